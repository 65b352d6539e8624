//! Where a guest's port and memory-mapped accesses go. Nothing a guest writes here panics or blocks
//! for long; what no device answers reads as all ones and swallows writes, as on a real bus.
//!
//! ```text
//!  ports    0x3f8-0x3ff serial (IRQ 4)    0x60, 0x64 i8042 (reset)    0x505 pvpanic
//!  memory   0xd000_0000 + n * 4 KiB: virtio-mmio device n (IRQ 5 + n)
//! ```

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ratoon_devices::legacy::{I8042, Pvpanic, PvpanicEvent, Serial};
use ratoon_devices::virtio::mmio::MmioTransport;
use ratoon_vmm_api::Outcome;

/// The first virtio-mmio device's address.
pub const MMIO_BASE: u64 = 0xd000_0000;
/// The address space of one device, in bytes.
pub const MMIO_SIZE: u64 = 0x1000;
/// The first virtio-mmio device's interrupt line.
pub const MMIO_IRQ: u32 = 5;
/// The serial port's interrupt line.
pub const SERIAL_IRQ: u32 = 4;
/// How many virtio devices have an interrupt line.
pub const MMIO_DEVICES: usize = (crate::boot::IRQ_LINES - MMIO_IRQ) as usize;

const SERIAL_PORT: u16 = 0x3f8;
const SERIAL_LAST: u16 = SERIAL_PORT + 7;
const I8042_DATA: u16 = 0x60;
const I8042_COMMAND: u16 = 0x64;
/// QEMU, docs/specs/pvpanic: the interface by which a guest tells of its panic or its power-off.
pub const PVPANIC_PORT: u16 = 0x505;
/// The CMOS clock's index and data: read as zero, so that nobody waits for its update flag.
const CMOS_DATA: u16 = 0x71;

/// A virtio device and its transport, shared by vCPU threads and the event loop.
pub type SharedTransport = Arc<Mutex<MmioTransport>>;

/// Takes a lock that a panicking thread may have left: devices check all they read anyway.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All devices of a VM, by address.
pub struct Bus {
    serial: Mutex<Serial>,
    i8042: Mutex<I8042>,
    pvpanic: Pvpanic,
    virtio: Vec<VirtioSlot>,
}

/// One virtio device on the bus.
pub struct VirtioSlot {
    /// Its name in metrics, e.g. `block.root`.
    pub name: String,
    /// The device.
    pub transport: SharedTransport,
}

impl Bus {
    /// The disk of this id.
    pub fn disk(&self, id: &str) -> Option<&VirtioSlot> {
        let name = format!("block.{id}");
        self.virtio.iter().find(|slot| slot.name == name)
    }

    /// A bus with `virtio` devices in the order of their addresses.
    pub fn new(serial: Serial, virtio: Vec<VirtioSlot>) -> Self {
        Self {
            serial: Mutex::new(serial),
            i8042: Mutex::new(I8042::new()),
            pvpanic: Pvpanic,
            virtio,
        }
    }

    /// The virtio devices.
    pub fn virtio(&self) -> &[VirtioSlot] {
        &self.virtio
    }

    /// The serial port.
    pub fn serial(&self) -> &Mutex<Serial> {
        &self.serial
    }

    /// The guest writes `data` to ports from `port` on. An outcome when that ends the VM.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Option<Outcome> {
        match port {
            SERIAL_PORT..=SERIAL_LAST => {
                let mut serial = lock(&self.serial);
                for byte in data {
                    serial.write((port - SERIAL_PORT) as u8, *byte);
                }
                None
            }
            I8042_DATA | I8042_COMMAND => {
                let reset = data
                    .iter()
                    .any(|byte| lock(&self.i8042).write((port - I8042_DATA) as u8, *byte));
                reset.then_some(Outcome::Reset)
            }
            PVPANIC_PORT => match self.pvpanic.write(*data.first()?)? {
                PvpanicEvent::Panicked => Some(Outcome::Panicked),
                PvpanicEvent::Shutdown => Some(Outcome::PoweredOff),
            },
            _ => None,
        }
    }

    /// The guest reads ports from `port` on.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        let value = match port {
            SERIAL_PORT..=SERIAL_LAST => {
                let mut serial = lock(&self.serial);
                data.fill_with(|| serial.read((port - SERIAL_PORT) as u8));
                return;
            }
            I8042_DATA | I8042_COMMAND => lock(&self.i8042).read((port - I8042_DATA) as u8),
            PVPANIC_PORT => self.pvpanic.read(),
            CMOS_DATA => 0,
            _ => 0xff,
        };
        data.fill(value);
    }

    /// The guest writes to device memory.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address) {
            lock(device).write(offset, data);
        }
    }

    /// The guest reads device memory.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((device, offset)) => lock(device).read(offset, data),
            None => data.fill(0xff),
        }
    }

    fn find(&self, address: u64) -> Option<(&SharedTransport, u64)> {
        let offset = address.checked_sub(MMIO_BASE)?;
        let slot = self.virtio.get(usize::try_from(offset / MMIO_SIZE).ok()?)?;
        Some((&slot.transport, offset % MMIO_SIZE))
    }
}
