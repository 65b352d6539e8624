//! Where memory comes from when it is written, and which parts of it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use crate::error::{Context as _, Error, Result};

/// A page, in bytes.
pub const PAGE_BYTES: u64 = 4096;

/// Frozen memory, read by offset. Offsets count through all regions, as in the VM's memfd.
pub trait Pages {
    /// Fills `into` with the memory at `offset`.
    ///
    /// # Errors
    /// Whatever reading gave; the snapshot is then not written.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;
}

/// A memfd or a file whose offsets are the memory's.
impl Pages for File {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(into, offset)
    }
}

impl Pages for &[u8] {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let found = usize::try_from(offset)
            .ok()
            .and_then(|offset| self.get(offset..)?.get(..into.len()));
        into.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// A stretch of whole pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Its first byte's offset in memory.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u64,
}

impl Run {
    /// The offset after its last byte; its makers checked that there is one.
    pub const fn end(&self) -> u64 {
        self.offset + self.length
    }
}

/// The pages of a memfd or file that hold anything (`SEEK_DATA`, `SEEK_HOLE`), as ascending runs
/// of whole pages; the last one ends at the file's end. Swapped-out pages count.
///
/// # Errors
/// [`Error::Io`].
pub fn populated(file: &File) -> Result<Vec<Run>> {
    populated_at(file, "the memory file".as_ref())
}

/// As [`populated`], with a path for errors.
pub(crate) fn populated_at(file: &File, path: &Path) -> Result<Vec<Run>> {
    let length = file.metadata().at("stat", path)?.len();
    let mut runs: Vec<Run> = Vec::new();
    let mut from = 0;
    while from < length {
        let data = match seek(file, SeekFrom::Data(from)) {
            Err(Errno::NXIO) => break,
            other => other.at("find data in", path)?,
        };
        let hole = seek(file, SeekFrom::Hole(data)).at("find holes in", path)?;
        let start = data / PAGE_BYTES * PAGE_BYTES;
        let end = hole.next_multiple_of(PAGE_BYTES).min(length);
        match runs.last_mut() {
            Some(last) if last.end() >= start => last.length = end - last.offset,
            _ => runs.push(Run {
                offset: start,
                length: end - start,
            }),
        }
        // A file that changes underneath could answer with no progress.
        from = end.max(from + PAGE_BYTES);
    }
    Ok(runs)
}

/// Checks a caller's runs against the memory and joins those that touch.
pub(crate) fn joined(runs: &[Run], memory_bytes: u64) -> Result<Vec<Run>> {
    let mut joined: Vec<Run> = Vec::new();
    let mut free_from = 0;
    for run in runs {
        let end = run
            .offset
            .checked_add(run.length)
            .filter(|end| *end <= memory_bytes);
        let (Some(end), true) = (end, run.offset >= free_from) else {
            return Err(Error::request(format!(
                "the run of {} bytes at {} overlaps one before it or ends after the memory",
                run.length, run.offset
            )));
        };
        if (run.offset | run.length) % PAGE_BYTES != 0 {
            return Err(Error::request(format!(
                "the run of {} bytes at {} is not whole pages",
                run.length, run.offset
            )));
        }
        match joined.last_mut() {
            _ if run.length == 0 => {}
            Some(last) if last.end() == run.offset => last.length += run.length,
            _ => joined.push(*run),
        }
        free_from = end;
    }
    Ok(joined)
}

/// Whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let (blocks, rest) = bytes.as_chunks::<64>();
    // One word or'ed over a block compiles to vector instructions; the blocks end early.
    blocks
        .iter()
        .all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(offset: u64, length: u64) -> Run {
        Run { offset, length }
    }

    #[test]
    fn runs_that_touch_are_joined() {
        let runs = [
            run(0, 4096),
            run(4096, 8192),
            run(8192 * 2, 0),
            run(20480, 4096),
        ];
        assert_eq!(
            joined(&runs, 1 << 20).unwrap(),
            [run(0, 12288), run(20480, 4096)]
        );
    }

    #[test]
    fn runs_that_overlap_or_leave_the_memory_are_refused() {
        for runs in [
            &[run(0, 8192), run(4096, 4096)][..],
            &[run(8192, 4096), run(0, 4096)],
            &[run(0, 1 << 21)],
            &[run(u64::MAX - 4095, 8192)],
            &[run(1, 4096)],
            &[run(0, 100)],
        ] {
            match joined(runs, 1 << 20) {
                Err(Error::BadRequest { .. }) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn populated_runs_cover_the_data_and_leave_out_the_holes() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        assert_eq!(populated(&file).unwrap(), []);
        file.write_all_at(b"x", 5 * 4096 + 7).unwrap();
        file.write_all_at(b"x", (1 << 20) - 1).unwrap();
        assert_eq!(
            populated(&file).unwrap(),
            [run(5 * 4096, 4096), run((1 << 20) - 4096, 4096)]
        );
    }

    #[test]
    fn one_set_bit_anywhere_is_not_zero() {
        let mut bytes = [0_u8; 200];
        assert!(is_zero(&bytes));
        for place in 0..bytes.len() {
            bytes[place] = 1;
            assert!(!is_zero(&bytes), "{place}");
            bytes[place] = 0;
        }
    }
}
