//! What the server says, and how it breaks.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Turns, and the key that requests must have.
///
/// A request gets the first turn that fits it and is not used up. A script whose turns have no `at`
/// is said in order; with `at` and `repeat` any number of conversations go on side by side.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Script {
    /// What is said.
    pub turns: Vec<Turn>,
    /// The one credential that a request must have; none when absent.
    #[serde(default)]
    pub key: Option<String>,
}

/// One answer.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Turn {
    /// Only when so many answers of the model are in the conversation already.
    pub at: Option<usize>,
    /// Only when the request has this text.
    pub when: Option<String>,
    /// It may be said again.
    pub repeat: bool,
    /// Words.
    pub text: String,
    /// Tool calls.
    pub tools: Vec<ToolCall>,
    /// Tokens of the input that are told.
    pub input_tokens: u64,
    /// Of them, those from a cache.
    pub cached_tokens: u64,
    /// Tokens of the output that are told; none are told at all when it is 0.
    pub output_tokens: u64,
    /// How it breaks.
    pub fault: Option<Fault>,
}

/// A tool call.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ToolCall {
    /// The tool.
    pub name: String,
    /// Its input.
    #[serde(default)]
    pub arguments: Value,
    /// Its input as text, in place of `arguments`: for what is not JSON.
    #[serde(default)]
    pub raw: Option<String>,
    /// Its id, in place of a new one: for ids that are there twice.
    #[serde(default)]
    pub id: Option<String>,
}

/// How an answer breaks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// An HTTP error in the API's form.
    Status {
        /// 429, 529, 500, ...
        status: u16,
        /// `Retry-After`, as it is written.
        #[serde(default)]
        retry_after: Option<String>,
        /// The error's message; `{credential}` in it is what the request had.
        #[serde(default)]
        message: String,
    },
    /// A redirect.
    Redirect {
        /// Where to.
        to: String,
    },
    /// The connection is closed after so many bytes of the body.
    Cut {
        /// How many.
        after_bytes: usize,
    },
    /// The stream ends well for HTTP, but without its last event.
    NoEnd,
    /// The connection is closed before an answer.
    HangUp,
    /// Nothing is said for so long, then the answer.
    Late {
        /// How long, in milliseconds.
        ms: u64,
    },
    /// The body comes in small pieces, which split UTF-8 and JSON.
    Drip {
        /// Bytes of a piece.
        bytes: usize,
        /// Between pieces, in milliseconds.
        pause_ms: u64,
    },
    /// The body never ends.
    Endless,
    /// An error event in the middle of the stream.
    ErrorEvent,
    /// The answer says that it is compressed.
    Encoded,
    /// The answer is a page of a proxy's.
    Html,
}

impl Script {
    /// These turns.
    #[must_use]
    pub fn new(turns: impl IntoIterator<Item = Turn>) -> Self {
        Self {
            turns: turns.into_iter().collect(),
            key: None,
        }
    }

    /// Requests must have this key.
    #[must_use]
    pub fn with_key(mut self, key: &str) -> Self {
        self.key = Some(key.to_owned());
        self
    }
}

impl Turn {
    /// Says something, for 10 input tokens and one output token a word.
    #[must_use]
    pub fn text(text: &str) -> Self {
        Self {
            text: text.to_owned(),
            input_tokens: 10,
            output_tokens: text.split_whitespace().count().max(1) as u64,
            ..Self::default()
        }
    }

    /// Calls a tool.
    #[must_use]
    pub fn tool(name: &str, arguments: Value) -> Self {
        Self::text("").and_tool(name, arguments)
    }

    /// Calls one more tool.
    #[must_use]
    pub fn and_tool(mut self, name: &str, arguments: Value) -> Self {
        self.tools.push(ToolCall {
            name: name.to_owned(),
            arguments,
            raw: None,
            id: None,
        });
        self.output_tokens += 10;
        self
    }

    /// Breaks.
    #[must_use]
    pub fn broken(mut self, fault: Fault) -> Self {
        self.fault = Some(fault);
        self
    }

    /// May be said again and again.
    #[must_use]
    pub fn repeated(mut self) -> Self {
        self.repeat = true;
        self
    }

    /// Is said when so many answers are in the conversation.
    #[must_use]
    pub fn at(mut self, answers: usize) -> Self {
        self.at = Some(answers);
        self
    }

    /// Is said when the request has this text.
    #[must_use]
    pub fn when(mut self, text: &str) -> Self {
        self.when = Some(text.to_owned());
        self
    }
}
