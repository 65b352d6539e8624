//! What of a socket device is saved, and how the connections fare in the new one.
//!
//! ```text
//!  saved: control connection --> joined to a fresh stream; the guest notices nothing
//!                           `--> no host program listens: RST, counted as `control_lost`
//!         all others, open, half-open or half-closed --> RST
//!         handshakes, and what only waits to be delivered to the old process's programs: not saved
//! ```
//!
//! The control connection is the newest at the host's port that [`crate::virtio::Device::keep_connection`] names
//! (else [`CONTROL_PORT`], to which the guest connects) and that is wholly open. In the new process it is joined to
//! whoever listens for the guest's connections to [`CONTROL_PORT`]. Its bytes under way are saved with it: those of the guest that the host's
//! stream had not taken, and those that lie in the stream for the guest. The latter are only looked
//! at, so that the device that was saved goes on undisturbed.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use super::connection::{BUF_ALLOC, Connection, Ports, TO_GUEST_MAX};
use super::device::{FIRST_HOST_PORT, Vsock};
use super::packet::{HEADER_BYTES, Header, Op, STREAM};
use super::queues::Queues;
use super::{CONTROL_PORT, HOST_CID};
use crate::virtio::DeviceError;
use crate::virtio::state::{DeviceState, RestoreError, Saved, bounded};

/// The most resets that are saved; [`super::MAX_CONNECTIONS`] and those that wait already are fewer.
const RESETS_MAX: usize = 4096;

/// A socket device beyond its queues.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The guest's context id, which its driver has read.
    pub guest_cid: u64,
    /// The next host port for a connection that a host program asks for.
    pub next_host_port: u32,
    /// The connection that goes on.
    pub control: Option<ControlState>,
    /// Those that the guest hears the end of.
    #[serde(deserialize_with = "bounded::<_, _, RESETS_MAX>")]
    pub resets: Vec<ResetState>,
    /// The driver has to be told of a transport reset.
    pub owes_transport_reset: bool,
    /// The driver has packets back of which it has not been told.
    pub owes_interrupt: bool,
}

/// The control connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlState {
    /// The host's port.
    #[serde(default = "control_port", skip_serializing_if = "is_control_port")]
    pub host_port: u32,
    /// The guest's port.
    pub guest_port: u32,
    /// Bytes sent to the guest, modulo 2^32.
    pub sent: u32,
    /// How many bytes the guest keeps at most (`buf_alloc` of its last packet).
    pub peer_alloc: u32,
    /// How many its program has taken (`fwd_cnt` of its last packet), modulo 2^32.
    pub peer_taken: u32,
    /// The guest has been asked for credit since it had none.
    pub credit_asked: bool,
    /// Bytes of the guest that the host has taken, modulo 2^32.
    pub forwarded: u32,
    /// [`Self::forwarded`] as the guest was last told.
    pub told_forwarded: u32,
    /// The guest has to be told.
    pub owes_credit: bool,
    /// Bytes of the guest that the host has not taken.
    #[serde(deserialize_with = "bounded::<_, _, { BUF_ALLOC as usize }>")]
    pub to_host: Vec<u8>,
    /// Bytes of the host that the guest has not got.
    #[serde(deserialize_with = "bounded::<_, _, TO_GUEST_MAX>")]
    pub to_guest: Vec<u8>,
}

fn control_port() -> u32 {
    CONTROL_PORT
}

fn is_control_port(port: &u32) -> bool {
    *port == CONTROL_PORT
}

/// A connection that the guest hears the end of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ResetState {
    /// The context id that the guest connected to: [`HOST_CID`], or one that nobody has.
    pub host_cid: u64,
    /// The host's port.
    pub host_port: u32,
    /// The guest's port.
    pub guest_port: u32,
}

impl ControlState {
    fn ports(&self) -> Ports {
        Ports {
            host: self.host_port,
            guest: self.guest_port,
        }
    }
}

impl ResetState {
    fn of_connection(ports: Ports) -> Self {
        Self {
            host_cid: HOST_CID,
            host_port: ports.host,
            guest_port: ports.guest,
        }
    }

    fn header(self, guest_cid: u64) -> Header {
        Header {
            src_cid: self.host_cid,
            dst_cid: guest_cid,
            src_port: self.host_port,
            dst_port: self.guest_port,
            kind: STREAM,
            op: Op::Reset as u16,
            ..Header::default()
        }
    }
}

impl Vsock {
    pub(super) fn saved(&self) -> Saved {
        let control = self
            .connections
            .iter()
            .filter(|(_, connection)| connection.ports.host == self.control_port)
            .max_by_key(|(token, _)| **token)
            .and_then(|(token, connection)| Some((*token, connection.saved()?)));
        let survivor = control.as_ref().map(|(token, _)| *token);
        let mut ended: Vec<ResetState> = self
            .connections
            .iter()
            .filter(|(token, connection)| Some(**token) != survivor && connection.guest_knows())
            .map(|(_, connection)| ResetState::of_connection(connection.ports))
            .collect();
        ended.sort_unstable();
        let waiting = self.resets.iter().map(|header| ResetState {
            host_cid: header.src_cid,
            host_port: header.src_port,
            guest_port: header.dst_port,
        });
        let queues = self.queues.as_ref();
        Saved {
            rings: queues.map(Queues::rings).unwrap_or_default(),
            own: DeviceState::Vsock(VsockState {
                guest_cid: self.guest_cid,
                next_host_port: self.next_host_port,
                control: control.map(|(_, state)| state),
                resets: waiting.chain(ended).take(RESETS_MAX).collect(),
                owes_transport_reset: self.owes_transport_reset,
                owes_interrupt: queues.is_some_and(Queues::has_untold),
            }),
        }
    }

    pub(super) fn take_state(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let given = self.control_stream.take();
        let DeviceState::Vsock(saved) = state else {
            return Err(RestoreError::OwnKind {
                device_type: VIRTIO_ID_VSOCK,
            });
        };
        saved.check()?;
        self.guest_cid = saved.guest_cid;
        self.next_host_port = saved.next_host_port;
        let Some(queues) = &mut self.queues else {
            // A driver that starts anew knows of no connection.
            return Ok(());
        };
        if saved.owes_interrupt {
            queues.owe_interrupt();
        }
        self.owes_transport_reset = saved.owes_transport_reset;
        let resets = saved.resets.iter();
        self.resets
            .extend(resets.map(|reset| reset.header(saved.guest_cid)));
        let Some(control) = &saved.control else {
            return Ok(());
        };
        self.control_port = control.host_port;
        let ports = control.ports();
        let joined = given
            .map_or_else(|| self.streams.connect(CONTROL_PORT), Ok)
            .and_then(|stream| {
                stream.set_nonblocking(true)?;
                let token = self.streams.watch(&stream)?;
                Ok((token, stream))
            });
        match joined {
            Ok((token, stream)) => self.add(token, Connection::joined(stream, ports, control)),
            Err(error) => {
                tracing::warn!(%error, "vsock: nobody takes the control connection; it is reset");
                self.counters.control_lost += 1;
                self.counters.resets += 1;
                let reset = ResetState::of_connection(ports);
                self.resets.push_back(reset.header(saved.guest_cid));
            }
        }
        Ok(())
    }

    /// Puts at most `want` saved bytes of connection `token` into the chain at hand; the packet's
    /// length in bytes.
    #[cold]
    pub(super) fn fill_carried(
        &mut self,
        queues: &Queues,
        token: u64,
        want: u64,
    ) -> Result<Option<u32>, DeviceError> {
        let Some(connection) = self.connections.get_mut(&token) else {
            return Ok(None);
        };
        let data = connection.take_carried(want);
        queues.chain.write(&queues.memory, HEADER_BYTES, &data)?;
        let header = connection.data_packet(self.guest_cid, data.len() as u32);
        self.counters.rx_bytes += data.len() as u64;
        let len = self.put(queues, &header)? + data.len() as u32;
        self.settle(token, Ok(()));
        Ok(Some(len))
    }
}

impl VsockState {
    fn check(&self) -> Result<(), RestoreError> {
        // 0 to 2 are others' (virtio 1.2, 5.10.4), and the upper half of the field is reserved.
        if self.guest_cid <= HOST_CID || self.guest_cid >= u64::from(u32::MAX) {
            let what = "a context id that no guest has";
            return Err(RestoreError::inconsistent(what, self.guest_cid));
        }
        if self.next_host_port < FIRST_HOST_PORT {
            let what = "a host port that is not given to connections";
            return Err(RestoreError::inconsistent(what, self.next_host_port));
        }
        if let Some(control) = &self.control {
            if self
                .resets
                .contains(&ResetState::of_connection(control.ports()))
            {
                let what = "a control connection that goes on and ends";
                return Err(RestoreError::inconsistent(what, control.guest_port));
            }
        }
        Ok(())
    }
}
