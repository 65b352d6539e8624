//! `ratoon-bench` leaves what others need to check its figures: every sample, and a summary made of them; and
//! says n/a, with its words, of a peer that failed.

use std::path::Path;
use std::process::{Command, Stdio};

use ratoon_tests::{Done, finish, program};
use serde_json::Value;

crate::promises!(
    a_quick_run_writes_every_sample_with_its_phases_and_a_summary,
    a_peer_that_crashes_is_not_available_with_its_last_words_and_ours_is_measured,
);

fn bench(out: &Path, args: &[&str]) -> Done {
    let bench = Command::new(program("ratoon-bench"))
        .args(["--quick", "--runs", "1", "--out"])
        .arg(out)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("ratoon-bench can be started");
    finish(bench)
}

fn records(out: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(out.join("samples.jsonl")).expect("samples.jsonl");
    let parse = |line| serde_json::from_str(line).expect("a line is JSON");
    text.lines().map(parse).collect()
}

/// The values of one series.
fn values(records: &[Value], system: &str, metric: &str) -> Vec<f64> {
    let of = |record: &&Value| record["system"] == system && record["metric"] == metric;
    let value = |record: &Value| record["value"].as_f64().expect("a number");
    let samples = records.iter().filter(|record| record["kind"] == "sample");
    samples.filter(of).map(value).collect()
}

fn a_quick_run_writes_every_sample_with_its_phases_and_a_summary() {
    let out = tempfile::tempdir().expect("a directory");
    bench(out.path(), &["start"]).ok();
    let records = records(out.path());
    assert_eq!(records[0]["kind"], "run");
    let last = records.last().expect("the end");
    assert_eq!(last["kind"], "end");
    assert!(last["partial"].is_null(), "{last}");
    let whole = values(&records, "ratoon", "spawn to first instruction");
    assert_eq!(whole.len(), 1);
    let phases = [
        "spawn",
        "configuration",
        "memory",
        "KVM",
        "vCPUs",
        "kernel or state loaded",
        "devices",
        "first guest instruction",
    ];
    let sum: f64 = phases
        .iter()
        .map(|phase| {
            let values = values(&records, "ratoon", &format!("phase: {phase}"));
            assert_eq!(values.len(), 1, "{phase}");
            values[0]
        })
        .sum();
    assert!((sum - whole[0]).abs() < 0.001, "{sum} of {}", whole[0]);
    let summary = std::fs::read_to_string(out.path().join("summary.md")).expect("summary.md");
    assert!(summary.contains("spawn to first instruction"), "{summary}");
}

fn a_peer_that_crashes_is_not_available_with_its_last_words_and_ours_is_measured() {
    let out = tempfile::tempdir().expect("a directory");
    let peer = out.path().join("peer");
    // Written by another process: while one of ours that is being started has it open, it cannot be executed.
    let text = r"printf '#!/bin/sh\necho cannot map that >&2\nexit 9\n' > peer; chmod 755 peer";
    let written = Command::new("sh")
        .args(["-c", text])
        .current_dir(out.path())
        .status();
    assert!(written.expect("sh").success());
    let path = peer.to_str().expect("a path in UTF-8");
    let [fire, qemu] = ["firecracker", "qemu"].map(|name| format!("{name}={path}"));
    bench(out.path(), &["--peer", &fire, "--peer", &qemu, "boot"]).ok();
    let records = records(out.path());
    assert_eq!(values(&records, "ratoon", "spawn to HELLO").len(), 1);
    for system in ["firecracker", "qemu-microvm"] {
        assert!(values(&records, system, "spawn to the console's ready line").is_empty());
        let missing = records
            .iter()
            .find(|record| record["kind"] == "missing" && record["system"] == system)
            .expect("it is told");
        let why = missing["why"].as_str().expect("why");
        assert!(why.contains("exit status: 9"), "{why}");
        assert!(why.contains("cannot map that"), "{why}");
    }
}
