//! Commit: a child takes its parent's place, and all others that come from there end.
//!
//! ```text
//!   list of who goes -> one write of the child's record: name, place, the list -> each ended -> list forgotten
//!     `- killed: nothing has changed          `- killed: the next command goes on with the list -'
//! ```
//!
//! How it fails: a VM that cannot be ended; the list stays, and the next command tries again.

use std::collections::BTreeSet;
use std::time::Duration;

use ratoon_protocol::{Call, HostnameSet};
use serde::{Deserialize, Serialize};

use crate::engine::Engine;
use crate::vm::life::{self, LifeError, Status};
use crate::vm::process::ProcessRef;
use crate::vm::record::{Parent, Record, VmDir, hostname};
use crate::vm::standstill;
use crate::vm::store::{Entry, Store, StoreError};

/// How long the runtime may take to accept a connection and to do a small thing.
const GUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// How long for a command that is about something else.
const BRIEF: Duration = Duration::from_secs(5);

/// What came of a commit.
#[derive(Debug, Clone, Serialize)]
pub struct Committed {
    /// The VM that stayed.
    pub id: String,
    /// What it is called now.
    pub name: Option<String>,
    /// The ids of those that were ended and removed.
    pub discarded: Vec<String>,
}

/// VMs that end in favour of another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replaces {
    /// Who ends them; when it was killed over it, the next command does.
    pub by: Option<ProcessRef>,
    /// Their ids.
    pub vms: BTreeSet<String>,
}

impl Replaces {
    /// Whether nobody is at it any more.
    pub fn is_left(&self) -> bool {
        !self.by.as_ref().is_some_and(ProcessRef::is_alive)
    }
}

/// Why a child does not take its parent's place.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// It is no child.
    #[error("VM {0} is no child of a fork: there is nothing to take the place of")]
    NoChild(String),
    /// It does not run.
    #[error("VM {id} is {status}: only a running VM can take its parent's place")]
    NotRunning {
        /// Which.
        id: String,
        /// What it does.
        status: Status,
    },
    /// Another one has taken the place already.
    #[error("VM {id} is about to be removed: VM {by} has taken its parent's place")]
    Discarded {
        /// Which.
        id: String,
        /// Who has.
        by: String,
    },
    /// Records.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Its own record, or a VM that is to end.
    #[error(transparent)]
    Life(#[from] LifeError),
}

impl Engine {
    /// `child` takes its parent's place and name; the parent, and all others that come from it, are ended and
    /// removed. What was forked from the child stays.
    ///
    /// # Errors
    /// [`CommitError`]. Once it has the place, the next command ends whom this one could not end.
    pub fn commit(&self, child: &Entry) -> Result<Committed, CommitError> {
        let id = child.dir.id();
        let status = life::info(child).status;
        if child.record.is_err() || status != Status::Running {
            return Err(CommitError::NotRunning { id, status });
        }
        let (name, vms) = self.store().succeed(&child.dir, replace)?;
        if let Err(error) = end_all(self.store(), &vms) {
            // This process may live on: the next command is to do the rest all the same.
            let _ = self.store().update(&child.dir, |record| {
                if let Some(replaces) = &mut record.replaces {
                    replaces.by = None;
                }
            });
            return Err(error.into());
        }
        if let Some(name) = &name {
            call_it(&child.dir, &hostname(Some(name), &id), GUEST_TIMEOUT);
        }
        forget(self.store(), &child.dir)?;
        Ok(Committed {
            id,
            name,
            discarded: vms.into_iter().collect(),
        })
    }
}

/// Whose place a child takes, and who goes.
fn replace(child: &Record, records: &[&Record]) -> Result<(Option<String>, Replaces), CommitError> {
    let id = child.id.clone();
    let Some(from) = &child.parent else {
        return Err(CommitError::NoChild(id));
    };
    let goes = |it: &&&Record| {
        let replaces = it.replaces.as_ref();
        replaces.is_some_and(|replaces| replaces.vms.contains(&id))
    };
    if let Some(other) = records.iter().find(goes) {
        let by = other.id.clone();
        return Err(CommitError::Discarded { id, by });
    }
    let parent = from.vm.clone();
    let parent = parent.filter(|parent| records.iter().any(|it| it.id == *parent));
    let replaces = Replaces {
        by: ProcessRef::current(),
        vms: others(records, &id, from),
    };
    Ok((parent, replaces))
}

/// Does the rest for a VM that has taken its parent's place, when whoever was at it was killed.
pub(crate) fn mend(store: &Store, entry: &Entry) -> Result<(), LifeError> {
    let Ok(record) = &entry.record else {
        return Ok(());
    };
    let Some(replaces) = &record.replaces else {
        return Ok(());
    };
    end_all(store, &replaces.vms)?;
    if record.name.is_some() && record.vmm_is_alive() {
        call_it(&entry.dir, &record.hostname(), BRIEF);
    }
    forget(store, &entry.dir)?;
    Ok(())
}

/// Those that are still there.
fn end_all(store: &Store, vms: &BTreeSet<String>) -> Result<(), LifeError> {
    for entry in store.list()? {
        if vms.contains(&entry.dir.id()) {
            life::remove(store, &entry, true)?;
        }
    }
    Ok(())
}

/// There is nothing left to be done.
fn forget(store: &Store, dir: &VmDir) -> Result<(), StoreError> {
    match store.update(dir, |record| record.replaces = None) {
        // Removed meanwhile.
        Err(StoreError::NotFound(_)) => Ok(()),
        other => other.map(drop),
    }
}

/// The guest goes by its VM's name. One that does not answer keeps the old one.
fn call_it(dir: &VmDir, name: &str, patience: Duration) {
    let call = Call::HostnameSet(HostnameSet {
        hostname: name.to_owned(),
    });
    let set = standstill::connect(dir, patience)
        .and_then(|mut client| client.call::<()>(&call, "taken its name", patience));
    if let Err(error) = set {
        tracing::warn!(%error, "the hostname of {}", dir.id());
    }
}

/// Who has to go when `child`, which comes from `from`, takes its parent's place: the parent, and all that
/// comes from it but the child and what comes from that. Children of a snapshot have no parent: it is those
/// of the same fork then.
fn others(records: &[&Record], child: &str, from: &Parent) -> BTreeSet<String> {
    let mut gone: BTreeSet<String> = from.vm.iter().cloned().collect();
    for record in records {
        let is_sibling = record
            .parent
            .as_ref()
            .is_some_and(|parent| parent.generation == from.generation);
        if is_sibling && record.id != child {
            gone.insert(record.id.clone());
        }
    }
    loop {
        let before = gone.len();
        for record in records {
            let parent = record.parent.as_ref().and_then(|parent| parent.vm.as_ref());
            if parent.is_some_and(|parent| gone.contains(parent)) && record.id != child {
                gone.insert(record.id.clone());
            }
        }
        if gone.len() == before {
            break;
        }
    }
    let known = |id: &String| records.iter().any(|record| record.id == *id);
    gone.retain(known);
    gone
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;
    use crate::vm::record::tests::config;

    fn record(id: &str, parent: Option<(&str, &str)>) -> Record {
        Record {
            parent: parent.map(|(vm, generation)| Parent {
                vm: Some(vm.to_owned()),
                generation: generation.to_owned(),
                index: 0,
                control_port: None,
            }),
            ..Record::new(config(id), None, None)
        }
    }

    #[test]
    fn who_takes_the_parents_place_leaves_nobody_but_its_own_children() {
        let all = [
            record("root", None),
            record("a", Some(("root", "g"))),
            record("b", Some(("root", "g"))),
            record("c", Some(("root", "h"))),
            record("aa", Some(("a", "i"))),
            record("bb", Some(("b", "j"))),
            record("stranger", None),
        ];
        let records: Vec<&Record> = all.iter().collect();
        let from = all[1].parent.clone().unwrap();
        let gone: Vec<_> = others(&records, "a", &from).into_iter().collect();
        assert_eq!(gone, ["b", "bb", "c", "root"]);
        let from = all[5].parent.clone().unwrap();
        let gone: Vec<_> = others(&records, "bb", &from).into_iter().collect();
        assert_eq!(gone, ["b"]);
    }

    /// A process that stands for a VMM.
    struct Vmm(Child);

    impl Vmm {
        fn new() -> Self {
            Self(Command::new("sleep").arg("1000").spawn().unwrap())
        }

        fn process(&self) -> Option<ProcessRef> {
            ProcessRef::of(i32::try_from(self.0.id()).unwrap())
        }

        fn lives(&mut self) -> bool {
            self.0.try_wait().unwrap().is_none()
        }
    }

    impl Drop for Vmm {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    /// A family of VMs that run: a root by this name, and two children of one fork.
    fn family(store: &Store) -> (Vec<VmDir>, Vec<Vmm>) {
        let vmms = vec![Vmm::new(), Vmm::new(), Vmm::new()];
        let mut dirs: Vec<VmDir> = Vec::new();
        for (vmm, name) in vmms.iter().zip(["root", "kid-0", "kid-1"]) {
            let parent = dirs.first().map(VmDir::id);
            let made = store.create(Some(name), |dir| Record {
                vmm: vmm.process(),
                ephemeral: false,
                ready: true,
                ..record(&dir.id(), parent.as_deref().map(|parent| (parent, "g")))
            });
            dirs.push(made.unwrap());
        }
        (dirs, vmms)
    }

    /// As a commit that was killed has it: the place is taken, and nobody has ended yet.
    fn succeed(store: &Store, dirs: &[VmDir], by: Option<ProcessRef>) {
        let root = dirs[0].id();
        let vms = BTreeSet::from([root.clone(), dirs[2].id()]);
        let choose = |_: &Record, _: &[&Record]| {
            let vms = vms.clone();
            Ok::<_, StoreError>((Some(root), Replaces { by, vms }))
        };
        let (name, gone) = store.succeed(&dirs[1], choose).unwrap();
        assert_eq!((name.as_deref(), gone), (Some("root"), vms));
    }

    #[test]
    fn the_next_command_does_the_rest_of_a_commit_that_was_killed() {
        let temp = tempfile::tempdir().unwrap();
        let store = Store::new(temp.path());
        let (dirs, mut vmms) = family(&store);
        let mut dead = ProcessRef::current();
        dead.as_mut().unwrap().start_ticks += 1;
        succeed(&store, &dirs, dead);
        // The guest does not answer: its name is nothing to fail for.
        life::sweep(&store).unwrap();
        let lives: Vec<_> = vmms.iter_mut().map(Vmm::lives).collect();
        assert_eq!(lives, [false, true, false]);
        let left = store.list().unwrap();
        assert_eq!(left.len(), 1);
        let record = left[0].record.as_ref().unwrap();
        assert_eq!(record.name.as_deref(), Some("root"));
        assert_eq!((&record.parent, &record.replaces), (&None, &None));
    }

    #[test]
    fn a_commit_that_is_under_way_is_left_alone() {
        let temp = tempfile::tempdir().unwrap();
        let store = Store::new(temp.path());
        let (dirs, mut vmms) = family(&store);
        succeed(&store, &dirs, ProcessRef::current());
        life::sweep(&store).unwrap();
        assert!(vmms.iter_mut().all(Vmm::lives));
        assert_eq!(store.list().unwrap().len(), 3);
        assert!(
            store.find("root").unwrap().dir == dirs[1],
            "it has the name"
        );
    }

    #[test]
    fn of_siblings_that_are_committed_at_once_one_stays() {
        let temp = tempfile::tempdir().unwrap();
        let store = Store::new(temp.path());
        let (dirs, _vmms) = family(&store);
        let (name, gone) = store.succeed(&dirs[1], replace).unwrap();
        assert_eq!(name.as_deref(), Some("root"));
        assert_eq!(gone, BTreeSet::from([dirs[0].id(), dirs[2].id()]));
        match store.succeed(&dirs[2], replace) {
            Err(CommitError::Discarded { id, by }) => {
                assert_eq!((id, by), (dirs[2].id(), dirs[1].id()));
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_machine_that_was_put_back_meanwhile_ends_with_the_vmm_that_it_has_now() {
        let temp = tempfile::tempdir().unwrap();
        let store = Store::new(temp.path());
        let (dirs, mut vmms) = family(&store);
        let known = store.find("root").unwrap();
        let mut now = Vmm::new();
        let update = store.update(&dirs[0], |record| record.vmm = now.process());
        update.unwrap();
        life::remove(&store, &known, true).unwrap();
        assert!(!now.lives() && !vmms[0].lives() && vmms[1].lives());
        assert!(!dirs[0].path().exists());
    }
}
