//! Descriptor chains, checked whole before a device sees them, and vectored I/O on their buffers.
//!
//! virtio-queue's own iterator ends silently at a descriptor that it cannot follow. Here a chain
//! that loops, leaves its table, runs longer than its queue, has an empty buffer, a buffer outside
//! guest memory, or a readable buffer after a writable one is a [`DeviceError`] (virtio 1.2,
//! 2.7.4.2 and 2.7.5): the device then needs a reset.
//!
//! ```text
//!  Queue --Chain::pop--> readable segments | writable segments --Iovecs--> readv/writev
//! ```

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

use super::DeviceError;

/// One buffer in guest memory; it has been checked to lie within it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Where it begins.
    pub address: GuestAddress,
    /// Its length in bytes, not zero.
    pub len_bytes: u32,
}

/// A descriptor chain taken from a queue. A device keeps one and fills it again and again, so that
/// a request allocates nothing.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
}

impl Chain {
    /// Takes the next available chain of `queue`, which is number `index` of its device. False when
    /// there is none; what was here before is gone in any case.
    ///
    /// # Errors
    /// When the available ring or the chain breaks the rules above.
    pub fn pop(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
        index: usize,
    ) -> Result<bool, DeviceError> {
        self.readable.clear();
        self.writable.clear();
        let longest = usize::from(queue.size());
        let mut available = queue
            .iter(memory)
            .map_err(|source| DeviceError::Queue { index, source })?;
        let Some(chain) = available.next() else {
            return Ok(false);
        };
        self.head = chain.head_index();
        let mut unfinished = true;
        for descriptor in chain {
            unfinished = descriptor.has_next();
            let segment = Segment {
                address: descriptor.addr(),
                len_bytes: descriptor.len(),
            };
            if segment.len_bytes == 0 {
                return Err(DeviceError::Driver("empty buffer in a chain"));
            }
            let (list, access) = if descriptor.is_write_only() {
                (&mut self.writable, Permissions::Write)
            } else if self.writable.is_empty() {
                (&mut self.readable, Permissions::Read)
            } else {
                return Err(DeviceError::Driver("readable buffer after a writable one"));
            };
            if !memory.check_range(segment.address, segment.len_bytes as usize, access) {
                return Err(DeviceError::Driver("buffer outside guest memory"));
            }
            list.push(segment);
            if self.readable.len() + self.writable.len() > longest {
                return Err(DeviceError::Driver("chain longer than its queue"));
            }
        }
        if unfinished {
            return Err(DeviceError::Driver(
                "chain that loops or leaves its descriptor table",
            ));
        }
        Ok(true)
    }

    /// The chain's name in the used ring.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What the device reads, in order.
    pub fn readable(&self) -> &[Segment] {
        &self.readable
    }

    /// What the device writes, in order.
    pub fn writable(&self) -> &[Segment] {
        &self.writable
    }

    /// Bytes in [`Self::readable`].
    pub fn readable_len_bytes(&self) -> u64 {
        len_bytes(&self.readable)
    }

    /// Bytes in [`Self::writable`].
    pub fn writable_len_bytes(&self) -> u64 {
        len_bytes(&self.writable)
    }

    /// Copies from byte `offset` of the readable buffers into `data`; returns how many bytes there
    /// were, at most `data.len()`.
    ///
    /// # Errors
    /// When guest memory cannot be read.
    pub fn read(
        &self,
        memory: &GuestMemoryMmap,
        offset: u64,
        data: &mut [u8],
    ) -> Result<usize, DeviceError> {
        let mut done = 0;
        for part in parts(&self.readable, offset, data.len() as u64) {
            let end = done + part.len_bytes as usize;
            memory
                .read_slice(&mut data[done..end], part.address)
                .map_err(DeviceError::Memory)?;
            done = end;
        }
        Ok(done)
    }

    /// Copies `data` to byte `offset` of the writable buffers; returns how many bytes fitted.
    ///
    /// # Errors
    /// When guest memory cannot be written.
    pub fn write(
        &self,
        memory: &GuestMemoryMmap,
        offset: u64,
        data: &[u8],
    ) -> Result<usize, DeviceError> {
        let mut done = 0;
        for part in parts(&self.writable, offset, data.len() as u64) {
            let end = done + part.len_bytes as usize;
            memory
                .write_slice(&data[done..end], part.address)
                .map_err(DeviceError::Memory)?;
            done = end;
        }
        Ok(done)
    }
}

fn len_bytes(segments: &[Segment]) -> u64 {
    segments.iter().map(|s| u64::from(s.len_bytes)).sum()
}

/// The bytes `offset..offset + len` of a list of segments, as segments; shorter when it ends.
fn parts(segments: &[Segment], offset: u64, len: u64) -> impl Iterator<Item = Segment> + '_ {
    let mut skip = offset;
    let mut left = len;
    segments.iter().filter_map(move |segment| {
        let have = u64::from(segment.len_bytes);
        let skipped = skip.min(have);
        skip -= skipped;
        let take = left.min(have - skipped);
        left -= take;
        (take > 0).then(|| Segment {
            // Within the segment, which has been checked.
            address: segment.address.unchecked_add(skipped),
            len_bytes: take as u32,
        })
    })
}

/// Pieces of guest memory as the kernel's vectored calls want them. Its borrow of guest memory
/// keeps the mappings alive.
///
/// The guest may change the bytes at any time; so may the kernel: nothing here makes a Rust
/// reference of them.
#[derive(Debug, Default)]
pub struct Iovecs<'m> {
    list: Vec<libc::iovec>,
    len_bytes: u64,
    memory: PhantomData<&'m GuestMemoryMmap>,
}

impl<'m> Iovecs<'m> {
    /// The bytes `offset..offset + len` of `segments`; fewer when those end before.
    ///
    /// # Errors
    /// When a segment is not in `memory`.
    pub fn new(
        memory: &'m GuestMemoryMmap,
        segments: &[Segment],
        offset: u64,
        len: u64,
    ) -> Result<Self, DeviceError> {
        let mut iovecs = Self::default();
        iovecs.push(memory, segments, offset, len)?;
        Ok(iovecs)
    }

    /// Adds bytes as [`Self::new`] takes them.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn push(
        &mut self,
        memory: &'m GuestMemoryMmap,
        segments: &[Segment],
        offset: u64,
        len: u64,
    ) -> Result<(), DeviceError> {
        for part in parts(segments, offset, len) {
            let slices = memory
                .get_slices(
                    part.address,
                    part.len_bytes as usize,
                    Permissions::ReadWrite,
                )
                .map_err(DeviceError::Memory)?;
            for slice in slices {
                let slice = slice.map_err(DeviceError::Memory)?;
                self.len_bytes += slice.len() as u64;
                self.list.push(libc::iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                });
            }
        }
        Ok(())
    }

    /// Adds a buffer of our own.
    pub fn push_host(&mut self, buffer: &'m mut [u8]) {
        self.len_bytes += buffer.len() as u64;
        self.list.push(libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        });
    }

    /// Bytes in all.
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// For calls that are not here, such as preadv.
    pub fn as_slice(&self) -> &[libc::iovec] {
        &self.list
    }

    /// readv(2): from `file` into guest memory.
    ///
    /// # Errors
    /// The call's.
    pub fn read_from(&self, file: BorrowedFd<'_>) -> io::Result<usize> {
        // SAFETY: each iovec lies in a mapping of guest memory that outlives `self` ('m), and is
        // memory that may change at any time, of which no Rust reference exists; or it is a buffer
        // that is borrowed mutably for as long.
        let read = unsafe {
            libc::readv(
                file.as_raw_fd(),
                self.list.as_ptr(),
                self.list.len() as libc::c_int,
            )
        };
        usize::try_from(read).map_err(|_| io::Error::last_os_error())
    }

    /// writev(2): from guest memory into `file`.
    ///
    /// # Errors
    /// The call's.
    pub fn write_to(&self, file: BorrowedFd<'_>) -> io::Result<usize> {
        // SAFETY: as in `read_from`; the kernel only reads.
        let written = unsafe {
            libc::writev(
                file.as_raw_fd(),
                self.list.as_ptr(),
                self.list.len() as libc::c_int,
            )
        };
        usize::try_from(written).map_err(|_| io::Error::last_os_error())
    }
}
