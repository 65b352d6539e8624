//! Images: root disks that many VMs read and none writes.
//!
//! ```text
//! recipe (mmdebstrap) ─┐
//! tar, OCI, docker ────┼─> Tree (a private folder) ─> mke2fs -d ─> debugfs ─> disk.ext4 ─> store
//! folder ──────────────┘                                            raw ext4 ──┘
//! ```
//!
//! * [`ImageStore`] owns the cache folder: content-addressed blobs, names, locks.
//! * `build` makes an image from a recipe, `import` from a file or folder; `archive` reads tars,
//!   `oci` manifests, `tree` writes the private folder, `ext4` makes and checks the disk.
//!
//! An archive is hostile input. Its names are resolved inside the private folder by the kernel
//! (`openat2` with `RESOLVE_IN_ROOT`), nothing is written through a link, and owners, set-id bits,
//! device nodes and extended attributes never exist on the host: `debugfs` puts them into the disk
//! afterwards. That also lets a normal user import.
//!
//! Work happens in a scratch folder inside the store and becomes visible by one rename. A process
//! killed at any point leaves a scratch folder whose lock nobody holds; the next command sweeps it.

mod archive;
mod build;
mod config;
mod error;
mod ext4;
mod import;
mod oci;
mod scratch;
mod source;
mod store;
mod stream;
#[cfg(test)]
mod tests;
mod tool;
mod tree;

pub use build::{BuildOptions, RECIPES};
pub use config::{ContainerConfig, Image, ImageConfig};
pub use error::{Error, Result};
pub use import::ImportKind;
pub use store::{ImageStore, Removed};
pub use stream::Limits;

/// For the fuzz target: the parsers alone.
#[doc(hidden)]
pub use import::fuzz_import;

/// Where an operation tells how far it is. The CLI draws bars or plain lines from it.
pub trait Progress: Send + Sync {
    /// A new step began.
    fn step(&self, what: &str);
    /// A line of output of a program that the step runs.
    fn line(&self, _text: &str) {}
    /// Bytes done in this step, and how many there are in all when known.
    fn bytes(&self, _done: u64, _total: Option<u64>) {}
    /// Asked often; when it says true the operation cleans up and ends with
    /// [`Error::Cancelled`].
    fn cancelled(&self) -> bool {
        false
    }
}

/// Progress that nobody sees.
#[derive(Debug, Clone, Copy, Default)]
pub struct Quiet;

impl Progress for Quiet {
    fn step(&self, _what: &str) {}
}
