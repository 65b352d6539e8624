//! Snapshots: a machine goes on from one as often as wanted, each time as somebody else.

use std::os::unix::fs::FileExt;
use std::time::{SystemTime, UNIX_EPOCH};

use ratoon_tests::Ratoon;

crate::promises![
    a_restored_machine_has_its_memory_its_processes_and_its_disk,
    a_clone_is_somebody_else_with_the_right_time,
    a_snapshot_that_is_not_there_is_named,
    an_image_that_was_booted_once_is_not_booted_again,
];

fn exec(ratoon: &Ratoon, vm: &str, line: &str) -> String {
    ratoon.run(["exec", vm, "--", "sh", "-c", line]).ok().stdout
}

fn code(ratoon: &Ratoon, vm: &str, line: &str) -> String {
    ratoon.run(["code", vm, "-c", line]).ok().stdout
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.expect("a time after 1970").as_secs()
}

/// What two machines must not share: machine-id and the kernel's random numbers.
fn secrets(ratoon: &Ratoon, vm: &str) -> Vec<String> {
    let all = exec(
        ratoon,
        vm,
        "cat /etc/machine-id /proc/sys/kernel/random/uuid",
    );
    all.lines().map(str::to_owned).collect()
}

fn a_restored_machine_has_its_memory_its_processes_and_its_disk() {
    let ratoon = Ratoon::warm();
    ratoon
        .run(["run", "-d", "--name", "first", "--memory", "256M"])
        .ok();
    exec(&ratoon, "first", "echo kept > /root/file; sync");
    exec(&ratoon, "first", "sleep 54321 >/dev/null 2>&1 &");
    code(&ratoon, "first", "x = 41");
    ratoon.run(["snapshot", "first", "point"]).ok();
    exec(&ratoon, "first", "echo of first > /root/file");

    ratoon.run(["restore", "point", "--name", "second"]).ok();
    ratoon.run(["restore", "point", "--name", "third"]).ok();
    for vm in ["second", "third"] {
        assert_eq!(exec(&ratoon, vm, "cat /root/file"), "kept\n", "{vm}");
        assert!(
            !exec(&ratoon, vm, "pgrep -f 'sleep 5432[1]'").is_empty(),
            "{vm}"
        );
        assert_eq!(code(&ratoon, vm, "print(x + 1)"), "42\n", "{vm}");
    }
    exec(&ratoon, "second", "echo of second > /root/file");
    assert_eq!(exec(&ratoon, "third", "cat /root/file"), "kept\n");
    assert_eq!(exec(&ratoon, "first", "cat /root/file"), "of first\n");

    let all: Vec<_> = ["first", "second", "third"]
        .iter()
        .flat_map(|vm| secrets(&ratoon, vm))
        .collect();
    let mut distinct = all.clone();
    distinct.sort();
    distinct.dedup();
    assert_eq!(distinct.len(), all.len(), "{all:?}");
    let before = now();
    let guest = exec(&ratoon, "third", "date +%s");
    let guest: u64 = guest.trim().parse().expect("seconds");
    let after = now();
    assert!(
        (before - 2..=after + 2).contains(&guest),
        "{before} {guest} {after}"
    );

    ratoon.run(["suspend", "second", "later"]).ok();
    assert!(!ratoon.run(["ps", "-a"]).ok().stdout.contains("second"));
    let said = ratoon.run(["run", "--snapshot", "later", "--", "cat", "/root/file"]);
    assert_eq!(said.ok().stdout, "of second\n");

    ratoon.run(["snapshots", "verify", "later"]).ok();
    let folder = ratoon.state_dir().join("ratoon/snapshots");
    let id = std::fs::read_to_string(folder.join("names/later")).expect("its name");
    let memory = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(folder.join(id.trim()).join("memory.bin"))
        .expect("its memory");
    let at = rustix::fs::seek(&memory, rustix::fs::SeekFrom::Data(0)).expect("some memory");
    let mut byte = [0];
    memory.read_exact_at(&mut byte, at + 100).expect("a byte");
    memory
        .write_all_at(&[byte[0] ^ 1], at + 100)
        .expect("another byte");
    let refused = ratoon.run(["snapshots", "verify", "later"]);
    assert_eq!(refused.code(), 125, "{refused:?}");
    assert!(refused.stderr.contains("memory.bin"), "{}", refused.stderr);

    let refused = ratoon.run(["snapshots", "rm", "point"]).stderr;
    assert!(refused.contains("is needed by later"), "{refused}");
    ratoon.run(["snapshots", "rm", "later"]).ok();
    let refused = ratoon.run(["snapshots", "rm", "point"]).stderr;
    assert!(refused.contains("is in use"), "{refused}");
    ratoon.run(["rm", "-f", "first", "third"]).ok();
    ratoon.run(["snapshots", "rm", "point"]).ok();
    ratoon.nothing_is_left();
}

/// What `ratoon-vmm` has counted for a VM, by name.
fn counter(ratoon: &Ratoon, vm: &str, name: &str) -> u64 {
    let list = ratoon.run(["ps", "--json"]).ok().stdout;
    let list: serde_json::Value = serde_json::from_str(&list).expect("JSON");
    let vms = list.as_array().expect("a list").iter();
    let found = vms
        .clone()
        .find(|info| info["name"] == vm)
        .expect("it runs");
    let id = found["id"].as_str().expect("an id");
    let socket = ratoon.vms_dir().join(id).join("control.sock");
    let control = ratoon_engine::vm::control::Control::new(socket, ratoon_tests::PATIENCE);
    let metrics = control.metrics().expect("metrics");
    metrics.devices[name]
}

fn a_clone_is_somebody_else_with_the_right_time() {
    let ratoon = Ratoon::warm();
    ratoon
        .run(["run", "-d", "--name", "parent", "--memory", "256M"])
        .ok();
    // As a snapshot that is restored a month later.
    const MONTH: u64 = 30 * 24 * 3600;
    let past = now() - MONTH;
    exec(&ratoon, "parent", &format!("date -s @{past}"));
    code(&ratoon, "parent", "import random");
    ratoon.run(["snapshot", "parent", "month"]).ok();
    // Its own clock never stopped, so nobody sets it.
    let own: u64 = exec(&ratoon, "parent", "date +%s")
        .trim()
        .parse()
        .expect("seconds");
    assert!((past..=past + 900).contains(&own), "{past} {own}");

    let mut seen = Vec::new();
    for vm in ["child-a", "child-b"] {
        let before = now();
        ratoon.run(["restore", "month", "--name", vm]).ok();
        // The connection over which it was frozen was joined, none was made, none was lost.
        assert_eq!(counter(&ratoon, vm, "vsock.control_lost"), 0);
        assert_eq!(counter(&ratoon, vm, "vsock.connections"), 1);
        let time: u64 = exec(&ratoon, vm, "date +%s")
            .trim()
            .parse()
            .expect("seconds");
        assert!(
            (before - 1..=now() + 1).contains(&time),
            "{vm}: {before} {time}"
        );
        let names = exec(
            &ratoon,
            vm,
            "hostname; cat /etc/hostname; getent hosts $(hostname) | wc -l",
        );
        assert_eq!(names, format!("{vm}\n{vm}\n1\n"));
        let line = "cat /etc/machine-id /run/ratoon/id /proc/sys/kernel/random/uuid; \
                    head -c 16 /dev/urandom | od -An -tx1";
        seen.extend(exec(&ratoon, vm, line).lines().map(str::to_owned));
        seen.push(code(&ratoon, vm, "print(random.random())"));
    }
    let mut distinct = seen.clone();
    distinct.sort();
    distinct.dedup();
    assert_eq!((distinct.len(), seen.len()), (10, 10), "{seen:?}");

    // A child is frozen over a connection of its own, and wakes again.
    ratoon.run(["snapshot", "child-a", "next"]).ok();
    ratoon
        .run(["rm", "-f", "parent", "child-a", "child-b"])
        .ok();
    ratoon.run(["restore", "next", "--name", "grandchild"]).ok();
    assert_eq!(counter(&ratoon, "grandchild", "vsock.connections"), 1);
    let words = "cat /etc/machine-id /run/ratoon/wakes";
    let words = exec(&ratoon, "grandchild", words);
    assert!(!seen.iter().any(|old| words.starts_with(old)), "{words}");
    ratoon.run(["rm", "-f", "grandchild"]).ok();
    ratoon.run(["snapshots", "rm", "month", "next"]).ok();
    ratoon.nothing_is_left();
}

fn a_snapshot_that_is_not_there_is_named() {
    let ratoon = Ratoon::new();
    for args in [
        &["restore", "nope"][..],
        &["run", "--snapshot", "nope", "--", "true"],
        &["snapshots", "verify", "nope"],
        &["snapshots", "rm", "nope"],
    ] {
        let refused = ratoon.run(args.iter().copied());
        assert_eq!(refused.code(), 125, "{args:?}");
        assert!(
            refused.stderr.contains("no snapshot `nope`"),
            "{}",
            refused.stderr
        );
    }
    ratoon.nothing_is_left();
}

fn an_image_that_was_booted_once_is_not_booted_again() {
    let ratoon = Ratoon::new();
    let generation = [
        "--",
        "sh",
        "-c",
        "cat /run/ratoon/generation || echo booted",
    ];
    let run = |flags: &[&str]| {
        let args = ["run"].iter().chain(flags).chain(&generation);
        ratoon.run(args.copied()).ok().stdout
    };
    let first = run(&[]);
    let second = run(&[]);
    assert!(!second.contains("booted"), "{second}");
    // The first one may have made it, or found it.
    assert!(!first.contains("booted"), "{first}");
    assert!(run(&["--cold"]).contains("booted"));
    ratoon.nothing_is_left();
}
