//! What drivers say on their control socket. A line is a kind (one byte) and what belongs to it:
//!
//! ```text
//!   H                  the interpreter is up
//!   X{"errno":N}       it is not: the directory refused it
//!   D{…}               a value to show: the line of DATA as it is, passed on in pieces
//!   O<len>  P<len>     so many bytes of standard output or error follow: what the outputs still
//!                      held at the cell's end (saves a write, a read and a frame)
//!   E{"status":…}      the cell has ended
//!   S<status>          so has Bash's
//!   R{"pid":…}         a zygote has reaped a context
//! ```
//!
//! Guest programs can write to it whatever they like: lines that are kept whole are bounded, values
//! are never held, and what does not fit is a [`Garbage`] that ends the context.

use ratoon_protocol::CodeError;
use serde::{Deserialize, Serialize};

use crate::session::Output;
use crate::swap::forms::{carried, carried_by_serde};

/// Longest line but for values, in bytes: a traceback of 32 KiB, all escaped, and its message.
const LINE_LIMIT: usize = 320 * 1024;

/// Longest line of a value, in bytes.
const DATA_LIMIT: usize = 9 << 20;

/// The driver does not keep to the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the interpreter's control channel carries garbage")]
pub struct Garbage;

/// How a driver says that a cell ended: `None` is well.
pub type Outcome = Option<CodeError>;

/// What comes next.
#[derive(Debug, PartialEq)]
pub enum Step<'a> {
    /// The rest of it has not come yet.
    More,
    /// There is no room for what has come.
    Blocked,
    /// Bytes of an output.
    Bytes(Output, &'a [u8]),
    /// It is up.
    Hello,
    /// No interrupt of the last cell can reach the next one.
    Calm,
    /// It cannot start in the directory: errno.
    Refused(i32),
    /// The cell has ended.
    End(Outcome),
    /// A process was reaped: its id and wait status.
    Reaped(i32, i32),
}

#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
enum Inside {
    /// At a line's start.
    #[default]
    Nothing,
    /// In a value, of which so much has gone.
    Value(usize),
    /// So much is left of text.
    Text(Output, usize),
}

/// Bytes that came, and where we are in them.
#[derive(Debug, Default)]
pub struct Wire {
    buffer: Vec<u8>,
    at: usize,
    inside: Inside,
}

carried_by_serde!(Inside);
carried!(Wire { buffer, at, inside });

#[derive(Deserialize)]
struct End {
    status: String,
    #[serde(default)]
    error: CodeError,
}

#[derive(Deserialize)]
struct Refusal {
    errno: i32,
}

#[derive(Deserialize)]
struct Reaping {
    pid: i32,
    status: i32,
}

impl Wire {
    /// Whether what was read can be what a wire was.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self) -> Result<(), &'static str> {
        let sent = match self.inside {
            Inside::Value(sent) => sent,
            _ => 0,
        };
        match self.at <= self.buffer.len() && sent <= DATA_LIMIT {
            true => Ok(()),
            false => Err("an interpreter has said more than there is"),
        }
    }

    /// Takes what was received.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.at);
        self.at = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// Whether the next thing to come belongs to a cell's end, so that the pipes must be drained
    /// before it.
    pub fn at_end(&self) -> bool {
        matches!(self.inside, Inside::Nothing)
            && matches!(self.buffer.get(self.at), Some(b'O' | b'P' | b'E' | b'S'))
    }

    /// The next thing. `room` says how much of an output may be taken.
    ///
    /// # Errors
    /// What came is nothing that a driver says.
    pub fn next(&mut self, room: impl Fn(Output) -> usize) -> Result<Step<'_>, Garbage> {
        if let Inside::Nothing = self.inside
            && let Some(b'D') = self.buffer.get(self.at)
        {
            self.at += 1;
            self.inside = Inside::Value(0);
        }
        let rest = &self.buffer[self.at..];
        if rest.is_empty() {
            self.buffer.clear();
            self.at = 0;
            if self.buffer.capacity() > LINE_LIMIT {
                self.buffer = Vec::new();
            }
            return Ok(Step::More);
        }
        let (output, most) = match self.inside {
            Inside::Nothing => return self.line(),
            Inside::Value(_) => {
                let end = rest.iter().position(|&byte| byte == b'\n');
                (Output::Data, end.map_or(rest.len(), |end| end + 1))
            }
            Inside::Text(output, left) => (output, left.min(rest.len())),
        };
        let len = most.min(room(output));
        if len == 0 {
            return Ok(Step::Blocked);
        }
        let start = self.at;
        self.at += len;
        let bytes = &self.buffer[start..self.at];
        self.inside = match self.inside {
            Inside::Value(_) if bytes.ends_with(b"\n") => Inside::Nothing,
            Inside::Value(sent) if sent + len > DATA_LIMIT => return Err(Garbage),
            Inside::Value(sent) => Inside::Value(sent + len),
            Inside::Text(_, left) if left == len => Inside::Nothing,
            Inside::Text(output, left) => Inside::Text(output, left - len),
            Inside::Nothing => Inside::Nothing,
        };
        Ok(Step::Bytes(output, bytes))
    }

    fn line(&mut self) -> Result<Step<'_>, Garbage> {
        let rest = &self.buffer[self.at..];
        let Some(len) = rest.iter().position(|&byte| byte == b'\n') else {
            return match rest.len() > LINE_LIMIT || !b"HXOPESR".contains(&rest[0]) {
                true => Err(Garbage),
                false => Ok(Step::More),
            };
        };
        let (kind, text) = (rest[0], &rest[1.min(len)..len]);
        let number = || {
            let text = std::str::from_utf8(text).map_err(|_| Garbage)?;
            text.parse::<u32>().map_err(|_| Garbage)
        };
        let step = match kind {
            b'H' => Step::Hello,
            b'C' => Step::Calm,
            b'X' => Step::Refused(json::<Refusal>(text)?.errno),
            b'E' => {
                let end: End = json(text)?;
                Step::End((end.status != "ok").then_some(end.error))
            }
            b'S' => Step::End(match number()? {
                0 => None,
                status => Some(CodeError {
                    name: "ExitStatus".into(),
                    message: status.to_string(),
                    traceback: String::new(),
                }),
            }),
            b'R' => {
                let reaping: Reaping = json(text)?;
                Step::Reaped(reaping.pid, reaping.status)
            }
            b'O' | b'P' => {
                let output = match kind {
                    b'O' => Output::Stdout,
                    _ => Output::Stderr,
                };
                let left = number()? as usize;
                if left > 0 {
                    self.inside = Inside::Text(output, left);
                }
                Step::Bytes(output, &[])
            }
            _ => return Err(Garbage),
        };
        self.at += len + 1;
        Ok(step)
    }
}

fn json<'a, T: Deserialize<'a>>(text: &'a [u8]) -> Result<T, Garbage> {
    serde_json::from_slice(text).map_err(|_| Garbage)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(_: Output) -> usize {
        usize::MAX
    }

    #[test]
    fn a_message_in_single_bytes_is_the_same_message() {
        let mut wire = Wire::default();
        let text = b"H\nD{\"data\":{}}\nO3\na\nbE{\"status\":\"ok\"}\nS3\n";
        let (mut data, mut stdout, mut ends, mut hellos) = (Vec::new(), Vec::new(), Vec::new(), 0);
        for byte in text {
            wire.feed(&[*byte]);
            loop {
                match wire.next(all).unwrap() {
                    Step::More => break,
                    Step::Bytes(Output::Data, bytes) => data.extend_from_slice(bytes),
                    Step::Bytes(_, bytes) => stdout.extend_from_slice(bytes),
                    Step::End(end) => ends.push(end.map(|error| error.message)),
                    Step::Hello => hellos += 1,
                    step => panic!("{step:?}"),
                }
            }
        }
        assert_eq!(
            (data.as_slice(), stdout.as_slice()),
            (&b"{\"data\":{}}\n"[..], &b"a\nb"[..])
        );
        assert_eq!((hellos, ends), (1, vec![None, Some("3".to_owned())]));
    }

    #[test]
    fn a_value_is_passed_on_only_as_there_is_room() {
        let mut wire = Wire::default();
        wire.feed(b"D12345\nS0\n");
        assert_eq!(wire.next(|_| 0), Ok(Step::Blocked));
        assert_eq!(
            wire.next(|_| 4),
            Ok(Step::Bytes(Output::Data, &b"1234"[..]))
        );
        assert_eq!(wire.next(|_| 9), Ok(Step::Bytes(Output::Data, &b"5\n"[..])));
        assert!(wire.at_end());
        assert_eq!(wire.next(|_| 0), Ok(Step::End(None)));
    }

    #[test]
    fn what_no_driver_says_is_garbage() {
        for text in [
            &b"hello\n"[..],
            b"\n",
            b"E\n",
            b"E{\"status\":1}\n",
            b"Oxx\n",
            b"O-1\n",
            b"O99999999999\n",
            b"S\xff\n",
            b"R{}\n",
            b"zz",
        ] {
            let mut wire = Wire::default();
            wire.feed(text);
            assert_eq!(wire.next(all), Err(Garbage), "{text:?}");
        }
    }

    #[test]
    fn a_line_and_a_value_without_end_are_garbage_at_their_limits() {
        let mut wire = Wire::default();
        wire.feed(b"E");
        wire.feed(&vec![b' '; LINE_LIMIT]);
        assert_eq!(wire.next(all), Err(Garbage));
        let mut wire = Wire::default();
        wire.feed(b"D");
        let piece = vec![b'x'; 1 << 20];
        let mut passed = 0;
        let end = loop {
            wire.feed(&piece);
            match wire.next(all) {
                Ok(Step::Bytes(_, bytes)) => passed += bytes.len(),
                other => break other,
            }
        };
        assert_eq!(end, Err(Garbage));
        assert_eq!(passed, DATA_LIMIT);
    }
}
