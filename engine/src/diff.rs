//! What two machines that come from one have different on their disks.
//!
//! Both guests list their root file system; entries differ by kind, length, mode, owner, the time of their
//! last change, or a link's target. Other file systems (`/proc`, `/sys`, `/dev`, `/run`) are left out. A file
//! that was written with what it had before differs by its time.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use ratoon_protocol::{Call, FileEntry, FileKind, FileList};
use serde::Serialize;
use serde_json::Value;

use crate::runtime::{CallIo, RuntimeClient, RuntimeError};
use crate::vm::record::VmDir;
use crate::vm::standstill;

/// How long the runtime may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// Directories of the root that are other file systems.
const ELSEWHERE: [&str; 4] = ["proc", "sys", "dev", "run"];
/// More entries than these are refused: a guest says how many there are.
const MOST_ENTRIES: usize = 4 << 20;
/// A longer line of a listing is none.
const MAX_LINE: usize = 64 << 10;

/// How an entry of the second machine differs from the first's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Difference {
    /// The first has none.
    Added,
    /// The second has none.
    Removed,
    /// Both have one.
    Modified,
}

/// An entry that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Changed {
    /// Where.
    pub path: String,
    /// How.
    pub difference: Difference,
    /// Its kind, in the machine that has it, the second if both do.
    pub kind: FileKind,
    /// Length in bytes there.
    pub size: u64,
}

/// Why two machines cannot be compared.
#[derive(Debug, thiserror::Error)]
pub enum DiffError {
    /// A runtime.
    #[error("the files of VM {id}")]
    Runtime {
        /// Of which VM.
        id: String,
        /// What is wrong.
        #[source]
        source: RuntimeError,
    },
    /// A listing that is none.
    #[error("the runtime of VM {id} lists what is no file: {why}")]
    Listing {
        /// Of which VM.
        id: String,
        /// What is wrong.
        why: &'static str,
    },
}

/// What differs between the disks of the running VMs in `one` and `other`, by path. Both are asked at once.
///
/// # Errors
/// [`DiffError`].
pub fn diff(one: &VmDir, other: &VmDir, path: &Path) -> Result<Vec<Changed>, DiffError> {
    let root = path.to_string_lossy();
    let (one, other) = std::thread::scope(|scope| {
        let first = scope.spawn(|| listing(one, &root));
        let second = listing(other, &root);
        match first.join() {
            Ok(first) => (first, second),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    });
    Ok(compare(&one?, other?))
}

type Listing = BTreeMap<String, FileEntry>;

fn compare(one: &Listing, other: Listing) -> Vec<Changed> {
    let of = |entry: &FileEntry, difference| Changed {
        path: entry.path.clone(),
        difference,
        kind: entry.kind,
        size: entry.size,
    };
    let removed = one.iter().filter(|(path, _)| !other.contains_key(*path));
    let mut changed: Vec<_> = removed
        .map(|(_, entry)| of(entry, Difference::Removed))
        .collect();
    for (path, entry) in &other {
        match one.get(path) {
            None => changed.push(of(entry, Difference::Added)),
            // A directory changes with what is in it, which is told itself.
            Some(before) if is_same(before, entry) => {}
            Some(_) => changed.push(of(entry, Difference::Modified)),
        }
    }
    changed.sort_by(|a, b| a.path.cmp(&b.path));
    changed
}

fn is_same(one: &FileEntry, other: &FileEntry) -> bool {
    if one.kind == FileKind::Directory && other.kind == FileKind::Directory {
        return (one.mode, one.uid, one.gid) == (other.mode, other.uid, other.gid);
    }
    one == other
}

fn listing(dir: &VmDir, root: &str) -> Result<Listing, DiffError> {
    let id = dir.id();
    let runtime = |source| DiffError::Runtime {
        id: id.clone(),
        source,
    };
    let mut client = standstill::connect(dir, CONNECT_TIMEOUT).map_err(runtime)?;
    let mut all = Listing::new();
    if root != "/" {
        list(&mut client, &id, root, 0, &mut all)?;
        return Ok(all);
    }
    list(&mut client, &id, "/", 1, &mut all)?;
    let inner = |entry: &&FileEntry| {
        let name = entry.path.trim_start_matches('/');
        entry.kind == FileKind::Directory && !ELSEWHERE.contains(&name)
    };
    let directories: Vec<_> = all
        .values()
        .filter(inner)
        .map(|it| it.path.clone())
        .collect();
    for directory in directories {
        list(&mut client, &id, &directory, 0, &mut all)?;
    }
    Ok(all)
}

/// Adds what is in a directory of the guest.
fn list(
    client: &mut RuntimeClient,
    id: &str,
    path: &str,
    depth: u32,
    all: &mut Listing,
) -> Result<(), DiffError> {
    let call = Call::FileList(FileList {
        path: path.to_owned(),
        depth,
        ..FileList::default()
    });
    let mut lines = Lines {
        all,
        line: Vec::new(),
        wrong: None,
    };
    let mut io = CallIo {
        stdin: None,
        stdout: &mut lines,
        stderr: &mut io::sink(),
        data: &mut io::sink(),
        events: &mut |_| {},
        ended: &mut |_| {},
    };
    let listed: Result<Value, RuntimeError> = client.run(&call, &mut io);
    if let Some(why) = lines.wrong {
        let id = id.to_owned();
        return Err(DiffError::Listing { id, why });
    }
    let id = id.to_owned();
    listed.map_err(|source| DiffError::Runtime { id, source })?;
    Ok(())
}

/// Takes a listing, a line of JSON for each entry.
struct Lines<'l> {
    all: &'l mut Listing,
    line: Vec<u8>,
    wrong: Option<&'static str>,
}

impl Lines<'_> {
    fn take(&mut self) -> Result<(), &'static str> {
        let entry: FileEntry =
            serde_json::from_slice(&self.line).map_err(|_| "a line is no entry")?;
        self.line.clear();
        self.all.insert(entry.path.clone(), entry);
        match self.all.len() > MOST_ENTRIES {
            true => Err("there are too many"),
            false => Ok(()),
        }
    }
}

impl Write for Lines<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            let taken = match byte {
                b'\n' => self.take(),
                _ if self.line.len() >= MAX_LINE => Err("a line is too long"),
                _ => {
                    self.line.push(*byte);
                    Ok(())
                }
            };
            if let Err(why) = taken {
                self.wrong = Some(why);
                return Err(io::Error::other(why));
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &str, kind: FileKind, size: u64, modified_us: i64) -> (String, FileEntry) {
        let entry = FileEntry {
            path: path.to_owned(),
            kind,
            size,
            mode: 0o644,
            uid: 0,
            gid: 0,
            modified_us,
            target: None,
        };
        (path.to_owned(), entry)
    }

    #[test]
    fn what_was_added_removed_and_written_is_told_by_path() {
        use FileKind::{Directory, File};
        let one = [
            entry("/d", Directory, 0, 1),
            entry("/d/gone", File, 1, 1),
            entry("/d/same", File, 1, 1),
            entry("/d/written", File, 1, 1),
        ];
        let other = [
            entry("/d", Directory, 0, 2),
            entry("/d/new", File, 3, 2),
            entry("/d/same", File, 1, 1),
            entry("/d/written", File, 1, 2),
        ];
        let changed = compare(&one.into(), other.into());
        let words: Vec<_> = changed
            .iter()
            .map(|it| format!("{:?} {}", it.difference, it.path))
            .collect();
        assert_eq!(
            words,
            ["Removed /d/gone", "Added /d/new", "Modified /d/written"]
        );
    }

    #[test]
    fn a_guest_that_lists_nonsense_is_refused() {
        let mut all = Listing::new();
        let mut lines = Lines {
            all: &mut all,
            line: Vec::new(),
            wrong: None,
        };
        assert!(lines.write(b"{\"path\":").is_ok());
        assert!(lines.write(b"\n").is_err());
        assert_eq!(lines.wrong, Some("a line is no entry"));
        let mut lines = Lines {
            all: &mut all,
            line: Vec::new(),
            wrong: None,
        };
        assert!(lines.write(&vec![b'x'; MAX_LINE + 1]).is_err());
    }
}
