//! Names, locks, races and kills.

use super::*;
use std::os::unix::fs::PermissionsExt as _;

fn small(lab: &Lab, text: &str) -> PathBuf {
    lab.write(&format!("{text}.tar"), &Tar::new().file("a", text).done())
}

fn blobs(lab: &Lab) -> usize {
    fs::read_dir(lab.store.root().join("blobs"))
        .unwrap()
        .count()
}

#[test]
fn an_image_is_found_by_name_digest_and_prefix() {
    let lab = Lab::new();
    let image = lab.import(&small(&lab, "one"), None).unwrap();
    for wanted in ["it", image.digest(), &image.digest()[..12]] {
        assert_eq!(lab.store.get(wanted).unwrap(), image);
    }
    assert_eq!(lab.store.list().unwrap(), std::slice::from_ref(&image));
    assert_eq!(lab.store.inspect("it", &Quiet).unwrap(), image);
    let mode = fs::metadata(&image.disk).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o444);
    match lab.store.get("other") {
        Err(Error::NotFound { wanted }) => assert_eq!(wanted, "other"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_changed_disk_is_found_by_inspect() {
    use std::os::unix::fs::FileExt as _;
    let lab = Lab::new();
    let image = lab.import(&small(&lab, "one"), None).unwrap();
    fs::set_permissions(&image.disk, fs::Permissions::from_mode(0o644)).unwrap();
    let disk = fs::File::options().write(true).open(&image.disk).unwrap();
    disk.write_all_at(b"changed", 1 << 20).unwrap();
    match lab.store.inspect("it", &Quiet) {
        Err(Error::DigestMismatch { digest, .. }) => assert_eq!(digest, image.digest()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_taken_name_is_refused_and_the_same_source_is_not_made_twice() {
    let lab = Lab::new();
    let first = lab.import(&small(&lab, "one"), None).unwrap();
    match lab.import(&small(&lab, "two"), None) {
        Err(Error::NameTaken { name, digest }) => {
            assert_eq!((name.as_str(), digest.as_str()), ("it", first.digest()));
        }
        other => panic!("{other:?}"),
    }
    let again = lab
        .store
        .import(&small(&lab, "one"), None, "too", &Quiet)
        .unwrap();
    assert!(again.cached);
    assert_eq!(again.digest(), first.digest());
    assert_eq!(again.names, ["it", "too"]);
    assert_eq!(blobs(&lab), 1);
}

#[test]
fn bad_and_reserved_names_are_refused() {
    let lab = Lab::new();
    let source = small(&lab, "one");
    for name in [
        "",
        ".",
        "../x",
        "a/b",
        "-x",
        "0123456789abcdef",
        &"x".repeat(129),
    ] {
        match lab.store.import(&source, None, name, &Quiet) {
            Err(Error::BadName { name: refused }) => assert_eq!(refused, name),
            other => panic!("{name}: {other:?}"),
        }
    }
    match lab.store.import(&source, None, "debian", &Quiet) {
        Err(Error::ReservedName { name }) => assert_eq!(name, "debian"),
        other => panic!("{other:?}"),
    }
    lab.assert_untouched();
}

#[test]
fn an_image_in_use_is_not_removed() {
    let lab = Lab::new();
    let image = lab.import(&small(&lab, "one"), None).unwrap();
    let vm = image.open_locked().unwrap();
    match lab.store.remove("it", false) {
        Err(Error::InUse { digest }) => assert_eq!(digest, image.digest()),
        other => panic!("{other:?}"),
    }
    drop(vm);
    let removed = lab.store.remove("it", false).unwrap();
    assert_eq!(removed.names, ["it"]);
    assert!(removed.disk);
    lab.assert_untouched();
    match image.open_locked() {
        Err(Error::NotFound { .. }) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn force_removes_an_image_in_use_and_its_reader_goes_on() {
    use std::io::Read as _;
    let lab = Lab::new();
    let image = lab.import(&small(&lab, "one"), None).unwrap();
    let mut vm = image.open_locked().unwrap();
    assert!(lab.store.remove("it", true).unwrap().disk);
    let mut bytes = [0; 2048];
    vm.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes[1024 + 0x38..1024 + 0x3a], &[0x53, 0xef]);
    lab.assert_untouched();
}

#[test]
fn an_image_on_which_a_snapshot_stands_is_removed_by_force_alone() {
    use ratoon_snapshot::{About, Cpu, Region};
    let lab = Lab::new();
    let folder = lab.path("snapshots");
    let image = lab.import(&small(&lab, "one"), None).unwrap();
    let snapshots = ratoon_snapshot::Store::open(&folder).unwrap();
    let mut writer = snapshots.begin().unwrap();
    writer.state(b"state").unwrap();
    let (memory, region) = (
        vec![1; 1 << 20],
        Region {
            guest_address: 0,
            length: 1 << 20,
        },
    );
    let quiet = ratoon_snapshot::Quiet;
    writer
        .memory_plain(&[region], &memory.as_slice(), &[], &quiet)
        .unwrap();
    let about = About {
        cpu: Cpu {
            vendor: "x".into(),
            features: Vec::new(),
        },
        kernel: None,
        image: None,
        runtime: None,
        vcpus: 1,
        memory_mib: 1,
        parent: None,
        labels: [("ratoon.image-digest".to_owned(), image.digest().to_owned())].into(),
    };
    writer.finish(about, Some("asleep"), None).unwrap();
    let store = lab.store.clone().kept_for(folder);
    match store.remove("it", false) {
        Err(Error::Needed { digest, by }) => {
            assert_eq!((digest.as_str(), by.as_str()), (image.digest(), "asleep"));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(store.get("it").unwrap().names, ["it"]);
    snapshots.remove("asleep").unwrap();
    assert!(store.remove("it", false).unwrap().disk);
    lab.assert_untouched();
}

#[test]
fn the_disk_goes_with_the_last_name() {
    let lab = Lab::new();
    let source = small(&lab, "one");
    let image = lab.import(&source, None).unwrap();
    lab.store.import(&source, None, "too", &Quiet).unwrap();
    match lab.store.remove(image.digest(), false) {
        Err(Error::SeveralNames { names, .. }) => assert_eq!(names, "it, too"),
        other => panic!("{other:?}"),
    }
    assert!(!lab.store.remove("it", false).unwrap().disk);
    assert_eq!(lab.store.get("too").unwrap().names, ["too"]);
    assert!(lab.store.remove("too", false).unwrap().disk);
    lab.assert_untouched();
}

#[test]
fn two_imports_of_the_same_source_at_once_make_one_image() {
    let lab = Lab::new();
    let source = small(&lab, "one");
    let images: Vec<Image> = std::thread::scope(|scope| {
        let started: Vec<_> = (0..4)
            .map(|number| {
                let (store, source) = (lab.store.clone(), source.clone());
                scope.spawn(move || {
                    store
                        .import(&source, None, &format!("name{number}"), &Quiet)
                        .unwrap()
                })
            })
            .collect();
        started
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    assert!(
        images
            .iter()
            .all(|image| image.digest() == images[0].digest())
    );
    assert_eq!(images.iter().filter(|image| !image.cached).count(), 1);
    assert_eq!(lab.store.list().unwrap().len(), 1);
    assert_eq!(lab.store.list().unwrap()[0].names.len(), 4);
}

#[test]
fn a_dead_owners_scratch_is_swept_and_a_live_ones_is_not() {
    let lab = Lab::new();
    let live = lab.store.scratch().unwrap();
    let tmp = lab.store.root().join("tmp");
    fs::create_dir_all(tmp.join("99-0/tree/deep")).unwrap();
    fs::write(tmp.join("99-0.lock"), "").unwrap();
    assert_eq!(lab.store.sweep().unwrap(), 1);
    assert!(!tmp.join("99-0").exists() && !tmp.join("99-0.lock").exists());
    assert!(live.path().exists());
    drop(live);
    lab.assert_untouched();
}

#[test]
fn a_cancelled_import_leaves_nothing() {
    struct Stop;
    impl Progress for Stop {
        fn step(&self, _what: &str) {}
        fn cancelled(&self) -> bool {
            true
        }
    }
    let lab = Lab::new();
    let source = small(&lab, "one");
    match lab.store.import(&source, None, "it", &Stop) {
        Err(Error::Cancelled) => {}
        other => panic!("{other:?}"),
    }
    lab.assert_untouched();
}

#[test]
fn a_damaged_record_is_named() {
    let lab = Lab::new();
    let image = lab.import(&small(&lab, "one"), None).unwrap();
    let record = image.disk.with_file_name("config.json");
    fs::write(&record, "{").unwrap();
    match lab.store.get("it") {
        Err(Error::BadRecord { path, .. }) => assert_eq!(path, record),
        other => panic!("{other:?}"),
    }
}

/// A disk of 1 MiB, mounted for this thread and its children alone.
#[test]
fn a_full_disk_is_said_and_the_scratch_removed_as_root() {
    use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
    use rustix::thread::UnshareFlags;
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("a.tar");
    // Not zeroes, which would become holes.
    fs::write(&source, Tar::new().file("a", &"x".repeat(4 << 20)).done()).unwrap();
    let cache = folder.path().join("cache");
    fs::create_dir(&cache).unwrap();
    let thread = std::thread::spawn(move || {
        // SAFETY: only the mount namespace, and only of this thread, which ends with the test.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
        mount_change(
            "/",
            MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
        )
        .unwrap();
        mount(
            "tmpfs",
            &cache,
            "tmpfs",
            MountFlags::empty(),
            Some(c"size=1m"),
        )
        .unwrap();
        let store = ImageStore::open(&cache).unwrap();
        match store.import(&source, None, "it", &Quiet) {
            Err(Error::DiskFull { .. }) => {}
            other => panic!("{other:?}"),
        }
        for folder in ["blobs", "names", "tmp"] {
            assert_eq!(
                fs::read_dir(store.root().join(folder)).unwrap().count(),
                0,
                "{folder}"
            );
        }
    });
    thread.join().unwrap();
}
