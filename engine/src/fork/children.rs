//! What children of a generation are started from, and each child on its way.

use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use ratoon_snapshot::Snapshot;
use ratoon_vmm_api::{GenerationConfig, MemoryLayerConfig};

use super::{ChildError, END_PATIENCE, ForkSpec};
use crate::bridge::AgentFork;
use crate::engine::Engine;
use crate::fan_out::Each;
use crate::lineage::ROOT;
use crate::renewal::StaleRuntime;
use crate::vm::cgroup::Group;
use crate::vm::freeze::{self, Before, Generation, Waking};
use crate::vm::launch::{self, From as StartFrom, Launch, LaunchError, Machine, Vm};
use crate::vm::record::{Parent, Record, VmDir};
use crate::vm::store::Store;
use crate::vm::turns::WAKES;

pub(super) fn start_from(
    dir: &VmDir,
    record: &Record,
    id: &str,
    generation: Generation,
) -> StartFrom {
    let frozen = generation.frozen(ROOT).to_vec();
    let freezes = generation.freezes(ROOT);
    let mut files = vec![OwnedFd::from(generation.state)];
    let mut memory = Vec::new();
    for (number, layer) in generation.layers.into_iter().enumerate() {
        files.push(layer.file.into());
        memory.push(MemoryLayerConfig {
            path: PathBuf::from(format!("memory layer {number}")),
            runs: layer.runs,
            packed: layer.packed,
            freezes: layer.freezes,
        });
    }
    StartFrom {
        config: GenerationConfig {
            id: id.to_owned(),
            state: PathBuf::from("the frozen machine's state"),
            memory,
            paged: false,
            descriptors: true,
        },
        files,
        frozen,
        freezes,
        linked_from: Some(dir.path().to_owned()),
        ancestors: record.ancestors.clone(),
        restored_from: record.restored_from.clone(),
        control_port: generation.control_port,
    }
}

/// A snapshot, and who starts children of it.
pub(super) struct Stored {
    pub(super) engine: Engine,
    pub(super) store: ratoon_snapshot::Store,
    pub(super) snapshot: Snapshot,
    /// Why a child did not take the host's runtime.
    pub(super) stale_runtime: Arc<Mutex<Option<StaleRuntime>>>,
}

/// What children are started from.
pub(super) struct Source {
    pub(super) plan: Launch,
    /// The VM that was forked.
    pub(super) parent: Option<String>,
    /// Its control group.
    pub(super) group: Option<Group>,
    /// That of the children.
    pub(super) family: Option<PathBuf>,
    /// Keeps the frozen layers where children link to them.
    pub(super) layers: Option<File>,
    /// What they are started from, if that is stored.
    pub(super) snapshot: Option<Stored>,
    /// The host's port of the connection that goes on in them, if one does.
    pub(super) control_port: Option<u32>,
}

impl Source {
    pub(super) fn launch(&self, generation: &str, spec: &ForkSpec, index: u32) -> Launch {
        let number = index as usize;
        let mut machine = self.plan.machine.clone();
        if let Some(taps) = spec.networks.get(number) {
            machine.networks.clone_from(taps);
        }
        Launch {
            vmm: self.plan.vmm.clone(),
            name: spec.names.get(number).cloned(),
            image: self.plan.image.clone(),
            detached: spec.detached,
            boot_timeout: self.plan.boot_timeout,
            keep_open: self.plan.keep_open.clone(),
            machine,
            runtime: self.plan.runtime.clone(),
            generation: self.plan.generation.clone(),
            pager: None,
            parent: Some(Parent {
                vm: self.parent.clone(),
                generation: generation.to_owned(),
                index,
                control_port: self.control_port,
            }),
            labels: spec.labels.clone(),
            shells: self.plan.shells.clone(),
            family: self.family.clone().map(|family| (family, spec.limits)),
        }
    }
}

/// Children on their way.
pub(super) struct Children {
    pub(super) store: Store,
    pub(super) launches: Vec<Launch>,
    pub(super) dirs: Vec<VmDir>,
    /// Whose start has begun, and with it whoever removes its folder.
    pub(super) begun: Vec<AtomicBool>,
    pub(super) generation: String,
    pub(super) message: Option<String>,
    pub(super) agent: Option<Arc<AgentFork>>,
    pub(super) snapshot: Option<Stored>,
    pub(super) _layers: Option<File>,
    /// One for each: the VM that was forked is woken when they have been started.
    pub(super) before: Mutex<Vec<Before>>,
}

impl Each for Children {
    type Item = Vm;
    type Error = ChildError;

    fn start(&self, index: usize, enough: BorrowedFd<'_>) -> Result<Vm, ChildError> {
        let (launch, dir) = (&self.launches[index], &self.dirs[index]);
        self.begun[index].store(true, Ordering::Relaxed);
        let before = self
            .before
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        let started = match &self.snapshot {
            None => launch::launch_in(&self.store, launch, dir, Some(enough)),
            Some(stored) => {
                let (store, snapshot) = (&stored.store, &stored.snapshot);
                let plan = stored.engine.with_pager(store, snapshot, launch.clone());
                let plan = plan.map_err(|error| {
                    let _ = self.store.remove(dir);
                    Box::new(error)
                })?;
                launch::launch_in(&self.store, &plan, dir, Some(enough))
            }
        };
        drop(before);
        Ok(started?)
    }

    fn finish(&self, _: usize, vm: &mut Vm) -> Result<(), ChildError> {
        let woken = self.wake(vm);
        // Why it ended says more than that it cannot be talked to.
        woken.map_err(|error| vm.ended(END_PATIENCE).map_or(error, Into::into))
    }
}

impl Children {
    /// What they start from. The VM that was forked waits for them with its wake.
    pub(super) fn go_on_from(&mut self, from: StartFrom, before: &Before) {
        let from = Arc::new(from);
        for launch in &mut self.launches {
            launch.generation = Some(from.clone());
        }
        self.before = Mutex::new(vec![before.clone(); self.launches.len()]);
    }

    /// The VM that was forked is another than it was when their records were made.
    pub(super) fn replan(&mut self, plan: &Launch) {
        for launch in &mut self.launches {
            let networks = std::mem::take(&mut launch.machine.networks);
            launch.machine = Machine {
                networks,
                ..plan.machine.clone()
            };
            launch.image.clone_from(&plan.image);
            launch.runtime.clone_from(&plan.runtime);
            launch.keep_open = plan.keep_open.clone();
        }
    }

    fn wake(&self, vm: &mut Vm) -> Result<(), ChildError> {
        let runtime = vm.runtime();
        let mut client = runtime.map_err(|source| LaunchError::Runtime { source })?;
        let mut waking = Waking::child(vm.record(), &self.generation);
        if let Some(child) = &mut waking.child {
            child.message.clone_from(&self.message);
        }
        if let Some(agent) = &self.agent {
            // Its bridge listens before anything in it runs.
            let index = waking.index.unwrap_or_default();
            waking.token = Some(agent.introduce(vm.dir(), index)?);
        }
        // The fork's own deadline and cancel are its caller's to watch.
        let turn = WAKES.take(|| false);
        freeze::wake(&mut client, &waking)?;
        drop(turn);
        vm.awake().map_err(LaunchError::from)?;
        vm.keep_runtime(client);
        let Some(stored) = &self.snapshot else {
            return Ok(());
        };
        let about = &stored.snapshot.manifest.about;
        if let Some(stale) = stored.engine.renew(vm, about).map_err(Box::new)? {
            let mut known = stored
                .stale_runtime
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            *known = Some(stale);
        }
        Ok(())
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        // Records of children that were never started: nobody else knows of them.
        for (dir, begun) in self.dirs.iter().zip(&self.begun) {
            if !begun.load(Ordering::Relaxed) {
                let _ = self.store.remove(dir);
            }
        }
    }
}
