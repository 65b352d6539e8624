//! Names, removal, locks, kills, full disks.

use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::*;

#[test]
fn a_snapshot_is_found_by_name_id_and_prefix() {
    let lab = Lab::new();
    let snapshot = lab.snapshot("it", MemoryKind::Plain).unwrap();
    let id = snapshot.id.to_string();
    for wanted in ["it", &id, &id[..12]] {
        assert_eq!(lab.store.get(wanted).unwrap().id, snapshot.id);
    }
    assert_eq!(snapshot.names, ["it"]);
    let manifest = fs::read(snapshot.folder.join("manifest.json")).unwrap();
    assert_eq!(Digest::of(&manifest), snapshot.id);
    for wanted in ["other", "", &id[..11], "../names/it", "0123456789abcdef"] {
        match lab.store.get(wanted) {
            Err(Error::NotFound { wanted: named }) => assert_eq!(named, wanted),
            other => panic!("{wanted}: {other:?}"),
        }
    }
}

#[test]
fn the_newest_comes_first_also_among_those_of_one_second() {
    let mut lab = Lab::new();
    let mut wanted = Vec::new();
    for number in 0..8_u8 {
        lab.memory[7] = number;
        let name = format!("s{number}");
        lab.snapshot(&name, MemoryKind::Plain).unwrap();
        wanted.insert(0, vec![name]);
        // The file system's clock has a tick of its own.
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let listed = lab.store.list().unwrap().snapshots;
    let names: Vec<_> = listed.into_iter().map(|it| it.names).collect();
    assert_eq!(names, wanted);
}

#[test]
fn a_taken_or_bad_name_is_refused_and_leaves_nothing() {
    let mut lab = Lab::new();
    let first = lab.snapshot("it", MemoryKind::Plain).unwrap();
    lab.memory[5] ^= 1;
    match lab.snapshot("it", MemoryKind::Plain) {
        Err(Error::NameTaken { name, id }) => {
            assert_eq!((name, id), ("it".into(), first.id.to_string()));
        }
        other => panic!("{other:?}"),
    }
    for name in ["", ".", "../x", "a/b", "-x", "0123456789abcdef"] {
        match lab.snapshot(name, MemoryKind::Plain) {
            Err(Error::BadName { name: named }) => assert_eq!(named, name),
            other => panic!("{other:?}"),
        }
    }
    assert!(lab.leftovers().is_empty());
    assert_eq!(lab.store.list().unwrap().snapshots.len(), 1);

    let second = lab.snapshot("second", MemoryKind::Plain).unwrap();
    let moved = lab.store.set_name("second", "it", true).unwrap();
    assert_eq!((moved.id, moved.names.len()), (second.id, 2));
    assert!(
        lab.store
            .get(&first.id.to_string())
            .unwrap()
            .names
            .is_empty()
    );
}

#[test]
fn a_parent_and_a_base_are_not_removed_before_those_who_need_them() {
    let mut lab = Lab::new();
    let first = lab.snapshot("first", MemoryKind::Plain).unwrap();
    let second = lab.difference("second", &first).unwrap();
    match lab.store.remove("first") {
        Err(Error::Needed { id, by }) => {
            assert_eq!(id, first.id.to_string());
            assert_eq!(by, format!("second ({})", second.id));
        }
        other => panic!("{other:?}"),
    }
    let removed = lab.store.remove("second").unwrap();
    assert_eq!((removed.names.len(), removed.files), (1, true));
    assert!(lab.store.remove(&first.id.to_string()).unwrap().files);
    assert!(lab.store.list().unwrap().snapshots.is_empty());
    assert!(lab.leftovers().is_empty());
}

#[test]
fn a_layer_that_another_snapshot_names_is_found_there_and_keeps_it() {
    let lab = Lab::new();
    let first = lab.snapshot("first", MemoryKind::Plain).unwrap();
    let layer = &first.manifest.layers[0];
    let mut writer = lab.store.begin().unwrap();
    writer
        .memory_plain(&REGIONS, &lab.memory.as_slice(), &[], &Quiet)
        .unwrap();
    writer.state(b"").unwrap();
    writer.external_layer("root", layer.blake3, layer.length, layer.blake3);
    let second = writer.finish(about(None), Some("second"), None).unwrap();
    let external = &second.manifest.layers[0];
    assert!(lab.store.layer(&second, external).unwrap().is_some());
    match lab.store.remove("first") {
        Err(Error::Needed { .. }) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_linked_layer_is_the_same_file_and_nobody_writes_it() {
    let lab = Lab::new();
    let source = lab.folder.path().join("frozen");
    fs::write(&source, vec![7; 10_000]).unwrap();
    let mut writer = lab.store.begin().unwrap();
    let linked = writer
        .layer_linked("root", "root-0.qcow2", &source, &Quiet)
        .unwrap();
    let file = File::open(&source).unwrap();
    assert_eq!(linked.blake3, hash_file(&file, &source, &Quiet).unwrap());
    assert_eq!(linked.length, 10_000);
    let none = lab.folder.path().join("none");
    let refused = writer.layer_linked("root", "root-1.qcow2", &none, &Quiet);
    assert!(matches!(refused, Err(Error::Io { path, .. }) if path == none));
    writer.state(b"state").unwrap();
    let memory = lab.memory_file();
    writer.memory_plain(&REGIONS, &memory, &[], &Quiet).unwrap();
    let snapshot = writer.finish(about(None), Some("linked"), None).unwrap();
    let files = lab.store.layer_files(&snapshot, "root").unwrap();
    let [ours] = &files[..] else {
        panic!("{files:?}")
    };
    let (ours, theirs) = (fs::metadata(ours).unwrap(), fs::metadata(&source).unwrap());
    assert_eq!(ours.ino(), theirs.ino());
    assert_eq!(theirs.mode() & 0o777, 0o444);
    lab.store.verify("linked", &Quiet).unwrap();
    assert!(
        lab.store
            .layer_files(&snapshot, "other")
            .unwrap()
            .is_empty()
    );
}

#[test]
fn a_layer_that_several_have_is_taken_from_where_the_snapshot_comes_from() {
    let lab = Lab::new();
    let source = lab.folder.path().join("frozen");
    fs::write(&source, b"a layer").unwrap();
    let put = |parent: Option<&Snapshot>, name: &str| {
        let mut writer = lab.store.begin().unwrap();
        match parent.map(|parent| &parent.manifest.layers[0]) {
            Some(it) => writer.external_layer("root", it.blake3, it.length, it.blake3),
            None => {
                let file = "root-0.qcow2";
                writer.layer_linked("root", file, &source, &Quiet).unwrap();
            }
        }
        writer.state(name.as_bytes()).unwrap();
        let memory = lab.memory_file();
        writer.memory_plain(&REGIONS, &memory, &[], &Quiet).unwrap();
        let about = about(parent.map(|parent| parent.id));
        writer.finish(about, Some(name), None).unwrap()
    };
    for top in ["a", "b", "c"].map(|name| put(None, name)) {
        let child = put(Some(&top), &format!("child-{}", top.names[0]));
        let grandchild = put(Some(&child), &format!("grand{}", child.names[0]));
        for snapshot in [child, grandchild] {
            let files = lab.store.layer_files(&snapshot, "root").unwrap();
            assert_eq!(files, [top.folder.join("root-0.qcow2")], "{snapshot:?}");
        }
    }
}

#[test]
fn a_layer_of_another_snapshot_is_found_by_its_content_and_missed_by_name() {
    let lab = Lab::new();
    let parent = lab.snapshot("parent", MemoryKind::Plain).unwrap();
    let layer = &parent.manifest.layers[0];
    let mut writer = lab.store.begin().unwrap();
    writer.external_layer("root", layer.blake3, layer.length, layer.blake3);
    writer.state(b"state").unwrap();
    let memory = lab.memory_file();
    writer.memory_plain(&REGIONS, &memory, &[], &Quiet).unwrap();
    let child = writer.finish(about(None), Some("child"), None).unwrap();
    let of_parent = parent.folder.join("root-0.qcow2");
    assert_eq!(
        lab.store.layer_files(&child, "root").unwrap(),
        std::slice::from_ref(&of_parent)
    );
    lab.store.verify("child", &Quiet).unwrap();
    let good = fs::read(&of_parent).unwrap();
    let mut bad = good.clone();
    bad[100_005] ^= 1;
    fs::remove_file(&of_parent).unwrap();
    fs::write(&of_parent, bad).unwrap();
    let damaged = lab.store.verify("child", &Quiet).unwrap_err();
    assert!(
        matches!(&damaged, Error::Damaged { path, .. } if *path == of_parent),
        "{damaged}"
    );
    fs::remove_file(&of_parent).unwrap();
    let missing = lab.store.layer_files(&child, "root").unwrap_err();
    assert!(
        matches!(&missing, Error::Damaged { path, .. } if *path == of_parent),
        "{missing}"
    );
    fs::rename(&parent.folder, lab.folder.path().join("away")).unwrap();
    let missing = lab.store.layer_files(&child, "root").unwrap_err();
    assert!(
        matches!(
            &missing,
            Error::MissingBase {
                what: "disk layer",
                ..
            }
        ),
        "{missing}"
    );
}

#[test]
fn a_snapshot_goes_with_its_last_name_and_not_while_it_is_held() {
    let lab = Lab::new();
    let snapshot = lab.snapshot("it", MemoryKind::Plain).unwrap();
    lab.store.set_name("it", "too", false).unwrap();
    let removed = lab.store.remove("it").unwrap();
    assert_eq!((removed.names, removed.files), (vec!["it".into()], false));
    let held = snapshot.hold().unwrap();
    match lab.store.remove("too") {
        Err(Error::InUse { id }) => assert_eq!(id, snapshot.id.to_string()),
        other => panic!("{other:?}"),
    }
    drop(held);
    assert!(lab.store.remove("too").unwrap().files);
    match snapshot.hold() {
        Err(Error::NotFound { .. }) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_dropped_writer_leaves_nothing_and_a_live_one_is_not_swept() {
    let lab = Lab::new();
    let mut writer = lab.store.begin().unwrap();
    writer.state(b"x").unwrap();
    assert_eq!(lab.store.sweep().unwrap(), 0);
    assert_eq!(lab.leftovers().len(), 1);
    drop(writer);
    assert!(lab.leftovers().is_empty());
    // What killed ones leave: with a lock that nobody holds, and without one.
    for name in [".tmp-1", ".tmp-2"] {
        fs::create_dir(lab.store.root().join(name)).unwrap();
    }
    fs::write(lab.store.root().join(".tmp-1/lock"), "").unwrap();
    fs::write(lab.store.root().join("names/.tmp-3"), "").unwrap();
    assert_eq!(lab.store.sweep().unwrap(), 2);
    assert!(lab.leftovers().is_empty());
}

#[test]
fn a_cancelled_write_leaves_nothing() {
    struct Stop;
    impl Progress for Stop {
        fn cancelled(&self) -> bool {
            true
        }
    }
    let lab = Lab::new();
    let mut writer = lab.store.begin().unwrap();
    let file = lab.memory_file();
    let runs = populated(&file).unwrap();
    match writer.memory_plain(&REGIONS, &file, &runs, &Stop) {
        Err(Error::Cancelled) => {}
        other => panic!("{other:?}"),
    }
    drop(writer);
    assert!(lab.leftovers().is_empty());
}

#[test]
fn a_signature_is_checked_against_the_trusted_keys() {
    let lab = Lab::new();
    let key = SigningKey::from_seed(&[3; 32]);
    let mut writer = lab.store.begin().unwrap();
    writer
        .memory_plain(&REGIONS, &lab.memory.as_slice(), &[], &Quiet)
        .unwrap();
    writer.state(b"").unwrap();
    let signed = writer.finish(about(None), None, Some(&key)).unwrap();
    let signed = lab.store.get(&signed.id.to_string()).unwrap();
    signed.check_signature(&[key.public()]).unwrap();
    let unsigned = lab.snapshot("it", MemoryKind::Plain).unwrap();
    match unsigned.check_signature(&[key.public()]) {
        Err(Error::Unsigned { .. }) => {}
        other => panic!("{other:?}"),
    }
}

const KILLED: &str = "RATOON_TEST_KILLED_WRITER";

/// Not a test of its own: the process that the next one kills.
#[test]
fn a_writer_to_be_killed() {
    let Some(root) = std::env::var_os(KILLED) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(Path::new(&root)).unwrap();
    let mut lab = Lab {
        folder,
        store,
        random: Random(7),
        memory: vec![0; MEMORY_BYTES as usize],
    };
    fs::write(Path::new(&root).join("ready"), "").unwrap();
    for number in 0_u64.. {
        lab.random.scribble(&mut lab.memory, 50);
        let kind = match number % 2 {
            0 => MemoryKind::Plain,
            _ => MemoryKind::Chunks,
        };
        let name = format!("new-{}-{number}", std::process::id());
        lab.snapshot(&name, kind).unwrap();
        lab.store.remove(&name).unwrap();
    }
}

#[test]
fn a_killed_writer_leaves_the_old_snapshot_and_nothing_half_made() {
    let mut lab = Lab::new();
    let root = lab.store.root().to_path_buf();
    lab.snapshot("old", MemoryKind::Plain).unwrap();
    let mut interrupted = 0;
    for _ in 0..50 {
        let _ = fs::remove_file(root.join("ready"));
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "tests::stores::a_writer_to_be_killed"])
            .env(KILLED, &root)
            // What a killed one leaves of its own goes with this test's folder.
            .env("TMPDIR", lab.folder.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        while !root.join("ready").exists() {
            assert!(child.try_wait().unwrap().is_none(), "the writer failed");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_micros(lab.random.below(60_000)));
        child.kill().unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(9));

        interrupted += usize::from(!leftovers(&root).is_empty());
        let listing = lab.store.list().unwrap();
        assert!(listing.damaged.is_empty(), "{listing:?}");
        for snapshot in listing.snapshots {
            // Killed after the rename: whole, with or without its name.
            lab.store.verify(&snapshot.id.to_string(), &Quiet).unwrap();
            if snapshot.names != ["old"] {
                lab.store.remove(&snapshot.id.to_string()).unwrap();
            }
        }
        assert!(lab.read("old").unwrap() == lab.memory);
        lab.store.sweep().unwrap();
        assert!(lab.leftovers().is_empty());
    }
    assert!(interrupted > 10, "only {interrupted} kills came in between");
}

/// A disk of 1 MiB, mounted for this thread and its children alone.
#[test]
fn a_full_disk_is_said_and_the_old_snapshot_stays_as_root() {
    use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
    use rustix::thread::UnshareFlags;
    let mut lab = Lab::new();
    let thread = std::thread::spawn(move || {
        // SAFETY: only the mount namespace, and only of this thread, which ends with the test.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
        mount_change(
            "/",
            MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
        )
        .unwrap();
        let root = lab.folder.path().join("small");
        fs::create_dir(&root).unwrap();
        mount(
            "tmpfs",
            &root,
            "tmpfs",
            MountFlags::empty(),
            Some(c"size=1m"),
        )
        .unwrap();
        lab.store = Store::open(&root).unwrap();
        let large = std::mem::replace(&mut lab.memory, vec![0; MEMORY_BYTES as usize]);
        lab.random.scribble(&mut lab.memory, 20);
        let old = lab.snapshot("old", MemoryKind::Plain).unwrap();
        let old_memory = std::mem::replace(&mut lab.memory, large);
        for at in &mut lab.memory {
            *at = lab.random.0 as u8;
            lab.random.next();
        }
        for kind in [MemoryKind::Plain, MemoryKind::Chunks] {
            match lab.snapshot("new", kind) {
                Err(Error::DiskFull { path }) => assert!(path.starts_with(&root), "{path:?}"),
                other => panic!("{other:?}"),
            }
            assert!(lab.leftovers().is_empty());
        }
        // Exporting says so too, and leaves no part of a file.
        let bundle = root.join("x.tar");
        fs::write(root.join("filler"), vec![1; 1 << 20]).unwrap_err();
        match lab.store.export("old", &bundle, &Quiet) {
            Err(Error::DiskFull { .. }) => assert!(!bundle.exists()),
            other => panic!("{other:?}"),
        }
        assert_eq!(lab.store.verify("old", &Quiet).unwrap().id, old.id);
        assert!(lab.read("old").unwrap() == old_memory);
        assert_eq!(lab.store.list().unwrap().snapshots.len(), 1);
    });
    thread.join().unwrap();
}
