//! The content hash: one name for one content, however its zero pages are kept.
//!
//! The hash is BLAKE3 over records of non-zero pages in ascending order, each record an offset, a
//! length (64-bit little-endian, in bytes) and the bytes; at the end a record of the total length
//! with length 0 and no bytes. A record is a longest stretch of non-zero pages, cut at multiples
//! of 1 MiB. Holes and zero pages are therefore the same thing.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use crate::digest::Digest;
use crate::error::{Context as _, Result};
use crate::pages::{PAGE_BYTES, Pages, Run, is_zero, populated_at};
use crate::{Progress, tick};

/// Records end at its multiples; also the size of our reads.
pub(crate) const CUT_BYTES: u64 = 1 << 20;

/// Takes the records: writes them, or nothing.
pub(crate) type Sink<'s> = &'s mut dyn FnMut(u64, &[u8]) -> Result<()>;

/// Hashes content that comes in ascending order, and hands its records on.
pub(crate) struct Hashing<'s> {
    hasher: blake3::Hasher,
    record: Vec<u8>,
    record_at: u64,
    sink: Sink<'s>,
}

impl<'s> Hashing<'s> {
    /// `hasher` may have something in it already.
    pub(crate) fn new(hasher: blake3::Hasher, sink: Sink<'s>) -> Self {
        Self {
            hasher,
            record: Vec::with_capacity(CUT_BYTES as usize),
            record_at: 0,
            sink,
        }
    }

    /// Takes whole pages at a page's offset; only the content's last page may be short.
    pub(crate) fn update(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        debug_assert_eq!(offset % PAGE_BYTES, 0, "pages begin at multiples of a page");
        let mut at = offset;
        for page in bytes.chunks(PAGE_BYTES as usize) {
            if !is_zero(page) {
                let next = self.record_at + self.record.len() as u64;
                if at != next || at.is_multiple_of(CUT_BYTES) {
                    self.flush()?;
                    self.record_at = at;
                }
                self.record.extend_from_slice(page);
            }
            at += page.len() as u64;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        if self.record.is_empty() {
            return Ok(());
        }
        self.hasher.update(&self.record_at.to_le_bytes());
        self.hasher
            .update(&(self.record.len() as u64).to_le_bytes());
        self.hasher.update(&self.record);
        (self.sink)(self.record_at, &self.record)?;
        self.record.clear();
        Ok(())
    }

    /// The hash of content of this total length.
    pub(crate) fn finish(mut self, length: u64) -> Result<Digest> {
        self.flush()?;
        self.hasher.update(&length.to_le_bytes());
        self.hasher.update(&0_u64.to_le_bytes());
        Ok(self.hasher.finalize().into())
    }
}

/// Reads the runs of `source` in blocks that end at multiples of 1 MiB.
pub(crate) fn read_runs(
    source: &dyn Pages,
    runs: &[Run],
    path: &Path,
    progress: &dyn Progress,
    mut each: impl FnMut(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    let total = runs.iter().map(|run| run.length).sum();
    let mut done = 0;
    let mut buffer = vec![0; CUT_BYTES as usize];
    for run in runs {
        let mut at = run.offset;
        while at < run.end() {
            let length = (CUT_BYTES - at % CUT_BYTES).min(run.end() - at);
            let block = &mut buffer[..length as usize];
            source.read_at(at, block).at("read", path)?;
            each(at, block)?;
            at += length;
            done += length;
            tick(progress, done, total)?;
        }
    }
    Ok(())
}

/// Copies `runs` of `source` into a new file of `length` bytes, leaving out zero pages; gives the
/// content hash.
pub(crate) fn copy_sparse(
    source: &dyn Pages,
    runs: &[Run],
    length: u64,
    to: (&File, &Path),
    progress: &dyn Progress,
) -> Result<Digest> {
    let (file, path) = to;
    file.set_len(length).at("set the length of", path)?;
    let mut write = |at: u64, bytes: &[u8]| file.write_all_at(bytes, at).at("write", path);
    let mut hashing = Hashing::new(blake3::Hasher::new(), &mut write);
    read_runs(source, runs, path, progress, |at, bytes| {
        hashing.update(at, bytes)
    })?;
    hashing.finish(length)
}

/// The content hash of a whole file. Holes are skipped, not read. `path` is named in errors.
///
/// # Errors
/// [`Error::Io`](crate::Error::Io), [`Error::Cancelled`](crate::Error::Cancelled).
pub fn hash_file(file: &File, path: &Path, progress: &dyn Progress) -> Result<Digest> {
    let length = file.metadata().at("stat", path)?.len();
    let runs = populated_at(file, path)?;
    let mut nowhere = |_: u64, _: &[u8]| Ok(());
    let mut hashing = Hashing::new(blake3::Hasher::new(), &mut nowhere);
    read_runs(file, &runs, path, progress, |at, bytes| {
        hashing.update(at, bytes)
    })?;
    hashing.finish(length)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Quiet;

    #[test]
    fn the_hash_is_that_of_the_documented_records() {
        let mut bytes = vec![0_u8; (2 << 20) + 100];
        bytes[4096..12288].fill(1);
        bytes[(1 << 20) - 4096..(1 << 20) + 4096].fill(2);
        bytes[(2 << 20) + 50] = 3;
        let mut stream = Vec::new();
        for (offset, length) in [
            (4096_usize, 8192_usize),
            ((1 << 20) - 4096, 4096),
            (1 << 20, 4096),
            (2 << 20, 100),
        ] {
            stream.extend((offset as u64).to_le_bytes());
            stream.extend((length as u64).to_le_bytes());
            stream.extend(&bytes[offset..offset + length]);
        }
        stream.extend((bytes.len() as u64).to_le_bytes());
        stream.extend(0_u64.to_le_bytes());

        let full = tempfile::tempfile().unwrap();
        full.write_all_at(&bytes, 0).unwrap();
        let sparse = tempfile::tempfile().unwrap();
        let length = bytes.len() as u64;
        let whole = [Run { offset: 0, length }];
        let path = Path::new("x");
        let written = copy_sparse(&full, &whole, length, (&sparse, path), &Quiet).unwrap();
        assert_eq!(written, Digest::of(&stream));
        for file in [&full, &sparse] {
            assert_eq!(hash_file(file, path, &Quiet).unwrap(), written);
        }
        assert!(populated_at(&sparse, path).unwrap().len() >= 3);
        let mut back = vec![9; bytes.len()];
        sparse.read_exact_at(&mut back, 0).unwrap();
        assert!(back == bytes);
    }

    #[test]
    fn the_hash_does_not_depend_on_how_the_content_is_cut() {
        let bytes: Vec<u8> = (0..40 * 4096_u32).map(|at| (at / 4096) as u8 % 3).collect();
        let hash = |pages: usize| {
            let mut nowhere = |_: u64, _: &[u8]| Ok(());
            let mut hashing = Hashing::new(blake3::Hasher::new(), &mut nowhere);
            for (place, block) in bytes.chunks(pages * 4096).enumerate() {
                hashing
                    .update((place * pages * 4096) as u64, block)
                    .unwrap();
            }
            hashing.finish(bytes.len() as u64).unwrap()
        };
        assert_eq!(hash(1), hash(40));
        assert_eq!(hash(7), hash(40));
    }
}
