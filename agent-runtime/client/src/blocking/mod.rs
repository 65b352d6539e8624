//! The blocking client: one connection, one call at a time.

pub(crate) mod link;
mod swap;

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ratoon_protocol::{
    Call, ErrorCode, Event, ExecParams, ExitReport, ExitStatus, Hello, MAX_PAYLOAD_LEN, Pong,
    RUNTIME_PORT, ResizeParams, SignalParams, Size, Target,
};
use rustix::io::Errno;
use serde::de::DeserializeOwned;
use serde_json::Value;

use self::link::Link;
use crate::RuntimeError;
use crate::state::{Happening, Output, State};

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

/// Where the streams of any call go.
pub struct CallIo<'a> {
    /// As [`ExecIo::stdin`], for calls that take input.
    pub stdin: Option<BorrowedFd<'a>>,
    /// As [`ExecIo::stdout`].
    pub stdout: &'a mut dyn Write,
    /// As [`ExecIo::stderr`].
    pub stderr: &'a mut dyn Write,
    /// Takes what comes beside the text, likewise.
    pub data: &'a mut dyn Write,
    /// Told what happens on the way.
    pub events: &'a mut dyn FnMut(Event),
    /// Told when an output is at its end, while the call goes on.
    pub ended: &'a mut dyn FnMut(Output),
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
    size: Option<Size>,
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

    /// Sets the size of the terminal of the command that runs, or of the next one.
    pub fn resize(&self, size: Size) {
        self.wish(|list| list.size = Some(size));
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

    fn fetch(&self) -> Result<(Vec<i32>, Option<Size>), RuntimeError> {
        let _ = rustix::io::read(&self.0.wake, &mut [0; 8]);
        let mut list = self.0.list.lock().unwrap_or_else(PoisonError::into_inner);
        match list.cancelled {
            true => Err(RuntimeError::Cancelled),
            false => Ok((std::mem::take(&mut list.signals), list.size.take())),
        }
    }
}

/// A connection to the runtime of one guest. See the module.
pub struct Client {
    link: Link,
    hello: Hello,
    host_port: u32,
    controller: Controller,
    broken: bool,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client")
            .field("hello", &self.hello)
            .field("broken", &self.broken)
            .finish_non_exhaustive()
    }
}

impl Client {
    /// Takes a connection that the runtime has made (its standing one), or one that is joined to
    /// the runtime's port; waits for its HELLO.
    ///
    /// # Errors
    /// [`RuntimeError::Timeout`] when no HELLO comes, and all others about the connection.
    pub fn from_stream(stream: UnixStream, timeout: Duration) -> Result<Self, RuntimeError> {
        let mut link = Link::new(stream, State::new())?;
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
        Self::around(link, hello, RUNTIME_PORT)
    }

    /// Takes over a connection that went on through a freeze: the one by which the runtime was told to
    /// expect its `wake`, which is the first call to make. The runtime says HELLO once a connection:
    /// [`Client::hello`] is empty. `host_port` is the connection's.
    ///
    /// # Errors
    /// [`RuntimeError::Io`].
    pub fn adopt(stream: UnixStream, host_port: u32) -> Result<Self, RuntimeError> {
        let link = Link::new(stream, State::adopted())?;
        Self::around(link, Hello::default(), host_port)
    }

    fn around(link: Link, hello: Hello, host_port: u32) -> Result<Self, RuntimeError> {
        let controller = Controller(Arc::new(Wishes {
            wake: link::wake_up()?,
            list: Mutex::default(),
        }));
        Ok(Self {
            link,
            hello,
            host_port,
            controller,
            broken: false,
        })
    }

    /// The host's vsock port of this connection, by which a freeze names it: [`RUNTIME_PORT`] for the one
    /// that the runtime has made.
    pub fn host_port(&self) -> u32 {
        self.host_port
    }

    /// Makes a new connection through a VM's vsock socket.
    ///
    /// # Errors
    /// [`RuntimeError::Connect`], [`RuntimeError::NotListening`], and as
    /// [`Client::from_stream`].
    pub fn connect(vsock_socket: &Path, timeout: Duration) -> Result<Self, RuntimeError> {
        let start = Instant::now();
        let (stream, host_port) = join(vsock_socket, RUNTIME_PORT, timeout)?;
        let client = Self::from_stream(stream, timeout.saturating_sub(start.elapsed()))?;
        Ok(Self {
            host_port,
            ..client
        })
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
        self.call(&Call::Ping, "answered a ping", timeout)
    }

    /// Ends the machine: processes are ended, file systems written back, then the power goes. When
    /// this returns the disk is safe.
    ///
    /// # Errors
    /// As [`Client::ping`].
    pub fn shutdown(&mut self, timeout: Duration) -> Result<(), RuntimeError> {
        self.call(&Call::Shutdown, "shut the guest down", timeout)
    }

    /// A call without streams. `what` completes "the runtime has not … within … ms".
    ///
    /// # Errors
    /// [`RuntimeError::Call`] when it failed, [`RuntimeError::Violation`] when its result is none,
    /// and as [`Client::ping`].
    pub fn call<T: DeserializeOwned>(
        &mut self,
        call: &Call,
        what: &'static str,
        within: Duration,
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
                        Happening::Reply { call, value } if call == id => {
                            return result(id, value);
                        }
                        Happening::Output {
                            call,
                            output,
                            bytes,
                        } => client.link.state.taken(call, output, bytes.len()),
                        _ => {}
                    }
                }
            }
        })
    }

    /// A call with streams, to its end, however long that takes ([`Controller::cancel`] ends it).
    ///
    /// # Errors
    /// [`RuntimeError::Call`] when it failed, [`RuntimeError::Output`] and [`RuntimeError::Input`] when
    /// our own side failed, and all others about the connection.
    pub fn run<T: DeserializeOwned>(
        &mut self,
        call: &Call,
        io: &mut CallIo<'_>,
    ) -> Result<T, RuntimeError> {
        self.guarded(|client| {
            let id = client.link.state.call(call)?;
            let mut running = Running {
                id,
                stdin: io.stdin,
                scratch: Vec::new(),
                own_failure: None,
            };
            if running.stdin.is_none() {
                running.end_input(client);
            }
            result(id, running.run(client, io)?)
        })
    }

    /// Runs a command to its end, forwarding its streams; `params.stdin` is set as `io` says.
    ///
    /// # Errors
    /// [`RuntimeError::Call`] when it could not be started ([`ErrorCode::NotFound`], …), and as
    /// [`Client::run`].
    pub fn exec(
        &mut self,
        params: &ExecParams,
        io: ExecIo<'_>,
    ) -> Result<ExitReport, RuntimeError> {
        let params = ExecParams {
            stdin: io.stdin.is_some(),
            ..params.clone()
        };
        let mut io = CallIo {
            stdin: io.stdin,
            stdout: io.stdout,
            stderr: io.stderr,
            data: &mut io::sink(),
            events: &mut |_| {},
            ended: &mut |_| {},
        };
        let report: ExitReport = self.run(&Call::Exec(Box::new(params)), &mut io)?;
        checked(report)
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

/// Connects to a port of the guest through its VM's vsock socket.
///
/// # Errors
/// [`RuntimeError::Connect`], [`RuntimeError::NotListening`], [`RuntimeError::Timeout`].
pub fn dial(vsock_socket: &Path, port: u32, timeout: Duration) -> Result<UnixStream, RuntimeError> {
    Ok(join(vsock_socket, port, timeout)?.0)
}

/// As [`dial`], with the host's port.
fn join(
    vsock_socket: &Path,
    port: u32,
    timeout: Duration,
) -> Result<(UnixStream, u32), RuntimeError> {
    let mut stream = UnixStream::connect(vsock_socket).map_err(|source| RuntimeError::Connect {
        path: vsock_socket.to_owned(),
        source,
    })?;
    let host_port = link::handshake(&mut stream, port, timeout)?;
    Ok((stream, host_port))
}

/// What a guest says of a process's end, held against what can be.
///
/// # Errors
/// [`RuntimeError::Violation`].
pub fn checked(report: ExitReport) -> Result<ExitReport, RuntimeError> {
    match report.status {
        ExitStatus::Code(0..=255) | ExitStatus::Signal(1..=64) => Ok(report),
        status => Err(RuntimeError::Violation(format!(
            "a process ended with {status:?}"
        ))),
    }
}

fn result<T: DeserializeOwned>(call: u64, value: Value) -> Result<T, RuntimeError> {
    serde_json::from_value(value)
        .map_err(|error| RuntimeError::Violation(format!("reply of call {call}: {error}")))
}

/// A call under way.
struct Running<'a> {
    id: u64,
    stdin: Option<BorrowedFd<'a>>,
    scratch: Vec<u8>,
    own_failure: Option<RuntimeError>,
}

impl Running<'_> {
    fn run(&mut self, client: &mut Client, io: &mut CallIo<'_>) -> Result<Value, RuntimeError> {
        let mut happenings = Vec::new();
        loop {
            let room = client.link.state.stdin_room(self.id);
            let stdin = self.stdin.filter(|_| room.is_some_and(|room| room > 0));
            let wake = client.controller.0.wake.as_fd();
            let ready = client.link.wait(None, Some(wake), stdin, &mut happenings)?;
            if ready.woken {
                self.pass_on(client)?;
            }
            if let (true, Some(fd), Some(room)) = (ready.input, stdin, room) {
                self.forward_input(client, fd, room);
            }
            for happening in happenings.drain(..) {
                match happening {
                    Happening::Output {
                        call,
                        output,
                        bytes,
                    } if call == self.id => self.write(client, io, output, &bytes),
                    Happening::Event { call, event } if call == self.id => (io.events)(event),
                    Happening::OutputEnd { call, output } if call == self.id => (io.ended)(output),
                    Happening::Reply { call, value } if call == self.id => {
                        return self.finish(io, value);
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

    fn pass_on(&self, client: &mut Client) -> Result<(), RuntimeError> {
        let (signals, size) = client.controller.fetch()?;
        let target = Target {
            call: Some(self.id),
            pid: None,
        };
        if let Some(size) = size {
            let params = ResizeParams { target, size };
            client.link.state.call(&Call::Resize(params))?;
        }
        for signal in signals {
            let params = SignalParams { target, signal };
            client.link.state.call(&Call::Signal(params))?;
        }
        Ok(())
    }

    fn forward_input(&mut self, client: &mut Client, fd: BorrowedFd<'_>, room: usize) {
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

    fn end_input(&mut self, client: &mut Client) {
        self.stdin = None;
        client.link.state.stdin(self.id, &[], true);
    }

    fn write(&mut self, client: &mut Client, io: &mut CallIo<'_>, output: Output, bytes: &[u8]) {
        let (writer, stream) = match output {
            Output::Stdout => (&mut *io.stdout, "stdout"),
            Output::Stderr => (&mut *io.stderr, "stderr"),
            Output::Data => (&mut *io.data, "data"),
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

    fn finish(&mut self, io: &mut CallIo<'_>, value: Value) -> Result<Value, RuntimeError> {
        let writers = [
            (&mut *io.stdout, "stdout"),
            (&mut *io.stderr, "stderr"),
            (&mut *io.data, "data"),
        ];
        for (writer, stream) in writers {
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
            None => Ok(value),
        }
    }
}

#[cfg(test)]
mod tests;
