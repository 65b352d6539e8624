//! Scratch folders that never outlive their owner for long.
//!
//! `tmp/<id>/` belongs to whoever holds the lock on `tmp/<id>.lock`. Dropping the [`Scratch`]
//! removes both; a killed process drops only the lock, and [`sweep`] removes what nobody holds.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{FlockOperation, flock};

use super::error::{Context, Result};

/// A private folder (mode 0700) in the store, removed when dropped.
#[derive(Debug)]
pub(super) struct Scratch {
    path: PathBuf,
    lock_path: PathBuf,
    _lock: File,
}

impl Scratch {
    /// Makes a new one under `parent`.
    pub(super) fn create(parent: &Path) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        loop {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let id = format!("{}-{number}", std::process::id());
            let path = parent.join(&id);
            let lock_path = parent.join(format!("{id}.lock"));
            let opened = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&lock_path);
            let lock = match opened {
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => continue,
                other => other.at("create", &lock_path)?,
            };
            flock(&lock, FlockOperation::LockExclusive).at("lock", &lock_path)?;
            // A sweeper may have taken and removed the file between our open and our lock.
            if !is_same_file(&lock, &lock_path) {
                continue;
            }
            fs::DirBuilder::new()
                .mode(0o700)
                .create(&path)
                .at("create", &path)?;
            return Ok(Self {
                path,
                lock_path,
                _lock: lock,
            });
        }
    }

    /// The folder.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Nothing to do about a failure here: the next sweep tries again.
        let _ = remove_tree(&self.path);
        let _ = fs::remove_file(&self.lock_path);
    }
}

/// Whether `path` still names the open `file`.
fn is_same_file(file: &File, path: &Path) -> bool {
    let Ok(ours) = file.metadata() else {
        return false;
    };
    fs::symlink_metadata(path).is_ok_and(|now| ours.ino() == now.ino())
}

/// Removes a folder whatever the modes inside are.
fn remove_tree(path: &Path) -> std::io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Removes the scratch folders whose owners are gone; returns how many.
pub(super) fn sweep(parent: &Path) -> Result<usize> {
    let mut swept = 0;
    for entry in fs::read_dir(parent).at("list", parent)? {
        let lock_path = entry.at("list", parent)?.path();
        if lock_path
            .extension()
            .is_none_or(|extension| extension != "lock")
        {
            continue;
        }
        let Ok(lock) = File::open(&lock_path) else {
            continue; // Its owner finished just now.
        };
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            continue;
        }
        // Its owner may have finished, and another may have taken the same name, before our lock.
        if !is_same_file(&lock, &lock_path) {
            continue;
        }
        let folder = lock_path.with_extension("");
        remove_tree(&folder).at("remove", &folder)?;
        match fs::remove_file(&lock_path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            other => other.at("remove", &lock_path)?,
        }
        swept += 1;
    }
    Ok(swept)
}
