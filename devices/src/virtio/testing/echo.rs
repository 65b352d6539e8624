//! The simplest device there is.

use std::sync::{Arc, Mutex};

use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;

use crate::virtio::chain::Chain;
use crate::virtio::state::{DeviceState, RestoreError, RingState, Saved};
use crate::virtio::{Activation, Device, DeviceError, Interrupt};

/// What a transport asked of an [`Echo`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// `activate` with these features.
    Activate(u64),
    /// `reset`.
    Reset,
    /// `process_queue` of this queue.
    Queue(usize),
    /// `process_host`.
    Host,
}

/// The simplest device: two queues; each chain's readable bytes are copied to its writable ones.
/// Its configuration space is eight bytes that can be written.
#[derive(Default)]
pub struct Echo {
    calls: Arc<Mutex<Vec<Call>>>,
    config: [u8; 8],
    active: Option<(GuestMemoryMmap, Vec<Queue>, Interrupt)>,
}

impl Echo {
    /// The device type's number, of no real device.
    pub const DEVICE_TYPE: u32 = 0x7fff;

    /// The calls so far and to come, for a test to keep when the transport owns the device.
    pub fn calls(&self) -> Arc<Mutex<Vec<Call>>> {
        Arc::clone(&self.calls)
    }

    fn record(&self, call: Call) {
        if let Ok(mut calls) = self.calls.lock() {
            calls.push(call);
        }
    }
}

impl Device for Echo {
    fn device_type(&self) -> u32 {
        Self::DEVICE_TYPE
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[64, 64]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            let at = offset as usize + index;
            *byte = self.config.get(at).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        for (index, byte) in data.iter().enumerate() {
            if let Some(place) = self.config.get_mut(offset as usize + index) {
                *place = *byte;
            }
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.record(Call::Activate(activation.features));
        let Activation {
            memory,
            queues,
            interrupt,
            ..
        } = activation;
        self.active = Some((memory, queues, interrupt));
        Ok(())
    }

    fn reset(&mut self) {
        self.record(Call::Reset);
        self.active = None;
    }

    fn process_queue(&mut self, index: usize) -> Result<(), DeviceError> {
        self.record(Call::Queue(index));
        let Some((memory, queues, interrupt)) = &mut self.active else {
            return Err(DeviceError::Driver("kick before activation"));
        };
        let queue = &mut queues[index];
        let at = |source| DeviceError::Queue { index, source };
        let mut chain = Chain::default();
        while chain.pop(queue, memory, index)? {
            let mut bytes = vec![0; chain.readable_len_bytes().min(4096) as usize];
            let read = chain.read(memory, 0, &mut bytes)?;
            let written = chain.write(memory, 0, &bytes[..read])?;
            queue
                .add_used(memory, chain.head(), written as u32)
                .map_err(at)?;
        }
        if queue.needs_notification(memory).map_err(at)? {
            interrupt.used_buffer();
        }
        Ok(())
    }

    fn process_host(&mut self) -> Result<(), DeviceError> {
        self.record(Call::Host);
        Ok(())
    }

    fn save(&self) -> Saved {
        let queues = self.active.iter().flat_map(|(_, queues, _)| queues);
        Saved {
            rings: queues.map(RingState::of).collect(),
            own: DeviceState::Echo(self.config),
        }
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Echo(config) = state else {
            return Err(RestoreError::OwnKind {
                device_type: Self::DEVICE_TYPE,
            });
        };
        self.config = *config;
        Ok(())
    }
}
