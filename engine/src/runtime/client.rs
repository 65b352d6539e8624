//! The blocking client: one connection, one call at a time.

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ratoon_protocol::{
    Call, ErrorCode, ExecParams, ExitStatus, Hello, MAX_PAYLOAD_LEN, Pong, RUNTIME_PORT,
    SignalParams,
};
use rustix::io::Errno;

use super::RuntimeError;
use super::link::{self, Link};
use super::state::{Happening, Output};

/// Where a command's streams go.
pub struct ExecIo<'a> {
    /// Forwarded to the command as it becomes readable; `None`: the command reads /dev/null.
    /// A descriptor and not a reader, so that the call's end need not wait for a blocked read.
    pub stdin: Option<BorrowedFd<'a>>,
    /// Takes standard output. A writer that fails with `BrokenPipe` closes the command's output;
    /// one that blocks holds the command up.
    pub stdout: &'a mut dyn Write,
    /// Takes standard error, likewise.
    pub stderr: &'a mut dyn Write,
}

/// Reaches a call that runs, from another thread or a signal handler's thread.
#[derive(Debug, Clone)]
pub struct Controller(Arc<Wishes>);

#[derive(Debug)]
struct Wishes {
    wake: OwnedFd,
    list: Mutex<WishList>,
}

#[derive(Debug, Default)]
struct WishList {
    signals: Vec<i32>,
    cancelled: bool,
}

/// More signals than these, sent and not yet fetched, are dropped.
const SIGNALS_LIMIT: usize = 64;

impl Controller {
    /// Sends a signal (1 to 64) to the process group of the command that runs, or of the next one.
    pub fn signal(&self, signal: i32) {
        self.wish(|list| {
            if list.signals.len() < SIGNALS_LIMIT {
                list.signals.push(signal);
            }
        });
    }

    /// Ends the client's current wait, or its next, with [`RuntimeError::Cancelled`]. The runtime
    /// kills the command when the client is dropped.
    pub fn cancel(&self) {
        self.wish(|list| list.cancelled = true);
    }

    fn wish(&self, change: impl FnOnce(&mut WishList)) {
        change(&mut self.0.list.lock().unwrap_or_else(PoisonError::into_inner));
        // It cannot fail but by overflow, and then it is readable anyway.
        let _ = rustix::io::write(&self.0.wake, &1u64.to_ne_bytes());
    }

    fn fetch(&self) -> Result<Vec<i32>, RuntimeError> {
        let _ = rustix::io::read(&self.0.wake, &mut [0; 8]);
        let mut list = self.0.list.lock().unwrap_or_else(PoisonError::into_inner);
        match list.cancelled {
            true => Err(RuntimeError::Cancelled),
            false => Ok(std::mem::take(&mut list.signals)),
        }
    }
}

/// A connection to the runtime of one guest. See the module.
pub struct RuntimeClient {
    link: Link,
    hello: Hello,
    controller: Controller,
    broken: bool,
}

impl RuntimeClient {
    /// Takes a connection that the runtime has made (its standing one), or one that is joined to
    /// the runtime's port; waits for its HELLO.
    ///
    /// # Errors
    /// [`RuntimeError::Timeout`] when no HELLO comes, and all others about the connection.
    pub fn from_stream(stream: UnixStream, timeout: Duration) -> Result<Self, RuntimeError> {
        let mut link = Link::new(stream)?;
        let deadline = Instant::now() + timeout;
        let mut happenings = Vec::new();
        let hello = loop {
            if let Some(Happening::Hello(hello)) = happenings.pop() {
                break hello;
            }
            if Instant::now() >= deadline {
                return Err(RuntimeError::Timeout {
                    what: "said HELLO",
                    within: timeout,
                });
            }
            link.wait(Some(deadline), None, None, &mut happenings)?;
        };
        let controller = Controller(Arc::new(Wishes {
            wake: link::wake_up()?,
            list: Mutex::default(),
        }));
        Ok(Self {
            link,
            hello,
            controller,
            broken: false,
        })
    }

    /// Makes a new connection through a VM's vsock socket.
    ///
    /// # Errors
    /// [`RuntimeError::Connect`], [`RuntimeError::NotListening`], and as
    /// [`RuntimeClient::from_stream`].
    pub fn connect(vsock_socket: &Path, timeout: Duration) -> Result<Self, RuntimeError> {
        let mut stream =
            UnixStream::connect(vsock_socket).map_err(|source| RuntimeError::Connect {
                path: vsock_socket.to_owned(),
                source,
            })?;
        let start = Instant::now();
        link::handshake(&mut stream, RUNTIME_PORT, timeout)?;
        Self::from_stream(stream, timeout.saturating_sub(start.elapsed()))
    }

    /// What the runtime said of itself.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// A handle for other threads.
    pub fn controller(&self) -> Controller {
        self.controller.clone()
    }

    /// Asks whether the runtime answers.
    ///
    /// # Errors
    /// [`RuntimeError::Timeout`] and all others about the connection.
    pub fn ping(&mut self, timeout: Duration) -> Result<Pong, RuntimeError> {
        self.simple(
            &Call::Ping,
            "answered a ping",
            timeout,
            |happening, id| match happening {
                Happening::Pong { call, pong } if call == id => Some(pong),
                _ => None,
            },
        )
    }

    /// Ends the machine: processes are ended, file systems written back, then the power goes. When
    /// this returns the disk is safe.
    ///
    /// # Errors
    /// As [`RuntimeClient::ping`].
    pub fn shutdown(&mut self, timeout: Duration) -> Result<(), RuntimeError> {
        self.simple(
            &Call::Shutdown,
            "shut the guest down",
            timeout,
            |happening, id| {
                matches!(happening, Happening::Done { call } if call == id).then_some(())
            },
        )
    }

    fn simple<T>(
        &mut self,
        call: &Call,
        what: &'static str,
        within: Duration,
        answer: impl Fn(Happening, u64) -> Option<T>,
    ) -> Result<T, RuntimeError> {
        self.guarded(|client| {
            let id = client.link.state.call(call)?;
            let deadline = Instant::now() + within;
            let mut happenings = Vec::new();
            loop {
                if Instant::now() >= deadline {
                    return Err(RuntimeError::Timeout { what, within });
                }
                let wake = client.controller.0.wake.as_fd();
                let ready = client
                    .link
                    .wait(Some(deadline), Some(wake), None, &mut happenings)?;
                if ready.woken {
                    client.controller.fetch()?;
                }
                for happening in happenings.drain(..) {
                    match happening {
                        Happening::Failed { call, error } if call == id => {
                            return Err(RuntimeError::Call(error));
                        }
                        other => {
                            if let Some(answer) = answer(other, id) {
                                return Ok(answer);
                            }
                        }
                    }
                }
            }
        })
    }

    /// Runs a command to its end, forwarding its streams; `params.stdin` is set as `io` says.
    ///
    /// # Errors
    /// [`RuntimeError::Call`] when it could not be started ([`ErrorCode::NotFound`], …),
    /// [`RuntimeError::Output`] and [`RuntimeError::Input`] when our own side failed, and all
    /// others about the connection.
    pub fn exec(
        &mut self,
        params: &ExecParams,
        mut io: ExecIo<'_>,
    ) -> Result<ExitStatus, RuntimeError> {
        let params = ExecParams {
            stdin: io.stdin.is_some(),
            ..params.clone()
        };
        self.guarded(|client| {
            let id = client.link.state.call(&Call::Exec(params))?;
            let mut exec = Exec {
                id,
                stdin: io.stdin,
                scratch: Vec::new(),
                own_failure: None,
            };
            exec.run(client, &mut io)
        })
    }

    fn guarded<T>(
        &mut self,
        call: impl FnOnce(&mut Self) -> Result<T, RuntimeError>,
    ) -> Result<T, RuntimeError> {
        if self.broken {
            return Err(RuntimeError::Broken);
        }
        let result = call(self);
        if let Err(error) = &result {
            self.broken = error.is_about_connection();
        }
        result
    }
}

/// An exec call under way.
struct Exec<'a> {
    id: u64,
    stdin: Option<BorrowedFd<'a>>,
    scratch: Vec<u8>,
    own_failure: Option<RuntimeError>,
}

impl Exec<'_> {
    fn run(
        &mut self,
        client: &mut RuntimeClient,
        io: &mut ExecIo<'_>,
    ) -> Result<ExitStatus, RuntimeError> {
        let mut happenings = Vec::new();
        loop {
            let room = client.link.state.stdin_room(self.id);
            let stdin = self.stdin.filter(|_| room.is_some_and(|room| room > 0));
            let wake = client.controller.0.wake.as_fd();
            let ready = client.link.wait(None, Some(wake), stdin, &mut happenings)?;
            if ready.woken {
                for signal in client.controller.fetch()? {
                    let call = self.id;
                    client
                        .link
                        .state
                        .call(&Call::Signal(SignalParams { call, signal }))?;
                }
            }
            if let (true, Some(fd), Some(room)) = (ready.input, stdin, room) {
                self.forward_input(client, fd, room);
            }
            for happening in happenings.drain(..) {
                match happening {
                    Happening::Output { output, bytes, .. } => {
                        self.write(client, io, output, &bytes);
                    }
                    Happening::Exited { call, status } if call == self.id => {
                        return self.finish(io, status);
                    }
                    Happening::Failed { call, error } if call == self.id => {
                        return Err(RuntimeError::Call(error));
                    }
                    // A signal that came too late is no failure of the command.
                    Happening::Failed { error, .. } if error.code != ErrorCode::NotFound => {
                        tracing::warn!("signal to the command: {error}");
                    }
                    _ => {}
                }
            }
        }
    }

    fn forward_input(&mut self, client: &mut RuntimeClient, fd: BorrowedFd<'_>, room: usize) {
        self.scratch.resize(MAX_PAYLOAD_LEN, 0);
        let room = room.min(self.scratch.len());
        match rustix::io::read(fd, &mut self.scratch[..room]) {
            Ok(0) => self.end_input(client),
            Ok(len) => client
                .link
                .state
                .stdin(self.id, &self.scratch[..len], false),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => {
                self.own_failure
                    .get_or_insert(RuntimeError::Input(error.into()));
                self.end_input(client);
            }
        }
    }

    fn end_input(&mut self, client: &mut RuntimeClient) {
        self.stdin = None;
        client.link.state.stdin(self.id, &[], true);
    }

    fn write(
        &mut self,
        client: &mut RuntimeClient,
        io: &mut ExecIo<'_>,
        output: Output,
        bytes: &[u8],
    ) {
        let (writer, stream) = match output {
            Output::Stdout => (&mut *io.stdout, "stdout"),
            Output::Stderr => (&mut *io.stderr, "stderr"),
        };
        match writer.write_all(bytes).and_then(|()| writer.flush()) {
            Ok(()) => client.link.state.taken(self.id, output, bytes.len()),
            Err(source) => {
                client.link.state.stop(self.id, output);
                if source.kind() != io::ErrorKind::BrokenPipe {
                    self.own_failure
                        .get_or_insert(RuntimeError::Output { stream, source });
                }
            }
        }
    }

    fn finish(
        &mut self,
        io: &mut ExecIo<'_>,
        status: ExitStatus,
    ) -> Result<ExitStatus, RuntimeError> {
        for (writer, stream) in [(&mut *io.stdout, "stdout"), (&mut *io.stderr, "stderr")] {
            match writer.flush() {
                Err(source) if source.kind() != io::ErrorKind::BrokenPipe => {
                    self.own_failure
                        .get_or_insert(RuntimeError::Output { stream, source });
                }
                _ => {}
            }
        }
        match self.own_failure.take() {
            Some(error) => Err(error),
            None => Ok(status),
        }
    }
}

#[cfg(test)]
#[path = "client_tests.rs"]
mod tests;
