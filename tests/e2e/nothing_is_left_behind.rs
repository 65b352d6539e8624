//! However `ratoon run` ends, no process, socket, file or record of it stays.

use std::io::{BufRead, BufReader};
use std::process::Child;
use std::time::{Duration, Instant};

use ratoon_tests::{Ratoon, finish};
use rustix::process::{Pid, Signal, kill_process};

crate::promises![
    after_an_interrupt,
    after_a_termination,
    after_the_command_line_is_killed,
    after_the_machine_monitor_is_killed,
    after_an_end_half_way_through_the_boot,
];

/// Starts a command that says when it runs and then stays; returns when it runs.
fn running(ratoon: &Ratoon) -> Child {
    let mut child = ratoon
        .command([
            "run",
            "--image",
            "debian",
            "--memory",
            "256M",
            "--",
            "sh",
            "-c",
            "echo up; exec sleep 600",
        ])
        .spawn()
        .expect("ratoon can be started");
    let stdout = child.stdout.take().expect("it is piped");
    let mut line = String::new();
    BufReader::new(stdout)
        .read_line(&mut line)
        .expect("a line comes");
    if line != "up\n" {
        panic!("not up: {line:?}, {:?}", finish(child));
    }
    child
}

fn send(child: &Child, signal: Signal) {
    let pid = Pid::from_child(child);
    kill_process(pid, signal).expect("our child can be signalled");
}

fn after_an_interrupt() {
    let ratoon = Ratoon::warm();
    let child = running(&ratoon);
    send(&child, Signal::INT);
    assert_eq!(finish(child).code(), 130);
    ratoon.nothing_is_left();
}

fn after_a_termination() {
    let ratoon = Ratoon::warm();
    let child = running(&ratoon);
    send(&child, Signal::TERM);
    assert_eq!(finish(child).code(), 143);
    ratoon.nothing_is_left();
}

fn after_the_command_line_is_killed() {
    let ratoon = Ratoon::warm();
    let mut child = running(&ratoon);
    send(&child, Signal::KILL);
    child.wait().expect("it is our child");
    ratoon.nothing_is_left();
}

fn after_the_machine_monitor_is_killed() {
    let ratoon = Ratoon::warm();
    let child = running(&ratoon);
    let cli = child.id() as i32;
    for pid in ratoon.processes() {
        if pid != cli {
            let pid = Pid::from_raw(pid).expect("a process id");
            kill_process(pid, Signal::KILL).expect("the VMM can be killed");
        }
    }
    let done = finish(child);
    assert_eq!(done.code(), 125, "{done:?}");
    assert!(!done.stderr.is_empty(), "{done:?}");
    ratoon.nothing_is_left();
}

fn after_an_end_half_way_through_the_boot() {
    let ratoon = Ratoon::new();
    let attached: &[&str] = &["run", "--cold", "--image", "debian", "--", "true"];
    let detached = &["run", "-d", "--cold", "--image", "debian"];
    for (args, signal) in [
        (attached, Signal::KILL),
        (attached, Signal::TERM),
        (detached, Signal::KILL),
    ] {
        let mut child = ratoon.command(args).spawn().expect("ratoon can be started");
        let begun = Instant::now();
        while ratoon.processes().len() < 2 {
            assert!(begun.elapsed() < Duration::from_secs(20), "no VMM came up");
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_millis(300));
        send(&child, signal);
        child.wait().expect("it is our child");
        ratoon.nothing_is_left();
    }
}
