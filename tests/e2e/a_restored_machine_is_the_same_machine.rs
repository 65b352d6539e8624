//! A witness in the guest: every byte of memory and disk, and a program in the middle of its work,
//! are after a restore what they were, although the process that ran the machine is dead.

use std::time::{SystemTime, UNIX_EPOCH};

use ratoon_tests::Ratoon;
use serde_json::Value;

crate::promises![every_byte_and_the_program_are_as_they_were];

const WITNESS: &str = include_str!("witness.py");
/// How much of the guest's 256 MiB the witness fills.
const MEBIBYTES: u32 = 24;

fn exec(ratoon: &Ratoon, vm: &str, line: &str) -> String {
    ratoon.run(["exec", vm, "--", "sh", "-c", line]).ok().stdout
}

fn code(ratoon: &Ratoon, vm: &str, line: &str) -> String {
    ratoon.run(["code", vm, "-c", line]).ok().stdout
}

fn now() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.expect("a time after 1970").as_secs_f64()
}

/// Starts the witness and waits until it has filled everything.
fn begin(ratoon: &Ratoon, vm: &str) {
    let file = ratoon.state_dir().join("witness.py");
    std::fs::write(&file, WITNESS).expect("a file for the witness");
    let path = file.to_str().expect("a path of letters");
    ratoon
        .run(["cp", path, &format!("{vm}:/root/witness.py")])
        .ok();
    let start = format!(
        "cd /root && mkfifo asks answers && (setsid sh -c 'python3 witness.py seed asks answers \
         {MEBIBYTES} 2>errors; cat errors > answers' >/dev/null 2>&1 </dev/null &) ; cat answers"
    );
    assert_eq!(exec(ratoon, vm, &start), "ready");
}

/// Asks the witness.
fn ask(ratoon: &Ratoon, vm: &str) -> Value {
    let line = "echo look > /root/asks; cat /root/answers";
    let before = now();
    let said = exec(ratoon, vm, line);
    let after = now();
    let said: Value = serde_json::from_str(&said).unwrap_or_else(|_| panic!("{vm}: {said}"));
    let found = said["found"].as_object().expect("what it found");
    assert!(found.len() > 8, "{vm}: {said}");
    for (what, good) in found {
        assert_eq!(*good, Value::Bool(true), "{vm}: {what}");
    }
    let time = said["time"].as_f64().expect("its clock");
    assert!((before - 2.0..=after + 2.0).contains(&time), "{vm}: {said}");
    said
}

/// Ends the process of a machine as a crash would.
fn kill(ratoon: &Ratoon, vm: &str) {
    let shown = ratoon.run(["ps", "--json"]).ok().stdout;
    let shown: Value = serde_json::from_str(&shown).expect("JSON");
    let all = shown.as_array().expect("a list");
    let this = all.iter().find(|one| one["name"] == vm);
    let pid = this
        .and_then(|one| one["pid"].as_i64())
        .expect("its process");
    let pid = rustix::process::Pid::from_raw(pid as i32).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("it lives");
}

fn every_byte_and_the_program_are_as_they_were() {
    let ratoon = Ratoon::warm();
    ratoon
        .run(["run", "-d", "--name", "first", "--memory", "256M"])
        .ok();
    begin(&ratoon, "first");
    code(
        &ratoon,
        "first",
        "live = {'list': [1, 2], 'open': open('/etc/hostname')}",
    );
    let first = ask(&ratoon, "first");
    ratoon.run(["snapshot", "first", "plain"]).ok();
    // The same work, a moment later, from memory that a pager fetches.
    let args = ["snapshot", "first", "compressed", "--compress"];
    ratoon.run(args).ok();
    kill(&ratoon, "first");
    ratoon.run(["rm", "-f", "first"]).ok();

    let mut random = vec![first["random"].clone()];
    let mut check = |snapshot: &str, name: &str| {
        ratoon.run(["restore", snapshot, "--name", name]).ok();
        let said = ask(&ratoon, name);
        assert_eq!(said["pid"], first["pid"], "the same program");
        random.push(said["random"].clone());
        let shown = code(
            &ratoon,
            name,
            "live['list'].append(3); print(live['list'], live['open'].closed)",
        );
        assert_eq!(shown, "[1, 2, 3] False\n");
    };
    check("plain", "second");
    check("plain", "third");
    check("compressed", "fifth");
    ratoon.run(["rm", "-f", "fifth"]).ok();
    // What is left of one machine's life is nothing of another's: a child's child, too.
    ratoon.run(["snapshot", "second", "child"]).ok();
    kill(&ratoon, "second");
    ratoon.run(["rm", "-f", "second"]).ok();
    ratoon.run(["restore", "child", "--name", "fourth"]).ok();
    let fourth = ask(&ratoon, "fourth");
    random.push(fourth["random"].clone());
    assert_eq!(
        code(&ratoon, "fourth", "print(live['list'])"),
        "[1, 2, 3]\n"
    );
    for (index, one) in random.iter().enumerate() {
        assert!(!random[..index].contains(one), "{random:?}");
    }
    ratoon.run(["rm", "-f", "third", "fourth"]).ok();
    ratoon
        .run(["snapshots", "rm", "child", "compressed", "plain"])
        .ok();
    ratoon.nothing_is_left();
}
