//! Server-sent events: the `data` of each, in whatever pieces the bytes come.
//!
//! Names, ids and comments mean nothing on the three wires. An event is text and at most [`MAX_EVENT_BYTES`] long;
//! one that the stream's end cuts off never counts.

/// The longest event: a Responses stream ends with the whole answer in one.
const MAX_EVENT_BYTES: usize = 32 << 20;

/// What is no stream of events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Too long.
    #[error("an event of the stream is too long")]
    TooLong,
    /// Not text.
    #[error("an event of the stream is no UTF-8")]
    NoText,
}

/// The state of a stream.
#[derive(Debug, Default)]
pub struct Events {
    line: Vec<u8>,
    data: Vec<u8>,
    has_data: bool,
    after_cr: bool,
    begun: bool,
}

impl Events {
    /// Takes bytes; gives the data of each event that ends with them.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Vec<String>, Malformed> {
        let mut events = Vec::new();
        let mut rest = bytes;
        while let Some(&first) = rest.first() {
            if std::mem::take(&mut self.after_cr) && first == b'\n' {
                rest = &rest[1..];
                continue;
            }
            let end = rest.iter().position(|byte| matches!(byte, b'\n' | b'\r'));
            let line = &rest[..end.unwrap_or(rest.len())];
            if self.line.len() + self.data.len() + line.len() > MAX_EVENT_BYTES {
                return Err(Malformed::TooLong);
            }
            self.line.extend_from_slice(line);
            let Some(end) = end else { break };
            self.after_cr = rest[end] == b'\r';
            rest = &rest[end + 1..];
            self.line_ends(&mut events)?;
        }
        Ok(events)
    }

    fn line_ends(&mut self, events: &mut Vec<String>) -> Result<(), Malformed> {
        let line = std::mem::take(&mut self.line);
        let mut line = line.as_slice();
        if !std::mem::replace(&mut self.begun, true) {
            line = line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line);
        }
        if line.is_empty() {
            let data = std::mem::take(&mut self.data);
            if std::mem::take(&mut self.has_data) {
                events.push(String::from_utf8(data).map_err(|_| Malformed::NoText)?);
            }
            return Ok(());
        }
        let value = match line.strip_prefix(b"data") {
            Some(b"") => &b""[..],
            Some([b':', b' ', value @ ..]) | Some([b':', value @ ..]) => value,
            _ => return Ok(()),
        };
        if std::mem::replace(&mut self.has_data, true) {
            self.data.push(b'\n');
        }
        self.data.extend_from_slice(value);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(bytes: &[u8], size: usize) -> Vec<String> {
        let mut events = Events::default();
        bytes
            .chunks(size)
            .flat_map(|piece| events.push(piece).expect("events"))
            .collect()
    }

    #[test]
    fn a_stream_may_be_split_anywhere() {
        let stream = "\u{feff}event: a\r\ndata: {\"x\":\"ü\"}\r\n\r\n: c\n\ndata:1\ndata: 2\n\nid: 7\rdata\r\rdatax: 3\n\ndata: cut off";
        for size in 1..=stream.len() {
            assert_eq!(
                all(stream.as_bytes(), size),
                ["{\"x\":\"ü\"}", "1\n2", ""],
                "in pieces of {size}"
            );
        }
    }

    #[test]
    fn what_is_no_text_is_refused() {
        let mut events = Events::default();
        assert_eq!(events.push(b"data: \xff\n\n"), Err(Malformed::NoText));
    }

    #[test]
    fn an_endless_line_is_refused() {
        let mut events = Events::default();
        let piece = vec![b'a'; 1 << 20];
        let refused = (0..64).find_map(|_| events.push(&piece).err());
        assert_eq!(refused, Some(Malformed::TooLong));
    }
}
