//! How a running machine's memory becomes an immutable layer, and where its own pages are after.
//!
//! ```text
//!  before          frozen                          frozen again
//!  shared memfd -> memfd (layer), mapped private -> layer, second layer of what was written since,
//!                                                  both mapped private
//! ```
//!
//! The mapping keeps its addresses, so KVM's slots stay as they are. Page tables of the old mapping
//! are moved aside with it and torn down later, off the pause. After that the private pages *are*
//! the difference from the generation: the kernel's copy-on-write keeps the log.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use ratoon_vmm_api::Run;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::MemoryError;
use super::ahead::Ahead;
use super::runs::joined;

/// A page's length in bytes.
pub const PAGE: u64 = 4096;

/// Runs of changed pages with gaps of at most so many pages are one run: each costs a mapping.
pub(super) const GAP_PAGES: u64 = 16;

/// One immutable file of a generation's memory; later layers lie over earlier ones.
#[derive(Debug, Clone)]
pub struct Layer {
    /// As long as guest memory and sparse, unless it is packed.
    pub file: Arc<File>,
    /// Which parts of it count.
    pub runs: Vec<Run>,
    /// It has the runs end to end.
    pub packed: bool,
    /// How many freezes it stands for.
    pub freezes: u32,
}

/// A mapping that was moved aside, unmapped when dropped: milliseconds for gigabytes.
#[derive(Debug)]
pub struct Aside(Vec<(usize, usize)>);

impl Aside {
    /// Of a range that nobody else knows of.
    pub(super) fn of(address: usize, len: usize) -> Self {
        Self(vec![(address, len)])
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        for &(address, len) in &self.0 {
            // SAFETY: the range came from `mremap` or `mmap`, nobody else knows of it.
            unsafe { libc::munmap(address as *mut libc::c_void, len) };
        }
    }
}

pub(super) fn last(what: &'static str) -> MemoryError {
    MemoryError::Freeze {
        what,
        source: std::io::Error::last_os_error(),
    }
}

/// Each region: its address here, its offset in the file, its length.
pub(super) fn regions(memory: &GuestMemoryMmap) -> Vec<(usize, u64, usize)> {
    let mut offset = 0;
    memory
        .iter()
        .map(|region| {
            let this = (region.as_ptr() as usize, offset, region.len() as usize);
            offset += region.len();
            this
        })
        .collect()
}

/// Maps `file` from `offset` on over `[address, address + len)`, privately.
pub(super) fn map_private(
    address: usize,
    len: usize,
    file: &File,
    offset: u64,
) -> Result<(), MemoryError> {
    // SAFETY: the range is guest memory of ours, mapped for as long as the machine lives; guest
    // memory is only accessed through raw pointers, to which another mapping of it is another value.
    let mapped = unsafe {
        libc::mmap(
            address as *mut libc::c_void,
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
            file.as_raw_fd(),
            offset as libc::off_t,
        )
    };
    match mapped == libc::MAP_FAILED {
        true => Err(last("map its memory privately")),
        false => Ok(()),
    }
}

/// The first freeze: memory that is mapped shared from `file` is mapped privately from now on, and
/// nobody writes the file again. The old mapping must be gone before the file is sealed.
///
/// # Errors
/// When the system refuses; memory may then be mapped in part privately, and the VM must end.
pub fn first(memory: &GuestMemoryMmap, file: &Arc<File>) -> Result<(Layer, Aside), MemoryError> {
    let mut aside = Aside(Vec::new());
    let mut total = 0;
    for (address, offset, len) in regions(memory) {
        // SAFETY: the range is a whole mapping of ours. DONTUNMAP leaves it mapped, so that nothing
        // else can get in between; its pages are missing until it is mapped anew, below, and no vCPU
        // or device runs.
        let moved = unsafe {
            libc::mremap(
                address as *mut libc::c_void,
                len,
                len,
                libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP,
                std::ptr::null_mut::<libc::c_void>(),
            )
        };
        if moved == libc::MAP_FAILED {
            return Err(last("move its memory aside"));
        }
        aside.0.push((moved as usize, len));
        map_private(address, len, file, offset)?;
        total += len as u64;
    }
    let whole = Run {
        offset: 0,
        len: total,
    };
    let layer = Layer {
        file: file.clone(),
        runs: vec![whole],
        packed: false,
        freezes: 1,
    };
    Ok((layer, aside))
}

/// A later freeze: the private pages become a layer of their own, and are mapped from it. Cost is
/// that of the pages written since the last freeze. `free`, ascending, is zero already: holes of the
/// layer, but for what has been written there.
///
/// # Errors
/// As [`first`].
pub fn again(
    memory: &GuestMemoryMmap,
    ahead: Ahead,
    free: &[Run],
) -> Result<(Layer, Aside), MemoryError> {
    let mut runs = Vec::new();
    for (address, offset, len) in regions(memory) {
        for (start, run_len) in private_runs(address, len)? {
            let run = Run {
                offset: offset + (start - address) as u64,
                len: run_len as u64,
            };
            ahead.complete(start, run)?;
            map_private(start, run_len, &ahead.file, run.offset)?;
            runs.push(run);
        }
    }
    ahead.forget(free, &runs)?;
    let (file, aside) = ahead.aside();
    let layer = Layer {
        file,
        runs: joined(runs.into_iter().chain(free.iter().copied()).collect()),
        packed: false,
        freezes: 1,
    };
    Ok((layer, aside))
}

/// Maps a layer that is the whole over memory that nobody has touched.
pub(super) fn cover(memory: &GuestMemoryMmap, layer: &Layer) -> Result<(), MemoryError> {
    let mut regions = regions(memory).into_iter();
    regions.try_for_each(|(address, offset, len)| map_private(address, len, &layer.file, offset))
}

/// Maps a layer's runs over memory that is a child's.
pub(super) fn overlay(memory: &GuestMemoryMmap, layer: &Layer) -> Result<(), MemoryError> {
    let regions = regions(memory);
    let mut packed_at = 0;
    for run in &layer.runs {
        let end = run.offset.checked_add(run.len);
        let aligned = run.offset % PAGE == 0 && run.len % PAGE == 0 && run.len > 0;
        let region = regions.iter().find(|(_, offset, len)| {
            run.offset >= *offset && end.is_some_and(|end| end <= offset + *len as u64)
        });
        let Some((address, offset, _)) = region.filter(|_| aligned) else {
            return Err(MemoryError::Layers("a run lies outside of memory"));
        };
        let at = address + (run.offset - offset) as usize;
        let file_offset = match layer.packed {
            true => packed_at,
            false => run.offset,
        };
        map_private(at, run.len as usize, &layer.file, file_offset)?;
        packed_at += run.len;
    }
    Ok(())
}

/// The runs of private pages in a private mapping, by address, small gaps filled.
///
/// # Errors
/// When neither PAGEMAP_SCAN nor the pagemap file can be used.
pub fn private_runs(address: usize, len: usize) -> Result<Vec<(usize, usize)>, MemoryError> {
    let pages = scan(address, len).or_else(|_| pagemap(address, len))?;
    let gap = (GAP_PAGES * PAGE) as usize;
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (start, end) in pages {
        match runs.last_mut() {
            Some(last) if start <= last.0 + last.1 + gap => last.1 = end - last.0,
            _ => runs.push((start, end - start)),
        }
    }
    Ok(runs)
}

/// The runs of memory that is mapped or swapped out: what was touched, with what the kernel mapped
/// around it. Offsets as in the memory's file.
///
/// # Errors
/// Before Linux 6.7, which has no PAGEMAP_SCAN.
pub fn touched(memory: &GuestMemoryMmap) -> Result<Vec<Run>, MemoryError> {
    let mut runs: Vec<Run> = Vec::new();
    for (address, offset, len) in regions(memory) {
        for (start, end) in scan_for(address, len, 0)? {
            runs.push(Run {
                offset: offset + (start - address) as u64,
                len: (end - start) as u64,
            });
        }
    }
    Ok(runs)
}

/// linux/fs.h: `struct page_region` and `struct pm_scan_arg`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
/// The page of zeroes that stands for what was only read of anonymous memory ([`super::free`]), and
/// that a pager maps where the generation has zeroes.
const PAGE_IS_PFNZERO: u64 = 1 << 5;
/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;

fn pagemap_file() -> Result<File, MemoryError> {
    File::open("/proc/self/pagemap").map_err(|source| MemoryError::Freeze {
        what: "read /proc/self/pagemap",
        source,
    })
}

/// Private pages, from Linux 6.7 on: those that are there and not the file's.
fn scan(address: usize, len: usize) -> Result<Vec<(usize, usize)>, MemoryError> {
    scan_for(address, len, PAGE_IS_FILE | PAGE_IS_PFNZERO)
}

/// Pages that are there and none of `without`.
fn scan_for(address: usize, len: usize, without: u64) -> Result<Vec<(usize, usize)>, MemoryError> {
    let file = pagemap_file()?;
    let mut found = Vec::new();
    let mut regions = vec![PageRegion::default(); 1024];
    let end = (address + len) as u64;
    let mut start = address as u64;
    while start < end {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            start,
            end,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            category_inverted: without,
            category_mask: without,
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            // Regions differ in nothing that is asked for, so that neighbours come as one.
            return_mask: 0,
            ..ScanArg::default()
        };
        // SAFETY: the argument and the vector that it names live until the call returns.
        let count = unsafe { libc::ioctl(file.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
        if count < 0 {
            return Err(last("find the pages that were written"));
        }
        found.extend(
            regions[..count as usize]
                .iter()
                .map(|region| (region.start as usize, region.end as usize)),
        );
        // With more regions than the kernel takes at a time within, it says where it was then, though it has gone
        // on to the end since: from there on they would come twice (do_pagemap_scan in fs/proc/task_mmu.c).
        let found_to = found.last().map_or(0, |&(_, end)| end as u64);
        let next = arg.walk_end.max(found_to);
        if next <= start {
            break;
        }
        start = next;
    }
    Ok(found)
}

/// The same, from any Linux: bit 61 of a page's entry says that it is the file's, 62 and 63 that it
/// is there (Documentation/admin-guide/mm/pagemap.rst).
fn pagemap(address: usize, len: usize) -> Result<Vec<(usize, usize)>, MemoryError> {
    let file = pagemap_file()?;
    let mut found: Vec<(usize, usize)> = Vec::new();
    let mut entries = vec![0_u8; 1 << 16];
    let page = PAGE as usize;
    let mut at = address;
    while at < address + len {
        let count = ((address + len - at) / page).min(entries.len() / 8);
        let bytes = &mut entries[..count * 8];
        std::os::unix::fs::FileExt::read_exact_at(&file, bytes, (at / page * 8) as u64).map_err(
            |source| MemoryError::Freeze {
                what: "read /proc/self/pagemap",
                source,
            },
        )?;
        for entry in bytes.chunks_exact(8) {
            let entry = u64::from_le_bytes(entry.try_into().expect("eight bytes"));
            if entry >> 62 != 0 && entry >> 61 & 1 == 0 {
                match found.last_mut() {
                    Some(last) if last.1 == at => last.1 += page,
                    _ => found.push((at, at + page)),
                }
            }
            at += page;
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::super::ahead::ahead;
    use super::*;

    const MIB: u64 = 1 << 20;

    fn byte(memory: &GuestMemoryMmap, at: u64) -> u8 {
        memory.read_obj(GuestAddress(at)).unwrap()
    }

    fn file_byte(layer: &Layer, at: u64) -> u8 {
        let mut byte = [0];
        std::os::unix::fs::FileExt::read_exact_at(&*layer.file, &mut byte, at).unwrap();
        byte[0]
    }

    #[test]
    fn pages_that_were_written_here_and_there_are_each_found_once() {
        let memory = super::super::create(64).unwrap();
        let (_, aside) = first(&memory, &super::super::file_of(&memory)).unwrap();
        drop(aside);
        let [(address, _, len)] = regions(&memory)[..] else {
            panic!("more than one region");
        };
        let mut written = 0;
        // The kernel's own buffer takes 512 regions, ours 1024.
        for count in [511, 512, 513, 700, 1024, 1025, 1600] {
            while written < count {
                memory
                    .write_obj(1_u8, GuestAddress(written * 8 * PAGE))
                    .unwrap();
                written += 1;
            }
            let found = scan(address, len).unwrap();
            assert_eq!(found.len() as u64, count);
            assert_eq!(found, pagemap(address, len).unwrap());
        }
    }

    #[test]
    fn what_is_written_after_a_freeze_is_not_in_the_generation() {
        let memory = super::super::create(64).unwrap();
        let file = super::super::file_of(&memory);
        memory.write_obj(7_u8, GuestAddress(MIB)).unwrap();
        let (layer, aside) = first(&memory, &file).unwrap();
        drop(aside);
        memory.write_obj(8_u8, GuestAddress(MIB)).unwrap();
        assert_eq!((byte(&memory, MIB), file_byte(&layer, MIB)), (8, 7));
        let (second, _) = again(&memory, ahead(&memory).unwrap(), &[]).unwrap();
        assert_eq!(
            second.runs,
            [Run {
                offset: MIB,
                len: PAGE
            }]
        );
        memory.write_obj(9_u8, GuestAddress(MIB)).unwrap();
        assert_eq!((byte(&memory, MIB), file_byte(&second, MIB)), (9, 8));
        let runs = |memory| again(memory, ahead(memory).unwrap(), &[]).unwrap().0.runs;
        assert_eq!(runs(&memory).len(), 1);
        assert!(runs(&memory).is_empty());
        assert_eq!(byte(&memory, MIB), 9);
    }

    #[test]
    fn both_ways_to_find_private_pages_agree() {
        let memory = super::super::create(64).unwrap();
        let file = super::super::file_of(&memory);
        let _ = first(&memory, &file).unwrap();
        for page in [0, 1, 2, 100, 5000, 64 * 256 - 1] {
            memory.write_obj(1_u8, GuestAddress(page * PAGE)).unwrap();
        }
        // Read only: it stays the file's.
        assert_eq!(byte(&memory, 9000 * PAGE), 0);
        let (address, _, len) = regions(&memory)[0];
        let pages = pagemap(address, len).unwrap();
        assert_eq!(pages.len(), 4);
        assert_eq!(scan(address, len).unwrap(), pages);
    }
}
