//! virtio-balloon (virtio 1.2, section 5.5), for the one thing that it is good at: the guest reports
//! its free pages, and the host takes them back ("free page reporting", 5.5.6.7).
//!
//! ```text
//!  queue 0 inflate, 1 deflate    acknowledged: the host never asks for pages
//!  queue 2 reporting             a chain of buffers, each a run of free pages --> Reclaim --> used
//! ```
//!
//! Queues that no offered feature asks for do not exist, and those that follow move up (so Linux's
//! driver counts them).
//!
//! **What a reported page holds afterwards.** VIRTIO_BALLOON_F_PAGE_POISON is not offered. So a
//! driver takes a reported page for uninitialised memory once it uses it again, and a kernel that
//! relies on what free pages hold (`init_on_free`, `page_poison`) does not report any
//! (`virtballoon_validate` in Linux). The host may then let a page read as zero or as anything that
//! this machine has had in its memory: nothing of another machine. What it may not do is let a page
//! change that is in use again, so [`Reclaim`] settles at once what a page reads as.
//!
//! How it fails: a chain with readable buffers, or one that is broken, needs a reset. A report is a
//! hint: what the host cannot take back is counted and stays the guest's.

use std::sync::Arc;

use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::virtio::chain::{Chain, Segment};
use crate::virtio::state::{DeviceState, RestoreError, Saved};
use crate::virtio::{Activation, Device, DeviceError, Interrupt, kick_again};

mod state;
#[cfg(test)]
mod tests;

pub use state::BalloonState;

/// VIRTIO_BALLOON_F_PAGE_REPORTING (virtio 1.2, 5.5.3; linux/virtio_balloon.h).
const F_REPORTING: u32 = 5;
/// The queue of reports.
pub const REPORTING: usize = 2;
/// Pages are so long in this device, whatever the guest's are.
pub const PAGE_BYTES: u64 = 4096;

/// Linux puts up to 32 runs into a report and wants a queue with room for one; of the others it
/// uses one entry at a time.
const QUEUE_SIZES: [u16; 3] = [2, 2, 32];
/// Chains taken from a queue in one turn of the event loop. A report can be a gigabyte.
const TURN_CHAINS: u16 = 16;
/// `struct virtio_balloon_config`: where the driver writes how many pages it has given.
const ACTUAL: u64 = 4;

/// Who takes memory back.
pub trait Reclaim: Send + Sync {
    /// The guest does not use `len` bytes from `address` on: whole pages, in guest memory. Afterwards
    /// each of them reads as what this machine has had there or as zero, and does not change until
    /// the guest writes it. Gives how many bytes were taken.
    ///
    /// # Errors
    /// The host's; the pages are then as they were.
    fn reclaim(
        &self,
        memory: &GuestMemoryMmap,
        address: GuestAddress,
        len: u64,
    ) -> std::io::Result<u64>;
}

/// A balloon device.
pub struct Balloon {
    host: Arc<dyn Reclaim>,
    active: Option<Active>,
    chain: Chain,
    /// Pages that the driver says it has given; the host never asks for any.
    actual_pages: u32,
    reports: u64,
    reclaimed_bytes: u64,
    failures: u64,
}

struct Active {
    memory: GuestMemoryMmap,
    queues: Vec<Queue>,
    interrupt: Interrupt,
    kicks: Arc<[EventFd]>,
}

impl Balloon {
    /// A device that hands free pages to `host`.
    pub fn new(host: Arc<dyn Reclaim>) -> Self {
        Self {
            host,
            active: None,
            chain: Chain::default(),
            actual_pages: 0,
            reports: 0,
            reclaimed_bytes: 0,
            failures: 0,
        }
    }
}

impl Device for Balloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << F_REPORTING
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // num_pages, which is the host's wish, is 0; so is all that other features would have.
        let actual = self.actual_pages.to_le_bytes();
        for (at, byte) in (offset..).zip(data) {
            let place = at
                .checked_sub(ACTUAL)
                .and_then(|at| usize::try_from(at).ok());
            *byte = place
                .and_then(|place| actual.get(place))
                .map_or(0, |byte| *byte);
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if offset == ACTUAL
            && let Ok(bytes) = data.try_into()
        {
            self.actual_pages = u32::from_le_bytes(bytes);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.active = Some(Active {
            memory: activation.memory,
            queues: activation.queues,
            interrupt: activation.interrupt,
            kicks: activation.kicks,
        });
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.actual_pages = 0;
    }

    fn process_queue(&mut self, index: usize) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let Active {
            memory,
            queues,
            interrupt,
            kicks,
        } = active;
        let queue = queues
            .get_mut(index)
            .ok_or(DeviceError::Driver("a queue that the balloon has not"))?;
        let at = |source| DeviceError::Queue { index, source };
        let mut used = 0;
        loop {
            while used < TURN_CHAINS && self.chain.pop(queue, memory, index)? {
                if index == REPORTING {
                    if !self.chain.readable().is_empty() {
                        return Err(DeviceError::Driver("readable buffer in a report"));
                    }
                    self.reports += 1;
                    for segment in self.chain.writable() {
                        match reclaim(&*self.host, memory, *segment) {
                            Ok(bytes) => self.reclaimed_bytes += bytes,
                            Err(error) => {
                                self.failures += 1;
                                tracing::debug!(%error, "balloon: free pages stay");
                            }
                        }
                    }
                }
                queue.add_used(memory, self.chain.head(), 0).map_err(at)?;
                used += 1;
            }
            if !queue.enable_notification(memory).map_err(at)? {
                break;
            }
            if used == TURN_CHAINS {
                kick_again(kicks, index)?;
                break;
            }
        }
        if used > 0 && queue.needs_notification(memory).map_err(at)? {
            interrupt.used_buffer();
        }
        Ok(())
    }

    fn save(&self) -> Saved {
        self.saved()
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        self.take_state(state)
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("reports", self.reports),
            ("reclaimed_bytes", self.reclaimed_bytes),
            ("failures", self.failures),
        ]
    }
}

/// Hands over the whole pages in a buffer, which lies in guest memory.
fn reclaim(host: &dyn Reclaim, memory: &GuestMemoryMmap, segment: Segment) -> std::io::Result<u64> {
    let start = segment.address.raw_value();
    // No overflow: the buffer has been checked to lie in guest memory.
    let end = (start + u64::from(segment.len_bytes)) & !(PAGE_BYTES - 1);
    let first = start.next_multiple_of(PAGE_BYTES);
    match end.checked_sub(first) {
        None | Some(0) => Ok(0),
        Some(len) => host.reclaim(memory, GuestAddress(first), len),
    }
}
