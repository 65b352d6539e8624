//! OpenAI's Chat Completions, as many servers speak it.

use ratoon_protocol::{AgentUsage, Task};
use serde::Deserialize;
use serde_json::Value;

use super::{By, Delta, End, MAX_CALLS, Said, Settings, Size, StreamError};
use crate::history::{History, Ids, Part, Turn};
use crate::json;

/// A request.
pub fn body(task: &Task, settings: &Settings, history: &History) -> String {
    let mut out = String::from("{\"model\":");
    json::quote(&task.model, &mut out);
    out.push_str(&format!(
        ",\"max_completion_tokens\":{},\"stream\":true,\"stream_options\":{{\"include_usage\":true}}",
        task.max_tokens.max(1)
    ));
    super::optional("temperature", super::finite(task.temperature), &mut out);
    super::optional("seed", task.seed, &mut out);
    out.push_str(",\"tools\":");
    out.push_str(&settings.tools);
    out.push_str(",\"messages\":[{\"role\":\"system\",\"content\":");
    json::quote(&settings.system, &mut out);
    out.push('}');
    for turn in &history.turns {
        match turn {
            Turn::User(parts) => parts.iter().for_each(|part| user(part, &mut out)),
            Turn::Model(raw) => {
                for message in raw {
                    out.push(',');
                    out.push_str(message.get());
                }
            }
        }
    }
    out.push_str("]}");
    out
}

fn user(part: &Part, out: &mut String) {
    match part {
        Part::Text(text) => {
            out.push_str(",{\"role\":\"user\",\"content\":");
            json::quote(text, out);
        }
        Part::Result { id, output, .. } => {
            out.push_str(",{\"role\":\"tool\",\"tool_call_id\":");
            json::quote(id, out);
            out.push_str(",\"content\":");
            json::quote(output, out);
        }
    }
    out.push('}');
}

/// The chunks of an answer.
#[derive(Debug, Default)]
pub struct Reading {
    text: String,
    reasoning: String,
    refusal: String,
    calls: Vec<Begun>,
    finish: Option<String>,
    done: bool,
    usage: AgentUsage,
    size: Size,
}

#[derive(Debug, Default)]
struct Begun {
    index: Option<u64>,
    id: String,
    name: String,
    arguments: String,
}

#[derive(Debug, Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct Choice {
    delta: Option<Changed>,
    finish_reason: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Changed {
    content: Option<String>,
    reasoning_content: Option<String>,
    reasoning: Option<Value>,
    refusal: Option<String>,
    tool_calls: Option<Vec<Piece>>,
}

#[derive(Debug, Deserialize)]
struct Piece {
    index: Option<u64>,
    id: Option<String>,
    function: Option<Function>,
}

#[derive(Debug, Deserialize)]
struct Function {
    name: Option<String>,
    /// A string; some servers give the object itself.
    arguments: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct Usage {
    #[serde(default)]
    prompt_tokens: u64,
    #[serde(default)]
    completion_tokens: u64,
    prompt_tokens_details: Option<Details>,
}

#[derive(Debug, Deserialize)]
struct Details {
    cached_tokens: Option<u64>,
}

impl Reading {
    pub fn event(&mut self, data: &str, on: &mut dyn FnMut(Delta<'_>)) -> Result<(), StreamError> {
        if data.trim() == "[DONE]" {
            self.done = true;
            return Ok(());
        }
        let chunk: Chunk = serde_json::from_str(data)?;
        if let Some(error) = chunk.error.filter(|error| !error.is_null()) {
            let message = error["message"].as_str().map(str::to_owned);
            return Err(StreamError::Told(
                message.unwrap_or_else(|| error.to_string()),
            ));
        }
        if let Some(usage) = chunk.usage {
            self.usage = AgentUsage {
                input: usage.prompt_tokens,
                cached: usage
                    .prompt_tokens_details
                    .and_then(|details| details.cached_tokens)
                    .unwrap_or(0),
                output: usage.completion_tokens,
            };
        }
        // One is asked for; another would be none of ours.
        let Some(choice) = chunk.choices.into_iter().next() else {
            return Ok(());
        };
        self.finish = choice.finish_reason.or(self.finish.take());
        if let Some(delta) = choice.delta {
            self.changed(delta, on)?;
        }
        Ok(())
    }

    fn changed(
        &mut self,
        delta: Changed,
        on: &mut dyn FnMut(Delta<'_>),
    ) -> Result<(), StreamError> {
        if let Some(text) = delta.content.filter(|text| !text.is_empty()) {
            self.size.add(&text)?;
            self.text.push_str(&text);
            on(Delta::Text(&text));
        }
        if let Some(text) = delta.reasoning_content.filter(|text| !text.is_empty()) {
            self.size.add(&text)?;
            self.reasoning.push_str(&text);
            on(Delta::Thinking(&text));
        } else if let Some(text) = delta.reasoning.as_ref().and_then(Value::as_str)
            && !text.is_empty()
        {
            self.size.add(text)?;
            on(Delta::Thinking(text));
        }
        if let Some(text) = delta.refusal {
            self.size.add(&text)?;
            self.refusal.push_str(&text);
        }
        for piece in delta.tool_calls.into_iter().flatten() {
            self.piece(piece)?;
        }
        Ok(())
    }

    fn piece(&mut self, piece: Piece) -> Result<(), StreamError> {
        let id = piece.id.unwrap_or_default();
        let known = match piece.index {
            Some(index) => self
                .calls
                .iter()
                .rposition(|call| call.index == Some(index)),
            // Without an index a new id begins a new call.
            None if id.is_empty() => self.calls.len().checked_sub(1),
            None => self.calls.iter().rposition(|call| call.id == id),
        };
        let at = match known {
            Some(at) => at,
            None if self.calls.len() >= MAX_CALLS => return Err(StreamError::TooLong),
            None => {
                self.calls.push(Begun {
                    index: piece.index,
                    ..Begun::default()
                });
                self.calls.len() - 1
            }
        };
        let call = &mut self.calls[at];
        if call.id.is_empty() {
            call.id = id;
        }
        if let Some(function) = piece.function {
            if call.name.is_empty() {
                call.name = function.name.unwrap_or_default();
            }
            let text = match function.arguments {
                Some(Value::String(text)) => text,
                None | Some(Value::Null) => String::new(),
                Some(value) => value.to_string(),
            };
            self.size.add(&text)?;
            call.arguments.push_str(&text);
        }
        Ok(())
    }

    /// Some servers end without a word.
    pub fn is_whole(&self) -> bool {
        self.done || self.finish.is_some()
    }

    pub fn finish(self, ids: &mut Ids) -> Said {
        let calls: Vec<super::Call> = self
            .calls
            .into_iter()
            .map(|begun| super::call(ids, &begun.id, &begun.name, begun.arguments, By::Function))
            .collect();
        let refused = !self.refusal.is_empty();
        let text = if refused && self.text.is_empty() {
            self.refusal
        } else {
            self.text
        };
        let mut message = format!(r#"{{"role":"assistant","content":{}"#, json::quoted(&text));
        if !self.reasoning.is_empty() {
            super::optional(
                "reasoning_content",
                Some(json::quoted(&self.reasoning)),
                &mut message,
            );
        }
        if !calls.is_empty() {
            let made: Vec<String> = calls
                .iter()
                .map(|call| {
                    format!(
                        r#"{{"id":{},"type":"function","function":{{"name":{},"arguments":{}}}}}"#,
                        json::quoted(&call.id),
                        json::quoted(&super::plain_name(&call.name)),
                        json::quoted(&super::object(call))
                    )
                })
                .collect();
            message.push_str(&format!(",\"tool_calls\":[{}]", made.join(",")));
        }
        message.push('}');
        Said {
            raw: vec![json::raw(message)],
            end: match self.finish.as_deref() {
                Some("length") => End::Length,
                Some("content_filter") => End::Refusal,
                _ if refused && calls.is_empty() => End::Refusal,
                _ => End::Done,
            },
            text,
            calls,
            usage: self.usage,
        }
    }
}
