//! One clone: its faults are resolved, its working set is put in place beside them.
//!
//! Each has a [`Pulse`], by which the pager's own thread tells it that the pager lives, and when what it waits
//! for does not come from the storage: the clone's threads may hang in a read then.

use std::fmt::Write as _;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::fill::{Chunk, Filler};
use super::link::{self, Part, Request};
use super::uffd::{Resolved, Userfaultfd, With};
use crate::pages::Run;

/// An error with its causes, on one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        // Writing into a string does not fail.
        let _ = write!(text, ": {cause}");
        source = cause.source();
    }
    text
}

/// Since when a thread waits for the storage.
#[derive(Debug, Default)]
struct Watch(Mutex<Option<Instant>>);

impl Watch {
    fn set(&self, since: Option<Instant>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = since;
    }

    fn is_over(&self, most: Duration) -> bool {
        let since = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        since.is_some_and(|since| since.elapsed() > most)
    }
}

/// A clone as the pager's own thread sees it.
#[derive(Debug)]
pub(super) struct Pulse {
    socket: OwnedFd,
    /// It has had its first word.
    is_greeted: AtomicBool,
    fault: Watch,
    completion: Watch,
}

impl Pulse {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            is_greeted: AtomicBool::new(false),
            fault: Watch::default(),
            completion: Watch::default(),
        }
    }

    /// Says that the pager lives, or that a chunk has not come for longer than `most`. Never waits.
    pub(super) fn beat(&self, most: Duration) {
        if !self.is_greeted.load(Ordering::Acquire) {
            return;
        }
        if self.fault.is_over(most) || self.completion.is_over(most) {
            let reason = format!(
                "its memory has not come for {} s: the storage of the snapshot does not answer",
                most.as_secs_f32()
            );
            let _ = link::send_failed(self.socket.as_fd(), &reason);
        } else {
            link::send_beat(self.socket.as_fd());
        }
    }
}

/// Serves a clone until it goes or must end. `working_set` is runs of whole chunks.
pub(super) fn serve(filler: &Filler, pulse: &Pulse, working_set: &[Run]) {
    let socket = pulse.socket.as_fd();
    let bytes = filler.memory_bytes();
    if link::send_hello(socket, filler.memory().as_fd(), bytes).is_err() {
        return;
    }
    pulse.is_greeted.store(true, Ordering::Release);
    let Request::Attach(faults, parts) = link::request(socket, bytes) else {
        return;
    };
    let clone = Clone {
        filler,
        pulse,
        socket,
        faults,
        parts,
        gone: AtomicBool::new(false),
    };
    std::thread::scope(|scope| {
        if !working_set.is_empty() {
            scope.spawn(|| clone.replay(working_set));
        }
        let served = clone.serve(|| {
            scope.spawn(|| clone.complete());
        });
        clone.gone.store(true, Ordering::Relaxed);
        if let Err(reason) = served {
            // Whether it hears the reason or only that we have gone: it ends.
            let _ = link::send_failed(socket, &reason);
        }
    });
}

struct Clone<'p> {
    filler: &'p Filler,
    pulse: &'p Pulse,
    socket: BorrowedFd<'p>,
    faults: Userfaultfd,
    parts: Vec<Part>,
    gone: AtomicBool,
}

impl Clone<'_> {
    /// Resolves faults until the clone has gone; an error is why it must end.
    fn serve(&self, complete: impl Fn()) -> Result<(), String> {
        let system = |error: io::Error| format!("the pager cannot serve its faults: {error}");
        let (mut addresses, mut buffer) = (Vec::new(), Vec::new());
        loop {
            let mut fds = [
                PollFd::new(&self.faults, PollFlags::IN),
                PollFd::new(&self.socket, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(system(error.into())),
            }
            if !fds[1].revents().is_empty() {
                match link::request(self.socket, self.filler.memory_bytes()) {
                    Request::Complete => complete(),
                    Request::Attach(..) | Request::Gone => return Ok(()),
                }
            }
            if fds[0].revents().is_empty() {
                continue;
            }
            self.faults.faults(&mut addresses).map_err(system)?;
            for &address in &addresses {
                if self.fault(address, &mut buffer)? == Resolved::ProcessGone {
                    return Ok(());
                }
            }
        }
    }

    /// Resolves the chunk around an address.
    fn fault(&self, address: u64, buffer: &mut Vec<u8>) -> Result<Resolved, String> {
        let part = self
            .parts
            .iter()
            .find(|part| (part.address..part.address + part.length).contains(&address))
            .ok_or_else(|| format!("a fault at {address:#x}, where it has no memory"))?;
        let chunk = self.filler.chunk_at(part.offset + (address - part.address));
        self.pulse.fault.set(Some(Instant::now()));
        let resolved = self.chunks(chunk, 1, buffer);
        self.pulse.fault.set(None);
        resolved.map_err(|error| format!("its memory cannot be restored: {}", chain(&error)))
    }

    /// Fetches chunks that are missing and resolves them in every part that has them; runs of one
    /// kind go in one call.
    fn chunks(&self, first: u64, count: u64, buffer: &mut Vec<u8>) -> crate::Result<Resolved> {
        let mut begin = first;
        let mut kind = None;
        for chunk in first..first + count {
            let this = self.filler.ensure(chunk, buffer)?;
            if kind.is_some_and(|kind| kind != this)
                && self.resolve(begin, chunk - begin, kind)? == Resolved::ProcessGone
            {
                return Ok(Resolved::ProcessGone);
            }
            if kind != Some(this) {
                (begin, kind) = (chunk, Some(this));
            }
        }
        self.resolve(begin, first + count - begin, kind)
    }

    fn resolve(&self, first: u64, count: u64, kind: Option<Chunk>) -> crate::Result<Resolved> {
        use crate::error::Context as _;
        let with = match kind {
            None => return Ok(Resolved::Yes),
            Some(Chunk::Zero) => With::Zeroes,
            Some(Chunk::Filled) => With::Memory,
        };
        let run = self.filler.place(first, count);
        for part in &self.parts {
            let start = run.offset.max(part.offset);
            let end = run.end().min(part.offset + part.length);
            if start < end {
                let address = part.address + (start - part.offset);
                let resolved = self
                    .faults
                    .resolve(address, end - start, with)
                    .at("put a page into", "the VM's memory".as_ref())?;
                if resolved == Resolved::ProcessGone {
                    return Ok(resolved);
                }
            }
        }
        Ok(Resolved::Yes)
    }

    /// Puts what clones touched first, another time, in place. What cannot be had is left to the
    /// fault that asks for it, if one ever does.
    fn replay(&self, working_set: &[Run]) {
        let mut buffer = Vec::new();
        for run in working_set {
            let first = self.filler.chunk_at(run.offset);
            let end = self.filler.chunk_at(run.end() - 1) + 1;
            let resolved = self.chunks(first, end - first, &mut buffer);
            let gone = self.gone.load(Ordering::Relaxed);
            if gone || matches!(resolved, Ok(Resolved::ProcessGone)) {
                return;
            }
        }
    }

    /// Fetches all there is.
    fn complete(&self) {
        let watch = &self.pulse.completion;
        let completed = self.filler.complete(|| watch.set(Some(Instant::now())));
        watch.set(None);
        let said = match completed {
            Ok(()) => link::send_complete(self.socket),
            Err(error) => link::send_failed(
                self.socket,
                &format!("its memory cannot be restored: {}", chain(&error)),
            ),
        };
        // A clone that does not hear has gone.
        let _ = said;
    }
}
