//! Used rings, for devices that must publish several chains at once: a received frame that lies in
//! several buffers (virtio 1.2, 5.1.6.4) must not be seen in part, and virtio-queue's `add_used`
//! publishes one by one. A queue is served either by this or by `add_used`, never by both: the
//! bookkeeping for interrupts differs.

use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Error, Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

/// VRING_AVAIL_F_NO_INTERRUPT.
const NO_INTERRUPT: u16 = 1;

/// A chain that the device is done with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UsedChain {
    /// Its first descriptor.
    pub head: u16,
    /// Bytes that the device wrote.
    pub len_bytes: u32,
}

/// Puts all of `chains` into the used ring, then moves its index once.
///
/// # Errors
/// When a head is no descriptor of the queue, or the ring cannot be written.
pub fn publish(
    queue: &mut Queue,
    memory: &GuestMemoryMmap,
    chains: &[UsedChain],
) -> Result<(), Error> {
    let ring = GuestAddress(queue.used_ring());
    let mut next = queue.next_used();
    for chain in chains {
        if chain.head >= queue.size() {
            return Err(Error::InvalidDescriptorIndex);
        }
        let entry = at(ring, 4 + 8 * u64::from(next % queue.size()))?;
        let value = u64::from(chain.head) | u64::from(chain.len_bytes) << 32;
        memory
            .write_obj(value.to_le(), entry)
            .map_err(Error::GuestMemory)?;
        next = next.wrapping_add(1);
    }
    queue.set_next_used(next);
    memory
        .store(next.to_le(), at(ring, 2)?, Ordering::Release)
        .map_err(Error::GuestMemory)
}

/// Whether the driver wants an interrupt for what was used since the ring's index was `before`
/// (virtio 1.2, 2.7.7.2).
///
/// # Errors
/// When the available ring cannot be read.
pub fn wants_interrupt(
    queue: &Queue,
    memory: &GuestMemoryMmap,
    before: u16,
) -> Result<bool, Error> {
    let used = queue.next_used();
    if used == before {
        return Ok(false);
    }
    // The index is out before the driver's wish is read; the driver does it the other way round.
    fence(Ordering::SeqCst);
    let ring = GuestAddress(queue.avail_ring());
    let load = |offset| -> Result<u16, Error> {
        let value: u16 = memory
            .load(at(ring, offset)?, Ordering::Relaxed)
            .map_err(Error::GuestMemory)?;
        Ok(u16::from_le(value))
    };
    if queue.event_idx_enabled() {
        let event = load(4 + 2 * u64::from(queue.size()))?;
        return Ok(used.wrapping_sub(event).wrapping_sub(1) < used.wrapping_sub(before));
    }
    Ok(load(0)? & NO_INTERRUPT == 0)
}

fn at(ring: GuestAddress, offset: u64) -> Result<GuestAddress, Error> {
    ring.checked_add(offset).ok_or(Error::AddressOverflow)
}
