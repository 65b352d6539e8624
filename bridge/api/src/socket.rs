//! Unix sockets to listen at: for their owner alone (mode 0600), never in place of one that somebody serves.

use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::fs::{Mode, chmod};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

/// Listens at `path`. A socket at which nobody listens any more is replaced.
///
/// # Errors
/// When something else is there, or someone listens.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    if is_dead(path)? {
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    chmod(path, Mode::RUSR | Mode::WUSR)?;
    Ok(listener)
}

/// Lets every user connect who can reach the folder: who it is, is asked of each connection.
///
/// # Errors
/// When it is not this user's.
pub fn open_to_all(path: &Path) -> io::Result<()> {
    Ok(chmod(path, Mode::from_raw_mode(0o666))?)
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_left_socket_is_replaced_and_a_busy_one_never() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        let mode = || {
            let found = std::fs::metadata(&path).expect("left behind");
            found.permissions().mode() & 0o777
        };
        for _ in 0..2 {
            drop(bind(&path).expect("a socket"));
            assert_eq!(mode(), 0o600);
        }
        open_to_all(&path).expect("it is ours");
        assert_eq!(mode(), 0o666);
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
            let error = bind(&path).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        }
        std::fs::write(folder.path().join("file"), b"").expect("a file");
        let error = bind(&folder.path().join("file")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    }
}
