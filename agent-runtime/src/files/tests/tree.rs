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
