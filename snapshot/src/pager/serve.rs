//! The pager's life: begun with its socket by whoever starts the first clone, it ends by itself a
//! while after the last one has gone.
//!
//! Whoever connects holds a lock on the socket's folder (flock), and so does a pager that ends: no
//! clone is ever handed to a pager that is about to go.
//!
//! This thread fetches nothing, so that it can say every [`BEAT`] that the pager lives: a clone that hears
//! nothing for long knows that the process is stopped.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};

use super::clone::{self, Pulse};
use super::fill::Filler;
use super::link;
use crate::chunks::source::PageSource;
use crate::error::{Context as _, Result};
use crate::pages::Run;

/// The most threads that fetch a working set.
const MOST_THREADS: usize = 4;

/// How often clones hear from their pager.
pub const BEAT: Duration = Duration::from_secs(5);
/// How long the storage may take for one chunk.
pub const FETCH: Duration = Duration::from_secs(60);

/// How long one that has refused a clone waits for another.
const LAST_LOOK: Duration = Duration::from_millis(10);

/// A pager's place in the world.
#[derive(Debug)]
pub struct Pager {
    /// A listening SOCK_SEQPACKET socket, bound to `path`.
    pub listener: OwnedFd,
    /// Removed in the end.
    pub path: PathBuf,
    /// How long it stays without a clone.
    pub linger: Duration,
    /// How often clones hear from it: [`BEAT`].
    pub beat: Duration,
    /// How long the storage may take for one chunk before the clone that waits for it is told to end: [`FETCH`].
    pub fetch: Duration,
}

/// What all clones share.
struct Shared {
    filler: Filler,
    working_set: Vec<Run>,
    clones: AtomicUsize,
    pulses: Mutex<Vec<Weak<Pulse>>>,
    /// Written when a clone goes.
    gone: OwnedFd,
}

impl Pager {
    /// Serves clones from `source` until there are none. `working_set` is fetched at once.
    ///
    /// # Errors
    /// When the system refuses memory, threads or descriptors.
    pub fn run(self, source: Box<dyn PageSource>, working_set: &[Run]) -> Result<()> {
        let what = "the pager's sockets".as_ref();
        let filler = Filler::new(source)?;
        let working_set = whole_chunks(&filler, working_set);
        let shared = Arc::new(Shared {
            filler,
            working_set,
            clones: AtomicUsize::new(0),
            pulses: Mutex::new(Vec::new()),
            gone: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).at("make", what)?,
        });
        shared.prefetch();
        let mut idle_since = Instant::now();
        let mut beaten = Instant::now();
        loop {
            if beaten.elapsed() >= self.beat {
                shared.beat(self.fetch);
                beaten = Instant::now();
            }
            let is_idle = shared.clones.load(Ordering::Acquire) == 0;
            let timeout = timespec(match is_idle {
                true => self.linger.saturating_sub(idle_since.elapsed()),
                false => self.beat.saturating_sub(beaten.elapsed()),
            });
            let mut fds = [
                PollFd::new(&self.listener, PollFlags::IN),
                PollFd::new(&shared.gone, PollFlags::IN),
            ];
            match poll(&mut fds, Some(&timeout)) {
                Ok(_) | Err(Errno::INTR) => {}
                other => drop(other.at("wait for", what)?),
            }
            if !fds[1].revents().is_empty() {
                let _ = rustix::io::read(&shared.gone, &mut [0; 8]);
                idle_since = Instant::now();
            }
            if !fds[0].revents().is_empty() {
                self.accept(&shared).at("accept a clone on", what)?;
                idle_since = Instant::now();
            } else if is_idle && idle_since.elapsed() >= self.linger {
                if self.ends().at("lock the folder of", &self.path)? {
                    return Ok(());
                }
                idle_since = Instant::now();
            }
        }
    }

    /// Tells clones that wait why there is no memory for them, then ends: what is wrong may be put
    /// right before the next one comes.
    ///
    /// # Errors
    /// As [`Pager::run`].
    pub fn refuse(self, error: &dyn std::error::Error) -> Result<()> {
        let reason = clone::chain(error);
        let mut patience = self.linger;
        loop {
            let timeout = timespec(patience);
            let mut fds = [PollFd::new(&self.listener, PollFlags::IN)];
            let ready = poll(&mut fds, Some(&timeout)).at("wait for", &self.path)?;
            if ready > 0 {
                let socket = accept_with(&self.listener, SocketFlags::CLOEXEC)
                    .at("accept a clone on", &self.path)?;
                let _ = link::send_failed(socket.as_fd(), &reason);
                patience = LAST_LOOK;
            } else if self.ends().at("lock the folder of", &self.path)? {
                return Ok(());
            }
        }
    }

    fn accept(&self, shared: &Arc<Shared>) -> io::Result<()> {
        let socket = match accept_with(&self.listener, SocketFlags::CLOEXEC) {
            Ok(socket) => socket,
            Err(Errno::INTR | Errno::CONNABORTED | Errno::AGAIN) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        shared.clones.fetch_add(1, Ordering::AcqRel);
        let shared = shared.clone();
        let pulse = Arc::new(Pulse::new(socket));
        shared.pulses().push(Arc::downgrade(&pulse));
        std::thread::Builder::new()
            .name("clone".into())
            .spawn(move || {
                clone::serve(&shared.filler, &pulse, &shared.working_set);
                drop(pulse);
                shared.clones.fetch_sub(1, Ordering::AcqRel);
                // It can only fail when the counter is full, and then it is readable anyway.
                let _ = rustix::io::write(&shared.gone, &1_u64.to_ne_bytes());
            })?;
        Ok(())
    }

    /// Whether this is the end: nobody waits to be served, or is about to.
    fn ends(&self) -> io::Result<bool> {
        let folder = self.path.parent().unwrap_or(&self.path);
        let lock = File::open(folder)?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
        let mut fds = [PollFd::new(&self.listener, PollFlags::IN)];
        if poll(&mut fds, Some(&Timespec::default()))? > 0 {
            return Ok(false);
        }
        std::fs::remove_file(&self.path)?;
        Ok(true)
    }
}

impl Shared {
    /// All clones hear that the pager lives, or why they must end.
    fn beat(&self, fetch: Duration) {
        self.pulses().retain(|pulse| {
            let pulse = pulse.upgrade();
            if let Some(pulse) = &pulse {
                pulse.beat(fetch);
            }
            pulse.is_some()
        });
    }

    fn pulses(&self) -> MutexGuard<'_, Vec<Weak<Pulse>>> {
        // A list of handles is whole whatever its users do.
        self.pulses.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fetches the working set beside whatever else happens. A chunk that cannot be had is an error
    /// only for a clone that touches it.
    fn prefetch(self: &Arc<Self>) {
        if self.working_set.is_empty() {
            return;
        }
        let chunks: Vec<u64> = self
            .working_set
            .iter()
            .flat_map(|run| self.filler.chunk_at(run.offset)..=self.filler.chunk_at(run.end() - 1))
            .collect();
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let (chunks, next) = (Arc::new(chunks), Arc::new(AtomicU64::new(0)));
        for _ in 0..threads.min(MOST_THREADS) {
            let (shared, chunks, next) = (self.clone(), chunks.clone(), next.clone());
            let work = move || {
                let mut buffer = Vec::new();
                while let Some(&chunk) = chunks.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
                    let _ = shared.filler.ensure(chunk, &mut buffer);
                }
            };
            // Without such a thread the clones' own threads fetch.
            let _ = std::thread::Builder::new().name("fetch".into()).spawn(work);
        }
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: duration.as_secs().cast_signed(),
        tv_nsec: duration.subsec_nanos().into(),
    }
}

/// Runs that begin and end with chunks, ascending, none twice.
fn whole_chunks(filler: &Filler, runs: &[Run]) -> Vec<Run> {
    let mut whole: Vec<Run> = Vec::new();
    for run in runs.iter().filter(|run| run.length > 0) {
        let last = run.end() - 1;
        if last >= filler.memory_bytes() {
            break;
        }
        let first = filler.chunk_at(run.offset);
        let this = filler.place(first, filler.chunk_at(last) + 1 - first);
        match whole.last_mut() {
            Some(before) if before.end() >= this.offset => {
                before.length = this.end().max(before.end()) - before.offset;
            }
            _ => whole.push(this),
        }
    }
    whole
}
