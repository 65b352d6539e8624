//! `memory.index`.

use std::path::Path;

use crate::binary::{self, Header};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::manifest::MAX_MEMORY_BYTES;
use crate::pages::PAGE_BYTES;

const MAGIC: [u8; 8] = *b"RTNCHNK1";
const ENTRY_BYTES: usize = 48;
/// 256 GiB in chunks of 64 KiB; more memory needs larger chunks.
pub(crate) const MAX_CHUNKS: u64 = 1 << 22;
/// Smallest and largest chunk; powers of two.
pub(crate) const CHUNK_BYTES: std::ops::RangeInclusive<u32> = 4096..=2 << 20;

/// How a chunk is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Encoding {
    /// All zero, and not in the file.
    Zero = 0,
    /// As it is.
    Stored = 1,
    /// One zstd frame, shorter than the chunk.
    Zstd = 2,
}

/// One chunk's place and hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkEntry {
    /// Its first byte in `memory.chunks`.
    pub offset: u64,
    /// Its length there.
    pub stored_bytes: u32,
    /// How it is kept.
    pub encoding: Encoding,
    /// BLAKE3 of its plain bytes; 32 zero bytes for a zero chunk.
    pub blake3: Digest,
}

/// Where each chunk is. [`ChunkIndex::parse`] keeps the rules: the stored chunks lie end to end
/// from offset 0 in ascending order, with nothing between or after them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkIndex {
    chunk_bytes: u32,
    memory_bytes: u64,
    entries: Vec<ChunkEntry>,
}

impl ChunkIndex {
    /// Reads an index and checks every rule. `path` is named in errors.
    ///
    /// # Errors
    /// [`Error::NewerFormat`], [`Error::Damaged`], [`Error::DamagedChunk`].
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        let (header, raw) = binary::read::<ENTRY_BYTES>(bytes, MAGIC, MAX_CHUNKS, path)?;
        let mut index = Self {
            chunk_bytes: header.unit_bytes,
            memory_bytes: header.memory_bytes,
            entries: Vec::with_capacity(raw.len()),
        };
        if !header.unit_bytes.is_power_of_two()
            || !CHUNK_BYTES.contains(&header.unit_bytes)
            || header.memory_bytes > MAX_MEMORY_BYTES
            || header.memory_bytes % PAGE_BYTES != 0
            || header.count != header.memory_bytes.div_ceil(u64::from(header.unit_bytes))
        {
            return Err(Error::damaged(path, "its header makes no sense"));
        }
        let mut next = 0;
        for (chunk, raw) in raw.iter().enumerate() {
            let chunk = chunk as u64;
            let entry =
                entry(raw, index.place(chunk).1, next).map_err(|reason| Error::DamagedChunk {
                    path: path.to_path_buf(),
                    chunk,
                    reason: reason.into(),
                })?;
            next += u64::from(entry.stored_bytes);
            index.entries.push(entry);
        }
        Ok(index)
    }

    pub(crate) fn new(chunk_bytes: u32, memory_bytes: u64, entries: Vec<ChunkEntry>) -> Self {
        Self {
            chunk_bytes,
            memory_bytes,
            entries,
        }
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut entries = Vec::with_capacity(self.entries.len() * ENTRY_BYTES);
        for entry in &self.entries {
            entries.extend(entry.offset.to_le_bytes());
            entries.extend(entry.stored_bytes.to_le_bytes());
            entries.extend((entry.encoding as u32).to_le_bytes());
            entries.extend(entry.blake3.as_bytes());
        }
        let header = Header {
            unit_bytes: self.chunk_bytes,
            memory_bytes: self.memory_bytes,
            count: self.count(),
        };
        binary::write(MAGIC, header, &entries)
    }

    /// All of the memory, in bytes.
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// A chunk's plain length in bytes; the last one may be shorter.
    pub fn chunk_bytes(&self) -> u32 {
        self.chunk_bytes
    }

    /// How many chunks there are.
    pub fn count(&self) -> u64 {
        self.entries.len() as u64
    }

    /// A chunk's entry; none beyond the last.
    pub fn entry(&self, chunk: u64) -> Option<&ChunkEntry> {
        self.entries.get(usize::try_from(chunk).ok()?)
    }

    /// The length that `memory.chunks` must have, in bytes.
    pub fn file_length(&self) -> u64 {
        self.entries
            .iter()
            .map(|entry| u64::from(entry.stored_bytes))
            .sum()
    }

    /// A chunk's offset in memory and its plain length, in bytes; 0 long beyond the last.
    pub fn place(&self, chunk: u64) -> (u64, u32) {
        let at = chunk.saturating_mul(u64::from(self.chunk_bytes));
        let left = self.memory_bytes.saturating_sub(at);
        (at, left.min(u64::from(self.chunk_bytes)) as u32)
    }
}

/// One entry, of a chunk of `plain_bytes` that has to begin at `next` in the file.
fn entry(raw: &[u8; ENTRY_BYTES], plain_bytes: u32, next: u64) -> Result<ChunkEntry, &'static str> {
    let offset = binary::number64(raw, 0);
    let stored_bytes = binary::number32(raw, 8);
    let mut hash = [0; 32];
    hash.copy_from_slice(&raw[16..]);
    let encoding = match binary::number32(raw, 12) {
        0 => Encoding::Zero,
        1 => Encoding::Stored,
        2 => Encoding::Zstd,
        _ => return Err("its encoding is unknown"),
    };
    let sound = match encoding {
        Encoding::Zero => offset == 0 && stored_bytes == 0 && hash == [0; 32],
        Encoding::Stored => offset == next && stored_bytes == plain_bytes,
        Encoding::Zstd => offset == next && stored_bytes > 0 && stored_bytes < plain_bytes,
    };
    if !sound {
        return Err("its place in the file is wrong");
    }
    Ok(ChunkEntry {
        offset,
        stored_bytes,
        encoding,
        blake3: Digest::from_bytes(hash),
    })
}
