//! Starting a VM: from a description to a runtime that answers.
//!
//! ```text
//!  Launch -> check -> record + directory -> sockets -> VMM -> runtime connected (R3) -> Vm
//!                          \___________________\________\____ any failure: VMM ended, all removed
//! ```
//!
//! The engine listens at `vsock.sock_1024` before the VMM starts; the runtime connects to it once
//! it serves. That first connection is the [`Vm`]'s control connection to the runtime. Of a machine that
//! was frozen, it is the VMM that connects there, with the guest's end of the connection that survived.
//! Such a machine is not ready before it has been woken ([`Vm::awake`]).

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ratoon_vmm_api::{
    ConfigError, DiskConfig, GenerationConfig, NetConfig, SerialConfig, VmConfig, VsockConfig,
};
use rustix::pipe::{PipeFlags, pipe_with};

use ratoon_client::RuntimeError;

use super::cgroup::{Group, GroupError, Limits};
use super::connect::{Until, call_runtime, ended, wait_ready};
use super::end::EndCause;
pub use super::handle::Vm;
use super::handle::{KillOnDrop, Parts, Runtime, reap};
use super::process::ProcessRef;
use super::record::{Ancestor, ImageRef, Parent, Record, VmDir, hostname};
use super::shells::Shells;
use super::spawn::{Inherited, spawn};
use super::store::{Store, StoreError};
use crate::renewal::RuntimeRef;
use crate::runtime::RuntimeClient;

/// The guest's context id. Each VM has a vsock of its own, so all may have the same.
const GUEST_CID: u32 = 3;
/// The word on the kernel's command line by which the runtime learns the hostname.
pub(crate) const HOSTNAME_WORD: &str = "ratoon.hostname=";
/// How large the serial logs of a VM may become, in bytes.
pub const SERIAL_LIMIT_BYTES: u64 = 4 << 20;

/// The machine itself.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Virtual CPUs.
    pub cpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// An uncompressed ELF `vmlinux`.
    pub kernel: PathBuf,
    /// Words added to the kernel's command line.
    pub kernel_args: String,
    /// The archive that carries the runtime.
    pub initramfs: PathBuf,
    /// The read-only root disk, over which the VM has a layer of its own.
    pub root_disk: PathBuf,
    /// Network devices.
    pub networks: Vec<NetConfig>,
}

/// A VM to be started.
#[derive(Debug, Clone)]
pub struct Launch {
    /// The `ratoon-vmm` binary.
    pub vmm: PathBuf,
    /// A name of its own.
    pub name: Option<String>,
    /// What `root_disk` was made from.
    pub image: Option<ImageRef>,
    /// It outlives this process; otherwise it ends with it, however that ends.
    pub detached: bool,
    /// How long the runtime may take to answer.
    pub boot_timeout: Duration,
    /// Descriptors that the VMM keeps open, such as the image's lock.
    pub keep_open: Arc<[OwnedFd]>,
    /// The machine.
    pub machine: Machine,
    /// The runtime that will be in it, if that is known.
    pub runtime: Option<RuntimeRef>,
    /// Start from this, in place of booting.
    pub generation: Option<Arc<From>>,
    /// A connection to the pager of the generation's memory, for this VM alone.
    pub pager: Option<Arc<OwnedFd>>,
    /// It is a child of a fork.
    pub parent: Option<Parent>,
    /// The user's own words.
    pub labels: BTreeMap<String, String>,
    /// Processes made ahead.
    pub shells: Option<Shells>,
    /// The control group of its family, and its limits.
    pub family: Option<(PathBuf, Limits)>,
}

/// A generation to start from.
#[derive(Debug)]
pub struct From {
    /// What it is, for the VMM.
    pub config: GenerationConfig,
    /// Its files, state first, when they are given to the VMM as descriptors.
    pub files: Vec<OwnedFd>,
    /// What had been written to the root disk, the lowest layer first; only read.
    pub frozen: Vec<PathBuf>,
    /// How many layers of freezes each stands for; none: one each.
    pub freezes: Vec<u32>,
    /// Of these, the ones in this folder go with another VM: a child links them into its own.
    pub linked_from: Option<PathBuf>,
    /// The snapshots that all this comes from, the oldest first.
    pub ancestors: Vec<Ancestor>,
    /// The folder of the snapshot whose files it uses in place.
    pub restored_from: Option<PathBuf>,
    /// The host's vsock port of the connection to the runtime that went on through the freeze; `None`:
    /// there is none, and the runtime is called.
    pub control_port: Option<u32>,
}

impl From {
    /// Where a VM in `dir` finds its frozen layers; those that it has to link first with where they are.
    fn layers(&self, dir: &VmDir) -> Vec<(PathBuf, Option<&Path>)> {
        let folder = self.linked_from.as_deref();
        let place = |(number, path): (usize, &PathBuf)| match folder {
            Some(folder) if path.starts_with(folder) => dir.inherited_layer(number),
            _ => path.clone(),
        };
        let layers = self.frozen.iter();
        let places = layers.clone().enumerate().map(place);
        places
            .zip(layers)
            .map(|(place, source)| {
                let is_linked = place != *source;
                (place, is_linked.then_some(source.as_path()))
            })
            .collect()
    }
}

/// Why a VM did not start. Nothing of it is left then.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The machine cannot be built so.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A file that the VM needs.
    #[error("{what} {} cannot be read; {remedy}", path.display())]
    File {
        /// Which file.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// What to do.
        remedy: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The VM's record.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Its limit on memory.
    #[error(transparent)]
    Group(#[from] GroupError),
    /// A socket or pipe.
    #[error("{action} for VM {id}")]
    System {
        /// What was tried.
        action: &'static str,
        /// The VM.
        id: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// The VMM's process could not be made.
    #[error("starting {}", program.display())]
    Spawn {
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The VM ended while it was booting.
    #[error("the VM ended before the runtime in it answered")]
    Ended {
        /// The serial console's last lines, printable.
        serial: Vec<String>,
        /// Why.
        #[source]
        source: EndCause,
    },
    /// The runtime did not answer in time.
    #[error("the runtime in the VM did not answer within {} s; --boot-timeout allows more", after.as_secs())]
    Timeout {
        /// How long it was given.
        after: Duration,
        /// The serial console's last lines, printable.
        serial: Vec<String>,
    },
    /// The runtime of a frozen machine does not take our connection.
    #[error("the runtime in the VM")]
    Runtime {
        /// Why.
        #[source]
        source: RuntimeError,
    },
    /// The caller's `cancel` became readable.
    #[error("cancelled while the VM was booting")]
    Cancelled,
}

impl LaunchError {
    /// The serial console's last lines, printable, when the guest is to blame.
    pub fn serial(&self) -> &[String] {
        match self {
            Self::Ended { serial, .. } | Self::Timeout { serial, .. } => serial,
            _ => &[],
        }
    }
}

/// Starts a VM and waits until its runtime has connected. `cancel` becoming readable ends the wait.
///
/// # Errors
/// [`LaunchError`]; nothing of the VM is left.
pub fn launch(
    store: &Store,
    launch: &Launch,
    cancel: Option<BorrowedFd<'_>>,
) -> Result<Vm, LaunchError> {
    let mut dirs = create(store, std::slice::from_ref(launch))?;
    launch_in(store, launch, &dirs.remove(0), cancel)
}

/// Makes the records of VMs of one kind: all or none.
///
/// # Errors
/// [`LaunchError`].
pub(crate) fn create(store: &Store, launches: &[Launch]) -> Result<Vec<VmDir>, LaunchError> {
    reap();
    if let Some(first) = launches.first() {
        check_files(first)?;
    }
    for launch in launches {
        config(launch, &VmDir::new("/check")).check()?;
    }
    let names: Vec<_> = launches.iter().map(|launch| launch.name.clone()).collect();
    let record = |number: usize, dir: &VmDir| {
        let launch: &Launch = &launches[number];
        let from = launch.generation.as_deref();
        Record {
            ephemeral: !launch.detached,
            ancestors: from.map_or_else(Vec::new, |from| from.ancestors.clone()),
            runtime: launch.runtime.clone(),
            restored_from: from.and_then(|from| from.restored_from.clone()),
            parent: launch.parent.clone(),
            labels: launch.labels.clone(),
            group: group(launch, dir),
            ..Record::new(
                config(launch, dir),
                launch.name.clone(),
                launch.image.clone(),
            )
        }
    };
    Ok(store.create_all(&names, record)?)
}

/// Starts the VM whose record is in `dir`.
///
/// # Errors
/// [`LaunchError`]; nothing of the VM is left.
pub(crate) fn launch_in(
    store: &Store,
    launch: &Launch,
    dir: &VmDir,
    cancel: Option<BorrowedFd<'_>>,
) -> Result<Vm, LaunchError> {
    let started = start(store, launch, dir, Some(dir.path()), cancel);
    if started.is_err() {
        // The first error is the one to tell; what this leaves the next sweep removes.
        let _ = store.remove(dir);
    }
    started
}

/// Starts another VM in the folder of one that has a record there and whose sockets are out of the way.
///
/// # Errors
/// [`LaunchError`]; its record then names a VMM that has ended, and its folder is still there.
pub(crate) fn restart(
    store: &Store,
    launch: &Launch,
    dir: &VmDir,
    cancel: Option<BorrowedFd<'_>>,
) -> Result<Vm, LaunchError> {
    // Not the end of this one.
    let _ = std::fs::remove_file(dir.exit_report());
    let config = config(launch, dir);
    config.check()?;
    let from = launch.generation.as_deref();
    store.update(dir, |record| {
        record.config = config;
        // Until it is ready it is this process's.
        record.owner = ProcessRef::current();
        record.ready = false;
        record.runtime.clone_from(&launch.runtime);
        record.ancestors = from.map_or_else(Vec::new, |from| from.ancestors.clone());
        record.restored_from = from.and_then(|from| from.restored_from.clone());
    })?;
    // The folder is another VM's still.
    start(store, launch, dir, None, cancel)
}

/// `own` is what the VMM removes when this process is killed.
fn start(
    store: &Store,
    launch: &Launch,
    dir: &VmDir,
    own: Option<&Path>,
    cancel: Option<BorrowedFd<'_>>,
) -> Result<Vm, LaunchError> {
    let system = |action| {
        move |source| LaunchError::System {
            action,
            id: dir.id(),
            source,
        }
    };
    let control = bind(&dir.control_socket()).map_err(system("binding the control socket"))?;
    let ready = bind(&dir.ready_socket()).map_err(system("binding the runtime's socket"))?;
    ready
        .set_nonblocking(true)
        .map_err(system("preparing the runtime's socket"))?;
    let (lifeline, held) = pipe_with(PipeFlags::CLOEXEC)
        .map_err(|error| system("making the lifeline")(error.into()))?;
    let from = launch.generation.as_deref();
    for (place, source) in from.map_or_else(Vec::new, |from| from.layers(dir)) {
        if let Some(source) = source {
            std::fs::hard_link(source, &place).map_err(system("linking the frozen disk"))?;
        }
    }
    let recorded = config(launch, dir);
    let config = VmConfig {
        generation: from.map(|from| from.config.clone()),
        remove_when_orphaned: own.map(Path::to_owned),
        ..recorded.clone()
    };
    let spawned_ns = monotonic_ns();
    let child = spawn(
        &launch.vmm,
        &config,
        &dir.vmm_log(),
        Inherited {
            control,
            lifeline,
            pager: launch.pager.as_deref(),
            generation: from.map_or(&[], |from| &from.files),
            keep_open: &launch.keep_open,
        },
        launch.shells.as_ref(),
    )
    .map_err(|source| LaunchError::Spawn {
        program: launch.vmm.clone(),
        source,
    })?;
    let child = KillOnDrop(Some(child));
    if let Some(group) = group(launch, dir) {
        group.take_in(child.id())?;
    }
    let pid = i32::try_from(child.id()).unwrap_or(0);
    let process = ProcessRef::of(pid);
    let Some((process, handle)) = process.and_then(|p| p.open().map(|handle| (p, handle))) else {
        // It has ended already: it is our child, so nobody else can have its pid.
        return Err(ended(dir));
    };
    let record = store.update(dir, |record| {
        record.vmm = Some(process);
        // A fork's records are made before its generation.
        record.config = recorded;
        if let Some(from) = from {
            record.image.clone_from(&launch.image);
            record.runtime.clone_from(&launch.runtime);
            record.ancestors.clone_from(&from.ancestors);
            record.restored_from.clone_from(&from.restored_from);
        }
    })?;
    let timeout = launch.boot_timeout;
    let wait = |until| wait_ready(&ready, &handle, dir, timeout, cancel, until);
    let adopt = |(stream, port)| {
        let client = RuntimeClient::adopt(stream, port);
        client.map_err(|source| LaunchError::Runtime { source })
    };
    let runtime = match &launch.generation {
        None => Runtime::Stream(wait(Until::Data)?),
        Some(from) => match from.control_port {
            Some(port) => Runtime::Client(Box::new(adopt((wait(Until::Accepted)?, port))?)),
            None => Runtime::Stream(call_runtime(&handle, dir, timeout, cancel)?),
        },
    };
    drop(ready);
    let _ = std::fs::remove_file(dir.ready_socket());
    let record = match &launch.generation {
        None => store.update(dir, |record| record.ready = true)?,
        Some(_) => record,
    };
    Ok(Vm {
        parts: child.release().map(|child| Parts {
            store: store.clone(),
            dir: dir.clone(),
            record,
            child,
            spawned_ns,
            process: handle,
            runtime: Some(runtime),
            lifeline: held,
        }),
    })
}

fn group(launch: &Launch, dir: &VmDir) -> Option<Group> {
    let (family, limits) = launch.family.as_ref()?;
    Some(Group::of(family, &dir.id(), *limits))
}

/// The directory is its owner's alone already; the mode says so on the socket too.
fn bind(path: &Path) -> std::io::Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt;
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

fn check_files(launch: &Launch) -> Result<(), LaunchError> {
    let machine = &launch.machine;
    let files = [
        (
            "guest kernel",
            &machine.kernel,
            "`guest-kernel/build` makes one, --kernel names another",
        ),
        (
            "initramfs",
            &machine.initramfs,
            "remove it and run again: it is made anew",
        ),
        (
            "root disk",
            &machine.root_disk,
            "`ratoon image ls` lists the images",
        ),
    ];
    // A machine that was frozen has its kernel and runtime in memory.
    let was_frozen = launch.generation.is_some() || launch.parent.is_some();
    let needed = if was_frozen { 2.. } else { 0.. };
    for &(what, path, remedy) in &files[needed] {
        readable_file(path).map_err(|source| LaunchError::File {
            what,
            path: path.clone(),
            remedy,
            source,
        })?;
    }
    Ok(())
}

fn readable_file(path: &Path) -> std::io::Result<()> {
    if std::fs::File::open(path)?.metadata()?.is_dir() {
        return Err(ErrorKind::IsADirectory.into());
    }
    Ok(())
}

fn config(launch: &Launch, dir: &VmDir) -> VmConfig {
    let machine = &launch.machine;
    VmConfig {
        id: dir.id(),
        vcpus: machine.cpus,
        memory_mib: machine.memory_mib,
        // Given to the VMM alone: its runs are many, and the record is written often.
        generation: None,
        kernel: machine.kernel.clone(),
        initramfs: Some(machine.initramfs.clone()),
        kernel_args: kernel_args(launch, dir),
        disks: vec![DiskConfig {
            id: "root".into(),
            path: machine.root_disk.clone(),
            read_only: false,
            frozen: match &launch.generation {
                Some(from) => {
                    let layers = from.layers(dir).into_iter();
                    layers.map(|(place, _)| place).collect()
                }
                None => Vec::new(),
            },
            freezes: match &launch.generation {
                Some(from) => from.freezes.clone(),
                None => Vec::new(),
            },
            layer: Some(dir.free_layer()),
        }],
        vsock: Some(VsockConfig {
            guest_cid: GUEST_CID,
            socket: dir.vsock_socket(),
        }),
        networks: machine.networks.clone(),
        balloon: true,
        serial: Some(SerialConfig {
            log: dir.serial_log(),
            limit_bytes: SERIAL_LIMIT_BYTES,
        }),
        exit_report: Some(dir.exit_report()),
        remove_when_orphaned: Some(dir.path().to_owned()),
    }
}

/// A machine that boots learns its name so, and the user's own words come later; one that was frozen is
/// told when it wakes.
fn kernel_args(launch: &Launch, dir: &VmDir) -> String {
    let own = &launch.machine.kernel_args;
    match &launch.generation {
        Some(_) => own.clone(),
        None => {
            let hostname = hostname(launch.name.as_deref(), &dir.id());
            format!("{HOSTNAME_WORD}{hostname} {own}")
                .trim_end()
                .to_owned()
        }
    }
}

fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

#[cfg(test)]
#[path = "launch_tests.rs"]
mod tests;
