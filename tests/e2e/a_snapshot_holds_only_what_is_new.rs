//! Snapshots of one line: each holds what is new since the one before, and restores all of it.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use ratoon_tests::Ratoon;
use serde_json::Value;

crate::promises![
    a_snapshot_of_a_child_refers_to_its_base_and_restores_right,
    what_the_guest_discards_is_given_back_to_the_host,
    what_a_machine_stands_on_stays_whichever_snapshots_are_removed,
];

fn exec(ratoon: &Ratoon, vm: &str, line: &str) -> String {
    ratoon.run(["exec", vm, "--", "sh", "-c", line]).ok().stdout
}

fn manifest(ratoon: &Ratoon, name: &str) -> Value {
    let said = ratoon.run(["snapshots", "inspect", name]).ok().stdout;
    let said: Value = serde_json::from_str(&said).expect("JSON");
    said["manifest"].clone()
}

fn folder(ratoon: &Ratoon, name: &str) -> PathBuf {
    let store = ratoon.state_dir().join("ratoon/snapshots");
    let id = std::fs::read_to_string(store.join("names").join(name)).expect("its name");
    store.join(id.trim())
}

fn id(ratoon: &Ratoon, name: &str) -> String {
    let folder = folder(ratoon, name);
    let id = folder.file_name().expect("a folder").to_string_lossy();
    id.into_owned()
}

/// What the file takes on the host's disk, in bytes.
fn taken(path: &Path) -> u64 {
    std::fs::metadata(path).expect("a file").blocks() * 512
}

/// What belongs into the two files of a seed, and these: in memory (a tmpfs) and on the disk.
fn places(seed: u32) -> [(String, String); 2] {
    ["/run/memory", "/root/disk"].map(|place| {
        let content = format!("yes '{seed} {place}' | head -c 200000");
        (content, format!("{place}-{seed}"))
    })
}

fn put(ratoon: &Ratoon, vm: &str, seed: u32) {
    let lines = places(seed).map(|(content, file)| format!("{content} > {file}"));
    exec(ratoon, vm, &format!("{}; sync", lines.join("; ")));
}

fn assert_kept(ratoon: &Ratoon, vm: &str, seed: u32) {
    let check = |(content, file)| format!("{content} | cmp - {file} && echo kept");
    let lines = places(seed).map(check);
    let said = exec(ratoon, vm, &lines.join("; "));
    assert_eq!(said, "kept\nkept\n", "{vm}, {seed}");
}

fn a_snapshot_of_a_child_refers_to_its_base_and_restores_right() {
    let ratoon = Ratoon::warm();
    let run = ["run", "-d", "--name", "first", "--memory", "256M"];
    ratoon.run(run).ok();
    put(&ratoon, "first", 1);
    ratoon.run(["snapshot", "first", "one"]).ok();
    put(&ratoon, "first", 2);
    ratoon.run(["snapshot", "first", "two"]).ok();
    exec(
        &ratoon,
        "first",
        "echo later > /root/disk-1; rm /root/disk-2",
    );

    ratoon.run(["restore", "two", "--name", "second"]).ok();
    put(&ratoon, "second", 3);
    ratoon.run(["suspend", "second", "three"]).ok();

    let [one, two, three] = ["one", "two", "three"].map(|name| manifest(&ratoon, name));
    assert_eq!(one["memory"]["base"], Value::Null);
    assert_eq!(two["memory"]["base"], one["memory"]["blake3"]);
    assert_eq!(three["memory"]["base"], two["memory"]["blake3"]);
    assert_eq!(two["parent"], id(&ratoon, "one"));
    assert_eq!(three["parent"], id(&ratoon, "two"));
    let layers = |manifest: &Value| manifest["layers"].as_array().expect("layers").clone();
    let (lower, upper) = (layers(&two), layers(&three));
    assert_eq!(upper.len(), lower.len() + 1);
    for (lower, upper) in lower.iter().zip(&upper) {
        assert_eq!(upper["external"], lower["blake3"]);
    }
    let [whole, part] =
        ["one", "three"].map(|name| taken(&folder(&ratoon, name).join("memory.bin")));
    assert!(part < whole / 2, "{part} of {whole} bytes");
    for name in ["one", "two", "three"] {
        ratoon.run(["snapshots", "verify", name]).ok();
    }

    // Two at once, from the top of the line.
    let starting = ["third", "fourth"].map(|vm| {
        let args = ["restore", "three", "--name", vm];
        ratoon.command(args).spawn().expect("ratoon can be started")
    });
    for child in starting {
        ratoon_tests::finish(child).ok();
    }
    exec(&ratoon, "third", "echo of third > /root/own; sync");
    for vm in ["third", "fourth"] {
        for seed in 1..=3 {
            assert_kept(&ratoon, vm, seed);
        }
    }
    assert_eq!(
        exec(&ratoon, "fourth", "ls /root/own 2>&1 || :")
            .lines()
            .count(),
        1
    );
    assert_eq!(exec(&ratoon, "third", "cat /root/own"), "of third\n");
    assert_eq!(exec(&ratoon, "first", "cat /root/disk-1"), "later\n");

    let refused = ratoon.run(["snapshots", "rm", "one"]);
    for needed in ["is needed by", "two (", "three ("] {
        assert!(refused.stderr.contains(needed), "{}", refused.stderr);
    }
    ratoon.run(["rm", "-f", "first", "third", "fourth"]).ok();

    // What it builds on is missing: memory's base first, then a file of it.
    let (base, away) = (folder(&ratoon, "one"), ratoon.state_dir().join("away"));
    std::fs::rename(&base, &away).expect("the snapshot can be moved");
    let refused = ratoon.run(["restore", "three"]);
    assert!(
        refused.stderr.contains("its base memory"),
        "{}",
        refused.stderr
    );
    std::fs::rename(&away, &base).expect("the snapshot can be moved back");
    let layer = std::fs::read_dir(folder(&ratoon, "two"))
        .expect("a folder")
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|end| end == "qcow2"))
        .expect("two has a layer of its own");
    std::fs::rename(&layer, &away).expect("the layer can be moved");
    let refused = ratoon.run(["restore", "three"]);
    let name = layer.file_name().expect("a file").to_string_lossy();
    assert!(refused.stderr.contains(&*name), "{}", refused.stderr);
    assert!(refused.stderr.contains("is missing"), "{}", refused.stderr);
    std::fs::rename(&away, &layer).expect("the layer can be moved back");

    let said = ratoon.run(["run", "--snapshot", "three", "--", "cat", "/root/own"]);
    assert_eq!(said.code(), 1, "{said:?}");
    ratoon.run(["snapshots", "rm", "three", "two", "one"]).ok();
    ratoon.nothing_is_left();
}

fn what_the_guest_discards_is_given_back_to_the_host() {
    let ratoon = Ratoon::warm();
    let run = ["run", "-d", "--name", "vm", "--memory", "256M"];
    let vm = ratoon.run(run).ok().stdout;
    let folder = ratoon.vms_dir().join(vm.trim());
    let layers = || -> u64 {
        std::fs::read_dir(&folder)
            .expect("the VM's folder")
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|end| end == "qcow2"))
            .map(|path| taken(&path))
            .sum()
    };
    exec(&ratoon, "vm", "mount -o remount,discard /");
    let before = layers();
    exec(
        &ratoon,
        "vm",
        "yes much | head -c 4194304 > /root/much; sync",
    );
    let full = layers();
    assert!(full >= before + (4 << 20), "{before} {full}");
    exec(&ratoon, "vm", "rm /root/much; sync");
    // The guest's kernel discards in the background.
    let mut after = full;
    for _ in 0..60 {
        after = layers();
        if after < full - (3 << 20) {
            break;
        }
        exec(&ratoon, "vm", "sync");
    }
    assert!(after < full - (3 << 20), "{before} {full} {after}");
    ratoon.run(["rm", "-f", "vm"]).ok();
    ratoon.nothing_is_left();
}

fn what_a_machine_stands_on_stays_whichever_snapshots_are_removed() {
    let ratoon = Ratoon::warm();
    let run = ["run", "-d", "--name", "first", "--memory", "256M"];
    ratoon.run(run).ok();
    put(&ratoon, "first", 1);
    // A layer that both have, as neither comes from a snapshot.
    ratoon.run(["fork", "first", "--name", "other"]).ok();
    for (vm, name) in [("first", "one"), ("other-0", "alike"), ("first", "over")] {
        ratoon.run(["snapshot", vm, name]).ok();
    }
    let owns = |name: &str| {
        let layers = manifest(&ratoon, name)["layers"].clone();
        let own = |layer: &&Value| layer["file"].is_string();
        let layers = layers.as_array().expect("layers").clone();
        let own: Vec<_> = layers.iter().filter(own).cloned().collect();
        own.iter()
            .map(|layer| layer["blake3"].clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(owns("one")[0], owns("alike")[0]);
    ratoon.run(["restore", "over", "--name", "restored"]).ok();
    ratoon.run(["rm", "-f", "first", "other-0"]).ok();
    // Nothing stands on it.
    ratoon.run(["snapshots", "rm", "alike"]).ok();
    for (name, why) in [("one", "over"), ("over", "use")] {
        let refused = ratoon.run(["snapshots", "rm", name]);
        assert_ne!(refused.code(), 0, "{refused:?}");
        assert!(refused.stderr.contains(why), "{refused:?}");
    }
    ratoon.run(["fork", "restored", "--name", "again"]).ok();
    assert_kept(&ratoon, "again-0", 1);
    ratoon.run(["rm", "-f", "restored", "again-0"]).ok();
    ratoon.run(["snapshots", "rm", "over", "one"]).ok();
    ratoon.nothing_is_left();
}
