//! Writing a snapshot: all or nothing.
//!
//! ```text
//! begin ─> memory_*, state, layer … ─> finish ─> a Snapshot
//!   │            │                        └ manifest, flush, one rename
//!   └────────────┴─ drop: the folder is removed; kill: Store::sweep removes it
//! ```

use std::fs::{self, File};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};
use rustix::io::Errno;

use crate::chunks::write::write_chunks;
use crate::content::{copy_sparse, hash_file};
use crate::digest::Digest;
use crate::error::{Context as _, Error, Result};
use crate::files;
use crate::manifest::{
    About, Blob, FORMAT_VERSION, Layer, MAX_STATE_BYTES, Manifest, Memory, Region, check_layer_file,
};
use crate::memory::{write_difference, write_plain};
use crate::pages::{Pages, Run, populated_at};
use crate::signature::{SigningKey, sign};
use crate::snapshot::Snapshot;
use crate::store::Store;
use crate::{ChunkOptions, Progress};

/// A snapshot that is being written. Memory and state are needed, once each, in any order.
#[derive(Debug)]
pub struct Writer {
    store: Store,
    folder: PathBuf,
    /// Held for as long as the folder is ours; on the file `lock` within.
    _lock: File,
    memory: Option<Memory>,
    state: Option<Blob>,
    layers: Vec<Layer>,
}

impl Writer {
    /// Begins a snapshot in the store at this folder.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::DiskFull`].
    pub fn begin(store: &Path) -> Result<Self> {
        Self::begin_in(&Store::open(store)?)
    }

    pub(crate) fn begin_in(store: &Store) -> Result<Self> {
        // A sweeper holds the store's lock too, so it never sees our folder without our lock.
        let _guard = store.lock()?;
        let folder = store.root().join(files::temporary_name()?);
        files::create_folder(&folder)?;
        let lock_path = folder.join(files::LOCK);
        let lock = files::create(&lock_path).and_then(|lock| {
            flock(&lock, FlockOperation::LockExclusive).at("lock", &lock_path)?;
            Ok(lock)
        });
        match lock {
            Ok(lock) => Ok(Self {
                store: store.clone(),
                folder,
                _lock: lock,
                memory: None,
                state: None,
                layers: Vec::new(),
            }),
            Err(error) => {
                let _ = files::remove_tree(&folder);
                Err(error)
            }
        }
    }

    /// Writes all of memory as a file to be mapped. `populated` is where `source` holds anything
    /// ([`populated`](crate::populated) finds that for a memfd); zero pages within are left out
    /// too. Leave free guest pages out of it as well.
    ///
    /// # Errors
    /// [`Error::BadRequest`], [`Error::Io`], [`Error::DiskFull`], [`Error::Cancelled`].
    pub fn memory_plain(
        &mut self,
        regions: &[Region],
        source: &dyn Pages,
        populated: &[Run],
        progress: &dyn Progress,
    ) -> Result<&Memory> {
        self.no_memory_yet()?;
        progress.step("writing memory");
        let memory = write_plain(&self.folder, regions, source, populated, progress)?;
        Ok(self.memory.insert(memory))
    }

    /// Writes only the `changed` pages of memory; the rest is in the memory whose content hash is
    /// `base`, which has to be in the store when the snapshot is finished. Pages that became zero
    /// count as changed.
    ///
    /// # Errors
    /// As [`Writer::memory_plain`].
    pub fn memory_difference(
        &mut self,
        regions: &[Region],
        source: &dyn Pages,
        changed: &[Run],
        base: Digest,
        progress: &dyn Progress,
    ) -> Result<&Memory> {
        self.no_memory_yet()?;
        progress.step("writing the memory that changed");
        let memory = write_difference(&self.folder, regions, source, changed, base, progress)?;
        Ok(self.memory.insert(memory))
    }

    /// Writes all of memory as chunks for a pager. `populated` as in [`Writer::memory_plain`].
    ///
    /// # Errors
    /// As [`Writer::memory_plain`].
    pub fn memory_chunks(
        &mut self,
        regions: &[Region],
        source: &dyn Pages,
        populated: &[Run],
        options: ChunkOptions,
        progress: &dyn Progress,
    ) -> Result<&Memory> {
        self.no_memory_yet()?;
        progress.step("compressing memory");
        let memory = write_chunks(&self.folder, regions, source, populated, options, progress)?;
        Ok(self.memory.insert(memory))
    }

    fn no_memory_yet(&self) -> Result<()> {
        match self.memory {
            None => Ok(()),
            Some(_) => Err(Error::request("its memory is there already")),
        }
    }

    /// Writes the VMM's blob, at most 64 MiB.
    ///
    /// # Errors
    /// [`Error::BadRequest`], [`Error::Io`], [`Error::DiskFull`].
    pub fn state(&mut self, bytes: &[u8]) -> Result<()> {
        if self.state.is_some() || bytes.len() as u64 > MAX_STATE_BYTES {
            return Err(Error::request(
                "its state is there already, or over 64 MiB long",
            ));
        }
        files::write_sealed(&self.folder.join(files::STATE), bytes)?;
        self.state = Some(Blob {
            length: bytes.len() as u64,
            blake3: Digest::of(bytes),
        });
        Ok(())
    }

    /// Copies a frozen layer of `disk` (by reflink where the file system can, else without its
    /// zero pages) into a file of this name. Layers of one disk go in from the base up.
    ///
    /// # Errors
    /// [`Error::BadRequest`], [`Error::Io`], [`Error::DiskFull`], [`Error::Cancelled`].
    pub fn layer(
        &mut self,
        disk: &str,
        name: &str,
        source: &File,
        progress: &dyn Progress,
    ) -> Result<&Layer> {
        check_layer_file(name).map_err(Error::request)?;
        progress.step("writing a disk layer");
        let path = self.folder.join(name);
        let file = files::create(&path)?;
        let length = source.metadata().at("stat", &path)?.len();
        let blake3 = match rustix::fs::ioctl_ficlone(file.as_fd(), source.as_fd()) {
            Ok(()) => hash_file(&file, &path, progress)?,
            Err(_) => {
                let runs = populated_at(source, &path)?;
                copy_sparse(source, &runs, length, (&file, &path), progress)?
            }
        };
        files::seal(&file, &path)?;
        Ok(self.push(Layer {
            disk: disk.to_owned(),
            file: Some(name.to_owned()),
            external: None,
            length,
            blake3,
        }))
    }

    /// As [`Writer::layer`], for a file that nobody writes any more: the snapshot gets a hard link to
    /// it, where it is on the same file system, and costs no space of its own.
    ///
    /// # Errors
    /// As [`Writer::layer`].
    pub fn layer_linked(
        &mut self,
        disk: &str,
        name: &str,
        source: &Path,
        progress: &dyn Progress,
    ) -> Result<&Layer> {
        check_layer_file(name).map_err(Error::request)?;
        let path = self.folder.join(name);
        let file = files::open(source)?;
        if fs::hard_link(source, &path).is_err() {
            return self.layer(disk, name, &file, progress);
        }
        progress.step("hashing a disk layer");
        let length = file.metadata().at("stat", &path)?.len();
        let blake3 = hash_file(&file, &path, progress)?;
        files::seal(&file, &path)?;
        Ok(self.push(Layer {
            disk: disk.to_owned(),
            file: Some(name.to_owned()),
            external: None,
            length,
            blake3,
        }))
    }

    /// Names a layer of `disk` that is kept elsewhere: an image, or a layer of another snapshot
    /// (then `external` is its content hash, and that snapshot cannot be removed).
    pub fn external_layer(&mut self, disk: &str, external: Digest, length: u64, blake3: Digest) {
        self.push(Layer {
            disk: disk.to_owned(),
            file: None,
            external: Some(external),
            length,
            blake3,
        });
    }

    fn push(&mut self, layer: Layer) -> &Layer {
        self.layers.push(layer);
        &self.layers[self.layers.len() - 1]
    }

    /// Writes and signs the manifest, flushes everything, and gives the snapshot its place, and
    /// its name if it gets one.
    ///
    /// # Errors
    /// [`Error::BadRequest`] when a part is missing or over its limit, [`Error::MissingBase`],
    /// [`Error::BadName`], [`Error::NameTaken`], [`Error::Io`], [`Error::DiskFull`].
    pub fn finish(
        mut self,
        about: About,
        name: Option<&str>,
        key: Option<&SigningKey>,
    ) -> Result<Snapshot> {
        let (Some(memory), Some(state)) = (self.memory.take(), self.state.take()) else {
            return Err(Error::request("its memory or its state was not written"));
        };
        let mut manifest = Manifest {
            format: FORMAT_VERSION,
            ratoon: env!("CARGO_PKG_VERSION").to_owned(),
            created_unix_seconds: SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)
                .map_or(0, |since| since.as_secs()),
            memory,
            state,
            layers: std::mem::take(&mut self.layers),
            about,
            signature: None,
        };
        manifest.check().map_err(Error::request)?;
        let path = self.folder.join(files::MANIFEST);
        if let Some(key) = key {
            manifest.signature = Some(sign(&manifest.to_bytes()?, key, &path)?);
        }
        let bytes = manifest.to_bytes()?;
        // What we cannot read we do not write: above all, one that is too long.
        Manifest::parse(&bytes, &path).map_err(|error| Error::request(error.to_string()))?;
        self.publish(&bytes, &manifest, name)
    }

    /// Everything but the manifest is in the folder and sealed.
    pub(crate) fn publish(
        self,
        bytes: &[u8],
        manifest: &Manifest,
        name: Option<&str>,
    ) -> Result<Snapshot> {
        files::write_sealed(&self.folder.join(files::MANIFEST), bytes)?;
        files::sync_folder(&self.folder)?;
        let id = Digest::of(bytes);
        let _guard = self.store.lock()?;
        self.store.check_bases(&self.folder, manifest)?;
        // Written before the rename, so that a disk that is full now leaves nothing behind.
        let pointer = name
            .map(|name| self.store.prepare_name(name, id))
            .transpose()?;
        let lock_path = self.folder.join(files::LOCK);
        fs::remove_file(&lock_path).at("remove", &lock_path)?;
        let place = self.store.folder(id);
        match fs::rename(&self.folder, &place) {
            // The same snapshot is there already. Ours is known to be sound, that one may be
            // damaged: they change places, and drop removes it, unless somebody holds it.
            Err(_) if place.is_dir() => {
                let held = File::open(place.join(files::MANIFEST)).map(|there| {
                    let locked = flock(&there, FlockOperation::NonBlockingLockExclusive);
                    locked.map(|()| there)
                });
                if let Ok(Err(Errno::WOULDBLOCK)) = held {
                    if let Some(pointer) = pointer {
                        pointer.place()?;
                    }
                    return self.store.load(id);
                }
                renameat_with(CWD, &self.folder, CWD, &place, RenameFlags::EXCHANGE)
                    .at("move the snapshot to", &place)?;
            }
            other => other.at("move the snapshot to", &place)?,
        }
        files::sync_folder(self.store.root())?;
        if let Some(pointer) = pointer {
            pointer.place()?;
        }
        self.store.load(id)
    }

    /// The folder that is being filled.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // After `finish` there is nothing there. A failure here is the next sweep's work.
        let _ = files::remove_tree(&self.folder);
    }
}
