//! Device models of a Ratoon VM and their backends. Knows nothing of KVM.
//!
//! [`virtio`] holds what all virtio devices share; each device is a folder with the same file
//! names. Every byte that a device reads from the guest is hostile: a device answers with a
//! [`virtio::DeviceError`], its transport then sets DEVICE_NEEDS_RESET, and the VMM lives on.

pub mod balloon;
pub mod block;
pub mod legacy;
pub mod net;
pub mod rng;
pub mod virtio;
pub mod vsock;
