//! Whole trees.

use super::*;

#[test]
fn a_list_is_as_deep_as_asked_and_only_what_fits() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("a/b")).unwrap();
    fs::write(dir.path().join("a/one.rs"), "").unwrap();
    fs::write(dir.path().join("a/b/two.rs"), "").unwrap();
    symlink("/", dir.path().join("a/root")).unwrap();
    let listed = |depth, glob: Option<&str>| {
        let params = FileList {
            path: text(dir.path()),
            root: None,
            depth,
            glob: glob.map(str::to_owned),
        };
        let (result, output) = done(list(params), None);
        result.unwrap();
        String::from_utf8(output)
            .unwrap()
            .lines()
            .map(|line| {
                let entry: FileEntry = serde_json::from_str(line).unwrap();
                let base = text(dir.path());
                entry.path.strip_prefix(&base).unwrap().to_owned()
            })
            .collect::<Vec<_>>()
    };
    assert_eq!(listed(1, None), ["/a"]);
    assert_eq!(
        listed(0, None),
        ["/a", "/a/b", "/a/b/two.rs", "/a/one.rs", "/a/root"]
    );
    assert_eq!(listed(0, Some("*.rs")), ["/a/b/two.rs", "/a/one.rs"]);
    assert_eq!(listed(2, Some("a/*.rs")), ["/a/one.rs"]);
}

#[test]
fn a_tree_is_removed_and_what_its_links_lead_to_stays() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir_all(tree.join("sub")).unwrap();
    fs::write(dir.path().join("outside"), "").unwrap();
    symlink(dir.path(), tree.join("sub/link")).unwrap();
    let mut params = FileRemove {
        path: text(&tree),
        ..FileRemove::default()
    };
    let (result, _) = done(remove(params.clone()), None);
    assert_eq!(code(result), ErrorCode::Exists);
    params.recursive = true;
    let (result, _) = done(remove(params.clone()), None);
    assert_eq!(result.unwrap()["entries"], 3);
    assert!(dir.path().join("outside").exists() && !tree.exists());
    let (result, _) = done(remove(params.clone()), None);
    assert_eq!(code(result), ErrorCode::NotFound);
    params.missing_ok = true;
    let (result, _) = done(remove(params), None);
    assert_eq!(result.unwrap()["entries"], 0);
}

#[test]
fn a_copy_has_modes_links_and_times_and_replaces_only_when_asked_to() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("f"), "content").unwrap();
    fs::set_permissions(tree.join("f"), fs::Permissions::from_mode(0o751)).unwrap();
    symlink("f", tree.join("l")).unwrap();
    let mut params = FileMove {
        from: text(&tree),
        to: text(&dir.path().join("copy")),
        ..FileMove::default()
    };
    let (result, _) = done(copy(params.clone()), None);
    assert_eq!(code(result), ErrorCode::BadRequest);
    params.recursive = true;
    let (result, _) = done(copy(params.clone()), None);
    assert_eq!(result.unwrap()["entries"], 3);
    let copied = dir.path().join("copy");
    assert_eq!(fs::read_link(copied.join("l")).unwrap(), Path::new("f"));
    let (old, new) = (
        fs::metadata(tree.join("f")).unwrap(),
        fs::metadata(copied.join("f")).unwrap(),
    );
    assert_eq!(old.permissions(), new.permissions());
    assert_eq!(old.modified().unwrap(), new.modified().unwrap());
    let (result, _) = done(copy(params), None);
    assert_eq!(code(result), ErrorCode::Exists);
    assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        2,
        "nothing is left"
    );
}

/// Makes directories in each other, all named `d`.
pub(super) fn deep(dir: &Path, levels: usize) {
    let mut at = rustix::fs::open(dir, OFlags::RDONLY, Mode::empty()).unwrap();
    for _ in 0..levels {
        mkdirat(&at, "d", Mode::from_raw_mode(0o755)).unwrap();
        at = openat(&at, "d", OFlags::RDONLY, Mode::empty()).unwrap();
    }
}

#[test]
fn a_tree_is_worked_on_a_hundred_deep_and_refused_deeper() {
    let each = |levels: usize, check: fn(Result<serde_json::Value, ErrorReply>)| {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("t")).unwrap();
        deep(&dir.path().join("t"), levels);
        let path = text(&dir.path().join("t"));
        let all = FileList {
            path: path.clone(),
            root: None,
            depth: 0,
            glob: None,
        };
        check(done(list(all), None).0);
        let packed = TreePack {
            path: path.clone(),
            ..TreePack::default()
        };
        check(done(pack(packed), None).0);
        let copied = FileMove {
            from: path.clone(),
            to: text(&dir.path().join("c")),
            recursive: true,
            ..FileMove::default()
        };
        check(done(copy(copied), None).0);
        let removed = FileRemove {
            path,
            recursive: true,
            ..FileRemove::default()
        };
        check(done(remove(removed), None).0);
    };
    each(MAX_DEPTH, |result| assert!(result.is_ok(), "{result:?}"));
    each(MAX_DEPTH + 1, |result| {
        let error = result.unwrap_err();
        assert_eq!(error.code, ErrorCode::BadRequest);
        assert!(error.message.contains("t/d/d"), "{}", error.message);
        assert!(
            error.message.contains("100 directories"),
            "{}",
            error.message
        );
    });
}

#[test]
fn a_directory_is_not_copied_into_itself() {
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("t");
    fs::create_dir_all(from.join("a/b")).unwrap();
    for to in ["t/inside", "t/a/b/inside"] {
        let params = FileMove {
            from: text(&from),
            to: text(&dir.path().join(to)),
            recursive: true,
            ..FileMove::default()
        };
        let (result, _) = done(copy(params), None);
        let error = result.unwrap_err();
        assert_eq!(error.code, ErrorCode::BadRequest);
        assert!(error.message.contains("into itself"), "{}", error.message);
    }
    assert_eq!(fs::read_dir(&from).unwrap().count(), 1);
    assert_eq!(fs::read_dir(from.join("a/b")).unwrap().count(), 0);
}

#[test]
fn what_is_no_longer_a_file_is_not_copied_as_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("f"), "x").unwrap();
    let was = statat(CWD, path("f"), AtFlags::empty()).unwrap();
    let fifo = Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(CWD, path("fifo"), FileType::Fifo, fifo, 0).unwrap();
    symlink("f", path("link")).unwrap();
    let here = rustix::fs::open(dir.path(), DIRECTORY, Mode::empty()).unwrap();
    for name in [c"fifo", c"link"] {
        let to = (here.as_fd(), c"copy");
        let result =
            crate::files::tree::Copier::default().entry(here.as_fd(), name, &was, to, "f", 0);
        assert_eq!(code(result), ErrorCode::BadRequest);
        assert!(!path("copy").exists());
    }
}

/// Needs root: mounts a file system.
#[test]
fn a_mount_is_not_removed_nor_what_is_in_it_as_root() {
    use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("t/m");
    fs::create_dir_all(&at).unwrap();
    if mount("none", &at, "tmpfs", MountFlags::empty(), None).is_err() {
        // Root of a container that may not.
        return;
    }
    fs::write(at.join("precious"), "p").unwrap();
    let removed = ["t", "t/m"].map(|name| {
        let params = FileRemove {
            path: text(&dir.path().join(name)),
            recursive: true,
            ..FileRemove::default()
        };
        done(remove(params), None).0.unwrap_err()
    });
    let kept = at.join("precious").exists();
    unmount(&at, UnmountFlags::DETACH).unwrap();
    for error in removed {
        assert_eq!(error.code, ErrorCode::BadRequest);
        assert!(
            error.message.contains("t/m: a file system"),
            "{}",
            error.message
        );
    }
    assert!(kept);
}
