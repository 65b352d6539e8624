//! Keys as files: a secret one that only its owner may read, and the public half to hand out.
//!
//! ```text
//! FILE      ratoon-signing-key <64 hexadecimal digits: the seed of RFC 8032>
//! FILE.pub  ratoon-public-key <64 hexadecimal digits>
//! ```
//!
//! A file that is anything else, or a secret that others can read, is [`Error::BadKey`].

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::rand::{GetRandomFlags, getrandom};

use crate::digest::{hex, unhex};
use crate::error::{Context as _, Error, Result};
use crate::files;
use crate::signature::{PublicKey, SigningKey};

const SECRET: &str = "ratoon-signing-key";
const PUBLIC: &str = "ratoon-public-key";
/// A longer file is no key.
const MAX_FILE_BYTES: u64 = 1024;

fn bad(path: &Path, reason: impl Into<String>) -> Error {
    Error::BadKey {
        path: path.to_path_buf(),
        reason: reason.into(),
    }
}

/// The digits after `word` in the file.
fn read(path: &Path, word: &str) -> Result<[u8; 32]> {
    let bytes = match files::read_bounded(path, MAX_FILE_BYTES) {
        Err(Error::Damaged { .. }) => return Err(bad(path, "it is too long, or not a file")),
        other => other?,
    };
    let text = String::from_utf8_lossy(&bytes);
    let mut words = text.split_whitespace();
    let found = words.next().unwrap_or_default();
    let digits = words.next().unwrap_or_default();
    match (found, word) {
        _ if found == word => {}
        (PUBLIC, SECRET) => {
            return Err(bad(path, "it is the public half; signing needs the other"));
        }
        (SECRET, PUBLIC) => {
            let reason =
                "it is the secret half, which need not leave the signer: use its .pub file";
            return Err(bad(path, reason));
        }
        _ => return Err(bad(path, "make one with `ratoon snapshots key new FILE`")),
    }
    unhex(digits).map_err(|reason| bad(path, reason))
}

impl SigningKey {
    /// Makes a key and writes it to a new file that only this user may read; its public half to
    /// `<file>.pub` beside it.
    ///
    /// # Errors
    /// [`Error::Io`] when one of the files is there, or cannot be written.
    pub fn create(path: &Path) -> Result<Self> {
        let mut seed = [0; 32];
        let kernel = Path::new("the kernel");
        getrandom(&mut seed, GetRandomFlags::empty()).at("read randomness from", kernel)?;
        let key = Self::from_seed(&seed);
        let public = public_path(path);
        write_new(path, &format!("{SECRET} {}\n", hex(&seed)), 0o600)?;
        let written = write_new(&public, &format!("{PUBLIC} {}\n", key.public()), 0o644);
        if written.is_err() {
            // Half a pair is no use.
            let _ = fs::remove_file(path);
        }
        written.map(|()| key)
    }

    /// Reads a key that [`SigningKey::create`] wrote.
    ///
    /// # Errors
    /// [`Error::BadKey`], [`Error::Io`].
    pub fn read(path: &Path) -> Result<Self> {
        let mode = fs::metadata(path).at("open", path)?.mode();
        if mode & 0o077 != 0 {
            let reason = format!("others can read it: chmod 600 {}", path.display());
            return Err(bad(path, reason));
        }
        Ok(Self::from_seed(&read(path, SECRET)?))
    }
}

impl PublicKey {
    /// Reads a public key's file.
    ///
    /// # Errors
    /// [`Error::BadKey`], [`Error::Io`].
    pub fn read(path: &Path) -> Result<Self> {
        read(path, PUBLIC).map(Self::from_bytes)
    }
}

/// Where the public half of a key lies.
fn public_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".pub");
    name.into()
}

fn write_new(path: &Path, text: &str, mode: u32) -> Result<()> {
    use std::io::Write as _;
    let mut file = files::create(path)?;
    file.write_all(text.as_bytes()).at("write", path)?;
    file.set_permissions(fs::Permissions::from_mode(mode))
        .at("set the mode of", path)?;
    file.sync_all().at("flush", path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason<T: std::fmt::Debug>(result: Result<T>) -> String {
        match result {
            Err(Error::BadKey { reason, .. }) => reason,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_key_is_read_as_it_was_made_and_never_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        let made = SigningKey::create(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(SigningKey::read(&path).unwrap().public(), made.public());
        let public = public_path(&path);
        assert_eq!(PublicKey::read(&public).unwrap(), made.public());
        match SigningKey::create(&path) {
            Err(Error::Io { source, .. }) => {
                assert_eq!(source.kind(), std::io::ErrorKind::AlreadyExists);
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(SigningKey::read(&path).unwrap().public(), made.public());
    }

    #[test]
    fn the_wrong_half_other_files_and_readable_secrets_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        SigningKey::create(&path).unwrap();
        let public = public_path(&path);
        assert!(reason(PublicKey::read(&path)).contains("secret half"));
        fs::set_permissions(&public, fs::Permissions::from_mode(0o600)).unwrap();
        assert!(reason(SigningKey::read(&public)).contains("public half"));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(reason(SigningKey::read(&path)).contains("chmod 600"));
        let other = folder.path().join("other");
        for text in ["", "ratoon-public-key", "ratoon-public-key 00ff", "x 1"] {
            fs::write(&other, text).unwrap();
            assert!(!reason(PublicKey::read(&other)).is_empty(), "{text:?}");
        }
        fs::write(&other, "x".repeat(2000)).unwrap();
        assert!(reason(PublicKey::read(&other)).contains("too long"));
    }
}
