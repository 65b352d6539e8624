//! The host has back what a guest does not use any more, and snapshots do not hold it.

use std::time::{Duration, Instant};

use ratoon_tests::Ratoon;
use serde_json::Value;

crate::promises![
    a_booted_machine_gives_freed_memory_back,
    a_machine_over_a_generation_gives_freed_memory_back,
];

const MIB: u64 = 1 << 20;

/// Has the guest read some 35 MiB of files, which it keeps in its memory.
const READ: &str = "cd /usr/lib/x86_64-linux-gnu; \
    cat /usr/bin/python3 /usr/bin/perl /usr/bin/git /usr/bin/scalar /usr/bin/git-shell \
    libcrypto.so.3 libperl.so.5.* libgnutls.so.30 libstdc++.so.6 libapt-pkg.so.* libc.so.6 \
    libdb-5.3.so libunistring.so.* > /dev/null";
/// Has it let go of them.
const FORGET: &str = "sync; echo 3 > /proc/sys/vm/drop_caches";

fn json(ratoon: &Ratoon, args: &[&str]) -> Value {
    let done = ratoon.run(args.iter().copied()).ok();
    serde_json::from_str(&done.stdout).expect("JSON")
}

fn exec(ratoon: &Ratoon, line: &str) -> String {
    ratoon
        .run(["exec", "it", "--", "sh", "-c", line])
        .ok()
        .stdout
}

/// What the VMM's process has in memory, the guest's pages among it, in bytes.
fn resident(pid: u64) -> u64 {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("its memory");
    let line = rollup.lines().find_map(|line| line.strip_prefix("Rss:"));
    let word = line.and_then(|line| line.split_whitespace().next());
    word.and_then(|word| word.parse::<u64>().ok())
        .expect("a number")
        << 10
}

fn snapshot(ratoon: &Ratoon, name: &str) -> u64 {
    ratoon.run(["snapshot", "it", name]).ok();
    let shown = json(ratoon, &["snapshots", "inspect", name]);
    shown["disk_bytes"].as_u64().expect("a size")
}

fn freed_memory_goes_back(more: &[&str]) {
    let ratoon = match more {
        [] => Ratoon::warm(),
        _ => Ratoon::new(),
    };
    let args = ["run", "-d", "--name", "it", "--memory", "256M"];
    ratoon.run(args.iter().chain(more)).ok();
    let pid = json(&ratoon, &["ps", "--json"])[0]["pid"]
        .as_u64()
        .expect("a process");
    let sums = exec(&ratoon, "md5sum /usr/bin/git");
    let before = resident(pid);
    exec(&ratoon, READ);
    let full = resident(pid);
    assert!(full > before + 20 * MIB, "{before} {full}");
    exec(&ratoon, FORGET);
    let deadline = Instant::now() + Duration::from_secs(45);
    // A guest gives back whole blocks: what else lies in one keeps it.
    while resident(pid) > full - (full - before) / 2 {
        assert!(Instant::now() < deadline, "{} of {full}", resident(pid));
        std::thread::sleep(Duration::from_millis(200));
    }
    // What is used again is as it should be, here and in who starts from here.
    assert_eq!(exec(&ratoon, "md5sum /usr/bin/git"), sums);
    exec(&ratoon, FORGET);

    // Over a generation, whatever it was before: the snapshot is one.
    snapshot(&ratoon, "small");
    exec(&ratoon, READ);
    let large = snapshot(&ratoon, "large");
    assert!(large > 25 * MIB, "{large}");
    exec(&ratoon, FORGET);
    let deadline = Instant::now() + Duration::from_secs(45);
    let mut names = (0..).map(|number| format!("again-{number}"));
    let last = loop {
        std::thread::sleep(Duration::from_secs(3));
        let name = names.next().expect("there is no last number");
        let size = snapshot(&ratoon, &name);
        if size + 15 * MIB < large {
            break name;
        }
        assert!(Instant::now() < deadline, "{size} of {large}");
    };
    assert_eq!(exec(&ratoon, "md5sum /usr/bin/git"), sums);
    ratoon.run(["rm", "-f", "it"]).ok();
    let restored = ratoon.run([
        "run",
        "--snapshot",
        &last,
        "--",
        "sh",
        "-c",
        "md5sum /usr/bin/git",
    ]);
    assert_eq!(restored.ok().stdout, sums);
    ratoon.nothing_is_left();
}

fn a_booted_machine_gives_freed_memory_back() {
    freed_memory_goes_back(&["--cold"]);
}

fn a_machine_over_a_generation_gives_freed_memory_back() {
    freed_memory_goes_back(&[]);
}
