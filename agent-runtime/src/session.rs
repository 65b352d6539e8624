//! One client connection as a state machine, without I/O: bytes come in, [`Action`]s and bytes
//! come out. The server ([`crate::server`]) owns sockets and processes and does what the actions
//! say; a fuzz target drives the same machine with processes replaced.
//!
//! ```text
//!   receive(bytes) --> decoder --> checks (ids, offsets, windows) --> Vec<Action> --> server
//!   unsent() <-- out buffer <-- pong / started / output / ended / refused   <-------- server
//! ```
//!
//! How it fails: whatever breaks the protocol ends the connection with a [`Violation`]; its text
//! goes to the client as the last frame, an error for call 0. What merely fails (no such program)
//! ends one call. Memory is bounded: the server stops reading a client that does not take its
//! output ([`Session::wants_input`]), output is framed only while [`Session::room`] says so, and
//! standard input is held back by [`STREAM_WINDOW`].

use std::collections::BTreeMap;

use ratoon_protocol::{
    Call, Decoder, ErrorCode, ErrorReply, Event, ExecParams, ExitStatus, Frame, FrameError, Hello,
    Kind, MAX_OPEN_CALLS, MAX_PAYLOAD_LEN, Pong, STREAM_WINDOW,
};
use serde_json::Value;

/// How many unsent bytes a connection may hold before its input and its processes' output wait.
pub const OUT_LIMIT: usize = 256 * 1024;

/// An out buffer larger than this is given back when it is empty and no call is open.
const OUT_KEEP: usize = 64 * 1024;

/// Longest error message, in bytes: escaped as JSON it still fits a frame.
const MESSAGE_LIMIT: usize = 4096;

/// Which output of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// Standard output.
    Stdout = 0,
    /// Standard error.
    Stderr = 1,
}

impl Output {
    /// Both, in the order of their index.
    pub const BOTH: [Self; 2] = [Self::Stdout, Self::Stderr];

    fn kind(self) -> Kind {
        match self {
            Self::Stdout => Kind::Stdout,
            Self::Stderr => Kind::Stderr,
        }
    }
}

/// What the server must do for the client.
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// Answer with [`Session::pong`].
    Ping {
        /// The call.
        call: u64,
    },
    /// Start a process: then [`Session::started`], or [`Session::refused`].
    Start {
        /// The call.
        call: u64,
        /// What to start.
        params: Box<ExecParams>,
    },
    /// Send a signal to the process group of `target`: then [`Session::done`], or
    /// [`Session::refused`].
    Signal {
        /// The call.
        call: u64,
        /// The exec call whose process is meant; it is open.
        target: u64,
        /// Signal number, 1 to 64.
        signal: i32,
    },
    /// End the machine; [`Session::done`] when the file systems are safe.
    Shutdown {
        /// The call.
        call: u64,
    },
    /// Write to the process's standard input, then [`Session::stdin_taken`].
    Stdin {
        /// The exec call.
        call: u64,
        /// In order and without gaps.
        bytes: Vec<u8>,
        /// Close the standard input after these.
        end: bool,
    },
    /// The client takes no more of this output: close our end, so that the process is told.
    StopOutput {
        /// The exec call.
        call: u64,
        /// Which.
        output: Output,
    },
}

/// How the client broke the protocol. Each ends the connection.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Bytes that are no frame.
    #[error("not a frame")]
    Frame(#[source] FrameError),
    /// A kind of frame that only the runtime sends.
    #[error("a client does not send frames of kind {0:?}")]
    Direction(Kind),
    /// Call id 0, or the id of an open call.
    #[error("call id {0} is 0 or in use")]
    DuplicateCall(u64),
    /// Input for a call that did not ask for it, or after its end.
    #[error("call {0} takes no standard input (any more)")]
    NoStdin(u64),
    /// A gap or a repetition in the input.
    #[error("standard input of call {call} goes on at {expected}, not at {found}")]
    Offset {
        /// The call.
        call: u64,
        /// The next byte's offset.
        expected: u64,
        /// What the frame says.
        found: u64,
    },
    /// More input than the window allows.
    #[error("standard input of call {0} overruns its window of {STREAM_WINDOW} bytes")]
    Window(u64),
    /// An acknowledgement of bytes never sent, or of fewer than before, or of no output stream.
    #[error("call {0}: an acknowledgement that does not fit what was sent")]
    Ack(u64),
}

impl Violation {
    fn reply(&self) -> ErrorReply {
        let code = match self {
            Self::DuplicateCall(_) => ErrorCode::DuplicateCall,
            _ => ErrorCode::Protocol,
        };
        let message = match self {
            Self::Frame(source) => format!("{self}: {source}"),
            _ => self.to_string(),
        };
        ErrorReply::new(code, message)
    }
}

#[derive(Debug, Default)]
struct Inbound {
    received: u64,
    taken: u64,
    acked: u64,
    ended: bool,
    /// Nobody reads it any more: the client was told, what still comes is dropped.
    stopped: bool,
}

#[derive(Debug, Default)]
struct Outbound {
    sent: u64,
    acked: u64,
    ended: bool,
}

#[derive(Debug)]
enum Open {
    Exec {
        stdin: Option<Inbound>,
        out: [Outbound; 2],
    },
    Shutdown,
}

/// One connection. See the module.
#[derive(Debug)]
pub struct Session {
    decoder: Decoder,
    calls: BTreeMap<u64, Open>,
    out: Vec<u8>,
    out_sent: usize,
    urgent: bool,
}

impl Session {
    /// A new connection; its HELLO waits to be sent. `ready_at_us` is the guest's CLOCK_BOOTTIME
    /// when the runtime began to serve.
    pub fn new(ready_at_us: u64) -> Self {
        let mut session = Self {
            decoder: Decoder::new(),
            calls: BTreeMap::new(),
            out: Vec::new(),
            out_sent: 0,
            urgent: true,
        };
        let hello = Hello {
            runtime: env!("CARGO_PKG_VERSION").into(),
            methods: Call::METHODS.iter().map(|&name| name.into()).collect(),
            ready_at_us,
        };
        session.json(Kind::Hello, 0, &hello);
        session
    }

    /// Takes bytes from the client; appends what is to be done.
    ///
    /// # Errors
    /// [`Violation`]: do the actions that were appended, then [`Session::close`].
    pub fn receive(&mut self, bytes: &[u8], actions: &mut Vec<Action>) -> Result<(), Violation> {
        self.decoder.feed(bytes);
        while let Some(frame) = self.decoder.next_frame().map_err(Violation::Frame)? {
            self.frame(frame, actions)?;
        }
        Ok(())
    }

    /// Says why the connection ends. Send what is unsent, then close.
    pub fn close(&mut self, violation: &Violation) {
        self.json(Kind::Error, 0, &violation.reply());
        self.urgent = true;
    }

    fn frame(&mut self, frame: Frame, actions: &mut Vec<Action>) -> Result<(), Violation> {
        match frame.kind {
            Kind::Call => self.call(&frame, actions),
            Kind::Stdin => self.stdin(frame, actions),
            Kind::Ack => self.ack(&frame, actions),
            other => Err(Violation::Direction(other)),
        }
    }

    fn call(&mut self, frame: &Frame, actions: &mut Vec<Action>) -> Result<(), Violation> {
        let id = frame.call;
        if id == 0 || self.calls.contains_key(&id) {
            return Err(Violation::DuplicateCall(id));
        }
        let call = match Call::parse(&frame.payload) {
            Ok(call) => call,
            Err(error) => {
                self.refused(id, &error);
                return Ok(());
            }
        };
        let full = self.calls.len() >= MAX_OPEN_CALLS;
        match call {
            Call::Ping => actions.push(Action::Ping { call: id }),
            Call::Signal(params) => self.signal(id, params.call, params.signal, actions),
            Call::Exec(_) | Call::Shutdown if full => self.refused(
                id,
                &ErrorReply::new(
                    ErrorCode::TooManyCalls,
                    format!("{MAX_OPEN_CALLS} calls are open on this connection; wait for one"),
                ),
            ),
            Call::Exec(params) => {
                let open = Open::Exec {
                    stdin: params.stdin.then(Inbound::default),
                    out: Default::default(),
                };
                self.calls.insert(id, open);
                actions.push(Action::Start {
                    call: id,
                    params: Box::new(params),
                });
            }
            Call::Shutdown => {
                self.calls.insert(id, Open::Shutdown);
                actions.push(Action::Shutdown { call: id });
            }
        }
        Ok(())
    }

    fn signal(&mut self, id: u64, target: u64, signal: i32, actions: &mut Vec<Action>) {
        if !(1..=64).contains(&signal) {
            let error = ErrorReply::new(
                ErrorCode::BadRequest,
                format!("signal {signal} is not 1 to 64"),
            );
            self.refused(id, &error);
        } else if matches!(self.calls.get(&target), Some(Open::Exec { .. })) {
            actions.push(Action::Signal {
                call: id,
                target,
                signal,
            });
        } else {
            let message = format!("no exec call {target} is open on this connection");
            self.refused(id, &ErrorReply::new(ErrorCode::NotFound, message));
        }
    }

    fn stdin(&mut self, frame: Frame, actions: &mut Vec<Action>) -> Result<(), Violation> {
        let id = frame.call;
        let stdin = match self.calls.get_mut(&id) {
            // It crossed the call's reply on the way.
            None => return Ok(()),
            Some(Open::Exec {
                stdin: Some(stdin), ..
            }) if !stdin.ended => stdin,
            Some(_) => return Err(Violation::NoStdin(id)),
        };
        if frame.offset != stdin.received {
            return Err(Violation::Offset {
                call: id,
                expected: stdin.received,
                found: frame.offset,
            });
        }
        stdin.received = stdin.received.saturating_add(frame.payload.len() as u64);
        if stdin.received - stdin.acked > STREAM_WINDOW {
            return Err(Violation::Window(id));
        }
        stdin.ended = frame.end;
        if stdin.stopped {
            stdin.taken = stdin.received;
            stdin.acked = stdin.received;
        } else if frame.end || !frame.payload.is_empty() {
            actions.push(Action::Stdin {
                call: id,
                bytes: frame.payload,
                end: frame.end,
            });
        }
        Ok(())
    }

    fn ack(&mut self, frame: &Frame, actions: &mut Vec<Action>) -> Result<(), Violation> {
        let id = frame.call;
        let output = match frame.acked_stream() {
            Some(Kind::Stdout) => Output::Stdout,
            Some(Kind::Stderr) => Output::Stderr,
            _ => return Err(Violation::Ack(id)),
        };
        let Some(Open::Exec { out, .. }) = self.calls.get_mut(&id) else {
            return Ok(());
        };
        let stream = &mut out[output as usize];
        if !(stream.acked..=stream.sent).contains(&frame.offset) {
            return Err(Violation::Ack(id));
        }
        stream.acked = frame.offset;
        if frame.end {
            actions.push(Action::StopOutput { call: id, output });
        }
        Ok(())
    }

    /// Answers a ping. `uptime_us` is CLOCK_BOOTTIME.
    pub fn pong(&mut self, call: u64, uptime_us: u64) {
        self.json(Kind::Reply, call, &Pong { uptime_us });
        self.urgent = true;
    }

    /// Ends a call with an error.
    pub fn refused(&mut self, call: u64, error: &ErrorReply) {
        self.calls.remove(&call);
        if error.message.len() > MESSAGE_LIMIT {
            // A client's own words, quoted, must not make a frame that is too long.
            let end = error.message.floor_char_boundary(MESSAGE_LIMIT);
            let clipped = ErrorReply::new(error.code, format!("{}…", &error.message[..end]));
            self.json(Kind::Error, call, &clipped);
        } else {
            self.json(Kind::Error, call, error);
        }
        self.urgent = true;
    }

    /// Ends a call that has no result.
    pub fn done(&mut self, call: u64) {
        self.calls.remove(&call);
        self.json(Kind::Reply, call, &Value::Null);
        self.urgent = true;
    }

    /// Says that the process of an exec call runs. Not urgent: it may travel with the first output.
    pub fn started(&mut self, call: u64, pid: i32) {
        self.json(Kind::Event, call, &Event::Started { pid });
    }

    /// How many bytes of this output may be framed now, in one frame.
    pub fn room(&self, call: u64, output: Output) -> usize {
        let Some(Open::Exec { out, .. }) = self.calls.get(&call) else {
            return 0;
        };
        if self.unsent().len() >= OUT_LIMIT {
            return 0;
        }
        let stream = &out[output as usize];
        let window = STREAM_WINDOW - (stream.sent - stream.acked);
        window.min(MAX_PAYLOAD_LEN as u64) as usize
    }

    /// Frames output of a process; `bytes` are at most [`Session::room`].
    pub fn output(&mut self, call: u64, output: Output, bytes: &[u8]) {
        self.stream(call, output, bytes, false);
        self.urgent = true;
    }

    /// The output is at its end. Not urgent: the reply mostly follows at once.
    pub fn output_ended(&mut self, call: u64, output: Output) {
        self.stream(call, output, &[], true);
    }

    fn stream(&mut self, call: u64, output: Output, bytes: &[u8], end: bool) {
        let Some(Open::Exec { out, .. }) = self.calls.get_mut(&call) else {
            return;
        };
        let stream = &mut out[output as usize];
        if stream.ended {
            return;
        }
        let offset = stream.sent;
        stream.sent += bytes.len() as u64;
        stream.ended = end;
        let header = Frame::header(output.kind(), call, offset, end, bytes.len());
        self.out.extend_from_slice(&header);
        self.out.extend_from_slice(bytes);
    }

    /// The process has ended and its outputs are drained: ends the call.
    pub fn ended(&mut self, call: u64, status: ExitStatus) {
        for output in Output::BOTH {
            self.output_ended(call, output);
        }
        if self.calls.remove(&call).is_some() {
            self.json(Kind::Reply, call, &status);
        }
        self.urgent = true;
    }

    /// `len_bytes` more of the input have been written to the process.
    pub fn stdin_taken(&mut self, call: u64, len_bytes: u64) {
        let Some(Open::Exec {
            stdin: Some(stdin), ..
        }) = self.calls.get_mut(&call)
        else {
            return;
        };
        stdin.taken = (stdin.taken + len_bytes).min(stdin.received);
        if stdin.taken - stdin.acked >= STREAM_WINDOW / 2 {
            stdin.acked = stdin.taken;
            Frame::ack(call, Kind::Stdin, stdin.acked).encode_into(&mut self.out);
            self.urgent = true;
        }
    }

    /// The process has closed its standard input: the client is told to send no more.
    pub fn stdin_closed(&mut self, call: u64) {
        let Some(Open::Exec {
            stdin: Some(stdin), ..
        }) = self.calls.get_mut(&call)
        else {
            return;
        };
        if stdin.stopped {
            return;
        }
        stdin.stopped = true;
        stdin.taken = stdin.received;
        stdin.acked = stdin.received;
        Frame::ack_and_stop(call, Kind::Stdin, stdin.acked).encode_into(&mut self.out);
    }

    /// Whether the server should read more from the client.
    pub fn wants_input(&self) -> bool {
        self.unsent().len() < OUT_LIMIT
    }

    /// What waits to be sent.
    pub fn unsent(&self) -> &[u8] {
        &self.out[self.out_sent..]
    }

    /// Whether what is unsent should go now; otherwise it may wait for company.
    pub fn is_urgent(&self) -> bool {
        self.urgent
    }

    /// `len_bytes` of [`Session::unsent`] have gone out.
    pub fn sent(&mut self, len_bytes: usize) {
        self.out_sent += len_bytes;
        debug_assert!(self.out_sent <= self.out.len());
        if self.out_sent >= self.out.len() {
            self.urgent = false;
            self.out_sent = 0;
            self.out.clear();
            if self.calls.is_empty() && self.out.capacity() > OUT_KEEP {
                self.out = Vec::new();
            }
        } else if self.out_sent >= OUT_LIMIT {
            self.out.drain(..self.out_sent);
            self.out_sent = 0;
        }
    }

    /// How many calls are open.
    pub fn open_calls(&self) -> usize {
        self.calls.len()
    }

    fn json<T: serde::Serialize>(&mut self, kind: Kind, call: u64, value: &T) {
        let start = self.out.len();
        self.out
            .extend_from_slice(&Frame::header(kind, call, 0, false, 0));
        // Our own messages always serialize, and a `Vec` never refuses bytes.
        let written = serde_json::to_writer(&mut self.out, value);
        debug_assert!(written.is_ok());
        let head = start + ratoon_protocol::HEADER_LEN;
        let len = (self.out.len() - head).min(MAX_PAYLOAD_LEN);
        self.out.truncate(head + len);
        let header = Frame::header(kind, call, 0, false, len);
        self.out[start..head].copy_from_slice(&header);
    }
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
