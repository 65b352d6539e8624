//! Unix sockets that this process listens on: for their owner alone (mode 0600), never in place of
//! one that somebody else serves.

use std::io;
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdStream};
use std::path::Path;

use rustix::fs::{Mode, chmod};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::UnixListener;

/// Listens at `path`. A socket that a killed bridge left there is removed.
///
/// # Errors
/// When something else is there, or someone listens.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    if let Err(error) = StdStream::connect(path)
        && error.kind() == io::ErrorKind::ConnectionRefused
    {
        std::fs::remove_file(path)?;
    }
    let listener = StdListener::bind(path)?;
    chmod(path, Mode::RUSR | Mode::WUSR)?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
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
