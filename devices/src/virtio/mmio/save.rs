//! Saving a transport with its device, and continuing it with a new one.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;

use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;

use super::{MmioTransport, QueueRegisters, RUNNING, TRANSITIONS, status};
use crate::virtio::state::{
    FAILURE_LEN_MAX, QueueRegistersState, RestoreError, RingState, TransportState,
};
use crate::virtio::{Activation, Device, DeviceError, Interrupt};

impl MmioTransport {
    /// See [`Device::prepare_layer`].
    ///
    /// # Errors
    /// The host's, by name. The device goes on.
    pub fn prepare_layer(&mut self, path: &Path) -> Result<(), DeviceError> {
        self.device.prepare_layer(path)
    }

    /// See [`Device::push_layer`].
    ///
    /// # Errors
    /// The host's, by name. The device goes on as it was.
    pub fn push_layer(&mut self) -> Result<bool, DeviceError> {
        self.device.push_layer()
    }

    /// See [`Device::replace_layers`].
    ///
    /// # Errors
    /// The host's, by name. The device goes on as it was.
    pub fn replace_layers(
        &mut self,
        replaced: std::ops::Range<usize>,
        path: &Path,
    ) -> Result<(), DeviceError> {
        self.device.replace_layers(replaced, path)
    }

    /// See [`Device::drop_prepared`].
    pub fn drop_prepared(&mut self) {
        self.device.drop_prepared();
    }

    /// All that a new device needs to go on exactly where this one is. It goes on undisturbed; call
    /// it with the vCPUs stopped, and after [`Self::write_back`], or guest memory and disk are not
    /// those of the same moment.
    ///
    /// Devices work within the transport's lock and do not let a request wait for the host beyond
    /// it: whoever holds the lock sees no I/O in flight. Kicks that wait in their eventfds need not
    /// be saved, since [`Self::restore`] kicks every queue.
    pub fn save(&self) -> TransportState {
        let saved = self.device.save();
        let sizes = self.device.queue_max_sizes();
        let registers = self.queues.iter().zip(sizes);
        TransportState {
            device_type: self.device.device_type(),
            status: self.status,
            active: self.active,
            failure: self.failure.as_ref().map(text),
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            driver_features: self.driver_features,
            queue_select: self.queue_select,
            queues: registers
                .map(|(registers, max_size)| QueueRegistersState {
                    max_size: *max_size,
                    size: registers.size,
                    ready: registers.ready,
                    descriptors: registers.descriptors,
                    driver_area: registers.driver_area,
                    device_area: registers.device_area,
                })
                .collect(),
            early_kicks: self.early_kicks.clone(),
            interrupt_status: self.interrupt.status(),
            config_generation: self.interrupt.config_generation(),
            // The queues of a device that waits for a reset go on nowhere.
            rings: if self.active { saved.rings } else { Vec::new() },
            device: saved.own,
        }
    }

    /// A transport for `device`, which is in reset, that goes on where the saved one was, with
    /// eventfds of its own and counters from zero.
    ///
    /// Every queue of an active device is kicked, by its eventfd: the event loop looks at it when it
    /// starts, and what the guest or the old process left there is found. The interrupt's line is
    /// raised if a cause was not acknowledged.
    ///
    /// # Errors
    /// [`RestoreError`]; the device is dropped.
    pub fn restore(
        memory: GuestMemoryMmap,
        device: Box<dyn Device>,
        state: &TransportState,
    ) -> Result<Self, RestoreError> {
        check(&*device, state)?;
        let mut transport = Self::new(memory, device).map_err(RestoreError::Eventfd)?;
        transport.status = state.status;
        transport.failure = state.failure.clone().map(DeviceError::Saved);
        transport.device_features_select = state.device_features_select;
        transport.driver_features_select = state.driver_features_select;
        transport.driver_features = state.driver_features;
        transport.queue_select = state.queue_select;
        transport.early_kicks.clone_from(&state.early_kicks);
        for (registers, saved) in transport.queues.iter_mut().zip(&state.queues) {
            *registers = QueueRegisters {
                size: saved.size,
                ready: saved.ready,
                descriptors: saved.descriptors,
                driver_area: saved.driver_area,
                device_area: saved.device_area,
            };
        }
        if state.active {
            transport
                .reactivate(&state.rings)
                .map_err(RestoreError::Activation)?;
        }
        transport.device.restore(&state.device)?;
        transport
            .interrupt
            .resume(state.interrupt_status, state.config_generation);
        if state.active {
            for kick in &*transport.kicks {
                kick.write(1).map_err(RestoreError::Eventfd)?;
            }
        }
        Ok(transport)
    }

    /// Gives the device its queues as `activate` does, each at its saved position. `rings` is one a
    /// queue.
    fn reactivate(&mut self, rings: &[RingState]) -> Result<(), DeviceError> {
        let mut queues = Vec::with_capacity(rings.len());
        for (index, (registers, ring)) in self.queues.iter().zip(rings).enumerate() {
            let mut queue = self.build_queue(index, registers)?;
            queue.set_next_avail(ring.next_avail);
            queue.set_next_used(ring.next_used);
            queues.push(queue);
        }
        self.touched = true;
        self.device.activate(Activation {
            memory: self.memory.clone(),
            queues,
            features: self.driver_features,
            interrupt: self.interrupt.clone(),
            kicks: Arc::clone(&self.kicks),
        })?;
        self.active = true;
        Ok(())
    }
}

/// What must hold before anything of `state` is used.
fn check(device: &dyn Device, state: &TransportState) -> Result<(), RestoreError> {
    if state.device_type != device.device_type() {
        return Err(RestoreError::Kind {
            saved: state.device_type,
            offered: device.device_type(),
        });
    }
    let sizes = device.queue_max_sizes();
    let ring_count = if state.active { sizes.len() } else { 0 };
    for (what, saved, offered) in [
        ("queues", state.queues.len(), sizes.len()),
        ("early kicks", state.early_kicks.len(), sizes.len()),
        ("rings", state.rings.len(), ring_count),
    ] {
        if saved != offered {
            return Err(RestoreError::QueueCount {
                what,
                saved,
                offered,
            });
        }
    }
    for (index, (queue, offered)) in state.queues.iter().zip(sizes).enumerate() {
        if queue.max_size != *offered {
            return Err(RestoreError::QueueSize {
                index,
                saved: queue.max_size,
                offered: *offered,
            });
        }
    }
    check_status(state)?;
    if state.status & status::FEATURES_OK != 0 {
        let missing = state.driver_features & !device.features();
        if missing != 0 {
            return Err(RestoreError::Features { missing });
        }
        if state.driver_features & 1 << VIRTIO_F_VERSION_1 == 0 {
            let what = "features without VERSION_1";
            return Err(RestoreError::inconsistent(what, state.driver_features));
        }
    }
    let causes = Interrupt::USED_BUFFER | Interrupt::CONFIG_CHANGE;
    if state.interrupt_status & !causes != 0 {
        let what = "unknown causes of an interrupt";
        return Err(RestoreError::inconsistent(what, state.interrupt_status));
    }
    Ok(())
}

/// The status is one that the transport can be in, and what goes with it agrees.
fn check_status(state: &TransportState) -> Result<(), RestoreError> {
    let wrong = |what| Err(RestoreError::inconsistent(what, state.status));
    let needs_reset = state.status & status::DEVICE_NEEDS_RESET != 0;
    let phase = state.status & !(status::DEVICE_NEEDS_RESET | status::FAILED);
    if phase != 0 && !TRANSITIONS.iter().any(|(_, to)| *to == phase) {
        return wrong("a status that no driver reaches");
    }
    if needs_reset && phase != RUNNING {
        return wrong("a device that needs a reset before DRIVER_OK");
    }
    if state.active != (state.status == RUNNING) {
        return wrong("whether the device is active is not what the status says");
    }
    if needs_reset != state.failure.is_some() {
        return wrong("DEVICE_NEEDS_RESET and a reason for it go together");
    }
    if let Some(failure) = &state.failure
        && failure.len() > FAILURE_LEN_MAX
    {
        let what = "the reason of a failure is too long";
        return Err(RestoreError::inconsistent(what, failure.len() as u64));
    }
    Ok(())
}

/// The error and its causes, cut to what may be saved.
fn text(error: &DeviceError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text.truncate(text.floor_char_boundary(FAILURE_LEN_MAX));
    text
}

#[cfg(test)]
mod tests;
