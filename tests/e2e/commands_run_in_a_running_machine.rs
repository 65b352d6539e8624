//! `ratoon exec`: any number of commands in one machine, whatever they do to it.

use std::io::Write;
use std::process::Stdio;

use ratoon_client::blocking::ExecIo;
use ratoon_protocol::{Call, ExecParams, ExitStatus, ProcessInfo};
use ratoon_tests::{Ratoon, finish};

use crate::shared::{client, exec, machine};

crate::promises![
    a_command_has_its_streams_its_user_and_its_exit_code,
    a_command_that_cannot_run_is_told_as_a_shell_would,
    a_time_out_ends_all_that_a_command_has_started,
    a_client_that_vanishes_takes_its_command_along,
    the_machines_init_cannot_be_killed_from_inside,
    a_fork_bomb_is_ended_and_the_machine_goes_on,
    a_command_can_have_a_terminal,
    binary_output_arrives_as_it_is_and_no_more_of_it_than_wanted,
    a_command_can_outlive_its_client,
];

fn a_command_has_its_streams_its_user_and_its_exit_code() {
    let script = "read line; echo out $line $X; echo err >&2; id -un; pwd; exit 7";
    let flags = ["-e", "X=y", "-u", "nobody", "-w", "/tmp", "--usage", "-i"];
    let mut command = machine().command(["exec"].into_iter().chain(flags).chain([
        crate::shared::NAME,
        "--",
        "sh",
        "-c",
        script,
    ]));
    let mut child = command.stdin(Stdio::piped()).spawn().expect("it starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    stdin.write_all(b"hello\n").expect("it reads");
    drop(stdin);
    let done = finish(child);
    assert_eq!(done.code(), 7, "{done:?}");
    assert_eq!(done.stdout, "out hello y\nnobody\n/tmp\n");
    assert!(done.stderr.starts_with("err\n"), "{done:?}");
    assert!(done.stderr.contains(" s, system "), "--usage: {done:?}");
}

fn a_command_that_cannot_run_is_told_as_a_shell_would() {
    for (flags, command, code, words) in [
        (&[][..], "no-such-program", 127, "command not found"),
        (&[], "/etc/passwd", 126, "not executable"),
        (&[], "/etc", 126, "is a directory"),
        (&["-u", "nemo"], "true", 127, "no user `nemo`"),
        (&["-w", "/no/where"], "true", 127, "/no/where"),
    ] {
        let done = exec(flags, &[command]);
        assert_eq!(done.code(), code, "{done:?}");
        assert!(done.stderr.contains(words), "{words}: {done:?}");
    }
    let done = machine().run(["exec", "nobody-home", "--", "true"]);
    assert_eq!(done.code(), 125, "{done:?}");
    assert!(done.stderr.contains("nobody-home"), "{done:?}");
}

/// How many processes in the guest have this word in their command line.
fn running(word: &str) -> usize {
    running_in(machine(), crate::shared::NAME, word)
}

fn running_in(ratoon: &Ratoon, vm: &str, word: &str) -> usize {
    // The brackets keep the shell itself out.
    let (first, rest) = word.split_at(1);
    let script = format!("pgrep -f -c '[{first}]{rest}'; true");
    let done = ratoon.run(["exec", vm, "--", "sh", "-c", &script]).ok();
    done.stdout.trim().parse().expect("a number")
}

fn a_time_out_ends_all_that_a_command_has_started() {
    let script =
        "trap '' TERM; setsid sleep 7771 & setsid setsid sleep 7771 & sleep 7771; sleep 7771";
    let done = exec(&["--timeout", "3s"], &["sh", "-c", script]);
    assert_eq!(done.code(), 124, "{done:?}");
    assert_eq!(running("7771"), 0);
}

fn a_client_that_vanishes_takes_its_command_along() {
    let args = [
        "exec",
        crate::shared::NAME,
        "--",
        "sh",
        "-c",
        "echo up; setsid sleep 7772",
    ];
    let mut child = machine().command(args).spawn().expect("it starts");
    let mut first = [0; 3];
    let stdout = child.stdout.as_mut().expect("a pipe");
    std::io::Read::read_exact(stdout, &mut first).expect("it is up");
    child.kill().expect("it can be killed");
    child.wait().expect("it ends");
    for _ in 0..60 {
        if running("7772") == 0 {
            return;
        }
    }
    panic!("the command outlives its client");
}

fn the_machines_init_cannot_be_killed_from_inside() {
    let script = "kill -9 1; kill -STOP 1; kill -TERM 1; kill -INT 1; sleep 0.2; echo alive";
    let done = exec(&[], &["sh", "-c", script]).ok();
    assert_eq!(done.stdout, "alive\n");
    assert_eq!(exec(&[], &["echo", "still"]).ok().stdout, "still\n");
}

fn a_fork_bomb_is_ended_and_the_machine_goes_on() {
    // In a machine of its own: for a moment nobody else gets on.
    let (ratoon, vm) = (Ratoon::warm(), "bombed");
    let run = ["run", "-d", "--name", vm, "--memory", "256M"];
    ratoon.run(run).ok();
    let bomb = "bomb() { bomb | bomb & }; bomb; sleep 1000";
    let bomb = ["exec", "--timeout", "20s", vm, "--", "bash", "-c", bomb];
    std::thread::scope(|scope| {
        let bomb = scope.spawn(|| ratoon.run(bomb));
        // By then there are some dozens.
        std::thread::sleep(std::time::Duration::from_secs(3));
        let beside = ratoon.run(["exec", vm, "--", "echo", "beside"]);
        assert_eq!(beside.ok().stdout, "beside\n");
        assert!(!bomb.is_finished(), "it was asked while the bomb ran");
        let done = bomb.join().expect("it is waited for");
        assert_eq!(done.code(), 124, "{:?}", done.status);
    });
    let fine = ratoon.run(["exec", vm, "--", "echo", "fine"]);
    assert_eq!(fine.ok().stdout, "fine\n");
    assert_eq!(running_in(&ratoon, vm, "bomb"), 0);
    ratoon.run(["rm", "-f", vm]).ok();
    ratoon.nothing_is_left();
}

fn a_command_can_have_a_terminal() {
    let done = exec(
        &["-t"],
        &[
            "sh",
            "-c",
            "tty; stty size; test -t 0 && test -t 2 && echo yes",
        ],
    );
    let text = done.ok().stdout;
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].starts_with("/dev/pts/"), "{text:?}");
    assert_eq!(lines[1..], ["24 80", "yes"], "{text:?}");
    let top = exec(&["-t"], &["top", "-n", "1"]).ok().stdout;
    assert!(
        top.contains("load average") && top.contains("\x1b["),
        "{top:?}"
    );
}

fn binary_output_arrives_as_it_is_and_no_more_of_it_than_wanted() {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let params = ExecParams {
        shell: Some(
            "i=0; while [ $i -lt 256 ]; do printf \"\\\\$(printf %o $i)\"; i=$((i+1)); done; \
             head -c 3000000 /dev/zero"
                .into(),
        ),
        output_limit: Some(100_000),
        ..ExecParams::default()
    };
    let io = ExecIo {
        stdin: None,
        stdout: &mut out,
        stderr: &mut err,
    };
    let report = client().exec(&params, io).expect("it runs");
    let all: Vec<u8> = (0..=255).collect();
    assert_eq!(out[..256], all);
    assert_eq!(out.len(), 100_000);
    let [stdout, _] = report.outputs.expect("counts");
    assert_eq!((stdout.bytes, stdout.kept), (3_000_256, 2_900_256));
    let file = stdout.file.expect("a file in the guest");
    let size = exec(&[], &["stat", "-c", "%s", &file]).ok().stdout;
    assert_eq!(size, "2900256\n");
    exec(&[], &["rm", &file]).ok();
}

fn a_command_can_outlive_its_client() {
    use ratoon_client::blocking::CallIo;
    let params = ExecParams {
        shell: Some("echo one; sleep 2; echo two; exit 4".into()),
        keep: true,
        tag: Some("kept".into()),
        ..ExecParams::default()
    };
    let mut first = client();
    let controller = first.controller();
    let started = std::cell::Cell::new(None);
    let mut io = CallIo {
        stdin: None,
        stdout: &mut std::io::sink(),
        stderr: &mut std::io::sink(),
        data: &mut std::io::sink(),
        events: &mut |event| {
            if let ratoon_protocol::Event::Started { pid } = event {
                started.set(Some(pid));
                controller.cancel();
            }
        },
        ended: &mut |_| {},
    };
    let result: Result<ratoon_protocol::ExitReport, _> =
        first.run(&Call::Exec(Box::new(params)), &mut io);
    assert!(result.is_err(), "cancelled");
    drop(first);
    let pid = started.get().expect("it has started");

    let mut second = client();
    let all: Vec<ProcessInfo> = second
        .call(&Call::Processes, "listed", ratoon_tests::PATIENCE)
        .expect("it lists");
    let kept = all
        .iter()
        .find(|process| process.pid == pid)
        .expect("it is kept");
    assert_eq!(kept.tag.as_deref(), Some("kept"));
    let attach = Call::Attach(ratoon_protocol::AttachParams { pid, have: [0, 0] });
    let mut out = Vec::new();
    let mut io = CallIo {
        stdin: None,
        stdout: &mut out,
        stderr: &mut std::io::sink(),
        data: &mut std::io::sink(),
        events: &mut |_| {},
        ended: &mut |_| {},
    };
    let report: ratoon_protocol::ExitReport = second.run(&attach, &mut io).expect("it ends");
    assert_eq!(report.status, ExitStatus::Code(4));
    // What the first client had taken before it went is not said again.
    let text = String::from_utf8_lossy(&out).into_owned();
    assert!(text.ends_with("two\n"), "{text:?}");
}
