//! The rules of [`Session`], without sockets and processes.

use super::*;

fn session() -> Session {
    let mut session = Session::new(1);
    take(&mut session);
    session
}

/// All frames that wait to be sent, as if they had gone out.
fn take(session: &mut Session) -> Vec<Frame> {
    let mut decoder = Decoder::new();
    decoder.feed(session.unsent());
    session.sent(session.unsent().len());
    let mut frames = Vec::new();
    while let Some(frame) = decoder.next_frame().unwrap() {
        frames.push(frame);
    }
    assert_eq!(decoder.pending(), 0);
    frames
}

fn call(session: &mut Session, id: u64, json: &str) -> Result<Vec<Action>, Violation> {
    feed(session, &Frame::new(Kind::Call, id, json.into()))
}

fn feed(session: &mut Session, frame: &Frame) -> Result<Vec<Action>, Violation> {
    let mut actions = Vec::new();
    session.receive(&frame.encode(), &mut actions)?;
    Ok(actions)
}

fn exec(session: &mut Session, id: u64) {
    let json = r#"{"method":"exec","params":{"argv":["x"],"stdin":true}}"#;
    let actions = call(session, id, json).unwrap();
    assert!(matches!(actions[..], [Action::Begin { call, .. }] if call == id));
    session.event(id, &Event::Started { pid: 42 });
    take(session);
}

fn stdin(offset: u64, len: usize) -> Frame {
    Frame {
        kind: Kind::Stdin,
        call: 1,
        offset,
        end: false,
        payload: vec![0; len],
    }
}

#[test]
fn hello_comes_first_and_names_every_call() {
    let mut session = Session::new(77);
    assert!(session.is_urgent());
    let frames = take(&mut session);
    assert_eq!((frames[0].kind, frames[0].call), (Kind::Hello, 0));
    let hello: Hello = serde_json::from_slice(&frames[0].payload).unwrap();
    assert_eq!(hello.methods, Call::METHODS);
    assert_eq!(hello.ready_at_us, 77);
}

#[test]
fn output_stops_at_the_window_until_it_is_acknowledged() {
    let mut session = session();
    exec(&mut session, 1);
    let mut sent = 0;
    loop {
        let room = session.room(1, Output::Stdout);
        if room == 0 {
            break;
        }
        session.output(1, Output::Stdout, &vec![0; room]);
        sent += room as u64;
        take(&mut session);
    }
    assert_eq!(sent, STREAM_WINDOW);
    assert_eq!(session.room(1, Output::Stderr), OUTPUT_LEN);
    feed(&mut session, &Frame::ack(1, Kind::Stdout, 1000)).unwrap();
    assert_eq!(session.room(1, Output::Stdout), 1000);
    let back = feed(&mut session, &Frame::ack(1, Kind::Stdout, 999));
    assert_eq!(back, Err(Violation::Ack(1)));
}

#[test]
fn a_client_that_does_not_read_makes_everything_wait() {
    let mut session = session();
    for id in 1..=8 {
        exec(&mut session, id);
    }
    for id in 1..=8 {
        for output in Output::BOTH {
            let room = session.room(id, output);
            session.output(id, output, &vec![0; room]);
        }
    }
    assert!(!session.wants_input());
    assert_eq!(session.room(8, Output::Stderr), 0);
    assert!(session.unsent().len() < OUT_LIMIT + MAX_PAYLOAD_LEN + 1024);
}

#[test]
fn input_is_acknowledged_when_half_the_window_is_taken() {
    let mut session = session();
    exec(&mut session, 1);
    let half = STREAM_WINDOW / 2;
    for part in 0..2 {
        let offset = part * MAX_PAYLOAD_LEN as u64;
        feed(&mut session, &stdin(offset, MAX_PAYLOAD_LEN)).unwrap();
    }
    session.stdin_taken(1, half - 1);
    assert_eq!(take(&mut session), []);
    session.stdin_taken(1, 1);
    assert_eq!(take(&mut session), [Frame::ack(1, Kind::Stdin, half)]);
}

#[test]
fn input_beyond_the_window_ends_the_connection_by_name() {
    let mut session = session();
    exec(&mut session, 1);
    for part in 0..4 {
        let offset = part * MAX_PAYLOAD_LEN as u64;
        feed(&mut session, &stdin(offset, MAX_PAYLOAD_LEN)).unwrap();
    }
    let over = feed(&mut session, &stdin(STREAM_WINDOW, 1));
    assert_eq!(over, Err(Violation::Window(1)));
}

#[test]
fn input_that_nobody_reads_is_refused_once_and_then_dropped() {
    let mut session = session();
    exec(&mut session, 1);
    feed(&mut session, &stdin(0, 10)).unwrap();
    session.stdin_closed(1);
    session.stdin_closed(1);
    assert_eq!(
        take(&mut session),
        [Frame::ack_and_stop(1, Kind::Stdin, 10)]
    );
    assert_eq!(feed(&mut session, &stdin(10, 10)), Ok(vec![]));
}

#[test]
fn an_end_is_sent_once_and_before_the_reply() {
    let mut session = session();
    exec(&mut session, 1);
    session.output_ended(1, Output::Stderr);
    assert!(!session.is_urgent(), "it waits for the reply");
    session.output_ended(1, Output::Stdout);
    session.reply(1, &ratoon_protocol::ExitStatus::Code(3));
    assert!(session.is_urgent());
    let frames = take(&mut session);
    let kinds: Vec<_> = frames.iter().map(|frame| (frame.kind, frame.end)).collect();
    assert_eq!(
        kinds,
        [
            (Kind::Stderr, true),
            (Kind::Stdout, true),
            (Kind::Reply, false)
        ]
    );
    assert_eq!(frames[2].payload, br#"{"code":3}"#);
    assert_eq!(session.open_calls(), 0);
}

#[test]
fn a_stop_becomes_an_action() {
    let mut session = session();
    exec(&mut session, 1);
    let actions = feed(&mut session, &Frame::ack_and_stop(1, Kind::Stderr, 0)).unwrap();
    let output = Output::Stderr;
    assert_eq!(actions, [Action::StopOutput { call: 1, output }]);
}

#[test]
fn actions_before_a_violation_are_kept() {
    let mut session = session();
    let mut bytes = Frame::new(Kind::Call, 1, br#"{"method":"ping"}"#.to_vec()).encode();
    bytes.extend([0xff; 24]);
    let mut actions = Vec::new();
    assert_eq!(
        session.receive(&bytes, &mut actions),
        Err(Violation::Frame(FrameError::Version(0xff)))
    );
    let request = Call::Ping;
    assert_eq!(actions, [Action::Begin { call: 1, request }]);
    session.reply(1, &5);
    session.close(&Violation::Frame(FrameError::Version(0xff)));
    let kinds: Vec<_> = take(&mut session)
        .iter()
        .map(|f| (f.kind, f.call))
        .collect();
    assert_eq!(kinds, [(Kind::Reply, 1), (Kind::Error, 0)]);
}

const NAME: &str = r#"{"method":"session","params":{"id":"0123456789abcdef"}}"#;

fn named() -> Session {
    let mut session = session();
    call(&mut session, 1, NAME).unwrap();
    session.name();
    session.reply(1, &ratoon_protocol::SessionReply::default());
    take(&mut session);
    session
}

fn resume(session: &mut Session, have: &[Have]) -> (Vec<HaveInput>, Vec<Frame>) {
    let mut newcomer = Session::new(1);
    take(&mut newcomer);
    session.detach();
    let inputs = session.resume(&mut newcomer, 99, have).unwrap();
    session.say_again();
    (inputs, take(session))
}

#[test]
fn what_the_client_has_not_is_said_again_and_nothing_else() {
    let mut session = named();
    exec(&mut session, 5);
    session.output(5, Output::Stdout, b"hello ");
    session.output(5, Output::Stderr, b"oops");
    session.output(5, Output::Stdout, b"world");
    take(&mut session);
    feed(&mut session, &Frame::ack(5, Kind::Stdout, 2)).unwrap();
    let have = Have {
        call: 5,
        outputs: [8, 4, 0],
    };
    let (inputs, frames) = resume(&mut session, &[have]);
    assert_eq!(inputs, [HaveInput { call: 5, stdin: 0 }]);
    let kinds: Vec<_> = frames.iter().map(|frame| frame.kind).collect();
    assert_eq!(kinds, [Kind::Event, Kind::Ack, Kind::Stdout]);
    assert_eq!((frames[2].offset, &frames[2].payload[..]), (8, &b"rld"[..]));
    session.output(5, Output::Stdout, b"!");
    assert_eq!(take(&mut session)[0].offset, 11);
}

#[test]
fn a_call_that_is_repeated_in_a_named_session_is_not_run_twice() {
    let mut session = named();
    exec(&mut session, 5);
    let again = call(
        &mut session,
        5,
        r#"{"method":"exec","params":{"argv":["x"]}}"#,
    );
    assert_eq!(again, Ok(vec![]));
    session.reply(5, &0);
    take(&mut session);
    let again = call(
        &mut session,
        5,
        r#"{"method":"exec","params":{"argv":["x"]}}"#,
    );
    assert_eq!(again, Ok(vec![]));
    let (_, frames) = resume(&mut session, &[]);
    assert_eq!(frames.last().map(|frame| frame.kind), Some(Kind::Reply));
}

#[test]
fn an_end_is_kept_until_the_client_confirms_it() {
    let mut session = named();
    exec(&mut session, 5);
    session.output(5, Output::Stdout, b"x");
    session.output_ended(5, Output::Stdout);
    session.reply(5, &7);
    take(&mut session);
    assert_eq!(session.open_calls(), 1);
    let (_, frames) = resume(&mut session, &[]);
    let kinds: Vec<_> = frames.iter().map(|f| (f.kind, f.end)).collect();
    assert_eq!(
        kinds,
        [
            (Kind::Ack, false),
            (Kind::Stdout, false),
            (Kind::Stdout, true),
            (Kind::Reply, false)
        ]
    );
    feed(&mut session, &Frame::ack(5, Kind::Reply, 0)).unwrap();
    assert_eq!(session.open_calls(), 0);
}

#[test]
fn a_client_that_claims_what_was_never_sent_is_refused() {
    let mut session = named();
    exec(&mut session, 5);
    let have = Have {
        call: 5,
        outputs: [1, 0, 0],
    };
    let mut newcomer = Session::new(1);
    let refused = session.resume(&mut newcomer, 99, &[have]);
    assert_eq!(refused, Err(Violation::Ack(5)));
}

#[test]
fn a_session_is_named_before_all_else_and_what_follows_waits() {
    let mut late = session();
    exec(&mut late, 1);
    assert_eq!(call(&mut late, 2, NAME), Err(Violation::LateSession));
    let mut early = session();
    let mut bytes = Frame::new(Kind::Call, 1, NAME.into()).encode();
    bytes.extend(Frame::new(Kind::Call, 2, br#"{"method":"ping"}"#.to_vec()).encode());
    let mut actions = Vec::new();
    early.receive(&bytes, &mut actions).unwrap();
    assert_eq!(actions.len(), 1);
    early.name();
    early.receive(&[], &mut actions).unwrap();
    assert_eq!(actions.len(), 2);
}

#[test]
fn an_answer_that_fits_no_frame_is_an_error_of_the_call() {
    let mut session = session();
    exec(&mut session, 1);
    session.reply(1, &"x".repeat(MAX_PAYLOAD_LEN));
    let frames = take(&mut session);
    assert_eq!((frames[0].kind, frames[0].call), (Kind::Error, 1));
    assert_eq!(session.open_calls(), 0);
}

#[test]
fn the_end_of_input_may_be_said_again_after_a_loss() {
    let mut session = named();
    exec(&mut session, 5);
    let end = |offset| Frame {
        call: 5,
        end: true,
        ..stdin(offset, 0)
    };
    assert_eq!(
        feed(&mut session, &end(0)).map(|actions| actions.len()),
        Ok(1)
    );
    resume(&mut session, &[]);
    assert_eq!(feed(&mut session, &end(0)), Ok(vec![]));
    assert_eq!(feed(&mut session, &end(1)), Err(Violation::NoStdin(5)));
}
