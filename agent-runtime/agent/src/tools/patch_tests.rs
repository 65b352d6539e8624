//! What a patch does to a folder: each case is files before, a patch, files after.

use std::os::unix::fs::PermissionsExt as _;

use super::*;

type Files = BTreeMap<String, String>;

fn files(given: &[(&str, &str)]) -> Files {
    given
        .iter()
        .map(|(name, text)| ((*name).to_owned(), (*text).to_owned()))
        .collect()
}

fn read(dir: &Path) -> Files {
    fn below(root: &Path, dir: &Path, into: &mut Files) {
        for entry in fs::read_dir(dir).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                below(root, &path, into);
            } else {
                let name = path
                    .strip_prefix(root)
                    .expect("below")
                    .display()
                    .to_string();
                into.insert(name, fs::read_to_string(&path).expect("text"));
            }
        }
    }
    let mut files = Files::new();
    below(dir, dir, &mut files);
    files
}

fn run(before: &[(&str, &str)], body: &str) -> (Result<String, String>, Files) {
    let dir = tempfile::tempdir().expect("a folder");
    for (name, text) in before {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        fs::write(path, text).expect("a file");
    }
    let patch = format!("*** Begin Patch\n{body}*** End Patch");
    let told = apply(dir.path(), &patch);
    (told, read(dir.path()))
}

/// The files after a patch that fits.
fn after(before: &[(&str, &str)], body: &str) -> Files {
    let (told, files) = run(before, body);
    told.expect("it fits");
    files
}

/// What is said of a patch that does not fit, which changes nothing.
fn refused(before: &[(&str, &str)], body: &str) -> String {
    let (told, now) = run(before, body);
    assert_eq!(now, files(before), "nothing may change");
    told.expect_err("it does not fit")
}

#[test]
fn files_are_added_deleted_updated_and_moved() {
    let body = "*** Add File: new/a.txt\n+one\n+\n+two\n*** Delete File: old\n*** Update File: x\n*** Move to: deep/y\n@@\n a\n-b\n+B\n c\n";
    let made = after(&[("old", "gone\n"), ("x", "a\nb\nc\n")], body);
    assert_eq!(
        made,
        files(&[("new/a.txt", "one\n\ntwo\n"), ("deep/y", "a\nB\nc\n")])
    );
}

#[test]
fn hunks_follow_each_other_and_headers_lead_to_them() {
    let text = "def a():\n    x = 1\ndef b():\n    x = 1\ndef c():\n    x = 1\n";
    let made = after(
        &[("f", text)],
        "*** Update File: f\n@@ def b():\n-    x = 1\n+    x = 2\n@@\n def c():\n-    x = 1\n+    x = 3\n",
    );
    let wanted = "def a():\n    x = 1\ndef b():\n    x = 2\ndef c():\n    x = 3\n";
    assert_eq!(made, files(&[("f", wanted)]));
    let made = after(
        &[("f", text)],
        "*** Update File: f\n@@ def b():\n@@ def c():\n-    x = 1\n+    x = 4\n",
    );
    assert!(made["f"].ends_with("def c():\n    x = 4\n"));
}

#[test]
fn a_first_hunk_needs_no_header() {
    let made = after(&[("f", "a\nb\n")], "*** Update File: f\n-a\n+A\n b\n");
    assert_eq!(made, files(&[("f", "A\nb\n")]));
}

#[test]
fn lines_that_are_only_added_go_to_the_end_or_below_the_header() {
    let made = after(&[("f", "a\nb\n")], "*** Update File: f\n@@\n+c\n");
    assert_eq!(made, files(&[("f", "a\nb\nc\n")]));
    let made = after(&[("f", "a\nb\n")], "*** Update File: f\n@@ a\n+c\n");
    assert_eq!(made, files(&[("f", "a\nc\nb\n")]));
    let made = after(&[("f", "")], "*** Update File: f\n@@\n+c\n");
    assert_eq!(made, files(&[("f", "c\n")]));
}

#[test]
fn the_end_of_a_file_is_a_place() {
    let made = after(
        &[("f", "a\nx\na\n")],
        "*** Update File: f\n@@\n-a\n+b\n*** End of File\n",
    );
    assert_eq!(made, files(&[("f", "a\nx\nb\n")]));
}

#[test]
fn lines_that_are_kept_keep_their_white_space() {
    let made = after(
        &[("f", "a  \n\tb\nc\n")],
        "*** Update File: f\n@@\n a\n b\n-c\n+C\n",
    );
    assert_eq!(made, files(&[("f", "a  \n\tb\nC\n")]));
    let made = after(
        &[("f", "it\u{2019}s \u{2014} so\nb\n")],
        "*** Update File: f\n@@\n it's - so\n-b\n+c\n",
    );
    assert_eq!(made, files(&[("f", "it\u{2019}s \u{2014} so\nc\n")]));
}

#[test]
fn line_endings_and_a_missing_end_stay() {
    let made = after(
        &[("f", "a\r\nb\r\n")],
        "*** Update File: f\n@@\n a\n-b\n+c\n",
    );
    assert_eq!(made, files(&[("f", "a\r\nc\r\n")]));
    let made = after(&[("f", "a\nb")], "*** Update File: f\n@@\n-a\n+A\n b\n");
    assert_eq!(made, files(&[("f", "A\nb")]));
    let made = after(&[("f", "a\nb")], "*** Update File: f\n@@\n a\n-b\n+c\n");
    assert_eq!(made, files(&[("f", "a\nc\n")]));
    let made = after(&[("f", "a\n")], "*** Update File: f\n@@\n-a\n");
    assert_eq!(made, files(&[("f", "")]));
}

#[test]
fn a_patch_that_does_not_fit_changes_nothing() {
    let before = &[("f", "a\n"), ("g", "b\n")];
    let said = refused(
        before,
        "*** Add File: h\n+x\n*** Update File: f\n@@\n-a\n+A\n*** Update File: g\n@@\n-zzz\n+y\n",
    );
    assert!(
        said.contains("g: these lines are not there:\nzzz"),
        "{said}"
    );
    assert!(refused(before, "*** Delete File: none\n").contains("none"));
    assert!(refused(before, "*** Update File: none\n@@\n-a\n+b\n").contains("none"));
    assert!(refused(before, "*** Update File: f\n@@ zzz\n-a\n+b\n").contains("go below"));
    assert!(
        refused(
            before,
            "*** Delete File: f\n*** Update File: f\n@@\n-a\n+b\n"
        )
        .contains("same patch")
    );
    let folders = &[("d/f", "a\n")];
    assert!(refused(folders, "*** Delete File: d\n").contains("directory"));
    assert!(refused(folders, "*** Add File: d\n+x\n").contains("directory"));
}

#[test]
fn parts_of_one_patch_see_each_other() {
    let made = after(
        &[("f", "a\n")],
        "*** Update File: f\n@@\n-a\n+b\n*** Update File: f\n@@\n-b\n+c\n*** Add File: g\n+1\n*** Update File: g\n@@\n-1\n+2\n",
    );
    assert_eq!(made, files(&[("f", "c\n"), ("g", "2\n")]));
}

#[test]
fn an_added_file_replaces_one_that_is_there() {
    let made = after(&[("f", "old\n")], "*** Add File: f\n+new\n");
    assert_eq!(made, files(&[("f", "new\n")]));
}

#[test]
fn what_is_no_patch_is_said_to_be_none() {
    for (text, what) in [
        ("", "first line"),
        ("*** Begin Patch", "last line"),
        ("*** Begin Patch\n*** End Patch", "no part"),
        ("*** Begin Patch\nhello\n*** End Patch", "is none of"),
        (
            "*** Begin Patch\n*** Add File: \n+x\n*** End Patch",
            "is none of",
        ),
        (
            "*** Begin Patch\n*** Add File: a\nx\n*** End Patch",
            "begin with +",
        ),
        (
            "*** Begin Patch\n*** Update File: a\n*** End Patch",
            "changes nothing",
        ),
        (
            "*** Begin Patch\n*** Update File: a\n@@\n*x\n*** End Patch",
            "begins with none",
        ),
        (
            "*** Begin Patch\n*** Delete File: a\n-x\n*** End Patch",
            "behind",
        ),
    ] {
        let said = parse(text).expect_err(text);
        assert!(said.contains(what), "{text:?}: {said}");
    }
}

#[test]
fn white_space_around_markers_and_a_heredoc_are_no_matter() {
    let text =
        "apply_patch <<'EOF'\n  *** Begin Patch  \n*** Add File: a \n+x\n *** End Patch\nEOF\n";
    let add = Part::Add {
        path: "a".into(),
        text: "x\n".into(),
    };
    assert_eq!(parse(text), Ok(vec![add]));
}

#[test]
fn a_file_that_moves_keeps_its_mode() {
    let dir = tempfile::tempdir().expect("a folder");
    let from = dir.path().join("run.sh");
    fs::write(&from, "a\n").expect("a file");
    fs::set_permissions(&from, fs::Permissions::from_mode(0o755)).expect("a mode");
    let patch =
        "*** Begin Patch\n*** Update File: run.sh\n*** Move to: go.sh\n@@\n-a\n+b\n*** End Patch";
    apply(dir.path(), patch).expect("it fits");
    let meta = fs::metadata(dir.path().join("go.sh")).expect("a file");
    assert_eq!(meta.permissions().mode() & 0o777, 0o755);
    assert!(!from.exists());
}
