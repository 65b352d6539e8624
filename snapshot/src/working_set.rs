//! The working set: which pages a clone touched between its restore and its first answer.
//!
//! It lies beside the snapshot as `working-set`, in the frame of `memory.runs`, and is no part of it:
//! it is made by the first restore, not exported, not verified. A wrong one costs time, never
//! a byte: it only says what to fetch early.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, openat};
use rustix::io::Errno;

use crate::error::{Context as _, Error, Result};
use crate::files;
use crate::memory::RunIndex;
use crate::pages::{PAGE_BYTES, Run};
use crate::snapshot::Snapshot;

const MAGIC: [u8; 8] = *b"RTNWSET1";
/// An index of 1 MiB.
const MAX_RUNS: u64 = 1 << 16;
/// Pages this close are one run: the disk reads them at one go.
const GAP_BYTES: u64 = 16 * PAGE_BYTES;
/// A larger set is no working set: fetching it early would only be in the way.
const MAX_BYTES: u64 = 512 << 20;

/// The path in a snapshot's folder.
fn path_in(folder: &Path) -> std::path::PathBuf {
    folder.join(files::WORKING_SET)
}

/// Whether the snapshot in this folder has a working set, good or bad.
pub fn has_working_set(folder: &Path) -> bool {
    path_in(folder).exists()
}

/// Reads the working set of the snapshot in `folder`, of so many bytes of memory; none: nobody has
/// recorded one.
///
/// # Errors
/// [`Error::Damaged`], [`Error::NewerFormat`], [`Error::Io`]. Whoever restores goes on without.
pub fn read_working_set(folder: &Path, memory_bytes: u64) -> Result<Option<Vec<Run>>> {
    let path = path_in(folder);
    let limit = crate::binary::length(MAX_RUNS, 16);
    let bytes = match files::read_bounded(&path, limit) {
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            return Ok(None);
        }
        other => other?,
    };
    let index = RunIndex::parse_as(&bytes, MAGIC, MAX_RUNS, &path)?;
    if index.memory_bytes != memory_bytes || index.file_length() > MAX_BYTES {
        return Err(Error::damaged(&path, "it does not fit the memory"));
    }
    Ok(Some(index.runs))
}

/// Records a working set, ascending runs of whole pages, unless there is one already.
///
/// # Errors
/// [`Error::BadRequest`] for a set that is too large or lies outside; [`Error::Io`].
pub fn record_working_set(folder: &Path, memory_bytes: u64, touched: &[Run]) -> Result<()> {
    let path = path_in(folder);
    let mut runs: Vec<Run> = Vec::new();
    for run in crate::pages::joined(touched, memory_bytes)? {
        match runs.last_mut() {
            Some(last) if run.offset - last.end() <= GAP_BYTES => {
                last.length = run.end() - last.offset;
            }
            _ => runs.push(run),
        }
    }
    let index = RunIndex { memory_bytes, runs };
    if index.runs.len() as u64 > MAX_RUNS || index.file_length() > MAX_BYTES {
        return Err(Error::request("its working set is too large to be one"));
    }
    // A file without a name until it is complete: a crash leaves nothing.
    let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
    let file = openat(CWD, folder, flags, Mode::from_raw_mode(0o444)).at("create", &path)?;
    let mut file = File::from(file);
    file.write_all(&index.to_bytes_as(MAGIC))
        .at("write", &path)?;
    let from = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    match linkat(CWD, from, CWD, &path, AtFlags::SYMLINK_FOLLOW) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error).at("create", &path),
    }
}

impl Snapshot {
    /// Its working set, if one was recorded.
    ///
    /// # Errors
    /// As [`read_working_set`].
    pub fn working_set(&self) -> Result<Option<Vec<Run>>> {
        read_working_set(&self.folder, self.manifest.memory.bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const MEMORY: u64 = 1 << 30;

    fn run(page: u64, pages: u64) -> Run {
        Run {
            offset: page * PAGE_BYTES,
            length: pages * PAGE_BYTES,
        }
    }

    #[test]
    fn what_was_recorded_reads_back_with_small_gaps_filled_and_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        assert!(!has_working_set(folder));
        assert_eq!(read_working_set(folder, MEMORY).unwrap(), None);
        let touched = [run(1, 1), run(3, 2), run(100, 1)];
        record_working_set(folder, MEMORY, &touched).unwrap();
        record_working_set(folder, MEMORY, &[run(7, 7)]).unwrap();
        assert!(has_working_set(folder));
        let found = read_working_set(folder, MEMORY).unwrap();
        assert_eq!(found, Some(vec![run(1, 4), run(100, 1)]));
        assert_eq!(fs::read_dir(folder).unwrap().count(), 1);
    }

    #[test]
    fn a_changed_bit_or_a_lost_end_is_damage() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        record_working_set(folder, MEMORY, &[run(1, 1), run(100, 1)]).unwrap();
        let path = path_in(folder);
        let whole = fs::read(&path).unwrap();
        let spoil = |bytes: &[u8], what: &str| {
            fs::remove_file(&path).unwrap();
            fs::write(&path, bytes).unwrap();
            match read_working_set(folder, MEMORY) {
                Err(Error::Damaged { .. } | Error::NewerFormat { .. }) => {}
                other => panic!("{what}: {other:?}"),
            }
        };
        for place in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[place] ^= 1;
            spoil(&bytes, &format!("byte {place}"));
            spoil(&whole[..place], &format!("{place} bytes"));
        }
    }

    #[test]
    fn a_set_of_other_memory_is_damage_and_too_large_a_set_is_not_recorded() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        for touched in [&[run(0, MEMORY / PAGE_BYTES)][..], &[run(1 << 18, 1)]] {
            match record_working_set(folder, MEMORY, touched) {
                Err(Error::BadRequest { .. }) => {}
                other => panic!("{other:?}"),
            }
        }
        assert!(!has_working_set(folder));
        record_working_set(folder, MEMORY, &[run(1, 1)]).unwrap();
        match read_working_set(folder, 2 * MEMORY) {
            Err(Error::Damaged { .. }) => {}
            other => panic!("{other:?}"),
        }
    }
}
