//! The engine: images, kernel and programs put together into running VMs.

use std::collections::BTreeMap;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ratoon_vmm_api::NetConfig;

use crate::dirs::Dirs;
use crate::image::{self, ContainerConfig, Image, ImageStore};
use crate::initramfs::{self, InitramfsError};
use crate::renewal::{RuntimeRef, StaleRuntime};
use crate::vm::command::ImageCommand;
use crate::vm::launch::{Launch, LaunchError, Machine, Vm, launch};
use crate::vm::life::{self, LifeError, Status, VmInfo};
use crate::vm::record::ImageRef;
use crate::vm::shells::{Class, Shells};
use crate::vm::standstill;
use crate::vm::store::{Entry, Store, StoreError};
use crate::warm::{Made, Warm};

/// Guest memory when none is asked for, in MiB. Debian with Python and a package manager at work
/// needs about 300; what a guest does not touch costs the host nothing.
pub const DEFAULT_MEMORY_MIB: u64 = 512;
/// How long a guest may take to boot when nothing else is said: 15 times what it takes on the
/// slowest kind of host, where the guest's kernel is emulated.
pub const DEFAULT_BOOT_TIMEOUT: Duration = Duration::from_secs(180);

/// The binaries that the engine starts or packs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Programs {
    /// One VM's process.
    pub vmm: PathBuf,
    /// The guest's runtime.
    pub runtime: PathBuf,
    /// What fetches compressed memory.
    pub pager: PathBuf,
    /// What holds models' keys.
    pub bridge: PathBuf,
    /// The agent's loop, for guests.
    pub agent: PathBuf,
}

/// A VM to be made from an image.
#[derive(Debug, Clone)]
pub struct RunSpec {
    /// Name or digest of the image.
    pub image: String,
    /// The VM's own name.
    pub name: Option<String>,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// An uncompressed ELF `vmlinux` in place of the default one.
    pub kernel: Option<PathBuf>,
    /// Words added to the kernel's command line.
    pub kernel_args: Vec<String>,
    /// Existing tap devices.
    pub networks: Vec<NetConfig>,
    /// It outlives this process.
    pub detached: bool,
    /// How long the runtime may take to answer.
    pub boot_timeout: Duration,
    /// Boot, even if VMs of its kind have a warm generation to start from, and make none.
    pub cold: bool,
}

impl RunSpec {
    /// One vCPU, [`DEFAULT_MEMORY_MIB`], no network, ending with this process.
    pub fn new(image: impl Into<String>) -> Self {
        Self {
            image: image.into(),
            name: None,
            cpus: 1,
            memory_mib: DEFAULT_MEMORY_MIB,
            kernel: None,
            kernel_args: Vec::new(),
            networks: Vec::new(),
            detached: false,
            boot_timeout: DEFAULT_BOOT_TIMEOUT,
            cold: false,
        }
    }
}

/// Why a VM could not be made from an image.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The image.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// The archive that carries the runtime.
    #[error(transparent)]
    Initramfs(#[from] InitramfsError),
    /// A path that cannot be made absolute.
    #[error("{}", path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The start itself.
    #[error(transparent)]
    Launch(#[from] LaunchError),
}

/// A running VM and what its image says about commands.
#[derive(Debug)]
pub struct Started {
    /// The VM.
    pub vm: Vm,
    /// The image's own command and settings.
    pub command: ImageCommand,
    /// It was booted, and left a warm generation: later VMs of its kind start from that.
    pub made_warm: bool,
    /// It is of a snapshot, and has that one's runtime still: why. It runs.
    pub stale_runtime: Option<StaleRuntime>,
}

/// The engine. See the crate's example. Any number of engines, in any number of processes, may use
/// the same directories.
#[derive(Debug, Clone)]
pub struct Engine {
    dirs: Dirs,
    programs: Programs,
    store: Store,
    shells: Option<Shells>,
}

impl Programs {
    /// `RATOON_VMM`, `RATOON_RUNTIME`, `RATOON_PAGER`, `RATOON_BRIDGE` and `RATOON_AGENT` where they are set, else
    /// `ratoon-vmm` and so on beside this executable.
    pub fn beside_this_executable() -> Self {
        let beside = std::env::current_exe()
            .ok()
            .and_then(|exe| exe.parent().map(Path::to_owned))
            .unwrap_or_default();
        let find = |variable: &str, name: &str| {
            std::env::var_os(variable)
                .filter(|value| !value.is_empty())
                .map_or_else(|| beside.join(name), PathBuf::from)
        };
        Self {
            vmm: find("RATOON_VMM", "ratoon-vmm"),
            runtime: find("RATOON_RUNTIME", "ratoon-runtime"),
            pager: find("RATOON_PAGER", "ratoon-pager"),
            bridge: find("RATOON_BRIDGE", "ratoon-bridge"),
            agent: find("RATOON_AGENT", "ratoon-agent"),
        }
    }
}

impl Engine {
    /// An engine over these directories.
    pub fn new(dirs: Dirs, programs: Programs) -> Self {
        let store = Store::new(dirs.vms());
        Self {
            dirs,
            programs,
            store,
            shells: None,
        }
    }

    /// An engine over these directories with the programs beside this executable; removes what
    /// killed commands have left there.
    ///
    /// # Errors
    /// When something abandoned cannot be removed.
    pub fn open(dirs: Dirs) -> Result<Self, LifeError> {
        let engine = Self::new(dirs, Programs::beside_this_executable());
        life::sweep(&engine.store)?;
        crate::pager::sweep(&engine.dirs.pagers());
        crate::bridge::sweep(&engine.dirs.state().join("bridge"), &engine.store, false);
        Ok(engine)
    }

    /// Keeps so many VMMs' processes ready for each class (vCPUs, memory in MiB), so that restores and forks of
    /// such machines cost no process start. They are replaced in the background as they are used, and end
    /// with this engine and all its clones.
    ///
    /// # Errors
    /// When a process cannot be made.
    pub fn with_shells(self, wanted: BTreeMap<Class, usize>) -> Result<Self, StartError> {
        let program = absolute(&self.programs.vmm)?;
        let shells = Shells::new(&program, wanted).map_err(|source| LaunchError::Spawn {
            program: program.clone(),
            source,
        })?;
        Ok(Self {
            shells: Some(shells),
            ..self
        })
    }

    /// Its shells, if it has any.
    pub fn shells(&self) -> Option<&Shells> {
        self.shells.as_ref()
    }

    /// Its directories.
    pub fn dirs(&self) -> &Dirs {
        &self.dirs
    }

    /// Its programs.
    pub fn programs(&self) -> &Programs {
        &self.programs
    }

    /// All VM records.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The images.
    ///
    /// # Errors
    /// When the store's directory cannot be made.
    pub fn images(&self) -> image::Result<ImageStore> {
        let store = ImageStore::open(self.dirs.cache())?;
        Ok(store.kept_for(self.dirs.state().join("snapshots")))
    }

    /// All VMs, oldest first. One that a killed command left frozen goes on, and what that left in its folder
    /// is removed.
    ///
    /// # Errors
    /// When the state directory cannot be read.
    pub fn vms(&self) -> Result<Vec<VmInfo>, StoreError> {
        let looked_at = |entry: &Entry| {
            let info = life::info(entry);
            if info.status == Status::Running {
                standstill::mend_idle(&entry.dir);
                entry.dir.sweep_left();
            }
            info
        };
        crate::vm::reap();
        Ok(self.store.list()?.iter().map(looked_at).collect())
    }

    /// The kernel that a VM gets: the one named, `RATOON_KERNEL`, or the default one.
    pub fn kernel(&self, named: Option<&Path>) -> PathBuf {
        named
            .map(Path::to_owned)
            .or_else(|| {
                std::env::var_os("RATOON_KERNEL")
                    .filter(|value| !value.is_empty())
                    .map(PathBuf::from)
            })
            .unwrap_or_else(|| self.dirs.default_kernel())
    }

    /// Starts a VM and waits until its runtime has connected. `cancel` becoming readable ends the
    /// wait. While the VM runs, its image cannot be removed.
    ///
    /// # Errors
    /// [`StartError`]; nothing of the VM is left.
    pub fn start(
        &self,
        spec: &RunSpec,
        cancel: Option<BorrowedFd<'_>>,
    ) -> Result<Started, StartError> {
        let (image, mut plan) = self.plan(spec)?;
        let mut warm = Warm::of(self, spec, &image, &plan);
        if let Some(started) = warm
            .as_mut()
            .and_then(|warm| warm.start(self, spec, cancel))
        {
            return started;
        }
        plan.runtime = self.own_runtime();
        let mut vm = launch(&self.store, &plan, cancel)?;
        let made = warm.map_or(Made::Nothing, |warm| warm.make(self, &mut vm));
        if matches!(made, Made::Lost) {
            vm.end().map_err(LaunchError::from)?;
            vm = launch(&self.store, &plan, cancel)?;
        }
        Ok(Started {
            vm,
            command: image_command(&image.config.container),
            made_warm: matches!(made, Made::Kept),
            stale_runtime: None,
        })
    }

    /// How a VM of this kind is booted, and its image.
    pub(crate) fn plan(&self, spec: &RunSpec) -> Result<(Image, Launch), StartError> {
        let image = self.images()?.get(&spec.image)?;
        let lock = OwnedFd::from(image.open_locked()?);
        let runtime = absolute(&self.programs.runtime)?;
        let initramfs = initramfs::ensure(&runtime, &self.dirs.cache().join("initramfs"))?;
        let plan = Launch {
            vmm: absolute(&self.programs.vmm)?,
            name: spec.name.clone(),
            image: Some(ImageRef {
                name: spec.image.clone(),
                digest: image.digest().to_owned(),
            }),
            detached: spec.detached,
            boot_timeout: spec.boot_timeout,
            keep_open: Arc::new([lock]),
            machine: Machine {
                cpus: spec.cpus,
                memory_mib: spec.memory_mib,
                kernel: absolute(&self.kernel(spec.kernel.as_deref()))?,
                kernel_args: spec.kernel_args.join(" "),
                initramfs,
                root_disk: image.disk.clone(),
                networks: spec.networks.clone(),
            },
            // To be read by who boots: it takes longer than to start from a generation.
            runtime: None,
            generation: None,
            pager: None,
            parent: None,
            labels: BTreeMap::new(),
            shells: None,
            family: None,
        };
        Ok((image, plan))
    }

    /// The runtime that a VM gets that boots now.
    pub(crate) fn own_runtime(&self) -> Option<RuntimeRef> {
        let read = RuntimeRef::read(&self.programs.runtime);
        read.ok().map(|(runtime, _)| runtime)
    }
}

/// What a container image's configuration says about commands.
pub fn image_command(container: &ContainerConfig) -> ImageCommand {
    ImageCommand {
        env: container.env.clone(),
        user: container.user.clone(),
        workdir: container.workdir.clone(),
        entrypoint: container.entrypoint.clone(),
        cmd: container.cmd.clone(),
    }
}

/// The VMM runs in `/`, so a path must mean the same there.
pub(crate) fn absolute(path: &Path) -> Result<PathBuf, StartError> {
    std::path::absolute(path).map_err(|source| StartError::Path {
        path: path.to_owned(),
        source,
    })
}
