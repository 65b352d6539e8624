//! Finding or starting the process that fetches a snapshot's chunked memory.
//!
//! There is one a snapshot and state directory, found by its socket `pagers/<beginning of the
//! id>.sock`. Whoever looks for one holds a lock on that folder, and so does a pager that is about to
//! end (`ratoon_snapshot::pager`). A socket whose pager was killed is replaced, or swept.

use std::fs::{DirBuilder, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen};

/// So many digits of a snapshot's id name its socket.
const NAME_LEN: usize = 24;
/// Clones that may wait to be served.
const BACKLOG: i32 = 128;
/// How long a pager whose backlog is full may take to take one of them, and how long somebody may look for a
/// pager or end one. Only who was stopped takes so long.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often the folder's lock is tried.
const LOOK: Duration = Duration::from_millis(2);

/// Why a snapshot's memory cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum PagerError {
    /// The system does not let this user have faults served.
    #[error(
        "the snapshot's memory is compressed, which takes a userfaultfd that sees the kernel's own \
         accesses: let this user open /dev/userfaultfd, or run as root; snapshots without --compress \
         do not need it"
    )]
    NotPermitted(#[source] std::io::Error),
    /// Its socket.
    #[error("the pager's socket {}", path.display())]
    Socket {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Its process.
    #[error("starting {}", program.display())]
    Spawn {
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

fn socket() -> rustix::io::Result<OwnedFd> {
    rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
}

/// What is said of a process that was stopped.
fn hangs(what: &str, patience: Duration) -> std::io::Error {
    let text = format!(
        "{what} for {} s: let it go on (kill -CONT) or end it",
        patience.as_secs_f32()
    );
    std::io::Error::new(std::io::ErrorKind::TimedOut, text)
}

/// A connection to whoever listens there; `None` when nobody does.
fn call(path: &Path, patience: Duration) -> std::io::Result<Option<OwnedFd>> {
    let socket = socket()?;
    // unix(7): a connection to a full backlog waits as a send does.
    set_socket_timeout(&socket, Timeout::Send, Some(patience))?;
    match connect(&socket, &SocketAddrUnix::new(path)?) {
        Ok(()) => {
            set_socket_timeout(&socket, Timeout::Send, None)?;
            Ok(Some(socket))
        }
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(None),
        Err(Errno::AGAIN) => Err(hangs("`ratoon-pager` has taken no connection", patience)),
        Err(error) => Err(error.into()),
    }
}

/// Takes the lock on a folder, which is made if it is not there.
pub(crate) fn lock(folder: &Path, patience: Duration) -> std::io::Result<File> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)?;
    let lock = File::open(folder)?;
    let end = Instant::now() + patience;
    loop {
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(lock),
            Err(Errno::WOULDBLOCK) if Instant::now() < end => std::thread::sleep(LOOK),
            Err(Errno::WOULDBLOCK) => {
                return Err(hangs(
                    "another process has held the folder of helpers",
                    patience,
                ));
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// A connection to the pager of the snapshot in this folder, started if there is none, for one VM.
/// `program` is `ratoon-pager`; sockets are in `folder`.
///
/// # Errors
/// [`PagerError`].
pub(crate) fn of(folder: &Path, program: &Path, snapshot: &Path) -> Result<OwnedFd, PagerError> {
    ratoon_snapshot::pager::is_permitted().map_err(PagerError::NotPermitted)?;
    // The folder is called as the snapshot's id.
    let id = snapshot.file_name().unwrap_or_default().to_string_lossy();
    let name: String = id.chars().take(NAME_LEN).collect();
    let path = folder.join(name).with_extension("sock");
    let failed = |source: std::io::Error| PagerError::Socket {
        path: path.clone(),
        source,
    };
    let _lock = lock(folder, PATIENCE).map_err(failed)?;
    if let Some(socket) = call(&path, PATIENCE).map_err(failed)? {
        return Ok(socket);
    }
    let listener = listen_at(&path).map_err(failed)?;
    let spawned = Command::new(program)
        .arg(&path)
        .arg(snapshot)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(listener))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(source) => {
            let _ = std::fs::remove_file(&path);
            return Err(PagerError::Spawn {
                program: program.to_owned(),
                source,
            });
        }
    };
    // It may end long before this process: somebody has to take note, or it stays a zombie.
    let _ = std::thread::Builder::new()
        .name("pager".into())
        .spawn(move || child.wait());
    let gone = || failed(std::io::ErrorKind::ConnectionRefused.into());
    call(&path, PATIENCE).map_err(failed)?.ok_or_else(gone)
}

fn listen_at(path: &Path) -> std::io::Result<OwnedFd> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = socket()?;
    bind(&listener, &SocketAddrUnix::new(path)?)?;
    listen(&listener, BACKLOG)?;
    Ok(listener)
}

/// Removes the sockets that killed pagers left.
pub(crate) fn sweep(folder: &Path) {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return;
    };
    let sockets: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    if sockets.is_empty() {
        return;
    }
    // Trouble here is told to whoever wants to use the folder.
    let Ok(_lock) = lock(folder, PATIENCE) else {
        return;
    };
    for path in sockets {
        if let Ok(None) = call(&path, PATIENCE) {
            let _ = std::fs::remove_file(&path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(50);

    #[test]
    fn a_pager_that_takes_no_connection_is_not_waited_for_without_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pager.sock");
        assert!(call(&path, PATIENCE).unwrap().is_none());
        let listener = socket().unwrap();
        bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        listen(&listener, 1).unwrap();
        let mut waiting = Vec::new();
        let refused = loop {
            match call(&path, SHORT) {
                Ok(socket) => waiting.push(socket.expect("somebody listens")),
                Err(error) => break error,
            }
            assert!(waiting.len() < 10, "there is no end to its backlog");
        };
        assert!(!waiting.is_empty());
        assert_eq!(refused.kind(), std::io::ErrorKind::TimedOut);
        assert!(refused.to_string().contains("kill -CONT"), "{refused}");
        // When it goes, it is replaced.
        drop(listener);
        assert!(call(&path, PATIENCE).unwrap().is_none());
    }

    #[test]
    fn somebody_who_holds_the_folder_is_not_waited_for_without_end() {
        let temp = tempfile::tempdir().unwrap();
        let folder = temp.path().join("pagers");
        let held = lock(&folder, PATIENCE).unwrap();
        let refused = lock(&folder, SHORT).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::TimedOut);
        drop(held);
        lock(&folder, SHORT).unwrap();
    }
}
