//! How a VM's end is told: the first outcome counts, and the event loop is woken.

use std::sync::{Mutex, PoisonError};

use ratoon_vmm_api::Outcome;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Where every thread may say that the VM is over.
#[derive(Debug)]
pub struct Ending {
    outcome: Mutex<Option<Outcome>>,
    wake: EventFd,
}

impl Ending {
    /// No end yet.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            outcome: Mutex::new(None),
            wake: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    /// The VM is over. Only the first call counts.
    pub fn end(&self, outcome: Outcome) {
        let mut slot = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.is_none() {
            *slot = Some(outcome);
        }
        drop(slot);
        // It can only fail when the counter is full, and then the loop is awake anyway.
        let _ = self.wake.write(1);
    }

    /// The outcome, once there is one.
    pub fn outcome(&self) -> Option<Outcome> {
        self.outcome
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Readable once there is an outcome.
    pub fn event(&self) -> &EventFd {
        &self.wake
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_outcome_counts() {
        let ending = Ending::new().unwrap();
        assert_eq!(ending.outcome(), None);
        ending.end(Outcome::PoweredOff);
        ending.end(Outcome::Stopped);
        assert_eq!(ending.outcome(), Some(Outcome::PoweredOff));
        assert_eq!(ending.event().read().unwrap(), 2);
    }
}
