//! What all virtio devices share: the trait between a device and its transport.
//!
//! ```text
//!  vCPU thread --MMIO--> MmioTransport --activate/reset/config--> dyn Device
//!  event loop  --eventfd (kick), host fd------^                         |
//!                                          Interrupt (irqfd) <---------+
//! ```
//!
//! [`mmio`] is the transport; [`chain`] and [`used`] are what devices take requests and publish
//! results with; [`state`] is what of them is saved; `testing` (feature `testing`) is a driver for
//! tests and fuzz targets.

pub mod chain;
pub mod mmio;
pub mod state;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod used;

use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use state::{DeviceState, RestoreError, Saved};
use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

/// What a transport hands to a device when the driver sets DRIVER_OK.
#[derive(Debug)]
pub struct Activation {
    /// Guest memory.
    pub memory: GuestMemoryMmap,
    /// One queue for each entry of [`Device::queue_max_sizes`]; each has been checked with
    /// `QueueT::is_valid`.
    pub queues: Vec<Queue>,
    /// The features that driver and device agreed on, VIRTIO_F_VERSION_1 among them.
    pub features: u64,
    /// How the device raises its interrupt.
    pub interrupt: Interrupt,
    /// One eventfd a queue. A device that has worked enough for one turn writes its queue's, and
    /// is called again after the others: else a driver that adds buffers without end holds the
    /// event loop.
    pub kicks: Arc<[EventFd]>,
}

/// A device's interrupt line (virtio 1.2, 4.2.2: InterruptStatus).
#[derive(Debug, Clone)]
pub struct Interrupt {
    status: Arc<AtomicU32>,
    config_generation: Arc<AtomicU32>,
    line: Arc<EventFd>,
}

impl Interrupt {
    /// InterruptStatus bit 0: the device used a buffer.
    pub const USED_BUFFER: u32 = 1;
    /// InterruptStatus bit 1: the configuration or the device status changed.
    pub const CONFIG_CHANGE: u32 = 2;

    /// An interrupt whose line is `line`, which KVM turns into the guest's IRQ.
    pub fn new(line: EventFd) -> Self {
        Self {
            status: Arc::new(AtomicU32::new(0)),
            config_generation: Arc::new(AtomicU32::new(0)),
            line: Arc::new(line),
        }
    }

    /// Tells the driver that buffers were used.
    pub fn used_buffer(&self) {
        self.raise(Self::USED_BUFFER);
    }

    /// Tells the driver that configuration or status changed.
    pub fn config_change(&self) {
        self.config_generation.fetch_add(1, Ordering::SeqCst);
        self.raise(Self::CONFIG_CHANGE);
    }

    /// The ConfigGeneration register: it differs after each [`Self::config_change`].
    pub fn config_generation(&self) -> u32 {
        self.config_generation.load(Ordering::SeqCst)
    }

    /// The InterruptStatus register.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// The driver wrote `bits` to InterruptACK.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// The eventfd to be bound to an IRQ.
    pub fn line(&self) -> &EventFd {
        &self.line
    }

    /// Continues one that was saved: a cause that the driver has not acknowledged is raised again.
    fn resume(&self, status: u32, config_generation: u32) {
        self.config_generation
            .store(config_generation, Ordering::SeqCst);
        if status != 0 {
            self.raise(status);
        }
    }

    fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::SeqCst);
        if let Err(error) = self.line.write(1) {
            // The counter is non-blocking and full only if KVM never took 2^64 - 2 of them.
            tracing::error!(%error, "interrupt line");
        }
    }
}

/// Why a device cannot go on until the driver resets it.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver broke the virtio rules.
    #[error("the driver broke the virtio rules: {0}")]
    Driver(&'static str),
    /// A queue's rings cannot be used.
    #[error("queue {index}")]
    Queue {
        /// Which queue.
        index: usize,
        /// What virtio-queue says.
        #[source]
        source: virtio_queue::Error,
    },
    /// Guest memory cannot be reached where the driver said.
    #[error("guest memory")]
    Memory(#[source] vm_memory::GuestMemoryError),
    /// The host's side of the device failed.
    #[error("{what}")]
    Host {
        /// What was tried, on what.
        what: String,
        /// The operating system's word.
        #[source]
        source: std::io::Error,
    },
    /// It could not go on before it was saved; this is what it said.
    #[error("{0}")]
    Saved(String),
}

/// A virtio device behind a transport. All methods are called with the transport's lock held: on a
/// vCPU thread for registers and activation, on the event loop for queues and host events.
///
/// A [`DeviceError`] from any of them makes the transport set DEVICE_NEEDS_RESET and raise a
/// configuration change; no method but [`Device::reset`] is called from then on.
pub trait Device: Send {
    /// The device type's number (virtio 1.2, section 5).
    fn device_type(&self) -> u32;

    /// The largest size of each queue, a power of two up to 32768.
    fn queue_max_sizes(&self) -> &[u16];

    /// Offered feature bits, VIRTIO_F_VERSION_1 and VIRTIO_RING_F_EVENT_IDX where supported.
    fn features(&self) -> u64;

    /// Reads the device's configuration space. Bytes beyond its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the device's configuration space. The default ignores it: most devices have no
    /// writable field.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// The driver is ready.
    ///
    /// # Errors
    /// When the device cannot start so.
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError>;

    /// Back to the state before activation: queues and interrupt dropped, host connections closed.
    fn reset(&mut self);

    /// The driver has put buffers into queue `index`. Only called while active, and `index` is
    /// within the queues.
    ///
    /// # Errors
    /// When the queue's content makes it impossible to go on.
    fn process_queue(&mut self, index: usize) -> Result<(), DeviceError>;

    /// A descriptor that becomes readable when the host's side has something to do: a tap, an
    /// epoll. It is the same for the device's life. It is watched *edge-triggered*: a device takes
    /// all that there is, or remembers that it stopped and goes on in [`Device::process_queue`].
    fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// [`Device::host_fd`] is ready. Also called right after activation. Only while active.
    ///
    /// # Errors
    /// As [`Device::process_queue`].
    fn process_host(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// What is to be saved of the device, which goes on undisturbed: nothing is taken from the host,
    /// nothing is given to the guest.
    fn save(&self) -> Saved;

    /// Takes what [`Self::save`] gave for such a device. Called once on a fresh device, after
    /// [`Self::activate`] with queues that continue where the saved ones were, if it was active.
    ///
    /// # Errors
    /// When the state cannot be this device's, or contradicts itself.
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError>;

    /// Writes what the device holds in memory for its files into them, without waiting for stable
    /// storage: then they are complete for whoever opens them. The default holds nothing.
    ///
    /// # Errors
    /// The host's, by name. The device goes on.
    fn write_back(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Which of the host's ports the connection has that goes on in another process, in saves from
    /// now on. For sockets; the default has none.
    fn keep_connection(&mut self, host_port: u32) {
        let _ = host_port;
    }

    /// Makes an empty layer at `path`, for the disk to go on in after [`Device::push_layer`].
    ///
    /// # Errors
    /// The host's, by name; a device that is no disk with layers refuses. The device goes on.
    fn prepare_layer(&mut self, path: &Path) -> Result<(), DeviceError> {
        let _ = path;
        Err(DeviceError::Host {
            what: "making a layer".into(),
            source: std::io::ErrorKind::Unsupported.into(),
        })
    }

    /// Freezes what was written, after [`Device::write_back`]; later writes go to the prepared
    /// layer. False: nothing was written since the last time, and the prepared layer is gone.
    ///
    /// # Errors
    /// The host's, by name. The device goes on as it was.
    fn push_layer(&mut self) -> Result<bool, DeviceError> {
        Ok(false)
    }

    /// Goes on with the layer at `path` in place of these frozen ones, counted from the lowest, whose
    /// content it has.
    ///
    /// # Errors
    /// The host's, by name; a device that is no disk with layers refuses. The device goes on as it was.
    fn replace_layers(
        &mut self,
        replaced: std::ops::Range<usize>,
        path: &Path,
    ) -> Result<(), DeviceError> {
        let _ = (replaced, path);
        Err(DeviceError::Host {
            what: "taking merged layers".into(),
            source: std::io::ErrorKind::Unsupported.into(),
        })
    }

    /// Removes a prepared layer that is not wanted any more.
    fn drop_prepared(&mut self) {}

    /// Counters for `metrics`, name and value since creation.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// Asks for another [`Device::process_queue`] of queue `index`, after everything else that waits.
/// `kicks` are [`Activation::kicks`].
///
/// # Errors
/// When the eventfd cannot be written.
pub fn kick_again(kicks: &[EventFd], index: usize) -> Result<(), DeviceError> {
    match kicks[index].write(1) {
        // The counter is full: a kick is pending.
        Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => Err(DeviceError::Host {
            what: "queue eventfd".into(),
            source: error,
        }),
        _ => Ok(()),
    }
}
