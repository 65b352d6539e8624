//! kill -9 of any process in a tree of forks: what it shared with others stays theirs, what only it had is
//! freed, and with the last of them everything.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use ratoon_tests::{PATIENCE, Ratoon};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

crate::promises![memory_and_disks_of_a_tree_are_freed_in_whatever_order_its_processes_are_killed];

fn exec(ratoon: &Ratoon, vm: &str, line: &str) -> String {
    ratoon.run(["exec", vm, "--", "sh", "-c", line]).ok().stdout
}

/// Machines that run, by their names: their ids and processes.
fn machines(ratoon: &Ratoon) -> BTreeMap<String, (String, i32)> {
    let shown = ratoon.run(["ps", "--json"]).ok().stdout;
    let shown: Value = serde_json::from_str(&shown).expect("JSON");
    let all = shown.as_array().expect("a list").iter().filter_map(|one| {
        let id = one["id"].as_str()?.to_owned();
        let name = one["name"].as_str().unwrap_or(&id).to_owned();
        Some((name, (id, one["pid"].as_i64()? as i32)))
    });
    all.collect()
}

fn entries(folder: impl AsRef<Path>) -> impl Iterator<Item = std::fs::DirEntry> {
    std::fs::read_dir(folder).into_iter().flatten().flatten()
}

/// Files in memory that a process has open or mapped, by their inodes.
fn memory_files(pid: i32) -> BTreeSet<u64> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    let mapped = maps.lines().filter(|line| line.contains("/memfd:"));
    let mapped = mapped.filter_map(|line| line.split_whitespace().nth(4)?.parse().ok());
    let open = entries(format!("/proc/{pid}/fd")).filter_map(|fd| {
        let link = std::fs::read_link(fd.path()).ok()?;
        let is_memory = link.to_string_lossy().starts_with("/memfd:");
        is_memory.then(|| std::fs::metadata(fd.path()).ok().map(|file| file.ino()))?
    });
    mapped.chain(open).collect()
}

/// Those that any process on this host has.
fn all_memory_files() -> BTreeSet<u64> {
    let pids = entries("/proc").filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.flat_map(memory_files).collect()
}

/// Files of disks in the machines' folders, by their inodes.
fn layers(ratoon: &Ratoon, id: Option<&str>) -> BTreeSet<u64> {
    let folders = entries(ratoon.vms_dir()).map(|entry| entry.path());
    let folders = folders.filter(|path| id.is_none_or(|id| path.ends_with(id)));
    let files = folders.flat_map(entries);
    let layers = files.filter(|file| file.path().extension().is_some_and(|it| it == "qcow2"));
    layers
        .filter_map(|file| file.metadata().ok())
        .map(|file| file.ino())
        .collect()
}

fn memory_and_disks_of_a_tree_are_freed_in_whatever_order_its_processes_are_killed() {
    let ratoon = Ratoon::warm();
    let run = ["run", "-d", "--name", "box", "--memory", "256M"];
    ratoon.run(run).ok();
    let write = "echo $(hostname) >> /root/file; sync";
    exec(&ratoon, "box", write);
    ratoon.run(["fork", "box", "-n", "2", "--name", "kid"]).ok();
    exec(&ratoon, "kid-0", write);
    let args = ["fork", "kid-0", "-n", "2", "--name", "grandkid"];
    ratoon.run(args).ok();
    exec(&ratoon, "grandkid-0", write);
    // Two more that belong to a command.
    let args = ["fork", "grandkid-0", "-n", "2", "--", "sleep", "1000"];
    let mut forker = ratoon.command(args).spawn().expect("ratoon starts");
    let end = Instant::now() + PATIENCE;
    let mut all = machines(&ratoon);
    while all.len() < 7 {
        assert!(Instant::now() < end, "no children: {all:?}");
        std::thread::sleep(Duration::from_millis(100));
        all = machines(&ratoon);
    }

    let memory: BTreeMap<_, _> = all
        .iter()
        .map(|(name, (_, pid))| (name.clone(), memory_files(*pid)))
        .collect();
    let ids = all.iter().map(|(name, (id, _))| (name.clone(), id.clone()));
    let ids: BTreeMap<String, String> = ids.collect();
    let share = |one: &str, other: &str| !memory[one].is_disjoint(&memory[other]);
    assert!(share("kid-0", "kid-1") && share("grandkid-0", "kid-1"));
    let names = all.keys().filter(|name| !name.contains('-'));
    let commands: Vec<String> = names.filter(|name| *name != "box").cloned().collect();
    assert_eq!(commands.len(), 2, "{all:?}");

    let said = |vm: &str| match vm {
        "box" | "kid-1" => "box\n",
        "kid-0" | "grandkid-1" => "box\nkid-0\n",
        _ => "box\nkid-0\ngrandkid-0\n",
    };
    let mut alive: BTreeSet<&str> = all.keys().map(String::as_str).collect();
    for vm in [
        "kid-0",
        &commands[0],
        "box",
        "forker",
        "grandkid-0",
        "kid-1",
        "grandkid-1",
    ] {
        let gone: Vec<&str> = match vm {
            // Its machines go with it.
            "forker" => {
                forker.kill().expect("it runs");
                forker.wait().expect("it is ours");
                vec![&commands[1]]
            }
            vm => {
                let pid = Pid::from_raw(all[vm].1).expect("a pid");
                kill_process(pid, Signal::KILL).expect("it lives");
                vec![vm]
            }
        };
        alive.retain(|one| !gone.contains(one));
        let is_of_command = |one: &str| commands.iter().any(|it| it == one);
        let end = Instant::now() + PATIENCE;
        let wait = |what: &str| {
            assert!(Instant::now() < end, "after {vm}: {what}");
            std::thread::sleep(Duration::from_millis(50));
        };
        while machines(&ratoon)
            .keys()
            .any(|one| gone.contains(&one.as_str()))
        {
            wait("it is still there");
        }
        let kept: BTreeSet<u64> = alive.iter().flat_map(|one| memory[*one].clone()).collect();
        let all: BTreeSet<u64> = memory.values().flatten().copied().collect();
        loop {
            let held = all_memory_files();
            assert!(
                kept.is_subset(&held),
                "after {vm}: memory of others is gone"
            );
            if all.difference(&kept).all(|file| !held.contains(file)) {
                break;
            }
            wait("memory files that nobody needs are held");
        }
        // One that was left running is told as killed until it is removed; the others are swept when their
        // forker has gone.
        for one in gone.iter().filter(|one| !is_of_command(one)) {
            ratoon.run(["rm", one]).ok();
        }
        let kept = alive
            .iter()
            .flat_map(|one| layers(&ratoon, Some(&ids[*one])));
        let kept: BTreeSet<u64> = kept.collect();
        let is_forker_there = alive.iter().any(|one| is_of_command(one));
        while !is_forker_there && layers(&ratoon, None) != kept {
            wait("layers are left");
            ratoon.run(["ps", "-a"]).ok();
        }
        for one in alive.iter().filter(|one| !is_of_command(one)) {
            let file = exec(&ratoon, one, "cat /root/file");
            assert_eq!(file, said(one), "{one} after {vm}");
        }
    }
    assert_eq!(layers(&ratoon, None), BTreeSet::new());
    ratoon.nothing_is_left();
}
