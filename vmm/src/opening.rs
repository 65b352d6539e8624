//! Disks on their way to the machine: opened on a thread of their own, beside what KVM does.
//!
//! To make a layer and read the headers below it is a third of a restore's time, and waits for files while KVM's part
//! waits for the kernel. How it fails: [`Opening::disks`] says which disk and why. One that is dropped waits for its
//! thread, so that no file is made after the machine was given up.

use std::thread::JoinHandle;

use ratoon_vmm_api::VmConfig;

use crate::start::{StartError, joined, system};
use crate::wiring::{self, Named};

type Opened = Result<Vec<Named>, StartError>;

/// See the module.
pub(crate) struct Opening(Option<JoinHandle<Opened>>);

impl Opening {
    /// Begins with the disks of a machine.
    ///
    /// # Errors
    /// When the system has no more threads.
    pub(crate) fn begin(config: &VmConfig) -> Result<Self, StartError> {
        if config.disks.is_empty() {
            return Ok(Self(None));
        }
        let disks = config.disks.clone();
        std::thread::Builder::new()
            .name("disks".into())
            .spawn(move || wiring::disks(&disks))
            .map(|thread| Self(Some(thread)))
            .map_err(system("a thread to open disks"))
    }

    /// Waits for them.
    ///
    /// # Errors
    /// [`StartError::Device`].
    pub(crate) fn disks(mut self) -> Opened {
        self.0.take().map_or_else(|| Ok(Vec::new()), joined)
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        if let Some(thread) = self.0.take() {
            // Whatever it found, nobody wants it.
            let _ = thread.join();
        }
    }
}
