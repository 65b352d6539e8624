//! File names of a snapshot, and the few ways in which we touch files.

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

use rustix::fs::OFlags;

use crate::error::{Context as _, Error, Result};

pub(crate) const MANIFEST: &str = "manifest.json";
pub(crate) const STATE: &str = "state.bin";
pub(crate) const MEMORY_PLAIN: &str = "memory.bin";
pub(crate) const MEMORY_RUNS: &str = "memory.runs";
pub(crate) const MEMORY_CHUNKS: &str = "memory.chunks";
pub(crate) const MEMORY_INDEX: &str = "memory.index";
pub(crate) const LOCK: &str = "lock";
/// Beside a snapshot, no part of it.
pub(crate) const WORKING_SET: &str = "working-set";
/// Names that no layer may have.
pub(crate) const OURS: [&str; 8] = [
    MANIFEST,
    STATE,
    MEMORY_PLAIN,
    MEMORY_RUNS,
    MEMORY_CHUNKS,
    MEMORY_INDEX,
    LOCK,
    WORKING_SET,
];
/// What a folder or file is called while it is not complete.
pub(crate) const TEMPORARY: &str = ".tmp-";

/// A temporary name that nobody has.
pub(crate) fn temporary_name() -> Result<String> {
    let mut random = [0; 8];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
        .at("read randomness from", "the kernel".as_ref())?;
    Ok(format!("{TEMPORARY}{}", crate::digest::hex(&random)))
}

/// Opens a regular file to read. A link, pipe or device in its place is refused, never followed
/// or waited for.
pub(crate) fn open(path: &Path) -> Result<File> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits().cast_signed())
        .open(path)
        .at("open", path)?;
    if !file.metadata().at("stat", path)?.is_file() {
        return Err(Error::damaged(path, "it is not a regular file"));
    }
    Ok(file)
}

/// Opens a snapshot's file, which has to be there and to have this length.
pub(crate) fn open_sized(path: &Path, length: u64) -> Result<File> {
    let file = match open(path) {
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::damaged(path, "it is missing"));
        }
        other => other?,
    };
    let found = file.metadata().at("stat", path)?.len();
    if found != length {
        return Err(Error::damaged(
            path,
            format!("it has {found} bytes and not {length}"),
        ));
    }
    Ok(file)
}

/// Reads a file whole, refusing more than `limit` bytes.
pub(crate) fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?
        .take(limit + 1)
        .read_to_end(&mut bytes)
        .at("read", path)?;
    if bytes.len() as u64 > limit {
        return Err(Error::damaged(path, format!("longer than {limit} bytes")));
    }
    Ok(bytes)
}

/// Makes a new file of ours, to write and to read back.
pub(crate) fn create(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .at("create", path)
}

/// Nothing more will be written: nobody can change it by mistake, and it is on the disk.
pub(crate) fn seal(file: &File, path: &Path) -> Result<()> {
    file.set_permissions(fs::Permissions::from_mode(0o444))
        .at("set the mode of", path)?;
    file.sync_all().at("flush", path)
}

/// Writes a whole small file and seals it.
pub(crate) fn write_sealed(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = create(path)?;
    file.write_all(bytes).at("write", path)?;
    seal(&file, path)
}

/// Puts a folder's entries on the disk.
pub(crate) fn sync_folder(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|folder| folder.sync_all())
        .at("flush", path)
}

/// Removes a folder; none is fine.
pub(crate) fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.at("remove", path),
    }
}

/// Makes a folder that only its owner sees, and those above it.
pub(crate) fn create_folder(path: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .at("create", path)
}
