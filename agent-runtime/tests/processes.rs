//! Processes beyond a plain command: terminals, time-outs, limits, kept ones, and sessions that are
//! taken up again.

mod common;

use std::io;
use std::sync::Mutex;

use ratoon_client::RuntimeError;
use ratoon_client::blocking::{CallIo, Client};
use ratoon_protocol::{
    AttachParams, Call, ErrorCode, Event, ExecParams, ExitReport, ExitStatus, Frame, Kind,
    ProcessInfo, SessionReply, SignalParams, Size, Target,
};

use common::{LONG, Runtime, command, sh, until};

/// Runs any call that ends as a process does; returns its report, output and events.
fn run(client: &mut Client, call: &Call) -> Result<(ExitReport, String, Vec<Event>), RuntimeError> {
    let mut out = Vec::new();
    let events = Mutex::new(Vec::new());
    let mut io = CallIo {
        stdin: None,
        stdout: &mut out,
        stderr: &mut io::sink(),
        data: &mut io::sink(),
        events: &mut |event| events.lock().expect("no panic before").push(event),
        ended: &mut |_| {},
    };
    let report = client.run(call, &mut io)?;
    let out = String::from_utf8_lossy(&out).into_owned();
    Ok((report, out, events.into_inner().expect("no panic before")))
}

fn exec(params: ExecParams) -> Call {
    Call::Exec(Box::new(params))
}

fn list(client: &mut Client) -> Vec<ProcessInfo> {
    client
        .call(&Call::Processes, "listed", LONG)
        .expect("it lists")
}

#[test]
fn a_line_for_the_shell_needs_no_argv() {
    let runtime = Runtime::start();
    let params = ExecParams {
        shell: Some("echo a | tr a b; exit 3".into()),
        ..ExecParams::default()
    };
    let (report, out, _) = run(&mut runtime.client(), &exec(params)).unwrap();
    assert_eq!((report.status, out.as_str()), (ExitStatus::Code(3), "b\n"));
    assert!(report.usage.unwrap().memory_peak > 0);
    let both = ExecParams {
        shell: Some("true".into()),
        ..command(&["true"])
    };
    let error = run(&mut runtime.client(), &exec(both)).unwrap_err();
    assert!(
        matches!(&error, RuntimeError::Call(error) if error.code == ErrorCode::BadRequest),
        "{error:?}"
    );
}

#[test]
fn a_program_with_a_terminal_has_its_size_and_controls_it() {
    let runtime = Runtime::start();
    let params = ExecParams {
        pty: Some(Size { rows: 30, cols: 99 }),
        ..sh(
            "tty >/dev/null && stty size && echo $TERM && echo err >&2; ps -o tpgid= -p $$ | grep -q $$",
        )
    };
    let (report, out, _) = run(&mut runtime.client(), &exec(params)).unwrap();
    assert_eq!(out, "30 99\r\nxterm-256color\r\nerr\r\n");
    assert_eq!(report.status, ExitStatus::Code(0));
}

#[test]
fn a_terminal_can_be_resized_and_typed_at() {
    let runtime = Runtime::start();
    let mut raw = runtime.raw();
    let script = r#"trap 'stty size; exit 0' WINCH; echo ready; read line; echo "got $line"; while :; do sleep 0.1; done"#;
    let call = exec(ExecParams {
        pty: Some(Size { rows: 10, cols: 20 }),
        ..sh(script)
    });
    raw.call(1, &serde_json::to_string(&call).unwrap());
    let mut seen = String::new();
    let mut wait_for = |raw: &mut common::Raw, what: &str| {
        while !seen.contains(what) {
            let frame = raw.frame_of(Kind::Stdout, 1);
            seen += &String::from_utf8_lossy(&frame.payload);
        }
    };
    wait_for(&mut raw, "ready");
    let mut typed = Frame::new(Kind::Stdin, 1, b"hello\r".to_vec());
    typed.offset = 0;
    raw.send(&typed);
    wait_for(&mut raw, "got hello");
    raw.call(
        2,
        r#"{"method":"resize","params":{"call":1,"rows":44,"cols":55}}"#,
    );
    wait_for(&mut raw, "44 55");
    raw.frame_of(Kind::Reply, 1);
}

#[test]
fn a_process_that_ignores_its_time_out_is_killed() {
    let runtime = Runtime::start();
    let params = ExecParams {
        timeout_ms: Some(100),
        grace_ms: Some(100),
        ..sh("trap '' TERM; while :; do sleep 1; done")
    };
    let (report, _, _) = run(&mut runtime.client(), &exec(params)).unwrap();
    assert_eq!(report.status, ExitStatus::Signal(libc::SIGKILL));
    assert!(report.timed_out);
    let params = ExecParams {
        timeout_ms: Some(100),
        ..sh("trap 'exit 9' TERM; while :; do sleep 0.05; done")
    };
    let (report, _, _) = run(&mut runtime.client(), &exec(params)).unwrap();
    assert_eq!(
        (report.status, report.timed_out),
        (ExitStatus::Code(9), true)
    );
}

#[test]
fn output_beyond_its_limit_is_counted_and_its_end_shown() {
    let runtime = Runtime::start();
    let params = ExecParams {
        output_limit: Some(1000),
        ..sh("yes 12345678 | head -c 9000000; echo the end; echo err >&2")
    };
    let (report, out, _) = run(&mut runtime.client(), &exec(params)).unwrap();
    assert_eq!(out.len(), 1000);
    let [stdout, stderr] = report.outputs.unwrap();
    assert_eq!((stdout.bytes, stdout.sent), (9_000_008, 1000));
    assert!(stdout.tail.ends_with("the end\n"), "{}", stdout.tail);
    assert_eq!((stderr.bytes, stderr.sent, stderr.file), (4, 4, None));
    if let Some(file) = stdout.file {
        assert_eq!(stdout.kept, 9_000_008 - 1000);
        let text = std::fs::read_to_string(&file).unwrap();
        assert_eq!(text.len() as u64, stdout.kept);
        std::fs::remove_file(file).unwrap();
    }
}

#[test]
fn a_kept_process_outlives_its_client_and_another_takes_it_up() {
    let runtime = Runtime::start();
    let mut raw = runtime.raw();
    let fifo = tempfile::tempdir().unwrap();
    let fifo = fifo.path().join("go");
    let script = format!(
        "echo one; mkfifo {0}; cat {0} >/dev/null; echo two; exit 5",
        fifo.display()
    );
    let call = exec(ExecParams {
        keep: true,
        tag: Some("server".into()),
        ..sh(&script)
    });
    raw.call(1, &serde_json::to_string(&call).unwrap());
    assert_eq!(raw.frame_of(Kind::Stdout, 1).payload, b"one\n");
    drop(raw);
    let mut client = runtime.client();
    until("the process is not let go", || {
        let all = list(&mut runtime.client());
        all.len() == 1 && !all[0].attached
    });
    let process = list(&mut client).remove(0);
    assert_eq!(process.tag.as_deref(), Some("server"));
    assert!(process.keep && process.ended.is_none());
    until("it waits", || std::fs::write(&fifo, "x").is_ok());
    until("it ends", || list(&mut runtime.client())[0].ended.is_some());
    let attach = Call::Attach(AttachParams {
        pid: process.pid,
        have: [4, 0],
    });
    let (report, out, events) = run(&mut client, &attach).unwrap();
    assert_eq!(
        (report.status, out.as_str()),
        (ExitStatus::Code(5), "two\n")
    );
    assert_eq!(
        events,
        [Event::Attached {
            from: [4, 0],
            pty: false
        }]
    );
    assert_eq!(list(&mut client), []);
}

#[test]
fn a_second_client_takes_a_process_from_the_first() {
    let runtime = Runtime::start();
    let mut first = runtime.raw();
    first.call(
        1,
        r#"{"method":"exec","params":{"argv":["sleep","1000"],"keep":true}}"#,
    );
    first.frame_of(Kind::Event, 1);
    let mut second = runtime.client();
    let pid = list(&mut second)[0].pid;
    let mut other = runtime.raw();
    let attach = Call::Attach(AttachParams { pid, have: [0, 0] });
    other.call(1, &serde_json::to_string(&attach).unwrap());
    other.frame_of(Kind::Event, 1);
    let error = first.frame_of(Kind::Error, 1);
    assert!(String::from_utf8_lossy(&error.payload).contains("taken_over"));
    let kill = Call::Signal(SignalParams {
        target: Target {
            call: None,
            pid: Some(pid),
        },
        signal: libc::SIGKILL,
    });
    let () = second.call(&kill, "killed it", LONG).unwrap();
    let reply = other.frame_of(Kind::Reply, 1);
    assert!(String::from_utf8_lossy(&reply.payload).contains(r#""signal":9"#));
}

#[test]
fn a_session_that_loses_its_connection_goes_on_where_the_client_was() {
    let runtime = Runtime::start();
    let name = r#"{"method":"session","params":{"id":"0123456789abcdef"HAVE}}"#;
    let mut raw = runtime.raw();
    raw.call(1, &name.replace("HAVE", ""));
    let reply: SessionReply =
        serde_json::from_slice(&raw.frame_of(Kind::Reply, 1).payload).unwrap();
    assert!(!reply.resumed);
    let cat = r#"{"method":"exec","params":{"argv":["cat"],"stdin":true}}"#;
    raw.call(2, cat);
    let mut input = Frame::new(Kind::Stdin, 2, b"hello".to_vec());
    raw.send(&input);
    assert_eq!(raw.frame_of(Kind::Stdout, 2).payload, b"hello");
    drop(raw);

    let mut raw = runtime.raw();
    let have = r#","have":[{"call":2,"outputs":[3,0,0]}]"#;
    raw.call(1, &name.replace("HAVE", have));
    let reply: SessionReply =
        serde_json::from_slice(&raw.frame_of(Kind::Reply, 1).payload).unwrap();
    assert!(reply.resumed);
    assert_eq!((reply.calls[0].call, reply.calls[0].stdin), (2, 5));
    let again = raw.frame_of(Kind::Stdout, 2);
    assert_eq!((again.offset, &again.payload[..]), (3, &b"lo"[..]));
    raw.call(2, cat);
    input.payload = b" world".to_vec();
    input.offset = 5;
    input.end = true;
    raw.send(&input);
    let more = raw.frame_of(Kind::Stdout, 2);
    assert_eq!((more.offset, &more.payload[..]), (5, &b" world"[..]));
    raw.frame_of(Kind::Reply, 2);
    assert_eq!(list(&mut runtime.client()), [], "it was run once");
}

#[test]
fn a_session_that_nobody_takes_up_ends_with_its_processes() {
    let runtime = Runtime::start();
    let mut raw = runtime.raw();
    raw.call(
        1,
        r#"{"method":"session","params":{"id":"0123456789abcdef","linger_ms":50}}"#,
    );
    raw.frame_of(Kind::Reply, 1);
    raw.call(2, r#"{"method":"exec","params":{"argv":["sleep","1000"]}}"#);
    raw.frame_of(Kind::Event, 2);
    drop(raw);
    until("its process outlives the session", || {
        list(&mut runtime.client()).is_empty()
    });
}
