//! The three queues of an active device, and the one interrupt of a turn.

use std::sync::Arc;

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use crate::virtio::chain::Chain;
use crate::virtio::{Activation, DeviceError, Interrupt, kick_again};

/// Queue numbers (virtio 1.2, 5.10.2).
pub(super) const RX: usize = 0;
pub(super) const TX: usize = 1;
pub(super) const EVENT: usize = 2;

/// What the driver gave.
pub(super) struct Queues {
    pub(super) memory: GuestMemoryMmap,
    queues: [Queue; 3],
    interrupt: Interrupt,
    interrupt_due: bool,
    kicks: Arc<[EventFd]>,
    /// The chain at hand.
    pub(super) chain: Chain,
}

impl Queues {
    pub(super) fn new(activation: Activation) -> Result<Self, DeviceError> {
        let queues = <[Queue; 3]>::try_from(activation.queues)
            .map_err(|_| DeviceError::Driver("vsock needs three queues"))?;
        Ok(Self {
            memory: activation.memory,
            queues,
            interrupt: activation.interrupt,
            interrupt_due: false,
            kicks: activation.kicks,
            chain: Chain::default(),
        })
    }

    /// Takes the next chain of queue `index`; false when there is none.
    pub(super) fn pop(&mut self, index: usize) -> Result<bool, DeviceError> {
        self.chain.pop(&mut self.queues[index], &self.memory, index)
    }

    /// The chain at hand, of queue `index`, will be the next again.
    pub(super) fn put_back(&mut self, index: usize) {
        let queue = &mut self.queues[index];
        queue.set_next_avail(queue.next_avail().wrapping_sub(1));
    }

    /// Gives the chain at hand back to the driver, with `len` bytes in it.
    pub(super) fn finish(&mut self, index: usize, len: u32) -> Result<(), DeviceError> {
        self.queues[index]
            .add_used(&self.memory, self.chain.head(), len)
            .map_err(|source| DeviceError::Queue { index, source })
    }

    /// Asks for a kick at the next buffer; true when there already is one.
    pub(super) fn enable(&mut self, index: usize) -> Result<bool, DeviceError> {
        self.queues[index]
            .enable_notification(&self.memory)
            .map_err(|source| DeviceError::Queue { index, source })
    }

    /// Notes that a batch of chains of queue `index` was used.
    pub(super) fn notify(&mut self, index: usize) -> Result<(), DeviceError> {
        self.interrupt_due |= self.queues[index]
            .needs_notification(&self.memory)
            .map_err(|source| DeviceError::Queue { index, source })?;
        Ok(())
    }

    /// Raises the interrupt when a batch of this turn wanted it.
    pub(super) fn interrupt(&mut self) {
        if std::mem::take(&mut self.interrupt_due) {
            self.interrupt.used_buffer();
        }
    }

    /// Asks for another turn.
    pub(super) fn again(&self, index: usize) -> Result<(), DeviceError> {
        kick_again(&self.kicks, index)
    }
}
