//! Frames: the fixed header, its checks, and an incremental decoder.
//!
//! ```text
//!  0        4    5    6     8             16            24
//!  +--------+----+----+-----+-------------+-------------+-----------------
//!  | length | ver|kind|flags|   call id   |   offset    |  payload ...
//!  +--------+----+----+-----+-------------+-------------+-----------------
//!    u32      u8   u8   u16       u64           u64         `length` bytes     (little-endian)
//! ```

use std::fmt;

use crate::VERSION;

/// Length of a frame's header, in bytes.
pub const HEADER_LEN: usize = 24;

/// The longest payload of one frame, in bytes. A longer one is an error, never an allocation.
pub const MAX_PAYLOAD_LEN: usize = 64 * 1024;

/// Flag bit 0 of a stream frame: this is the stream's last byte range. Of an acknowledgement: the
/// receiver wants no more.
const FLAG_END: u16 = 1;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Runtime to client, first on every connection: [`crate::Hello`] as JSON.
    Hello = 1,
    /// Client to runtime: [`crate::Call`] as JSON. The call id is new on this connection.
    Call = 2,
    /// Runtime to client: the call's result as JSON; ends the call.
    Reply = 3,
    /// Runtime to client: [`crate::ErrorReply`] as JSON; ends the call.
    Error = 4,
    /// Runtime to client: [`crate::Event`] as JSON; the call goes on.
    Event = 5,
    /// Client to runtime: bytes for the process's standard input.
    Stdin = 16,
    /// Runtime to client: bytes of the process's standard output.
    Stdout = 17,
    /// Runtime to client: bytes of the process's standard error.
    Stderr = 18,
    /// Runtime to client: a third output, of calls that have values beside their text.
    Data = 20,
    /// Either way: all bytes before `offset` of the stream whose kind is the payload's one byte
    /// have been taken. With the end flag: the receiver wants no more of this stream.
    Ack = 19,
}

impl Kind {
    /// The kind whose number on the wire is `byte`.
    pub fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Hello,
            2 => Self::Call,
            3 => Self::Reply,
            4 => Self::Error,
            5 => Self::Event,
            16 => Self::Stdin,
            17 => Self::Stdout,
            18 => Self::Stderr,
            19 => Self::Ack,
            20 => Self::Data,
            _ => return None,
        })
    }
}

/// One unit on the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it is.
    pub kind: Kind,
    /// The call that it belongs to; 0 for [`Kind::Hello`].
    pub call: u64,
    /// Stream frames: the offset of the payload's first byte in its stream, in bytes.
    /// [`Kind::Ack`]: how many bytes of the stream have been taken. Otherwise 0.
    pub offset: u64,
    /// Stream frames: nothing follows on this stream after this payload. [`Kind::Ack`]: the
    /// receiver wants no more of the stream; what the sender sends all the same is dropped.
    pub end: bool,
    /// At most [`MAX_PAYLOAD_LEN`] bytes.
    pub payload: Vec<u8>,
}

/// Why bytes are not a frame. Each is final for the connection: there is no way to find the next
/// frame's start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameError {
    /// The header's version is not ours.
    Version(u8),
    /// No such kind.
    Kind(u8),
    /// The payload is longer than [`MAX_PAYLOAD_LEN`].
    TooLong(u32),
    /// Flag bits that this version does not know.
    Flags(u16),
}

impl fmt::Display for FrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Version(v) => write!(
                f,
                "the other side speaks runtime protocol version {v}, this one {VERSION}"
            ),
            Self::Kind(k) => write!(f, "unknown frame kind {k}"),
            Self::TooLong(n) => write!(
                f,
                "a frame of {n} bytes is over the limit of {MAX_PAYLOAD_LEN}"
            ),
            Self::Flags(bits) => write!(f, "unknown frame flags {bits:#06x}"),
        }
    }
}

impl std::error::Error for FrameError {}

impl Frame {
    /// A frame with a payload that is not part of a stream.
    pub fn new(kind: Kind, call: u64, payload: Vec<u8>) -> Self {
        Self {
            kind,
            call,
            offset: 0,
            end: false,
            payload,
        }
    }

    /// An acknowledgement: all bytes of `stream` before `offset` have been taken.
    pub fn ack(call: u64, stream: Kind, offset: u64) -> Self {
        Self {
            kind: Kind::Ack,
            call,
            offset,
            end: false,
            payload: vec![stream as u8],
        }
    }

    /// An acknowledgement that also says: send no more of `stream`, nobody reads it.
    pub fn ack_and_stop(call: u64, stream: Kind, offset: u64) -> Self {
        Self {
            end: true,
            ..Self::ack(call, stream, offset)
        }
    }

    /// For an [`Kind::Ack`] frame: which stream it acknowledges; [`Kind::Reply`] when it confirms the
    /// call's end. `None` when it names neither.
    pub fn acked_stream(&self) -> Option<Kind> {
        match (self.kind, self.payload.as_slice()) {
            (Kind::Ack, [byte]) => Kind::from_byte(*byte).filter(|kind| {
                matches!(
                    kind,
                    Kind::Stdin | Kind::Stdout | Kind::Stderr | Kind::Data | Kind::Reply
                )
            }),
            _ => None,
        }
    }

    /// The 24 header bytes of a frame whose payload is `payload_len` bytes: for a caller that
    /// writes header and payload from separate buffers (writev).
    pub fn header(
        kind: Kind,
        call: u64,
        offset: u64,
        end: bool,
        payload_len: usize,
    ) -> [u8; HEADER_LEN] {
        assert!(
            payload_len <= MAX_PAYLOAD_LEN,
            "a sender splits its payloads"
        );
        let mut header = [0; HEADER_LEN];
        header[0..4].copy_from_slice(&(payload_len as u32).to_le_bytes());
        header[4] = VERSION;
        header[5] = kind as u8;
        header[6..8].copy_from_slice(&(if end { FLAG_END } else { 0 }).to_le_bytes());
        header[8..16].copy_from_slice(&call.to_le_bytes());
        header[16..24].copy_from_slice(&offset.to_le_bytes());
        header
    }

    /// Appends the frame's bytes to `out`.
    ///
    /// # Panics
    /// When the payload is longer than [`MAX_PAYLOAD_LEN`]: the sender's own mistake.
    pub fn encode_into(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&Self::header(
            self.kind,
            self.call,
            self.offset,
            self.end,
            self.payload.len(),
        ));
        out.extend_from_slice(&self.payload);
    }

    /// The frame's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_LEN + self.payload.len());
        self.encode_into(&mut out);
        out
    }
}

/// Turns a byte stream, fed in any pieces, into frames. Holds at most one frame and what was fed
/// beyond it.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    consumed: usize,
}

impl Decoder {
    /// An empty decoder.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes that came from the other side.
    pub fn feed(&mut self, bytes: &[u8]) {
        if self.consumed > 0 {
            self.buffer.drain(..self.consumed);
            self.consumed = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame, `None` when more bytes are needed.
    ///
    /// # Errors
    /// A [`FrameError`] as soon as a header is wrong; the connection cannot go on then.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let bytes = &self.buffer[self.consumed..];
        let Some(header) = bytes.first_chunk::<HEADER_LEN>() else {
            return Ok(None);
        };
        let (len, kind, flags, call, offset) = parse_header(header)?;
        let Some(payload) = bytes.get(HEADER_LEN..HEADER_LEN + len) else {
            return Ok(None);
        };
        let frame = Frame {
            kind,
            call,
            offset,
            end: flags & FLAG_END != 0,
            payload: payload.to_vec(),
        };
        self.consumed += HEADER_LEN + len;
        Ok(Some(frame))
    }

    /// How many bytes have been fed and not yet returned in a frame.
    pub fn pending(&self) -> usize {
        self.buffer.len() - self.consumed
    }

    /// These bytes: a new decoder that is fed them goes on where this one is.
    pub fn pending_bytes(&self) -> &[u8] {
        &self.buffer[self.consumed..]
    }
}

fn parse_header(header: &[u8; HEADER_LEN]) -> Result<(usize, Kind, u16, u64, u64), FrameError> {
    let [l0, l1, l2, l3, version, kind, f0, f1, rest @ ..] = *header;
    let [c0, c1, c2, c3, c4, c5, c6, c7, offset @ ..] = rest;
    if version != VERSION {
        return Err(FrameError::Version(version));
    }
    let kind = Kind::from_byte(kind).ok_or(FrameError::Kind(kind))?;
    let len = u32::from_le_bytes([l0, l1, l2, l3]);
    if len as usize > MAX_PAYLOAD_LEN {
        return Err(FrameError::TooLong(len));
    }
    let flags = u16::from_le_bytes([f0, f1]);
    if flags & !FLAG_END != 0 {
        return Err(FrameError::Flags(flags));
    }
    let call = u64::from_le_bytes([c0, c1, c2, c3, c4, c5, c6, c7]);
    Ok((len as usize, kind, flags, call, u64::from_le_bytes(offset)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Frame {
        Frame {
            kind: Kind::Stdout,
            call: 7,
            offset: 1 << 40,
            end: true,
            payload: b"hello".to_vec(),
        }
    }

    #[test]
    fn a_frame_comes_back_as_it_was_whatever_the_pieces() {
        let mut bytes = sample().encode();
        Frame::new(Kind::Call, 8, b"{}".to_vec()).encode_into(&mut bytes);
        for piece in 1..bytes.len() {
            let mut decoder = Decoder::new();
            let mut frames = Vec::new();
            for chunk in bytes.chunks(piece) {
                decoder.feed(chunk);
                while let Some(frame) = decoder.next_frame().unwrap() {
                    frames.push(frame);
                }
            }
            assert_eq!(
                frames,
                [sample(), Frame::new(Kind::Call, 8, b"{}".to_vec())]
            );
            assert_eq!(decoder.pending(), 0);
        }
    }

    #[test]
    fn the_layout_is_pinned() {
        assert_eq!(
            sample().encode(),
            b"\x05\0\0\0\x01\x11\x01\0\x07\0\0\0\0\0\0\0\0\0\0\0\0\x01\0\0hello"
        );
    }

    fn spoiled(at: usize, byte: u8) -> Result<Option<Frame>, FrameError> {
        let mut bytes = sample().encode();
        bytes[at] = byte;
        let mut decoder = Decoder::new();
        decoder.feed(&bytes);
        decoder.next_frame()
    }

    #[test]
    fn each_wrong_header_field_is_refused_by_name() {
        assert_eq!(spoiled(4, 2), Err(FrameError::Version(2)));
        assert_eq!(spoiled(5, 99), Err(FrameError::Kind(99)));
        assert_eq!(
            spoiled(2, 1),
            Err(FrameError::TooLong(65536 + 5)),
            "just over the limit"
        );
        assert_eq!(spoiled(7, 0x80), Err(FrameError::Flags(0x8001)));
    }

    #[test]
    fn a_long_payload_is_refused_before_it_has_come() {
        let mut decoder = Decoder::new();
        let mut header = Frame::header(Kind::Stdin, 1, 0, false, 0);
        header[0..4].copy_from_slice(&u32::MAX.to_le_bytes());
        decoder.feed(&header);
        assert_eq!(decoder.next_frame(), Err(FrameError::TooLong(u32::MAX)));
    }

    #[test]
    fn an_acknowledgement_names_its_stream() {
        assert_eq!(
            Frame::ack(3, Kind::Stderr, 10).acked_stream(),
            Some(Kind::Stderr)
        );
        let mut wrong = Frame::ack(3, Kind::Call, 10);
        assert_eq!(wrong.acked_stream(), None);
        wrong.payload.clear();
        assert_eq!(wrong.acked_stream(), None);
    }
}
