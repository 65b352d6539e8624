//! Budgets, repeated steps, forks and crashes.

mod common;

use common::{CHAT, Host, MESSAGES, RESPONSES, body, calls, config, script};
use ratoon_bridge_api::amount::Limits;
use ratoon_bridge_api::control::{Reply, Request, Rested};
use ratoon_bridge_api::record::{Ending, Entry};
use ratoon_scripted_model::{Fault, Turn};
use serde_json::json;

#[test]
fn a_step_is_paid_once() {
    let model = script([Turn::text("first"), Turn::text("second")]);
    let configuration = config(&model.url());
    let mut host = Host::start(configuration.clone());
    let guest = host.first();
    for (path, status) in [(MESSAGES, 200), (RESPONSES, 409)] {
        assert_eq!(guest.step(path, &body(path, true), 1, 0).status, status);
    }
    let first = guest.step(MESSAGES, &body(MESSAGES, true), 1, 0);
    assert_eq!(first.header("x-ratoon-replayed"), Some("1"));
    let other = guest.step(RESPONSES, &body(RESPONSES, true), 1, 0);
    assert_eq!(
        (other.status, other.code()),
        (409, "step"),
        "another request"
    );
    let second = guest.step(RESPONSES, &body(RESPONSES, true), 1, 1);
    assert!(second.body.contains("second"));
    assert_eq!(model.seen().len(), 2);
    // Also after the bridge was killed.
    let spent = host.spent("main");
    let mut host = host.crash_and_restart(configuration);
    let guest = host.first();
    let again = guest.step(MESSAGES, &body(MESSAGES, true), 1, 0);
    assert_eq!(again.body, first.body);
    assert_eq!(again.header("content-type"), Some("text/event-stream"));
    assert_eq!(host.spent("main"), spent);
    assert_eq!(model.seen().len(), 2);
    host.check_record(&model);
}

#[test]
fn a_stored_answer_that_was_cut_is_not_given_again() {
    let model = script([Turn::text("one two three")]);
    let mut host = Host::start(config(&model.url()));
    let guest = host.first();
    let ask = || guest.step(CHAT, &body(CHAT, false), 1, 0);
    assert_eq!(ask().status, 200);
    let Some(Entry::Answer { body, .. }) = host.entries("main").pop() else {
        panic!("no answer");
    };
    let path = host.run_dir().join("bodies").join(&body.hash.0);
    let file = std::fs::File::options().write(true).open(path);
    let file = file.expect("a body");
    file.set_len(body.len - 1).expect("cut");
    let answer = ask();
    assert_eq!((answer.status, answer.code()), (503, "record"));
    let replayed = |entry: &Entry| matches!(entry, Entry::Replay { .. });
    assert!(!host.entries("main").iter().any(replayed));
    assert_eq!(model.seen().len(), 1);
}

#[test]
fn a_bridge_that_is_killed_in_a_call_counts_all_of_it() {
    let drip = Fault::Drip {
        bytes: 60,
        pause_ms: 100,
    };
    let model = script([
        Turn::text("one two three four").broken(drip),
        Turn::text("ok"),
    ]);
    let configuration = config(&model.url());
    let mut host = Host::start(configuration.clone());
    let guest = host.first();
    let token = [
        ("x-ratoon-token", guest.token.as_str()),
        ("x-ratoon-step", "7"),
    ];
    let bytes = body(MESSAGES, true).to_string();
    let mut stream = guest.send("POST", MESSAGES, &token, bytes.as_bytes());
    common::read_head(&mut stream);
    let piece = common::read_chunk(&mut stream).expect("a piece");
    let mut host = host.crash_and_restart(configuration);
    let guest = host.first();
    assert_eq!(host.spent("main").output_tokens, 50);
    let cut = host
        .entries("main")
        .into_iter()
        .find_map(|entry| match entry {
            Entry::Answer {
                ending: Ending::Cut,
                body,
                ..
            } => Some(body),
            _ => None,
        });
    let path = host.run_dir().join("bodies").join(cut.expect("cut").hash.0);
    let kept = std::fs::read(path).expect("what had come");
    assert!(kept.starts_with(&piece), "the guest had this");
    let again = guest.step(MESSAGES, &body(MESSAGES, true), 7, 0);
    assert_eq!(again.code(), "step", "it may have been paid");
    assert_eq!(
        guest.step(MESSAGES, &body(MESSAGES, true), 7, 1).status,
        200
    );
    host.check_record(&model);
}

#[test]
fn children_draw_on_their_parents_budget() {
    let model = script([Turn::text("a b c d e").repeated()]);
    let mut host = Host::start(config(&model.url()));
    let limits = Limits {
        output_tokens: Some(60),
        ..Limits::default()
    };
    let parent = host.vm("p", "main", None, limits);
    let small = Limits {
        output_tokens: Some(20),
        ..Limits::default()
    };
    let a = host.vm("a", "a", Some("main"), small);
    let b = host.vm("b", "b", Some("main"), Limits::default());
    // Five tokens an answer; what is asked for is clamped to what is left.
    assert_eq!(a.ask(CHAT, &body(CHAT, false)).status, 200);
    assert_eq!(model.seen()[0].body["max_completion_tokens"], 20);
    assert_eq!(a.ask(CHAT, &body(CHAT, false)).code(), "budget");
    let mut all = 1;
    while b.ask(CHAT, &body(CHAT, true)).status == 200 {
        all += 1;
    }
    assert_eq!(all, 9, "as long as 16 tokens are left");
    let refused = parent.ask(MESSAGES, &body(MESSAGES, false));
    assert_eq!((refused.status, refused.code()), (402, "budget"));
    assert_eq!(refused.json()["error"]["type"], "billing_error");
    assert_eq!(host.spent("main").output_tokens, 45);
    assert_eq!(host.spent("a").output_tokens, 5);
    let Some(Entry::Begin {
        parent: Some(above),
        ..
    }) = host.entries("a").into_iter().next()
    else {
        panic!("no beginning");
    };
    assert_eq!((above.branch.as_str(), above.seq), ("main", 2));
    host.check_record(&model);
}

#[test]
fn working_time_ends_calls_also_on_their_way_and_is_read_back() {
    let late = Turn::text("ok").broken(Fault::Late { ms: 900 });
    let model = script([late.repeated()]);
    let configuration = config(&model.url());
    let mut host = Host::start(configuration.clone());
    let limits = Limits {
        working_ms: Some(1500),
        ..Limits::default()
    };
    let guest = host.vm("vm", "main", None, limits);
    let ask = |guest: &common::Guest| {
        let answer = guest.ask(CHAT, &body(CHAT, false));
        (answer.status, answer.code().to_owned())
    };
    assert_eq!(ask(&guest), (200, "none".into()));
    assert_eq!(ask(&guest), (504, "timed_out".into()));
    assert_eq!(ask(&guest), (402, "time".into()));
    let mut host = host.crash_and_restart(configuration);
    let guest = host.vm("vm", "main", None, Limits::default());
    let answer = guest.ask(MESSAGES, &body(MESSAGES, false));
    assert_eq!((answer.status, answer.code()), (402, "time"));
    assert_eq!(answer.header("x-should-retry"), Some("false"));
    assert!(
        answer.body.contains("working time of 1 s is over"),
        "{}",
        answer.body
    );
    host.check_record(&model);
}

#[test]
fn wall_time_goes_on_unless_the_host_says_that_it_was_rest() {
    let model = script([Turn::text("ok").repeated()]);
    let mut host = Host::start(config(&model.url()));
    let limits = Limits {
        wall_ms: Some(2000),
        ..Limits::default()
    };
    let guest = host.vm("vm", "main", None, limits);
    let ask = |guest: &common::Guest| guest.ask(CHAT, &body(CHAT, false)).code().to_owned();
    let pause = || std::thread::sleep(std::time::Duration::from_millis(1500));
    assert_eq!(ask(&guest), "none");
    pause();
    let rested = Rested { vm: "vm".into() };
    assert_eq!(host.tell(Request::Rested(rested)), Reply::Rested {});
    pause();
    assert_eq!(ask(&guest), "none");
    // A child's time is the run's, from which its parent's rest is taken when it begins.
    pause();
    let child = host.vm("child", "child", Some("main"), Limits::default());
    assert_eq!(ask(&child), "none");
    pause();
    assert_eq!((ask(&child), ask(&guest)), ("time".into(), "time".into()));
    let rests = |branch: &str| {
        let entries = host.entries(branch).into_iter();
        let rests = entries.filter_map(|entry| match entry {
            Entry::Rest { ms } => Some(ms),
            _ => None,
        });
        rests.collect::<Vec<_>>()
    };
    assert_eq!(rests("main").len(), 2);
    assert!(
        rests("main").iter().all(|ms| (1400..2500).contains(ms)),
        "{:?}",
        rests("main")
    );
    assert!(rests("child").is_empty());
    host.check_record(&model);
}

#[test]
fn a_budget_that_others_hold_is_waited_for_and_not_used_up() {
    let late = Turn::text("one two").broken(Fault::Late { ms: 1500 });
    let model = script([late, Turn::text("three")]);
    let mut host = Host::start(config(&model.url()));
    let limits = Limits {
        output_tokens: Some(60),
        ..Limits::default()
    };
    host.vm("p", "main", None, limits);
    let a = host.vm("a", "a", Some("main"), Limits::default());
    let b = host.vm("b", "b", Some("main"), Limits::default());
    let token = [("x-ratoon-token", a.token.as_str())];
    let bytes = body(CHAT, false).to_string();
    let first = a.send("POST", CHAT, &token, bytes.as_bytes());
    while model.seen().is_empty() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let busy = b.ask(CHAT, &body(CHAT, false));
    assert_eq!((busy.status, busy.code()), (429, "busy"), "{busy:?}");
    assert_eq!(busy.header("x-should-retry"), None);
    assert_eq!(busy.header("retry-after"), Some("1"));
    assert_eq!(common::read_answer(first).status, 200);
    assert_eq!(b.ask(CHAT, &body(CHAT, false)).status, 200);
    host.check_record(&model);
}

#[test]
fn money_is_limited_and_needs_a_price() {
    let model = script([Turn::text("a b c d e").repeated()]);
    let mut configuration = config(&model.url());
    configuration["providers"][0]["models"][0]["max_input_tokens"] = json!(50);
    let mut host = Host::start(configuration);
    let limits = Limits {
        cost_microusd: Some(1000),
        ..Limits::default()
    };
    let guest = host.vm("vm", "main", None, limits);
    let mut asked = body(CHAT, false);
    asked["model"] = "free".into();
    assert_eq!(guest.ask(CHAT, &asked).code(), "model");
    asked["model"] = "m".into();
    asked["max_tokens"] = json!(1000);
    assert_eq!(guest.ask(CHAT, &asked).status, 200);
    let sent = model.seen()[0].body["max_completion_tokens"]
        .as_u64()
        .expect("a limit");
    assert_eq!(sent, (1000 - 50 * 3) / 15, "what 1000 microdollars buy");
    assert_eq!(host.spent("main").cost_microusd, 30 + 75);
    host.check_record(&model);
}

#[test]
fn a_vm_may_have_fewer_models() {
    let model = script([Turn::text("ok").repeated()]);
    let mut host = Host::start(config(&model.url()));
    let mut add = host.add_vm("vm", "main", None, calls(5));
    add.models = Some(vec!["nobody".into()]);
    assert!(
        host.refused(Request::AddVm(add.clone()))
            .contains("not in the configuration")
    );
    add.models = Some(vec!["free".into()]);
    let guest = host.guest(add);
    assert_eq!(guest.ask(CHAT, &body(CHAT, false)).code(), "model");
}

#[test]
fn without_a_record_there_are_no_calls() {
    let model = script([Turn::text("ok").repeated()]);
    let mut host = Host::start(config(&model.url()));
    let guest = host.first();
    let bodies = host.run_dir().join("bodies");
    std::fs::remove_dir(&bodies).expect("an empty folder");
    let answer = guest.ask(CHAT, &body(CHAT, false));
    assert_eq!((answer.status, answer.code()), (503, "record"));
    assert!(model.seen().is_empty());
    assert_eq!(host.spent("main").calls, 0);
}

#[test]
fn a_run_whose_record_is_full_makes_no_more_calls() {
    let model = script([Turn::text("ok").repeated()]);
    let mut configuration = config(&model.url());
    configuration["limits"] = json!({"run_record_bytes": 20_000});
    let mut host = Host::start(configuration);
    let guest = host.first();
    let mut asked = body(CHAT, false);
    let answer = (0..100)
        .map(|number| {
            asked["messages"][0]["content"] = format!("{number}{}", "x".repeat(2000)).into();
            guest.ask(CHAT, &asked)
        })
        .find(|answer| answer.status != 200)
        .expect("it is full at some time");
    assert_eq!((answer.status, answer.code()), (503, "record"));
    assert!(answer.body.contains("as large as the host allows"));
    assert_eq!(answer.header("x-should-retry"), Some("false"));
    assert!((4..9).contains(&host.spent("main").calls));
    host.check_record(&model);
}

#[test]
fn the_process_hides_its_memory() {
    // Root may read any process: so this becomes whom the bridge becomes.
    let user = common::is_root().then_some(ratoon_bridge::confine::OWN_ID);
    the_process_of(user, None);
}

#[test]
fn the_process_of_another_user_hides_its_memory_as_root() {
    if !common::is_root() {
        eprintln!("SKIPPED: only root can be somebody else");
        return;
    }
    let user = Some(common::NOBODY);
    let program = env!("CARGO_BIN_EXE_ratoon-bridge");
    if let Err(error) = common::as_user(user, || std::fs::File::open(program)) {
        eprintln!("SKIPPED: user {user:?} cannot read {program}: {error}");
        return;
    }
    the_process_of(user, user);
}

fn the_process_of(user: Option<u32>, starter: Option<u32>) {
    let model = script([Turn::text("ok").repeated()]);
    let folder = tempfile::tempdir().expect("a folder");
    let mut host = Host::start_as(starter, folder, config(&model.url()));
    // It serves: so it is confined, and all that follows is of one that works.
    if starter.is_none() {
        assert_eq!(host.first().ask(CHAT, &body(CHAT, false)).status, 200);
    } else {
        host.tell(Request::Status {});
    }
    let proc = format!("/proc/{}", host.pid());
    let limits = std::fs::read_to_string(format!("{proc}/limits")).expect("limits");
    let limit = |name: &str| {
        let line = limits.lines().find(|line| line.starts_with(name));
        let words = line.expect("a limit").split_whitespace();
        let words: Vec<String> = words.map(str::to_owned).collect();
        (
            words[words.len() - 3].clone(),
            words[words.len() - 2].clone(),
        )
    };
    assert_eq!(limit("Max core file size"), ("0".into(), "0".into()));
    let (soft, hard) = limit("Max open files");
    assert_eq!(soft, hard, "as many descriptors as it may have");
    let status = std::fs::read_to_string(format!("{proc}/status")).expect("a status");
    let id = user.unwrap_or_else(|| rustix::process::geteuid().as_raw());
    let ids = format!("Uid:\t{id}\t{id}\t{id}\t{id}\n");
    for line in [
        ids.as_str(),
        "NoNewPrivs:\t1\n",
        "Seccomp:\t2\n",
        "CapPrm:\t0000000000000000\n",
        "CapEff:\t0000000000000000\n",
    ] {
        assert!(status.contains(line), "{line:?}: {status}");
    }
    assert!(
        user.is_none() || starter.is_some() || status.contains("Groups:\t \n"),
        "{status}"
    );
    let mut open = vec!["cmdline"];
    // Nobody else but root reads this.
    open.extend(user.map(|_| "environ"));
    for name in open {
        let bytes = std::fs::read(format!("{proc}/{name}")).expect(name);
        let key = common::KEY.as_bytes();
        assert!(!bytes.windows(key.len()).any(|part| part == key), "{name}");
    }
    let mem = |pid: u32| {
        let path = format!("/proc/{pid}/mem");
        common::as_user(user, || std::fs::File::open(path).map(drop))
    };
    let error = mem(host.pid()).expect_err("its memory is hidden");
    assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
    // Another process of the same user is not.
    let mut command = std::process::Command::new("sleep");
    if let Some(user) = user {
        std::os::unix::process::CommandExt::uid(&mut command, user);
    }
    let mut other = command.arg("60").spawn().expect("sleep");
    let read = mem(other.id());
    other.kill().expect("a process");
    other.wait().expect("a process");
    read.expect("this test can fail");
}

#[test]
fn a_socket_is_open_to_the_users_who_are_configured_and_to_nobody_else() {
    if !common::is_root() {
        eprintln!("SKIPPED: only root can be somebody else");
        return;
    }
    let model = script([Turn::text("ok").repeated()]);
    let mut configuration = config(&model.url());
    configuration["peer_uids"] = json!([common::NOBODY]);
    let mut host = Host::start(configuration);
    let all = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(host.folder.path(), all).expect("a folder");
    let guest = host.first();
    let asked = body(CHAT, false);
    let answer = common::as_user(Some(common::NOBODY), || guest.ask(CHAT, &asked));
    assert_eq!(answer.status, 200);
    let control = host.folder.path().join("control");
    let is_served = |user: u32, socket: &std::path::Path| {
        common::as_user(Some(user), || common::is_served(socket))
    };
    let served = is_served(common::NOBODY, &guest.socket);
    assert!(served.expect("connected"));
    let served = is_served(common::NOBODY - 1, &guest.socket);
    assert!(!served.expect("connected, and not heard"));
    let error = is_served(common::NOBODY, &control).expect_err("its owner's");
    assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
    host.check_record(&model);
}
