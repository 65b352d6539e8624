//! Whole runs: on each wire, with each profile, and with all that a model and its provider do wrong.

mod common;

use common::{Host, WIRES, bash};
use ratoon_protocol::{AgentEvent, Ending, Profile, Wire};
use ratoon_scripted_model::{Fault, ToolCall, Turn};
use serde_json::json;

#[test]
fn a_run_calls_tools_and_finishes_on_each_wire() {
    for wire in WIRES {
        let mut first = bash("x=kept; echo hi > a.txt; cat a.txt");
        first.text = "I look.".into();
        let host = Host::start([
            first,
            Turn::tool(
                "str_replace_based_edit_tool",
                json!({"command": "str_replace", "path": "a.txt", "old_str": "hi", "new_str": "ho"}),
            )
            .and_tool("bash", json!({"command": "echo $x; cat a.txt; exit 0"}))
            .and_tool("grep", json!({"pattern": "h."})),
            Turn::text("Done."),
        ]);
        let done = host.whole(&host.task(wire, Profile::Anthropic));
        host.check();
        assert_eq!(
            (done.ending, done.text.as_str()),
            (Ending::Finished, "Done.")
        );
        assert_eq!(done.steps, 3);
        assert_eq!(done.said(), "I look.Done.");
        let results = done.results();
        assert_eq!(results[0], ("hi\n".into(), false));
        assert!(results[1].0.contains("     1\tho"), "{results:?}");
        assert!(results[2].0.starts_with("kept\nho\n"), "{results:?}");
        assert!(results[3].0.ends_with("a.txt:1:ho"), "{results:?}");
        let answered: Vec<&AgentEvent> = done
            .events
            .iter()
            .filter(|event| matches!(event, AgentEvent::Answered { .. }))
            .collect();
        assert_eq!(answered.len(), 3);
        let AgentEvent::Answered {
            usage,
            first_ms,
            ms,
            replayed,
            ..
        } = answered[2]
        else {
            unreachable!()
        };
        assert_eq!((usage.input, usage.output), (10, 1));
        assert!(*first_ms > 0.0 && ms >= first_ms && !replayed);
    }
}

#[test]
fn the_openai_profile_patches_runs_and_finishes() {
    for wire in [Wire::Chat, Wire::Responses] {
        let patch = "*** Begin Patch\n*** Add File: a.sh\n+echo one\n+read line\n+echo two $line\n*** End Patch";
        let host = Host::start([
            Turn::tool("apply_patch", json!({"input": patch})).and_tool(
                "update_plan",
                json!({"plan": [{"step": "a", "status": "in_progress"}]}),
            ),
            Turn::tool(
                "exec_command",
                json!({"cmd": "sh a.sh", "tty": true, "yield_time_ms": 500}),
            ),
            Turn::tool(
                "write_stdin",
                json!({"session_id": 1, "chars": "three\n", "yield_time_ms": 5000}),
            ),
            Turn::tool("exec_command", json!({"cmd": "echo err >&2; exit 3"})),
            Turn::tool("write_stdin", json!({"session_id": 1})),
            Turn::tool("python", json!({"code": "1 + 1"})),
            Turn::tool(
                "finish",
                json!({"summary": "It is written.", "success": true}),
            ),
        ]);
        let done = host.whole(&host.task(wire, Profile::Openai));
        host.check();
        assert_eq!(done.ending, Ending::Finished);
        assert_eq!(done.text, "It is written.");
        let results = done.results();
        assert!(results[0].0.contains("A a.sh"), "{results:?}");
        assert!(results[2].0.contains("running with session ID 1") && results[2].0.contains("one"));
        assert!(results[3].0.contains("exit code 0") && results[3].0.contains("two three"));
        assert!(results[4].0.contains("exit code 3") && results[4].0.contains("err"));
        assert!(results[5].1 && results[5].0.contains("no running command"));
        assert!(results[6].0 == "2\n" || results[6].0.contains("no python3"));
    }
}

#[test]
fn a_small_model_may_write_its_calls_as_text() {
    let host = Host::start([
        Turn::text(
            r#"<tool_call>{"name": "bash", "arguments": {"command": "echo $((6*7))"}}</tool_call>"#,
        ),
        Turn::text("```json\n{\"name\": \"bash\", \"arguments\": {\"command\": \"pwd\"}}\n```"),
        Turn::text(r#"<tool_call>{"name": "bash", "arguments": {"command": "\d"}}</tool_call>"#),
        Turn::text("It is 42."),
    ]);
    let done = host.whole(&host.task(Wire::Chat, Profile::Minimal));
    host.check();
    assert_eq!(done.ending, Ending::Finished);
    assert_eq!(done.results()[0].0, "42\n");
    assert!(host.request(1).contains("<tool_response>\\n42"));
    assert!(host.request(3).contains("not right"));
}

#[test]
fn a_model_that_cannot_do_it_gives_up() {
    let host = Host::start([Turn::tool(
        "finish",
        json!({"summary": "There is no way.", "success": false}),
    )
    .and_tool("bash", json!({"command": "touch never"}))]);
    let done = host.whole(&host.task(Wire::Messages, Profile::Anthropic));
    assert_eq!((done.ending, done.code), (Ending::GaveUp, 1));
    assert!(done.results()[1].0.contains("Not run"));
    assert!(!host.work().join("never").exists());
}

#[test]
fn a_call_that_fails_for_a_while_is_made_again() {
    let status = |status| Fault::Status {
        status,
        retry_after: Some("0".into()),
        message: "slow down".into(),
    };
    for wire in WIRES {
        for fault in [
            status(429),
            status(500),
            status(529),
            Fault::Cut { after_bytes: 300 },
            Fault::ErrorEvent,
            Fault::NoEnd,
            Fault::HangUp,
        ] {
            // The bridge itself tries four times where nothing was answered.
            let times = if matches!(
                fault,
                Fault::Status {
                    status: 429 | 529,
                    ..
                }
            ) {
                4
            } else {
                1
            };
            let broken =
                Turn::text("Some words that never come to their end.").broken(fault.clone());
            let turns =
                std::iter::repeat_n(broken, times).chain([bash("echo ok"), Turn::text("Done.")]);
            let host = Host::start(turns);
            let done = host.whole(&host.task(wire, Profile::Anthropic));
            host.check();
            assert_eq!(
                done.ending,
                Ending::Finished,
                "{wire:?} {fault:?}: {}",
                done.text
            );
            assert_eq!(done.steps, 2, "it is one step");
            assert!(done.notices().contains("asked again"), "{wire:?} {fault:?}");
        }
    }
}

#[test]
fn what_is_refused_for_good_ends_the_run() {
    let refused = |status| {
        Turn::text("x").broken(Fault::Status {
            status,
            retry_after: None,
            message: "no such thing".into(),
        })
    };
    for (status, text) in [
        (400, "no such thing"),
        (404, "no such thing"),
        (401, "the host's key"),
    ] {
        let host = Host::start([refused(status)]);
        let done = host.whole(&host.task(Wire::Chat, Profile::Anthropic));
        assert_eq!(done.ending, Ending::Model, "{status}");
        assert!(done.text.contains(text), "{}", done.text);
        assert_eq!(host.model.seen().len(), 1, "it is not asked again");
    }
    let host = Host::start([]);
    let mut task = host.task(Wire::Chat, Profile::Anthropic);
    task.model = "other".into();
    let done = host.whole(&task);
    assert_eq!(done.ending, Ending::Model);
    assert!(done.text.contains("may not be used here"), "{}", done.text);
}

#[test]
fn a_stream_in_small_pieces_is_the_same_answer() {
    for wire in WIRES {
        let drip = Fault::Drip {
            bytes: 7,
            pause_ms: 0,
        };
        let mut turn = bash("echo 'ä\u{1f33e}'").broken(drip.clone());
        turn.text = "Größe: \u{1f33e}\u{1f33e}".into();
        let host = Host::start([turn, Turn::text("Fertig: ü.").broken(drip)]);
        let done = host.whole(&host.task(wire, Profile::Anthropic));
        host.check();
        assert_eq!(done.text, "Fertig: ü.");
        assert!(done.said().starts_with("Größe: \u{1f33e}\u{1f33e}"));
        assert_eq!(done.results()[0].0, "ä\u{1f33e}\n");
    }
}

#[test]
fn calls_that_are_wrong_are_answered_and_the_run_goes_on() {
    let call = |name: &str, raw: &str, id: &str| ToolCall {
        name: name.into(),
        arguments: json!(null),
        raw: Some(raw.into()),
        id: Some(id.into()),
    };
    for wire in WIRES {
        let mut turn = Turn::text("");
        turn.tools = vec![
            call("bash", r#"{"command": "echo a >> log"}"#, "same"),
            call("bash", r#"{"command": "echo b >> log"}"#, "same"),
            call("bash", r#"{"command": "\d"}"#, "bad"),
            call("bash", r#"{"command": 7}"#, "type"),
            call("no such tool!", "{}", "name"),
            call(
                "str_replace_based_edit_tool",
                r#"{"command": "fly", "path": "x"}"#,
                "kind",
            ),
            call("bash", "", "empty"),
        ];
        let mut again = bash("cat log");
        again.tools[0].id = Some("same".into());
        let host = Host::start([turn, again, Turn::text("Done.")]);
        let done = host.whole(&host.task(wire, Profile::Anthropic));
        host.check();
        assert_eq!(done.ending, Ending::Finished, "{wire:?}: {}", done.text);
        let results = done.results();
        let errors: Vec<bool> = results.iter().map(|(_, error)| *error).collect();
        assert_eq!(errors, [false, false, true, true, true, true, true, false]);
        assert!(results[2].0.contains("not JSON"), "{results:?}");
        assert!(results[3].0.contains("do not fit"), "{results:?}");
        assert!(results[4].0.contains("There is no tool"), "{results:?}");
        assert!(results[6].0.contains("needs a command"), "{results:?}");
        assert_eq!(results[7].0, "a\nb\n", "both of one id ran, once each");
    }
}

#[test]
fn an_endless_answer_ends() {
    for wire in WIRES {
        let endless = Turn::text("word after word after word")
            .broken(Fault::Endless)
            .repeated();
        let host = Host::with([endless], json!({"answer_bytes": 300_000}), 100);
        let done = host.whole(&host.task(wire, Profile::Anthropic));
        assert_eq!(done.ending, Ending::Model, "{wire:?}");
        assert!(
            host.model.seen().len() <= 3,
            "it is asked again, but not for ever"
        );
    }
}

#[test]
fn much_output_is_cut_and_kept_in_a_file() {
    let host = Host::start([bash("seq 1 100000"), Turn::text("Done.")]);
    let done = host.whole(&host.task(Wire::Messages, Profile::Anthropic));
    let file = done.events.iter().find_map(|event| match event {
        AgentEvent::ToolResult { file, output, .. } => Some((file.clone(), output.clone())),
        _ => None,
    });
    let (Some(file), output) = file.expect("a result") else {
        panic!("no file")
    };
    assert!(output.len() < 17_000 && output.starts_with("1\n2\n"));
    assert!(output.ends_with("99999\n100000\n") && output.contains(&file));
    let all = std::fs::read_to_string(file).expect("a file");
    assert_eq!(all.lines().count(), 100_000);
}

#[test]
fn a_token_that_is_replaced_is_read_again() {
    let mut host = Host::start([bash("sleep 1"), Turn::text("Done.")]);
    let task = host.task(Wire::Messages, Profile::Anthropic);
    let mut run = host.run(&task);
    run.wait(|event| matches!(event, AgentEvent::ToolCall { .. }));
    // As a wake does: older tokens end before the new one is written.
    let token = host.mint(true);
    run.wait(|event| matches!(event, AgentEvent::Step { step: 2 }));
    std::thread::sleep(std::time::Duration::from_millis(500));
    std::fs::write(host.token_file(), token).expect("a file");
    let done = run.end();
    assert_eq!(done.ending, Ending::Finished);
    assert_eq!(host.model.seen().len(), 2);
}
