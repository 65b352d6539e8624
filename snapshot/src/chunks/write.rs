//! Writing chunked memory.

use std::io::{BufWriter, Write as _};
use std::path::Path;

use zstd::bulk::Compressor;

use super::index::{CHUNK_BYTES, ChunkEntry, ChunkIndex, Encoding, MAX_CHUNKS};
use crate::content::Hashing;
use crate::digest::Digest;
use crate::error::{Context as _, Error, Result};
use crate::files;
use crate::manifest::{Blob, Memory, MemoryKind, Region};
use crate::memory::check_layout;
use crate::pages::{Pages, Run, is_zero};
use crate::{Progress, tick};

/// How to chunk and compress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkOptions {
    /// Plain bytes of a chunk: a power of two from 4 KiB to 2 MiB.
    pub chunk_bytes: u32,
    /// zstd's level, 1 to 19.
    pub level: i32,
}

impl Default for ChunkOptions {
    fn default() -> Self {
        Self {
            chunk_bytes: 64 << 10,
            level: 1,
        }
    }
}

/// Writes `memory.chunks` and `memory.index` into `folder`.
pub(crate) fn write_chunks(
    folder: &Path,
    regions: &[Region],
    source: &dyn Pages,
    runs: &[Run],
    options: ChunkOptions,
    progress: &dyn Progress,
) -> Result<Memory> {
    let (bytes, runs) = check_layout(regions, runs)?;
    let ChunkOptions { chunk_bytes, level } = options;
    if !chunk_bytes.is_power_of_two() || !CHUNK_BYTES.contains(&chunk_bytes) {
        return Err(Error::request(
            "chunks are a power of two from 4 KiB to 2 MiB",
        ));
    }
    let count = bytes.div_ceil(u64::from(chunk_bytes));
    if count > MAX_CHUNKS {
        return Err(Error::request(format!(
            "memory in more than {MAX_CHUNKS} chunks: take larger chunks"
        )));
    }
    let path = folder.join(files::MEMORY_CHUNKS);
    let mut out = BufWriter::with_capacity(1 << 20, files::create(&path)?);
    let mut compressor = Compressor::new(level).at("make a compressor for", &path)?;
    let mut nowhere = |_: u64, _: &[u8]| Ok(());
    let mut hashing = Hashing::new(blake3::Hasher::new(), &mut nowhere);
    let mut index = ChunkIndex::new(chunk_bytes, bytes, Vec::new());
    let mut entries = Vec::with_capacity(count as usize);
    let mut buffer = vec![0; chunk_bytes as usize];
    let mut packed = vec![0; zstd::zstd_safe::compress_bound(buffer.len())];
    let mut offset = 0;
    let mut runs = runs.as_slice();
    for chunk in 0..count {
        let (at, length) = index.place(chunk);
        let plain = &mut buffer[..length as usize];
        tick(progress, at, bytes)?;
        if !read_chunk(source, &mut runs, at, plain).at("read", "the VM's memory".as_ref())? {
            entries.push(ChunkEntry {
                offset: 0,
                stored_bytes: 0,
                encoding: Encoding::Zero,
                blake3: Digest::from_bytes([0; 32]),
            });
            continue;
        }
        hashing.update(at, plain)?;
        let packed_bytes = compressor
            .compress_to_buffer(plain, &mut packed)
            .at("compress", &path)?;
        let (encoding, stored) = if packed_bytes < plain.len() {
            (Encoding::Zstd, &packed[..packed_bytes])
        } else {
            (Encoding::Stored, &*plain)
        };
        out.write_all(stored).at("write", &path)?;
        entries.push(ChunkEntry {
            offset,
            stored_bytes: stored.len() as u32,
            encoding,
            blake3: Digest::of(plain),
        });
        offset += stored.len() as u64;
    }
    tick(progress, bytes, bytes)?;
    let file = out
        .into_inner()
        .map_err(|error| Error::io("write", &path, error.into_error()))?;
    files::seal(&file, &path)?;
    index = ChunkIndex::new(chunk_bytes, bytes, entries);
    let index_bytes = index.to_bytes();
    files::write_sealed(&folder.join(files::MEMORY_INDEX), &index_bytes)?;
    Ok(Memory {
        bytes,
        regions: regions.to_vec(),
        kind: MemoryKind::Chunks,
        file_length: offset,
        blake3: hashing.finish(bytes)?,
        index: Some(Blob {
            length: index_bytes.len() as u64,
            blake3: Digest::of(&index_bytes),
        }),
        base: None,
    })
}

/// Fills `plain` with the memory at `at`, of which only `runs` hold anything; false when all of it
/// is zero. Runs that end before the next chunk are taken off the list.
fn read_chunk(
    source: &dyn Pages,
    runs: &mut &[Run],
    at: u64,
    plain: &mut [u8],
) -> std::io::Result<bool> {
    let end = at + plain.len() as u64;
    let mut clean = false;
    while let Some((run, rest)) = runs.split_first() {
        if run.offset >= end {
            break;
        }
        if !clean {
            plain.fill(0);
            clean = true;
        }
        let (from, to) = (run.offset.max(at), run.end().min(end));
        source.read_at(from, &mut plain[(from - at) as usize..(to - at) as usize])?;
        if run.end() > end {
            break;
        }
        *runs = rest;
    }
    Ok(clean && !is_zero(plain))
}
