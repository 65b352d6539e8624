//! The guest's packets, and the packets for the guest.
//!
//! Nothing may be lost between "there is something for the guest" and "there is a free buffer":
//! whoever has something stays in `resets` or `waiting` until it has been sent, and both a new
//! buffer and a new event lead to [`Vsock::send`].

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::HOST_CID;
use super::connection::{BUF_ALLOC, Broken, Connection, Phase, Ports, would_block};
use super::device::{QUEUE_SIZE, Vsock};
use super::packet::{HEADER_BYTES, Header, Op, STREAM};
use super::queues::{Queues, RX, TX};
use crate::virtio::DeviceError;
use crate::virtio::chain::Iovecs;

/// Packets handled in one turn of the event loop, each way.
const TURN_PACKETS: usize = 2 * QUEUE_SIZE as usize;
/// Resets that wait for a buffer of the guest. With this many, its packets are left in their queue.
const MAX_RESETS: usize = QUEUE_SIZE as usize;
/// The most data in one packet, in bytes.
const MAX_DATA: u32 = 64 * 1024;
/// How long a host program may take to read the rest of a connection that the guest has left.
const DELIVERY_TIMEOUT: Duration = Duration::from_secs(60);

const _: () = assert!(BUF_ALLOC >= MAX_DATA);

impl Vsock {
    /// Takes the guest's packets.
    pub(super) fn receive(&mut self, queues: &mut Queues) -> Result<(), DeviceError> {
        let mut used = 0;
        let mut bytes = 0;
        loop {
            while used < TURN_PACKETS && self.resets.len() < MAX_RESETS && queues.pop(TX)? {
                self.packet(queues)?;
                bytes += queues.chain.readable_len_bytes();
                queues.finish(TX, 0)?;
                used += 1;
            }
            if self.resets.len() >= MAX_RESETS {
                // Goes on when the guest has given buffers for the resets: see `send`.
                break;
            }
            if !queues.enable(TX)? {
                break;
            }
            if used >= TURN_PACKETS {
                queues.again(TX)?;
                break;
            }
        }
        queues.notify_sent(used, bytes)
    }

    fn packet(&mut self, queues: &Queues) -> Result<(), DeviceError> {
        let chain = &queues.chain;
        let mut bytes = [0; HEADER_BYTES as usize];
        if chain.read(&queues.memory, 0, &mut bytes)? < bytes.len() {
            return Err(DeviceError::Driver("vsock packet without a whole header"));
        }
        let header = Header::parse(&bytes);
        let data = u64::from(header.len);
        if chain.readable_len_bytes() < HEADER_BYTES + data {
            return Err(DeviceError::Driver("vsock packet shorter than it says"));
        }
        self.counters.tx_packets += 1;
        self.counters.sent(data);
        let op = Op::from_number(header.op);
        if header.src_cid != self.guest_cid {
            // Whoever that is, it is not there to be told.
            self.counters.refused += 1;
            return Ok(());
        }
        let ports = Ports {
            host: header.dst_port,
            guest: header.src_port,
        };
        let known = (header.dst_cid == HOST_CID)
            .then(|| self.by_ports.get(&ports).copied())
            .flatten();
        let stream = header.kind == STREAM;
        match (known, op) {
            (None, Some(Op::Reset)) => {}
            (None, Some(Op::Request)) if stream && header.dst_cid == HOST_CID => {
                self.request(&header, ports);
            }
            (None, _) => self.refuse(&header),
            (Some(token), Some(op)) if stream => self.known_packet(token, op, &header, queues)?,
            (Some(token), _) => self.end(token),
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

    fn known_packet(
        &mut self,
        token: u64,
        op: Op,
        header: &Header,
        queues: &Queues,
    ) -> Result<(), DeviceError> {
        let Some(connection) = self.connections.get_mut(&token) else {
            return Ok(());
        };
        connection.note_credit(header);
        let result = match (op, connection.phase) {
            (Op::Reset, _) => {
                self.guest_reset(token);
                return Ok(());
            }
            (Op::Response, Phase::Asked) => connection.opened(),
            (Op::Data, Phase::Open) => {
                let (chain, memory) = (&queues.chain, &queues.memory);
                let len = header.len;
                let data = Iovecs::new(memory, chain.readable(), HEADER_BYTES, u64::from(len))?;
                connection.guest_data(
                    len,
                    |stream| data.write_to(stream.as_fd()),
                    |skip| -> Result<_, DeviceError> {
                        let mut rest = vec![0; (len - skip) as usize];
                        chain.read(memory, HEADER_BYTES + u64::from(skip), &mut rest)?;
                        Ok(rest)
                    },
                )?
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
                self.end(token);
                return Ok(());
            }
        };
        self.settle(token, result);
        Ok(())
    }

    /// The guest has left connection `token`. Its ports are free; what it sent before a clean close
    /// is still delivered.
    fn guest_reset(&mut self, token: u64) {
        self.leave_guest(token);
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        if connection.guest_reset() {
            connection.deadline = Some(Instant::now() + DELIVERY_TIMEOUT);
            self.streams.tick(true);
        } else {
            self.remove(token);
        }
    }

    /// Gives the guest's buffers to resets, then to connections in turn.
    pub(super) fn send(&mut self, queues: &mut Queues) -> Result<(), DeviceError> {
        let mut used = 0;
        let paused = self.resets.len() >= MAX_RESETS;
        loop {
            while used < TURN_PACKETS && self.has_packets() && queues.pop(RX)? {
                if queues.chain.writable_len_bytes() <= HEADER_BYTES {
                    return Err(DeviceError::Driver("vsock buffer without room for data"));
                }
                match self.fill(queues)? {
                    Some(len) => {
                        queues.finish(RX, len)?;
                        used += 1;
                    }
                    None => queues.put_back(RX),
                }
            }
            // With nothing to send, new buffers are no news.
            if !self.has_packets() || !queues.enable(RX)? {
                break;
            }
            if used >= TURN_PACKETS {
                queues.again(RX)?;
                break;
            }
        }
        if paused && self.resets.len() < MAX_RESETS {
            queues.again(TX)?;
        }
        if used > 0 {
            queues.notify(RX)?;
        }
        Ok(())
    }

    fn has_packets(&self) -> bool {
        !self.resets.is_empty() || !self.waiting.is_empty()
    }

    /// Puts the next packet into the chain at hand; its length in bytes, or none.
    fn fill(&mut self, queues: &Queues) -> Result<Option<u32>, DeviceError> {
        if let Some(reset) = self.resets.pop_front() {
            return self.put(queues, &reset).map(Some);
        }
        let Some(token) = self.waiting.pop_front() else {
            return Ok(None);
        };
        let Some(connection) = self.connections.get_mut(&token) else {
            return Ok(None);
        };
        connection.queued = false;
        if let Some(header) = connection.control_packet(self.guest_cid) {
            let len = self.put(queues, &header)?;
            self.settle(token, Ok(()));
            return Ok(Some(len));
        }
        let room = queues.chain.writable_len_bytes() - HEADER_BYTES;
        let want = u64::from(connection.may_read().min(MAX_DATA)).min(room);
        if want == 0 {
            return Ok(None);
        }
        if connection.carries() {
            return self.fill_carried(queues, token, want);
        }
        let writable = queues.chain.writable();
        let buffers = Iovecs::new(&queues.memory, writable, HEADER_BYTES, want)?;
        let mut result = Ok(());
        let mut filled = None;
        match buffers.read_from(connection.stream.as_fd()) {
            Ok(0) => connection.host_ended(),
            Ok(len) => {
                let header = connection.data_packet(self.guest_cid, len as u32);
                self.counters.received(len as u64);
                filled = Some(self.put(queues, &header)? + len as u32);
            }
            Err(error) if would_block(&error) => connection.readable = false,
            // It is still readable, and so in the queue again.
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => result = Err(Broken::Host),
        }
        self.settle(token, result);
        Ok(filled)
    }

    pub(super) fn put(&mut self, queues: &Queues, header: &Header) -> Result<u32, DeviceError> {
        self.counters.rx_packets += 1;
        queues.chain.write(&queues.memory, 0, &header.encode())?;
        Ok(HEADER_BYTES as u32)
    }
}
