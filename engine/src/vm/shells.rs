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
    ready: Mutex<BTreeMap<Class, Ready>>,
    /// One refill at a time.
    refill: Mutex<()>,
}

#[derive(Debug, Default)]
struct Ready {
    shells: VecDeque<Shell>,
    /// How many are still to be made.
    owed: usize,
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

    /// None are kept ready: a place for those that are made [`ahead`](Self::ahead).
    pub(crate) fn none(program: &Path) -> Self {
        Self(Arc::new(Inner {
            program: program.to_owned(),
            wanted: BTreeMap::new(),
            ready: Mutex::default(),
            refill: Mutex::default(),
        }))
    }

    /// So many of a class are about to be taken: starts what is missing, in the background.
    pub(crate) fn ahead(&self, class: Class, count: usize) {
        self.in_background(move |inner| inner.fill_to(class, count));
    }

    /// How many of a class are there, ready or about to be.
    pub fn count(&self, class: Class) -> usize {
        self.0
            .ready()
            .get(&class)
            .map_or(0, |ready| ready.shells.len())
    }

    /// Makes one of them a VM's process with these descriptors. `None`: none is there.
    pub(super) fn take(&self, class: Class, fds: &[BorrowedFd<'_>]) -> Option<Child> {
        loop {
            let shell = {
                let mut ready = self.0.ready();
                let ready = ready.get_mut(&class)?;
                let shell = ready.shells.pop_front();
                if shell.is_none() {
                    // Whoever asks makes one: it is not to be made twice.
                    ready.owed = ready.owed.saturating_sub(1);
                }
                shell
            };
            let mut shell = shell?;
            let lives = |child: &mut Child| matches!(child.try_wait(), Ok(None));
            let is_alive = shell.child.as_mut().is_some_and(lives);
            if is_alive && send_descriptors(&shell.socket, fds).is_ok() {
                return shell.child.take();
            }
        }
    }

    /// Starts what is missing, in the background, and ends what is too many.
    pub(crate) fn refill(&self) {
        self.in_background(Inner::fill);
    }

    fn in_background(&self, what: impl FnOnce(&Inner) -> std::io::Result<()> + Send + 'static) {
        let inner: Weak<Inner> = Arc::downgrade(&self.0);
        // Without a thread there are fewer shells, and a process is made when it is needed.
        let _ = std::thread::Builder::new()
            .name("shells".into())
            .spawn(move || inner.upgrade().map(|inner| what(&inner)));
    }
}

impl Inner {
    fn ready(&self) -> MutexGuard<'_, BTreeMap<Class, Ready>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fill(&self) -> std::io::Result<()> {
        for (&class, &wanted) in &self.wanted {
            self.fill_to(class, wanted)?;
            let surplus = {
                let mut ready = self.ready();
                let shells = &mut ready.entry(class).or_default().shells;
                shells.split_off(wanted.min(shells.len()))
            };
            drop(surplus);
        }
        Ok(())
    }

    fn fill_to(&self, class: Class, count: usize) -> std::io::Result<()> {
        let _alone = self.refill.lock().unwrap_or_else(PoisonError::into_inner);
        let is_owed = || {
            let mut ready = self.ready();
            let owed = &mut ready.entry(class).or_default().owed;
            let is_owed = *owed > 0;
            *owed = owed.saturating_sub(1);
            is_owed
        };
        {
            let mut ready = self.ready();
            let of_class = ready.entry(class).or_default();
            of_class.owed = count.saturating_sub(of_class.shells.len());
        }
        while is_owed() {
            let shell = self.start(class)?;
            let mut ready = self.ready();
            ready.entry(class).or_default().shells.push_back(shell);
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
