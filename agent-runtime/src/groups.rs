//! Control groups: one for each process that a client starts, so that all its descendants can be
//! ended together, wherever they hide; and one above them, which the freezer stops.
//!
//! ```text
//!   /sys/fs/cgroup            PID 1 (the runtime)
//!                 /ratoon     pids.max: a fork bomb leaves the runtime room to end it
//!                        /0 /1 …   used again when they are empty: making one costs more than a lookup
//! ```
//!
//! Shares of processors are not theirs: each client's process begins a session, and the kernel gives each session one
//! share (CONFIG_SCHED_AUTOGROUP), and the runtime another.
//!
//! How it fails: without control groups (a test on the host, a kernel without them) there are none,
//! and ending a process ends its process group.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags, mkdirat, openat};
use rustix::io::Errno;

use crate::swap::forms::{Fd, carried};

/// The group above all that clients start.
pub const BASE: &str = "/sys/fs/cgroup/ratoon";

/// Empty groups beyond these are removed.
const KEEP_IDLE: usize = 16;

/// One process's group.
#[derive(Debug)]
pub struct Group {
    dir: Fd,
    name: String,
}

/// All groups.
#[derive(Debug, Default)]
pub struct Groups {
    base: Option<Fd>,
    idle: Vec<Group>,
    next: u32,
    /// A program of the guest has enabled controllers below: what it set in a group would be the next
    /// process's, so no group is used again.
    touched: bool,
}

carried!(Group { dir, name });
carried!(Groups {
    base,
    idle,
    next,
    touched
});

impl Groups {
    /// Makes the group above all others; with an error, everything works without groups.
    ///
    /// # Errors
    /// What the system says, with the file.
    pub fn set_up() -> Result<Self, String> {
        let failed = |path: &str, error: std::io::Error| format!("{path}: {error}");
        let control = "/sys/fs/cgroup/cgroup.subtree_control";
        fs::write(control, "+pids").map_err(|error| failed(control, error))?;
        match fs::create_dir(BASE) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(failed(BASE, error));
            }
            _ => {}
        }
        let number =
            |path: &str| -> Option<u64> { fs::read_to_string(path).ok()?.trim().parse().ok() };
        let threads = number("/proc/sys/kernel/threads-max").unwrap_or(1024);
        let pids = number("/proc/sys/kernel/pid_max").unwrap_or(32768);
        let limit = (threads.min(pids) / 10 * 9).max(64);
        let path = format!("{BASE}/pids.max");
        fs::write(&path, limit.to_string()).map_err(|error| failed(&path, error))?;
        let base = open_dir(rustix::fs::CWD, BASE).map_err(|error| failed(BASE, error.into()))?;
        Ok(Self {
            base: Some(base.into()),
            ..Self::default()
        })
    }

    /// An empty group, if there are groups.
    pub fn take(&mut self) -> Option<Group> {
        let base = self.base.as_ref()?;
        for at in 0..self.idle.len() {
            if !self.touched && self.idle[at].is_clean() {
                return Some(self.idle.swap_remove(at));
            }
        }
        loop {
            let name = self.next.to_string();
            self.next += 1;
            match mkdirat(base, name.as_str(), Mode::from_raw_mode(0o755)) {
                Ok(()) => {}
                Err(Errno::EXIST) => continue,
                Err(_) => return None,
            }
            let dir = open_dir(base.as_fd(), &name).ok()?;
            return Some(Group {
                dir: dir.into(),
                name,
            });
        }
    }

    /// A group whose process has ended. Descendants may still be in it.
    pub fn give_back(&mut self, group: Group) {
        self.idle.push(group);
        let Some(base) = &self.base else { return };
        self.touched = self.touched || has_controllers(base);
        let most = if self.touched { 0 } else { KEEP_IDLE };
        let mut surplus = self.idle.len().saturating_sub(most);
        // One that is not empty is tried again at the next end.
        self.idle.retain(|group| {
            let flags = rustix::fs::AtFlags::REMOVEDIR;
            let removed =
                surplus > 0 && rustix::fs::unlinkat(base, group.name.as_str(), flags).is_ok();
            surplus -= usize::from(removed);
            !removed
        });
    }
}

impl Group {
    /// For CLONE_INTO_CGROUP.
    pub fn fd(&self) -> RawFd {
        self.dir.as_raw_fd()
    }

    /// Kills every process in it.
    ///
    /// # Errors
    /// When the kernel has no `cgroup.kill`.
    pub fn kill(&self) -> rustix::io::Result<()> {
        let file = openat(
            &self.dir,
            "cgroup.kill",
            OFlags::WRONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        rustix::io::write(file, b"1").map(|_| ())
    }

    /// Whether it is empty and was not left frozen.
    fn is_clean(&self) -> bool {
        let text = read_start(&self.dir, "cgroup.events");
        text.is_ok_and(|(text, len)| text[..len] == *b"populated 0\nfrozen 0\n")
    }
}

/// Whether controllers are enabled for the groups in `base`; we enable none.
fn has_controllers(base: &Fd) -> bool {
    let text = read_start(base, "cgroup.subtree_control");
    text.is_ok_and(|(text, len)| text[..len].iter().any(u8::is_ascii_alphabetic))
}

fn read_start(dir: &Fd, name: &str) -> rustix::io::Result<([u8; 64], usize)> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = openat(dir, name, flags, Mode::empty())?;
    let mut text = [0; 64];
    let len = rustix::io::read(file, &mut text)?;
    Ok((text, len))
}

fn open_dir(at: impl AsFd, path: impl AsRef<Path>) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(at, path.as_ref(), flags, Mode::empty())
}
