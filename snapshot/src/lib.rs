//! Generations on disk.
//!
//! A *generation* is a VM frozen: its state (a blob that the VMM makes), its memory, its disk
//! layers. This crate writes one to disk as a *snapshot*, finds it again, and proves that it is
//! what was written. It knows nothing of KVM, devices or the engine. The format, byte by byte, is
//! in `docs/snapshots.md`.
//!
//! ```text
//! store/
//!   lock                 held for a moment while snapshots and names come and go
//!   names/<name>         the id
//!   .tmp-<random>/       a snapshot being written; its writer holds a lock on .tmp-<random>/lock
//!   <id>/manifest.json   what the rest is; the id is the BLAKE3 of its bytes
//!       /state.bin       opaque
//!       /memory.bin      plain: pages at their offsets, zero pages are holes
//!       /memory.runs     difference: which pages memory.bin holds, over a base named by content
//!       /memory.chunks   chunked: zstd, with
//!       /memory.index    a place and a BLAKE3 for each chunk
//!       /<layer files>
//!       /working-set    not part of it: what a restore touches first
//! ```
//!
//! [`Writer`] makes a snapshot; it becomes visible by one rename, so a crash at any byte leaves the
//! old snapshots alone. [`Store`] lists, opens, verifies, removes, exports and imports.
//! [`MemoryImage`] says what a VM has to map; [`PageSource`] gives a [`pager`] its chunks.
//!
//! Every byte read is hostile until its hash says otherwise: sizes are bounded and checked before
//! anything is allocated from them, and a refusal names the file and what to do.

mod binary;
mod bundle;

mod chunks;
mod content;
mod digest;
mod error;
mod files;
mod keys;
mod manifest;
mod memory;
mod names;
pub mod pager;
mod pages;
mod signature;
mod snapshot;
mod store;
#[cfg(test)]
mod tests;
mod verify;
mod working_set;
mod writer;

pub use chunks::index::{ChunkEntry, ChunkIndex, Encoding};
pub use chunks::source::{ChunkFile, Content, PageSource};
pub use chunks::write::ChunkOptions;
pub use content::hash_file;
pub use digest::Digest;
pub use error::{Error, Result};
pub use manifest::{
    About, Blob, Cpu, FORMAT_VERSION, Layer, MAX_LAYERS, MAX_MANIFEST_BYTES, MAX_REGIONS, Manifest,
    Memory, MemoryKind, Region,
};
pub use memory::{Base, Mapping, MemoryFile, MemoryImage, Overlay, RunIndex};
pub use pages::{PAGE_BYTES, Pages, Run, populated};
pub use signature::{PublicKey, Signature, SigningKey};
pub use snapshot::{Sizes, Snapshot, hold};
pub use store::{Damaged, Listing, Removed, Store};
pub use working_set::{has_working_set, read_working_set, record_working_set};
pub use writer::Writer;

/// Where a long operation tells how far it is, and is told to stop.
pub trait Progress: Send + Sync {
    /// A new step began.
    fn step(&self, _what: &str) {}
    /// Bytes done in this step, and how many there are in all.
    fn bytes(&self, _done: u64, _total: u64) {}
    /// Asked often; when it says true the operation cleans up and ends with
    /// [`Error::Cancelled`].
    fn cancelled(&self) -> bool {
        false
    }
}

/// Progress that nobody sees.
#[derive(Debug, Clone, Copy, Default)]
pub struct Quiet;

impl Progress for Quiet {}

/// Tells the bytes done, and ends the operation when asked to.
fn tick(progress: &dyn Progress, done: u64, total: u64) -> Result<()> {
    progress.bytes(done, total);
    if progress.cancelled() {
        return Err(Error::Cancelled);
    }
    Ok(())
}
