//! The store: snapshots that are never changed, and names for them.
//!
//! All changes of what is there (a rename, a removal, a name) are made with the store's lock held.
//! Nothing waits for a copy: those happen in folders that nobody else looks into.

use std::cmp::Reverse;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::digest::Digest;
use crate::error::{Context as _, Error, Result};
use crate::files;
use crate::manifest::{Layer, MAX_MANIFEST_BYTES, Manifest, Memory};
use crate::memory::{MAX_DEPTH, MemoryFile, MemoryImage};
use crate::names::NAMES;
use crate::snapshot::{ManifestBytes, Snapshot};
use crate::writer::Writer;

/// The snapshots in one folder. Any number of processes may use one store at once.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

/// What [`Store::list`] found.
#[derive(Debug, Default)]
pub struct Listing {
    /// Newest first.
    pub snapshots: Vec<Snapshot>,
    /// Those whose manifest cannot be used. [`Store::remove`] takes their ids.
    pub damaged: Vec<Damaged>,
}

/// A snapshot whose manifest cannot be used.
#[derive(Debug)]
pub struct Damaged {
    /// Its id.
    pub id: Digest,
    /// Why.
    pub error: Error,
}

/// What [`Store::remove`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removed {
    /// The snapshot.
    pub id: Digest,
    /// Names that no longer exist.
    pub names: Vec<String>,
    /// Whether its files are gone too (they stay while it has other names).
    pub files: bool,
}

impl Store {
    /// Opens the store at this folder, makes it if need be, and sweeps it.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::DiskFull`].
    pub fn open(root: &Path) -> Result<Self> {
        files::create_folder(&root.join(NAMES))?;
        let store = Self {
            root: root.canonicalize().at("open", root)?,
        };
        // Housekeeping never stands in the way of using the snapshots.
        let _ = store.sweep();
        Ok(store)
    }

    /// The store's folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Begins a snapshot here.
    ///
    /// # Errors
    /// As [`Writer::begin`].
    pub fn begin(&self) -> Result<Writer> {
        Writer::begin_in(self)
    }

    /// All snapshots.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn list(&self) -> Result<Listing> {
        let names = self.names()?;
        let mut listing = Listing::default();
        for id in self.ids()? {
            match self.load_with(id, &names) {
                Ok(snapshot) => listing.snapshots.push(snapshot),
                Err(Error::NotFound { .. }) => {} // Removed while we looked.
                Err(error) => listing.damaged.push(Damaged { id, error }),
            }
        }
        // Several may be of one second, and build on each other.
        let written = |snapshot: &Snapshot| {
            let manifest = self.folder(snapshot.id).join(files::MANIFEST);
            manifest.metadata().and_then(|it| it.modified()).ok()
        };
        listing.snapshots.sort_by_cached_key(|it| {
            let time = (it.manifest.created_unix_seconds, written(it));
            (Reverse(time), it.id)
        });
        Ok(listing)
    }

    /// The snapshot of this name, id, or id's first 12 or more digits.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Ambiguous`], [`Error::Damaged`], [`Error::NewerFormat`],
    /// [`Error::ForeignOwner`], [`Error::Io`].
    pub fn get(&self, wanted: &str) -> Result<Snapshot> {
        self.load(self.resolve(wanted)?)
    }

    /// Opens a snapshot's memory, with what it builds on.
    ///
    /// # Errors
    /// [`Error::MissingBase`], [`Error::Damaged`], [`Error::NewerFormat`], [`Error::Io`].
    pub fn memory(&self, snapshot: &Snapshot) -> Result<MemoryImage> {
        let chain = self.chain(snapshot)?;
        let layers: Vec<(PathBuf, &Memory)> = chain
            .iter()
            .map(|layer| (layer.folder.clone(), &layer.manifest.memory))
            .collect();
        MemoryImage::open(&layers)
    }

    /// The snapshot and those that its memory lies over, each after what lies over it.
    pub(crate) fn chain(&self, snapshot: &Snapshot) -> Result<Vec<Snapshot>> {
        let mut chain = vec![snapshot.clone()];
        let mut known = Vec::new();
        while let Some(base) = chain[chain.len() - 1].manifest.memory.base {
            if chain.len() > MAX_DEPTH {
                let reason = format!("its memory lies over more than {MAX_DEPTH} others");
                return Err(Error::damaged(&snapshot.folder, reason));
            }
            if known.is_empty() {
                known = self.list()?.snapshots;
            }
            let top = &chain[chain.len() - 1];
            let found = known.iter().find(|it| it.manifest.memory.blake3 == base);
            let Some(found) = found else {
                return Err(Error::MissingBase {
                    path: top.folder.clone(),
                    what: "base memory",
                    digest: base.to_string(),
                });
            };
            chain.push(found.clone());
        }
        Ok(chain)
    }

    /// Opens a disk layer: the snapshot's own, or one of another snapshot here. None when it is
    /// external and in no snapshot (an image, then).
    ///
    /// # Errors
    /// [`Error::Damaged`], [`Error::Io`].
    pub fn layer(&self, snapshot: &Snapshot, layer: &Layer) -> Result<Option<File>> {
        let Some(external) = layer.external else {
            return snapshot.layer(layer).map(Some);
        };
        for other in self.list()?.snapshots {
            let own = |it: &&Layer| it.file.is_some() && it.blake3 == external;
            if let Some(found) = other.manifest.layers.iter().find(own) {
                return other.layer(found).map(Some);
            }
        }
        Ok(None)
    }

    /// The files of a disk's layers, the lowest first, their lengths checked; those of other
    /// snapshots here among them. A layer that is in no snapshot is missing. One that several have is taken from
    /// where the snapshot comes from, if it can be: that one stays while the snapshot does.
    ///
    /// # Errors
    /// [`Error::MissingBase`], [`Error::Damaged`], [`Error::Io`].
    pub fn layer_files(&self, snapshot: &Snapshot, disk: &str) -> Result<Vec<PathBuf>> {
        let mut known = Vec::new();
        let mut files = Vec::new();
        for layer in snapshot.manifest.layers.iter().filter(|it| it.disk == disk) {
            let Some(external) = layer.external else {
                files.push(checked_layer(snapshot, layer)?);
                continue;
            };
            if known.is_empty() {
                known = self.forebears_first(snapshot)?;
            }
            let own = |it: &&Layer| it.file.is_some() && it.blake3 == external;
            let found = known.iter().find_map(|other| {
                let found = other.manifest.layers.iter().find(own)?;
                Some((other, found))
            });
            let Some((other, found)) = found else {
                return Err(Error::MissingBase {
                    path: snapshot.folder.clone(),
                    what: "disk layer",
                    digest: external.to_string(),
                });
            };
            files.push(checked_layer(other, found)?);
        }
        Ok(files)
    }

    /// All snapshots, those before the others that this one comes from.
    fn forebears_first(&self, snapshot: &Snapshot) -> Result<Vec<Snapshot>> {
        let mut known = self.list()?.snapshots;
        let (mut first, mut above) = (0, snapshot.manifest.about.parent);
        while let Some(id) = above
            && let Some(further) = known[first..].iter().position(|it| it.id == id)
        {
            known.swap(first, first + further);
            above = known[first].manifest.about.parent;
            first += 1;
        }
        Ok(known)
    }

    /// The files of a snapshot's memory, the lowest first, their lengths checked and indexes
    /// verified, with those of the snapshots that it lies over.
    ///
    /// # Errors
    /// As [`Store::memory`].
    pub fn memory_files(&self, snapshot: &Snapshot) -> Result<Vec<MemoryFile>> {
        let chain = self.chain(snapshot)?;
        chain
            .iter()
            .rev()
            .map(|layer| MemoryFile::of(&layer.folder, &layer.manifest.memory))
            .collect()
    }

    /// Removes a snapshot with all its names; given one of several names, removes that name alone.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Ambiguous`], [`Error::Needed`], [`Error::InUse`],
    /// [`Error::Io`].
    pub fn remove(&self, wanted: &str) -> Result<Removed> {
        let lock = self.lock()?;
        let id = self.resolve(wanted)?;
        let mut names = names_of(id, &self.names()?);
        let files = names.len() < 2 || !names.iter().any(|name| name == wanted);
        if files {
            self.check_unneeded(id)?;
        } else {
            names = vec![wanted.to_owned()];
        }
        let folder = self.folder(id);
        // Held until the folder has moved, so that nobody begins to hold it meanwhile.
        let _held = match File::open(folder.join(files::MANIFEST)) {
            Ok(manifest) if files => {
                match flock(&manifest, FlockOperation::NonBlockingLockExclusive) {
                    Err(Errno::WOULDBLOCK) => return Err(Error::InUse { id: id.to_string() }),
                    other => other.at("lock", &folder)?,
                }
                Some(manifest)
            }
            _ => None,
        };
        for name in &names {
            let path = self.root.join(NAMES).join(name);
            fs::remove_file(&path).at("remove", &path)?;
        }
        if files {
            // Gone in one step; a kill from here on leaves work for the sweep.
            let away = self.root.join(files::temporary_name()?);
            fs::rename(&folder, &away).at("remove", &folder)?;
            // Much memory takes a while to go, and nobody needs to wait for that.
            drop(lock);
            files::remove_tree(&away)?;
        }
        Ok(Removed { id, names, files })
    }

    /// Removes what killed writers and removers left; gives how many folders that were.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sweep(&self) -> Result<usize> {
        let _lock = self.lock()?;
        let mut swept = 0;
        for entry in fs::read_dir(&self.root).at("list", &self.root)? {
            let path = entry.at("list", &self.root)?.path();
            if !is_temporary(&path) {
                continue;
            }
            // Writers make folder and lock with the store's lock held: no lock, no writer.
            let lock = File::open(path.join(files::LOCK));
            if let Ok(lock) = &lock
                && flock(lock, FlockOperation::NonBlockingLockExclusive).is_err()
            {
                continue;
            }
            files::remove_tree(&path)?;
            swept += 1;
        }
        let names = self.root.join(NAMES);
        for entry in fs::read_dir(&names).at("list", &names)? {
            let path = entry.at("list", &names)?.path();
            // Names are written with the store's lock held, so nobody writes this one.
            if is_temporary(&path) {
                fs::remove_file(&path).at("remove", &path)?;
            }
        }
        Ok(swept)
    }

    pub(crate) fn lock(&self) -> Result<File> {
        let path = self.root.join(files::LOCK);
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .at("open", &path)?;
        flock(&file, FlockOperation::LockExclusive).at("lock", &path)?;
        Ok(file)
    }

    pub(crate) fn folder(&self, id: Digest) -> PathBuf {
        self.root.join(id.to_string())
    }

    pub(crate) fn load(&self, id: Digest) -> Result<Snapshot> {
        self.load_with(id, &self.names()?)
    }

    fn load_with(&self, id: Digest, names: &[(String, Digest)]) -> Result<Snapshot> {
        let folder = self.folder(id);
        let metadata = match fs::symlink_metadata(&folder) {
            Ok(metadata) if metadata.is_dir() => metadata,
            _ => {
                return Err(Error::NotFound {
                    wanted: id.to_string(),
                });
            }
        };
        let owner = metadata.uid();
        if owner != 0 && owner != rustix::process::geteuid().as_raw() {
            return Err(Error::ForeignOwner {
                path: folder,
                owner,
            });
        }
        let path = folder.join(files::MANIFEST);
        let bytes = files::read_bounded(&path, MAX_MANIFEST_BYTES)?;
        if Digest::of(&bytes) != id {
            return Err(Error::damaged(&path, "its hash is not the snapshot's id"));
        }
        let manifest = Manifest::parse(&bytes, &path)?;
        Ok(Snapshot {
            id,
            manifest,
            names: names_of(id, names),
            folder,
            bytes: ManifestBytes(bytes),
        })
    }

    pub(crate) fn ids(&self) -> Result<Vec<Digest>> {
        let mut ids = Vec::new();
        for entry in fs::read_dir(&self.root).at("list", &self.root)? {
            let name = entry.at("list", &self.root)?.file_name();
            if let Some(id) = name.to_str().and_then(|name| name.parse().ok()) {
                ids.push(id);
            }
        }
        Ok(ids)
    }

    /// Whether the memory that `manifest` lies over is here and fits. The caller holds the lock.
    pub(crate) fn check_bases(&self, folder: &Path, manifest: &Manifest) -> Result<()> {
        let Some(base) = manifest.memory.base else {
            return Ok(());
        };
        let known = self.list()?.snapshots;
        let found = known.iter().find(|it| it.manifest.memory.blake3 == base);
        match found {
            Some(found) if found.manifest.memory.bytes == manifest.memory.bytes => {
                // One more may lie over it.
                match self.chain(found)?.len() {
                    depth if depth > MAX_DEPTH => Err(Error::request(format!(
                        "its memory would lie over more than {MAX_DEPTH} others: write it whole"
                    ))),
                    _ => Ok(()),
                }
            }
            Some(_) => Err(Error::request("its base is memory of another size")),
            None => Err(Error::MissingBase {
                path: folder.to_path_buf(),
                what: "base memory",
                digest: base.to_string(),
            }),
        }
    }

    /// The snapshots that name this one as parent, or build on what only it has: while there are
    /// any it cannot be removed.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn needed_by(&self, id: Digest) -> Result<Vec<Snapshot>> {
        let mut others = self.list()?.snapshots;
        let only_here: Vec<Digest> = match others.iter().position(|it| it.id == id) {
            Some(place) => {
                let mut offered = offers(&others.remove(place).manifest);
                offered.retain(|content| {
                    !others
                        .iter()
                        .any(|it| offers(&it.manifest).contains(content))
                });
                offered
            }
            None => Vec::new(),
        };
        others.retain(|it| {
            let manifest = &it.manifest;
            let externals = manifest.layers.iter().filter_map(|layer| layer.external);
            manifest.about.parent == Some(id)
                || externals
                    .chain(manifest.memory.base)
                    .any(|content| only_here.contains(&content))
        });
        Ok(others)
    }

    fn check_unneeded(&self, id: Digest) -> Result<()> {
        let by: Vec<String> = self
            .needed_by(id)?
            .iter()
            .map(|it| match it.names.first() {
                Some(name) => format!("{name} ({})", it.id),
                None => it.id.to_string(),
            })
            .collect();
        if by.is_empty() {
            return Ok(());
        }
        Err(Error::Needed {
            id: id.to_string(),
            by: by.join(", "),
        })
    }
}

fn checked_layer(snapshot: &Snapshot, layer: &Layer) -> Result<PathBuf> {
    drop(snapshot.layer(layer)?);
    let file = layer.file.as_deref().unwrap_or_default();
    Ok(snapshot.folder.join(file))
}

fn names_of(id: Digest, names: &[(String, Digest)]) -> Vec<String> {
    let own = names.iter().filter(|(_, of)| *of == id);
    own.map(|(name, _)| name.clone()).collect()
}

/// Contents that others may build on.
fn offers(manifest: &Manifest) -> Vec<Digest> {
    let own = manifest.layers.iter().filter(|layer| layer.file.is_some());
    let layers = own.map(|layer| layer.blake3);
    layers.chain([manifest.memory.blake3]).collect()
}

fn is_temporary(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    name.is_some_and(|name| name.starts_with(files::TEMPORARY))
}
