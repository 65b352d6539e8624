//! The runtime's connection to a VM that starts: waited for, or made.
//!
//! A runtime that has booted connects by itself, and says HELLO. Of a machine that was frozen the VMM joins the
//! connection that went on, and nothing is said on it. A generation without such a connection is called.
//!
//! How it fails: the VM has ended, the time is over, or the caller wants no more of it.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use ratoon_client::RuntimeError;
use ratoon_client::blocking::dial;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::end::EndCause;
use super::launch::LaunchError;
use super::process::{ProcessHandle, timespec};
use super::record::VmDir;
use super::serial::last_lines;

/// How many of the serial console's last lines an error carries.
const SERIAL_LINES: usize = 12;
/// How long a VMM whose connection broke may take to be gone, if it ends.
const END_PATIENCE: Duration = Duration::from_secs(2);
/// How often the wait for a VMM's socket looks: it takes a few milliseconds.
const LOOK: Duration = Duration::from_millis(1);

/// Connects to the runtime of a machine that was frozen, as soon as its VMM has made the socket.
pub(super) fn call_runtime(
    vmm: &ProcessHandle,
    dir: &VmDir,
    timeout: Duration,
    cancel: Option<BorrowedFd<'_>>,
) -> Result<UnixStream, LaunchError> {
    let end = Instant::now() + timeout;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let socket = dir.vsock_socket();
        match dial(&socket, ratoon_protocol::RUNTIME_PORT, left) {
            Ok(stream) => return Ok(stream),
            Err(RuntimeError::Connect { .. }) if !left.is_zero() => {}
            Err(RuntimeError::Timeout { .. } | RuntimeError::Connect { .. }) => {
                return Err(LaunchError::Timeout {
                    after: timeout,
                    serial: last_lines(&dir.serial_log(), SERIAL_LINES),
                });
            }
            // A VMM that ends closes its sockets before it is gone.
            Err(source) if !vmm.wait(END_PATIENCE).unwrap_or(false) => {
                return Err(LaunchError::Runtime { source });
            }
            Err(_) => return Err(ended(dir)),
        }
        let mut fds = vec![PollFd::new(vmm.fd(), PollFlags::IN)];
        fds.extend(cancel.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        if poll(&mut fds, Some(&timespec(LOOK))).is_ok_and(|ready| ready > 0) {
            return Err(match fds[0].revents().is_empty() {
                true => LaunchError::Cancelled,
                false => ended(dir),
            });
        }
    }
}

/// What a connection of the runtime must have shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Until {
    /// Nothing: it is one that went on.
    Accepted,
    /// Its first frame.
    Data,
}

/// Waits for the runtime's connection.
pub(super) fn wait_ready(
    listener: &UnixListener,
    vmm: &ProcessHandle,
    dir: &VmDir,
    timeout: Duration,
    cancel: Option<BorrowedFd<'_>>,
    until: Until,
) -> Result<UnixStream, LaunchError> {
    let end = Instant::now() + timeout;
    let mut stream: Option<UnixStream> = None;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let guest = stream.as_ref().map_or(listener.as_fd(), AsFd::as_fd);
        let mut fds = vec![
            PollFd::new(vmm.fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(guest, PollFlags::IN),
        ];
        fds.extend(cancel.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        match poll(&mut fds, Some(&timespec(left))) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                return Err(LaunchError::System {
                    action: "waiting for the runtime",
                    id: dir.id(),
                    source: error.into(),
                });
            }
        }
        let is_set = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
        let (vmm_ended, guest_moved, cancelled) = (is_set(0), is_set(1), is_set(2));
        if cancelled {
            return Err(LaunchError::Cancelled);
        }
        if vmm_ended {
            return Err(ended(dir));
        }
        if guest_moved {
            stream = match stream.take() {
                None => match accept(listener) {
                    Some(stream) if until == Until::Accepted => return Ok(stream),
                    accepted => accepted,
                },
                Some(stream) if has_data(&stream) => return Ok(stream),
                // Hung up without a word: the next connection may be the runtime's.
                Some(_) => None,
            };
        } else if left.is_zero() {
            return Err(LaunchError::Timeout {
                after: timeout,
                serial: last_lines(&dir.serial_log(), SERIAL_LINES),
            });
        }
    }
}

fn accept(listener: &UnixListener) -> Option<UnixStream> {
    let (stream, _) = listener.accept().ok()?;
    // On Linux the accepted socket is blocking whatever the listener is.
    Some(stream)
}

fn has_data(stream: &UnixStream) -> bool {
    use rustix::net::{RecvFlags, recv};
    let mut byte = [0];
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    match recv(stream, &mut byte[..], flags) {
        Ok((len, _)) => len > 0,
        Err(Errno::AGAIN | Errno::INTR) => true,
        Err(_) => false,
    }
}

/// The VM has ended by itself.
pub(super) fn ended(dir: &VmDir) -> LaunchError {
    LaunchError::Ended {
        serial: last_lines(&dir.serial_log(), SERIAL_LINES),
        source: EndCause::of(dir),
    }
}
