//! A disk that is a writable qcow2 layer over a read-only raw base.
//!
//! The guest's writes go to the layer, what it has not written is read from the base. The base is
//! opened read-only and locked shared, the layer exclusively. The layer's header names the base for
//! other tools; Ratoon never follows that name, but takes the base that it is given.
//!
//! qcow2 comes from imago, built synchronous: no threads, no runtime. Its table caches are written
//! back on a flush and when the [`Layer`] is dropped: a VMM that is killed loses what the guest had
//! not flushed, as in a power cut, and no more. What is discarded in whole clusters is used again by
//! the layer; its file does not shrink, for imago does not punch holes where clusters are freed.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use imago::file::File as ImagoFile;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder,
    StorageOpenOptions,
};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use vm_memory::VolatileSlice;

use super::backend::Backend;
use super::file::{self, OpenError};

/// A qcow2 cluster in bytes: what the layer allocates at a time.
const CLUSTER_BYTES: u32 = 64 << 10;

/// A writable layer over a base.
pub struct Layer {
    disk: FormatAccess<ImagoFile>,
    name: String,
    len_bytes: u64,
}

impl Layer {
    /// Opens the layer at `layer_path` over the raw image at `base_path`. A layer that does not
    /// exist is made, whole or not at all, with the base's size.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open_or_create(layer_path: &Path, base_path: &Path) -> Result<Self, OpenError> {
        let (base, base_bytes) = file::open(base_path, false)?;
        file::check_size(base_bytes, base_path)?;
        let layer = match file::open_unlocked(layer_path, true) {
            Err(OpenError::Missing { .. }) => create(layer_path, base_path, base_bytes)?,
            other => other?.0,
        };
        let io_error = |source| OpenError::Io {
            path: layer_path.to_owned(),
            source,
        };
        if file::same_file(&layer, &base).map_err(io_error)? {
            return Err(OpenError::LayerIsBase {
                path: layer_path.to_owned(),
            });
        }
        file::lock(&layer, layer_path, true)?;
        let disk = assemble(layer, base).map_err(|source| OpenError::LayerFormat {
            path: layer_path.to_owned(),
            source,
        })?;
        let len_bytes = disk.size();
        if len_bytes != base_bytes {
            return Err(OpenError::LayerMismatch {
                path: layer_path.to_owned(),
                base: base_path.to_owned(),
                layer_bytes: len_bytes,
                base_bytes,
            });
        }
        Ok(Self {
            disk,
            name: layer_path.display().to_string(),
            len_bytes,
        })
    }
}

fn storage(file: File, writable: bool) -> io::Result<ImagoFile> {
    ImagoFile::from_open_file(file, StorageOpenOptions::new().write(writable))
}

fn assemble(layer: File, base: File) -> io::Result<FormatAccess<ImagoFile>> {
    let base = Raw::builder(storage(base, false)?).open(DenyImplicitOpenGate::default())?;
    let layer = Qcow2::<ImagoFile>::builder(storage(layer, true)?)
        .backing(Some(FormatAccess::new(base)))
        .write(true)
        .open(DenyImplicitOpenGate::default())?;
    Ok(FormatAccess::new(layer))
}

/// Makes the layer beside its place and moves it there, unless another was faster: then that one.
fn create(layer_path: &Path, base_path: &Path, base_bytes: u64) -> Result<File, OpenError> {
    let failed = |source| OpenError::LayerCreate {
        path: layer_path.to_owned(),
        source,
    };
    let temporary = temporary_path(layer_path).map_err(failed)?;
    let made = write_new(&temporary, base_path, base_bytes).and_then(|file| {
        match renameat_with(CWD, &temporary, CWD, layer_path, RenameFlags::NOREPLACE) {
            Ok(()) => {
                sync_directory(layer_path)?;
                Ok(Some(file))
            }
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

fn write_new(path: &Path, base_path: &Path, base_bytes: u64) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        // What lies there under our process id was left by a process that died.
        .create(true)
        .truncate(true)
        .open(path)?;
    let base = std::fs::canonicalize(base_path)?;
    Qcow2::<ImagoFile>::create_builder(storage(file.try_clone()?, true)?)
        .size(base_bytes)
        .cluster_size(CLUSTER_BYTES as usize)
        .backing(base.display().to_string(), "raw".into())
        .create()?;
    file.sync_all()?;
    Ok(file)
}

fn sync_directory(path: &Path) -> io::Result<()> {
    let directory = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    Ok(rustix::fs::fsync(File::open(directory)?.as_fd())?)
}

impl Backend for Layer {
    fn name(&self) -> &str {
        &self.name
    }

    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn discard_granularity_bytes(&self) -> u32 {
        CLUSTER_BYTES
    }

    fn read_at(&mut self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        let (vector, _mapped) = IoVectorMut::from_volatile_slice(buffers);
        self.disk.readv(vector, offset)
    }

    fn write_at(&mut self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        let (vector, _mapped) = IoVector::from_volatile_slice(buffers);
        self.disk.writev(vector, offset)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.disk.flush()?;
        self.disk.sync()
    }

    fn discard(&mut self, offset: u64, len_bytes: u64) -> io::Result<()> {
        // Only whole clusters: their zeroing costs no write. The rest is kept.
        let cluster = u64::from(CLUSTER_BYTES);
        let start = offset.next_multiple_of(cluster);
        let mut end = offset + len_bytes;
        if end != self.len_bytes {
            end -= end % cluster;
        }
        if start < end {
            self.disk.discard_to_zero(start, end - start)?;
        }
        Ok(())
    }

    fn write_zeroes(&mut self, offset: u64, len_bytes: u64, may_unmap: bool) -> io::Result<()> {
        if may_unmap {
            self.disk.discard_to_zero(offset, len_bytes)
        } else {
            self.disk.write_zeroes(offset, len_bytes)
        }
    }
}
