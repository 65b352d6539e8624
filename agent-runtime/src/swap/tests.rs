//! The state's own rules; whole swaps are in `tests/swap.rs`.

use ratoon_protocol::{ExecParams, Language};
use serde_json::{Value, json};

use super::*;

/// A server with a bit of everything, and the call that is to be answered.
fn server() -> (Server, CallRef) {
    let null = File::open("/dev/null").unwrap();
    let listener =
        std::os::unix::net::UnixListener::bind(tempfile::tempdir().unwrap().path().join("socket"));
    let signals = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let mut server = Server::new(listener.unwrap().into(), signals, null.into(), false).unwrap();
    let (ours, _) = std::os::unix::net::UnixStream::pair().unwrap();
    server.add(ours.into(), true);
    let at = CallRef {
        session: 0,
        call: 7,
    };
    let params = ExecParams {
        argv: ["sleep", "1000"].map(str::to_owned).into(),
        stdin: true,
        timeout_ms: Some(3_600_000),
        output_limit: Some(10),
        tag: Some("$fd".into()),
        ..ExecParams::default()
    };
    server.begin(at, Call::Exec(Box::new(params)));
    let bash = ratoon_protocol::CodeStart {
        language: Language::Bash,
        ..ratoon_protocol::CodeStart::default()
    };
    server.begin(at, Call::CodeStart(bash));
    (server, at)
}

fn end(server: &mut Server) {
    for task in &mut server.tasks {
        task.process().map(|process| process.signal(libc::SIGKILL));
    }
    server.contexts.signal_all(libc::SIGKILL);
}

#[test]
fn a_state_that_was_read_is_written_the_same_but_for_the_numbers_of_descriptors() {
    let (mut server, at) = server();
    let before = server.parting(at);
    let bytes = state::encode(&before).unwrap();
    let arriving = Arriving::read(state::decode(&bytes).unwrap()).unwrap();
    let signals = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let other = Server::arrive(arriving, signals).unwrap();
    let mut after = other.parting(at);
    let (first, second) = (
        state::descriptors(&before).unwrap(),
        state::descriptors(&after).unwrap(),
    );
    assert_eq!(first.len(), second.len());
    assert!(first.len() > 8, "{first:?}");
    assert!(first.is_disjoint(&second));
    // Moments are told from now.
    let mut before = before;
    for state in [&mut before, &mut after] {
        state::stand_in(state, 3);
        forget_moments(state);
    }
    assert_eq!(before, after);
    end(&mut server);
}

fn forget_moments(state: &mut Value) {
    match state {
        Value::Object(members) => {
            for (name, value) in members {
                match name.as_str() {
                    "due" | "up_by" => *value = Value::Bool(value.is_null()),
                    _ => forget_moments(value),
                }
            }
        }
        Value::Array(values) => values.iter_mut().for_each(forget_moments),
        _ => {}
    }
}

/// Applies `change` to every value in turn, each time to the state as it was.
fn spoil_each(state: &Value, change: &Value, seen: &mut dyn FnMut(&str, Value)) {
    fn paths(value: &Value, path: &str, found: &mut Vec<String>) {
        found.push(path.to_owned());
        match value {
            Value::Object(members) => {
                for (name, value) in members {
                    let name = name.replace('~', "~0").replace('/', "~1");
                    paths(value, &format!("{path}/{name}"), found);
                }
            }
            Value::Array(values) => {
                for (index, value) in values.iter().enumerate() {
                    paths(value, &format!("{path}/{index}"), found);
                }
            }
            _ => {}
        }
    }
    let mut found = Vec::new();
    paths(state, "", &mut found);
    for path in found {
        let mut spoiled = state.clone();
        if let Some(place) = spoiled.pointer_mut(&path) {
            place.clone_from(change);
        }
        seen(&path, spoiled);
    }
}

#[test]
fn a_spoiled_state_is_refused_or_harmless_and_never_a_panic() {
    let (mut server, at) = server();
    let state = server.parting(at);
    end(&mut server);
    let (mut refused, mut harmless) = (0, 0);
    let changes = [
        json!(null),
        json!(-1),
        json!(u64::MAX),
        json!(1_u64 << 40),
        json!("x"),
        json!([]),
        json!({}),
        json!({"$fd": 100_000}),
    ];
    for change in changes {
        spoil_each(&state, &change, &mut |_, spoiled| {
            match state::descriptors(&spoiled).and_then(|_| Arriving::read(spoiled)) {
                Err(_) => refused += 1,
                Ok(arriving) => {
                    harmless += 1;
                    // What it counts with does not overflow.
                    let output = crate::session::Output::Stdout;
                    let _ = arriving.sessions.room(at, output);
                    let _ = arriving.sessions.held();
                }
            }
        });
    }
    assert!(refused > 1000 && harmless > 10, "{refused} {harmless}");
}

#[test]
fn what_contradicts_itself_is_refused_by_name() {
    let (mut server, at) = server();
    let state = server.parting(at);
    end(&mut server);
    let spoil = |path: &str, value: Value| {
        let mut state = state.clone();
        *state.pointer_mut(path).expect(path) = value;
        Arriving::read(state).map(drop).unwrap_err().to_string()
    };
    for (path, value, why) in [
        (
            "/tasks/0/job/process/pid",
            json!(1),
            "a process has no number of its own",
        ),
        (
            "/tasks/0/job/process/sent/0",
            json!(u64::MAX),
            "an output is longer than any",
        ),
        (
            "/contexts/contexts/1/pid",
            json!(-5),
            "an interpreter has no number of its own",
        ),
        (
            "/contexts/next",
            json!(0),
            "a context has a number that was not given",
        ),
        (
            "/contexts/contexts/1/wire/at",
            json!(1),
            "an interpreter has said more than there is",
        ),
        (
            "/sessions/next",
            json!(0),
            "a session has a number that was not given",
        ),
        (
            "/sessions/clients/0/session/out_sent",
            json!(1 << 20),
            "a connection has sent more than there was",
        ),
    ] {
        assert_eq!(spoil(path, value), format!("the state is wrong: {why}"));
    }
}

#[test]
fn only_a_whole_program_of_this_kind_of_machine_is_taken() {
    let own = std::fs::read("/proc/self/exe").unwrap();
    let take = |bytes: &[u8], params: RuntimeSwap| {
        let (incoming, fd) = Incoming::begin(&params)?;
        let written = rustix::io::write(&fd, bytes).map_err(Incoming::not_written)?;
        incoming.check(written as u64)
    };
    let params = |bytes: &[u8]| RuntimeSwap {
        bytes: bytes.len() as u64,
        blake3: blake3::hash(bytes).to_string(),
    };
    assert_eq!(take(&own[..4096], params(&own[..4096])), Ok(()));
    let message = |result: Result<(), ErrorReply>| result.unwrap_err().message;
    let text = b"#!/bin/sh\nexit 0\n";
    assert_eq!(
        message(take(text, params(text))),
        "the new runtime is not an ELF program for x86-64"
    );
    assert_eq!(
        message(take(&own[..100], params(&own[..101]))),
        "only 100 of the runtime's 101 bytes came"
    );
    assert_eq!(
        message(take(&own[..101], params(&own[..100]))),
        "more bytes came than were announced"
    );
    let other = RuntimeSwap {
        bytes: 100,
        ..params(b"other")
    };
    let error = message(take(&own[..100], other));
    assert!(error.starts_with("the new runtime's BLAKE3 is "), "{error}");
    for params in [
        RuntimeSwap {
            bytes: 0,
            ..params(b"")
        },
        RuntimeSwap {
            bytes: MAX_BINARY_LEN + 1,
            ..params(b"")
        },
        RuntimeSwap {
            bytes: 1,
            blake3: "1".into(),
        },
    ] {
        assert_eq!(take(b"", params).unwrap_err().code, ErrorCode::BadRequest);
    }
}

/// A state as version 1 was written when it was new. **Do not change this file**: a state that it stands
/// for lies in somebody's snapshot. What no longer reads it needs a new version (see `state.rs`).
const FIRST: &str = include_str!("state-v1.json");

#[test]
fn a_state_of_version_1_is_read_as_long_as_that_is_promised() {
    assert_eq!(state::OLDEST_VERSION, 1);
    let mut first: Value = serde_json::from_str(FIRST).unwrap();
    let null = File::open("/dev/null").unwrap();
    state::stand_in(&mut first, null.as_raw_fd());
    let arriving = Arriving::read(first).unwrap();
    assert_eq!((arriving.tasks.len(), arriving.swap.call), (1, 7));
}
