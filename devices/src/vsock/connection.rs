//! One connection: a stream to a host program, credit both ways, and how it ends.
//!
//! ```text
//!  Asked (we sent REQUEST) --RESPONSE--> Open --both directions closed--> gone (RST)
//!        |                                 |----guest's RST-------> gone, or with bytes for the
//!        +--RST, timeout--> gone           |                        host after a clean close:
//!                                          |                        Delivering --all taken--> gone
//!                                          +----host error, broken rule--> gone (RST)
//! ```
//!
//! Each direction closes on its own. *To the guest*: when the host's stream is at its end we send
//! SHUTDOWN with NO_SEND. *To the host*: when the guest said NO_SEND and all its bytes are written
//! we shut the stream's writing side; when the host takes no more (it closed, or a write failed) we
//! send SHUTDOWN with NO_RECEIVE and let the guest's bytes fall, but still deliver what the host
//! has written. Bytes that the host does not take yet wait in `to_host`, at most [`BUF_ALLOC`]:
//! that is what the guest is told it may send.
//!
//! No queue, no epoll, no clock here; the stream is behind [`HostStream`].

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::net::SendFlags;

use super::packet::{Header, NO_RECEIVE, NO_SEND, Op, STREAM};

mod save;

pub(super) use save::TO_GUEST_MAX;

/// How many bytes of the guest wait at most for a slow host program, a connection.
pub(super) const BUF_ALLOC: u32 = 256 * 1024;

/// Who is who: the host's port and the guest's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

/// A connection's place in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// A host program asked for it; the guest has not answered.
    Asked,
    /// Data flows.
    Open,
    /// The guest has gone after a clean close; the host program still takes bytes.
    Delivering,
}

/// What the guest broke; the connection is reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Broken {
    /// It sent more than it was told it may.
    Credit,
    /// It sent data after it had said that it would not.
    AfterShutdown,
    /// The host program's stream is broken.
    Host,
}

/// What a connection does with its host program's stream. None of it blocks.
pub(super) trait HostStream {
    /// Writes some bytes.
    fn write(&self, bytes: &[u8]) -> io::Result<usize>;
    /// Closes a direction. One that is closed already is fine.
    fn shut(&self, how: Shutdown);
}

impl HostStream for UnixStream {
    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        // A stream that was closed is an error, not a signal.
        Ok(rustix::net::send(self, bytes, SendFlags::NOSIGNAL)?)
    }

    fn shut(&self, how: Shutdown) {
        // It fails only on a stream that is closed both ways.
        let _ = self.shutdown(how);
    }
}

/// One connection. All but the stream is plain data.
#[derive(Debug)]
pub(super) struct Connection<S = UnixStream> {
    pub(super) stream: S,
    pub(super) ports: Ports,
    pub(super) phase: Phase,
    /// When to give up waiting for the guest.
    pub(super) deadline: Option<Instant>,
    /// The stream may have something to read.
    pub(super) readable: bool,
    /// It is in the queue of those with something for the guest.
    pub(super) queued: bool,
    /// The host program takes no more.
    host_takes_no_more: bool,
    host_at_end: bool,
    guest_sends_no_more: bool,
    guest_takes_no_more: bool,
    announced: u32,
    to_host: VecDeque<u8>,
    /// Saved bytes of an earlier stream, for the guest; see `save`.
    carried: VecDeque<u8>,
    writing_shut: bool,
    // Credit, all modulo 2^32 (5.10.6.3).
    sent: u32,
    peer_alloc: u32,
    peer_taken: u32,
    received: u32,
    forwarded: u32,
    told_forwarded: u32,
    credit_asked: bool,
    owe_request: bool,
    owe_response: bool,
    owe_credit: bool,
}

impl<S: HostStream> Connection<S> {
    /// One that a host program asked for: the guest gets a REQUEST.
    pub(super) fn asked(stream: S, ports: Ports, deadline: Instant) -> Self {
        let mut connection = Self::new(stream, ports, Phase::Asked);
        connection.owe_request = true;
        connection.deadline = Some(deadline);
        connection
    }

    /// One that the guest asked for with `request` and that the host has taken: it gets a RESPONSE.
    pub(super) fn accepted(stream: S, ports: Ports, request: &Header) -> Self {
        let mut connection = Self::new(stream, ports, Phase::Open);
        connection.owe_response = true;
        connection.note_credit(request);
        connection.readable = true;
        connection
    }

    fn new(stream: S, ports: Ports, phase: Phase) -> Self {
        Self {
            stream,
            ports,
            phase,
            deadline: None,
            readable: false,
            queued: false,
            host_takes_no_more: false,
            host_at_end: false,
            guest_sends_no_more: false,
            guest_takes_no_more: false,
            announced: 0,
            to_host: VecDeque::new(),
            carried: VecDeque::new(),
            writing_shut: false,
            sent: 0,
            peer_alloc: 0,
            peer_taken: 0,
            received: 0,
            forwarded: 0,
            told_forwarded: 0,
            credit_asked: false,
            owe_request: false,
            owe_response: false,
            owe_credit: false,
        }
    }

    /// Takes the credit that every packet of the guest carries.
    pub(super) fn note_credit(&mut self, header: &Header) {
        self.peer_alloc = header.buf_alloc;
        self.peer_taken = header.fwd_cnt;
        if self.credit() > 0 {
            self.credit_asked = false;
        }
    }

    /// How many bytes the guest will take now. A guest that lies (a count that runs backward)
    /// only starves itself.
    fn credit(&self) -> u32 {
        let in_flight = self.sent.wrapping_sub(self.peer_taken);
        self.peer_alloc.saturating_sub(in_flight)
    }

    /// The guest answered our REQUEST. The host program is told by `OK <port>`.
    pub(super) fn opened(&mut self) -> Result<(), Broken> {
        self.phase = Phase::Open;
        self.deadline = None;
        self.readable = true;
        let line = format!("OK {}\n", self.ports.host);
        // A fresh socket's buffer takes a line; a program that has gone away does not.
        match self.stream.write(line.as_bytes()) {
            Ok(len) if len == line.len() => Ok(()),
            _ => Err(Broken::Host),
        }
    }

    /// Takes `len` bytes of the guest: `write` gives the stream what it takes at once, `copy` the
    /// bytes from a given one on.
    pub(super) fn guest_data<E>(
        &mut self,
        len: u32,
        write: impl FnOnce(&S) -> io::Result<usize>,
        copy: impl FnOnce(u32) -> Result<Vec<u8>, E>,
    ) -> Result<Result<(), Broken>, E> {
        if len > BUF_ALLOC - self.waiting().min(BUF_ALLOC) {
            return Ok(Err(Broken::Credit));
        }
        if self.guest_sends_no_more {
            return Ok(Err(Broken::AfterShutdown));
        }
        self.received = self.received.wrapping_add(len);
        let mut taken = 0;
        let mut interrupted = false;
        if self.to_host.is_empty() && len > 0 && !self.host_takes_no_more {
            match write(&self.stream) {
                Ok(some) => taken = some as u32,
                Err(error) if would_block(&error) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => interrupted = true,
                Err(_) => self.host_takes_no_more(),
            }
            self.forwarded = self.forwarded.wrapping_add(taken);
        }
        if self.host_takes_no_more {
            self.forwarded = self.received;
        } else if taken < len {
            self.to_host.extend(copy(taken)?);
        }
        if interrupted {
            // The stream may have room, and then would never say so.
            self.flush();
        }
        self.weigh_credit();
        Ok(Ok(()))
    }

    /// Bytes of the guest that the host has not taken.
    fn waiting(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    /// The host program's stream takes nothing any more: it was closed.
    pub(super) fn host_takes_no_more(&mut self) {
        self.host_takes_no_more = true;
        self.to_host = VecDeque::new();
        self.forwarded = self.received;
    }

    /// The host program may take more.
    pub(super) fn flush(&mut self) {
        while !self.to_host.is_empty() {
            let (front, _) = self.to_host.as_slices();
            match self.stream.write(front) {
                Ok(len) => {
                    self.to_host.drain(..len);
                    self.forwarded = self.forwarded.wrapping_add(len as u32);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if would_block(&error) => break,
                Err(_) => self.host_takes_no_more(),
            }
        }
        self.weigh_credit();
        self.shut_writing();
        if self.to_host.is_empty() {
            self.to_host.shrink_to(0);
        }
    }

    /// Tells the guest of room once half of it has been used up since it was last told: it can then
    /// never wait for room that there is, and gets few packets.
    fn weigh_credit(&mut self) {
        if self.forwarded.wrapping_sub(self.told_forwarded) >= BUF_ALLOC / 2 {
            self.owe_credit = true;
        }
    }

    /// The guest asks how much room there is.
    pub(super) fn credit_requested(&mut self) {
        self.owe_credit = true;
    }

    /// The guest said SHUTDOWN with `flags`.
    pub(super) fn guest_shutdown(&mut self, flags: u32) {
        self.guest_sends_no_more |= flags & NO_SEND != 0;
        if flags & NO_RECEIVE != 0 && !self.guest_takes_no_more {
            self.guest_takes_no_more = true;
            // A host program that still writes gets EPIPE.
            self.stream.shut(Shutdown::Read);
        }
        self.shut_writing();
    }

    fn shut_writing(&mut self) {
        if self.guest_sends_no_more && self.to_host.is_empty() && !self.writing_shut {
            self.writing_shut = true;
            self.stream.shut(Shutdown::Write);
        }
    }

    /// The guest reset it. True when it closed cleanly before and the host program has not taken
    /// all: the connection then lives on without the guest until it has.
    pub(super) fn guest_reset(&mut self) -> bool {
        let delivers = self.guest_sends_no_more && !self.to_host.is_empty();
        if delivers {
            self.phase = Phase::Delivering;
            self.guest_takes_no_more = true;
            self.stream.shut(Shutdown::Read);
        }
        delivers
    }

    /// The host's stream gave its last byte.
    pub(super) fn host_ended(&mut self) {
        self.host_at_end = true;
        self.readable = false;
    }

    /// Both directions are closed and all bytes delivered: it ends with a reset.
    pub(super) fn is_over(&self) -> bool {
        let guest_knows = self.guest_takes_no_more || self.announced & NO_SEND != 0;
        let to_guest_closed = self.guest_takes_no_more || self.host_at_end;
        let to_host_closed = self.guest_sends_no_more && self.to_host.is_empty();
        to_guest_closed && to_host_closed && guest_knows
    }

    /// Whether the guest knows of it, so that it must hear of its end.
    pub(super) fn guest_knows(&self) -> bool {
        self.phase != Phase::Delivering && !self.owe_request
    }

    /// How many bytes of the host's stream may go to the guest now.
    pub(super) fn may_read(&self) -> u32 {
        let flows = self.phase == Phase::Open && self.readable && !self.guest_takes_no_more;
        if flows { self.credit() } else { 0 }
    }

    /// Whether there is a packet for the guest.
    pub(super) fn has_packet(&self) -> bool {
        let owed = self.owe_request || self.owe_response || self.owe_credit;
        self.phase != Phase::Delivering
            && (owed
                || self.may_read() > 0
                || self.wants_credit()
                || self.shutdown_to_announce() != 0)
    }

    fn wants_credit(&self) -> bool {
        self.phase == Phase::Open
            && self.readable
            && !self.guest_takes_no_more
            && self.credit() == 0
            && !self.credit_asked
    }

    /// SHUTDOWN's flags when the guest does not know all of them, else 0.
    fn shutdown_to_announce(&self) -> u32 {
        if self.phase != Phase::Open {
            return 0;
        }
        let sends_no_more =
            self.host_at_end || (self.guest_takes_no_more && self.host_takes_no_more);
        let mut wanted = 0;
        if sends_no_more {
            wanted |= NO_SEND;
        }
        // A guest that sends no more need not hear that nobody takes it.
        if self.host_takes_no_more && !self.guest_sends_no_more {
            wanted |= NO_RECEIVE;
        }
        if self.announced & wanted == wanted {
            0
        } else {
            wanted | self.announced
        }
    }

    /// The next packet without data, if one is owed; it counts as sent.
    pub(super) fn control_packet(&mut self, guest_cid: u64) -> Option<Header> {
        if std::mem::take(&mut self.owe_request) {
            return Some(self.header(guest_cid, Op::Request, 0, 0));
        }
        if std::mem::take(&mut self.owe_response) {
            return Some(self.header(guest_cid, Op::Response, 0, 0));
        }
        if self.owe_credit {
            return Some(self.header(guest_cid, Op::CreditUpdate, 0, 0));
        }
        if self.wants_credit() {
            self.credit_asked = true;
            return Some(self.header(guest_cid, Op::CreditRequest, 0, 0));
        }
        let flags = self.shutdown_to_announce();
        if flags != 0 {
            self.announced |= flags;
            return Some(self.header(guest_cid, Op::Shutdown, 0, flags));
        }
        None
    }

    /// The header of a data packet of `len` bytes; they count as sent.
    pub(super) fn data_packet(&mut self, guest_cid: u64, len: u32) -> Header {
        self.sent = self.sent.wrapping_add(len);
        self.header(guest_cid, Op::Data, len, 0)
    }

    /// Every packet tells the guest our credit.
    fn header(&mut self, guest_cid: u64, op: Op, len: u32, flags: u32) -> Header {
        self.owe_credit = false;
        self.told_forwarded = self.forwarded;
        Header {
            src_cid: super::HOST_CID,
            dst_cid: guest_cid,
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            len,
            kind: STREAM,
            op: op as u16,
            flags,
            buf_alloc: BUF_ALLOC,
            fwd_cnt: self.forwarded,
        }
    }

    /// The reset that ends it.
    pub(super) fn reset(&self, guest_cid: u64) -> Header {
        Header {
            src_cid: super::HOST_CID,
            dst_cid: guest_cid,
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            kind: STREAM,
            op: Op::Reset as u16,
            ..Header::default()
        }
    }

    /// Memory held for bytes that the host has not taken.
    #[cfg(test)]
    pub(super) fn kept_bytes(&self) -> usize {
        self.to_host.capacity()
    }

    /// Whether we wait for the guest to finish a close that both sides want.
    pub(super) fn awaits_close(&self) -> bool {
        self.announced & (NO_SEND | NO_RECEIVE) == NO_SEND | NO_RECEIVE
    }
}

/// The other side is not ready: try again when it is.
pub(super) fn would_block(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}
