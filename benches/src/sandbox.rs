//! Machines as users have them: started, frozen and restored by the engine, with a state directory
//! that is gone at the end. How it fails: with the engine's errors.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use ratoon_engine::dirs::Dirs;
use ratoon_engine::runtime::{CallIo, RuntimeClient};
use ratoon_engine::snapshot::Quiet;
use ratoon_engine::snapshots::{Keep, RestoreSpec};
use ratoon_engine::vm::control::Control;
use ratoon_engine::vm::freeze::{self, Child, Waking};
use ratoon_engine::vm::launch::Vm;
use ratoon_engine::{Engine, RunSpec};
use ratoon_protocol::{Call, CodeEnd, CodeRun, CodeStatus, FreezeParams};
use ratoon_vmm_api::MetricsReply;
use tempfile::TempDir;

use crate::host;
use crate::machine::{Parts, go_on};
use crate::scenario::exec;

/// How long a guest may take for anything.
const PATIENCE: Duration = Duration::from_secs(240);

/// An engine of the harness's own, with the user's images.
pub struct Sandboxes {
    engine: Engine,
    image: String,
    state: Arc<TempDir>,
}

impl Sandboxes {
    /// An engine over a new state directory.
    ///
    /// # Errors
    /// When that cannot be made.
    pub fn new(parts: &Parts) -> Result<Self> {
        let state = tempfile::Builder::new()
            .prefix("ratoon-bench-")
            .tempdir()
            .context("a directory for the engine")?;
        let dirs = Dirs::new(state.path(), &parts.cache);
        Ok(Self {
            engine: Engine::new(dirs, parts.programs.clone()),
            image: parts.image.clone(),
            state: Arc::new(state),
        })
    }

    /// The same state with an engine of its own that keeps so many shells.
    ///
    /// # Errors
    /// When their processes cannot be made.
    pub fn beside(&self, memory_mib: u64, shells: usize) -> Result<Self> {
        let dirs = Dirs::new(self.state.path(), self.engine.dirs().cache());
        let same = Self {
            engine: Engine::new(dirs, self.engine.programs().clone()),
            image: self.image.clone(),
            state: Arc::clone(&self.state),
        };
        same.with_shells(memory_mib, shells)
    }

    /// With so many shells ready for machines of one vCPU and so much memory.
    ///
    /// # Errors
    /// When their processes cannot be made.
    pub fn with_shells(self, memory_mib: u64, count: usize) -> Result<Self> {
        let engine = self.engine.with_shells([((1, memory_mib), count)].into())?;
        Ok(Self { engine, ..self })
    }

    /// The engine.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// A machine that has booted and whose Python has run a cell.
    ///
    /// # Errors
    /// When the guest does not come up.
    pub fn boot(&self, memory_mib: u64) -> Result<(Vm, RuntimeClient)> {
        let spec = RunSpec {
            memory_mib,
            cold: true,
            ..RunSpec::new(&self.image)
        };
        let mut vm = self.engine.start(&spec, None)?.vm;
        let mut client = vm.runtime()?;
        warm_up(&mut client)?;
        Ok((vm, client))
    }

    /// Takes a snapshot of it, its memory plain or compressed; how long it stood still for that.
    ///
    /// # Errors
    /// The engine's.
    pub fn snapshot(&self, vm: &Vm, name: &str, compressed: bool) -> Result<Duration> {
        let keep = Keep {
            name: Some(name),
            compressed,
            ..Keep::default()
        };
        Ok(self.engine.snapshot(vm.dir(), keep, &Quiet)?.pause)
    }

    /// A woken machine from a snapshot.
    ///
    /// # Errors
    /// The engine's.
    pub fn restore(&self, name: &str) -> Result<(Vm, RuntimeClient)> {
        let spec = RestoreSpec {
            snapshot: name.into(),
            timeout: PATIENCE,
            ..RestoreSpec::default()
        };
        let mut vm = self.engine.restore(&spec, None)?.vm;
        let client = vm.runtime()?;
        Ok((vm, client))
    }
}

/// What is booted once and restored from then on: a boot takes long where guest kernels are emulated.
#[derive(Default)]
pub struct WarmMachines(Mutex<BTreeMap<u64, Arc<Warm>>>);

/// A machine with Debian and a warm Python, and plain snapshot of it.
pub struct Warm {
    /// Dropped before its folder is.
    original: Mutex<Option<(Vm, RuntimeClient)>>,
    /// The engine that has the snapshot [`Warm::SNAPSHOT`].
    pub sandboxes: Sandboxes,
    /// How long it stood still for that: its first freeze.
    pub first_pause: Duration,
}

/// A machine that has booted and was never frozen.
struct Booted {
    /// Dropped before its folder is.
    vm: Vm,
    client: RuntimeClient,
    sandboxes: Sandboxes,
}

impl Booted {
    /// Its first freeze: nothing else is to be going on, since its pause is told.
    fn freeze(self) -> Result<Warm> {
        let first_pause = self.sandboxes.snapshot(&self.vm, Warm::SNAPSHOT, false)?;
        Ok(Warm {
            sandboxes: self.sandboxes,
            first_pause,
            original: Mutex::new(Some((self.vm, self.client))),
        })
    }
}

impl Warm {
    /// The snapshot's name.
    pub const SNAPSHOT: &str = "bench";

    /// Boots it; [`Booted::freeze`] makes the snapshot.
    fn boot(parts: &Parts, memory_mib: u64) -> Result<Booted> {
        let sandboxes = Sandboxes::new(parts)?;
        let (vm, client) = sandboxes.boot(memory_mib)?;
        Ok(Booted {
            vm,
            client,
            sandboxes,
        })
    }

    /// The machine that the snapshot was taken of, which goes on; or, when somebody had it, one restored.
    ///
    /// # Errors
    /// The engine's.
    pub fn original(&self) -> Result<(Vm, RuntimeClient)> {
        let kept = self.original.lock().unwrap_or_else(PoisonError::into_inner);
        match { kept }.take() {
            Some(original) => Ok(original),
            None => self.sandboxes.restore(Self::SNAPSHOT),
        }
    }
}

impl WarmMachines {
    /// The one of this size; made when it is asked for first.
    ///
    /// # Errors
    /// When its guest does not come up.
    pub fn of(&self, parts: &Parts, memory_mib: u64) -> Result<Arc<Warm>> {
        let mut made = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(warm) = made.get(&memory_mib) {
            return Ok(Arc::clone(warm));
        }
        let warm = Arc::new(Warm::boot(parts, memory_mib)?.freeze()?);
        made.insert(memory_mib, Arc::clone(&warm));
        Ok(warm)
    }

    /// Makes those of these sizes, as many at a time as the host has processors: a boot takes one. They are frozen
    /// one after the other, while nothing else goes on. What fails is left out.
    pub fn make(&self, parts: &Parts, sizes: &BTreeSet<u64>) {
        let processors = host::processors();
        let sizes: Vec<u64> = sizes.iter().copied().collect();
        for some in sizes.chunks(processors) {
            if go_on().is_err() {
                return;
            }
            let booted: Vec<_> = std::thread::scope(|scope| {
                let boots: Vec<_> = some
                    .iter()
                    .map(|&mib| (mib, scope.spawn(move || Warm::boot(parts, mib))))
                    .collect();
                let ends = boots.into_iter();
                ends.map(|(mib, boot)| (mib, boot.join())).collect()
            });
            for (mib, booted) in booted {
                let booted = booted.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                if let Ok(warm) = booted.and_then(Booted::freeze) {
                    let mut made = self.0.lock().unwrap_or_else(PoisonError::into_inner);
                    made.insert(mib, Arc::new(warm));
                }
            }
        }
    }
}

impl std::fmt::Debug for WarmMachines {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WarmMachines").finish_non_exhaustive()
    }
}

/// Runs what later measurements run, in any system's machine.
///
/// # Errors
/// When a command or cell fails.
pub fn warm_up(client: &mut RuntimeClient) -> Result<()> {
    exec(client, &["python3", "-c", "import json"], &mut io::sink())?;
    exec(client, &["true"], &mut io::sink())?;
    cell(client, "import json, time")?;
    Ok(())
}

/// Who a machine is that was not made by the engine: another name each time, as a child gets one.
///
/// # Errors
/// When the system has no random numbers.
pub fn child() -> Result<Waking> {
    let mut hostname = freeze::machine_id()?;
    hostname.truncate(12);
    Ok(Waking {
        id: "bench".into(),
        generation: "bench".into(),
        index: None,
        child: Some(Child {
            hostname: Some(hostname),
            ..Child::default()
        }),
        token: None,
    })
}

/// Tells a machine's runtime to stop its processes and expect a wake.
///
/// # Errors
/// When it does not.
pub fn still(client: &mut RuntimeClient) -> Result<()> {
    let still = FreezeParams {
        processes: true,
        file_systems: false,
        ..FreezeParams::default()
    };
    client.call::<()>(&Call::Freeze(still), "stopped its processes", PATIENCE)?;
    client.call::<()>(&Call::ExpectWake, "expected its wake", PATIENCE)?;
    Ok(())
}

/// What a machine's VMM has counted.
///
/// # Errors
/// When it does not answer.
pub fn metrics(vm: &Vm) -> Result<MetricsReply> {
    Ok(Control::new(vm.dir().control_socket(), PATIENCE).metrics()?)
}

/// The process of a machine's VMM.
///
/// # Errors
/// When its record has none.
pub fn pid(vm: &Vm) -> Result<u32> {
    let vmm = vm
        .record()
        .vmm
        .as_ref()
        .context("the record has no process of the VMM")?;
    Ok(u32::try_from(vmm.pid)?)
}

/// Runs a cell in the default Python context; what it printed.
///
/// # Errors
/// When it fails.
pub fn cell(client: &mut RuntimeClient, code: &str) -> Result<String> {
    let mut printed = Vec::new();
    let params = CodeRun {
        code: code.into(),
        ..CodeRun::default()
    };
    let mut errors = Vec::new();
    let end: CodeEnd = client.run(
        &Call::CodeRun(params),
        &mut CallIo {
            stdin: None,
            stdout: &mut printed,
            stderr: &mut errors,
            data: &mut io::sink(),
            events: &mut |_| {},
            ended: &mut |_| {},
        },
    )?;
    anyhow::ensure!(
        end.status == CodeStatus::Ok,
        "a cell ended with {end:?}: {}",
        String::from_utf8_lossy(&errors)
    );
    Ok(String::from_utf8(printed)?)
}
