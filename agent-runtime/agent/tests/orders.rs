//! Orders, limits, and a host that is gone.

mod common;

use std::time::{Duration, Instant};

use common::{Host, WIRES, bash};
use ratoon_protocol::{AgentEvent, AgentLimits, Ending, Go, Order, Profile, Task, Wire};
use ratoon_scripted_model::{Fault, Turn};
use serde_json::json;

fn limited(host: &Host, limits: AgentLimits) -> Task {
    Task {
        limits,
        ..host.task(Wire::Messages, Profile::Anthropic)
    }
}

fn is_held(event: &AgentEvent) -> bool {
    matches!(event, AgentEvent::Held { .. })
}

fn held(step: u32, nonce: Option<String>) -> AgentEvent {
    AgentEvent::Held { step, nonce }
}

fn go(go: Go) -> Order {
    Order::Go(Box::new(go))
}

/// Processes of this host whose command line has the word.
fn processes(word: &str) -> usize {
    std::fs::read_dir("/proc")
        .expect("/proc")
        .filter_map(|entry| std::fs::read(entry.ok()?.path().join("cmdline")).ok())
        .filter(|line| String::from_utf8_lossy(line).contains(word))
        .count()
}

#[test]
fn a_run_holds_where_it_is_told_and_goes_on_as_another_branch() {
    for wire in WIRES {
        let host = Host::start([bash("echo a"), Turn::text("Done.").when("the other way")]);
        let mut task = host.task(wire, Profile::Anthropic);
        task.hold_before = vec![2];
        let mut run = host.run(&task);
        assert_eq!(run.wait(is_held), held(2, None));
        run.is_quiet(Duration::from_millis(300));
        let nonce = Some("n-1".to_owned());
        run.order(&Order::Hold {
            nonce: nonce.clone(),
        });
        assert_eq!(run.wait(is_held), held(2, nonce));
        assert_eq!(host.model.seen().len(), 1, "no call is open");
        run.order(&go(Go {
            branch: Some("main.1".into()),
            steer: Some("Try the other way.".into()),
            ..Go::default()
        }));
        let going = run.wait(|event| matches!(event, AgentEvent::Going { .. }));
        assert_eq!(
            going,
            AgentEvent::Going {
                branch: "main.1".into()
            }
        );
        assert_eq!(run.end().ending, Ending::Finished);
        host.check();
    }
}

#[test]
fn a_run_waits_at_each_boundary_until_it_is_kept_or_told_to_go() {
    let boundary = |step| move |event: &AgentEvent| *event == AgentEvent::Boundary { step };
    let kept = |step| Order::Kept { step };
    let host = Host::start([
        bash("echo a"),
        bash("echo b"),
        Turn::text("Done.").when("another way"),
    ]);
    let mut task = host.task(Wire::Messages, Profile::Anthropic);
    task.boundaries = true;
    task.hold_before = vec![2];
    let mut run = host.run(&task);
    run.wait(boundary(1));
    run.order(&Order::Echo { nonce: "e".into() });
    let echo = AgentEvent::Echo {
        nonce: "e".into(),
        boundary: Some(1),
    };
    run.wait(|event| *event == echo);
    // One for another boundary is none for this.
    run.order(&kept(7));
    run.is_quiet(Duration::from_millis(300));
    assert!(host.model.seen().is_empty(), "no call is open");
    run.order(&kept(1));
    run.wait(boundary(2));
    // To be kept, and held as it was to be.
    assert_eq!(run.wait(is_held), held(2, None));
    run.order(&kept(2));
    run.is_quiet(Duration::from_millis(300));
    run.order(&go(Go::default()));
    run.wait(boundary(3));
    // As a copy hears it: it is asked where it is, and goes on without having been kept.
    run.order(&Order::Hold {
        nonce: Some("n".into()),
    });
    assert_eq!(run.wait(is_held), held(3, Some("n".into())));
    run.order(&go(Go {
        steer: Some("Find another way.".into()),
        ..Go::default()
    }));
    assert_eq!(run.end().ending, Ending::Finished);
    host.check();
}

#[test]
fn an_order_to_hold_waits_for_the_tool() {
    let host = Host::start([bash("sleep 1; echo a"), bash("echo b"), Turn::text("Done.")]);
    let mut run = host.run(&host.task(Wire::Chat, Profile::Anthropic));
    run.wait(|event| matches!(event, AgentEvent::ToolCall { .. }));
    run.order(&Order::Hold { nonce: None });
    // An echo waits for nothing.
    run.order(&Order::Echo { nonce: "e".into() });
    let echo = |boundary| AgentEvent::Echo {
        nonce: "e".into(),
        boundary,
    };
    run.wait(|event| *event == echo(None));
    let is_result = |event: &AgentEvent| matches!(event, AgentEvent::ToolResult { .. });
    assert!(!run.seen.iter().any(is_result));
    run.wait(is_held);
    assert!(
        run.seen
            .iter()
            .any(|event| matches!(event, AgentEvent::ToolResult { output, .. } if output == "a\n"))
    );
    // Time held is none of the run's.
    std::thread::sleep(Duration::from_millis(700));
    run.order(&go(Go {
        limits: Some(AgentLimits {
            wall_ms: 20_000,
            ..AgentLimits::default()
        }),
        hold_before: vec![3],
        ..Go::default()
    }));
    assert_eq!(run.wait(is_held), held(3, None));
    run.order(&go(Go::default()));
    assert_eq!(run.end().ending, Ending::Finished);
    host.check();
}

#[test]
fn held_time_does_not_count() {
    let host = Host::start([Turn::text("Done.")]);
    let mut task = limited(
        &host,
        AgentLimits {
            wall_ms: 1500,
            ..AgentLimits::default()
        },
    );
    task.hold_before = vec![1];
    let mut run = host.run(&task);
    run.wait(is_held);
    std::thread::sleep(Duration::from_millis(2000));
    run.order(&go(Go::default()));
    assert_eq!(run.end().ending, Ending::Finished);
}

#[test]
fn a_cancel_ends_a_tool_and_all_its_processes() {
    let host = Host::start([
        bash("sleep 61971 & sleep 61971").and_tool("bash", json!({"command": "touch never"}))
    ]);
    let mut run = host.run(&host.task(Wire::Messages, Profile::Anthropic));
    run.wait(|event| matches!(event, AgentEvent::ToolCall { .. }));
    while processes("61971") < 2 {
        std::thread::sleep(Duration::from_millis(20));
    }
    let began = Instant::now();
    run.order(&Order::Cancel);
    let done = run.end();
    assert!(began.elapsed() < Duration::from_secs(5));
    assert_eq!((done.ending, done.code), (Ending::Cancelled, 130));
    assert_eq!(processes("61971"), 0);
    let results = done.results();
    assert_eq!(results.len(), 2, "each call has its result: {results:?}");
    assert!(results[0].0.contains("cancelled") && results[1].0.contains("Not run"));
    assert!(!host.work().join("never").exists());
}

#[test]
fn a_cancel_ends_commands_of_their_own_too() {
    let host = Host::start([
        Turn::tool(
            "exec_command",
            json!({"cmd": "sleep 61972", "yield_time_ms": 250}),
        ),
        Turn::tool("exec_command", json!({"cmd": "sleep 61972"})),
    ]);
    let mut run = host.run(&host.task(Wire::Responses, Profile::Openai));
    while processes("61972") < 2 {
        std::thread::sleep(Duration::from_millis(20));
    }
    run.order(&Order::Cancel);
    assert_eq!(run.end().ending, Ending::Cancelled);
    assert_eq!(processes("61972"), 0);
}

#[test]
fn a_cancel_ends_an_answer() {
    for wire in WIRES {
        let slow = Turn::text(&"word ".repeat(500)).broken(Fault::Drip {
            bytes: 40,
            pause_ms: 20,
        });
        let mut host = Host::start([slow]);
        let mut run = host.run(&host.task(wire, Profile::Anthropic));
        run.wait(|event| matches!(event, AgentEvent::Text { .. }));
        let began = Instant::now();
        run.order(&Order::Cancel);
        assert_eq!(run.end().ending, Ending::Cancelled);
        assert!(began.elapsed() < Duration::from_secs(5));
        while host.calls_in_flight() > 0 {
            assert!(
                began.elapsed() < Duration::from_secs(5),
                "the call is closed"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

#[test]
fn a_cancel_ends_a_held_run() {
    let host = Host::start([]);
    let mut task = host.task(Wire::Chat, Profile::Minimal);
    task.hold_before = vec![1];
    let mut run = host.run(&task);
    run.wait(is_held);
    run.order(&Order::Cancel);
    assert_eq!(run.end().ending, Ending::Cancelled);
}

#[test]
fn each_limit_has_its_ending() {
    let many = |count: u32| (0..count).map(|number| bash(&format!("echo {number}")));
    let host = Host::start(many(5));
    let limits = AgentLimits {
        steps: 3,
        ..AgentLimits::default()
    };
    let done = host.whole(&limited(&host, limits));
    assert_eq!((done.ending, done.steps), (Ending::Steps, 3));

    let host = Host::start([bash("sleep 100")]);
    let limits = AgentLimits {
        wall_ms: 1000,
        ..AgentLimits::default()
    };
    let done = host.whole(&limited(&host, limits));
    assert_eq!(done.ending, Ending::Time);

    let host = Host::start((0..9).map(|number| bash(&format!("sleep 0.4; echo {number}"))));
    let limits = AgentLimits {
        working_ms: 1000,
        ..AgentLimits::default()
    };
    let done = host.whole(&limited(&host, limits));
    assert_eq!(done.ending, Ending::Time);
    assert!(done.steps <= 3, "{done:#?}");

    let host = Host::start([
        bash("echo a; sleep 100"),
        bash("echo b"),
        Turn::text("Done."),
    ]);
    let limits = AgentLimits {
        tool_ms: 500,
        ..AgentLimits::default()
    };
    let done = host.whole(&limited(&host, limits));
    assert_eq!(done.ending, Ending::Finished);
    let results = done.results();
    assert!(
        results[0].0.starts_with("a\n[not done after 0.5 s"),
        "{results:?}"
    );
    assert_eq!(results[1].0, "b\n");

    let host = Host::start((0..9).map(|_| Turn::tool("nothing", json!({}))));
    let done = host.whole(&limited(&host, AgentLimits::default()));
    assert_eq!((done.ending, done.steps), (Ending::Format, 3));

    let host = Host::start((0..9).map(|_| Turn::text("")));
    let done = host.whole(&limited(&host, AgentLimits::default()));
    assert_eq!((done.ending, done.steps), (Ending::Format, 3));
    host.check();

    let host = Host::with(many(5), json!({}), 2);
    let done = host.whole(&limited(&host, AgentLimits::default()));
    assert_eq!((done.ending, done.steps), (Ending::Budget, 3));
}

#[test]
fn a_circle_is_noticed() {
    let host = Host::start([bash("echo a").repeated()]);
    let done = host.whole(&limited(&host, AgentLimits::default()));
    assert_eq!((done.ending, done.steps), (Ending::Repetition, 5));
    let results = done.results();
    assert!(
        results[3].0.contains("Once more ends the run"),
        "{results:?}"
    );
    assert!(results[4].0.contains("Not run"), "{results:?}");

    let host = Host::start((0..20).map(|number| bash(&format!("echo {}", number % 2))));
    let done = host.whole(&limited(&host, AgentLimits::default()));
    assert_eq!((done.ending, done.steps), (Ending::Repetition, 9));
    host.check();
}

#[test]
fn an_endless_answer_ends_with_the_runs_time() {
    let endless = Turn::text("word after word").broken(Fault::Endless);
    let host = Host::start([endless]);
    let limits = AgentLimits {
        wall_ms: 1000,
        ..AgentLimits::default()
    };
    let mut task = limited(&host, limits);
    task.wire = Wire::Chat;
    let began = Instant::now();
    let done = host.whole(&task);
    assert_eq!(done.ending, Ending::Time, "{}", done.text);
    assert!(began.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_host_that_says_nothing_more_changes_nothing() {
    let host = Host::start([bash("sleep 0.5"), Turn::text("Done.")]);
    let mut run = host.run(&host.task(Wire::Messages, Profile::Anthropic));
    drop(run.stdin.take());
    assert_eq!(run.end().ending, Ending::Finished);
}

#[test]
fn a_host_that_reads_nothing_more_changes_nothing() {
    let host = Host::start([
        bash("sleep 0.3; touch one"),
        bash("touch two"),
        Turn::text("Done."),
    ]);
    let task = host.task(Wire::Messages, Profile::Anthropic);
    let mut process = host.command("loop").spawn().expect("ratoon-agent");
    let line = serde_json::to_string(&task).expect("JSON") + "\n";
    let mut stdin = process.stdin.take().expect("a pipe");
    std::io::Write::write_all(&mut stdin, line.as_bytes()).expect("it reads");
    drop(process.stdout.take());
    let status = process.wait().expect("a process");
    assert_eq!(status.code(), Some(0));
    assert!(host.work().join("two").exists());
    assert_eq!(host.model.seen().len(), 3);
}

#[test]
fn what_is_no_task_is_said() {
    let host = Host::start([]);
    let task = host.task(Wire::Chat, Profile::Minimal);
    let gone = Task {
        directory: "/no/such/place".into(),
        ..task
    };
    let done = host.whole(&gone);
    assert_eq!((done.ending, done.code), (Ending::Failed, 125));
    assert!(done.text.contains("/no/such/place"));
    let mut process = host.command("loop").spawn().expect("ratoon-agent");
    drop(process.stdin.take());
    let output = process.wait_with_output().expect("a process");
    assert_eq!(output.status.code(), Some(125));
    let line = String::from_utf8(output.stdout).expect("UTF-8");
    assert!(line.contains(r#""ending":"failed""#), "{line}");
}
