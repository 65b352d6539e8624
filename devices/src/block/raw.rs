//! A disk that is one raw file or block device.
//!
//! Data moves between the page cache and guest memory in one copy, by `preadv` and `pwritev`.
//! Space is given back by punching holes; a file system without holes keeps the space.

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::fs::{FallocateFlags, fdatasync};
use vm_memory::VolatileSlice;

use super::backend::Backend;
use super::file::{self, OpenError};
use super::vectored::Vectored;

/// A raw disk image, open and locked.
#[derive(Debug)]
pub struct RawFile {
    file: File,
    name: String,
    len_bytes: u64,
    vectored: Vectored,
    can_punch: bool,
    can_zero: bool,
}

impl RawFile {
    /// Opens the regular file or block device at `path`, and locks it: shared if `read_only`, else
    /// exclusively.
    ///
    /// A size that is not a multiple of 512 bytes is refused and not rounded: cutting a sector off
    /// hides that the image is incomplete.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(path: &Path, read_only: bool) -> Result<Self, OpenError> {
        let (file, len_bytes) = file::open(path, !read_only)?;
        Self::new(file, path, len_bytes)
    }

    /// As [`RawFile::open`], with a descriptor that another process opened; `path` is its name in
    /// messages. The descriptor must allow writing unless `read_only`.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn from_file(file: File, path: &Path, read_only: bool) -> Result<Self, OpenError> {
        let len_bytes = file::check_kind(&file, path)?;
        file::lock(&file, path, !read_only)?;
        Self::new(file, path, len_bytes)
    }

    fn new(file: File, path: &Path, len_bytes: u64) -> Result<Self, OpenError> {
        file::check_size(len_bytes, path)?;
        Ok(Self {
            file,
            name: path.display().to_string(),
            len_bytes,
            vectored: Vectored::default(),
            can_punch: true,
            can_zero: true,
        })
    }

    fn punch(&mut self, offset: u64, len_bytes: u64) -> io::Result<bool> {
        if self.can_punch {
            let hole = FallocateFlags::PUNCH_HOLE;
            self.can_punch = file::allocate(&self.file, hole, offset, len_bytes)?;
        }
        Ok(self.can_punch)
    }
}

impl Backend for RawFile {
    fn name(&self) -> &str {
        &self.name
    }

    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn read_at(&mut self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        self.vectored.read_exact_at(&self.file, buffers, offset)
    }

    fn write_at(&mut self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        self.vectored.write_all_at(&self.file, buffers, offset)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(fdatasync(&self.file)?)
    }

    fn discard(&mut self, offset: u64, len_bytes: u64) -> io::Result<()> {
        self.punch(offset, len_bytes).map(|_| ())
    }

    fn write_zeroes(&mut self, offset: u64, len_bytes: u64, may_unmap: bool) -> io::Result<()> {
        if len_bytes == 0 || (may_unmap && self.punch(offset, len_bytes)?) {
            return Ok(());
        }
        if self.can_zero {
            let zero = FallocateFlags::ZERO_RANGE;
            self.can_zero = file::allocate(&self.file, zero, offset, len_bytes)?;
            if self.can_zero {
                return Ok(());
            }
        }
        self.write_zeroes_by_hand(offset, len_bytes)
    }
}

impl RawFile {
    /// One page of zeroes, written many times over by each call.
    fn write_zeroes_by_hand(&mut self, mut offset: u64, mut len_bytes: u64) -> io::Result<()> {
        const PAGES: usize = 256;
        let mut page = [0_u8; 4096];
        let page = VolatileSlice::from(page.as_mut_slice());
        let mut list = Vec::with_capacity(PAGES);
        while len_bytes > 0 {
            list.clear();
            let mut count = 0;
            while len_bytes > 0 && list.len() < PAGES {
                let part = len_bytes.min(page.len() as u64);
                list.push(page.subslice(0, part as usize).map_err(io::Error::other)?);
                count += part;
                len_bytes -= part;
            }
            self.vectored.write_all_at(&self.file, &list, offset)?;
            offset += count;
        }
        Ok(())
    }
}
