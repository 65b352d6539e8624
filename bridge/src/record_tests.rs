//! Runs that are opened again, forked, torn and shared.

use super::*;
use crate::relay;
use ratoon_bridge_api::audit::{read_branch, verify_run};

fn open(records: &Path) -> Run {
    let masker = Arc::new(Masker::new(&[b"top-secret-key"]));
    Run::open(records, "run", masker, 1 << 20).expect("a run")
}

fn limits(calls: u64) -> Limits {
    Limits {
        calls: Some(calls),
        ..Limits::default()
    }
}

fn one() -> Amount {
    Amount {
        calls: 1,
        output_tokens: 7,
        ..Amount::default()
    }
}

fn step(step: u64) -> Step {
    Step { step, attempt: 0 }
}

fn begin_call(run: &Run, branch: &str, at: u64) -> u64 {
    let request = run
        .store("r", b"a request with top-secret-key")
        .expect("stored");
    let mut state = run.state();
    state.tree.reserve(branch, one()).expect("enough");
    run.begin_call(&mut state, branch, |call| Entry::Call {
        call,
        vm: "vm".into(),
        wire: "chat".into(),
        provider: "p".into(),
        model: "m".into(),
        step: Some(step(at)),
        digest: Hash::of_body(b"same"),
        request,
        withheld: Vec::new(),
        reserved: one(),
    })
    .expect("written")
}

fn end_call(run: &Run, branch: &str, call: u64, at: u64, ending: Ending) {
    let body = run.store("a", b"an answer").expect("stored");
    let entry = Entry::Answer {
        call,
        ending,
        status: 200,
        media_type: "application/json".into(),
        body,
        charged: Amount {
            output_tokens: 2,
            ..one()
        },
        cached_tokens: 0,
        attempts: 1,
        first_byte_us: 0,
        total_us: 0,
    };
    run.end_call(branch, Some(&step(at)), one(), entry)
        .expect("written");
}

#[test]
fn what_was_used_and_answered_is_known_after_a_restart() {
    let records = tempfile::tempdir().expect("a folder");
    let run = open(records.path());
    run.begin("main", None, limits(10)).expect("begun");
    run.begin("child", Some("main"), limits(5)).expect("begun");
    for (at, ending) in [(0, Ending::Complete), (1, Ending::Cut)] {
        let call = begin_call(&run, "child", at);
        end_call(&run, "child", call, at, ending);
    }
    // The bridge is killed while this one is on its way.
    begin_call(&run, "child", 2);
    drop(run);
    let bodies = records.path().join("run/bodies");
    fs::write(bodies.join(".child.2"), b"data: a par").expect("a part of its answer");
    fs::write(bodies.join(".child.request"), b"{").expect("a part of a request");
    fs::write(bodies.join(".child.1"), b"{").expect("of a call that has ended");

    let run = open(records.path());
    run.begin("child", Some("main"), Limits::default())
        .expect("there");
    let state = run.state();
    let spent = state.tree.get("main").expect("there").spent;
    assert_eq!((spent.calls, spent.output_tokens), (3, 2 + 2 + 7));
    assert_eq!(state.tree.left("child").calls, 2);
    let answer = |at| state.step("child", &step(at)).expect("known").answer;
    assert!(matches!(answer(0), Answered::Whole { .. }));
    assert_eq!(answer(1), Answered::Never);
    assert_eq!(answer(2), Answered::Never);
    assert_eq!(
        state.step("main", &step(0)),
        None,
        "a step is of one branch"
    );
    drop(state);
    let path = branch_file(&records.path().join("run"), "child");
    let last = || {
        let mut read = read_branch(&path).expect("readable");
        (read.lines.len(), read.lines.pop().expect("a line").0.entry)
    };
    let (lines, entry) = last();
    let Entry::Answer {
        call: 2,
        ending: Ending::Cut,
        media_type,
        body,
        charged,
        ..
    } = entry
    else {
        panic!("{entry:?}");
    };
    assert_eq!((media_type.as_str(), charged), (relay::EVENTS, one()));
    let kept = fs::read(bodies.join(&body.hash.0)).expect("kept");
    assert_eq!((kept.as_slice(), body.len), (&b"data: a par"[..], 11));
    let hidden = fs::read_dir(&bodies).expect("a folder").flatten();
    let hidden = hidden.filter(|entry| entry.file_name().as_encoded_bytes()[0] == b'.');
    assert_eq!(hidden.count(), 0);
    drop(run);
    // Once.
    let run = open(records.path());
    assert_eq!(run.state().tree.get("main").expect("there").spent, spent);
    assert_eq!(last().0, lines);
    verify_run(&records.path().join("run"), &[]).expect("whole");
}

#[test]
fn a_torn_line_is_taken_away_and_told() {
    let records = tempfile::tempdir().expect("a folder");
    let run = open(records.path());
    run.begin("main", None, limits(10)).expect("begun");
    drop(run);
    let dir = records.path().join("run");
    let path = branch_file(&dir, "main");
    let mut file = OpenOptions::new().append(true).open(&path).expect("a file");
    file.write_all(b"{\"seq\":1,\"pr").expect("written");
    drop(open(records.path()));
    verify_run(&dir, &[]).expect("whole again");
    let read = read_branch(&path).expect("readable");
    assert_eq!(read.lines[1].0.entry, Entry::Torn { bytes: 12 });
}

#[test]
fn a_damaged_record_is_not_gone_on_with() {
    let records = tempfile::tempdir().expect("a folder");
    let run = open(records.path());
    run.begin("main", None, limits(10)).expect("begun");
    run.append("main", Entry::Vm { vm: "a".into() })
        .expect("written");
    run.append("main", Entry::Vm { vm: "b".into() })
        .expect("written");
    drop(run);
    let path = branch_file(&records.path().join("run"), "main");
    let text = fs::read_to_string(&path).expect("a record");
    fs::write(&path, text.replace("\"vm\":\"a\"", "\"vm\":\"x\"")).expect("a file");
    let error = Run::open(records.path(), "run", Arc::new(Masker::new(&[])), 0).unwrap_err();
    assert!(matches!(error, RunError::Damaged { .. }), "{error}");
}

#[test]
fn a_run_is_open_once() {
    let records = tempfile::tempdir().expect("a folder");
    let run = open(records.path());
    let error = Run::open(records.path(), "run", Arc::new(Masker::new(&[])), 0).unwrap_err();
    assert!(matches!(error, RunError::Busy { .. }), "{error}");
    drop(run);
    drop(open(records.path()));
}

#[test]
fn a_branch_fits_its_run_or_is_refused() {
    let records = tempfile::tempdir().expect("a folder");
    let run = open(records.path());
    let refused = |name: &str, parent: Option<&str>, budget: Limits| {
        run.begin(name, parent, budget).unwrap_err().to_string()
    };
    assert!(refused("main", None, Limits::default()).contains("needs a budget"));
    run.begin("main", None, limits(10)).expect("begun");
    assert!(refused("other", None, limits(1)).contains("one first branch"));
    assert!(refused("child", Some("nobody"), limits(1)).contains("its parent is not"));
    assert!(refused("main", Some("main"), limits(10)).contains("another parent"));
    assert!(refused("main", None, limits(11)).contains("another budget"));
}

#[test]
fn no_file_has_a_secret() {
    let records = tempfile::tempdir().expect("a folder");
    let run = open(records.path());
    run.begin("main", None, limits(10)).expect("begun");
    let vm = "dG9wLXNlY3JldC1rZXk= top-secret-key".into();
    run.append("main", Entry::Vm { vm }).expect("written");
    begin_call(&run, "main", 0);
    let dir = records.path().join("run");
    let text = fs::read_to_string(branch_file(&dir, "main")).expect("a record");
    assert!(text.contains("[secret]") && !text.contains("top-secret-key"));
    assert!(!text.contains("dG9wLXNlY3JldC1rZX"));
    for body in fs::read_dir(dir.join("bodies")).expect("a folder") {
        let bytes = fs::read(body.expect("an entry").path()).expect("a file");
        assert_eq!(bytes, b"a request with [secret]");
    }
    verify_run(&dir, &[]).expect("whole");
}

#[test]
fn a_record_that_is_full_takes_the_ends_of_calls_and_no_more() {
    let records = tempfile::tempdir().expect("a folder");
    let open = || {
        let masker = Arc::new(Masker::new(&[]));
        Run::open(records.path(), "run", masker, 4000).expect("a run")
    };
    let run = open();
    run.begin("main", None, limits(10)).expect("begun");
    let call = begin_call(&run, "main", 0);
    // The same bytes are one file.
    for _ in 0..9 {
        run.store("x", &[7; 1000]).expect("stored");
    }
    let full = |stored: io::Result<Body>| {
        let error = stored.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::QuotaExceeded, "{error}");
    };
    full(run.store("y", &[8; 3000]));
    // What could not be stored takes no room.
    run.store("y", &[8; 1000]).expect("stored");
    full(run.store("z", &[9; 1900]));
    let body = run.store("z", &[9; 100]).expect("stored");
    let refused = |message: &str| {
        let entry = Entry::Refused {
            vm: "vm".into(),
            code: "rule".into(),
            message: message.into(),
        };
        run.append("main", entry)
    };
    let error = refused(&"x".repeat(3000)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::QuotaExceeded);
    while refused("y").is_ok() {}
    let entry = Entry::Answer {
        call,
        ending: Ending::Complete,
        status: 200,
        media_type: "application/json".into(),
        body,
        charged: one(),
        cached_tokens: 0,
        attempts: 1,
        first_byte_us: 0,
        total_us: 0,
    };
    run.end_call("main", Some(&step(0)), one(), entry)
        .expect("an end is always written");
    drop(run);
    let run = open();
    full(run.store("z", &[9; 200]));
    run.append("main", Entry::Vm { vm: "vm".into() })
        .expect("the host's lines are always written");
    verify_run(&records.path().join("run"), &[]).expect("whole");
}
