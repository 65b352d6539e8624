//! `ratoon fork`: one running machine becomes many, each goes on by itself.

use std::collections::BTreeSet;
use std::fs::File;
use std::time::{Duration, Instant};

use ratoon_engine::vm::record::Ancestor;
use ratoon_engine::vm::store::Store;
use ratoon_tests::{PATIENCE, Ratoon, finish};
use serde_json::Value;

use crate::shared;

crate::promises![
    children_go_on_from_one_memory_and_nobody_sees_anothers_writes,
    a_command_runs_in_each_child_and_the_best_one_takes_its_parents_place,
    a_machine_goes_back_in_place,
    a_fork_that_waits_for_its_turn_goes_by_what_the_machine_is_then,
    a_fork_that_cannot_be_is_refused_and_leaves_nothing,
    a_child_over_its_memory_limit_dies_alone_as_root,
    the_example_of_branches_finds_its_answer,
];

fn a_child_over_its_memory_limit_dies_alone_as_root() {
    let ratoon = Ratoon::warm();
    start(&ratoon, "box");
    let groups = groups();
    let args = "fork box -n 2 --name kid --memory-limit 24M --json --keep -- sh -c";
    let mut args: Vec<_> = args.split(' ').collect();
    // A file system in memory: the cheapest way to take much of it.
    args.push("[ $RATOON_CHILD = 0 ] || head -c 40M /dev/zero > /run/much; echo lives");
    let done = ratoon.run(&args);
    let done: Value = serde_json::from_str(&done.stdout).expect("JSON");
    assert_eq!(done["children"][0]["stdout"], "lives\n", "{done}");
    let why = "it took more memory than its limit of 24 MiB";
    let error = done["children"][1]["error"].as_str().expect("an error");
    assert!(error.contains(why), "{done}");
    let listed = ratoon.run(["ps", "-a", "--json"]).ok().stdout;
    assert!(listed.contains(why), "{listed}");
    assert_eq!(exec(&ratoon, "kid-0", "echo on"), "on\n");
    // One that goes back in place has its limit still.
    ratoon.run(["rollback", "kid-0"]).ok();
    assert_eq!(exec(&ratoon, "kid-0", "echo on"), "on\n");
    let line = "head -c 40M /dev/zero > /run/much; echo lives";
    let killed = ratoon.run(["exec", "kid-0", "--", "sh", "-c", line]);
    assert_eq!(killed.stdout, "", "{killed:?}");
    let listed = json(&ratoon, &["ps", "-a", "--json"]);
    let listed = listed.as_array().expect("a list").iter();
    let kid = listed.clone().find(|vm| vm["name"] == "kid-0");
    assert_eq!(kid.expect("its record")["causes"][0], why, "{listed:?}");
    assert_eq!(exec(&ratoon, "box", "echo on"), "on\n");
    ratoon.run(["rm", "-f", "box", "kid-0", "kid-1"]).ok();
    ratoon.nothing_is_left();
    assert_eq!(self::groups(), groups, "control groups are left");
}

/// How many control groups are there under the name of Ratoon.
fn groups() -> usize {
    let mut found = 0;
    let mut todo = vec![std::path::PathBuf::from("/sys/fs/cgroup")];
    while let Some(path) = todo.pop() {
        for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                let path = entry.path();
                found += usize::from(path.to_string_lossy().contains("/ratoon/"));
                todo.push(path);
            }
        }
    }
    found
}

#[path = "../../engine/examples/branches.rs"]
#[allow(dead_code, reason = "its main is the example's")]
mod branches;

fn the_example_of_branches_finds_its_answer() {
    let ratoon = Ratoon::new();
    let engine = ratoon.engine();
    let answer = branches::solve(&engine).expect("an answer");
    assert_eq!(answer, "842");
    ratoon.nothing_is_left();
}

fn start(ratoon: &Ratoon, name: &str) {
    let args = ["run", "-d", "--name", name, "--memory", "256M"];
    ratoon.run(args).ok();
}

fn exec(ratoon: &Ratoon, vm: &str, line: &str) -> String {
    let args = ["exec", vm, "--", "sh", "-c", line];
    ratoon.run(args).ok().stdout
}

fn code(ratoon: &Ratoon, vm: &str, line: &str) -> String {
    ratoon.run(["code", vm, "-c", line]).ok().stdout
}

fn json(ratoon: &Ratoon, args: &[&str]) -> Value {
    let done = ratoon.run(args).ok();
    serde_json::from_str(&done.stdout).expect("JSON")
}

fn children_go_on_from_one_memory_and_nobody_sees_anothers_writes() {
    let ratoon = Ratoon::warm();
    start(&ratoon, "box");
    // Not by a shell: where guests are emulated each `sleep` costs as long as it lasts.
    let program = "import random, threading, time; x = ['old']\n\
        def tick():\n\
        \x20   with open('/root/ticks', 'w') as file:\n\
        \x20       while True: print('tick', file=file, flush=True); time.sleep(1)\n\
        threading.Thread(target=tick, daemon=True).start()";
    code(&ratoon, "box", program);
    exec(&ratoon, "box", "echo old > /root/file");

    let args = "fork box -n 3 --name kid --message hello --label idea=sort";
    let forked = ratoon.run(args.split(' ')).ok();
    assert_eq!(forked.stdout, "kid-0\nkid-1\nkid-2\n");
    let kids = ["kid-0", "kid-1", "kid-2"];
    let mut random = BTreeSet::new();
    for kid in kids {
        let said = code(
            &ratoon,
            kid,
            &format!("x.append('{kid}'); print(x); print(random.random())"),
        );
        let (list, number) = said.split_once('\n').expect("two lines");
        assert_eq!(list, format!("['old', '{kid}']"));
        random.insert(number.to_owned());
        let line = format!(
            "cat /root/file /run/ratoon/index /run/ratoon/message; echo; hostname; \
             echo {kid} > /root/file; echo > /root/of-{kid}; rm -f /etc/motd; \
             cat /proc/sys/kernel/random/uuid /etc/machine-id"
        );
        let said = exec(&ratoon, kid, &line);
        let said: Vec<_> = said.lines().collect();
        let (index, number) = (&kid[4..], said.len());
        assert_eq!(said[0], "old");
        assert_eq!(said[1..number - 3].concat(), format!("{index}hello"));
        assert_eq!(said[number - 3], kid);
        random.extend(said[number - 2..].iter().map(|&line| line.to_owned()));
    }
    assert_eq!(random.len(), 9, "{random:?}");
    // What each wrote is its own, and the machine goes on as if nothing had been.
    for vm in ["box", "kid-0", "kid-1", "kid-2"] {
        let own = if vm == "box" { "old" } else { vm };
        assert_eq!(exec(&ratoon, vm, "cat /root/file"), format!("{own}\n"));
    }
    assert_eq!(code(&ratoon, "box", "print(x)"), "['old']\n");
    let ticks = |vm: &str| -> usize {
        let ticks = exec(&ratoon, vm, "grep -c tick /root/ticks");
        ticks.trim().parse().expect("a number")
    };
    for vm in ["box", "kid-1"] {
        let (before, patience) = (ticks(vm), Instant::now() + Duration::from_secs(60));
        while ticks(vm) == before {
            assert!(Instant::now() < patience, "{vm}: its program stands still");
        }
    }

    let tree = json(&ratoon, &["tree", "box", "--json"]);
    let children = tree[0]["children"].as_array().expect("children");
    let indexes: Vec<_> = children
        .iter()
        .map(|it| (it["parent"]["index"].as_u64(), it["labels"]["idea"].clone()))
        .collect();
    let wanted: Vec<_> = (0..3).map(|index| (Some(index), "sort".into())).collect();
    assert_eq!(indexes, wanted);
    let shown = ratoon.run(["tree"]).ok().stdout;
    assert!(shown.contains("├─ ") && shown.contains("kid-2"), "{shown}");

    let diff = ratoon.run(["diff", "kid-0", "kid-1", "--path", "/root"]);
    let diff = diff.ok().stdout;
    let has = |line: &str| diff.lines().any(|it| it == line);
    assert!(has("M /root/file"), "{diff}");
    assert!(has("- /root/of-kid-0") && has("+ /root/of-kid-1"), "{diff}");

    // Nobody needs the machine that was forked: not even to fork on, or for a snapshot.
    ratoon.run(["rm", "-f", "box"]).ok();
    assert_eq!(exec(&ratoon, "kid-0", "cat /root/file"), "kid-0\n");
    ratoon.run(["fork", "kid-0", "--name", "grandkid"]).ok();
    ratoon.run(["snapshot", "kid-0", "point"]).ok();
    ratoon.run(["rm", "-f", "kid-0"]).ok();
    assert_eq!(
        code(&ratoon, "grandkid-0", "print(x)"),
        "['old', 'kid-0']\n"
    );
    let args = "fork --snapshot point -n 2 --name again";
    ratoon.run(args.split(' ')).ok();
    for vm in ["again-0", "again-1"] {
        assert_eq!(exec(&ratoon, vm, "cat /root/file"), "kid-0\n");
    }
    let all = "rm -f kid-1 kid-2 grandkid-0 again-0 again-1";
    ratoon.run(all.split(' ')).ok();
    ratoon.run(["snapshots", "rm", "point"]).ok();
    ratoon.nothing_is_left();
}

fn a_command_runs_in_each_child_and_the_best_one_takes_its_parents_place() {
    let ratoon = Ratoon::warm();
    start(&ratoon, "box");
    let mut args = vec!["fork", "box", "-n", "3", "--", "sh", "-c"];
    args.push("echo I am $RATOON_CHILD; exit $RATOON_CHILD");
    let done = ratoon.run(&args);
    assert_eq!(done.code(), 1, "that of the first that failed: {done:?}");
    let lines: BTreeSet<_> = done.stdout.lines().collect();
    let wanted = ["[0] I am 0", "[1] I am 1", "[2] I am 2"];
    assert_eq!(lines, BTreeSet::from(wanted), "{done:?}");
    assert!(done.stderr.contains("CHILD"), "{done:?}");
    let id = json(&ratoon, &["ps", "--json"])[0]["id"].clone();
    let listed = ratoon.run(["ps", "-a", "-q"]).ok().stdout;
    assert_eq!(Some(listed.trim_end()), id.as_str(), "children end");

    let args = "fork box -n 2 --name try --json --keep -- sh -c";
    let mut args: Vec<_> = args.split(' ').collect();
    args.push("echo $RATOON_CHILD > /root/result; cat /root/result");
    let done = json(&ratoon, &args);
    let outputs: Vec<_> = (0..2)
        .map(|child| done["children"][child]["stdout"].clone())
        .collect();
    assert_eq!(outputs, ["0\n", "1\n"]);
    ratoon.run(["fork", "try-1", "--name", "on"]).ok();
    let committed = ratoon.run(["commit", "try-1"]).ok();
    assert_eq!(committed.stdout, "box\n");
    let said = exec(&ratoon, "box", "cat /root/result; hostname");
    assert_eq!(said, "1\nbox\n");
    let listed = ratoon.run(["ps", "-a"]).ok().stdout;
    assert!(!listed.contains("try-0"), "{listed}");
    assert_eq!(exec(&ratoon, "on-0", "cat /root/result"), "1\n");
    let refused = ratoon.run(["commit", "box"]);
    assert!(refused.stderr.contains("is no child"), "{refused:?}");
    ratoon.run(["rm", "-f", "box", "on-0"]).ok();
    ratoon.nothing_is_left();
}

fn a_machine_goes_back_in_place() {
    let ratoon = Ratoon::warm();
    start(&ratoon, "box");
    let id = |vm: &str| {
        let list = json(&ratoon, &["ps", "--json"]);
        let list = list.as_array().expect("a list");
        let found = list.iter().find(|it| it["name"] == vm).expect("it runs");
        found["id"].as_str().expect("an id").to_owned()
    };
    let refused = ratoon.run(["rollback", "box"]);
    assert!(refused.stderr.contains("no snapshot"), "{refused:?}");
    code(&ratoon, "box", "x = 'good'");
    exec(&ratoon, "box", "echo good > /root/file");
    ratoon.run(["snapshot", "box", "point"]).ok();
    code(&ratoon, "box", "x = 'bad'");
    exec(&ratoon, "box", "echo bad > /root/file");
    let before = id("box");
    for _ in 0..2 {
        ratoon.run(["rollback", "box"]).ok();
        assert_eq!(id("box"), before);
        assert_eq!(code(&ratoon, "box", "print(x)"), "good\n");
        let said = exec(&ratoon, "box", "cat /root/file; echo worse > /root/file");
        assert_eq!(said, "good\n");
    }
    // One that cannot be gone back to leaves it as it is.
    let refused = ratoon.run(["rollback", "box", "nope"]);
    assert_eq!(refused.code(), 125, "{refused:?}");
    assert_eq!(exec(&ratoon, "box", "cat /root/file"), "worse\n");
    let folder = ratoon.vms_dir().join(before);
    let layers = std::fs::read_dir(folder).expect("its folder").flatten();
    let layers = layers.filter(|file| file.path().extension().is_some_and(|it| it == "qcow2"));
    assert_eq!(layers.count(), 1, "what it wrote before is gone");
    ratoon.run(["rm", "-f", "box"]).ok();
    ratoon.run(["snapshots", "rm", "point"]).ok();
    ratoon.nothing_is_left();
}

fn a_fork_that_waits_for_its_turn_goes_by_what_the_machine_is_then() {
    let ratoon = shared::machine();
    let store = Store::new(ratoon.vms_dir());
    let dir = store.find(shared::NAME).expect("its record").dir;
    let ours = File::open(dir.path()).expect("its folder");
    ours.lock().expect("others finish");
    let fork = ratoon
        .command(["fork", shared::NAME, "--name", "waits"])
        .spawn();
    let fork = fork.expect("it starts");
    // A line of who waits: number, arrow, kind, which, how, pid (proc_locks(5)).
    let pid = fork.id().to_string();
    let waits = || {
        let locks = std::fs::read_to_string("/proc/locks").expect("locks");
        let mut waiting = locks.lines().filter(|line| line.contains("->"));
        waiting.any(|line| line.split_whitespace().nth(5) == Some(&pid))
    };
    let end = Instant::now() + PATIENCE;
    while !waits() {
        assert!(Instant::now() < end, "it does not wait");
        std::thread::sleep(Duration::from_millis(20));
    }
    // As a snapshot that was taken meanwhile leaves it.
    let taken = Ancestor {
        snapshot: "5".repeat(64),
        memory_layers: 1,
        disk_layers: 0,
    };
    let noted = store.update(&dir, |record| record.ancestors.push(taken.clone()));
    noted.expect("its record");
    drop(ours);
    finish(fork).ok();
    let kid = store.find("waits-0").expect("it runs").record;
    assert!(kid.expect("its record").ancestors.contains(&taken));
    let back = store.update(&dir, |record| record.ancestors.retain(|it| *it != taken));
    back.expect("its record");
    assert_eq!(exec(ratoon, "waits-0", "echo here"), "here\n");
    ratoon.run(["rm", "-f", "waits-0"]).ok();
}

fn a_fork_that_cannot_be_is_refused_and_leaves_nothing() {
    let ratoon = Ratoon::warm();
    start(&ratoon, "box");
    for (count, why) in [
        ("0", "choose 1 to"),
        ("1000000", "choose 1 to"),
        ("10000", "MiB of memory"),
    ] {
        let refused = ratoon.run(["fork", "box", "-n", count]);
        assert!(refused.stderr.contains(why), "{refused:?}");
        assert!(!refused.status.success());
    }
    // Two children are late, each is told, and the machine goes on.
    let late = ratoon.run(["fork", "box", "-n", "2", "--deadline", "1ms"]);
    assert_eq!(late.code(), 125, "{late:?}");
    for child in ["child 0: it was not ready", "child 1: it was not ready"] {
        assert!(late.stderr.contains(child), "{late:?}");
    }
    // A paused machine is forked, and stays paused.
    ratoon.run(["pause", "box"]).ok();
    ratoon.run(["fork", "box", "--name", "kid"]).ok();
    let listed = ratoon.run(["ps"]).ok().stdout;
    assert!(listed.contains("paused"), "{listed}");
    ratoon.run(["resume", "box"]).ok();
    assert_eq!(exec(&ratoon, "kid-0", "echo here"), "here\n");
    let taken = ratoon.run(["fork", "box", "--name", "kid"]);
    assert!(taken.stderr.contains("is taken"), "{taken:?}");

    // Whoever forks is killed: what it made is gone, the machine is not.
    let args = ["fork", "box", "-n", "4", "--", "sleep", "1000"];
    let mut forking = ratoon.command(args).spawn().expect("it starts");
    let patience = Instant::now() + Duration::from_secs(120);
    while ratoon.run(["ps"]).ok().stdout.lines().count() < 7 {
        assert!(Instant::now() < patience, "no children");
        std::thread::sleep(Duration::from_millis(100));
    }
    forking.kill().expect("it runs");
    forking.wait().expect("it is ours");
    while ratoon.run(["ps", "-a"]).ok().stdout.lines().count() > 3 {
        assert!(Instant::now() < patience, "children are left");
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(exec(&ratoon, "box", "echo on"), "on\n");
    ratoon.run(["rm", "-f", "box", "kid-0"]).ok();
    ratoon.nothing_is_left();
}
