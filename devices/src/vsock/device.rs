//! The device: its life, and who is connected to whom. What comes from the guest and goes to it is
//! in `guest.rs`, what the host's side does in `host.rs`.

use std::collections::{HashMap, VecDeque};
use std::os::fd::BorrowedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use super::connection::{Broken, Connection, Ports};
use super::packet::Header;
use super::queues::{EVENT, Queues, RX, TX};
use super::streams::{Streams, VsockError};
use super::{CONTROL_PORT, MAX_CONNECTIONS};
use crate::virtio::state::{DeviceState, RestoreError, Saved};
use crate::virtio::{Activation, Device, DeviceError};

/// The most chains in a queue.
pub(super) const QUEUE_SIZE: u16 = 256;
/// The driver fills the receive queue when it starts, a page and thousands of instructions a buffer.
const RX_QUEUE_SIZE: u16 = 64;
/// How long the guest may take to finish a close.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);
/// Host ports given to connections that a host program asked for begin here.
pub(super) const FIRST_HOST_PORT: u32 = 1 << 30;
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (virtio 1.2, 5.10.6.7).
const TRANSPORT_RESET: u32 = 0;

/// Whether host programs wait in the listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Backlog {
    /// None that we have not been told of.
    Empty,
    /// More than one turn takes.
    More,
    /// They cannot be taken, for want of descriptors most likely: the timer tries again.
    Failing,
}

/// A socket device.
pub struct Vsock {
    pub(super) guest_cid: u64,
    pub(super) streams: Streams,
    pub(super) connections: HashMap<u64, Connection>,
    pub(super) by_ports: HashMap<Ports, u64>,
    /// Connections with something for the guest, in turn.
    pub(super) waiting: VecDeque<u64>,
    pub(super) resets: VecDeque<Header>,
    pub(super) next_host_port: u32,
    pub(super) backlog: Backlog,
    /// The driver has not been told yet of [`Self::transport_reset`].
    pub(super) owes_transport_reset: bool,
    pub(super) queues: Option<Queues>,
    /// The host's port of the control connection: of the one that is saved.
    pub(super) control_port: u32,
    /// For the control connection, at a restore.
    pub(super) control_stream: Option<UnixStream>,
    pub(super) counters: Counters,
}

/// Among the counters: CLOCK_MONOTONIC in nanoseconds when the first data was put before the guest; 0 before.
pub const FIRST_RX_NS: &str = "first_rx_ns";
/// The same when the first data came from the guest.
pub const FIRST_TX_NS: &str = "first_tx_ns";

#[derive(Default)]
pub(super) struct Counters {
    pub(super) connections: u64,
    pub(super) rx_packets: u64,
    pub(super) rx_bytes: u64,
    pub(super) tx_packets: u64,
    pub(super) tx_bytes: u64,
    pub(super) resets: u64,
    pub(super) refused: u64,
    pub(super) control_lost: u64,
    pub(super) first_rx_ns: u64,
    pub(super) first_tx_ns: u64,
}

impl Counters {
    /// So much data was put before the guest.
    pub(super) fn received(&mut self, len_bytes: u64) {
        self.rx_bytes += len_bytes;
        stamp(&mut self.first_rx_ns, len_bytes);
    }

    /// So much data came from the guest.
    pub(super) fn sent(&mut self, len_bytes: u64) {
        self.tx_bytes += len_bytes;
        stamp(&mut self.first_tx_ns, len_bytes);
    }
}

fn stamp(first_ns: &mut u64, len_bytes: u64) {
    if *first_ns == 0 && len_bytes > 0 {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        *first_ns = now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64;
    }
}

impl Vsock {
    /// A device for the guest `guest_cid`, whose Unix socket is made at `socket`, mode 0600, and
    /// removed with the device. A stale socket there is replaced.
    ///
    /// # Errors
    /// [`VsockError`] when the socket cannot be made.
    pub fn new(guest_cid: u32, socket: &Path) -> Result<Self, VsockError> {
        Ok(Self::around(guest_cid, Streams::new(socket)?))
    }

    /// A device whose Unix socket somebody else has bound, and removes. The guest's connections go
    /// to `<guest_prefix>_<port>`.
    ///
    /// # Errors
    /// [`VsockError::System`] when the system is out of descriptors.
    pub fn with_listener(
        guest_cid: u32,
        listener: UnixListener,
        guest_prefix: &Path,
    ) -> Result<Self, VsockError> {
        let streams = Streams::with_listener(listener, guest_prefix)?;
        Ok(Self::around(guest_cid, streams))
    }

    fn around(guest_cid: u32, streams: Streams) -> Self {
        Self {
            guest_cid: u64::from(guest_cid),
            streams,
            connections: HashMap::new(),
            by_ports: HashMap::new(),
            waiting: VecDeque::new(),
            resets: VecDeque::new(),
            next_host_port: FIRST_HOST_PORT,
            backlog: Backlog::Empty,
            owes_transport_reset: false,
            queues: None,
            control_port: CONTROL_PORT,
            control_stream: None,
            counters: Counters::default(),
        }
    }

    /// The same device, which at its restore joins the control connection to `stream`, already
    /// connected, instead of connecting to `<socket>_1024`. A state without a control connection
    /// closes it.
    #[must_use]
    pub fn with_control_stream(mut self, stream: UnixStream) -> Self {
        self.control_stream = Some(stream);
        self
    }

    /// Ends all connections and tells the driver that it has none, as after a restore. A driver
    /// that has no buffer for that now is told as soon as it has.
    ///
    /// # Errors
    /// When the event queue is broken.
    pub fn transport_reset(&mut self) -> Result<(), DeviceError> {
        self.drop_all();
        self.owes_transport_reset = true;
        self.with_queues(|device, queues| {
            // The guest's packets may have waited for resets that are gone now.
            queues.again(TX)?;
            device.tell_transport_reset(queues)
        })
    }

    fn tell_transport_reset(&mut self, queues: &mut Queues) -> Result<(), DeviceError> {
        while self.owes_transport_reset {
            if queues.pop(EVENT)? {
                let event = TRANSPORT_RESET.to_le_bytes();
                if queues.chain.write(&queues.memory, 0, &event)? < event.len() {
                    return Err(DeviceError::Driver("vsock event buffer too short"));
                }
                queues.finish(EVENT, event.len() as u32)?;
                queues.notify(EVENT)?;
                self.owes_transport_reset = false;
            } else if !queues.enable(EVENT)? {
                break;
            }
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

    pub(super) fn room(&self) -> bool {
        self.connections.len() + self.streams.handshakes.len() < MAX_CONNECTIONS
    }

    pub(super) fn add(&mut self, token: u64, connection: Connection) {
        self.counters.connections += 1;
        self.by_ports.insert(connection.ports, token);
        self.connections.insert(token, connection);
        self.enqueue(token);
    }

    /// Notes that connection `token` may have something for the guest.
    pub(super) fn enqueue(&mut self, token: u64) {
        if let Some(connection) = self.connections.get_mut(&token)
            && !connection.queued
            && connection.has_packet()
        {
            connection.queued = true;
            self.waiting.push_back(token);
        }
    }

    /// Ends connection `token`: its stream is closed, and the guest gets a reset if it knows of it.
    pub(super) fn end(&mut self, token: u64) {
        if let Some(connection) = self.remove(token)
            && connection.guest_knows()
        {
            self.counters.resets += 1;
            self.resets.push_back(connection.reset(self.guest_cid));
        }
    }

    /// Takes connection `token` out of everything; its stream closes when it is dropped.
    pub(super) fn remove(&mut self, token: u64) -> Option<Connection> {
        self.leave_guest(token);
        self.connections.remove(&token)
    }

    /// Frees the ports of connection `token` and its place among those that wait for a buffer. A
    /// guest that makes and resets connections but gives no buffers must not make either grow.
    pub(super) fn leave_guest(&mut self, token: u64) {
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        if std::mem::take(&mut connection.queued) {
            self.waiting.retain(|waiting| *waiting != token);
        }
        // The ports of one that only delivers may be another's by now.
        if self.by_ports.get(&connection.ports) == Some(&token) {
            self.by_ports.remove(&connection.ports);
        }
    }

    /// After a change of connection `token`: on with it, or its end.
    pub(super) fn settle(&mut self, token: u64, result: Result<(), Broken>) {
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        if result.is_err() || connection.is_over() {
            self.end(token);
            return;
        }
        if connection.awaits_close() && connection.deadline.is_none() {
            connection.deadline = Some(Instant::now() + CLOSE_TIMEOUT);
            self.streams.tick(true);
        }
        self.enqueue(token);
    }

    /// Takes the queues out, does `work`, puts them back; then raises the interrupt, once.
    pub(super) fn with_queues(
        &mut self,
        work: impl FnOnce(&mut Self, &mut Queues) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let Some(mut queues) = self.queues.take() else {
            return Ok(());
        };
        let result = work(self, &mut queues);
        if result.is_err() {
            // Until the driver resets the device no byte moves: host programs need not wait for it.
            self.drop_all();
        }
        queues.interrupt();
        if result.is_ok() && queues.is_late() {
            self.streams.tick(true);
        }
        self.queues = Some(queues);
        result
    }
}

impl Device for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[RX_QUEUE_SIZE, QUEUE_SIZE, RX_QUEUE_SIZE]
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
                .and_then(|offset| config.get(offset.checked_add(index)?).copied())
                .unwrap_or(0);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.queues = Some(Queues::new(activation)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.drop_all();
        self.owes_transport_reset = false;
        self.queues = None;
    }

    fn process_queue(&mut self, index: usize) -> Result<(), DeviceError> {
        self.with_queues(|device, queues| {
            match index {
                TX => device.receive(queues)?,
                RX => device.look(queues)?,
                _ => return device.tell_transport_reset(queues),
            }
            device.send(queues)
        })
    }

    fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.streams.fd())
    }

    fn process_host(&mut self) -> Result<(), DeviceError> {
        self.with_queues(|device, queues| {
            device.look(queues)?;
            device.send(queues)
        })
    }

    fn save(&self) -> Saved {
        self.saved()
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        self.take_state(state)
    }

    fn keep_connection(&mut self, host_port: u32) {
        self.control_port = host_port;
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
            ("control_lost", counters.control_lost),
            (FIRST_RX_NS, counters.first_rx_ns),
            (FIRST_TX_NS, counters.first_tx_ns),
        ]
    }
}
