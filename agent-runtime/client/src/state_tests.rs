//! What a hostile runtime may say and what comes of it.

use ratoon_protocol::{ErrorCode, ExecParams, FrameError};

use super::*;

fn feed(state: &mut State, frames: &[Frame]) -> Result<Vec<Happening>, RuntimeError> {
    let mut happenings = Vec::new();
    for frame in frames {
        state.receive(&frame.encode(), &mut happenings)?;
    }
    Ok(happenings)
}

fn hello() -> Frame {
    Frame::new(Kind::Hello, 0, br#"{"runtime":"0","methods":[]}"#.to_vec())
}

fn frame(kind: Kind, offset: u64, payload: &[u8], end: bool) -> Frame {
    Frame {
        kind,
        call: 1,
        offset,
        end,
        payload: payload.to_vec(),
    }
}

/// A greeted connection with one open exec call, number 1, that takes input.
fn running() -> State {
    let mut state = State::new();
    feed(&mut state, &[hello()]).unwrap();
    let params = ExecParams {
        argv: vec!["x".into()],
        stdin: true,
        ..ExecParams::default()
    };
    assert_eq!(state.call(&Call::Exec(Box::new(params))).unwrap(), 1);
    state.sent(state.unsent().len());
    state
}

fn violates(frames: &[Frame], what: &str) {
    match feed(&mut running(), frames) {
        Err(RuntimeError::Violation(found)) => assert_eq!(found, what),
        other => panic!("{what}: {other:?}"),
    }
}

#[test]
fn each_lie_of_a_runtime_is_refused_by_name() {
    let big = vec![0; MAX_PAYLOAD_LEN];
    let flood: Vec<_> = (0..5)
        .map(|part| frame(Kind::Stdout, part * big.len() as u64, &big, false))
        .collect();
    violates(&[hello()], "HELLO is not the first frame");
    violates(
        &[Frame::new(Kind::Reply, 9, b"null".to_vec())],
        "Reply for call 9, which is not open",
    );
    violates(
        &[frame(Kind::Stdout, 1, b"x", false)],
        "call 1: Stdout goes on at 0, not at 1",
    );
    violates(
        &[
            frame(Kind::Stderr, 0, b"x", true),
            frame(Kind::Stderr, 1, b"x", false),
        ],
        "call 1: Stderr after its end",
    );
    violates(&flood, "call 1: Stdout overruns its window");
    violates(
        &[Frame::ack(1, Kind::Stdin, 1)],
        "call 1: an ACK of input never sent",
    );
    violates(&[Frame::ack(1, Kind::Stdout, 0)], "Ack does not fit call 1");
    violates(
        &[frame(Kind::Stdin, 0, b"", false)],
        "Stdin does not fit call 1",
    );
}

#[test]
fn nothing_is_believed_before_hello() {
    let mut state = State::new();
    let early = Frame::new(
        Kind::Error,
        0,
        br#"{"code":"failed","message":""}"#.to_vec(),
    );
    assert!(matches!(
        feed(&mut state, &[early]),
        Err(RuntimeError::Violation(what)) if what == "Error before HELLO"
    ));
}

#[test]
fn a_giant_frame_is_refused_at_its_header() {
    let mut header = Frame::header(Kind::Hello, 0, 0, false, 0);
    header[0..4].copy_from_slice(&u32::MAX.to_le_bytes());
    let result = State::new().receive(&header, &mut Vec::new());
    assert!(matches!(
        result,
        Err(RuntimeError::Frame(FrameError::TooLong(u32::MAX)))
    ));
}

#[test]
fn the_guests_words_cannot_steer_a_terminal() {
    let mut state = running();
    let message = br#"{"code":"failed","message":"\u001b]0;owned\u0007 no"}"#;
    let happenings = feed(&mut state, &[frame(Kind::Error, 0, message, false)]).unwrap();
    let error = ErrorReply::new(ErrorCode::Failed, "\u{fffd}]0;owned\u{fffd} no");
    assert_eq!(happenings, [Happening::Failed { call: 1, error }]);
}

#[test]
fn a_last_word_about_the_connection_is_passed_on() {
    let last = Frame::new(
        Kind::Error,
        0,
        br#"{"code":"protocol","message":"why"}"#.to_vec(),
    );
    match feed(&mut running(), &[last]) {
        Err(RuntimeError::Rejected(error)) => assert_eq!(error.message, "why"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_event_of_a_newer_runtime_is_skipped() {
    let later = frame(Kind::Event, 0, br#"{"event":"levitating"}"#, false);
    assert_eq!(feed(&mut running(), &[later]).unwrap(), []);
}

#[test]
fn output_is_acknowledged_at_half_the_window_and_refused_once() {
    let mut state = running();
    let big = vec![0; MAX_PAYLOAD_LEN];
    for part in 0..2 {
        assert_eq!(state.unsent(), b"");
        let offset = part * big.len() as u64;
        feed(&mut state, &[frame(Kind::Stdout, offset, &big, false)]).unwrap();
        state.taken(1, Output::Stdout, big.len());
    }
    let ack = Frame::ack(1, Kind::Stdout, STREAM_WINDOW / 2).encode();
    assert_eq!(state.unsent(), ack);
    state.sent(ack.len());
    state.stop(1, Output::Stdout);
    state.stop(1, Output::Stdout);
    let stop = Frame::ack_and_stop(1, Kind::Stdout, STREAM_WINDOW / 2).encode();
    assert_eq!(state.unsent(), stop);
    let more = frame(Kind::Stdout, STREAM_WINDOW / 2, b"x", false);
    assert_eq!(feed(&mut state, &[more]).unwrap(), []);
}

#[test]
fn input_waits_at_the_window_and_ends_when_it_is_refused() {
    let mut state = running();
    for _ in 0..4 {
        assert_eq!(state.stdin_room(1), Some(MAX_PAYLOAD_LEN));
        state.stdin(1, &[0; MAX_PAYLOAD_LEN], false);
    }
    assert_eq!(state.stdin_room(1), Some(0));
    feed(&mut state, &[Frame::ack(1, Kind::Stdin, 10)]).unwrap();
    assert_eq!(state.stdin_room(1), Some(10));
    feed(&mut state, &[Frame::ack_and_stop(1, Kind::Stdin, 10)]).unwrap();
    assert_eq!(state.stdin_room(1), None);
}

const ID: &str = "0123456789abcdef";

/// A named session whose call 2 (exec with input) has sent three bytes, then its next connection.
fn resumed(reply: &str) -> Result<State, RuntimeError> {
    let mut state = State::named(ID, None)?;
    let first = br#"{"resumed":false}"#.to_vec();
    feed(&mut state, &[hello(), Frame::new(Kind::Reply, 1, first)])?;
    let params = ratoon_protocol::ExecParams {
        stdin: true,
        ..Default::default()
    };
    let call = state.call(&Call::Exec(Box::new(params)))?;
    state.stdin(call, b"abc", false);
    feed(&mut state, &[Frame::ack(call, Kind::Stdin, 1)])?;
    state.reconnect()?;
    state.sent(state.unsent().len());
    let again = Frame::new(Kind::Reply, 3, reply.into());
    feed(&mut state, &[hello(), again])?;
    Ok(state)
}

#[test]
fn a_resumed_session_sends_what_the_runtime_has_not() {
    let state = resumed(r#"{"resumed":true,"calls":[{"call":2,"stdin":2}]}"#).unwrap();
    assert_eq!(state.unsent(), frame_of(Kind::Stdin, 2, 2, b"c"));
}

fn frame_of(kind: Kind, call: u64, offset: u64, bytes: &[u8]) -> Vec<u8> {
    let mut out = Frame::header(kind, call, offset, false, bytes.len()).to_vec();
    out.extend_from_slice(bytes);
    out
}

#[test]
fn each_lie_about_a_session_is_refused_by_name() {
    for (reply, expected) in [
        (
            r#"{"resumed":false}"#,
            "the session is lost: its calls may have run",
        ),
        (
            r#"{"resumed":true,"calls":[]}"#,
            "`session`: call 2 is forgotten",
        ),
        (
            r#"{"resumed":true,"calls":[{"call":3}]}"#,
            "`session`: call 3 never was",
        ),
        (
            r#"{"resumed":true,"calls":[{"call":2,"stdin":4}]}"#,
            "`session`: input of call 2 at 4, not in 1..=3",
        ),
        (
            r#"{"resumed":true,"calls":[{"call":2,"stdin":0}]}"#,
            "`session`: input of call 2 at 0, not in 1..=3",
        ),
    ] {
        match resumed(reply) {
            Err(RuntimeError::Violation(what)) => assert_eq!(what, expected),
            other => panic!("{reply}: {other:?}"),
        }
    }
}

#[test]
fn an_end_is_confirmed_with_the_next_frame_and_again_when_it_is_repeated() {
    let reply = r#"{"resumed":true,"calls":[{"call":2,"stdin":3}]}"#;
    let mut state = resumed(reply).unwrap();
    let end = Frame::new(Kind::Reply, 2, b"null".to_vec());
    let happenings = feed(&mut state, std::slice::from_ref(&end)).unwrap();
    assert_eq!(happenings.len(), 1);
    assert_eq!(state.unsent(), b"");
    state.reconnect().unwrap();
    state.sent(state.unsent().len());
    let again = Frame::new(Kind::Reply, 4, reply.into());
    assert_eq!(feed(&mut state, &[hello(), again, end]).unwrap().len(), 1);
    assert_eq!(state.unsent(), b"");
    state.call(&Call::Ping).unwrap();
    let confirmed = Frame::ack(2, Kind::Reply, 0).encode();
    assert!(state.unsent().starts_with(&confirmed));
}

#[test]
fn what_waits_untaken_when_a_connection_breaks_is_said_again_and_skipped() {
    let part = |offset: u64, len: usize| Frame {
        call: 2,
        ..frame(Kind::Stdout, offset, &vec![b'x'; len], false)
    };
    let reply = |call, text: &str| Frame::new(Kind::Reply, call, text.into());
    let known = r#"{"resumed":true,"calls":[{"call":2}]}"#;
    let begun = || {
        let mut state = State::named(ID, None).unwrap();
        let named = reply(1, r#"{"resumed":false}"#);
        feed(&mut state, &[hello(), named]).unwrap();
        state.call(&Call::Exec(Box::default())).unwrap();
        feed(&mut state, &[part(0, 60_000), part(60_000, 60_000)]).unwrap();
        state.taken(2, Output::Stdout, 50_000);
        state.reconnect().unwrap();
        state
    };
    let mut state = begun();
    let have = String::from_utf8_lossy(state.unsent()).into_owned();
    assert!(have.contains(r#""outputs":[50000,0,0]"#), "{have}");
    // Meanwhile all of it is taken; that is acknowledged when this connection has brought it.
    state.taken(2, Output::Stdout, 70_000);
    state.sent(state.unsent().len());
    feed(&mut state, &[hello(), reply(3, known)]).unwrap();
    assert_eq!(feed(&mut state, &[part(50_000, 60_000)]).unwrap(), []);
    let happenings = feed(&mut state, &[part(110_000, 10_001)]).unwrap();
    let one = Happening::Output {
        call: 2,
        output: Output::Stdout,
        bytes: vec![b'x'],
    };
    assert_eq!(happenings, [one]);
    assert_eq!(state.unsent(), b"");
    feed(&mut state, &[part(120_001, 65_000)]).unwrap();
    state.taken(2, Output::Stdout, 65_001);
    let ack = Frame::ack(2, Kind::Stdout, 185_001).encode();
    assert_eq!(state.unsent(), ack);

    let mut state = begun();
    let end = Frame {
        end: true,
        ..part(50_000, 60_000)
    };
    match feed(&mut state, &[hello(), reply(3, known), end]) {
        Err(RuntimeError::Violation(what)) => {
            assert_eq!(what, "call 2: Stdout ends before what it had brought");
        }
        other => panic!("{other:?}"),
    }
}
