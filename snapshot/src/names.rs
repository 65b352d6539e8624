//! Names of snapshots: small files `names/<name>` that hold an id.

use std::fs;
use std::path::{Path, PathBuf};

use crate::digest::Digest;
use crate::error::{Context as _, Error, Result};
use crate::files;
use crate::snapshot::Snapshot;
use crate::store::Store;

/// The folder within the store.
pub(crate) const NAMES: &str = "names";
/// An id can be shortened to this many digits; a name cannot look like that.
const MIN_ID_PREFIX: usize = 12;

impl Store {
    /// Gives a snapshot one more name. A name of another snapshot moves only when `take` says so.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::BadName`], [`Error::NameTaken`], [`Error::Io`],
    /// [`Error::DiskFull`].
    pub fn set_name(&self, wanted: &str, name: &str, take: bool) -> Result<Snapshot> {
        let _lock = self.lock()?;
        let id = self.resolve(wanted)?;
        check_name(name)?;
        if !take {
            self.check_free(name, id)?;
        }
        Pointer::write(&self.root().join(NAMES), name, id)?.place()?;
        self.load(id)
    }

    /// All names that hold an id, sorted, with it. The snapshot need not be there.
    pub(crate) fn names(&self) -> Result<Vec<(String, Digest)>> {
        let folder = self.root().join(NAMES);
        let mut names = Vec::new();
        for entry in fs::read_dir(&folder).at("list", &folder)? {
            let name = entry.at("list", &folder)?.file_name();
            if let Ok(name) = name.into_string()
                && check_name(&name).is_ok()
                && let Some(id) = self.read_name(&name)?
            {
                names.push((name, id));
            }
        }
        names.sort();
        Ok(names)
    }

    fn read_name(&self, name: &str) -> Result<Option<Digest>> {
        match files::read_bounded(&self.root().join(NAMES).join(name), 128) {
            Ok(bytes) => Ok(std::str::from_utf8(&bytes)
                .ok()
                .and_then(|text| text.trim_end().parse().ok())),
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                Ok(None)
            }
            Err(Error::Damaged { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn resolve(&self, wanted: &str) -> Result<Digest> {
        let missing = || Error::NotFound {
            wanted: wanted.to_owned(),
        };
        if check_name(wanted).is_ok() {
            return self
                .read_name(wanted)?
                .filter(|id| self.folder(*id).is_dir())
                .ok_or_else(missing);
        }
        if wanted.len() < MIN_ID_PREFIX {
            return Err(missing());
        }
        let mut found = self.ids()?;
        found.retain(|id| id.to_string().starts_with(wanted));
        match found.as_slice() {
            [] => Err(missing()),
            [id] => Ok(*id),
            several => Err(Error::Ambiguous {
                wanted: wanted.to_owned(),
                count: several.len(),
            }),
        }
    }

    fn check_free(&self, name: &str, id: Digest) -> Result<()> {
        match self.read_name(name)? {
            Some(taken) if taken != id && self.folder(taken).is_dir() => Err(Error::NameTaken {
                name: name.to_owned(),
                id: taken.to_string(),
            }),
            _ => Ok(()),
        }
    }

    /// Whether this snapshot can have this name, as things are now.
    pub(crate) fn check_name(&self, name: &str, id: Digest) -> Result<()> {
        check_name(name)?;
        self.check_free(name, id)
    }

    /// Writes a name beside its place. The caller holds the lock.
    pub(crate) fn prepare_name(&self, name: &str, id: Digest) -> Result<Pointer> {
        self.check_name(name, id)?;
        Pointer::write(&self.root().join(NAMES), name, id)
    }
}

/// A name that can stand on a command line and be a file, and cannot be taken for an id.
fn check_name(name: &str) -> Result<()> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._:-".contains(&byte);
    let is_id = name.len() >= MIN_ID_PREFIX && name.bytes().all(|byte| byte.is_ascii_hexdigit());
    let sound = (1..=128).contains(&name.len())
        && name.as_bytes()[0].is_ascii_alphanumeric()
        && name.bytes().all(plain)
        && !is_id;
    if sound {
        return Ok(());
    }
    Err(Error::BadName {
        name: name.to_owned(),
    })
}

/// A name, written and flushed, that still has to get its place.
pub(crate) struct Pointer {
    temporary: PathBuf,
    place: PathBuf,
}

impl Pointer {
    fn write(folder: &Path, name: &str, id: Digest) -> Result<Self> {
        let pointer = Self {
            temporary: folder.join(files::temporary_name()?),
            place: folder.join(name),
        };
        files::write_sealed(&pointer.temporary, id.to_string().as_bytes())?;
        Ok(pointer)
    }

    pub(crate) fn place(self) -> Result<()> {
        fs::rename(&self.temporary, &self.place).at("write", &self.place)?;
        files::sync_folder(self.place.parent().unwrap_or(&self.place))
    }
}

impl Drop for Pointer {
    fn drop(&mut self) {
        // There is nothing once it has its place.
        let _ = fs::remove_file(&self.temporary);
    }
}
