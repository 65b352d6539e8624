//! Unix sockets that this process listens on: for their owner alone (mode 0600) unless other users
//! are configured, never in place of one that somebody else serves.

use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::UnixListener as StdListener;
use std::path::Path;

use rustix::fs::{Mode, chmod};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::UnixListener;

/// Who may connect to a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum For {
    /// Its owner (mode 0600).
    Owner,
    /// Whoever can reach its folder (mode 0666): who it is, is asked of each connection.
    Everyone,
}

/// Listens at `path`. A socket that a killed bridge left there is removed.
///
/// # Errors
/// When something else is there, or someone listens.
pub fn bind(path: &Path, who: For) -> io::Result<UnixListener> {
    if is_dead(path)? {
        std::fs::remove_file(path)?;
    }
    let listener = StdListener::bind(path)?;
    let owner = Mode::RUSR | Mode::WUSR;
    let mode = match who {
        For::Owner => owner,
        For::Everyone => owner | Mode::RGRP | Mode::WGRP | Mode::ROTH | Mode::WOTH,
    };
    chmod(path, mode)?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

/// Whether a socket is there at which nobody listens. Whoever listens and does not accept must not
/// hold us up, so this does not wait.
fn is_dead(path: &Path) -> io::Result<bool> {
    // An ordinary file refuses connections as well.
    if !std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
        return Ok(false);
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    let connected = connect(&socket, &SocketAddrUnix::new(path)?);
    Ok(connected == Err(Errno::CONNREFUSED))
}

/// Lets this process have as many descriptors as it may: each connection is one, each call two or
/// three.
///
/// # Errors
/// When the kernel refuses.
pub fn raise_descriptors() -> io::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limit.maximum,
            ..limit
        },
    )?;
    Ok(())
}

/// How many connections of guests there may be: as configured, but never more than half of the
/// descriptors; the others are for calls, records and listeners.
pub(crate) fn most_connections(configured: u32) -> usize {
    let all = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    (configured as usize).min(usize::try_from(all / 2).unwrap_or(usize::MAX))
}

/// Removes a socket of ours.
pub fn unlink(path: &Path) {
    if let Err(error) = std::fs::remove_file(path) {
        tracing::warn!("{} stays behind: {error}", path.display());
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[tokio::test]
    async fn a_left_socket_is_replaced_and_a_busy_one_never() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        for (who, mode) in [(For::Owner, 0o600), (For::Everyone, 0o666)] {
            drop(bind(&path, who).expect("a socket"));
            let found = std::fs::metadata(&path).expect("left behind");
            assert_eq!(found.permissions().mode() & 0o777, mode);
        }
        std::fs::remove_file(&path).expect("a file");
        let busy = socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .expect("a socket");
        let address = SocketAddrUnix::new(&path).expect("an address");
        rustix::net::bind(&busy, &address).expect("bound");
        rustix::net::listen(&busy, 0).expect("listening");
        // The second finds the queue of those who wait full.
        for _ in 0..3 {
            let error = bind(&path, For::Owner).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        }
        std::fs::write(folder.path().join("file"), b"").expect("a file");
        let error = bind(&folder.path().join("file"), For::Owner).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    }
}
