//! Records that are whole, and records in which one thing was changed.

use super::*;
use crate::amount::Limits;
use crate::record::Parent;

/// Writes a branch of `entries` after its beginning; gives its head.
fn write(dir: &Path, branch: &str, parent: Option<Parent>, entries: &[Entry]) -> Hash {
    let mut prev = parent
        .as_ref()
        .map_or_else(Hash::zero, |parent| parent.head.clone());
    let begin = Entry::Begin {
        format: FORMAT,
        run: "run".into(),
        branch: branch.into(),
        parent,
        budget: Limits::default(),
    };
    let mut file = Vec::new();
    for (seq, entry) in std::iter::once(&begin).chain(entries).enumerate() {
        let line = Line {
            seq: seq as u64,
            prev,
            time_ms: 1,
            entry: entry.clone(),
        };
        let bytes = serde_json::to_vec(&line).expect("a line");
        prev = Hash::of_line(&bytes);
        file.extend_from_slice(&bytes);
        file.push(b'\n');
    }
    fs::write(branch_file(dir, branch), file).expect("a file");
    prev
}

fn vm(id: &str) -> Entry {
    Entry::Vm { vm: id.into() }
}

/// A run with a fork.
fn run() -> (tempfile::TempDir, Hash) {
    let dir = tempfile::tempdir().expect("a folder");
    let head = write(dir.path(), "main", None, &[vm("a"), vm("b")]);
    let parent = Parent {
        branch: "main".into(),
        seq: 2,
        head: head.clone(),
    };
    write(dir.path(), "child", Some(parent), &[vm("c")]);
    (dir, head)
}

fn edit(dir: &Path, branch: &str, from: &str, to: &str) -> String {
    let path = branch_file(dir, branch);
    let text = fs::read_to_string(&path).expect("a record");
    assert!(text.contains(from), "{text}");
    fs::write(&path, text.replacen(from, to, 1)).expect("a file");
    verify_run(dir, &[]).expect_err("damage").to_string()
}

#[test]
fn a_whole_run_with_a_fork_is_found_whole() {
    let (dir, head) = run();
    let kept = [("main".to_owned(), head.0.clone())];
    let report = verify_run(dir.path(), &kept).expect("whole");
    assert_eq!(report.branches["main"], (3, head));
    assert_eq!(report.branches["child"].0, 2);
}

#[test]
fn a_changed_line_is_found() {
    let (dir, _) = run();
    let error = edit(dir.path(), "main", "\"vm\":\"a\"", "\"vm\":\"x\"");
    assert!(error.contains("line 3: does not name the hash"), "{error}");
}

#[test]
fn a_changed_last_line_of_a_parent_is_found_by_its_child() {
    let (dir, _) = run();
    let error = edit(dir.path(), "main", "\"vm\":\"b\"", "\"vm\":\"x\"");
    assert!(error.contains("which is not that line"), "{error}");
}

#[test]
fn a_removed_line_and_another_order_are_found() {
    let (dir, _) = run();
    let path = branch_file(dir.path(), "main");
    let text = fs::read_to_string(&path).expect("a record");
    let lines: Vec<&str> = text.lines().collect();
    for order in [&[0, 2][..], &[0, 2, 1], &[1, 2], &[0, 0, 1, 2]] {
        let changed: String = order.iter().map(|at| format!("{}\n", lines[*at])).collect();
        fs::write(&path, changed).expect("a file");
        let error = verify_run(dir.path(), &[]).expect_err("damage");
        assert!(
            matches!(error, AuditError::Line { .. }),
            "{order:?}: {error}"
        );
    }
}

#[test]
fn an_end_that_was_cut_off_is_found_by_a_kept_head() {
    let dir = tempfile::tempdir().expect("a folder");
    let head = write(dir.path(), "main", None, &[vm("a"), vm("b")]);
    write(dir.path(), "main", None, &[vm("a")]);
    verify_run(dir.path(), &[]).expect("by itself it looks whole");
    let error = verify_run(dir.path(), &[("main".into(), head.0)]).expect_err("cut");
    assert!(matches!(error, AuditError::Head { .. }), "{error}");
}

#[test]
fn a_torn_last_line_is_told() {
    let (dir, _) = run();
    let path = branch_file(dir.path(), "child");
    let mut text = fs::read_to_string(&path).expect("a record");
    text.push_str("{\"seq\":2");
    fs::write(&path, text).expect("a file");
    assert_eq!(read_branch(&path).expect("readable").torn_bytes, 8);
    let error = verify_run(dir.path(), &[]).expect_err("torn").to_string();
    assert!(error.contains("is not whole"), "{error}");
}

#[test]
fn a_body_that_is_missing_or_another_is_found() {
    let dir = tempfile::tempdir().expect("a folder");
    let body = Body {
        hash: Hash::of_body(b"hello"),
        len: 5,
    };
    let answer = Entry::Answer {
        call: 0,
        ending: crate::record::Ending::Complete,
        status: 200,
        media_type: "application/json".into(),
        body: body.clone(),
        charged: crate::amount::Amount::default(),
        cached_tokens: 0,
        attempts: 1,
        first_byte_us: 1,
        total_us: 2,
    };
    write(dir.path(), "main", None, &[answer]);
    assert!(matches!(
        verify_run(dir.path(), &[]),
        Err(AuditError::Io { .. })
    ));
    fs::create_dir(dir.path().join("bodies")).expect("a folder");
    let path = body_file(dir.path(), &body.hash);
    for wrong in ["hellO", "hell"] {
        fs::write(&path, wrong).expect("a file");
        let error = verify_run(dir.path(), &[]).expect_err("another");
        assert!(matches!(error, AuditError::Body { .. }), "{error}");
    }
    fs::write(&path, "hello").expect("a file");
    assert_eq!(verify_run(dir.path(), &[]).expect("whole").bodies, 1);
}
