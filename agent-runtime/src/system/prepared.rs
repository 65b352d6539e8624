//! What `expect_wake` opens for `wake`, so that a restored machine has little left to do before it
//! answers: each small file is then one write into a descriptor, at its beginning.
//!
//! A file written so is not replaced whole: a reader could see half of it. So this is done only while
//! all other processes are frozen; else, and for whatever could not be opened (a link, a file with
//! several names, one that is not there), `wake` replaces the file as at any other time.
//!
//! How it fails: a write's error goes to the caller; what cannot be prepared is not.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, FileType, Mode, OFlags, open};
use rustix::io::Errno;

use super::{files, identity, quiet, settings};

/// A file longer than this is left alone.
const MAX_LEN: usize = 64 * 1024;

/// A small file, open, and what is in it.
#[derive(Debug)]
pub(super) struct Slot {
    file: OwnedFd,
    text: Vec<u8>,
}

impl Slot {
    /// A file that is there; `None` if it is not to be written in place.
    fn open(path: &Path) -> Option<Self> {
        let flags =
            OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = open(path, flags, Mode::empty()).ok()?;
        let stat = rustix::fs::fstat(&file).ok()?;
        let len = usize::try_from(stat.st_size).ok()?;
        let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        if !is_file || stat.st_nlink != 1 || len > MAX_LEN {
            return None;
        }
        // One byte more than there is: a file that grows is somebody's, and not prepared.
        let mut text = vec![0; len + 1];
        let read = rustix::io::pread(&file, &mut text, 0).ok()?;
        // A new file in memory has no page yet. Elsewhere the write itself makes room.
        let _ = rustix::fs::fallocate(&file, FallocateFlags::KEEP_SIZE, 0, 1);
        text.truncate(read);
        (read == len).then_some(Self { file, text })
    }

    /// What is in it.
    pub(super) fn text(&self) -> &[u8] {
        &self.text
    }

    /// Makes `text` all that is in it.
    pub(super) fn put(&mut self, text: &[u8]) -> Result<(), Errno> {
        if self.text == text {
            return Ok(());
        }
        let mut done = 0;
        while done < text.len() {
            match rustix::io::pwrite(&self.file, &text[done..], done as u64) {
                Ok(0) => return Err(Errno::IO),
                Ok(len) => done += len,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        if text.len() < self.text.len() {
            rustix::fs::ftruncate(&self.file, text.len() as u64)?;
        }
        self.text = text.to_vec();
        Ok(())
    }
}

/// The files of a directory that programs read, by name.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    slots: Vec<(&'static str, Option<Slot>)>,
}

impl Directory {
    /// Opens the files of these names, and makes those of them that are to be there anyway.
    fn open(path: &Path, names: &[(&'static str, bool)]) -> Self {
        let slot = |&(name, is_always): &(&'static str, bool)| {
            let file = path.join(name);
            let found = Slot::open(&file);
            if found.is_none() && is_always {
                let made = files::replace(&file, b"", 0o644);
                return (name, made.ok().and_then(|()| Slot::open(&file)));
            }
            (name, found)
        };
        Self {
            path: path.to_owned(),
            slots: names.iter().map(slot).collect(),
        }
    }

    /// Makes `text` what is in the file, or removes it. `mode` is for a new one.
    pub(super) fn put(&mut self, name: &str, text: Option<&str>, mode: u32) -> Result<(), Errno> {
        let slot = self.slots.iter_mut().find(|(known, _)| *known == name);
        let slot = slot.map(|(_, slot)| slot);
        let path = self.path.join(name);
        match (slot, text) {
            (Some(Some(slot)), Some(text)) => slot.put(text.as_bytes()),
            // It was not there.
            (Some(None), None) => Ok(()),
            (slot, text) => {
                if let Some(slot) = slot {
                    *slot = None;
                }
                match text {
                    Some(text) => files::replace(&path, text.as_bytes(), mode),
                    None => files::remove(&path),
                }
            }
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Prepared {
    /// The kernel's random numbers.
    pub(super) random: Option<OwnedFd>,
    /// The switch by which processes go on.
    pub(super) switch: Option<OwnedFd>,
    /// Files of `/run/ratoon`.
    pub(super) directory: Option<Directory>,
    /// Files of `/etc`: in memory (see `etc.rs`), unless that failed at boot.
    pub(super) etc: Etc,
}

/// Files of `/etc`. Where they are on the disk, open ones would keep it from becoming read-only, so they are closed soon.
#[derive(Debug, Default)]
pub(super) struct Etc {
    pub(super) machine_id: Option<Slot>,
    pub(super) hostname: Option<Slot>,
    pub(super) hosts: Option<Slot>,
}

impl Prepared {
    /// Opens what there is; `dir` is `/run/ratoon`. `None` while other processes run.
    pub(super) fn open(dir: &Path) -> Option<Self> {
        if !quiet::are_processes_frozen() || quiet::are_file_systems_frozen() {
            return None;
        }
        let etc = Path::new(settings::ETC);
        Some(Self {
            random: settings::open_random().ok(),
            switch: quiet::open_switch().ok(),
            directory: identity::is_secret(dir)
                .is_ok()
                .then(|| Directory::open(dir, &identity::FILES)),
            etc: Etc {
                machine_id: Slot::open(&etc.join("machine-id")),
                hostname: Slot::open(&etc.join("hostname")),
                hosts: Slot::open(&etc.join("hosts")),
            },
        })
    }

    /// The kernel's random numbers, to be written.
    pub(super) fn random(&self) -> Option<BorrowedFd<'_>> {
        self.random.as_ref().map(AsFd::as_fd)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_slot_holds_exactly_what_was_put_into_it_last() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("name");
        fs::write(&path, "sandbox\n").unwrap();
        let mut slot = Slot::open(&path).unwrap();
        for text in ["longer-than-that\n", "short\n", "short\n", "", "again\n"] {
            slot.put(text.as_bytes()).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
            assert_eq!(slot.text(), text.as_bytes());
        }
    }

    #[test]
    fn only_a_plain_small_file_with_one_name_is_written_in_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("file"), "x").unwrap();
        assert!(Slot::open(&path("file")).is_some());
        std::os::unix::fs::symlink("file", path("link")).unwrap();
        assert!(Slot::open(&path("link")).is_none());
        fs::hard_link(path("file"), path("second")).unwrap();
        assert!(Slot::open(&path("file")).is_none());
        fs::write(path("long"), vec![0; MAX_LEN + 1]).unwrap();
        assert!(Slot::open(&path("long")).is_none());
        assert!(Slot::open(&path("none")).is_none());
        assert!(Slot::open(dir.path()).is_none());
    }

    #[test]
    fn files_come_and_go_with_their_values() {
        let dir = tempfile::tempdir().unwrap();
        let names = [("id", true), ("message", false)];
        let mut directory = Directory::open(dir.path(), &names);
        let read = |name: &str| fs::read_to_string(dir.path().join(name)).ok();
        directory.put("id", Some("a\n"), 0o644).unwrap();
        directory.put("message", None, 0o644).unwrap();
        assert_eq!((read("id"), read("message")), (Some("a\n".into()), None));
        directory.put("message", Some("hello\n"), 0o644).unwrap();
        assert_eq!(read("message"), Some("hello\n".into()));
        directory = Directory::open(dir.path(), &names);
        directory.put("message", None, 0o644).unwrap();
        directory.put("id", Some("b\n"), 0o644).unwrap();
        assert_eq!((read("id"), read("message")), (Some("b\n".into()), None));
    }
}
