//! What can go wrong with an image: each error names the thing, the place and the remedy.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Result of this module.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An image operation failed. Nothing half-made is left in the store, whichever it was.
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
    /// The disk that holds the store (or `/tmp`, for a build) has no room left.
    #[error(
        "the disk that holds {} is full: free some space, or point XDG_CACHE_HOME at a larger disk",
        path.display()
    )]
    DiskFull {
        /// A path on the full disk.
        path: PathBuf,
    },
    /// A program that this work needs is not installed.
    #[error("{tool} is not installed: install it with `apt install {package}`")]
    MissingTool {
        /// The program.
        tool: &'static str,
        /// Debian's package that has it.
        package: &'static str,
    },
    /// A program that this work needs ended with an error.
    #[error("{tool} failed ({status}): {detail}")]
    ToolFailed {
        /// The program.
        tool: &'static str,
        /// Its exit status or signal.
        status: String,
        /// Its last lines of output.
        detail: String,
    },
    /// The caller's [`Progress::cancelled`](super::Progress::cancelled) said so.
    #[error("stopped on request; nothing was kept")]
    Cancelled,
    /// No recipe of that name.
    #[error("no recipe `{recipe}`: the recipes are debian, debian-dev")]
    UnknownRecipe {
        /// What was asked for.
        recipe: String,
    },
    /// No image of that name or digest.
    #[error(
        "no image `{wanted}`: `ratoon image ls` lists them, `ratoon image build debian` makes one"
    )]
    NotFound {
        /// What was asked for.
        wanted: String,
    },
    /// A digest was shortened too far.
    #[error("`{wanted}` is the start of {count} digests: give more of it")]
    Ambiguous {
        /// What was asked for.
        wanted: String,
        /// How many images it could mean.
        count: usize,
    },
    /// A name that cannot be a file name or could be taken for a digest.
    #[error(
        "`{name}` cannot name an image: use 1 to 128 of a-z A-Z 0-9 . _ : - with a letter or \
         digit first, not 12 or more hexadecimal digits alone"
    )]
    BadName {
        /// What was asked for.
        name: String,
    },
    /// The name belongs to a recipe.
    #[error("`{name}` is the name of a recipe: import under another name")]
    ReservedName {
        /// What was asked for.
        name: String,
    },
    /// The name belongs to another image.
    #[error(
        "the name `{name}` is taken by image {digest}: choose another name, or remove that image \
         first with `ratoon image rm {name}`"
    )]
    NameTaken {
        /// What was asked for.
        name: String,
        /// The image that has the name.
        digest: String,
    },
    /// A running VM reads the image.
    #[error("image {digest} is in use by a VM: stop that VM first (`ratoon ps`)")]
    InUse {
        /// The image.
        digest: String,
    },
    /// Snapshots stand on the image.
    #[error(
        "image {digest} is needed by {by}: remove those first (`ratoon snapshots rm`), or use --force"
    )]
    Needed {
        /// The image.
        digest: String,
        /// The snapshots, joined.
        by: String,
    },
    /// Asked to remove by digest what several names share.
    #[error("image {digest} has the names {names}: remove those, or use --force")]
    SeveralNames {
        /// The image.
        digest: String,
        /// Its names, joined.
        names: String,
    },
    /// The store's own record of an image cannot be used.
    #[error("the store's record {} is damaged: {reason}; remove the image and make it again", path.display())]
    BadRecord {
        /// The record.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The source is none of the formats we know.
    #[error(
        "{} is not an image we can read ({reason}): give a root file system folder, a tar, a raw \
         ext4 file, an OCI layout or a docker-archive tar (docs/images.md)",
        path.display()
    )]
    UnknownFormat {
        /// The source.
        path: PathBuf,
        /// What was seen.
        reason: String,
    },
    /// The source is not what `--kind` claims.
    #[error("{} is not {expected}: {reason}", path.display())]
    WrongKind {
        /// The source.
        path: PathBuf,
        /// What was asked for.
        expected: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// The archive breaks off or does not parse.
    #[error("{archive} is damaged at byte {offset}: {reason}; fetch or export it again")]
    DamagedArchive {
        /// Which file or layer.
        archive: String,
        /// Place, in bytes of the unpacked tar.
        offset: u64,
        /// What is wrong.
        reason: String,
    },
    /// The archive is well formed but holds something that we refuse.
    #[error("{archive} holds `{entry}`, refused: {reason}")]
    RefusedEntry {
        /// Which file or layer.
        archive: String,
        /// The entry's name, lossy.
        entry: String,
        /// Which rule it breaks and what to do.
        reason: String,
    },
    /// A limit against decompression bombs was passed.
    #[error("{archive} is over the limit of {limit} {what}: is it a decompression bomb?")]
    OverLimit {
        /// Which file or layer.
        archive: String,
        /// What is limited, with the unit.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// A blob is not what its digest says.
    #[error(
        "{archive}: blob {digest} does not match its {what} (found {found}): fetch the image again"
    )]
    DigestMismatch {
        /// The image.
        archive: String,
        /// The blob's digest in the manifest.
        digest: String,
        /// Digest, size or diff id.
        what: &'static str,
        /// What the bytes give.
        found: String,
    },
    /// A manifest, index or config cannot be used.
    #[error("{archive}: {reason}")]
    BadManifest {
        /// The image.
        archive: String,
        /// What is wrong and what to do.
        reason: String,
    },
    /// A raw ext4 file fails its checks.
    #[error("{} is not a sound ext4 file system: {reason}", path.display())]
    BadExt4 {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
}

impl Error {
    /// Wraps an I/O error; full disks and our own errors that travelled through a reader come out
    /// as themselves.
    pub(super) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        if source.get_ref().is_some_and(|inner| inner.is::<Error>()) {
            if let Some(Ok(inner)) = source.into_inner().map(|inner| inner.downcast::<Error>()) {
                return *inner;
            }
            // Not reached: the check above saw the inner error.
            return Self::Cancelled;
        }
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

    /// Sends this error through a `Read` implementation; [`Error::io`] takes it out again.
    pub(super) fn into_io(self) -> io::Error {
        io::Error::other(self)
    }
}

/// Adds the action and the path to an I/O result.
pub(super) trait Context<T> {
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
