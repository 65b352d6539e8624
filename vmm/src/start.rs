//! From a configuration to a machine, one phase after another. Each phase consumes the one before
//! it, so that none can be left out or done twice:
//!
//! ```text
//!  Configured -> WithMemory -> WithVcpus -> Loaded -> Machine (created, vCPUs holding)
//!                    |                         ^
//!                    +-- a thread: kernel and initramfs into memory
//! ```
//!
//! Memory slots come before the interrupt controller: a slot added after it waits milliseconds for
//! a grace period of the kernel.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

use kvm_bindings::{
    CpuId, KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY,
    kvm_enable_cap, kvm_pit_config,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use ratoon_devices::legacy::SerialState;
use ratoon_devices::virtio::mmio::MmioTransport;
use ratoon_vmm_api::{HostClass, Phases, VmConfig, VmState};
use vm_memory::GuestMemoryMmap;

use crate::boot::{self, BootError};
use crate::bus::{Bus, MMIO_DEVICES, SERIAL_IRQ, VirtioSlot};
use crate::clock::monotonic_ns;
use crate::ending::Ending;
use crate::machine::Machine;
use crate::memory::{self, FreeMemory, Layer, MemoryError};
use crate::opening::Opening;
use crate::pager::{Pager, PagerError, PagerLink};
use crate::shell::Shell;
use crate::state::{DeviceState, MachineState, StateError, VcpuState};
use crate::stats::StatsReader;
use crate::vcpu::Vcpus;
use crate::wiring::{self, command_line, wire};
use crate::{cpuid, generation};

/// Where Intel's virtualization wants three unused pages: just below the BIOS area.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// Why a machine cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// /dev/kvm cannot be opened.
    #[error("cannot open /dev/kvm: {}", remedy(source))]
    Kvm {
        /// KVM's word.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM is too old, or not Linux's.
    #[error("/dev/kvm speaks API version {found}, not 12: this kernel is not supported")]
    KvmVersion {
        /// What it says.
        found: i32,
    },
    /// A step inside KVM failed.
    #[error("KVM cannot make {what}")]
    KvmStep {
        /// What was to be made.
        what: String,
        /// KVM's word.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The generation to start from.
    #[error(transparent)]
    State(#[from] StateError),
    /// The generation to start from, its files.
    #[error("generation: {}", path.display())]
    Generation {
        /// Which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The generation is not of such a machine.
    #[error("the generation does not fit: {0}")]
    Unfit(String),
    /// Memory from a pager.
    #[error(transparent)]
    Pager(#[from] PagerError),
    /// Kernel, initramfs or command line.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The vCPUs' registers.
    #[error("vCPU {index}")]
    Registers {
        /// Which.
        index: u32,
        /// What failed.
        #[source]
        source: boot::RegisterError,
    },
    /// A device.
    #[error("{what}")]
    Device {
        /// Which device, of what.
        what: String,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// More devices than interrupt lines.
    #[error("{0} devices, but there are interrupt lines for {MMIO_DEVICES}")]
    TooManyDevices(usize),
    /// Descriptors or threads.
    #[error("the system refuses {what}")]
    System {
        /// What was asked for.
        what: &'static str,
        /// The system's word.
        #[source]
        source: std::io::Error,
    },
}

fn remedy(error: &kvm_ioctls::Error) -> &'static str {
    match error.errno() {
        libc::ENOENT => "there is no KVM; enable virtualization or load the kvm module",
        libc::EACCES | libc::EPERM => "permission denied; join the group kvm",
        _ => "see `ratoon doctor`",
    }
}

pub(crate) fn kvm_step(what: impl Into<String>) -> impl FnOnce(kvm_ioctls::Error) -> StartError {
    let what = what.into();
    |source| StartError::KvmStep { what, source }
}

pub(crate) fn system(what: &'static str) -> impl FnOnce(std::io::Error) -> StartError {
    move |source| StartError::System { what, source }
}

/// Phase 0: what is wanted.
pub struct Configured {
    config: VmConfig,
    class: HostClass,
    started: Instant,
    phases: Phases,
    pager: Option<PagerLink>,
    sent: Vec<OwnedFd>,
    shell: Option<Shell>,
}

impl Configured {
    /// A checked configuration, on the host as it is found to be. `main_ns` is CLOCK_MONOTONIC when
    /// the process began.
    pub fn new(config: VmConfig, main_ns: u64) -> Self {
        let class = HostClass::detect();
        if class == HostClass::Emulated {
            tracing::info!(
                "this host has no hardware virtualization: guest kernels are emulated, with \
                 workarounds (docs/host-without-vt.md)"
            );
        }
        Self {
            config,
            class,
            started: Instant::now(),
            phases: Phases {
                main_ns,
                configured_ns: monotonic_ns(),
                ..Phases::default()
            },
            pager: None,
            sent: Vec::new(),
            shell: None,
        }
    }

    /// Start in this, which was made ahead.
    #[must_use]
    pub fn with_shell(self, shell: Option<Shell>) -> Self {
        Self { shell, ..self }
    }

    /// The lowest layer of its generation's memory comes from a pager.
    #[must_use]
    pub fn with_pager(self, pager: Option<PagerLink>) -> Self {
        Self { pager, ..self }
    }

    /// What the owner has sent beside: the files of the generation, when they come so.
    #[must_use]
    pub fn with_descriptors(self, sent: Vec<OwnedFd>) -> Self {
        Self { sent, ..self }
    }

    /// Phase 1: the VM with its memory slots.
    ///
    /// # Errors
    /// No KVM, no permission, no memory.
    pub fn with_memory(mut self) -> Result<WithMemory, StartError> {
        let opening = Opening::begin(&self.config)?;
        let ahead = match self.shell.take() {
            None => None,
            Some(shell) => Some(self.fitting(shell)?),
        };
        let mut pager = None;
        let (memory, source) = match &self.config.generation {
            None => {
                let memory = memory::create(self.config.memory_mib)?;
                let loading = start_loading(&self.config, self.class, &memory)?;
                (memory, Source::Boot(loading))
            }
            Some(generation) => {
                let mib = self.config.memory_mib;
                let mut files = generation::Files::open(generation, self.sent)?;
                let mut layers = files.layers(generation)?;
                if let Some(link) = &self.pager {
                    layers.insert(0, generation::whole(link.memory(mib << 20)?, mib << 20));
                }
                let memory = match &ahead {
                    None => memory::restore(mib, &layers)?,
                    Some(shell) => memory::fill(&shell.memory, mib, &layers)?,
                };
                if let Some(link) = self.pager {
                    pager = Some(link.attach(&memory)?);
                }
                memory::lay_over(&memory, &layers)?;
                let state = files.state(generation, &self.config, self.class)?;
                (memory, Source::Generation(Box::new(state), layers))
            }
        };
        let mut phases = self.phases;
        phases.mapped_ns = monotonic_ns();
        let (kvm, vm, vcpus) = match ahead {
            Some(shell) => (shell.kvm, shell.vm, Some(shell.vcpus)),
            None => {
                let kvm = open_kvm()?;
                let vm = kvm.create_vm().map_err(kvm_step("a VM"))?;
                memory::register(&vm, &memory)?;
                (kvm, vm, None)
            }
        };
        phases.memory_ns = monotonic_ns();
        Ok(WithMemory {
            config: self.config,
            opening,
            class: self.class,
            started: self.started,
            phases,
            kvm,
            vm,
            memory,
            source,
            pager,
            vcpus,
        })
    }

    /// The shell, if it is of the machine that is wanted.
    fn fitting(&self, shell: Shell) -> Result<Shell, StartError> {
        let wanted = (self.config.vcpus as usize, self.config.memory_mib);
        if self.config.generation.is_none() || (shell.vcpus.len(), shell.memory_mib) != wanted {
            return Err(StartError::Unfit(format!(
                "a shell of {} vCPUs and {} MiB is for generations of such machines",
                shell.vcpus.len(),
                shell.memory_mib
            )));
        }
        Ok(shell)
    }
}

/// Opens /dev/kvm.
pub(crate) fn open_kvm() -> Result<Kvm, StartError> {
    let kvm = Kvm::new().map_err(|source| StartError::Kvm { source })?;
    match kvm.get_api_version() {
        12 => Ok(kvm),
        found => Err(StartError::KvmVersion { found }),
    }
}

/// Interrupt controller, timer and vCPUs, which know nothing of their features yet. After the memory slots.
pub(crate) fn make_vcpus(
    vm: &VmFd,
    class: HostClass,
    count: u32,
) -> Result<Vec<VcpuFd>, StartError> {
    if class == HostClass::Emulated {
        let cap = kvm_enable_cap {
            cap: KVM_CAP_EXIT_ON_EMULATION_FAILURE,
            args: [1, 0, 0, 0],
            ..kvm_enable_cap::default()
        };
        vm.enable_cap(&cap)
            .map_err(kvm_step("reports of instructions that it cannot emulate"))?;
    }
    vm.set_tss_address(TSS_ADDRESS)
        .map_err(kvm_step("its task state area"))?;
    vm.create_irq_chip()
        .map_err(kvm_step("an interrupt controller"))?;
    let pit = kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..kvm_pit_config::default()
    };
    vm.create_pit2(pit).map_err(kvm_step("a timer"))?;
    let make = |index: u32| {
        vm.create_vcpu(u64::from(index))
            .map_err(kvm_step(format!("vCPU {index}")))
    };
    (0..count).map(make).collect()
}

/// The boot files on their way into memory: the longest part of a start, so it runs beside KVM's.
type Loading = JoinHandle<Result<boot::Loaded, BootError>>;

fn start_loading(
    config: &VmConfig,
    class: HostClass,
    memory: &GuestMemoryMmap,
) -> Result<Loading, StartError> {
    let memory = memory.clone();
    let kernel = config.kernel.clone();
    let initramfs = config.initramfs.clone();
    let command_line = command_line(config, class);
    let vcpus = config.vcpus;
    std::thread::Builder::new()
        .name("load".into())
        .spawn(move || boot::load(&memory, &kernel, initramfs.as_deref(), &command_line, vcpus))
        .map_err(system("a thread to load the kernel"))
}

pub(crate) fn joined<T>(thread: JoinHandle<T>) -> T {
    thread
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Where the machine's first instruction comes from.
enum Source {
    Boot(Loading),
    Generation(Box<MachineState>, Vec<Layer>),
}

/// Phase 1 done.
pub struct WithMemory {
    config: VmConfig,
    opening: Opening,
    class: HostClass,
    started: Instant,
    phases: Phases,
    kvm: Kvm,
    vm: VmFd,
    memory: GuestMemoryMmap,
    source: Source,
    pager: Option<Pager>,
    /// A shell's.
    vcpus: Option<Vec<VcpuFd>>,
}

impl WithMemory {
    /// Phase 2: interrupt controller, timer, vCPUs.
    ///
    /// # Errors
    /// When KVM refuses one.
    pub fn with_vcpus(mut self) -> Result<WithVcpus, StartError> {
        let vcpus = match self.vcpus.take() {
            Some(vcpus) => vcpus,
            None => make_vcpus(&self.vm, self.class, self.config.vcpus)?,
        };
        for (index, (vcpu, cpuid)) in vcpus.iter().zip(self.cpuids()?).enumerate() {
            vcpu.set_cpuid2(&cpuid)
                .map_err(kvm_step(format!("the features of vCPU {index}")))?;
        }
        self.phases.vcpus_ns = monotonic_ns();
        Ok(WithVcpus { base: self, vcpus })
    }
}

impl WithMemory {
    /// What each vCPU is told of itself: as before, or as this host has it.
    fn cpuids(&self) -> Result<Vec<CpuId>, StartError> {
        if let Source::Generation(state, _) = &self.source {
            let cpuids = state.vcpus.iter().map(VcpuState::cpuid);
            return Ok(cpuids.collect::<Result<_, _>>()?);
        }
        let supported = self
            .kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(kvm_step("a list of processor features"))?;
        let deadline = cpuid::TscDeadline(self.kvm.check_extension(Cap::TscDeadlineTimer));
        let vcpus = self.config.vcpus;
        let of = |index| cpuid::for_vcpu(&supported, index, vcpus, self.class, deadline);
        Ok((0..vcpus).map(of).collect())
    }
}

/// Phase 2 done.
pub struct WithVcpus {
    base: WithMemory,
    vcpus: Vec<VcpuFd>,
}

impl WithVcpus {
    /// Phase 3: kernel, initramfs and command line in memory, registers set.
    ///
    /// # Errors
    /// A kernel or initramfs that cannot be used.
    pub fn loaded(self) -> Result<Loaded, StartError> {
        let mut base = self.base;
        let (saved, layers) = match base.source {
            Source::Boot(loading) => {
                let loaded = joined(loading)?;
                for (index, vcpu) in self.vcpus.iter().enumerate() {
                    let index = index as u32;
                    boot::set_up_registers(vcpu, index, &base.memory, loaded)
                        .map_err(|source| StartError::Registers { index, source })?;
                }
                (None, Vec::new())
            }
            Source::Generation(state, layers) => {
                for (vcpu, state) in self.vcpus.iter().zip(&state.vcpus) {
                    state.restore(vcpu)?;
                }
                state.vm.restore(&base.vm)?;
                (Some((state.serial, state.devices)), layers)
            }
        };
        base.phases.loaded_ns = monotonic_ns();
        Ok(Loaded {
            config: base.config,
            opening: base.opening,
            class: base.class,
            started: base.started,
            phases: base.phases,
            vm: base.vm,
            memory: base.memory,
            vcpus: self.vcpus,
            saved,
            layers,
            pager: base.pager,
        })
    }
}

/// Phase 3 done.
pub struct Loaded {
    config: VmConfig,
    opening: Opening,
    class: HostClass,
    started: Instant,
    phases: Phases,
    vm: VmFd,
    memory: GuestMemoryMmap,
    vcpus: Vec<VcpuFd>,
    /// As they were, when the machine is a child.
    saved: Option<(SerialState, Vec<DeviceState>)>,
    layers: Vec<Layer>,
    pager: Option<Pager>,
}

impl Loaded {
    /// Phase 4: devices and vCPU threads. The machine is then created, and waits for
    /// [`crate::machine::Action::Resume`].
    ///
    /// # Errors
    /// A disk, socket or tap that cannot be used.
    pub fn machine(mut self) -> Result<Machine, StartError> {
        let vm = &self.vm;
        let mut serial = wiring::serial(&self.config)?;
        let mut saved = match self.saved {
            None => None,
            Some((state, devices)) => {
                serial = serial
                    .restored(&state)
                    .map_err(wiring::device_error("the serial port's state".into()))?;
                Some(devices.into_iter())
            }
        };
        vm.register_irqfd(serial.interrupt(), SERIAL_IRQ)
            .map_err(kvm_step("the serial port's interrupt"))?;
        let free = FreeMemory::new(saved.is_some());
        if let Some(saved) = &saved {
            // A machine that was frozen before there was a balloon goes on without one.
            let had_one = saved
                .as_slice()
                .iter()
                .any(|state| state.name == wiring::BALLOON);
            self.config.balloon &= had_one;
        }
        let disks = self.opening.disks()?;
        let devices = wiring::devices(&self.config, disks, &free)?;
        if devices.len() > MMIO_DEVICES {
            return Err(StartError::TooManyDevices(devices.len()));
        }
        let mut slots = Vec::new();
        for (index, (name, device)) in devices.into_iter().enumerate() {
            let memory = self.memory.clone();
            let transport = match &mut saved {
                None => {
                    MmioTransport::new(memory, device).map_err(system("an event descriptor"))?
                }
                Some(saved) => {
                    let state = saved.next().filter(|state| state.name == name);
                    let state =
                        state.ok_or_else(|| StartError::Unfit(format!("it has no {name}")))?;
                    MmioTransport::restore(memory, device, &state.transport)
                        .map_err(wiring::device_error(format!("the state of {name}")))?
                }
            };
            wire(vm, index, &name, &transport)?;
            slots.push(VirtioSlot {
                name,
                transport: Arc::new(Mutex::new(transport)),
            });
        }
        let vm_stats = StatsReader::open(vm).ok();
        let vcpu_stats = self
            .vcpus
            .iter()
            .filter_map(|vcpu| StatsReader::open(vcpu).ok())
            .collect();
        let bus = Arc::new(Bus::new(serial, slots));
        let ending = Arc::new(Ending::new().map_err(system("an event descriptor"))?);
        let vcpus = Vcpus::start(self.vcpus, self.class, &bus, &ending)
            .map_err(system("a thread for a vCPU"))?;
        self.phases.devices_ns = monotonic_ns();
        Ok(Machine {
            disks: Mutex::new(self.config.disks.clone()),
            config: self.config,
            class: self.class,
            started: self.started,
            phases: self.phases,
            bus,
            ending,
            vcpus: Mutex::new(vcpus),
            state: Mutex::new(VmState::Created),
            vm_stats,
            vcpu_stats,
            layers: Mutex::new(self.layers),
            free,
            birth: None,
            merging: crate::merge::Merging::default(),
            pager: self.pager,
            vm: self.vm,
            memory: self.memory,
        })
    }
}

/// The file that a machine's socket device made, to be removed when the VM ends.
pub fn vsock_socket(config: &VmConfig) -> Option<&Path> {
    config.vsock.as_ref().map(|vsock| vsock.socket.as_path())
}
