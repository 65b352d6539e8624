//! Where the bridge is, and the token that it wants.
//!
//! In a guest that is port 1025 of the host by vsock, and `/run/ratoon/token`, which the host replaces whenever the
//! machine wakes as somebody else. For tests `RATOON_BRIDGE` names another place (`unix:PATH` or `tcp:ADDRESS`)
//! and `RATOON_TOKEN_FILE` another file.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use ratoon_protocol::BRIDGE_PORT;
use rustix::event::PollFlags;
use rustix::io::Errno;

use crate::clock::{self, Moment};
use crate::stop::{Stop, Waited, wait};

const TOKEN_FILE: &str = "/run/ratoon/token";
const MAX_TOKEN_BYTES: usize = 256;
/// How long a connection may take to come about.
const CONNECT: Duration = Duration::from_secs(5);

/// The bridge.
#[derive(Debug, Clone)]
pub struct Bridge {
    place: Place,
    token_file: PathBuf,
}

#[derive(Debug, Clone)]
enum Place {
    Host,
    Unix(PathBuf),
    Tcp(SocketAddr),
}

/// Why nothing more comes or goes.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// The connection.
    #[error("the connection to the bridge broke: {0}")]
    Io(#[from] io::Error),
    /// The time.
    #[error("the bridge took too long")]
    Over,
    /// It is to end now.
    #[error("it was cancelled")]
    Stopped,
}

impl From<Errno> for Broken {
    fn from(errno: Errno) -> Self {
        Self::Io(errno.into())
    }
}

impl Bridge {
    /// As the environment says.
    pub fn of_environment() -> Result<Self, String> {
        let place = match std::env::var("RATOON_BRIDGE") {
            Err(_) => Place::Host,
            Ok(text) => match text.split_once(':') {
                Some(("unix", path)) => Place::Unix(path.into()),
                Some(("tcp", address)) => Place::Tcp(
                    address
                        .parse()
                        .map_err(|_| "RATOON_BRIDGE: an address has numbers alone")?,
                ),
                _ => return Err("RATOON_BRIDGE is neither unix:PATH nor tcp:ADDRESS".into()),
            },
        };
        let token_file = std::env::var_os("RATOON_TOKEN_FILE")
            .map_or_else(|| PathBuf::from(TOKEN_FILE), PathBuf::from);
        Ok(Self { place, token_file })
    }

    /// The token of this moment.
    pub fn token(&self) -> Result<String, String> {
        let name = self.token_file.display();
        let text = std::fs::read_to_string(&self.token_file)
            .map_err(|error| format!("{name}: {error}"))?;
        let token = text.trim();
        let plain = |byte: u8| byte.is_ascii_graphic();
        if token.is_empty() || token.len() > MAX_TOKEN_BYTES || !token.bytes().all(plain) {
            return Err(format!("{name} has no token"));
        }
        Ok(token.to_owned())
    }

    /// A connection.
    pub fn connect(&self, stop: &Stop) -> Result<Connection, Broken> {
        let fd: OwnedFd = match &self.place {
            Place::Host => ratoon_runtime::sys::vsock_connect_host(BRIDGE_PORT)?,
            Place::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_nonblocking(true)?;
                stream.into()
            }
            Place::Tcp(address) => {
                let stream = TcpStream::connect(address)?;
                stream.set_nodelay(true)?;
                stream.set_nonblocking(true)?;
                stream.into()
            }
        };
        let connection = Connection { fd };
        connection.ready(PollFlags::OUT, Some(clock::now() + CONNECT), stop)?;
        rustix::net::sockopt::socket_error(&connection.fd)??;
        Ok(connection)
    }
}

/// A connection to the bridge.
#[derive(Debug)]
pub struct Connection {
    fd: OwnedFd,
}

impl Connection {
    /// Nothing more will be sent.
    pub fn ends_here(&self) {
        // A connection that is gone needs no end.
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Write);
    }

    fn ready(&self, flags: PollFlags, until: Option<Moment>, stop: &Stop) -> Result<(), Broken> {
        match wait(&[(self.fd.as_fd(), flags)], until, stop)? {
            Waited::Ready(_) => Ok(()),
            Waited::Over => Err(Broken::Over),
            Waited::Stopped => Err(Broken::Stopped),
        }
    }

    /// Sends all of it.
    pub fn send(&self, mut bytes: &[u8], until: Option<Moment>, stop: &Stop) -> Result<(), Broken> {
        while !bytes.is_empty() {
            match rustix::net::send(&self.fd, bytes, rustix::net::SendFlags::NOSIGNAL) {
                Ok(sent) => bytes = &bytes[sent..],
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.ready(PollFlags::OUT, until, stop)?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Takes what is there, and waits for the first byte; 0 is the end.
    pub fn receive(
        &self,
        into: &mut [u8],
        until: Option<Moment>,
        stop: &Stop,
    ) -> Result<usize, Broken> {
        loop {
            self.ready(PollFlags::IN, until, stop)?;
            match rustix::io::read(&self.fd, &mut *into) {
                Ok(read) => return Ok(read),
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}
