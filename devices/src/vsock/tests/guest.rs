//! A guest that behaves: what Linux's driver does, as far as the device can see it. It kicks only
//! when the device asked for it, looks at its used rings only when it was interrupted, and the
//! device's host descriptor is watched edge-triggered: whoever loses a wake-up stands still here.

use std::collections::{HashMap, VecDeque};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use tempfile::TempDir;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use crate::virtio::state::{RestoreError, TransportState};
use crate::virtio::testing::{BUFFERS, MockDriver};
use crate::vsock::packet::{HEADER_BYTES, Header, Op, STREAM};
use crate::vsock::{HOST_CID, Vsock};

pub(super) const CID: u32 = 42;
pub(super) const RX: usize = 0;
pub(super) const TX: usize = 1;
pub(super) const EVENT: usize = 2;
/// Bytes of one buffer for packets to the guest.
pub(super) const RX_BUFFER: u32 = 4096;
const RX_BUFFERS: usize = 64;
const TX_SLOT: u64 = 80 << 10;
const TX_SLOTS: u64 = 64;
const TX_BASE: u64 = BUFFERS + RX_BUFFERS as u64 * RX_BUFFER as u64;

/// A packet as the guest got it.
#[derive(Debug, Clone)]
pub(super) struct Packet {
    pub(super) header: Header,
    pub(super) data: Vec<u8>,
}

impl Packet {
    pub(super) fn op(&self) -> Option<Op> {
        Op::from_number(self.header.op)
    }
}

pub(super) struct Guest {
    pub(super) driver: MockDriver,
    pub(super) dir: TempDir,
    /// What came and was not looked at.
    pub(super) inbox: VecDeque<Packet>,
    /// Whether used buffers for packets are given back at once.
    pub(super) refills: bool,
    watch: OwnedFd,
    features: u64,
    given: VecDeque<(u16, u64)>,
    spare: VecDeque<u64>,
    next_slot: u64,
    /// Available indices at the last kick, and now, a queue.
    kicked: [u16; 3],
    offered: [u16; 3],
    used_seen: [u16; 3],
    pub(super) sent_chains: usize,
    pub(super) done_chains: usize,
    pub(super) kicks: usize,
    pub(super) interrupts: usize,
}

impl Guest {
    pub(super) fn new() -> Self {
        Self::with_features(1 << VIRTIO_RING_F_EVENT_IDX)
    }

    pub(super) fn with_features(features: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let device = Vsock::new(CID, &dir.path().join("v")).unwrap();
        let driver = MockDriver::new(device);
        let watch = watch(&driver);
        let mut guest = Self {
            driver,
            dir,
            inbox: VecDeque::new(),
            refills: true,
            watch,
            features,
            given: VecDeque::new(),
            spare: VecDeque::new(),
            next_slot: 0,
            kicked: [0; 3],
            offered: [0; 3],
            used_seen: [0; 3],
            sent_chains: 0,
            done_chains: 0,
            kicks: 0,
            interrupts: 0,
        };
        guest.probe();
        guest
    }

    /// From reset to running, with all buffers given.
    pub(super) fn probe(&mut self) {
        self.driver.probe(self.features);
        self.kicked = [0; 3];
        self.offered = [0; 3];
        self.used_seen = [0; 3];
        self.sent_chains = 0;
        self.done_chains = 0;
        self.given.clear();
        self.inbox.clear();
        let at = |slot| BUFFERS + slot as u64 * u64::from(RX_BUFFER);
        self.spare = (0..RX_BUFFERS).map(at).collect();
        if self.refills {
            self.refill(RX_BUFFERS);
        }
    }

    /// Continues `state` in a device of another process, which has the socket in `dir`.
    pub(super) fn restore(
        &mut self,
        dir: TempDir,
        device: Vsock,
        state: &TransportState,
    ) -> Result<(), RestoreError> {
        self.driver.restore(device, state)?;
        self.watch = watch(&self.driver);
        self.dir = dir;
        Ok(())
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.dir.path().join("v")
    }

    /// Where the host's program listens for connections to `port`.
    pub(super) fn port_path(&self, port: u32) -> PathBuf {
        port_path(&self.socket(), port)
    }

    /// Gives at most `count` buffers for packets.
    pub(super) fn refill(&mut self, count: usize) {
        for _ in 0..count {
            let Some(address) = self.spare.pop_front() else {
                break;
            };
            // As Linux: one buffer, header and data together.
            let head = self.driver.lay_chain(RX, &[(address, RX_BUFFER, true)]);
            self.given.push_back((head, address));
            self.offer(RX, head);
        }
        self.kick_if_wanted(RX);
    }

    fn offer(&mut self, queue: usize, head: u16) {
        self.driver.offer(queue, head);
        self.offered[queue] = self.offered[queue].wrapping_add(1);
    }

    /// Kicks as virtqueue_kick_prepare decides (virtio 1.2, 2.7.10).
    fn kick_if_wanted(&mut self, queue: usize) {
        let (old, new) = (self.kicked[queue], self.offered[queue]);
        if old == new {
            return;
        }
        self.kicked[queue] = new;
        if self.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0 {
            let size = u64::from(self.driver.queue_size(queue));
            let at = MockDriver::areas(queue)[2] + 4 + 8 * size;
            let event = self.driver.read_memory(at, 2);
            let event = u16::from_le_bytes([event[0], event[1]]);
            if new.wrapping_sub(event).wrapping_sub(1) >= new.wrapping_sub(old) {
                return;
            }
        }
        self.kicks += 1;
        self.driver.kick(queue);
    }

    /// Asks for an interrupt at the next used buffer.
    fn want_interrupt(&mut self, queue: usize) {
        let size = u64::from(self.driver.queue_size(queue));
        let at = MockDriver::areas(queue)[1] + 4 + 2 * size;
        let seen = self.used_seen[queue];
        self.driver.write_memory(at, &seen.to_le_bytes());
    }

    /// Sends a packet in pieces of data that lie apart in memory.
    pub(super) fn send(&mut self, header: Header, data: &[u8], cuts: &[usize]) {
        self.queue(header, data, cuts);
        self.kick_if_wanted(TX);
    }

    /// As [`Self::send`], without the kick.
    pub(super) fn queue(&mut self, header: Header, data: &[u8], cuts: &[usize]) {
        assert!(self.may_queue(), "a test with too much under way");
        let base = TX_BASE + self.next_slot * TX_SLOT;
        self.next_slot = (self.next_slot + 1) % TX_SLOTS;
        let bytes = [&header.encode()[..], data].concat();
        let mut buffers = Vec::new();
        let (mut from, mut gap) = (0, 0);
        for end in cuts.iter().copied().chain([bytes.len()]) {
            let end = end.min(bytes.len());
            if end > from {
                self.driver.write_memory(base + gap, &bytes[from..end]);
                buffers.push((base + gap, (end - from) as u32, false));
                gap += (end - from) as u64 + 8;
                from = end;
            }
        }
        let head = self.driver.lay_chain(TX, &buffers);
        self.offer(TX, head);
        self.sent_chains += 1;
    }

    pub(super) fn may_queue(&self) -> bool {
        self.sent_chains - self.done_chains < TX_SLOTS as usize
    }

    pub(super) fn flush(&mut self) {
        self.kick_if_wanted(TX);
    }

    /// Everything that can happen without news from outside, until nothing does.
    pub(super) fn settle(&mut self) {
        for _ in 0..10_000 {
            if !self.step() {
                return;
            }
        }
        panic!("the device never comes to rest");
    }

    /// One round of the event loop and of the guest's interrupt handler.
    pub(super) fn step(&mut self) -> bool {
        let mut any = self.driver.run_kicks();
        if self.host_is_ready() {
            self.driver.transport.host_event();
            any = true;
        }
        // How often it was raised, which the driver cannot see.
        if let Ok(raised) = self.driver.transport.interrupt().line().read() {
            self.interrupts += raised as usize;
            self.driver.take_interrupt();
            self.collect();
            any = true;
        }
        any
    }

    fn host_is_ready(&self) -> bool {
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let mut events = [MaybeUninit::uninit(); 1];
        let (events, _) = epoll::wait(&self.watch, &mut events, Some(&now)).unwrap();
        !events.is_empty()
    }

    fn collect(&mut self) {
        self.done_chains += self.driver.used(TX).len();
        for used in self.driver.used(RX) {
            let (head, address) = self.given.pop_front().expect("a buffer that was given");
            assert_eq!(used.head, u32::from(head), "buffers are used in order");
            self.used_seen[RX] = self.used_seen[RX].wrapping_add(1);
            let bytes = self.driver.read_memory(address, used.len_bytes as usize);
            let (header, data) = bytes.split_first_chunk().expect("a whole header");
            let header = Header::parse(header);
            assert_eq!(header.len as usize, data.len(), "{header:?}");
            assert_eq!(header.dst_cid, u64::from(CID));
            let data = data.to_vec();
            self.inbox.push_back(Packet { header, data });
            self.spare.push_back(address);
        }
        self.used_seen[TX] = self.done_chains as u16;
        self.want_interrupt(RX);
        self.want_interrupt(TX);
        if self.refills {
            self.refill(RX_BUFFERS);
        }
    }

    /// The next packet, after all that can happen has.
    pub(super) fn next(&mut self) -> Option<Packet> {
        self.settle();
        self.inbox.pop_front()
    }

    /// The next packet, which must be a `op`.
    pub(super) fn expect(&mut self, op: Op) -> Packet {
        let packet = self.next().unwrap_or_else(|| panic!("no {op:?} came"));
        assert_eq!(packet.op(), Some(op), "{packet:?}");
        packet
    }

    pub(super) fn expect_nothing(&mut self) {
        let packet = self.next();
        assert!(packet.is_none(), "{packet:?}");
    }

    pub(super) fn counter(&self, name: &str) -> u64 {
        let all: HashMap<_, _> = self.driver.transport.counters().into_iter().collect();
        all[name]
    }

    pub(super) fn failure(&self) -> Option<String> {
        self.driver.transport.failure().map(ToString::to_string)
    }
}

/// What the event loop does with the device's host descriptor.
fn watch(driver: &MockDriver) -> OwnedFd {
    let watch = epoll::create(CreateFlags::CLOEXEC).unwrap();
    epoll::add(
        &watch,
        driver.transport.host_fd().unwrap(),
        EventData::new_u64(0),
        EventFlags::IN | EventFlags::ET,
    )
    .unwrap();
    watch
}

pub(super) fn port_path(socket: &Path, port: u32) -> PathBuf {
    let mut path = socket.as_os_str().to_owned();
    path.push(format!("_{port}"));
    path.into()
}

/// A header of the guest with all the credit that a test needs.
pub(super) fn header(op: Op, guest_port: u32, host_port: u32) -> Header {
    Header {
        src_cid: u64::from(CID),
        dst_cid: HOST_CID,
        src_port: guest_port,
        dst_port: host_port,
        kind: STREAM,
        op: op as u16,
        buf_alloc: 256 << 10,
        ..Header::default()
    }
}

/// A data packet's header.
pub(super) fn data_header(guest_port: u32, host_port: u32, len: usize) -> Header {
    Header {
        len: len as u32,
        ..header(Op::Data, guest_port, host_port)
    }
}

pub(super) const WHOLE_HEADER: usize = HEADER_BYTES as usize;
