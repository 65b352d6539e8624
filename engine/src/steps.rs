//! Turn boundaries of an agent that are kept: snapshots of its machine, from which it can go on once more.
//!
//! ```text
//!   at the boundary before a step: snapshot --> agent-<run>-<branch>-<step> in the store, a line in the VM's steps.json
//!   more than wanted: the oldest are removed          the VM is removed: all of its are
//! ```
//!
//! Each holds what is new since the one before, as snapshots do; so that old ones can go, every so many begin anew with
//! a whole one. What somebody still uses (a machine that was started from it, a snapshot of the user's that builds on
//! it) stays until the last machine of the run is removed.

use std::collections::BTreeSet;
use std::path::PathBuf;

use ratoon_snapshot::Progress;
use serde::{Deserialize, Serialize};

use crate::bridge::{AgentVm, write_json};
use crate::engine::Engine;
use crate::snapshots::{Keep, SnapshotError, Taken};
use crate::vm::record::VmDir;
use crate::vm::store::Store;

/// A boundary that was kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptStep {
    /// The step that comes next there.
    pub step: u32,
    /// The snapshot's name.
    pub snapshot: String,
    /// It stands by itself.
    pub whole: bool,
    /// How long the machine stood still for it, in microseconds.
    pub pause_us: u64,
}

/// The boundaries of the agent in `dir` that were kept and are there, oldest first.
pub fn kept(dir: &VmDir) -> Vec<KeptStep> {
    let read = std::fs::read(dir.steps_note()).ok();
    read.and_then(|bytes| serde_json::from_slice(&bytes).ok())
        .unwrap_or_default()
}

fn prefix(run: &str) -> String {
    format!("agent-{run}-")
}

/// How many at the front can go when `wanted` are to stay: what comes after has to begin with a whole one.
fn surplus(steps: &[KeptStep], wanted: usize) -> usize {
    let most = steps.len().saturating_sub(wanted);
    (0..=most)
        .rev()
        .find(|index| steps.get(*index).is_none_or(|step| step.whole))
        .unwrap_or(0)
}

/// Whether the next one has to stand by itself: so many that build on each other are enough.
fn is_next_whole(steps: &[KeptStep], wanted: usize) -> bool {
    let chain = steps.iter().rev().position(|step| step.whole);
    chain.is_none_or(|since| since + 1 >= wanted)
}

impl Engine {
    /// Keeps the boundary before `step` at which the agent in `dir` waits. The last `wanted` stay, and at most as many
    /// again, on which they build.
    ///
    /// # Errors
    /// [`SnapshotError`]; the agent's machine goes on, and the boundary is not kept.
    pub fn keep_step(
        &self,
        dir: &VmDir,
        step: u32,
        wanted: usize,
        progress: &dyn Progress,
    ) -> Result<Taken, SnapshotError> {
        let failed = |path: PathBuf| move |source| SnapshotError::File { path, source };
        let no_agent = || failed(dir.agent_note())(std::io::ErrorKind::NotFound.into());
        let vm = AgentVm::read(dir).ok_or_else(no_agent)?;
        let store = self.snapshots()?;
        let name = format!("{}{}-{step}", prefix(&vm.run), vm.branch);
        let mut steps = kept(dir);
        // It comes by here again, after a rollback: what came after then is another future.
        let again = steps.iter().position(|it| it.step >= step);
        let gone = steps.split_off(again.unwrap_or(steps.len()));
        let note = |steps: &[KeptStep]| {
            write_json(&dir.steps_note(), &steps).map_err(failed(dir.steps_note()))
        };
        // Written first: what is named there is there.
        if !gone.is_empty() {
            note(&steps)?;
        }
        for step in gone.iter().rev() {
            remove(&store, &step.snapshot);
        }
        put_aside(&store, &name)?;
        let whole = is_next_whole(&steps, wanted);
        let keep = Keep {
            name: Some(&name),
            whole,
            ..Keep::default()
        };
        let taken = self.snapshot(dir, keep, progress)?;
        steps.push(KeptStep {
            step,
            snapshot: name,
            whole,
            pause_us: taken.pause.as_micros() as u64,
        });
        let old: Vec<_> = steps.drain(..surplus(&steps, wanted)).collect();
        note(&steps)?;
        for step in old.iter().rev() {
            remove(&store, &step.snapshot);
        }
        Ok(taken)
    }
}

/// Whoever uses a step of this name, be it the machine that comes by here again, has it under another one.
fn put_aside(store: &ratoon_snapshot::Store, name: &str) -> Result<(), ratoon_snapshot::Error> {
    let Ok(there) = store.get(name) else {
        return Ok(());
    };
    let id = there.id.to_string();
    store.set_name(&id, &format!("{name}.old-{}", &id[..8]), true)?;
    // It has two names: this one alone goes.
    store.remove(name).map(drop)
}

/// The machine in `dir` goes on from one of these boundaries of another that has gone, before `step`: it has those
/// until there.
///
/// # Errors
/// [`SnapshotError`]: its folder cannot be written to.
pub fn inherit(
    engine: &Engine,
    dir: &VmDir,
    kept: Vec<KeptStep>,
    step: u32,
) -> Result<(), SnapshotError> {
    let store = engine.snapshots()?;
    let is_there = |it: &KeptStep| it.step <= step && store.get(&it.snapshot).is_ok();
    let steps: Vec<_> = kept.into_iter().filter(is_there).collect();
    let path = dir.steps_note();
    write_json(&path, &steps).map_err(|source| SnapshotError::File { path, source })
}

/// What cannot be removed now, since somebody uses it, is removed with the run's last machine.
fn remove(store: &ratoon_snapshot::Store, name: &str) {
    use ratoon_snapshot::Error;
    match store.remove(name) {
        Ok(_) | Err(Error::NotFound { .. } | Error::Needed { .. } | Error::InUse { .. }) => {}
        Err(error) => tracing::warn!(%error, "removing the kept step {name}"),
    }
}

/// The VM in `dir` goes: so do the boundaries of its run that no other machine has.
pub(crate) fn forget(vms: &Store, dir: &VmDir, vm: &AgentVm) {
    let folder = vms.root().with_file_name("snapshots");
    if !folder.is_dir() {
        return;
    }
    let others = vms.list().unwrap_or_default();
    let others = others.iter().filter(|entry| entry.dir != *dir);
    let stay: BTreeSet<String> = others
        .flat_map(|entry| kept(&entry.dir))
        .map(|step| step.snapshot)
        .collect();
    let Ok(store) = ratoon_snapshot::Store::open(&folder) else {
        return;
    };
    let prefix = prefix(&vm.run);
    let Ok(listing) = store.list() else {
        return;
    };
    // The newest first: it builds on the older ones.
    let names = listing.snapshots.iter().flat_map(|it| &it.names);
    for name in names.filter(|name| name.starts_with(&prefix) && !stay.contains(*name)) {
        remove(&store, name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(whole: &[bool]) -> Vec<KeptStep> {
        let step = |(index, whole): (usize, &bool)| KeptStep {
            step: index as u32 + 1,
            snapshot: format!("s{index}"),
            whole: *whole,
            pause_us: 0,
        };
        whole.iter().enumerate().map(step).collect()
    }

    #[test]
    fn the_last_ones_stay_and_at_most_as_many_again() {
        for wanted in 1..6 {
            let mut have: Vec<KeptStep> = Vec::new();
            for number in 1..40 {
                let whole = is_next_whole(&have, wanted);
                have.push(KeptStep {
                    step: number,
                    snapshot: format!("s{number}"),
                    whole,
                    pause_us: 0,
                });
                have.drain(..surplus(&have, wanted));
                assert!(have[0].whole, "the first builds on nothing: {have:?}");
                assert!(have.len() < 2 * wanted.max(1), "{wanted}: {have:?}");
                let last = have.iter().rev().take(wanted).map(|it| it.step);
                let due = (1..=number).rev().take(wanted);
                assert!(last.eq(due), "{wanted}: {have:?}");
            }
        }
    }

    #[test]
    fn what_others_build_on_stays() {
        assert_eq!(surplus(&steps(&[true, false, false, true]), 2), 0);
        assert_eq!(surplus(&steps(&[true, false, true, false]), 2), 2);
        assert_eq!(surplus(&steps(&[true]), 4), 0);
        assert!(is_next_whole(&[], 3));
        assert!(!is_next_whole(&steps(&[true, false]), 3));
        assert!(is_next_whole(&steps(&[true, false, false]), 3));
    }
}
