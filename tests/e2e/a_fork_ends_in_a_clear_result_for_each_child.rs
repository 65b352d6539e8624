//! Whatever goes wrong in a fork: for each child it is said what became of it, the machine that was forked goes
//! on (unless it is that which was killed), and nothing is left.
//!
//! What there is is counted before and after each.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use ratoon_tests::{Done, PATIENCE, Ratoon, finish, program};
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, setrlimit};
use serde_json::Value;

crate::promises![
    a_fork_during_another_fork_or_a_snapshot_or_a_command_disturbs_nobody,
    a_fork_while_the_disk_is_written_gives_whole_disks,
    a_parent_that_is_killed_in_the_middle_leaves_whole_children_or_none,
    a_child_that_is_killed_or_stuck_before_its_wake_does_not_keep_the_others,
    a_fork_without_descriptors_is_refused,
    a_fork_without_processes_is_told_as_root,
    a_fork_on_a_full_disk_is_told_as_root,
    a_fork_with_no_time_has_no_children,
    a_guest_whose_runtime_is_dead_is_not_forked,
];

const BOX: &str = "box";

/// A machine; counted before and after.
fn with_box(test: impl FnOnce(&Ratoon)) {
    let ratoon = Ratoon::warm();
    let args = ["run", "-d", "--name", BOX, "--memory", "256M"];
    ratoon.run(args).ok();
    exec(
        &ratoon,
        BOX,
        "echo kept > /root/kept; echo kept > /run/kept",
    );
    let before = count(&ratoon);
    test(&ratoon);
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        let after = count(&ratoon);
        if after == before {
            break;
        }
        assert!(Instant::now() < end, "{after:?}, and there were {before:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(exec(&ratoon, BOX, KEPT), "kept\nkept\n");
    rm(&ratoon, &[BOX]);
    ratoon.nothing_is_left();
}

/// What the machine and each child have in memory and on the disk.
const KEPT: &str = "cat /root/kept /run/kept";

fn exec(ratoon: &Ratoon, vm: &str, line: &str) -> String {
    ratoon.run(["exec", vm, "--", "sh", "-c", line]).ok().stdout
}

/// Processes, and files but for the layers in which the machine goes on after each freeze.
fn count(ratoon: &Ratoon) -> (BTreeSet<i32>, BTreeSet<PathBuf>) {
    let mut files = BTreeSet::new();
    let mut todo = vec![ratoon.state_dir().to_owned()];
    while let Some(folder) = todo.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            let name = entry.file_name().to_string_lossy().into_owned();
            let is_layer = name.ends_with(".qcow2") || name == "layers.lock";
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                todo.push(path);
            } else if !is_layer && !path.starts_with(ratoon.state_dir().join("ratoon/snapshots")) {
                files.insert(path);
            }
        }
    }
    (ratoon.processes().into_iter().collect(), files)
}

fn rm(ratoon: &Ratoon, vms: &[&str]) {
    ratoon.run(["rm", "-f"].iter().chain(vms)).ok();
}

/// Everybody who can be asked has what the machine had.
fn are_whole(ratoon: &Ratoon, vms: &[&str]) {
    for vm in vms {
        assert_eq!(exec(ratoon, vm, KEPT), "kept\nkept\n", "{vm}");
    }
}

fn said(done: &Done, words: &[&str]) {
    for word in words {
        assert!(done.stderr.contains(word), "no {word:?}: {done:?}");
    }
    assert!(!done.stderr.contains("panicked"), "{done:?}");
}

fn a_fork_during_another_fork_or_a_snapshot_or_a_command_disturbs_nobody() {
    with_box(|ratoon| {
        let start = |words: &str| {
            let command = ratoon.command(words.split(' ')).spawn();
            command.expect("ratoon starts")
        };
        exec(ratoon, BOX, "mkfifo /run/enough");
        let wait = "read word < /run/enough; echo went $word";
        let at_work = ["exec", BOX, "--", "sh", "-c", wait];
        let at_work = ratoon.command(at_work).spawn().expect("ratoon starts");
        let (one, other) = (start("fork box -n 2 --name a"), start("fork box --name b"));
        let snapshot = start("snapshot box meanwhile");
        assert_eq!(finish(one).ok().stdout, "a-0\na-1\n");
        assert_eq!(finish(other).ok().stdout, "b-0\n");
        finish(snapshot).ok();
        are_whole(ratoon, &["a-0", "a-1", "b-0"]);
        exec(ratoon, BOX, "echo on > /run/enough");
        assert_eq!(finish(at_work).ok().stdout, "went on\n");
        ratoon.run(["snapshots", "verify", "meanwhile"]).ok();
        rm(ratoon, &["a-0", "a-1", "b-0"]);
        ratoon.run(["snapshots", "rm", "meanwhile"]).ok();
    });
}

/// Writes whole files, each with its own sum, until it is told that it is enough. In the interpreter: a process
/// would cost a second where the guest is emulated.
const WRITER: &str = r#"
import hashlib, os, threading, time
enough, rounds = False, 0
def write():
    global rounds
    while not enough:
        data = os.urandom(1 << 18)
        with open("/root/new", "wb") as new:
            new.write(hashlib.sha256(data).digest() + data)
            new.flush()
            os.fsync(new.fileno())
        os.rename("/root/new", "/root/written")
        rounds += 1
writer = threading.Thread(target=write)
writer.start()
while not rounds: time.sleep(0.05)
"#;
const WRITTEN: &str = r#"
enough = True
writer.join()
with open("/root/written", "rb") as file:
    os.fsync(file.fileno())
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    data = file.read()
os.sync()
print(rounds > 0 and hashlib.sha256(data[32:]).digest() == data[:32])
"#;

fn a_fork_while_the_disk_is_written_gives_whole_disks() {
    with_box(|ratoon| {
        ratoon.run(["code", BOX, "-c", WRITER]).ok();
        let is_whole = |vm: &str| {
            let said = ratoon.run(["code", vm, "-c", WRITTEN]).ok().stdout;
            assert_eq!(said, "True\n", "{vm}");
        };
        // Each of them writes on until it is told: not all at once.
        ratoon.run(["fork", BOX, "--name", "x"]).ok();
        is_whole("x-0");
        ratoon.run(["fork", BOX, "-n", "2", "--name", "y"]).ok();
        for vm in ["y-0", "y-1", BOX] {
            is_whole(vm);
        }
        are_whole(ratoon, &["x-0", "y-1"]);
        rm(ratoon, &["x-0", "y-0", "y-1"]);
    });
}

/// Its process, when it has one.
fn pid(ratoon: &Ratoon, name: &str) -> Option<i32> {
    let shown = ratoon.run(["ps", "-a", "--json"]).ok().stdout;
    let shown: Value = serde_json::from_str(&shown).expect("JSON");
    let this = shown.as_array()?.iter().find(|one| one["name"] == name)?;
    this["pid"].as_i64().map(|pid| pid as i32)
}

fn kill(pid: i32) {
    let pid = Pid::from_raw(pid).expect("a pid");
    kill_process(pid, Signal::KILL).expect("it lives");
}

fn a_parent_that_is_killed_in_the_middle_leaves_whole_children_or_none() {
    with_box(|ratoon| {
        for delay_ms in [0, 300] {
            ratoon.run(["fork", BOX, "--name", "victim"]).ok();
            let victim = pid(ratoon, "victim-0").expect("it runs");
            let args = ["fork", "victim-0", "-n", "2", "--name", "kid"];
            let fork = ratoon.command(args).spawn().expect("ratoon starts");
            std::thread::sleep(Duration::from_millis(delay_ms));
            kill(victim);
            let done = finish(fork);
            let listed = ratoon.run(["ps"]).ok().stdout;
            for kid in ["kid-0", "kid-1"] {
                match done.stdout.lines().any(|line| line == kid) {
                    true => are_whole(ratoon, &[kid]),
                    false => assert!(
                        !listed.contains(kid),
                        "{kid} was not told: {listed} {done:?}"
                    ),
                }
            }
            // Who is missing is told, or that nobody was forked.
            said(&done, &[]);
            let is_told = done.stdout.lines().count() == 2 || !done.stderr.is_empty();
            assert!(is_told, "{done:?}");
            let mut all = vec!["victim-0"];
            all.extend(done.stdout.lines());
            rm(ratoon, &all);
        }
    });
}

/// A `ratoon` whose VMM is `script`, run with the program of the VMM as `$vmm`. It runs as it is when `mkdir` has
/// made `turn`: for one process alone.
fn with_vmm(ratoon: &Ratoon, script: &str, args: &[&str]) -> Done {
    let folder = tempfile::tempdir().expect("a folder");
    let (path, turn) = (folder.path().join("vmm"), folder.path().join("turn"));
    let text = format!(
        "#!/bin/sh\nPATH=/usr/bin:/bin\nvmm={}\nturn={}\n{script}\nexec $vmm \"$@\"\n",
        program("ratoon-vmm").display(),
        turn.display()
    );
    std::fs::write(&path, text).expect("a script");
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).expect("it is ours");
    finish(
        ratoon
            .command(args)
            .env("RATOON_VMM", &path)
            .spawn()
            .expect("ratoon starts"),
    )
}

fn a_child_that_is_killed_or_stuck_before_its_wake_does_not_keep_the_others() {
    with_box(|ratoon| {
        // Each is told by its number: two are there, one is not.
        let check = |done: &Done, why: &str| {
            assert_eq!(done.code(), 125, "{done:?}");
            let there: Vec<_> = done.stdout.lines().collect();
            assert_eq!(there.len(), 2, "{done:?}");
            let missing = (0..3).find(|index| !there.contains(&format!("kid-{index}").as_str()));
            let missing = missing.expect("one of three");
            said(done, &[&format!("child {missing}: "), why]);
            are_whole(ratoon, &there);
            rm(ratoon, &there);
        };
        let args = ["fork", BOX, "-n", "3", "--name", "kid"];
        // A shell that is dead is passed over: the process in its place dies too.
        let dead = "mkdir $turn 2>/dev/null && kill -9 $$\n[ \"$1\" = --owned ] && kill -9 $$";
        let killed = with_vmm(ratoon, dead, &args);
        check(&killed, "the VM ended before the runtime in it answered");
        // One that has what it needs, and stands still.
        let stuck = "if mkdir $turn 2>/dev/null; then kill -STOP $$; fi";
        let late = [&args[..], &["--deadline", "15s"]].concat();
        check(
            &with_vmm(ratoon, stuck, &late),
            "it was not ready within 15000 ms",
        );
    });
}

fn a_fork_without_descriptors_is_refused() {
    with_box(|ratoon| {
        let mut command = ratoon.command(["fork", BOX, "-n", "100"]);
        // SAFETY: one system call that is safe between fork and exec.
        unsafe {
            command.pre_exec(|| {
                let limit = Rlimit {
                    current: Some(256),
                    maximum: Some(512),
                };
                Ok(setrlimit(Resource::Nofile, limit)?)
            });
        }
        let done = finish(command.spawn().expect("ratoon starts"));
        assert_eq!(done.code(), 125, "{done:?}");
        said(
            &done,
            &["100 children take 928 descriptors", "512", "ulimit -n"],
        );
    });
}

/// A control group for `most` processes and threads, removed at the end.
struct Pids(PathBuf);

impl Pids {
    fn new(most: u32) -> Self {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("mounts");
        let point = mounts.lines().find_map(|line| {
            let (head, tail) = line.split_once(" - ")?;
            let is_first = tail.starts_with("cgroup ")
                && tail.rsplit(' ').next()?.split(',').any(|it| it == "pids");
            let is_second = tail.starts_with("cgroup2 ");
            let point = PathBuf::from(head.split(' ').nth(4)?);
            let has = || std::fs::read_to_string(point.join("cgroup.controllers"));
            let has = is_second && has().is_ok_and(|list| list.contains("pids"));
            (is_first || has).then_some(point)
        });
        let point = point.expect("control groups that limit processes, version 1 or 2");
        let group = point.join(format!("ratoon-test-{}", std::process::id()));
        // Version 2 hands the controller on when it is told to; version 1 has no such file.
        let hand_on = point.join("cgroup.subtree_control");
        if hand_on.exists() {
            std::fs::write(hand_on, "+pids").expect("root may");
        }
        std::fs::create_dir(&group).expect("root may make a group");
        std::fs::write(group.join("pids.max"), most.to_string()).expect("it has the controller");
        Self(group)
    }

    /// The command and all that it starts are in it.
    fn run(&self, mut command: Command) -> Done {
        let procs = self.0.join("cgroup.procs");
        // SAFETY: a write to a path that was made before; no lock is taken.
        unsafe {
            command.pre_exec(move || std::fs::write(&procs, "0"));
        }
        finish(command.spawn().expect("ratoon starts"))
    }
}

impl Drop for Pids {
    fn drop(&mut self) {
        let end = Instant::now() + PATIENCE;
        // Refused while there is anybody in it.
        while std::fs::remove_dir(&self.0).is_err() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn a_fork_without_processes_is_told_as_root() {
    with_box(|ratoon| {
        // From not even a thread of its own to not enough for all children.
        for most in [1, 2, 4, 8, 12] {
            let pids = Pids::new(most);
            let done = pids.run(ratoon.command(["fork", BOX, "-n", "4", "--name", "kid"]));
            assert_eq!(done.code(), 125, "{most}: {done:?}");
            let there: Vec<_> = done.stdout.lines().collect();
            let told = (0..4).filter(|index| {
                let is_there = there.contains(&format!("kid-{index}").as_str());
                is_there || done.stderr.contains(&format!("child {index}: "))
            });
            if !done.stderr.starts_with("error: ") {
                assert_eq!(told.count(), 4, "{most}: {done:?}");
            }
            said(&done, &["Resource temporarily unavailable"]);
            if !there.is_empty() {
                are_whole(ratoon, &there);
                rm(ratoon, &there);
            }
            assert_eq!(exec(ratoon, BOX, KEPT), "kept\nkept\n");
        }
    });
}

fn a_fork_with_no_time_has_no_children() {
    with_box(|ratoon| {
        let done = ratoon.run(["fork", BOX, "-n", "2", "--deadline", "0ms"]);
        assert_eq!(done.code(), 125, "{done:?}");
        assert_eq!(done.stdout, "");
        for child in 0..2 {
            said(
                &done,
                &[&format!("child {child}: it was not ready within 0 ms")],
            );
        }
    });
}

fn a_guest_whose_runtime_is_dead_is_not_forked() {
    with_box(|ratoon| {
        ratoon.run(["fork", BOX, "--name", "dead"]).ok();
        // Nothing can kill a runtime, and be it root; but it can be made to stand still.
        let still = "mkdir /sys/fs/cgroup/still; echo 1 > /sys/fs/cgroup/still/cgroup.procs; \
                     (sleep 1; echo 1 > /sys/fs/cgroup/still/cgroup.freeze) > /dev/null 2>&1 &";
        exec(ratoon, "dead-0", still);
        std::thread::sleep(Duration::from_secs(3));
        let done = ratoon.run(["fork", "dead-0", "-n", "2"]);
        assert_eq!(done.code(), 125, "{done:?}");
        said(&done, &["the runtime in the VM"]);
        rm(ratoon, &["dead-0"]);
    });
}

/// The state directory on a disk of a few MiB, mounted for this thread and its children alone.
fn a_fork_on_a_full_disk_is_told_as_root() {
    use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
    let checks = std::thread::spawn(|| {
        // SAFETY: only the mount namespace, and only of this thread, which ends with the test.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }
            .expect("root has a mount namespace of its own");
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private).expect("mounts of its own");
        let ratoon = Ratoon::warm();
        let small = Some(c"size=24m,mode=0700");
        mount(
            "tmpfs",
            ratoon.state_dir(),
            "tmpfs",
            MountFlags::empty(),
            small,
        )
        .expect("a small disk");
        let args = ["run", "-d", "--name", BOX, "--memory", "256M"];
        ratoon.run(args).ok();
        exec(&ratoon, BOX, "sync; echo kept > /run/kept");
        let before = count(&ratoon);
        let filler = ratoon.state_dir().join("filler");
        // Not a byte, and enough for some of the files that a child takes.
        for left in [0, 16 << 10, 600 << 10] {
            let full = std::fs::write(&filler, vec![1; 32 << 20]).expect_err("it is too much");
            assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
            let len = std::fs::metadata(&filler).expect("it is there").len();
            let file = std::fs::File::options()
                .write(true)
                .open(&filler)
                .expect("it is ours");
            file.set_len(len.saturating_sub(left)).expect("less");
            let done = ratoon.run(["fork", BOX, "-n", "4", "--name", "kid"]);
            assert_eq!(done.code(), 125, "{left} bytes are left: {done:?}");
            said(&done, &["No space left on device"]);
            std::fs::remove_file(&filler).expect("it can be removed");
            let there: Vec<_> = done.stdout.lines().collect();
            if !there.is_empty() {
                rm(&ratoon, &there);
            }
            assert_eq!(exec(&ratoon, BOX, "cat /run/kept"), "kept\n");
            assert_eq!(count(&ratoon), before, "{left} bytes were left");
        }
        ratoon.run(["fork", BOX, "--name", "kid"]).ok();
        assert_eq!(exec(&ratoon, "kid-0", "cat /run/kept"), "kept\n");
        rm(&ratoon, &[BOX, "kid-0"]);
        ratoon.nothing_is_left();
        rustix::mount::unmount(ratoon.state_dir(), rustix::mount::UnmountFlags::DETACH)
            .expect("it is mounted");
    });
    checks.join().expect("the checks hold");
}
