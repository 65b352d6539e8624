//! virtio-blk (virtio 1.2, section 5.2): a disk of one queue.
//!
//! ```text
//!  queue --Chain--> request::parse --> Block::serve --> dyn Backend: RawFile | Layer
//! ```
//!
//! What a request asks is checked against the disk before the backend sees it; a request that asks
//! for what the disk does not have gets an I/O error in its status byte. Only a chain in which that
//! byte cannot be written makes the device need a reset. An error of the host's file (a full disk)
//! is the guest's I/O error, a counter and a line in the log: the VMM lives.

mod backend;
mod device;
mod file;
mod layer;
mod raw;
mod request;
mod vectored;

use std::path::Path;

pub use backend::{Backend, SECTOR_BYTES};
pub use device::Block;
pub use file::OpenError;
pub use layer::Layer;
pub use raw::RawFile;

/// Opens a disk: the raw file at `path`, or, with a `layer`, a writable layer over it. Then the
/// file at `path` is opened read-only, and the layer is made when it does not exist.
///
/// # Errors
/// See [`OpenError`].
pub fn open(
    path: &Path,
    read_only: bool,
    layer: Option<&Path>,
) -> Result<Box<dyn Backend>, OpenError> {
    match layer {
        Some(layer) if read_only => Err(OpenError::ReadOnlyLayer {
            path: layer.to_owned(),
        }),
        Some(layer) => Ok(Box::new(Layer::open_or_create(layer, path)?)),
        None => Ok(Box::new(RawFile::open(path, read_only)?)),
    }
}
