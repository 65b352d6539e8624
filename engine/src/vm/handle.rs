//! A VM that this process has started, and has to end or to let go.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::Child;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use ratoon_client::RuntimeError;

use super::connect::ended;
use super::launch::LaunchError;
use super::process::ProcessHandle;
use super::record::{Record, VmDir};
use super::standstill;
use super::store::{Store, StoreError};
use crate::renewal::RuntimeRef;
use crate::runtime::RuntimeClient;

/// How long a runtime that has connected may take to say HELLO.
const HELLO_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a killed VMM may take to be gone: the kernel frees the guest's memory in that time.
const KILL_TIMEOUT: Duration = Duration::from_secs(60);

/// Processes of VMs that were let go. Nobody waits for them, but a process that has ended stays until its
/// parent has asked how.
static LET_GO: Mutex<Vec<Child>> = Mutex::new(Vec::new());

/// Asks those that were let go and have ended.
pub(crate) fn reap() {
    let mut children = LET_GO.lock().unwrap_or_else(PoisonError::into_inner);
    children.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
}

/// A running VM whose runtime has connected. Dropped, it is ended and removed, unless it was
/// [detached](Vm::detach).
#[derive(Debug)]
pub struct Vm {
    pub(super) parts: Option<Parts>,
}

/// The connection to the runtime, before its HELLO or after.
#[derive(Debug)]
pub(super) enum Runtime {
    Stream(UnixStream),
    Client(Box<RuntimeClient>),
}

#[derive(Debug)]
pub(super) struct Parts {
    pub store: Store,
    pub dir: VmDir,
    pub record: Record,
    pub child: Child,
    pub spawned_ns: u64,
    pub process: ProcessHandle,
    pub runtime: Option<Runtime>,
    /// Cut when this process ends; the VMM then ends too and removes the directory. One byte on it
    /// releases the VMM.
    pub lifeline: OwnedFd,
}

/// A child that is killed and reaped unless it is released.
pub(super) struct KillOnDrop(pub Option<Child>);

impl KillOnDrop {
    pub(super) fn id(&self) -> u32 {
        self.0.as_ref().map_or(0, Child::id)
    }

    pub(super) fn release(mut self) -> Option<Child> {
        self.0.take()
    }
}

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            // Both fail only when it has been reaped, which nobody but us does.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Vm {
    fn parts(&self) -> &Parts {
        self.parts
            .as_ref()
            .expect("only taken by methods that consume the Vm")
    }

    /// The VM's files.
    pub fn dir(&self) -> &VmDir {
        &self.parts().dir
    }

    /// Its record as it was when the runtime connected.
    pub fn record(&self) -> &Record {
        &self.parts().record
    }

    /// CLOCK_MONOTONIC in nanoseconds right before its VMM's process was made, for measurements.
    pub fn spawned_ns(&self) -> u64 {
        self.parts().spawned_ns
    }

    /// The runtime's connection as it came, once, before its HELLO was read.
    pub fn take_runtime(&mut self) -> Option<UnixStream> {
        let parts = self.parts.as_mut()?;
        match parts.runtime.take() {
            Some(Runtime::Stream(stream)) => Some(stream),
            other => {
                parts.runtime = other;
                None
            }
        }
    }

    /// A client on the runtime's connection, once; later calls make a connection of their own.
    ///
    /// # Errors
    /// [`RuntimeError`] about the connection.
    pub fn runtime(&mut self) -> Result<RuntimeClient, RuntimeError> {
        let kept = self.parts.as_mut().and_then(|parts| parts.runtime.take());
        match kept {
            Some(Runtime::Client(client)) => Ok(*client),
            Some(Runtime::Stream(stream)) => RuntimeClient::from_stream(stream, HELLO_TIMEOUT),
            None => standstill::connect(self.dir(), HELLO_TIMEOUT),
        }
    }

    /// A machine that was frozen has been woken: it is ready.
    ///
    /// # Errors
    /// When its record cannot be written.
    pub fn awake(&mut self) -> Result<(), StoreError> {
        if let Some(parts) = &mut self.parts {
            parts.record = parts
                .store
                .update(&parts.dir, |record| record.ready = true)?;
        }
        Ok(())
    }

    /// Another runtime serves in it.
    ///
    /// # Errors
    /// When its record cannot be written.
    pub fn renewed(&mut self, runtime: &RuntimeRef) -> Result<(), StoreError> {
        if let Some(parts) = &mut self.parts {
            let renewed = Some(runtime.clone());
            parts.record = parts
                .store
                .update(&parts.dir, |record| record.runtime = renewed)?;
        }
        Ok(())
    }

    /// Gives a client back, for the next [`Vm::runtime`].
    pub fn keep_runtime(&mut self, client: RuntimeClient) {
        if let Some(parts) = &mut self.parts {
            parts.runtime = Some(Runtime::Client(Box::new(client)));
        }
    }

    /// Its VMM's process.
    pub fn process(&self) -> &ProcessHandle {
        &self.parts().process
    }

    /// For a VM that went away by itself: why, and its console's last lines; `None` when it still
    /// runs after `patience`.
    pub fn ended(&self, patience: Duration) -> Option<LaunchError> {
        let parts = self.parts();
        let gone = parts.process.wait(patience).unwrap_or(false);
        gone.then(|| ended(&parts.dir))
    }

    /// Ends the VM at once, without asking the guest, and removes its record and files: its layer
    /// is thrown away, so there is nothing to write back.
    ///
    /// # Errors
    /// When its files cannot be removed.
    pub fn end(mut self) -> Result<(), StoreError> {
        self.parts.take().map_or(Ok(()), Parts::end)
    }

    /// Ends its process and leaves its files: another goes on in its folder.
    pub(crate) fn give_up(mut self) {
        if let Some(mut parts) = self.parts.take() {
            parts.kill();
        }
    }

    /// Lets the VM live on without this process.
    pub fn detach(mut self) -> Option<Record> {
        let parts = self.parts.take()?;
        // A VMM that has gone takes no byte: the record then says what became of it.
        let _ = rustix::io::write(&parts.lifeline, b"r");
        let mut children = LET_GO.lock().unwrap_or_else(PoisonError::into_inner);
        children.push(parts.child);
        Some(parts.record)
    }
}

impl Parts {
    fn end(mut self) -> Result<(), StoreError> {
        self.kill();
        self.store.remove(&self.dir)
    }

    fn kill(&mut self) {
        let _ = self.child.kill();
        // Bounded: a VMM in an uninterruptible wait must not hang the caller.
        if self.process.wait(KILL_TIMEOUT).unwrap_or(false) {
            let _ = self.child.wait();
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if let Some(parts) = self.parts.take() {
            // A destructor has nobody to tell; the next sweep removes what this could not.
            let _ = parts.end();
        }
    }
}
