//! The pager's end in a VM's process: memory that comes as it is touched.
//!
//! A thread of its own waits for the pager's word and touches no guest memory, so that it is never
//! held up by a fault. When the pager fails, goes, or hangs, every other thread may be waiting for a page
//! that will never come: the process then ends where it stands, its report written.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use ratoon_snapshot::pager::{Link, Part, Userfaultfd, Word};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Why memory cannot come from a pager.
#[derive(Debug, thiserror::Error)]
pub enum PagerError {
    /// The pager's first word.
    #[error("the snapshot's memory cannot be had from its pager")]
    Memory(#[source] std::io::Error),
    /// No userfaultfd.
    #[error(
        "memory in chunks needs a userfaultfd that sees the kernel's own accesses: let this user \
         open /dev/userfaultfd, run as root, or take snapshots without --compress"
    )]
    NotPermitted(#[source] std::io::Error),
    /// Registering.
    #[error("the system refuses a userfaultfd for guest memory; it takes Linux 5.14 or later")]
    Register(#[source] std::io::Error),
    /// The memory is not this machine's.
    #[error("the snapshot's memory has {found} bytes, the machine {wanted}")]
    Size {
        /// The pager's.
        found: u64,
        /// The machine's.
        wanted: u64,
    },
    /// A thread.
    #[error("the system refuses a thread for the pager")]
    Thread(#[source] std::io::Error),
    /// The memory that was not touched yet cannot be fetched.
    #[error("the pager has gone")]
    Gone,
}

/// What is done when the pager has failed; it does not return.
pub type GiveUp = Box<dyn FnOnce(Vec<String>) + Send>;

/// A connection to a pager, and what to do when it fails.
pub struct PagerLink {
    link: Arc<Link>,
    give_up: GiveUp,
}

/// The pager of a running machine.
#[derive(Debug)]
pub struct Pager {
    link: Arc<Link>,
    completed: Mutex<Receiver<()>>,
    /// While it is open, no missing page is ever resolved but by the pager.
    _faults: Userfaultfd,
}

impl PagerLink {
    /// On an inherited socket. `give_up` ends the process with these causes.
    pub fn new(socket: OwnedFd, give_up: GiveUp) -> Self {
        Self {
            link: Arc::new(Link::new(socket)),
            give_up,
        }
    }

    /// The memory that all clones of the generation map, `wanted` bytes long.
    pub(crate) fn memory(&self, wanted: u64) -> Result<File, PagerError> {
        let (file, found) = self.link.memory().map_err(PagerError::Memory)?;
        match found == wanted {
            true => Ok(file),
            false => Err(PagerError::Size { found, wanted }),
        }
    }

    /// Hands the faults of `memory`, privately mapped from that file and not touched yet, to the
    /// pager.
    pub(crate) fn attach(self, memory: &GuestMemoryMmap) -> Result<Pager, PagerError> {
        let faults = Userfaultfd::new().map_err(PagerError::NotPermitted)?;
        let mut parts = Vec::new();
        let mut offset = 0;
        for region in memory.iter() {
            let address = region.as_ptr() as usize;
            faults
                .register(address, region.len() as usize)
                .map_err(PagerError::Register)?;
            parts.push(Part {
                address: address as u64,
                offset,
                length: region.len(),
            });
            offset += region.len();
        }
        self.link
            .attach(&faults, &parts)
            .map_err(PagerError::Memory)?;
        let (sender, completed) = channel();
        let (link, give_up) = (self.link.clone(), self.give_up);
        std::thread::Builder::new()
            .name("pager".into())
            .stack_size(128 * 1024)
            .spawn(move || watch(&link, &sender, give_up))
            .map_err(PagerError::Thread)?;
        Ok(Pager {
            link: self.link,
            completed: Mutex::new(completed),
            _faults: faults,
        })
    }
}

impl Pager {
    /// Has all of the generation's memory fetched, so that its file can be read.
    ///
    /// # Errors
    /// [`PagerError::Gone`]; the machine ends then, too.
    pub(crate) fn complete(&self) -> Result<(), PagerError> {
        let completed = self
            .completed
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.link.complete().map_err(|_| PagerError::Gone)?;
        completed.recv().map_err(|_| PagerError::Gone)
    }
}

/// The pager's words until the last one.
fn watch(link: &Link, completed: &Sender<()>, give_up: GiveUp) {
    let causes = loop {
        match link.wait() {
            Word::Complete => drop(completed.send(())),
            Word::Failed(reason) => {
                let what = "the VM cannot go on: its snapshot is damaged or out of reach";
                break vec![what.to_owned(), reason];
            }
            Word::Silent(time) => {
                let what = "the VM cannot go on without the rest of its memory";
                let why = format!(
                    "the process that fetches it from the snapshot (ratoon-pager) has said nothing for \
                     {} s: it was stopped, or hangs",
                    time.as_secs()
                );
                break vec![what.to_owned(), why];
            }
            Word::Gone => {
                let what = "the VM cannot go on without the rest of its memory";
                let why = "the process that fetches it from the snapshot (ratoon-pager) has ended";
                break vec![what.to_owned(), why.to_owned()];
            }
        }
    };
    give_up(causes);
}
