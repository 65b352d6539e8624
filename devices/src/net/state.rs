//! A network device's own part of a saved state. Chains that it holds for frames to come are given
//! back to their ring, frames in the tap stay there, and the MAC address is the new device's: a child
//! has its own. The old one is remembered, so that no frame is sent in its name: until the guest has
//! been told who it is, its kernel goes on as the machine that was saved (it repeats TCP segments,
//! answers ARP), and what it had queued is that machine's, which sends it itself.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;

use super::Net;
use crate::virtio::state::{DeviceState, RestoreError, RingState, Saved};

/// A network device beyond its queues.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// The device's address; a state from before this was saved has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<[u8; 6]>,
}

impl Net {
    pub(super) fn saved(&self) -> Saved {
        let rings = self.active.as_ref().map(|active| {
            vec![
                RingState::before(&active.rx, active.pending.len()),
                RingState::of(&active.tx),
            ]
        });
        Saved {
            rings: rings.unwrap_or_default(),
            own: DeviceState::Net(NetState {
                mac: Some(self.mac),
            }),
        }
    }

    pub(super) fn take_state(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        match state {
            DeviceState::Net(NetState { mac }) => {
                self.former = mac.filter(|mac| *mac != self.mac);
                Ok(())
            }
            _ => Err(RestoreError::OwnKind {
                device_type: VIRTIO_ID_NET,
            }),
        }
    }
}
