//! A disk's own part of a saved state: what the driver has read of it. Its content is in its files;
//! see `Device::write_back`.

use serde::{Deserialize, Serialize};

use super::device::{Block, DEVICE_TYPE};
use crate::virtio::state::{DeviceState, RestoreError};

/// What a new disk must have in common with the saved one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// The disk's size in bytes.
    pub len_bytes: u64,
    /// Whether nothing is ever written.
    pub read_only: bool,
}

impl Block {
    pub(super) fn own_state(&self) -> BlockState {
        BlockState {
            len_bytes: self.len_bytes(),
            read_only: self.is_read_only(),
        }
    }

    pub(super) fn check_state(&self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Block(saved) = state else {
            return Err(RestoreError::OwnKind {
                device_type: DEVICE_TYPE,
            });
        };
        let now = self.own_state();
        let changed = |what, saved: String, offered: String| {
            Err(RestoreError::Changed {
                what,
                saved,
                offered,
            })
        };
        if saved.len_bytes != now.len_bytes {
            let what = "the disk's size in bytes";
            return changed(what, saved.len_bytes.to_string(), now.len_bytes.to_string());
        }
        if saved.read_only != now.read_only {
            let what = "whether the disk is read-only";
            return changed(what, saved.read_only.to_string(), now.read_only.to_string());
        }
        Ok(())
    }
}
