//! virtio-blk (virtio 1.2, section 5.2): the guest's disks.
//!
//! ```text
//!  queue 0 --chain--> request (what is asked, checked) --range--> Backend
//!                                                                  |- RawFile: one raw file
//!                                                                  `- Layer: qcow2 layers over a raw base
//! ```
//!
//! Data goes between guest memory and the file without a copy of ours. Requests are served one
//! after the other on the event loop; a turn is bounded, then the device kicks itself.
//!
//! How it fails: a request that asks for what cannot be (beyond the end, a broken header) or that
//! the host cannot do (I/O error, full disk) gets an error status, is counted, and is logged ever
//! more rarely; the device goes on. A chain that has no room for a status, or breaks the ring's
//! rules, needs a reset. The guest cannot make the host allocate more than a list of its queue's
//! length.

use std::path::{Path, PathBuf};

mod backend;
mod device;
mod file;
mod layered;
mod make;
mod merge;
mod places;
mod raw;
mod request;
mod state;
#[cfg(test)]
mod tests;
mod vectored;

pub use backend::{Backend, SECTOR_BYTES};
pub use device::Block;
pub use file::OpenError;
pub use layered::{Layer, MAX_FROZEN};
pub use merge::merge;
pub use raw::RawFile;
pub use state::BlockState;

/// Opens the disk at `path`: alone, or as the base under `frozen` layers, the lowest first, and the
/// writable `layer`, which is made if it does not exist. A path `/dev/fd/N` is a descriptor that
/// this process inherited.
///
/// # Errors
/// See [`OpenError`]; a `layer` with `read_only` is refused.
pub fn open(
    path: &Path,
    read_only: bool,
    frozen: &[PathBuf],
    layer: Option<&Path>,
) -> Result<Box<dyn Backend>, OpenError> {
    match layer {
        None if !frozen.is_empty() => Err(OpenError::NoLayers {
            path: frozen[0].clone(),
        }),
        None => Ok(Box::new(RawFile::open(path, read_only)?)),
        Some(layer) if read_only => Err(OpenError::ReadOnlyLayer {
            path: layer.to_owned(),
        }),
        Some(layer) => Ok(Box::new(Layer::open(layer, frozen, path)?)),
    }
}
