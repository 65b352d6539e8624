//! Compressed snapshots: machines start at once, their memory comes as they touch it, once for all of
//! them, and never as anything but what it was.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ratoon_tests::{Ratoon, finish};
use rustix::process::{Pid, Signal, kill_process};

crate::promises![
    machines_from_compressed_memory_go_on_where_they_were,
    a_damaged_part_of_memory_ends_the_machine_that_touches_it_and_says_so,
    a_machine_whose_pager_is_killed_or_stopped_ends_and_says_so,
];

/// Numbers in the guest's memory (/run is no disk), and what they add up to.
const FILL: &str = "seq 1 50000 > /run/numbers; sha256sum < /run/numbers";
const SUM: &str = "sha256sum < /run/numbers";

fn exec(ratoon: &Ratoon, vm: &str, line: &str) -> String {
    ratoon.run(["exec", vm, "--", "sh", "-c", line]).ok().stdout
}

/// A machine with numbers in its memory and a compressed snapshot `point` of it; their sum.
fn snapshot(ratoon: &Ratoon) -> String {
    let run = ["run", "-d", "--name", "first", "--memory", "256M"];
    ratoon.run(run).ok();
    exec(ratoon, "first", "sleep 54321 >/dev/null 2>&1 &");
    let sum = exec(ratoon, "first", FILL);
    ratoon
        .run(["snapshot", "first", "point", "--compress"])
        .ok();
    sum
}

fn folder(ratoon: &Ratoon, name: &str) -> PathBuf {
    let store = ratoon.state_dir().join("ratoon/snapshots");
    let id = fs::read_to_string(store.join("names").join(name)).expect("its name");
    store.join(id.trim())
}

fn pagers(ratoon: &Ratoon) -> Vec<i32> {
    let is_pager = |pid: &i32| {
        let exe = fs::read_link(format!("/proc/{pid}/exe"));
        exe.is_ok_and(|exe| exe.ends_with("ratoon-pager"))
    };
    ratoon.processes().into_iter().filter(is_pager).collect()
}

fn sockets(ratoon: &Ratoon) -> usize {
    fs::read_dir(ratoon.state_dir().join("ratoon/pagers"))
        .expect("a pager was there")
        .count()
}

fn machines_from_compressed_memory_go_on_where_they_were() {
    let ratoon = Ratoon::warm();
    let sum = snapshot(&ratoon);
    let folder = folder(&ratoon, "point");
    assert!(folder.join("memory.chunks").exists() && !folder.join("memory.bin").exists());

    for vm in ["second", "third"] {
        ratoon.run(["restore", "point", "--name", vm]).ok();
        assert_eq!(exec(&ratoon, vm, SUM), sum, "{vm}");
    }
    assert_eq!(pagers(&ratoon).len(), 1, "one for all");
    assert!(!exec(&ratoon, "third", "pgrep -f 'sleep 5432[1]'").is_empty());
    exec(&ratoon, "second", "echo of second > /run/numbers");
    assert_eq!(exec(&ratoon, "third", SUM), sum);

    // The first one's first command said what is touched first. A spoiled note costs time alone.
    let note = folder.join("working-set");
    fs::set_permissions(&note, PermissionsExt::from_mode(0o644)).expect("it is there");
    fs::write(&note, "not it").expect("another note");

    // Of memory that was fetched in part, the whole is in a snapshot.
    ratoon.run(["suspend", "third", "plain"]).ok();
    ratoon.run(["snapshots", "verify", "plain"]).ok();
    ratoon.run(["rm", "-f", "first", "second"]).ok();
    let deadline = Instant::now() + Duration::from_secs(60);
    while !pagers(&ratoon).is_empty() {
        assert!(Instant::now() < deadline, "the pager outlives its machines");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(sockets(&ratoon), 0);
    let said = ratoon.run(["run", "--snapshot", "plain", "--", "sh", "-c", SUM]);
    assert_eq!(said.ok().stdout, sum);
    let said = ratoon.run(["run", "--snapshot", "point", "--", "sh", "-c", SUM]);
    assert_eq!(said.ok().stdout, sum);
    ratoon.run(["snapshots", "rm", "plain", "point"]).ok();
    ratoon.nothing_is_left();
    assert_eq!(sockets(&ratoon), 0);
}

fn a_damaged_part_of_memory_ends_the_machine_that_touches_it_and_says_so() {
    let ratoon = Ratoon::warm();
    snapshot(&ratoon);
    ratoon.run(["rm", "-f", "first"]).ok();
    let path = folder(&ratoon, "point").join("memory.chunks");
    fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).expect("it is there");
    let file = fs::OpenOptions::new().read(true).write(true).open(&path);
    let file = file.expect("it can be opened");
    let whole = fs::read(&path).expect("it can be read");
    // A bit in each chunk: no chunk is longer than this.
    for place in (0..whole.len()).step_by(1000) {
        let byte = [whole[place] ^ 0x10];
        file.write_all_at(&byte, place as u64)
            .expect("another byte");
    }
    let refused = ratoon.run(["restore", "point", "--name", "second"]);
    assert_eq!(refused.code(), 125, "{refused:?}");
    for word in ["memory.chunks", "chunk", "is damaged"] {
        assert!(refused.stderr.contains(word), "{word}: {}", refused.stderr);
    }
    ratoon.nothing_is_left();

    file.set_len(whole.len() as u64 / 2)
        .expect("a shorter file");
    let refused = ratoon.run(["restore", "point", "--name", "second"]);
    assert_eq!(refused.code(), 125, "{refused:?}");
    for word in ["memory.chunks", "is damaged: it has"] {
        assert!(refused.stderr.contains(word), "{word}: {}", refused.stderr);
    }
    ratoon.nothing_is_left();

    file.write_all_at(&whole, 0).expect("as it was");
    ratoon
        .run(["run", "--snapshot", "point", "--", "true"])
        .ok();
    ratoon.nothing_is_left();
}

fn a_machine_whose_pager_is_killed_or_stopped_ends_and_says_so() {
    let ratoon = Ratoon::warm();
    snapshot(&ratoon);
    ratoon.run(["restore", "point", "--name", "second"]).ok();
    let keep_busy = |vm: &str| {
        let line = "while true; do sha256sum /usr/bin/* >/dev/null; done";
        let busy = ["exec", vm, "--", "sh", "-c", line];
        ratoon.command(busy).spawn().expect("it can be started")
    };
    let pager = || {
        let [pager] = pagers(&ratoon)[..] else {
            panic!("one pager is wanted");
        };
        Pid::from_raw(pager).expect("a pid")
    };
    let busy = keep_busy("second");
    std::thread::sleep(Duration::from_secs(2));
    kill_process(pager(), Signal::KILL).expect("it can be killed");

    let ended = finish(busy);
    assert_eq!(ended.code(), 125, "{ended:?}");
    assert!(ended.stderr.contains("ratoon-pager"), "{}", ended.stderr);
    let later = ratoon.run(["exec", "second", "--", "true"]);
    assert_eq!(later.code(), 125, "{later:?}");
    assert!(later.stderr.contains("ratoon-pager"), "{}", later.stderr);
    assert_eq!(sockets(&ratoon), 0, "the next command sweeps its socket");

    // The snapshot and the machine that it is of are as they were.
    exec(&ratoon, "first", "true");
    ratoon
        .run(["run", "--snapshot", "point", "--", "true"])
        .ok();

    // One that was stopped is as good as gone; who comes to it now is refused.
    ratoon.run(["restore", "point", "--name", "third"]).ok();
    let pager = pager();
    kill_process(pager, Signal::STOP).expect("it can be stopped");
    let busy = keep_busy("third");
    let refused = ratoon.run(["restore", "point", "--name", "fourth"]);
    let ended = finish(busy);
    kill_process(pager, Signal::CONT).expect("it is there");
    for done in [refused, ended, ratoon.run(["exec", "third", "--", "true"])] {
        assert_eq!(done.code(), 125, "{done:?}");
        for word in ["ratoon-pager", "has said nothing for"] {
            assert!(done.stderr.contains(word), "{word}: {}", done.stderr);
        }
    }
    ratoon.run(["rm", "-f", "first", "second", "third"]).ok();
    ratoon.nothing_is_left();
}
