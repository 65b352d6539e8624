//! A network device's own part of a saved state: nothing as yet. Chains that it holds for frames to
//! come are given back to their ring, frames in the tap stay there, and the MAC address is the new
//! device's: a child has its own.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;

use super::Net;
use crate::virtio::state::{DeviceState, RestoreError, RingState, Saved};

/// A network device beyond its queues.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {}

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
            own: DeviceState::Net(NetState {}),
        }
    }

    pub(super) fn check_state(state: &DeviceState) -> Result<(), RestoreError> {
        match state {
            DeviceState::Net(NetState {}) => Ok(()),
            _ => Err(RestoreError::OwnKind {
                device_type: VIRTIO_ID_NET,
            }),
        }
    }
}
