//! Files in and out, code that remembers, servers that are reached, a machine that can be looked at
//! and becomes another.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use ratoon_client::RuntimeError;
use ratoon_client::blocking::{CallIo, Client};
use ratoon_protocol::{
    Awake, Call, ErrorCode, ExecParams, FileMkdir, FileWrite, FreezeParams, Metrics, Transferred,
    Wake,
};
use ratoon_tests::{PATIENCE, Ratoon};
use serde_json::Value;

use crate::shared::{NAME, exec, machine};

crate::promises![
    files_and_trees_go_in_and_out_as_they_are,
    code_remembers_and_shows_its_values,
    a_server_in_the_machine_is_reached_from_here,
    a_machine_can_be_looked_at,
    a_woken_machine_is_somebody_else_before_anything_else_runs,
];

fn in_guest(path: &str) -> String {
    format!("{NAME}:{path}")
}

fn files_and_trees_go_in_and_out_as_they_are() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = |name: &str| dir.path().join(name).to_str().expect("plain").to_owned();
    let bytes: Vec<u8> = (0..500_000_u32)
        .map(|i| (i.wrapping_mul(i) % 251) as u8)
        .collect();
    std::fs::create_dir_all(dir.path().join("tree/sub")).expect("it is made");
    std::fs::write(path("tree/sub/data"), &bytes).expect("it is written");
    std::fs::write(path("tree/run.sh"), "#!/bin/sh\necho ran\n").expect("it is written");
    let mode = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(path("tree/run.sh"), mode).expect("it is mine");
    std::os::unix::fs::symlink("sub/data", dir.path().join("tree/link")).expect("it is made");

    machine()
        .run(["cp", &path("tree"), &in_guest("/root/")])
        .ok();
    assert_eq!(exec(&[], &["/root/tree/run.sh"]).ok().stdout, "ran\n");
    machine()
        .run(["cp", &in_guest("/root/tree"), &path("back")])
        .ok();
    assert_eq!(
        std::fs::read(path("back/link")).expect("it is there"),
        bytes
    );
    let link = std::fs::read_link(path("back/link")).expect("it is a link");
    assert_eq!(link.to_str(), Some("sub/data"));

    machine()
        .run([
            "cp",
            "-u",
            "nobody",
            &path("tree/sub/data"),
            &in_guest("/tmp/one"),
        ])
        .ok();
    let owner = exec(&[], &["stat", "-c", "%U %s", "/tmp/one"]).ok().stdout;
    assert_eq!(owner, "nobody 500000\n");
    machine()
        .run(["cp", &in_guest("/tmp/one"), &path("one")])
        .ok();
    assert_eq!(std::fs::read(path("one")).expect("it is there"), bytes);

    for (from, to, words) in [
        (path("none"), in_guest("/tmp"), "none"),
        (in_guest("/none"), path("x"), "/none"),
        (path("one"), in_guest("/no/dir/x"), "/no/dir/x"),
        (path("one"), in_guest("/proc/nothing"), "/proc/nothing"),
        (path("one"), path("two"), "VM:PATH"),
    ] {
        let done = machine().run(["cp", &from, &to]);
        assert_ne!(done.code(), 0, "{from} to {to}: {done:?}");
        assert!(done.stderr.contains(words), "{words}: {done:?}");
    }
    assert!(
        !dir.path().join("x").exists(),
        "nothing is left of a failed copy"
    );
}

fn code(args: &[&str]) -> ratoon_tests::Done {
    let mut all = vec!["code", NAME];
    all.extend(args);
    machine().run(all)
}

fn code_remembers_and_shows_its_values() {
    code(&["-c", "import math\nx = [1, 2]"]).ok();
    let done = code(&["-c", "print('out')\nx + [math.floor(3.5)]"]).ok();
    assert_eq!(done.stdout, "out\n[1, 2, 3]\n");
    let failed = code(&["-c", "y = 1\ny / 0"]);
    assert_eq!(failed.code(), 1, "{failed:?}");
    assert!(failed.stderr.contains("ZeroDivisionError") && failed.stderr.contains("y / 0"));
    assert_eq!(
        code(&["-c", "y"]).ok().stdout,
        "1\n",
        "state survives an error"
    );
    let late = code(&["--timeout", "2s", "-c", "while True: pass"]);
    assert_eq!(late.code(), 124, "{late:?}");
    assert_eq!(
        code(&["-c", "x[0]"]).ok().stdout,
        "1\n",
        "state survives a time-out"
    );
    let other = code(&["-x", "other", "-c", "x"]);
    assert_eq!(
        other.code(),
        1,
        "another context has another state: {other:?}"
    );
    let rich = "class R:\n  def _repr_html_(self): return '<b>r</b>'\nR()";
    let shown: Value =
        serde_json::from_str(&code(&["--json", "-c", rich]).ok().stdout).expect("JSON");
    assert_eq!(shown["data"]["text/html"], "<b>r</b>");
    code(&["-l", "bash", "-c", "cd /usr; v=7"]).ok();
    assert_eq!(
        code(&["-l", "bash", "-c", "pwd; echo $v"]).ok().stdout,
        "/usr\n7\n"
    );
    let node = code(&["-l", "node", "-c", "1"]);
    assert!(node.code() != 0 && node.stderr.contains("node"), "{node:?}");
    let gone = code(&["-c", "import os; os._exit(3)"]);
    assert!(gone.stderr.contains("has ended"), "{gone:?}");
    assert_eq!(
        code(&["-c", "'x' in globals()"]).ok().stdout,
        "False\n",
        "a fresh one"
    );
}

fn a_server_in_the_machine_is_reached_from_here() {
    let server = "import http.server\n\
        class H(http.server.BaseHTTPRequestHandler):\n\
        \x20   def do_GET(self):\n\
        \x20       self.send_response(200); self.end_headers(); self.wfile.write(b'hello from the guest')\n\
        http.server.HTTPServer(('127.0.0.1', 8080), H).serve_forever()";
    let script = format!("nohup python3 -c \"{server}\" >/dev/null 2>&1 &");
    exec(&[], &["sh", "-c", &script]).ok();
    let listens = || {
        let done = machine().run(["forward", "--list", "--json", NAME]).ok();
        let ports: Value = serde_json::from_str(&done.stdout).expect("JSON");
        ports
            .as_array()
            .is_some_and(|all| all.iter().any(|port| port["port"] == 8080))
    };
    let deadline = std::time::Instant::now() + PATIENCE;
    while !listens() {
        assert!(
            std::time::Instant::now() < deadline,
            "the server does not listen"
        );
    }
    let mut forward = machine()
        .command(["forward", NAME, "0:8080", "0:9"])
        .spawn()
        .expect("it starts");
    let mut lines = BufReader::new(forward.stdout.take().expect("a pipe")).lines();
    let mut next = || {
        let line = lines.next().expect("a line").expect("text");
        line.split(" -> ").next().expect("an address").to_owned()
    };
    let (web, nothing) = (next(), next());
    for _ in 0..2 {
        let mut stream = TcpStream::connect(&web).expect("it listens");
        stream
            .write_all(b"GET / HTTP/1.0\r\n\r\n")
            .expect("it takes a request");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("it answers");
        assert!(answer.ends_with("hello from the guest"), "{answer:?}");
    }
    let mut stream = TcpStream::connect(&nothing).expect("it listens");
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    assert_eq!(answer, "", "nobody listens there");
    forward.kill().expect("it can be killed");
    forward.wait().expect("it ends");
}

fn a_machine_can_be_looked_at() {
    let done = machine().run(["top", "--json", NAME]).ok();
    let metrics: Metrics = serde_json::from_str(&done.stdout).expect("metrics");
    assert_eq!(metrics.cpus, 1);
    assert!((100 << 20..=256 << 20).contains(&metrics.memory_total));
    assert!(metrics.top.iter().any(|process| process.pid == 1));
    assert!(
        metrics.runtime_memory < 8 << 20,
        "{}",
        metrics.runtime_memory
    );
    assert!(
        machine()
            .run(["top", NAME])
            .ok()
            .stdout
            .contains("processes")
    );
}

/// Runs a command by a client; returns its standard output.
fn output(client: &mut Client, shell: &str) -> String {
    let params = ExecParams {
        shell: Some(shell.into()),
        ..ExecParams::default()
    };
    let mut out = Vec::new();
    let io = ratoon_client::blocking::ExecIo {
        stdin: None,
        stdout: &mut out,
        stderr: &mut std::io::sink(),
    };
    client.exec(&params, io).expect("it runs");
    String::from_utf8_lossy(&out).into_owned()
}

fn run_true() -> Call {
    Call::Exec(Box::new(ExecParams {
        argv: vec!["true".into()],
        ..ExecParams::default()
    }))
}

fn a_woken_machine_is_somebody_else_before_anything_else_runs() {
    let ratoon = Ratoon::warm();
    let args = ["run", "-d", "--name", "sleeper", "--memory", "256M"];
    let id = ratoon.run(args).ok().stdout.trim().to_owned();
    let socket = ratoon.vms_dir().join(id).join("vsock.sock");
    let connect = || Client::connect(&socket, Duration::from_secs(60)).expect("it answers");
    let mut client = connect();
    let mut done =
        |call: Call| -> Result<Value, RuntimeError> { client.call(&call, "done", PATIENCE) };

    // For the moment of a freeze nothing moves, and nothing that would hang the runtime is begun.
    let all = FreezeParams {
        processes: true,
        file_systems: true,
        ..FreezeParams::default()
    };
    done(Call::Freeze(all)).expect("it freezes");
    let mkdir = Call::FileMkdir(FileMkdir {
        path: "/root/new".into(),
        ..FileMkdir::default()
    });
    for call in [run_true(), mkdir] {
        let refused = done(call);
        assert!(
            matches!(&refused, Err(RuntimeError::Call(error)) if error.code == ErrorCode::Busy),
            "{refused:?}"
        );
    }
    done(Call::Thaw(all)).expect("it thaws");

    // Nor is a program caught between its start and the freeze, if both are asked for in one breath.
    let processes = FreezeParams {
        processes: true,
        ..FreezeParams::default()
    };
    let tokio = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    tokio.expect("a runtime").block_on(async {
        let client = ratoon_client::Client::connect(&socket, PATIENCE)
            .await
            .expect("it answers");
        for _ in 0..8 {
            let freeze = client.begin(Call::Freeze(processes)).await.expect("sent");
            let exec = client.begin(run_true()).await.expect("sent");
            let frozen = tokio::time::timeout(PATIENCE, freeze.result::<()>()).await;
            frozen.expect("it hears us").expect("it freezes");
            client.thaw(processes).await.expect("it thaws");
            let ran = exec.result::<Value>().await;
            let is_clear = match &ran {
                Err(RuntimeError::Call(error)) => error.code == ErrorCode::Busy,
                ran => ran.is_ok(),
            };
            assert!(is_clear, "{ran:?}");
        }
    });

    let uuid = |client: &mut Client| output(client, "cat /proc/sys/kernel/random/uuid");
    let before = uuid(&mut connect());
    done(Call::ExpectWake).expect("it waits");
    let other = connect();
    let early = std::thread::spawn(move || {
        let mut other = other;
        output(
            &mut other,
            "hostname; cat /etc/machine-id /run/ratoon/message",
        )
    });
    let mut other = connect();
    let upload = std::thread::spawn(move || {
        let (reader, mut writer) = std::io::pipe().expect("a pipe");
        writer.write_all(b"early words").expect("it takes them");
        drop(writer);
        let mut io = CallIo {
            stdin: Some(reader.as_fd()),
            stdout: &mut std::io::sink(),
            stderr: &mut std::io::sink(),
            data: &mut std::io::sink(),
            events: &mut |_| {},
            ended: &mut |_| {},
        };
        let write = Call::FileWrite(FileWrite {
            path: "/root/early".into(),
            ..FileWrite::default()
        });
        let moved: Transferred = other.run(&write, &mut io).expect("it is written");
        moved.bytes
    });
    done(Call::Ping).expect("a ping is answered");
    let mut wake = Wake {
        generation: "g".into(),
        id: "child-3".into(),
        child: true,
        index: Some(3),
        hostname: Some("child3".into()),
        machine_id: Some("0123456789abcdef0123456789abcdef".into()),
        time_us: Some(2_000_000_000_000_000),
        entropy: "short".into(),
        message: Some("try this".into()),
        ..Wake::default()
    };
    let refused = done(Call::Wake(Box::new(wake.clone())));
    assert!(matches!(refused, Err(RuntimeError::Call(_))), "{refused:?}");
    wake.entropy = "ab".repeat(32);
    let awake = done(Call::Wake(Box::new(wake))).expect("it wakes");
    let awake: Awake = serde_json::from_value(awake).expect("an identity");
    assert_eq!(
        (awake.id.as_str(), awake.index, awake.wakes),
        ("child-3", 3, 2),
        "its warm start was a wake, too"
    );
    assert_eq!(
        early.join().expect("it ran"),
        "child3\n0123456789abcdef0123456789abcdef\ntry this\n",
        "what was asked before it woke was answered after"
    );
    let uploaded = upload.join().expect("it is written");
    assert_eq!(uploaded, 11, "input waits with its call");
    let mut client = connect();
    assert_ne!(uuid(&mut client), before);
    assert!(output(&mut client, "date -u +%Y").starts_with("2033"));
    ratoon.run(["rm", "-f", "sleeper"]).ok();
    ratoon.nothing_is_left();
}
