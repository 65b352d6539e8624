//! Warm starts: a VM of an image that was booted once starts from its generation ever after.
//!
//! The generation is taken from the first VM of its kind, after its boot and before its user's first
//! command; it lies in the cache under a name made of all that went into it. Any trouble with it ends
//! in a boot: warm starts are a matter of time, never of whether a VM starts.

use std::os::fd::BorrowedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::SystemTime;

use ratoon_protocol::ExecParams;
use ratoon_snapshot::{Digest, MemoryKind, Quiet, Snapshot, Store};

use crate::engine::{Engine, RunSpec, StartError, Started};
use crate::image::Image;
use crate::runtime::ExecIo;
use crate::snapshots::{RestoreSpec, SnapshotError};
use crate::vm::launch::{Launch, LaunchError, Vm};

/// So many are kept; those not used for the longest time go first.
const MOST: usize = 8;

/// Where the generation of one kind of VM is.
pub(crate) struct Warm {
    store: Store,
    name: String,
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
            store: Store::open(&engine.dirs().cache().join("warm")).ok()?,
            name: format!("warm-{}", id.get(..32)?),
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
        &self,
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
        };
        match engine.restore_from(&snapshot, &restore, cancel) {
            Ok(started) => Some(Ok(started)),
            // These a boot would run into as well.
            Err(SnapshotError::Start(
                error @ StartError::Launch(LaunchError::Cancelled | LaunchError::Store(_)),
            )) => Some(Err(error)),
            Err(error) => {
                tracing::warn!(%error, "warm start of {}: it is booted", spec.image);
                let _ = self.store.remove(&self.name);
                None
            }
        }
    }

    /// Makes it from a VM that has just booted. False: the VM may not be usable any more.
    pub(crate) fn make(&self, engine: &Engine, vm: &mut Vm) -> bool {
        let dir = vm.dir().clone();
        let record = vm.record().clone();
        let Ok(mut client) = vm.runtime() else {
            return false;
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
        let name = Some(self.name.as_str());
        let taken = engine.snapshot_into(
            &self.store,
            &dir,
            &record,
            &mut client,
            (name, MemoryKind::Plain),
            &Quiet,
        );
        let usable = match taken {
            Ok(_) => true,
            Err(SnapshotError::Freeze(error)) => {
                tracing::warn!(%error, "no warm start");
                false
            }
            // Another was faster, or the disk is full: the VM itself goes on.
            Err(error) => {
                tracing::warn!(%error, "no warm start");
                true
            }
        };
        vm.keep_runtime(client);
        self.trim();
        usable
    }

    /// Removes those beyond [`MOST`].
    fn trim(&self) {
        let Ok(listing) = self.store.list() else {
            return;
        };
        let mut all: Vec<_> = listing
            .snapshots
            .iter()
            .map(|snapshot| {
                let used = std::fs::metadata(&snapshot.folder).and_then(|found| found.modified());
                (used.unwrap_or(SystemTime::UNIX_EPOCH), snapshot.id)
            })
            .collect();
        all.sort();
        let surplus = all.len().saturating_sub(MOST);
        for (_, id) in &all[..surplus] {
            let _ = self.store.remove(&id.to_string());
        }
    }
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
