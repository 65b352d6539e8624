//! Chunks on their way into the shared memory, each once.
//!
//! ```text
//!   missing -> busy (one thread fetches, others wait) -> filled
//!      ^---------+ it cannot be had or does not fit its hash
//! ```

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::shared::SharedMemory;
use crate::chunks::source::PageSource;
use crate::error::{Context as _, Result};
use crate::pages::Run;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Missing,
    Busy,
    Filled,
}

/// What a chunk is resolved with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Chunk {
    /// All zero, and not in the memory.
    Zero,
    /// In the memory, whole and proved.
    Filled,
}

/// The source, the shared memory, and which chunks are in it.
pub(super) struct Filler {
    source: Box<dyn PageSource>,
    memory: SharedMemory,
    states: Mutex<Vec<State>>,
    changed: Condvar,
}

/// A chunk that was busy is missing again, however its thread went.
struct Claim<'f> {
    filler: &'f Filler,
    chunk: u64,
    to: State,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.filler.states()[self.chunk as usize] = self.to;
        self.filler.changed.notify_all();
    }
}

impl Filler {
    /// Nothing is in the memory yet.
    pub(super) fn new(source: Box<dyn PageSource>) -> Result<Self> {
        let bytes = source.memory_bytes();
        let count = bytes.div_ceil(u64::from(source.chunk_bytes()));
        let memory = SharedMemory::new(bytes).at("make", "the clones' memory".as_ref())?;
        Ok(Self {
            source,
            memory,
            states: Mutex::new(vec![State::Missing; count as usize]),
            changed: Condvar::new(),
        })
    }

    pub(super) fn memory(&self) -> &SharedMemory {
        &self.memory
    }

    /// All of the memory, in bytes.
    pub(super) fn memory_bytes(&self) -> u64 {
        self.source.memory_bytes()
    }

    /// How many chunks there are.
    pub(super) fn count(&self) -> u64 {
        self.memory_bytes()
            .div_ceil(u64::from(self.source.chunk_bytes()))
    }

    /// The chunk of a page, by its offset in memory.
    pub(super) fn chunk_at(&self, offset: u64) -> u64 {
        offset / u64::from(self.source.chunk_bytes())
    }

    /// Where chunks lie in memory.
    pub(super) fn place(&self, first: u64, count: u64) -> Run {
        let chunk_bytes = u64::from(self.source.chunk_bytes());
        let offset = first * chunk_bytes;
        let end = (offset + count * chunk_bytes).min(self.memory_bytes());
        Run {
            offset,
            length: end - offset,
        }
    }

    /// Makes sure of a chunk; `buffer` is the caller's to use again.
    ///
    /// # Errors
    /// As [`PageSource::chunk`]: the chunk is as missing as before.
    pub(super) fn ensure(&self, chunk: u64, buffer: &mut Vec<u8>) -> Result<Chunk> {
        if self.source.is_zero(chunk) {
            return Ok(Chunk::Zero);
        }
        let Some(mut claim) = self.claim(chunk) else {
            return Ok(Chunk::Filled);
        };
        let place = self.place(chunk, 1);
        buffer.resize(place.length as usize, 0);
        self.source.chunk(chunk, buffer)?;
        self.memory
            .write(place.offset, buffer)
            .at("write", "the clones' memory".as_ref())?;
        claim.to = State::Filled;
        Ok(Chunk::Filled)
    }

    /// Fetches all that is not zero; `begins` is called before each chunk.
    ///
    /// # Errors
    /// The first chunk's that cannot be had.
    pub(super) fn complete(&self, begins: impl Fn()) -> Result<()> {
        let mut buffer = Vec::new();
        (0..self.count()).try_for_each(|chunk| {
            begins();
            self.ensure(chunk, &mut buffer).map(drop)
        })
    }

    /// A missing chunk is this thread's to fetch; none: it is filled.
    fn claim(&self, chunk: u64) -> Option<Claim<'_>> {
        let mut states = self.states();
        loop {
            match states[chunk as usize] {
                State::Filled => return None,
                State::Busy => {
                    states = self
                        .changed
                        .wait(states)
                        .unwrap_or_else(PoisonError::into_inner);
                }
                State::Missing => {
                    states[chunk as usize] = State::Busy;
                    return Some(Claim {
                        filler: self,
                        chunk,
                        to: State::Missing,
                    });
                }
            }
        }
    }

    fn states(&self) -> MutexGuard<'_, Vec<State>> {
        // Each change is one assignment: a panic leaves none half done.
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
