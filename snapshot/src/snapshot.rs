//! One snapshot in the store.

use std::fmt;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::digest::Digest;
use crate::error::{Context as _, Error, Result};
use crate::files;
use crate::manifest::{Layer, Manifest};
use crate::signature::{self, PublicKey};

/// A snapshot whose manifest fits its id. Its other files are checked as they are opened.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// BLAKE3 of the manifest's bytes.
    pub id: Digest,
    /// What it is.
    pub manifest: Manifest,
    /// Its names, sorted.
    pub names: Vec<String>,
    /// Where its files are.
    pub folder: PathBuf,
    /// The manifest's file, which the id and the signature are of.
    pub(crate) bytes: ManifestBytes,
}

/// Kept out of debug output, which has the manifest already.
#[derive(Clone)]
pub(crate) struct ManifestBytes(pub(crate) Vec<u8>);

impl fmt::Debug for ManifestBytes {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{} bytes", self.0.len())
    }
}

/// How large a snapshot is, without what it builds on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sizes {
    /// Lengths of its files, in bytes.
    pub apparent_bytes: u64,
    /// What they take on the disk, in bytes.
    pub disk_bytes: u64,
}

impl Snapshot {
    /// The VMM's blob, checked against its hash.
    ///
    /// # Errors
    /// [`Error::Damaged`], [`Error::Io`].
    pub fn state(&self) -> Result<Vec<u8>> {
        let path = self.folder.join(files::STATE);
        let state = self.manifest.state;
        drop(files::open_sized(&path, state.length)?);
        let bytes = files::read_bounded(&path, state.length)?;
        if Digest::of(&bytes) != state.blake3 {
            return Err(Error::damaged(&path, "its hash is not the manifest's"));
        }
        Ok(bytes)
    }

    /// Opens a layer that is kept in this snapshot, its length checked.
    ///
    /// # Errors
    /// [`Error::Damaged`], [`Error::BadRequest`] for an external layer, [`Error::Io`].
    pub fn layer(&self, layer: &Layer) -> Result<File> {
        let Some(file) = &layer.file else {
            return Err(Error::request("an external layer has no file here"));
        };
        files::open_sized(&self.folder.join(file), layer.length)
    }

    /// Checks that one of `trusted` signed this snapshot. To be asked before a VM starts from it,
    /// if the user wants signatures at all.
    ///
    /// # Errors
    /// [`Error::Unsigned`], [`Error::UntrustedKey`], [`Error::BadSignature`].
    pub fn check_signature(&self, trusted: &[PublicKey]) -> Result<()> {
        let signature = self.manifest.signature.as_ref();
        let path = self.folder.join(files::MANIFEST);
        signature::check(&self.bytes.0, signature, trusted, &path)
    }

    /// Keeps the snapshot from being removed for as long as the file lives (a shared lock on the
    /// manifest; a child process can inherit it).
    ///
    /// # Errors
    /// [`Error::NotFound`] when it was removed meanwhile, [`Error::Io`].
    pub fn hold(&self) -> Result<File> {
        hold(&self.folder)
    }

    /// Adds up its files.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sizes(&self) -> Result<Sizes> {
        let folder = &self.folder;
        let mut sizes = Sizes::default();
        for entry in fs::read_dir(folder).at("list", folder)? {
            let entry = entry.at("list", folder)?;
            let metadata = entry.metadata().at("stat", &entry.path())?;
            sizes.apparent_bytes += metadata.len();
            sizes.disk_bytes += metadata.blocks() * 512;
        }
        Ok(sizes)
    }
}

/// As [`Snapshot::hold`], of the one in this folder.
///
/// # Errors
/// See there.
pub fn hold(folder: &Path) -> Result<File> {
    let path = folder.join(files::MANIFEST);
    let gone = || Error::NotFound {
        wanted: folder
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into(),
    };
    loop {
        let file = match File::open(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(gone()),
            other => other.at("open", &path)?,
        };
        flock(&file, FlockOperation::LockShared).at("lock", &path)?;
        // It may have been removed before it was locked, or another one been put in its place.
        let ours = file.metadata().at("stat", &path)?;
        match fs::metadata(&path) {
            Ok(there) if (there.dev(), there.ino()) == (ours.dev(), ours.ino()) => return Ok(file),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(gone()),
            Err(error) => return Err(Error::io("stat", &path, error)),
            Ok(_) => {}
        }
    }
}
