//! Making a new, empty layer: a qcow2 file over what is below it.
//!
//! It appears under its name whole or not at all. It is not synced: there is nothing in it, and the
//! fsync took 8 ms of a VM's start. A host that crashes before the guest's first flush may leave an
//! empty file, which is refused; the flush makes file and name durable on ext4, XFS and Btrfs.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use imago::FormatCreateBuilder;
use imago::file::File as ImagoFile;
use imago::qcow2::Qcow2;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::file::{self, OpenError};
use super::layered::{CLUSTER_BYTES, storage};

/// What a new layer lies over: its header names it for other tools.
#[derive(Debug, Clone, Copy)]
pub(super) struct Below<'p> {
    pub(super) path: &'p Path,
    /// `raw` or `qcow2`.
    pub(super) format: &'static str,
    pub(super) len_bytes: u64,
}

/// Makes the layer beside its place and moves it there, unless another was faster: then that one.
pub(super) fn create(layer_path: &Path, below: Below<'_>) -> Result<File, OpenError> {
    let failed = |source| OpenError::LayerCreate {
        path: layer_path.to_owned(),
        source,
    };
    let temporary = temporary_path(layer_path).map_err(failed)?;
    let made = write_new(&temporary, below).and_then(|file| {
        match renameat_with(CWD, &temporary, CWD, layer_path, RenameFlags::NOREPLACE) {
            Ok(()) => Ok(Some(file)),
            Err(Errno::EXIST) => {
                std::fs::remove_file(&temporary)?;
                Ok(None)
            }
            Err(errno) => Err(errno.into()),
        }
    });
    match made {
        Ok(Some(file)) => Ok(file),
        Ok(None) => Ok(file::open_unlocked(layer_path, true)?.0),
        Err(source) => {
            // It may not exist; the first error is the one to tell.
            let _ = std::fs::remove_file(&temporary);
            Err(failed(source))
        }
    }
}

/// A name of our own in the layer's directory.
fn temporary_path(layer_path: &Path) -> io::Result<PathBuf> {
    let name = layer_path
        .file_name()
        .ok_or(io::ErrorKind::InvalidFilename)?;
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{}.new", std::process::id()));
    Ok(layer_path.with_file_name(temporary))
}

fn write_new(path: &Path, below: Below<'_>) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        // What lies there under our process id was left by a process that died.
        .create(true)
        .truncate(true)
        .open(path)?;
    format(&file, below)?;
    Ok(file)
}

/// Makes a layer of an empty file.
pub(super) fn format(file: &File, below: Below<'_>) -> io::Result<()> {
    // A jail may have no way from an inherited descriptor to its name.
    let name = std::fs::canonicalize(below.path).unwrap_or_else(|_| below.path.to_owned());
    Qcow2::<ImagoFile>::create_builder(storage(file.try_clone()?, true)?)
        .size(below.len_bytes)
        .cluster_size(CLUSTER_BYTES as usize)
        .backing(name.display().to_string(), below.format.into())
        .create()
}
