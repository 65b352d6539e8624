//! How answers come back, whatever a provider does.

mod common;

use std::time::{Duration, Instant};

use common::{CHAT, Host, KEY, MESSAGES, RESPONSES, body, config, read_chunk, read_head, script};
use ratoon_bridge_api::control::{RemoveVm, Request};
use ratoon_bridge_api::record::{Ending, Entry};
use ratoon_scripted_model::{Fault, Turn};
use serde_json::json;

fn endings(host: &Host) -> Vec<Ending> {
    let entries = host.entries("main").into_iter();
    entries
        .filter_map(|entry| match entry {
            Entry::Answer { ending, .. } => Some(ending),
            _ => None,
        })
        .collect()
}

/// Waits until so many calls have ended.
fn wait_for_endings(host: &Host, count: usize) -> Vec<Ending> {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        let found = endings(host);
        if found.len() >= count || Instant::now() > until {
            return found;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn status(status: u16, retry_after: Option<&str>, message: &str) -> Turn {
    Turn::text("").broken(Fault::Status {
        status,
        retry_after: retry_after.map(str::to_owned),
        message: message.to_owned(),
    })
}

#[test]
fn a_stream_is_the_same_in_whatever_pieces_it_comes() {
    let text = "Zwölf Boxkämpfer \u{1F94A} jagen Viktor";
    let drip = Turn::text(text).broken(Fault::Drip {
        bytes: 3,
        pause_ms: 0,
    });
    for path in [MESSAGES, CHAT, RESPONSES] {
        let model = script([Turn::text(text), drip.clone()]);
        let mut host = Host::start(config(&model.url()));
        let guest = host.first();
        let whole = guest.ask(path, &body(path, true));
        let pieces = guest.ask(path, &body(path, true));
        assert_eq!(whole.body, pieces.body);
        assert!(whole.whole && pieces.whole);
        assert_eq!(endings(&host), [Ending::Complete; 2]);
        host.check_record(&model);
    }
}

#[test]
fn usage_is_in_a_chats_stream_if_it_was_asked_for() {
    let model = script([Turn::text("ok").repeated()]);
    let mut host = Host::start(config(&model.url()));
    let guest = host.first();
    let mut asked = body(CHAT, true);
    assert!(!guest.ask(CHAT, &asked).body.contains("usage"));
    asked["stream_options"] = json!({"include_usage": true});
    assert!(guest.ask(CHAT, &asked).body.contains("usage"));
    assert_eq!(host.spent("main").output_tokens, 2);
}

#[test]
fn tool_calls_come_through_as_they_are() {
    let turn = Turn::tool("bash", json!({"command": "ls \"ü\""})).and_tool("bash", json!({"n": 1}));
    let mut odd = turn.clone();
    odd.tools[0].raw = Some("{\"command\": \"\\d\"".into());
    odd.tools[1].id = Some("call_1".into());
    odd.tools[0].id = Some("call_1".into());
    for path in [MESSAGES, CHAT, RESPONSES] {
        let model = script([turn.clone(), odd.clone()]);
        let mut host = Host::start(config(&model.url()));
        let guest = host.first();
        for _ in 0..2 {
            let answer = guest.ask(path, &body(path, true));
            assert!(answer.whole && answer.body.contains("call_1"), "{answer:?}");
        }
        assert_eq!(endings(&host), [Ending::Complete; 2]);
    }
}

#[test]
fn a_call_is_sent_again_before_the_first_byte_and_paid_once() {
    let model = script([
        status(429, Some("0"), "slow down"),
        status(529, Some("0.1"), "overloaded"),
        Turn::text("at last"),
    ]);
    let mut host = Host::start(config(&model.url()));
    let guest = host.first();
    let answer = guest.ask(MESSAGES, &body(MESSAGES, true));
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(model.seen().len(), 3);
    assert_eq!(model.seen()[0].bytes, model.seen()[2].bytes);
    let Some(Entry::Answer { attempts, .. }) = host.entries("main").pop() else {
        panic!("no answer");
    };
    assert_eq!(attempts, 3);
    let spent = host.spent("main");
    assert_eq!((spent.calls, spent.output_tokens), (1, 2));
    host.check_record(&model);
}

#[test]
fn a_provider_that_asks_for_a_long_wait_is_quoted() {
    let model = script([status(429, Some("3600"), "come back later")]);
    let mut host = Host::start(config(&model.url()));
    let guest = host.first();
    let answer = guest.ask(MESSAGES, &body(MESSAGES, true));
    assert_eq!(answer.status, 429);
    assert_eq!(answer.header("retry-after"), Some("3600"));
    assert_eq!(answer.json()["error"]["message"], "come back later");
    assert_eq!(model.seen().len(), 1);
    assert_eq!(host.spent("main").output_tokens, 0);
}

#[test]
fn a_providers_errors_come_in_its_own_form_and_without_our_key() {
    let model = script([
        status(400, None, "prompt is too long"),
        status(401, None, "wrong key: {credential}"),
        status(500, None, "internal, with {credential}"),
        Turn::text("x").broken(Fault::Html),
        Turn::text("x").broken(Fault::Encoded),
        Turn::text("x").broken(Fault::Redirect {
            to: "http://127.0.0.1:1/".into(),
        }),
    ]);
    let mut host = Host::start(config(&model.url()));
    let guest = host.first();
    let mut told = Vec::new();
    for _ in 0..6 {
        let answer = guest.ask(MESSAGES, &body(MESSAGES, false));
        assert!(!answer.body.contains(KEY), "{answer:?}");
        let error = answer.json()["error"]["message"].clone();
        told.push((
            answer.status,
            answer.code().to_owned(),
            error.as_str().expect("words").to_owned(),
        ));
    }
    assert_eq!(told[0].0, 400);
    assert_eq!(told[0].2, "prompt is too long");
    assert_eq!((told[1].0, told[1].1.as_str()), (401, "credential"));
    assert!(told[1].2.contains("host's operator"));
    assert_eq!(
        (told[2].0, told[2].2.as_str()),
        (500, "internal, with [secret]")
    );
    for (index, what) in [
        (3, "neither JSON nor events"),
        (4, "encoding"),
        (5, "redirect"),
    ] {
        assert_eq!((told[index].0, told[index].1.as_str()), (502, "strange"));
        assert!(told[index].2.contains(what), "{told:?}");
    }
    assert_eq!(
        model.seen().len(),
        6,
        "no redirect was followed, nothing sent twice"
    );
    host.check_record(&model);
}

#[test]
fn an_error_costs_no_token_only_if_it_says_that_none_was_made() {
    for (code, tokens) in [(400, 0), (404, 0), (503, 0), (500, 50), (502, 50)] {
        let model = script([status(code, None, "no")]);
        let mut host = Host::start(config(&model.url()));
        let guest = host.first();
        let answer = guest.ask(MESSAGES, &body(MESSAGES, true));
        assert_eq!(answer.status, code);
        assert_eq!(host.spent("main").output_tokens, tokens, "{code}");
    }
}

#[test]
fn a_key_in_an_answer_is_masked_for_the_guest_and_in_the_record() {
    let drip = Fault::Drip {
        bytes: 5,
        pause_ms: 0,
    };
    let words = Turn::text(&format!("the key is {KEY}, or so"));
    let tool = Turn::tool(KEY, json!({}));
    // In one document, and in one event of a stream, in whatever pieces these come.
    for (turn, stream) in [(&words, false), (&tool, false), (&tool, true)] {
        let model = script([turn.clone().broken(drip.clone())]);
        let mut host = Host::start(config(&model.url()));
        let guest = host.first();
        let answer = guest.ask(MESSAGES, &body(MESSAGES, stream));
        assert!(answer.whole && !answer.body.contains(KEY), "{answer:?}");
        assert!(answer.body.contains("[secret]"), "{answer:?}");
        host.check_record(&model);
    }
}

/// docs/bridge.md says so, under "Limits of this".
#[test]
fn a_key_that_a_stream_spells_over_several_events_is_not_found() {
    let model = script([Turn::text(&format!("the key is {KEY}, or so"))]);
    let mut host = Host::start(config(&model.url()));
    let guest = host.first();
    let answer = guest.ask(MESSAGES, &body(MESSAGES, true));
    let deltas = answer.body.lines().filter_map(|line| {
        let event: serde_json::Value = serde_json::from_str(line.strip_prefix("data: ")?).ok()?;
        Some(event["delta"]["text"].as_str()?.to_owned())
    });
    assert_eq!(
        deltas.collect::<String>(),
        format!("the key is {KEY}, or so")
    );
    assert!(!answer.body.contains(KEY));
    host.check_record(&model);
}

#[test]
fn a_stream_that_breaks_off_ends_in_an_error_event_and_is_never_sent_again() {
    for (path, fault, ending) in [
        (MESSAGES, Fault::Cut { after_bytes: 700 }, Ending::Cut),
        (CHAT, Fault::Cut { after_bytes: 300 }, Ending::Cut),
        (RESPONSES, Fault::NoEnd, Ending::Cut),
        (MESSAGES, Fault::NoEnd, Ending::Cut),
        (MESSAGES, Fault::ErrorEvent, Ending::ProviderError),
    ] {
        let model = script([Turn::text("one two three four five").broken(fault.clone())]);
        let mut host = Host::start(config(&model.url()));
        let guest = host.first();
        let answer = guest.ask(path, &body(path, true));
        assert!(answer.whole, "{fault:?} {answer:?}");
        let last = answer
            .body
            .trim_end()
            .rsplit("\n\n")
            .next()
            .expect("an event");
        let data = last.rsplit("data: ").next().expect("data");
        let value: serde_json::Value = serde_json::from_str(data).expect("whole JSON");
        assert!(value["error"].is_object(), "{fault:?}: {last}");
        assert_eq!(model.seen().len(), 1);
        assert_eq!(endings(&host), [ending]);
        // What may have been paid is counted: all that was reserved.
        assert_eq!(host.spent("main").output_tokens, 50);
        host.check_record(&model);
    }
}

#[test]
fn an_answer_that_is_cut_is_no_answer() {
    let cut = Turn::text("one two three").broken(Fault::Cut { after_bytes: 60 });
    let model = script([cut, Turn::text("x").broken(Fault::HangUp)]);
    let mut host = Host::start(config(&model.url()));
    let guest = host.first();
    assert!(!guest.ask(CHAT, &body(CHAT, false)).whole);
    let answer = guest.ask(CHAT, &body(CHAT, false));
    assert_eq!((answer.status, answer.code()), (502, "cut"));
    assert_eq!(endings(&host), [Ending::Cut, Ending::Unreachable]);
    assert_eq!(model.seen().len(), 2);
    assert_eq!(host.spent("main").output_tokens, 100);
}

#[test]
fn a_slow_guest_sees_that_an_answer_is_cut() {
    // Some of these cuts come when buffers and waiting pieces are just full.
    let text = "word ".repeat(200_000);
    let cuts = (0..32_usize).map(|part| {
        let after_bytes = 150_000 + part * 16_384;
        Turn::text(&text).broken(Fault::Cut { after_bytes })
    });
    let model = script(cuts);
    let mut configuration = config(&model.url());
    configuration["limits"] = json!({"vm_calls": 32});
    let mut host = Host::start(configuration);
    let guest = host.first();
    let token = [("x-ratoon-token", guest.token.as_str())];
    let bytes = body(CHAT, false).to_string();
    let mut streams: Vec<_> = (0..32)
        .map(|_| guest.send("POST", CHAT, &token, bytes.as_bytes()))
        .collect();
    for stream in &mut streams {
        read_head(stream);
    }
    std::thread::sleep(Duration::from_millis(500));
    let mut whole = 0;
    for stream in &mut streams {
        while let Some(piece) = read_chunk(stream) {
            if piece.is_empty() {
                whole += 1;
                break;
            }
        }
    }
    assert_eq!(whole, 0);
    assert_eq!(wait_for_endings(&host, 32), [Ending::Cut; 32]);
    host.check_record(&model);
}

#[test]
fn a_provider_that_is_down_is_named_and_costs_no_token() {
    let mut host = Host::start(config("http://127.0.0.1:9"));
    let guest = host.first();
    let answer = guest.ask(RESPONSES, &body(RESPONSES, true));
    assert_eq!((answer.status, answer.code()), (502, "unreachable"));
    assert_eq!(answer.json()["error"]["type"], "server_error");
    assert_eq!(host.spent("main").output_tokens, 0);
    host.check_files();
}

#[test]
fn silence_and_endless_answers_have_an_end() {
    let model = script([
        Turn::text("x").broken(Fault::Late { ms: 60_000 }),
        Turn::text("x").broken(Fault::Drip {
            bytes: 40,
            pause_ms: 60_000,
        }),
        Turn::text("on and on").broken(Fault::Endless),
    ]);
    let mut config = config(&model.url());
    config["limits"] = json!({"first_byte_s": 1, "silence_s": 1, "answer_bytes": 300_000});
    let mut host = Host::start(config);
    let guest = host.first();
    let late = guest.ask(MESSAGES, &body(MESSAGES, true));
    assert_eq!((late.status, late.code()), (504, "timed_out"));
    let silent = guest.ask(MESSAGES, &body(MESSAGES, true));
    assert!(silent.body.contains("took too long"), "{silent:?}");
    let endless = guest.ask(MESSAGES, &body(MESSAGES, true));
    assert!(endless.body.contains("too large") && endless.body.len() < 400_000);
    assert_eq!(
        endings(&host),
        [Ending::TimedOut, Ending::TimedOut, Ending::TooLarge]
    );
    host.check_record(&model);
}

#[test]
fn who_hangs_up_ends_the_call_and_settles_it() {
    let slow = Turn::text("one two three four").broken(Fault::Drip {
        bytes: 50,
        pause_ms: 100,
    });
    let model = script([
        slow.clone(),
        Turn::text("x").broken(Fault::Late { ms: 30_000 }),
        slow,
    ]);
    let mut host = Host::start(config(&model.url()));
    let guest = host.first();
    let token = [("x-ratoon-token", guest.token.as_str())];
    let bytes = body(MESSAGES, true).to_string();
    let send = || guest.send("POST", MESSAGES, &token, bytes.as_bytes());
    let mut stream = send();
    read_head(&mut stream);
    read_chunk(&mut stream).expect("a piece");
    drop(stream);
    assert_eq!(wait_for_endings(&host, 1), [Ending::GuestGone]);
    // Before the answer's head, too.
    let stream = send();
    while model.seen().len() < 2 {
        std::thread::sleep(Duration::from_millis(10));
    }
    drop(stream);
    assert_eq!(wait_for_endings(&host, 2)[1], Ending::GuestGone);
    // A VM that is removed in the middle of a call.
    let mut stream = send();
    read_head(&mut stream);
    host.tell(Request::RemoveVm(RemoveVm { vm: "vm".into() }));
    assert_eq!(wait_for_endings(&host, 3)[2], Ending::Removed);
    assert_eq!(host.spent("main").output_tokens, 150);
    host.check_record(&model);
}
