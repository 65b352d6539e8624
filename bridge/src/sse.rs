//! Server-sent events on their way from a provider to a guest.
//!
//! Bytes come in any pieces; events go out whole, so that an error event of ours never lands in the
//! middle of one. An event that is larger than [`HOLD_BYTES`] is passed on as it comes: memory is
//! constant whatever a provider sends. On the way usage and the stream's end are noticed.

use crate::scan::{Marks, Scan, Usage};

/// How much of an event is held back until it is whole.
pub const HOLD_BYTES: usize = 128 * 1024;

/// The state of a stream.
#[derive(Debug)]
pub struct Events {
    /// Leave out chat events that have nothing but usage: the guest did not ask for them.
    hide_usage: bool,
    held: Vec<u8>,
    /// The event was too large to hold, and its beginning is out.
    passing: bool,
    line: Field,
    line_len: usize,
    scan: Scan,
    done: Done,
    /// Usage so far.
    pub usage: Usage,
    /// An event said that the answer is whole.
    pub ended: bool,
    /// An event was an error.
    pub failed: bool,
}

/// What the current line is.
#[derive(Debug, Clone, Copy)]
enum Field {
    /// So many bytes of `data:` have come.
    Begins(usize),
    Data,
    Other,
}

/// How much of `[DONE]` the event's data is so far.
#[derive(Debug, Clone, Copy)]
enum Done {
    Matches(usize),
    No,
}

const DATA: &[u8] = b"data:";
const DONE: &[u8] = b"[DONE]";

impl Events {
    /// A new stream.
    #[must_use]
    pub fn new(hide_usage: bool) -> Self {
        Self {
            hide_usage,
            held: Vec::new(),
            passing: false,
            line: Field::Begins(0),
            line_len: 0,
            scan: Scan::default(),
            done: Done::Matches(0),
            usage: Usage::default(),
            ended: false,
            failed: false,
        }
    }

    /// Takes what came; appends to `out` what may go on.
    pub fn push(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        for &byte in bytes {
            self.held.push(byte);
            match byte {
                b'\n' => {
                    if self.line_len == 0 {
                        self.event_ends(out);
                    }
                    self.line = Field::Begins(0);
                    self.line_len = 0;
                }
                b'\r' => {}
                _ => {
                    self.line_len += 1;
                    self.in_line(byte);
                }
            }
            if self.held.len() >= HOLD_BYTES {
                self.passing = true;
                out.append(&mut self.held);
            }
        }
        if self.passing {
            out.append(&mut self.held);
        }
    }

    fn in_line(&mut self, byte: u8) {
        match self.line {
            Field::Begins(matched) if DATA[matched] == byte => {
                self.line = if matched + 1 == DATA.len() {
                    Field::Data
                } else {
                    Field::Begins(matched + 1)
                };
            }
            Field::Begins(_) => self.line = Field::Other,
            Field::Data => {
                self.done = match self.done {
                    Done::Matches(0) if byte == b' ' => self.done,
                    Done::Matches(matched) if DONE.get(matched) == Some(&byte) => {
                        Done::Matches(matched + 1)
                    }
                    _ => Done::No,
                };
                self.scan.push(&[byte], &mut self.usage);
            }
            Field::Other => {}
        }
    }

    fn event_ends(&mut self, out: &mut Vec<u8>) {
        let Marks {
            end,
            error,
            empty_choices,
        } = std::mem::take(&mut self.scan).marks;
        let done = matches!(self.done, Done::Matches(matched) if matched == DONE.len());
        self.done = Done::Matches(0);
        self.ended |= end || done;
        self.failed |= error;
        if self.hide_usage && empty_choices && !self.passing && self.usage.output.is_some() {
            self.held.clear();
        } else {
            out.append(&mut self.held);
        }
        self.passing = false;
    }

    /// Whether the guest has got all or nothing of the last event: then another may follow.
    #[must_use]
    pub fn is_between_events(&self) -> bool {
        !self.passing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(pieces: &[&[u8]], hide_usage: bool) -> (Events, String) {
        let mut events = Events::new(hide_usage);
        let mut out = Vec::new();
        for piece in pieces {
            events.push(piece, &mut out);
        }
        (events, String::from_utf8_lossy(&out).into_owned())
    }

    const CHAT: &str = "data: {\"choices\":[{\"delta\":{\"content\":\"h\u{fc}\"}}]}\n\ndata: {\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":2}}\n\ndata: [DONE]\n\n";

    #[test]
    fn events_go_out_whole_in_whatever_pieces_they_come() {
        let pieces: Vec<&[u8]> = CHAT.as_bytes().chunks(1).collect();
        let (events, out) = run(&pieces, false);
        assert_eq!(out, CHAT);
        assert!(events.ended && !events.failed);
        assert_eq!(events.usage.output, Some(2));
        let cut = &CHAT.as_bytes()[..CHAT.len() / 2];
        let (events, out) = run(&[cut], false);
        assert!(out.ends_with("\n\n") && out.len() < cut.len());
        assert!(!events.ended && events.is_between_events());
    }

    #[test]
    fn usage_that_was_not_asked_for_is_left_out() {
        let (events, out) = run(&[CHAT.as_bytes()], true);
        assert!(!out.contains("usage") && out.contains("[DONE]"));
        assert_eq!(events.usage.input, Some(3));
    }

    #[test]
    fn both_line_endings_end_an_event() {
        let stream = "event: message_stop\r\ndata: {\"type\":\"message_stop\"}\r\n\r\n";
        let (events, out) = run(&[stream.as_bytes()], false);
        assert_eq!(out, stream);
        assert!(events.ended);
    }

    #[test]
    fn a_huge_event_passes_in_constant_memory_and_its_usage_is_found() {
        let mut events = Events::new(false);
        let mut out = Vec::new();
        events.push(
            b"data: {\"type\":\"response.completed\",\"response\":{\"x\":\"",
            &mut out,
        );
        for _ in 0..64 {
            events.push(&[b'a'; 16 * 1024], &mut out);
            assert!(events.held.capacity() <= 2 * HOLD_BYTES);
            out.clear();
        }
        assert!(!events.is_between_events());
        events.push(
            b"\",\"usage\":{\"input_tokens\":1,\"output_tokens\":2}}}\n\n",
            &mut out,
        );
        assert!(events.ended && events.is_between_events());
        assert_eq!(events.usage.output, Some(2));
    }

    #[test]
    fn done_is_said_by_data_alone() {
        for stream in [
            "data: [DONE\n\n",
            "data: [DONE]]\n\n",
            ": [DONE]\n\n",
            "event: [DONE]\n\n",
        ] {
            assert!(!run(&[stream.as_bytes()], false).0.ended, "{stream}");
        }
    }
}
