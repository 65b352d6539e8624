//! The store: a folder of disks that are never changed, and names for them.
//!
//! ```text
//! images/
//!   lock                      held for a moment while names, keys and blobs change
//!   blobs/<digest>/disk.ext4  0444; a VM that reads it holds a shared flock on it
//!                 /config.json
//!   names/<name>              the digest
//!   keys/<key>                the digest made from this recipe or source
//!   making/<key>              lock: the second maker of the same thing waits, then reuses
//!   tmp/<id>/, tmp/<id>.lock  work in progress (see `scratch`)
//! ```
//!
//! A blob is complete before it gets its place by one rename, so that a kill leaves at most
//! scratch folders and blobs without a name, both harmless.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{
    DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, flock};

use super::Progress;
use super::config::{
    CONFIG_VERSION, ContainerConfig, Image, ImageConfig, MIN_DIGEST_PREFIX, check_name, is_digest,
    is_hex, read_config,
};
use super::error::{Context, Error, Result};
use super::ext4;
use super::scratch::{Scratch, sweep};
use crate::snapshots;

/// What [`ImageStore::remove`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removed {
    /// The image.
    pub digest: String,
    /// Names that no longer exist.
    pub names: Vec<String>,
    /// Whether the disk is gone too (it stays while other names point at it).
    pub disk: bool,
}

/// The images of one user. Any number of processes may use one store at once.
#[derive(Debug, Clone)]
pub struct ImageStore {
    root: PathBuf,
    /// Where snapshots are that may stand on images.
    snapshots: Option<PathBuf>,
}

/// A disk that is ready to enter the store.
pub(super) struct NewImage<'n> {
    /// In the scratch folder, named `disk.ext4`, alone in its folder.
    pub(super) blob: PathBuf,
    pub(super) source: String,
    pub(super) key: &'n str,
    pub(super) container: ContainerConfig,
    pub(super) name: &'n str,
    /// Whether `name` may move from another image to this one.
    pub(super) take_name: bool,
}

impl ImageStore {
    /// Opens the store under `cache_dir` (see
    /// [`Dirs::cache`](crate::dirs::Dirs::cache)), makes its folders and sweeps
    /// what killed processes left.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::DiskFull`].
    pub fn open(cache_dir: &Path) -> Result<Self> {
        let root = cache_dir.join("images");
        for folder in ["blobs", "names", "keys", "making", "tmp"] {
            let folder = root.join(folder);
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&folder)
                .at("create", &folder)?;
        }
        // Programs get these paths from other working folders.
        let root = root.canonicalize().at("open", &root)?;
        sweep(&root.join("tmp")).or_else(|error| match error {
            // Sweeping is housekeeping: it never stands in the way of using the images.
            Error::Io { .. } => Ok(0),
            other => Err(other),
        })?;
        let store = Self {
            root,
            snapshots: None,
        };
        store.sweep_making();
        Ok(store)
    }

    /// The same; images on which a snapshot in this folder stands are kept.
    #[must_use]
    pub fn kept_for(mut self, snapshots: PathBuf) -> Self {
        self.snapshots = Some(snapshots);
        self
    }

    /// The snapshots that stand on an image, by name or id.
    fn needed_by(&self, digest: &str) -> Vec<String> {
        let folder = self.snapshots.as_deref();
        folder.map_or_else(Vec::new, |folder| snapshots::standing_on(folder, digest))
    }

    /// The store's folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// All images, newest first.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::BadRecord`].
    pub fn list(&self) -> Result<Vec<Image>> {
        let blobs = self.root.join("blobs");
        let names = self.names()?;
        let mut images = Vec::new();
        for entry in fs::read_dir(&blobs).at("list", &blobs)? {
            let digest = entry.at("list", &blobs)?.file_name();
            let Some(digest) = digest.to_str().filter(|digest| is_digest(digest)) else {
                continue;
            };
            match self.load(digest, &names) {
                Err(Error::NotFound { .. }) => {} // Removed while we looked.
                other => images.push(other?),
            }
        }
        images.sort_by(|a, b| {
            let by_time = b
                .config
                .created_unix_seconds
                .cmp(&a.config.created_unix_seconds);
            by_time.then_with(|| a.config.digest.cmp(&b.config.digest))
        });
        Ok(images)
    }

    /// The image of this name, digest, or digest's first 12 or more digits.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Ambiguous`], [`Error::Io`], [`Error::BadRecord`].
    pub fn get(&self, wanted: &str) -> Result<Image> {
        let digest = self.resolve(wanted)?;
        self.load(&digest, &self.names()?)
    }

    /// The image as `get` gives it, after reading the whole disk to check it against its digest.
    ///
    /// # Errors
    /// As [`ImageStore::get`], and [`Error::DigestMismatch`].
    pub fn inspect(&self, wanted: &str, progress: &dyn Progress) -> Result<Image> {
        let image = self.get(wanted)?;
        progress.step("checking the disk against its digest");
        let found = ext4::digest(&image.disk, progress)?;
        if found != image.config.digest {
            return Err(Error::DigestMismatch {
                archive: image.disk.display().to_string(),
                digest: image.config.digest,
                what: "digest",
                found,
            });
        }
        Ok(image)
    }

    /// Removes a name, and with the last name the disk; given a digest, removes the image with its
    /// one name. `force` removes the disk with all names, and also while a VM reads it (that VM
    /// goes on; it cannot be started again from this image) or a snapshot stands on it (that cannot
    /// be restored then).
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::InUse`], [`Error::Needed`], [`Error::SeveralNames`], [`Error::Io`].
    pub fn remove(&self, wanted: &str, force: bool) -> Result<Removed> {
        let _lock = self.lock()?;
        let digest = self.resolve(wanted)?;
        let mut names: Vec<String> = self
            .names()?
            .into_iter()
            .filter(|(_, of)| *of == digest)
            .map(|(name, _)| name)
            .collect();
        if !force && names.len() > 1 {
            if !names.iter().any(|name| name == wanted) {
                return Err(Error::SeveralNames {
                    digest,
                    names: names.join(", "),
                });
            }
            names = vec![wanted.to_owned()];
            self.forget_names(&names)?;
            return Ok(Removed {
                digest,
                names,
                disk: false,
            });
        }
        if !force {
            let by = self.needed_by(&digest).join(", ");
            if !by.is_empty() {
                return Err(Error::Needed { digest, by });
            }
        }
        let disk = self.blob(&digest).join("disk.ext4");
        // Held until the disk is gone, so that no VM starts from it meanwhile.
        let _guard = match File::open(&disk) {
            Ok(file) => match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Err(rustix::io::Errno::WOULDBLOCK) if !force => {
                    return Err(Error::InUse { digest });
                }
                _ => Some(file),
            },
            Err(_) => None,
        };
        self.forget_names(&names)?;
        self.forget_keys(&digest)?;
        self.discard_blob(&digest)?;
        Ok(Removed {
            digest,
            names,
            disk: true,
        })
    }

    /// The image made from this recipe or source before, if it is still there.
    pub(super) fn by_key(&self, key: &str) -> Result<Option<Image>> {
        let path = self.root.join("keys").join(key);
        let Some(digest) = read_small(&path)? else {
            return Ok(None);
        };
        match self.load(&digest, &self.names()?) {
            Ok(image) => Ok(Some(Image {
                cached: true,
                ..image
            })),
            Err(Error::NotFound { .. } | Error::BadRecord { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Waits until nobody else makes the image of this key. The lock goes with the file.
    pub(super) fn making(&self, key: &str, progress: &dyn Progress) -> Result<File> {
        let path = self.root.join("making").join(key);
        let mut told = false;
        loop {
            let file = open_lock(&path)?;
            loop {
                match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                    Ok(()) => break,
                    Err(rustix::io::Errno::WOULDBLOCK) => {}
                    Err(errno) => return Err(Error::io("lock", &path, errno.into())),
                }
                if !told {
                    progress.step("waiting for another process that makes the same image");
                    told = true;
                }
                if progress.cancelled() {
                    return Err(Error::Cancelled);
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            // Another store user may have swept the file between our open and our lock.
            let ours = file.metadata().at("stat", &path)?.ino();
            if fs::metadata(&path).is_ok_and(|now| now.ino() == ours) {
                return Ok(file);
            }
        }
    }

    /// A scratch folder in the store.
    pub(super) fn scratch(&self) -> Result<Scratch> {
        Scratch::create(&self.root.join("tmp"))
    }

    /// Whether `name` can be given to the image `digest` (or to a new one, with none).
    pub(super) fn check_free(&self, name: &str, digest: Option<&str>) -> Result<()> {
        match read_small(&self.root.join("names").join(name))? {
            Some(taken) if Some(taken.as_str()) != digest && self.blob(&taken).exists() => {
                Err(Error::NameTaken {
                    name: name.to_owned(),
                    digest: taken,
                })
            }
            _ => Ok(()),
        }
    }

    /// Gives `name` to an image that exists.
    pub(super) fn name_image(&self, image: &Image, name: &str, take: bool) -> Result<Image> {
        let _lock = self.lock()?;
        if !take {
            self.check_free(name, Some(image.digest()))?;
        }
        self.point("names", name, image.digest())?;
        let named = self.load(image.digest(), &self.names()?)?;
        Ok(Image {
            cached: image.cached,
            ..named
        })
    }

    /// Hashes the new disk and gives it its place, key and name.
    pub(super) fn publish(&self, new: NewImage<'_>, progress: &dyn Progress) -> Result<Image> {
        progress.step("hashing the disk");
        let disk = new.blob.join("disk.ext4");
        let digest = ext4::digest(&disk, progress)?;
        let file = File::open(&disk).at("open", &disk)?;
        file.set_permissions(fs::Permissions::from_mode(0o444))
            .at("set the mode of", &disk)?;
        file.sync_all().at("flush", &disk)?;
        let metadata = file.metadata().at("stat", &disk)?;
        let config = ImageConfig {
            version: CONFIG_VERSION,
            digest: digest.clone(),
            size_bytes: metadata.len(),
            stored_bytes: metadata.blocks() * 512,
            created_unix_seconds: SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)
                .map_or(0, |since| since.as_secs()),
            source: new.source,
            key: new.key.to_owned(),
            container: new.container,
        };
        let record = new.blob.join("config.json");
        let text = serde_json::to_vec_pretty(&config).map_err(|error| Error::BadRecord {
            path: record.clone(),
            reason: error.to_string(),
        })?;
        write_synced(&record, &text)?;
        sync_folder(&new.blob)?;

        let _lock = self.lock()?;
        if progress.cancelled() {
            return Err(Error::Cancelled);
        }
        if !new.take_name {
            self.check_free(new.name, Some(&digest))?;
        }
        let place = self.blob(&digest);
        match fs::rename(&new.blob, &place) {
            // The same content is there already: keep that one, its users hold locks on it.
            Err(_) if place.join("config.json").exists() => {}
            other => other.at("move the image to", &place)?,
        }
        sync_folder(&self.root.join("blobs"))?;
        let old = read_small(&self.root.join("names").join(new.name))?;
        self.point("keys", new.key, &digest)?;
        self.point("names", new.name, &digest)?;
        if let Some(old) = old.filter(|old| *old != digest) {
            self.drop_if_unused(&old)?;
        }
        self.load(&digest, &self.names()?)
    }

    /// Removes an image that lost its last name, unless a VM reads it or a snapshot stands on it.
    fn drop_if_unused(&self, digest: &str) -> Result<()> {
        let has_name = self.names()?.iter().any(|(_, of)| of == digest);
        if has_name || !self.needed_by(digest).is_empty() {
            return Ok(());
        }
        let Ok(file) = File::open(self.blob(digest).join("disk.ext4")) else {
            return Ok(());
        };
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Ok(());
        }
        self.forget_keys(digest)?;
        self.discard_blob(digest)
    }

    /// Moves a blob away in one step, then deletes it.
    fn discard_blob(&self, digest: &str) -> Result<()> {
        let scratch = self.scratch()?;
        let place = self.blob(digest);
        match fs::rename(&place, scratch.path().join("blob")) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            other => other.at("remove", &place),
        }
    }

    fn blob(&self, digest: &str) -> PathBuf {
        self.root.join("blobs").join(digest)
    }

    fn load(&self, digest: &str, names: &[(String, String)]) -> Result<Image> {
        let gone = || Error::NotFound {
            wanted: digest.to_owned(),
        };
        if !is_digest(digest) {
            return Err(gone());
        }
        let folder = self.blob(digest);
        let record = folder.join("config.json");
        if !record.exists() {
            return Err(gone());
        }
        let config = read_config(&record)?;
        if config.digest != digest {
            let reason = format!("it is of image {}", config.digest);
            return Err(Error::BadRecord {
                path: record,
                reason,
            });
        }
        let names = names
            .iter()
            .filter(|(_, of)| of == digest)
            .map(|(name, _)| name.clone())
            .collect();
        Ok(Image {
            config,
            names,
            disk: folder.join("disk.ext4"),
            cached: false,
        })
    }

    /// All names, sorted, with their digests.
    fn names(&self) -> Result<Vec<(String, String)>> {
        let folder = self.root.join("names");
        let mut names = Vec::new();
        for entry in fs::read_dir(&folder).at("list", &folder)? {
            let entry = entry.at("list", &folder)?;
            let Ok(name) = entry.file_name().into_string() else {
                continue;
            };
            if check_name(&name).is_err() {
                continue;
            }
            if let Some(digest) = read_small(&entry.path())? {
                names.push((name, digest));
            }
        }
        names.sort();
        Ok(names)
    }

    fn resolve(&self, wanted: &str) -> Result<String> {
        let missing = || Error::NotFound {
            wanted: wanted.to_owned(),
        };
        if check_name(wanted).is_ok() {
            return read_small(&self.root.join("names").join(wanted))?
                .filter(|digest| self.blob(digest).exists())
                .ok_or_else(missing);
        }
        if wanted.len() < MIN_DIGEST_PREFIX || wanted.len() > 64 || !is_hex(wanted) {
            return Err(missing());
        }
        let blobs = self.root.join("blobs");
        let mut found = Vec::new();
        for entry in fs::read_dir(&blobs).at("list", &blobs)? {
            let name = entry.at("list", &blobs)?.file_name();
            if let Some(digest) = name.to_str()
                && is_digest(digest)
                && digest.starts_with(wanted)
            {
                found.push(digest.to_owned());
            }
        }
        match found.len() {
            0 => Err(missing()),
            1 => Ok(found.remove(0)),
            count => Err(Error::Ambiguous {
                wanted: wanted.to_owned(),
                count,
            }),
        }
    }

    /// Writes `<folder>/<name>` = digest in one step. The caller holds the lock.
    fn point(&self, folder: &str, name: &str, digest: &str) -> Result<()> {
        let scratch = self.scratch()?;
        let new = scratch.path().join("pointer");
        write_synced(&new, digest.as_bytes())?;
        let place = self.root.join(folder).join(name);
        fs::rename(&new, &place).at("write", &place)?;
        sync_folder(&self.root.join(folder))
    }

    fn forget_names(&self, names: &[String]) -> Result<()> {
        for name in names {
            let path = self.root.join("names").join(name);
            fs::remove_file(&path).at("remove", &path)?;
        }
        Ok(())
    }

    fn forget_keys(&self, digest: &str) -> Result<()> {
        let folder = self.root.join("keys");
        for entry in fs::read_dir(&folder).at("list", &folder)? {
            let path = entry.at("list", &folder)?.path();
            if read_small(&path)?.is_some_and(|of| of == digest) {
                fs::remove_file(&path).at("remove", &path)?;
            }
        }
        Ok(())
    }

    /// Removes the lock files of images that nobody makes now.
    fn sweep_making(&self) {
        let Ok(entries) = fs::read_dir(self.root.join("making")) else {
            return;
        };
        for path in entries.flatten().map(|entry| entry.path()) {
            let Ok(file) = File::open(&path) else {
                continue;
            };
            if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
                // Those who wait for this lock look at the name again after they get it.
                let _ = fs::remove_file(&path);
            }
        }
    }

    fn lock(&self) -> Result<File> {
        let path = self.root.join("lock");
        let file = open_lock(&path)?;
        flock(&file, FlockOperation::LockExclusive).at("lock", &path)?;
        Ok(file)
    }

    /// Removes scratch folders whose owners are gone; returns how many.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sweep(&self) -> Result<usize> {
        sweep(&self.root.join("tmp"))
    }
}

fn open_lock(path: &Path) -> Result<File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .at("open", path)
}

/// A file of one digest; none when it is not there.
fn read_small(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text.trim_end().to_owned()).filter(|digest| is_digest(digest))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.kind() == std::io::ErrorKind::InvalidData => Ok(None),
        Err(error) => Err(Error::io("read", path, error)),
    }
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = File::create_new(path).at("create", path)?;
    file.write_all(bytes).at("write", path)?;
    file.sync_all().at("flush", path)
}

fn sync_folder(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|folder| folder.sync_all())
        .at("flush", path)
}
