//! Snapshots of VMs: taken from a running one, and started again.
//!
//! ```text
//!   running VM --freeze--> generation (files) --write, in the background of the VM--> store
//!   store --map, wake--> VM
//! ```
//!
//! A snapshot holds memory, state and what was written to the disk; the image it stands on is named
//! by its digest and has to be there. A VM that cannot be woken is ended: it never runs half-woken.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ratoon_snapshot::{
    About, ChunkOptions, MemoryKind, Pages, Progress, Region, Run, Snapshot, Store, hash_file,
    populated,
};
use ratoon_vmm_api::{GenerationConfig, MemoryLayerConfig, NetConfig};

use crate::engine::{Engine, StartError, Started, absolute, image_command};
use crate::image;
use crate::pager::{self, PagerError};
use crate::runtime::{RuntimeClient, RuntimeError};
use crate::vm::freeze::{self, FreezeError, Generation};
use crate::vm::launch::{From as StartFrom, Launch, Machine, Vm, launch};
use crate::vm::record::{ImageRef, Record, RecordError, VmDir};
use crate::{cpu, working_set};

/// How long the runtime may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a VM whose connection broke may take to be gone, if it ends.
const END_PATIENCE: Duration = Duration::from_secs(2);

/// The labels of a snapshot by which its VM is built again.
mod label {
    pub const IMAGE: &str = "ratoon.image";
    pub const IMAGE_DIGEST: &str = "ratoon.image-digest";
    pub const KERNEL_ARGS: &str = "ratoon.kernel-args";
}

/// The name of the image that a snapshot stands on.
pub fn image_of(snapshot: &Snapshot) -> Option<&str> {
    let labels = &snapshot.manifest.about.labels;
    labels.get(label::IMAGE).map(String::as_str)
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

impl std::convert::From<crate::vm::launch::LaunchError> for SnapshotError {
    fn from(error: crate::vm::launch::LaunchError) -> Self {
        Self::Start(error.into())
    }
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
}

/// Memory of several layers: the topmost that has a page counts.
struct Layered(Vec<(File, Vec<ratoon_vmm_api::Run>)>);

impl Layered {
    /// The layer that counts at `offset`, and up to where.
    fn at(&self, offset: u64, end: u64) -> (&File, u64) {
        let mut end = end;
        for (file, runs) in self.0.iter().rev() {
            for run in runs {
                let run_end = run.offset + run.len;
                if (run.offset..run_end).contains(&offset) {
                    return (file, end.min(run_end));
                }
                if run.offset > offset {
                    end = end.min(run.offset);
                }
            }
        }
        // The first layer is the whole.
        (&self.0[0].0, end)
    }

    /// Where there is anything.
    fn populated(&self) -> Result<Vec<Run>, ratoon_snapshot::Error> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for (index, (file, own)) in self.0.iter().enumerate() {
            match index {
                0 => runs.extend(populated(file)?.iter().map(|run| (run.offset, run.length))),
                _ => runs.extend(own.iter().map(|run| (run.offset, run.len))),
            }
        }
        runs.sort_unstable();
        let mut merged: Vec<Run> = Vec::new();
        for (offset, length) in runs {
            match merged.last_mut() {
                Some(last) if offset <= last.offset + last.length => {
                    last.length = last.length.max(offset + length - last.offset);
                }
                _ => merged.push(Run { offset, length }),
            }
        }
        Ok(merged)
    }
}

impl Pages for Layered {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> std::io::Result<()> {
        let mut done = 0;
        while done < into.len() {
            let at = offset + done as u64;
            let (file, end) = self.at(at, offset + into.len() as u64);
            let len = (end - at) as usize;
            file.read_exact_at(&mut into[done..done + len], at)?;
            done += len;
        }
        Ok(())
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
        name: Option<&str>,
        kind: MemoryKind,
        progress: &dyn Progress,
    ) -> Result<Taken, SnapshotError> {
        let record = dir.read_record()?;
        let mut client = RuntimeClient::connect(&dir.vsock_socket(), CONNECT_TIMEOUT)?;
        self.snapshot_into(
            &self.snapshots()?,
            dir,
            &record,
            &mut client,
            (name, kind),
            progress,
        )
    }

    /// As [`Engine::snapshot`], of a VM whose runtime's client the caller has.
    pub(crate) fn snapshot_into(
        &self,
        store: &Store,
        dir: &VmDir,
        record: &Record,
        client: &mut RuntimeClient,
        (name, kind): (Option<&str>, MemoryKind),
        progress: &dyn Progress,
    ) -> Result<Taken, SnapshotError> {
        let generation = freeze::freeze(dir, client, &freeze::machine_id()?)?;
        let pause = generation.pause;
        let frozen = dir.frozen_layer();
        let written = write(store, record, generation, &frozen, (name, kind), progress);
        let _ = std::fs::remove_file(&frozen);
        Ok(Taken {
            snapshot: written?,
            pause,
        })
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
        let snapshot = self.snapshots()?.get(&spec.snapshot)?;
        self.restore_from(&snapshot, spec, cancel)
    }

    /// Starts a VM from this snapshot and wakes it.
    pub(crate) fn restore_from(
        &self,
        snapshot: &Snapshot,
        spec: &RestoreSpec,
        cancel: Option<BorrowedFd<'_>>,
    ) -> Result<Started, SnapshotError> {
        let about = &snapshot.manifest.about;
        let id = snapshot.id.to_string();
        if let Some(why) = cpu::missing(&about.cpu, &cpu::here()) {
            return Err(SnapshotError::Cpu { id, why });
        }
        let word = |key: &str| about.labels.get(key).cloned();
        let digest = word(label::IMAGE_DIGEST).ok_or_else(|| SnapshotError::NoImage(id.clone()))?;
        let image = self.images()?.get(&digest)?;
        let keep_open = vec![
            OwnedFd::from(image.open_locked()?),
            OwnedFd::from(snapshot.hold()?),
        ];
        // Checks its hash.
        drop(snapshot.state()?);
        let file = |name: &str| snapshot.folder.join(name);
        let layer = snapshot.manifest.layers.iter().find_map(|layer| {
            let is_root = layer.disk == "root";
            layer.file.as_deref().filter(|_| is_root).map(file)
        });
        let (memory, pager) = match snapshot.manifest.memory.kind {
            MemoryKind::Plain => {
                let layer = MemoryLayerConfig {
                    path: file("memory.bin"),
                    runs: Vec::new(),
                };
                (vec![layer], None)
            }
            MemoryKind::Chunks => {
                let program = absolute(&self.programs().pager)?;
                let pager = pager::of(&self.dirs().pagers(), &program, snapshot)?;
                (Vec::new(), Some(Arc::new(pager)))
            }
        };
        working_set::read_ahead(snapshot);
        let launched = launch(
            self.store(),
            &Launch {
                vmm: absolute(&self.programs().vmm)?,
                name: spec.name.clone(),
                image: Some(ImageRef {
                    name: word(label::IMAGE).unwrap_or_default(),
                    digest,
                }),
                detached: spec.detached,
                boot_timeout: spec.timeout,
                keep_open,
                machine: Machine {
                    cpus: about.vcpus,
                    memory_mib: about.memory_mib,
                    kernel: self.kernel(None),
                    kernel_args: word(label::KERNEL_ARGS).unwrap_or_default(),
                    initramfs: PathBuf::from("/"),
                    root_disk: image.disk.clone(),
                    networks: spec.networks.clone(),
                },
                generation: Some(StartFrom {
                    config: GenerationConfig {
                        state: file("state.bin"),
                        memory,
                    },
                    pager,
                    layer: layer.ok_or_else(|| SnapshotError::NoImage(id.clone()))?,
                }),
            },
            cancel,
        );
        let mut vm = launched?;
        if let Err(error) = wake(&mut vm, &id) {
            // Why the VM ended says more than that it cannot be talked to.
            return Err(vm.ended(END_PATIENCE).map_or(error, Into::into));
        }
        Ok(Started {
            vm,
            command: image_command(&image.config.container),
        })
    }
}

/// Tells a restored VM who it is.
fn wake(vm: &mut Vm, generation: &str) -> Result<(), SnapshotError> {
    let mut client = vm.runtime()?;
    let machine_id = Some(freeze::machine_id()?);
    freeze::wake(&mut client, &vm.dir().id(), generation, machine_id)?;
    vm.keep_runtime(client);
    Ok(())
}

fn write(
    store: &Store,
    record: &Record,
    generation: Generation,
    frozen_layer: &std::path::Path,
    (name, kind): (Option<&str>, MemoryKind),
    progress: &dyn Progress,
) -> Result<Snapshot, SnapshotError> {
    let failed = |path: &std::path::Path| {
        let path = path.to_owned();
        |source| SnapshotError::File { path, source }
    };
    let config = &record.config;
    let mut writer = store.begin()?;
    let memory = Layered(generation.layers);
    let parts = regions(config.memory_mib << 20);
    let populated = memory.populated()?;
    match kind {
        MemoryKind::Plain => writer.memory_plain(&parts, &memory, &populated, progress)?,
        MemoryKind::Chunks => {
            let options = ChunkOptions::default();
            writer.memory_chunks(&parts, &memory, &populated, options, progress)?
        }
    };
    writer.state(generation.state.as_bytes())?;
    let layer = File::open(frozen_layer).map_err(failed(frozen_layer))?;
    writer.layer("root", "root.qcow2", &layer, progress)?;
    let kernel = File::open(&config.kernel).map_err(failed(&config.kernel))?;
    let mut labels = BTreeMap::new();
    if let Some(image) = &record.image {
        labels.insert(label::IMAGE.to_owned(), image.name.clone());
        labels.insert(label::IMAGE_DIGEST.to_owned(), image.digest.clone());
    }
    labels.insert(label::KERNEL_ARGS.to_owned(), config.kernel_args.clone());
    let about = About {
        cpu: cpu::here(),
        kernel: hash_file(&kernel, &config.kernel, progress)?,
        image: None,
        runtime: None,
        vcpus: config.vcpus,
        memory_mib: config.memory_mib,
        parent: None,
        labels,
    };
    Ok(writer.finish(about, name, None)?)
}
