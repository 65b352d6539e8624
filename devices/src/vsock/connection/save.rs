//! Saving a connection that goes on, and joining it to another stream.

use std::collections::VecDeque;
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::RecvFlags;

use super::{Connection, HostStream, Phase, Ports};
use crate::vsock::state::ControlState;

/// The most bytes in a host program's stream that are saved; far above what a Unix socket holds.
pub(in crate::vsock) const TO_GUEST_MAX: usize = 1 << 20;

impl<S: HostStream> Connection<S> {
    /// One that was saved, on another stream. It has nothing for the guest but what was under way.
    pub(in crate::vsock) fn joined(stream: S, ports: Ports, state: &ControlState) -> Self {
        let mut connection = Self::new(stream, ports, Phase::Open);
        connection.readable = true;
        connection.carried = VecDeque::from(state.to_guest.clone());
        connection.sent = state.sent;
        connection.peer_alloc = state.peer_alloc;
        connection.peer_taken = state.peer_taken;
        connection.credit_asked = state.credit_asked;
        connection.forwarded = state.forwarded;
        connection.told_forwarded = state.told_forwarded;
        connection.owe_credit = state.owes_credit;
        // At most BUF_ALLOC: the state's list is bounded.
        connection.received = state.forwarded.wrapping_add(state.to_host.len() as u32);
        // The stream is watched, and says at once that it has room.
        connection.to_host = VecDeque::from(state.to_host.clone());
        connection
    }

    /// Whether there are saved bytes for the guest; they go before the stream's.
    pub(in crate::vsock) fn carries(&self) -> bool {
        !self.carried.is_empty()
    }

    /// The next saved bytes for the guest, at most `len`.
    pub(in crate::vsock) fn take_carried(&mut self, len: u64) -> Vec<u8> {
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let bytes = self.carried.drain(..len.min(self.carried.len())).collect();
        if self.carried.is_empty() {
            self.carried = VecDeque::new();
        }
        bytes
    }

    /// Both sides take and send, and the guest knows that it is open.
    fn is_wholly_open(&self) -> bool {
        let closing = self.host_takes_no_more
            || self.host_at_end
            || self.guest_sends_no_more
            || self.guest_takes_no_more
            || self.announced != 0;
        self.phase == Phase::Open && !self.owe_response && !closing
    }
}

impl Connection {
    /// Its state, if it is wholly open and all its bytes can be had. It goes on undisturbed.
    pub(in crate::vsock) fn saved(&self) -> Option<ControlState> {
        if !self.is_wholly_open() {
            return None;
        }
        let mut to_guest = Vec::from(self.carried.clone());
        peek_all(&self.stream, &mut to_guest)?;
        Some(ControlState {
            host_port: self.ports.host,
            guest_port: self.ports.guest,
            sent: self.sent,
            peer_alloc: self.peer_alloc,
            peer_taken: self.peer_taken,
            credit_asked: self.credit_asked,
            forwarded: self.forwarded,
            told_forwarded: self.told_forwarded,
            owes_credit: self.owe_credit,
            to_host: Vec::from(self.to_host.clone()),
            to_guest,
        })
    }
}

/// Appends all that lies in `stream` without taking it. `None` when that cannot be had whole, or
/// nothing can ever come: the stream is at its end.
fn peek_all(stream: &UnixStream, bytes: &mut Vec<u8>) -> Option<()> {
    let waiting = usize::try_from(rustix::io::ioctl_fionread(stream).ok()?).ok()?;
    if bytes.len() + waiting > TO_GUEST_MAX {
        return None;
    }
    let start = bytes.len();
    // One byte at least: an empty stream that is at its end says so.
    bytes.resize(start + waiting.max(1), 0);
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    let peeked = loop {
        match rustix::net::recv(stream, &mut bytes[start..], flags) {
            Err(Errno::INTR) => {}
            Ok((_, 0)) => return None,
            Ok((_, len)) => break len,
            Err(Errno::AGAIN) => break 0,
            Err(_) => return None,
        }
    };
    // A byte that came just now belongs to what is written after the save.
    bytes.truncate(start + peeked.min(waiting));
    (peeked >= waiting).then_some(())
}
