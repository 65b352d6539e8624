//! What disturbs a measurement is told: an interrupt, a full disk, files that are none of ours. Samples so
//! far are kept and reported as partial.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ratoon_tests::{Done, PATIENCE, finish, program};

crate::promises!(
    an_interrupted_run_keeps_its_samples_and_reports_them_as_partial,
    an_interrupt_does_not_wait_for_a_guest_and_leaves_nothing,
    a_full_disk_ends_the_run_with_the_samples_so_far_as_root,
    without_kvm_the_harness_says_how_to_mend_it_as_root,
);

/// Those that need no guest.
pub mod without_guests {
    use super::{
        a_baseline_that_is_none_is_refused, samples_that_are_none_are_refused_by_name,
        the_harness_is_a_command_of_ours,
    };

    crate::promises!(
        samples_that_are_none_are_refused_by_name,
        a_baseline_that_is_none_is_refused,
        the_harness_is_a_command_of_ours,
    );
}

fn bench(args: &[&str]) -> Command {
    let mut bench = Command::new(program("ratoon-bench"));
    bench
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    bench
}

fn run(args: &[&str]) -> Done {
    finish(bench(args).spawn().expect("ratoon-bench can be started"))
}

fn text(path: &Path) -> String {
    path.to_str().expect("a path in UTF-8").to_owned()
}

fn samples(out: &Path) -> Vec<serde_json::Value> {
    let text = fs::read_to_string(out.join("samples.jsonl")).unwrap_or_default();
    let lines = text
        .split_inclusive('\n')
        .filter(|line| line.ends_with('\n'));
    let parse = |line| serde_json::from_str(line).expect("a line is JSON");
    lines.map(parse).collect()
}

fn count(out: &Path) -> usize {
    let samples = samples(out);
    let start = samples.iter().filter(|it| it["scenario"] == "start");
    start.filter(|it| it["kind"] == "sample").count()
}

fn an_interrupted_run_keeps_its_samples_and_reports_them_as_partial() {
    let out = tempfile::tempdir().expect("a directory");
    let args = [
        "--runs",
        "5000",
        "--out",
        &text(out.path()),
        "start",
        "boot",
    ];
    let child = bench(&args).process_group(0).spawn();
    let child = child.expect("ratoon-bench can be started");
    let from = Instant::now();
    while count(out.path()) == 0 {
        assert!(from.elapsed() < PATIENCE, "no sample came");
        std::thread::sleep(Duration::from_millis(50));
    }
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("a signal");
    let done = finish(child);
    assert_eq!(done.code(), 130, "{}", done.stderr);
    assert!(
        done.stdout.contains("Partial: interrupted."),
        "{}",
        done.stdout
    );
    assert!(done.stdout.contains("boot: not begun."), "{}", done.stdout);
    let records = samples(out.path());
    let end = records.last().expect("the end");
    assert_eq!(end["kind"], "end");
    assert_eq!(end["partial"], "interrupted");
    let page = fs::read_to_string(out.path().join("report.html")).expect("the page");
    assert!(page.contains("Partial: interrupted."));
    // The same from the samples alone.
    let again = run(&["report", &text(out.path())]).ok();
    assert!(again.stdout.contains("report.html"), "{}", again.stdout);
}

fn an_interrupt_does_not_wait_for_a_guest_and_leaves_nothing() {
    let (out, temp) = (
        tempfile::tempdir().expect("a directory"),
        tempfile::tempdir().expect("a directory"),
    );
    let child = bench(&["--out", &text(out.path()), "boot"])
        .env("TMPDIR", temp.path())
        .spawn()
        .expect("ratoon-bench can be started");
    let from = Instant::now();
    let boots = || {
        let machines = fs::read_dir(temp.path()).expect("a directory").flatten();
        let mut sockets = machines.map(|machine| machine.path().join("control"));
        sockets.any(|socket| socket.exists())
    };
    // From here on it takes seconds more where guest kernels are emulated.
    while !boots() {
        assert!(from.elapsed() < PATIENCE, "no guest boots");
        std::thread::sleep(Duration::from_millis(20));
    }
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("a signal");
    let from = Instant::now();
    let done = finish(child);
    let took = from.elapsed();
    assert_eq!(done.code(), 130, "{}", done.stderr);
    // It is a fraction of a second; the rest is for a host with much else to do.
    assert!(took < Duration::from_secs(5), "{took:?}");
    assert!(
        done.stdout.contains("boot: interrupted."),
        "{}",
        done.stdout
    );
    let left: Vec<_> = fs::read_dir(temp.path()).expect("a directory").collect();
    assert!(left.is_empty(), "{left:?}");
}

fn a_full_disk_ends_the_run_with_the_samples_so_far_as_root() {
    let dir = tempfile::tempdir().expect("a directory");
    let small = dir.path();
    let status = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=16k", "none"])
        .arg(small)
        .status();
    assert!(status.expect("mount").success(), "a small tmpfs");
    let done = run(&["--runs", "500", "--out", &text(small), "start"]);
    let kept = count(small);
    let status = Command::new("umount").arg(small).status();
    assert!(status.expect("umount").success());
    assert_eq!(done.code(), 1, "{}", done.stderr);
    assert!(done.stderr.contains("No space left"), "{}", done.stderr);
    assert!(done.stderr.contains("samples.jsonl"), "{}", done.stderr);
    assert!(kept > 10, "{kept} samples");
    assert!(
        done.stdout.contains("samples could not be written"),
        "{}",
        done.stdout
    );
}

fn samples_that_are_none_are_refused_by_name() {
    let dir = tempfile::tempdir().expect("a directory");
    let garbage = dir.path().join("garbage.jsonl");
    fs::write(&garbage, b"\x7fELF not samples\n").expect("written");
    let empty = dir.path().join("empty.jsonl");
    fs::write(&empty, b"").expect("written");
    let (garbage, empty) = (text(&garbage), text(&empty));
    for args in [&["compare", &garbage, &garbage][..], &["report", &garbage]] {
        let done = run(args);
        assert_eq!(done.code(), 1);
        assert!(done.stderr.contains(&garbage), "{}", done.stderr);
        assert!(done.stderr.contains("line 1"), "{}", done.stderr);
    }
    let done = run(&["report", &empty]);
    assert_eq!(done.code(), 1);
    assert!(done.stderr.contains("is empty"), "{}", done.stderr);
    let done = run(&["compare", &empty, "/no/such/run"]);
    assert_eq!(done.code(), 1);
}

fn a_baseline_that_is_none_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let baseline = dir.path().join("baseline.json");
    fs::write(&baseline, b"[]").expect("written");
    let done = run(&["gate", "--baseline", &text(&baseline)]);
    assert_eq!(done.code(), 1);
    assert!(done.stderr.contains("not a baseline"), "{}", done.stderr);
    let done = run(&["gate", "--baseline", "/no/such/file"]);
    assert!(done.stderr.contains("--baseline"), "{}", done.stderr);
}

fn the_harness_is_a_command_of_ours() {
    let ratoon = |envs: &[(&str, &str)]| {
        let ratoon = Command::new(program("ratoon"))
            .args(["bench", "--help"])
            .envs(envs.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        finish(ratoon.expect("ratoon can be started"))
    };
    let done = ratoon(&[]).ok();
    assert!(
        done.stdout.contains("ratoon bench --quick"),
        "{}",
        done.stdout
    );
    let done = ratoon(&[("RATOON_BENCH", "/no/such/ratoon-bench")]);
    assert_eq!(done.code(), 125);
    assert!(
        done.stderr.contains("/no/such/ratoon-bench"),
        "{}",
        done.stderr
    );
    assert!(
        done.stderr.contains("cargo build --release"),
        "{}",
        done.stderr
    );
}

fn without_kvm_the_harness_says_how_to_mend_it_as_root() {
    let dir = tempfile::tempdir().expect("a directory");
    // A /dev without kvm, in a mount namespace of the program's own.
    let script = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && exec \"$0\" \"$@\"";
    let child = Command::new("unshare")
        .args(["--mount", "sh", "-c", script])
        .arg(program("ratoon-bench"))
        .args(["--out", &text(dir.path()), "start"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let done = finish(child.expect("unshare can be started"));
    assert_eq!(done.code(), 1, "{}", done.stderr);
    assert!(done.stderr.contains("/dev/kvm"), "{}", done.stderr);
    assert!(done.stderr.contains("ratoon doctor"), "{}", done.stderr);
    assert!(!dir.path().join("samples.jsonl").exists());
}
