//! The three queues of an active device, and the one interrupt of a turn.

use std::sync::Arc;

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use crate::virtio::chain::Chain;
use crate::virtio::state::RingState;
use crate::virtio::{Activation, DeviceError, Interrupt, kick_again};

/// Queue numbers (virtio 1.2, 5.10.2).
pub(super) const RX: usize = 0;
pub(super) const TX: usize = 1;
pub(super) const EVENT: usize = 2;

/// How many of the guest's packets, and bytes, it may have back without being told. Linux wakes no writer that
/// has got credit while half of its send buffer (104 KiB, unless the program set another) is with the device,
/// each packet counted with up to twice its bytes and a KiB: so these must stay well below. What is left when all
/// is quiet is told by the timer.
const UNTOLD_PACKETS: usize = 32;
const UNTOLD_BYTES: u64 = 24 << 10;

/// What the driver gave.
pub(super) struct Queues {
    pub(super) memory: GuestMemoryMmap,
    queues: [Queue; 3],
    interrupt: Interrupt,
    interrupt_due: bool,
    /// Packets of the guest, and bytes, that it has back and has not been told of.
    untold: (usize, u64),
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
            untold: (0, 0),
            kicks: activation.kicks,
            chain: Chain::default(),
        })
    }

    /// Where each queue goes on.
    pub(super) fn rings(&self) -> Vec<RingState> {
        self.queues.iter().map(RingState::of).collect()
    }

    /// Whether the driver has packets back of which it has not been told.
    pub(super) fn has_untold(&self) -> bool {
        self.untold.0 > 0 || self.interrupt_due
    }

    /// Raises the interrupt at the next turn: which packets the driver had not been told of before
    /// it was saved is not known any more, and with event-idx it is told once or never.
    pub(super) fn owe_interrupt(&mut self) {
        self.interrupt_due = true;
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

    /// Notes that so many packets of the guest, with so many bytes, were used. The guest only frees
    /// memory when it hears of that, and an interrupt costs it thousands of instructions: it is told
    /// with the next packet for it, when much has come together, or when the timer ticks.
    pub(super) fn notify_sent(&mut self, packets: usize, bytes: u64) -> Result<(), DeviceError> {
        self.untold.0 += packets;
        self.untold.1 += bytes;
        let many = UNTOLD_PACKETS.min(usize::from(self.queues[TX].size()) / 4);
        if packets > 0 && (self.untold.0 >= many || self.untold.1 >= UNTOLD_BYTES) {
            self.notify(TX)?;
        }
        Ok(())
    }

    /// Whether the guest has packets back that it has not been told of.
    pub(super) fn is_late(&self) -> bool {
        self.untold.0 > 0
    }

    /// Notes that it is time to tell the guest of them.
    pub(super) fn notify_late(&mut self) -> Result<(), DeviceError> {
        if std::mem::take(&mut self.untold).0 > 0 {
            self.notify(TX)?;
        }
        Ok(())
    }

    /// Raises the interrupt when a batch of this turn wanted it.
    pub(super) fn interrupt(&mut self) {
        if std::mem::take(&mut self.interrupt_due) {
            // The driver looks at all queues then. What was used until now counts as told: the queue's own count of it
            // has 16 bits, and after as many packets that were never asked about it would say "no need" for ever.
            if self.untold.0 > 0 {
                let _ = self.queues[TX].needs_notification(&self.memory);
            }
            self.untold = (0, 0);
            self.interrupt.used_buffer();
        }
    }

    /// Asks for another turn.
    pub(super) fn again(&self, index: usize) -> Result<(), DeviceError> {
        kick_again(&self.kicks, index)
    }
}
