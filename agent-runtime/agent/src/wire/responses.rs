//! OpenAI's Responses, without any state at the provider.

use ratoon_protocol::{AgentUsage, Task};
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use super::{By, Delta, End, MAX_CALLS, Said, Settings, Size, StreamError};
use crate::history::{History, Ids, Part, Turn};
use crate::json;

/// A request.
pub fn body(task: &Task, settings: &Settings, history: &History) -> String {
    let mut out = String::from("{\"model\":");
    json::quote(&task.model, &mut out);
    out.push_str(&format!(
        ",\"max_output_tokens\":{},\"stream\":true,\"store\":false",
        task.max_tokens.max(1)
    ));
    super::optional("temperature", super::finite(task.temperature), &mut out);
    if settings.encrypted_reasoning {
        out.push_str(",\"include\":[\"reasoning.encrypted_content\"]");
    }
    out.push_str(",\"instructions\":");
    json::quote(&settings.system, &mut out);
    out.push_str(",\"tools\":");
    out.push_str(&settings.tools);
    out.push_str(",\"input\":[");
    let mut items: Vec<String> = Vec::new();
    for turn in &history.turns {
        match turn {
            Turn::User(parts) => items.extend(parts.iter().map(user)),
            Turn::Model(raw) => items.extend(raw.iter().map(|item| item.get().to_owned())),
        }
    }
    out.push_str(&items.join(","));
    out.push_str("]}");
    out
}

fn user(part: &Part) -> String {
    match part {
        Part::Text(text) => format!(
            r#"{{"type":"message","role":"user","content":[{{"type":"input_text","text":{}}}]}}"#,
            json::quoted(text)
        ),
        Part::Result {
            id, output, custom, ..
        } => format!(
            r#"{{"type":"{}","call_id":{},"output":{}}}"#,
            if *custom {
                "custom_tool_call_output"
            } else {
                "function_call_output"
            },
            json::quoted(id),
            json::quoted(output)
        ),
    }
}

/// The fields of items that a request may have, by type.
fn allowed(kind: &str) -> Option<&'static [&'static str]> {
    Some(match kind {
        "message" => &["type", "role", "content", "phase", "id", "status"],
        "reasoning" => &[
            "type",
            "summary",
            "content",
            "encrypted_content",
            "id",
            "status",
        ],
        "function_call" => &["type", "call_id", "name", "arguments", "id", "status"],
        "custom_tool_call" => &["type", "call_id", "name", "input", "id", "status"],
        _ => return None,
    })
}

/// The events of an answer.
#[derive(Debug, Default)]
pub struct Reading {
    items: Vec<Box<RawValue>>,
    last: Option<Last>,
    kind: String,
    refused: bool,
    size: Size,
}

#[derive(Debug, Deserialize)]
struct Event {
    /// An error of the bridge's has none.
    #[serde(rename = "type", default)]
    kind: String,
    delta: Option<Value>,
    item: Option<Box<RawValue>>,
    response: Option<Box<RawValue>>,
    message: Option<String>,
    error: Option<Value>,
}

/// The answer in the last event.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Last {
    output: Vec<Box<RawValue>>,
    usage: Option<Usage>,
    incomplete_details: Option<Value>,
    error: Option<Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Usage {
    input_tokens: u64,
    output_tokens: u64,
    input_tokens_details: Option<Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Item {
    #[serde(rename = "type")]
    kind: Option<String>,
    content: Option<Vec<ContentPart>>,
    call_id: String,
    name: String,
    arguments: String,
    input: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ContentPart {
    #[serde(rename = "type")]
    kind: String,
    text: String,
    refusal: String,
}

impl Reading {
    pub fn event(&mut self, data: &str, on: &mut dyn FnMut(Delta<'_>)) -> Result<(), StreamError> {
        // Chat's last word, which some servers say here too.
        if data.trim() == "[DONE]" {
            return Ok(());
        }
        let event: Event = serde_json::from_str(data)?;
        let delta = event.delta.as_ref().and_then(Value::as_str).unwrap_or("");
        self.size.add(delta)?;
        match event.kind.as_str() {
            "response.output_text.delta" => on(Delta::Text(delta)),
            "response.reasoning_summary_text.delta" | "response.reasoning_text.delta" => {
                on(Delta::Thinking(delta));
            }
            "response.refusal.delta" => self.refused = true,
            "response.output_item.done" => {
                let item = event
                    .item
                    .ok_or_else(|| StreamError::Strange("an item's end without the item".into()))?;
                self.size.add(item.get())?;
                if self.items.len() >= MAX_CALLS {
                    return Err(StreamError::TooLong);
                }
                self.items.push(item);
            }
            "response.completed" | "response.incomplete" | "response.failed" => {
                let response = event
                    .response
                    .ok_or_else(|| StreamError::Strange("an end without the answer".into()))?;
                let last: Last = serde_json::from_str(response.get())?;
                if event.kind == "response.failed" {
                    let error = last.error.unwrap_or_default();
                    let message = error["message"].as_str().unwrap_or("the answer failed");
                    return Err(StreamError::Told(message.to_owned()));
                }
                self.last = Some(last);
                self.kind = event.kind;
            }
            "error" => return Err(StreamError::Told(told(event.message, event.error))),
            _ if event.error.as_ref().is_some_and(Value::is_object) => {
                return Err(StreamError::Told(told(event.message, event.error)));
            }
            _ => {}
        }
        Ok(())
    }

    pub fn is_whole(&self) -> bool {
        self.last.is_some()
    }

    pub fn finish(self, ids: &mut Ids) -> Result<Said, StreamError> {
        let last = self.last.unwrap_or_default();
        let items = if self.items.is_empty() {
            last.output
        } else {
            self.items
        };
        let mut raw = Vec::new();
        let mut text = String::new();
        let mut calls = Vec::new();
        let mut refused = self.refused;
        for given in items {
            let item: Item = serde_json::from_str(given.get())?;
            let kind = item.kind.as_deref().unwrap_or("message");
            let Some(fields) = allowed(kind) else {
                continue;
            };
            let mut instead: Vec<(&str, String)> = Vec::new();
            match kind {
                "function_call" | "custom_tool_call" => {
                    let (by, words) = match kind {
                        "function_call" => (By::Function, item.arguments),
                        _ => (By::Custom, item.input),
                    };
                    let call = super::call(ids, &item.call_id, &item.name, words, by);
                    if call.id != item.call_id {
                        instead.push(("call_id", json::quoted(&call.id)));
                    }
                    let plain = super::plain_name(&call.name);
                    if plain != call.name {
                        instead.push(("name", json::quoted(&plain)));
                    }
                    if by == By::Function && call.arguments.is_err() {
                        instead.push(("arguments", json::quoted(&super::object(&call))));
                    }
                    calls.push(call);
                }
                "message" => {
                    for part in item.content.iter().flatten() {
                        text.push_str(&part.text);
                        refused |= part.kind == "refusal";
                        text.push_str(&part.refusal);
                    }
                }
                _ => {}
            }
            raw.push(rebuilt(given, fields, &instead)?);
        }
        let reason = last.incomplete_details.unwrap_or_default();
        let reason = reason["reason"].as_str().unwrap_or("");
        let usage = last.usage.unwrap_or_default();
        let details = usage.input_tokens_details.unwrap_or_default();
        Ok(Said {
            end: match (self.kind.as_str(), reason) {
                ("response.incomplete", "content_filter") => End::Refusal,
                ("response.incomplete", _) => End::Length,
                _ if refused && calls.is_empty() => End::Refusal,
                _ => End::Done,
            },
            raw,
            text,
            calls,
            usage: AgentUsage {
                input: usage.input_tokens,
                cached: details["cached_tokens"].as_u64().unwrap_or(0),
                output: usage.output_tokens,
            },
        })
    }
}

fn told(message: Option<String>, error: Option<Value>) -> String {
    let inner = error.unwrap_or_default();
    message
        .or_else(|| inner["message"].as_str().map(str::to_owned))
        .unwrap_or_else(|| "the stream ended with an error".into())
}

/// The item as it came, without fields that no request may have; with others in place of some.
fn rebuilt(
    given: Box<RawValue>,
    allowed: &[&str],
    instead: &[(&str, String)],
) -> Result<Box<RawValue>, StreamError> {
    let fields = json::fields(given.get())?;
    let known = |name: &str| allowed.contains(&name);
    if instead.is_empty() && fields.iter().all(|(name, _)| known(name)) {
        return Ok(given);
    }
    let mut made: Vec<String> = Vec::new();
    for (name, value) in fields.iter().filter(|(name, _)| known(name)) {
        let value = instead
            .iter()
            .find(|(other, _)| other == name)
            .map_or_else(|| value.get(), |(_, value)| value.as_str());
        made.push(format!("{}:{value}", json::quoted(name)));
    }
    // An id that was missing altogether.
    for (name, value) in instead {
        if !fields.iter().any(|(other, _)| other == name) {
            made.push(format!("{}:{value}", json::quoted(name)));
        }
    }
    Ok(json::raw(format!("{{{}}}", made.join(","))))
}
