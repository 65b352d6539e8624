//! How calls and sessions end before their time.
#![allow(missing_docs)]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};

use common::{LONG, Raw, Runtime, command, until};
use ratoon_client::{Client, RuntimeError};
use ratoon_protocol::{Call, ErrorCode, ErrorReply, FileWrite, Frame, Kind, Transferred};
use tokio::net::UnixStream;

fn stdin(call: u64, bytes: &[u8], end: bool) -> Frame {
    let mut frame = Frame::new(Kind::Stdin, call, bytes.to_vec());
    frame.end = end;
    frame
}

fn processes(raw: &mut Raw, call: u64) -> usize {
    raw.call(call, r#"{"method":"processes"}"#);
    let reply = raw.frame_of(Kind::Reply, call).payload;
    let list: Vec<serde_json::Value> = serde_json::from_slice(&reply).unwrap();
    list.len()
}

#[test]
fn an_upload_that_is_cancelled_leaves_nothing_and_its_connection_goes_on() {
    let (runtime, dir) = (Runtime::start(), tempfile::tempdir().unwrap());
    let names = || std::fs::read_dir(dir.path()).unwrap().count();
    let mut raw = runtime.raw();
    let write = Call::FileWrite(FileWrite {
        path: dir.path().join("f").to_str().unwrap().into(),
        ..FileWrite::default()
    });
    raw.call(1, &serde_json::to_string(&write).unwrap());
    raw.send(&stdin(1, b"half", false));
    until("nothing is written", || names() == 1);
    raw.send(&Frame::ack_and_stop(1, Kind::Stdout, 0));
    // What was on its way.
    let mut late = stdin(1, b"more", true);
    late.offset = 4;
    raw.send(&late);
    let error: ErrorReply = serde_json::from_slice(&raw.frame_of(Kind::Error, 1).payload).unwrap();
    assert_eq!(error.code, ErrorCode::Cancelled, "{error}");
    assert_eq!(processes(&mut raw, 2), 0);
    assert_eq!(names(), 0);
}

/// A call to a server of ours: the connection to the runtime, and the server's end.
fn dialled(runtime: &Runtime) -> (Raw, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut raw = runtime.raw();
    let call = format!(r#"{{"method":"port.connect","params":{{"port":{port}}}}}"#);
    raw.call(1, &call);
    let (server, _) = listener.accept().unwrap();
    server.set_read_timeout(Some(LONG)).unwrap();
    raw.frame_of(Kind::Event, 1);
    (raw, server)
}

#[test]
fn a_port_call_goes_on_until_both_ways_are_at_their_end() {
    let runtime = Runtime::start();
    let (mut raw, mut server) = dialled(&runtime);
    server.write_all(b"bye").unwrap();
    server.shutdown(Shutdown::Write).unwrap();
    assert_eq!(raw.frame_of(Kind::Stdout, 1).payload, b"bye");
    assert!(raw.frame_of(Kind::Stdout, 1).end);
    raw.send(&stdin(1, b"still here", true));
    let mut heard = Vec::new();
    server.read_to_end(&mut heard).unwrap();
    assert_eq!(heard, b"still here");
    let reply = raw.frame_of(Kind::Reply, 1).payload;
    let moved: Transferred = serde_json::from_slice(&reply).unwrap();
    assert_eq!(moved.bytes, 13);
}

#[test]
fn a_server_that_breaks_off_ends_both_ways() {
    let runtime = Runtime::start();
    let (mut raw, server) = dialled(&runtime);
    raw.send(&stdin(1, b"unread", false));
    let mut first = [0];
    // With bytes unread a close is a reset (RFC 2525, 2.17).
    assert_eq!(server.peek(&mut first).unwrap(), 1);
    drop(server);
    raw.frame_of(Kind::Reply, 1);
}

#[test]
fn a_session_that_says_goodbye_ends_at_once_with_what_it_began() {
    let runtime = Runtime::start();
    let session = r#"{"method":"session","params":{"id":"0123456789abcdef"}}"#;
    let mut raw = runtime.raw();
    raw.call(1, session);
    raw.frame_of(Kind::Reply, 1);
    // As many as there may be: the goodbye is heard all the same.
    for call in 2..258 {
        raw.call(
            call,
            r#"{"method":"port.connect","params":{"port":1,"host":"192.0.2.1"}}"#,
        );
    }
    raw.call(999, r#"{"method":"session.end"}"#);
    assert_eq!(raw.frame_of(Kind::Reply, 999).payload, b"null");
    assert!(raw.frame().is_none(), "the connection ends");

    let mut raw = runtime.raw();
    raw.call(1, session);
    let reply = raw.frame_of(Kind::Reply, 1).payload;
    assert!(String::from_utf8_lossy(&reply).contains(r#""resumed":false"#));
}

#[tokio::test]
async fn a_resumable_clients_processes_end_with_its_last_handle() {
    let runtime = Runtime::start();
    let socket = runtime.socket();
    let dial = move || {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map_err(RuntimeError::Io) }
    };
    let client = Client::resumable(dial, LONG, LONG * 100).await.unwrap();
    let process = client.exec(command(&["sleep", "1000"])).await.unwrap();
    let pid = process.pid;
    drop(client);
    assert!(common::is_alive(pid), "a process is a handle too");
    drop(process);
    let start = std::time::Instant::now();
    while common::is_alive(pid) {
        assert!(start.elapsed() < LONG, "it lingers");
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    }
}

/// A restored machine's other connections are reset before its wake comes; the runtime may see both at once.
#[test]
fn a_call_whose_connection_is_lost_before_the_wake_is_not_run_as_root() {
    let runtime = Runtime::start();
    let dir = tempfile::tempdir().unwrap();
    let (lost, kept) = (dir.path().join("lost"), dir.path().join("kept"));
    // The older connection is served first.
    let mut waker = runtime.raw();
    let mut other = runtime.raw();
    let mut third = runtime.raw();
    waker.call(1, r#"{"method":"expect_wake"}"#);
    waker.frame_of(Kind::Reply, 1);
    let mkdir = |raw: &mut Raw, path: &std::path::Path| {
        let path = path.display();
        raw.call(
            1,
            &format!(r#"{{"method":"file.mkdir","params":{{"path":"{path}"}}}}"#),
        );
        raw.call(2, r#"{"method":"ping"}"#);
        raw.frame_of(Kind::Reply, 2);
    };
    mkdir(&mut other, &lost);
    mkdir(&mut third, &kept);
    let pid = rustix::process::Pid::from_raw(runtime.pid() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    // Dropped alone it would stay open as long as a child that another test is starting has a copy.
    other.stream.shutdown(std::net::Shutdown::Both).unwrap();
    drop(other);
    let entropy = "5a".repeat(32);
    let wake = format!(
        r#"{{"method":"wake","params":{{"generation":"g","id":"i","entropy":"{entropy}","thaw":true}}}}"#
    );
    waker.call(2, &wake);
    rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
    waker.frame_of(Kind::Reply, 2);
    third.frame_of(Kind::Reply, 1);
    assert!(kept.exists());
    assert!(!lost.exists());
}
