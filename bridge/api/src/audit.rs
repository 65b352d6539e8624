//! Reads a run's record back and checks it.
//!
//! [`read_branch`] checks one file: every line is whole, numbered in order and names the hash of the
//! one before. [`verify_run`] checks all of a run: also that each fork begins at its parent's line,
//! and that each body is what its hash says. What nobody can see from the files alone is a branch
//! whose last lines were cut off; whoever kept a head (`vm_removed`, `usage`) gives it, and it has to
//! be there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use crate::record::{Body, Entry, FORMAT, Hash, Line, MAX_LINE_BYTES, body_file, branch_file};

/// What a record says when it is not whole.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// A file cannot be read.
    #[error("{} cannot be read", .path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A line is damaged.
    #[error("{}, line {}: {what}", .path.display(), .line + 1)]
    Line {
        /// In which file.
        path: PathBuf,
        /// Which, from 0.
        line: u64,
        /// How.
        what: String,
    },
    /// A body is missing or not what it was.
    #[error("{} is not the body that the record names: {what}", .path.display())]
    Body {
        /// Its file.
        path: PathBuf,
        /// How.
        what: String,
    },
    /// A head that somebody kept is not there.
    #[error(
        "branch \"{branch}\" has no line with the hash {head}: its end was cut off or rewritten"
    )]
    Head {
        /// Of which branch.
        branch: String,
        /// What was kept.
        head: String,
    },
}

/// A branch as it was read.
#[derive(Debug, Clone)]
pub struct Branch {
    /// All lines and their hashes.
    pub lines: Vec<(Line, Hash)>,
    /// Bytes after the last newline: a line whose writing was cut off.
    pub torn_bytes: u64,
}

impl Branch {
    /// The hash of the last line.
    #[must_use]
    pub fn head(&self) -> Hash {
        self.lines
            .last()
            .map_or_else(Hash::zero, |(_, hash)| hash.clone())
    }
}

/// What a run's check found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Each branch: its number of lines and its head.
    pub branches: BTreeMap<String, (u64, Hash)>,
    /// How many different bodies were read.
    pub bodies: usize,
}

/// Reads and checks one branch's file by itself.
///
/// # Errors
/// At the first damaged line. A torn last line is not an error here: see [`Branch::torn_bytes`].
pub fn read_branch(path: &Path) -> Result<Branch, AuditError> {
    let io = |source| AuditError::Io {
        path: path.to_owned(),
        source,
    };
    let mut file = BufReader::new(File::open(path).map_err(io)?);
    let mut branch = Branch {
        lines: Vec::new(),
        torn_bytes: 0,
    };
    let mut bytes = Vec::new();
    loop {
        bytes.clear();
        let at = branch.lines.len() as u64;
        let damaged = |what: String| AuditError::Line {
            path: path.to_owned(),
            line: at,
            what,
        };
        file.by_ref()
            .take(MAX_LINE_BYTES as u64 + 1)
            .read_until(b'\n', &mut bytes)
            .map_err(io)?;
        if bytes.is_empty() {
            return Ok(branch);
        }
        if bytes.last() != Some(&b'\n') {
            if bytes.len() > MAX_LINE_BYTES {
                return Err(damaged(format!("is over {MAX_LINE_BYTES} bytes long")));
            }
            branch.torn_bytes = bytes.len() as u64;
            return Ok(branch);
        }
        bytes.pop();
        let line: Line = serde_json::from_slice(&bytes)
            .map_err(|error| damaged(format!("is no entry of this format: {error}")))?;
        if line.seq != at {
            return Err(damaged(format!("says that it is line {}", line.seq + 1)));
        }
        match (&line.entry, branch.lines.last()) {
            (Entry::Begin { format, .. }, None) if *format != FORMAT => {
                return Err(damaged(format!(
                    "has format {format}; this version reads {FORMAT}"
                )));
            }
            (Entry::Begin { parent, .. }, None) => {
                let begins = parent
                    .as_ref()
                    .map_or_else(Hash::zero, |parent| parent.head.clone());
                if line.prev != begins {
                    return Err(damaged("does not go on from its parent's head".into()));
                }
            }
            (Entry::Begin { .. }, Some(_)) => return Err(damaged("begins a second time".into())),
            (_, None) => return Err(damaged("is first, but not a beginning".into())),
            (_, Some((_, hash))) if line.prev != *hash => {
                return Err(damaged(
                    "does not name the hash of the line before: one of the two was changed".into(),
                ));
            }
            (_, Some(_)) => {}
        }
        let hash = Hash::of_line(&bytes);
        branch.lines.push((line, hash));
    }
}

/// The names of a run's branches.
///
/// # Errors
/// When the folder cannot be read.
pub fn branch_names(run_dir: &Path) -> Result<BTreeSet<String>, AuditError> {
    let io = |source| AuditError::Io {
        path: run_dir.to_owned(),
        source,
    };
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(run_dir).map_err(io)? {
        let name = entry.map_err(io)?.file_name();
        if let Some(branch) = name.to_str().and_then(|name| name.strip_suffix(".jsonl")) {
            names.insert(branch.to_owned());
        }
    }
    Ok(names)
}

/// Checks all of a run. `kept` has heads that somebody kept, by branch: each must be a line's hash.
///
/// # Errors
/// At the first thing that is not as it was written.
pub fn verify_run(run_dir: &Path, kept: &[(String, String)]) -> Result<Report, AuditError> {
    let mut branches = BTreeMap::new();
    for name in branch_names(run_dir)? {
        let path = branch_file(run_dir, &name);
        let branch = read_branch(&path)?;
        if branch.torn_bytes > 0 || branch.lines.is_empty() {
            return Err(AuditError::Line {
                path,
                line: branch.lines.len() as u64,
                what: "is not whole; the bridge notes and mends this when it next opens the run"
                    .into(),
            });
        }
        branches.insert(name, branch);
    }
    let mut bodies = BTreeSet::new();
    for (name, branch) in &branches {
        check_beginning(run_dir, name, branch, &branches)?;
        for (line, _) in &branch.lines {
            if let Some(body) = body_of(&line.entry)
                && *body != Body::empty()
                && bodies.insert(body.hash.clone())
            {
                check_body(run_dir, body)?;
            }
        }
    }
    for (branch, head) in kept {
        let found = branches
            .get(branch)
            .is_some_and(|read| read.lines.iter().any(|(_, hash)| hash.0 == *head));
        if !found {
            return Err(AuditError::Head {
                branch: branch.clone(),
                head: head.clone(),
            });
        }
    }
    Ok(Report {
        branches: branches
            .into_iter()
            .map(|(name, branch)| (name, (branch.lines.len() as u64, branch.head())))
            .collect(),
        bodies: bodies.len(),
    })
}

/// A first line names its own file, and a line of its parent's that is there.
fn check_beginning(
    run_dir: &Path,
    name: &str,
    branch: &Branch,
    all: &BTreeMap<String, Branch>,
) -> Result<(), AuditError> {
    let damaged = |what: String| AuditError::Line {
        path: branch_file(run_dir, name),
        line: 0,
        what,
    };
    let Some((
        Line {
            entry:
                Entry::Begin {
                    branch: own,
                    parent,
                    ..
                },
            ..
        },
        _,
    )) = branch.lines.first()
    else {
        return Err(damaged("is not a beginning".into()));
    };
    if own != name {
        return Err(damaged(format!("is of branch \"{own}\"")));
    }
    let Some(parent) = parent else {
        return Ok(());
    };
    let there = all
        .get(&parent.branch)
        .and_then(|read| read.lines.get(usize::try_from(parent.seq).ok()?))
        .is_some_and(|(_, hash)| *hash == parent.head);
    if there {
        Ok(())
    } else {
        Err(damaged(format!(
            "goes on from line {} of \"{}\", which is not that line",
            parent.seq + 1,
            parent.branch
        )))
    }
}

fn body_of(entry: &Entry) -> Option<&Body> {
    match entry {
        Entry::Call { request, .. } => Some(request),
        Entry::Answer { body, .. } => Some(body),
        _ => None,
    }
}

fn check_body(run_dir: &Path, body: &Body) -> Result<(), AuditError> {
    let path = body_file(run_dir, &body.hash);
    let mut hasher = blake3::Hasher::new();
    let read = File::open(&path)
        .and_then(|mut file| io::copy(&mut file, &mut hasher))
        .map_err(|source| AuditError::Io {
            path: path.clone(),
            source,
        })?;
    if read != body.len {
        return Err(AuditError::Body {
            path,
            what: format!("it has {read} bytes, not {}", body.len),
        });
    }
    if hasher.finalize().to_hex().as_str() != body.hash.0 {
        return Err(AuditError::Body {
            path,
            what: "its hash is another".into(),
        });
    }
    Ok(())
}

#[cfg(test)]
#[path = "audit_tests.rs"]
mod tests;
