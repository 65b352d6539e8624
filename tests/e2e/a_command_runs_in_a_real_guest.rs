//! `ratoon run` boots a real Linux guest and behaves as if the command ran here.

use std::io::Write;
use std::process::Stdio;

use ratoon_tests::{Ratoon, finish};

crate::promises![
    python_sees_our_kernel_and_hostname,
    output_and_errors_come_apart_and_the_exit_code_is_the_commands,
    environment_directory_and_input_reach_the_command,
    a_signal_is_told_as_a_shell_would,
    a_guest_has_the_processors_and_the_memory_asked_for,
];

fn python_sees_our_kernel_and_hostname() {
    let ratoon = Ratoon::new();
    let script = "import platform; print(platform.release(), platform.node())";
    let done = ratoon
        .run(["run", "--image", "debian", "--", "python3", "-c", script])
        .ok();
    assert!(done.stdout.starts_with("6.12."), "{done:?}");
    // A machine without a name is called by its id.
    let node = done
        .stdout
        .trim_end()
        .rsplit(' ')
        .next()
        .unwrap_or_default();
    let is_id = node.len() == 12 && node.bytes().all(|byte| byte.is_ascii_hexdigit());
    assert!(done.stdout.contains("-ratoon ") && is_id, "{done:?}");
    ratoon.nothing_is_left();
}

fn output_and_errors_come_apart_and_the_exit_code_is_the_commands() {
    let ratoon = Ratoon::new();
    let script = "echo out; echo err >&2; exit 7";
    let done = ratoon.run(["run", "--image", "debian", "--", "sh", "-c", script]);
    assert_eq!(done.code(), 7);
    assert_eq!(done.stdout, "out\n");
    // Where no run came before, on a new cache, this one has booted and says so first.
    let note = "note: debian was booted;";
    let errors: Vec<_> = done.stderr.lines().collect();
    let errors = match errors.split_first() {
        Some((first, rest)) if first.starts_with(note) => rest,
        _ => &errors[..],
    };
    assert_eq!(errors, ["err"], "{done:?}");
    ratoon.nothing_is_left();
}

fn environment_directory_and_input_reach_the_command() {
    let ratoon = Ratoon::new();
    let script = "echo $GREETING $(pwd) $(id -un); cat";
    let args = [
        "run",
        "--image",
        "debian",
        "-e",
        "GREETING=hello there",
        "-w",
        "/usr/share",
        "-u",
        "nobody",
        "--",
        "sh",
        "-c",
        script,
    ];
    let mut child = ratoon
        .command(args)
        .stdin(Stdio::piped())
        .spawn()
        .expect("ratoon can be started");
    let mut stdin = child.stdin.take().expect("it is piped");
    stdin.write_all(b"from the host\n").expect("it takes input");
    drop(stdin);
    let done = finish(child).ok();
    assert_eq!(
        done.stdout,
        "hello there /usr/share nobody\nfrom the host\n"
    );
    ratoon.nothing_is_left();
}

fn a_signal_is_told_as_a_shell_would() {
    let ratoon = Ratoon::new();
    let done = ratoon.run(["run", "--image", "debian", "--", "sh", "-c", "kill -9 $$"]);
    assert_eq!(done.code(), 128 + 9);
}

fn a_guest_has_the_processors_and_the_memory_asked_for() {
    let ratoon = Ratoon::new();
    let script = "nproc; grep MemTotal /proc/meminfo";
    let args = [
        "run", "--image", "debian", "--cpus", "2", "--memory", "1G", "--", "sh", "-c", script,
    ];
    let done = ratoon.run(args).ok();
    let mut lines = done.stdout.lines();
    assert_eq!(lines.next(), Some("2"));
    let kib: u64 = lines
        .next()
        .and_then(|line| line.split_whitespace().nth(1)?.parse().ok())
        .expect("MemTotal has a number");
    assert!((900 << 10..1 << 20).contains(&kib), "{kib} KiB");
}
