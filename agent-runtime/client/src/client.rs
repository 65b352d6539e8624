//! The async client: handles to a driver task that owns the socket.
//!
//! Output is acknowledged when it has been read by the user, so that a slow reader holds the guest's
//! program up and no more than a window (256 KiB) for each stream waits here. How it fails: a
//! connection that fails ends every open call with [`RuntimeError::Closed`] (the first to hear gets
//! the reason); later calls get [`RuntimeError::Broken`].

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ratoon_protocol::{Call, Hello, Pong, RUNTIME_PORT};
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::RuntimeError;
use crate::blocking::link;
use crate::driver::{Driver, WayBack, Wish};
use crate::running::Running;
use crate::state::State;

/// A connection to the runtime of one guest; cheap to clone. It closes when the last clone and the
/// last stream are dropped, and the runtime then ends what was begun over it, but for processes that
/// are to be kept.
#[derive(Clone)]
pub struct Client {
    wishes: mpsc::UnboundedSender<Wish>,
    hello: Arc<Hello>,
}

impl Client {
    /// Makes a connection through a VM's vsock socket; `timeout` is for all of it.
    ///
    /// # Errors
    /// [`RuntimeError::Connect`], [`RuntimeError::NotListening`], and as [`Client::from_stream`].
    pub async fn connect(vsock_socket: &Path, timeout: Duration) -> Result<Self, RuntimeError> {
        let start = Instant::now();
        let stream = join(vsock_socket.to_owned(), timeout).await?;
        Self::from_stream(stream, timeout.saturating_sub(start.elapsed())).await
    }

    /// Takes a connection to the runtime (one that is joined to its port already, or to
    /// `ratoon-runtime --serve-unix`) and waits for its HELLO.
    ///
    /// # Errors
    /// [`RuntimeError::Timeout`] when no HELLO comes, and all others about the connection.
    pub async fn from_stream(stream: UnixStream, timeout: Duration) -> Result<Self, RuntimeError> {
        Self::start(State::new(), stream, timeout, None).await
    }

    /// As [`Client::connect`], and a connection that is lost is made again: see
    /// [`Client::resumable`].
    ///
    /// # Errors
    /// As [`Client::resumable`].
    pub async fn connect_resumable(
        vsock_socket: &Path,
        timeout: Duration,
        linger: Duration,
    ) -> Result<Self, RuntimeError> {
        let path = vsock_socket.to_owned();
        Self::resumable(move || join(path.clone(), timeout), timeout, linger).await
    }

    /// A client whose calls outlive its connection: when that is lost, `dial` makes another, and all
    /// goes on where it broke off. No byte is lost or comes twice, nothing is run twice.
    ///
    /// `dial` makes a connection that is joined to the runtime's port. `timeout` is for HELLO and
    /// the session's name, on each connection. `linger` is how long the runtime keeps the session
    /// without a connection, and how long this side tries (at most a day). When the last handle is
    /// dropped the session is ended; should the connection be lost just then, the runtime waits so long
    /// before it ends what was begun.
    ///
    /// # Errors
    /// Those of `dial`'s first connection, and as [`Client::from_stream`]. Later, calls fail with
    /// [`RuntimeError::Timeout`] when nothing could be taken up within `linger`, and with
    /// [`RuntimeError::Violation`] when the runtime no longer knows the session.
    pub async fn resumable<D, F>(
        mut dial: D,
        timeout: Duration,
        linger: Duration,
    ) -> Result<Self, RuntimeError>
    where
        D: FnMut() -> F + Send + 'static,
        F: Future<Output = Result<UnixStream, RuntimeError>> + Send + 'static,
    {
        let linger_ms = u64::try_from(linger.as_millis()).unwrap_or(u64::MAX);
        let state = State::named(unguessable()?, Some(linger_ms))?;
        let stream = dial().await?;
        let back = WayBack {
            dial: Box::new(move || Box::pin(dial())),
            linger,
        };
        Self::start(state, stream, timeout, Some(back)).await
    }

    async fn start(
        state: State,
        stream: UnixStream,
        timeout: Duration,
        back: Option<WayBack>,
    ) -> Result<Self, RuntimeError> {
        let (wishes, heard) = mpsc::unbounded_channel();
        let (greet, greeted) = oneshot::channel();
        let driver = Driver::new(state, wishes.downgrade(), greet, timeout);
        tokio::spawn(driver.run(stream, heard, back));
        // The driver has the deadline.
        let hello = greeted.await.map_err(|_| RuntimeError::Closed)??;
        let hello = Arc::new(hello);
        Ok(Self { wishes, hello })
    }

    /// What the runtime said of itself, on the first connection.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// Begins a call with streams.
    ///
    /// # Errors
    /// [`RuntimeError::TooLarge`], [`RuntimeError::Broken`].
    pub async fn begin(&self, call: Call) -> Result<Running, RuntimeError> {
        let (tell, told) = oneshot::channel();
        let sent = self.wishes.send(Wish::Call(call, tell));
        sent.map_err(|_| RuntimeError::Broken)?;
        told.await.map_err(|_| RuntimeError::Broken)?
    }

    /// A call without streams. It has no deadline of its own: `tokio::time::timeout` gives it one.
    ///
    /// # Errors
    /// As [`Client::begin`] and [`Running::result`].
    pub async fn call<T: DeserializeOwned>(&self, call: Call) -> Result<T, RuntimeError> {
        self.begin(call).await?.result().await
    }

    /// Asks whether the runtime answers.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub async fn ping(&self) -> Result<Pong, RuntimeError> {
        self.call(Call::Ping).await
    }
}

/// A connection through a VM's vsock socket to the runtime's port.
async fn join(vsock_socket: PathBuf, timeout: Duration) -> Result<UnixStream, RuntimeError> {
    let connect = UnixStream::connect(&vsock_socket).await;
    let connected = connect.and_then(UnixStream::into_std);
    let mut stream = connected.map_err(|source| RuntimeError::Connect {
        path: vsock_socket,
        source,
    })?;
    let joining = tokio::task::spawn_blocking(move || {
        stream.set_nonblocking(false).map_err(RuntimeError::Io)?;
        link::handshake(&mut stream, RUNTIME_PORT, timeout)?;
        stream.set_nonblocking(true).map_err(RuntimeError::Io)?;
        Ok(stream)
    });
    let joined = joining.await;
    let stream = joined.map_err(|error| RuntimeError::Io(error.into()))??;
    UnixStream::from_std(stream).map_err(RuntimeError::Io)
}

/// A session's name: 128 random bits in hexadecimal.
fn unguessable() -> Result<String, RuntimeError> {
    let mut bits = [0; 16];
    let flags = rustix::rand::GetRandomFlags::empty();
    // So few are given whole or not at all (getrandom(2)).
    rustix::rand::getrandom(&mut bits, flags).map_err(|error| RuntimeError::Io(error.into()))?;
    Ok(format!("{:032x}", u128::from_ne_bytes(bits)))
}

#[cfg(test)]
#[path = "client_tests.rs"]
mod tests;
