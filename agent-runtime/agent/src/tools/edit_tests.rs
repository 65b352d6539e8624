//! Edge cases of the editor.

use super::*;

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}

fn file(bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let dir = folder();
    let path = dir.path().join("f");
    fs::write(&path, bytes).expect("a file");
    (dir, path)
}

fn changed(bytes: &[u8], what: impl Fn(&Path) -> Result<String, String>) -> Vec<u8> {
    let (_dir, path) = file(bytes);
    what(&path).expect("a change");
    fs::read(&path).expect("a file")
}

#[test]
fn what_is_not_replaced_keeps_its_bytes() {
    let before = b"\xff\ta\r\n\tb  \r\nlast";
    let after = changed(before, |path| replace(path, "b  ", "c"));
    assert_eq!(after, b"\xff\ta\r\n\tc\r\nlast");
    let after = changed(b"a\nb", |path| replace(path, "a\nb", ""));
    assert_eq!(after, b"");
}

#[test]
fn text_that_is_not_there_once_is_not_replaced() {
    let (_dir, path) = file(b"x\nab\nx ab\naaa\n");
    let refused = |old: &str| replace(&path, old, "y").expect_err("a refusal");
    assert!(refused("zz").contains("not in"));
    assert!(refused("ab").contains("2 times, beginning in lines 2, 3"));
    assert!(refused("aa").contains("2 times"), "they overlap");
    assert!(refused("").contains("empty"));
    assert!(replace(&path, "x", "x").is_err());
    assert_eq!(fs::read(&path).expect("a file"), b"x\nab\nx ab\naaa\n");
}

#[test]
fn lines_go_where_they_are_wanted() {
    for (before, after, text, wanted) in [
        ("", 0, "a", "a"),
        ("x\n", 0, "a", "a\nx\n"),
        ("x\ny\n", 1, "a\nb\n", "x\na\nb\ny\n"),
        ("x\ny\n", 2, "a", "x\ny\na"),
        ("x", 1, "a", "x\na"),
    ] {
        let made = changed(before.as_bytes(), |path| insert(path, after, text));
        assert_eq!(String::from_utf8_lossy(&made), wanted, "{before:?} {after}");
    }
    let (_dir, path) = file(b"x\n");
    assert!(
        insert(&path, 2, "a")
            .expect_err("a refusal")
            .contains("1 lines")
    );
}

#[test]
fn a_view_has_numbers_and_may_be_a_part() {
    let (_dir, path) = file(b"a\n\tb\nc");
    assert_eq!(
        view(&path, None).expect("a view"),
        "     1\ta\n     2\t\tb\n     3\tc\n"
    );
    assert_eq!(
        view(&path, Some((2, -1))).expect("a view"),
        "     2\t\tb\n     3\tc\n"
    );
    for range in [(0, 1), (4, 4), (2, 1), (1, 4), (1, -2)] {
        assert!(view(&path, Some(range)).is_err(), "{range:?}");
    }
}

#[test]
fn a_directory_is_shown_two_levels_deep() {
    let dir = folder();
    fs::create_dir_all(dir.path().join("a/b/c")).expect("folders");
    fs::write(dir.path().join(".hidden"), "").expect("a file");
    let text = view(dir.path(), None).expect("a view");
    assert!(text.contains("/a/\n") && text.contains("/a/b/\n"));
    assert!(!text.contains("/a/b/c") && !text.contains(".hidden"));
}

#[test]
fn what_is_no_file_is_refused() {
    assert!(read_bytes(Path::new("/dev/zero")).is_err());
    assert!(write_bytes(Path::new("/dev/null"), b"").is_err());
    let dir = folder();
    assert!(create(dir.path(), "x").is_err());
    create(&dir.path().join("new/deep/f"), "x").expect("parents are made");
}

#[test]
fn a_file_is_read_in_parts() {
    let dir = folder();
    let text: String = (1..=5).map(|n| format!("{n}\n")).collect();
    fs::write(dir.path().join("f"), text).expect("a file");
    let read = |offset, limit| {
        let read = Read {
            path: "f".into(),
            offset,
            limit,
        };
        read_file(dir.path(), &read)
    };
    let part = read(Some(2), Some(2)).expect("a part");
    assert!(part.starts_with("     2\t2\n     3\t3\n"));
    assert!(part.contains("2 more lines; go on with offset 4"));
    assert!(read(Some(9), None).is_err());
    assert_eq!(read(None, None).expect("all").lines().count(), 5);
}
