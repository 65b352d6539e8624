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

use std::io::ErrorKind;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::Arc;
use std::time::Duration;

use ratoon_vmm_api::{
    ConfigError, DiskConfig, GenerationConfig, NetConfig, SerialConfig, VmConfig, VsockConfig,
};
use rustix::pipe::{PipeFlags, pipe_with};

use ratoon_client::RuntimeError;

use super::connect::{Until, call_runtime, ended, wait_ready};
use super::end::EndCause;
use super::process::{ProcessHandle, ProcessRef};
use super::record::{Ancestor, ImageRef, Record, VmDir, hostname};
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
/// How long a runtime that has connected may take to say HELLO.
const HELLO_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a killed VMM may take to be gone: the kernel frees the guest's memory in that time.
const KILL_TIMEOUT: Duration = Duration::from_secs(60);

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
#[derive(Debug)]
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
    pub keep_open: Vec<OwnedFd>,
    /// The machine.
    pub machine: Machine,
    /// The runtime that will be in it, if that is known.
    pub runtime: Option<RuntimeRef>,
    /// Start from this, in place of booting.
    pub generation: Option<From>,
}

/// A generation to start from.
#[derive(Debug, Clone)]
pub struct From {
    /// Its files, for the VMM.
    pub config: GenerationConfig,
    /// A connection to the pager of its memory, for this VM alone.
    pub pager: Option<Arc<OwnedFd>>,
    /// What had been written to the root disk, the lowest layer first; only read.
    pub frozen: Vec<PathBuf>,
    /// The snapshot that all this is.
    pub ancestor: Ancestor,
    /// The host's vsock port of the connection to the runtime that went on through the freeze; `None`:
    /// there is none, and the runtime is called.
    pub control_port: Option<u32>,
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

/// A running VM whose runtime has connected. Dropped, it is ended and removed, unless it was
/// [detached](Vm::detach).
#[derive(Debug)]
pub struct Vm {
    parts: Option<Parts>,
}

/// The connection to the runtime, before its HELLO or after.
#[derive(Debug)]
enum Runtime {
    Stream(UnixStream),
    Client(Box<RuntimeClient>),
}

#[derive(Debug)]
struct Parts {
    store: Store,
    dir: VmDir,
    record: Record,
    child: Child,
    spawned_ns: u64,
    process: ProcessHandle,
    runtime: Option<Runtime>,
    /// Cut when this process ends; the VMM then ends too and removes the directory. One byte on it
    /// releases the VMM.
    lifeline: OwnedFd,
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
    check_files(launch)?;
    config(launch, &VmDir::new("/check")).check()?;
    let (dir, _) = store.create(launch.name.as_deref(), launch.image.clone(), |dir| {
        config(launch, dir)
    })?;
    let started = start(store, launch, &dir, cancel);
    if started.is_err() {
        // The first error is the one to tell; what this leaves the next sweep removes.
        let _ = store.remove(&dir);
    }
    started
}

fn start(
    store: &Store,
    launch: &Launch,
    dir: &VmDir,
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
    let record = store.update(dir, |record| {
        record.ephemeral = !launch.detached;
        record.runtime.clone_from(&launch.runtime);
        let from = launch.generation.iter();
        record.ancestors = from.map(|from| from.ancestor.clone()).collect();
        let from = launch.generation.as_ref();
        let folder = from.and_then(|from| from.config.state.parent());
        record.restored_from = folder.map(Path::to_owned);
    })?;
    let mut config = record.config.clone();
    config.generation = launch.generation.as_ref().map(|from| from.config.clone());
    let spawned_ns = monotonic_ns();
    let child = spawn(
        &launch.vmm,
        &config,
        &dir.vmm_log(),
        Inherited {
            control,
            lifeline,
            keep_open: &launch.keep_open,
            pager: launch
                .generation
                .as_ref()
                .and_then(|from| from.pager.as_deref()),
        },
    )
    .map_err(|source| LaunchError::Spawn {
        program: launch.vmm.clone(),
        source,
    })?;
    let child = KillOnDrop(Some(child));
    let pid = i32::try_from(child.id()).unwrap_or(0);
    let process = ProcessRef::of(pid);
    let Some((process, handle)) = process.and_then(|p| p.open().map(|handle| (p, handle))) else {
        // It has ended already: it is our child, so nobody else can have its pid.
        return Err(ended(dir));
    };
    let record = store.update(dir, |record| record.vmm = Some(process))?;
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
    let needed = if launch.generation.is_some() {
        2..
    } else {
        0..
    };
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
                Some(from) => from.frozen.clone(),
                None => Vec::new(),
            },
            layer: Some(dir.layer()),
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
    match launch.generation {
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

/// A child that is killed and reaped unless it is released.
struct KillOnDrop(Option<Child>);

impl KillOnDrop {
    fn id(&self) -> u32 {
        self.0.as_ref().map_or(0, Child::id)
    }

    fn release(mut self) -> Option<Child> {
        self.0.take()
    }
}

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            // Both fail only when it has been reaped, which nobody but us does.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Vm {
    fn parts(&self) -> &Parts {
        self.parts
            .as_ref()
            .expect("only taken by methods that consume the Vm")
    }

    /// The VM's files.
    pub fn dir(&self) -> &VmDir {
        &self.parts().dir
    }

    /// Its record as it was when the runtime connected.
    pub fn record(&self) -> &Record {
        &self.parts().record
    }

    /// CLOCK_MONOTONIC in nanoseconds right before its VMM's process was made, for measurements.
    pub fn spawned_ns(&self) -> u64 {
        self.parts().spawned_ns
    }

    /// The runtime's connection as it came, once, before its HELLO was read.
    pub fn take_runtime(&mut self) -> Option<UnixStream> {
        let parts = self.parts.as_mut()?;
        match parts.runtime.take() {
            Some(Runtime::Stream(stream)) => Some(stream),
            other => {
                parts.runtime = other;
                None
            }
        }
    }

    /// A client on the runtime's connection, once; later calls make a connection of their own.
    ///
    /// # Errors
    /// [`RuntimeError`] about the connection.
    pub fn runtime(&mut self) -> Result<RuntimeClient, RuntimeError> {
        let kept = self.parts.as_mut().and_then(|parts| parts.runtime.take());
        match kept {
            Some(Runtime::Client(client)) => Ok(*client),
            Some(Runtime::Stream(stream)) => RuntimeClient::from_stream(stream, HELLO_TIMEOUT),
            None => RuntimeClient::connect(&self.dir().vsock_socket(), HELLO_TIMEOUT),
        }
    }

    /// A machine that was frozen has been woken: it is ready.
    ///
    /// # Errors
    /// When its record cannot be written.
    pub fn awake(&mut self) -> Result<(), StoreError> {
        if let Some(parts) = &mut self.parts {
            parts.record = parts
                .store
                .update(&parts.dir, |record| record.ready = true)?;
        }
        Ok(())
    }

    /// Another runtime serves in it.
    ///
    /// # Errors
    /// When its record cannot be written.
    pub fn renewed(&mut self, runtime: &RuntimeRef) -> Result<(), StoreError> {
        if let Some(parts) = &mut self.parts {
            let renewed = Some(runtime.clone());
            parts.record = parts
                .store
                .update(&parts.dir, |record| record.runtime = renewed)?;
        }
        Ok(())
    }

    /// Gives a client back, for the next [`Vm::runtime`].
    pub fn keep_runtime(&mut self, client: RuntimeClient) {
        if let Some(parts) = &mut self.parts {
            parts.runtime = Some(Runtime::Client(Box::new(client)));
        }
    }

    /// Its VMM's process.
    pub fn process(&self) -> &ProcessHandle {
        &self.parts().process
    }

    /// For a VM that went away by itself: why, and its console's last lines; `None` when it still
    /// runs after `patience`.
    pub fn ended(&self, patience: Duration) -> Option<LaunchError> {
        let parts = self.parts();
        let gone = parts.process.wait(patience).unwrap_or(false);
        gone.then(|| ended(&parts.dir))
    }

    /// Ends the VM at once, without asking the guest, and removes its record and files: its layer
    /// is thrown away, so there is nothing to write back.
    ///
    /// # Errors
    /// When its files cannot be removed.
    pub fn end(mut self) -> Result<(), StoreError> {
        self.parts.take().map_or(Ok(()), Parts::end)
    }

    /// Lets the VM live on without this process.
    pub fn detach(mut self) -> Option<Record> {
        let parts = self.parts.take()?;
        // A VMM that has gone takes no byte: the record then says what became of it.
        let _ = rustix::io::write(&parts.lifeline, b"r");
        Some(parts.record)
    }
}

impl Parts {
    fn end(mut self) -> Result<(), StoreError> {
        let _ = self.child.kill();
        // Bounded: a VMM in an uninterruptible wait must not hang the caller.
        if self.process.wait(KILL_TIMEOUT).unwrap_or(false) {
            let _ = self.child.wait();
        }
        self.store.remove(&self.dir)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if let Some(parts) = self.parts.take() {
            // A destructor has nobody to tell; the next sweep removes what this could not.
            let _ = parts.end();
        }
    }
}

#[cfg(test)]
#[path = "launch_tests.rs"]
mod tests;
