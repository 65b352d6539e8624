//! As much of HTTP/1.1 as the bridge and the vendors' SDKs speak.
//!
//! A head is read whole ([`httparse`]), a body by its framing. What is not plain is refused: two lengths, a length
//! beside chunks, a coding other than `chunked`.

use crate::bridge::{Broken, Connection};
use crate::clock::Moment;
use crate::stop::Stop;

/// The largest head.
pub const MAX_HEAD_BYTES: usize = 64 << 10;
/// The most headers.
pub const MAX_HEADERS: usize = 100;
const PIECE: usize = 16 << 10;

/// Bytes that are not HTTP as it is spoken here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this is not HTTP as it is spoken here: {0}")]
pub struct Malformed(pub &'static str);

/// How long a body is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Framing {
    /// So many bytes more.
    Length(u64),
    /// Chunks.
    Chunked(Chunks),
    /// To the connection's end.
    ToEnd,
}

impl Framing {
    /// As the headers say; none when they say nothing.
    pub fn of<'a>(
        headers: impl Iterator<Item = (&'a str, &'a [u8])>,
    ) -> Result<Option<Self>, Malformed> {
        let mut framing = None;
        for (name, value) in headers {
            let found = if name.eq_ignore_ascii_case("content-length") {
                let digits = value.trim_ascii();
                let number = std::str::from_utf8(digits)
                    .ok()
                    .filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()))
                    .and_then(|text| text.parse().ok())
                    .ok_or(Malformed("a length that is no number"))?;
                Self::Length(number)
            } else if name.eq_ignore_ascii_case("transfer-encoding") {
                if !value.trim_ascii().eq_ignore_ascii_case(b"chunked") {
                    return Err(Malformed("a transfer coding that is not chunked"));
                }
                Self::Chunked(Chunks::default())
            } else {
                continue;
            };
            if framing.replace(found).is_some() {
                return Err(Malformed("two lengths of one body"));
            }
        }
        Ok(framing)
    }

    /// Takes a body's bytes: appends what they mean to `out`, says how many belong to the body, and whether it ends
    /// with them.
    pub fn take(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Result<(usize, bool), Malformed> {
        match self {
            Self::Length(left) => {
                let take = usize::try_from(*left).map_or(bytes.len(), |left| left.min(bytes.len()));
                out.extend_from_slice(&bytes[..take]);
                *left -= take as u64;
                Ok((take, *left == 0))
            }
            Self::Chunked(chunks) => {
                let taken = chunks.take(bytes, out)?;
                Ok((taken, chunks.state == State::End))
            }
            Self::ToEnd => {
                out.extend_from_slice(bytes);
                Ok((bytes.len(), false))
            }
        }
    }
}

/// Takes chunks apart.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chunks {
    state: State,
    left: u64,
    /// Bytes of the line so far: sizes and trailers are short.
    line: usize,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum State {
    #[default]
    Size,
    Extension,
    SizeLf,
    Data,
    DataCr,
    DataLf,
    Trailer,
    TrailerLf,
    End,
}

impl Chunks {
    fn take(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Result<usize, Malformed> {
        let mut at = 0;
        while at < bytes.len() && self.state != State::End {
            if self.state == State::Data {
                let rest = bytes.len() - at;
                let len = usize::try_from(self.left).map_or(rest, |left| left.min(rest));
                out.extend_from_slice(&bytes[at..at + len]);
                at += len;
                self.left -= len as u64;
                if self.left == 0 {
                    self.state = State::DataCr;
                }
                continue;
            }
            self.byte(bytes[at])?;
            at += 1;
        }
        Ok(at)
    }

    fn byte(&mut self, byte: u8) -> Result<(), Malformed> {
        self.line += 1;
        if self.line > MAX_HEAD_BYTES {
            return Err(Malformed("a chunk's line is too long"));
        }
        self.state = match (self.state, byte) {
            (State::Size, b'\r') if self.line > 1 => State::SizeLf,
            (State::Size, b';' | b' ' | b'\t') if self.line > 1 => State::Extension,
            (State::Size, byte) => {
                let digit = char::from(byte).to_digit(16);
                let digit = digit.ok_or(Malformed("a chunk's size is no number"))?;
                if self.left >> 56 != 0 {
                    return Err(Malformed("a chunk is too large"));
                }
                self.left = self.left << 4 | u64::from(digit);
                State::Size
            }
            (State::Extension, b'\r') => State::SizeLf,
            (State::Extension, _) => State::Extension,
            (State::SizeLf, b'\n') => {
                self.line = 0;
                match self.left {
                    0 => State::Trailer,
                    _ => State::Data,
                }
            }
            (State::DataCr, b'\r') => State::DataLf,
            (State::DataLf, b'\n') => {
                self.line = 0;
                State::Size
            }
            (State::Trailer, b'\r') => State::TrailerLf,
            (State::Trailer, _) => State::Trailer,
            // The empty line is the last one.
            (State::TrailerLf, b'\n') if self.line == 2 => State::End,
            (State::TrailerLf, b'\n') => {
                self.line = 0;
                State::Trailer
            }
            _ => return Err(Malformed("chunks are not where they should be")),
        };
        Ok(())
    }
}

/// An answer whose body is still to come.
#[derive(Debug)]
pub struct Answer {
    connection: Connection,
    /// Its status.
    pub status: u16,
    headers: Vec<(String, String)>,
    framing: Framing,
    /// Of the body, read with the head.
    read: Vec<u8>,
    ended: bool,
}

/// Why there is no answer, or no more of it.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    /// No bytes.
    #[error(transparent)]
    Broken(#[from] Broken),
    /// Other bytes.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The body is shorter than it was said to be.
    #[error("the answer broke off")]
    Short,
}

/// Sends a request and reads the answer's head.
pub fn ask(
    connection: Connection,
    head: &str,
    body: &[u8],
    until: Option<Moment>,
    stop: &Stop,
) -> Result<Answer, AnswerError> {
    let mut request = Vec::with_capacity(head.len() + body.len());
    request.extend_from_slice(head.as_bytes());
    request.extend_from_slice(body);
    // It may refuse before it has read all: then there is an answer all the same.
    let sent = connection.send(&request, until, stop);
    if let Err(error @ (Broken::Stopped | Broken::Over)) = sent {
        return Err(error.into());
    }
    let mut bytes = Vec::new();
    let mut piece = [0; PIECE];
    loop {
        let read = match connection.receive(&mut piece, until, stop) {
            Ok(0) => {
                sent?;
                return Err(AnswerError::Short);
            }
            Ok(read) => read,
            Err(error) => {
                sent?;
                return Err(error.into());
            }
        };
        bytes.extend_from_slice(&piece[..read]);
        while let Some((len, status, headers)) = parse_head(&bytes)? {
            bytes.drain(..len);
            // "Go on", or the like: the answer itself follows.
            if (100..200).contains(&status) {
                continue;
            }
            let pairs = headers
                .iter()
                .map(|(name, value)| (name.as_str(), value.as_bytes()));
            let framing = Framing::of(pairs)?.unwrap_or(Framing::ToEnd);
            let ended = framing == Framing::Length(0);
            return Ok(Answer {
                connection,
                status,
                headers,
                framing,
                read: bytes,
                ended,
            });
        }
        if bytes.len() > MAX_HEAD_BYTES {
            return Err(Malformed("the head is too long").into());
        }
    }
}

type Head = (usize, u16, Vec<(String, String)>);

fn parse_head(bytes: &[u8]) -> Result<Option<Head>, Malformed> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    match response.parse(bytes) {
        Err(_) => Err(Malformed("the answer's head")),
        Ok(httparse::Status::Partial) => Ok(None),
        Ok(httparse::Status::Complete(len)) => {
            let headers = response.headers.iter().map(|header| {
                let value = String::from_utf8_lossy(header.value).into_owned();
                (header.name.to_ascii_lowercase(), value)
            });
            Ok(Some((len, response.code.unwrap_or(0), headers.collect())))
        }
    }
}

impl Answer {
    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(given, _)| given == name);
        found.map(|(_, value)| value.as_str())
    }

    /// The next piece of the body; none at its end.
    pub fn piece(
        &mut self,
        until: Option<Moment>,
        stop: &Stop,
    ) -> Result<Option<Vec<u8>>, AnswerError> {
        loop {
            if self.ended {
                return Ok(None);
            }
            if self.read.is_empty() {
                let mut piece = [0; PIECE];
                match self.connection.receive(&mut piece, until, stop)? {
                    0 if self.framing == Framing::ToEnd => self.ended = true,
                    0 => return Err(AnswerError::Short),
                    read => self.read.extend_from_slice(&piece[..read]),
                }
                continue;
            }
            let bytes = std::mem::take(&mut self.read);
            let mut out = Vec::new();
            let (_, ended) = self.framing.take(&bytes, &mut out)?;
            self.ended = ended;
            if !out.is_empty() {
                return Ok(Some(out));
            }
        }
    }

    /// The whole body, or as much of it as comes and `most` allows.
    pub fn text(&mut self, most: usize, until: Option<Moment>, stop: &Stop) -> String {
        let mut all = Vec::new();
        while all.len() < most
            && let Ok(Some(piece)) = self.piece(until, stop)
        {
            all.extend_from_slice(&piece);
        }
        all.truncate(most);
        String::from_utf8_lossy(&all).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framing(headers: &[(&str, &str)]) -> Result<Option<Framing>, Malformed> {
        Framing::of(
            headers
                .iter()
                .map(|(name, value)| (*name, value.as_bytes())),
        )
    }

    #[test]
    fn chunks_come_in_any_pieces() {
        let text = b"5\r\nhello\r\n1;x=y\r\n!\r\n0\r\nTrailer: x\r\n\r\nNEXT";
        for size in 1..text.len() {
            let mut framing = Framing::Chunked(Chunks::default());
            let (mut out, mut used, mut ended) = (Vec::new(), 0, false);
            for piece in text.chunks(size) {
                if ended {
                    break;
                }
                let (taken, end) = framing.take(piece, &mut out).expect("chunks");
                used += taken;
                ended = end;
            }
            assert!(ended);
            assert_eq!(out, b"hello!");
            assert_eq!(used, text.len() - 4, "in pieces of {size}");
        }
    }

    #[test]
    fn chunks_that_are_none_are_refused() {
        for text in [
            "\r\n",
            "x\r\n",
            "5hello",
            "1\r\nab\r\n",
            "1\r\na\n",
            "fffffffffffffffff\r\n",
            "5 \n",
        ] {
            let mut framing = Framing::Chunked(Chunks::default());
            let taken = framing.take(text.as_bytes(), &mut Vec::new());
            // `5 \n` only waits for its end.
            assert!(taken.is_err() || text == "5 \n", "{text:?}");
        }
    }

    #[test]
    fn a_body_has_one_length() {
        assert_eq!(framing(&[("a", "b")]), Ok(None));
        assert_eq!(
            framing(&[("Content-Length", "7")]),
            Ok(Some(Framing::Length(7)))
        );
        for headers in [
            &[("content-length", "7"), ("Content-Length", "7")][..],
            &[("content-length", "7"), ("transfer-encoding", "chunked")],
            &[("content-length", "+7")],
            &[("content-length", "7, 7")],
            &[("transfer-encoding", "gzip, chunked")],
        ] {
            assert!(framing(headers).is_err(), "{headers:?}");
        }
    }
}
