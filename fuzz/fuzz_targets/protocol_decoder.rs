//! Any bytes, in any pieces, into the frame decoder.
//!
//! Rules: no panic; how the bytes are cut makes no difference; a frame that comes out encodes to
//! the bytes that went in; what is held is bounded by one frame and one piece.

#![no_main]

use libfuzzer_sys::fuzz_target;
use ratoon_protocol::{Decoder, Frame, FrameError, HEADER_LEN, MAX_PAYLOAD_LEN};

fn decode(bytes: &[u8], piece: usize) -> (Vec<Frame>, Option<FrameError>) {
    let mut decoder = Decoder::new();
    let mut frames = Vec::new();
    for chunk in bytes.chunks(piece.max(1)) {
        decoder.feed(chunk);
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(error) => return (frames, Some(error)),
            }
        }
        assert!(decoder.pending() <= HEADER_LEN + MAX_PAYLOAD_LEN);
    }
    (frames, None)
}

fuzz_target!(|data: &[u8]| {
    let Some((&cut, bytes)) = data.split_first() else {
        return;
    };
    let (frames, error) = decode(bytes, usize::from(cut));
    assert_eq!(decode(bytes, bytes.len()), (frames.clone(), error));
    let mut again = Vec::new();
    for frame in &frames {
        frame.encode_into(&mut again);
    }
    assert_eq!(again, bytes[..again.len()]);
});
