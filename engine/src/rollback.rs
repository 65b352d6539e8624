//! Rollback: a running VM goes back to a snapshot, or to a generation of its family that lies in memory, in
//! place. Its id, name, folder and sockets stay.
//!
//! ```text
//!   old VMM paused, its sockets aside -> new VMM started in the same folder, woken -> old one killed
//!                     ^------------------------------ fails: the new one ended, sockets back, resumed
//! ```
//!
//! When this process is killed in the middle, the next one puts it right (`rollback/note.rs`).
//!
//! A generation of a fork is held by the children that were started from it: one of them that still runs
//! gives its files. When the last has gone, so has the generation.

mod note;

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use self::note::{Note, set_aside};
pub(crate) use self::note::{mend, old_vmm};
use crate::engine::Engine;
use crate::fork::ForkError;
use crate::lineage::ROOT;
use crate::snapshots::{RestoreSpec, SnapshotError, wake};
use crate::vm::control::ControlError;
use crate::vm::freeze;
use crate::vm::launch::{self, Launch, LaunchError};
use crate::vm::life::{self, Status};
use crate::vm::record::{Ancestor, Record, RecordError, VmDir};
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
    #[error(
        "no snapshot was taken of VM {0}, and it was not started from one, nor forked: say which"
    )]
    NoSnapshot(String),
    /// Nobody has the generation any more.
    #[error(
        "there is no snapshot {0}, and no machine of the family runs that was started from a generation {0}: \
         one that lies in memory goes with the last of them"
    )]
    NotHeld(String),
    /// The snapshot is of another kind of machine.
    #[error("{snapshot} is of a machine with {what}, and VM {id} is not such a one")]
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
    /// The generation of a fork.
    #[error(transparent)]
    Fork(#[from] Box<ForkError>),
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
    /// Puts a running VM back to `snapshot`, which may be a generation of its family (as [`Engine::tree`] has them)
    /// that one of its children still has, or to the youngest snapshot that it comes from, or the generation that it was
    /// forked from. What it did since is gone. VMs that were forked from it stay as they are.
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
        let target = self.target(&record, snapshot)?;
        let generation = target.generation;
        let mut plan = target.plan;
        plan.name.clone_from(&record.name);
        plan.machine.networks.clone_from(&record.config.networks);
        plan.parent.clone_from(&record.parent);
        plan.labels.clone_from(&record.labels);
        plan.family = record
            .group
            .as_ref()
            .map(|group| (group.family.clone(), group.limits));
        let mut note = Note::new(dir, record, status == Status::Paused);
        // Before the links: they are removed by it when we are killed.
        note.write(dir).map_err(file(dir.path()))?;
        let links = match &target.holder {
            Some(holder) => links_in(dir, holder, &generation, &mut plan),
            None => Ok(Links::default()),
        };
        let links = links.inspect_err(|_| Note::withdraw(dir))?;
        let begun = set_aside(dir).and_then(|()| {
            launch::restart(self.store(), &plan, dir, cancel).map_err(RollbackError::from)
        });
        let woken = begun.and_then(|mut vm| match wake(&mut vm, generation.clone()) {
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
        links.keep();
        drop(target.holder);
        note.forward(dir);
        Ok(generation)
    }

    /// Where a VM is to go back to, by the name of a snapshot or of a generation; `None`: the youngest snapshot
    /// that it comes from, or else the generation that it was forked from.
    fn target(&self, record: &Record, wanted: Option<&str>) -> Result<Target, RollbackError> {
        let store = self.snapshots().map_err(SnapshotError::from)?;
        let found = match wanted {
            None => {
                let mut known = record.ancestors.iter().rev();
                known.find_map(|known| store.get(&known.snapshot).ok())
            }
            Some(name) => match store.get(name) {
                Ok(found) => Some(found),
                Err(error) => {
                    let is_generation = name.bytes().all(|byte| byte.is_ascii_hexdigit());
                    return match self.held(record, name)? {
                        Some(held) => Ok(held),
                        None if is_generation => Err(RollbackError::NotHeld(name.to_owned())),
                        None => Err(SnapshotError::from(error).into()),
                    };
                }
            },
        };
        let Some(found) = found else {
            let held = match &record.parent {
                Some(parent) => self.held(record, &parent.generation)?,
                None => None,
            };
            return held.ok_or_else(|| RollbackError::NoSnapshot(record.id.clone()));
        };
        let about = &found.manifest.about;
        let (vcpus, memory_mib) = (about.vcpus, about.memory_mib);
        check_alike(record, &found.id.to_string(), vcpus, memory_mib)?;
        let spec = RestoreSpec {
            detached: true,
            timeout: Duration::from_secs(180),
            ..RestoreSpec::default()
        };
        let (_, plan) = self.plan_restore(&store, &found, &spec)?;
        Ok(Target {
            plan: self.with_pager(&store, &found, plan)?,
            generation: found.id.to_string(),
            holder: None,
        })
    }

    /// A generation of the VM's family, by its name or the beginning of one; `None`: nobody has it.
    fn held(&self, record: &Record, wanted: &str) -> Result<Option<Target>, RollbackError> {
        let entries = self.store().list()?;
        let records = entries.iter().filter_map(|it| it.record.as_ref().ok());
        let family = family(record, &records.clone().collect::<Vec<_>>());
        let is_wanted = |it: &&Record| {
            let parent = it.parent.as_ref();
            parent.is_some_and(|parent| {
                let is_related = parent.vm.as_ref().is_some_and(|vm| family.contains(vm));
                is_related && wanted.len() >= LEAST && parent.generation.starts_with(wanted)
            })
        };
        for held in records.filter(is_wanted) {
            let (Some(parent), true) = (&held.parent, held.vmm_is_alive()) else {
                continue;
            };
            let entry = entries.iter().find(|entry| entry.dir.id() == held.id);
            let Some(entry) = entry else {
                continue;
            };
            let id = &parent.generation;
            check_alike(record, id, held.config.vcpus, held.config.memory_mib)?;
            let holder = &entry.dir;
            let file = |source| RollbackError::File {
                path: holder.path().to_owned(),
                source,
            };
            let layers = holder.hold_layers().map_err(file)?;
            // One that was rolled back itself has another.
            let Ok(generation) = freeze::birth(holder, id, parent.control_port) else {
                continue;
            };
            let (memory, disk) = generation.depth(ROOT);
            let mut before = held.clone();
            // Not the snapshots that were taken of it since.
            let is_older = |it: &Ancestor| it.memory_layers <= memory && it.disk_layers <= disk;
            before.ancestors.retain(is_older);
            let plan = self.plan_from(holder, &before, id, generation);
            return Ok(Some(Target {
                plan: plan.map_err(Box::new)?,
                generation: id.clone(),
                holder: Some(Holder {
                    dir: holder.clone(),
                    _layers: layers,
                }),
            }));
        }
        Ok(None)
    }
}

/// The least of a generation's name.
const LEAST: usize = 4;

/// What a VM goes back to.
struct Target {
    plan: Launch,
    /// What it is called.
    generation: String,
    /// Who has its files, unless it is a snapshot.
    holder: Option<Holder>,
}

/// A VM that has a generation's files in its folder.
struct Holder {
    dir: VmDir,
    /// They stay there.
    _layers: File,
}

/// Links that are removed again unless the VM keeps them.
#[derive(Default)]
struct Links(Vec<PathBuf>);

impl Links {
    fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        for link in &self.0 {
            let _ = std::fs::remove_file(link);
        }
    }
}

/// Gives a VM links of its own to the frozen layers that are in the holder's folder.
fn links_in(
    dir: &VmDir,
    holder: &Holder,
    generation: &str,
    plan: &mut Launch,
) -> Result<Links, RollbackError> {
    let mut links = Links::default();
    let from = plan.generation.as_mut().and_then(std::sync::Arc::get_mut);
    let Some(from) = from.filter(|_| holder.dir != *dir) else {
        return Ok(links);
    };
    for (number, layer) in from.frozen.iter_mut().enumerate() {
        if !is_in(layer, &holder.dir) {
            continue;
        }
        let link = dir.borrowed_layer(generation, number);
        match std::fs::hard_link(&*layer, &link) {
            Ok(()) => links.0.push(link.clone()),
            // It has been there before: the same file.
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(source) => return Err(RollbackError::File { path: link, source }),
        }
        *layer = link;
    }
    from.linked_from = None;
    Ok(links)
}

fn check_alike(
    record: &Record,
    target: &str,
    vcpus: u32,
    memory_mib: u64,
) -> Result<(), RollbackError> {
    if (vcpus, memory_mib) == (record.config.vcpus, record.config.memory_mib) {
        return Ok(());
    }
    Err(RollbackError::Unlike {
        id: record.id.clone(),
        snapshot: target.to_owned(),
        what: format!("{vcpus} vCPUs and {memory_mib} MiB of memory"),
    })
}

/// The ids of the VM and of those that it comes from: what was forked from them is its family's.
fn family(record: &Record, records: &[&Record]) -> BTreeSet<String> {
    let mut family = BTreeSet::from([record.id.clone()]);
    let mut last = record;
    while let Some(above) = last.parent.as_ref().and_then(|parent| parent.vm.as_ref())
        && family.insert(above.clone())
    {
        // One that is gone says no more where it came from.
        let Some(found) = records.iter().find(|record| record.id == *above) else {
            break;
        };
        last = found;
    }
    family
}

fn is_in(path: &Path, dir: &VmDir) -> bool {
    path.starts_with(dir.path())
}
