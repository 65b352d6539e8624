//! virtio-net (virtio 1.2, section 5.1): Ethernet frames between one queue pair and a tap.
//!
//! ```text
//!  guest TX chain --writev--> tap          each frame after a virtio_net_hdr of 12 bytes,
//!  guest RX chains <--readv-- tap          which guest and tap understand alike
//! ```
//!
//! Frames go straight between guest memory and tap. Checksums and segmentation are negotiated and
//! left to the two ends. With MRG_RXBUF a frame fills as many chains as it takes, published at
//! once; chains taken from the ring wait in `pending` for the frames to come.
//!
//! How it fails: a frame that cannot be sent, or has no room in what the driver gave, is dropped
//! and counted, as on a wire. A chain that breaks the rules needs a reset. A tap that is taken away
//! is a wire unplugged.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use crate::virtio::chain::{Chain, Iovecs};
use crate::virtio::state::{DeviceState, RestoreError, Saved};
use crate::virtio::used::{self, UsedChain};
use crate::virtio::{Activation, Device, DeviceError, Interrupt, kick_again};

mod state;
mod tap;
#[cfg(test)]
mod tests;

pub use state::NetState;
pub use tap::{Backend, Tap, TapError};

/// struct virtio_net_hdr_v1, in bytes.
pub const HEADER_BYTES: usize = 12;
/// The largest frame: 64 KiB of IP behind an Ethernet header, with ours (5.1.6.3.1).
pub const MAX_FRAME_BYTES: usize = 65550 + HEADER_BYTES;
/// The largest frame without segmentation and with a VLAN tag, with our header.
const SMALL_FRAME_BYTES: usize = 1518 + HEADER_BYTES;
/// The queue of frames for the guest.
pub const RX: usize = 0;
/// The queue of frames from the guest.
pub const TX: usize = 1;

const QUEUE_SIZE: u16 = 256;
/// Frames of one queue in one turn of the event loop.
const TURN_FRAMES: u32 = 256;
/// Where num_buffers is in the header.
const NUM_BUFFERS_OFFSET: u64 = 10;
/// Where a frame's source address is, behind our header and its destination.
const SOURCE_OFFSET: u64 = HEADER_BYTES as u64 + 6;
/// readv(2) takes 1024 pieces; one chain has at most as many as its queue, each in at most a few
/// regions.
const MAX_PENDING_SEGMENTS: usize = 512;

/// A network device.
pub struct Net {
    mac: [u8; 6],
    /// Of the machine that this one is a child of, if it is another: nothing is sent in its name.
    former: Option<[u8; 6]>,
    backend: Box<dyn Backend>,
    active: Option<Active>,
    /// What of a frame has no room in guest memory lands here and is dropped.
    overflow: Vec<u8>,
    counters: Counters,
}

#[derive(Default)]
struct Counters {
    rx_frames: u64,
    rx_bytes: u64,
    rx_dropped: u64,
    tx_frames: u64,
    tx_bytes: u64,
    tx_dropped: u64,
}

struct Active {
    memory: GuestMemoryMmap,
    rx: Queue,
    tx: Queue,
    interrupt: Interrupt,
    kicks: Arc<[EventFd]>,
    mergeable: bool,
    /// The room in bytes that is waited for before a frame is read.
    need_bytes: u64,
    /// A frame may wait: the backend has not said that it would block since it was ready.
    host_ready: bool,
    /// Chains taken from the RX ring and not used yet, in order.
    pending: VecDeque<Chain>,
    /// Empty chains, to be filled again.
    spare: Vec<Chain>,
    sending: Chain,
    done: Vec<UsedChain>,
}

impl Net {
    /// A device on the existing tap `name`, with the guest's address `mac`.
    ///
    /// # Errors
    /// [`TapError`].
    pub fn open(name: &str, mac: [u8; 6]) -> Result<Self, TapError> {
        Ok(Self::new(Box::new(Tap::open(name)?), mac))
    }

    /// A device on `backend`.
    pub fn new(backend: Box<dyn Backend>, mac: [u8; 6]) -> Self {
        Self {
            mac,
            former: None,
            backend,
            active: None,
            overflow: vec![0; MAX_FRAME_BYTES],
            counters: Counters::default(),
        }
    }
}

impl Device for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
        ]
        .into_iter()
        .fold(0, |all, feature| all | 1 << feature)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        data.fill(0);
        for (place, byte) in data.iter_mut().zip(self.mac.iter().skip(start)) {
            *place = *byte;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let features = activation.features;
        let has = |feature: u32| features & 1 << feature != 0;
        let large_in = has(VIRTIO_NET_F_GUEST_TSO4) || has(VIRTIO_NET_F_GUEST_TSO6);
        let large_out = has(VIRTIO_NET_F_HOST_TSO4) || has(VIRTIO_NET_F_HOST_TSO6);
        if large_in && !has(VIRTIO_NET_F_GUEST_CSUM) || large_out && !has(VIRTIO_NET_F_CSUM) {
            return Err(DeviceError::Driver("segmentation without checksums"));
        }
        self.backend
            .set_offloads(features)
            .map_err(|source| DeviceError::Host {
                what: "tap offloads".into(),
                source,
            })?;
        let mut queues = activation.queues.into_iter();
        let (Some(rx), Some(tx)) = (queues.next(), queues.next()) else {
            return Err(DeviceError::Driver("fewer than two queues"));
        };
        self.active = Some(Active {
            memory: activation.memory,
            rx,
            tx,
            interrupt: activation.interrupt,
            kicks: activation.kicks,
            mergeable: has(VIRTIO_NET_F_MRG_RXBUF),
            // One chain must do when chains cannot be joined.
            need_bytes: match (has(VIRTIO_NET_F_MRG_RXBUF), large_in) {
                (false, _) => 0,
                (true, false) => SMALL_FRAME_BYTES as u64,
                (true, true) => MAX_FRAME_BYTES as u64,
            },
            host_ready: true,
            pending: VecDeque::new(),
            spare: Vec::new(),
            sending: Chain::default(),
            done: Vec::new(),
        });
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        if let Err(error) = self.backend.set_offloads(0) {
            tracing::warn!(%error, "tap offloads");
        }
    }

    fn process_queue(&mut self, index: usize) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        match index {
            RX => active.receive(&*self.backend, &mut self.overflow, &mut self.counters),
            _ => active.send(&*self.backend, self.former, &mut self.counters),
        }
    }

    fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.backend.fd())
    }

    fn process_host(&mut self) -> Result<(), DeviceError> {
        if let Some(active) = &mut self.active {
            active.host_ready = true;
        }
        self.process_queue(RX)
    }

    fn save(&self) -> Saved {
        self.saved()
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        self.take_state(state)
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let counters = &self.counters;
        vec![
            ("rx_frames", counters.rx_frames),
            ("rx_bytes", counters.rx_bytes),
            ("rx_dropped", counters.rx_dropped),
            ("tx_frames", counters.tx_frames),
            ("tx_bytes", counters.tx_bytes),
            ("tx_dropped", counters.tx_dropped),
        ]
    }
}

fn rx_error(source: virtio_queue::Error) -> DeviceError {
    DeviceError::Queue { index: RX, source }
}

fn tx_error(source: virtio_queue::Error) -> DeviceError {
    DeviceError::Queue { index: TX, source }
}

impl Active {
    /// Takes frames from the backend as long as it has some and the driver has room.
    fn receive(
        &mut self,
        backend: &dyn Backend,
        overflow: &mut [u8],
        counters: &mut Counters,
    ) -> Result<(), DeviceError> {
        let before = self.rx.next_used();
        let mut turn = 0;
        while self.host_ready {
            if turn == TURN_FRAMES {
                kick_again(&self.kicks, RX)?;
                break;
            }
            turn += 1;
            if !self.gather()? {
                // The driver's kick for new buffers brings us back, unless they came just now.
                if self
                    .rx
                    .enable_notification(&self.memory)
                    .map_err(rx_error)?
                {
                    continue;
                }
                break;
            }
            let mut iovecs = Iovecs::default();
            for chain in &self.pending {
                iovecs.push(&self.memory, chain.writable(), 0, u64::MAX)?;
            }
            let room = iovecs.len_bytes();
            iovecs.push_host(overflow);
            match iovecs.read_from(backend.fd()) {
                Ok(0) => self.host_ready = false,
                Ok(len) if len < HEADER_BYTES || len as u64 > room => counters.rx_dropped += 1,
                Ok(len) => {
                    self.deliver(len as u64)?;
                    counters.rx_frames += 1;
                    counters.rx_bytes += (len - HEADER_BYTES) as u64;
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock => self.host_ready = false,
                    _ => {
                        tracing::warn!(%error, "tap read");
                        self.host_ready = false;
                    }
                },
            }
        }
        if used::wants_interrupt(&self.rx, &self.memory, before).map_err(rx_error)? {
            self.interrupt.used_buffer();
        }
        Ok(())
    }

    /// Takes chains from the RX ring until they have room for any frame, or there are no more.
    /// Without MRG_RXBUF a frame has one chain, whatever its size. True when a frame may come: there
    /// is the room that is needed, or the driver cannot give more.
    fn gather(&mut self) -> Result<bool, DeviceError> {
        let mut room: u64 = self.pending.iter().map(Chain::writable_len_bytes).sum();
        let mut segments: usize = self.pending.iter().map(|c| c.writable().len()).sum();
        while self.pending.is_empty()
            || self.mergeable && room < MAX_FRAME_BYTES as u64 && segments < MAX_PENDING_SEGMENTS
        {
            let mut chain = self.spare.pop().unwrap_or_default();
            if !chain.pop(&mut self.rx, &self.memory, RX)? {
                self.spare.push(chain);
                break;
            }
            if !chain.readable().is_empty() {
                return Err(DeviceError::Driver("readable buffer in the receive queue"));
            }
            if chain.writable_len_bytes() < HEADER_BYTES as u64 {
                return Err(DeviceError::Driver("receive buffer smaller than a header"));
            }
            room += chain.writable_len_bytes();
            segments += chain.writable().len();
            self.pending.push_back(chain);
        }
        Ok(!self.pending.is_empty()
            && (room >= self.need_bytes
                || segments >= MAX_PENDING_SEGMENTS
                || self.pending.len() >= usize::from(self.rx.size())))
    }

    /// A frame of `len` bytes, header and all, lies in the first pending chains: hands them over.
    fn deliver(&mut self, len: u64) -> Result<(), DeviceError> {
        self.done.clear();
        let mut left = len;
        for chain in &self.pending {
            let len_bytes = left.min(chain.writable_len_bytes());
            left -= len_bytes;
            self.done.push(UsedChain {
                head: chain.head(),
                len_bytes: len_bytes as u32,
            });
            if left == 0 {
                break;
            }
        }
        if let Some(first) = self.pending.front() {
            let count = (self.done.len() as u16).to_le_bytes();
            first.write(&self.memory, NUM_BUFFERS_OFFSET, &count)?;
        }
        self.spare.extend(self.pending.drain(..self.done.len()));
        used::publish(&mut self.rx, &self.memory, &self.done).map_err(rx_error)
    }

    /// Sends what the driver offers.
    fn send(
        &mut self,
        backend: &dyn Backend,
        former: Option<[u8; 6]>,
        counters: &mut Counters,
    ) -> Result<(), DeviceError> {
        let before = self.tx.next_used();
        let mut turn = 0;
        loop {
            self.done.clear();
            while turn < TURN_FRAMES && self.sending.pop(&mut self.tx, &self.memory, TX)? {
                turn += 1;
                self.send_one(backend, former, counters)?;
                self.done.push(UsedChain {
                    head: self.sending.head(),
                    len_bytes: 0,
                });
            }
            used::publish(&mut self.tx, &self.memory, &self.done).map_err(tx_error)?;
            if !self
                .tx
                .enable_notification(&self.memory)
                .map_err(tx_error)?
            {
                break;
            }
            if turn == TURN_FRAMES {
                kick_again(&self.kicks, TX)?;
                break;
            }
        }
        if used::wants_interrupt(&self.tx, &self.memory, before).map_err(tx_error)? {
            self.interrupt.used_buffer();
        }
        Ok(())
    }

    fn send_one(
        &self,
        backend: &dyn Backend,
        former: Option<[u8; 6]>,
        counters: &mut Counters,
    ) -> Result<(), DeviceError> {
        if !self.sending.writable().is_empty() {
            return Err(DeviceError::Driver("writable buffer in the transmit queue"));
        }
        let len = self.sending.readable_len_bytes();
        if len < HEADER_BYTES as u64 {
            return Err(DeviceError::Driver("frame shorter than its header"));
        }
        if len > MAX_FRAME_BYTES as u64 {
            counters.tx_dropped += 1;
            return Ok(());
        }
        if let Some(former) = former {
            let mut source = [0; 6];
            let read = self
                .sending
                .read(&self.memory, SOURCE_OFFSET, &mut source)?;
            if read == source.len() && source == former {
                counters.tx_dropped += 1;
                return Ok(());
            }
        }
        let iovecs = Iovecs::new(&self.memory, self.sending.readable(), 0, len)?;
        match iovecs.write_to(backend.fd()) {
            Ok(_) => {
                counters.tx_frames += 1;
                counters.tx_bytes += len - HEADER_BYTES as u64;
            }
            // The interface is down or full, or the kernel cannot make sense of the header.
            Err(error) => {
                counters.tx_dropped += 1;
                if counters.tx_dropped.is_power_of_two() {
                    tracing::debug!(%error, dropped = counters.tx_dropped, "frame not sent");
                }
            }
        }
        Ok(())
    }
}
