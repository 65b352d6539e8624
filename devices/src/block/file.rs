//! Opening a disk's file: what may be a disk, and who may write it.
//!
//! A file that some VM may write is locked exclusively, one that is only read is locked shared
//! (`flock(2)`, on the open file description: the lock lives as long as the last descriptor, also
//! when that was sent to another process). So no two VMs ever write one file, and none changes a
//! file that another has as its base. The locks bind Ratoon, not other programs.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{
    FallocateFlags, FlockOperation, OFlags, SeekFrom, fallocate, fcntl_getfl, flock, seek,
};
use rustix::io::Errno;

use super::backend::SECTOR_BYTES;

/// Why a disk could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no such file.
    #[error("disk {path:?} does not exist; check the path")]
    Missing {
        /// The disk's file.
        path: PathBuf,
    },
    /// The user may not open the file.
    #[error("no permission to {} disk {path:?}; check its owner and mode", access(*.writable))]
    Permission {
        /// The disk's file.
        path: PathBuf,
        /// Whether writing was asked for.
        writable: bool,
    },
    /// A directory, a pipe, a socket, a terminal.
    #[error(
        "disk {path:?} is {found}, not a file or block device; give the path of a raw disk image"
    )]
    NotADisk {
        /// What was given.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// The size is zero or not a whole number of sectors.
    #[error(
        "disk {path:?} has {len_bytes} bytes, which is not a multiple of 512 above 0; \
         is it a complete raw image?"
    )]
    Size {
        /// The disk's file.
        path: PathBuf,
        /// Its size.
        len_bytes: u64,
    },
    /// Another VM has it.
    #[error(
        "disk {path:?} is in use by another VM{}; \
         stop that VM, or give this one a layer of its own",
        if *.writable { "" } else { ", which writes to it" }
    )]
    Locked {
        /// The disk's file.
        path: PathBuf,
        /// Whether writing was asked for.
        writable: bool,
    },
    /// The layer is the base itself.
    #[error("layer {path:?} is the base image itself; give the layer a file of its own")]
    LayerIsBase {
        /// The layer's path.
        path: PathBuf,
    },
    /// The writable layer is one of the frozen ones below it.
    #[error("layer {path:?} is frozen: it cannot be the writable one too; give a new path")]
    LayerIsFrozen {
        /// The layer's path.
        path: PathBuf,
    },
    /// More layers than can be told apart.
    #[error(
        "the disk of layer {path:?} has more than {} frozen layers; start from an older snapshot",
        super::layered::MAX_FROZEN
    )]
    TooManyLayers {
        /// The path of the layer that would be the next.
        path: PathBuf,
    },
    /// A disk without layers has none to freeze.
    #[error("the disk has no layers, so {path:?} cannot be its next one; give it a layer first")]
    NoLayers {
        /// The path of the layer that was asked for.
        path: PathBuf,
    },
    /// A layer cannot be used read-only: it would be no layer.
    #[error("layer {path:?} was given for a read-only disk; leave out the layer or allow writing")]
    ReadOnlyLayer {
        /// The layer's path.
        path: PathBuf,
    },
    /// The layer was made for another base.
    #[error(
        "layer {path:?} is for a base of {layer_bytes} bytes, but {base:?} has {base_bytes}; \
         give it the image it was made with, or a new layer"
    )]
    LayerMismatch {
        /// The layer's path.
        path: PathBuf,
        /// The base's path.
        base: PathBuf,
        /// The size that the layer says.
        layer_bytes: u64,
        /// The size of the base.
        base_bytes: u64,
    },
    /// The layer's file is no layer, or damaged.
    #[error("layer {path:?} cannot be read; remove it to start from the base again")]
    LayerFormat {
        /// The layer's path.
        path: PathBuf,
        /// What the format's reader says.
        #[source]
        source: io::Error,
    },
    /// The layer could not be made.
    #[error("layer {path:?} cannot be made; check the directory and the space on its disk")]
    LayerCreate {
        /// The layer's path.
        path: PathBuf,
        /// The operating system's word.
        #[source]
        source: io::Error,
    },
    /// Anything else.
    #[error("disk {path:?} cannot be opened")]
    Io {
        /// The disk's file.
        path: PathBuf,
        /// The operating system's word.
        #[source]
        source: io::Error,
    },
}

fn access(writable: bool) -> &'static str {
    if writable { "write" } else { "read" }
}

/// Opens `path` as a disk's file and locks it. Gives the file and its size in bytes, not yet
/// checked to be a whole number of sectors.
pub(super) fn open(path: &Path, writable: bool) -> Result<(File, u64), OpenError> {
    let (file, len_bytes) = open_unlocked(path, writable)?;
    lock(&file, path, writable)?;
    Ok((file, len_bytes))
}

/// As [`open`], without the lock.
pub(super) fn open_unlocked(path: &Path, writable: bool) -> Result<(File, u64), OpenError> {
    let file = match inherited(path) {
        Some(fd) => duplicate(fd, writable),
        None => OpenOptions::new()
            .read(true)
            .write(writable)
            // Opening a pipe must not wait for its other end. Files do not heed the flag.
            .custom_flags(libc::O_NONBLOCK)
            .open(path),
    };
    let file = file.map_err(|source| open_error(path, writable, source))?;
    let len_bytes = check_kind(&file, path)?;
    Ok((file, len_bytes))
}

/// The descriptor that a path of the form `/dev/fd/N` names: one that this process inherited. It is
/// used as it is, so that a jail needs neither the file's name nor a `/proc`.
pub(super) fn inherited(path: &Path) -> Option<RawFd> {
    let number = path.to_str()?.strip_prefix("/dev/fd/")?;
    number.parse().ok().filter(|fd| *fd > 2)
}

/// A descriptor of our own for the same open file.
fn duplicate(fd: RawFd, writable: bool) -> io::Result<File> {
    // SAFETY: the call takes a number and gives a new one; a number that is no open descriptor is
    // an error.
    let own = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    if own < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was made a moment ago, and nobody else knows of it.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(own) });
    let mode = fcntl_getfl(&file)? & OFlags::RWMODE;
    if writable && mode != OFlags::RDWR {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    Ok(file)
}

/// The size in bytes of a regular file or block device; everything else is refused.
pub(super) fn check_kind(file: &File, path: &Path) -> Result<u64, OpenError> {
    let io_error = |source| OpenError::Io {
        path: path.to_owned(),
        source,
    };
    let metadata = file.metadata().map_err(io_error)?;
    let kind = metadata.file_type();
    if kind.is_file() {
        return Ok(metadata.len());
    }
    if kind.is_block_device() {
        return seek(file, SeekFrom::End(0)).map_err(|errno| io_error(errno.into()));
    }
    let found = if kind.is_dir() {
        "a directory"
    } else if kind.is_char_device() {
        "a character device"
    } else if kind.is_fifo() {
        "a pipe"
    } else {
        "a special file"
    };
    Err(OpenError::NotADisk {
        path: path.to_owned(),
        found,
    })
}

/// Takes the lock that the module's text describes.
pub(super) fn lock(file: &File, path: &Path, writable: bool) -> Result<(), OpenError> {
    let operation = if writable {
        FlockOperation::NonBlockingLockExclusive
    } else {
        FlockOperation::NonBlockingLockShared
    };
    match flock(file, operation) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => Err(OpenError::Locked {
            path: path.to_owned(),
            writable,
        }),
        Err(errno) => Err(OpenError::Io {
            path: path.to_owned(),
            source: errno.into(),
        }),
    }
}

/// Refuses a size that is no disk's.
pub(super) fn check_size(len_bytes: u64, path: &Path) -> Result<(), OpenError> {
    if len_bytes == 0 || !len_bytes.is_multiple_of(SECTOR_BYTES) {
        return Err(OpenError::Size {
            path: path.to_owned(),
            len_bytes,
        });
    }
    Ok(())
}

/// Changes a range's space without changing the file's length (`fallocate(2)`); false if the file
/// system does not know `flags`. No bytes are nothing to do, though `fallocate` refuses them.
pub(super) fn allocate(
    file: &File,
    flags: FallocateFlags,
    offset: u64,
    len_bytes: u64,
) -> io::Result<bool> {
    if len_bytes == 0 {
        return Ok(true);
    }
    loop {
        match fallocate(file, flags | FallocateFlags::KEEP_SIZE, offset, len_bytes) {
            Ok(()) => return Ok(true),
            Err(Errno::INTR) => {}
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(false),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Whether both are one file.
pub(super) fn same_file(one: &File, other: &File) -> io::Result<bool> {
    let (one, other) = (one.metadata()?, other.metadata()?);
    Ok((one.dev(), one.ino()) == (other.dev(), other.ino()))
}

fn open_error(path: &Path, writable: bool, source: io::Error) -> OpenError {
    let path = path.to_owned();
    match source.kind() {
        io::ErrorKind::NotFound => OpenError::Missing { path },
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            OpenError::Permission { path, writable }
        }
        // The kernel says so when a directory is opened for writing.
        io::ErrorKind::IsADirectory => OpenError::NotADisk {
            path,
            found: "a directory",
        },
        _ => OpenError::Io { path, source },
    }
}
