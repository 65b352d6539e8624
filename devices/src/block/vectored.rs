//! `preadv` and `pwritev` between a file and guest memory, to the last byte.
//!
//! Guest buffers are passed to the kernel as they are: Rust references to memory that the guest
//! writes at the same time would be unsound, so libc is called with pointers.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::VolatileSlice;

/// The most buffers that one call takes (IOV_MAX, linux/uio.h: UIO_MAXIOV).
const BUFFERS_MAX: usize = 1024;

/// A reusable list of `iovec`, so that a request allocates nothing.
#[derive(Debug, Default)]
pub(super) struct Vectored {
    list: Vec<libc::iovec>,
}

// SAFETY: the list is filled and emptied within one method call; between calls it holds no pointer.
unsafe impl Send for Vectored {}

#[derive(Clone, Copy)]
enum Direction {
    FromFile,
    ToFile,
}

impl Vectored {
    /// Fills `buffers` from `offset` on.
    ///
    /// # Errors
    /// The operating system's, or [`io::ErrorKind::UnexpectedEof`] when the file has become
    /// shorter than the disk.
    pub(super) fn read_exact_at(
        &mut self,
        file: &File,
        buffers: &[VolatileSlice<'_>],
        offset: u64,
    ) -> io::Result<()> {
        self.transfer(file, buffers, offset, Direction::FromFile)
    }

    /// Writes `buffers` from `offset` on.
    ///
    /// # Errors
    /// The operating system's.
    pub(super) fn write_all_at(
        &mut self,
        file: &File,
        buffers: &[VolatileSlice<'_>],
        offset: u64,
    ) -> io::Result<()> {
        self.transfer(file, buffers, offset, Direction::ToFile)
    }

    fn transfer(
        &mut self,
        file: &File,
        buffers: &[VolatileSlice<'_>],
        mut offset: u64,
        direction: Direction,
    ) -> io::Result<()> {
        for group in buffers.chunks(BUFFERS_MAX) {
            self.list.clear();
            // The guards do nothing here (guest memory is mapped for good), but hold the pointers.
            self.list.extend(group.iter().map(|buffer| libc::iovec {
                iov_base: buffer.ptr_guard_mut().as_ptr().cast(),
                iov_len: buffer.len(),
            }));
            let mut first = 0;
            while let Some(rest) = skip_empty(&mut self.list, &mut first) {
                let done = match once(file, rest, offset, direction) {
                    Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    other => other,
                };
                let done = done.inspect_err(|_| self.list.clear())?;
                offset += done as u64;
                advance(&mut self.list[first..], done);
            }
            self.list.clear();
        }
        Ok(())
    }
}

/// Moves `first` past buffers with nothing left; none when all are done.
fn skip_empty<'a>(list: &'a mut [libc::iovec], first: &mut usize) -> Option<&'a [libc::iovec]> {
    while list.get(*first)?.iov_len == 0 {
        *first += 1;
    }
    list.get(*first..)
}

/// Takes `done` bytes off the front of the list.
fn advance(list: &mut [libc::iovec], mut done: usize) {
    for entry in list {
        let part = done.min(entry.iov_len);
        entry.iov_base = entry.iov_base.cast::<u8>().wrapping_add(part).cast();
        entry.iov_len -= part;
        done -= part;
        if done == 0 {
            break;
        }
    }
}

fn once(file: &File, list: &[libc::iovec], offset: u64, direction: Direction) -> io::Result<usize> {
    let fd = file.as_raw_fd();
    let offset =
        libc::off_t::try_from(offset).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let (pointer, count) = (list.as_ptr(), list.len() as libc::c_int);
    // SAFETY: the list's entries lie within `VolatileSlice`s that the caller still borrows: mapped
    // memory that no Rust reference aliases. The kernel reads `count` entries.
    let done = unsafe {
        match direction {
            Direction::FromFile => libc::preadv(fd, pointer, count, offset),
            Direction::ToFile => libc::pwritev(fd, pointer, count, offset),
        }
    };
    usize::try_from(done).map_err(|_| io::Error::last_os_error())
}
