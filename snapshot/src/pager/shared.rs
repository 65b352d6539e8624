//! The memory that all clones of a generation on this host share: a memfd that only the pager
//! writes.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

/// A memfd and our mapping of it. The seals are set after the mapping was made: nobody else can write
/// the file, map it to be written, cut it or punch holes in it, whoever has its descriptor.
#[derive(Debug)]
pub(super) struct SharedMemory {
    file: File,
    mapping: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping belongs to the value alone, lives as long as it, and is only written through
// `write`, whose callers never write one place at once.
unsafe impl Send for SharedMemory {}
// SAFETY: as above.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// Empty memory of so many bytes.
    pub(super) fn new(bytes: u64) -> io::Result<Self> {
        let length = usize::try_from(bytes).map_err(io::Error::other)?;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create("ratoon-generation", flags)?);
        file.set_len(bytes)?;
        // SAFETY: a new mapping at an address of the system's choice.
        let mapping = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                &file,
                0,
            )
        }?;
        let mapping = NonNull::new(mapping.cast()).ok_or(io::ErrorKind::InvalidData)?;
        let this = Self {
            file,
            mapping,
            bytes: length,
        };
        let seals = SealFlags::FUTURE_WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&this.file, seals)?;
        Ok(this)
    }

    /// Writes a part of it. No two threads may write the same part at once: see [`super::fill`].
    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let end = (offset as usize).checked_add(bytes.len());
        if end.is_none_or(|end| end > self.bytes) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the part lies within the mapping, as was just checked; nobody else writes it, and
        // no Rust reference to the mapping exists.
        unsafe {
            let to = self.mapping.as_ptr().add(offset as usize);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
        Ok(())
    }
}

impl AsFd for SharedMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing points into it any more.
        let _ = unsafe { rustix::mm::munmap(self.mapping.as_ptr().cast(), self.bytes) };
    }
}
