//! fork(n): one running VM becomes many.
//!
//! ```text
//!   VM --freeze--> generation: memory files, state, disk layers -- n x (start, wake) --> children
//!    `---- woken at the same time, goes on
//! ```
//!
//! Nothing is copied: a child maps the generation's memory privately and writes its disk into a layer of its
//! own, over links to the frozen ones. So each has all that it needs in its own folder and descriptors, and
//! what nobody uses any more the kernel frees, whoever was killed. A child that cannot be woken is ended.

mod children;
mod error;

use std::collections::BTreeMap;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ratoon_snapshot::hold;
use ratoon_vmm_api::{FrozenDisk, NetConfig};

use self::children::{Children, Source, Stored, start_from};
pub use self::error::{ChildError, ForkError};
use crate::admission;
use crate::bridge::AgentFork;
use crate::engine::{Engine, absolute};
use crate::fan_out::fan_out;
use crate::lineage::{self, ROOT};
use crate::renewal::StaleRuntime;
use crate::runtime::RuntimeClient;
use crate::snapshots::{RestoreSpec, SnapshotError};
use crate::vm::cgroup::{self, Limits};
use crate::vm::control::{Control, ControlError};
use crate::vm::freeze::{self, Generation};
use crate::vm::launch::{self, HOSTNAME_WORD, Launch, LaunchError, Machine, Vm};
use crate::vm::record::{Record, VmDir};
use crate::vm::shells::Shells;

/// The most children of one fork.
pub const MAX_CHILDREN: u32 = 10_000;
/// So many processes of children at most are made while the guest is brought to rest.
const MOST_AHEAD: usize = 128;
/// How long the runtime may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a child may take to start when there is no deadline.
const START_TIMEOUT: Duration = Duration::from_secs(180);
/// How long a VMM may take to hold its vCPUs, or let them go.
const CONTROL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a child whose connection broke may take to be gone, if it ends.
const END_PATIENCE: Duration = Duration::from_secs(2);

/// Children that are wanted.
#[derive(Debug, Clone, Default)]
pub struct ForkSpec {
    /// How many; 1 to [`MAX_CHILDREN`].
    pub count: u32,
    /// Those that are not awake so long after the call are given up. It returns then, or when the VM
    /// that was forked goes on again, whichever is later.
    pub deadline: Option<Duration>,
    /// Names of their own: as many as children, or none.
    pub names: Vec<String>,
    /// They outlive this process.
    pub detached: bool,
    /// Tap devices of each child, as many as the VM has; not needed for a VM without.
    pub networks: Vec<Vec<NetConfig>>,
    /// What programs in each child read in `/run/ratoon/message`.
    pub message: Option<String>,
    /// How much memory of the host they may take.
    pub limits: Limits,
    /// What is written into each child's record.
    pub labels: BTreeMap<String, String>,
    /// They may call models, each on a branch of its own. Without it they may not.
    pub agent: Option<Arc<AgentFork>>,
    /// The id of the VM whose children those of a stored snapshot are, if they are any's.
    pub parent: Option<String>,
}

impl ForkSpec {
    /// So many, without a deadline, ending with this process.
    pub fn new(count: u32) -> Self {
        Self {
            count,
            ..Self::default()
        }
    }
}

/// What came of a fork.
#[derive(Debug)]
pub struct Forked {
    /// What the VM and its children call the generation that they go on from.
    pub generation: String,
    /// How long no vCPU of the VM ran; zero for a stored snapshot.
    pub pause: Duration,
    /// From the call until all processes of the guest were stopped, and the guest slept.
    pub stopped: Duration,
    /// One for each child that was asked for, by its index. Dropped, a child is ended, unless it is
    /// detached.
    pub children: Vec<Result<Vm, ChildError>>,
    /// Children of a snapshot have that one's runtime still: why, of one of them. They run.
    pub stale_runtime: Option<StaleRuntime>,
}

/// Lets a paused VM run as long as this lives: its runtime has to answer.
struct Unpaused(Option<Control>);

impl Unpaused {
    fn of(dir: &VmDir) -> Result<Self, ControlError> {
        let control = Control::new(dir.control_socket(), CONTROL_TIMEOUT);
        let is_paused = control.status()?.state == ratoon_vmm_api::VmState::Paused;
        if is_paused {
            control.resume()?;
        }
        Ok(Self(is_paused.then_some(control)))
    }
}

impl Drop for Unpaused {
    fn drop(&mut self) {
        if let Some(control) = &self.0 {
            // It has ended: then it does not run either.
            let _ = control.pause();
        }
    }
}

impl Engine {
    /// Forks the running VM in `dir`, which goes on after a short pause. A paused one runs for as long as it
    /// takes its runtime to stop all processes. `cancel` becoming readable ends the wait for children.
    ///
    /// # Errors
    /// [`ForkError`]: there is no child then. What becomes of each child is in [`Forked::children`].
    pub fn fork(
        &self,
        dir: &VmDir,
        spec: &ForkSpec,
        cancel: Option<BorrowedFd<'_>>,
    ) -> Result<Forked, ForkError> {
        let begun = Instant::now();
        let record = self.forkable(dir, spec)?;
        let _unpaused = Unpaused::of(dir)?;
        let mut client = RuntimeClient::connect(&dir.vsock_socket(), CONNECT_TIMEOUT)?;
        self.fork_over(dir, record, &mut client, spec, begun, cancel)
    }

    /// As [`Engine::fork`], of a VM whose runtime's client the caller has, which saves a connection.
    ///
    /// # Errors
    /// See there.
    pub fn fork_with(
        &self,
        dir: &VmDir,
        client: &mut RuntimeClient,
        spec: &ForkSpec,
        cancel: Option<BorrowedFd<'_>>,
    ) -> Result<Forked, ForkError> {
        let begun = Instant::now();
        let record = self.forkable(dir, spec)?;
        self.fork_over(dir, record, client, spec, begun, cancel)
    }

    /// Starts children of a stored snapshot: as many restores, side by side.
    ///
    /// # Errors
    /// See [`Engine::fork`].
    pub fn fork_snapshot(
        &self,
        snapshot: &str,
        spec: &ForkSpec,
        cancel: Option<BorrowedFd<'_>>,
    ) -> Result<Forked, ForkError> {
        let begun = Instant::now();
        check_numbers(spec)?;
        let store = self.snapshots().map_err(SnapshotError::from)?;
        let snapshot = store.get(snapshot).map_err(SnapshotError::from)?;
        let restore = RestoreSpec {
            detached: spec.detached,
            timeout: START_TIMEOUT,
            ..RestoreSpec::default()
        };
        let (_, plan) = self.plan_restore(&store, &snapshot, &restore)?;
        let generation = snapshot.id.to_string();
        let control_port = plan.generation.as_ref().and_then(|from| from.control_port);
        let stale_runtime = Arc::default();
        let source = Source {
            plan,
            parent: spec.parent.clone(),
            group: None,
            family: None,
            layers: None,
            control_port,
            snapshot: Some(Stored {
                engine: self.clone(),
                store,
                snapshot,
                stale_runtime: Arc::clone(&stale_runtime),
            }),
        };
        let children = self.prepare(source, &generation, spec)?;
        let children = self.start_all(children, spec, begun, cancel)?;
        Ok(Forked {
            generation,
            pause: Duration::ZERO,
            stopped: Duration::ZERO,
            children,
            stale_runtime: stale_runtime
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
        })
    }

    fn forkable(&self, dir: &VmDir, spec: &ForkSpec) -> Result<Record, ForkError> {
        check_numbers(spec)?;
        let record = dir.read_record()?;
        let devices = record.config.networks.len();
        check_networks(devices, spec)?;
        admission::children(spec.count, record.config.memory_mib)?;
        Ok(record)
    }

    fn fork_over(
        &self,
        dir: &VmDir,
        record: Record,
        client: &mut RuntimeClient,
        spec: &ForkSpec,
        begun: Instant,
        cancel: Option<BorrowedFd<'_>>,
    ) -> Result<Forked, ForkError> {
        let id = freeze::machine_id()?;
        let layers = dir.hold_layers().map_err(|source| ForkError::System {
            what: "a lock on the VM's layers",
            source,
        })?;
        let mut plan = self.plan_relative(&record, spec.detached)?;
        // Their processes and records are made while the guest is brought to rest.
        let shells = plan.shells.get_or_insert_with(|| Shells::none(&plan.vmm));
        let class = (plan.machine.cpus, plan.machine.memory_mib);
        shells.ahead(class, (spec.count as usize).min(MOST_AHEAD));
        let source = Source {
            plan,
            parent: Some(record.id.clone()),
            group: record.group.clone(),
            family: None,
            layers: Some(layers),
            snapshot: None,
            control_port: Some(client.host_port()),
        };
        let (pause, stopped, children) = std::thread::scope(|scope| {
            let prepare = || self.prepare(source, &id, spec);
            let preparing = std::thread::Builder::new()
                .spawn_scoped(scope, prepare)
                .map_err(|source| ForkError::System {
                    what: "a thread to make children's records",
                    source,
                })?;
            // A VM that has gone meanwhile has no use for it.
            let note = |disks: &[FrozenDisk]| drop(self.went_on(dir, disks));
            freeze::freeze_and(dir, client, &id, note, |generation, before| {
                let pause = generation.pause;
                let stopped = generation.at_rest.saturating_duration_since(begun);
                let mut children = joined(preparing)?;
                // Others may have been at work on it before it was ours alone.
                let now = dir.read_record()?;
                if now != record {
                    children.replan(&self.plan_relative(&now, spec.detached)?);
                }
                children.go_on_from(start_from(dir, &now, &id, generation), &before);
                drop(before);
                let children = self.start_all(children, spec, begun, cancel)?;
                Ok::<_, ForkError>((pause, stopped, children))
            })?
        })?;
        Ok(Forked {
            generation: id,
            pause,
            stopped,
            children,
            stale_runtime: None,
        })
    }

    /// How a VM is started from a generation that lies in memory, whose disk layers are in `dir`.
    pub(crate) fn plan_from(
        &self,
        dir: &VmDir,
        record: &Record,
        id: &str,
        generation: Generation,
    ) -> Result<Launch, ForkError> {
        Ok(Launch {
            generation: Some(Arc::new(start_from(dir, record, id, generation))),
            ..self.plan_relative(record, true)?
        })
    }

    /// How a relative of a VM is started, all but its generation.
    fn plan_relative(&self, record: &Record, detached: bool) -> Result<Launch, ForkError> {
        let config = &record.config;
        let mut keep_open = Vec::new();
        if let Some(image) = &record.image {
            keep_open.push(OwnedFd::from(
                self.images()?.get(&image.digest)?.open_locked()?,
            ));
        }
        if let Some(folder) = &record.restored_from {
            let held = hold(folder).map_err(SnapshotError::from)?;
            keep_open.push(held.into());
        }
        let root = config.disks.iter().find(|disk| disk.id == ROOT);
        let layers = root.map_or(&[][..], |root| &root.frozen);
        let held = lineage::hold_layers(layers, record.restored_from.as_deref());
        keep_open.extend(held.map_err(SnapshotError::from)?);
        let words = config.kernel_args.split_whitespace();
        // Its name is its own.
        let words: Vec<&str> = words
            .filter(|word| !word.starts_with(HOSTNAME_WORD))
            .collect();
        Ok(Launch {
            vmm: absolute(&self.programs().vmm)?,
            name: None,
            image: record.image.clone(),
            detached,
            boot_timeout: START_TIMEOUT,
            keep_open: keep_open.into(),
            machine: Machine {
                cpus: config.vcpus,
                memory_mib: config.memory_mib,
                kernel: config.kernel.clone(),
                kernel_args: words.join(" "),
                initramfs: config.initramfs.clone().unwrap_or_default(),
                root_disk: root.map(|disk| disk.path.clone()).unwrap_or_default(),
                networks: Vec::new(),
            },
            runtime: record.runtime.clone(),
            generation: None,
            pager: None,
            parent: None,
            labels: BTreeMap::new(),
            shells: self.shells().cloned(),
            family: None,
        })
    }

    /// Makes children's records: all or none.
    fn prepare(
        &self,
        mut source: Source,
        generation: &str,
        spec: &ForkSpec,
    ) -> Result<Children, ForkError> {
        let store = self.store().root();
        source.family = cgroup::family(store, source.group.as_ref(), generation, spec.limits)
            .map_err(LaunchError::from)?;
        let launches: Vec<_> = (0..spec.count)
            .map(|index| source.launch(generation, spec, index))
            .collect();
        let dirs = launch::create(self.store(), &launches).inspect_err(|_| {
            if let Some(family) = &source.family {
                cgroup::remove_empty(family);
            }
        })?;
        Ok(Children {
            store: self.store().clone(),
            launches,
            begun: dirs.iter().map(|_| AtomicBool::new(false)).collect(),
            dirs,
            generation: generation.to_owned(),
            message: spec.message.clone(),
            agent: spec.agent.clone(),
            snapshot: source.snapshot,
            _layers: source.layers,
            before: Mutex::default(),
        })
    }

    fn start_all(
        &self,
        children: Children,
        spec: &ForkSpec,
        begun: Instant,
        cancel: Option<BorrowedFd<'_>>,
    ) -> Result<Vec<Result<Vm, ChildError>>, ForkError> {
        let late = |after: Duration| Err(ChildError::Late(after));
        let deadline = spec.deadline.map(|after| begun + after);
        if let Some(after) = spec.deadline
            && deadline.is_some_and(|end| end <= Instant::now())
        {
            return Ok((0..spec.count).map(|_| late(after)).collect());
        }
        let done = fan_out(spec.count as usize, children, deadline, cancel);
        if let Some(shells) = self.shells() {
            shells.refill();
        }
        let done = done.map_err(|source| ForkError::System {
            what: "a thread to start children",
            source,
        })?;
        let result = |result: Option<_>| match (result, spec.deadline) {
            (Some(result), _) => result,
            (None, Some(after)) if deadline.is_some_and(|end| end <= Instant::now()) => late(after),
            (None, _) => Err(ChildError::Cancelled),
        };
        Ok(done.into_iter().map(result).collect())
    }
}

fn joined<T>(thread: std::thread::ScopedJoinHandle<'_, T>) -> T {
    thread
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Before anything is frozen for it.
fn check_numbers(spec: &ForkSpec) -> Result<(), ForkError> {
    admission::count(spec.count, MAX_CHILDREN).map_err(ForkError::Count)?;
    match spec.names.len() {
        names if names > 0 && names != spec.count as usize => Err(ForkError::Names {
            names,
            count: spec.count,
        }),
        _ => Ok(()),
    }
}

fn check_networks(devices: usize, spec: &ForkSpec) -> Result<(), ForkError> {
    let given = &spec.networks;
    let fits = match given.is_empty() {
        true => devices == 0,
        false => {
            given.len() == spec.count as usize && given.iter().all(|taps| taps.len() == devices)
        }
    };
    match fits {
        true => Ok(()),
        false => Err(ForkError::Networks {
            devices,
            count: spec.count,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dirs::Dirs;
    use crate::engine::Programs;
    use crate::vm::record::tests::config;

    #[test]
    fn numbers_that_do_not_fit_are_refused_before_anything_is_frozen() {
        let temp = tempfile::tempdir().unwrap();
        let programs = Programs {
            vmm: "/none".into(),
            runtime: "/none".into(),
            pager: "/none".into(),
            bridge: "/none".into(),
            agent: "/none".into(),
        };
        let engine = Engine::new(Dirs::new(temp.path().join("s"), temp.path()), programs);
        let made = engine.store().create(Some("box"), |dir| {
            Record::new(config(&dir.id()), None, None)
        });
        // Nobody serves its sockets: whatever asked its VMM would fail by that.
        let dir = made.unwrap();
        let spec = ForkSpec {
            names: vec!["one".into(), "two".into()],
            ..ForkSpec::new(3)
        };
        for refused in [
            engine.fork(&dir, &spec, None).unwrap_err(),
            engine.fork_snapshot("none", &spec, None).unwrap_err(),
        ] {
            let is_refused = matches!(refused, ForkError::Names { names: 2, count: 3 });
            assert!(is_refused, "{refused}");
        }
        let refused = engine.fork(&dir, &ForkSpec::new(0), None).unwrap_err();
        assert!(matches!(refused, ForkError::Count(0)), "{refused}");
    }
}
