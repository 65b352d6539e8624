//! Single files, read and written by the loop, a frame at a time.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use ratoon_protocol::{ErrorReply, FileKind, FileRead, FileWrite, Transferred};
use rustix::fs::{
    AtFlags, Mode, OFlags, SeekFrom, fchmod, fstat, openat, renameat, seek, statat, unlinkat,
};

use super::{Owner, Place, bad_request, failed, kind, make_parents, open, place};

/// A file to be sent.
#[derive(Debug)]
pub struct Download {
    /// At the position from which it is read.
    pub file: File,
    /// How many bytes at most.
    pub left: Option<u64>,
}

/// `file.read`: opens the file.
///
/// # Errors
/// When it is not there, or no regular file.
pub fn open_read(params: &FileRead) -> Result<Download, ErrorReply> {
    const WHAT: &str = "read";
    let path = params.path.as_str();
    // A FIFO must not make us wait for a writer.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = open(path, params.root.as_deref(), flags, WHAT)?;
    regular(&file, WHAT, path)?;
    if params.offset > 0 {
        seek(&file, SeekFrom::Start(params.offset)).map_err(|error| failed(WHAT, path, error))?;
    }
    Ok(Download {
        file: file.into(),
        left: params.length,
    })
}

fn regular(file: &OwnedFd, what: &str, path: &str) -> Result<rustix::fs::Stat, ErrorReply> {
    let stat = fstat(file).map_err(|error| failed(what, path, error))?;
    match kind(&stat) {
        FileKind::File => Ok(stat),
        FileKind::Directory => Err(failed(what, path, rustix::io::Errno::ISDIR)),
        _ => Err(no_file(what, path)),
    }
}

fn no_file(what: &str, path: &str) -> ErrorReply {
    let shown = path.escape_debug();
    bad_request(format!("cannot {what} {shown}: it is no regular file"))
}

/// A file that is being written. Dropped before [`Upload::finish`], it leaves nothing under the final
/// name (but for `append` and `offset`, which write into the file as it is).
#[derive(Debug)]
pub struct Upload {
    file: OwnedFd,
    path: String,
    begun_at: u64,
    /// The temporary name, until it is renamed.
    temporary: Option<(Place, String)>,
}

impl std::fmt::Debug for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name)
    }
}

impl Upload {
    /// `file.write`: opens the file, or one beside it that will take its place.
    ///
    /// # Errors
    /// When the path is no place for a file, or the system refuses.
    pub fn begin(params: &FileWrite) -> Result<Self, ErrorReply> {
        const WHAT: &str = "write";
        let path = params.path.as_str();
        let root = params.root.as_deref();
        let owner = Owner::find(params.owner.as_deref())?;
        if params.append && params.offset.is_some() {
            return Err(bad_request("both `append` and `offset`".into()));
        }
        if params.parents {
            make_parents(path, root, owner)?;
        }
        if params.append || params.offset.is_some() {
            return Self::into_file(params, owner);
        }
        let there = place(path, root, WHAT)?;
        let name = there.name.as_str();
        let old = match statat(there.parent(), name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(_) => None,
            Ok(old) => match kind(&old) {
                FileKind::File => Some(old),
                // It is replaced. What it leads to says nothing of the new file: anybody may have
                // made the link.
                FileKind::Symlink => None,
                _ => return Err(no_file(WHAT, path)),
            },
        };
        let name = temporary_name();
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o600);
        let file = openat(there.parent(), name.as_str(), flags, mode)
            .map_err(|error| failed(WHAT, path, error))?;
        let upload = Self {
            file,
            path: path.into(),
            begun_at: 0,
            temporary: Some((there, name)),
        };
        let owner = owner.or(old.map(|old| Owner {
            uid: old.st_uid,
            gid: old.st_gid,
        }));
        let mode = params
            .mode
            .or(old.map(|old| old.st_mode & 0o777))
            .unwrap_or(0o644);
        // The mode after the owner: a change of owner clears setuid.
        let set = match owner {
            Some(Owner { uid: 0, gid: 0 }) | None => Ok(()),
            Some(owner) => owner.take(&upload.file),
        };
        set.and_then(|()| fchmod(&upload.file, Mode::from_raw_mode(mode)))
            .map_err(|error| failed(WHAT, path, error))?;
        Ok(upload)
    }

    fn into_file(params: &FileWrite, owner: Option<Owner>) -> Result<Self, ErrorReply> {
        const WHAT: &str = "write";
        let path = params.path.as_str();
        let root = params.root.as_deref();
        let mut flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
        // Others may write to it at the same time.
        flags.set(OFlags::APPEND, params.append);
        let file = match open(path, root, flags, WHAT) {
            Ok(file) => file,
            Err(error) if error.code == ratoon_protocol::ErrorCode::NotFound => {
                let there = place(path, root, WHAT)?;
                let flags = flags | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                let mode = Mode::from_raw_mode(params.mode.unwrap_or(0o644));
                let file = openat(there.parent(), there.name.as_str(), flags, mode)
                    .map_err(|error| failed(WHAT, path, error))?;
                if let Some(owner) = owner {
                    owner
                        .take(&file)
                        .map_err(|error| failed(WHAT, path, error))?;
                }
                file
            }
            Err(error) => return Err(error),
        };
        regular(&file, WHAT, path)?;
        let position = match params.offset {
            Some(offset) => SeekFrom::Start(offset),
            None => SeekFrom::End(0),
        };
        let begun_at = seek(&file, position).map_err(|error| failed(WHAT, path, error))?;
        Ok(Self {
            file,
            path: path.into(),
            begun_at,
            temporary: None,
        })
    }

    /// Write here, at its own position.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// All has been written: gives the file its name. It is not yet on the disk (`sync` does that).
    ///
    /// # Errors
    /// When the name cannot be given; nothing is left behind then.
    pub fn finish(&mut self) -> Result<Transferred, ErrorReply> {
        const WHAT: &str = "write";
        let end = seek(&self.file, SeekFrom::Current(0))
            .map_err(|error| failed(WHAT, &self.path, error))?;
        if let Some((place, name)) = &self.temporary {
            renameat(
                place.parent(),
                name.as_str(),
                place.parent(),
                place.name.as_str(),
            )
            .map_err(|error| failed(WHAT, &self.path, error))?;
            self.temporary = None;
        }
        Ok(Transferred {
            bytes: end.saturating_sub(self.begun_at),
            entries: 1,
        })
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if let Some((place, name)) = &self.temporary {
            let _ = unlinkat(place.parent(), name.as_str(), AtFlags::empty());
        }
    }
}

/// A name that nobody else uses: of this process, counted.
pub(super) fn temporary_name() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!(
        ".ratoon-{}-{}-{number}",
        std::process::id(),
        crate::sys::boot_time_us()
    )
}
