//! The virtio-mmio transport, version 2 (virtio 1.2, section 4.2): one device's register page.
//!
//! It owns the device, its status, the queues' addresses until they go to the device, the
//! interrupt and one eventfd a queue. It lives behind one lock, taken by vCPU threads for registers
//! and by the event loop for kicks and host events.
//!
//! ```text
//!            ACKNOWLEDGE     DRIVER      FEATURES_OK         DRIVER_OK
//!  reset (0) ----------> 1 ---------> 3 ------------> 11 -------------> 15, active
//!      ^                                 (features              |
//!      |                                  accepted)             | DeviceError, here or later
//!      +--- write 0, from every state ---- NEEDS_RESET (|64) <--+
//! ```
//!
//! How it fails: never by a panic. What the driver may not write is refused, counted and logged
//! ever more rarely. What leaves the device in doubt (a [`DeviceError`], or queues and features
//! rewritten after DRIVER_OK) sets DEVICE_NEEDS_RESET and raises a configuration change; from then
//! on nothing but a reset reaches the device.
//!
//! All queues of a device must be ready at DRIVER_OK. Writes to the configuration space, allowed
//! from DRIVER on, go to the device, which ignores what is not writable.

use std::error::Error;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Activation, Device, DeviceError, Interrupt};

mod registers;
mod save;

pub use registers::{register, status};

/// The register page's length in bytes; configuration space is its upper part.
pub const REGION_LEN: u64 = 0x1000;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION_MODERN: u32 = 2;
/// "RATN", little-endian, as QEMU and others put a name there.
const VENDOR: u32 = u32::from_le_bytes(*b"RATN");

const ACKNOWLEDGED: u32 = status::ACKNOWLEDGE;
const DRIVER: u32 = ACKNOWLEDGED | status::DRIVER;
const NEGOTIATED: u32 = DRIVER | status::FEATURES_OK;
const RUNNING: u32 = NEGOTIATED | status::DRIVER_OK;

/// Every legal step forward (virtio 1.2, 3.1.1). Reset and FAILED are handled apart; whatever is
/// not here is refused.
const TRANSITIONS: [(u32, u32); 4] = [
    (0, ACKNOWLEDGED),
    (ACKNOWLEDGED, DRIVER),
    (DRIVER, NEGOTIATED),
    (NEGOTIATED, RUNNING),
];

/// What the driver wrote about one queue. Nothing here is believed before DRIVER_OK.
#[derive(Debug, Clone, Default)]
struct QueueRegisters {
    size: u32,
    ready: bool,
    descriptors: u64,
    driver_area: u64,
    device_area: u64,
}

#[derive(Debug, Default)]
struct Counters {
    notifications: u64,
    resets: u64,
    needs_resets: u64,
    refused_writes: u64,
}

/// One virtio device behind its register page.
pub struct MmioTransport {
    memory: GuestMemoryMmap,
    device: Box<dyn Device>,
    interrupt: Interrupt,
    kicks: Arc<[EventFd]>,

    status: u32,
    /// Queues are the device's and nothing has gone wrong.
    active: bool,
    /// The device saw `activate` since its last reset, whether that succeeded or not.
    touched: bool,
    failure: Option<DeviceError>,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<QueueRegisters>,
    /// Kicks that came before activation, one entry a queue.
    early_kicks: Vec<bool>,
    counters: Counters,
}

impl MmioTransport {
    /// A transport for `device` in reset, with eventfds of its own.
    ///
    /// # Errors
    /// When the kernel gives no eventfd: the file descriptor limit.
    pub fn new(memory: GuestMemoryMmap, device: Box<dyn Device>) -> io::Result<Self> {
        let eventfd = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let count = device.queue_max_sizes().len();
        Ok(Self {
            memory,
            interrupt: Interrupt::new(eventfd()?),
            kicks: (0..count).map(|_| eventfd()).collect::<io::Result<_>>()?,
            queues: Self::fresh_queues(&*device),
            early_kicks: vec![false; count],
            device,
            status: 0,
            active: false,
            touched: false,
            failure: None,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            counters: Counters::default(),
        })
    }

    /// The interrupt, whose line the VMM binds to an IRQ.
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// One eventfd a queue, to be written by the kernel when the guest writes the queue's index to
    /// [`register::QUEUE_NOTIFY`]. The event loop drains it, then calls [`Self::kick`].
    pub fn queue_eventfds(&self) -> &[EventFd] {
        &self.kicks
    }

    /// Whether DEVICE_NEEDS_RESET is set.
    pub fn needs_reset(&self) -> bool {
        self.status & status::DEVICE_NEEDS_RESET != 0
    }

    /// Why DEVICE_NEEDS_RESET is set; `None` when it is not.
    pub fn failure(&self) -> Option<&DeviceError> {
        self.failure.as_ref()
    }

    /// See [`Device::write_back`].
    ///
    /// # Errors
    /// The host's, by name. The device goes on.
    pub fn write_back(&mut self) -> Result<(), DeviceError> {
        self.device.write_back()
    }

    /// See [`Device::keep_connection`].
    pub fn keep_connection(&mut self, host_port: u32) {
        self.device.keep_connection(host_port);
    }

    /// The device's host descriptor; see [`Device::host_fd`].
    pub fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        self.device.host_fd()
    }

    /// The counters of transport and device, name and value since creation.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut all = vec![
            ("notifications", self.counters.notifications),
            ("resets", self.counters.resets),
            ("needs_resets", self.counters.needs_resets),
            ("refused_writes", self.counters.refused_writes),
        ];
        all.extend(self.device.counters());
        all
    }

    /// The driver put buffers into queue `index`. Kicks before DRIVER_OK are kept for it; kicks of
    /// a device that needs reset, or of a queue that is not there, are dropped.
    pub fn kick(&mut self, index: usize) {
        if index >= self.queues.len() {
            self.refuse(
                "notification of a queue that the device has not",
                index as u64,
            );
            return;
        }
        self.counters.notifications += 1;
        if self.active {
            let outcome = self.device.process_queue(index);
            self.settle(outcome);
        } else if self.status & !NEGOTIATED == 0 {
            self.early_kicks[index] = true;
        }
    }

    /// The device's host descriptor is ready.
    pub fn host_event(&mut self) {
        if self.active {
            let outcome = self.device.process_host();
            self.settle(outcome);
        }
    }

    /// The guest reads `data.len()` bytes at `offset` of the page. What cannot be read is zero.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= register::CONFIG {
            let offset = offset - register::CONFIG;
            if Self::in_config(offset, data.len()) {
                self.device.read_config(offset, data);
            }
        } else if let Ok(word) = <&mut [u8; 4]>::try_from(data) {
            *word = self.read_register(offset).to_le_bytes();
        }
    }

    /// The guest writes `data` at `offset` of the page.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if offset >= register::CONFIG {
            let offset = offset - register::CONFIG;
            if !Self::in_config(offset, data.len()) || self.status & status::DRIVER == 0 {
                self.refuse("write to the configuration space", offset);
            } else if !self.needs_reset() {
                self.device.write_config(offset, data);
            }
        } else if let Ok(word) = <[u8; 4]>::try_from(data) {
            self.write_register(offset, u32::from_le_bytes(word));
        } else {
            self.refuse("register write that is not of 4 bytes", offset);
        }
    }

    fn in_config(offset: u64, len: usize) -> bool {
        matches!(len, 1 | 2 | 4 | 8)
            && offset
                .checked_add(len as u64)
                .is_some_and(|end| end <= REGION_LEN - register::CONFIG)
    }

    fn read_register(&self, offset: u64) -> u32 {
        let queue = self.queues.get(self.queue_select as usize);
        match offset {
            register::MAGIC_VALUE => MAGIC,
            register::VERSION => VERSION_MODERN,
            register::DEVICE_ID => self.device.device_type(),
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => match self.device_features_select {
                0 => self.device.features() as u32,
                1 => (self.device.features() >> 32) as u32,
                _ => 0,
            },
            register::QUEUE_NUM_MAX => self
                .device
                .queue_max_sizes()
                .get(self.queue_select as usize)
                .map_or(0, |size| u32::from(*size)),
            register::QUEUE_READY => queue.map_or(0, |queue| u32::from(queue.ready)),
            register::INTERRUPT_STATUS => self.interrupt.status(),
            register::STATUS => self.status,
            // No shared memory regions: a length of -1 says so (4.2.2.1).
            register::SHM_LEN_LOW..=register::SHM_BASE_HIGH => u32::MAX,
            register::CONFIG_GENERATION => self.interrupt.config_generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            register::DEVICE_FEATURES_SEL => self.device_features_select = value,
            register::DRIVER_FEATURES_SEL => self.driver_features_select = value,
            register::DRIVER_FEATURES => self.write_features(value),
            register::QUEUE_SEL => self.queue_select = value,
            register::QUEUE_NUM
            | register::QUEUE_READY
            | register::QUEUE_DESC_LOW..=register::QUEUE_DEVICE_HIGH => {
                self.write_queue(offset, value);
            }
            register::QUEUE_NOTIFY => self.kick(value as usize),
            register::INTERRUPT_ACK => self.interrupt.acknowledge(value),
            register::STATUS => self.write_status(value),
            register::SHM_SEL => {}
            _ => self.refuse("write to a register that is not writable", offset),
        }
    }

    fn write_features(&mut self, value: u32) {
        if !self.may_configure(DRIVER) {
            return;
        }
        let value = u64::from(value);
        match self.driver_features_select {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
            // Linux writes the words it knows; the others are all zero.
            select if value != 0 => self.refuse("feature word out of range", select.into()),
            _ => {}
        }
    }

    fn write_queue(&mut self, offset: u64, value: u32) {
        let index = self.queue_select as usize;
        let Some(ready) = self.queues.get(index).map(|queue| queue.ready) else {
            return self.refuse("set-up of a queue that the device has not", index as u64);
        };
        // Linux clears QUEUE_READY of queues that a reset has just cleared.
        if offset == register::QUEUE_READY && value == 0 && !ready
            || !self.may_configure(NEGOTIATED)
        {
            return;
        }
        if ready && offset != register::QUEUE_READY {
            return self.refuse("set-up of a queue that is ready", index as u64);
        }
        let low = |address: &mut u64| *address = *address & !0xffff_ffff | u64::from(value);
        let high = |address: &mut u64| *address = *address & 0xffff_ffff | u64::from(value) << 32;
        let queue = &mut self.queues[index];
        match offset {
            register::QUEUE_NUM => queue.size = value,
            register::QUEUE_READY => queue.ready = value == 1,
            register::QUEUE_DESC_LOW => low(&mut queue.descriptors),
            register::QUEUE_DESC_HIGH => high(&mut queue.descriptors),
            register::QUEUE_DRIVER_LOW => low(&mut queue.driver_area),
            register::QUEUE_DRIVER_HIGH => high(&mut queue.driver_area),
            register::QUEUE_DEVICE_LOW => low(&mut queue.device_area),
            register::QUEUE_DEVICE_HIGH => high(&mut queue.device_area),
            _ => self.refuse("write to a register that is not writable", offset),
        }
    }

    /// Whether the status is `phase`, the only one in which the register at hand is writable.
    fn may_configure(&mut self, phase: u32) -> bool {
        if self.active {
            self.settle(Err(DeviceError::Driver(
                "queues or features written after DRIVER_OK",
            )));
        } else if self.status != phase {
            self.refuse("set-up in the wrong state", self.status.into());
        }
        self.status == phase
    }

    /// The STATUS register (virtio 1.2, 2.1 and 3.1.1).
    fn write_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        if value == self.status {
            return;
        }
        if value & status::FAILED != 0 {
            self.status |= status::FAILED;
            self.active = false;
            tracing::warn!(device = self.device.device_type(), "the driver gave up");
            return;
        }
        if !TRANSITIONS.contains(&(self.status, value)) {
            return self.refuse("status out of order", value.into());
        }
        if value == NEGOTIATED && !self.features_acceptable() {
            // The driver reads the status back and finds FEATURES_OK missing.
            return self.refuse("features that the device cannot take", self.driver_features);
        }
        self.status = value;
        if value == RUNNING {
            let outcome = self.activate();
            self.settle(outcome);
        }
    }

    fn features_acceptable(&self) -> bool {
        self.driver_features & !self.device.features() == 0
            && self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    fn activate(&mut self) -> Result<(), DeviceError> {
        let queues = self
            .queues
            .iter()
            .enumerate()
            .map(|(index, registers)| self.build_queue(index, registers))
            .collect::<Result<_, _>>()?;
        self.touched = true;
        self.device.activate(Activation {
            memory: self.memory.clone(),
            queues,
            features: self.driver_features,
            interrupt: self.interrupt.clone(),
            kicks: Arc::clone(&self.kicks),
        })?;
        self.active = true;
        self.device.process_host()?;
        for index in 0..self.early_kicks.len() {
            if std::mem::take(&mut self.early_kicks[index]) {
                self.device.process_queue(index)?;
            }
        }
        Ok(())
    }

    fn build_queue(&self, index: usize, registers: &QueueRegisters) -> Result<Queue, DeviceError> {
        if !registers.ready {
            return Err(DeviceError::Driver("DRIVER_OK with a queue not ready"));
        }
        let build = || {
            let mut queue = Queue::new(self.device.queue_max_sizes()[index])?;
            let size = u16::try_from(registers.size);
            queue.try_set_size(size.map_err(|_| virtio_queue::Error::InvalidSize)?)?;
            queue.try_set_desc_table_address(GuestAddress(registers.descriptors))?;
            queue.try_set_avail_ring_address(GuestAddress(registers.driver_area))?;
            queue.try_set_used_ring_address(GuestAddress(registers.device_area))?;
            queue.set_event_idx(self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
            queue.set_ready(true);
            Ok(queue)
        };
        let queue = build().map_err(|source| DeviceError::Queue { index, source })?;
        if !queue.is_valid(&self.memory) {
            return Err(DeviceError::Driver("rings outside guest memory"));
        }
        Ok(queue)
    }

    fn reset(&mut self) {
        if self.touched {
            self.device.reset();
        }
        self.counters.resets += 1;
        self.status = 0;
        self.active = false;
        self.touched = false;
        self.failure = None;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        self.queues = Self::fresh_queues(&*self.device);
        self.early_kicks.fill(false);
        self.interrupt.acknowledge(u32::MAX);
    }

    fn fresh_queues(device: &dyn Device) -> Vec<QueueRegisters> {
        let sizes = device.queue_max_sizes().iter();
        sizes
            .map(|size| QueueRegisters {
                size: u32::from(*size),
                ..QueueRegisters::default()
            })
            .collect()
    }

    /// A device that failed needs a reset, and the driver is told.
    fn settle(&mut self, outcome: Result<(), DeviceError>) {
        let Err(error) = outcome else { return };
        self.active = false;
        self.status |= status::DEVICE_NEEDS_RESET;
        self.counters.needs_resets += 1;
        if self.counters.needs_resets.is_power_of_two() {
            tracing::warn!(
                device = self.device.device_type(),
                count = self.counters.needs_resets,
                error = &error as &dyn Error,
                "device needs reset"
            );
        }
        self.failure = Some(error);
        self.interrupt.config_change();
    }

    /// Counts what the driver may not do. A guest can do it for ever, so it is logged at powers of
    /// two only.
    fn refuse(&mut self, what: &'static str, value: u64) {
        self.counters.refused_writes += 1;
        if self.counters.refused_writes.is_power_of_two() {
            tracing::warn!(
                device = self.device.device_type(),
                count = self.counters.refused_writes,
                status = self.status,
                value,
                "refused: {what}"
            );
        }
    }
}

#[cfg(test)]
mod tests;
