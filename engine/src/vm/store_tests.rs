//! The store's rules: races between threads and processes, damage, names.

use std::process::Command;

use super::*;
use crate::vm::process::ProcessRef;
use crate::vm::record::tests::config;

fn store() -> (tempfile::TempDir, Store) {
    let temp = tempfile::tempdir().unwrap();
    let store = Store::new(temp.path().join("vms"));
    (temp, store)
}

fn create(store: &Store, name: Option<&str>) -> Result<(VmDir, Record), StoreError> {
    let dir = store.create(name, |dir| Record::new(config(&dir.id()), None, None))?;
    let record = dir.read_record()?;
    Ok((dir, record))
}

fn dead() -> Option<ProcessRef> {
    let mut process = ProcessRef::current().unwrap();
    process.start_ticks += 1;
    Some(process)
}

#[test]
fn of_many_threads_that_want_a_name_exactly_one_gets_it() {
    let (_temp, store) = store();
    let winners: usize = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..16)
            .map(|_| scope.spawn(|| create(&store, Some("x"))))
            .collect();
        threads
            .into_iter()
            .map(|thread| match thread.join().unwrap() {
                Ok(_) => 1,
                Err(StoreError::NameTaken { name, .. }) if name == "x" => 0,
                Err(other) => panic!("{other}"),
            })
            .sum()
    });
    assert_eq!(winners, 1);
    assert_eq!(store.list().unwrap().len(), 1);
}

/// Run by the test below in processes of their own; on its own it has no store and does nothing.
#[test]
fn helper_that_wants_a_name() {
    let Some(root) = std::env::var_os("RATOON_TEST_STORE") else {
        return;
    };
    match create(&Store::new(root), Some("x")) {
        Ok(_) => println!("RESULT won"),
        Err(StoreError::NameTaken { .. }) => println!("RESULT lost"),
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn of_many_processes_that_want_a_name_exactly_one_gets_it() {
    let (_temp, store) = store();
    let children: Vec<_> = (0..6)
        .map(|_| {
            Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "vm::store::tests::helper_that_wants_a_name"])
                .arg("--nocapture")
                .env("RATOON_TEST_STORE", store.root())
                .stdout(std::process::Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    let mut won = 0;
    let mut lost = 0;
    for child in children {
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        won += text.matches("RESULT won").count();
        lost += text.matches("RESULT lost").count();
    }
    assert_eq!((won, lost), (1, 5));
}

#[test]
fn updates_at_once_lose_nothing() {
    let (_temp, store) = store();
    let (dir, before) = create(&store, None).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..10 {
                    store.update(&dir, |record| record.created_ms += 1).unwrap();
                }
            });
        }
    });
    assert_eq!(
        dir.read_record().unwrap().created_ms,
        before.created_ms + 80
    );
}

#[test]
fn a_damaged_record_is_listed_as_broken_and_can_be_removed() {
    let (_temp, store) = store();
    let (good, _) = create(&store, Some("good")).unwrap();
    let (bad, _) = create(&store, None).unwrap();
    std::fs::write(bad.record(), b"{\"format\":1,").unwrap();
    let listed = store.list().unwrap();
    assert_eq!(listed.len(), 2);
    assert_eq!(listed[0].dir, good);
    assert!(matches!(listed[1].record, Err(RecordError::Damaged { .. })));
    let found = store.find(&bad.id()[..11]).unwrap();
    assert!(found.record.is_err());
    store.remove(&found.dir).unwrap();
    assert!(!bad.path().exists());
    store.remove(&found.dir).unwrap();
}

#[test]
fn a_vm_is_found_by_name_id_and_unique_prefix() {
    let (_temp, store) = store();
    let (dir, _) = create(&store, Some("web")).unwrap();
    let id = dir.id();
    for text in ["web", &id, &id[..6]] {
        assert_eq!(store.find(text).unwrap().dir, dir);
    }
    for text in ["we", "", "zz"] {
        assert!(matches!(store.find(text), Err(StoreError::NotFound(t)) if t == text));
    }
    let twin = format!("{}{}", &id[..11], if id.ends_with('0') { '1' } else { '0' });
    std::fs::create_dir(store.root().join(&twin)).unwrap();
    match store.find(&id[..11]) {
        Err(StoreError::Ambiguous { ids, .. }) => assert_eq!(ids.len(), 2),
        other => panic!("{other:?}"),
    }
}

#[test]
fn names_that_could_be_taken_for_something_else_are_refused() {
    let (_temp, store) = store();
    for name in ["", "-x", "a b", "../x", "0123456789ab", &"x".repeat(41)] {
        match create(&store, Some(name)) {
            Err(StoreError::BadName(named)) => assert_eq!(named, name),
            other => panic!("{name}: {other:?}"),
        }
    }
    assert!(!store.root().exists(), "nothing was made");
}

#[test]
fn a_state_directory_too_deep_for_sockets_is_refused_before_anything_is_made() {
    let (temp, _) = store();
    let root = temp.path().join("d".repeat(90));
    let store = Store::new(&root);
    match create(&store, None) {
        Err(StoreError::PathTooLong { len, .. }) => {
            assert_eq!(len, root.as_os_str().len() + 1 + ID_LEN + 1 + 30);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(store.list().unwrap().len(), 0);
}

#[test]
fn the_sweep_removes_what_dead_processes_left_and_nothing_else() {
    let (_temp, store) = store();
    let (live, _) = create(&store, Some("live")).unwrap();
    let (kept, _) = create(&store, Some("kept")).unwrap();
    store
        .update(&kept, |record| {
            record.ephemeral = false;
            record.ready = true;
            record.owner = dead();
            record.vmm = dead();
        })
        .unwrap();
    let (gone, _) = create(&store, Some("gone")).unwrap();
    store
        .update(&gone, |record| {
            record.owner = dead();
            record.vmm = dead();
        })
        .unwrap();
    let (orphan, _) = create(&store, Some("orphan")).unwrap();
    store
        .update(&orphan, |record| {
            record.ephemeral = false;
            record.owner = dead();
            record.vmm = ProcessRef::current();
        })
        .unwrap();
    for half in [".new-0123456789ab", ".trash-0123456789ab"] {
        std::fs::create_dir(store.root().join(half)).unwrap();
    }
    let unknown = ["0123456789ab", "ba9876543210"].map(|id| VmDir::new(store.root().join(id)));
    for (dir, file) in unknown.iter().zip(["layers.lock", "control.sock"]) {
        std::fs::create_dir(dir.path()).unwrap();
        std::fs::write(dir.path().join(file), "").unwrap();
    }

    let left = store.sweep().unwrap();

    assert!(left.committed.is_empty());
    assert_eq!(left.abandoned.len(), 1);
    assert_eq!(left.abandoned[0].dir, orphan);
    for dir in [live, kept, orphan] {
        assert!(dir.read_record().is_ok());
    }
    assert!(!gone.path().exists());
    // The other may have a VMM still.
    assert_eq!(unknown.map(|dir| dir.path().exists()), [false, true]);
    assert!(!store.root().join(".new-0123456789ab").exists());
    assert!(!store.root().join(".trash-0123456789ab").exists());
}

#[test]
fn an_update_of_a_removed_vm_says_so() {
    let (_temp, store) = store();
    let (dir, _) = create(&store, None).unwrap();
    store.remove(&dir).unwrap();
    assert!(matches!(
        store.update(&dir, |_| {}),
        Err(StoreError::NotFound(id)) if id == dir.id()
    ));
}
