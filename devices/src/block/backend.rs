//! What a block device needs of its disk, whatever the disk is made of.

use std::io;
use std::ops::Range;
use std::path::Path;

use vm_memory::VolatileSlice;

use super::file::OpenError;

/// The unit of virtio-blk's addresses, in bytes, whatever the block size (virtio 1.2, 5.2.4).
pub const SECTOR_BYTES: u64 = 512;

/// A disk's storage.
///
/// The device has checked every range against [`Backend::len_bytes`] before it calls. Buffers are
/// guest memory: the guest may change them at any time, so a backend hands them to the kernel and
/// never trusts what it saw in them.
///
/// All methods block. An error leaves the disk usable: the guest gets an I/O error for that one
/// request.
pub trait Backend: Send {
    /// What to call the disk in logs: its file's path.
    fn name(&self) -> &str;

    /// The disk's size in bytes: a multiple of [`SECTOR_BYTES`], the same for the disk's life.
    fn len_bytes(&self) -> u64;

    /// The piece in bytes below which a discard frees nothing.
    fn discard_granularity_bytes(&self) -> u32 {
        4096
    }

    /// Fills `buffers`, one after the other, from `offset` (bytes) on.
    ///
    /// # Errors
    /// The operating system's; the buffers' content is then undefined.
    fn read_at(&mut self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()>;

    /// Writes `buffers`, one after the other, from `offset` (bytes) on.
    ///
    /// # Errors
    /// The operating system's; the range's content is then undefined.
    fn write_at(&mut self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()>;

    /// Puts all that was written before onto stable storage.
    ///
    /// # Errors
    /// The operating system's.
    fn flush(&mut self) -> io::Result<()>;

    /// Writes what is held in memory into the disk's files, without waiting for stable storage:
    /// then they are complete for whoever opens them. The default holds nothing.
    ///
    /// # Errors
    /// The operating system's; trying again is safe.
    fn write_back(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Makes an empty layer at `path`, to be the top after [`Backend::push_layer`].
    ///
    /// # Errors
    /// See [`OpenError`]; a disk that has no layers refuses.
    fn prepare_layer(&mut self, path: &Path) -> Result<(), OpenError> {
        Err(OpenError::NoLayers {
            path: path.to_owned(),
        })
    }

    /// Freezes the top, which has been written back, and goes on in the prepared layer. False: the
    /// top is empty and stays; the prepared layer is gone.
    ///
    /// # Errors
    /// The operating system's; the disk goes on as it was.
    fn push_layer(&mut self) -> io::Result<bool> {
        Ok(false)
    }

    /// Goes on with the layer at `path` in place of these frozen ones, counted from the lowest, whose
    /// content it has (see [`super::merge`]).
    ///
    /// # Errors
    /// See [`OpenError`]; the disk goes on as it was. A disk that has no layers refuses.
    fn replace_layers(&mut self, replaced: Range<usize>, path: &Path) -> Result<(), OpenError> {
        let _ = replaced;
        Err(OpenError::NoLayers {
            path: path.to_owned(),
        })
    }

    /// Removes a prepared layer that is not wanted any more.
    fn drop_prepared(&mut self) {}

    /// Gives the range's space back where the storage can; it may then read as anything that the
    /// guest wrote there before, or as zeroes.
    ///
    /// # Errors
    /// The operating system's; a storage that cannot discard does nothing and succeeds.
    fn discard(&mut self, offset: u64, len_bytes: u64) -> io::Result<()>;

    /// Makes the range read as zeroes; `may_unmap` allows giving its space back.
    ///
    /// # Errors
    /// The operating system's; the range's content is then undefined.
    fn write_zeroes(&mut self, offset: u64, len_bytes: u64, may_unmap: bool) -> io::Result<()>;
}
