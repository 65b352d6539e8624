//! Finds usage in a provider's JSON while it passes, in constant memory.
//!
//! The scanner is pushed bytes and remembers where in the document it is: the keys of the first
//! levels, nothing of what is deeper. Text that a model makes cannot pass for usage: it is within a
//! string, or deeper than usage stands. It checks nothing; of bytes that are not JSON it makes
//! nothing.

/// How deep keys are remembered.
const LEVELS: usize = 4;
/// The longest key or scalar of interest.
const TOKEN_BYTES: usize = 40;

/// Tokens as a provider counts them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Input tokens, those read from or written to a cache not among them, if Anthropic says so.
    pub input: Option<u64>,
    /// Output tokens.
    pub output: Option<u64>,
    /// Input tokens that the provider had in its cache.
    pub cached: u64,
    /// Input tokens that it put there (Anthropic).
    pub cache_written: u64,
    /// Whether `input` is without the two above.
    pub input_is_rest: bool,
}

impl Usage {
    /// All tokens of the input.
    #[must_use]
    pub fn all_input(&self) -> Option<u64> {
        let input = self.input?;
        Some(if self.input_is_rest {
            input
                .saturating_add(self.cached)
                .saturating_add(self.cache_written)
        } else {
            input
        })
    }
}

/// What an event is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Marks {
    /// `"type"` says that the stream ends well.
    pub end: bool,
    /// `"type"` says error, or there is an `"error"` object.
    pub error: bool,
    /// `"choices"` is an empty list: only usage is in it.
    pub empty_choices: bool,
}

/// The scanner of one document.
#[derive(Debug, Default)]
pub struct Scan {
    depth: usize,
    keys: [Word; LEVELS],
    is_object: [bool; LEVELS],
    expects_key: bool,
    in_string: bool,
    escaped: bool,
    string_is_key: bool,
    list_is_empty: bool,
    word: Word,
    /// What was found.
    pub marks: Marks,
}

#[derive(Debug, Clone, Copy)]
struct Word {
    bytes: [u8; TOKEN_BYTES],
    len: usize,
}

impl Default for Word {
    fn default() -> Self {
        Self {
            bytes: [0; TOKEN_BYTES],
            len: 0,
        }
    }
}

impl Word {
    fn push(&mut self, byte: u8) {
        if let Some(slot) = self.bytes.get_mut(self.len) {
            *slot = byte;
            self.len += 1;
        } else {
            // Too long to be of interest: it equals nothing any more.
            self.bytes[0] = 0;
        }
    }

    fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl Scan {
    /// Goes on with `bytes`; what is found goes into `usage`.
    pub fn push(&mut self, bytes: &[u8], usage: &mut Usage) {
        for &byte in bytes {
            self.byte(byte, usage);
        }
    }

    /// Whether all that was opened is closed.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.depth == 0 && !self.in_string
    }

    fn byte(&mut self, byte: u8, usage: &mut Usage) {
        if self.in_string {
            match byte {
                _ if self.escaped => {
                    self.escaped = false;
                    self.word.push(0);
                }
                b'\\' => self.escaped = true,
                b'"' => {
                    self.in_string = false;
                    self.string_ends();
                }
                _ => self.word.push(byte),
            }
            return;
        }
        match byte {
            b'"' => {
                self.list_is_empty = false;
                self.in_string = true;
                self.word = Word::default();
                self.string_is_key = self.expects_key;
            }
            b'{' | b'[' => {
                self.list_is_empty = byte == b'[';
                if let Some(is_object) = self.is_object.get_mut(self.depth) {
                    *is_object = byte == b'{';
                    self.keys[self.depth] = Word::default();
                }
                self.depth += 1;
                self.expects_key = byte == b'{';
                self.word = Word::default();
                if byte == b'{' && self.depth == 2 && self.key(0) == b"error" {
                    self.marks.error = true;
                }
            }
            b'}' | b']' => {
                self.scalar_ends(usage);
                if byte == b']'
                    && self.list_is_empty
                    && self.depth == 2
                    && self.key(0) == b"choices"
                {
                    self.marks.empty_choices = true;
                }
                self.list_is_empty = false;
                self.depth = self.depth.saturating_sub(1);
                self.expects_key = false;
            }
            b',' => {
                self.scalar_ends(usage);
                self.expects_key = self
                    .depth
                    .checked_sub(1)
                    .and_then(|level| self.is_object.get(level))
                    .copied()
                    .unwrap_or(false);
            }
            b':' => {
                self.expects_key = false;
                self.word = Word::default();
            }
            b' ' | b'\t' | b'\r' | b'\n' => {}
            _ => {
                self.list_is_empty = false;
                self.word.push(byte);
            }
        }
    }

    fn key(&self, level: usize) -> &[u8] {
        self.keys[level].as_bytes()
    }

    fn string_ends(&mut self) {
        let word = std::mem::take(&mut self.word);
        if self.string_is_key {
            if let Some(level) = self.depth.checked_sub(1)
                && let Some(key) = self.keys.get_mut(level)
            {
                *key = word;
            }
        } else if self.depth == 1 && self.is_object[0] && self.key(0) == b"type" {
            match word.as_bytes() {
                b"message_stop" | b"response.completed" | b"response.incomplete" => {
                    self.marks.end = true;
                }
                b"error" | b"response.failed" => {
                    self.marks.error = true;
                }
                _ => {}
            }
        }
    }

    fn scalar_ends(&mut self, usage: &mut Usage) {
        let word = std::mem::take(&mut self.word);
        if word.len == 0 || self.depth == 0 || self.depth > LEVELS {
            return;
        }
        let objects = self.is_object[..self.depth].iter().all(|is| *is);
        let Some(number) = std::str::from_utf8(word.as_bytes())
            .ok()
            .and_then(|text| text.parse::<u64>().ok())
        else {
            return;
        };
        // `usage` stands at the top, or in `message` or `response` at the top.
        let wrapped = self.depth > 2 && matches!(self.key(0), b"message" | b"response");
        let at = usize::from(wrapped);
        if !objects || self.depth < at + 2 || self.key(at) != b"usage" {
            return;
        }
        match (self.depth - at, self.key(at + 1)) {
            (2, b"input_tokens" | b"prompt_tokens") => usage.input = Some(number),
            (2, b"output_tokens" | b"completion_tokens") => usage.output = Some(number),
            (2, b"cache_read_input_tokens") => {
                usage.cached = number;
                usage.input_is_rest = true;
            }
            (2, b"cache_creation_input_tokens") => {
                usage.cache_written = number;
                usage.input_is_rest = true;
            }
            (3, b"prompt_tokens_details" | b"input_tokens_details")
                if self.key(at + 2) == b"cached_tokens" =>
            {
                usage.cached = number;
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scan(document: &str) -> (Usage, Marks) {
        let mut whole = (Usage::default(), Scan::default());
        whole.1.push(document.as_bytes(), &mut whole.0);
        // In any pieces it is the same.
        let mut pieces = (Usage::default(), Scan::default());
        for byte in document.bytes() {
            pieces.1.push(&[byte], &mut pieces.0);
        }
        assert_eq!(pieces.0, whole.0);
        assert_eq!(pieces.1.marks, whole.1.marks);
        (whole.0, whole.1.marks)
    }

    #[test]
    fn usage_of_each_wire_is_found() {
        let (usage, _) = scan(
            r#"{"type":"message_start","message":{"id":"a","usage":{"input_tokens":5,"cache_read_input_tokens":100,"cache_creation_input_tokens":7,"output_tokens":1}}}"#,
        );
        assert_eq!((usage.all_input(), usage.output), (Some(112), Some(1)));
        let (usage, _) = scan(r#"{"usage":{"output_tokens": 42 },"type":"message_delta"}"#);
        assert_eq!((usage.input, usage.output), (None, Some(42)));
        let (usage, marks) = scan(
            r#"{"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":3,"total_tokens":12,"prompt_tokens_details":{"cached_tokens":4}}}"#,
        );
        assert_eq!((usage.all_input(), usage.output), (Some(9), Some(3)));
        assert_eq!(usage.cached, 4);
        assert!(marks.empty_choices);
        let (usage, marks) = scan(
            r#"{"type":"response.completed","response":{"output":[{"a":[1,{}]}],"usage":{"input_tokens":8,"input_tokens_details":{"cached_tokens":2},"output_tokens":6}}}"#,
        );
        assert_eq!((usage.all_input(), usage.output), (Some(8), Some(6)));
        assert!(marks.end && !marks.error);
    }

    #[test]
    fn what_a_model_says_is_not_usage() {
        for document in [
            r#"{"content":[{"type":"tool_use","input":{"usage":{"output_tokens":1}}}]}"#,
            r#"{"delta":{"text":"\"usage\":{\"output_tokens\":1}"}}"#,
            r#"{"delta":{"usage":{"output_tokens":1}}}"#,
            r#"[{"usage":{"output_tokens":1}}]"#,
            r#"{"usage":[{"output_tokens":1}]}"#,
            r#"{"us\u0061ge":{"output_tokens":1}}"#,
            r#"{"x":{"type":"message_stop"}}"#,
            r#"{"usage":{"output_tokens":null,"input_tokens":-1,"x":"5"}}"#,
        ] {
            assert_eq!(
                scan(document),
                (Usage::default(), Marks::default()),
                "{document}"
            );
        }
    }

    #[test]
    fn an_error_is_seen() {
        assert!(
            scan(r#"{"type":"error","error":{"type":"overloaded_error"}}"#)
                .1
                .error
        );
        assert!(scan(r#"{"error":{"message":"x"}}"#).1.error);
        assert!(
            !scan(r#"{"type":"response.created","response":{"error":null}}"#)
                .1
                .error
        );
        assert!(!scan(r#"{"choices":[{}]}"#).1.empty_choices);
        assert!(!scan(r#"{"choices":[1]}"#).1.empty_choices);
    }

    #[test]
    fn nonsense_is_nothing() {
        for document in [
            "}}}}]]]]",
            "{{{{{{{{{{\"usage\":1",
            "\\\"",
            "[[[[[[[[\"",
            "\0\u{1}",
        ] {
            scan(document);
        }
    }
}
