//! Every byte counts: what was changed is refused, or made no difference.

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use super::*;

fn writable(path: &Path) -> File {
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
    File::options().read(true).write(true).open(path).unwrap()
}

fn flip(path: &Path, random: &mut Random) -> (u64, u8) {
    let file = writable(path);
    let place = random.below(file.metadata().unwrap().len());
    let bit = 1 << random.below(8);
    flip_at(&file, place, bit);
    (place, bit)
}

fn flip_at(file: &File, place: u64, bit: u8) {
    let mut byte = [0];
    file.read_exact_at(&mut byte, place).unwrap();
    file.write_all_at(&[byte[0] ^ bit], place).unwrap();
}

fn files_of(snapshot: &Snapshot) -> Vec<PathBuf> {
    let entries = fs::read_dir(&snapshot.folder).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// A plain snapshot, a chunked one, and a difference over each.
fn every_kind(each: impl Fn(&mut Lab, &Snapshot)) {
    for kind in [MemoryKind::Plain, MemoryKind::Chunks] {
        let mut lab = Lab::new();
        let base = lab.snapshot("base", kind).unwrap();
        each(&mut lab, &base);
        let top = lab.difference("top", &base).unwrap();
        each(&mut lab, &top);
    }
}

#[test]
fn a_flipped_bit_anywhere_is_refused_or_made_no_difference() {
    every_kind(|lab, snapshot| {
        for path in files_of(snapshot) {
            for _ in 0..40 {
                let (place, bit) = flip(&path, &mut lab.random);
                let found = lab.store.verify(&snapshot.id.to_string(), &Quiet);
                match found {
                    Err(Error::Damaged { path: named, .. }) => {
                        assert_eq!(named.parent(), path.parent());
                    }
                    Err(Error::DamagedChunk { path: named, .. }) => assert_eq!(named, path),
                    // zstd has a bit or two in its headers that mean nothing.
                    Ok(_) => assert!(path.ends_with("memory.chunks"), "{path:?} at {place}"),
                    Err(other) => panic!("{path:?} at {place}: {other}"),
                }
                if path.ends_with("memory.chunks") {
                    match lab.read(&snapshot.id.to_string()) {
                        Ok(bytes) => assert!(bytes == lab.memory),
                        Err(Error::DamagedChunk { .. }) => {}
                        Err(other) => panic!("{other}"),
                    }
                }
                flip_at(&writable(&path), place, bit);
            }
        }
        lab.store.verify(&snapshot.id.to_string(), &Quiet).unwrap();
    });
}

#[test]
fn a_file_of_another_length_or_none_is_refused_when_it_is_opened() {
    every_kind(|lab, snapshot| {
        for path in files_of(snapshot) {
            let whole = fs::read(&path).unwrap();
            for _ in 0..10 {
                let length = lab.random.below(whole.len() as u64 * 2);
                if length == whole.len() as u64 {
                    continue;
                }
                writable(&path).set_len(length).unwrap();
                match open_all(lab, snapshot) {
                    Err(Error::Damaged { path: named, .. }) => assert_eq!(named, path),
                    other => panic!("{path:?} of {length}: {other:?}"),
                }
                fs::write(&path, &whole).unwrap();
            }
            if path.ends_with("manifest.json") {
                continue;
            }
            fs::remove_file(&path).unwrap();
            match open_all(lab, snapshot) {
                Err(Error::Damaged {
                    path: named,
                    reason,
                }) => assert_eq!((named, reason.as_str()), (path.clone(), "it is missing")),
                other => panic!("{path:?}: {other:?}"),
            }
            // A pipe is not waited for, and a link is not followed.
            std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
            assert!(open_all(lab, snapshot).is_err());
            fs::remove_file(&path).unwrap();
            fs::write(&path, &whole).unwrap();
        }
        open_all(lab, snapshot).unwrap();
    });
}

/// What a restore opens, without reading memory.
fn open_all(lab: &Lab, snapshot: &Snapshot) -> Result<()> {
    let snapshot = lab.store.get(&snapshot.id.to_string())?;
    snapshot.state()?;
    lab.store.memory(&snapshot)?;
    for layer in &snapshot.manifest.layers {
        snapshot.layer(layer)?;
    }
    Ok(())
}

#[test]
fn a_damaged_snapshot_does_not_hide_the_others_and_can_be_removed() {
    let lab = Lab::new();
    let snapshot = lab.snapshot("it", MemoryKind::Plain).unwrap();
    lab.snapshot("other", MemoryKind::Chunks).unwrap();
    let manifest = snapshot.folder.join("manifest.json");
    flip_at(&writable(&manifest), 5, 1);
    let listing = lab.store.list().unwrap();
    assert_eq!(listing.snapshots.len(), 1);
    assert_eq!(listing.damaged.len(), 1);
    assert_eq!(listing.damaged[0].id, snapshot.id);
    assert_eq!(
        listing.damaged[0].error.to_string(),
        format!(
            "{} is damaged: its hash is not the snapshot's id; use another snapshot, or import \
             this one again",
            manifest.display()
        )
    );
    lab.store.remove("it").unwrap();
    assert!(lab.store.list().unwrap().damaged.is_empty());
}

#[test]
fn a_base_that_is_gone_is_named() {
    let mut lab = Lab::new();
    let base = lab.snapshot("base", MemoryKind::Plain).unwrap();
    let top = lab.difference("top", &base).unwrap();
    fs::remove_dir_all(&base.folder).unwrap();
    match lab.store.memory(&top) {
        Err(Error::MissingBase { digest, .. }) => {
            assert_eq!(digest, base.manifest.memory.blake3.to_string());
        }
        other => panic!("{other:?}"),
    }
    match lab.difference("more", &base) {
        Err(Error::MissingBase { .. }) => assert!(lab.leftovers().is_empty()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_export_comes_back_in_another_store() {
    every_kind(|lab, snapshot| {
        let bundle = lab.folder.path().join("bundle.tar");
        let id = snapshot.id.to_string();
        lab.store.export(&id, &bundle, &Quiet).unwrap();
        // A difference finds its base there from the round before.
        let other = Store::open(&lab.folder.path().join("other")).unwrap();
        let name = &snapshot.names[0];
        let imported = other.import(&bundle, Some(name), &[], &Quiet).unwrap();
        assert_eq!(
            (imported.id, &imported.names),
            (snapshot.id, &snapshot.names)
        );
        other.verify(name, &Quiet).unwrap();
        let image = other.memory(&imported).unwrap();
        let mut memory = vec![9; MEMORY_BYTES as usize];
        image.read(0, &mut memory).unwrap();
        assert!(memory == lab.memory);
        assert!(leftovers(other.root()).is_empty());
    });
}

/// Looks at a folder while something is done.
struct Watching<'w> {
    folder: &'w Path,
    cancel: bool,
    looked: std::sync::atomic::AtomicBool,
}

impl Progress for Watching<'_> {
    fn cancelled(&self) -> bool {
        let names = fs::read_dir(self.folder).unwrap();
        let names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["bundle.tar"]);
        self.looked
            .store(true, std::sync::atomic::Ordering::Relaxed);
        self.cancel
    }
}

#[test]
fn an_export_that_is_ended_leaves_the_old_file_and_nothing_else() {
    let lab = Lab::new();
    lab.snapshot("it", MemoryKind::Plain).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let bundle = folder.path().join("bundle.tar");
    fs::write(&bundle, "old").unwrap();
    let watching = |cancel| Watching {
        folder: folder.path(),
        cancel,
        looked: false.into(),
    };
    match lab.store.export("it", &bundle, &watching(true)) {
        Err(Error::Cancelled) => {}
        other => panic!("{other:?}"),
    }
    assert_eq!(fs::read(&bundle).unwrap(), b"old");
    // While it is written it has no name: a kill leaves nothing either.
    let watched = watching(false);
    lab.store.export("it", &bundle, &watched).unwrap();
    assert!(watched.looked.into_inner());
    lab.store.import(&bundle, None, &[], &Quiet).unwrap();
    match lab.store.export("it", folder.path(), &Quiet) {
        Err(Error::BadRequest { reason }) => assert!(reason.contains("is a folder"), "{reason}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_export_goes_through_a_pipe() {
    let lab = Lab::new();
    let snapshot = lab.snapshot("it", MemoryKind::Plain).unwrap();
    let other = Store::open(&lab.folder.path().join("other")).unwrap();
    let (read, write) = rustix::pipe::pipe().unwrap();
    let label = Path::new("pipe");
    let imported = std::thread::scope(|scope| {
        scope.spawn(|| {
            lab.store
                .export_into("it", write.into(), label, &Quiet)
                .unwrap()
        });
        other.import_from(read.into(), label, Some("it"), &[], &Quiet)
    });
    assert_eq!(imported.unwrap().id, snapshot.id);
    other.verify("it", &Quiet).unwrap();
}

#[test]
fn importing_again_mends_a_damaged_snapshot() {
    let lab = Lab::new();
    let snapshot = lab.snapshot("it", MemoryKind::Chunks).unwrap();
    let bundle = lab.exported("it");
    flip_at(&writable(&snapshot.folder.join("state.bin")), 0, 1);
    match snapshot.state() {
        Err(Error::Damaged { .. }) => {}
        other => panic!("{other:?}"),
    }
    lab.store.import(&bundle, None, &[], &Quiet).unwrap();
    assert_eq!(lab.store.verify("it", &Quiet).unwrap().id, snapshot.id);
    assert!(lab.leftovers().is_empty());
}

#[test]
fn importing_again_leaves_a_snapshot_to_who_holds_it() {
    let lab = Lab::new();
    let snapshot = lab.snapshot("it", MemoryKind::Plain).unwrap();
    let bundle = lab.exported("it");
    let held = snapshot.hold().unwrap();
    let imported = lab.store.import(&bundle, Some("again"), &[], &Quiet);
    assert_eq!(imported.unwrap().names, ["again", "it"]);
    match lab.store.remove(&snapshot.id.to_string()) {
        Err(Error::InUse { id }) => assert_eq!(id, snapshot.id.to_string()),
        other => panic!("{other:?}"),
    }
    assert!(lab.leftovers().is_empty());
    drop(held);
    // Nobody has it: another takes its place, and is what is held from then on.
    lab.store.import(&bundle, None, &[], &Quiet).unwrap();
    let held = snapshot.hold().unwrap();
    let refused = lab.store.remove(&snapshot.id.to_string()).unwrap_err();
    assert!(matches!(refused, Error::InUse { .. }), "{refused}");
    drop(held);
    lab.store.remove(&snapshot.id.to_string()).unwrap();
}

#[test]
fn an_import_that_nobody_trusted_signed_changes_nothing() {
    let lab = Lab::new();
    let snapshot = lab.snapshot("it", MemoryKind::Plain).unwrap();
    let bundle = lab.exported("it");
    let key = SigningKey::create(&lab.folder.path().join("key")).unwrap();
    let other = Store::open(&lab.folder.path().join("other")).unwrap();
    for store in [&lab.store, &other] {
        match store.import(&bundle, Some("other"), &[key.public()], &Quiet) {
            Err(Error::Unsigned { path }) => assert_eq!(path, bundle),
            other => panic!("{other:?}"),
        }
        assert!(leftovers(store.root()).is_empty());
    }
    lab.store.verify("it", &Quiet).unwrap();
    assert_eq!(lab.store.get("it").unwrap().id, snapshot.id);
    assert!(other.list().unwrap().snapshots.is_empty());
}

#[test]
fn a_snapshot_of_another_user_is_refused_as_root() {
    let lab = Lab::new();
    let snapshot = lab.snapshot("it", MemoryKind::Plain).unwrap();
    std::os::unix::fs::chown(&snapshot.folder, Some(12345), None).unwrap();
    match lab.store.get("it") {
        Err(Error::ForeignOwner { path, owner }) => {
            assert_eq!((path, owner), (snapshot.folder, 12345));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_import_without_its_base_is_refused() {
    let mut lab = Lab::new();
    let base = lab.snapshot("base", MemoryKind::Plain).unwrap();
    lab.difference("top", &base).unwrap();
    let bundle = lab.exported("top");
    let other = Store::open(&lab.folder.path().join("other")).unwrap();
    match other.import(&bundle, None, &[], &Quiet) {
        Err(Error::MissingBase { path, .. }) => assert_eq!(path, bundle),
        other => panic!("{other:?}"),
    }
    assert!(leftovers(other.root()).is_empty());
}

#[test]
fn a_changed_or_cut_export_is_refused_or_made_no_difference() {
    for kind in [MemoryKind::Plain, MemoryKind::Chunks] {
        let mut lab = Lab::new();
        let snapshot = lab.snapshot("it", kind).unwrap();
        let bundle = lab.exported("it");
        let whole = fs::read(&bundle).unwrap();
        let other = Store::open(&lab.folder.path().join("other")).unwrap();
        for round in 0..120 {
            if round % 2 == 0 {
                flip(&bundle, &mut lab.random);
            } else {
                let length = lab.random.below(whole.len() as u64);
                writable(&bundle).set_len(length).unwrap();
            }
            match other.import(&bundle, Some("it"), &[], &Quiet) {
                Err(Error::Damaged { .. } | Error::DamagedChunk { .. }) => {
                    let listing = other.list().unwrap();
                    assert!(listing.snapshots.is_empty() && listing.damaged.is_empty());
                }
                // Padding, the end of the tar, or a bit of zstd's that means nothing.
                Ok(imported) => {
                    assert_eq!(imported.id, snapshot.id);
                    other.verify("it", &Quiet).unwrap();
                    other.remove("it").unwrap();
                }
                Err(error) => panic!("{error}"),
            }
            assert!(leftovers(other.root()).is_empty());
            fs::write(&bundle, &whole).unwrap();
        }
    }
}

#[test]
fn no_name_in_an_export_becomes_a_path() {
    let lab = Lab::new();
    let snapshot = lab.snapshot("it", MemoryKind::Plain).unwrap();
    let manifest = fs::read(snapshot.folder.join("manifest.json")).unwrap();
    for (name, kind) in [
        ("../../state.bin", tar::EntryType::Regular),
        ("/tmp/state.bin", tar::EntryType::Regular),
        ("./state.bin", tar::EntryType::Regular),
        ("state.bin", tar::EntryType::Symlink),
        ("state.bin", tar::EntryType::Link),
        ("state.bin", tar::EntryType::GNULongName),
    ] {
        let mut bundle = tar::Builder::new(Vec::new());
        for (name, kind, bytes) in [
            ("manifest.json", tar::EntryType::Regular, &manifest[..]),
            (name, kind, b"the state of the VM"),
        ] {
            let mut header = tar::Header::new_gnu();
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_size(bytes.len() as u64);
            header.set_entry_type(kind);
            header.set_cksum();
            bundle.append(&header, bytes).unwrap();
        }
        let path = lab.folder.path().join("bundle.tar");
        fs::write(&path, bundle.into_inner().unwrap()).unwrap();
        match lab.store.import(&path, None, &[], &Quiet) {
            Err(Error::Damaged { reason, .. }) => {
                assert_eq!(reason, "it does not go on with state.bin");
            }
            other => panic!("{name}: {other:?}"),
        }
    }
}
