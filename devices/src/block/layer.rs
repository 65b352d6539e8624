//! A writable layer over a base that nobody writes: a qcow2 file whose backing file is the raw base.
//!
//! Reads of what the layer does not have fall through to the base; writes go to the layer only.
//! The format is imago's; its synchronous build has no threads and no runtime of its own.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::storage::StorageOpenOptions;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder};
use vm_memory::VolatileSlice;

use super::backend::Backend;
use super::file::{self, OpenError};

type Storage = imago::file::File;

/// The unit in which the layer takes space, in bytes: small enough that a 4 KiB write copies little
/// of the base, large enough that its tables stay small.
const CLUSTER_BYTES: usize = 64 << 10;

/// A base and the layer over it, open and locked.
pub struct Layer {
    image: FormatAccess<Storage>,
    name: String,
}

impl Layer {
    /// Opens the layer at `layer` over the raw base at `base`; makes it when there is none. The
    /// base is locked shared, the layer exclusively.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open_or_create(layer: &Path, base: &Path) -> Result<Self, OpenError> {
        let (base_file, base_bytes) = file::open(base, false)?;
        file::check_size(base_bytes, base)?;
        if !layer.exists() {
            create(layer, base, base_bytes)?;
        }
        let (layer_file, _) = file::open(layer, true)?;
        let io_error = |source| OpenError::Io {
            path: layer.to_owned(),
            source,
        };
        if file::same_file(&base_file, &layer_file).map_err(io_error)? {
            return Err(OpenError::LayerIsBase {
                path: layer.to_owned(),
            });
        }
        let image =
            open(layer_file, layer, base_file, base).map_err(|source| OpenError::LayerFormat {
                path: layer.to_owned(),
                source,
            })?;
        if image.size() != base_bytes {
            return Err(OpenError::LayerMismatch {
                path: layer.to_owned(),
                base: base.to_owned(),
                layer_bytes: image.size(),
                base_bytes,
            });
        }
        Ok(Self {
            image,
            name: layer.display().to_string(),
        })
    }
}

fn storage(file: File, path: &Path, write: bool) -> io::Result<Storage> {
    Storage::from_open_file(file, StorageOpenOptions::new().write(write).filename(path))
}

fn open(
    layer_file: File,
    layer: &Path,
    base_file: File,
    base: &Path,
) -> io::Result<FormatAccess<Storage>> {
    let base = Raw::open_image(storage(base_file, base, false)?, false)?;
    let image =
        Qcow2::<Storage, Arc<FormatAccess<Storage>>>::builder(storage(layer_file, layer, true)?)
            .backing(Some(Arc::new(FormatAccess::new(base))))
            .write(true)
            .open(DenyImplicitOpenGate::default())?;
    Ok(FormatAccess::new(image))
}

/// Makes an empty layer under a temporary name, then renames it: a crash leaves a whole layer or
/// none.
fn create(layer: &Path, base: &Path, base_bytes: u64) -> Result<(), OpenError> {
    let mut temporary = layer.as_os_str().to_owned();
    temporary.push(format!(".{}.new", std::process::id()));
    let temporary = PathBuf::from(temporary);
    let made =
        format(&temporary, base, base_bytes).and_then(|()| std::fs::rename(&temporary, layer));
    made.map_err(|source| {
        // What cannot be removed either is named in the error below: its directory.
        let _ = std::fs::remove_file(&temporary);
        OpenError::LayerCreate {
            path: layer.to_owned(),
            source,
        }
    })
}

fn format(path: &Path, base: &Path, base_bytes: u64) -> io::Result<()> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)?;
    let storage = storage(file, path, true)?;
    Qcow2::<Storage>::create_builder(storage)
        .size(base_bytes)
        .cluster_size(CLUSTER_BYTES)
        .backing(base.display().to_string(), "raw".into())
        .create()
}

impl Backend for Layer {
    fn name(&self) -> &str {
        &self.name
    }

    fn len_bytes(&self) -> u64 {
        self.image.size()
    }

    fn discard_granularity_bytes(&self) -> u32 {
        CLUSTER_BYTES as u32
    }

    fn read_at(&mut self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        let (buffers, _guard) = IoVectorMut::from_volatile_slice(buffers);
        self.image.readv(buffers, offset)
    }

    fn write_at(&mut self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        let (buffers, _guard) = IoVector::from_volatile_slice(buffers);
        self.image.writev(buffers, offset)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.image.flush()?;
        self.image.sync()
    }

    fn discard(&mut self, offset: u64, len_bytes: u64) -> io::Result<()> {
        self.image.discard_to_zero(offset, len_bytes)
    }

    fn write_zeroes(&mut self, offset: u64, len_bytes: u64, may_unmap: bool) -> io::Result<()> {
        if may_unmap {
            self.image.discard_to_zero(offset, len_bytes)
        } else {
            self.image.write_zeroes(offset, len_bytes)
        }
    }
}
