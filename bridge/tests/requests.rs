//! What a guest may ask, and that nothing else goes out.

mod common;

use common::{CHAT, COUNT, Host, KEY, MESSAGES, RESPONSES, body, calls, config, script};
use ratoon_bridge_api::control::{AddVm, MintToken, RemoveVm, Reply, Request};
use ratoon_bridge_api::record::Entry;
use ratoon_scripted_model::Turn;
use serde_json::json;

#[test]
fn each_wire_works_streamed_and_whole() {
    let model = script([Turn::text("Grüße aus dem Norden.").repeated()]);
    let mut host = Host::start(config(&model.url()));
    let guest = host.first();
    for path in [MESSAGES, CHAT, RESPONSES] {
        for stream in [false, true] {
            let answer = guest.ask(path, &body(path, stream));
            assert_eq!(answer.status, 200, "{answer:?}");
            assert!(answer.whole, "{answer:?}");
            let media_type = answer.header("content-type").expect("a type");
            assert_eq!(media_type == "text/event-stream", stream, "{media_type}");
            let words = if stream {
                "Grüße "
            } else {
                "Grüße aus dem Norden."
            };
            assert!(answer.body.contains(words), "{answer:?}");
            assert_eq!(answer.header("set-cookie"), None);
        }
    }
    let count = guest.ask(COUNT, &body(COUNT, false));
    assert_eq!(count.json()["input_tokens"], 10);
    assert_eq!(model.violations(), Vec::<String>::new());
    for seen in model.seen() {
        assert_eq!(seen.body["model"], "real-m");
    }
    // 6 answers of 10 tokens in and 4 out; counting is free.
    let spent = host.spent("main");
    assert_eq!(
        (spent.calls, spent.input_tokens, spent.output_tokens),
        (7, 60, 24)
    );
    assert_eq!(spent.cost_microusd, 6 * (30 + 60));
    host.check_record(&model);
}

#[test]
fn a_guests_credentials_stay_here_in_every_spelling() {
    let model = script([Turn::text("ok").repeated()]);
    let mut host = Host::start(config(&model.url()));
    let guest = host.first();
    let evil = [
        ("authorization", "Bearer evil"),
        ("Authorization", "Basic evil"),
        ("x-api-key", "evil"),
        ("X_API_KEY", "evil"),
        ("x.api.key", "evil"),
        ("api-key", "evil"),
        ("cookie", "evil=1"),
        ("proxy-authorization", "evil"),
        ("openai-organization", "evil"),
        ("OpenAI-Project", "evil"),
        (
            "anthropic-beta",
            "files-api-2025-04-14,interleaved-thinking-2025-05-14,mcp-client-2025-04-04",
        ),
        ("anthropic-version", "2023-06-01"),
        ("x-forwarded-host", "evil"),
        ("accept-encoding", "gzip"),
        ("user-agent", "evil"),
    ];
    for path in [MESSAGES, CHAT, RESPONSES] {
        let answer = guest.ask_with(path, &body(path, false), &evil);
        assert_eq!(answer.status, 200, "{answer:?}");
    }
    assert_eq!(model.violations(), Vec::<String>::new());
    for seen in model.seen() {
        for (name, value) in &seen.headers {
            assert!(!value.contains("evil"), "{name}: {value}");
            if name == "anthropic-beta" {
                assert_eq!(value, "interleaved-thinking-2025-05-14");
            }
        }
    }
    host.check_record(&model);
}

#[test]
fn only_the_four_routes_are_there() {
    let model = script([]);
    let mut host = Host::start(config(&model.url()));
    let guest = host.first();
    for (method, path, status) in [
        ("GET", "/v1/messages", 405),
        ("TRACE", "/v1/messages", 405),
        ("DELETE", "/v1/responses", 405),
        ("POST", "/v1/files", 404),
        ("POST", "/v1/messages/batches", 404),
        ("POST", "/v1/messages?beta=true&x=1", 404),
        ("POST", "/v1/messages?", 404),
        ("POST", "/v1/responses?beta=true", 404),
        ("POST", "/v1/messages/", 404),
        ("POST", "//v1/messages", 404),
        ("POST", "/v1/../v1/messages", 404),
        ("POST", "/v1/%6dessages", 404),
        ("POST", "/V1/messages", 404),
        ("POST", "/", 404),
        ("GET", "/v1/models", 404),
        ("POST", "http://127.0.0.1/v1/messages", 404),
    ] {
        let token = [("x-ratoon-token", guest.token.as_str())];
        let answer = guest.raw(method, path, &token, b"{}");
        assert_eq!(answer.status, status, "{method} {path}: {answer:?}");
    }
    assert!(model.seen().is_empty());
    host.check_record(&model);
}

#[test]
fn a_token_is_good_for_its_vm_until_it_is_revoked() {
    let model = script([Turn::text("ok").repeated()]);
    let mut host = Host::start(config(&model.url()));
    let mut guest = host.first();
    let other = host.vm("other", "side", Some("main"), calls(5));
    let ask = |token: &str| {
        let headers = [("x-ratoon-token", token)];
        let bytes = body(CHAT, false).to_string();
        guest.raw("POST", CHAT, &headers, bytes.as_bytes()).status
    };
    assert_eq!(ask(&guest.token), 200);
    assert_eq!(ask(&other.token), 401, "a token of another VM");
    assert_eq!(ask(""), 401);
    assert_eq!(ask(KEY), 401);
    assert_eq!(guest.raw("POST", CHAT, &[], b"{}").code(), "token");
    let renewed = host.mint("vm", false);
    assert_eq!(ask(&guest.token), 200, "renewing ends none");
    let woken = host.mint("vm", true);
    assert_eq!(ask(&guest.token), 401);
    assert_eq!(ask(&renewed), 401);
    assert_eq!(ask(&woken), 200);
    guest.token = woken;
    for ttl_s in [0, 3601] {
        let mint = MintToken {
            vm: "vm".into(),
            ttl_s,
            revoke_older: false,
        };
        assert!(
            host.refused(Request::MintToken(mint))
                .contains("lives from 1 to 3600")
        );
    }
    let short = MintToken {
        vm: "vm".into(),
        ttl_s: 1,
        revoke_older: true,
    };
    let Reply::Token { token, .. } = host.tell(Request::MintToken(short)) else {
        panic!("no token");
    };
    std::thread::sleep(std::time::Duration::from_millis(1100));
    let bytes = body(CHAT, false).to_string();
    let expired = guest.raw(
        "POST",
        CHAT,
        &[("x-ratoon-token", &token.0)],
        bytes.as_bytes(),
    );
    assert_eq!(expired.code(), "token");
    host.check_record(&model);
}

#[test]
fn a_token_that_is_revoked_while_the_body_comes_begins_no_call() {
    let model = script([]);
    let mut host = Host::start(config(&model.url()));
    let guest = host.first();
    let token = [("x-ratoon-token", guest.token.as_str())];
    let bytes = body(CHAT, false).to_string();
    let (first, rest) = bytes.as_bytes().split_at(10);
    let mut stream = guest.send_part("POST", CHAT, &token, first, bytes.len());
    // The head is read when its call has its place.
    let in_flight = |host: &mut Host| match host.tell(Request::Status {}) {
        Reply::Status {
            calls_in_flight, ..
        } => calls_in_flight,
        other => panic!("{other:?}"),
    };
    while in_flight(&mut host) == 0 {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    host.mint("vm", true);
    std::io::Write::write_all(stream.get_mut(), rest).expect("sent");
    let answer = common::read_answer(stream);
    assert_eq!((answer.status, answer.code()), (401, "token"));
    assert!(model.seen().is_empty());
    assert_eq!(host.spent("main").calls, 0);
    host.check_record(&model);
}

#[test]
fn what_no_rule_allows_reaches_no_provider_and_is_told_in_the_apis_form() {
    let model = script([]);
    let mut host = Host::start(config(&model.url()));
    let guest = host.first();
    let image = json!({"type": "image", "source": {"type": "url", "url": "http://evil/x.png"}});
    for (path, name, value, message) in [
        (
            MESSAGES,
            "mcp_servers",
            json!([{"url": "http://evil"}]),
            "mcp_servers: would let",
        ),
        (MESSAGES, "container", json!("c"), "container: would let"),
        (
            MESSAGES,
            "stop",
            json!("x"),
            "the field \"stop\" is none that may be sent",
        ),
        (
            MESSAGES,
            "messages",
            json!([{"role": "user", "content": [image]}]),
            "messages[0].content[0].source.type: \"url\" is none",
        ),
        (MESSAGES, "model", json!(7), "model: is a number"),
        (
            MESSAGES,
            "max_tokens",
            json!(0),
            "max_tokens: must be at least 1",
        ),
        (CHAT, "n", json!(2), "n: must be 1"),
        (
            CHAT,
            "web_search_options",
            json!({}),
            "web_search_options: would let",
        ),
        (
            RESPONSES,
            "previous_response_id",
            json!("r"),
            "previous_response_id: state",
        ),
        (
            RESPONSES,
            "background",
            json!(true),
            "background: must be false",
        ),
        (
            RESPONSES,
            "input",
            json!([{"type": "item_reference", "id": "x"}]),
            "input[0].type: \"item_reference\" is none",
        ),
    ] {
        let mut asked = body(path, false);
        asked[name] = value;
        let answer = guest.ask(path, &asked);
        assert_eq!((answer.status, answer.code()), (400, "rule"), "{answer:?}");
        let told = answer.json();
        assert_eq!(told["error"]["type"], "invalid_request_error");
        assert_eq!(told["type"] == "error", path == MESSAGES);
        let words = told["error"]["message"].as_str().expect("words");
        assert!(words.contains(message), "{words}");
        assert_eq!(answer.header("x-should-retry"), Some("false"));
    }
    let mut unknown = body(CHAT, false);
    unknown["model"] = "gpt-evil".into();
    assert_eq!(guest.ask(CHAT, &unknown).code(), "model");
    for bytes in [
        &b"{\"model\":\"m\",\"model\":\"x\"}"[..],
        b"",
        b"[]",
        b"\xff",
        b"{} {}",
    ] {
        let token = [("x-ratoon-token", guest.token.as_str())];
        assert_eq!(guest.raw("POST", CHAT, &token, bytes).code(), "rule");
    }
    assert!(model.seen().is_empty());
    let refused = host
        .entries("main")
        .into_iter()
        .filter(|entry| matches!(entry, Entry::Refused { .. }));
    assert_eq!(refused.count(), 11 + 1 + 5);
    assert_eq!(host.spent("main").calls, 0);
    host.check_record(&model);
}

#[test]
fn provider_side_tools_are_withheld_and_said_to_be() {
    let model = script([Turn::text("ok").repeated()]);
    let mut host = Host::start(config(&model.url()));
    let guest = host.first();
    let mut asked = body(RESPONSES, false);
    asked["tools"] = json!([{"type": "web_search", "external_web_access": false},
                            {"type": "function", "name": "f", "parameters": {}}]);
    let answer = guest.ask(RESPONSES, &asked);
    assert_eq!(answer.header("x-ratoon-withheld"), Some("web_search"));
    asked["tools"] = json!([{"type": "web_search"}]);
    assert_eq!(guest.ask(RESPONSES, &asked).status, 200);
    let seen = model.seen();
    assert_eq!(seen[0].body["tools"].as_array().map(Vec::len), Some(1));
    assert_eq!(seen[1].body.get("tools"), None);
    assert_eq!(model.violations(), Vec::<String>::new());
    host.check_record(&model);
}

#[test]
fn sizes_numbers_and_rates_are_bounded() {
    let model = script([Turn::text("ok").repeated()]);
    let mut config = config(&model.url());
    config["limits"] = json!({"body_bytes": 2048, "vm_requests_a_minute": 5});
    let mut host = Host::start(config);
    let guest = host.first();
    let mut large = body(CHAT, false);
    large["messages"][0]["content"] = "x".repeat(2048).into();
    let answer = guest.ask(CHAT, &large);
    assert_eq!((answer.status, answer.code()), (413, "too_large"));
    let headers = [
        ("x-ratoon-token", guest.token.as_str()),
        ("transfer-encoding", "chunked"),
    ];
    // Of two lengths the chunks count (RFC 9112, 6.3), and these have no request.
    assert_eq!(guest.raw("POST", CHAT, &headers, b"0\r\n\r\n").status, 400);
    for _ in 0..3 {
        assert_ne!(guest.ask(CHAT, &body(CHAT, false)).code(), "busy");
    }
    let answer = guest.ask(CHAT, &body(CHAT, false));
    assert_eq!((answer.status, answer.code()), (429, "busy"));
    assert_eq!(answer.header("retry-after"), Some("60"));
    host.check_record(&model);
}

#[test]
fn large_requests_are_taken_apart_beside_each_other_and_as_small_ones() {
    let model = script([Turn::text("ok").repeated()]);
    let mut host = Host::start(config(&model.url()));
    let guest = host.first();
    let mut large = body(CHAT, false);
    large["messages"][0]["content"] = "x".repeat(1 << 20).into();
    let bytes = large.to_string();
    let token = [("x-ratoon-token", guest.token.as_str())];
    let sent: Vec<_> = (0..4)
        .map(|_| guest.send("POST", CHAT, &token, bytes.as_bytes()))
        .collect();
    for stream in sent {
        assert_eq!(common::read_answer(stream).status, 200);
    }
    large["nobody"] = 1.into();
    let answer = guest.ask(CHAT, &large);
    assert_eq!((answer.status, answer.code()), (400, "rule"));
    assert_eq!(model.violations(), Vec::<String>::new());
    host.check_record(&model);
}

#[test]
fn connections_of_all_machines_are_bounded() {
    let model = script([Turn::text("ok").repeated()]);
    let mut config = config(&model.url());
    config["limits"] = json!({"all_connections": 3});
    let mut host = Host::start(config);
    let (a, b) = (host.first(), host.vm("b", "side", Some("main"), calls(5)));
    let connect = || std::os::unix::net::UnixStream::connect(&a.socket).expect("a socket");
    let idle = [connect(), connect(), connect()];
    // These are accepted by another listener, in its own time.
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert!(!common::is_served(&b.socket).expect("connected"));
    drop(idle);
    std::thread::sleep(std::time::Duration::from_millis(100));
    assert_eq!(b.ask(CHAT, &body(CHAT, false)).status, 200);
}

#[test]
fn a_vm_that_is_removed_is_served_no_more() {
    let model = script([Turn::text("ok").repeated()]);
    let mut host = Host::start(config(&model.url()));
    let guest = host.first();
    let elsewhere = host.folder.path().join("elsewhere");
    let again = AddVm {
        socket: elsewhere.clone(),
        ..host.add_vm("vm", "side", Some("main"), calls(1))
    };
    assert!(
        host.refused(Request::AddVm(again))
            .contains("is there already")
    );
    assert!(!elsewhere.exists(), "nobody serves it");
    let busy = host.add_vm("vm", "side", Some("main"), calls(1));
    assert!(
        host.refused(Request::AddVm(busy))
            .contains("cannot listen at")
    );
    let same = host.add_vm("vm2", "main", None, calls(1));
    assert!(host.refused(Request::AddVm(same)).contains("one at a time"));
    let remove = || Request::RemoveVm(RemoveVm { vm: "vm".into() });
    let Reply::VmRemoved { head } = host.tell(remove()) else {
        panic!("not removed");
    };
    // The socket itself may close a moment later.
    assert!(!common::is_served(&guest.socket).unwrap_or(false));
    assert!(host.refused(remove()).contains("there is no VM"));
    let heads = [("main".to_owned(), head)];
    ratoon_bridge_api::audit::verify_run(&host.run_dir(), &heads).expect("the head is there");
    // It may go on under another name.
    let go_on = host.add_vm("vm3", "main", None, calls(100));
    assert_eq!(host.guest(go_on).ask(CHAT, &body(CHAT, false)).status, 200);
    let bad = host.add_vm("../x", "main", None, calls(1));
    assert!(host.refused(Request::AddVm(bad)).contains("is no id"));
    host.check_record(&model);
}
