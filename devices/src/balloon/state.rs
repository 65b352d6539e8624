//! A balloon's own part of a saved state. Which pages are free is the guest's knowledge, and lies in
//! its memory.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

use super::Balloon;
use crate::virtio::state::{DeviceState, RestoreError, RingState, Saved};

/// A balloon beyond its queues.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    /// The configuration field `actual`, in pages of 4 KiB.
    pub actual_pages: u32,
}

impl Balloon {
    pub(super) fn saved(&self) -> Saved {
        let queues = self.active.iter().flat_map(|active| &active.queues);
        Saved {
            rings: queues.map(RingState::of).collect(),
            own: DeviceState::Balloon(BalloonState {
                actual_pages: self.actual_pages,
            }),
        }
    }

    pub(super) fn take_state(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        match state {
            DeviceState::Balloon(BalloonState { actual_pages }) => {
                self.actual_pages = *actual_pages;
                Ok(())
            }
            _ => Err(RestoreError::OwnKind {
                device_type: VIRTIO_ID_BALLOON,
            }),
        }
    }
}
