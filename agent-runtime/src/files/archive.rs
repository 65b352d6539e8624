//! Trees as tar archives, out and in.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;

use ratoon_protocol::{ErrorReply, Transferred, TreePack, TreeUnpack};
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, chownat, fchmod, fchown,
    futimens, linkat, mkdirat, mknodat, openat, readlinkat, statat, symlinkat, unlinkat,
};
use rustix::io::Errno;
use serde_json::json;
use tar::{EntryType, Header};

use super::tree::{names, output_failed};
use super::{
    DIRECTORY, MAX_DEPTH, Owner, bad_request, failed, failed_io, make_parents, open, place,
    too_deep,
};
use crate::work::Work;

/// `tree.pack`.
pub fn pack(params: TreePack) -> Work {
    Box::new(move |streams| {
        const WHAT: &str = "pack";
        let path = params.path.as_str();
        let root = params.root.as_deref();
        let Some(output) = streams.output else {
            return Ok(json!(Transferred::default()));
        };
        let mut packer = Packer::new(output);
        let trimmed = path.trim_end_matches('/');
        let own_name = trimmed
            .rsplit('/')
            .next()
            .filter(|name| !matches!(*name, "" | "." | ".."));
        let name = params.name.as_deref().or(own_name).unwrap_or(".");
        let result = match own_name {
            Some(own) if !params.follow => {
                let there = place(path, root, WHAT)?;
                let stat = statat(there.parent(), own, AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(|error| failed(WHAT, path, error))?;
                let own = CString::new(own).unwrap_or_default();
                packer.entry(there.parent(), &own, &stat, Path::new(name), 0)
            }
            _ => {
                let file = open(path, root, OFlags::RDONLY | OFlags::NONBLOCK, WHAT)?;
                let stat = rustix::fs::fstat(&file).map_err(|error| failed(WHAT, path, error))?;
                packer.opened(&file, &stat, Path::new(name), 0)
            }
        };
        if let Some(deep) = packer.too_deep {
            return Err(too_deep(WHAT, &deep));
        }
        let entries = packer.entries;
        match result.and_then(|()| packer.finish()) {
            Ok(bytes) => Ok(json!(Transferred { bytes, entries })),
            Err(error) => output_failed(path, &error).map(|()| json!(Transferred::default())),
        }
    })
}

struct Counted {
    output: File,
    bytes: u64,
}

impl Write for Counted {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = self.output.write(bytes)?;
        self.bytes += len as u64;
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub(super) struct Packer {
    builder: tar::Builder<BufWriter<Counted>>,
    /// Files with several names: device and inode, and the first of them.
    links: BTreeMap<(u64, u64), PathBuf>,
    entries: u64,
    /// The directory for which it gave up.
    too_deep: Option<String>,
}

fn header(stat: &Stat, kind: EntryType) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(stat.st_mode & 0o7777);
    header.set_uid(u64::from(stat.st_uid));
    header.set_gid(u64::from(stat.st_gid));
    header.set_mtime(u64::try_from(stat.st_mtime).unwrap_or(0));
    header.set_size(0);
    header
}

/// It vanished since it was looked at, or is something else now (a link, a socket, no link).
fn is_gone(error: Errno) -> bool {
    matches!(
        error,
        Errno::NOENT | Errno::LOOP | Errno::NXIO | Errno::INVAL
    )
}

impl Packer {
    pub(super) fn new(output: File) -> Self {
        let out = BufWriter::with_capacity(64 << 10, Counted { output, bytes: 0 });
        Self {
            builder: tar::Builder::new(out),
            links: BTreeMap::new(),
            entries: 0,
            too_deep: None,
        }
    }

    /// Ends the archive; returns how many bytes it has.
    pub(super) fn finish(self) -> io::Result<u64> {
        let out = self.builder.into_inner()?.into_inner();
        Ok(out.map_err(io::IntoInnerError::into_error)?.bytes)
    }

    pub(super) fn entry(
        &mut self,
        dir: BorrowedFd<'_>,
        name: &CStr,
        stat: &Stat,
        path: &Path,
        depth: usize,
    ) -> io::Result<()> {
        let kind = FileType::from_raw_mode(stat.st_mode);
        match kind {
            FileType::RegularFile | FileType::Directory => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let file = match openat(dir, name, flags, Mode::empty()) {
                    Err(error) if depth > 0 && is_gone(error) => return Ok(()),
                    file => file?,
                };
                let stat = rustix::fs::fstat(&file)?;
                self.opened(&file, &stat, path, depth)
            }
            FileType::Symlink => {
                let target = match readlinkat(dir, name, Vec::new()) {
                    Err(error) if depth > 0 && is_gone(error) => return Ok(()),
                    target => target?,
                };
                let target = Path::new(OsStr::from_bytes(target.as_bytes()));
                self.entries += 1;
                let mut header = header(stat, EntryType::Symlink);
                self.builder.append_link(&mut header, path, target)
            }
            FileType::Fifo | FileType::CharacterDevice | FileType::BlockDevice => {
                let mut header = header(
                    stat,
                    match kind {
                        FileType::Fifo => EntryType::Fifo,
                        FileType::CharacterDevice => EntryType::Char,
                        _ => EntryType::Block,
                    },
                );
                header.set_device_major(rustix::fs::major(stat.st_rdev))?;
                header.set_device_minor(rustix::fs::minor(stat.st_rdev))?;
                self.entries += 1;
                self.builder.append_data(&mut header, path, io::empty())
            }
            _ => Ok(()),
        }
    }

    fn opened(&mut self, file: &OwnedFd, stat: &Stat, path: &Path, depth: usize) -> io::Result<()> {
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                if depth > MAX_DEPTH {
                    self.too_deep = Some(path.to_string_lossy().into_owned());
                    return Err(io::ErrorKind::InvalidInput.into());
                }
                self.entries += 1;
                let mut header = header(stat, EntryType::Directory);
                self.builder.append_data(&mut header, path, io::empty())?;
                for name in names(file.as_fd())? {
                    // Gone again meanwhile: not there.
                    let Ok(stat) = statat(file, &*name, AtFlags::SYMLINK_NOFOLLOW) else {
                        continue;
                    };
                    let below = path.join(OsStr::from_bytes(name.to_bytes()));
                    self.entry(file.as_fd(), &name, &stat, &below, depth + 1)?;
                }
                Ok(())
            }
            FileType::RegularFile => self.file(file, stat, path),
            _ => Ok(()),
        }
    }

    fn file(&mut self, file: &OwnedFd, stat: &Stat, path: &Path) -> io::Result<()> {
        self.entries += 1;
        if stat.st_nlink > 1 {
            let id = (stat.st_dev, stat.st_ino);
            if let Some(first) = self.links.get(&id) {
                let mut header = header(stat, EntryType::Link);
                return self.builder.append_link(&mut header, path, first);
            }
            self.links.insert(id, path.to_owned());
        }
        let mut header = header(stat, EntryType::Regular);
        let size = stat.st_size as u64;
        header.set_size(size);
        // It may shrink or grow while it is read: the archive has what the header says.
        let reader = File::from(file.try_clone()?)
            .chain(io::repeat(0))
            .take(size);
        self.builder.append_data(&mut header, path, reader)
    }
}

/// `tree.unpack`.
pub fn unpack(params: TreeUnpack) -> Work {
    Box::new(move |streams| {
        const WHAT: &str = "unpack into";
        let path = params.path.as_str();
        let root = params.root.as_deref();
        let owner = Owner::find(params.owner.as_deref())?;
        make_parents(&format!("{}/x", path.trim_end_matches('/')), root, owner)?;
        let dir = open(path, root, OFlags::RDONLY | OFlags::DIRECTORY, WHAT)?;
        let Some(input) = streams.input else {
            return Ok(json!(Transferred::default()));
        };
        let mut unpacker = Unpacker {
            base: dir,
            owner,
            open: Vec::new(),
            bytes: 0,
            entries: 0,
        };
        let left = Rc::new(Cell::new(None));
        let mut archive = tar::Archive::new(Capped {
            input: io::BufReader::with_capacity(64 << 10, input),
            left: left.clone(),
        });
        let mut entries = archive
            .entries()
            .map_err(|error| failed_io(WHAT, path, &error))?;
        loop {
            left.set(Some(MAX_HEAD));
            let Some(entry) = entries.next() else { break };
            left.set(None);
            let mut entry = entry.map_err(|error| bad_archive(&error))?;
            unpacker.entry(&mut entry)?;
            // What is left of it does not count for the next one's head.
            io::copy(&mut entry, &mut io::sink()).map_err(|error| bad_archive(&error))?;
        }
        left.set(None);
        unpacker
            .close(0)
            .map_err(|error| failed_io(WHAT, path, &error))?;
        // To the end of the input: a writer is not to be stopped at the padding.
        let mut rest = archive.into_inner();
        let _ = io::copy(&mut rest, &mut io::sink());
        Ok(json!(Transferred {
            bytes: unpacker.bytes,
            entries: unpacker.entries,
        }))
    })
}

/// How many bytes may come before an entry's content: its header, and what the tar library keeps in
/// memory, long names and other records.
const MAX_HEAD: u64 = 64 << 10;

/// The archive, of which no more is read than is left.
struct Capped<R> {
    input: R,
    /// `None`: without end.
    left: Rc<Cell<Option<u64>>>,
}

impl<R: Read> Read for Capped<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(left) = self.left.get() else {
            return self.input.read(buffer);
        };
        let most = usize::try_from(left).unwrap_or(usize::MAX);
        if most == 0 && !buffer.is_empty() {
            let message = format!("an entry has more than {MAX_HEAD} bytes of names and records");
            return Err(io::Error::other(message));
        }
        let most = most.min(buffer.len());
        let len = self.input.read(&mut buffer[..most])?;
        self.left.set(Some(left - len as u64));
        Ok(len)
    }
}

fn bad_archive(error: &io::Error) -> ErrorReply {
    bad_request(format!("the archive is damaged or none: {error}"))
}

struct Unpacker {
    base: OwnedFd,
    owner: Option<Owner>,
    /// Directories of the archive, each in the one before it, whose contents may still come: their
    /// names, and the times that they get then.
    open: Vec<(Vec<CString>, OwnedFd, Timestamps)>,
    bytes: u64,
    entries: u64,
}

/// The components of a name in an archive; `None` for one that leads upwards.
fn components(path: &Path) -> Option<Vec<CString>> {
    let mut all = Vec::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => all.push(CString::new(name.as_bytes()).ok()?),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => return None,
        }
    }
    Some(all)
}

impl Unpacker {
    fn entry<R: Read>(&mut self, entry: &mut tar::Entry<'_, R>) -> Result<(), ErrorReply> {
        let path = entry
            .path()
            .map_err(|error| bad_archive(&error))?
            .into_owned();
        let shown = path.to_string_lossy().into_owned();
        let outside = || {
            bad_request(format!(
                "{} leads out of the directory",
                shown.escape_debug()
            ))
        };
        let mut names = components(&path).ok_or_else(outside)?;
        if names.len() > MAX_DEPTH + 2 {
            return Err(too_deep("unpack", &shown));
        }
        let Some(name) = names.pop() else {
            // The directory itself.
            return Ok(());
        };
        let result = self.make(entry, &names, &name);
        match result {
            Ok(()) => {
                self.entries += 1;
                Ok(())
            }
            Err(error)
                if error.kind() == io::ErrorKind::InvalidInput
                    && error.raw_os_error().is_none() =>
            {
                Err(outside())
            }
            Err(error) => Err(failed_io("unpack", &shown, &error)),
        }
    }

    /// Gives the last directories their times, until so many are left open.
    fn close(&mut self, left: usize) -> io::Result<()> {
        while self.open.len() > left {
            if let Some((_, directory, times)) = self.open.pop() {
                futimens(&directory, &times)?;
            }
        }
        Ok(())
    }

    /// The directory that these names lead to, made where it is missing. A symlink on the way is not
    /// followed: it may have come with the archive.
    fn directory(&self, names: &[CString]) -> io::Result<OwnedFd> {
        let mut dir = self.base.try_clone()?;
        for name in names {
            let next = match openat(&dir, &**name, DIRECTORY, Mode::empty()) {
                Err(Errno::NOENT) => {
                    mkdirat(&dir, &**name, Mode::from_raw_mode(0o755))?;
                    if let Some(owner) = self.owner {
                        let (uid, gid) = owner.ids();
                        chownat(&dir, &**name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
                    }
                    openat(&dir, &**name, DIRECTORY, Mode::empty())?
                }
                next => next?,
            };
            dir = next;
        }
        Ok(dir)
    }

    fn make<R: Read>(
        &mut self,
        entry: &mut tar::Entry<'_, R>,
        names: &[CString],
        name: &CStr,
    ) -> io::Result<()> {
        let around = |(above, ..): &(Vec<CString>, _, _)| names.starts_with(above);
        self.close(self.open.iter().take_while(|open| around(open)).count())?;
        let dir = self.directory(names)?;
        let header = entry.header();
        let kind = header.entry_type();
        let mode = Mode::from_raw_mode(header.mode()? & 0o7777);
        let number = |id: io::Result<u64>| id.ok().and_then(|id| u32::try_from(id).ok());
        let (uid, gid) = match self.owner {
            Some(owner) => (owner.uid, owner.gid),
            None => (
                number(header.uid()).unwrap_or(0),
                number(header.gid()).unwrap_or(0),
            ),
        };
        let ids = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        let time = Timespec {
            tv_sec: i64::try_from(header.mtime().unwrap_or(0)).unwrap_or(0),
            tv_nsec: 0,
        };
        let times = Timestamps {
            last_access: time,
            last_modification: time,
        };
        if kind == EntryType::Directory {
            match mkdirat(&dir, name, Mode::from_raw_mode(0o700)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
            let made = openat(&dir, name, DIRECTORY, Mode::empty())?;
            owned(fchown(&made, ids.0, ids.1))?;
            fchmod(&made, mode)?;
            self.open
                .push(([names, &[name.to_owned()]].concat(), made, times));
            return Ok(());
        }
        // What is there is replaced, unless it is a directory.
        match unlinkat(&dir, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        match kind {
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                let file = openat(&dir, name, flags, Mode::from_raw_mode(0o600))?;
                let mut file = File::from(file);
                self.bytes += io::copy(entry, &mut file)?;
                let file = OwnedFd::from(file);
                owned(fchown(&file, ids.0, ids.1))?;
                fchmod(&file, mode)?;
                futimens(&file, &times)?;
                return Ok(());
            }
            EntryType::Symlink => {
                let target = link_name(entry)?;
                symlinkat(target.as_os_str(), &dir, name)?;
            }
            EntryType::Link => {
                let target = link_name(entry)?;
                let mut names = components(&target).ok_or(io::ErrorKind::InvalidInput)?;
                let last = names.pop().ok_or(io::ErrorKind::InvalidInput)?;
                let from = self.directory(&names)?;
                linkat(&from, &*last, &dir, name, AtFlags::empty())?;
                return Ok(());
            }
            EntryType::Fifo | EntryType::Char | EntryType::Block => {
                let major = header.device_major()?.unwrap_or(0);
                let minor = header.device_minor()?.unwrap_or(0);
                let kind = match kind {
                    EntryType::Fifo => FileType::Fifo,
                    EntryType::Char => FileType::CharacterDevice,
                    _ => FileType::BlockDevice,
                };
                mknodat(&dir, name, kind, mode, rustix::fs::makedev(major, minor))?;
            }
            // Of a newer kind of archive: left out.
            _ => return Ok(()),
        }
        owned(chownat(&dir, name, ids.0, ids.1, AtFlags::SYMLINK_NOFOLLOW))?;
        Ok(())
    }
}

fn link_name<R: Read>(entry: &tar::Entry<'_, R>) -> io::Result<PathBuf> {
    let name = entry.link_name()?.ok_or(io::ErrorKind::InvalidData)?;
    Ok(name.into_owned())
}

/// Only root can give files away; others keep them.
fn owned(result: rustix::io::Result<()>) -> rustix::io::Result<()> {
    match result {
        Err(Errno::PERM) if !rustix::process::geteuid().is_root() => Ok(()),
        result => result,
    }
}
