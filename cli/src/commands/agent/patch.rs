//! What an agent has done to a directory: found, written as git writes it, put into the directory.
//!
//! The patch has text and links; files that are no text are told beside it. What is applied was checked to be a plain
//! path ([`super::tree`]), and is written without following a link.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, mkdirat, openat, renameat, symlinkat, unlinkat};
use rustix::io::Errno;
use similar::TextDiff;

use super::tree::{Entry, LeftOut, Tree};

/// Longer files are not shown, in bytes.
const MAX_TEXT: u64 = 4 << 20;
/// Lines around a change.
const CONTEXT: usize = 3;
/// How long a comparison of two files may take; then it is a coarser one.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(5);

/// A path that is not as it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changed {
    /// Which.
    pub path: String,
    /// What it was.
    pub before: Option<Entry>,
    /// What it is.
    pub after: Option<Entry>,
}

/// A patch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Patch {
    /// As `git diff` writes it.
    pub text: String,
    /// Files that differ and are no text.
    pub binary: Vec<String>,
}

/// All that differs, by path, but what is left out.
pub fn changes(before: &Tree, after: &Tree, left_out: &LeftOut) -> Vec<Changed> {
    let mut paths: Vec<&String> = before.entries.keys().collect();
    let new = |path: &&String| !before.entries.contains_key(*path);
    paths.extend(after.entries.keys().filter(new));
    paths.sort();
    let mut all = Vec::new();
    for path in paths {
        let (one, other) = (before.entries.get(path), after.entries.get(path));
        let is_same = matches!((one, other), (Some(one), Some(other)) if one.is_as(other));
        if !is_same && !left_out.has(path) {
            all.push(Changed {
                path: path.clone(),
                before: one.cloned(),
                after: other.cloned(),
            });
        }
    }
    all
}

/// The patch that does what was done.
pub fn patch(before: &Tree, after: &Tree, changes: &[Changed]) -> io::Result<Patch> {
    let mut patch = Patch::default();
    for changed in changes {
        let path = &changed.path;
        let content = |tree: &Tree, entry: &Option<Entry>| {
            let Some(entry) = entry else {
                return Ok(Some(String::new()));
            };
            match entry {
                Entry::File { len, .. } if *len > MAX_TEXT => Ok(None),
                _ => tree.content(entry).map(text),
            }
        };
        let one = content(before, &changed.before)?;
        let other = content(after, &changed.after)?;
        let (Some(one), Some(other)) = (one, other) else {
            patch.binary.push(path.clone());
            continue;
        };
        match (&changed.before, &changed.after) {
            // Another kind of thing: one goes, another comes.
            (Some(from), Some(to)) if is_link(from) != is_link(to) => {
                section(&mut patch.text, path, (Some(from), None), (&one, ""));
                section(&mut patch.text, path, (None, Some(to)), ("", &other));
            }
            (from, to) => section(
                &mut patch.text,
                path,
                (from.as_ref(), to.as_ref()),
                (&one, &other),
            ),
        }
    }
    Ok(patch)
}

fn is_link(entry: &Entry) -> bool {
    matches!(entry, Entry::Link(_))
}

fn text(bytes: Vec<u8>) -> Option<String> {
    String::from_utf8(bytes)
        .ok()
        .filter(|text| !text.contains('\0'))
}

fn mode(entry: &Entry) -> &'static str {
    match entry {
        Entry::Link(_) => "120000",
        Entry::File {
            executable: true, ..
        } => "100755",
        Entry::File { .. } => "100644",
    }
}

fn section(
    out: &mut String,
    path: &str,
    (from, to): (Option<&Entry>, Option<&Entry>),
    (one, other): (&str, &str),
) {
    let (a, b) = (quoted("a/", path), quoted("b/", path));
    let _ = writeln!(out, "diff --git {a} {b}");
    match (from, to) {
        (None, Some(to)) => {
            let _ = writeln!(out, "new file mode {}", mode(to));
        }
        (Some(from), None) => {
            let _ = writeln!(out, "deleted file mode {}", mode(from));
        }
        (Some(from), Some(to)) if mode(from) != mode(to) => {
            let _ = writeln!(out, "old mode {}\nnew mode {}", mode(from), mode(to));
        }
        _ => {}
    }
    if one == other {
        return;
    }
    let head_a = if from.is_some() { &a } else { "/dev/null" };
    let head_b = if to.is_some() { &b } else { "/dev/null" };
    let diff = TextDiff::configure()
        .timeout(PATIENCE)
        .diff_lines(one, other);
    let mut unified = diff.unified_diff();
    let unified = unified.context_radius(CONTEXT).header(head_a, head_b);
    let _ = write!(out, "{unified}");
    if !out.ends_with('\n') {
        out.push('\n');
    }
}

/// A name as git writes it: in quotes when it has something odd.
fn quoted(prefix: &str, path: &str) -> String {
    let is_odd = |byte: u8| !(b' '..=b'~').contains(&byte) || matches!(byte, b'"' | b'\\');
    if !path.bytes().any(is_odd) {
        return format!("{prefix}{path}");
    }
    let mut text = format!("\"{prefix}");
    for byte in path.bytes() {
        match byte {
            b'"' => text.push_str("\\\""),
            b'\\' => text.push_str("\\\\"),
            b'\n' => text.push_str("\\n"),
            b'\t' => text.push_str("\\t"),
            byte if is_odd(byte) => {
                let _ = write!(text, "\\{byte:03o}");
            }
            byte => text.push(byte as char),
        }
    }
    text.push('"');
    text
}

/// Does to `dir` what was done to its copy.
pub fn apply(dir: &Path, after: &Tree, changes: &[Changed]) -> io::Result<()> {
    for changed in changes {
        if let Some(Entry::Link(target)) = &changed.after
            && leads_out(&changed.path, target)
        {
            return Err(io::Error::other(format!(
                "{:?} is a link that leads out of the directory, to {target:?}: nothing was applied",
                changed.path
            )));
        }
    }
    let root = openat(CWD, dir, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    // What goes makes room for what comes: a file for a directory of its name.
    for changed in changes.iter().filter(|it| it.after.is_none()) {
        named(&changed.path, remove(&root, &changed.path))?;
    }
    for changed in changes {
        if let Some(entry) = &changed.after {
            named(&changed.path, put(&root, &changed.path, entry, after))?;
        }
    }
    Ok(())
}

fn named<T>(path: &str, result: io::Result<T>) -> io::Result<T> {
    result.map_err(|error| io::Error::new(error.kind(), format!("{path:?}: {error}")))
}

/// Whether a link at `path` leads out of the directory.
fn leads_out(path: &str, target: &str) -> bool {
    let mut deep = path.split('/').count() as i64 - 1;
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => deep -= 1,
            _ => deep += 1,
        }
        if deep < 0 {
            return true;
        }
    }
    target.starts_with('/')
}

/// The directory that `path` is in, and its name there. No link is followed.
fn parent<'p>(root: &OwnedFd, path: &'p str, make: bool) -> io::Result<(OwnedFd, &'p str)> {
    let mut parts: Vec<&str> = path.split('/').collect();
    let name = parts.pop().unwrap_or_default();
    let mut dir = root.try_clone()?;
    for part in parts {
        if make {
            match mkdirat(&dir, part, Mode::from_raw_mode(0o777)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        dir = openat(&dir, part, flags, Mode::empty())?;
    }
    Ok((dir, name))
}

fn remove(root: &OwnedFd, path: &str) -> io::Result<()> {
    let (dir, name) = parent(root, path, false)?;
    unlinkat(&dir, name, AtFlags::empty())?;
    // As git does: a directory without files goes.
    let mut above = path;
    while let Some((next, _)) = above.rsplit_once('/') {
        above = next;
        let (dir, name) = parent(root, above, false)?;
        if unlinkat(&dir, name, AtFlags::REMOVEDIR).is_err() {
            break;
        }
    }
    Ok(())
}

fn put(root: &OwnedFd, path: &str, entry: &Entry, tree: &Tree) -> io::Result<()> {
    let (dir, name) = parent(root, path, true)?;
    let new = format!(".ratoon-{}-new", std::process::id());
    match entry {
        Entry::Link(target) => symlinkat(target.as_str(), &dir, &new)?,
        Entry::File { executable, .. } => {
            let mode = if *executable { 0o777 } else { 0o666 };
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            let file = openat(&dir, &new, flags, Mode::from_raw_mode(mode))?;
            let written = File::from(file).write_all(&tree.content(entry)?);
            if let Err(error) = written {
                let _ = unlinkat(&dir, &new, AtFlags::empty());
                return Err(error);
            }
        }
    }
    renameat(&dir, &new, &dir, name).map_err(|error| {
        let _ = unlinkat(&dir, &new, AtFlags::empty());
        error.into()
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::process::Command;

    use super::super::tree::pack;
    use super::*;

    fn tree(dir: &Path) -> Tree {
        Tree::read(pack(dir, tempfile::tempfile().unwrap()).unwrap(), "").unwrap()
    }

    /// A directory, and what became of a copy of it.
    fn before_and_after() -> (tempfile::TempDir, tempfile::TempDir) {
        let (before, after) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for dir in [before.path(), after.path()] {
            fs::create_dir(dir.join("src")).unwrap();
            let lines: String = (0..20).map(|n| format!("line {n}\n")).collect();
            fs::write(dir.join("src/a"), lines).unwrap();
            fs::write(dir.join("src/gone"), "x").unwrap();
            fs::write(dir.join("tool"), "#!/bin/sh\n").unwrap();
            fs::write(dir.join("kind"), "file\n").unwrap();
        }
        let after_dir = after.path();
        let changed = fs::read_to_string(after_dir.join("src/a")).unwrap();
        fs::write(
            after_dir.join("src/a"),
            changed.replace("line 7\n", "seven"),
        )
        .unwrap();
        fs::remove_file(after_dir.join("src/gone")).unwrap();
        fs::set_permissions(after_dir.join("tool"), fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir(after_dir.join("new dir")).unwrap();
        fs::write(after_dir.join("new dir/\"odd\"\n"), "new\n").unwrap();
        fs::write(after_dir.join("empty"), "").unwrap();
        fs::remove_file(after_dir.join("kind")).unwrap();
        symlink("src/a", after_dir.join("kind")).unwrap();
        (before, after)
    }

    #[test]
    fn what_is_applied_is_what_was_done() {
        let (before, after) = before_and_after();
        fs::write(after.path().join("blob"), [0, 159, 146, 150]).unwrap();
        let (one, other) = (tree(before.path()), tree(after.path()));
        let none = LeftOut::default();
        let changed = changes(&one, &other, &none);
        assert_eq!(patch(&one, &other, &changed).unwrap().binary, ["blob"]);
        apply(before.path(), &other, &changed).unwrap();
        assert_eq!(tree(before.path()).digest(&none), other.digest(&none));
        assert!(changes(&tree(before.path()), &other, &none).is_empty());
    }

    #[test]
    fn git_takes_the_patch() {
        if Command::new("git").arg("--version").output().is_err() {
            return;
        }
        let (before, after) = before_and_after();
        let (one, other) = (tree(before.path()), tree(after.path()));
        let none = LeftOut::default();
        let patch = patch(&one, &other, &changes(&one, &other, &none)).unwrap();
        let file = after.path().join("the.patch");
        fs::write(&file, &patch.text).unwrap();
        let done = Command::new("git")
            .args(["apply", "--verbose"])
            .arg(&file)
            .current_dir(before.path())
            .env("GIT_CEILING_DIRECTORIES", "/")
            .output()
            .unwrap();
        assert!(done.status.success(), "{done:?}\n{}", patch.text);
        assert_eq!(
            tree(before.path()).digest(&none),
            other.digest(&none),
            "{}",
            patch.text
        );
    }

    #[test]
    fn a_link_that_leads_out_is_not_applied_and_a_link_is_not_followed() {
        assert!(!leads_out("a/b", "../c") && !leads_out("a", "b/../c"));
        for (path, target) in [
            ("a", "/etc"),
            ("a", ".."),
            ("a/b", "../../x"),
            ("a", "b/../../c"),
        ] {
            assert!(leads_out(path, target), "{path} -> {target}");
        }
        let (dir, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        symlink(outside.path(), dir.path().join("way")).unwrap();
        let after = tempfile::tempdir().unwrap();
        fs::create_dir(after.path().join("way")).unwrap();
        fs::write(after.path().join("way/out"), "x").unwrap();
        let after = tree(after.path());
        let changed = [Changed {
            path: "way/out".into(),
            before: None,
            after: Some(after.entries["way/out"].clone()),
        }];
        apply(dir.path(), &after, &changed).unwrap_err();
        assert!(fs::read_dir(outside.path()).unwrap().next().is_none());
    }
}
