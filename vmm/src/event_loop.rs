//! The event loop: one thread for all devices' queues and host descriptors, and for what may end
//! the VM from outside (a signal, a cut lifeline).

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use ratoon_vmm_api::Outcome;
use vmm_sys_util::epoll::EventSet;

use crate::bus::{SharedTransport, VirtioSlot, lock};
use crate::ending::Ending;

/// `data` of the event of a device's host descriptor; queues have their index.
const HOST_EVENT: u32 = u32::MAX;

/// Milliseconds without any event after which the loop counts as idle.
const IDLE_MS: i32 = 20;

/// Why the event loop cannot be set up or go on.
#[derive(Debug, thiserror::Error)]
#[error("the VMM's event loop")]
pub struct LoopError(#[source] std::io::Error);

impl From<event_manager::Error> for LoopError {
    fn from(error: event_manager::Error) -> Self {
        Self(std::io::Error::other(error))
    }
}

/// One virtio device in the loop.
struct DeviceEvents(SharedTransport);

impl MutEventSubscriber for DeviceEvents {
    fn init(&mut self, ops: &mut EventOps) {
        let transport = lock(&self.0);
        for (index, kick) in transport.queue_eventfds().iter().enumerate() {
            add(ops, Events::with_data(kick, index as u32, EventSet::IN));
        }
        if let Some(fd) = transport.host_fd() {
            let set = EventSet::IN | EventSet::EDGE_TRIGGERED;
            add(ops, Events::with_data_raw(fd.as_raw_fd(), HOST_EVENT, set));
        }
    }

    fn process(&mut self, events: Events, _: &mut EventOps) {
        let mut transport = lock(&self.0);
        match events.data() {
            HOST_EVENT => transport.host_event(),
            index => {
                let index = index as usize;
                if let Some(kick) = transport.queue_eventfds().get(index) {
                    // Already empty when another event of this round has emptied it.
                    let _ = kick.read();
                    transport.kick(index);
                }
            }
        }
    }
}

/// What ends the loop, or the VM.
struct EndEvents {
    ending: Arc<Ending>,
    signals: UnixStream,
    lifeline: Option<OwnedFd>,
}

impl MutEventSubscriber for EndEvents {
    fn init(&mut self, ops: &mut EventOps) {
        add(ops, Events::new(self.ending.event(), EventSet::IN));
        add(ops, Events::new(&self.signals, EventSet::IN));
        if let Some(lifeline) = &self.lifeline {
            add(ops, lifeline_events(lifeline));
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.fd() == self.signals.as_raw_fd() {
            self.ending.end(Outcome::Stopped);
        }
        let Some(lifeline) = &self.lifeline else {
            return;
        };
        if events.fd() != lifeline.as_raw_fd() {
            return;
        }
        // One byte: the owner lets the VM live on without it. The end: the owner has gone.
        match rustix::io::read(lifeline, &mut [0_u8; 1]) {
            Ok(1) => {
                if let Err(error) = ops.remove(lifeline_events(lifeline)) {
                    tracing::error!(%error, "event loop");
                }
                self.lifeline = None;
            }
            _ => self.ending.end(Outcome::Orphaned),
        }
    }
}

fn lifeline_events(lifeline: &OwnedFd) -> Events {
    Events::new_raw(lifeline.as_raw_fd(), EventSet::IN | EventSet::HANG_UP)
}

fn add(ops: &mut EventOps, events: Events) {
    if let Err(error) = ops.add(events) {
        // epoll_ctl fails only for want of memory or watches: the device then stays silent.
        tracing::error!(%error, "event loop");
    }
}

/// The loop with everything registered.
pub struct EventLoop {
    manager: EventManager<Box<dyn MutEventSubscriber>>,
    ending: Arc<Ending>,
}

impl EventLoop {
    /// Registers devices, signals (a socket that becomes readable) and the lifeline.
    ///
    /// # Errors
    /// [`LoopError`] when the process is out of descriptors.
    pub fn new(
        devices: &[VirtioSlot],
        ending: Arc<Ending>,
        signals: UnixStream,
        lifeline: Option<OwnedFd>,
    ) -> Result<Self, LoopError> {
        let mut manager: EventManager<Box<dyn MutEventSubscriber>> = EventManager::new()?;
        for device in devices {
            manager.add_subscriber(Box::new(DeviceEvents(device.transport.clone())));
        }
        manager.add_subscriber(Box::new(EndEvents {
            ending: ending.clone(),
            signals,
            lifeline,
        }));
        Ok(Self { manager, ending })
    }

    /// Serves events until the VM is over. `when_idle` runs once, the first time that nothing has
    /// happened for 20 ms: what it does is in no guest's way.
    ///
    /// # Errors
    /// [`LoopError`] when the system refuses to wait for events.
    pub fn run(&mut self, when_idle: impl FnOnce()) -> Result<Outcome, LoopError> {
        let mut when_idle = Some(when_idle);
        loop {
            if let Some(outcome) = self.ending.outcome() {
                return Ok(outcome);
            }
            let timeout = if when_idle.is_some() { IDLE_MS } else { -1 };
            if self.manager.run_with_timeout(timeout)? == 0
                && let Some(when_idle) = when_idle.take()
            {
                when_idle();
            }
        }
    }
}
