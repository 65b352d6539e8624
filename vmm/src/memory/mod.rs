//! Guest-physical memory: one memfd, mapped in one or two regions around the hole below 4 GiB.
//!
//! ```text
//!  0 ............. 3 GiB | hole: virtio-mmio, IOAPIC, LAPIC | 4 GiB ..............
//!  region 0 (slot 0)     |                                  | region 1 (slot 1)
//! ```

mod freeze;

use std::fs::File;
use std::sync::Arc;

pub use freeze::{Aside, Layer, PAGE, again, first, touched};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
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

/// Guest memory of `mib` MiB from a generation's layers: a child's, that no layer sees change.
///
/// # Errors
/// [`MemoryError`]: layers of another size, or no address space.
pub fn restore(mib: u64, layers: &[Layer]) -> Result<GuestMemoryMmap, MemoryError> {
    let bytes = mib << 20;
    let whole = Run {
        offset: 0,
        len: bytes,
    };
    let Some((base, overlays)) = layers.split_first() else {
        return Err(MemoryError::Layers("there is none"));
    };
    if base.runs != [whole] {
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
        if len.len() != bytes {
            return Err(MemoryError::Layers("a file is not as long as the memory"));
        }
    }
    let memory = map(mib, &base.file, libc::MAP_PRIVATE)?;
    for layer in overlays {
        freeze::overlay(&memory, layer)?;
    }
    Ok(memory)
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
    use super::*;

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
