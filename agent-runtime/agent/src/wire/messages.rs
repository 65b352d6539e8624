//! Anthropic's Messages.

use ratoon_protocol::{AgentUsage, Task};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{By, Delta, End, MAX_CALLS, Said, Settings, Size, StreamError};
use crate::history::{History, Ids, Part, Turn};
use crate::json;

const CACHE: &str = r#","cache_control":{"type":"ephemeral"}"#;

/// A request. What is marked for the provider's cache: system and tools, and the ends of the last two turns of ours.
pub fn body(task: &Task, settings: &Settings, history: &History) -> String {
    let mut out = String::from("{\"model\":");
    json::quote(&task.model, &mut out);
    out.push_str(&format!(
        ",\"max_tokens\":{},\"stream\":true",
        task.max_tokens.max(1)
    ));
    super::optional("temperature", super::finite(task.temperature), &mut out);
    out.push_str(",\"system\":[{\"type\":\"text\",\"text\":");
    json::quote(&settings.system, &mut out);
    out.push_str(CACHE);
    out.push_str("}],\"tools\":");
    out.push_str(&settings.tools);
    out.push_str(",\"messages\":[");
    let ours = history
        .turns
        .iter()
        .filter(|turn| matches!(turn, Turn::User(_)))
        .count();
    let mut number = 0;
    let mut first = true;
    for turn in &history.turns {
        let role = match turn {
            Turn::User(_) => "user",
            Turn::Model(raw) if raw.is_empty() => continue,
            Turn::Model(_) => "assistant",
        };
        if !std::mem::take(&mut first) {
            out.push(',');
        }
        out.push_str(&format!("{{\"role\":\"{role}\",\"content\":["));
        match turn {
            Turn::User(parts) => {
                number += 1;
                for (index, part) in parts.iter().enumerate() {
                    let last = index + 1 == parts.len();
                    user(part, last && number + 2 > ours, &mut out);
                    if !last {
                        out.push(',');
                    }
                }
            }
            Turn::Model(raw) => {
                let blocks: Vec<&str> = raw.iter().map(|block| block.get()).collect();
                out.push_str(&blocks.join(","));
            }
        }
        out.push_str("]}");
    }
    out.push_str("]}");
    out
}

fn user(part: &Part, cached: bool, out: &mut String) {
    match part {
        Part::Text(text) => {
            out.push_str("{\"type\":\"text\",\"text\":");
            json::quote(text, out);
        }
        Part::Result {
            id, output, error, ..
        } => {
            out.push_str("{\"type\":\"tool_result\",\"tool_use_id\":");
            json::quote(id, out);
            out.push_str(",\"content\":");
            json::quote(output, out);
            if *error {
                out.push_str(",\"is_error\":true");
            }
        }
    }
    if cached {
        out.push_str(CACHE);
    }
    out.push('}');
}

/// The events of an answer.
#[derive(Debug, Default)]
pub struct Reading {
    blocks: Vec<Block>,
    usage: Usage,
    stop: Option<String>,
    whole: bool,
    size: Size,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Block {
    #[serde(skip)]
    index: u64,
    #[serde(rename = "type")]
    kind: String,
    text: String,
    thinking: String,
    signature: Option<String>,
    data: String,
    id: String,
    name: String,
    input: Option<Box<RawValue>>,
    #[serde(skip)]
    json: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Usage {
    input_tokens: Option<u64>,
    cache_read_input_tokens: Option<u64>,
    cache_creation_input_tokens: Option<u64>,
    output_tokens: Option<u64>,
}

#[derive(Debug, Deserialize)]
struct Event {
    #[serde(rename = "type")]
    kind: String,
    index: Option<u64>,
    message: Option<Start>,
    content_block: Option<Box<RawValue>>,
    delta: Option<Changed>,
    usage: Option<Usage>,
    error: Option<Told>,
}

#[derive(Debug, Deserialize)]
struct Start {
    usage: Option<Usage>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Changed {
    #[serde(rename = "type")]
    kind: String,
    text: String,
    thinking: String,
    signature: String,
    partial_json: String,
    stop_reason: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Told {
    message: String,
}

impl Usage {
    /// Later events count all that was before.
    fn update(&mut self, later: Self) {
        self.input_tokens = later.input_tokens.or(self.input_tokens);
        self.cache_read_input_tokens = later
            .cache_read_input_tokens
            .or(self.cache_read_input_tokens);
        self.cache_creation_input_tokens = later
            .cache_creation_input_tokens
            .or(self.cache_creation_input_tokens);
        self.output_tokens = later.output_tokens.or(self.output_tokens);
    }
}

impl Reading {
    pub fn event(&mut self, data: &str, on: &mut dyn FnMut(Delta<'_>)) -> Result<(), StreamError> {
        let event: Event = serde_json::from_str(data)?;
        match event.kind.as_str() {
            "message_start" => {
                if let Some(usage) = event.message.and_then(|message| message.usage) {
                    self.usage.update(usage);
                }
            }
            "content_block_start" => {
                let raw = event
                    .content_block
                    .ok_or_else(|| StreamError::Strange("a block without a beginning".into()))?;
                let mut block: Block = serde_json::from_str(raw.get())?;
                block.index = event.index.unwrap_or(self.blocks.len() as u64);
                if self.blocks.len() >= MAX_CALLS {
                    return Err(StreamError::TooLong);
                }
                if !block.text.is_empty() {
                    on(Delta::Text(&block.text));
                }
                self.blocks.push(block);
            }
            "content_block_delta" => {
                let index = event.index.unwrap_or(0);
                let block = self
                    .blocks
                    .iter_mut()
                    .rev()
                    .find(|block| block.index == index)
                    .ok_or_else(|| StreamError::Strange("a piece of no block".into()))?;
                let delta = event.delta.unwrap_or_default();
                match delta.kind.as_str() {
                    "text_delta" => {
                        self.size.add(&delta.text)?;
                        block.text.push_str(&delta.text);
                        on(Delta::Text(&delta.text));
                    }
                    "input_json_delta" => {
                        self.size.add(&delta.partial_json)?;
                        block.json.push_str(&delta.partial_json);
                    }
                    "thinking_delta" => {
                        self.size.add(&delta.thinking)?;
                        block.thinking.push_str(&delta.thinking);
                        on(Delta::Thinking(&delta.thinking));
                    }
                    "signature_delta" => {
                        self.size.add(&delta.signature)?;
                        block
                            .signature
                            .get_or_insert_default()
                            .push_str(&delta.signature);
                    }
                    _ => {}
                }
            }
            "message_delta" => {
                if let Some(usage) = event.usage {
                    self.usage.update(usage);
                }
                if let Some(delta) = event.delta {
                    self.stop = delta.stop_reason.or(self.stop.take());
                }
            }
            "message_stop" => self.whole = true,
            "error" => {
                let told = event.error.unwrap_or_default();
                return Err(StreamError::Told(told.message));
            }
            _ => {}
        }
        Ok(())
    }

    pub fn is_whole(&self) -> bool {
        self.whole
    }

    pub fn finish(self, ids: &mut Ids) -> Said {
        let mut raw = Vec::new();
        let mut text = String::new();
        let mut calls = Vec::new();
        for block in self.blocks {
            match block.kind.as_str() {
                // An empty one is refused in a request.
                "text" if !block.text.is_empty() => {
                    raw.push(json::raw(format!(
                        r#"{{"type":"text","text":{}}}"#,
                        json::quoted(&block.text)
                    )));
                    text.push_str(&block.text);
                }
                "thinking" => {
                    let mut made = format!(
                        r#"{{"type":"thinking","thinking":{}"#,
                        json::quoted(&block.thinking)
                    );
                    super::optional(
                        "signature",
                        block.signature.as_deref().map(json::quoted),
                        &mut made,
                    );
                    raw.push(json::raw(made + "}"));
                }
                "redacted_thinking" => raw.push(json::raw(format!(
                    r#"{{"type":"redacted_thinking","data":{}}}"#,
                    json::quoted(&block.data)
                ))),
                "tool_use" => {
                    let text = match (block.json.is_empty(), block.input) {
                        (true, Some(input)) => input.get().to_owned(),
                        _ => block.json,
                    };
                    let call = super::call(ids, &block.id, &block.name, text, By::Function);
                    raw.push(json::raw(format!(
                        r#"{{"type":"tool_use","id":{},"name":{},"input":{}}}"#,
                        json::quoted(&call.id),
                        json::quoted(&super::plain_name(&call.name)),
                        super::object(&call)
                    )));
                    calls.push(call);
                }
                // What runs at the provider is never asked for.
                _ => {}
            }
        }
        let usage = self.usage;
        let cached = usage.cache_read_input_tokens.unwrap_or(0);
        Said {
            raw,
            text,
            calls,
            end: match self.stop.as_deref() {
                Some("max_tokens") => End::Length,
                Some("refusal") => End::Refusal,
                Some("model_context_window_exceeded") => End::Context,
                _ => End::Done,
            },
            usage: AgentUsage {
                input: usage.input_tokens.unwrap_or(0)
                    + cached
                    + usage.cache_creation_input_tokens.unwrap_or(0),
                cached,
                output: usage.output_tokens.unwrap_or(0),
            },
        }
    }
}
