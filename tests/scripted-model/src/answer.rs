//! A turn in the words of a wire: one document, or the events of a stream.

use serde_json::{Value, json};

use crate::script::Turn;

/// A wire by its path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wire {
    Messages,
    CountTokens,
    Chat,
    Responses,
}

impl Wire {
    pub(crate) fn of_path(path: &str) -> Option<Self> {
        Some(match path {
            "/v1/messages" => Self::Messages,
            "/v1/messages/count_tokens" => Self::CountTokens,
            "/v1/chat/completions" => Self::Chat,
            "/v1/responses" => Self::Responses,
            _ => return None,
        })
    }
}

/// A tool call with its id and its input as text.
struct Called<'a> {
    id: String,
    name: &'a str,
    text: String,
}

fn called<'a>(turn: &'a Turn, ids: &mut u64) -> Vec<Called<'a>> {
    turn.tools
        .iter()
        .map(|tool| {
            *ids += 1;
            Called {
                id: tool.id.clone().unwrap_or_else(|| format!("call_{ids}")),
                name: &tool.name,
                text: tool
                    .raw
                    .clone()
                    .unwrap_or_else(|| tool.arguments.to_string()),
            }
        })
        .collect()
}

/// The text in pieces of a few characters, as tokens are.
fn pieces(text: &str) -> Vec<String> {
    let letters: Vec<char> = text.chars().collect();
    letters
        .chunks(6)
        .map(|piece| piece.iter().collect())
        .collect()
}

fn halves(text: &str) -> [&str; 2] {
    let middle = (0..=text.len() / 2)
        .rev()
        .find(|at| text.is_char_boundary(*at))
        .unwrap_or(0);
    let (first, second) = text.split_at(middle);
    [first, second]
}

/// The whole answer as one document.
pub(crate) fn document(wire: Wire, turn: &Turn, model: &Value, ids: &mut u64) -> Value {
    let tools = called(turn, ids);
    match wire {
        Wire::CountTokens => json!({"input_tokens": turn.input_tokens}),
        Wire::Messages => {
            let mut content = Vec::new();
            if !turn.text.is_empty() {
                content.push(json!({"type": "text", "text": turn.text}));
            }
            for tool in &tools {
                let input: Value =
                    serde_json::from_str(&tool.text).unwrap_or_else(|_| json!({"raw": tool.text}));
                content.push(
                    json!({"type": "tool_use", "id": tool.id, "name": tool.name, "input": input}),
                );
            }
            let mut document = json!({
                "id": "msg_1", "type": "message", "role": "assistant", "model": model,
                "content": content, "stop_sequence": null,
                "stop_reason": if tools.is_empty() { "end_turn" } else { "tool_use" },
            });
            if turn.output_tokens > 0 {
                document["usage"] = anthropic_usage(turn, turn.output_tokens);
            }
            document
        }
        Wire::Chat => {
            let calls: Vec<Value> = tools
                .iter()
                .map(|tool| {
                    json!({"id": tool.id, "type": "function",
                           "function": {"name": tool.name, "arguments": tool.text}})
                })
                .collect();
            let mut message = json!({"role": "assistant", "content": turn.text});
            if !calls.is_empty() {
                message["tool_calls"] = Value::from(calls);
            }
            let mut document = json!({
                "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": model,
                "choices": [{"index": 0, "message": message, "finish_reason": chat_end(turn)}],
            });
            if turn.output_tokens > 0 {
                document["usage"] = chat_usage(turn);
            }
            document
        }
        Wire::Responses => response(turn, model, &tools, "completed"),
    }
}

/// The answer as the events of a stream, the last of which ends it.
pub(crate) fn events(wire: Wire, turn: &Turn, request: &Value, ids: &mut u64) -> Vec<String> {
    let tools = called(turn, ids);
    let model = &request["model"];
    match wire {
        Wire::Messages | Wire::CountTokens => messages_events(turn, model, &tools),
        Wire::Chat => chat_events(turn, request, &tools),
        Wire::Responses => responses_events(turn, model, &tools),
    }
}

/// An error in the middle of a stream.
pub(crate) fn error_event(wire: Wire) -> String {
    match wire {
        Wire::Messages | Wire::CountTokens => named(
            &json!({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}),
        ),
        Wire::Chat => plain(&json!({"error": {"message": "Overloaded", "type": "server_error"}})),
        Wire::Responses => named(&json!({"type": "error", "code": "server_error",
                                         "message": "Overloaded", "sequence_number": 1})),
    }
}

fn named(value: &Value) -> String {
    let name = value["type"].as_str().unwrap_or_default();
    format!("event: {name}\ndata: {value}\n\n")
}

fn plain(value: &Value) -> String {
    format!("data: {value}\n\n")
}

fn anthropic_usage(turn: &Turn, output_tokens: u64) -> Value {
    json!({
        "input_tokens": turn.input_tokens - turn.cached_tokens,
        "cache_read_input_tokens": turn.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": output_tokens,
    })
}

fn messages_events(turn: &Turn, model: &Value, tools: &[Called<'_>]) -> Vec<String> {
    let mut start = json!({"type": "message_start", "message": {
        "id": "msg_1", "type": "message", "role": "assistant", "model": model, "content": [],
        "stop_reason": null, "stop_sequence": null}});
    start["message"]["usage"] = anthropic_usage(turn, 1);
    let mut events = vec![named(&start), named(&json!({"type": "ping"}))];
    let mut index = 0;
    let mut block = |begin: Value, deltas: Vec<Value>, events: &mut Vec<String>| {
        events.push(named(
            &json!({"type": "content_block_start", "index": index, "content_block": begin}),
        ));
        for delta in deltas {
            events.push(named(
                &json!({"type": "content_block_delta", "index": index, "delta": delta}),
            ));
        }
        events.push(named(
            &json!({"type": "content_block_stop", "index": index}),
        ));
        index += 1;
    };
    if !turn.text.is_empty() {
        let deltas = pieces(&turn.text)
            .into_iter()
            .map(|piece| json!({"type": "text_delta", "text": piece}))
            .collect();
        block(json!({"type": "text", "text": ""}), deltas, &mut events);
    }
    for tool in tools {
        let deltas = halves(&tool.text)
            .into_iter()
            .map(|half| json!({"type": "input_json_delta", "partial_json": half}))
            .collect();
        block(
            json!({"type": "tool_use", "id": tool.id, "name": tool.name, "input": {}}),
            deltas,
            &mut events,
        );
    }
    let stop = if tools.is_empty() {
        "end_turn"
    } else {
        "tool_use"
    };
    let mut delta = json!({"type": "message_delta",
        "delta": {"stop_reason": stop, "stop_sequence": null}});
    if turn.output_tokens > 0 {
        delta["usage"] = json!({"output_tokens": turn.output_tokens});
    }
    events.push(named(&delta));
    events.push(named(&json!({"type": "message_stop"})));
    events
}

fn chat_end(turn: &Turn) -> &'static str {
    if turn.tools.is_empty() {
        "stop"
    } else {
        "tool_calls"
    }
}

fn chat_usage(turn: &Turn) -> Value {
    json!({
        "prompt_tokens": turn.input_tokens, "completion_tokens": turn.output_tokens,
        "total_tokens": turn.input_tokens + turn.output_tokens,
        "prompt_tokens_details": {"cached_tokens": turn.cached_tokens},
    })
}

fn chat_events(turn: &Turn, request: &Value, tools: &[Called<'_>]) -> Vec<String> {
    let chunk = |choices: Value| {
        json!({"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1,
               "model": request["model"], "choices": choices})
    };
    let delta = |delta: Value| {
        plain(&chunk(
            json!([{"index": 0, "delta": delta, "finish_reason": null}]),
        ))
    };
    let mut events = vec![delta(json!({"role": "assistant", "content": ""}))];
    for piece in pieces(&turn.text) {
        events.push(delta(json!({"content": piece})));
    }
    for (index, tool) in tools.iter().enumerate() {
        events.push(delta(json!({"tool_calls": [{"index": index, "id": tool.id,
            "type": "function", "function": {"name": tool.name, "arguments": ""}}]})));
        for half in halves(&tool.text) {
            events.push(delta(json!({"tool_calls": [{"index": index,
                "function": {"arguments": half}}]})));
        }
    }
    events.push(plain(&chunk(
        json!([{"index": 0, "delta": {}, "finish_reason": chat_end(turn)}]),
    )));
    if request["stream_options"]["include_usage"] == true && turn.output_tokens > 0 {
        let mut usage = chunk(json!([]));
        usage["usage"] = chat_usage(turn);
        events.push(plain(&usage));
    }
    events.push("data: [DONE]\n\n".into());
    events
}

fn response(turn: &Turn, model: &Value, tools: &[Called<'_>], status: &str) -> Value {
    let mut output = Vec::new();
    if status == "completed" {
        if !turn.text.is_empty() {
            output.push(text_item(&turn.text));
        }
        output.extend(tools.iter().map(|tool| tool_item(tool, &tool.text)));
    }
    let mut response = json!({
        "id": "resp_1", "object": "response", "created_at": 1, "status": status, "model": model,
        "output": output, "error": null, "incomplete_details": null, "instructions": null,
        "metadata": {}, "parallel_tool_calls": true, "temperature": 1.0, "tool_choice": "auto",
        "tools": [], "top_p": 1.0,
    });
    if status == "completed" && turn.output_tokens > 0 {
        response["usage"] = json!({
            "input_tokens": turn.input_tokens, "output_tokens": turn.output_tokens,
            "input_tokens_details": {"cached_tokens": turn.cached_tokens},
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": turn.input_tokens + turn.output_tokens,
        });
    }
    response
}

fn text_item(text: &str) -> Value {
    json!({"type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
           "content": [{"type": "output_text", "text": text, "annotations": []}]})
}

fn tool_item(tool: &Called<'_>, arguments: &str) -> Value {
    json!({"type": "function_call", "id": format!("fc_{}", tool.id), "call_id": tool.id,
           "name": tool.name, "arguments": arguments, "status": "completed"})
}

fn responses_events(turn: &Turn, model: &Value, tools: &[Called<'_>]) -> Vec<String> {
    let mut values = vec![
        json!({"type": "response.created", "response": response(turn, model, tools, "in_progress")}),
    ];
    let mut index = 0;
    if !turn.text.is_empty() {
        values.push(
            json!({"type": "response.output_item.added", "output_index": index,
            "item": {"type": "message", "id": "msg_1", "status": "in_progress",
                     "role": "assistant", "content": []}}),
        );
        values.push(
            json!({"type": "response.content_part.added", "output_index": index,
            "item_id": "msg_1", "content_index": 0,
            "part": {"type": "output_text", "text": "", "annotations": []}}),
        );
        for piece in pieces(&turn.text) {
            values.push(
                json!({"type": "response.output_text.delta", "item_id": "msg_1",
                "output_index": index, "content_index": 0, "delta": piece, "logprobs": []}),
            );
        }
        values.push(
            json!({"type": "response.output_text.done", "item_id": "msg_1",
            "output_index": index, "content_index": 0, "text": turn.text, "logprobs": []}),
        );
        values.push(
            json!({"type": "response.output_item.done", "output_index": index,
            "item": text_item(&turn.text)}),
        );
        index += 1;
    }
    for tool in tools {
        let item = format!("fc_{}", tool.id);
        values.push(
            json!({"type": "response.output_item.added", "output_index": index,
            "item": tool_item(tool, "")}),
        );
        for half in halves(&tool.text) {
            values.push(json!({"type": "response.function_call_arguments.delta",
                "item_id": item, "output_index": index, "delta": half}));
        }
        values.push(json!({"type": "response.function_call_arguments.done",
            "item_id": item, "output_index": index, "arguments": tool.text, "name": tool.name}));
        values.push(
            json!({"type": "response.output_item.done", "output_index": index,
            "item": tool_item(tool, &tool.text)}),
        );
        index += 1;
    }
    values.push(json!({"type": "response.completed",
        "response": response(turn, model, tools, "completed")}));
    values
        .iter_mut()
        .enumerate()
        .map(|(number, value)| {
            value["sequence_number"] = number.into();
            named(value)
        })
        .collect()
}
