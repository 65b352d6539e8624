//! Rollback: a running VM goes back to a snapshot, in place. Its id, name, folder and sockets stay.
//!
//! ```text
//!   old VMM paused, its sockets aside -> new VMM started in the same folder, woken -> old one killed
//!                     ^------------------------------ fails: the new one ended, sockets back, resumed
//! ```
//!
//! When this process is killed in the middle, the next one puts it right (`rollback/note.rs`).

mod note;

use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub(crate) use self::note::mend;
use self::note::{Note, set_aside};
use crate::engine::Engine;
use crate::snapshots::{RestoreSpec, SnapshotError, wake};
use crate::vm::control::ControlError;
use crate::vm::launch::{self, LaunchError};
use crate::vm::life::{self, Status};
use crate::vm::record::RecordError;
use crate::vm::store::{Entry, StoreError};

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

fn file(path: &Path) -> impl FnOnce(std::io::Error) -> RollbackError {
    let path = path.to_owned();
    |source| RollbackError::File { path, source }
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
        let _alone = alone.map_err(file(dir.path()))?;
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
        let mut note = Note::new(record, status == Status::Paused);
        note.write(dir).map_err(file(dir.path()))?;
        let begun = set_aside(dir).and_then(|()| {
            launch::restart(self.store(), &plan, dir, cancel).map_err(RollbackError::from)
        });
        let woken = begun.and_then(|mut vm| match wake(&mut vm, found.id.to_string()) {
            Ok(()) => Ok(vm),
            Err(error) => {
                vm.give_up();
                Err(error.into())
            }
        });
        match woken {
            Ok(vm) => drop(vm.detach()),
            Err(error) => {
                note.back(self.store(), dir)?;
                return Err(error);
            }
        }
        note.replaced(dir);
        note.forward(dir);
        Ok(found.id.to_string())
    }
}
