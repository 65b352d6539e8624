//! What the client knows of its calls, without I/O. Bytes from the guest come in, checked
//! [`Happening`]s come out; a fuzz target feeds it anything.
//!
//! A runtime may send frames only for calls that are open, output only in order, within the window
//! and before its end, and replies that fit their call. All else is
//! [`RuntimeError::Violation`]. Strings of the guest are cleared of control characters.

use std::collections::{BTreeMap, VecDeque};

use ratoon_protocol::{
    Call, Decoder, ErrorReply, Event, Frame, Hello, Kind, MAX_PAYLOAD_LEN, STREAM_WINDOW,
};
use serde_json::Value;

use self::resume::Named;
use crate::RuntimeError;

#[path = "resume.rs"]
mod resume;

/// Which output of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// Standard output, or the call's only one.
    Stdout = 0,
    /// Standard error.
    Stderr = 1,
    /// Values beside the text.
    Data = 2,
}

impl Output {
    fn kind(self) -> Kind {
        match self {
            Self::Stdout => Kind::Stdout,
            Self::Stderr => Kind::Stderr,
            Self::Data => Kind::Data,
        }
    }
}

/// Something that the runtime said, checked.
#[derive(Debug, PartialEq, Eq)]
pub enum Happening {
    /// First of all.
    Hello(Hello),
    /// Something happens in a call that goes on.
    Event {
        /// The call.
        call: u64,
        /// What.
        event: Event,
    },
    /// Output; then [`State::taken`] or [`State::stop`].
    Output {
        /// The call.
        call: u64,
        /// Which.
        output: Output,
        /// In order, without gaps; never empty.
        bytes: Vec<u8>,
    },
    /// An output is at its end; the call may go on.
    OutputEnd {
        /// The call.
        call: u64,
        /// Which.
        output: Output,
    },
    /// A call has its result.
    Reply {
        /// The call, now ended.
        call: u64,
        /// The result, JSON of the guest's making.
        value: Value,
    },
    /// A call failed.
    Failed {
        /// The call, now ended.
        call: u64,
        /// Why.
        error: ErrorReply,
    },
}

#[derive(Debug, Default)]
struct Inbound {
    received: u64,
    taken: u64,
    acked: u64,
    ended: bool,
    stopped: bool,
    /// After a resume the end is said once more: it is not among the bytes that are counted.
    end_again: bool,
    /// How many of the bytes received are still to be said again on this connection.
    again: u64,
}

impl Inbound {
    /// What is to be acknowledged now: no more than was taken, nor than this connection has brought.
    fn due(&mut self) -> Option<u64> {
        let upto = self.taken.min(self.received - self.again);
        let is_due = !self.ended && !self.stopped && upto >= self.acked + STREAM_WINDOW / 2;
        is_due.then(|| {
            self.acked = upto;
            upto
        })
    }
}

#[derive(Debug, Default)]
struct Stdin {
    sent: u64,
    acked: u64,
    ended: bool,
    stopped: bool,
    /// In a named session: what was sent and not acknowledged, at most the window.
    replay: VecDeque<u8>,
}

#[derive(Debug, Default)]
struct Open {
    stdin: Option<Stdin>,
    out: [Inbound; 3],
    /// In a named session: the call itself, for a runtime that it has not reached.
    payload: Vec<u8>,
    /// How many events came over all connections; and how many are still to be said again.
    events: u64,
    repeated: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub struct State {
    decoder: Decoder,
    greeted: bool,
    last_id: u64,
    calls: BTreeMap<u64, Open>,
    out: Vec<u8>,
    session: Option<Named>,
}

fn violation(what: impl Into<String>) -> RuntimeError {
    RuntimeError::Violation(what.into())
}

/// The guest's words may end on a terminal.
fn clean(text: &mut String) {
    if text.contains(char::is_control) {
        *text = text.replace(char::is_control, "\u{fffd}");
    }
}

impl State {
    /// A new connection.
    pub fn new() -> Self {
        Self::default()
    }

    /// A connection that another client has had from its HELLO on, and on which no call is open.
    pub fn adopted() -> Self {
        Self {
            greeted: true,
            ..Self::default()
        }
    }

    /// Begins a call; its frame waits in [`State::unsent`]. Returns the call's id.
    ///
    /// # Errors
    /// [`RuntimeError::TooLarge`].
    pub fn call(&mut self, call: &Call) -> Result<u64, RuntimeError> {
        let payload = serde_json::to_vec(call).map_err(|error| RuntimeError::Io(error.into()))?;
        if payload.len() > MAX_PAYLOAD_LEN {
            return Err(RuntimeError::TooLarge { len: payload.len() });
        }
        let mut open = Open {
            stdin: call.takes_input().then(Stdin::default),
            ..Open::default()
        };
        if self.session.is_some() {
            open.payload.clone_from(&payload);
        }
        self.last_id += 1;
        self.calls.insert(self.last_id, open);
        if !self.is_naming() {
            self.confirm();
            Frame::new(Kind::Call, self.last_id, payload).encode_into(&mut self.out);
        }
        Ok(self.last_id)
    }

    /// Takes bytes from the guest; appends what they say.
    ///
    /// # Errors
    /// [`RuntimeError::Frame`], [`RuntimeError::Violation`], [`RuntimeError::Rejected`]: the
    /// connection is to be closed.
    pub fn receive(
        &mut self,
        bytes: &[u8],
        happenings: &mut Vec<Happening>,
    ) -> Result<(), RuntimeError> {
        self.decoder.feed(bytes);
        while let Some(frame) = self.decoder.next_frame().map_err(RuntimeError::Frame)? {
            self.frame(frame, happenings)?;
        }
        Ok(())
    }

    fn frame(&mut self, frame: Frame, happenings: &mut Vec<Happening>) -> Result<(), RuntimeError> {
        if frame.kind == Kind::Hello {
            return self.hello(&frame, happenings);
        }
        if !self.greeted {
            return Err(violation(format!("{:?} before HELLO", frame.kind)));
        }
        if frame.kind == Kind::Error && frame.call == 0 {
            return Err(RuntimeError::Rejected(error_reply(&frame)?));
        }
        let id = frame.call;
        if self.session.is_some() && self.session_frame(&frame)? {
            return Ok(());
        }
        let Some(open) = self.calls.get_mut(&id) else {
            return Err(violation(format!(
                "{:?} for call {id}, which is not open",
                frame.kind
            )));
        };
        match (frame.kind, open) {
            (Kind::Reply, _) => {
                let value = serde_json::from_slice(&frame.payload)
                    .map_err(|error| violation(format!("reply of call {id}: {error}")))?;
                self.end(id);
                happenings.push(Happening::Reply { call: id, value });
            }
            (Kind::Error, _) => {
                let error = error_reply(&frame)?;
                self.end(id);
                happenings.push(Happening::Failed { call: id, error });
            }
            (Kind::Event, open) if open.repeated > 0 => open.repeated -= 1,
            (Kind::Event, open) => {
                open.events += 1;
                // An event of a newer runtime is none of our business.
                if let Ok(event) = serde_json::from_slice(&frame.payload)
                    && event != Event::Unknown
                {
                    happenings.push(Happening::Event { call: id, event });
                }
            }
            (Kind::Stdout, open) => output(open, frame, Output::Stdout, happenings, &mut self.out)?,
            (Kind::Stderr, open) => output(open, frame, Output::Stderr, happenings, &mut self.out)?,
            (Kind::Data, open) => output(open, frame, Output::Data, happenings, &mut self.out)?,
            (
                Kind::Ack,
                Open {
                    stdin: Some(stdin), ..
                },
            ) if frame.acked_stream() == Some(Kind::Stdin) => {
                if !(stdin.acked..=stdin.sent).contains(&frame.offset) {
                    return Err(violation(format!("call {id}: an ACK of input never sent")));
                }
                let newly = (frame.offset - stdin.acked) as usize;
                stdin.replay.drain(..newly.min(stdin.replay.len()));
                stdin.acked = frame.offset;
                stdin.stopped |= frame.end;
            }
            (kind, _) => return Err(violation(format!("{kind:?} does not fit call {id}"))),
        }
        Ok(())
    }

    fn hello(
        &mut self,
        frame: &Frame,
        happenings: &mut Vec<Happening>,
    ) -> Result<(), RuntimeError> {
        if self.greeted || frame.call != 0 {
            return Err(violation("HELLO is not the first frame"));
        }
        let mut hello: Hello = serde_json::from_slice(&frame.payload)
            .map_err(|error| violation(format!("HELLO: {error}")))?;
        clean(&mut hello.runtime);
        hello.methods.iter_mut().for_each(clean);
        self.greeted = true;
        happenings.push(Happening::Hello(hello));
        Ok(())
    }

    /// Output of this length has been written on: acknowledges it when it is time.
    pub fn taken(&mut self, call: u64, output: Output, len_bytes: usize) {
        let naming = self.is_naming();
        let Some(open) = self.calls.get_mut(&call) else {
            return;
        };
        let stream = &mut open.out[output as usize];
        stream.taken = (stream.taken + len_bytes as u64).min(stream.received);
        if !naming && let Some(upto) = stream.due() {
            Frame::ack(call, output.kind(), upto).encode_into(&mut self.out);
        }
    }

    /// Nobody reads this output any more: the process is to be told (as by a closed pipe).
    pub fn stop(&mut self, call: u64, output: Output) {
        let naming = self.is_naming();
        let Some(open) = self.calls.get_mut(&call) else {
            return;
        };
        let stream = &mut open.out[output as usize];
        if !stream.stopped && !stream.ended {
            stream.stopped = true;
            stream.acked = stream.received - stream.again;
            if !naming {
                Frame::ack_and_stop(call, output.kind(), stream.acked).encode_into(&mut self.out);
            }
        }
    }

    /// How much input may be sent now, in one go; `None` when no more is wanted at all.
    pub fn stdin_room(&self, call: u64) -> Option<usize> {
        match self.calls.get(&call) {
            Some(Open {
                stdin: Some(stdin), ..
            }) if !stdin.ended && !stdin.stopped => {
                let room = STREAM_WINDOW - (stdin.sent - stdin.acked);
                Some(room.min(MAX_PAYLOAD_LEN as u64) as usize)
            }
            _ => None,
        }
    }

    /// Sends input, at most [`State::stdin_room`] bytes; `end` closes it.
    pub fn stdin(&mut self, call: u64, bytes: &[u8], end: bool) {
        let (named, naming) = (self.session.is_some(), self.is_naming());
        let Some(Open {
            stdin: Some(stdin), ..
        }) = self.calls.get_mut(&call)
        else {
            return;
        };
        if stdin.ended || stdin.stopped {
            return;
        }
        let header = Frame::header(Kind::Stdin, call, stdin.sent, end, bytes.len());
        stdin.sent += bytes.len() as u64;
        stdin.ended = end;
        if named {
            stdin.replay.extend(bytes);
        }
        if !naming {
            self.out.extend_from_slice(&header);
            self.out.extend_from_slice(bytes);
            self.confirm();
        }
    }

    /// What waits to be sent.
    pub fn unsent(&self) -> &[u8] {
        &self.out
    }

    /// `len_bytes` of [`State::unsent`] have gone out.
    pub fn sent(&mut self, len_bytes: usize) {
        self.out.drain(..len_bytes.min(self.out.len()));
    }
}

fn error_reply(frame: &Frame) -> Result<ErrorReply, RuntimeError> {
    let mut error: ErrorReply = serde_json::from_slice(&frame.payload)
        .map_err(|error| violation(format!("error of call {}: {error}", frame.call)))?;
    clean(&mut error.message);
    Ok(error)
}

fn output(
    open: &mut Open,
    frame: Frame,
    output: Output,
    happenings: &mut Vec<Happening>,
    out: &mut Vec<u8>,
) -> Result<(), RuntimeError> {
    let call = frame.call;
    let stream = &mut open.out[output as usize];
    if stream.ended {
        let fits = frame.end && frame.payload.is_empty() && frame.offset == stream.received;
        if fits && std::mem::take(&mut stream.end_again) {
            return Ok(());
        }
        return Err(violation(format!("call {call}: {output:?} after its end")));
    }
    let at = stream.received - stream.again;
    if frame.offset != at {
        return Err(violation(format!(
            "call {call}: {output:?} goes on at {at}, not at {}",
            frame.offset
        )));
    }
    let mut bytes = frame.payload;
    let known = stream.again.min(bytes.len() as u64);
    stream.again -= known;
    bytes.drain(..known as usize);
    stream.received = stream.received.saturating_add(bytes.len() as u64);
    if stream.received - stream.again - stream.acked > STREAM_WINDOW {
        return Err(violation(format!(
            "call {call}: {output:?} overruns its window"
        )));
    }
    if frame.end && stream.again > 0 {
        return Err(violation(format!(
            "call {call}: {output:?} ends before what it had brought"
        )));
    }
    stream.ended = frame.end;
    if stream.stopped {
        return Ok(());
    }
    if !bytes.is_empty() {
        happenings.push(Happening::Output {
            call,
            output,
            bytes,
        });
    }
    if frame.end {
        happenings.push(Happening::OutputEnd { call, output });
    } else if let Some(upto) = stream.due() {
        // What was said again had been taken before.
        Frame::ack(call, output.kind(), upto).encode_into(out);
    }
    Ok(())
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
