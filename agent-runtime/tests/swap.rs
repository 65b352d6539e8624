//! The runtime is replaced while it serves: nothing that runs notices.
#![allow(missing_docs)]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;

use common::{LONG, Raw, Runtime, run, sh};
use ratoon_client::RuntimeError;
use ratoon_client::blocking::Client;
use ratoon_protocol::{
    Call, ErrorCode, ErrorReply, ExecParams, ExitStatus, Frame, Kind, Size, Swapped,
};

/// The runtime's program, with bytes behind it that make it another one.
fn program(more: &str) -> Vec<u8> {
    let mut bytes = std::fs::read(env!("CARGO_BIN_EXE_ratoon-runtime")).unwrap();
    bytes.extend_from_slice(more.as_bytes());
    bytes
}

fn faulty(how: &str) -> Vec<u8> {
    let dir = PathBuf::from(env!("CARGO_BIN_EXE_ratoon-runtime"));
    let path = dir.parent().unwrap().join("examples/faulty_runtime");
    let mut bytes = std::fs::read(&path).unwrap_or_else(|error| {
        panic!(
            "{}: {error}: `cargo build --example faulty_runtime`",
            path.display()
        )
    });
    bytes.extend_from_slice(how.as_bytes());
    bytes
}

fn swap(client: &mut Client, binary: &[u8]) -> Result<Swapped, RuntimeError> {
    let digest = blake3::hash(binary).to_string();
    client.swap_runtime(binary, &digest, LONG)
}

fn refused(result: Result<Swapped, RuntimeError>) -> ErrorReply {
    match result {
        Err(RuntimeError::Call(error)) => error,
        other => panic!("not refused: {other:?}"),
    }
}

fn exec(params: ExecParams) -> String {
    serde_json::to_string(&Call::Exec(Box::new(params))).unwrap()
}

/// What a client has of its calls.
#[derive(Default)]
struct Seen {
    out: BTreeMap<u64, Vec<u8>>,
    replies: BTreeMap<u64, serde_json::Value>,
}

impl Seen {
    /// Takes one frame; every output has to go on where it was.
    fn frame(&mut self, raw: &mut Raw) {
        let frame = raw.frame().expect("the runtime closed");
        match frame.kind {
            Kind::Stdout => {
                let out = self.out.entry(frame.call).or_default();
                assert_eq!(frame.offset, out.len() as u64, "call {}", frame.call);
                out.extend_from_slice(&frame.payload);
                raw.send(&Frame::ack(frame.call, Kind::Stdout, out.len() as u64));
            }
            Kind::Reply => {
                let value = serde_json::from_slice(&frame.payload).unwrap();
                self.replies.insert(frame.call, value);
            }
            Kind::Error => panic!("{}", String::from_utf8_lossy(&frame.payload)),
            _ => {}
        }
    }

    fn text(&self, call: u64) -> String {
        let out = self.out.get(&call).map_or(&b""[..], Vec::as_slice);
        String::from_utf8_lossy(out).into_owned()
    }

    fn until(&mut self, raw: &mut Raw, holds: impl Fn(&Self) -> bool) {
        while !holds(self) {
            self.frame(raw);
        }
    }

    fn reply(&mut self, raw: &mut Raw, call: u64) -> serde_json::Value {
        self.until(raw, |seen| seen.replies.contains_key(&call));
        self.replies[&call].clone()
    }
}

fn stdin(raw: &mut Raw, call: u64, offset: u64, bytes: &str, end: bool) {
    let mut frame = Frame::new(Kind::Stdin, call, bytes.into());
    (frame.offset, frame.end) = (offset, end);
    raw.send(&frame);
}

fn session(have: u64) -> String {
    format!(
        r#"{{"method":"session","params":{{"id":"abcdefghijklmnop","have":[{{"call":2,"outputs":[{have},0,0]}}]}}}}"#
    )
}

fn cell(code: &str) -> String {
    let params = serde_json::json!({"context": "c", "code": code});
    serde_json::json!({"method": "code.run", "params": params}).to_string()
}

/// The numbers of the descriptors that a program has.
fn descriptors(client: &mut Client) -> String {
    let ran = run(client, &sh("cd /proc/$$/fd && echo *")).unwrap();
    assert_eq!(ran.status, ExitStatus::Code(0));
    ran.out
}

/// Prints numbered lines, some at once and some later.
const COUNT: &str = "i=0; while [ $i -lt 4000 ]; do echo line $i; i=$((i+1)); \
    [ $((i%100)) = 0 ] && sleep 0.05; done; exit 7";

fn count() -> String {
    (0..4000).map(|i| format!("line {i}\n")).collect()
}

#[test]
fn everything_that_runs_goes_on_in_the_new_runtime_and_no_byte_is_lost() {
    let runtime = Runtime::start();
    let (mut raw, mut seen) = (runtime.raw(), Seen::default());
    raw.call(1, &exec(sh(COUNT)));
    raw.call(
        2,
        &exec(ExecParams {
            stdin: true,
            ..sh("read a; read b; echo $a$b; exit 9")
        }),
    );
    stdin(&mut raw, 2, 0, "fir", false);
    raw.call(
        3,
        &exec(ExecParams {
            pty: Some(Size { rows: 24, cols: 80 }),
            ..sh("stty -echo; echo on; exec sh")
        }),
    );
    seen.until(&mut raw, |seen| seen.text(3).contains("on"));
    stdin(&mut raw, 3, 0, "x=5\r", false);
    raw.call(
        4,
        r#"{"method":"code.start","params":{"language":"python","context":"c"}}"#,
    );
    seen.reply(&mut raw, 4);
    raw.call(5, &cell("x = 42"));
    seen.reply(&mut raw, 5);
    raw.call(6, &cell("import time; time.sleep(1.5); print('slept', x)"));
    raw.call(
        7,
        &exec(ExecParams {
            keep: true,
            tag: Some("kept".into()),
            output_limit: Some(5),
            ..sh("echo 0123456789; sleep 1; echo end; exit 3")
        }),
    );
    raw.call(
        8,
        &exec(ExecParams {
            timeout_ms: Some(3000),
            ..sh("exec sleep 1000")
        }),
    );
    // A client that is gone when it happens, with its window full.
    let (mut lost, mut had) = (runtime.raw(), Seen::default());
    lost.call(1, &session(0));
    lost.frame_of(Kind::Reply, 1);
    lost.call(2, &exec(sh("seq 1 200000; exit 5")));
    had.until(&mut lost, |had| had.text(2).len() > 100_000);
    drop(lost);

    // A frame of which only a part has come: the rest is for the new runtime.
    let mut half = Frame::new(Kind::Stdin, 2, b"st\nsecond\n".to_vec());
    (half.offset, half.end) = (3, true);
    let half = half.encode();
    raw.stream.write_all(&half[..26]).unwrap();

    let mut client = runtime.client();
    let before = descriptors(&mut client);
    let is_new = |name: &str| {
        let exe = std::fs::read_link(format!("/proc/{}/exe", runtime.pid())).unwrap();
        assert!(exe.to_string_lossy().contains(name), "{exe:?}");
    };
    is_new("/ratoon-runtime");
    let swapped = swap(&mut client, &program("one")).unwrap();
    assert_eq!(swapped.runtime, env!("CARGO_PKG_VERSION"));
    assert_eq!(client.hello().methods, Call::METHODS);
    is_new("memfd:ratoon-runtime");
    let name = std::fs::read_to_string(format!("/proc/{}/comm", runtime.pid())).unwrap();
    assert_eq!(name, "ratoon-runtime\n");
    client.ping(LONG).unwrap();
    // Once more: the new one can be replaced as well.
    swap(&mut client, &program("two")).unwrap();
    raw.stream.write_all(&half[26..]).unwrap();

    assert_eq!(seen.reply(&mut raw, 1)["code"], 7);
    assert!(seen.text(1) == count(), "lines are lost or repeated");
    assert_eq!(seen.reply(&mut raw, 2)["code"], 9);
    assert_eq!(seen.text(2), "firstsecond\n");
    stdin(&mut raw, 3, 4, "echo v$x; exit 4\r", false);
    assert_eq!(seen.reply(&mut raw, 3)["code"], 4);
    assert!(seen.text(3).contains("v5\r\n"), "{}", seen.text(3));
    assert_eq!(seen.reply(&mut raw, 6)["status"], "ok");
    assert_eq!(seen.text(6), "slept 42\n");
    raw.call(9, &cell("print(x + 1)"));
    assert_eq!(seen.reply(&mut raw, 9)["status"], "ok");
    assert_eq!(seen.text(9), "43\n");
    let kept = seen.reply(&mut raw, 7);
    assert_eq!(
        (
            &kept["code"],
            &kept["outputs"][0]["tail"],
            &kept["outputs"][0]["bytes"]
        ),
        (&3.into(), &"56789\nend\n".into(), &15.into()),
        "{kept}"
    );
    let late = seen.reply(&mut raw, 8);
    assert_eq!(
        (&late["timed_out"], &late["signal"]),
        (&true.into(), &15.into())
    );

    let have = had.text(2).len() as u64;
    let mut again = runtime.raw();
    again.call(3, &session(have));
    let reply = again.frame_of(Kind::Reply, 3);
    let reply: serde_json::Value = serde_json::from_slice(&reply.payload).unwrap();
    assert_eq!(reply["resumed"], true);
    assert_eq!(had.reply(&mut again, 2)["code"], 5);
    let all: String = (1..=200_000).map(|i| format!("{i}\n")).collect();
    assert!(had.text(2) == all, "the lost client's output has a gap");
    assert_eq!(descriptors(&mut client), before, "none is inherited");
}

#[test]
fn a_runtime_that_is_not_fit_leaves_the_old_one_as_it_was_and_the_client_hears_why() {
    let runtime = Runtime::start();
    let (mut raw, mut seen) = (runtime.raw(), Seen::default());
    raw.call(1, &exec(sh(COUNT)));
    raw.call(
        2,
        &exec(ExecParams {
            stdin: true,
            ..sh("read line; exit $line")
        }),
    );
    let mut client = runtime.client();
    let before = descriptors(&mut client);
    let mut hear = |binary: &[u8]| refused(swap(&mut client, binary)).message;
    assert_eq!(
        hear(b"#!/bin/sh\nexit 0\n"),
        "the new runtime is not an ELF program for x86-64"
    );
    let mut cut = program("");
    cut.truncate(4096);
    let message = hear(&cut);
    assert!(message.starts_with("the new runtime "), "{message}");
    assert_eq!(
        hear(&faulty("early")),
        "the new runtime refuses: this is nothing for me"
    );
    assert_eq!(
        hear(&faulty("late")),
        "the new runtime did not take over: it has changed its mind"
    );
    let wrong = blake3::hash(b"another").to_string();
    let error = refused(client.swap_runtime(&program(""), &wrong, LONG));
    assert_eq!(error.code, ErrorCode::BadRequest);
    assert!(error.message.contains("BLAKE3"), "{error}");
    assert_eq!(descriptors(&mut client), before, "none is inherited");
    // And then it is possible all the same.
    swap(&mut client, &program("fit")).unwrap();
    stdin(&mut raw, 2, 0, "8\n", true);
    assert_eq!(seen.reply(&mut raw, 2)["code"], 8);
    assert_eq!(seen.reply(&mut raw, 1)["code"], 7);
    assert!(seen.text(1) == count(), "lines are lost or repeated");
}

#[test]
fn what_cannot_go_on_is_named_when_it_does_not_end() {
    let runtime = Runtime::start();
    let mut raw = runtime.raw();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().display();
    raw.call(
        1,
        &format!(r#"{{"method":"file.watch","params":{{"path":"{path}"}}}}"#),
    );
    raw.frame_of(Kind::Event, 1);
    let mut client = runtime.client();
    let error = refused(swap(&mut client, &program("new")));
    assert_eq!(error.code, ErrorCode::Busy);
    assert_eq!(
        error.message,
        "file.watch did not end within 5 s, and cannot go on in another runtime"
    );
    // The watch has gone on.
    std::fs::write(dir.path().join("new"), "").unwrap();
    let told = raw.frame_of(Kind::Stdout, 1);
    assert!(String::from_utf8_lossy(&told.payload).contains("created"));
    let mut stop = Frame::ack(1, Kind::Stdout, 0);
    stop.end = true;
    raw.send(&stop);
    swap(&mut client, &program("new")).unwrap();
}
