//! Looking at, ending and removing VMs, whichever process started them.
//!
//! A VM's state is never stored: it follows from its record, whether its VMM's process lives
//! (pid and start time) and the report that the VMM left.

use std::time::{Duration, Instant};

use ratoon_vmm_api::{Outcome, VmState};
use rustix::process::Signal;
use serde::Serialize;

use super::control::Control;
use super::end::EndCause;
use super::process::{ProcessHandle, ProcessRef};
use super::record::{RecordError, VmDir};
use super::standstill;
use super::store::{Entry, Store, StoreError};

/// How long a VMM may take to answer on its control socket.
const CONTROL_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a VMM may take to end when told so, and after SIGKILL.
const END_TIMEOUT: Duration = Duration::from_secs(30);

/// Where a VM is in its life, as its user sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Being made or booting.
    Starting,
    /// It runs and its runtime has answered.
    Running,
    /// Its vCPUs are held.
    Paused,
    /// It ended as it or its owner wished.
    Stopped,
    /// It ended because something went wrong.
    Failed,
    /// Its VMM left no report: it was killed, or the host went down.
    Killed,
    /// Its record cannot be read.
    Broken,
}

impl Status {
    /// Whether it takes up a process.
    pub fn is_live(self) -> bool {
        matches!(self, Self::Starting | Self::Running | Self::Paused)
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
            Self::Killed => "killed",
            Self::Broken => "broken",
        })
    }
}

/// A VM as `ps` shows it.
#[derive(Debug, Clone, Serialize)]
pub struct VmInfo {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: Option<String>,
    /// The image's name when it was started.
    pub image: Option<String>,
    /// The image's digest.
    pub image_digest: Option<String>,
    /// Where it is in its life.
    pub status: Status,
    /// Virtual CPUs; 0 when its record is broken.
    pub cpus: u32,
    /// Guest memory in MiB; 0 when its record is broken.
    pub memory_mib: u64,
    /// Milliseconds after the Unix epoch; 0 when its record is broken.
    pub created_ms: u64,
    /// Its VMM's process while that lives.
    pub pid: Option<i32>,
    /// It is removed when it ends.
    pub ephemeral: bool,
    /// Why it ended, or what is wrong with its record: a chain, outermost first.
    pub causes: Vec<String>,
}

/// How a VM came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stopped {
    /// It had ended before.
    Already,
    /// The guest powered off: its file systems are written back.
    ByGuest,
    /// The guest did not; the VMM ended it.
    ByVmm,
    /// Its process was killed.
    Killed,
}

/// Why a VM cannot be ended or removed.
#[derive(Debug, thiserror::Error)]
pub enum LifeError {
    /// Its record is not usable.
    #[error("the record of VM {id} is broken; `ratoon rm -f {id}` removes it")]
    Broken {
        /// The VM.
        id: String,
        /// What is wrong.
        #[source]
        source: RecordError,
    },
    /// It runs.
    #[error("VM {id} is {status}: `ratoon stop {id}` first, or `ratoon rm -f {id}`")]
    Live {
        /// The VM.
        id: String,
        /// What it does.
        status: Status,
    },
    /// Its process cannot be signalled or waited for.
    #[error("ending the process of VM {id}")]
    Signal {
        /// The VM.
        id: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Its process does not go away.
    #[error("process {pid} of VM {id} is still there {END_TIMEOUT:?} after SIGKILL")]
    Unkillable {
        /// The VM.
        id: String,
        /// Its process.
        pid: i32,
    },
    /// Its files.
    #[error(transparent)]
    Store(#[from] StoreError),
}

fn control(entry: &Entry) -> Control {
    Control::new(entry.dir.control_socket(), CONTROL_TIMEOUT)
}

/// What is known of a VM. Asks a running one's VMM whether it is paused.
pub fn info(entry: &Entry) -> VmInfo {
    let id = entry.dir.id();
    let record = match &entry.record {
        Ok(record) => record,
        Err(error) => {
            return VmInfo {
                id,
                name: None,
                image: None,
                image_digest: None,
                status: Status::Broken,
                cpus: 0,
                memory_mib: 0,
                created_ms: 0,
                pid: None,
                ephemeral: false,
                causes: chain(error),
            };
        }
    };
    let pid = record
        .vmm
        .as_ref()
        .filter(|vmm| vmm.is_alive())
        .map(|vmm| vmm.pid);
    let (status, causes) = match pid {
        Some(_) if !record.ready => (Status::Starting, Vec::new()),
        Some(_) => (running(entry), Vec::new()),
        None if record.vmm.is_none() && record.owner_is_alive() => (Status::Starting, Vec::new()),
        None => ended(entry),
    };
    VmInfo {
        id,
        name: record.name.clone(),
        image: record.image.as_ref().map(|image| image.name.clone()),
        image_digest: record.image.as_ref().map(|image| image.digest.clone()),
        status,
        cpus: record.config.vcpus,
        memory_mib: record.config.memory_mib,
        created_ms: record.created_ms,
        pid,
        ephemeral: record.ephemeral,
        causes,
    }
}

fn running(entry: &Entry) -> Status {
    match control(entry).status().map(|reply| reply.state) {
        Ok(VmState::Paused) => Status::Paused,
        // A VMM too busy to answer runs all the same.
        _ => Status::Running,
    }
}

fn ended(entry: &Entry) -> (Status, Vec<String>) {
    let status = match entry.dir.read_exit_report().map(|report| report.outcome) {
        None => Status::Killed,
        Some(Outcome::Panicked | Outcome::Failed { .. }) => Status::Failed,
        Some(_) => Status::Stopped,
    };
    (status, chain(&EndCause::of(&entry.dir)))
}

fn chain(error: &dyn std::error::Error) -> Vec<String> {
    std::iter::successors(Some(error), |error| error.source())
        .map(ToString::to_string)
        .collect()
}

/// Ends a VM: asks its runtime to shut down, and when that does not lead to an end within
/// `timeout`, its VMM, and at last kills the process.
///
/// # Errors
/// [`LifeError`].
pub fn stop(entry: &Entry, timeout: Duration) -> Result<Stopped, LifeError> {
    let Some((process, pid)) = live_process(entry)? else {
        return Ok(Stopped::Already);
    };
    let deadline = Instant::now() + timeout;
    let left = || deadline.saturating_duration_since(Instant::now());
    if running(entry) == Status::Paused {
        // A held guest cannot shut down. If it stays held, the next steps end it.
        let _ = control(entry).resume();
    }
    // Whatever goes wrong between us and the guest, the VMM can still end it.
    let asked = !left().is_zero()
        && standstill::connect(&entry.dir, left())
            .and_then(|mut client| client.shutdown(left()))
            .is_ok();
    if asked && wait(entry, &process, left())? {
        return Ok(Stopped::ByGuest);
    }
    if control(entry).stop().is_ok() && wait(entry, &process, END_TIMEOUT)? {
        return Ok(Stopped::ByVmm);
    }
    finish(entry, &process, pid).map(|()| Stopped::Killed)
}

/// Kills a VM's process at once.
///
/// # Errors
/// [`LifeError`].
pub fn kill(entry: &Entry) -> Result<Stopped, LifeError> {
    match live_process(entry)? {
        None => Ok(Stopped::Already),
        Some((process, pid)) => finish(entry, &process, pid).map(|()| Stopped::Killed),
    }
}

/// Kills the processes of all of these, and then waits for them: one after the other would take as long as all of
/// them together, where many are busy. What cannot be killed is [`remove`]'s to tell.
pub fn kill_all<'a>(entries: impl IntoIterator<Item = &'a Entry>) {
    let processes = entries.into_iter().filter_map(|entry| {
        let (process, _) = live_process(entry).ok()??;
        process.signal(Signal::KILL).ok()?;
        Some(process)
    });
    let processes: Vec<_> = processes.collect();
    let deadline = Instant::now() + END_TIMEOUT;
    for process in processes {
        let _ = process.wait(deadline.saturating_duration_since(Instant::now()));
    }
}

/// Removes a VM that has ended; with `force` any, broken ones among them.
///
/// # Errors
/// [`LifeError::Live`] and [`LifeError::Broken`] without `force`.
pub fn remove(store: &Store, entry: &Entry, force: bool) -> Result<(), LifeError> {
    if force {
        return end_and_remove(store, entry);
    }
    live_process(entry)?;
    let status = info(entry).status;
    if status.is_live() {
        return Err(LifeError::Live {
            id: entry.dir.id(),
            status,
        });
    }
    crate::bridge::forget(store, &entry.dir);
    store.remove(&entry.dir)?;
    Ok(())
}

/// Removes what dead commands left: see [`Store::sweep`]. What they left half done is put right before.
///
/// # Errors
/// [`LifeError`].
pub fn sweep(store: &Store) -> Result<(), LifeError> {
    crate::rollback::mend(store)?;
    let left = store.sweep()?;
    for entry in left.abandoned {
        end_and_remove(store, &entry)?;
    }
    for entry in left.committed {
        // Who cannot be ended now is no reason to refuse all commands.
        if let Err(error) = crate::commit::mend(store, &entry) {
            tracing::warn!(%error, "a commit cannot be finished yet");
        }
    }
    super::cgroup::sweep(store.root());
    Ok(())
}

/// Ends it and removes it. It may be another VMM's by now: a rollback that began before has put it in the place of
/// the one that this process knew.
fn end_and_remove(store: &Store, entry: &Entry) -> Result<(), LifeError> {
    end_for_good(entry)?;
    crate::bridge::forget(store, &entry.dir);
    while let Some(vmm) = store.remove_unless(&entry.dir, living)? {
        if let Some(process) = vmm.open() {
            finish(entry, &process, vmm.pid)?;
        }
    }
    Ok(())
}

/// A VMM that a folder's record, or what a rollback has noted, names, and that has not ended.
fn living(dir: &VmDir) -> Option<ProcessRef> {
    let record = dir.read_record().ok();
    let named = record.and_then(|record| record.vmm);
    let mut vmms = named.into_iter().chain(crate::rollback::old_vmm(dir));
    vmms.find(ProcessRef::is_alive)
}

/// Kills the VMM, also one that no usable record names.
fn end_for_good(entry: &Entry) -> Result<(), LifeError> {
    let recorded = match &entry.record {
        Ok(record) => record.vmm.clone(),
        Err(_) => None,
    };
    let process = recorded.or_else(|| {
        // Whoever serves the control socket says who it is. It is our directory, mode 0700.
        let pid = control(entry).status().ok()?.pid;
        ProcessRef::of(i32::try_from(pid).ok()?)
    });
    if let Some(process) = process
        && let Some(handle) = process.open()
    {
        finish(entry, &handle, process.pid)?;
    }
    Ok(())
}

fn live_process(entry: &Entry) -> Result<Option<(ProcessHandle, i32)>, LifeError> {
    let record = match &entry.record {
        Ok(record) => record,
        Err(_) => {
            return Err(LifeError::Broken {
                id: entry.dir.id(),
                source: entry
                    .dir
                    .read_record()
                    .err()
                    .unwrap_or_else(|| RecordError::Read {
                        path: entry.dir.record(),
                        source: std::io::Error::other("it was damaged a moment ago"),
                    }),
            });
        }
    };
    Ok(record
        .vmm
        .as_ref()
        .and_then(|vmm| Some((vmm.open()?, vmm.pid))))
}

fn finish(entry: &Entry, process: &ProcessHandle, pid: i32) -> Result<(), LifeError> {
    process
        .signal(Signal::KILL)
        .map_err(|source| LifeError::Signal {
            id: entry.dir.id(),
            source,
        })?;
    if wait(entry, process, END_TIMEOUT)? {
        Ok(())
    } else {
        Err(LifeError::Unkillable {
            id: entry.dir.id(),
            pid,
        })
    }
}

fn wait(entry: &Entry, process: &ProcessHandle, timeout: Duration) -> Result<bool, LifeError> {
    process.wait(timeout).map_err(|source| LifeError::Signal {
        id: entry.dir.id(),
        source,
    })
}
