//! The record that lies beside a disk, and the rules for names and digests.

use std::fs::File;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::{Context, Error, Result};

/// Version of [`ImageConfig`]; raised when a reader could misread a new record.
pub(super) const CONFIG_VERSION: u32 = 1;

/// What a container image says about how to run it; empty for other images.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ContainerConfig {
    /// `NAME=value` pairs.
    pub env: Vec<String>,
    /// `user`, `uid`, `user:group` or `uid:gid`; none means root.
    pub user: Option<String>,
    /// Absolute path in the guest; none means `/`.
    pub workdir: Option<String>,
    /// First part of the command line.
    pub entrypoint: Vec<String>,
    /// Rest of the command line, which a user's command replaces.
    pub cmd: Vec<String>,
}

/// `config.json` of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// Layout version of this record.
    pub version: u32,
    /// 64 hexadecimal digits; docs/images.md says how it is computed.
    pub digest: String,
    /// Size of the disk that the guest sees, in bytes.
    pub size_bytes: u64,
    /// Space that the disk takes on the host, in bytes (the rest is holes).
    pub stored_bytes: u64,
    /// Seconds since 1970.
    pub created_unix_seconds: u64,
    /// Where it came from, for people: `recipe debian (bookworm)`, `docker archive app.tar`.
    pub source: String,
    /// Hash of the recipe or of the source's bytes: the same key is not made twice.
    pub key: String,
    /// From an OCI or docker image.
    #[serde(default)]
    pub container: ContainerConfig,
}

/// An image in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Image {
    /// Its record.
    pub config: ImageConfig,
    /// Names that point at it, sorted; may be empty.
    pub names: Vec<String>,
    /// The read-only disk.
    pub disk: PathBuf,
    /// Whether this call found it ready instead of making it.
    #[serde(skip)]
    pub cached: bool,
}

impl Image {
    /// 64 hexadecimal digits.
    pub fn digest(&self) -> &str {
        &self.config.digest
    }

    /// Opens the disk for reading and takes the shared lock that keeps `remove` away for as long
    /// as this file (or a descriptor made from it, in any process) stays open.
    ///
    /// # Errors
    /// [`Error::NotFound`] when the image was removed meanwhile, [`Error::Io`] otherwise.
    pub fn open_locked(&self) -> Result<File> {
        use std::os::unix::fs::MetadataExt as _;
        let gone = || Error::NotFound {
            wanted: self.config.digest.clone(),
        };
        let file = match File::open(&self.disk) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(gone()),
            other => other.at("open", &self.disk)?,
        };
        match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockShared) {
            // Only `remove` takes the exclusive lock: the image is about to go.
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(gone()),
            other => other.at("lock", &self.disk)?,
        }
        if file.metadata().at("stat", &self.disk)?.nlink() == 0 {
            return Err(gone());
        }
        Ok(file)
    }
}

/// Reads a record.
pub(super) fn read_config(path: &Path) -> Result<ImageConfig> {
    let bytes = std::fs::read(path).at("read", path)?;
    let bad = |reason: String| Error::BadRecord {
        path: path.to_path_buf(),
        reason,
    };
    let config: ImageConfig =
        serde_json::from_slice(&bytes).map_err(|error| bad(error.to_string()))?;
    if config.version != CONFIG_VERSION {
        return Err(bad(format!(
            "version {} is not {CONFIG_VERSION}",
            config.version
        )));
    }
    Ok(config)
}

/// 64 lower-case hexadecimal digits.
pub(super) fn is_digest(text: &str) -> bool {
    text.len() == 64 && is_hex(text)
}

/// Lower-case hexadecimal digits only.
pub(super) fn is_hex(text: &str) -> bool {
    text.bytes()
        .all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// Shortest prefix of a digest that `get` takes; names may not look like one.
pub(super) const MIN_DIGEST_PREFIX: usize = 12;

/// Checks a name against the rules in [`Error::BadName`].
pub(super) fn check_name(name: &str) -> Result<()> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._:-".contains(&byte);
    let sound = (1..=128).contains(&name.len())
        && name.as_bytes()[0].is_ascii_alphanumeric()
        && name.bytes().all(allowed)
        && !(name.len() >= MIN_DIGEST_PREFIX && is_hex(name));
    if sound {
        Ok(())
    } else {
        Err(Error::BadName {
            name: name.to_owned(),
        })
    }
}
