//! The socket below the client: non-blocking, every wait bounded by a deadline or a wake-up.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use crate::RuntimeError;
use crate::state::{Happening, State};

/// How much is read at once.
const READ_LEN: usize = 64 * 1024;

/// A connection and the protocol's state on it.
pub(super) struct Link {
    stream: UnixStream,
    pub(super) state: State,
    scratch: Vec<u8>,
    /// The other side takes nothing any more; what it still sent is read before we say so.
    deaf: bool,
}

/// What a wait has brought, beside happenings.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Ready {
    /// The wake-up descriptor is readable.
    pub(super) woken: bool,
    /// The input descriptor is readable, at its end or broken.
    pub(super) input: bool,
}

/// A descriptor that ends waits; see [`Link::wait`].
pub(super) fn wake_up() -> Result<OwnedFd, RuntimeError> {
    let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
    eventfd(0, flags).map_err(|error| RuntimeError::Io(error.into()))
}

impl Link {
    pub(super) fn new(stream: UnixStream, state: State) -> Result<Self, RuntimeError> {
        stream.set_nonblocking(true).map_err(RuntimeError::Io)?;
        Ok(Self {
            stream,
            state,
            scratch: vec![0; READ_LEN],
            deaf: false,
        })
    }

    /// Sends what waits and waits until something comes: from the guest (appended to
    /// `happenings`), or on one of the two descriptors. Returns at `deadline` too, with nothing.
    pub(super) fn wait(
        &mut self,
        deadline: Option<Instant>,
        wake: Option<BorrowedFd<'_>>,
        input: Option<BorrowedFd<'_>>,
        happenings: &mut Vec<Happening>,
    ) -> Result<Ready, RuntimeError> {
        self.flush()?;
        let mut events = PollFlags::IN;
        if !self.state.unsent().is_empty() && !self.deaf {
            events |= PollFlags::OUT;
        }
        let mut fds = Vec::with_capacity(3);
        fds.push(PollFd::from_borrowed_fd(self.stream.as_fd(), events));
        for fd in [wake, input].into_iter().flatten() {
            fds.push(PollFd::from_borrowed_fd(fd, PollFlags::IN));
        }
        let timeout = deadline.map(|at| timespec(at.saturating_duration_since(Instant::now())));
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(Ready::default()),
            Err(error) => return Err(RuntimeError::Io(error.into())),
        }
        let is_ready = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
        let ready = Ready {
            woken: wake.is_some() && is_ready(1),
            input: input.is_some() && is_ready(1 + usize::from(wake.is_some())),
        };
        let readable = PollFlags::IN | PollFlags::HUP | PollFlags::ERR;
        if fds[0].revents().intersects(readable) {
            self.receive(happenings)?;
        }
        Ok(ready)
    }

    fn receive(&mut self, happenings: &mut Vec<Happening>) -> Result<(), RuntimeError> {
        match rustix::net::recv(&self.stream, &mut self.scratch[..], RecvFlags::DONTWAIT) {
            Ok((0, _)) | Err(Errno::CONNRESET) => Err(RuntimeError::Closed),
            Ok((len, _)) => self.state.receive(&self.scratch[..len], happenings),
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(error) => Err(RuntimeError::Io(error.into())),
        }
    }

    fn flush(&mut self) -> Result<(), RuntimeError> {
        while !self.deaf && !self.state.unsent().is_empty() {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match rustix::net::send(&self.stream, self.state.unsent(), flags) {
                Ok(len) => self.state.sent(len),
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => self.deaf = true,
                Err(error) => return Err(RuntimeError::Io(error.into())),
            }
        }
        Ok(())
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: duration.subsec_nanos().into(),
    }
}

/// Asks the VMM (hybrid vsock) to join a connection to `port` of the guest: `CONNECT <port>\n`,
/// answered by `OK <number>\n`. The number is the host's port of the connection.
pub(crate) fn handshake(
    stream: &mut UnixStream,
    port: u32,
    timeout: Duration,
) -> Result<u32, RuntimeError> {
    use io::{Read, Write};
    /// "OK " and a u32.
    const LONGEST: usize = 16;
    let deadline = Instant::now() + timeout;
    let late = || RuntimeError::Timeout {
        what: "taken the connection",
        within: timeout,
    };
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => late(),
        // The VMM closes what it cannot join.
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
            RuntimeError::NotListening { port }
        }
        _ => RuntimeError::Io(error),
    };
    let limit = |stream: &UnixStream| {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(late());
        }
        stream
            .set_write_timeout(Some(left))
            .map_err(RuntimeError::Io)?;
        stream
            .set_read_timeout(Some(left))
            .map_err(RuntimeError::Io)
    };
    limit(stream)?;
    stream
        .write_all(format!("CONNECT {port}\n").as_bytes())
        .map_err(failed)?;
    let mut line = Vec::new();
    loop {
        limit(stream)?;
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(0) => return Err(RuntimeError::NotListening { port }),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(failed(error)),
        }
        if byte == [b'\n'] {
            break;
        }
        line.push(byte[0]);
        if line.len() > LONGEST {
            return Err(not_ok(&line));
        }
    }
    let number = line
        .strip_prefix(b"OK ")
        .filter(|number| number.iter().all(u8::is_ascii_digit))
        .and_then(|number| std::str::from_utf8(number).ok()?.parse().ok());
    number.ok_or_else(|| not_ok(&line))
}

fn not_ok(line: &[u8]) -> RuntimeError {
    let shown = line.escape_ascii();
    RuntimeError::Violation(format!("CONNECT was answered with \"{shown}\""))
}
