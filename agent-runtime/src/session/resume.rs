//! A named session goes on over another connection.

use super::*;

impl Session {
    /// The connection is lost; the session waits for another.
    pub fn detach(&mut self) {
        self.decoder = Decoder::new();
        self.out = Vec::new();
        self.out_sent = 0;
    }

    /// A named session goes on over the connection that `newcomer` had begun; answers its
    /// `session` call `call` and says again what the client has not.
    ///
    /// # Errors
    /// [`Violation::Ack`] when the client claims to have what was never sent, or less than it once
    /// acknowledged. The session is then as it was, without a connection.
    pub fn resume(
        &mut self,
        newcomer: &mut Self,
        call: u64,
        have: &[Have],
    ) -> Result<Vec<HaveInput>, Violation> {
        for have in have {
            let Some(open) = self.calls.get(&have.call) else {
                continue;
            };
            for (stream, has) in open.out.iter().zip(have.outputs) {
                if !(stream.acked..=stream.sent).contains(&has) {
                    return Err(Violation::Ack(have.call));
                }
            }
        }
        if self.calls.contains_key(&call) {
            return Err(Violation::DuplicateCall(call));
        }
        self.decoder = std::mem::take(&mut newcomer.decoder);
        self.out = newcomer.unsent().to_vec();
        self.out_sent = 0;
        self.urgent = true;
        for have in have {
            if let Some(open) = self.calls.get_mut(&have.call) {
                for (stream, has) in open.out.iter_mut().zip(have.outputs) {
                    stream.acknowledge(has);
                }
            }
        }
        let inputs = self.calls.iter().map(|(&call, open)| HaveInput {
            call,
            stdin: open.stdin.as_ref().map_or(0, |stdin| stdin.received),
        });
        Ok(inputs.collect())
    }

    /// The second half of [`Session::resume`], after the answer to the `session` call.
    pub fn say_again(&mut self) {
        for (&call, open) in &mut self.calls {
            self.out.extend_from_slice(&open.events);
            if let Some(stdin) = &mut open.stdin {
                stdin.acked = stdin.taken;
                let ack = match stdin.stopped {
                    true => Frame::ack_and_stop(call, Kind::Stdin, stdin.acked),
                    false => Frame::ack(call, Kind::Stdin, stdin.acked),
                };
                ack.encode_into(&mut self.out);
            }
            for output in Output::ALL {
                open.out[output as usize].say_again(output.kind(), call, &mut self.out);
            }
            if let Some(frame) = &open.finished {
                self.out.extend_from_slice(frame);
            }
        }
        self.urgent = true;
    }
}

impl Outbound {
    fn say_again(&mut self, kind: Kind, call: u64, out: &mut Vec<u8>) {
        let mut offset = self.acked;
        let bytes = self.replay.make_contiguous();
        for piece in bytes.chunks(MAX_PAYLOAD_LEN) {
            out.extend_from_slice(&Frame::header(kind, call, offset, false, piece.len()));
            out.extend_from_slice(piece);
            offset += piece.len() as u64;
        }
        if self.ended {
            out.extend_from_slice(&Frame::header(kind, call, offset, true, 0));
        }
    }
}
