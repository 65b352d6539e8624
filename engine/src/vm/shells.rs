//! Warm shells: VMMs' processes made ahead, so that a child costs no process start.
//!
//! ```text
//!   Shells::new --spawn k of each class--> ready --take--> a VM's process
//!                          ^----------- in the background -----'
//! ```
//!
//! A shell is of one class: so many vCPUs, so much memory. One that has died meanwhile is passed over; with none
//! ready a process is started as without shells. They end with this process, or with the last handle.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use ratoon_vmm_api::send_descriptors;

/// vCPUs, and memory in MiB.
pub type Class = (u32, u64);

/// Handle to the shells of this process.
#[derive(Debug, Clone)]
pub struct Shells(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    program: PathBuf,
    /// How many of each class are to be ready.
    wanted: BTreeMap<Class, usize>,
    ready: Mutex<BTreeMap<Class, VecDeque<Shell>>>,
    /// One refill at a time.
    refill: Mutex<()>,
}

/// A process that waits. Dropped, it is ended.
#[derive(Debug)]
struct Shell {
    child: Option<Child>,
    socket: UnixStream,
}

impl Shells {
    /// Starts so many of each class, and waits until they have been started, not until they are ready.
    ///
    /// # Errors
    /// When the first process cannot be made.
    pub fn new(program: &Path, wanted: BTreeMap<Class, usize>) -> std::io::Result<Self> {
        let shells = Self(Arc::new(Inner {
            program: program.to_owned(),
            wanted,
            ready: Mutex::default(),
            refill: Mutex::default(),
        }));
        shells.0.fill()?;
        Ok(shells)
    }

    /// How many of a class are there, ready or about to be.
    pub fn count(&self, class: Class) -> usize {
        self.0.ready().get(&class).map_or(0, VecDeque::len)
    }

    /// Makes one of them a VM's process with these descriptors. `None`: none is there.
    pub(super) fn take(&self, class: Class, fds: &[BorrowedFd<'_>]) -> Option<Child> {
        loop {
            let mut shell = self.0.ready().get_mut(&class)?.pop_front()?;
            let lives = |child: &mut Child| matches!(child.try_wait(), Ok(None));
            let is_alive = shell.child.as_mut().is_some_and(lives);
            if is_alive && send_descriptors(&shell.socket, fds).is_ok() {
                return shell.child.take();
            }
        }
    }

    /// Starts what is missing, in the background.
    pub(crate) fn refill(&self) {
        let inner: Weak<Inner> = Arc::downgrade(&self.0);
        // Without a thread there are fewer shells, and the next call tries again.
        let _ = std::thread::Builder::new()
            .name("shells".into())
            .spawn(move || {
                if let Some(inner) = inner.upgrade() {
                    let _ = inner.fill();
                }
            });
    }
}

impl Inner {
    fn ready(&self) -> MutexGuard<'_, BTreeMap<Class, VecDeque<Shell>>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fill(&self) -> std::io::Result<()> {
        let _alone = self.refill.lock().unwrap_or_else(PoisonError::into_inner);
        for (&class, &wanted) in &self.wanted {
            while self.ready().get(&class).map_or(0, VecDeque::len) < wanted {
                let shell = self.start(class)?;
                self.ready().entry(class).or_default().push_back(shell);
            }
        }
        Ok(())
    }

    fn start(&self, (vcpus, mib): Class) -> std::io::Result<Shell> {
        let (ours, theirs) = UnixStream::pair()?;
        let child = Command::new(&self.program)
            .arg("--shell")
            .arg(format!("{vcpus}:{mib}"))
            .env_clear()
            .stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Shell {
            child: Some(child),
            socket: ours,
        })
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // Both fail only when it has been reaped, which nobody but us does.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Descriptors of a VM, for a shell: its log in front.
pub(super) fn with_log<'f>(log: &'f impl AsFd, fds: &[BorrowedFd<'f>]) -> Vec<BorrowedFd<'f>> {
    std::iter::once(log.as_fd())
        .chain(fds.iter().copied())
        .collect()
}
