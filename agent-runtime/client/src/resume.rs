//! Named sessions: a session outlives its connection. [`State::reconnect`] makes the state of the
//! next connection, which says what the client has; the runtime's answer says what the runtime has,
//! and each side sends the rest again.
//!
//! ```text
//!   named --> naming --- reply ---> going on --- connection lost, reconnect ---> naming
//! ```
//!
//! While naming, nothing but the `session` call is sent. So a runtime that does not know the
//! session, and never answered for it, has run nothing: everything is sent. One that did answer and
//! now does not know it has lost it (linger over, runtime new): [`RuntimeError::Violation`], for what
//! was run must not run twice.

use std::collections::{BTreeMap, BTreeSet};

use ratoon_protocol::{Call, Frame, Have, Kind, MAX_PAYLOAD_LEN, SessionParams, SessionReply};

use super::{Open, Output, State, error_reply, violation};
use crate::RuntimeError;

/// So many ends wait for company before they are confirmed alone.
const OWED_LIMIT: usize = 32;

/// What a named session adds.
#[derive(Debug)]
pub(super) struct Named {
    params: SessionParams,
    /// The runtime has answered for it, on some connection.
    known: bool,
    /// The `session` call that waits for its answer.
    naming: Option<u64>,
    /// Ended calls that the runtime says again.
    stale: BTreeSet<u64>,
    /// Ended calls to be confirmed.
    owed: Vec<u64>,
}

impl State {
    /// A connection in a session of this name (16 to 64 characters that nobody can guess), which
    /// [`State::reconnect`] takes up again after at most `linger_ms`.
    ///
    /// # Errors
    /// [`RuntimeError::TooLarge`] for a name that fits no frame.
    pub fn named(id: impl Into<String>, linger_ms: Option<u64>) -> Result<Self, RuntimeError> {
        let mut state = Self {
            session: Some(Named {
                params: SessionParams {
                    id: id.into(),
                    linger_ms,
                    have: Vec::new(),
                },
                known: false,
                naming: None,
                stale: BTreeSet::new(),
                owed: Vec::new(),
            }),
            ..Self::default()
        };
        state.name()?;
        Ok(state)
    }

    /// The connection is lost: the same calls on a new one. What was unsent is forgotten here and
    /// sent when the runtime has told what it has.
    ///
    /// # Errors
    /// [`RuntimeError::Closed`] when the session has no name, so that nothing can go on.
    pub fn reconnect(&mut self) -> Result<(), RuntimeError> {
        if self.session.is_none() {
            return Err(RuntimeError::Closed);
        }
        self.decoder = ratoon_protocol::Decoder::new();
        self.greeted = false;
        self.out = Vec::new();
        for open in self.calls.values_mut() {
            open.repeated = open.events;
        }
        self.name()
    }

    /// Whether the runtime has yet to answer for the session; until then only that call is sent.
    pub fn is_naming(&self) -> bool {
        self.session
            .as_ref()
            .is_some_and(|named| named.naming.is_some())
    }

    /// Says that the session is over; the runtime then ends its calls and closes. False when it has
    /// no name, and so ends with its connection.
    pub fn end_session(&mut self) -> bool {
        self.session.is_some() && self.call(&Call::SessionEnd).is_ok()
    }

    fn name(&mut self) -> Result<(), RuntimeError> {
        let Some(named) = &mut self.session else {
            return Ok(());
        };
        let have = self.calls.iter_mut().map(|(&call, open)| {
            // To say what we have is to acknowledge it, and so to ask for another window: what
            // waits here untaken is not told, and said again. Otherwise each connection that is
            // lost would add a window to what a slow reader holds.
            let outputs = std::array::from_fn(|index| {
                let stream = &mut open.out[index];
                stream.acked = match stream.ended || stream.stopped {
                    true => stream.received,
                    false => stream.taken.max(stream.acked),
                };
                stream.again = stream.received - stream.acked;
                stream.end_again = stream.ended;
                stream.acked
            });
            Have { call, outputs }
        });
        named.params.have = have.collect();
        named.stale.clear();
        // Those that were not confirmed are named again by the runtime.
        named.owed.clear();
        let call = Call::Session(named.params.clone());
        let payload = serde_json::to_vec(&call).map_err(|error| RuntimeError::Io(error.into()))?;
        if payload.len() > MAX_PAYLOAD_LEN {
            return Err(RuntimeError::TooLarge { len: payload.len() });
        }
        self.last_id += 1;
        named.naming = Some(self.last_id);
        Frame::new(Kind::Call, self.last_id, payload).encode_into(&mut self.out);
        Ok(())
    }

    /// Ends a call; its end is confirmed in a named session.
    pub(super) fn end(&mut self, call: u64) {
        self.calls.remove(&call);
        self.owe(call);
    }

    fn owe(&mut self, call: u64) {
        if let Some(named) = &mut self.session {
            named.owed.push(call);
            if named.owed.len() >= OWED_LIMIT {
                self.confirm();
            }
        }
    }

    /// Confirms what is owed, beside a frame that goes out anyway.
    pub(super) fn confirm(&mut self) {
        if let Some(named) = &mut self.session {
            for call in named.owed.drain(..) {
                Frame::ack(call, Kind::Reply, 0).encode_into(&mut self.out);
            }
        }
    }

    /// Frames that are about the session; whether this was one.
    pub(super) fn session_frame(&mut self, frame: &Frame) -> Result<bool, RuntimeError> {
        let Some(named) = &mut self.session else {
            return Ok(false);
        };
        if let Some(call) = named.naming {
            return match frame.kind {
                Kind::Reply if frame.call == call => {
                    let reply = serde_json::from_slice(&frame.payload)
                        .map_err(|error| violation(format!("reply of `session`: {error}")))?;
                    self.resume(&reply)?;
                    Ok(true)
                }
                Kind::Error if frame.call == call => {
                    Err(RuntimeError::Rejected(error_reply(frame)?))
                }
                kind => Err(violation(format!("{kind:?} before the reply of `session`"))),
            };
        }
        if !named.stale.contains(&frame.call) {
            return Ok(false);
        }
        if matches!(frame.kind, Kind::Reply | Kind::Error) {
            named.stale.remove(&frame.call);
            self.owe(frame.call);
        }
        Ok(true)
    }

    fn resume(&mut self, reply: &SessionReply) -> Result<(), RuntimeError> {
        let Some(named) = &mut self.session else {
            return Ok(());
        };
        if named.known && !reply.resumed {
            return Err(violation("the session is lost: its calls may have run"));
        }
        let mut inputs = BTreeMap::new();
        for has in &reply.calls {
            if !named.known || Some(has.call) >= named.naming || has.call == 0 {
                return Err(violation(format!("`session`: call {} never was", has.call)));
            }
            if !self.calls.contains_key(&has.call) {
                named.stale.insert(has.call);
            }
            inputs.insert(has.call, has.stdin);
        }
        named.known = true;
        named.naming = None;
        for (&call, open) in &mut self.calls {
            open.say_again(call, inputs.get(&call).copied(), &mut self.out)?;
        }
        Ok(())
    }
}

impl Open {
    /// Sends what the runtime has not; `has` is how much input it has, `None` when not even the call.
    fn say_again(
        &mut self,
        call: u64,
        has: Option<u64>,
        out: &mut Vec<u8>,
    ) -> Result<(), RuntimeError> {
        if has.is_none() {
            let heard = self.events > 0 || self.out.iter().any(|stream| stream.received > 0);
            if heard || self.stdin.as_ref().is_some_and(|stdin| stdin.acked > 0) {
                return Err(violation(format!("`session`: call {call} is forgotten")));
            }
            Frame::new(Kind::Call, call, self.payload.clone()).encode_into(out);
        }
        if let Some(stdin) = &mut self.stdin {
            let mut offset = has.unwrap_or(0);
            if !(stdin.acked..=stdin.sent).contains(&offset) {
                return Err(violation(format!(
                    "`session`: input of call {call} at {offset}, not in {}..={}",
                    stdin.acked, stdin.sent
                )));
            }
            if !stdin.stopped {
                let skip = (offset - stdin.acked) as usize;
                let bytes = stdin.replay.make_contiguous();
                for piece in bytes
                    .get(skip..)
                    .unwrap_or_default()
                    .chunks(MAX_PAYLOAD_LEN)
                {
                    let header = Frame::header(Kind::Stdin, call, offset, false, piece.len());
                    out.extend_from_slice(&header);
                    out.extend_from_slice(piece);
                    offset += piece.len() as u64;
                }
                if stdin.ended {
                    out.extend_from_slice(&Frame::header(Kind::Stdin, call, offset, true, 0));
                }
            }
        }
        for output in [Output::Stdout, Output::Stderr, Output::Data] {
            let stream = &self.out[output as usize];
            if stream.stopped && !stream.ended {
                Frame::ack_and_stop(call, output.kind(), stream.acked).encode_into(out);
            }
        }
        Ok(())
    }
}
