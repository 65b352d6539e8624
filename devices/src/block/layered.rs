//! A disk of layers: a writable qcow2 file over frozen ones over a read-only raw base.
//!
//! The guest's writes go to the top; what it has not written there is read from the layer below
//! that has it, at last from the base. All but the top are opened read-only and locked shared, the
//! top exclusively. A layer's header names what is below it for other tools; Ratoon never follows
//! that name, but takes what it is given.
//!
//! Freezing moves nothing: an empty layer is made ahead (`prepare_layer`), and when the tables are
//! written back it becomes the top (`push_layer`), with the old top, whose lock becomes a shared
//! one, below it. An untouched top stays the top.
//!
//! qcow2 comes from imago, built synchronous: no threads, no runtime. Its table caches are written
//! back on a flush and when the [`Layer`] is dropped: a VMM that is killed loses what the guest had
//! not flushed, as in a power cut, and no more.
//!
//! ```text
//!  read  --pieces of known clusters--> preadv on their files, whichever layer's
//!  write --known, in one piece, top--> pwritev on its file
//!        `-all else--> imago: tables, copy on write, zeroes
//! ```
//!
//! Where a cluster is, is asked once (`Places`): then the depth of the layers costs a read nothing,
//! and imago's lookups and lists would cost a 4 KiB read a third more. A cluster that is
//! discarded, or zeroed with leave to unmap, is freed in the tables and punched out of the file.
//! imago frees and never punches; the order is safe, since whatever table survives a crash says
//! either "zeroes" or points at the hole.
//!
//! What it costs beside a raw file: `examples/block_backends.rs` measures it, docs/architecture.md
//! has the figures.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use imago::file::File as ImagoFile;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, Mapping, ShallowMapping,
    StorageOpenOptions,
};
use rustix::fs::{FallocateFlags, fdatasync};
use vm_memory::VolatileSlice;

use super::backend::Backend;
use super::file::{self, OpenError};
use super::make::{self, Below};
use super::places::{Place, Places};
use super::vectored::Vectored;

/// A qcow2 cluster in bytes: what a layer allocates at a time.
pub(super) const CLUSTER_BYTES: u32 = 64 << 10;
/// The most frozen layers between base and top.
pub const MAX_FROZEN: usize = 60;

pub(super) type Access = FormatAccess<ImagoFile>;
/// A layer, which shares what is below it with those that look at it by itself.
type Format = Qcow2<ImagoFile, Arc<Access>>;

/// A disk of layers, the topmost writable.
pub struct Layer {
    /// The top, over all the others. Nobody shares it.
    disk: Arc<Access>,
    /// The same open files that `disk` has: the base, the frozen layers, the top.
    files: Vec<File>,
    /// What was written to layers that are frozen now is not on stable storage yet.
    unsynced: Vec<File>,
    /// The next top, made ahead.
    next: Option<Next>,
    /// Something was asked to be written since the top was made or opened.
    is_touched: bool,
    places: Places,
    vectored: Vectored,
    can_punch: bool,
    name: String,
    path: PathBuf,
    len_bytes: u64,
}

/// An empty top that waits for [`Backend::push_layer`].
struct Next {
    format: Format,
    file: File,
    path: PathBuf,
}

impl Layer {
    /// Opens the layer at `layer_path` over `frozen` ones, the lowest first, over the raw image at
    /// `base_path`. Only the topmost is ever written. If it does not exist it is made, whole or not
    /// at all, with the base's size.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(
        layer_path: &Path,
        frozen: &[PathBuf],
        base_path: &Path,
    ) -> Result<Self, OpenError> {
        check_depth(frozen.len(), layer_path)?;
        let (mut files, disk, below) = open_frozen(frozen, base_path)?;
        let base_bytes = below.len_bytes;
        let top = open_top(layer_path, below)?;
        for (file, path) in files
            .iter()
            .zip(std::iter::once(base_path).chain(frozen.iter().map(PathBuf::as_path)))
        {
            if file::same_file(&top, file).map_err(io_error(layer_path))? {
                return Err(match path == base_path {
                    true => OpenError::LayerIsBase {
                        path: layer_path.to_owned(),
                    },
                    false => OpenError::LayerIsFrozen {
                        path: layer_path.to_owned(),
                    },
                });
            }
        }
        file::lock(&top, layer_path, true)?;
        let disk = open_over(&top, layer_path, disk, below, true)?;
        files.push(top);
        Ok(Self {
            disk,
            files,
            unsynced: Vec::new(),
            next: None,
            is_touched: false,
            places: Places::new(base_bytes, CLUSTER_BYTES),
            vectored: Vectored::default(),
            can_punch: true,
            name: layer_path.display().to_string(),
            path: layer_path.to_owned(),
            len_bytes: base_bytes,
        })
    }

    fn top(&self) -> usize {
        self.files.len() - 1
    }
}

/// The base and the frozen layers over it: their files, all of them as one disk, and the topmost.
pub(super) fn open_frozen<'p>(
    frozen: &'p [PathBuf],
    base_path: &'p Path,
) -> Result<(Vec<File>, Arc<Access>, Below<'p>), OpenError> {
    let (base, base_bytes) = file::open(base_path, false)?;
    file::check_size(base_bytes, base_path)?;
    let mut files = vec![base];
    let mut disk = raw(&files[0]).map_err(io_error(base_path))?;
    let mut below = Below {
        path: base_path,
        format: "raw",
        len_bytes: base_bytes,
    };
    for path in frozen {
        let (file, _) = file::open(path, false)?;
        disk = open_over(&file, path, disk, below, false)?;
        files.push(file);
        below.path = path;
        below.format = "qcow2";
    }
    Ok((files, disk, below))
}

fn check_depth(frozen: usize, path: &Path) -> Result<(), OpenError> {
    if frozen > MAX_FROZEN {
        return Err(OpenError::TooManyLayers {
            path: path.to_owned(),
        });
    }
    Ok(())
}

fn io_error(path: &Path) -> impl Fn(io::Error) -> OpenError {
    move |source| OpenError::Io {
        path: path.to_owned(),
        source,
    }
}

pub(super) fn storage(file: File, writable: bool) -> io::Result<ImagoFile> {
    ImagoFile::from_open_file(file, StorageOpenOptions::new().write(writable))
}

pub(super) fn raw(base: &File) -> io::Result<Arc<Access>> {
    let base = storage(base.try_clone()?, false)?;
    let base = Raw::builder(base).open(DenyImplicitOpenGate::default())?;
    Ok(Arc::new(FormatAccess::new(base)))
}

/// The top's file, not locked; made if there is none, or if an empty one was inherited.
fn open_top(path: &Path, below: Below<'_>) -> Result<File, OpenError> {
    let (file, len_bytes) = match file::open_unlocked(path, true) {
        Err(OpenError::Missing { .. }) => return make::create(path, below),
        other => other?,
    };
    if len_bytes == 0 && file::inherited(path).is_some() {
        make::format(&file, below).map_err(|source| OpenError::LayerCreate {
            path: path.to_owned(),
            source,
        })?;
    }
    Ok(file)
}

/// Reads a layer's header and refuses one that is not for a disk of this size.
fn open_format(
    file: &File,
    path: &Path,
    backing: Option<Arc<Access>>,
    writable: bool,
) -> Result<Format, OpenError> {
    file.try_clone()
        .and_then(|file| storage(file, writable))
        .and_then(|file| {
            Format::builder(file)
                .backing(backing)
                .write(writable)
                .open(DenyImplicitOpenGate::default())
        })
        .map_err(|source| OpenError::LayerFormat {
            path: path.to_owned(),
            source,
        })
}

pub(super) fn open_over(
    file: &File,
    path: &Path,
    backing: Arc<Access>,
    below: Below<'_>,
    writable: bool,
) -> Result<Arc<Access>, OpenError> {
    let disk = Arc::new(FormatAccess::new(open_format(
        file,
        path,
        Some(backing),
        writable,
    )?));
    if disk.size() != below.len_bytes {
        return Err(OpenError::LayerMismatch {
            path: path.to_owned(),
            base: below.path.to_owned(),
            layer_bytes: disk.size(),
            base_bytes: below.len_bytes,
        });
    }
    Ok(disk)
}

impl Layer {
    /// Asks where the clusters of a range are.
    fn learn(&mut self, offset: u64, len_bytes: u64) -> io::Result<()> {
        let cluster_bytes = u64::from(CLUSTER_BYTES);
        for cluster in self.places.clusters(offset, len_bytes) {
            if self.places.get(cluster) != Place::Unknown {
                continue;
            }
            let start = cluster as u64 * cluster_bytes;
            let whole = cluster_bytes.min(self.len_bytes - start);
            let place = locate(&self.disk, self.top(), start, whole)?;
            self.places.set(cluster, place);
        }
        Ok(())
    }

    /// imago's methods that free ask for it. Nobody shares the top until it is frozen.
    fn own(disk: &mut Arc<Access>) -> io::Result<&mut Access> {
        Arc::get_mut(disk).ok_or_else(|| io::Error::other("the top layer is shared"))
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
                Self::own(&mut self.disk)?.discard_to_zero(offset, length)?;
            }
            if let (Some(host), true) = (own, self.can_punch) {
                let hole = FallocateFlags::PUNCH_HOLE;
                let top = self.top();
                self.can_punch = file::allocate(&self.files[top], hole, host, length)?;
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

/// `len_bytes` of `buffers`, from byte `skip` on.
fn part<'m>(
    buffers: &[VolatileSlice<'m>],
    mut skip: u64,
    mut len_bytes: u64,
) -> io::Result<Vec<VolatileSlice<'m>>> {
    let mut parts = Vec::with_capacity(buffers.len());
    for buffer in buffers {
        let have = buffer.len() as u64;
        let skipped = skip.min(have);
        let take = len_bytes.min(have - skipped);
        if take > 0 {
            let slice = buffer.subslice(skipped as usize, take as usize);
            parts.push(slice.map_err(io::Error::other)?);
        }
        skip -= skipped;
        len_bytes -= take;
    }
    Ok(parts)
}

/// Where the cluster from `start` on is, in the files from the base, 0, to the `top`: looked for
/// from the top downwards.
pub(super) fn locate(disk: &Access, top: usize, start: u64, whole: u64) -> io::Result<Place> {
    let cluster_bytes = u64::from(CLUSTER_BYTES);
    let mut level = disk;
    for file in (1..=top).rev() {
        let (mapping, length) = level.get_shallow_mapping(start, whole)?;
        match mapping {
            // A layer that another tool made may have clusters of another size.
            _ if length < whole => return Ok(Place::Unknown),
            ShallowMapping::Indirect { layer, offset, .. } if offset == start => level = layer,
            ShallowMapping::Raw {
                offset, writable, ..
            } if offset.is_multiple_of(cluster_bytes) && (writable || file < top) => {
                return Ok(Place::In {
                    file,
                    cluster: offset / cluster_bytes,
                });
            }
            _ => return Ok(Place::Unknown),
        }
    }
    Ok(Place::In {
        file: 0,
        cluster: start / cluster_bytes,
    })
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
        let (mut done, mut is_learned) = (0, false);
        while done < len_bytes {
            let (at, left) = (offset + done, len_bytes - done);
            if let Some(piece) = self.places.piece(at, left) {
                let file = &self.files[piece.file];
                if piece.len_bytes == len_bytes {
                    return self.vectored.read_exact_at(file, buffers, piece.offset);
                }
                let part = part(buffers, done, piece.len_bytes)?;
                self.vectored.read_exact_at(file, &part, piece.offset)?;
                done += piece.len_bytes;
            } else if !is_learned {
                self.learn(at, left)?;
                is_learned = true;
            } else {
                let unknown = self.places.unknown_bytes(at, left);
                let part = part(buffers, done, unknown)?;
                let (vector, _mapped) = IoVectorMut::from_volatile_slice(&part);
                self.disk.readv(vector, at)?;
                done += unknown;
            }
        }
        Ok(())
    }

    fn write_at(&mut self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        let len_bytes = sum(buffers);
        if len_bytes == 0 {
            return Ok(());
        }
        self.is_touched = true;
        let top = self.top();
        if let Some(piece) = self.places.piece(offset, len_bytes)
            && (piece.file, piece.len_bytes) == (top, len_bytes)
        {
            let file = &self.files[top];
            return self.vectored.write_all_at(file, buffers, piece.offset);
        }
        self.places.forget(offset, len_bytes);
        let (vector, _mapped) = IoVector::from_volatile_slice(buffers);
        self.disk.writev(vector, offset)?;
        self.learn(offset, len_bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.disk.flush()?;
        fdatasync(&self.files[self.top()])?;
        // The guest may have asked for the first time since its layer was frozen.
        while let Some(file) = self.unsynced.last() {
            fdatasync(file)?;
            self.unsynced.pop();
        }
        Ok(())
    }

    fn write_back(&mut self) -> io::Result<()> {
        self.disk.flush()
    }

    fn prepare_layer(&mut self, path: &Path) -> Result<(), OpenError> {
        check_depth(self.files.len() - 1, path)?;
        let below = Below {
            path: &self.path,
            format: "qcow2",
            len_bytes: self.len_bytes,
        };
        let file = make::create(path, below)?;
        file::lock(&file, path, true)?;
        self.next = Some(Next {
            format: open_format(&file, path, None, true)?,
            file,
            path: path.to_owned(),
        });
        Ok(())
    }

    fn push_layer(&mut self) -> io::Result<bool> {
        let Some(next) = self.next.take() else {
            return Ok(false);
        };
        if !self.is_touched {
            return std::fs::remove_file(&next.path).map(|()| false);
        }
        let frozen = self.files[self.top()].try_clone()?;
        // From exclusive to shared: others may read it now, and nobody writes it again.
        file::lock(&frozen, &self.path, false).map_err(io::Error::other)?;
        let Next {
            mut format,
            file,
            path,
        } = next;
        format.set_backing(Some(Arc::clone(&self.disk)));
        self.disk = Arc::new(FormatAccess::new(format));
        self.files.push(file);
        self.unsynced.push(frozen);
        self.name = path.display().to_string();
        self.path = path;
        self.is_touched = false;
        Ok(true)
    }

    fn replace_layers(&mut self, replaced: Range<usize>, path: &Path) -> Result<(), OpenError> {
        let failed = io_error(path);
        let top = self.top();
        if self.next.is_some() || replaced.is_empty() || replaced.end >= top {
            return Err(failed(io::Error::other("there are no such layers")));
        }
        // Complete in the file, which is read again: nobody writes through the old tables any more.
        self.disk.flush().map_err(&failed)?;
        let (merged, _) = file::open(path, false)?;
        let below = Below {
            path,
            format: "qcow2",
            len_bytes: self.len_bytes,
        };
        // The base is file 0, frozen layer n is file n + 1.
        let mut files: Vec<File> = Vec::with_capacity(self.files.len());
        for file in &self.files[..=replaced.start] {
            files.push(file.try_clone().map_err(&failed)?);
        }
        files.push(merged);
        for file in &self.files[replaced.end + 1..] {
            files.push(file.try_clone().map_err(&failed)?);
        }
        let mut disk = raw(&files[0]).map_err(&failed)?;
        let new_top = files.len() - 1;
        for (number, file) in files.iter().enumerate().skip(1) {
            disk = open_over(file, path, disk, below, number == new_top)?;
        }
        self.disk = disk;
        self.files = files;
        self.places = Places::new(self.len_bytes, CLUSTER_BYTES);
        Ok(())
    }

    fn drop_prepared(&mut self) {
        if let Some(next) = self.next.take() {
            // What cannot be removed is empty, and goes with the VM's folder.
            let _ = std::fs::remove_file(&next.path);
        }
    }

    fn discard(&mut self, offset: u64, len_bytes: u64) -> io::Result<()> {
        self.is_touched = true;
        // The pieces at the ends are kept: zeroing them would cost writes.
        match self.whole_clusters(offset, len_bytes) {
            Some((start, end)) => self.free(start, end, false),
            None => Ok(()),
        }
    }

    fn write_zeroes(&mut self, offset: u64, len_bytes: u64, may_unmap: bool) -> io::Result<()> {
        self.is_touched = true;
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
