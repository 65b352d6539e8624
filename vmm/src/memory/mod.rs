//! Guest-physical memory: one memfd, mapped in one or two regions around the hole below 4 GiB.
//!
//! ```text
//!  0 ............. 3 GiB | hole: virtio-mmio, IOAPIC, LAPIC | 4 GiB ..............
//!  region 0 (slot 0)     |                                  | region 1 (slot 1)
//! ```

mod ahead;
mod free;
mod freeze;
mod merge;
mod runs;

use std::fs::File;
use std::sync::Arc;

pub use ahead::{Ahead, ahead};
pub use free::FreeMemory;
pub use freeze::{Aside, Layer, PAGE, again, first, touched};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
pub use merge::{floor, install, merge, move_over, plan, plan_layers, prune};
use ratoon_vmm_api::Run;
use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};

/// Where the hole for devices begins: no RAM from here to [`HOLE_END`].
pub const HOLE_START: u64 = 3 << 30;
/// Where RAM goes on.
pub const HOLE_END: u64 = 4 << 30;

/// Why guest memory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The memfd.
    #[error("cannot make a memory file of {mib} MiB for the guest")]
    File {
        /// Wanted size.
        mib: u64,
        /// The system's word.
        #[source]
        source: std::io::Error,
    },
    /// The mapping.
    #[error("cannot map {mib} MiB of guest memory; is there a limit on address space (ulimit -v)?")]
    Map {
        /// Wanted size.
        mib: u64,
        /// The system's word.
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
    /// A freeze or what follows from it.
    #[error("cannot {what} to freeze the machine")]
    Freeze {
        /// Which step.
        what: &'static str,
        /// The system's word.
        #[source]
        source: std::io::Error,
    },
    /// Layers that are not those of this machine.
    #[error("the machine's frozen memory does not fit: {0}")]
    Layers(&'static str),
    /// Regions that overlap: our own mistake.
    #[error("guest memory layout")]
    Layout(#[source] vm_memory::GuestRegionCollectionError),
    /// KVM refused a slot.
    #[error("KVM refuses memory slot {slot}")]
    Slot {
        /// Which.
        slot: u32,
        /// KVM's word.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// The regions, start and length in bytes, of a guest with `bytes` of memory.
pub fn layout(bytes: u64) -> Vec<(u64, u64)> {
    if bytes <= HOLE_START {
        vec![(0, bytes)]
    } else {
        vec![(0, HOLE_START), (HOLE_END, bytes - HOLE_START)]
    }
}

/// A file in memory that cannot change its size.
fn memfd(name: &str, bytes: u64) -> rustix::io::Result<Arc<File>> {
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&fd, bytes)?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW)?;
    Ok(Arc::new(File::from(fd)))
}

/// The file that guest memory was made from.
///
/// # Panics
/// Never: all our memory is a file's.
pub fn file_of(memory: &GuestMemoryMmap) -> Arc<File> {
    let region = memory.iter().next().expect("at least one region");
    let file = region.file_offset().expect("all memory is a file's");
    file.arc().clone()
}

/// Makes guest memory of `mib` MiB: a memfd that cannot change its size, mapped shared.
///
/// # Errors
/// [`MemoryError`]: usually a limit on memory or address space.
pub fn create(mib: u64) -> Result<GuestMemoryMmap, MemoryError> {
    let bytes = mib << 20;
    let file = memfd("ratoon-guest", bytes).map_err(|source| MemoryError::File {
        mib,
        source: source.into(),
    })?;
    map(mib, &file, libc::MAP_SHARED)
}

/// Guest memory of `mib` MiB from a generation's layers: a child's, that no layer sees change. Only the
/// lowest is there yet: [`lay_over`] maps the others.
///
/// # Errors
/// [`MemoryError`]: layers of another size, or no address space.
pub fn restore(mib: u64, layers: &[Layer]) -> Result<GuestMemoryMmap, MemoryError> {
    map(mib, &lowest(mib, layers)?.file, libc::MAP_PRIVATE)
}

/// Addresses for `mib` MiB of guest memory, with nothing there: see [`fill`].
///
/// # Errors
/// [`MemoryError::Map`].
pub fn reserve(mib: u64) -> Result<GuestMemoryMmap, MemoryError> {
    let mut regions = Vec::new();
    for (start, len) in layout(mib << 20) {
        let mapping = MmapRegionBuilder::new(len as usize)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
            .build()
            .map_err(|source| MemoryError::Map { mib, source })?;
        regions.push(Arc::new(
            GuestRegionMmap::new(mapping, GuestAddress(start))
                .expect("the layout ends far below 2^64"),
        ));
    }
    GuestMemoryMmap::from_arc_regions(regions).map_err(MemoryError::Layout)
}

/// As [`restore`], at the addresses of a reservation of the same size.
///
/// # Errors
/// [`MemoryError`].
pub fn fill(
    reserved: &GuestMemoryMmap,
    mib: u64,
    layers: &[Layer],
) -> Result<GuestMemoryMmap, MemoryError> {
    freeze::cover(reserved, lowest(mib, layers)?)?;
    Ok(reserved.clone())
}

/// The layer that all others lie over; all have the right sizes.
fn lowest(mib: u64, layers: &[Layer]) -> Result<&Layer, MemoryError> {
    let bytes = mib << 20;
    let whole = Run {
        offset: 0,
        len: bytes,
    };
    let Some(base) = layers.first() else {
        return Err(MemoryError::Layers("there is none"));
    };
    if base.runs != [whole] || base.packed {
        return Err(MemoryError::Layers("the first layer is not the whole"));
    }
    for layer in layers {
        let len = layer
            .file
            .metadata()
            .map_err(|source| MemoryError::Freeze {
                what: "look at a memory file",
                source,
            })?;
        let wanted = match layer.packed {
            true => layer
                .runs
                .iter()
                .fold(0_u64, |sum, run| sum.saturating_add(run.len)),
            false => bytes,
        };
        if len.len() != wanted {
            return Err(MemoryError::Layers(
                "a file is not as long as the memory or its runs",
            ));
        }
    }
    Ok(base)
}

/// Maps what lies over the lowest layer.
///
/// # Errors
/// [`MemoryError`]: runs outside of memory, or no address space.
pub fn lay_over(memory: &GuestMemoryMmap, layers: &[Layer]) -> Result<(), MemoryError> {
    let mut overlays = layers.iter().skip(1);
    overlays.try_for_each(|layer| freeze::overlay(memory, layer))
}

fn map(mib: u64, file: &Arc<File>, how: i32) -> Result<GuestMemoryMmap, MemoryError> {
    let mut regions = Vec::new();
    let mut offset = 0;
    for (start, len) in layout(mib << 20) {
        let mapping = MmapRegionBuilder::new(len as usize)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(how | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::from_arc(file.clone(), offset))
            .build()
            .map_err(|source| MemoryError::Map { mib, source })?;
        offset += len;
        regions.push(Arc::new(
            GuestRegionMmap::new(mapping, GuestAddress(start))
                .expect("the layout ends far below 2^64"),
        ));
    }
    GuestMemoryMmap::from_arc_regions(regions).map_err(MemoryError::Layout)
}

/// Gives each region to KVM as a memory slot. To be called before the irqchip exists: a slot added
/// after it waits for a grace period of several milliseconds.
///
/// # Errors
/// [`MemoryError::Slot`].
pub fn register(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<(), MemoryError> {
    for (slot, region) in memory.iter().enumerate() {
        let slot = slot as u32;
        let entry = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the mapping is as long as the slot, and it lives as long as the VM: `Machine`
        // drops the VM's descriptor before the memory.
        unsafe { vm.set_user_memory_region(entry) }.map_err(|error| MemoryError::Slot {
            slot,
            source: error,
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::Bytes;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn layer(len: u64, packed: bool, runs: &[(u64, u64)], bytes: &[(u64, u8)]) -> Layer {
        let file = memfd("test", len).unwrap();
        for &(at, byte) in bytes {
            file.write_all_at(&[byte], at).unwrap();
        }
        let runs = runs.iter().map(|&(offset, len)| Run { offset, len });
        Layer {
            file,
            runs: runs.collect(),
            packed,
            freezes: 1,
        }
    }

    fn whole_of(layers: &[Layer]) -> Result<GuestMemoryMmap, MemoryError> {
        let memory = restore(64, layers)?;
        lay_over(&memory, layers)?;
        Ok(memory)
    }

    #[test]
    fn packed_runs_lie_over_the_layers_below_and_are_never_written() {
        let whole = [(0, 64 * MIB)];
        let base = layer(64 * MIB, false, &whole, &[(0, 1), (MIB, 1), (2 * MIB, 1)]);
        let runs = [(MIB, PAGE), (2 * MIB, 2 * PAGE)];
        let over = layer(3 * PAGE, true, &runs, &[(0, 2), (PAGE, 3), (2 * PAGE, 4)]);
        let memory = whole_of(&[base.clone(), over.clone()]).unwrap();
        let byte = |at: u64| memory.read_obj::<u8>(GuestAddress(at)).unwrap();
        let found = [0, MIB, 2 * MIB, 2 * MIB + PAGE].map(byte);
        assert_eq!(found, [1, 2, 3, 4]);
        memory.write_obj(9_u8, GuestAddress(2 * MIB)).unwrap();
        let mut kept = [0];
        over.file.read_exact_at(&mut kept, PAGE).unwrap();
        assert_eq!(kept, [3]);
        // What a child wrote is what it has more than its layers.
        let (own, _) = again(&memory, ahead(&memory).unwrap(), &[]).unwrap();
        assert_eq!(own.runs.len(), 1);
        assert_eq!((own.runs[0].offset, own.runs[0].len), (2 * MIB, PAGE));
    }

    #[test]
    fn layers_that_do_not_fit_are_refused() {
        let whole = [(0, 64 * MIB)];
        let base = || layer(64 * MIB, false, &whole, &[]);
        let refused = |layers: &[Layer]| match whole_of(layers) {
            Err(MemoryError::Layers(why)) => why,
            other => panic!("{other:?}"),
        };
        assert_eq!(refused(&[]), "there is none");
        let packed = Layer {
            packed: true,
            ..base()
        };
        assert_eq!(refused(&[packed]), "the first layer is not the whole");
        let short = layer(PAGE, true, &[(0, 2 * PAGE)], &[]);
        let lengths = "a file is not as long as the memory or its runs";
        assert_eq!(refused(&[base(), short]), lengths);
        let outside = layer(PAGE, true, &[(64 * MIB, PAGE)], &[]);
        assert_eq!(refused(&[base(), outside]), "a run lies outside of memory");
    }

    #[test]
    fn memory_leaves_the_hole_free() {
        assert_eq!(layout(128 << 20), [(0, 128 << 20)]);
        assert_eq!(layout(HOLE_START), [(0, HOLE_START)]);
        assert_eq!(
            layout(16 << 30),
            [(0, HOLE_START), (HOLE_END, (16 << 30) - HOLE_START)]
        );
    }

    #[test]
    fn guest_memory_is_one_file_that_keeps_its_size() {
        let memory = create(64).unwrap();
        let region = memory.iter().next().unwrap();
        let file = region.file_offset().unwrap().file();
        assert_eq!(file.metadata().unwrap().len(), 64 << 20);
        assert!(file.set_len(1 << 20).is_err());
    }
}
