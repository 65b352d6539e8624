//! All records: making, finding, changing and removing them, whoever else does so at once.
//!
//! ```text
//!  <root>/.lock          flock(2), held for the milliseconds of a change, never across a wait
//!  <root>/.new-<id>/     being made, under the lock
//!  <root>/<id>/          a VM; appears whole by rename
//!  <root>/.trash-<id>/   renamed away under the lock, deleted after it
//! ```
//!
//! A process that dies in between drops the lock with it; what it leaves under a dotted name is
//! swept by the next command ([`Store::sweep`]).

use std::collections::BTreeSet;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use super::record::{Record, RecordError, VmDir};
use crate::commit::Replaces;

/// Length of an id: 6 random bytes as hex digits.
pub const ID_LEN: usize = 12;
/// The longest name, in bytes.
pub const MAX_NAME_LEN: usize = 40;
/// `sun_path` of `struct sockaddr_un` holds 108 bytes, the closing NUL among them (unix(7)).
const MAX_SOCKET_PATH_LEN: usize = 107;
/// The longest file name that is bound in a VM's directory: the highest pid (proc_sys_kernel(5)), and a number.
const LONGEST_SOCKET_NAME: &str = "freeze-4194304-4294967295.sock";

/// A directory of VM records.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

/// One VM as the store has it.
#[derive(Debug)]
pub struct Entry {
    /// Its files.
    pub dir: VmDir,
    /// Its record, or why that cannot be read.
    pub record: Result<Record, RecordError>,
}

/// What dead processes have left that is more than files.
#[derive(Debug, Default)]
pub struct Left {
    /// Abandoned VMs whose VMM still runs: a detached start whose owner was killed. (The VMM of an ephemeral VM
    /// sees its owner's end itself.)
    pub abandoned: Vec<Entry>,
    /// Those that took their parents' places, and whoever was to end others for it was killed.
    pub committed: Vec<Entry>,
}

/// Why the store refuses.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A directory or the lock file cannot be made, read or removed.
    #[error("{action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// Another VM has this name.
    #[error("the name {name:?} is taken by VM {id}: choose another, or `ratoon rm {name}` first")]
    NameTaken {
        /// The name.
        name: String,
        /// Who has it.
        id: String,
    },
    /// Not a name.
    #[error(
        "{0:?} is not a VM name: 1 to {MAX_NAME_LEN} letters, digits, '-', '_' or '.', starting \
         with a letter or digit, and not {ID_LEN} hex digits, which would look like an id"
    )]
    BadName(String),
    /// No VM is called so.
    #[error("no such VM {0:?}; `ratoon ps -a` lists them")]
    NotFound(String),
    /// Several VMs' ids begin so.
    #[error("{text:?} is the beginning of several VM ids: {}", ids.join(", "))]
    Ambiguous {
        /// What was asked for.
        text: String,
        /// Whose ids begin so.
        ids: Vec<String>,
    },
    /// A socket in the VM's directory would have too long a path for the kernel.
    #[error(
        "the state directory's path is too long for Unix sockets: {} has {len} bytes of at most \
         {MAX_SOCKET_PATH_LEN}; set XDG_STATE_HOME to a shorter path", path.display()
    )]
    PathTooLong {
        /// The longest socket's path.
        path: PathBuf,
        /// Its length in bytes.
        len: usize,
    },
    /// The system has no random bytes to give.
    #[error("no random bytes for an id: {0}")]
    Random(getrandom::Error),
    /// The record itself.
    #[error(transparent)]
    Record(#[from] RecordError),
}

impl StoreError {
    fn io<'a>(
        action: &'static str,
        path: &'a Path,
    ) -> impl FnOnce(std::io::Error) -> Self + use<'a> {
        move |source| Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

/// The store's lock; dropped, it is free.
struct Locked(#[expect(dead_code, reason = "held for its lock")] File);

impl Store {
    /// The records under `root`, which is made when the first VM is.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Where it is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Makes a VM's directory and record. `make` is given the new directory, named by the VM's id, and makes its
    /// record; the name is set here.
    ///
    /// # Errors
    /// [`StoreError::NameTaken`] when another record has the name: of two at once, one wins.
    pub fn create(
        &self,
        name: Option<&str>,
        mut make: impl FnMut(&VmDir) -> Record,
    ) -> Result<VmDir, StoreError> {
        let mut made = self.create_all(&[name.map(str::to_owned)], |_, dir| make(dir))?;
        Ok(made.remove(0))
    }

    /// As [`Store::create`], one VM a name, all or none. `make` is given the number too.
    ///
    /// # Errors
    /// See there.
    pub fn create_all(
        &self,
        names: &[Option<String>],
        mut make: impl FnMut(usize, &VmDir) -> Record,
    ) -> Result<Vec<VmDir>, StoreError> {
        let named: Vec<&str> = names.iter().flatten().map(String::as_str).collect();
        named.iter().try_for_each(|name| check_name(name))?;
        let _lock = self.lock()?;
        if !named.is_empty() {
            for entry in self.list()? {
                if let Some(name) = named.iter().find(|name| entry.has_name(name)) {
                    return Err(StoreError::NameTaken {
                        name: (*name).to_owned(),
                        id: entry.dir.id(),
                    });
                }
            }
        }
        let mut made = Vec::with_capacity(names.len());
        for (number, name) in names.iter().enumerate() {
            match self.create_one(name, |dir| make(number, dir)) {
                Ok(dir) => made.push(dir),
                Err(error) => {
                    for dir in &made {
                        let _ = std::fs::remove_dir_all(VmDir::path(dir));
                    }
                    return Err(error);
                }
            }
        }
        Ok(made)
    }

    /// With the lock held.
    fn create_one(
        &self,
        name: &Option<String>,
        make: impl FnOnce(&VmDir) -> Record,
    ) -> Result<VmDir, StoreError> {
        let id = self.free_id()?;
        let dir = VmDir::new(self.root.join(&id));
        check_socket_paths(&dir)?;
        let mut record = make(&dir);
        record.name.clone_from(name);
        let new = VmDir::new(self.root.join(format!(".new-{id}")));
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(new.path())
            .map_err(StoreError::io("making", new.path()))?;
        let written = new.write_record(&record).map_err(StoreError::from);
        let moved = written.and_then(|()| {
            std::fs::rename(new.path(), dir.path()).map_err(StoreError::io("making", dir.path()))
        });
        if let Err(error) = moved {
            let _ = std::fs::remove_dir_all(new.path());
            return Err(error);
        }
        Ok(dir)
    }

    /// Changes a VM's record.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] when it has been removed meanwhile.
    pub fn update(
        &self,
        dir: &VmDir,
        change: impl FnOnce(&mut Record),
    ) -> Result<Record, StoreError> {
        let _lock = self.lock()?;
        let mut record = match dir.read_record() {
            Err(_) if !dir.path().exists() => return Err(StoreError::NotFound(dir.id())),
            other => other?,
        };
        change(&mut record);
        dir.write_record(&record)?;
        Ok(record)
    }

    /// A VM takes another's name, if that has one and is still there, and its place below what that came from. `choose`
    /// says whose, of the VM's record and all that there are, and who goes for it, which is noted with it at once:
    /// nobody changes a record meanwhile. Returns what the VM is called then, and who goes.
    ///
    /// # Errors
    /// Those of `choose`, and as [`Store::update`].
    pub fn succeed<E: From<StoreError>>(
        &self,
        dir: &VmDir,
        choose: impl FnOnce(&Record, &[&Record]) -> Result<(Option<String>, Replaces), E>,
    ) -> Result<(Option<String>, BTreeSet<String>), E> {
        let _lock = self.lock()?;
        let mut record = dir.read_record().map_err(StoreError::from)?;
        let entries = self.list()?;
        let records: Vec<_> = entries
            .iter()
            .filter_map(|it| it.record.as_ref().ok())
            .collect();
        let (before, replaces) = choose(&record, &records)?;
        let vms = replaces.vms.clone();
        record.parent = None;
        record.replaces = Some(replaces);
        let before = before.map(|id| VmDir::new(self.root.join(id)));
        let mut old = before.and_then(|dir| Some((dir.read_record().ok()?, dir)));
        if let Some((old, _)) = &mut old {
            record.parent.clone_from(&old.parent);
            record.name = old.name.take().or(record.name);
        }
        // Whoever is killed here: from now on it is the one that stays.
        dir.write_record(&record).map_err(StoreError::from)?;
        if let Some((old, before)) = old {
            before.write_record(&old).map_err(StoreError::from)?;
        }
        Ok((record.name, vms))
    }

    /// All VMs, oldest first, broken ones last.
    ///
    /// # Errors
    /// When the directory cannot be read; its absence means that there are none.
    pub fn list(&self) -> Result<Vec<Entry>, StoreError> {
        let mut entries: Vec<Entry> = self
            .names()?
            .into_iter()
            .filter(|name| is_id(name))
            .map(|id| Entry::read(VmDir::new(self.root.join(id))))
            // Removed since the directory was listed.
            .filter(|entry| entry.record.is_ok() || entry.dir.path().exists())
            .collect();
        entries.sort_by_key(|entry| {
            let created = entry.record.as_ref().map_or(u64::MAX, |r| r.created_ms);
            (created, entry.dir.id())
        });
        Ok(entries)
    }

    /// The VM with this id, name, or unique beginning of an id; in this order.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Ambiguous`].
    pub fn find(&self, text: &str) -> Result<Entry, StoreError> {
        let mut entries = self.list()?;
        let exact = entries
            .iter()
            .position(|entry| entry.dir.id() == text)
            .or_else(|| entries.iter().position(|entry| entry.has_name(text)));
        if let Some(index) = exact {
            return Ok(entries.swap_remove(index));
        }
        if !text.is_empty() {
            entries.retain(|entry| entry.dir.id().starts_with(text));
        } else {
            entries.clear();
        }
        match entries.len() {
            1 => Ok(entries.swap_remove(0)),
            0 => Err(StoreError::NotFound(text.to_owned())),
            _ => Err(StoreError::Ambiguous {
                text: text.to_owned(),
                ids: entries.iter().map(|entry| entry.dir.id()).collect(),
            }),
        }
    }

    /// Removes a VM's record and files. Its VMM must have ended. That it is gone already is fine.
    ///
    /// # Errors
    /// [`StoreError::Io`] when a file cannot be removed.
    pub fn remove(&self, dir: &VmDir) -> Result<(), StoreError> {
        self.remove_unless(dir, |_| None::<()>).map(drop)
    }

    /// As [`Store::remove`], unless `needed` says why not of the VM's folder as it is then: nobody changes a record
    /// meanwhile.
    ///
    /// # Errors
    /// See there.
    pub(crate) fn remove_unless<T>(
        &self,
        dir: &VmDir,
        needed: impl FnOnce(&VmDir) -> Option<T>,
    ) -> Result<Option<T>, StoreError> {
        let trash = self.root.join(format!(".trash-{}", dir.id()));
        {
            let _lock = self.lock()?;
            if let Some(why) = needed(dir) {
                return Ok(Some(why));
            }
            let group = dir.read_record().ok().and_then(|record| record.group);
            if let Some(group) = group {
                group.remove();
            }
            match std::fs::rename(dir.path(), &trash) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(StoreError::io("removing", dir.path())(error)),
            }
        }
        remove_tree(&trash).map(|()| None)
    }

    /// Removes what dead processes have left: half-made and half-removed directories, and VMs
    /// for which [`Record::is_abandoned`] holds and whose VMM has ended. Returns what takes more than that.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn sweep(&self) -> Result<Left, StoreError> {
        let mut left = Left::default();
        if !self.root.exists() {
            return Ok(left);
        }
        let (mut half, mut trash) = (Vec::new(), Vec::new());
        let mut throw = |dir: &VmDir| {
            let target = self.root.join(format!(".trash-{}", dir.id()));
            std::fs::rename(dir.path(), &target).map_err(StoreError::io("removing", dir.path()))?;
            trash.push(target);
            Ok::<_, StoreError>(())
        };
        {
            let _lock = self.lock()?;
            for name in self.names()? {
                // Under the lock nobody is making one.
                if name.starts_with(".new-") || name.starts_with(".trash-") {
                    half.push(self.root.join(name));
                } else if is_id(&name) {
                    let entry = Entry::read(VmDir::new(self.root.join(&name)));
                    let Ok(record) = &entry.record else {
                        // A VMM without an owner removes its folder, but for what another made there meanwhile.
                        let dir = &entry.dir;
                        let known = [dir.record(), dir.control_socket(), dir.serial_log()];
                        if !known.iter().any(|path| path.exists()) {
                            throw(dir)?;
                        }
                        continue;
                    };
                    if record.replaces.as_ref().is_some_and(Replaces::is_left) {
                        left.committed.push(entry);
                        continue;
                    }
                    // One that was being put back to a snapshot is put right, not removed.
                    if !record.is_abandoned() || entry.dir.rollback_note().exists() {
                        continue;
                    }
                    if record.vmm_is_alive() || record.vmm.is_none() {
                        left.abandoned.push(entry);
                        continue;
                    }
                    if let Some(group) = &record.group {
                        group.remove();
                    }
                    throw(&entry.dir)?;
                }
            }
        }
        for path in half.into_iter().chain(trash) {
            remove_tree(&path)?;
        }
        Ok(left)
    }

    /// VMs that are being put back to a snapshot, or were when whoever did so was killed.
    pub(crate) fn in_rollback(&self) -> Result<Vec<VmDir>, StoreError> {
        let ids = self.names()?.into_iter().filter(|name| is_id(name));
        let dirs = ids.map(|id| VmDir::new(self.root.join(id)));
        Ok(dirs.filter(|dir| dir.rollback_note().exists()).collect())
    }

    fn names(&self) -> Result<Vec<String>, StoreError> {
        let listing = match std::fs::read_dir(&self.root) {
            Ok(listing) => listing,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(StoreError::io("reading", &self.root)(error)),
        };
        let mut names = Vec::new();
        for entry in listing {
            let entry = entry.map_err(StoreError::io("reading", &self.root))?;
            names.extend(entry.file_name().into_string());
        }
        Ok(names)
    }

    fn free_id(&self) -> Result<String, StoreError> {
        loop {
            let mut bytes = [0; ID_LEN / 2];
            getrandom::fill(&mut bytes).map_err(StoreError::Random)?;
            let id: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            if !self.root.join(&id).exists() {
                return Ok(id);
            }
        }
    }

    fn lock(&self) -> Result<Locked, StoreError> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.root)
            .map_err(StoreError::io("making", &self.root))?;
        let path = self.root.join(".lock");
        let file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(StoreError::io("opening", &path))?;
        loop {
            match flock(&file, FlockOperation::LockExclusive) {
                Ok(()) => return Ok(Locked(file)),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(StoreError::io("locking", &path)(error.into())),
            }
        }
    }
}

impl Entry {
    fn read(dir: VmDir) -> Self {
        let record = dir.read_record();
        Self { dir, record }
    }

    fn has_name(&self, name: &str) -> bool {
        self.record
            .as_ref()
            .is_ok_and(|record| record.name.as_deref() == Some(name))
    }
}

/// Two processes may delete the same tree at once: what the other took is gone as well.
fn remove_tree(path: &Path) -> Result<(), StoreError> {
    match std::fs::remove_dir_all(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        // The other one took a file between our listing and our deletion of the directory.
        Err(_) if !path.exists() => Ok(()),
        Err(error) => Err(StoreError::io("removing", path)(error)),
    }
}

fn is_id(name: &str) -> bool {
    name.len() == ID_LEN
        && name
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn check_name(name: &str) -> Result<(), StoreError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let good = (1..=MAX_NAME_LEN).contains(&name.len())
        && name.bytes().all(plain)
        && name.as_bytes()[0].is_ascii_alphanumeric()
        && !is_id(name);
    if good {
        Ok(())
    } else {
        Err(StoreError::BadName(name.to_owned()))
    }
}

fn check_socket_paths(dir: &VmDir) -> Result<(), StoreError> {
    let path = dir.path().join(LONGEST_SOCKET_NAME);
    let len = path.as_os_str().len();
    if len > MAX_SOCKET_PATH_LEN {
        return Err(StoreError::PathTooLong { path, len });
    }
    Ok(())
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
