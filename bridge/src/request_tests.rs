//! Requests on each wire, and what they become.

use super::*;
use serde_json::{Value, json};

fn finished(wire: Wire, body: Value) -> Value {
    finished_for(wire, body, "max_completion_tokens")
}

fn finished_for(wire: Wire, body: Value, chat_limit: &'static str) -> Value {
    let mut request = parse(wire, body.to_string().as_bytes()).expect("allowed");
    let bytes = request.finish("up", 5, chat_limit);
    serde_json::from_slice(&bytes).expect("JSON")
}

fn refused(wire: Wire, body: Value) -> String {
    parse(wire, body.to_string().as_bytes())
        .expect_err("refused")
        .to_string()
}

#[test]
fn paths_are_exact() {
    for wire in Wire::ALL {
        assert_eq!(Wire::of_path(wire.path()), Some(wire));
    }
    for path in ["", "/", "/v1/messages/", "/v1/Messages", "/v1/files"] {
        assert_eq!(Wire::of_path(path), None);
    }
}

#[test]
fn model_and_limit_are_the_hosts() {
    let messages = json!([{"role": "user", "content": "x"}]);
    let sent = finished(
        Wire::Messages,
        json!({"model": "m", "max_tokens": 100_000, "messages": messages, "stream": true}),
    );
    assert_eq!(
        sent,
        json!({"model": "up", "max_tokens": 5, "stream": true, "messages": messages})
    );
    for given in [
        json!({}),
        json!({"max_tokens": 9}),
        json!({"max_completion_tokens": 9}),
    ] {
        let mut body = json!({"model": "m", "messages": messages, "n": 1, "stream": true});
        for (name, value) in given.as_object().expect("an object") {
            body[name] = value.clone();
        }
        for name in ["max_tokens", "max_completion_tokens"] {
            assert_eq!(
                finished_for(Wire::Chat, body.clone(), name),
                json!({"model": "up", name: 5, "messages": messages, "stream": true,
                       "stream_options": {"include_usage": true}})
            );
        }
    }
    let sent = finished(
        Wire::Responses,
        json!({"model": "m", "input": "x", "store": true}),
    );
    assert_eq!(
        sent,
        json!({"model": "up", "max_output_tokens": 5, "input": "x", "store": false})
    );
    let sent = finished(
        Wire::CountTokens,
        json!({"model": "m", "messages": messages}),
    );
    assert_eq!(sent, json!({"model": "up", "messages": messages}));
}

#[test]
fn the_wires_own_fields_are_checked() {
    let chat = |name: &str, value: Value| {
        let mut body = json!({"model": "m", "messages": []});
        body[name] = value;
        refused(Wire::Chat, body)
    };
    assert_eq!(chat("n", json!(2)), "n: must be 1");
    assert_eq!(chat("n", json!("1")), "n: is a string, not a number");
    assert_eq!(
        chat("max_tokens", json!(-1)),
        "max_tokens: is not a whole number above 0"
    );
    assert_eq!(
        chat("max_tokens", json!(1.5)),
        "max_tokens: is not a whole number above 0"
    );
    assert_eq!(
        chat("stream", json!("yes")),
        "stream: is a string, not a boolean"
    );
    assert!(chat("stream_options", json!({"x": 1})).contains("and nothing else"));
    let both = json!({"model": "m", "messages": [], "max_tokens": 1, "max_completion_tokens": 1});
    assert!(refused(Wire::Chat, both).contains("a second limit"));
    assert_eq!(
        refused(Wire::Chat, json!({"messages": []})),
        "model: is missing"
    );
    assert_eq!(
        refused(Wire::Chat, json!({"model": "m"})),
        "messages: is missing"
    );
    assert_eq!(refused(Wire::Chat, json!([])), "is an array, not an object");
    let body = json!({"model": "m", "input": "x", "background": true});
    assert!(refused(Wire::Responses, body).contains("background: must be false"));
}

#[test]
fn what_a_program_says_of_its_surroundings_in_the_middle_is_passed_on() {
    let surroundings =
        json!([{"type": "text", "text": "It is Monday.", "cache_control": {"type": "ephemeral"}}]);
    let messages = json!([
        {"role": "user", "content": "x"}, {"role": "system", "content": surroundings},
    ]);
    let body = json!({"model": "m", "max_tokens": 9, "messages": messages});
    assert_eq!(finished(Wire::Messages, body)["messages"], messages);
}

#[test]
fn the_same_request_has_the_same_digest_and_another_has_another() {
    let digest = |body: &Value| {
        parse(Wire::Chat, body.to_string().as_bytes())
            .expect("allowed")
            .digest
    };
    let body = json!({"model": "m", "messages": [{"role": "user", "content": "x"}]});
    let mut same = body.clone();
    same["user"] = "somebody".into();
    assert_eq!(digest(&body), digest(&same));
    for (name, value) in [
        ("model", json!("other")),
        ("stream", json!(true)),
        ("max_tokens", json!(1)),
        ("temperature", json!(0)),
    ] {
        let mut other = body.clone();
        other[name] = value;
        assert_ne!(digest(&body), digest(&other), "{name}");
    }
}

#[test]
fn text_has_no_more_tokens_than_bytes_and_images_count_as_all_that_a_model_takes() {
    let at_most = |content: Value, most: Option<u64>| {
        let body = json!({"model": "m", "messages": [{"role": "user", "content": content}]});
        parse(Wire::Messages, body.to_string().as_bytes())
            .expect("allowed")
            .input_tokens_at_most(most)
    };
    let short = at_most(json!("x"), None);
    assert!(short > 4096 + 40, "{short}");
    assert_eq!(at_most(json!("x".repeat(2001)), None), short + 2000);
    assert_eq!(at_most(json!("x"), Some(4100)), 4100);
    assert_eq!(at_most(json!("x"), Some(200_000)), short);
    let image = json!([{"type": "image", "source": {
        "type": "base64", "media_type": "image/png", "data": "A".repeat(64_000)}}]);
    let estimate = at_most(image.clone(), None);
    assert!((9000..10_000).contains(&estimate), "{estimate}");
    assert_eq!(at_most(image, Some(200_000)), 200_000);
}
