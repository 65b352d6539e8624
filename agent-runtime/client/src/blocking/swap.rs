//! Another runtime for the guest.

use std::time::{Duration, Instant};

use ratoon_protocol::{Call, RuntimeSwap, Swapped};

use super::{Client, result};
use crate::RuntimeError;
use crate::state::Happening;

impl Client {
    /// Has the runtime replaced by `binary`, whose BLAKE3 is `blake3` (64 hexadecimal digits). What runs
    /// goes on, and so does this connection.
    ///
    /// # Errors
    /// [`RuntimeError::Call`]: the old runtime goes on, and says why; and as [`Client::ping`].
    pub fn swap_runtime(
        &mut self,
        binary: &[u8],
        blake3: &str,
        within: Duration,
    ) -> Result<Swapped, RuntimeError> {
        let call = Call::RuntimeSwap(RuntimeSwap {
            bytes: binary.len() as u64,
            blake3: blake3.to_owned(),
        });
        let swapped: Swapped = self.guarded(|client| client.send_runtime(&call, binary, within))?;
        self.hello.runtime.clone_from(&swapped.runtime);
        self.hello.methods.clone_from(&swapped.methods);
        Ok(swapped)
    }

    fn send_runtime(
        &mut self,
        call: &Call,
        binary: &[u8],
        within: Duration,
    ) -> Result<Swapped, RuntimeError> {
        let id = self.link.state.call(call)?;
        let deadline = Instant::now() + within;
        let (mut rest, mut happenings) = (binary, Vec::new());
        loop {
            // None: all has been said, or the runtime wants no more.
            while let Some(room) = self.link.state.stdin_room(id).filter(|room| *room > 0) {
                let (piece, after) = rest.split_at(room.min(rest.len()));
                self.link.state.stdin(id, piece, after.is_empty());
                rest = after;
            }
            if Instant::now() >= deadline {
                let what = "taken the new runtime";
                return Err(RuntimeError::Timeout { what, within });
            }
            self.link
                .wait(Some(deadline), None, None, &mut happenings)?;
            for happening in happenings.drain(..) {
                match happening {
                    Happening::Reply { call, value } if call == id => return result(id, value),
                    Happening::Failed { call, error } if call == id => {
                        return Err(RuntimeError::Call(error));
                    }
                    _ => {}
                }
            }
        }
    }
}
