//! Clients that break the protocol: the connection ends with a reason, the runtime lives on.
#![allow(missing_docs)]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::io::Write;

use common::{LONG, Runtime, is_alive, run, sh, until};
use ratoon_protocol::{
    ErrorCode, ErrorReply, Frame, Kind, MAX_OPEN_CALLS, MAX_PAYLOAD_LEN, STREAM_WINDOW,
};

const CAT: &str = r#"{"method":"exec","params":{"argv":["cat"],"stdin":true}}"#;

fn stdin(call: u64, offset: u64, len: usize, end: bool) -> Frame {
    Frame {
        kind: Kind::Stdin,
        call,
        offset,
        end,
        payload: vec![b'x'; len],
    }
}

/// Sends these bytes after an open `cat` (call 1); the runtime must answer as told and close.
fn closes(runtime: &Runtime, bytes: &[u8], code: ErrorCode, message: &str) {
    let mut raw = runtime.raw();
    raw.call(1, CAT);
    raw.frame_of(Kind::Event, 1);
    raw.stream.write_all(bytes).unwrap();
    let last = raw.frame_of(Kind::Error, 0);
    let error: ErrorReply = serde_json::from_slice(&last.payload).unwrap();
    assert_eq!((error.code, error.message.as_str()), (code, message));
    assert_eq!(raw.frame(), None, "after {message}");
    runtime.client().ping(LONG).unwrap();
}

#[test]
fn each_broken_rule_closes_the_connection_by_name() {
    let runtime = Runtime::start();
    let mut long = Frame::header(Kind::Call, 2, 0, false, 0);
    long[0..4].copy_from_slice(&u32::MAX.to_le_bytes());
    let mut window = Vec::new();
    for part in 0..5u64 {
        // The runtime may take 65,536 into the pipe and cat as much again: stop cat from reading.
        stdin(2, part * 65536, MAX_PAYLOAD_LEN, false).encode_into(&mut window);
    }
    let protocol = ErrorCode::Protocol;
    let cases: [(Vec<u8>, ErrorCode, &str); 11] = [
        (
            b"GET / HTTP/1.1\r\nHost: guest\r\n\r\n".to_vec(),
            protocol,
            "not a frame: the other side speaks runtime protocol version 47, this one 1",
        ),
        (
            long.to_vec(),
            protocol,
            "not a frame: a frame of 4294967295 bytes is over the limit of 65536",
        ),
        (
            Frame::new(Kind::Hello, 0, b"{}".to_vec()).encode(),
            protocol,
            "a client does not send frames of kind Hello",
        ),
        (
            Frame::new(Kind::Stdout, 1, b"x".to_vec()).encode(),
            protocol,
            "a client does not send frames of kind Stdout",
        ),
        (
            Frame::new(Kind::Call, 1, br#"{"method":"ping"}"#.to_vec()).encode(),
            ErrorCode::DuplicateCall,
            "call id 1 is 0 or in use",
        ),
        (
            Frame::new(Kind::Call, 0, br#"{"method":"ping"}"#.to_vec()).encode(),
            ErrorCode::DuplicateCall,
            "call id 0 is 0 or in use",
        ),
        (
            stdin(1, 5, 1, false).encode(),
            protocol,
            "standard input of call 1 goes on at 0, not at 5",
        ),
        (
            [
                stdin(1, 0, 1, true).encode(),
                stdin(1, 1, 1, false).encode(),
            ]
            .concat(),
            protocol,
            "call 1 takes no standard input (any more)",
        ),
        (
            Frame::ack(1, Kind::Stdout, 1).encode(),
            protocol,
            "call 1: an acknowledgement that does not fit what was sent",
        ),
        (
            Frame::ack(1, Kind::Stdin, 0).encode(),
            protocol,
            "call 1: an acknowledgement that does not fit what was sent",
        ),
        (
            [
                Frame::new(
                    Kind::Call,
                    2,
                    br#"{"method":"exec","params":{"argv":["sleep","1000"],"stdin":true}}"#
                        .to_vec(),
                )
                .encode(),
                window,
            ]
            .concat(),
            protocol,
            "standard input of call 2 overruns its window of 262144 bytes",
        ),
    ];
    assert_eq!(
        STREAM_WINDOW,
        4 * MAX_PAYLOAD_LEN as u64,
        "five frames overrun it"
    );
    for (bytes, code, message) in cases {
        closes(&runtime, &bytes, code, message);
    }
}

#[test]
fn frames_for_calls_that_have_ended_are_no_error() {
    let runtime = Runtime::start();
    let mut raw = runtime.raw();
    raw.call(
        1,
        r#"{"method":"exec","params":{"argv":["true"],"stdin":true}}"#,
    );
    raw.frame_of(Kind::Reply, 1);
    raw.send(&stdin(1, 0, 10, true));
    raw.send(&Frame::ack(1, Kind::Stdout, 7));
    raw.call(2, r#"{"method":"ping"}"#);
    raw.frame_of(Kind::Reply, 2);
    raw.call(1, r#"{"method":"ping"}"#);
    raw.frame_of(Kind::Reply, 1);
}

#[test]
fn one_call_too_many_is_refused_and_the_others_go_on() {
    let runtime = Runtime::start();
    let mut raw = runtime.raw();
    for id in 1..=MAX_OPEN_CALLS as u64 + 1 {
        raw.call(id, CAT);
    }
    let error = raw.frame_of(Kind::Error, MAX_OPEN_CALLS as u64 + 1);
    let error: ErrorReply = serde_json::from_slice(&error.payload).unwrap();
    assert_eq!(error.code, ErrorCode::TooManyCalls);
    raw.send(&stdin(7, 0, 3, true));
    assert_eq!(raw.frame_of(Kind::Stdout, 7).payload, b"xxx");
    let reply = raw.frame_of(Kind::Reply, 7).payload;
    let report: ratoon_protocol::ExitReport = serde_json::from_slice(&reply).unwrap();
    assert_eq!(report.status, ratoon_protocol::ExitStatus::Code(0));
}

#[test]
fn a_client_that_never_reads_is_held_back_and_holds_nobody_else() {
    let runtime = Runtime::start();
    let mut raw = runtime.raw();
    raw.call(1, r#"{"method":"exec","params":{"argv":["yes"]}}"#);
    raw.stream.set_nonblocking(true).unwrap();
    let ping = Frame::new(Kind::Call, 2, br#"{"method":"ping"}"#.to_vec()).encode();
    // Until the runtime reads no more: pongs pile up to its limit, then the socket is full.
    let mut sent = 0;
    while raw.stream.write_all(&ping).is_ok() {
        sent += 1;
        assert!(sent < 1_000_000, "the runtime takes pings without end");
    }
    let ran = run(&mut runtime.client(), &sh("echo fine")).unwrap();
    assert_eq!(ran.out, "fine\n");
    let memory = std::fs::read_to_string(format!("/proc/{}/statm", runtime.pid())).unwrap();
    let pages: u64 = memory.split(' ').nth(1).unwrap().parse().unwrap();
    assert!(pages * 4096 < 16 << 20, "{pages} pages resident");
}

#[test]
fn processes_of_a_lost_connection_are_killed_as_groups() {
    let runtime = Runtime::start();
    let mut raw = runtime.raw();
    raw.call(
        1,
        r#"{"method":"exec","params":{"argv":["sh","-c","trap '' HUP TERM; sleep 1000 & echo $! $$; wait"]}}"#,
    );
    let text = String::from_utf8(raw.frame_of(Kind::Stdout, 1).payload).unwrap();
    let pids: Vec<i32> = text
        .split_whitespace()
        .map(|pid| pid.parse().unwrap())
        .collect();
    assert_eq!(pids.len(), 2);
    drop(raw);
    for pid in pids {
        until("a process outlives its connection", || !is_alive(pid));
    }
    runtime.client().ping(LONG).unwrap();
}

#[test]
fn a_signal_to_no_call_or_out_of_range_is_refused() {
    let runtime = Runtime::start();
    let mut raw = runtime.raw();
    for (id, params, code) in [
        (1, r#"{"call":9,"signal":15}"#, ErrorCode::NotFound),
        (2, r#"{"call":9,"signal":0}"#, ErrorCode::BadRequest),
        (3, r#"{"call":9,"signal":65}"#, ErrorCode::BadRequest),
        (4, r#"{"call":9}"#, ErrorCode::BadRequest),
    ] {
        raw.call(id, &format!(r#"{{"method":"signal","params":{params}}}"#));
        let error: ErrorReply =
            serde_json::from_slice(&raw.frame_of(Kind::Error, id).payload).unwrap();
        assert_eq!(error.code, code, "{params}");
    }
}

#[test]
fn an_endless_method_name_comes_back_clipped() {
    let runtime = Runtime::start();
    let mut raw = runtime.raw();
    let name = "\\u0001".repeat(10_000);
    raw.call(1, &format!(r#"{{"method":"{name}"}}"#));
    let error: ErrorReply = serde_json::from_slice(&raw.frame_of(Kind::Error, 1).payload).unwrap();
    assert_eq!(error.code, ErrorCode::UnknownMethod);
    assert!(error.message.len() < 5000);
}
