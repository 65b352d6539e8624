//! Memory that the guest does not use, given back to the host.
//!
//! ```text
//!  own alone (shared memfd)   a hole in the file: the page is gone, and reads as zero
//!  over a generation          anonymous memory mapped in its place: the copy is gone, and it reads as zero
//! ```
//!
//! Over a generation `MADV_DONTNEED` would do for the host, but the page would then read as the
//! generation's, and the next snapshot could not know that nobody wants it. So blocks of 2 MiB (what
//! a guest reports, at the least) get a mapping of their own, of zeroes, which the next freeze
//! takes into its layer as holes ([`FreeMemory::take`]). Blocks, because each may cost a mapping, of
//! which a process has 65530; a guest that reports every second one of 64 GiB needs 32768. The rest of
//! a run, less than a block at either end, stays the guest's.
//!
//! It fails when the system has no room for a mapping: the pages stay the guest's.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use ratoon_devices::balloon::Reclaim;
use ratoon_vmm_api::Run;
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::bus::lock;

/// The least that is mapped anew, in bytes.
const BLOCK: u64 = 2 << 20;

/// What becomes of a machine's free memory. Its lock is taken with the balloon's transport locked, or
/// with all transports locked.
#[derive(Debug, Default)]
pub struct FreeMemory(Mutex<Free>);

#[derive(Debug, Default)]
struct Free {
    /// Memory lies over a generation.
    is_child: bool,
    /// Mapped anew since the last freeze: offset in memory and end.
    runs: BTreeMap<u64, u64>,
}

impl FreeMemory {
    /// Of a machine whose memory lies over a generation, or is its own alone.
    pub fn new(is_child: bool) -> Arc<Self> {
        let runs = BTreeMap::new();
        Arc::new(Self(Mutex::new(Free { is_child, runs })))
    }

    /// For a freeze, during which nothing is reclaimed: from now on memory lies over a generation.
    /// Gives what is zero without having been written, ascending and apart.
    pub fn take(&self) -> Vec<Run> {
        let mut free = lock(&self.0);
        free.is_child = true;
        let runs = std::mem::take(&mut free.runs).into_iter();
        runs.map(|(offset, end)| Run {
            offset,
            len: end - offset,
        })
        .collect()
    }
}

impl FreeMemory {
    /// What [`Self::take`] would give, which stays.
    pub fn runs(&self) -> Vec<Run> {
        let free = lock(&self.0);
        let runs = free.runs.iter();
        runs.map(|(&offset, &end)| Run {
            offset,
            len: end - offset,
        })
        .collect()
    }
}

impl Free {
    /// Adds a run, and makes one of those that touch.
    fn add(&mut self, offset: u64, end: u64) {
        let (mut offset, mut end) = (offset, end);
        while let Some((&start, &stop)) = self.runs.range(..=end).next_back() {
            if stop < offset {
                break;
            }
            self.runs.remove(&start);
            offset = offset.min(start);
            end = end.max(stop);
        }
        self.runs.insert(offset, end);
    }
}

/// A run within one region: where it is mapped here, and its offset in memory.
fn place(
    memory: &GuestMemoryMmap,
    address: GuestAddress,
    len: u64,
) -> Option<(usize, u64, &GuestMemoryRegionOf)> {
    let mut before = 0;
    for region in memory.iter() {
        if let Some(within) = region.to_region_addr(address) {
            let fits = len <= region.len() - within.raw_value();
            let here = region.as_ptr() as usize + within.raw_value() as usize;
            return fits.then_some((here, before + within.raw_value(), region));
        }
        before += region.len();
    }
    None
}

type GuestMemoryRegionOf = <GuestMemoryMmap as GuestMemoryBackend>::R;

impl Reclaim for FreeMemory {
    fn reclaim(
        &self,
        memory: &GuestMemoryMmap,
        address: GuestAddress,
        len: u64,
    ) -> std::io::Result<u64> {
        let Some((here, offset, region)) = place(memory, address, len) else {
            return Err(std::io::ErrorKind::InvalidInput.into());
        };
        let mut free = lock(&self.0);
        if !free.is_child {
            let file = region
                .file_offset()
                .ok_or(std::io::ErrorKind::Unsupported)?;
            use rustix::fs::FallocateFlags;
            let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(file.file(), hole, offset, len)?;
            return Ok(len);
        }
        let first = offset.next_multiple_of(BLOCK);
        let end = (offset + len) & !(BLOCK - 1);
        if end <= first {
            return Ok(0);
        }
        zero(here + (first - offset) as usize, (end - first) as usize)?;
        free.add(first, end);
        Ok(end - first)
    }
}

/// Maps zeroes over a part of guest memory.
fn zero(address: usize, len: usize) -> std::io::Result<()> {
    // SAFETY: the range is guest memory of ours, mapped for as long as the machine lives; guest
    // memory is only accessed through raw pointers, to which another mapping of it is another value.
    // In one step: a vCPU or device that looks meanwhile finds the old page or a zero one.
    let mapped = unsafe {
        libc::mmap(
            address as *mut libc::c_void,
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    match mapped == libc::MAP_FAILED {
        true => Err(std::io::Error::last_os_error()),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use vm_memory::Bytes;

    use super::super::{again, ahead, create, file_of, first};
    use super::*;

    const MIB: u64 = 1 << 20;

    fn run(offset: u64, len: u64) -> Run {
        Run { offset, len }
    }

    fn byte(memory: &GuestMemoryMmap, at: u64) -> u8 {
        memory.read_obj(GuestAddress(at)).unwrap()
    }

    fn fill(memory: &GuestMemoryMmap, at: u64, len: u64) {
        let bytes = vec![7; len as usize];
        memory.write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    #[test]
    fn runs_that_touch_or_overlap_are_one() {
        let mut free = Free::default();
        for (offset, end) in [(10, 20), (40, 50), (20, 30), (5, 12), (60, 70), (45, 65)] {
            free.add(offset, end);
        }
        assert_eq!(free.runs, BTreeMap::from([(5, 30), (40, 70)]));
        free.add(0, 100);
        assert_eq!(free.runs, BTreeMap::from([(0, 100)]));
    }

    #[test]
    fn before_a_freeze_free_pages_are_holes_in_the_file() {
        let memory = create(64).unwrap();
        let file = file_of(&memory);
        fill(&memory, 0, 8 * MIB);
        let blocks = || file.metadata().unwrap().blocks() * 512;
        assert_eq!(blocks(), 8 * MIB);
        let free = FreeMemory::new(false);
        let given = free.reclaim(&memory, GuestAddress(MIB), 3 * MIB).unwrap();
        assert_eq!(given, 3 * MIB);
        assert_eq!(blocks(), 5 * MIB);
        assert_eq!(
            [MIB - 1, MIB, 4 * MIB - 1, 4 * MIB].map(|at| byte(&memory, at)),
            [7, 0, 0, 7]
        );
        assert!(free.take().is_empty());
    }

    #[test]
    fn after_a_freeze_free_blocks_are_zero_here_and_holes_in_the_next_layer() {
        let memory = create(64).unwrap();
        let file = file_of(&memory);
        fill(&memory, 0, 16 * MIB);
        let free = FreeMemory::new(false);
        let (generation, aside) = first(&memory, &file).unwrap();
        drop((aside, free.take()));
        fill(&memory, 4 * MIB, MIB);
        // Whole blocks only: 4 to 8 MiB of 3 to 9.
        let given = free.reclaim(&memory, GuestAddress(3 * MIB), 6 * MIB);
        assert_eq!(given.unwrap(), 4 * MIB);
        let around = [4 * MIB - 1, 4 * MIB, 8 * MIB - 1, 8 * MIB];
        assert_eq!(around.map(|at| byte(&memory, at)), [7, 0, 0, 7]);
        // The guest uses one page of it again.
        fill(&memory, 5 * MIB, 4096);
        let layer = again(&memory, ahead(&memory).unwrap(), &free.take())
            .unwrap()
            .0;
        assert_eq!(layer.runs, [run(4 * MIB, 4 * MIB)]);
        assert_eq!(layer.file.metadata().unwrap().blocks() * 512, 4096);
        assert_eq!(byte(&memory, 5 * MIB), 7);
        assert_eq!(around.map(|at| byte(&memory, at)), [7, 0, 0, 7]);
        // It stays so for those who start from the layers.
        let layers = [generation, layer];
        let child = super::super::restore(64, &layers).unwrap();
        super::super::lay_over(&child, &layers).unwrap();
        assert_eq!(around.map(|at| byte(&child, at)), [7, 0, 0, 7]);
        assert_eq!(byte(&child, 5 * MIB), 7);
        // Nothing more was written: the next freeze has nothing to say.
        assert!(
            again(&memory, ahead(&memory).unwrap(), &free.take())
                .unwrap()
                .0
                .runs
                .is_empty()
        );
    }

    #[test]
    fn what_is_given_back_between_the_copy_and_the_freeze_is_zero_in_the_layer() {
        let memory = create(64).unwrap();
        let file = file_of(&memory);
        let free = FreeMemory::new(false);
        let (generation, aside) = first(&memory, &file).unwrap();
        drop((aside, free.take()));
        fill(&memory, 3 * MIB, 3 * MIB);
        let ahead = ahead(&memory).unwrap();
        free.reclaim(&memory, GuestAddress(4 * MIB), 4 * MIB)
            .unwrap();
        let layer = again(&memory, ahead, &free.take()).unwrap().0;
        assert_eq!(layer.file.metadata().unwrap().blocks() * 512, MIB);
        let layers = [generation, layer];
        let child = super::super::restore(64, &layers).unwrap();
        super::super::lay_over(&child, &layers).unwrap();
        let around = [3 * MIB, 4 * MIB - 1, 4 * MIB, 6 * MIB - 1];
        assert_eq!(around.map(|at| byte(&child, at)), [7, 7, 0, 0]);
    }

    #[test]
    fn what_is_not_memory_is_refused() {
        let memory = create(64).unwrap();
        let free = FreeMemory::new(false);
        for (at, len) in [(64 * MIB, 4096), (63 * MIB, 2 * MIB), (u64::MAX, 4096)] {
            let refused = free.reclaim(&memory, GuestAddress(at), len).unwrap_err();
            assert_eq!(refused.kind(), std::io::ErrorKind::InvalidInput);
        }
    }
}
