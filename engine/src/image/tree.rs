//! The private folder in which layers are merged before they become a disk.
//!
//! Every name is resolved by the kernel with `RESOLVE_IN_ROOT`: a link inside the folder, absolute
//! or with any number of `..`, leads to a place inside the folder. The last component is created
//! anew (`O_EXCL`, after removing what was there), never opened, so nothing is written through a
//! link. Owners, set-id bits, device nodes and extended attributes are only remembered;
//! [`Tree::finish`] hands them back as [`Fix`]es for the disk.

use std::collections::{HashMap, HashSet};
use std::ffi::CString;
use std::fs::File;
use std::io::{Read, Seek as _, SeekFrom, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps};
use rustix::io::Errno;

use super::Progress;
use super::archive::{Entry, Kind};
use super::error::{Context, Error, Result};

/// Folders that every disk has, so that a guest can mount on them: name and mode.
const MOUNT_POINTS: [(&str, u32); 5] = [
    ("dev", 0o755),
    ("proc", 0o555),
    ("sys", 0o555),
    ("run", 0o755),
    ("tmp", 0o1777),
];
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
const COPY_BYTES: usize = 64 << 10;

/// What the host's file system does not hold and debugfs sets in the disk.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Fix {
    /// Absolute path in the image.
    pub(super) path: String,
    /// `p`, `c <major> <minor>` or `b <major> <minor>`: replaces the placeholder file.
    pub(super) device: Option<String>,
    /// `i_mode` with the type bits.
    pub(super) mode: Option<u32>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) xattrs: Vec<(String, Vec<u8>)>,
}

/// How much the tree holds.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Summary {
    /// Content in bytes, in whole blocks of 4 KiB.
    pub(super) bytes: u64,
    /// Files, folders, links, devices.
    pub(super) entries: u64,
}

/// What an inode shall be in the disk.
#[derive(Debug, Clone)]
struct Meta {
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: i64,
    xattrs: Vec<(String, Vec<u8>)>,
    device: Option<String>,
}

/// The folder and what is remembered about it.
#[derive(Debug)]
pub(super) struct Tree {
    root: OwnedFd,
    path: PathBuf,
    archive: String,
    /// By inode number in the folder: hard links share it.
    meta: HashMap<u64, Meta>,
    /// Names made by the layer in work: the folder's inode number and the name.
    layer: HashSet<(u64, Vec<u8>)>,
}

impl Tree {
    /// Makes the folder `path`, which must not exist.
    pub(super) fn create(path: &Path) -> Result<Self> {
        rustix::fs::mkdir(path, Mode::RWXU).at("create", path)?;
        let root = rustix::fs::open(
            path,
            OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .at("open", path)?;
        let mut tree = Self {
            root,
            path: path.to_path_buf(),
            archive: String::new(),
            meta: HashMap::new(),
            layer: HashSet::new(),
        };
        let ino = rustix::fs::fstat(&tree.root).at("stat", path)?.st_ino;
        tree.meta.insert(ino, Meta::folder(0o755));
        Ok(tree)
    }

    /// The folder.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Begins a layer (or the only tar): what comes now may white out what came before.
    /// `archive` names it in errors.
    pub(super) fn begin_layer(&mut self, archive: &str) {
        archive.clone_into(&mut self.archive);
        self.layer.clear();
    }

    /// Adds one entry; `data` gives a file's bytes.
    pub(super) fn put(
        &mut self,
        entry: &Entry,
        data: &mut dyn Read,
        progress: &dyn Progress,
    ) -> Result<()> {
        let Some((name, folders)) = entry.path.split_last() else {
            return self.put_root(entry);
        };
        let parent = self.parent(folders)?;
        let parent_ino = rustix::fs::fstat(&parent).at("stat", &self.path)?.st_ino;
        let name_c =
            CString::new(name.as_slice()).map_err(|_| self.refuse(entry, "it holds a NUL"))?;
        let old = stat_at(&parent, &name_c).at("stat", &self.path)?;
        let keep_folder = matches!(entry.kind, Kind::Folder)
            && old
                .as_ref()
                .is_some_and(|old| file_type(old) == FileType::Directory);
        if old.is_some() && !keep_folder {
            if matches!(&entry.kind, Kind::HardLink(target) if target == &entry.path) {
                return Err(self.refuse(entry, "it is a hard link to itself"));
            }
            remove_at(&parent, &name_c).at("remove in", &self.path)?;
        }
        self.layer.insert((parent_ino, name.clone()));
        self.create_node(entry, &parent, &name_c, keep_folder, data, progress)
    }

    /// Makes the node itself; its name is free now, or is a folder to keep.
    fn create_node(
        &mut self,
        entry: &Entry,
        parent: &OwnedFd,
        name: &CString,
        keep_folder: bool,
        data: &mut dyn Read,
        progress: &dyn Progress,
    ) -> Result<()> {
        let mut device = None;
        match &entry.kind {
            Kind::Folder if keep_folder => {}
            Kind::Folder => {
                rustix::fs::mkdirat(parent, name, Mode::RWXU)
                    .at("create a folder in", &self.path)?;
            }
            Kind::File => {
                let mut file = self.create_file(parent, name)?;
                self.copy(entry, data, &mut file, progress)?;
            }
            Kind::Symlink(target) => {
                let target = CString::new(target.as_slice())
                    .map_err(|_| self.refuse(entry, "its target holds a NUL"))?;
                rustix::fs::symlinkat(&target, parent, name).at("create a link in", &self.path)?;
            }
            Kind::HardLink(target) => return self.hard_link(entry, target, parent, name),
            Kind::Device(what) => {
                drop(self.create_file(parent, name)?);
                device = Some(what.clone());
            }
        }
        let stat = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)
            .at("stat in", &self.path)?;
        self.meta.insert(
            stat.st_ino,
            Meta {
                mode: entry.mode,
                uid: entry.uid,
                gid: entry.gid,
                mtime: entry.mtime,
                xattrs: entry.xattrs.clone(),
                device,
            },
        );
        Ok(())
    }

    fn create_file(&self, parent: &OwnedFd, name: &CString) -> Result<File> {
        let flags =
            OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(parent, name, flags, Mode::RUSR | Mode::WUSR)
            .at("create a file in", &self.path)?;
        Ok(File::from(fd))
    }

    /// Copies a file's bytes; runs of zeroes become holes.
    fn copy(
        &self,
        entry: &Entry,
        data: &mut dyn Read,
        file: &mut File,
        progress: &dyn Progress,
    ) -> Result<()> {
        let mut buffer = vec![0; COPY_BYTES.min(entry.size.max(1) as usize)];
        let mut left = entry.size;
        while left > 0 {
            if progress.cancelled() {
                return Err(Error::Cancelled);
            }
            let want = left.min(buffer.len() as u64) as usize;
            data.read_exact(&mut buffer[..want])
                .at("unpack", &self.path)?;
            left -= want as u64;
            if buffer[..want].iter().all(|byte| *byte == 0) {
                file.seek(SeekFrom::Current(want as i64))
                    .at("write in", &self.path)?;
            } else {
                file.write_all(&buffer[..want]).at("write in", &self.path)?;
            }
        }
        file.set_len(entry.size).at("write in", &self.path)
    }

    fn hard_link(
        &self,
        entry: &Entry,
        target: &[Vec<u8>],
        parent: &OwnedFd,
        name: &CString,
    ) -> Result<()> {
        let missing = || self.refuse(entry, "it is a hard link to something outside the archive");
        let (target_name, folders) = target.split_last().ok_or_else(missing)?;
        let target_parent = match self.open_folder(folders) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Err(missing()),
            Err(errno) => return Err(Error::io("open a folder in", &self.path, errno.into())),
        };
        let target_name = CString::new(target_name.as_slice()).map_err(|_| missing())?;
        match stat_at(&target_parent, &target_name).at("stat in", &self.path)? {
            None => Err(missing()),
            Some(stat) if file_type(&stat) == FileType::Directory => {
                Err(self.refuse(entry, "it is a hard link to a folder"))
            }
            Some(_) => {
                // No flag: a symbolic link as the last component is linked, not followed.
                rustix::fs::linkat(&target_parent, &target_name, parent, name, AtFlags::empty())
                    .at("create a hard link in", &self.path)
            }
        }
    }

    /// The archive's own entry for `/`.
    fn put_root(&mut self, entry: &Entry) -> Result<()> {
        if entry.kind != Kind::Folder {
            return Err(self.refuse(entry, "it would replace the root folder"));
        }
        let ino = rustix::fs::fstat(&self.root).at("stat", &self.path)?.st_ino;
        let meta = Meta {
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            xattrs: entry.xattrs.clone(),
            ..Meta::folder(entry.mode)
        };
        self.meta.insert(ino, meta);
        Ok(())
    }

    /// Handles `.wh.` entries of container layers; says whether `entry` was one.
    pub(super) fn whiteout(&mut self, entry: &Entry) -> Result<bool> {
        let Some((name, folders)) = entry.path.split_last() else {
            return Ok(false);
        };
        if !name.starts_with(WHITEOUT) {
            return Ok(false);
        }
        let parent = match self.open_folder(folders) {
            Ok(fd) => fd,
            // Nothing below to hide.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(true),
            Err(errno) => return Err(Error::io("open a folder in", &self.path, errno.into())),
        };
        if name == OPAQUE {
            self.clear_lower(&parent)?;
            return Ok(true);
        }
        let hidden = &name[WHITEOUT.len()..];
        if hidden.is_empty() || hidden == b"." || hidden == b".." {
            return Err(self.refuse(entry, "it is a whiteout of nothing"));
        }
        if hidden.starts_with(WHITEOUT) {
            return Ok(true); // aufs keeps its own books under .wh..wh.*
        }
        let ino = rustix::fs::fstat(&parent).at("stat", &self.path)?.st_ino;
        if self.layer.contains(&(ino, hidden.to_vec())) {
            return Ok(true); // A whiteout hides lower layers only.
        }
        let hidden = CString::new(hidden).map_err(|_| self.refuse(entry, "it holds a NUL"))?;
        if stat_at(&parent, &hidden)
            .at("stat in", &self.path)?
            .is_some()
        {
            remove_at(&parent, &hidden).at("remove in", &self.path)?;
        }
        Ok(true)
    }

    /// Removes from a folder all that this layer did not make. A lower layer's folder stays when
    /// this layer put something into it.
    fn clear_lower(&self, folder: &OwnedFd) -> Result<()> {
        // Names, not descriptors: a layer may have more folders than we may open files.
        let mut work: Vec<Vec<CString>> = vec![Vec::new()];
        let mut lower = Vec::new();
        while let Some(chain) = work.pop() {
            let here = open_chain(folder, &chain).at("open a folder in", &self.path)?;
            let ino = rustix::fs::fstat(&here).at("stat", &self.path)?.st_ino;
            for name in names(&here).at("list a folder in", &self.path)? {
                let stat = rustix::fs::statat(&here, &name, AtFlags::SYMLINK_NOFOLLOW)
                    .at("stat in", &self.path)?;
                let is_folder = file_type(&stat) == FileType::Directory;
                let of_layer = self.layer.contains(&(ino, name.as_bytes().to_vec()));
                if is_folder {
                    let below: Vec<CString> = chain.iter().cloned().chain([name]).collect();
                    if !of_layer {
                        lower.push(below.clone());
                    }
                    work.push(below);
                } else if !of_layer {
                    remove_at(&here, &name).at("remove in", &self.path)?;
                }
            }
        }
        // Deepest first, so that a folder is empty when its turn comes.
        lower.sort_by_key(|chain| std::cmp::Reverse(chain.len()));
        for mut chain in lower {
            let Some(name) = chain.pop() else { continue };
            let above = open_chain(folder, &chain).at("open a folder in", &self.path)?;
            match rustix::fs::unlinkat(&above, &name, AtFlags::REMOVEDIR) {
                Ok(()) | Err(Errno::NOTEMPTY | Errno::EXIST) => {}
                Err(errno) => return Err(Error::io("remove in", &self.path, errno.into())),
            }
        }
        Ok(())
    }

    /// Opens the folder of an entry; makes what is missing on the way.
    fn parent(&mut self, folders: &[Vec<u8>]) -> Result<OwnedFd> {
        match self.open_folder(folders) {
            Ok(fd) => return Ok(fd),
            Err(Errno::NOENT) => {}
            Err(errno @ (Errno::NOTDIR | Errno::LOOP)) => {
                return Err(self.bad_parent(folders, errno));
            }
            Err(errno) => return Err(Error::io("open a folder in", &self.path, errno.into())),
        }
        for depth in 0..folders.len() {
            match self.open_folder(&folders[..=depth]) {
                Ok(_) => continue,
                Err(Errno::NOENT) => {}
                Err(errno) => return Err(self.bad_parent(folders, errno)),
            }
            let above = self
                .open_folder(&folders[..depth])
                .at("open a folder in", &self.path)?;
            let name = CString::new(folders[depth].as_slice())
                .map_err(|_| self.bad_parent(folders, Errno::INVAL))?;
            match rustix::fs::mkdirat(&above, &name, Mode::RWXU) {
                Ok(()) => {}
                // A link to nowhere stands there.
                Err(errno @ Errno::EXIST) => return Err(self.bad_parent(folders, errno)),
                Err(errno) => {
                    return Err(Error::io("create a folder in", &self.path, errno.into()));
                }
            }
            let stat = rustix::fs::statat(&above, &name, AtFlags::SYMLINK_NOFOLLOW)
                .at("stat in", &self.path)?;
            self.meta.insert(stat.st_ino, Meta::folder(0o755));
            let above_ino = rustix::fs::fstat(&above).at("stat", &self.path)?.st_ino;
            self.layer.insert((above_ino, folders[depth].clone()));
        }
        self.open_folder(folders).at("open a folder in", &self.path)
    }

    /// Opens a folder inside the tree; links lead to places inside the tree only.
    fn open_folder(&self, folders: &[Vec<u8>]) -> rustix::io::Result<OwnedFd> {
        let path = if folders.is_empty() {
            b".".to_vec()
        } else {
            folders.join(&b'/')
        };
        let path = CString::new(path).map_err(|_| Errno::INVAL)?;
        rustix::fs::openat2(
            &self.root,
            &path,
            OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
        )
    }

    fn bad_parent(&self, folders: &[Vec<u8>], errno: Errno) -> Error {
        Error::RefusedEntry {
            archive: self.archive.clone(),
            entry: String::from_utf8_lossy(&folders.join(&b'/')).into_owned(),
            reason: format!("it is used as a folder but is a file or a broken link ({errno})"),
        }
    }

    fn refuse(&self, entry: &Entry, reason: &str) -> Error {
        Error::RefusedEntry {
            archive: self.archive.clone(),
            entry: entry.shown(),
            reason: reason.to_owned(),
        }
    }

    /// Adds the mount points that are missing, sets modes and times, and lists what the disk needs
    /// beyond that.
    pub(super) fn finish(mut self) -> Result<(Summary, Vec<Fix>)> {
        for (name, mode) in MOUNT_POINTS {
            let name_c = CString::new(name).unwrap_or_default();
            if stat_at(&self.root, &name_c)
                .at("stat in", &self.path)?
                .is_none()
            {
                rustix::fs::mkdirat(&self.root, &name_c, Mode::RWXU)
                    .at("create a folder in", &self.path)?;
                let stat = rustix::fs::statat(&self.root, &name_c, AtFlags::SYMLINK_NOFOLLOW)
                    .at("stat in", &self.path)?;
                self.meta.insert(stat.st_ino, Meta::folder(mode));
            }
        }
        let mut summary = Summary::default();
        let mut fixes = Vec::new();
        // Folders are settled after their content: writing inside changes their time.
        let mut work = vec![(String::new(), false)];
        while let Some((path, done)) = work.pop() {
            let folder = self.open_folder_at(&path)?;
            if done {
                self.settle(&folder, c".", &path, &mut summary, &mut fixes)?;
                continue;
            }
            work.push((path.clone(), true));
            for name in names(&folder).at("list a folder in", &self.path)? {
                let Ok(shown) = name.to_str() else {
                    return Err(Error::RefusedEntry {
                        archive: self.archive.clone(),
                        entry: format!("{path}/{}", name.to_string_lossy()),
                        reason: "its name is not UTF-8: rename it".into(),
                    });
                };
                let child = format!("{path}/{shown}");
                let stat = rustix::fs::statat(&folder, &name, AtFlags::SYMLINK_NOFOLLOW)
                    .at("stat in", &self.path)?;
                if file_type(&stat) == FileType::Directory {
                    work.push((child, false));
                } else {
                    self.settle(&folder, &name, &child, &mut summary, &mut fixes)?;
                }
            }
        }
        Ok((summary, fixes))
    }

    fn open_folder_at(&self, path: &str) -> Result<OwnedFd> {
        let relative = path.trim_start_matches('/');
        let relative = if relative.is_empty() { "." } else { relative };
        rustix::fs::openat2(
            &self.root,
            relative,
            OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS,
        )
        .at("open a folder in", &self.path)
    }

    /// Sets what the host can hold and adds a fix for the rest.
    fn settle(
        &self,
        folder: &OwnedFd,
        name: &std::ffi::CStr,
        path: &str,
        summary: &mut Summary,
        fixes: &mut Vec<Fix>,
    ) -> Result<()> {
        let stat = rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)
            .at("stat in", &self.path)?;
        summary.entries += 1;
        summary.bytes += (stat.st_size as u64).next_multiple_of(4096);
        let kind = file_type(&stat);
        let default = Meta::folder(0o755);
        let meta = self.meta.get(&stat.st_ino).unwrap_or(&default);
        let mut fix = Fix {
            path: if path.is_empty() {
                "/".into()
            } else {
                path.to_owned()
            },
            xattrs: meta.xattrs.clone(),
            ..Fix::default()
        };
        let mut type_bits = stat.st_mode & 0o170_000;
        if let Some(device) = &meta.device {
            type_bits = match device.as_bytes().first() {
                Some(b'c') => 0o020_000,
                Some(b'b') => 0o060_000,
                _ => 0o010_000,
            };
            fix.device = Some(device.clone());
            fix.mode = Some(type_bits | meta.mode);
        } else if kind != FileType::Symlink {
            // On the host: no set-id bits, and always open to ourselves, who must read it back.
            let own = if kind == FileType::Directory {
                0o700
            } else {
                0o600
            };
            let on_host = (meta.mode & 0o777) | own;
            rustix::fs::chmodat(folder, name, Mode::from_raw_mode(on_host), AtFlags::empty())
                .at("set the mode in", &self.path)?;
            if on_host != meta.mode {
                fix.mode = Some(type_bits | meta.mode);
            }
        }
        let fresh = fix.device.is_some();
        if meta.uid != if fresh { 0 } else { stat.st_uid } {
            fix.uid = Some(meta.uid);
        }
        if meta.gid != if fresh { 0 } else { stat.st_gid } {
            fix.gid = Some(meta.gid);
        }
        let time = Timespec {
            tv_sec: meta.mtime,
            tv_nsec: 0,
        };
        let times = Timestamps {
            last_access: time,
            last_modification: time,
        };
        rustix::fs::utimensat(folder, name, &times, AtFlags::SYMLINK_NOFOLLOW)
            .at("set the time in", &self.path)?;
        let needed = fix.device.is_some()
            || fix.mode.is_some()
            || fix.uid.is_some()
            || fix.gid.is_some()
            || !fix.xattrs.is_empty();
        if needed {
            fixes.push(fix);
        }
        Ok(())
    }
}

impl Meta {
    /// A folder nobody described: root's.
    fn folder(mode: u32) -> Self {
        Self {
            mode,
            uid: 0,
            gid: 0,
            mtime: 0,
            xattrs: Vec::new(),
            device: None,
        }
    }
}

fn file_type(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

/// The entry itself, not what it links to; none when there is nothing.
fn stat_at(folder: impl AsFd, name: &CString) -> rustix::io::Result<Option<Stat>> {
    match rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// Opens a folder by its own name, no link.
fn open_below(folder: &OwnedFd, name: &std::ffi::CStr) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(folder, name, flags, Mode::empty())
}

/// Opens a folder anew, for reading.
fn reopen(folder: &OwnedFd) -> rustix::io::Result<OwnedFd> {
    open_below(folder, c".")
}

/// All names in a folder.
fn names(folder: &OwnedFd) -> rustix::io::Result<Vec<CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(reopen(folder)?)? {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

/// Removes a name and, for a folder, all below, without recursion (an archive can nest deeply).
fn remove_at(folder: &OwnedFd, name: &CString) -> rustix::io::Result<()> {
    match rustix::fs::unlinkat(folder, name, AtFlags::empty()) {
        Err(Errno::ISDIR | Errno::PERM) => {}
        other => return other,
    }
    // Depth first; each step goes one folder down or removes one name.
    let mut path: Vec<CString> = vec![name.clone()];
    while let Some(last) = path.last() {
        let above = open_chain(folder, &path[..path.len() - 1])?;
        let here = open_below(&above, last)?;
        let mut deeper = None;
        for child in names(&here)? {
            match rustix::fs::unlinkat(&here, &child, AtFlags::empty()) {
                Err(Errno::ISDIR | Errno::PERM) => {
                    match rustix::fs::unlinkat(&here, &child, AtFlags::REMOVEDIR) {
                        Err(Errno::NOTEMPTY | Errno::EXIST) => {
                            deeper = Some(child);
                            break;
                        }
                        other => other?,
                    }
                }
                other => other?,
            }
        }
        match deeper {
            Some(child) => path.push(child),
            None => {
                rustix::fs::unlinkat(&above, last, AtFlags::REMOVEDIR)?;
                path.pop();
            }
        }
    }
    Ok(())
}

fn open_chain(folder: &OwnedFd, chain: &[CString]) -> rustix::io::Result<OwnedFd> {
    let mut current = reopen(folder)?;
    for name in chain {
        current = open_below(&current, name)?;
    }
    Ok(current)
}
