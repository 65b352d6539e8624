//! Rollback: a running VM goes back to a snapshot, in place. Its id, name, folder and sockets stay.
//!
//! ```text
//!   old VMM paused, its sockets aside -> new VMM started in the same folder, woken -> old one killed
//!                     ^------------------------------ fails: the new one ended, sockets back, resumed
//! ```

use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Signal;

use crate::engine::Engine;
use crate::snapshots::{RestoreSpec, SnapshotError, wake};
use crate::vm::control::{Control, ControlError};
use crate::vm::launch::{self, LaunchError, Vm};
use crate::vm::life::{self, Status};
use crate::vm::record::{Record, RecordError, VmDir};
use crate::vm::store::{Entry, StoreError};

/// How long a VMM may take to hold its vCPUs.
const CONTROL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a killed VMM may take to be gone.
const KILL_TIMEOUT: Duration = Duration::from_secs(60);

/// Why a VM does not go back. It goes on as it was.
#[derive(Debug, thiserror::Error)]
pub enum RollbackError {
    /// It does not run.
    #[error(
        "VM {id} is {status}: only a VM that runs can be rolled back; `ratoon restore` starts another"
    )]
    NotRunning {
        /// Which.
        id: String,
        /// What it does.
        status: Status,
    },
    /// It belongs to a command.
    #[error("VM {0} belongs to the command that runs in it, and ends with that")]
    Owned(String),
    /// There is nothing to go back to.
    #[error("no snapshot was taken of VM {0}, and it was not started from one: say which")]
    NoSnapshot(String),
    /// The snapshot is of another kind of machine.
    #[error("snapshot {snapshot} is of a machine with {what}, and VM {id} is not such a one")]
    Unlike {
        /// Which VM.
        id: String,
        /// Which snapshot.
        snapshot: String,
        /// What it has.
        what: String,
    },
    /// Its record.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Its VMM.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The snapshot, or its start.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// Its files.
    #[error("{}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl From<LaunchError> for RollbackError {
    fn from(error: LaunchError) -> Self {
        Self::Snapshot(error.into())
    }
}

impl From<StoreError> for RollbackError {
    fn from(error: StoreError) -> Self {
        LaunchError::from(error).into()
    }
}

/// The old VMM, which goes on unless it is replaced.
struct Old<'d> {
    dir: &'d VmDir,
    control: Control,
    was_paused: bool,
    moved: Vec<(PathBuf, PathBuf)>,
    is_replaced: bool,
}

impl<'d> Old<'d> {
    fn set_aside(dir: &'d VmDir, was_paused: bool) -> Result<Self, RollbackError> {
        let control = Control::new(dir.control_socket(), CONTROL_TIMEOUT);
        control.pause()?;
        let mut old = Self {
            dir,
            control,
            was_paused,
            moved: Vec::new(),
            is_replaced: false,
        };
        for path in [dir.control_socket(), dir.vsock_socket()] {
            let aside = path.with_extension("old");
            std::fs::rename(&path, &aside).map_err(|source| RollbackError::File {
                path: path.clone(),
                source,
            })?;
            old.moved.push((path, aside));
        }
        Ok(old)
    }

    fn replaced(mut self) {
        self.is_replaced = true;
        for (_, aside) in &self.moved {
            let _ = std::fs::remove_file(aside);
        }
    }
}

impl Drop for Old<'_> {
    fn drop(&mut self) {
        if self.is_replaced {
            return;
        }
        for (path, aside) in &self.moved {
            let _ = std::fs::rename(aside, path);
        }
        if !self.was_paused {
            let resumed = self.control.resume();
            if let Err(error) = resumed {
                tracing::error!(%error, "VM {} stays paused", self.dir.id());
            }
        }
    }
}

impl Engine {
    /// Puts a running VM back to `snapshot`, or to the youngest one that it comes from. What it did since is
    /// gone. VMs that were forked from it stay as they are.
    ///
    /// # Errors
    /// [`RollbackError`]; the VM goes on as it was.
    pub fn rollback(
        &self,
        entry: &Entry,
        snapshot: Option<&str>,
        cancel: Option<BorrowedFd<'_>>,
    ) -> Result<String, RollbackError> {
        let (dir, id) = (&entry.dir, entry.dir.id());
        // No freeze meanwhile.
        let alone = std::fs::File::open(dir.path()).and_then(|file| {
            file.lock()?;
            Ok(file)
        });
        let _alone = alone.map_err(|source| RollbackError::File {
            path: dir.path().to_owned(),
            source,
        })?;
        let record = dir.read_record()?;
        let status = life::info(entry).status;
        if !matches!(status, Status::Running | Status::Paused) {
            return Err(RollbackError::NotRunning { id, status });
        }
        if record.ephemeral {
            return Err(RollbackError::Owned(id));
        }
        let store = self.snapshots().map_err(SnapshotError::from)?;
        let found = match snapshot {
            Some(name) => store.get(name).map_err(SnapshotError::from)?,
            None => {
                let mut known = record.ancestors.iter().rev();
                let youngest = known.find_map(|known| store.get(&known.snapshot).ok());
                youngest.ok_or_else(|| RollbackError::NoSnapshot(id.clone()))?
            }
        };
        let about = &found.manifest.about;
        let config = &record.config;
        if (about.vcpus, about.memory_mib) != (config.vcpus, config.memory_mib) {
            return Err(RollbackError::Unlike {
                id,
                snapshot: found.id.to_string(),
                what: format!(
                    "{} vCPUs and {} MiB of memory",
                    about.vcpus, about.memory_mib
                ),
            });
        }
        let spec = RestoreSpec {
            name: record.name.clone(),
            networks: config.networks.clone(),
            detached: true,
            timeout: Duration::from_secs(180),
            ..RestoreSpec::default()
        };
        let (_, plan) = self.plan_restore(&store, &found, &spec)?;
        let mut plan = self.with_pager(&store, &found, plan)?;
        plan.parent.clone_from(&record.parent);
        plan.labels.clone_from(&record.labels);
        let process = record.vmm.as_ref().and_then(|vmm| vmm.open());
        let old = Old::set_aside(dir, status == Status::Paused)?;
        let begun = launch::restart(self.store(), &plan, dir, cancel).map_err(RollbackError::from);
        let woken = begun.and_then(|mut vm| match wake(&mut vm, found.id.to_string()) {
            Ok(()) => Ok(vm),
            Err(error) => {
                vm.give_up();
                Err(error.into())
            }
        });
        let vm = match woken {
            Ok(vm) => vm,
            Err(error) => {
                // Its own record again, with the VMM that goes on.
                self.store().update(dir, |now| *now = record)?;
                return Err(error);
            }
        };
        if let Some(process) = process {
            // Nobody waits for it but us; what it holds is freed when it is gone.
            let _ = process.signal(Signal::KILL);
            let _ = process.wait(KILL_TIMEOUT);
        }
        old.replaced();
        self.leave(vm, dir, &record);
        Ok(found.id.to_string())
    }

    /// Lets the VM live, and removes what the one before it wrote.
    fn leave(&self, vm: Vm, dir: &VmDir, before: &Record) {
        let now = vm.detach();
        let layers = |record: &Record| -> Vec<PathBuf> {
            let disks = record.config.disks.iter();
            disks
                .flat_map(|disk| disk.frozen.iter().chain(&disk.layer))
                .filter(|path| is_in(path, dir))
                .cloned()
                .collect()
        };
        let kept = now.as_ref().map(layers).unwrap_or_default();
        for layer in layers(before) {
            if !kept.contains(&layer) {
                let _ = std::fs::remove_file(layer);
            }
        }
    }
}

fn is_in(path: &Path, dir: &VmDir) -> bool {
    path.starts_with(dir.path())
}
