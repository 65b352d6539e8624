//! What can go wrong with a snapshot: each error names the thing, the place and the remedy.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A snapshot operation failed. Whichever it was, snapshots that were there before still are.
#[derive(Debug, Error)]
pub enum Error {
    /// A system call on a host file failed.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// No room left. What was being written is gone again.
    #[error(
        "the disk that holds {} is full: free some space, or remove old snapshots \
         (`ratoon snapshots` lists them)",
        path.display()
    )]
    DiskFull {
        /// A path on the full disk.
        path: PathBuf,
    },
    /// The caller's [`Progress::cancelled`](crate::Progress::cancelled) said so.
    #[error("stopped on request; nothing was kept")]
    Cancelled,
    /// No snapshot of that name or id.
    #[error("no snapshot `{wanted}`: `ratoon snapshots` lists them")]
    NotFound {
        /// What was asked for.
        wanted: String,
    },
    /// An id was shortened too far.
    #[error("`{wanted}` is the start of {count} ids: give more of it")]
    Ambiguous {
        /// What was asked for.
        wanted: String,
        /// How many snapshots it could mean.
        count: usize,
    },
    /// A name that cannot be a file name or could be taken for an id.
    #[error(
        "`{name}` cannot name a snapshot: use 1 to 128 of a-z A-Z 0-9 . _ : - with a letter or \
         digit first, not 12 or more hexadecimal digits alone"
    )]
    BadName {
        /// What was asked for.
        name: String,
    },
    /// The name belongs to another snapshot.
    #[error(
        "the name `{name}` is taken by snapshot {id}: choose another name, or remove that one first"
    )]
    NameTaken {
        /// What was asked for.
        name: String,
        /// The snapshot that has the name.
        id: String,
    },
    /// A VM holds the snapshot open.
    #[error("snapshot {id} is in use: stop the VMs that were restored from it first")]
    InUse {
        /// The snapshot.
        id: String,
    },
    /// Others build on the snapshot.
    #[error("snapshot {id} is needed by {by}: remove that first")]
    Needed {
        /// The snapshot.
        id: String,
        /// The snapshots that build on it: ids and names, joined.
        by: String,
    },
    /// What a snapshot builds on is not in the store.
    #[error(
        "{}: its {what} {digest} is not in this store: import the snapshot that holds it first",
        path.display()
    )]
    MissingBase {
        /// The snapshot's folder, or the file it comes from.
        path: PathBuf,
        /// Base memory or base layer.
        what: &'static str,
        /// Its content.
        digest: String,
    },
    /// Written by a newer Ratoon.
    #[error(
        "{} has snapshot format {found} (written by Ratoon {writer}); this Ratoon reads format \
         {known} and older: upgrade Ratoon",
        path.display()
    )]
    NewerFormat {
        /// The manifest or index.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// The newest format known here.
        known: u32,
        /// The version that wrote it.
        writer: String,
    },
    /// A file of a snapshot is not what was written.
    #[error(
        "{} is damaged: {reason}; use another snapshot, or import this one again",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A chunk of memory is not what was written.
    #[error(
        "{}: chunk {chunk} is damaged: {reason}; use another snapshot, or import this one again",
        path.display()
    )]
    DamagedChunk {
        /// The file.
        path: PathBuf,
        /// Which chunk, from 0.
        chunk: u64,
        /// What is wrong.
        reason: String,
    },
    /// A snapshot belongs to another user, who could change it underneath us.
    #[error(
        "{} belongs to user {owner}: export it as that user and import the file",
        path.display()
    )]
    ForeignOwner {
        /// The snapshot's folder.
        path: PathBuf,
        /// The owner's uid.
        owner: u32,
    },
    /// A signature was asked for and there is none.
    #[error("{} has no signature: have it signed by a key you trust", path.display())]
    Unsigned {
        /// The manifest.
        path: PathBuf,
    },
    /// The signature is by a key that the caller does not trust.
    #[error("{} is signed by {key}, which is not among the trusted keys", path.display())]
    UntrustedKey {
        /// The manifest.
        path: PathBuf,
        /// The key, in hexadecimal.
        key: String,
    },
    /// The signature does not fit the manifest.
    #[error(
        "{}: its signature does not fit its content: do not use it; fetch it again from where it \
         was signed",
        path.display()
    )]
    BadSignature {
        /// The manifest.
        path: PathBuf,
    },
    /// A file that should hold a key.
    #[error("{} is no key: {reason}", path.display())]
    BadKey {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
    /// The caller asked for what no snapshot can hold.
    #[error("this snapshot cannot be written: {reason}")]
    BadRequest {
        /// What is wrong and what to do.
        reason: String,
    },
}

impl Error {
    /// Wraps an I/O error; full disks and our own errors that travelled through a reader come out
    /// as themselves.
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        let source = match source.downcast::<Self>() {
            Ok(inner) => return inner,
            Err(source) => source,
        };
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull {
                path: path.to_path_buf(),
            },
            _ => Self::Io {
                action,
                path: path.to_path_buf(),
                source,
            },
        }
    }

    pub(crate) fn damaged(path: &Path, reason: impl Into<String>) -> Self {
        Self::Damaged {
            path: path.to_path_buf(),
            reason: reason.into(),
        }
    }

    pub(crate) fn request(reason: impl Into<String>) -> Self {
        Self::BadRequest {
            reason: reason.into(),
        }
    }
}

/// Adds the action and the path to an I/O result.
pub(crate) trait Context<T> {
    /// Names the action and the path.
    fn at(self, action: &'static str, path: &Path) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn at(self, action: &'static str, path: &Path) -> Result<T> {
        self.map_err(|source| Error::io(action, path, source))
    }
}

impl<T> Context<T> for rustix::io::Result<T> {
    fn at(self, action: &'static str, path: &Path) -> Result<T> {
        self.map_err(|errno| Error::io(action, path, errno.into()))
    }
}
