//! An entropy device's own part of a saved state: nothing as yet. Its randomness is the host's, and
//! no two children get the same.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::Rng;
use crate::virtio::state::{DeviceState, RestoreError, RingState, Saved};

/// An entropy device beyond its queue.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngState {}

impl Rng {
    pub(super) fn saved(&self) -> Saved {
        let active = self.active.iter();
        Saved {
            rings: active.map(|active| RingState::of(&active.queue)).collect(),
            own: DeviceState::Rng(RngState {}),
        }
    }

    pub(super) fn check_state(state: &DeviceState) -> Result<(), RestoreError> {
        match state {
            DeviceState::Rng(RngState {}) => Ok(()),
            _ => Err(RestoreError::OwnKind {
                device_type: VIRTIO_ID_RNG,
            }),
        }
    }
}
