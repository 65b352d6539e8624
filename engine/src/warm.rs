//! Warm starts: a VM of an image that was booted once starts from its generation ever after.
//!
//! The generation is taken from the first VM of its kind, after its boot and before its user's first
//! command; it lies in the cache under a name made of all that went into it. Any trouble with it ends
//! in a boot: warm starts are a matter of time, never of whether a VM starts.
//!
//! ```text
//!   start: no generation -> boot -> make    (the first run of a kind; never in place of another)
//!   Engine::warming      -> boot -> the caller's own commands -> Warming::keep   (takes the place)
//! ```

use std::os::fd::BorrowedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use ratoon_protocol::{Call, CodeContext, CodeName, CodeStart, ExecParams, Language};
use ratoon_snapshot::{Digest, Progress, Quiet, Snapshot, Store};

use crate::engine::{Engine, RunSpec, StartError, Started, image_command};
use crate::image::Image;
use crate::runtime::{ExecIo, RuntimeClient, RuntimeError};
use crate::snapshots::{self, Keep, RestoreSpec, SnapshotError};
use crate::vm::launch::{Launch, LaunchError, Vm, launch};

/// So many are kept; those not used for the longest time go first.
const MOST: usize = 8;
/// So many bytes of disk they may take together; the one used last is kept whatever it takes.
const MOST_BYTES: u64 = 8 << 30;
/// One without a name is being made, or was replaced while a VM ran from it: after so long it is
/// the latter.
const NAMELESS: Duration = Duration::from_secs(600);
/// How long an interpreter may take to start.
const INTERPRETER_TIMEOUT: Duration = Duration::from_secs(120);

/// A warm generation in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WarmGeneration {
    /// The digest of its image.
    pub image_digest: String,
    /// Virtual CPUs of the VMs that start from it.
    pub cpus: u32,
    /// Their memory in MiB.
    pub memory_mib: u64,
    /// What it takes on the disk, in bytes.
    pub disk_bytes: u64,
    /// When a VM last started from it.
    pub used: SystemTime,
    id: Digest,
}

/// Why a warm generation was not made. Nothing of it is left, and the one that was there is.
#[derive(Debug, thiserror::Error)]
pub enum WarmError {
    /// The VM does not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The generation cannot be written.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The runtime in the guest.
    #[error("the runtime in the VM")]
    Runtime(#[from] RuntimeError),
    /// VMs so wanted always boot.
    #[error("machines with networks or kernel arguments of their own always boot")]
    AlwaysBoots,
}

impl From<LaunchError> for WarmError {
    fn from(error: LaunchError) -> Self {
        Self::Start(error.into())
    }
}

impl From<ratoon_snapshot::Error> for WarmError {
    fn from(error: ratoon_snapshot::Error) -> Self {
        Self::Snapshot(error.into())
    }
}

/// A VM that is being made warm: booted, with nothing run in it yet but what the caller runs.
/// Dropped, it ends, and leaves nothing.
#[derive(Debug)]
pub struct Warming {
    warm: Warm,
    /// The VM, and what its image says about commands.
    pub started: Started,
}

impl Warming {
    /// Makes it the generation from which VMs of its kind start from now on, in place of one that
    /// was there, and ends the VM. `client` is what [`Vm::runtime`] gave.
    ///
    /// An interpreter of Python has started in it, if the image has one: `code` then forks from
    /// that.
    ///
    /// # Errors
    /// [`WarmError`].
    pub fn keep(
        self,
        engine: &Engine,
        mut client: RuntimeClient,
        progress: &dyn Progress,
    ) -> Result<WarmGeneration, WarmError> {
        let vm = self.started.vm;
        start_python(&mut client)?;
        let dir = vm.dir().clone();
        let store = &self.warm.store;
        let nameless = Keep::default();
        let taken = engine.snapshot_into(store, &dir, &mut client, nameless, progress)?;
        let id = taken.snapshot.id.to_string();
        let old = store.get(&self.warm.name).ok();
        let kept = store.set_name(&id, &self.warm.name, true)?;
        if let Some(old) = old.filter(|old| old.id != kept.id) {
            // A VM may run from it: then it goes later.
            let _ = store.remove(&old.id.to_string());
        }
        trim(store);
        drop(client);
        vm.end().map_err(LaunchError::from)?;
        Ok(describe(&kept)?)
    }
}

/// Has the runtime start the interpreter that contexts are forked from.
fn start_python(client: &mut RuntimeClient) -> Result<(), RuntimeError> {
    let start = Call::CodeStart(CodeStart {
        language: Language::Python,
        ..CodeStart::default()
    });
    match client.call::<CodeContext>(&start, "started Python", INTERPRETER_TIMEOUT) {
        Ok(context) => {
            let stop = Call::CodeStop(CodeName {
                context: context.context,
            });
            client.call::<()>(&stop, "stopped a context", INTERPRETER_TIMEOUT)
        }
        // The image has none that works.
        Err(RuntimeError::Call(_)) => Ok(()),
        Err(error) => Err(error),
    }
}

fn describe(snapshot: &Snapshot) -> Result<WarmGeneration, ratoon_snapshot::Error> {
    let about = &snapshot.manifest.about;
    Ok(WarmGeneration {
        image_digest: snapshots::image_digest_of(snapshot)
            .unwrap_or_default()
            .to_owned(),
        cpus: about.vcpus,
        memory_mib: about.memory_mib,
        disk_bytes: snapshot.sizes()?.disk_bytes,
        used: used(snapshot),
        id: snapshot.id,
    })
}

/// When a VM last started from it.
fn used(snapshot: &Snapshot) -> SystemTime {
    std::fs::metadata(&snapshot.folder)
        .and_then(|found| found.modified())
        .unwrap_or(SystemTime::UNIX_EPOCH)
}

fn store(engine: &Engine) -> Result<Store, ratoon_snapshot::Error> {
    Store::open(&engine.dirs().cache().join("warm"))
}

impl Engine {
    /// Boots a VM of this kind to make its warm generation from; see [`Warming::keep`].
    ///
    /// # Errors
    /// [`WarmError`]; nothing of the VM is left.
    pub fn warming(
        &self,
        spec: &RunSpec,
        cancel: Option<BorrowedFd<'_>>,
    ) -> Result<Warming, WarmError> {
        let (image, mut plan) = self.plan(spec)?;
        let warm = Warm::of(self, spec, &image, &plan).ok_or(WarmError::AlwaysBoots)?;
        plan.runtime = self.own_runtime();
        let vm = launch(self.store(), &plan, cancel)?;
        Ok(Warming {
            warm,
            started: Started {
                vm,
                command: image_command(&image.config.container),
                made_warm: false,
                stale_runtime: None,
            },
        })
    }

    /// The warm generations in the cache.
    ///
    /// # Errors
    /// When the cache cannot be read.
    pub fn warm_generations(&self) -> Result<Vec<WarmGeneration>, ratoon_snapshot::Error> {
        let listing = store(self)?.list()?;
        let named = listing.snapshots.iter().filter(|it| !it.names.is_empty());
        named.map(describe).collect()
    }

    /// Removes an image's warm generations, but those that a VM runs from.
    ///
    /// # Errors
    /// When the cache cannot be read or changed.
    pub fn forget_warm(&self, image_digest: &str) -> Result<(), ratoon_snapshot::Error> {
        let store = store(self)?;
        for warm in self.warm_generations()? {
            if warm.image_digest != image_digest {
                continue;
            }
            match store.remove(&warm.id.to_string()) {
                Err(ratoon_snapshot::Error::InUse { .. }) => {}
                other => drop(other?),
            }
        }
        Ok(())
    }
}

/// Where the generation of one kind of VM is.
#[derive(Debug)]
pub(crate) struct Warm {
    store: Store,
    name: String,
    /// It is there, and no VM has started from it. That may be the host's fault: a boot shows it.
    failed: Option<Digest>,
}

impl Warm {
    /// The place for VMs of `spec`; `None` when they always boot.
    pub(crate) fn of(
        engine: &Engine,
        spec: &RunSpec,
        image: &Image,
        launch: &Launch,
    ) -> Option<Self> {
        let is_plain = spec.networks.is_empty() && spec.kernel_args.is_empty();
        if spec.cold || !is_plain {
            return None;
        }
        let machine = &launch.machine;
        let words = [
            env!("CARGO_PKG_VERSION").to_owned(),
            image.digest().to_owned(),
            identity(&machine.kernel)?,
            identity(&machine.initramfs)?,
            identity(&launch.vmm)?,
            machine.cpus.to_string(),
            machine.memory_mib.to_string(),
        ];
        let id = Digest::of(words.join("\0").as_bytes()).to_string();
        Some(Self {
            store: store(engine).ok()?,
            name: format!("warm-{}", id.get(..32)?),
            failed: None,
        })
    }

    /// The generation, if there is one.
    pub(crate) fn find(&self) -> Option<Snapshot> {
        let found = self.store.get(&self.name).ok()?;
        // When it was last used.
        if let Ok(file) = std::fs::File::open(&found.folder) {
            let _ = file.set_modified(SystemTime::now());
        }
        Some(found)
    }

    /// Starts a VM from it; `None`: boot one.
    pub(crate) fn start(
        &mut self,
        engine: &Engine,
        spec: &RunSpec,
        cancel: Option<BorrowedFd<'_>>,
    ) -> Option<Result<Started, StartError>> {
        let snapshot = self.find()?;
        let restore = RestoreSpec {
            snapshot: self.name.clone(),
            name: spec.name.clone(),
            networks: Vec::new(),
            detached: spec.detached,
            timeout: spec.boot_timeout,
            trusted: Vec::new(),
            // It is the same: the generation's name says so.
            keep_runtime: true,
        };
        match engine.restore_from(&self.store, &snapshot, &restore, cancel) {
            Ok(started) => Some(Ok(started)),
            // These a boot would run into as well.
            Err(SnapshotError::Start(
                error @ StartError::Launch(LaunchError::Cancelled | LaunchError::Store(_)),
            )) => Some(Err(error)),
            Err(error) => {
                tracing::warn!(%error, "warm start of {}: it is booted", spec.image);
                self.failed = Some(snapshot.id);
                None
            }
        }
    }

    /// Makes it from a VM that has just booted, in place of one that has failed.
    pub(crate) fn make(&self, engine: &Engine, vm: &mut Vm) -> Made {
        if let Some(failed) = self.failed {
            let _ = self.store.remove(&failed.to_string());
        }
        let dir = vm.dir().clone();
        let Ok(mut client) = vm.runtime() else {
            return Made::Lost;
        };
        // The first command costs more than later ones: it is had before.
        let params = ExecParams {
            argv: vec!["true".into()],
            ..ExecParams::default()
        };
        let io = ExecIo {
            stdin: None,
            stdout: &mut std::io::sink(),
            stderr: &mut std::io::sink(),
        };
        // An image may have no `true`.
        let _ = client.exec(&params, io);
        let keep = Keep {
            name: Some(&self.name),
            ..Keep::default()
        };
        let taken = engine.snapshot_into(&self.store, &dir, &mut client, keep, &Quiet);
        let made = match taken {
            Ok(_) => Made::Kept,
            Err(SnapshotError::Freeze(error)) => {
                tracing::warn!(%error, "no warm start");
                Made::Lost
            }
            // Another was faster, or the disk is full: the VM itself goes on.
            Err(error) => {
                tracing::warn!(%error, "no warm start");
                Made::Nothing
            }
        };
        vm.keep_runtime(client);
        trim(&self.store);
        made
    }
}

/// What became of the making of a warm generation.
pub(crate) enum Made {
    /// It is there.
    Kept,
    /// It is not; the VM goes on.
    Nothing,
    /// The VM may not be usable any more.
    Lost,
}

/// Removes those beyond [`MOST`] and [`MOST_BYTES`], and those that were replaced.
fn trim(store: &Store) {
    let Ok(listing) = store.list() else {
        return;
    };
    let mut all: Vec<_> = listing.snapshots.iter().collect();
    all.sort_by_key(|snapshot| (std::cmp::Reverse(used(snapshot)), snapshot.id.to_string()));
    let now = SystemTime::now();
    let sized = all.into_iter().map(|snapshot| {
        let age = now.duration_since(used(snapshot)).unwrap_or_default();
        let is_replaced = snapshot.names.is_empty() && age > NAMELESS;
        let bytes = snapshot.sizes().map_or(0, |sizes| sizes.disk_bytes);
        (snapshot.id, bytes, is_replaced)
    });
    for id in surplus(sized) {
        let _ = store.remove(&id.to_string());
    }
}

/// Which of these have to go; the one used last comes first.
fn surplus<I>(all: impl Iterator<Item = (I, u64, bool)>) -> Vec<I> {
    let (mut count, mut total) = (0, 0_u64);
    let mut surplus = Vec::new();
    for (id, bytes, is_replaced) in all {
        let fits = count < MOST && total.saturating_add(bytes) <= MOST_BYTES;
        if is_replaced || !(fits || count == 0) {
            surplus.push(id);
            continue;
        }
        count += 1;
        total += bytes;
    }
    surplus
}

/// What tells a file from others that were under its name.
fn identity(path: &Path) -> Option<String> {
    let path = path.canonicalize().ok()?;
    let found = std::fs::metadata(&path).ok()?;
    Some(format!(
        "{} {} {} {}",
        path.display(),
        found.len(),
        found.mtime(),
        found.mtime_nsec()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gone(all: &[(char, u64, bool)]) -> String {
        surplus(all.iter().copied()).into_iter().collect()
    }

    #[test]
    fn those_not_used_for_the_longest_time_go_when_there_are_too_many_or_too_much() {
        const GIB: u64 = 1 << 30;
        let ten: Vec<_> = ('a'..='j').map(|name| (name, GIB / 4, false)).collect();
        assert_eq!(gone(&ten), "ij");
        assert_eq!(gone(&[('a', 5 * GIB, false), ('b', 3 * GIB, false)]), "");
        assert_eq!(
            gone(&[
                ('a', 5 * GIB, false),
                ('b', 4 * GIB, false),
                ('c', GIB, false)
            ]),
            "b"
        );
        // The one in use is kept whatever it takes.
        assert_eq!(gone(&[('a', 9 * GIB, false), ('b', 1, false)]), "b");
        assert_eq!(gone(&[('a', GIB, true), ('b', 9 * GIB, false)]), "a");
    }
}
