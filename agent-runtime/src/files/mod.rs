//! Files and trees: the calls `file.*` and `tree.*`.
//!
//! ```text
//!   at once:            stat  mkdir  rename
//!   by the loop:        open_read, Upload        (one read or write a frame)
//!   on a thread:        list  remove  copy  watch  pack  unpack
//! ```
//!
//! Programs of the guest may change a tree while it is worked on. So trees are walked by directory
//! descriptors, never following a symlink on the way down: a link that is swapped in leads nowhere.
//! A `root` is kept by the kernel (openat2, RESOLVE_IN_ROOT).
//!
//! Walks go down by recursion, no deeper than [`MAX_DEPTH`]: it is the guest that makes the trees.
//!
//! How it fails: an [`ErrorReply`] with the path and the system's reason.

mod archive;
pub mod glob;
mod transfer;
mod tree;
mod watch;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use ratoon_protocol::{ErrorCode, ErrorReply, FileEntry, FileKind, FileMkdir, FileMove, FilePath};
use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, RenameFlags, ResolveFlags, Stat, Uid, chownat,
    fchmod, fchown, mkdirat, openat, openat2, readlinkat, renameat, renameat_with, statat,
};
use rustix::io::Errno;

pub use archive::{pack, unpack};
pub use transfer::{Download, Upload, open_read};
pub use tree::{copy, list, remove};
pub use watch::watch;

use crate::users;

/// How many directories deep a tree may be: each level holds a descriptor and a piece of the stack.
pub const MAX_DEPTH: usize = 100;

/// How long a path may be, in bytes (PATH_MAX of the kernel).
const MAX_PATH: usize = 4096;

/// Flags with which directories of a tree are opened.
const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// The system's refusal of something about a path, as the client is to hear it.
fn failed(what: &str, path: &str, error: Errno) -> ErrorReply {
    let code = match error {
        Errno::NOENT | Errno::NOTDIR => ErrorCode::NotFound,
        Errno::ACCESS | Errno::PERM | Errno::ROFS => ErrorCode::PermissionDenied,
        Errno::EXIST | Errno::NOTEMPTY => ErrorCode::Exists,
        Errno::NOSPC | Errno::DQUOT | Errno::FBIG | Errno::NOMEM | Errno::MFILE => {
            ErrorCode::NoSpace
        }
        Errno::OPNOTSUPP | Errno::NOSYS => ErrorCode::Unsupported,
        Errno::ISDIR | Errno::INVAL | Errno::NAMETOOLONG | Errno::LOOP => ErrorCode::BadRequest,
        _ => ErrorCode::Failed,
    };
    ErrorReply::new(
        code,
        format!("cannot {what} {}: {error}", path.escape_debug()),
    )
}

/// As [`failed`], of the standard library's errors.
fn failed_io(what: &str, path: &str, error: &std::io::Error) -> ErrorReply {
    match error.raw_os_error() {
        Some(code) => failed(what, path, Errno::from_raw_os_error(code)),
        None => {
            let message = format!("cannot {what} {}: {error}", path.escape_debug());
            ErrorReply::new(ErrorCode::Failed, message)
        }
    }
}

fn bad_request(message: String) -> ErrorReply {
    ErrorReply::new(ErrorCode::BadRequest, message)
}

/// Refuses a directory below which nothing is looked at.
fn too_deep(what: &str, path: &str) -> ErrorReply {
    let shown = path.escape_debug();
    bad_request(format!(
        "cannot {what} {shown}: it is more than {MAX_DEPTH} directories deep"
    ))
}

fn not_too_long(what: &str, path: &str) -> Result<(), ErrorReply> {
    match path.len() > MAX_PATH {
        true => Err(bad_request(format!(
            "cannot {what} a path of {} bytes: it may have {MAX_PATH}",
            path.len()
        ))),
        false => Ok(()),
    }
}

/// Opens a path, below `root` if there is one.
fn open(path: &str, root: Option<&str>, flags: OFlags, what: &str) -> Result<OwnedFd, ErrorReply> {
    not_too_long(what, path)?;
    let flags = flags | OFlags::CLOEXEC;
    let result = match root {
        None => openat(CWD, path, flags, Mode::empty()),
        Some(root) => {
            let root = open(
                root,
                None,
                OFlags::PATH | OFlags::DIRECTORY,
                "enter the root",
            )?;
            openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT)
        }
    };
    result.map_err(|error| failed(what, path, error))
}

/// A place in a directory: what is there is named, not followed.
struct Place {
    parent: OwnedFd,
    name: String,
}

impl Place {
    fn parent(&self) -> BorrowedFd<'_> {
        self.parent.as_fd()
    }
}

/// Finds the directory above a path. `.` and `..` are no names of places.
fn place(path: &str, root: Option<&str>, what: &str) -> Result<Place, ErrorReply> {
    not_too_long(what, path)?;
    let trimmed = path.trim_end_matches('/');
    let (above, name) = match trimmed.rsplit_once('/') {
        Some(("", name)) => ("/", name),
        Some((above, name)) => (above, name),
        None => (".", trimmed),
    };
    if name.is_empty() || name == "." || name == ".." {
        let shown = path.escape_debug();
        return Err(bad_request(format!(
            "cannot {what} {shown}: it names no entry of a directory"
        )));
    }
    let parent = open(above, root, OFlags::PATH | OFlags::DIRECTORY, what)?;
    Ok(Place {
        parent,
        name: name.into(),
    })
}

/// Makes the directories of a path that are missing.
fn make_parents(path: &str, root: Option<&str>, owner: Option<Owner>) -> Result<(), ErrorReply> {
    const WHAT: &str = "make directory";
    not_too_long(WHAT, path)?;
    let mut missing = Vec::new();
    let mut rest = path;
    while let Some((above, _)) = rest.trim_end_matches('/').rsplit_once('/')
        && !above.is_empty()
        && open(above, root, OFlags::PATH | OFlags::DIRECTORY, "enter").is_err()
    {
        if missing.len() == MAX_DEPTH {
            return Err(too_deep(WHAT, path));
        }
        missing.push(above);
        rest = above;
    }
    for above in missing.into_iter().rev() {
        let there = place(above, root, WHAT)?;
        let name = there.name.as_str();
        match mkdirat(there.parent(), name, Mode::from_raw_mode(0o755)) {
            Ok(()) => give(there.parent(), name, owner)
                .map_err(|error| failed("give away", above, error))?,
            Err(Errno::EXIST) => {}
            Err(error) => return Err(failed(WHAT, above, error)),
        }
    }
    Ok(())
}

/// Who something will belong to.
#[derive(Debug, Clone, Copy)]
struct Owner {
    uid: u32,
    gid: u32,
}

impl Owner {
    fn find(spec: Option<&str>) -> Result<Option<Self>, ErrorReply> {
        let Some(spec) = spec else { return Ok(None) };
        if spec == "root" {
            return Ok(Some(Self { uid: 0, gid: 0 }));
        }
        let user = users::find(spec, Path::new("/etc"))
            .map_err(|error| ErrorReply::new(ErrorCode::NotFound, error.to_string()))?;
        Ok(Some(Self {
            uid: user.uid,
            gid: user.gid,
        }))
    }

    fn ids(self) -> (Option<Uid>, Option<Gid>) {
        (Some(Uid::from_raw(self.uid)), Some(Gid::from_raw(self.gid)))
    }

    fn take(self, file: impl AsFd) -> rustix::io::Result<()> {
        let (uid, gid) = self.ids();
        fchown(file, uid, gid)
    }
}

fn give(parent: BorrowedFd<'_>, name: &str, owner: Option<Owner>) -> rustix::io::Result<()> {
    let Some(owner) = owner else { return Ok(()) };
    let (uid, gid) = owner.ids();
    chownat(parent, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)
}

fn kind(stat: &Stat) -> FileKind {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => FileKind::File,
        FileType::Directory => FileKind::Directory,
        FileType::Symlink => FileKind::Symlink,
        _ => FileKind::Other,
    }
}

fn entry(path: String, stat: &Stat, target: Option<String>) -> FileEntry {
    FileEntry {
        path,
        kind: kind(stat),
        size: stat.st_size as u64,
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        modified_us: stat.st_mtime * 1_000_000 + stat.st_mtime_nsec as i64 / 1000,
        target,
    }
}

fn link_target(parent: impl AsFd, name: &str, stat: &Stat) -> Option<String> {
    (kind(stat) == FileKind::Symlink)
        .then(|| readlinkat(parent, name, Vec::new()).ok())
        .flatten()
        .map(|target| target.to_string_lossy().into_owned())
}

/// `file.stat`.
///
/// # Errors
/// When there is no such file, or the way to it is closed.
pub fn stat(params: &FilePath) -> Result<FileEntry, ErrorReply> {
    const WHAT: &str = "look at";
    let root = params.root.as_deref();
    let path = params.path.as_str();
    let at_end = path.trim_end_matches('/');
    if params.follow || at_end.is_empty() || at_end.ends_with('.') {
        let file = open(path, root, OFlags::PATH, WHAT)?;
        let stat = rustix::fs::fstat(file).map_err(|error| failed(WHAT, path, error))?;
        return Ok(entry(path.into(), &stat, None));
    }
    let there = place(path, root, WHAT)?;
    let stat = statat(
        there.parent(),
        there.name.as_str(),
        AtFlags::SYMLINK_NOFOLLOW,
    )
    .map_err(|error| failed(WHAT, path, error))?;
    let target = link_target(there.parent(), &there.name, &stat);
    Ok(entry(path.into(), &stat, target))
}

/// `file.mkdir`.
///
/// # Errors
/// When something is there already (with `parents`: something else than a directory), or it cannot
/// be made.
pub fn mkdir(params: &FileMkdir) -> Result<(), ErrorReply> {
    const WHAT: &str = "make directory";
    let root = params.root.as_deref();
    let path = params.path.as_str();
    let owner = Owner::find(params.owner.as_deref())?;
    if params.parents {
        make_parents(path, root, owner)?;
        if open(path, root, OFlags::PATH | OFlags::DIRECTORY, WHAT).is_ok() {
            return Ok(());
        }
    }
    let there = place(path, root, WHAT)?;
    mkdirat(
        there.parent(),
        there.name.as_str(),
        Mode::from_raw_mode(0o700),
    )
    .map_err(|error| failed(WHAT, path, error))?;
    let made = openat(
        there.parent(),
        there.name.as_str(),
        DIRECTORY,
        Mode::empty(),
    );
    let set = made.and_then(|made| {
        if let Some(owner) = owner {
            owner.take(&made)?;
        }
        fchmod(&made, Mode::from_raw_mode(params.mode.unwrap_or(0o755)))
    });
    set.map_err(|error| failed(WHAT, path, error))
}

/// `file.rename`.
///
/// # Errors
/// When `to` is there and may not be replaced, or the system refuses.
pub fn rename(params: &FileMove) -> Result<(), ErrorReply> {
    const WHAT: &str = "rename";
    let root = params.root.as_deref();
    let from = place(&params.from, root, WHAT)?;
    let to = place(&params.to, root, WHAT)?;
    let (old, new) = (from.name.as_str(), to.name.as_str());
    let result = match params.replace {
        true => renameat(from.parent(), old, to.parent(), new),
        false => renameat_with(from.parent(), old, to.parent(), new, RenameFlags::NOREPLACE),
    };
    result.map_err(|error| failed(WHAT, &format!("{} to {}", params.from, params.to), error))
}

#[cfg(test)]
mod tests;
