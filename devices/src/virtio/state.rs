//! What of a virtio device is saved at a freeze, and why a restore is refused.
//!
//! ```text
//!  MmioTransport::save ----> TransportState: registers, interrupt, failure
//!    `- Device::save ------>   Saved: rings (where each queue goes on), DeviceState (its own part)
//!
//!  MmioTransport::restore: checks against the new device --> Device::activate (queues that go on)
//!                          --> Device::restore (its own part) --> every queue is kicked once
//! ```
//!
//! A state is plain data and hostile: nothing in it is believed. What contradicts itself or the new
//! device is a [`RestoreError`]; what only the guest's rings can show (a position that no driver
//! can have reached) makes the device need a reset at its first look, as it would for a driver.
//!
//! How a state may change: unknown members are ignored; a member added later gets a serde default
//! with the meaning "as before there was one"; none is ever removed or given another meaning. So an
//! older state loads in a newer Ratoon. Lists are bounded while they are read.
//!
//! Every queue's addresses and size are in the transport's registers, and event-idx is one of the
//! driver's features: a ring's own part is its two positions, and nothing is said twice.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserializer, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueT};

use super::DeviceError;
use crate::balloon::BalloonState;
use crate::block::BlockState;
use crate::net::NetState;
use crate::rng::RngState;
use crate::vsock::VsockState;

/// The most queues that a saved device has.
const QUEUES_MAX: usize = 64;
/// The longest text of a failure that is saved, in bytes.
pub(super) const FAILURE_LEN_MAX: usize = 1024;

/// A transport and its device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// The device type's number (virtio 1.2, section 5).
    pub device_type: u32,
    /// The STATUS register.
    pub status: u32,
    /// Whether the queues were the device's, and nothing had gone wrong.
    pub active: bool,
    /// Why DEVICE_NEEDS_RESET is set, cause after cause.
    pub failure: Option<String>,
    /// The DEVICE_FEATURES_SEL register.
    pub device_features_select: u32,
    /// The DRIVER_FEATURES_SEL register.
    pub driver_features_select: u32,
    /// What the driver wrote to DRIVER_FEATURES.
    pub driver_features: u64,
    /// The QUEUE_SEL register.
    pub queue_select: u32,
    /// What the driver wrote about each queue.
    #[serde(deserialize_with = "bounded::<_, _, QUEUES_MAX>")]
    pub queues: Vec<QueueRegistersState>,
    /// Kicks that came before activation, one entry a queue.
    #[serde(deserialize_with = "bounded::<_, _, QUEUES_MAX>")]
    pub early_kicks: Vec<bool>,
    /// The INTERRUPT_STATUS register.
    pub interrupt_status: u32,
    /// The CONFIG_GENERATION register.
    pub config_generation: u32,
    /// Where each queue goes on; none when not active.
    #[serde(deserialize_with = "bounded::<_, _, QUEUES_MAX>")]
    pub rings: Vec<RingState>,
    /// The device's own part.
    pub device: DeviceState,
}

/// One queue's registers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueRegistersState {
    /// The largest size that the device offered.
    pub max_size: u16,
    /// QUEUE_NUM.
    pub size: u32,
    /// QUEUE_READY.
    pub ready: bool,
    /// Guest address of the descriptor table.
    pub descriptors: u64,
    /// Guest address of the available ring.
    pub driver_area: u64,
    /// Guest address of the used ring.
    pub device_area: u64,
}

/// How far a device has come in one queue. All chains before that are used: a device that holds
/// some gives them back first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingState {
    /// Position in the available ring of the chain to be taken next, modulo 2^16.
    pub next_avail: u16,
    /// Position in the used ring of the next entry, modulo 2^16.
    pub next_used: u16,
}

impl RingState {
    /// Where `queue` goes on.
    pub fn of(queue: &Queue) -> Self {
        Self {
            next_avail: queue.next_avail(),
            next_used: queue.next_used(),
        }
    }

    /// Where `queue` goes on when the last `held` chains that were taken from it are taken again.
    pub fn before(queue: &Queue, held: usize) -> Self {
        Self {
            // A device holds at most a queue's size of chains.
            next_avail: queue.next_avail().wrapping_sub(held as u16),
            next_used: queue.next_used(),
        }
    }
}

/// What [`super::Device::save`] gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Saved {
    /// Where each queue goes on; none when the device is not active.
    pub rings: Vec<RingState>,
    /// The rest.
    pub own: DeviceState,
}

/// A device's own part, one kind a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceState {
    /// A balloon.
    Balloon(BalloonState),
    /// A disk.
    Block(BlockState),
    /// A network device.
    Net(NetState),
    /// An entropy device.
    Rng(RngState),
    /// A socket device.
    Vsock(VsockState),
    /// The test device's configuration space.
    #[cfg(any(test, feature = "testing"))]
    Echo([u8; 8]),
}

/// Why a saved device cannot go on in the one that is given. The device that was given is lost.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Another kind of device.
    #[error("the state is of virtio device type {saved}, the new device is of type {offered}")]
    Kind {
        /// The saved type's number.
        saved: u32,
        /// The new device's.
        offered: u32,
    },
    /// The device's own part is another kind's.
    #[error("the state of a device of type {device_type} holds another kind's own part")]
    OwnKind {
        /// The device type's number.
        device_type: u32,
    },
    /// Another number of queues.
    #[error("{saved} {what} were saved, the device needs {offered}")]
    QueueCount {
        /// Of what.
        what: &'static str,
        /// How many were saved.
        saved: usize,
        /// How many there must be.
        offered: usize,
    },
    /// A queue of another largest size.
    #[error("queue {index} could have {saved} chains, in the new device {offered}")]
    QueueSize {
        /// Which queue.
        index: usize,
        /// The saved device's largest size.
        saved: u16,
        /// The new one's.
        offered: u16,
    },
    /// Features that the new device has not.
    #[error("the driver uses features {missing:#x}, which the new device does not offer")]
    Features {
        /// Those bits.
        missing: u64,
    },
    /// The state contradicts itself.
    #[error("the state contradicts itself: {what} ({value:#x})")]
    Inconsistent {
        /// What is wrong.
        what: &'static str,
        /// With which value.
        value: u64,
    },
    /// Something that the driver has read of the device is not the same in the new one.
    #[error("{what} was {saved}, in the new device it is {offered}")]
    Changed {
        /// What.
        what: &'static str,
        /// As it was.
        saved: String,
        /// As it is now.
        offered: String,
    },
    /// The device cannot start with the saved queues.
    #[error("the device does not start where it was")]
    Activation(#[source] DeviceError),
    /// The kernel.
    #[error("an event descriptor; is the limit of open files reached?")]
    Eventfd(#[source] std::io::Error),
}

impl RestoreError {
    pub(crate) fn inconsistent(what: &'static str, value: impl Into<u64>) -> Self {
        let value = value.into();
        Self::Inconsistent { what, value }
    }
}

/// Reads a list of at most `MAX` entries; more are an error before they are read.
pub(crate) fn bounded<'de, D, T, const MAX: usize>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    struct Bounded<T, const MAX: usize>(PhantomData<T>);

    impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for Bounded<T, MAX> {
        type Value = Vec<T>;

        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(formatter, "a list of at most {MAX} entries")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut entries: A) -> Result<Vec<T>, A::Error> {
            let mut list = Vec::new();
            while let Some(entry) = entries.next_element()? {
                if list.len() == MAX {
                    return Err(serde::de::Error::invalid_length(MAX + 1, &self));
                }
                list.push(entry);
            }
            Ok(list)
        }
    }

    deserializer.deserialize_seq(Bounded::<T, MAX>(PhantomData))
}

/// What a newer process reads of what an older one wrote.
#[cfg(test)]
pub(crate) fn through_json(state: &TransportState) -> TransportState {
    let json = serde_json::to_string(state).expect("a state is plain data");
    let read = serde_json::from_str(&json).expect("what was written can be read");
    assert_eq!(*state, read);
    read
}

#[cfg(test)]
mod tests;
