//! The host's side: the listening socket, handshakes, and one epoll over all streams, which is the
//! descriptor that the event loop watches.

use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SocketAddrUnix, SocketFlags, SocketType};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use super::connection::would_block;

/// How long a host program may take to send its line.
pub(super) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest line: "CONNECT 4294967295\r\n".
const LINE_MAX: usize = 20;

const LISTENER: u64 = 0;
const TIMER: u64 = 1;
/// Host programs that wait to be accepted, at most.
const BACKLOG: i32 = 128;
/// Events looked at in one round.
const EVENTS: usize = 64;
/// Tokens of streams begin here.
const FIRST_STREAM: u64 = 2;

/// Why the socket device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The Unix socket.
    #[error("cannot make the Unix socket {}; does its directory exist, is the path below 108 bytes?", path.display())]
    Bind {
        /// Its path.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// Somebody listens there.
    #[error("the Unix socket {} is in use; stop the VM that has it, or choose another path", path.display())]
    InUse {
        /// Its path.
        path: PathBuf,
    },
    /// Something else lies there.
    #[error("{} is not a socket and is not replaced; remove it, or choose another path", path.display())]
    NotASocket {
        /// Its path.
        path: PathBuf,
    },
    /// epoll, timerfd.
    #[error("the system refuses {what}")]
    System {
        /// What was asked for.
        what: &'static str,
        /// The system's word.
        #[source]
        source: io::Error,
    },
}

/// What the epoll saw.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seen {
    pub(super) token: u64,
    pub(super) flags: EventFlags,
}

/// A host program that has not said yet where it wants to go.
#[derive(Debug)]
pub(super) struct Handshake {
    pub(super) stream: UnixStream,
    pub(super) deadline: Instant,
}

/// What the listener had.
pub(super) enum Accepted {
    /// Nobody waits.
    None,
    /// One too many, let go at once.
    TurnedAway,
    /// A handshake has begun.
    Handshake(u64),
}

/// What became of a handshake.
pub(super) enum Step {
    /// The line is not whole.
    Wait,
    /// It wants to reach this port of the guest.
    Connect(u32),
    /// It went away or sent something else.
    Drop,
}

/// Listener, epoll, timer and handshakes.
#[derive(Debug)]
pub(super) struct Streams {
    listener: UnixListener,
    /// `<path>_<port>` is where the guest's connections go.
    path: PathBuf,
    /// Held for its Drop.
    _bound: Option<Bound>,
    epoll: OwnedFd,
    timer: OwnedFd,
    ticking: bool,
    next_token: u64,
    pub(super) handshakes: HashMap<u64, Handshake>,
}

impl Streams {
    /// Binds `path`, mode 0600, until this is dropped. A socket that nobody listens on any more is
    /// replaced.
    pub(super) fn new(path: &Path) -> Result<Self, VsockError> {
        let (listener, bound) = bind(path)?;
        Self::around(listener, path, Some(bound))
    }

    /// With a listener that somebody else bound, and unlinks.
    pub(super) fn with_listener(listener: UnixListener, path: &Path) -> Result<Self, VsockError> {
        listener
            .set_nonblocking(true)
            .map_err(|source| VsockError::System {
                what: "a listener that does not block",
                source,
            })?;
        Self::around(listener, path, None)
    }

    fn around(
        listener: UnixListener,
        path: &Path,
        bound: Option<Bound>,
    ) -> Result<Self, VsockError> {
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(system("an epoll"))?;
        let timer = timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
        )
        .map_err(system("a timer"))?;
        // Edge-triggered: a listener that cannot be served, for want of descriptors, must not keep
        // the event loop awake.
        let add = |fd: BorrowedFd<'_>, token| {
            let flags = EventFlags::IN | EventFlags::ET;
            epoll::add(&epoll, fd, EventData::new_u64(token), flags)
                .map_err(system("an epoll entry"))
        };
        add(listener.as_fd(), LISTENER)?;
        add(timer.as_fd(), TIMER)?;
        Ok(Self {
            listener,
            path: path.to_owned(),
            _bound: bound,
            epoll,
            timer,
            ticking: false,
            next_token: FIRST_STREAM,
            handshakes: HashMap::new(),
        })
    }

    /// The descriptor that is readable when any of this is.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// What happened; empty when nothing has.
    pub(super) fn wait(&self) -> Vec<Seen> {
        let no_wait = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let mut events = [MaybeUninit::uninit(); EVENTS];
        loop {
            return match epoll::wait(&self.epoll, &mut events, Some(&no_wait)) {
                Ok((events, _)) => events
                    .iter()
                    .map(|event| Seen {
                        token: event.data.u64(),
                        flags: event.flags,
                    })
                    .collect(),
                // "Nothing" would be a lost wake-up.
                Err(Errno::INTR) => continue,
                // Not with an epoll and a buffer that are ours.
                Err(_) => Vec::new(),
            };
        }
    }

    /// Watches a stream, edge-triggered; gives its token.
    pub(super) fn watch(&mut self, stream: &UnixStream) -> io::Result<u64> {
        let token = self.next_token;
        self.next_token += 1;
        epoll::add(
            &self.epoll,
            stream,
            EventData::new_u64(token),
            EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET,
        )?;
        Ok(token)
    }

    /// Whether `token` is the listener's.
    pub(super) fn is_listener(token: u64) -> bool {
        token == LISTENER
    }

    /// Whether `token` is the timer's; it is then read.
    pub(super) fn is_timer(&self, token: u64) -> bool {
        if token != TIMER {
            return false;
        }
        let mut ticks = [0; 8];
        let _ = rustix::io::read(&self.timer, &mut ticks);
        true
    }

    /// Lets the timer tick once a second, or stops it.
    pub(super) fn tick(&mut self, wanted: bool) {
        if wanted == self.ticking {
            return;
        }
        let second = Timespec {
            tv_sec: i64::from(wanted),
            tv_nsec: 0,
        };
        let spec = Itimerspec {
            it_interval: second,
            it_value: second,
        };
        match timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &spec) {
            Ok(_) => self.ticking = wanted,
            Err(error) => tracing::warn!(%error, "vsock timer"),
        }
    }

    /// Whether the timer runs.
    #[cfg(test)]
    pub(super) fn is_ticking(&self) -> bool {
        self.ticking
    }

    /// The next waiting host program.
    pub(super) fn accept(&mut self, room: bool) -> io::Result<Accepted> {
        loop {
            return match self.listener.accept() {
                Ok(_) if !room => Ok(Accepted::TurnedAway),
                Ok((stream, _)) => {
                    stream.set_nonblocking(true)?;
                    let token = self.watch(&stream)?;
                    let deadline = Instant::now() + HANDSHAKE_TIMEOUT;
                    self.handshakes
                        .insert(token, Handshake { stream, deadline });
                    self.tick(true);
                    Ok(Accepted::Handshake(token))
                }
                Err(error) if would_block(&error) => Ok(Accepted::None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => Err(error),
            };
        }
    }

    /// Looks at a handshake's line. Exactly the line is taken from the stream: what follows is the
    /// connection's first data.
    pub(super) fn step(&self, token: u64) -> Step {
        let Some(handshake) = self.handshakes.get(&token) else {
            return Step::Drop;
        };
        let mut line = [0; LINE_MAX];
        let peeked = match rustix::net::recv(
            &handshake.stream,
            &mut line[..],
            RecvFlags::PEEK | RecvFlags::DONTWAIT,
        ) {
            Ok((_, 0)) => return Step::Drop,
            Ok((_, len)) => &line[..len.min(LINE_MAX)],
            Err(Errno::AGAIN | Errno::INTR) => return Step::Wait,
            Err(_) => return Step::Drop,
        };
        let Some(end) = peeked.iter().position(|byte| *byte == b'\n') else {
            return if peeked.len() == LINE_MAX {
                Step::Drop
            } else {
                Step::Wait
            };
        };
        let port = parse_line(&peeked[..end]);
        let mut taken = [0; LINE_MAX];
        match (
            port,
            rustix::net::recv(&handshake.stream, &mut taken[..=end], RecvFlags::DONTWAIT),
        ) {
            (Some(port), Ok((_, len))) if len == end + 1 => Step::Connect(port),
            _ => Step::Drop,
        }
    }

    /// Connects to the host program that listens for the guest's connections to `port`.
    pub(super) fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = self.path.as_os_str().to_owned();
        path.push(format!("_{port}"));
        let address = SocketAddrUnix::new(Path::new(&path))?;
        let socket = unix_socket()?;
        rustix::net::connect(&socket, &address)?;
        Ok(UnixStream::from(socket))
    }
}

/// A socket's file, which goes with the device.
#[derive(Debug)]
struct Bound(PathBuf);

impl Drop for Bound {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn system(what: &'static str) -> impl Fn(Errno) -> VsockError {
    move |errno| VsockError::System {
        what,
        source: errno.into(),
    }
}

/// The port in `CONNECT <port>`.
fn parse_line(line: &[u8]) -> Option<u32> {
    let line = std::str::from_utf8(line).ok()?;
    let port = line
        .strip_suffix('\r')
        .unwrap_or(line)
        .strip_prefix("CONNECT ")?;
    let digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| port.parse().ok())?
}

fn bind(path: &Path) -> Result<(UnixListener, Bound), VsockError> {
    let error = |source: io::Error| VsockError::Bind {
        path: path.to_owned(),
        source,
    };
    let address = SocketAddrUnix::new(path).map_err(|errno| error(errno.into()))?;
    let socket = unix_socket().map_err(|errno| error(errno.into()))?;
    // The file is born with this mode: there is no moment in which others can connect.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(|errno| error(errno.into()))?;
    match rustix::net::bind(&socket, &address) {
        Err(Errno::ADDRINUSE) => {
            remove_stale(path, &address)?;
            rustix::net::bind(&socket, &address)
        }
        other => other,
    }
    .map_err(|errno| error(errno.into()))?;
    let bound = Bound(path.to_owned());
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o600)).map_err(error)?;
    rustix::net::listen(&socket, BACKLOG).map_err(|errno| error(errno.into()))?;
    Ok((UnixListener::from(socket), bound))
}

/// Removes a socket that nobody listens on; anything else is an error.
fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<(), VsockError> {
    let error = |source: io::Error| VsockError::Bind {
        path: path.to_owned(),
        source,
    };
    // Connecting to a plain file is refused too.
    let kind = std::fs::symlink_metadata(path).map_err(error)?.file_type();
    if !kind.is_socket() {
        return Err(VsockError::NotASocket {
            path: path.to_owned(),
        });
    }
    let probe = unix_socket().map_err(|errno| error(errno.into()))?;
    match rustix::net::connect(&probe, address) {
        Err(Errno::CONNREFUSED) => std::fs::remove_file(path).map_err(error),
        // Connected, or so busy that it has no room for one more.
        _ => Err(VsockError::InUse {
            path: path.to_owned(),
        }),
    }
}

fn unix_socket() -> rustix::io::Result<OwnedFd> {
    rustix::net::socket_with(
        rustix::net::AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
        None,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_names_a_port_or_is_refused() {
        assert_eq!(parse_line(b"CONNECT 1024"), Some(1024));
        assert_eq!(parse_line(b"CONNECT 4294967295\r"), Some(u32::MAX));
        for wrong in [
            "CONNECT",
            "CONNECT ",
            "CONNECT -1",
            "CONNECT +1",
            "CONNECT 4294967296",
            "connect 1",
            "GET / HTTP/1.1",
            "CONNECT 1 2",
        ] {
            assert_eq!(parse_line(wrong.as_bytes()), None, "{wrong}");
        }
    }

    #[test]
    fn a_live_socket_is_not_taken_and_a_dead_one_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let first = Streams::new(&path).unwrap();
        let first_mode = std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        assert!(matches!(Streams::new(&path), Err(VsockError::InUse { .. })));
        drop(first);
        assert!(!path.exists());
        assert_eq!(first_mode, 0o600);
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        Streams::new(&path).unwrap();
    }
}
