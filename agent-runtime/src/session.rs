//! One client as a state machine, without I/O: bytes come in, [`Action`]s and bytes come out. The
//! server ([`crate::server`]) owns sockets and tasks and does what the actions say; a fuzz target
//! drives the same machine with tasks replaced.
//!
//! ```text
//!   receive(bytes) --> decoder --> checks (ids, offsets, windows) --> Vec<Action> --> server
//!   unsent() <-- out buffer <-- event / output / reply / fail                 <-------- server
//! ```
//!
//! A session that the client has named outlives its connection: what was sent and not acknowledged
//! is kept, and sent again to the connection that takes it up ([`Session::resume`]). Nothing is run
//! twice, no byte is lost or repeated.
//!
//! How it fails: whatever breaks the protocol ends the connection with a [`Violation`]; its text
//! goes to the client as the last frame, an error for call 0. What merely fails (no such program)
//! ends one call. Memory is bounded: the server stops reading a client that does not take its
//! output ([`Session::wants_input`]), output is framed only while [`Session::room`] says so, and
//! input is held back by [`STREAM_WINDOW`].

use std::collections::{BTreeMap, VecDeque};

use ratoon_protocol::{
    Call, Decoder, ErrorCode, ErrorReply, Event, Frame, FrameError, HEADER_LEN, Have, HaveInput,
    Hello, Kind, MAX_OPEN_CALLS, MAX_PAYLOAD_LEN, STREAM_WINDOW,
};
use serde::{Deserialize, Serialize};

/// How many unsent bytes a connection may hold before its input and its tasks' output wait.
pub const OUT_LIMIT: usize = 256 * 1024;

/// An out buffer larger than this is given back when it is empty and no call is open.
const OUT_KEEP: usize = 64 * 1024;

/// Most bytes of output in a frame: with its header it is one packet of the guest's vsock driver.
const OUTPUT_LEN: usize = MAX_PAYLOAD_LEN - HEADER_LEN;

/// Longest error message, in bytes: escaped as JSON it still fits a frame.
const MESSAGE_LIMIT: usize = 4096;

/// Which output of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Output {
    /// Standard output, or the call's only one.
    Stdout = 0,
    /// Standard error.
    Stderr = 1,
    /// Values beside the text.
    Data = 2,
}

impl Output {
    /// All, in the order of their index.
    pub const ALL: [Self; 3] = [Self::Stdout, Self::Stderr, Self::Data];
    /// Those of a process.
    pub const BOTH: [Self; 2] = [Self::Stdout, Self::Stderr];

    fn kind(self) -> Kind {
        match self {
            Self::Stdout => Kind::Stdout,
            Self::Stderr => Kind::Stderr,
            Self::Data => Kind::Data,
        }
    }
}

/// What the server must do for the client.
#[derive(Debug, PartialEq)]
pub enum Action {
    /// Do it; then [`Session::reply`], or [`Session::fail`].
    Begin {
        /// The call.
        call: u64,
        /// What is asked for.
        request: Call,
    },
    /// Take input, then [`Session::stdin_taken`].
    Stdin {
        /// The call.
        call: u64,
        /// In order and without gaps.
        bytes: Vec<u8>,
        /// Nothing follows.
        end: bool,
    },
    /// The client takes no more of this output: close our end, so that the writer is told.
    StopOutput {
        /// The call.
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
    /// Input for a call that does not take it, or after its end.
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
    /// `session` after another call.
    #[error("`session` must be the first call of a connection")]
    LateSession,
}

mod carried;
mod resume;

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
    /// In a named session: what was sent and not acknowledged.
    replay: VecDeque<u8>,
}

#[derive(Debug, Default)]
struct Open {
    stdin: Option<Inbound>,
    out: [Outbound; 3],
    /// In a named session: the events, whole frames, to be said again.
    events: Vec<u8>,
    /// In a named session: the last frame, until the client confirms it.
    finished: Option<Vec<u8>>,
}

/// One client. See the module.
#[derive(Debug)]
pub struct Session {
    decoder: Decoder,
    calls: BTreeMap<u64, Open>,
    out: Vec<u8>,
    out_sent: usize,
    urgent: bool,
    /// A call has been seen on this connection.
    begun: bool,
    /// A `session` call waits for the server; what follows it is not looked at.
    naming: bool,
    named: bool,
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
            begun: false,
            naming: false,
            named: false,
        };
        let hello = Hello {
            runtime: env!("CARGO_PKG_VERSION").into(),
            methods: Call::METHODS.iter().map(|&name| name.into()).collect(),
            ready_at_us,
        };
        let _ = session.json(Kind::Hello, 0, &hello);
        session
    }

    /// Takes bytes from the client; appends what is to be done.
    ///
    /// # Errors
    /// [`Violation`]: do the actions that were appended, then [`Session::close`].
    pub fn receive(&mut self, bytes: &[u8], actions: &mut Vec<Action>) -> Result<(), Violation> {
        self.decoder.feed(bytes);
        while !self.naming {
            match self.decoder.next_frame().map_err(Violation::Frame)? {
                Some(frame) => self.frame(frame, actions)?,
                None => break,
            }
        }
        Ok(())
    }

    /// Says why the connection ends. Send what is unsent, then close.
    pub fn close(&mut self, violation: &Violation) {
        let _ = self.json(Kind::Error, 0, &violation.reply());
        self.urgent = true;
    }

    /// From now on the session outlives its connection. (The first answer to a `session` call.)
    pub fn name(&mut self) {
        self.named = true;
        self.naming = false;
    }

    /// Whether it outlives its connection.
    pub fn is_named(&self) -> bool {
        self.named
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
        let call = frame.call;
        if call == 0 || self.calls.contains_key(&call) {
            // In a named session it is the repetition of a call that did arrive.
            return match call != 0 && self.named {
                true => Ok(()),
                false => Err(Violation::DuplicateCall(call)),
            };
        }
        let is_first = !std::mem::replace(&mut self.begun, true);
        let request = match Call::parse(&frame.payload) {
            Ok(request) => request,
            Err(error) => {
                self.fail(call, &error);
                return Ok(());
            }
        };
        // Who has too many calls open may still end them all.
        if self.calls.len() >= MAX_OPEN_CALLS && request != Call::SessionEnd {
            let message =
                format!("{MAX_OPEN_CALLS} calls are open on this connection; wait for one");
            self.fail(call, &ErrorReply::new(ErrorCode::TooManyCalls, message));
            return Ok(());
        }
        if let Call::Session(_) = request {
            if !is_first {
                return Err(Violation::LateSession);
            }
            self.naming = true;
        } else {
            let open = Open {
                stdin: request.takes_input().then(Inbound::default),
                ..Open::default()
            };
            self.calls.insert(call, open);
        }
        actions.push(Action::Begin { call, request });
        Ok(())
    }

    fn stdin(&mut self, frame: Frame, actions: &mut Vec<Action>) -> Result<(), Violation> {
        let call = frame.call;
        let stdin = match self.calls.get_mut(&call) {
            // It crossed the call's end on the way.
            None => return Ok(()),
            Some(open) if open.finished.is_some() => return Ok(()),
            Some(Open {
                stdin: Some(stdin), ..
            }) if !stdin.ended => stdin,
            // A client that took the session up again cannot know whether its END had arrived.
            Some(Open {
                stdin: Some(stdin), ..
            }) if self.named
                && frame.end
                && frame.payload.is_empty()
                && frame.offset == stdin.received =>
            {
                return Ok(());
            }
            Some(_) => return Err(Violation::NoStdin(call)),
        };
        if frame.offset != stdin.received {
            return Err(Violation::Offset {
                call,
                expected: stdin.received,
                found: frame.offset,
            });
        }
        stdin.received = stdin.received.saturating_add(frame.payload.len() as u64);
        if stdin.received - stdin.acked > STREAM_WINDOW {
            return Err(Violation::Window(call));
        }
        stdin.ended = frame.end;
        if stdin.stopped {
            stdin.taken = stdin.received;
            stdin.acked = stdin.received;
        } else if frame.end || !frame.payload.is_empty() {
            actions.push(Action::Stdin {
                call,
                bytes: frame.payload,
                end: frame.end,
            });
        }
        Ok(())
    }

    fn ack(&mut self, frame: &Frame, actions: &mut Vec<Action>) -> Result<(), Violation> {
        let call = frame.call;
        let output = match frame.acked_stream() {
            Some(Kind::Stdout) => Output::Stdout,
            Some(Kind::Stderr) => Output::Stderr,
            Some(Kind::Data) => Output::Data,
            Some(Kind::Reply) => {
                if self
                    .calls
                    .get(&call)
                    .is_some_and(|open| open.finished.is_some())
                {
                    self.calls.remove(&call);
                }
                return Ok(());
            }
            _ => return Err(Violation::Ack(call)),
        };
        let Some(open) = self.calls.get_mut(&call) else {
            return Ok(());
        };
        let stream = &mut open.out[output as usize];
        if !(stream.acked..=stream.sent).contains(&frame.offset) {
            return Err(Violation::Ack(call));
        }
        stream.acknowledge(frame.offset);
        if frame.end && open.finished.is_none() {
            actions.push(Action::StopOutput { call, output });
        }
        Ok(())
    }

    /// Ends a call with an error.
    pub fn fail(&mut self, call: u64, error: &ErrorReply) {
        if error.message.len() > MESSAGE_LIMIT {
            // A client's own words, quoted, must not make a frame that is too long.
            let end = error.message.floor_char_boundary(MESSAGE_LIMIT);
            let clipped = ErrorReply::new(error.code, format!("{}…", &error.message[..end]));
            self.finish(Kind::Error, call, &clipped);
        } else {
            self.finish(Kind::Error, call, error);
        }
    }

    /// Ends a call with its result; outputs that were used get their end before.
    pub fn reply<T: Serialize>(&mut self, call: u64, value: &T) {
        for output in Output::ALL {
            let used = |open: &Open| open.out[output as usize].sent > 0;
            if self.calls.get(&call).is_some_and(used) {
                self.output_ended(call, output);
            }
        }
        self.finish(Kind::Reply, call, value);
    }

    fn finish<T: Serialize>(&mut self, kind: Kind, call: u64, value: &T) {
        let start = self.out.len();
        if self.json(kind, call, value).is_err() {
            let message =
                format!("the answer is longer than {MAX_PAYLOAD_LEN} bytes: ask for less");
            // Short, so this one fits.
            let _ = self.json(
                Kind::Error,
                call,
                &ErrorReply::new(ErrorCode::Failed, message),
            );
        }
        self.urgent = true;
        match self.calls.get_mut(&call) {
            Some(open) if self.named => {
                let frame = self.out[start..].to_vec();
                open.finished.get_or_insert(frame);
                open.events = Vec::new();
            }
            _ => {
                self.calls.remove(&call);
            }
        }
    }

    /// Tells what happens in a call. Not urgent: it may travel with the first output.
    pub fn event(&mut self, call: u64, event: &Event) {
        let start = self.out.len();
        let _ = self.json(Kind::Event, call, event);
        if self.named
            && let Some(open) = self.calls.get_mut(&call)
        {
            open.events.extend_from_slice(&self.out[start..]);
        }
    }

    /// What is unsent is to go out now.
    pub fn hurry(&mut self) {
        self.urgent = true;
    }

    /// How many bytes of this output may be framed now, in one frame.
    pub fn room(&self, call: u64, output: Output) -> usize {
        let Some(open) = self.calls.get(&call) else {
            return 0;
        };
        let stream = &open.out[output as usize];
        if self.unsent().len() >= OUT_LIMIT || open.finished.is_some() || stream.ended {
            return 0;
        }
        let window = STREAM_WINDOW - (stream.sent - stream.acked);
        window.min(OUTPUT_LEN as u64) as usize
    }

    /// Frames output; `bytes` are at most [`Session::room`].
    pub fn output(&mut self, call: u64, output: Output, bytes: &[u8]) {
        self.stream(call, output, bytes, false);
        self.urgent = true;
    }

    /// The output is at its end. Not urgent: the reply mostly follows at once.
    pub fn output_ended(&mut self, call: u64, output: Output) {
        self.stream(call, output, &[], true);
    }

    fn stream(&mut self, call: u64, output: Output, bytes: &[u8], end: bool) {
        let Some(open) = self.calls.get_mut(&call) else {
            return;
        };
        let stream = &mut open.out[output as usize];
        if stream.ended || open.finished.is_some() {
            return;
        }
        let offset = stream.sent;
        stream.sent += bytes.len() as u64;
        stream.ended = end;
        if self.named {
            stream.replay.extend(bytes);
        }
        let header = Frame::header(output.kind(), call, offset, end, bytes.len());
        self.out.extend_from_slice(&header);
        self.out.extend_from_slice(bytes);
    }

    /// `len_bytes` more of the input have been taken.
    pub fn stdin_taken(&mut self, call: u64, len_bytes: u64) {
        let Some(stdin) = self
            .calls
            .get_mut(&call)
            .and_then(|open| open.stdin.as_mut())
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

    /// Nobody reads the input any more: the client is told to send no more.
    pub fn stdin_closed(&mut self, call: u64) {
        let Some(stdin) = self
            .calls
            .get_mut(&call)
            .and_then(|open| open.stdin.as_mut())
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

    /// How many calls are open, or ended and not confirmed.
    pub fn open_calls(&self) -> usize {
        self.calls.len()
    }

    /// Frames a value as JSON.
    ///
    /// # Errors
    /// When it is too long for a frame; nothing is framed then.
    fn json<T: Serialize>(&mut self, kind: Kind, call: u64, value: &T) -> Result<(), TooLong> {
        let start = self.out.len();
        self.out
            .extend_from_slice(&Frame::header(kind, call, 0, false, 0));
        // Our own messages always serialize, and a `Vec` never refuses bytes.
        let written = serde_json::to_writer(&mut self.out, value);
        debug_assert!(written.is_ok());
        let head = start + HEADER_LEN;
        let len = self.out.len() - head;
        if len > MAX_PAYLOAD_LEN {
            self.out.truncate(start);
            return Err(TooLong);
        }
        let header = Frame::header(kind, call, 0, false, len);
        self.out[start..head].copy_from_slice(&header);
        Ok(())
    }
}

struct TooLong;

impl Outbound {
    /// The client has the first `offset` bytes (between `acked` and `sent`).
    fn acknowledge(&mut self, offset: u64) {
        let newly = (offset - self.acked) as usize;
        self.replay.drain(..newly.min(self.replay.len()));
        self.acked = offset;
    }
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
