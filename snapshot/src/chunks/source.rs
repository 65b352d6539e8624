//! Where a pager gets memory from.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use zstd::bulk::Decompressor;

use super::index::{ChunkIndex, Encoding};
use crate::digest::Digest;
use crate::error::{Context as _, Error, Result};
use crate::files;
use crate::manifest::{MAX_MANIFEST_BYTES, Manifest, Memory, MemoryKind};
use crate::memory::read_index;

/// What a chunk turned out to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Zeroes; nothing was read.
    Zero,
    /// Bytes that fit their hash.
    Data,
}

/// Memory in chunks, from wherever it is kept. Any number of threads may ask at once.
pub trait PageSource: Send + Sync {
    /// All of the memory, in bytes.
    fn memory_bytes(&self) -> u64;

    /// A chunk's length in bytes; the last one may be shorter.
    fn chunk_bytes(&self) -> u32;

    /// Whether a chunk is known to be all zero. No I/O.
    fn is_zero(&self, chunk: u64) -> bool;

    /// Fills `into`, which has the chunk's exact length, and proves it against its hash. On an
    /// error the content of `into` means nothing and must not reach a guest.
    ///
    /// # Errors
    /// [`Error::DamagedChunk`], [`Error::Io`], [`Error::BadRequest`] for a chunk that there is not
    /// or a wrong length.
    fn chunk(&self, chunk: u64, into: &mut [u8]) -> Result<Content>;
}

/// Chunks in a local file.
pub struct ChunkFile {
    file: File,
    path: PathBuf,
    index: ChunkIndex,
    /// One a thread that asks at the same time; made on demand, used again.
    workers: Mutex<Vec<Worker>>,
}

struct Worker {
    decompressor: Decompressor<'static>,
    stored: Vec<u8>,
}

impl ChunkFile {
    /// Chunks from an open file, for a process that cannot open it itself. `path` is named in
    /// errors.
    ///
    /// # Errors
    /// [`Error::Damaged`] when the file has not the length that the index wants; [`Error::Io`].
    pub fn new(file: File, path: &Path, index: ChunkIndex) -> Result<Self> {
        let found = file.metadata().at("stat", path)?.len();
        let wanted = index.file_length();
        if found != wanted {
            return Err(Error::damaged(
                path,
                format!("it has {found} bytes and not {wanted}"),
            ));
        }
        Ok(Self {
            file,
            path: path.to_path_buf(),
            index,
            workers: Mutex::default(),
        })
    }

    /// Opens the chunks of the snapshot in `folder`, whose name is its id: the manifest is checked
    /// against that, the index against the manifest.
    ///
    /// # Errors
    /// [`Error::Damaged`], [`Error::NewerFormat`], [`Error::Io`], [`Error::BadRequest`] when its
    /// memory is not in chunks.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(files::MANIFEST);
        let bytes = files::read_bounded(&path, MAX_MANIFEST_BYTES)?;
        let name = folder.file_name().and_then(|name| name.to_str());
        if name.and_then(|name| name.parse().ok()) != Some(Digest::of(&bytes)) {
            return Err(Error::damaged(&path, "its hash is not the snapshot's id"));
        }
        let memory = Manifest::parse(&bytes, &path)?.memory;
        match memory.kind {
            MemoryKind::Chunks => Self::open_in(folder, &memory),
            MemoryKind::Plain => Err(Error::request("its memory is not in chunks")),
        }
    }

    /// Opens both files of a snapshot's folder and checks the index against the manifest.
    pub(crate) fn open_in(folder: &Path, memory: &Memory) -> Result<Self> {
        let index_path = folder.join(files::MEMORY_INDEX);
        let index = ChunkIndex::parse(&read_index(&index_path, memory.index)?, &index_path)?;
        if index.memory_bytes() != memory.bytes || index.file_length() != memory.file_length {
            return Err(Error::damaged(&index_path, "it does not fit the manifest"));
        }
        let path = folder.join(files::MEMORY_CHUNKS);
        Self::new(files::open_sized(&path, memory.file_length)?, &path, index)
    }

    /// Where each chunk is.
    pub fn index(&self) -> &ChunkIndex {
        &self.index
    }

    /// Reads any stretch, chunk by chunk.
    pub(crate) fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let chunk_bytes = u64::from(self.index.chunk_bytes());
        let mut buffer = vec![0; chunk_bytes as usize];
        let mut done = 0;
        while done < into.len() {
            let at = offset + done as u64;
            let (start, length) = self.index.place(at / chunk_bytes);
            let plain = &mut buffer[..length as usize];
            self.chunk(at / chunk_bytes, plain)?;
            let part = &plain[(at - start) as usize..];
            let count = part.len().min(into.len() - done);
            into[done..done + count].copy_from_slice(&part[..count]);
            done += count;
        }
        Ok(())
    }

    fn worker(&self) -> Result<Worker> {
        // Whoever panicked left whole workers in there.
        let idle = self
            .workers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        match idle {
            Some(worker) => Ok(worker),
            None => Ok(Worker {
                decompressor: Decompressor::new().at("make a decompressor for", &self.path)?,
                stored: Vec::new(),
            }),
        }
    }

    fn damaged(&self, chunk: u64, reason: &str) -> Error {
        Error::DamagedChunk {
            path: self.path.clone(),
            chunk,
            reason: reason.into(),
        }
    }

    fn unpack(&self, chunk: u64, at: u64, stored_bytes: usize, into: &mut [u8]) -> Result<()> {
        let mut worker = self.worker()?;
        worker.stored.resize(stored_bytes, 0);
        self.file
            .read_exact_at(&mut worker.stored, at)
            .at("read", &self.path)?;
        // Bounded by `into`: a frame that holds more is refused, whatever its header claims.
        let unpacked = worker
            .decompressor
            .decompress_to_buffer(&worker.stored, into);
        self.workers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(worker);
        match unpacked {
            Ok(length) if length == into.len() => Ok(()),
            Ok(_) => Err(self.damaged(chunk, "it unpacks to too little")),
            Err(_) => Err(self.damaged(chunk, "it does not unpack")),
        }
    }
}

impl fmt::Debug for ChunkFile {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("ChunkFile")
            .field("path", &self.path)
            .field("chunks", &self.index.count())
            .finish_non_exhaustive()
    }
}

impl PageSource for ChunkFile {
    fn memory_bytes(&self) -> u64 {
        self.index.memory_bytes()
    }

    fn chunk_bytes(&self) -> u32 {
        self.index.chunk_bytes()
    }

    fn is_zero(&self, chunk: u64) -> bool {
        self.index
            .entry(chunk)
            .is_some_and(|entry| entry.encoding == Encoding::Zero)
    }

    fn chunk(&self, chunk: u64, into: &mut [u8]) -> Result<Content> {
        let plain_bytes = self.index.place(chunk).1 as usize;
        let Some(entry) = self
            .index
            .entry(chunk)
            .filter(|_| into.len() == plain_bytes)
        else {
            return Err(Error::request(format!(
                "chunk {chunk} was asked for with {} bytes; there are {} of them and this one has \
                 {plain_bytes}",
                into.len(),
                self.index.count()
            )));
        };
        match entry.encoding {
            Encoding::Zero => {
                into.fill(0);
                return Ok(Content::Zero);
            }
            Encoding::Stored => self
                .file
                .read_exact_at(into, entry.offset)
                .at("read", &self.path)?,
            Encoding::Zstd => {
                self.unpack(chunk, entry.offset, entry.stored_bytes as usize, into)?;
            }
        }
        if Digest::of(into) != entry.blake3 {
            return Err(self.damaged(chunk, "its hash does not fit its content"));
        }
        Ok(Content::Data)
    }
}
