//! What is said to a model and what it says, as each of the three APIs has it.
//!
//! A request is built from the [`History`] alone ([`body`]), so the same history gives the same
//! bytes, and siblings of a fork share the provider's cache. An answer is read event by event ([`Reading`]) and kept as
//! the provider's own JSON; only what no request may have is mended: arguments that are no JSON, ids that were there
//! before, fields that the bridge refuses.

mod chat;
mod messages;
mod responses;

use ratoon_protocol::{AgentUsage, Task, Wire};
use serde_json::value::RawValue;

use crate::history::{History, Ids};
use crate::json;

/// The most text and arguments of one answer.
const MAX_ANSWER_BYTES: usize = 8 << 20;
/// The most tool calls of one answer.
const MAX_CALLS: usize = 128;

/// A piece of an answer that a user may see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delta<'a> {
    /// Words.
    Text(&'a str),
    /// Thoughts.
    Thinking(&'a str),
}

/// A tool call.
#[derive(Debug, Clone)]
pub struct Call {
    /// Its id, which no other call of the run has.
    pub id: String,
    /// The tool, as the model names it.
    pub name: String,
    /// The arguments, as the model wrote them.
    pub text: String,
    /// The same as JSON, or what is wrong with it.
    pub arguments: Result<Box<RawValue>, String>,
    /// How it was made, and so how it is answered.
    pub by: By,
}

/// How a call was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    /// As the API has it.
    Function,
    /// As a tool with free input (Responses).
    Custom,
    /// In the answer's text.
    Text,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// All is said.
    Done,
    /// Its limit of tokens.
    Length,
    /// The model declines.
    Refusal,
    /// The conversation is longer than the model can read.
    Context,
}

/// A whole answer.
#[derive(Debug)]
pub struct Said {
    /// The provider's own JSON, for the next request.
    pub raw: Vec<Box<RawValue>>,
    /// All words.
    pub text: String,
    /// The calls, in order.
    pub calls: Vec<Call>,
    /// Why it ended.
    pub end: End,
    /// As the provider counts.
    pub usage: AgentUsage,
}

/// Why a stream is no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// The provider, or the bridge, says so in the stream.
    #[error("{0}")]
    Told(String),
    /// It is not what the API should say.
    #[error("the model's provider answers strangely: {0}")]
    Strange(String),
    /// It is too long.
    #[error("the model's answer is too long")]
    TooLong,
}

impl From<serde_json::Error> for StreamError {
    fn from(error: serde_json::Error) -> Self {
        Self::Strange(error.to_string())
    }
}

/// An answer that is being read.
#[derive(Debug)]
pub enum Reading {
    /// See [`messages`].
    Messages(messages::Reading),
    /// See [`chat`].
    Chat(chat::Reading),
    /// See [`responses`].
    Responses(responses::Reading),
}

impl Reading {
    /// Nothing is read yet.
    pub fn new(wire: Wire) -> Self {
        match wire {
            Wire::Messages => Self::Messages(messages::Reading::default()),
            Wire::Chat => Self::Chat(chat::Reading::default()),
            Wire::Responses => Self::Responses(responses::Reading::default()),
        }
    }

    /// Takes an event.
    pub fn event(&mut self, data: &str, on: &mut dyn FnMut(Delta<'_>)) -> Result<(), StreamError> {
        match self {
            Self::Messages(reading) => reading.event(data, on),
            Self::Chat(reading) => reading.event(data, on),
            Self::Responses(reading) => reading.event(data, on),
        }
    }

    /// Whether the answer is whole.
    pub fn is_whole(&self) -> bool {
        match self {
            Self::Messages(reading) => reading.is_whole(),
            Self::Chat(reading) => reading.is_whole(),
            Self::Responses(reading) => reading.is_whole(),
        }
    }

    /// The answer.
    pub fn finish(self, ids: &mut Ids) -> Result<Said, StreamError> {
        match self {
            Self::Messages(reading) => Ok(reading.finish(ids)),
            Self::Chat(reading) => Ok(reading.finish(ids)),
            Self::Responses(reading) => reading.finish(ids),
        }
    }
}

/// What stays the same over all requests of a run, beside the task.
#[derive(Debug)]
pub struct Settings {
    /// How to work.
    pub system: String,
    /// The tools, in the wire's form: JSON.
    pub tools: String,
    /// Responses: reasoning is asked for in its encrypted form, so that it can be sent back.
    pub encrypted_reasoning: bool,
}

/// The route of a wire.
pub fn path(wire: Wire) -> &'static str {
    match wire {
        Wire::Messages => "/v1/messages",
        Wire::Chat => "/v1/chat/completions",
        Wire::Responses => "/v1/responses",
    }
}

/// A request.
pub fn body(task: &Task, settings: &Settings, history: &History) -> String {
    match task.wire {
        Wire::Messages => messages::body(task, settings, history),
        Wire::Chat => chat::body(task, settings, history),
        Wire::Responses => responses::body(task, settings, history),
    }
}

/// A tool in the wire's form.
pub fn tool(wire: Wire, name: &str, description: &str, schema: &str) -> String {
    let (name, description) = (json::quoted(name), json::quoted(description));
    match wire {
        Wire::Messages => {
            format!(r#"{{"name":{name},"description":{description},"input_schema":{schema}}}"#)
        }
        Wire::Chat => format!(
            r#"{{"type":"function","function":{{"name":{name},"description":{description},"parameters":{schema}}}}}"#
        ),
        Wire::Responses => format!(
            r#"{{"type":"function","name":{name},"description":{description},"parameters":{schema},"strict":false}}"#
        ),
    }
}

/// Makes a call of what a stream said of it.
fn call(ids: &mut Ids, id: &str, name: &str, text: String, by: By) -> Call {
    let arguments = match by {
        By::Custom => json::strict(&json::quoted(&text)),
        _ if text.trim().is_empty() => json::strict("{}"),
        _ => json::strict(&text).and_then(|raw| {
            if raw.get().starts_with('{') {
                Ok(raw)
            } else {
                Err("the arguments are no object".into())
            }
        }),
    };
    Call {
        id: ids.unique(id),
        name: name.to_owned(),
        text,
        arguments,
        by,
    }
}

/// The arguments as an object that a request may have: providers refuse, and servers' templates choke on, what is none.
fn object(call: &Call) -> String {
    match &call.arguments {
        Ok(raw) => raw.get().to_owned(),
        Err(_) => format!(r#"{{"invalid_json":{}}}"#, json::quoted(&call.text)),
    }
}

/// A name that a request may have.
fn plain_name(name: &str) -> String {
    let plain: String = name
        .chars()
        .take(64)
        .map(|letter| match letter {
            'a'..='z' | 'A'..='Z' | '0'..='9' | '_' | '-' => letter,
            _ => '_',
        })
        .collect();
    if plain.is_empty() {
        "unnamed".into()
    } else {
        plain
    }
}

/// Appends `,"name":value` for what there is.
fn optional(name: &str, value: Option<impl std::fmt::Display>, out: &mut String) {
    if let Some(value) = value {
        out.push_str(&format!(",\"{name}\":{value}"));
    }
}

/// A number that JSON has.
fn finite(number: Option<f64>) -> Option<f64> {
    number.filter(|number| number.is_finite())
}

/// Counts what an answer has said so far.
#[derive(Debug, Default)]
struct Size(usize);

impl Size {
    fn add(&mut self, text: &str) -> Result<(), StreamError> {
        self.0 += text.len();
        if self.0 > MAX_ANSWER_BYTES {
            return Err(StreamError::TooLong);
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
