//! Snapshots of VMs: taken from a running one, and started again.
//!
//! ```text
//!   running VM --freeze--> generation (files) --write, in the background of the VM--> store
//!   store --map, wake--> VM
//! ```
//!
//! A snapshot holds memory, state and what was written to the disk, or what of these is not in the
//! snapshot that it builds on (`lineage.rs`); the image it stands on is named by its digest
//! and has to be there. A VM that cannot be woken is ended: it never runs half-woken.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use ratoon_snapshot::{
    About, ChunkOptions, Progress, PublicKey, Region, SigningKey, Snapshot, Store, hash_file,
};
use ratoon_vmm_api::{FrozenDisk, GenerationConfig, NetConfig};

use crate::engine::{Engine, StartError, Started, absolute, image_command};
use crate::fan_out::is_readable;
use crate::image::{self, Image};
use crate::lineage::{self, Base, Layered, ROOT};
use crate::pager::{self, PagerError};
use crate::renewal::RuntimeRef;
use crate::runtime::{RuntimeClient, RuntimeError};
use crate::vm::freeze::{self, FreezeError, Generation, Waking};
use crate::vm::launch::{
    From as StartFrom, HOSTNAME_WORD, Launch, LaunchError, Machine, Vm, launch,
};
use crate::vm::record::{Ancestor, ImageRef, Record, RecordError, VmDir};
use crate::vm::store::StoreError;
use crate::vm::turns::WAKES;
use crate::{cpu, working_set};

/// How long the runtime may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a VM whose connection broke may take to be gone, if it ends.
const END_PATIENCE: Duration = Duration::from_secs(2);

/// The labels of a snapshot by which its VM is built again.
pub(crate) mod label {
    pub const IMAGE: &str = "ratoon.image";
    pub const IMAGE_DIGEST: &str = "ratoon.image-digest";
    pub const IMAGE_FILE: &str = "ratoon.image-file";
    pub const KERNEL_ARGS: &str = "ratoon.kernel-args";
    pub const CONTROL_PORT: &str = "ratoon.control-port";
    pub const RUNTIME_FILE: &str = "ratoon.runtime-file";
    pub const RUNTIME_VERSION: &str = "ratoon.runtime-version";
}

/// The digest of the image that a snapshot stands on.
pub fn image_digest_of(snapshot: &Snapshot) -> Option<&str> {
    let labels = &snapshot.manifest.about.labels;
    labels.get(label::IMAGE_DIGEST).map(String::as_str)
}

/// The name of the image that a snapshot stands on.
pub fn image_of(snapshot: &Snapshot) -> Option<&str> {
    let labels = &snapshot.manifest.about.labels;
    labels.get(label::IMAGE).map(String::as_str)
}

/// The snapshots in this folder that stand on an image, by name or else id.
pub(crate) fn standing_on(folder: &Path, image: &str) -> Vec<String> {
    let store = folder.is_dir().then(|| Store::open(folder));
    let listing = store.and_then(|store| store.ok()?.list().ok());
    let snapshots = listing.map_or_else(Vec::new, |listing| listing.snapshots);
    let on_it = snapshots
        .into_iter()
        .filter(|it| image_digest_of(it) == Some(image));
    on_it
        .map(|it| it.names.first().cloned().unwrap_or(it.id.to_string()))
        .collect()
}

/// Why a snapshot could not be taken or started.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The store of snapshots.
    #[error(transparent)]
    Store(#[from] ratoon_snapshot::Error),
    /// The freeze itself, or a wake.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// The runtime in the guest.
    #[error("the runtime in the VM")]
    Runtime(#[from] RuntimeError),
    /// The process that fetches its memory.
    #[error(transparent)]
    Pager(#[from] PagerError),
    /// The VM's record.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The snapshot's image.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// The start of its VM.
    #[error(transparent)]
    Start(#[from] StartError),
    /// Its disk's layers.
    #[error("the frozen disk")]
    Disk(#[from] ratoon_devices::block::OpenError),
    /// Its image is not what it was.
    #[error(
        "{}, on which snapshot {id} stands, was written after the snapshot was taken; \
         `ratoon image inspect` checks it: remove it and import it again",
        path.display()
    )]
    ImageChanged {
        /// Which snapshot.
        id: String,
        /// The image's disk.
        path: PathBuf,
    },
    /// It says nothing of its image.
    #[error("snapshot {0} does not say which image it stands on: it was made by another program")]
    NoImage(String),
    /// This host cannot run it.
    #[error("snapshot {id} cannot run here: {why}")]
    Cpu {
        /// Which.
        id: String,
        /// What is missing.
        why: String,
    },
    /// A file of the VM.
    #[error("{}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl std::convert::From<LaunchError> for SnapshotError {
    fn from(error: LaunchError) -> Self {
        Self::Start(error.into())
    }
}

/// How a snapshot is kept.
#[derive(Debug, Clone, Copy, Default)]
pub struct Keep<'k> {
    /// What it is called beside its id.
    pub name: Option<&'k str>,
    /// Who vouches for it.
    pub key: Option<&'k SigningKey>,
    /// Its memory is written whole, in compressed chunks that a pager serves.
    pub compressed: bool,
    /// It stands by itself, whatever snapshots the VM comes from.
    pub whole: bool,
}

/// A snapshot that was taken.
#[derive(Debug)]
pub struct Taken {
    /// It.
    pub snapshot: Snapshot,
    /// How long the VM stood still.
    pub pause: Duration,
}

/// A VM to be started from a snapshot.
#[derive(Debug, Clone, Default)]
pub struct RestoreSpec {
    /// Name or id of the snapshot.
    pub snapshot: String,
    /// The VM's own name.
    pub name: Option<String>,
    /// Tap devices in place of those it had: as many.
    pub networks: Vec<NetConfig>,
    /// It outlives this process.
    pub detached: bool,
    /// How long it may take.
    pub timeout: Duration,
    /// Unless empty, one of these has to have signed it, and every byte is read again to see that
    /// it is what was signed.
    pub trusted: Vec<PublicKey>,
    /// Leave it the snapshot's runtime, even if this host has a newer one.
    pub keep_runtime: bool,
}

/// Work that ends when a descriptor becomes readable.
struct Until<'u>(Option<BorrowedFd<'u>>);

impl Progress for Until<'_> {
    fn cancelled(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let Some(fd) = self.0 else {
            return false;
        };
        let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }
}

/// The regions of guest memory of so many bytes (as ratoon-vmm lays them out).
fn regions(bytes: u64) -> Vec<Region> {
    const HOLE_START: u64 = 3 << 30;
    const HOLE_END: u64 = 4 << 30;
    let low = Region {
        guest_address: 0,
        length: bytes.min(HOLE_START),
    };
    let high = Region {
        guest_address: HOLE_END,
        length: bytes.saturating_sub(HOLE_START),
    };
    [low, high]
        .into_iter()
        .filter(|region| region.length > 0)
        .collect()
}

impl Engine {
    /// The snapshots that users have made.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub fn snapshots(&self) -> Result<Store, ratoon_snapshot::Error> {
        Store::open(&self.dirs().state().join("snapshots"))
    }

    /// Takes a snapshot of the running VM in `dir`; it goes on after a short pause, while the
    /// snapshot is written, its memory as `kind`.
    ///
    /// # Errors
    /// [`SnapshotError`]; the VM goes on, and nothing is left in the store.
    pub fn snapshot(
        &self,
        dir: &VmDir,
        keep: Keep<'_>,
        progress: &dyn Progress,
    ) -> Result<Taken, SnapshotError> {
        let mut client = RuntimeClient::connect(&dir.vsock_socket(), CONNECT_TIMEOUT)?;
        self.snapshot_into(&self.snapshots()?, dir, &mut client, keep, progress)
    }

    /// As [`Engine::snapshot`], of a VM whose runtime's client the caller has.
    pub(crate) fn snapshot_into(
        &self,
        store: &Store,
        dir: &VmDir,
        client: &mut RuntimeClient,
        keep: Keep<'_>,
        progress: &dyn Progress,
    ) -> Result<Taken, SnapshotError> {
        // Until the layers are linked or copied.
        let _layers = dir.hold_layers().map_err(|source| SnapshotError::File {
            path: dir.path().to_owned(),
            source,
        })?;
        let mut record = None;
        let note = |disks: &[FrozenDisk]| record = Some(self.went_on(dir, disks));
        let id = freeze::machine_id()?;
        let generation = freeze::freeze_and(dir, client, &id, note, |generation, _| generation)?;
        let record = record.unwrap_or_else(|| self.went_on(dir, &generation.disks));
        let record = record.map_err(LaunchError::from)?;
        let pause = generation.pause;
        let (memory_layers, disk_layers) = generation.depth(ROOT);
        let taken = Ancestor {
            snapshot: String::new(),
            memory_layers,
            disk_layers,
        };
        let version = client.hello().runtime.as_str();
        let snapshot = write(store, dir, &record, version, generation, keep, progress)?;
        // It has gone, or is another machine by now, that does not come from this snapshot.
        let _ = self.store().update(dir, |now| {
            if now.vmm == record.vmm {
                now.ancestors.push(Ancestor {
                    snapshot: snapshot.id.to_string(),
                    ..taken
                });
            }
        });
        Ok(Taken { snapshot, pause })
    }

    /// Writes down where a VM that was frozen goes on.
    /// Returns its record, which is of this VM and no other as long as the caller keeps freezes and rollbacks off.
    ///
    /// # Errors
    /// When it has gone meanwhile, or its record cannot be written.
    pub(crate) fn went_on(&self, dir: &VmDir, disks: &[FrozenDisk]) -> Result<Record, StoreError> {
        self.store().update(dir, |record| record.goes_on_in(disks))
    }

    /// Starts a VM from a snapshot and wakes it.
    ///
    /// # Errors
    /// [`SnapshotError`]; nothing of the VM is left.
    pub fn restore(
        &self,
        spec: &RestoreSpec,
        cancel: Option<BorrowedFd<'_>>,
    ) -> Result<Started, SnapshotError> {
        let store = self.snapshots()?;
        let snapshot = store.get(&spec.snapshot)?;
        if !spec.trusted.is_empty() {
            snapshot.check_signature(&spec.trusted)?;
            store.verify(&snapshot.id.to_string(), &Until(cancel))?;
        }
        self.restore_from(&store, &snapshot, spec, cancel)
    }

    /// Starts a VM from this snapshot of `store` and wakes it.
    pub(crate) fn restore_from(
        &self,
        store: &Store,
        snapshot: &Snapshot,
        spec: &RestoreSpec,
        cancel: Option<BorrowedFd<'_>>,
    ) -> Result<Started, SnapshotError> {
        let id = snapshot.id.to_string();
        let (image, plan) = self.plan_restore(store, snapshot, spec)?;
        let plan = self.with_pager(store, snapshot, plan)?;
        working_set::read_ahead(snapshot);
        let enough = || cancel.is_some_and(is_readable);
        let turn = WAKES.take(enough).ok_or(LaunchError::Cancelled)?;
        let mut vm = launch(self.store(), &plan, cancel)?;
        if let Some(shells) = self.shells() {
            shells.refill();
        }
        // Why a VM ended says more than that it cannot be talked to.
        if let Err(error) = wake(&mut vm, id) {
            return Err(vm.ended(END_PATIENCE).map_or(error, Into::into));
        }
        drop(turn);
        let stale_runtime = match spec.keep_runtime {
            true => None,
            false => self.renew(&mut vm, &snapshot.manifest.about)?,
        };
        Ok(Started {
            vm,
            command: image_command(&image.config.container),
            made_warm: false,
            stale_runtime,
        })
    }

    /// A connection to the pager of its memory for one VM, if the snapshot's is in chunks.
    pub(crate) fn with_pager(
        &self,
        store: &Store,
        snapshot: &Snapshot,
        plan: Launch,
    ) -> Result<Launch, SnapshotError> {
        let is_paged = plan.generation.as_ref().is_some_and(|it| it.config.paged);
        let chunks = match is_paged {
            true => lineage::memory_layers(store, snapshot)?.1,
            false => None,
        };
        let pager = match chunks {
            None => None,
            Some(folder) => {
                let program = absolute(&self.programs().pager)?;
                let pager = pager::of(&self.dirs().pagers(), &program, &folder)?;
                Some(Arc::new(pager))
            }
        };
        Ok(Launch { pager, ..plan })
    }

    /// How VMs are started from this snapshot of `store`, but for their pager.
    pub(crate) fn plan_restore(
        &self,
        store: &Store,
        snapshot: &Snapshot,
        spec: &RestoreSpec,
    ) -> Result<(Image, Launch), SnapshotError> {
        let about = &snapshot.manifest.about;
        let id = snapshot.id.to_string();
        if let Some(why) = cpu::missing(&about.cpu, &cpu::here()) {
            return Err(SnapshotError::Cpu { id, why });
        }
        let word = |key: &str| about.labels.get(key).cloned();
        let digest = word(label::IMAGE_DIGEST).ok_or_else(|| SnapshotError::NoImage(id.clone()))?;
        let image = self.images()?.get(&digest)?;
        let mut keep_open = vec![
            OwnedFd::from(image.open_locked()?),
            OwnedFd::from(snapshot.hold()?),
        ];
        if let Some((then, now)) = word(label::IMAGE_FILE).zip(file_identity(&image.disk))
            && was_changed(&then, &now)
        {
            let path = image.disk;
            return Err(SnapshotError::ImageChanged { id, path });
        }
        // Checks its hash.
        drop(snapshot.state()?);
        // In place, and only read. Held by name: what they build on stays while the snapshot does.
        let (memory, chunks) = lineage::memory_layers(store, snapshot)?;
        let frozen = store.layer_files(snapshot, ROOT)?;
        // By path: others that have the same layer do not keep it there.
        keep_open.extend(lineage::hold_layers(&frozen, Some(&snapshot.folder))?);
        let ancestor = Ancestor {
            snapshot: id,
            memory_layers: memory.len() + usize::from(chunks.is_some()),
            disk_layers: frozen.len(),
        };
        let plan = Launch {
            vmm: absolute(&self.programs().vmm)?,
            name: spec.name.clone(),
            image: Some(ImageRef {
                name: word(label::IMAGE).unwrap_or_default(),
                digest,
            }),
            detached: spec.detached,
            boot_timeout: spec.timeout,
            keep_open: keep_open.into(),
            machine: Machine {
                cpus: about.vcpus,
                memory_mib: about.memory_mib,
                kernel: self.kernel(None),
                kernel_args: word(label::KERNEL_ARGS).unwrap_or_default(),
                initramfs: PathBuf::from("/"),
                root_disk: image.disk.clone(),
                networks: spec.networks.clone(),
            },
            runtime: RuntimeRef::of(about),
            generation: Some(Arc::new(StartFrom {
                config: GenerationConfig {
                    id: snapshot.id.to_string(),
                    state: snapshot.folder.join("state.bin"),
                    memory,
                    paged: chunks.is_some(),
                    descriptors: false,
                },
                files: Vec::new(),
                frozen,
                freezes: Vec::new(),
                linked_from: None,
                ancestors: vec![ancestor],
                restored_from: Some(snapshot.folder.clone()),
                control_port: word(label::CONTROL_PORT).and_then(|port| port.parse().ok()),
            })),
            pager: None,
            parent: None,
            labels: BTreeMap::new(),
            shells: self.shells().cloned(),
            family: None,
        };
        Ok((image, plan))
    }
}

/// Which file it is, and after a space what of it changes when it is written. The time of its birth
/// tells it from one that got its inode later; a file system that does not know it cannot say.
pub(crate) fn file_identity(path: &Path) -> Option<String> {
    let found = std::fs::metadata(path).ok()?;
    let born = found.created().ok()?.duration_since(UNIX_EPOCH).ok()?;
    Some(format!(
        "{}:{}:{} {}:{}.{:09}",
        found.dev(),
        found.ino(),
        born.as_nanos(),
        found.len(),
        found.mtime(),
        found.mtime_nsec()
    ))
}

/// Whether it is the same file, written since. Another file is judged by its digest alone.
fn was_changed(then: &str, now: &str) -> bool {
    let file = |text: &str| text.split(' ').next().map(str::to_owned);
    file(then) == file(now) && then != now
}

/// Tells a restored VM who it is.
pub(crate) fn wake(vm: &mut Vm, generation: String) -> Result<(), SnapshotError> {
    let mut client = vm.runtime()?;
    let mut waking = Waking::child(vm.record(), &generation);
    // One that goes back in place may have called models; a new one does not yet.
    waking.token = crate::bridge::token_for(vm.dir());
    freeze::wake(&mut client, &waking)?;
    vm.awake().map_err(LaunchError::from)?;
    vm.keep_runtime(client);
    Ok(())
}

fn write(
    store: &Store,
    dir: &VmDir,
    record: &Record,
    runtime_version: &str,
    generation: Generation,
    keep: Keep<'_>,
    progress: &dyn Progress,
) -> Result<Snapshot, SnapshotError> {
    let failed = |path: &std::path::Path| {
        let path = path.to_owned();
        |source| SnapshotError::File { path, source }
    };
    let config = &record.config;
    let mut writer = store.begin()?;
    let base = match keep.whole {
        true => None,
        false => Base::of(store, record, &generation),
    };
    let parts = regions(config.memory_mib << 20);
    let state = generation.state();
    writer.state(
        state
            .map_err(failed(Path::new("the VMM's state")))?
            .as_bytes(),
    )?;
    if let Some(root) = config.disks.iter().find(|disk| disk.id == ROOT) {
        let freezes = generation.freezes(ROOT);
        let frozen = (generation.frozen(ROOT), freezes.as_slice());
        lineage::write_disk(
            &mut writer,
            base.as_ref(),
            frozen,
            &root.path,
            &dir.merged_layer(),
            progress,
        )?;
    }
    let memory = Layered::new(generation.layers);
    let difference = match &base {
        Some(base) if !keep.compressed => base.difference(store, &memory)?,
        _ => None,
    };
    match difference {
        Some((runs, base)) => {
            writer.memory_difference(&parts, &memory, &runs, base, progress)?;
        }
        None if keep.compressed => {
            let (runs, options) = (memory.populated()?, ChunkOptions::default());
            writer.memory_chunks(&parts, &memory, &runs, options, progress)?;
        }
        None => {
            writer.memory_plain(&parts, &memory, &memory.populated()?, progress)?;
        }
    }
    // Started from a snapshot it has that one's kernel, whatever file is here now.
    let kernel = match (&base, &record.restored_from) {
        (Some(base), _) => base.snapshot.manifest.about.kernel,
        (None, Some(_)) => None,
        (None, None) => match File::open(&config.kernel) {
            Ok(kernel) => Some(hash_file(&kernel, &config.kernel, progress)?),
            Err(_) => None,
        },
    };
    let mut labels = BTreeMap::new();
    if let Some(image) = &record.image {
        labels.insert(label::IMAGE.to_owned(), image.name.clone());
        labels.insert(label::IMAGE_DIGEST.to_owned(), image.digest.clone());
    }
    let root = config.disks.iter().find(|disk| disk.id == ROOT);
    if let Some(identity) = root.and_then(|root| file_identity(&root.path)) {
        labels.insert(label::IMAGE_FILE.to_owned(), identity);
    }
    let words = config.kernel_args.split_whitespace();
    // Its name is its own.
    let words: Vec<&str> = words
        .filter(|word| !word.starts_with(HOSTNAME_WORD))
        .collect();
    labels.insert(label::KERNEL_ARGS.to_owned(), words.join(" "));
    if let Some(port) = generation.control_port {
        labels.insert(label::CONTROL_PORT.to_owned(), port.to_string());
    }
    let runtime = record.runtime.as_ref();
    for (key, value) in [
        (label::RUNTIME_FILE, runtime.map_or("", |it| &it.file)),
        (label::RUNTIME_VERSION, runtime_version),
    ] {
        if !value.is_empty() {
            labels.insert(key.to_owned(), value.to_owned());
        }
    }
    let about = About {
        cpu: cpu::here(),
        kernel,
        image: None,
        runtime: runtime.and_then(|runtime| runtime.digest.parse().ok()),
        vcpus: config.vcpus,
        memory_mib: config.memory_mib,
        parent: base.as_ref().map(|base| base.snapshot.id),
        labels,
    };
    Ok(writer.finish(about, keep.name, keep.key)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_was_written_was_changed_and_another_file_was_not() {
        let folder = tempfile::tempdir().unwrap();
        let (one, other) = (folder.path().join("one"), folder.path().join("other"));
        std::fs::write(&one, "1").unwrap();
        std::fs::write(&other, "22").unwrap();
        let Some(then) = file_identity(&one) else {
            panic!("the folder for temporary files has no times of birth");
        };
        let is_changed = |path: &Path| was_changed(&then, &file_identity(path).unwrap());
        assert!(!is_changed(&one));
        assert!(!is_changed(&other));
        std::fs::write(&one, "33").unwrap();
        assert!(is_changed(&one));
        // Another file in its place is another file.
        std::fs::rename(&other, &one).unwrap();
        assert!(!is_changed(&one));
    }
}
