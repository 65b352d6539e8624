//! Answers as the three APIs stream them, and the requests that come of them.

use ratoon_protocol::{AgentLimits, Profile};
use serde_json::{Value, json};

use super::*;
use crate::history::Part;

fn task(wire: Wire) -> Task {
    Task {
        run: "r".into(),
        branch: "b".into(),
        wire,
        model: "m".into(),
        profile: Profile::Anthropic,
        prompt: String::new(),
        system: None,
        directory: "/".into(),
        max_tokens: 100,
        temperature: Some(0.5),
        seed: Some(7),
        limits: AgentLimits::default(),
        hold_before: Vec::new(),
        boundaries: false,
    }
}

fn read(wire: Wire, events: &[Value]) -> (Result<Said, StreamError>, String, Ids) {
    let mut reading = Reading::new(wire);
    let mut shown = String::new();
    let mut ids = Ids::default();
    for event in events {
        let told = reading.event(&event.to_string(), &mut |delta| match delta {
            Delta::Text(text) => shown.push_str(text),
            Delta::Thinking(text) => shown.push_str(&format!("<{text}>")),
        });
        if let Err(error) = told {
            return (Err(error), shown, ids);
        }
    }
    assert!(reading.is_whole());
    (reading.finish(&mut ids), shown, ids)
}

/// The next request, with one result for each call.
fn next(wire: Wire, said: Said, ids: Ids) -> Value {
    let mut history = History {
        ids,
        ..History::default()
    };
    history.push(Part::Text("do it".into()));
    history.answer(said.raw);
    for call in &said.calls {
        history.result(call, format!("out of {}", call.id), false);
    }
    let settings = Settings {
        system: "s".into(),
        tools: "[]".into(),
        encrypted_reasoning: true,
    };
    let body = body(&task(wire), &settings, &history);
    json::strict(&body).expect("a body that the bridge accepts");
    serde_json::from_str(&body).expect("JSON")
}

fn start(index: u32, block: Value) -> Value {
    json!({"type": "content_block_start", "index": index, "content_block": block})
}

fn delta(index: u32, delta: Value) -> Value {
    json!({"type": "content_block_delta", "index": index, "delta": delta})
}

#[test]
fn a_message_keeps_thoughts_signatures_and_inputs_as_they_were() {
    let events = [
        json!({"type": "message_start", "message": {"usage": {"input_tokens": 5, "cache_read_input_tokens": 7, "cache_creation_input_tokens": 1, "output_tokens": 1}}}),
        start(
            0,
            json!({"type": "thinking", "thinking": "", "signature": ""}),
        ),
        delta(0, json!({"type": "thinking_delta", "thinking": "hm"})),
        delta(0, json!({"type": "signature_delta", "signature": "Sg=="})),
        start(1, json!({"type": "redacted_thinking", "data": "xx"})),
        start(2, json!({"type": "text", "text": ""})),
        delta(2, json!({"type": "text_delta", "text": "I lo"})),
        delta(2, json!({"type": "text_delta", "text": "ok."})),
        start(
            3,
            json!({"type": "tool_use", "id": "t1", "name": "bash", "input": {}}),
        ),
        delta(
            3,
            json!({"type": "input_json_delta", "partial_json": "{\"command\" : \"l"}),
        ),
        delta(
            3,
            json!({"type": "input_json_delta", "partial_json": "s\"}"}),
        ),
        start(
            4,
            json!({"type": "tool_use", "id": "t1", "name": "ba sh", "input": {}}),
        ),
        delta(
            4,
            json!({"type": "input_json_delta", "partial_json": "{\"a\": \"\\d\"}"}),
        ),
        start(
            5,
            json!({"type": "tool_use", "id": "t3", "name": "bash", "input": {}}),
        ),
        start(6, json!({"type": "text", "text": ""})),
        json!({"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 9}}),
        json!({"type": "message_stop"}),
    ];
    let (said, shown, ids) = read(Wire::Messages, &events);
    let said = said.expect("an answer");
    assert_eq!(shown, "<hm>I look.");
    assert_eq!(said.text, "I look.");
    assert_eq!(
        said.usage,
        AgentUsage {
            input: 13,
            cached: 7,
            output: 9
        }
    );
    assert_eq!(
        said.raw[3].get(),
        r#"{"type":"tool_use","id":"t1","name":"bash","input":{"command" : "ls"}}"#
    );
    let ids_of: Vec<&str> = said.calls.iter().map(|call| call.id.as_str()).collect();
    assert_eq!(ids_of, ["t1", "t1_2", "t3"]);
    assert!(said.calls[1].arguments.is_err() && said.calls[2].arguments.is_ok());
    let body = next(Wire::Messages, said, ids);
    let answer = &body["messages"][1]["content"];
    assert_eq!(
        answer[0],
        json!({"type": "thinking", "thinking": "hm", "signature": "Sg=="})
    );
    assert_eq!(
        answer[1],
        json!({"type": "redacted_thinking", "data": "xx"})
    );
    assert_eq!(answer[4]["name"], "ba_sh");
    assert_eq!(
        answer[4]["input"],
        json!({"invalid_json": "{\"a\": \"\\d\"}"})
    );
    assert_eq!(answer.as_array().expect("blocks").len(), 6, "no empty text");
    let results = &body["messages"][2]["content"];
    assert_eq!(
        results[1],
        json!({"type": "tool_result", "tool_use_id": "t1_2", "content": "out of t1_2"})
    );
    let cached = json!({"type": "ephemeral"});
    assert_eq!(results[2]["cache_control"], cached);
    assert_eq!(body["messages"][0]["content"][0]["cache_control"], cached);
    assert_eq!(body["system"][0]["cache_control"], cached);
    assert_eq!(body["temperature"], 0.5);
    assert_eq!(body.get("seed"), None);
}

fn chunk(delta: Value) -> Value {
    json!({"choices": [{"index": 0, "delta": delta, "finish_reason": null}]})
}

#[test]
fn a_chat_is_put_together_from_its_pieces() {
    let events = [
        chunk(json!({"role": "assistant", "content": "", "reasoning_content": "hm"})),
        chunk(json!({"content": "I look."})),
        chunk(json!({"tool_calls": [
            {"index": 0, "id": "c1", "type": "function", "function": {"name": "bash", "arguments": ""}},
            {"index": 1, "id": "c1", "type": "function", "function": {"name": "bash", "arguments": "{\"a\""}}]})),
        chunk(json!({"tool_calls": [{"index": 0, "function": {"arguments": "{\"command\" :"}}]})),
        chunk(json!({"tool_calls": [{"index": 0, "function": {"arguments": " \"ls\"}"}}]})),
        json!({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]}),
        json!({"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 3}}}),
    ];
    let (said, shown, ids) = read(Wire::Chat, &events);
    let said = said.expect("an answer");
    assert_eq!(shown, "<hm>I look.");
    assert_eq!(
        said.usage,
        AgentUsage {
            input: 4,
            cached: 3,
            output: 2
        }
    );
    let body = next(Wire::Chat, said, ids);
    let answer = &body["messages"][2];
    assert_eq!(answer["reasoning_content"], "hm");
    assert_eq!(
        answer["tool_calls"][0]["function"]["arguments"],
        r#"{"command" : "ls"}"#
    );
    assert_eq!(
        answer["tool_calls"][1]["function"]["arguments"],
        r#"{"invalid_json":"{\"a\""}"#
    );
    assert_eq!(
        body["messages"][4],
        json!({"role": "tool", "tool_call_id": "c1_2", "content": "out of c1_2"})
    );
    assert_eq!(body["seed"], 7);
}

#[test]
fn a_chat_without_indexes_is_understood() {
    let events = [
        chunk(
            json!({"tool_calls": [{"id": "a", "function": {"name": "x", "arguments": {"k": 1}}}]}),
        ),
        chunk(json!({"tool_calls": [{"id": "b", "function": {"name": "y", "arguments": "{}"}}]})),
        json!({"choices": [{"delta": null, "finish_reason": "stop"}]}),
    ];
    let (said, ..) = read(Wire::Chat, &events);
    let calls = said.expect("an answer").calls;
    let texts: Vec<(&str, &str)> = calls
        .iter()
        .map(|call| (call.name.as_str(), call.text.as_str()))
        .collect();
    assert_eq!(texts, [("x", "{\"k\":1}"), ("y", "{}")]);
}

#[test]
fn items_of_a_response_go_back_as_they_came() {
    let reasoning =
        json!({"type": "reasoning", "id": "rs", "summary": [], "encrypted_content": "e=="});
    let events = [
        json!({"type": "response.created", "response": {}}),
        json!({"type": "response.reasoning_summary_text.delta", "delta": "hm"}),
        json!({"type": "response.output_item.done", "item": reasoning}),
        json!({"type": "response.output_text.delta", "delta": "I look."}),
        json!({"type": "response.output_item.done", "item": {"type": "message", "id": "m", "role": "assistant", "status": "completed", "strange": 1,
            "content": [{"type": "output_text", "text": "I look.", "annotations": []}]}}),
        json!({"type": "response.output_item.done", "item": {"type": "function_call", "id": "f", "call_id": "c", "name": "bash", "arguments": "{\"command\" : 1}", "status": "completed"}}),
        json!({"type": "response.output_item.done", "item": {"type": "function_call", "id": "f2", "call_id": "c", "name": "bash", "arguments": "{", "status": "completed"}}),
        json!({"type": "response.output_item.done", "item": {"type": "custom_tool_call", "id": "f3", "call_id": "d", "name": "apply_patch", "input": "*** x"}}),
        json!({"type": "response.output_item.done", "item": {"type": "web_search_call", "id": "w"}}),
        json!({"type": "response.completed", "response": {"usage": {"input_tokens": 3, "output_tokens": 2, "input_tokens_details": {"cached_tokens": 1}}}}),
    ];
    let (said, shown, ids) = read(Wire::Responses, &events);
    let said = said.expect("an answer");
    assert_eq!(shown, "<hm>I look.");
    assert_eq!(said.text, "I look.");
    assert_eq!(said.raw[0].get(), reasoning.to_string());
    assert_eq!(said.calls[2].by, By::Custom);
    let body = next(Wire::Responses, said, ids);
    let input = body["input"].as_array().expect("items");
    assert_eq!(input.len(), 1 + 5 + 3);
    assert_eq!(input[2].get("strange"), None);
    assert_eq!(input[3]["arguments"], "{\"command\" : 1}");
    assert_eq!(input[4]["call_id"], "c_2");
    assert_eq!(input[4]["arguments"], "{\"invalid_json\":\"{\"}");
    assert_eq!(
        input[7],
        json!({"type": "function_call_output", "call_id": "c_2", "output": "out of c_2"})
    );
    assert_eq!(input[8]["type"], "custom_tool_call_output");
}

#[test]
fn ends_are_told_apart() {
    let message = |reason: &str| {
        let stop = json!({"type": "message_delta", "delta": {"stop_reason": reason}});
        read(Wire::Messages, &[stop, json!({"type": "message_stop"})])
            .0
            .expect("an answer")
            .end
    };
    assert_eq!(message("max_tokens"), End::Length);
    assert_eq!(message("refusal"), End::Refusal);
    assert_eq!(message("model_context_window_exceeded"), End::Context);
    assert_eq!(message("end_turn"), End::Done);
    let chat = |reason: &str| {
        let chunk = json!({"choices": [{"delta": {}, "finish_reason": reason}]});
        read(Wire::Chat, &[chunk]).0.expect("an answer").end
    };
    assert_eq!(chat("length"), End::Length);
    assert_eq!(chat("content_filter"), End::Refusal);
    let response = |reason: &str| {
        let last = json!({"type": "response.incomplete", "response": {"incomplete_details": {"reason": reason}}});
        read(Wire::Responses, &[last]).0.expect("an answer").end
    };
    assert_eq!(response("max_output_tokens"), End::Length);
    assert_eq!(response("content_filter"), End::Refusal);
}

#[test]
fn errors_in_a_stream_are_told() {
    for (wire, event) in [
        (
            Wire::Messages,
            json!({"type": "error", "error": {"type": "x", "message": "Overloaded"}}),
        ),
        (Wire::Chat, json!({"error": {"message": "Overloaded"}})),
        (
            Wire::Responses,
            json!({"type": "error", "message": "Overloaded"}),
        ),
        (
            Wire::Responses,
            json!({"type": "response.failed", "response": {"error": {"message": "Overloaded"}}}),
        ),
    ] {
        let (said, ..) = read(wire, &[event]);
        assert_eq!(
            said.expect_err("an error"),
            StreamError::Told("Overloaded".into())
        );
    }
    for wire in [Wire::Messages, Wire::Chat, Wire::Responses] {
        let mut reading = Reading::new(wire);
        let told = reading.event("{\"type\":", &mut |_| {});
        assert!(matches!(told, Err(StreamError::Strange(_))));
        assert!(!reading.is_whole());
    }
}
