//! `ratoon run -d` leaves a machine that the other commands find, control and end. One machine is
//! booted for most of it.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use ratoon_engine::runtime::{ExecIo, RuntimeClient};
use ratoon_protocol::{ExecParams, ExitStatus};
use ratoon_tests::Ratoon;
use ratoon_vmm_api::{MetricsReply, StatusReply, VmState};

crate::promises![
    a_detached_machine_is_found_controlled_and_ended,
    one_of_two_commands_that_want_a_name_gets_it,
];

/// One request on a VM's control socket; its status line's code and its body.
fn request(socket: &PathBuf, method: &str, path: &str) -> (u16, String) {
    let mut stream = UnixStream::connect(socket).expect("the control socket takes connections");
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: vm\r\nConnection: close\r\n\r\n"
    )
    .expect("it takes a request");
    let mut reply = String::new();
    stream
        .read_to_string(&mut reply)
        .expect("it answers in text");
    let code = reply
        .split(' ')
        .nth(1)
        .and_then(|code| code.parse().ok())
        .expect("an HTTP status");
    let body = reply.split_once("\r\n\r\n").expect("a body").1;
    (code, body.to_owned())
}

fn status(socket: &PathBuf, method: &str, path: &str) -> StatusReply {
    let (code, body) = request(socket, method, path);
    assert_eq!(code, 200, "{body}");
    serde_json::from_str(&body).expect("a status")
}

/// What KVM counts of vCPU 0, by its names.
fn counters(socket: &PathBuf) -> BTreeMap<String, u64> {
    let (_, body) = request(socket, "GET", "/v1/metrics");
    let mut metrics: MetricsReply = serde_json::from_str(&body).expect("metrics");
    metrics.vcpus.swap_remove(0)
}

/// All counters of guest-kernel instructions and exits of vCPU 0.
fn progress(socket: &PathBuf) -> u64 {
    let counters = counters(socket);
    counters["exits"] + counters.get("insn_emulation").unwrap_or(&0)
}

/// It comes to rest within the minute: what was written goes to the disk first. kcompactd alone woke it twice a
/// second, for ever.
fn an_idle_machine_leaves_the_processor_alone(socket: &PathBuf) {
    let now = || {
        let counters = counters(socket);
        let done = counters["exits"] + counters.get("insn_emulation").unwrap_or(&0);
        (counters["halt_exits"], done)
    };
    let (mut seen, mut quiet) = (Vec::new(), 0);
    for _ in 0..20 {
        let (woken, done) = now();
        std::thread::sleep(Duration::from_secs(3));
        let (woken, done) = (now().0 - woken, now().1 - done);
        seen.push((woken, done));
        // One that never sleeps is not woken either.
        quiet = if woken <= 2 && done < 60_000 {
            quiet + 1
        } else {
            0
        };
        if quiet == 2 {
            return;
        }
    }
    panic!("an idle guest is woken so often, and does so much, in 3 s each: {seen:?}");
}

fn a_detached_machine_is_found_controlled_and_ended() {
    let ratoon = Ratoon::warm();
    let args = ["run", "-d", "--name", "box", "--memory", "256M"];
    let id = ratoon.run(args).ok().stdout.trim().to_owned();
    let listed = ratoon.run(["ps", "--json"]).ok().stdout;
    let listed: serde_json::Value = serde_json::from_str(&listed).expect("--json prints JSON");
    assert_eq!(listed[0]["id"], id.as_str());
    assert_eq!(listed[0]["name"], "box");
    assert_eq!(listed[0]["status"], "running");

    let dir = ratoon.vms_dir().join(&id);
    let control = dir.join("control.sock");
    assert_eq!(
        status(&control, "GET", "/v1/status").state,
        VmState::Running
    );

    // Paused, it does nothing; resumed, it goes on where it was.
    assert_eq!(status(&control, "POST", "/v1/pause").state, VmState::Paused);
    let before = progress(&control);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(
        progress(&control),
        before,
        "a paused guest makes no progress"
    );
    assert_eq!(
        status(&control, "POST", "/v1/resume").state,
        VmState::Running
    );
    let (code, body) = request(&control, "POST", "/v1/fly");
    assert_eq!(code, 404, "{body}");
    let (_, document) = request(&control, "GET", "/openapi.json");
    assert!(document.contains("\"/v1/pause\""));

    // The runtime in the guest still answers, on a connection of its own.
    let mut client = RuntimeClient::connect(&dir.join("vsock.sock"), Duration::from_secs(60))
        .expect("it answers");
    let uptime = client
        .ping(Duration::from_secs(60))
        .expect("a pong")
        .uptime_us;
    assert!(uptime > 0);
    let exit = run(&mut client, &["sh", "-c", "touch /left && exit 3"]);
    assert_eq!(exit, ExitStatus::Code(3));
    assert_eq!(
        run(&mut client, &["test", "-e", "/left"]),
        ExitStatus::Code(0)
    );
    drop(client);
    an_idle_machine_leaves_the_processor_alone(&control);

    assert!(ratoon.run(["rm", "box"]).code() != 0, "it runs: rm refuses");
    ratoon.run(["stop", "box"]).ok();
    let listed = ratoon.run(["ps", "-a", "--json"]).ok().stdout;
    let listed: serde_json::Value = serde_json::from_str(&listed).expect("--json prints JSON");
    assert_eq!(listed[0]["status"], "stopped");
    ratoon.run(["logs", "box"]).ok();
    ratoon.run(["rm", "box"]).ok();
    ratoon.nothing_is_left();
}

fn run(client: &mut RuntimeClient, argv: &[&str]) -> ExitStatus {
    let params = ExecParams {
        argv: argv.iter().map(|word| (*word).to_owned()).collect(),
        ..ExecParams::default()
    };
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let io = ExecIo {
        stdin: None,
        stdout: &mut out,
        stderr: &mut err,
    };
    client.exec(&params, io).expect("the command runs").status
}

fn one_of_two_commands_that_want_a_name_gets_it() {
    let ratoon = Ratoon::warm();
    let args = ["run", "-d", "--name", "twin", "--memory", "256M"];
    let start = || ratoon.command(args).spawn().expect("ratoon can be started");
    let (a, b) = (start(), start());
    let (a, b) = (ratoon_tests::finish(a), ratoon_tests::finish(b));
    let won = [&a, &b].iter().filter(|done| done.code() == 0).count();
    assert_eq!(won, 1, "{a:?} {b:?}");
    let lost = if a.code() == 0 { &b } else { &a };
    assert!(lost.stderr.contains("twin"), "{lost:?}");
    ratoon.run(["kill", "twin"]).ok();
    ratoon.run(["rm", "twin"]).ok();
    ratoon.nothing_is_left();
}
