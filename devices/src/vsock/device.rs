//! The device: takes the guest's packets, and hands out the guest's free buffers in turn to resets
//! and to connections that have something for it.
//!
//! Nothing may be lost between "there is something for the guest" and "there is a free buffer":
//! whoever has something stays in `resets` or `waiting` until it has been sent, and both a new
//! buffer and a new event lead to [`Vsock::send`].

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::connection::{BUF_ALLOC, Broken, Connection, Phase, Ports, would_block};
use super::packet::{HEADER_BYTES, Header, Op, STREAM};
use super::streams::{Seen, Step, Streams, VsockError};
use super::{HOST_CID, MAX_CONNECTIONS};
use crate::virtio::chain::{Chain, Iovecs};
use crate::virtio::{Activation, Device, DeviceError, Interrupt, kick_again};

const QUEUE_SIZE: u16 = 256;
/// Queue numbers (5.10.2).
const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
/// Packets handled in one turn of the event loop, each way.
const TURN_PACKETS: usize = 2 * QUEUE_SIZE as usize;
/// Rounds of events looked at in one turn.
const TURN_EVENTS: usize = 16;
/// Resets that wait for a buffer of the guest. With this many, its packets are left in their queue.
const MAX_RESETS: usize = QUEUE_SIZE as usize;
/// The most data in one packet, in bytes.
const MAX_DATA: u32 = 64 * 1024;
/// How long the guest may take to answer a REQUEST; generous, as guests may be emulated.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// How long it may take to finish a close.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);
/// Host ports given to connections that a host program asked for begin here.
const FIRST_HOST_PORT: u32 = 1 << 30;
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (5.10.6.7).
const TRANSPORT_RESET: u32 = 0;

/// A socket device.
pub struct Vsock {
    guest_cid: u64,
    streams: Streams,
    connections: HashMap<u64, Connection>,
    by_ports: HashMap<Ports, u64>,
    /// Connections with something for the guest, in turn.
    waiting: VecDeque<u64>,
    resets: VecDeque<Header>,
    next_host_port: u32,
    accept_again: bool,
    active: Option<Active>,
    counters: Counters,
}

struct Active {
    memory: GuestMemoryMmap,
    rx: Queue,
    tx: Queue,
    event: Queue,
    interrupt: Interrupt,
    kicks: Arc<[EventFd]>,
    chain: Chain,
}

#[derive(Default)]
struct Counters {
    connections: u64,
    rx_packets: u64,
    rx_bytes: u64,
    tx_packets: u64,
    tx_bytes: u64,
    resets: u64,
    refused: u64,
}

impl Vsock {
    /// A device for the guest `guest_cid`, whose Unix socket is made at `socket`.
    ///
    /// # Errors
    /// [`VsockError`] when the socket cannot be made.
    pub fn new(guest_cid: u32, socket: &Path) -> Result<Self, VsockError> {
        Ok(Self {
            guest_cid: u64::from(guest_cid),
            streams: Streams::new(socket)?,
            connections: HashMap::new(),
            by_ports: HashMap::new(),
            waiting: VecDeque::new(),
            resets: VecDeque::new(),
            next_host_port: FIRST_HOST_PORT,
            accept_again: false,
            active: None,
            counters: Counters::default(),
        })
    }

    /// Tells the driver that all its connections are gone, as after a restore.
    ///
    /// # Errors
    /// When the event queue is broken.
    pub fn transport_reset(&mut self) -> Result<(), DeviceError> {
        self.drop_all();
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        if active.chain.pop(&mut active.event, &active.memory, EVENT)? {
            let event = TRANSPORT_RESET.to_le_bytes();
            let len = active.chain.write(&active.memory, 0, &event)? as u32;
            finish(&mut active.event, &active.memory, &active.chain, len, EVENT)?;
            active.interrupt.used_buffer();
        }
        Ok(())
    }

    fn drop_all(&mut self) {
        self.connections.clear();
        self.by_ports.clear();
        self.waiting.clear();
        self.resets.clear();
        self.streams.handshakes.clear();
    }

    fn room(&self) -> bool {
        self.connections.len() + self.streams.handshakes.len() < MAX_CONNECTIONS
    }

    /// Notes that connection `token` may have something for the guest.
    fn enqueue(&mut self, token: u64) {
        if let Some(connection) = self.connections.get_mut(&token)
            && !connection.queued
            && connection.has_packet()
        {
            connection.queued = true;
            self.waiting.push_back(token);
        }
    }

    /// Ends connection `token`: its stream is closed, the guest gets a reset.
    fn end(&mut self, token: u64, tell_guest: bool) {
        if let Some(connection) = self.connections.remove(&token) {
            self.by_ports.remove(&connection.ports);
            if tell_guest {
                self.counters.resets += 1;
                self.resets.push_back(connection.reset(self.guest_cid));
            }
        }
    }

    /// After a change of connection `token`: on with it, or its end.
    fn settle(&mut self, token: u64, result: Result<(), Broken>) {
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        let broken = result.is_err();
        if broken || connection.is_over() {
            // A host program that went away without reading all is not the guest's fault, but it
            // learns of it in the only way there is.
            self.end(token, true);
            return;
        }
        if connection.awaits_close() && connection.deadline.is_none() {
            connection.deadline = Some(Instant::now() + CLOSE_TIMEOUT);
        }
        self.enqueue(token);
    }

    // ---- the guest's packets ----

    fn receive(&mut self, active: &mut Active) -> Result<(), DeviceError> {
        let mut used = 0;
        loop {
            while used < TURN_PACKETS && self.resets.len() < MAX_RESETS {
                if !active.chain.pop(&mut active.tx, &active.memory, TX)? {
                    break;
                }
                self.packet(&active.chain, &active.memory)?;
                finish(&mut active.tx, &active.memory, &active.chain, 0, TX)?;
                used += 1;
            }
            if self.resets.len() >= MAX_RESETS {
                // Goes on when the guest has given buffers for the resets: see `send`.
                break;
            }
            if !enable(&mut active.tx, &active.memory, TX)? {
                break;
            }
            if used >= TURN_PACKETS {
                kick_again(&active.kicks, TX)?;
                break;
            }
        }
        notify(&mut active.tx, &active.memory, &active.interrupt, used, TX)
    }

    fn packet(&mut self, chain: &Chain, memory: &GuestMemoryMmap) -> Result<(), DeviceError> {
        let mut bytes = [0; HEADER_BYTES as usize];
        if chain.read(memory, 0, &mut bytes)? < bytes.len() {
            return Err(DeviceError::Driver("vsock packet without a whole header"));
        }
        let header = Header::parse(&bytes);
        let data = u64::from(header.len);
        if chain.readable_len_bytes() < HEADER_BYTES + data {
            return Err(DeviceError::Driver("vsock packet shorter than it says"));
        }
        self.counters.tx_packets += 1;
        self.counters.tx_bytes += data;
        let op = Op::from_number(header.op);
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            // Not for us: nobody could be told.
            self.counters.refused += 1;
            return Ok(());
        }
        let ports = Ports {
            host: header.dst_port,
            guest: header.src_port,
        };
        let known = self.by_ports.get(&ports).copied();
        match (known, op) {
            (None, Some(Op::Request)) if header.kind == STREAM => self.request(&header, ports),
            (None, Some(Op::Reset)) => {}
            (Some(token), Some(op)) if header.kind == STREAM => {
                self.known_packet(token, op, &header, chain, memory)?;
            }
            (Some(token), _) => self.end(token, true),
            (None, _) => self.refuse(&header),
        }
        Ok(())
    }

    fn refuse(&mut self, header: &Header) {
        self.counters.refused += 1;
        self.resets.push_back(header.reset());
    }

    /// The guest wants to reach a program of the host.
    fn request(&mut self, header: &Header, ports: Ports) {
        if !self.room() {
            return self.refuse(header);
        }
        let connected = self.streams.connect(ports.host).and_then(|stream| {
            let token = self.streams.watch(&stream)?;
            Ok((token, stream))
        });
        match connected {
            Ok((token, stream)) => {
                let connection = Connection::accepted(stream, ports, header);
                self.add(token, connection);
            }
            Err(_) => self.refuse(header),
        }
    }

    fn add(&mut self, token: u64, connection: Connection) {
        self.counters.connections += 1;
        self.by_ports.insert(connection.ports, token);
        self.connections.insert(token, connection);
        self.enqueue(token);
    }

    fn known_packet(
        &mut self,
        token: u64,
        op: Op,
        header: &Header,
        chain: &Chain,
        memory: &GuestMemoryMmap,
    ) -> Result<(), DeviceError> {
        let Some(connection) = self.connections.get_mut(&token) else {
            return Ok(());
        };
        connection.note_credit(header);
        let result = match (op, connection.phase) {
            (Op::Reset, _) => {
                self.end(token, false);
                return Ok(());
            }
            (Op::Response, Phase::Asked) => connection.opened(),
            (Op::Data, Phase::Open) => {
                let len = u64::from(header.len);
                let data = Iovecs::new(memory, chain.readable(), HEADER_BYTES, len)?;
                let mut failed = None;
                let result = connection.guest_data(&data, &mut |skip| {
                    let mut rest = vec![0; (len - skip) as usize];
                    if let Err(error) = chain.read(memory, HEADER_BYTES + skip, &mut rest) {
                        failed = Some(error);
                    }
                    rest
                });
                if let Some(error) = failed {
                    return Err(error);
                }
                result
            }
            (Op::CreditUpdate, Phase::Open) => Ok(()),
            (Op::CreditRequest, Phase::Open) => {
                connection.credit_requested();
                Ok(())
            }
            (Op::Shutdown, Phase::Open) => {
                connection.guest_shutdown(header.flags);
                Ok(())
            }
            // A second REQUEST, an answer that nobody waits for, data before the answer.
            _ => {
                self.end(token, true);
                return Ok(());
            }
        };
        self.settle(token, result);
        Ok(())
    }

    // ---- packets for the guest ----

    fn send(&mut self, active: &mut Active) -> Result<(), DeviceError> {
        let mut used = 0;
        let paused = self.resets.len() >= MAX_RESETS;
        loop {
            while used < TURN_PACKETS && (!self.resets.is_empty() || !self.waiting.is_empty()) {
                if !active.chain.pop(&mut active.rx, &active.memory, RX)? {
                    break;
                }
                if active.chain.writable_len_bytes() < HEADER_BYTES {
                    return Err(DeviceError::Driver("vsock buffer shorter than a header"));
                }
                match self.fill(&active.chain, &active.memory)? {
                    Some(len) => {
                        finish(&mut active.rx, &active.memory, &active.chain, len, RX)?;
                        used += 1;
                    }
                    // Nothing came of it: the buffer goes back to the front of its queue.
                    None => {
                        let next = active.rx.next_avail();
                        active.rx.set_next_avail(next.wrapping_sub(1));
                    }
                }
            }
            // With nothing to send, new buffers are no news.
            let idle = self.resets.is_empty() && self.waiting.is_empty();
            if idle || !enable(&mut active.rx, &active.memory, RX)? {
                break;
            }
            if used >= TURN_PACKETS {
                kick_again(&active.kicks, RX)?;
                break;
            }
        }
        if paused && self.resets.len() < MAX_RESETS {
            kick_again(&active.kicks, TX)?;
        }
        notify(&mut active.rx, &active.memory, &active.interrupt, used, RX)
    }

    /// Puts the next packet into `chain`; its length in bytes, or none.
    fn fill(
        &mut self,
        chain: &Chain,
        memory: &GuestMemoryMmap,
    ) -> Result<Option<u32>, DeviceError> {
        if let Some(reset) = self.resets.pop_front() {
            return self.put(chain, memory, &reset).map(Some);
        }
        let Some(token) = self.waiting.pop_front() else {
            return Ok(None);
        };
        let Some(connection) = self.connections.get_mut(&token) else {
            return Ok(None);
        };
        connection.queued = false;
        if let Some(header) = connection.control_packet(self.guest_cid) {
            let len = self.put(chain, memory, &header)?;
            self.settle(token, Ok(()));
            return Ok(Some(len));
        }
        let room = chain.writable_len_bytes() - HEADER_BYTES;
        let want = u64::from(connection.may_read().min(MAX_DATA)).min(room);
        if want == 0 {
            return Ok(None);
        }
        let buffers = Iovecs::new(memory, chain.writable(), HEADER_BYTES, want)?;
        let filled = match buffers.read_from(connection.stream.as_fd()) {
            Ok(0) => {
                connection.host_ended();
                None
            }
            Ok(len) => {
                let header = connection.data_packet(self.guest_cid, len as u32);
                self.counters.rx_bytes += len as u64;
                Some(self.put(chain, memory, &header)? + len as u32)
            }
            Err(error) if would_block(&error) => {
                connection.readable = false;
                None
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => None,
            Err(_) => {
                self.settle(token, Err(Broken::Host));
                return Ok(None);
            }
        };
        self.settle(token, Ok(()));
        Ok(filled)
    }

    fn put(
        &mut self,
        chain: &Chain,
        memory: &GuestMemoryMmap,
        header: &Header,
    ) -> Result<u32, DeviceError> {
        self.counters.rx_packets += 1;
        chain.write(memory, 0, &header.encode())?;
        Ok(HEADER_BYTES as u32)
    }

    // ---- the host's events ----

    fn look(&mut self, active: &mut Active) -> Result<(), DeviceError> {
        if std::mem::take(&mut self.accept_again) {
            self.accept();
        }
        for _ in 0..TURN_EVENTS {
            let seen = self.streams.wait();
            if seen.is_empty() {
                self.tick();
                return Ok(());
            }
            for seen in seen {
                self.event(seen);
            }
        }
        self.tick();
        // More may wait, and the event loop is told of news only.
        kick_again(&active.kicks, RX)
    }

    fn tick(&mut self) {
        let wanted = self.accept_again
            || !self.streams.handshakes.is_empty()
            || self
                .connections
                .values()
                .any(|connection| connection.deadline.is_some());
        self.streams.tick(wanted);
    }

    fn event(&mut self, seen: Seen) {
        if Streams::is_listener(seen.token) {
            self.accept();
        } else if self.streams.is_timer(seen.token) {
            self.expire();
        } else if self.streams.handshakes.contains_key(&seen.token) {
            self.handshake(seen.token);
        } else if let Some(connection) = self.connections.get_mut(&seen.token) {
            let ended = EventFlags::HUP | EventFlags::ERR;
            if seen
                .flags
                .intersects(EventFlags::IN | EventFlags::RDHUP | ended)
            {
                connection.readable = true;
            }
            connection.hung_up |= seen.flags.intersects(ended);
            let result = if seen.flags.intersects(EventFlags::OUT | ended) {
                connection.flush()
            } else {
                Ok(())
            };
            self.settle(seen.token, result);
        }
    }

    fn accept(&mut self) {
        for _ in 0..MAX_CONNECTIONS {
            match self.streams.accept(self.room()) {
                Ok(Some(token)) => self.handshake(token),
                Ok(None) => return,
                Err(error) => {
                    // Out of descriptors, most likely: the timer tries again.
                    tracing::warn!(%error, "vsock socket");
                    self.accept_again = true;
                    return;
                }
            }
        }
        self.accept_again = true;
    }

    fn handshake(&mut self, token: u64) {
        match self.streams.step(token) {
            Step::Wait => {}
            Step::Drop => {
                self.streams.handshakes.remove(&token);
            }
            Step::Connect(port) => {
                let Some(handshake) = self.streams.handshakes.remove(&token) else {
                    return;
                };
                let ports = Ports {
                    host: self.free_host_port(port),
                    guest: port,
                };
                let deadline = Instant::now() + CONNECT_TIMEOUT;
                self.add(token, Connection::asked(handshake.stream, ports, deadline));
            }
        }
    }

    /// A port of the host that no connection to `guest` has. There are more ports than connections.
    fn free_host_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_host_port;
            self.next_host_port = host.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            if !self.by_ports.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }

    fn expire(&mut self) {
        let now = Instant::now();
        self.streams
            .handshakes
            .retain(|_, handshake| handshake.deadline > now);
        let late: Vec<u64> = self
            .connections
            .iter()
            .filter(|(_, connection)| connection.deadline.is_some_and(|deadline| deadline <= now))
            .map(|(token, _)| *token)
            .collect();
        for token in late {
            self.end(token, true);
        }
    }

    /// Takes the queues out, does `work`, puts them back.
    fn with_active(
        &mut self,
        work: impl FnOnce(&mut Self, &mut Active) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let Some(mut active) = self.active.take() else {
            return Ok(());
        };
        let result = work(self, &mut active);
        self.active = Some(active);
        result
    }
}

/// Gives a chain back to the driver.
fn finish(
    queue: &mut Queue,
    memory: &GuestMemoryMmap,
    chain: &Chain,
    len: u32,
    index: usize,
) -> Result<(), DeviceError> {
    queue
        .add_used(memory, chain.head(), len)
        .map_err(|source| DeviceError::Queue { index, source })
}

/// Asks for a kick at the next buffer; true when there already is one.
fn enable(queue: &mut Queue, memory: &GuestMemoryMmap, index: usize) -> Result<bool, DeviceError> {
    queue
        .enable_notification(memory)
        .map_err(|source| DeviceError::Queue { index, source })
}

/// One interrupt for a batch.
fn notify(
    queue: &mut Queue,
    memory: &GuestMemoryMmap,
    interrupt: &Interrupt,
    used: usize,
    index: usize,
) -> Result<(), DeviceError> {
    let wanted = used > 0
        && queue
            .needs_notification(memory)
            .map_err(|source| DeviceError::Queue { index, source })?;
    if wanted {
        interrupt.used_buffer();
    }
    Ok(())
}

impl Device for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE, QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX
    }

    /// `struct virtio_vsock_config`: the guest's context id.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.guest_cid.to_le_bytes();
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = usize::try_from(offset)
                .ok()
                .and_then(|offset| config.get(offset + index).copied())
                .unwrap_or(0);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let [rx, tx, event] = <[Queue; 3]>::try_from(activation.queues)
            .map_err(|_| DeviceError::Driver("vsock needs three queues"))?;
        self.active = Some(Active {
            memory: activation.memory,
            rx,
            tx,
            event,
            interrupt: activation.interrupt,
            kicks: activation.kicks,
            chain: Chain::default(),
        });
        Ok(())
    }

    fn reset(&mut self) {
        self.drop_all();
        self.active = None;
    }

    fn process_queue(&mut self, index: usize) -> Result<(), DeviceError> {
        self.with_active(|device, active| {
            match index {
                TX => device.receive(active)?,
                RX => device.look(active)?,
                _ => return Ok(()),
            }
            device.send(active)
        })
    }

    fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.streams.fd())
    }

    fn process_host(&mut self) -> Result<(), DeviceError> {
        self.with_active(|device, active| {
            device.look(active)?;
            device.send(active)
        })
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let counters = &self.counters;
        vec![
            ("connections", counters.connections),
            ("open", self.connections.len() as u64),
            ("rx_packets", counters.rx_packets),
            ("rx_bytes", counters.rx_bytes),
            ("tx_packets", counters.tx_packets),
            ("tx_bytes", counters.tx_bytes),
            ("connection_resets", counters.resets),
            ("refused", counters.refused),
        ]
    }
}

const _: () = assert!(BUF_ALLOC >= MAX_DATA);
