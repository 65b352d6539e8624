//! What is wrong with a snapshot is said before its machine runs, or ends it; a guest never reads a byte
//! that is not its own.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use ratoon_engine::snapshot::Digest;
use ratoon_tests::{Done, Random, Ratoon, finish};
use serde_json::{Value, json};

crate::promises![
    a_flipped_bit_anywhere_is_refused_or_ends_the_machine_or_makes_no_difference,
    what_a_snapshot_needs_and_has_not_is_named_before_its_machine_runs,
];

/// Rounds whose bit is in a file that is proved before anything is started, and in one that is proved while
/// the machine runs.
const EARLY: u32 = 24;
const LATE: u32 = 8;

/// A pattern in memory (/run is no disk) and one on the disk; their sums.
const FILL: &str = "seq 1 150000 > /run/pattern; seq 200000 300000 > /root/pattern; sync";
const SUM: &str = "sha256sum /run/pattern /root/pattern";

fn exec(ratoon: &Ratoon, vm: &str, line: &str) -> String {
    ratoon.run(["exec", vm, "--", "sh", "-c", line]).ok().stdout
}

fn store(ratoon: &Ratoon) -> PathBuf {
    ratoon.state_dir().join("ratoon/snapshots")
}

fn id(ratoon: &Ratoon, name: &str) -> String {
    let id = fs::read_to_string(store(ratoon).join("names").join(name));
    id.expect("its name").trim().to_owned()
}

/// The files of a snapshot's folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("its folder").flatten();
    let mut files: Vec<_> = entries.map(|entry| entry.path()).collect();
    files.sort();
    files
}

/// Another place with the same snapshots, whose files are the same ones (hard links) but for `own`, which is a
/// copy that may be written.
fn elsewhere(ratoon: &Ratoon, own: &Path) -> (Ratoon, PathBuf) {
    let other = Ratoon::new();
    let (from, to) = (store(ratoon), store(&other));
    let mut copy = PathBuf::new();
    for folder in files(&from).iter().filter(|path| path.is_dir()) {
        let place = to.join(folder.strip_prefix(&from).expect("it is in the store"));
        fs::create_dir_all(&place).expect("a folder");
        fs::set_permissions(&place, PermissionsExt::from_mode(0o700)).expect("it is ours");
        for file in files(folder) {
            let target = place.join(file.file_name().expect("a name"));
            if file == own || folder.ends_with("names") {
                fs::copy(&file, &target).expect("a copy");
                fs::set_permissions(&target, PermissionsExt::from_mode(0o644)).expect("ours");
                if file == own {
                    copy = target;
                }
            } else {
                fs::hard_link(&file, &target).expect("a link");
            }
        }
    }
    (other, copy)
}

/// Flips a bit of a file and says where.
fn flip(path: &Path, random: &mut Random) -> (u64, u8) {
    let file = File::options().read(true).write(true).open(path);
    let file = file.expect("it may be written");
    let at = random.below(file.metadata().expect("it is there").len());
    let bit = random.below(8) as u8;
    flip_at(&file, at, bit);
    (at, bit)
}

fn flip_at(file: &File, at: u64, bit: u8) {
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("a byte");
    let flipped = [byte[0] ^ (1 << bit)];
    file.write_all_at(&flipped, at).expect("another byte");
}

/// Refused before anything ran, with words about the snapshot in `store`.
fn check_refused(done: &Done, store: &Path, what: &str) {
    assert!(done.stdout.is_empty(), "{what}: {done:?}");
    check_names_it(done, store, what);
}

/// Ended with words about the snapshot in `store`.
fn check_names_it(done: &Done, store: &Path, what: &str) {
    assert_eq!(done.code(), 125, "{what}: {done:?}");
    let names_it = done.stderr.contains(&*store.to_string_lossy())
        || done.stderr.contains("no snapshot `")
        || done.stderr.contains("snapshot ");
    assert!(names_it, "{what}: {}", done.stderr);
}

/// A machine that has done `fill`; of it a plain snapshot `plain`, and `point`, compressed, whose disk lies over the
/// other's; both signed. What `fill` said, and the public key.
fn snapshots(ratoon: &Ratoon, fill: &str) -> (String, String) {
    let key = ratoon.state_dir().join("key");
    let key = key.to_str().expect("a plain path");
    ratoon.run(["snapshots", "key", "new", key]).ok();
    ratoon
        .run(["run", "-d", "--name", "first", "--memory", "256M"])
        .ok();
    let sums = exec(ratoon, "first", fill);
    ratoon
        .run(["snapshot", "first", "plain", "--sign-key", key])
        .ok();
    exec(ratoon, "first", "echo more > /root/more; sync");
    let args = [
        "snapshot",
        "first",
        "point",
        "--compress",
        "--sign-key",
        key,
    ];
    ratoon.run(args).ok();
    ratoon.run(["rm", "-f", "first"]).ok();
    (sums, format!("{key}.pub"))
}

fn a_flipped_bit_anywhere_is_refused_or_ends_the_machine_or_makes_no_difference() {
    let ratoon = Ratoon::warm();
    let (sums, key) = snapshots(&ratoon, &format!("{FILL}; {SUM}"));
    let folder = |name: &str| store(&ratoon).join(id(&ratoon, name));
    let run = ["run", "--snapshot", "point", "--", "sh", "-c", SUM];
    // This leaves a working set, too.
    assert_eq!(ratoon.run(run).ok().stdout, sums);
    let point = folder("point");
    assert!(point.join("working-set").exists());
    let mut random = Random::new(0x5eed_0008);

    // What is proved while it is fetched, and what only says what to fetch early.
    let mut right = 0;
    for round in 0..LATE {
        let name = match round % 4 {
            3 => "working-set",
            _ => "memory.chunks",
        };
        let (there, copy) = elsewhere(&ratoon, &point.join(name));
        let place = flip(&copy, &mut random);
        let what = format!("round {round}: {name} {place:?}");
        let done = there.run(run);
        if done.status.success() {
            assert_eq!(done.stdout, sums, "{what}");
            right += 1;
        } else {
            assert_ne!(name, "working-set", "{what}: {done:?}");
            // The page may be one that the machine needs when the command has said its answer: a right one.
            assert!(sums.starts_with(&done.stdout), "{what}: {done:?}");
            check_names_it(&done, &store(&there), &what);
            assert!(done.stderr.contains("is damaged"), "{what}: {done:?}");
        }
        there.nothing_is_left();
    }
    assert!(right > 0, "a bit of the working set matters");

    // What is proved before anything runs.
    let proved = ["manifest.json", "state.bin", "memory.index"];
    for round in 0..EARLY {
        let name = proved[round as usize % proved.len()];
        let (there, copy) = elsewhere(&ratoon, &point.join(name));
        let place = flip(&copy, &mut random);
        let what = format!("round {round}: {name} {place:?}");
        check_refused(&there.run(run), &store(&there), &what);
        there.nothing_is_left();
    }

    // What nobody reads whole at a restore is found by who reads all: plain memory, and disk layers, those of
    // what the snapshot builds on among them.
    let is_layer = |path: &PathBuf| path.extension().is_some_and(|it| it == "qcow2");
    let mut read_by_all: Vec<_> = files(&folder("plain"))
        .into_iter()
        .filter(|path| is_layer(path) || path.ends_with("memory.bin"))
        .map(|path| ("plain", path))
        .collect();
    let own = files(&point).into_iter().filter(is_layer);
    let below = files(&folder("plain")).into_iter().filter(is_layer);
    read_by_all.extend(own.chain(below).map(|path| ("point", path)));
    assert!(read_by_all.len() >= 4, "{read_by_all:?}");
    for (name, path) in read_by_all {
        fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).expect("it is ours");
        let (at, bit) = flip(&path, &mut random);
        let what = format!("{name}: {} {at} {bit}", path.display());
        for args in [
            &["snapshots", "verify", name][..],
            &["restore", name, "--require-signature", &key],
        ] {
            let done = ratoon.run(args.iter().copied());
            check_refused(&done, &store(&ratoon), &what);
            let file = path.file_name().expect("a name").to_string_lossy();
            assert!(done.stderr.contains(&*file), "{what}: {}", done.stderr);
        }
        let file = File::options().read(true).write(true).open(&path);
        flip_at(&file.expect("it may be written"), at, bit);
        fs::set_permissions(&path, PermissionsExt::from_mode(0o444)).expect("it is ours");
    }

    // All is as it was. Two machines may begin from it at once; neither has the other's writes.
    let both = ["second", "third"].map(|vm| {
        let args = ["restore", "point", "--name", vm];
        ratoon.command(args).spawn().expect("it can be started")
    });
    for restored in both {
        finish(restored).ok();
    }
    for vm in ["second", "third"] {
        assert_eq!(exec(&ratoon, vm, SUM), sums, "{vm}");
        exec(
            &ratoon,
            vm,
            &format!("echo {vm} | tee /run/own > /root/own; sync"),
        );
    }
    for vm in ["second", "third"] {
        let own = exec(&ratoon, vm, "cat /run/own /root/own");
        assert_eq!(own, format!("{vm}\n{vm}\n"));
    }
    ratoon.run(["rm", "-f", "second", "third"]).ok();
    ratoon.nothing_is_left();
}

/// The snapshots of `ratoon`, elsewhere, the manifest of `point` changed and all hashes right again.
fn resealed(ratoon: &Ratoon, change: &dyn Fn(&mut Value, &Path)) -> Ratoon {
    let before = id(ratoon, "point");
    let path = store(ratoon).join(&before).join("manifest.json");
    let (there, copy) = elsewhere(ratoon, &path);
    let manifest = fs::read(&copy).expect("it is there");
    let mut manifest: Value = serde_json::from_slice(&manifest).expect("JSON");
    // Nobody vouches for what is changed.
    manifest
        .as_object_mut()
        .expect("an object")
        .remove("signature");
    change(&mut manifest, copy.parent().expect("a folder"));
    let bytes = serde_json::to_vec(&manifest).expect("JSON");
    let id = Digest::of(&bytes).to_string();
    fs::write(&copy, bytes).expect("it may be written");
    let to = store(&there);
    fs::rename(to.join(before), to.join(&id)).expect("a name that is free");
    fs::write(to.join("names/point"), id).expect("it may be written");
    there
}

fn what_a_snapshot_needs_and_has_not_is_named_before_its_machine_runs() {
    let ratoon = Ratoon::warm();
    snapshots(&ratoon, "echo > /root/pattern; sync");
    type Change = fn(&mut Value, &Path);
    let cases: [(&str, Change, &[&str]); 8] = [
        (
            "a processor of another make",
            |manifest, _| manifest["cpu"]["vendor"] = json!("TransmetaCPU"),
            &["it needs a processor of TransmetaCPU"],
        ),
        (
            "a processor with more features",
            |manifest, _| {
                for word in manifest["cpu"]["features"].as_array_mut().expect("words") {
                    let text = word.as_str().expect("a word");
                    let name = text.split('=').next().expect("a name");
                    *word = json!(format!("{name}=ffffffff"));
                }
            },
            &["this processor lacks features"],
        ),
        (
            "a newer format",
            |manifest, _| manifest["format"] = json!(2),
            &["snapshot format 2", "upgrade Ratoon"],
        ),
        (
            "a newer state",
            |manifest, folder| {
                let path = folder.join("state.bin");
                let state = fs::read(&path).expect("its state");
                let mut state: Value = serde_json::from_slice(&state).expect("JSON");
                assert_eq!(state["version"], 1);
                state["version"] = json!(2);
                let state = serde_json::to_vec(&state).expect("JSON");
                fs::remove_file(&path).expect("it is there");
                fs::write(&path, &state).expect("it may be written");
                manifest["state"]["length"] = json!(state.len());
                manifest["state"]["blake3"] = json!(Digest::of(&state).to_string());
            },
            &["form 2", "use a newer one"],
        ),
        (
            "an image that is not here",
            |manifest, _| {
                let digest = format!("blake3:{}", "5a".repeat(32));
                manifest["labels"]["ratoon.image-digest"] = json!(digest);
            },
            &["5a5a5a5a5a5a"],
        ),
        (
            "an image that was written since",
            |manifest, _| {
                let label = &mut manifest["labels"]["ratoon.image-file"];
                let text = label.as_str().expect("which file it was").to_owned();
                let file = text.split(' ').next().expect("two words");
                *label = json!(format!("{file} 4096:1.000000000"));
            },
            &[
                "was written after the snapshot was taken",
                "import it again",
            ],
        ),
        (
            "a disk layer that is not here",
            |manifest, folder| {
                let parent = manifest["parent"].as_str().expect("a parent");
                let parent = folder.with_file_name(parent);
                fs::remove_dir_all(parent).expect("it is there");
            },
            &["its disk layer", "is not in this store"],
        ),
        (
            "a memory that is shorter",
            |_, folder| {
                let path = folder.join("memory.chunks");
                let memory = fs::read(&path).expect("its memory");
                fs::remove_file(&path).expect("it is there");
                fs::write(&path, &memory[1..]).expect("it may be written");
            },
            &["memory.chunks", "is damaged: it has"],
        ),
    ];
    for (what, change, words) in cases {
        let there = resealed(&ratoon, &change);
        let done = there.run(["restore", "point", "--name", "second"]);
        assert_eq!(done.code(), 125, "{what}: {done:?}");
        for word in words {
            assert!(done.stderr.contains(word), "{what}: {}", done.stderr);
        }
        there.nothing_is_left();
    }
    // Sealed again with nothing changed it starts: it is the changes that were refused.
    let there = resealed(&ratoon, &|_, _| {});
    there.run(["run", "--snapshot", "point", "--", "true"]).ok();
    there.nothing_is_left();
    ratoon.nothing_is_left();
}
