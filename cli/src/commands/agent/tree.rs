//! A directory as a tar archive: packed for the guest, and read back with what tells its files apart.
//!
//! What comes from a guest is not trusted: a name that is no plain path below the directory is left out.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Seek, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Component, Path};

use ignore::gitignore::{Gitignore, GitignoreBuilder};

/// More files than these are refused.
const MOST_ENTRIES: usize = 1 << 20;
/// Directories are followed so deep, as the runtime does.
const MOST_DEEP: usize = 100;
/// A longer `.gitignore` is none, in bytes.
const MAX_IGNORE_LEN: u64 = 1 << 20;

/// What a name stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// A regular file.
    File {
        /// Somebody may execute it.
        executable: bool,
        /// Where its content begins in the archive.
        offset: u64,
        /// Its length in bytes.
        len: u64,
        /// Of its content.
        hash: blake3::Hash,
    },
    /// A symbolic link, and where it leads.
    Link(String),
}

impl Entry {
    /// Whether both are the same, wherever they lie.
    pub fn is_as(&self, other: &Self) -> bool {
        match (self, other) {
            (
                Self::File {
                    executable, hash, ..
                },
                Self::File {
                    executable: other_executable,
                    hash: other_hash,
                    ..
                },
            ) => executable == other_executable && hash == other_hash,
            (one, other) => one == other,
        }
    }
}

/// An archive and what is in it, by path.
#[derive(Debug)]
pub struct Tree {
    file: File,
    /// Files and links; directories are what their files make them.
    pub entries: BTreeMap<String, Entry>,
}

impl Tree {
    /// Reads an archive whose names begin with `prefix` (`work/`, or nothing).
    pub fn read(file: File, prefix: &str) -> io::Result<Self> {
        let mut entries = BTreeMap::new();
        let mut archive = tar::Archive::new(BufReader::with_capacity(64 << 10, &file));
        for entry in archive.entries()? {
            let mut entry = entry?;
            let Some(path) = plain_path(&entry.path_bytes(), prefix) else {
                continue;
            };
            let kind = entry.header().entry_type();
            let found = if kind.is_symlink() {
                let target = entry.link_name_bytes().unwrap_or_default();
                Entry::Link(String::from_utf8_lossy(&target).into_owned())
            } else if kind.is_hard_link() {
                let target = entry.link_name_bytes().unwrap_or_default();
                let target = plain_path(&target, prefix).and_then(|path| entries.get(&path));
                let Some(target) = target else { continue };
                Entry::clone(target)
            } else if kind.is_file() || kind.is_contiguous() {
                let executable = entry.header().mode()? & 0o111 != 0;
                let offset = entry.raw_file_position();
                let mut hasher = blake3::Hasher::new();
                let len = io::copy(&mut entry, &mut hasher)?;
                Entry::File {
                    executable,
                    offset,
                    len,
                    hash: hasher.finalize(),
                }
            } else {
                continue;
            };
            entries.insert(path, found);
            if entries.len() > MOST_ENTRIES {
                return Err(io::Error::other(format!("over {MOST_ENTRIES} files")));
            }
        }
        drop(archive);
        Ok(Self { file, entries })
    }

    /// The content of a file, or where a link leads.
    pub fn content(&self, entry: &Entry) -> io::Result<Vec<u8>> {
        match entry {
            Entry::Link(target) => Ok(target.clone().into_bytes()),
            Entry::File { offset, len, .. } => {
                let len = usize::try_from(*len).map_err(io::Error::other)?;
                let mut bytes = vec![0; len];
                self.file.read_exact_at(&mut bytes, *offset)?;
                Ok(bytes)
            }
        }
    }

    /// One hash of all of it but what is left out.
    pub fn digest(&self, left_out: &LeftOut) -> String {
        let mut hasher = blake3::Hasher::new();
        let mut part = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        for (path, entry) in &self.entries {
            if left_out.has(path) {
                continue;
            }
            part(path.as_bytes());
            match entry {
                Entry::File {
                    executable, hash, ..
                } => {
                    part(if *executable { b"x" } else { b"-" });
                    part(hash.as_bytes());
                }
                Entry::Link(target) => {
                    part(b"l");
                    part(target.as_bytes());
                }
            }
        }
        hasher.finalize().to_hex().to_string()
    }
}

/// What is in no patch: `.git`, `__pycache__`, and what the directory's own `.gitignore` files name.
#[derive(Debug, Default)]
pub struct LeftOut(Vec<(String, Gitignore)>);

impl LeftOut {
    /// As the files in this tree have it.
    pub fn of(tree: &Tree) -> Self {
        let mut all = Vec::new();
        for (path, entry) in &tree.entries {
            let Some(folder) = path.strip_suffix(".gitignore") else {
                continue;
            };
            let is_short = matches!(entry, Entry::File { len, .. } if *len <= MAX_IGNORE_LEN);
            if !(folder.is_empty() || folder.ends_with('/')) || !is_short {
                continue;
            }
            let Ok(content) = tree.content(entry) else {
                continue;
            };
            let mut builder = GitignoreBuilder::new("");
            for line in String::from_utf8_lossy(&content).lines() {
                // A pattern that is none ignores nothing.
                let _ = builder.add_line(None, line);
            }
            if let Ok(built) = builder.build() {
                all.push((folder.to_owned(), built));
            }
        }
        Self(all)
    }

    /// Whether this file is left out.
    pub fn has(&self, path: &str) -> bool {
        let mut parts = path.split('/');
        if parts.any(|part| part.eq_ignore_ascii_case(".git") || part == "__pycache__") {
            return true;
        }
        // The innermost that says something.
        let says = self.0.iter().rev().find_map(|(folder, ignored)| {
            let below = path.strip_prefix(folder.as_str())?;
            let found = ignored.matched_path_or_any_parents(below, false);
            (!found.is_none()).then(|| found.is_ignore())
        });
        says.unwrap_or(false)
    }
}

/// A name as a path below the directory; `None` for one that is none.
fn plain_path(name: &[u8], prefix: &str) -> Option<String> {
    let name = std::str::from_utf8(name).ok()?;
    let name = name.trim_start_matches("./").strip_prefix(prefix)?;
    let name = name.trim_end_matches('/');
    let is_plain = !name.is_empty()
        && Path::new(name)
            .components()
            .all(|part| matches!(part, Component::Normal(_)));
    // `a//b` and `a/./b` would be second names.
    let is_plain = is_plain && name.split('/').all(|part| !part.is_empty() && part != ".");
    is_plain.then(|| name.to_owned())
}

/// Packs a directory: files, links and directories, as root's. Sockets, pipes and devices are left out.
pub fn pack(dir: &Path, into: File) -> io::Result<File> {
    let mut builder = tar::Builder::new(BufWriter::with_capacity(64 << 10, into));
    builder.follow_symlinks(false);
    let mut count = 0;
    pack_dir(&mut builder, dir, Path::new(""), 0, &mut count)?;
    let mut file = builder
        .into_inner()?
        .into_inner()
        .map_err(io::IntoInnerError::into_error)?;
    file.flush()?;
    file.rewind()?;
    Ok(file)
}

fn pack_dir<W: Write>(
    builder: &mut tar::Builder<W>,
    dir: &Path,
    name: &Path,
    deep: usize,
    count: &mut usize,
) -> io::Result<()> {
    if deep > MOST_DEEP {
        let text = format!("{} is over {MOST_DEEP} directories deep", dir.display());
        return Err(io::Error::other(text));
    }
    let mut names: Vec<_> = fs::read_dir(dir)?
        .map(|entry| Ok(entry?.file_name()))
        .collect::<io::Result<_>>()?;
    names.sort();
    for part in names {
        let (path, name) = (dir.join(&part), name.join(&part));
        let named =
            |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        let metadata = fs::symlink_metadata(&path).map_err(named)?;
        *count += 1;
        if *count > MOST_ENTRIES {
            return Err(io::Error::other(format!("over {MOST_ENTRIES} files")));
        }
        let mut header = tar::Header::new_gnu();
        header.set_metadata(&metadata);
        header.set_mode(metadata.permissions().mode() & 0o777);
        header.set_uid(0);
        header.set_gid(0);
        if metadata.is_symlink() {
            let target = fs::read_link(&path).map_err(named)?;
            header.set_size(0);
            builder
                .append_link(&mut header, &name, target)
                .map_err(named)?;
        } else if metadata.is_dir() {
            header.set_size(0);
            let mut name_of_dir = name.clone().into_os_string();
            name_of_dir.push("/");
            builder
                .append_data(&mut header, &name_of_dir, io::empty())
                .map_err(named)?;
            pack_dir(builder, &path, &name, deep + 1, count)?;
        } else if metadata.is_file() {
            let file = File::open(&path).map_err(named)?;
            // One that grows meanwhile must not spoil the archive.
            let mut content = file.take(metadata.len());
            builder
                .append_data(&mut header, &name, &mut content)
                .map_err(named)?;
            if content.limit() > 0 {
                return Err(named(io::Error::other(
                    "it became shorter while it was read",
                )));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn tree_of(dir: &Path) -> Tree {
        Tree::read(pack(dir, tempfile::tempfile().unwrap()).unwrap(), "").unwrap()
    }

    #[test]
    fn a_directory_reads_back_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        fs::write(dir.path().join("a/b/x"), "one").unwrap();
        fs::write(dir.path().join("run"), "#!/bin/sh\n").unwrap();
        fs::set_permissions(dir.path().join("run"), fs::Permissions::from_mode(0o755)).unwrap();
        std::os::unix::fs::symlink("a/b", dir.path().join("link")).unwrap();
        let tree = tree_of(dir.path());
        let names: Vec<_> = tree.entries.keys().map(String::as_str).collect();
        assert_eq!(names, ["a/b/x", "link", "run"]);
        assert_eq!(tree.content(&tree.entries["a/b/x"]).unwrap(), b"one");
        assert_eq!(tree.entries["link"], Entry::Link("a/b".into()));
        assert!(matches!(
            tree.entries["run"],
            Entry::File {
                executable: true,
                ..
            }
        ));
        let before = tree.digest(&LeftOut::default());
        assert_eq!(before, tree_of(dir.path()).digest(&LeftOut::default()));
        fs::write(dir.path().join("a/b/x"), "two").unwrap();
        assert_ne!(before, tree_of(dir.path()).digest(&LeftOut::default()));
    }

    #[test]
    fn names_that_lead_elsewhere_are_left_out() {
        assert_eq!(plain_path(b"work/a/b", "work/").as_deref(), Some("a/b"));
        assert_eq!(plain_path(b"./dir/a", "dir/").as_deref(), Some("a"));
        for odd in [
            &b"work/../x"[..],
            b"work/",
            b"work/a/../../x",
            b"/etc/passwd",
            b"work/a//b",
            b"work/\xff",
            b"other/a",
        ] {
            assert_eq!(plain_path(odd, "work/"), None, "{odd:?}");
        }
        assert_eq!(plain_path(b"/etc/passwd", ""), None);
    }

    #[test]
    fn what_git_does_not_have_is_in_no_patch() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("sub")).unwrap();
        fs::write(dir.path().join(".gitignore"), "*.log\n/target/\n").unwrap();
        fs::write(dir.path().join("sub/.gitignore"), "!keep.log\n").unwrap();
        let left_out = LeftOut::of(&tree_of(dir.path()));
        for path in [
            "a.log",
            "sub/a.log",
            "target/x",
            ".git/config",
            "x/.GIT/hooks/y",
            "__pycache__/a",
        ] {
            assert!(left_out.has(path), "{path}");
        }
        for path in ["a", "sub/keep.log", "sub/target/x", ".gitignore"] {
            assert!(!left_out.has(path), "{path}");
        }
    }
}
