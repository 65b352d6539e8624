//! Brings kernel, initramfs, command line and boot parameters into guest memory.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use linux_loader::cmdline::Cmdline;
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::transfer::ToGuest;
use super::{COMMAND_LINE, COMMAND_LINE_MAX, HIGH_RAM, mptable, params};

/// Why a guest cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be opened or read.
    #[error("cannot read the {what} {}", path.display())]
    File {
        /// "kernel" or "initramfs".
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: std::io::Error,
    },
    /// A bzImage or a compressed file instead of a vmlinux.
    #[error(
        "kernel {} is {what}: Ratoon boots an uncompressed ELF vmlinux (docs/kernel.md)",
        path.display()
    )]
    Compressed {
        /// Which file.
        path: PathBuf,
        /// What it is instead.
        what: &'static str,
    },
    /// Not a kernel at all.
    #[error(
        "kernel {} is not an x86-64 ELF vmlinux; guest-kernel/build makes one",
        path.display()
    )]
    NotElf {
        /// Which file.
        path: PathBuf,
    },
    /// It is ELF, but broken or too large for the guest's memory.
    #[error(
        "kernel {} cannot be loaded into {memory_mib} MiB of guest memory: it is damaged, or the memory is too small",
        path.display()
    )]
    Load {
        /// Which file.
        path: PathBuf,
        /// The guest's memory.
        memory_mib: u64,
        /// linux-loader's word.
        #[source]
        source: linux_loader::loader::Error,
    },
    /// The initramfs does not fit beside the kernel.
    #[error(
        "initramfs {} ({bytes} bytes) does not fit into {memory_mib} MiB of guest memory",
        path.display()
    )]
    InitramfsSize {
        /// Which file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The guest's memory.
        memory_mib: u64,
    },
    /// Too many or wrong kernel arguments.
    #[error("the kernel's command line cannot be used (limit {COMMAND_LINE_MAX} bytes): {why}")]
    CommandLine {
        /// What is wrong.
        why: String,
    },
    /// The host's random numbers.
    #[error("the host gives no random numbers for the guest's seed")]
    Random(#[source] std::io::Error),
    /// Guest memory cannot be written: our own layout does not fit it.
    #[error("guest memory")]
    Memory(#[source] vm_memory::GuestMemoryError),
}

/// What the vCPUs need to know about a loaded guest.
#[derive(Debug, Clone, Copy)]
pub struct Loaded {
    /// The kernel's 64-bit entry point, a guest-physical address.
    pub entry: GuestAddress,
}

/// Loads everything.
///
/// # Errors
/// A [`BootError`] that names the file.
pub fn load(
    memory: &GuestMemoryMmap,
    kernel: &Path,
    initramfs: Option<&Path>,
    command_line: &str,
    vcpus: u32,
) -> Result<Loaded, BootError> {
    let (entry, kernel_end) = load_kernel(memory, kernel)?;
    let initramfs = match initramfs {
        Some(path) => Some(load_initramfs(memory, path, kernel_end)?),
        None => None,
    };
    let command_line_len = write_command_line(memory, command_line)?;
    params::write(memory, initramfs, command_line_len)?;
    mptable::write(memory, vcpus).map_err(BootError::Memory)?;
    Ok(Loaded { entry })
}

fn memory_mib(memory: &GuestMemoryMmap) -> u64 {
    memory.iter().map(GuestMemoryRegion::len).sum::<u64>() >> 20
}

fn open(what: &'static str, path: &Path) -> Result<File, BootError> {
    let error = |source| BootError::File {
        what,
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(error)?;
    if file.metadata().map_err(error)?.is_dir() {
        return Err(error(std::io::ErrorKind::IsADirectory.into()));
    }
    Ok(file)
}

/// What a file that is no ELF is, by its first bytes.
fn check_magic(path: &Path, file: &File) -> Result<(), BootError> {
    let mut head = [0; 0x206];
    let mut len = 0;
    while let Ok(n @ 1..) = file.read_at(&mut head[len..], len as u64) {
        len += n;
    }
    let head = &head[..len];
    if head.starts_with(b"\x7fELF") {
        return Ok(());
    }
    let compressed = |what| {
        Err(BootError::Compressed {
            path: path.to_owned(),
            what,
        })
    };
    // The setup header's magic (boot.rst: offset 0x202).
    if head.get(0x202..0x206) == Some(b"HdrS") {
        return compressed("a compressed bzImage");
    }
    if head.starts_with(&[0x1f, 0x8b]) {
        return compressed("gzip-compressed");
    }
    if head.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        return compressed("zstd-compressed");
    }
    if head.starts_with(b"\xfd7zXZ") {
        return compressed("xz-compressed");
    }
    Err(BootError::NotElf {
        path: path.to_owned(),
    })
}

fn load_kernel(
    memory: &GuestMemoryMmap,
    path: &Path,
) -> Result<(GuestAddress, GuestAddress), BootError> {
    let file = open("kernel", path)?;
    check_magic(path, &file)?;
    let mut source = ToGuest::new(&file, memory);
    let loaded =
        Elf::load(memory, None, &mut source, Some(GuestAddress(HIGH_RAM))).map_err(|source| {
            BootError::Load {
                path: path.to_owned(),
                memory_mib: memory_mib(memory),
                source,
            }
        })?;
    Ok((loaded.kernel_load, GuestAddress(loaded.kernel_end)))
}

/// Puts the initramfs at the end of the first region; returns its address and length in bytes.
fn load_initramfs(
    memory: &GuestMemoryMmap,
    path: &Path,
    kernel_end: GuestAddress,
) -> Result<(u64, u64), BootError> {
    const PAGE: u64 = 4096;
    let file_error = |source| BootError::File {
        what: "initramfs",
        path: path.to_owned(),
        source,
    };
    let file = open("initramfs", path)?;
    let len = file.metadata().map_err(file_error)?.len();
    let low_end = memory
        .find_region(GuestAddress(0))
        .map_or(0, GuestMemoryRegion::len);
    let start = low_end.checked_sub(len).map(|start| start & !(PAGE - 1));
    let start = match start {
        Some(start) if start >= kernel_end.0 => start,
        _ => {
            return Err(BootError::InitramfsSize {
                path: path.to_owned(),
                bytes: len,
                memory_mib: memory_mib(memory),
            });
        }
    };
    memory
        .read_exact_volatile_from(
            GuestAddress(start),
            &mut ToGuest::new(&file, memory),
            usize::try_from(len).unwrap_or(usize::MAX),
        )
        .map_err(|error| file_error(std::io::Error::other(error)))?;
    Ok((start, len))
}

fn write_command_line(memory: &GuestMemoryMmap, words: &str) -> Result<u32, BootError> {
    let wrong = |why: String| BootError::CommandLine { why };
    let mut line = Cmdline::new(COMMAND_LINE_MAX).map_err(|error| wrong(error.to_string()))?;
    line.insert_str(words)
        .map_err(|error| wrong(error.to_string()))?;
    let line = line
        .as_cstring()
        .map_err(|error| wrong(error.to_string()))?;
    let bytes = line.as_bytes_with_nul();
    memory
        .write_slice(bytes, GuestAddress(COMMAND_LINE))
        .map_err(BootError::Memory)?;
    Ok(bytes.len() as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> GuestMemoryMmap {
        crate::memory::create(64).unwrap()
    }

    fn refuse(content: &[u8]) -> BootError {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("k");
        std::fs::write(&path, content).unwrap();
        load(&memory(), &path, None, "", 1).unwrap_err()
    }

    #[test]
    fn a_compressed_kernel_is_named_as_such() {
        let mut bzimage = vec![0; 0x1000];
        bzimage[0x202..0x206].copy_from_slice(b"HdrS");
        let error = refuse(&bzimage);
        assert!(matches!(error, BootError::Compressed { what, .. } if what.contains("bzImage")));
        assert!(matches!(
            refuse(&[0x1f, 0x8b, 8]),
            BootError::Compressed { .. }
        ));
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        assert!(matches!(refuse(b""), BootError::NotElf { .. }));
        assert!(matches!(refuse(b"#!/bin/sh\n"), BootError::NotElf { .. }));
        assert!(matches!(refuse(b"\x7fELF garbage"), BootError::Load { .. }));
        let error = load(&memory(), Path::new("/no/such"), None, "", 1).unwrap_err();
        assert!(error.to_string().contains("/no/such"));
        let error = load(&memory(), Path::new("/"), None, "", 1).unwrap_err();
        assert!(matches!(error, BootError::File { .. }));
    }

    #[test]
    fn a_segment_outside_guest_memory_is_refused() {
        // A valid ELF header with one PT_LOAD far above 64 MiB.
        let mut elf = vec![0; 64 + 56 + 16];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[24..32].copy_from_slice(&0x100_0000_u64.to_le_bytes());
        elf[32..40].copy_from_slice(&64_u64.to_le_bytes());
        elf[54..56].copy_from_slice(&56_u16.to_le_bytes());
        elf[56..58].copy_from_slice(&1_u16.to_le_bytes());
        let header = &mut elf[64..];
        header[0] = 1;
        header[8..16].copy_from_slice(&120_u64.to_le_bytes());
        header[24..32].copy_from_slice(&0xffff_ffff_0000_u64.to_le_bytes());
        header[32..40].copy_from_slice(&16_u64.to_le_bytes());
        assert!(matches!(refuse(&elf), BootError::Load { .. }));
    }

    #[test]
    fn an_initramfs_larger_than_memory_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("i");
        File::create(&path).unwrap().set_len(65 << 20).unwrap();
        let error = load_initramfs(&memory(), &path, GuestAddress(20 << 20)).unwrap_err();
        assert!(matches!(error, BootError::InitramfsSize { .. }));
        File::create(&path).unwrap().set_len(50 << 20).unwrap();
        let error = load_initramfs(&memory(), &path, GuestAddress(20 << 20)).unwrap_err();
        assert!(matches!(error, BootError::InitramfsSize { .. }));
    }

    #[test]
    fn a_command_line_that_the_kernel_would_cut_is_refused() {
        let long = "x".repeat(COMMAND_LINE_MAX);
        assert!(matches!(
            write_command_line(&memory(), &long),
            Err(BootError::CommandLine { .. })
        ));
        assert_eq!(write_command_line(&memory(), "quiet").unwrap(), 6);
    }
}
