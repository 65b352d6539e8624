//! virtio-rng (virtio 1.2, section 5.4): random bytes from the host's kernel.
//!
//! One queue; a request is a chain of writable buffers, filled with at most [`MAX_REQUEST_BYTES`].
//! How it fails: a chain with readable buffers, or one that is broken, needs a reset.

use std::sync::Arc;

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use crate::virtio::chain::Chain;
use crate::virtio::state::{DeviceState, RestoreError, Saved};
use crate::virtio::{Activation, Device, DeviceError, Interrupt, kick_again};

mod state;
#[cfg(test)]
mod tests;

pub use state::RngState;

/// The most bytes that one request gets. The driver asks again for more.
pub const MAX_REQUEST_BYTES: u64 = 64 << 10;

const QUEUE_SIZE: u16 = 64;
/// Requests served in one turn of the event loop.
const TURN_REQUESTS: u16 = 2 * QUEUE_SIZE;
/// Bytes fetched at a time.
const PIECE_BYTES: usize = 4096;

/// An entropy device.
#[derive(Default)]
pub struct Rng {
    active: Option<Active>,
    chain: Chain,
    requests: u64,
    bytes: u64,
}

struct Active {
    memory: GuestMemoryMmap,
    queue: Queue,
    interrupt: Interrupt,
    kicks: Arc<[EventFd]>,
}

impl Rng {
    /// An entropy device.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Device for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let mut queues = activation.queues.into_iter();
        let queue = queues
            .next()
            .ok_or(DeviceError::Driver("no queue for requests"))?;
        self.active = Some(Active {
            memory: activation.memory,
            queue,
            interrupt: activation.interrupt,
            kicks: activation.kicks,
        });
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn process_queue(&mut self, index: usize) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let Active {
            memory,
            queue,
            interrupt,
            kicks,
        } = active;
        let at = |source| DeviceError::Queue { index, source };
        let mut used = 0;
        loop {
            while used < TURN_REQUESTS && self.chain.pop(queue, memory, index)? {
                if !self.chain.readable().is_empty() {
                    return Err(DeviceError::Driver("readable buffer in an entropy request"));
                }
                let filled = fill(memory, &self.chain)?;
                self.requests += 1;
                self.bytes += u64::from(filled);
                queue
                    .add_used(memory, self.chain.head(), filled)
                    .map_err(at)?;
                used += 1;
            }
            if !queue.enable_notification(memory).map_err(at)? {
                break;
            }
            if used == TURN_REQUESTS {
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
        Self::check_state(state)
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![("requests", self.requests), ("bytes", self.bytes)]
    }
}

/// Fills the chain's buffers; returns how many bytes.
fn fill(memory: &GuestMemoryMmap, chain: &Chain) -> Result<u32, DeviceError> {
    let want = chain.writable_len_bytes().min(MAX_REQUEST_BYTES);
    let mut done = 0;
    while done < want {
        let mut piece = [0; PIECE_BYTES];
        let len = (want - done).min(PIECE_BYTES as u64) as usize;
        let got = getrandom(&mut piece[..len], GetRandomFlags::empty()).map_err(|error| {
            DeviceError::Host {
                what: "getrandom".into(),
                source: error.into(),
            }
        })?;
        done += chain.write(memory, done, &piece[..got])? as u64;
    }
    Ok(done as u32)
}
