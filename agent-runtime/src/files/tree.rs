//! Whole directories: list, remove, copy.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use ratoon_protocol::{ErrorReply, FileKind, FileList, FileMove, FileRemove, Transferred};
use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, fchmod, fchown,
    fstat, futimens, mkdirat, mknodat, openat, openat2, readlinkat, statat, symlinkat, unlinkat,
};
use rustix::io::Errno;
use serde_json::{Value, json};

use super::glob::Glob;
use super::{
    DIRECTORY, MAX_DEPTH, Place, bad_request, entry, failed, failed_io, kind, link_target, open,
    place, too_deep,
};
use crate::work::{Streams, Work};

/// The names in a directory, in order. There are none in one that was removed meanwhile.
pub(super) fn names(dir: BorrowedFd<'_>) -> rustix::io::Result<Vec<CString>> {
    let mut names = Vec::new();
    let entries = match Dir::read_from(dir) {
        Err(Errno::NOENT) => return Ok(names),
        entries => entries?,
    };
    for entry in entries {
        let entry = match entry {
            Err(Errno::NOENT) => break,
            entry => entry?,
        };
        let name = entry.file_name();
        if name != c"." && name != c".." {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

pub(super) fn shown(name: &CStr) -> String {
    name.to_string_lossy().into_owned()
}

fn transferred(bytes: u64, entries: u64) -> Value {
    json!(Transferred { bytes, entries })
}

/// `file.list`.
pub fn list(params: FileList) -> Work {
    Box::new(move |streams| {
        let glob = params.glob.as_deref().map(Glob::new).transpose();
        let glob = glob.map_err(bad_request)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let dir = open(&params.path, params.root.as_deref(), flags, "list")?;
        let Some(output) = streams.output else {
            return Ok(json!(Transferred::default()));
        };
        let mut lister = Lister {
            out: BufWriter::with_capacity(64 << 10, output),
            glob,
            depth: match params.depth {
                0 => usize::MAX,
                depth => depth as usize,
            },
            bytes: 0,
            entries: 0,
            gone: false,
        };
        let base = match params.path.trim_end_matches('/') {
            "" if params.path.starts_with('/') => String::new(),
            base => base.to_owned(),
        };
        lister.directory(dir.as_fd(), &base, "", 1)?;
        let _ = lister.out.flush();
        Ok(transferred(lister.bytes, lister.entries))
    })
}

struct Lister {
    out: BufWriter<File>,
    glob: Option<Glob>,
    depth: usize,
    bytes: u64,
    entries: u64,
    /// The client takes no more.
    gone: bool,
}

impl Lister {
    fn directory(
        &mut self,
        dir: BorrowedFd<'_>,
        base: &str,
        below: &str,
        depth: usize,
    ) -> Result<(), ErrorReply> {
        if depth > MAX_DEPTH + 1 {
            return Err(too_deep("list", &format!("{base}/{below}")));
        }
        let all = names(dir).map_err(|error| failed("list", &format!("{base}/{below}"), error))?;
        for name in all {
            if self.gone {
                return Ok(());
            }
            // Gone again meanwhile: not there.
            let Ok(stat) = statat(dir, &*name, AtFlags::SYMLINK_NOFOLLOW) else {
                continue;
            };
            let below = match below {
                "" => shown(&name),
                below => format!("{below}/{}", shown(&name)),
            };
            if self.glob.as_ref().is_none_or(|glob| glob.fits(&below)) {
                let target = link_target(dir, &shown(&name), &stat);
                self.line(&entry(format!("{base}/{below}"), &stat, target));
            }
            if kind(&stat) == FileKind::Directory && depth < self.depth {
                // What may not be entered is told and not entered.
                if let Ok(next) = openat(dir, &*name, DIRECTORY, Mode::empty()) {
                    self.directory(next.as_fd(), base, &below, depth + 1)?;
                }
            }
        }
        Ok(())
    }

    fn line(&mut self, entry: &ratoon_protocol::FileEntry) {
        let mut line = serde_json::to_vec(entry).unwrap_or_default();
        line.push(b'\n');
        self.bytes += line.len() as u64;
        self.entries += 1;
        self.gone |= self.out.write_all(&line).is_err();
    }
}

/// `file.remove`.
pub fn remove(params: FileRemove) -> Work {
    Box::new(move |_| {
        const WHAT: &str = "remove";
        let path = params.path.as_str();
        let missing = |error: &ErrorReply| {
            params.missing_ok && error.code == ratoon_protocol::ErrorCode::NotFound
        };
        let there = match place(path, params.root.as_deref(), WHAT) {
            Err(error) if missing(&error) => return Ok(transferred(0, 0)),
            there => there?,
        };
        let name = CString::new(there.name.as_str())
            .map_err(|_| bad_request("a path with a zero byte".into()))?;
        let mut remover = Remover {
            recursive: params.recursive,
            entries: 0,
        };
        match remover.entry(there.parent(), &name, path, 0) {
            Err(error) if missing(&error) => {}
            result => result?,
        }
        Ok(transferred(0, remover.entries))
    })
}

/// Removes a name and, if it is a directory, all below it. Another program may put new files in
/// while that goes on: then it is "not empty" at last.
struct Remover {
    recursive: bool,
    entries: u64,
}

impl Remover {
    fn entry(
        &mut self,
        dir: BorrowedFd<'_>,
        name: &CStr,
        path: &str,
        depth: usize,
    ) -> Result<(), ErrorReply> {
        const WHAT: &str = "remove";
        match unlinkat(dir, name, AtFlags::empty()) {
            Err(Errno::ISDIR) => {}
            // So says POSIX of a directory; Linux says it of a file that is immutable.
            Err(Errno::PERM) if is_directory(dir, name) => {}
            // Somebody else was quicker.
            Err(Errno::NOENT) if depth > 0 => return Ok(()),
            result => {
                result.map_err(|error| failed(WHAT, path, error))?;
                self.entries += 1;
                return Ok(());
            }
        }
        if self.recursive {
            if depth > MAX_DEPTH {
                return Err(too_deep(WHAT, path));
            }
            // The kernel does not enter a mount, be it of the same file system.
            let inside = openat2(dir, name, DIRECTORY, Mode::empty(), ResolveFlags::NO_XDEV)
                .map_err(|error| match error {
                    Errno::XDEV => bad_request(format!(
                        "cannot {WHAT} {}: a file system is mounted there",
                        path.escape_debug()
                    )),
                    error => failed(WHAT, path, error),
                })?;
            for below in names(inside.as_fd()).map_err(|error| failed(WHAT, path, error))? {
                let path = format!("{path}/{}", shown(&below));
                self.entry(inside.as_fd(), &below, &path, depth + 1)?;
            }
        }
        match unlinkat(dir, name, AtFlags::REMOVEDIR) {
            Err(Errno::NOENT) if depth > 0 => return Ok(()),
            result => result.map_err(|error| failed(WHAT, path, error))?,
        }
        self.entries += 1;
        Ok(())
    }
}

fn is_directory(dir: BorrowedFd<'_>, name: &CStr) -> bool {
    statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)
        .is_ok_and(|stat| kind(&stat) == FileKind::Directory)
}

/// `file.copy`.
pub fn copy(params: FileMove) -> Work {
    Box::new(move |streams: Streams| {
        const WHAT: &str = "copy";
        let root = params.root.as_deref();
        let from = place(&params.from, root, WHAT)?;
        let to = place(&params.to, root, WHAT)?;
        let stat = statat(from.parent(), from.name.as_str(), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|error| failed(WHAT, &params.from, error))?;
        if kind(&stat) == FileKind::Directory && !params.recursive {
            return Err(failed(WHAT, &params.from, Errno::ISDIR));
        }
        let found = statat(to.parent(), to.name.as_str(), AtFlags::SYMLINK_NOFOLLOW);
        let replaces = found.is_ok();
        if replaces && (!params.replace || kind(&stat) == FileKind::Directory) {
            return Err(failed(WHAT, &params.to, Errno::EXIST));
        }
        let mut copier = Copier::default();
        // Under another name first: a copy that breaks off is not taken for the whole.
        let name = super::transfer::temporary_name();
        let c_name = CString::new(name.as_str()).unwrap_or_default();
        let from_name = CString::new(from.name.as_str())
            .map_err(|_| bad_request("a path with a zero byte".into()))?;
        let result = copier
            .entry(
                from.parent(),
                &from_name,
                &stat,
                (to.parent(), &c_name),
                &params.from,
                0,
            )
            .and_then(|()| finish(&to, &name, params.replace, &params.to));
        if result.is_err() {
            let mut remover = Remover {
                recursive: true,
                entries: 0,
            };
            let _ = remover.entry(to.parent(), &c_name, &name, 0);
        }
        drop(streams);
        result.map(|()| transferred(copier.bytes, copier.entries))
    })
}

fn finish(to: &Place, name: &str, replace: bool, path: &str) -> Result<(), ErrorReply> {
    use rustix::fs::{RenameFlags, renameat_with};
    let flags = match replace {
        true => RenameFlags::empty(),
        false => RenameFlags::NOREPLACE,
    };
    renameat_with(to.parent(), name, to.parent(), to.name.as_str(), flags)
        .map_err(|error| failed("copy to", path, error))
}

#[derive(Default)]
pub(super) struct Copier {
    bytes: u64,
    entries: u64,
    /// Device and inode of the directory that is made, at the top.
    made: Option<(u64, u64)>,
}

impl Copier {
    pub(super) fn entry(
        &mut self,
        from: BorrowedFd<'_>,
        name: &CStr,
        stat: &Stat,
        to: (BorrowedFd<'_>, &CStr),
        path: &str,
        depth: usize,
    ) -> Result<(), ErrorReply> {
        const WHAT: &str = "copy";
        let (dir, new) = to;
        let refused = |error| failed(WHAT, path, error);
        self.entries += 1;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => self.file(from, name, to).map_err(refused),
            FileType::Directory => {
                if depth > MAX_DEPTH {
                    return Err(too_deep(WHAT, path));
                }
                let source = openat(from, name, DIRECTORY, Mode::empty()).map_err(refused)?;
                let stat = fstat(&source).map_err(refused)?;
                if self.made == Some((stat.st_dev, stat.st_ino)) {
                    let above = path.rsplit_once('/').map_or(path, |(above, _)| above);
                    return Err(bad_request(format!(
                        "cannot {WHAT} a directory into itself: the copy would be in {}",
                        above.escape_debug()
                    )));
                }
                mkdirat(dir, new, Mode::from_raw_mode(0o700)).map_err(refused)?;
                let target = openat(dir, new, DIRECTORY, Mode::empty()).map_err(refused)?;
                if self.made.is_none() {
                    let stat = fstat(&target).map_err(refused)?;
                    self.made = Some((stat.st_dev, stat.st_ino));
                }
                for below in names(source.as_fd()).map_err(refused)? {
                    let path = format!("{path}/{}", shown(&below));
                    let stat = statat(&source, &*below, AtFlags::SYMLINK_NOFOLLOW)
                        .map_err(|error| failed(WHAT, &path, error))?;
                    let to = (target.as_fd(), &*below);
                    self.entry(source.as_fd(), &below, &stat, to, &path, depth + 1)?;
                }
                set(&target, &stat).map_err(refused)
            }
            FileType::Symlink => {
                let target = readlinkat(from, name, Vec::new()).map_err(refused)?;
                symlinkat(&*target, dir, new).map_err(refused)?;
                own(dir, new, stat).map_err(refused)
            }
            FileType::Socket => {
                self.entries -= 1;
                Ok(())
            }
            kind => {
                let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
                mknodat(dir, new, kind, mode, stat.st_rdev).map_err(refused)?;
                own(dir, new, stat).map_err(refused)
            }
        }
    }

    fn file(
        &mut self,
        from: BorrowedFd<'_>,
        name: &CStr,
        (dir, new): (BorrowedFd<'_>, &CStr),
    ) -> rustix::io::Result<()> {
        // It may be a FIFO or device by now: opening must not wait, and what is open counts.
        let flags =
            OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let source = openat(from, name, flags, Mode::empty())?;
        let stat = fstat(&source)?;
        if kind(&stat) != FileKind::File {
            return Err(Errno::INVAL);
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let target = openat(dir, new, flags, Mode::from_raw_mode(0o600))?;
        let (mut source, mut target) = (File::from(source), File::from(target));
        self.bytes += std::io::copy(&mut source, &mut target)
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        set(&target.into(), &stat)
    }
}

fn own(dir: BorrowedFd<'_>, name: &CStr, stat: &Stat) -> rustix::io::Result<()> {
    use rustix::fs::{Gid, Uid, chownat};
    let ids = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    chownat(
        dir,
        name,
        Some(ids.0),
        Some(ids.1),
        AtFlags::SYMLINK_NOFOLLOW,
    )
}

/// Owner, mode and times as `stat` has them. Only root can give files away; others keep them.
fn set(file: &OwnedFd, stat: &Stat) -> rustix::io::Result<()> {
    use rustix::fs::{Gid, Uid};
    let ids = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    match fchown(file, Some(ids.0), Some(ids.1)) {
        Err(Errno::PERM) => {}
        result => result?,
    }
    fchmod(file, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    let time = |seconds, nanoseconds| Timespec {
        tv_sec: seconds,
        tv_nsec: nanoseconds,
    };
    futimens(
        file,
        &Timestamps {
            last_access: time(stat.st_atime, stat.st_atime_nsec as i64),
            last_modification: time(stat.st_mtime, stat.st_mtime_nsec as i64),
        },
    )
}

/// An error of a stream, as the client is to hear it; none when it only takes no more.
pub(super) fn output_failed(path: &str, error: &std::io::Error) -> Result<(), ErrorReply> {
    match error.kind() {
        std::io::ErrorKind::BrokenPipe => Ok(()),
        _ => Err(failed_io("read", path, error)),
    }
}
