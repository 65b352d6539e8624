//! Plain memory: one sparse file that can be mapped, or the difference from other memory.
//!
//! ```text
//! whole        memory.bin   memory at its own offsets, zero pages are holes
//! difference   memory.runs  which pages changed, over the base's
//!              memory.bin   those pages end to end, so any of them can be mapped in place
//! ```
//!
//! A page that became zero is in a difference (as a hole), because it hides the base's page.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use crate::Progress;
use crate::binary::{self, Header};
use crate::chunks::source::{ChunkFile, PageSource as _};
use crate::content::{Hashing, copy_sparse, read_runs};
use crate::digest::Digest;
use crate::error::{Context as _, Error, Result};
use crate::files;
use crate::manifest::{Blob, MAX_MEMORY_BYTES, Memory, MemoryKind, Region, check_regions};
use crate::pages::{PAGE_BYTES, Pages, Run, joined};

const RUNS_MAGIC: [u8; 8] = *b"RTNRUNS1";
const RUN_BYTES: usize = 16;
/// An index of 16 MiB. Memory that is scattered more than this is better written whole.
const MAX_RUNS: u64 = 1 << 20;
/// Differences that may lie over one base.
pub(crate) const MAX_DEPTH: usize = 64;

/// `memory.runs`: which pages a difference holds, in the order of its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunIndex {
    /// All of the memory, in bytes.
    pub memory_bytes: u64,
    /// Ascending, not touching, not empty.
    pub runs: Vec<Run>,
}

impl RunIndex {
    /// Reads an index and checks every rule. `path` is named in errors.
    ///
    /// # Errors
    /// [`Error::NewerFormat`], [`Error::Damaged`].
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        Self::parse_as(bytes, RUNS_MAGIC, MAX_RUNS, path)
    }

    /// As [`RunIndex::parse`], of a file of another kind.
    pub(crate) fn parse_as(
        bytes: &[u8],
        magic: [u8; 8],
        max_runs: u64,
        path: &Path,
    ) -> Result<Self> {
        let (header, entries) = binary::read::<RUN_BYTES>(bytes, magic, max_runs, path)?;
        if u64::from(header.unit_bytes) != PAGE_BYTES || header.memory_bytes > MAX_MEMORY_BYTES {
            return Err(Error::damaged(path, "its header makes no sense"));
        }
        let runs: Vec<Run> = entries
            .iter()
            .map(|entry| Run {
                offset: binary::number64(entry, 0),
                length: binary::number64(entry, 8),
            })
            .collect();
        // Runs that touch are joined and empty ones left out: there is one index for one content.
        match joined(&runs, header.memory_bytes) {
            Ok(joined) if joined == runs => {}
            _ => {
                return Err(Error::damaged(
                    path,
                    "its runs overlap, touch or lie outside",
                ));
            }
        }
        Ok(Self {
            memory_bytes: header.memory_bytes,
            runs,
        })
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        self.to_bytes_as(RUNS_MAGIC)
    }

    pub(crate) fn to_bytes_as(&self, magic: [u8; 8]) -> Vec<u8> {
        let mut entries = Vec::with_capacity(self.runs.len() * RUN_BYTES);
        for run in &self.runs {
            entries.extend(run.offset.to_le_bytes());
            entries.extend(run.length.to_le_bytes());
        }
        let header = Header {
            unit_bytes: PAGE_BYTES as u32,
            memory_bytes: self.memory_bytes,
            count: self.runs.len() as u64,
        };
        binary::write(magic, header, &entries)
    }

    /// The difference's file length in bytes.
    pub fn file_length(&self) -> u64 {
        self.runs.iter().map(|run| run.length).sum()
    }

    /// Where each run is in the difference's file.
    pub fn mappings(&self) -> Vec<Mapping> {
        let mut file_offset = 0;
        let place = |run: &Run| {
            let mapping = Mapping {
                memory_offset: run.offset,
                file_offset,
                length: run.length,
            };
            file_offset += run.length;
            mapping
        };
        self.runs.iter().map(place).collect()
    }
}

/// A stretch of a file to be mapped MAP_PRIVATE at a stretch of memory. All page-aligned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// Offset in memory (through all regions), in bytes.
    pub memory_offset: u64,
    /// Offset in the file, in bytes.
    pub file_offset: u64,
    /// In bytes.
    pub length: u64,
}

/// What lies under all differences.
#[derive(Debug)]
pub enum Base {
    /// To be mapped whole: offsets in the file are offsets in memory.
    Plain(File),
    /// To be served by a pager.
    Chunks(ChunkFile),
}

/// A difference: mapped over what is below it.
#[derive(Debug)]
pub struct Overlay {
    /// Its `memory.bin`.
    pub file: File,
    /// Which parts of it go where. Each costs the VM one mapping (`vm.max_map_count` bounds them,
    /// 65530 by default); small ones may be read into private pages instead.
    pub mappings: Vec<Mapping>,
}

/// One file of a snapshot's memory, for whoever opens it by its path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryFile {
    /// `memory.bin` or `memory.chunks`.
    pub path: PathBuf,
    /// Which of them it is.
    pub kind: MemoryKind,
    /// A difference: where in memory the file's content, end to end, belongs. Empty for whole
    /// memory and for a difference of nothing.
    pub runs: Vec<Run>,
    /// It is a difference.
    pub is_difference: bool,
}

impl MemoryFile {
    pub(crate) fn of(folder: &Path, memory: &Memory) -> Result<Self> {
        let name = match memory.kind {
            MemoryKind::Plain => files::MEMORY_PLAIN,
            MemoryKind::Chunks => files::MEMORY_CHUNKS,
        };
        let path = folder.join(name);
        drop(files::open_sized(&path, memory.file_length)?);
        let runs = match memory.base {
            Some(_) => read_runs_index(folder, memory)?.runs,
            None => Vec::new(),
        };
        Ok(Self {
            path,
            kind: memory.kind,
            runs,
            is_difference: memory.base.is_some(),
        })
    }
}

/// Memory of a snapshot, its files open and their lengths checked, indexes verified.
///
/// The pages of plain files are *not* hashed on opening, so that they can be mapped at once:
/// [`Store::verify`](crate::Store::verify) does that.
#[derive(Debug)]
pub struct MemoryImage {
    /// All of the memory, in bytes.
    pub bytes: u64,
    /// Where in guest memory it is.
    pub regions: Vec<Region>,
    /// The lowest layer.
    pub base: Base,
    /// What lies over it, lowest first.
    pub overlays: Vec<Overlay>,
}

impl MemoryImage {
    /// Opens the memory of the snapshot in the first folder. The folders after it hold each one's
    /// base in turn ([`Store::memory`](crate::Store::memory) finds them).
    ///
    /// # Errors
    /// [`Error::Damaged`], [`Error::NewerFormat`], [`Error::MissingBase`] when the last one has a
    /// base, [`Error::Io`].
    pub fn open(layers: &[(PathBuf, &Memory)]) -> Result<Self> {
        let Some((top, memory)) = layers.first() else {
            return Err(Error::request("no memory to open"));
        };
        let mut overlays = Vec::new();
        for (place, (folder, layer)) in layers.iter().enumerate() {
            if layer.bytes != memory.bytes {
                return Err(Error::damaged(top, "its base is memory of another size"));
            }
            let next = layers.get(place + 1).map(|(_, below)| below.blake3);
            match layer.base {
                None => {
                    let base = match layer.kind {
                        MemoryKind::Plain => Base::Plain(open_plain(folder, layer)?),
                        MemoryKind::Chunks => Base::Chunks(ChunkFile::open_in(folder, layer)?),
                    };
                    overlays.reverse();
                    return Ok(Self {
                        bytes: memory.bytes,
                        regions: memory.regions.clone(),
                        base,
                        overlays,
                    });
                }
                Some(base) if next == Some(base) => {
                    overlays.push(Overlay {
                        file: open_plain(folder, layer)?,
                        mappings: read_runs_index(folder, layer)?.mappings(),
                    });
                }
                Some(base) => {
                    return Err(Error::MissingBase {
                        path: folder.clone(),
                        what: "base memory",
                        digest: base.to_string(),
                    });
                }
            }
        }
        Err(Error::damaged(top, "its bases do not end"))
    }

    /// Reads memory through all layers. Bytes of plain files are as they are on the disk; chunks
    /// are verified.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::DamagedChunk`].
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let end = offset
            .checked_add(into.len() as u64)
            .filter(|end| *end <= self.bytes)
            .ok_or_else(|| Error::request("reading beyond the end of memory"))?;
        let path = Path::new(files::MEMORY_PLAIN);
        match &self.base {
            Base::Plain(file) => file.read_exact_at(into, offset).at("read", path)?,
            Base::Chunks(chunks) => chunks.read(offset, into)?,
        }
        for overlay in &self.overlays {
            let first = overlay
                .mappings
                .partition_point(|mapping| mapping.memory_offset + mapping.length <= offset);
            for mapping in &overlay.mappings[first..] {
                if mapping.memory_offset >= end {
                    break;
                }
                let from = mapping.memory_offset.max(offset);
                let to = (mapping.memory_offset + mapping.length).min(end);
                let part = &mut into[(from - offset) as usize..(to - offset) as usize];
                let at = mapping.file_offset + (from - mapping.memory_offset);
                overlay.file.read_exact_at(part, at).at("read", path)?;
            }
        }
        Ok(())
    }
}

/// Memory on disk can be written again: whole from differences, chunks from plain.
impl Pages for MemoryImage {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> std::io::Result<()> {
        self.read(offset, into).map_err(std::io::Error::other)
    }
}

fn open_plain(folder: &Path, memory: &Memory) -> Result<File> {
    files::open_sized(&folder.join(files::MEMORY_PLAIN), memory.file_length)
}

/// Reads an index file that the manifest describes, and checks its hash.
pub(crate) fn read_index(path: &Path, index: Option<Blob>) -> Result<Vec<u8>> {
    let Some(index) = index else {
        return Err(Error::damaged(path, "the manifest does not describe it"));
    };
    drop(files::open_sized(path, index.length)?);
    let bytes = files::read_bounded(path, index.length)?;
    if Digest::of(&bytes) != index.blake3 {
        return Err(Error::damaged(path, "its hash is not the manifest's"));
    }
    Ok(bytes)
}

fn read_runs_index(folder: &Path, memory: &Memory) -> Result<RunIndex> {
    let path = folder.join(files::MEMORY_RUNS);
    let index = RunIndex::parse(&read_index(&path, memory.index)?, &path)?;
    if index.memory_bytes != memory.bytes || index.file_length() != memory.file_length {
        return Err(Error::damaged(&path, "it does not fit the manifest"));
    }
    Ok(index)
}

/// Regions and runs as a writer's caller gave them.
pub(crate) fn check_layout(regions: &[Region], runs: &[Run]) -> Result<(u64, Vec<Run>)> {
    let bytes = regions
        .iter()
        .try_fold(0_u64, |sum, region| sum.checked_add(region.length))
        .unwrap_or(u64::MAX);
    check_regions(regions, bytes).map_err(Error::request)?;
    Ok((bytes, joined(runs, bytes)?))
}

/// Writes all of memory into `folder`.
pub(crate) fn write_plain(
    folder: &Path,
    regions: &[Region],
    source: &dyn Pages,
    runs: &[Run],
    progress: &dyn Progress,
) -> Result<Memory> {
    let (bytes, runs) = check_layout(regions, runs)?;
    let path = folder.join(files::MEMORY_PLAIN);
    let file = files::create(&path)?;
    let blake3 = copy_sparse(source, &runs, bytes, (&file, &path), progress)?;
    files::seal(&file, &path)?;
    Ok(Memory {
        bytes,
        regions: regions.to_vec(),
        kind: MemoryKind::Plain,
        file_length: bytes,
        blake3,
        index: None,
        base: None,
    })
}

/// Writes the changed `runs` of memory into `folder`.
pub(crate) fn write_difference(
    folder: &Path,
    regions: &[Region],
    source: &dyn Pages,
    runs: &[Run],
    base: Digest,
    progress: &dyn Progress,
) -> Result<Memory> {
    let (bytes, runs) = check_layout(regions, runs)?;
    if runs.len() as u64 > MAX_RUNS {
        return Err(Error::request(format!(
            "a difference of more than {MAX_RUNS} runs of pages: write the memory whole"
        )));
    }
    let index = RunIndex {
        memory_bytes: bytes,
        runs,
    };
    let index_bytes = index.to_bytes();
    files::write_sealed(&folder.join(files::MEMORY_RUNS), &index_bytes)?;

    let path = folder.join(files::MEMORY_PLAIN);
    let file = files::create(&path)?;
    file.set_len(index.file_length())
        .at("set the length of", &path)?;
    let mappings = index.mappings();
    let mut current = 0;
    let mut write = |at: u64, record: &[u8]| {
        // A record never spans two runs, because runs do not touch.
        while mappings[current].memory_offset + mappings[current].length <= at {
            current += 1;
        }
        let mapping = mappings[current];
        let place = mapping.file_offset + (at - mapping.memory_offset);
        file.write_all_at(record, place).at("write", &path)
    };
    let mut hashing = Hashing::new(difference_hasher(base, &index_bytes), &mut write);
    read_runs(source, &index.runs, &path, progress, |at, block| {
        hashing.update(at, block)
    })?;
    let blake3 = hashing.finish(bytes)?;
    files::seal(&file, &path)?;
    Ok(Memory {
        bytes,
        regions: regions.to_vec(),
        kind: MemoryKind::Plain,
        file_length: index.file_length(),
        blake3,
        index: Some(Blob {
            length: index_bytes.len() as u64,
            blake3: Digest::of(&index_bytes),
        }),
        base: Some(base),
    })
}

/// A difference is named by its base, its index and its non-zero pages.
fn difference_hasher(base: Digest, index: &[u8]) -> blake3::Hasher {
    let mut hasher = blake3::Hasher::new_derive_key("ratoon snapshot memory difference v1");
    hasher.update(base.as_bytes());
    hasher.update(index);
    hasher
}

/// The packed pages of a difference, read by their offsets in memory.
struct Packed<'p> {
    file: &'p File,
    mappings: &'p [Mapping],
}

impl Pages for Packed<'_> {
    /// Only ever within one run: `read_runs` reads no further.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> std::io::Result<()> {
        let place = self
            .mappings
            .partition_point(|mapping| mapping.memory_offset + mapping.length <= offset);
        let mapping = self.mappings[place];
        let at = mapping.file_offset + (offset - mapping.memory_offset);
        self.file.read_exact_at(into, at)
    }
}

/// Computes the content hash of a snapshot's own memory file again.
pub(crate) fn hash_memory(
    folder: &Path,
    memory: &Memory,
    progress: &dyn Progress,
) -> Result<(PathBuf, Digest)> {
    let path = folder.join(files::MEMORY_PLAIN);
    match (memory.kind, memory.base) {
        (MemoryKind::Plain, None) => {
            let file = open_plain(folder, memory)?;
            let found = crate::content::hash_file(&file, &path, progress)?;
            Ok((path, found))
        }
        (MemoryKind::Plain, Some(base)) => {
            let file = open_plain(folder, memory)?;
            let index = read_runs_index(folder, memory)?;
            let packed = Packed {
                file: &file,
                mappings: &index.mappings(),
            };
            let mut nowhere = |_: u64, _: &[u8]| Ok(());
            let hasher = difference_hasher(base, &index.to_bytes());
            let mut hashing = Hashing::new(hasher, &mut nowhere);
            read_runs(&packed, &index.runs, &path, progress, |at, block| {
                hashing.update(at, block)
            })?;
            let found = hashing.finish(memory.bytes)?;
            Ok((path, found))
        }
        (MemoryKind::Chunks, _) => {
            let chunks = ChunkFile::open_in(folder, memory)?;
            let mut nowhere = |_: u64, _: &[u8]| Ok(());
            let mut hashing = Hashing::new(blake3::Hasher::new(), &mut nowhere);
            let mut buffer = vec![0; chunks.chunk_bytes() as usize];
            for chunk in 0..chunks.index().count() {
                let (at, length) = chunks.index().place(chunk);
                crate::tick(progress, at, memory.bytes)?;
                if !chunks.is_zero(chunk) {
                    let block = &mut buffer[..length as usize];
                    chunks.chunk(chunk, block)?;
                    hashing.update(at, block)?;
                }
            }
            let found = hashing.finish(memory.bytes)?;
            Ok((folder.join(files::MEMORY_CHUNKS), found))
        }
    }
}
