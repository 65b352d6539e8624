//! A disk that is a writable qcow2 layer over a read-only raw base.
//!
//! The guest's writes go to the layer, what it has not written is read from the base. The base is
//! opened read-only and locked shared, the layer exclusively. The layer's header names the base for
//! other tools; Ratoon never follows that name, but takes the base that it is given.
//!
//! qcow2 comes from imago, built synchronous: no threads, no runtime. Its table caches are written
//! back on a flush and when the [`Layer`] is dropped: a VMM that is killed loses what the guest had
//! not flushed, as in a power cut, and no more.
//!
//! ```text
//!  request --known, in one piece--------> preadv, pwritev on the base's or the layer's file
//!          `-new cluster, zeroes, pieces-> imago: tables, copy on write
//! ```
//!
//! A request whose clusters are known to lie in one piece (`Places`) goes to the file itself:
//! imago's lookups and lists would cost a 4 KiB read from the layer a third more. A cluster that is
//! discarded, or zeroed with leave to unmap, is freed in the tables and punched out of the file.
//! imago frees and never punches; the order is safe, since whatever table survives a crash says
//! either "zeroes" or points at the hole.
//!
//! A new layer is not synced: there is nothing in it, and the fsync took 8 ms of a VM's start. A
//! host that crashes before the guest's first flush may leave an empty file, which is refused; the
//! flush makes file and name durable on ext4, XFS and Btrfs.
//!
//! What it costs (`examples/block_backends.rs`: CPU of a request in microseconds, medians of 15
//! rounds by turns; 2 CPUs, busy with other work; ext4, 1 GiB, all in the page cache):
//!
//! | request              |   raw | layer, from base | layer, own | raw, layer's file |
//! |----------------------|------:|-----------------:|-----------:|------------------:|
//! | read 4 KiB, random   |  0.96 |             0.98 |       1.25 |              1.17 |
//! | read 1 MiB, in order |   102 |              101 |        113 |               114 |
//! | write 4 KiB, random  |  20.5 |                - |        7.7 |                 - |
//! | write 1 MiB, in order|   136 |                - |        137 |                 - |
//!
//! The last column is the layer's file read without the layer: most of what its own clusters cost
//! more than raw is how the page cache holds that file, and 7 % is ours. Why random writes to the
//! raw file cost more was not looked into. A cluster's first write: 28 for 4 KiB (60 KiB are copied
//! from the base), 461 for 1 MiB. Making and opening a layer takes 130 (p50), opening one 44. Open
//! and empty it has less memory than the page that shows; all written, 0.7 MiB a GiB of disk.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use imago::file::File as ImagoFile;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, Mapping,
    ShallowMapping, StorageOpenOptions,
};
use rustix::fs::{CWD, FallocateFlags, RenameFlags, fdatasync, renameat_with};
use rustix::io::Errno;
use vm_memory::VolatileSlice;

use super::backend::Backend;
use super::file::{self, OpenError};
use super::places::{Piece, Place, Places};
use super::vectored::Vectored;

/// A qcow2 cluster in bytes: what the layer allocates at a time.
const CLUSTER_BYTES: u32 = 64 << 10;

/// A writable layer over a base.
pub struct Layer {
    disk: FormatAccess<ImagoFile>,
    /// The same open files that `disk` has.
    layer: File,
    base: File,
    places: Places,
    vectored: Vectored,
    can_punch: bool,
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
        let twin = |file: &File| file.try_clone().map_err(io_error);
        let disk =
            assemble(twin(&layer)?, twin(&base)?).map_err(|source| OpenError::LayerFormat {
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
            layer,
            base,
            places: Places::new(len_bytes, CLUSTER_BYTES),
            vectored: Vectored::default(),
            can_punch: true,
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
    Ok(file)
}

impl Layer {
    /// Asks where the clusters of a range are, for the next request.
    ///
    /// A layer that another tool made may have clusters of another size: what does not look like
    /// one of ours stays unknown.
    fn learn(&mut self, offset: u64, len_bytes: u64) -> io::Result<()> {
        let cluster_bytes = u64::from(CLUSTER_BYTES);
        for cluster in self.places.clusters(offset, len_bytes) {
            if self.places.get(cluster) != Place::Unknown {
                continue;
            }
            let start = cluster as u64 * cluster_bytes;
            let whole = cluster_bytes.min(self.len_bytes - start);
            let (mapping, length) = self.disk.get_shallow_mapping(start, whole)?;
            let place = match mapping {
                _ if length < whole => Place::Unknown,
                ShallowMapping::Indirect { offset, .. } if offset == start => Place::Base,
                ShallowMapping::Raw {
                    offset,
                    writable: true,
                    ..
                } if offset.is_multiple_of(cluster_bytes) => {
                    u32::try_from(offset / cluster_bytes).map_or(Place::Unknown, Place::Layer)
                }
                _ => Place::Unknown,
            };
            self.places.set(cluster, place);
        }
        Ok(())
    }

    /// Frees the layer's own clusters in a range of whole clusters, and punches them out of the
    /// file. They then read as zeroes; the others too if `all`, else they are as before.
    ///
    /// Punching what was just freed hits nothing new: freeing a cluster allocates none.
    fn free(&mut self, mut offset: u64, end: u64, all: bool) -> io::Result<()> {
        self.places.forget(offset, end - offset);
        while offset < end {
            let (mapping, length) = self.disk.get_mapping(offset, end - offset)?;
            let own = match mapping {
                Mapping::Raw {
                    offset,
                    writable: true,
                    ..
                } => Some(offset),
                Mapping::Eof { .. } => break,
                _ => None,
            };
            if all || own.is_some() {
                self.disk.discard_to_zero(offset, length)?;
            }
            if let (Some(host), true) = (own, self.can_punch) {
                let hole = FallocateFlags::PUNCH_HOLE;
                self.can_punch = file::allocate(&self.layer, hole, host, length)?;
            }
            offset += length;
        }
        Ok(())
    }

    /// The whole clusters in a range; the disk's last counts as whole.
    fn whole_clusters(&self, offset: u64, len_bytes: u64) -> Option<(u64, u64)> {
        let cluster = u64::from(CLUSTER_BYTES);
        let start = offset.next_multiple_of(cluster);
        let mut end = offset + len_bytes;
        if end != self.len_bytes {
            end -= end % cluster;
        }
        (start < end).then_some((start, end))
    }
}

fn sum(buffers: &[VolatileSlice<'_>]) -> u64 {
    buffers.iter().map(|buffer| buffer.len() as u64).sum()
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
        let len_bytes = sum(buffers);
        if len_bytes == 0 {
            // imago takes buffers without a byte for a mistake of ours, and panics.
            return Ok(());
        }
        let (file, at) = match self.places.piece(offset, len_bytes) {
            Some(Piece::Base) => (&self.base, offset),
            Some(Piece::Layer(host)) => (&self.layer, host),
            None => {
                let (vector, _mapped) = IoVectorMut::from_volatile_slice(buffers);
                self.disk.readv(vector, offset)?;
                return self.learn(offset, len_bytes);
            }
        };
        self.vectored.read_exact_at(file, buffers, at)
    }

    fn write_at(&mut self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        let len_bytes = sum(buffers);
        if len_bytes == 0 {
            return Ok(());
        }
        if let Some(Piece::Layer(host)) = self.places.piece(offset, len_bytes) {
            return self.vectored.write_all_at(&self.layer, buffers, host);
        }
        self.places.forget(offset, len_bytes);
        let (vector, _mapped) = IoVector::from_volatile_slice(buffers);
        self.disk.writev(vector, offset)?;
        self.learn(offset, len_bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.disk.flush()?;
        Ok(fdatasync(&self.layer)?)
    }

    fn write_back(&mut self) -> io::Result<()> {
        self.disk.flush()
    }

    fn discard(&mut self, offset: u64, len_bytes: u64) -> io::Result<()> {
        // The pieces at the ends are kept: zeroing them would cost writes.
        match self.whole_clusters(offset, len_bytes) {
            Some((start, end)) => self.free(start, end, false),
            None => Ok(()),
        }
    }

    fn write_zeroes(&mut self, offset: u64, len_bytes: u64, may_unmap: bool) -> io::Result<()> {
        self.places.forget(offset, len_bytes);
        let whole = self.whole_clusters(offset, len_bytes);
        let Some((start, end)) = whole.filter(|_| may_unmap) else {
            return self.disk.write_zeroes(offset, len_bytes);
        };
        self.free(start, end, true)?;
        // Apart from the rest: the ends may take clusters that were just freed and punched.
        self.disk.write_zeroes(offset, start - offset)?;
        self.disk.write_zeroes(end, offset + len_bytes - end)
    }
}
