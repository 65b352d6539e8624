//! A session in the state that goes from one runtime to the next (see [`crate::swap`]).

use serde_json::Value;

use super::*;
use crate::swap::forms::{Carried, carried, carried_by_serde};
use crate::swap::state::StateError;

/// No stream is as long, in bytes: what is counted does not overflow.
const MAX_OFFSET: u64 = 1 << 62;

impl Session {
    /// How many bytes it holds for its client.
    pub fn held(&self) -> usize {
        let calls = self.calls.values().map(|open| {
            let replay: usize = open.out.iter().map(|stream| stream.replay.len()).sum();
            replay + open.events.len() + open.finished.as_ref().map_or(0, Vec::len)
        });
        self.out.len() + self.decoder.pending() + calls.sum::<usize>()
    }

    /// Whether what was read can be what a session was.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self) -> Result<(), &'static str> {
        if self.out_sent > self.out.len() {
            return Err("a connection has sent more than there was");
        }
        for open in self.calls.values() {
            for stream in &open.out {
                let unacknowledged = stream.sent.checked_sub(stream.acked);
                let fits = unacknowledged.is_some_and(|len| stream.replay.len() as u64 <= len);
                if !fits || stream.sent > MAX_OFFSET {
                    return Err("an output is acknowledged beyond its end");
                }
            }
            if let Some(stdin) = &open.stdin
                && !(stdin.acked <= stdin.taken
                    && stdin.taken <= stdin.received
                    && stdin.received <= MAX_OFFSET)
            {
                return Err("an input is taken beyond its end");
            }
        }
        Ok(())
    }
}

carried!(Inbound {
    received,
    taken,
    acked,
    ended,
    stopped
});
carried!(Outbound {
    sent,
    acked,
    ended,
    replay
});
carried!(Open {
    stdin,
    out,
    events,
    finished
});
carried!(Session {
    decoder,
    calls,
    out,
    out_sent,
    urgent,
    begun,
    naming,
    named
});
carried_by_serde!(Output);

/// A decoder is the bytes that it has not yet returned.
impl Carried for Decoder {
    fn carry(&self) -> Value {
        self.pending_bytes().to_vec().carry()
    }

    fn arrive(value: Value) -> Result<Self, StateError> {
        let mut decoder = Self::new();
        decoder.feed(&Vec::<u8>::arrive(value)?);
        Ok(decoder)
    }
}
