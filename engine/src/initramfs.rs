//! The initramfs that carries the runtime into a guest: an uncompressed newc archive
//! (Documentation/driver-api/early-userspace/buffer-format.rst in Linux), because decompressing
//! costs seconds on hosts without hardware virtualization.
//!
//! It holds `/init` (the runtime), the mount points `/dev`, `/proc`, `/new`, and `/dev/console`,
//! which the kernel opens for init before anything is mounted. The archive is kept in the cache
//! under the runtime's SHA-256, so a new runtime is a new file and an old one is never changed.
//!
//! How it fails: [`InitramfsError`] names the file. A crash leaves no half archive: it is written
//! to a temporary name and renamed.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// A runtime larger than this is a mistake: it would eat the guest's memory.
const RUNTIME_LIMIT_BYTES: u64 = 256 << 20;

/// Why there is no initramfs.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    /// The runtime's binary.
    #[error("cannot read the guest runtime {}: build it with `cargo build -p ratoon-runtime`", path.display())]
    Runtime {
        /// Where it should be.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is not a program of this machine's kind.
    #[error("the guest runtime {} is not an ELF program of at most {RUNTIME_LIMIT_BYTES} bytes", path.display())]
    NotAProgram {
        /// Which file.
        path: PathBuf,
    },
    /// The cache.
    #[error("cannot write the initramfs to {}", path.display())]
    Write {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The initramfs for this runtime, made if `cache_dir` does not have it yet. Safe when several
/// processes do it at once.
///
/// # Errors
/// See [`InitramfsError`].
pub fn ensure(runtime_binary: &Path, cache_dir: &Path) -> Result<PathBuf, InitramfsError> {
    let runtime = fs::read(runtime_binary).map_err(|source| InitramfsError::Runtime {
        path: runtime_binary.to_owned(),
        source,
    })?;
    if !runtime.starts_with(b"\x7fELF") || runtime.len() as u64 > RUNTIME_LIMIT_BYTES {
        return Err(InitramfsError::NotAProgram {
            path: runtime_binary.to_owned(),
        });
    }
    let digest = Sha256::digest(&runtime);
    let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    let path = cache_dir.join(format!("{digest}-v{LAYOUT}.cpio"));
    let archive = archive(&runtime);
    // Same name, same length: it is this archive, since only a rename puts it there.
    if fs::metadata(&path).is_ok_and(|found| found.len() == archive.len() as u64) {
        return Ok(path);
    }
    let failed = |source| InitramfsError::Write {
        path: path.clone(),
        source,
    };
    fs::create_dir_all(cache_dir).map_err(failed)?;
    let mut temporary = tempfile::Builder::new()
        .prefix(".initramfs-")
        .tempfile_in(cache_dir)
        .map_err(failed)?;
    temporary.write_all(&archive).map_err(failed)?;
    temporary.as_file().sync_all().map_err(failed)?;
    temporary
        .persist(&path)
        .map_err(|error| failed(error.error))?;
    Ok(path)
}

/// Goes up when [`archive`] changes, so that an archive of an older Ratoon is not taken for ours.
const LAYOUT: u32 = 1;

/// The archive's bytes.
pub fn archive(runtime: &[u8]) -> Vec<u8> {
    const DIRECTORY: u32 = 0o040_755;
    const PROGRAM: u32 = 0o100_755;
    const CHARACTER_DEVICE: u32 = 0o020_600;
    let mut cpio = Cpio::default();
    for directory in ["dev", "proc", "new"] {
        cpio.entry(directory, DIRECTORY, (0, 0), &[]);
    }
    cpio.entry("dev/console", CHARACTER_DEVICE, (5, 1), &[]);
    cpio.entry("init", PROGRAM, (0, 0), runtime);
    cpio.finish()
}

/// A newc archive in the making. All owned by root, no times: the same input gives the same bytes.
#[derive(Default)]
struct Cpio {
    bytes: Vec<u8>,
    entries: u32,
}

impl Cpio {
    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) {
        self.entries += 1;
        let is_directory = mode & 0o170_000 == 0o040_000;
        let fields = [
            self.entries, // inode
            mode,
            0, // uid
            0, // gid
            if is_directory { 2 } else { 1 },
            0, // mtime
            data.len() as u32,
            0, // the archive's own device
            0,
            device.0,
            device.1,
            name.len() as u32 + 1,
            0, // checksum: only the other format has one
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_reads_back_with_every_entry_as_the_kernel_wants_it() {
        let archive = archive(b"\x7fELFx");
        let mut rest = archive.as_slice();
        let mut found = Vec::new();
        loop {
            assert_eq!(&rest[..6], b"070701");
            let field = |index: usize| {
                let text = std::str::from_utf8(&rest[6 + index * 8..14 + index * 8]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            let (mode, size, major, minor, name_len) = (
                field(1),
                field(6) as usize,
                field(9),
                field(10),
                field(11) as usize,
            );
            let name = std::str::from_utf8(&rest[110..110 + name_len - 1])
                .unwrap()
                .to_owned();
            assert_eq!(rest[110 + name_len - 1], 0);
            let data = (110 + name_len).next_multiple_of(4);
            if name == "TRAILER!!!" {
                assert_eq!(rest.len(), data);
                break;
            }
            found.push((name, mode, major, minor, rest[data..data + size].to_vec()));
            rest = &rest[(data + size).next_multiple_of(4)..];
        }
        let expected = [
            ("dev", 0o040_755, 0, 0, &b""[..]),
            ("proc", 0o040_755, 0, 0, b""),
            ("new", 0o040_755, 0, 0, b""),
            ("dev/console", 0o020_600, 5, 1, b""),
            ("init", 0o100_755, 0, 0, b"\x7fELFx"),
        ];
        let expected = expected.map(|(n, m, a, i, d)| (n.to_owned(), m, a, i, d.to_vec()));
        assert_eq!(found, expected);
    }

    #[test]
    fn the_same_runtime_is_packed_once_and_another_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let (runtime, cache) = (dir.path().join("runtime"), dir.path().join("cache"));
        fs::write(&runtime, b"\x7fELF one").unwrap();
        let first = ensure(&runtime, &cache).unwrap();
        assert_eq!(fs::read(&first).unwrap(), archive(b"\x7fELF one"));
        let inode = |path: &Path| std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap());
        let before = inode(&first);
        assert_eq!(ensure(&runtime, &cache).unwrap(), first);
        assert_eq!(inode(&first), before);
        fs::write(&runtime, b"\x7fELF two").unwrap();
        assert_ne!(ensure(&runtime, &cache).unwrap(), first);
        assert_eq!(fs::read_dir(&cache).unwrap().count(), 2);
    }

    #[test]
    fn an_archive_of_the_wrong_length_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = dir.path().join("runtime");
        fs::write(&runtime, b"\x7fELF").unwrap();
        let path = ensure(&runtime, dir.path()).unwrap();
        fs::write(&path, b"short").unwrap();
        ensure(&runtime, dir.path()).unwrap();
        assert_eq!(fs::read(&path).unwrap(), archive(b"\x7fELF"));
    }

    #[test]
    fn what_is_no_program_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = dir.path().join("runtime");
        assert!(matches!(
            ensure(&runtime, dir.path()),
            Err(InitramfsError::Runtime { .. })
        ));
        fs::write(&runtime, b"#!/bin/sh").unwrap();
        assert!(matches!(
            ensure(&runtime, dir.path()),
            Err(InitramfsError::NotAProgram { path }) if path == runtime
        ));
    }
}
