//! What a later freeze copies while the machine still runs.
//!
//! Most of what was written since the last freeze is not written again while the guest comes to rest. It is
//! copied before the pause; in the pause it is held against memory, and only pages that differ are copied
//! again.

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use ratoon_vmm_api::Run;
use rustix::fs::FallocateFlags;
use vm_memory::GuestMemoryMmap;

use super::freeze::{Aside, PAGE, last, private_runs, regions};
use super::runs::{both, joined, minus};
use super::{MemoryError, memfd};

/// The file of a later freeze's layer, with what had been written when it was made.
#[derive(Debug)]
pub struct Ahead {
    pub(super) file: Arc<File>,
    copied: Vec<Run>,
    /// The whole file, mapped shared.
    mapping: Mapping,
}

#[derive(Debug)]
struct Mapping {
    address: usize,
    len: usize,
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is a mapping of ours alone, and no reference into it outlives this.
        unsafe { libc::munmap(self.address as *mut libc::c_void, self.len) };
    }
}

fn failed(what: &'static str) -> impl FnOnce(std::io::Error) -> MemoryError {
    move |source| MemoryError::Freeze { what, source }
}

/// Before a later freeze, while the machine still runs.
///
/// # Errors
/// When the system has no such file, no memory for it, or cannot tell what was written.
pub fn ahead(memory: &GuestMemoryMmap) -> Result<Ahead, MemoryError> {
    let regions = regions(memory);
    let total = regions.iter().map(|(_, _, len)| *len).sum();
    let file = memfd("ratoon-layer", total as u64)
        .map_err(std::io::Error::from)
        .map_err(failed("make a file for what was written"))?;
    let mapping = Mapping::of(&file, total)?;
    let mut copied = Vec::new();
    for (address, offset, len) in regions {
        for (start, run_len) in private_runs(address, len)? {
            let run = Run {
                offset: offset + (start - address) as u64,
                len: run_len as u64,
            };
            copy(&file, start, run)?;
            mapping.populate(run);
            copied.push(run);
        }
    }
    Ok(Ahead {
        file,
        copied: joined(copied),
        mapping,
    })
}

/// A run of memory at `address` into the file. The kernel reads it: what the guest writes meanwhile tears a page at most,
/// which is copied again.
fn copy(file: &File, address: usize, run: Run) -> Result<(), MemoryError> {
    let mut done = 0;
    while done < run.len {
        let from = (address as u64 + done) as *const libc::c_void;
        let (len, at) = (
            (run.len - done) as usize,
            (run.offset + done) as libc::off_t,
        );
        // SAFETY: the run is mapped guest memory, which only the kernel reads here: a reference into it could not be had,
        // as the guest may write it.
        let written = unsafe { libc::pwrite(file.as_raw_fd(), from, len, at) };
        match written {
            0 => return Err(failed("copy what was written")(ErrorKind::WriteZero.into())),
            1.. => done += written as u64,
            _ => {
                let error = std::io::Error::last_os_error();
                if error.kind() != ErrorKind::Interrupted {
                    return Err(failed("copy what was written")(error));
                }
            }
        }
    }
    Ok(())
}

impl Mapping {
    fn of(file: &File, len: usize) -> Result<Self, MemoryError> {
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                0,
            )
        };
        match address == libc::MAP_FAILED {
            true => Err(last("map what was written")),
            false => Ok(Self {
                address: address as usize,
                len,
            }),
        }
    }

    /// Fills in its page table, so that nothing of this run faults later. Kernels before 5.14 cannot: then it does.
    fn populate(&self, run: Run) {
        let address = self.address + run.offset as usize;
        // SAFETY: the run lies within the mapping, and has pages of the file.
        unsafe {
            libc::madvise(
                address as *mut libc::c_void,
                run.len as usize,
                libc::MADV_POPULATE_WRITE,
            )
        };
    }
}

impl Ahead {
    /// Brings a run of the layer to what memory at `address` is. Nobody may write memory meanwhile.
    ///
    /// # Errors
    /// When there is no memory for what had not been copied.
    pub(super) fn complete(&self, address: usize, run: Run) -> Result<(), MemoryError> {
        let address_of = |part: &Run| address + (part.offset - run.offset) as usize;
        // There may be many thousands, and this is in the pause.
        let before = |it: &Run| it.offset + it.len <= run.offset;
        let near = &self.copied[self.copied.partition_point(before)..];
        for part in minus(&[run], near) {
            copy(&self.file, address_of(&part), part)?;
        }
        for part in both(&[run], near) {
            let len = part.len as usize;
            // SAFETY: the part is mapped guest memory that nobody writes now, and mapped here too, from a file that
            // nobody else has; the one is not the other.
            let (now, then) = unsafe {
                let then = (self.mapping.address + part.offset as usize) as *mut u8;
                (
                    std::slice::from_raw_parts(address_of(&part) as *const u8, len),
                    std::slice::from_raw_parts_mut(then, len),
                )
            };
            let pages = now.chunks(PAGE as usize);
            for (now, then) in pages.zip(then.chunks_mut(PAGE as usize)) {
                if now != then {
                    then.copy_from_slice(now);
                }
            }
        }
        Ok(())
    }

    /// Makes holes of what was copied and is zero now: the guest has given it back since. `runs` are what was completed.
    ///
    /// # Errors
    /// When the system cannot.
    pub(super) fn forget(&self, free: &[Run], runs: &[Run]) -> Result<(), MemoryError> {
        for part in both(&minus(&self.copied, runs), free) {
            let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&*self.file, how, part.offset, part.len)
                .map_err(std::io::Error::from)
                .map_err(failed("leave out what the guest gave back"))?;
        }
        Ok(())
    }

    /// What is left to unmap, off the pause.
    pub(super) fn aside(self) -> (Arc<File>, Aside) {
        let mapping = std::mem::ManuallyDrop::new(self.mapping);
        (self.file, Aside::of(mapping.address, mapping.len))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::{Bytes, GuestAddress};

    use super::super::freeze::{again, first};
    use super::*;

    #[test]
    fn what_is_written_after_the_copy_is_in_the_layer_all_the_same() {
        let memory = super::super::create(64).unwrap();
        let (_, aside) = first(&memory, &super::super::file_of(&memory)).unwrap();
        drop(aside);
        let write = |page: u64, value: u8| {
            memory
                .write_obj(value, GuestAddress(page * PAGE + 7))
                .unwrap();
        };
        // Only before the copy; before and after; only after, in a run of its own and beside one.
        write(3, 1);
        write(4, 1);
        let ahead = ahead(&memory).unwrap();
        write(4, 2);
        write(5, 2);
        write(9000, 2);
        let (layer, aside) = again(&memory, ahead, &[]).unwrap();
        drop(aside);
        for (page, value) in [(3, 1), (4, 2), (5, 2), (9000, 2)] {
            let mut byte = [0];
            layer
                .file
                .read_exact_at(&mut byte, page * PAGE + 7)
                .unwrap();
            assert_eq!(byte, [value], "page {page} of the layer");
            let byte: u8 = memory.read_obj(GuestAddress(page * PAGE + 7)).unwrap();
            assert_eq!(byte, value, "page {page} of memory");
        }
        write(4, 3);
        let mut byte = [0];
        layer.file.read_exact_at(&mut byte, 4 * PAGE + 7).unwrap();
        assert_eq!(byte, [2], "the layer does not change any more");
    }
}
