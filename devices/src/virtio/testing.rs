//! The other side: a driver in the shape of Linux's, for tests and fuzzing (feature `testing`).
//!
//! It lays queues out in guest memory, drives a transport's registers through a whole probe, offers
//! descriptor chains and reads used rings. What a well-behaved driver does is one call; each of its
//! steps, and each single descriptor and ring field, can be had alone to break one rule.
//!
//! ```
//! use ratoon_devices::virtio::testing::{Echo, MockDriver};
//!
//! let mut driver = MockDriver::new(Echo::default());
//! driver.probe(0);
//! let request = driver.send(0, &[b"ping"], &[16]);
//! driver.kick(0);
//! assert_eq!(driver.used(0)[0].len_bytes, 4);
//! assert_eq!(driver.read_memory(request.writable[0], 4), b"ping");
//! ```
//!
//! ```text
//!  guest memory   0x01_0000 * (queue + 1): descriptors, +0x8000 driver area, +0xc000 device area
//!                 0x20_0000 ..: buffers, handed out one after the other
//! ```
//!
//! It panics where a test has asked for something that cannot be, never for what a device did.

use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::Device;
use super::mmio::{MmioTransport, register, status};
use super::state::{RestoreError, TransportState};

mod echo;

pub use echo::{Call, Echo};

/// Bytes of guest memory, from address 0.
pub const MEMORY_LEN: u64 = 16 << 20;
/// The largest queue that the driver lays out.
pub const MAX_QUEUE_SIZE: u16 = 1024;
/// Where buffers begin.
pub const BUFFERS: u64 = 0x20_0000;
/// A descriptor flag: another follows.
pub const NEXT: u16 = VRING_DESC_F_NEXT as u16;
/// A descriptor flag: the device writes.
pub const WRITE: u16 = VRING_DESC_F_WRITE as u16;

const QUEUE_STRIDE: u64 = 0x1_0000;
const DRIVER_AREA: u64 = 0x8000;
const DEVICE_AREA: u64 = 0xc000;

/// A descriptor as it lies in guest memory (virtio 1.2, 2.7.5).
#[derive(Debug, Clone, Copy)]
pub struct Descriptor {
    /// Guest address of the buffer.
    pub address: u64,
    /// Its length in bytes.
    pub len_bytes: u32,
    /// [`NEXT`], [`WRITE`].
    pub flags: u16,
    /// Index of the next descriptor.
    pub next: u16,
}

/// A chain that was sent.
#[derive(Debug, Clone)]
pub struct Sent {
    /// Its first descriptor.
    pub head: u16,
    /// Guest addresses of the readable buffers.
    pub readable: Vec<u64>,
    /// Guest addresses of the writable buffers.
    pub writable: Vec<u64>,
}

/// An entry of the used ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// The chain's first descriptor.
    pub head: u32,
    /// Bytes written by the device.
    pub len_bytes: u32,
}

#[derive(Debug, Clone)]
struct DriverQueue {
    size: u16,
    next_descriptor: u16,
    available: u16,
    used: u16,
}

/// A driver and the transport that it drives.
pub struct MockDriver {
    /// The transport under test.
    pub transport: MmioTransport,
    memory: GuestMemoryMmap,
    queues: Vec<DriverQueue>,
    next_buffer: u64,
}

impl MockDriver {
    /// A driver for `device`, which is in reset.
    pub fn new(device: impl Device + 'static) -> Self {
        Self::new_boxed(Box::new(device))
    }

    /// As [`Self::new`].
    pub fn new_boxed(device: Box<dyn Device>) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_LEN as usize)])
            .expect("guest memory for a test");
        let queues = device
            .queue_max_sizes()
            .iter()
            .map(|size| DriverQueue {
                size: (*size).min(MAX_QUEUE_SIZE),
                next_descriptor: 0,
                available: 0,
                used: 0,
            })
            .collect();
        let transport = MmioTransport::new(memory.clone(), device).expect("eventfds for a test");
        Self {
            transport,
            memory,
            queues,
            next_buffer: BUFFERS,
        }
    }

    /// Puts `device`, continued from `state`, in the place of the transport. Guest memory and the
    /// driver's own mind are as they were. Refused, the transport is the old one.
    ///
    /// # Errors
    /// [`MmioTransport::restore`]'s.
    pub fn restore(
        &mut self,
        device: impl Device + 'static,
        state: &TransportState,
    ) -> Result<(), RestoreError> {
        self.transport = MmioTransport::restore(self.memory.clone(), Box::new(device), state)?;
        Ok(())
    }

    /// Guest memory.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// Reads a register.
    pub fn read32(&mut self, offset: u64) -> u32 {
        let mut word = [0; 4];
        self.transport.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    /// Writes a register.
    pub fn write32(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    /// Reads the configuration space byte by byte.
    pub fn read_config(&mut self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        for (index, byte) in bytes.iter_mut().enumerate() {
            let offset = register::CONFIG + offset + index as u64;
            self.transport.read(offset, std::slice::from_mut(byte));
        }
        bytes
    }

    /// The STATUS register.
    pub fn status(&mut self) -> u32 {
        self.read32(register::STATUS)
    }

    /// Sets a status bit, as virtio_add_status does.
    pub fn add_status(&mut self, bit: u32) {
        let status = self.status();
        self.write32(register::STATUS, status | bit);
    }

    /// Resets the device and forgets all queues and buffers.
    pub fn reset(&mut self) {
        self.write32(register::STATUS, 0);
        self.next_buffer = BUFFERS;
        for queue in &mut self.queues {
            queue.next_descriptor = 0;
            queue.available = 0;
            queue.used = 0;
        }
    }

    /// The features that the device offers.
    pub fn offered(&mut self) -> u64 {
        self.write32(register::DEVICE_FEATURES_SEL, 1);
        let high = u64::from(self.read32(register::DEVICE_FEATURES));
        self.write32(register::DEVICE_FEATURES_SEL, 0);
        high << 32 | u64::from(self.read32(register::DEVICE_FEATURES))
    }

    /// From reset to FEATURES_OK with exactly `features`; false when the device refused them.
    pub fn negotiate(&mut self, features: u64) -> bool {
        self.reset();
        self.add_status(status::ACKNOWLEDGE);
        self.add_status(status::DRIVER);
        self.write32(register::DRIVER_FEATURES_SEL, 1);
        self.write32(register::DRIVER_FEATURES, (features >> 32) as u32);
        self.write32(register::DRIVER_FEATURES_SEL, 0);
        self.write32(register::DRIVER_FEATURES, features as u32);
        self.add_status(status::FEATURES_OK);
        self.status() & status::FEATURES_OK != 0
    }

    /// Tells the device where queue `index` is, and makes it ready.
    pub fn set_up_queue(&mut self, index: usize) {
        let size = u32::from(self.queues[index].size);
        let [descriptors, driver, device] = Self::areas(index);
        // Rings of an earlier probe must not look like new requests.
        self.write_memory(driver, &[0; 0x4000]);
        self.write_memory(device, &[0; 0x4000]);
        self.write32(register::QUEUE_SEL, index as u32);
        self.write32(register::QUEUE_NUM, size);
        for (offset, address) in [
            (register::QUEUE_DESC_LOW, descriptors),
            (register::QUEUE_DRIVER_LOW, driver),
            (register::QUEUE_DEVICE_LOW, device),
        ] {
            self.write32(offset, address as u32);
            self.write32(offset + 4, (address >> 32) as u32);
        }
        self.write32(register::QUEUE_READY, 1);
    }

    /// The whole probe, with those of the `wanted` features that are offered, and VERSION_1.
    /// Returns the features in use. The device may still have set DEVICE_NEEDS_RESET.
    pub fn probe(&mut self, wanted: u64) -> u64 {
        let features = self.offered() & (wanted | 1 << VIRTIO_F_VERSION_1);
        assert!(self.negotiate(features), "the device refused its features");
        for index in 0..self.queues.len() {
            self.set_up_queue(index);
        }
        self.add_status(status::DRIVER_OK);
        features
    }

    /// Guest addresses of descriptor table, driver area and device area of a queue.
    pub fn areas(index: usize) -> [u64; 3] {
        let base = QUEUE_STRIDE * (index as u64 + 1);
        [base, base + DRIVER_AREA, base + DEVICE_AREA]
    }

    /// The size that the driver gives queue `index`.
    pub fn queue_size(&self, index: usize) -> u16 {
        self.queues[index].size
    }

    /// A new buffer of `len` bytes. The buffers go round when memory ends.
    pub fn allocate(&mut self, len: u32) -> u64 {
        let len = u64::from(len).next_multiple_of(16);
        if self.next_buffer + len > MEMORY_LEN {
            self.next_buffer = BUFFERS;
        }
        let address = self.next_buffer;
        self.next_buffer += len;
        address
    }

    /// Copies `bytes` into guest memory.
    pub fn write_memory(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .expect("an address in guest memory");
    }

    /// Copies `len` bytes out of guest memory.
    pub fn read_memory(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .expect("an address in guest memory");
        bytes
    }

    /// Writes descriptor `slot` of queue `index`; `slot` goes round at the queue's size.
    pub fn set_descriptor(&self, index: usize, slot: u16, descriptor: Descriptor) {
        let slot = slot % self.queues[index].size;
        let address = Self::areas(index)[0] + 16 * u64::from(slot);
        self.write_memory(address, &descriptor.address.to_le_bytes());
        self.write_memory(address + 8, &descriptor.len_bytes.to_le_bytes());
        self.write_memory(address + 12, &descriptor.flags.to_le_bytes());
        self.write_memory(address + 14, &descriptor.next.to_le_bytes());
    }

    /// Puts `head` into the available ring and moves its index. It need not be a descriptor.
    pub fn offer(&mut self, index: usize, head: u16) {
        let queue = &mut self.queues[index];
        let entry = 4 + 2 * u64::from(queue.available % queue.size);
        queue.available = queue.available.wrapping_add(1);
        let available = queue.available;
        self.write_memory(Self::areas(index)[1] + entry, &head.to_le_bytes());
        self.set_available_index(index, available);
    }

    /// Writes the available ring's index, whatever it was.
    pub fn set_available_index(&self, index: usize, value: u16) {
        self.write_memory(Self::areas(index)[1] + 2, &value.to_le_bytes());
    }

    /// Writes descriptors for `buffers` (address, length, writable), chained in this order, and
    /// returns the first one's index. Nothing is offered yet.
    pub fn lay_chain(&mut self, index: usize, buffers: &[(u64, u32, bool)]) -> u16 {
        let size = self.queues[index].size;
        let head = self.queues[index].next_descriptor;
        for (position, (address, len_bytes, writable)) in buffers.iter().enumerate() {
            let slot = self.queues[index].next_descriptor;
            let next = (slot + 1) % size;
            let more = position + 1 < buffers.len();
            self.set_descriptor(
                index,
                slot,
                Descriptor {
                    address: *address,
                    len_bytes: *len_bytes,
                    flags: if more { NEXT } else { 0 } | if *writable { WRITE } else { 0 },
                    next: if more { next } else { 0 },
                },
            );
            self.queues[index].next_descriptor = next;
        }
        head
    }

    /// Offers a request: buffers with these bytes, then zeroed buffers of these lengths for the
    /// device to fill. No kick.
    pub fn send(&mut self, index: usize, readable: &[&[u8]], writable: &[u32]) -> Sent {
        let mut buffers = Vec::new();
        for bytes in readable {
            let address = self.allocate(bytes.len() as u32);
            self.write_memory(address, bytes);
            buffers.push((address, bytes.len() as u32, false));
        }
        for len in writable {
            let address = self.allocate(*len);
            self.write_memory(address, &vec![0; *len as usize]);
            buffers.push((address, *len, true));
        }
        let head = self.lay_chain(index, &buffers);
        self.offer(index, head);
        let addresses = |writable| {
            let those = buffers.iter().filter(move |buffer| buffer.2 == writable);
            those.map(|buffer| buffer.0).collect()
        };
        Sent {
            head,
            readable: addresses(false),
            writable: addresses(true),
        }
    }

    /// Notifies queue `index` by its register.
    pub fn kick(&mut self, index: usize) {
        self.write32(register::QUEUE_NOTIFY, index as u32);
    }

    /// Does what the event loop does for queues whose eventfd was written, by a device that wants
    /// to go on. True when there were any.
    pub fn run_kicks(&mut self) -> bool {
        let mut any = false;
        for index in 0..self.queues.len() {
            if self.transport.queue_eventfds()[index].read().is_ok() {
                self.transport.kick(index);
                any = true;
            }
        }
        any
    }

    /// The used ring's entries that were not returned before.
    pub fn used(&mut self, index: usize) -> Vec<Used> {
        let ring = Self::areas(index)[2];
        let queue = &self.queues[index];
        let end = self.read_u16(ring + 2);
        let mut position = queue.used;
        let mut entries = Vec::new();
        while position != end {
            let entry = ring + 4 + 8 * u64::from(position % queue.size);
            let bytes = self.read_memory(entry, 8);
            let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4"));
            entries.push(Used {
                head: word(0),
                len_bytes: word(4),
            });
            position = position.wrapping_add(1);
        }
        self.queues[index].used = end;
        entries
    }

    /// The interrupts' causes since the last call, acknowledged; and whether the line was raised.
    pub fn take_interrupt(&mut self) -> (u32, bool) {
        let raised = self.transport.interrupt().line().read().is_ok();
        let causes = self.read32(register::INTERRUPT_STATUS);
        self.write32(register::INTERRUPT_ACK, causes);
        (causes, raised)
    }

    fn read_u16(&self, address: u64) -> u16 {
        self.memory
            .read_obj(GuestAddress(address))
            .map(u16::from_le)
            .expect("an address in guest memory")
    }
}
