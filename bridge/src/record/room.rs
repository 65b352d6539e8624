//! How much of a disk one run's record may take.
//!
//! What a guest causes is refused when there is no room: bodies, and the lines of calls, replays and
//! refusals. The end of a call that has begun and what the host does are always written: so the room
//! is overstepped by a few lines at most.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use ratoon_bridge_api::record::Entry;

/// A run's room.
#[derive(Debug)]
pub struct Room {
    used: AtomicU64,
    most: u64,
}

impl Room {
    pub(super) fn new(most: u64) -> Self {
        Self {
            used: AtomicU64::new(0),
            most,
        }
    }

    /// Counts what is there.
    pub(super) fn count(&self, folders: [&Path; 2]) -> io::Result<()> {
        let mut used = 0_u64;
        for folder in folders {
            for entry in std::fs::read_dir(folder)? {
                let found = entry?.metadata()?;
                if found.is_file() {
                    used = used.saturating_add(found.len());
                }
            }
        }
        self.used.store(used, Ordering::Relaxed);
        Ok(())
    }

    /// Takes so many bytes for a body.
    pub(super) fn take(&self, bytes: u64) -> io::Result<()> {
        let fits = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= self.most);
        self.used
            .try_update(Ordering::Relaxed, Ordering::Relaxed, fits)
            .map(drop)
            .map_err(|_| {
                io::Error::new(
                    io::ErrorKind::QuotaExceeded,
                    format!("the record of this run has {} bytes, which is all that limits.run_record_bytes allows", self.most),
                )
            })
    }

    /// Takes so many bytes for a line.
    pub(super) fn take_line(&self, bytes: u64, entry: &Entry) -> io::Result<()> {
        match entry {
            Entry::Call { .. } | Entry::Replay { .. } | Entry::Refused { .. } => self.take(bytes),
            Entry::Begin { .. }
            | Entry::Vm { .. }
            | Entry::Token { .. }
            | Entry::Answer { .. }
            | Entry::VmGone { .. }
            | Entry::Rest { .. }
            | Entry::Torn { .. } => {
                self.used.fetch_add(bytes, Ordering::Relaxed);
                Ok(())
            }
        }
    }

    /// Gives back what was taken.
    pub(super) fn give_back(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}
