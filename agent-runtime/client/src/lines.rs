//! Values as lines of JSON, out of an output.

use serde::de::DeserializeOwned;

use crate::RuntimeError;

/// Lines that are not whole yet, at most `limit` bytes and a chunk.
pub(crate) struct Lines {
    buffer: Vec<u8>,
    /// Where the next line begins.
    start: usize,
    /// Up to here there is no end of that line.
    searched: usize,
    limit: usize,
}

impl Lines {
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            buffer: Vec::new(),
            start: 0,
            searched: 0,
            limit,
        }
    }

    /// Takes what came, after [`Lines::next`] has said that there is no other.
    pub(crate) fn feed(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.start);
        self.searched -= self.start;
        self.start = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole line's value.
    ///
    /// # Errors
    /// [`RuntimeError::Violation`]: a line that is too long, or no such value.
    pub(crate) fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, RuntimeError> {
        let rest = &self.buffer[self.searched..];
        let Some(len) = rest.iter().position(|&byte| byte == b'\n') else {
            self.searched = self.buffer.len();
            if self.searched - self.start > self.limit {
                let limit = self.limit;
                return Err(RuntimeError::Violation(format!(
                    "a line of more than {limit} bytes"
                )));
            }
            return Ok(None);
        };
        let end = self.searched + len;
        let line = &self.buffer[self.start..end];
        (self.start, self.searched) = (end + 1, end + 1);
        let value = serde_json::from_slice(line)
            .map_err(|error| RuntimeError::Violation(format!("a line: {error}")))?;
        Ok(Some(value))
    }

    /// The output is at its end.
    ///
    /// # Errors
    /// [`RuntimeError::Violation`]: in the middle of a line.
    pub(crate) fn finish(&self) -> Result<(), RuntimeError> {
        match self.start == self.buffer.len() {
            true => Ok(()),
            false => Err(RuntimeError::Violation(
                "an output ends in the middle of a line".into(),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_whole_however_they_are_cut() {
        let text = b"1\n22\n\"x\"\n";
        for cut in 0..text.len() {
            let (mut lines, mut values) = (Lines::new(8), Vec::new());
            for part in [&text[..cut], &text[cut..]] {
                lines.feed(part);
                while let Some(value) = lines.next::<serde_json::Value>().unwrap() {
                    values.push(value.to_string());
                }
            }
            assert_eq!(values, ["1", "22", "\"x\""], "cut at {cut}");
            lines.finish().unwrap();
        }
    }

    #[test]
    fn a_line_too_long_no_value_or_without_end_is_refused_by_name() {
        let violation = |result: Result<(), RuntimeError>| match result {
            Err(RuntimeError::Violation(what)) => what,
            other => panic!("{other:?}"),
        };
        let mut lines = Lines::new(4);
        lines.feed(b"12345");
        let long = lines.next::<u64>().map(drop);
        assert_eq!(violation(long), "a line of more than 4 bytes");
        assert_eq!(
            violation(lines.finish()),
            "an output ends in the middle of a line"
        );
        let mut lines = Lines::new(4);
        lines.feed(b"x\n");
        let none = lines.next::<u64>().map(drop);
        assert!(violation(none).starts_with("a line: expected value"));
    }
}
