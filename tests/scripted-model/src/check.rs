//! What has to be true of every request.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::Seen;
use crate::answer::Wire;

/// Fields that a guest must not get through, anywhere but in free JSON.
const FORBIDDEN: &[&str] = &[
    "mcp_servers",
    "container",
    "previous_response_id",
    "conversation",
    "prompt",
    "background",
    "metadata",
    "user",
    "service_tier",
    "web_search_options",
    "audio",
    "file_id",
    "file_url",
    "webhook",
];
/// Where JSON is free: schemas, a tool's input, a model's own words.
const FREE: &[&str] = &[
    "input_schema",
    "parameters",
    "schema",
    "json_schema",
    "input_examples",
    "logit_bias",
    "format",
    "action",
    "operation",
];
/// Types that act at the provider, or make it fetch.
const FORBIDDEN_TYPES: &[&str] = &[
    "web_search",
    "web_fetch",
    "code_execution",
    "code_interpreter",
    "file_search",
    "mcp",
    "computer",
    "browser",
    "image_generation",
    "tool_search",
    "item_reference",
    "url",
    "file",
    "container_auto",
    "server_tool_use",
];

/// All that is wrong with a request.
pub(crate) fn violations(wire: Wire, seen: &Seen, key: Option<&str>) -> Vec<String> {
    let mut wrong = Vec::new();
    credentials(seen, key, &mut wrong);
    let body = &seen.body;
    if !body.is_object() {
        wrong.push("the body is no JSON object".into());
        return wrong;
    }
    walk(body, wire, &mut wrong);
    let limit = ["max_tokens", "max_completion_tokens", "max_output_tokens"]
        .iter()
        .filter(|name| body[**name].as_u64().is_some_and(|limit| limit > 0))
        .count();
    if limit != usize::from(wire != Wire::CountTokens) {
        wrong.push(format!("{limit} limits of output"));
    }
    if body.get("n").is_some_and(|n| *n != 1) {
        wrong.push("n is not 1".into());
    }
    match wire {
        Wire::Chat => {
            if body["stream"] == true && body["stream_options"]["include_usage"] != true {
                wrong.push("a stream without usage".into());
            }
            chat_calls(body, &mut wrong);
        }
        Wire::Responses => {
            if body["store"] != false {
                wrong.push("store is not false".into());
            }
            responses_calls(body, &mut wrong);
        }
        Wire::Messages | Wire::CountTokens => messages_calls(body, &mut wrong),
    }
    wrong
}

fn credentials(seen: &Seen, key: Option<&str>, wrong: &mut Vec<String>) {
    let mut right = 0;
    for (name, value) in &seen.headers {
        let folded: String = name.chars().filter(|c| c.is_alphanumeric()).collect();
        let names = [
            "apikey",
            "auth",
            "cookie",
            "token",
            "organization",
            "project",
            "secret",
        ];
        if !names.iter().any(|part| folded.contains(part)) && !folded.starts_with("xratoon") {
            continue;
        }
        let is_key = match (name.as_str(), key) {
            ("x-api-key", Some(key)) => value == key,
            ("authorization", Some(key)) => value.strip_prefix("Bearer ") == Some(key),
            _ => false,
        };
        if is_key {
            right += 1;
        } else {
            wrong.push(format!(
                "the header {name} carries what is not the host's key"
            ));
        }
    }
    if right != usize::from(key.is_some()) {
        wrong.push(format!("{right} credentials"));
    }
}

fn walk(value: &Value, wire: Wire, wrong: &mut Vec<String>) {
    match value {
        Value::Array(items) => items.iter().for_each(|item| walk(item, wire, wrong)),
        Value::Object(fields) => {
            for (name, value) in fields {
                let anthropic = matches!(wire, Wire::Messages | Wire::CountTokens);
                if FORBIDDEN.contains(&name.as_str()) {
                    wrong.push(format!("the field {name}"));
                }
                if name == "type"
                    && let Some(kind) = value.as_str()
                    && !(kind == "file" && wire == Wire::Chat)
                    && FORBIDDEN_TYPES
                        .iter()
                        .any(|bad| kind == *bad || kind.starts_with(&format!("{bad}_")))
                {
                    wrong.push(format!("the type {kind}"));
                }
                if name == "url" || name == "image_url" && value.is_string() {
                    let text = value.as_str().unwrap_or_default();
                    if !text.starts_with("data:") {
                        wrong.push("a URL that the provider would fetch".into());
                    }
                }
                let free = FREE.contains(&name.as_str()) || name == "input" && anthropic;
                if !free {
                    walk(value, wire, wrong);
                }
            }
        }
        _ => {}
    }
}

/// Each call is answered once, and each answer has its call before it.
#[derive(Default)]
struct Calls(BTreeMap<String, i32>);

impl Calls {
    fn called(&mut self, id: &Value) {
        // Of calls with one id (a fault that models have) each has its own answer.
        *self.0.entry(id.to_string()).or_default() += 1;
    }

    fn answered(&mut self, id: &Value, wrong: &mut Vec<String>) {
        let open = self.0.entry(id.to_string()).or_default();
        *open -= 1;
        if *open < 0 {
            wrong.push(format!("an answer to {id}, which is no open call"));
        }
    }

    fn end(self, wrong: &mut Vec<String>) {
        for (id, open) in self.0 {
            if open > 0 {
                wrong.push(format!("the call {id} has no answer"));
            }
        }
    }
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn messages_calls(body: &Value, wrong: &mut Vec<String>) {
    let mut calls = Calls::default();
    for message in list(&body["messages"]) {
        for block in list(&message["content"]) {
            match block["type"].as_str() {
                Some("tool_use") => calls.called(&block["id"]),
                Some("tool_result") => calls.answered(&block["tool_use_id"], wrong),
                _ => {}
            }
        }
        if message["role"] == "user" {
            std::mem::take(&mut calls).end(wrong);
        }
    }
    calls.end(wrong);
}

fn chat_calls(body: &Value, wrong: &mut Vec<String>) {
    let mut calls = Calls::default();
    for message in list(&body["messages"]) {
        if message["role"] == "tool" {
            calls.answered(&message["tool_call_id"], wrong);
            continue;
        }
        std::mem::take(&mut calls).end(wrong);
        list(&message["tool_calls"]).for_each(|call| calls.called(&call["id"]));
    }
    calls.end(wrong);
}

fn responses_calls(body: &Value, wrong: &mut Vec<String>) {
    let mut calls = Calls::default();
    for item in list(&body["input"]) {
        let kind = item["type"].as_str().unwrap_or_default();
        if kind.ends_with("_call") {
            calls.called(&item["call_id"]);
        } else if kind.ends_with("_call_output") {
            calls.answered(&item["call_id"], wrong);
        }
    }
    calls.end(wrong);
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn wrong(wire: Wire, body: Value, headers: &[(&str, &str)]) -> String {
        let seen = Seen {
            path: String::new(),
            headers: headers
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect(),
            bytes: body.to_string().into_bytes(),
            body,
        };
        violations(wire, &seen, Some("k")).join("; ")
    }

    const RIGHT: &[(&str, &str)] = &[("x-api-key", "k"), ("accept", "x")];

    #[test]
    fn a_right_request_has_no_violation() {
        let body = json!({"max_tokens": 1, "messages": [
            {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "input": {"url": "http://x"}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a"}]}]});
        assert_eq!(wrong(Wire::Messages, body, RIGHT), "");
        let body = json!({"max_output_tokens": 1, "store": false, "input": [
            {"type": "function_call", "call_id": "a"},
            {"type": "function_call_output", "call_id": "a"}]});
        assert_eq!(
            wrong(Wire::Responses, body, &[("authorization", "Bearer k")]),
            ""
        );
    }

    #[test]
    fn each_violation_is_named() {
        let max = json!({"max_tokens": 1});
        for (headers, what) in [
            (&[][..], "0 credentials"),
            (
                &[("x-api-key", "k"), ("authorization", "Bearer k")],
                "2 credentials",
            ),
            (
                &[("x-api-key", "k"), ("x_api_key", "k")],
                "the header x_api_key",
            ),
            (&[("x-api-key", "k"), ("cookie", "k")], "the header cookie"),
            (
                &[("x-api-key", "k"), ("x-ratoon-token", "t")],
                "the header x-ratoon-token",
            ),
        ] {
            let found = wrong(Wire::Messages, max.clone(), headers);
            assert!(found.contains(what), "{found}");
        }
        for (wire, body, what) in [
            (
                Wire::Chat,
                json!({"max_tokens": 1, "stream": true}),
                "without usage",
            ),
            (Wire::Chat, json!({"max_tokens": 1, "n": 2}), "n is not 1"),
            (Wire::Chat, json!({}), "0 limits"),
            (
                Wire::Responses,
                json!({"max_output_tokens": 1}),
                "store is not false",
            ),
            (
                Wire::Messages,
                json!({"max_tokens": 1, "mcp_servers": []}),
                "the field mcp_servers",
            ),
            (
                Wire::Messages,
                json!({"max_tokens": 1, "tools": [{"type": "web_search_20250305"}]}),
                "the type web_search_20250305",
            ),
            (
                Wire::Chat,
                json!({"max_tokens": 1, "messages": [{"content": [{"image_url": {"url": "http://x"}}]}]}),
                "a URL",
            ),
            (
                Wire::Chat,
                json!({"max_tokens": 1, "messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}),
                "\"a\" has no answer",
            ),
            (
                Wire::Chat,
                json!({"max_tokens": 1, "messages": [{"role": "tool", "tool_call_id": "a"}]}),
                "no open call",
            ),
        ] {
            let found = wrong(wire, body, RIGHT);
            assert!(found.contains(what), "{found}");
        }
    }
}
