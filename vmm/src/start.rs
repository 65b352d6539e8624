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

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

use kvm_bindings::{
    KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY,
    kvm_enable_cap, kvm_pit_config,
};
use kvm_ioctls::{IoEventAddress, Kvm, VcpuFd, VmFd};
use ratoon_devices::block::{self, Block};
use ratoon_devices::legacy::Serial;
use ratoon_devices::net::Net;
use ratoon_devices::rng::Rng;
use ratoon_devices::virtio::Device;
use ratoon_devices::virtio::mmio::MmioTransport;
use ratoon_devices::vsock::Vsock;
use ratoon_vmm_api::{HostClass, NetConfig, Phases, VmConfig, VmState};
use vm_memory::GuestMemoryMmap;

use crate::boot::{self, BootError};
use crate::bus::{Bus, MMIO_BASE, MMIO_DEVICES, MMIO_IRQ, MMIO_SIZE, SERIAL_IRQ, VirtioSlot};
use crate::clock::monotonic_ns;
use crate::ending::Ending;
use crate::machine::Machine;
use crate::memory::{self, MemoryError};
use crate::stats::StatsReader;
use crate::vcpu::Vcpus;
use crate::{cpuid, host};

/// Where Intel's virtualization wants three unused pages: just below the BIOS area.
const TSS_ADDRESS: usize = 0xfffb_d000;
/// The register by which a driver kicks a queue (virtio 1.2, 4.2.2: QueueNotify).
const QUEUE_NOTIFY: u64 = 0x50;

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

fn kvm_step(what: impl Into<String>) -> impl FnOnce(kvm_ioctls::Error) -> StartError {
    let what = what.into();
    |source| StartError::KvmStep { what, source }
}

fn system(what: &'static str) -> impl FnOnce(std::io::Error) -> StartError {
    move |source| StartError::System { what, source }
}

/// Phase 0: what is wanted.
pub struct Configured {
    config: VmConfig,
    class: HostClass,
    started: Instant,
    phases: Phases,
}

impl Configured {
    /// A checked configuration, on the host as it is found to be. `main_ns` is CLOCK_MONOTONIC when
    /// the process began.
    pub fn new(config: VmConfig, main_ns: u64) -> Self {
        let class = host::detect();
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
        }
    }

    /// Phase 1: the VM with its memory slots.
    ///
    /// # Errors
    /// No KVM, no permission, no memory.
    pub fn with_memory(self) -> Result<WithMemory, StartError> {
        let kvm = Kvm::new().map_err(|source| StartError::Kvm { source })?;
        let found = kvm.get_api_version();
        if found != 12 {
            return Err(StartError::KvmVersion { found });
        }
        let memory = memory::create(self.config.memory_mib)?;
        let loading = start_loading(&self.config, self.class, &memory)?;
        let vm = kvm.create_vm().map_err(kvm_step("a VM"))?;
        memory::register(&vm, &memory)?;
        let mut phases = self.phases;
        phases.memory_ns = monotonic_ns();
        Ok(WithMemory {
            config: self.config,
            class: self.class,
            started: self.started,
            phases,
            kvm,
            vm,
            memory,
            loading,
        })
    }
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

/// Phase 1 done.
pub struct WithMemory {
    config: VmConfig,
    class: HostClass,
    started: Instant,
    phases: Phases,
    kvm: Kvm,
    vm: VmFd,
    memory: GuestMemoryMmap,
    loading: Loading,
}

impl WithMemory {
    /// Phase 2: interrupt controller, timer, vCPUs.
    ///
    /// # Errors
    /// When KVM refuses one.
    pub fn with_vcpus(mut self) -> Result<WithVcpus, StartError> {
        let vm = &self.vm;
        if self.class == HostClass::Emulated {
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
        let supported = self
            .kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(kvm_step("a list of processor features"))?;
        let mut vcpus = Vec::new();
        for index in 0..self.config.vcpus {
            let vcpu = vm
                .create_vcpu(u64::from(index))
                .map_err(kvm_step(format!("vCPU {index}")))?;
            vcpu.set_cpuid2(&cpuid::for_vcpu(
                &supported,
                index,
                self.config.vcpus,
                self.class,
            ))
            .map_err(kvm_step(format!("the features of vCPU {index}")))?;
            vcpus.push(vcpu);
        }
        self.phases.vcpus_ns = monotonic_ns();
        Ok(WithVcpus { base: self, vcpus })
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
        let loaded = match base.loading.join() {
            Ok(loaded) => loaded?,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            let index = index as u32;
            boot::set_up_registers(vcpu, index, &base.memory, loaded)
                .map_err(|source| StartError::Registers { index, source })?;
        }
        base.phases.loaded_ns = monotonic_ns();
        Ok(Loaded {
            config: base.config,
            class: base.class,
            started: base.started,
            phases: base.phases,
            vm: base.vm,
            memory: base.memory,
            vcpus: self.vcpus,
        })
    }
}

/// Phase 3 done.
pub struct Loaded {
    config: VmConfig,
    class: HostClass,
    started: Instant,
    phases: Phases,
    vm: VmFd,
    memory: GuestMemoryMmap,
    vcpus: Vec<VcpuFd>,
}

impl Loaded {
    /// Phase 4: devices and vCPU threads. The machine is then created, and waits for
    /// [`crate::machine::Action::Resume`].
    ///
    /// # Errors
    /// A disk, socket or tap that cannot be used.
    pub fn machine(mut self) -> Result<Machine, StartError> {
        let vm = &self.vm;
        let serial = serial(&self.config)?;
        vm.register_irqfd(serial.interrupt(), SERIAL_IRQ)
            .map_err(kvm_step("the serial port's interrupt"))?;
        let devices = devices(&self.config)?;
        if devices.len() > MMIO_DEVICES {
            return Err(StartError::TooManyDevices(devices.len()));
        }
        let mut slots = Vec::new();
        for (index, (name, device)) in devices.into_iter().enumerate() {
            let transport = MmioTransport::new(self.memory.clone(), device)
                .map_err(system("an event descriptor"))?;
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
        let vcpus =
            Vcpus::start(self.vcpus, &bus, &ending).map_err(system("a thread for a vCPU"))?;
        self.phases.devices_ns = monotonic_ns();
        Ok(Machine {
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
            _vm: self.vm,
            _memory: self.memory,
        })
    }
}

/// Binds a device's interrupt and the kicks of its queues.
fn wire(vm: &VmFd, index: usize, name: &str, transport: &MmioTransport) -> Result<(), StartError> {
    vm.register_irqfd(transport.interrupt().line(), MMIO_IRQ + index as u32)
        .map_err(kvm_step(format!("the interrupt of {name}")))?;
    let notify = MMIO_BASE + index as u64 * MMIO_SIZE + QUEUE_NOTIFY;
    for (queue, kick) in transport.queue_eventfds().iter().enumerate() {
        vm.register_ioevent(kick, &IoEventAddress::Mmio(notify), queue as u32)
            .map_err(kvm_step(format!("queue {queue} of {name}")))?;
    }
    Ok(())
}

fn device_error<E>(what: String) -> impl FnOnce(E) -> StartError
where
    E: std::error::Error + Send + Sync + 'static,
{
    |source| StartError::Device {
        what,
        source: Box::new(source),
    }
}

fn serial(config: &VmConfig) -> Result<Serial, StartError> {
    match &config.serial {
        Some(serial) => Serial::to_log(&serial.log, serial.limit_bytes)
            .map_err(device_error(format!("serial log {}", serial.log.display()))),
        None => Serial::discard().map_err(system("an event descriptor")),
    }
}

/// A device and its name in metrics.
type Named = (String, Box<dyn Device>);

/// All virtio devices, in the order of their addresses: disks first, so that they are vda, vdb, …
fn devices(config: &VmConfig) -> Result<Vec<Named>, StartError> {
    let mut devices: Vec<Named> = Vec::new();
    for disk in &config.disks {
        let backend = block::open(&disk.path, disk.read_only, disk.layer.as_deref())
            .map_err(device_error(format!("disk {:?}", disk.id)))?;
        let device = Block::new(&disk.id, backend, disk.read_only);
        devices.push((format!("block.{}", disk.id), Box::new(device)));
    }
    if let Some(vsock) = &config.vsock {
        let device = Vsock::new(vsock.guest_cid, &vsock.socket).map_err(device_error(format!(
            "vsock socket {}",
            vsock.socket.display()
        )))?;
        devices.push(("vsock".into(), Box::new(device)));
    }
    for (index, net) in config.networks.iter().enumerate() {
        let device = Net::open(&net.tap, mac(net, &config.id, index)?)
            .map_err(device_error(format!("network device {}", net.tap)))?;
        devices.push((format!("net.{index}"), Box::new(device)));
    }
    devices.push(("rng".into(), Box::new(Rng::new())));
    Ok(devices)
}

/// A locally administered address: the one given, or one made from the VM's id (FNV-1a).
fn mac(net: &NetConfig, id: &str, index: usize) -> Result<[u8; 6], StartError> {
    let Some(text) = &net.mac else {
        let hash = id.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
        });
        let [a, b, c, d, ..] = hash.to_be_bytes();
        return Ok([2, a, b, c, d, index as u8]);
    };
    let bytes: Option<Vec<u8>> = text
        .split(':')
        .map(|part| {
            u8::from_str_radix(part, 16)
                .ok()
                .filter(|_| part.len() == 2)
        })
        .collect();
    bytes
        .and_then(|bytes| <[u8; 6]>::try_from(bytes).ok())
        .filter(|mac| mac[0] & 1 == 0)
        .ok_or_else(|| StartError::Device {
            what: format!("MAC address {text:?} of {}", net.tap),
            source: "it needs six hex bytes with colons, the first one even".into(),
        })
}

/// The kernel's command line: quiet, its devices, what the host needs, what the user adds.
fn command_line(config: &VmConfig, class: HostClass) -> String {
    let mut words = vec![
        "console=ttyS0 quiet reboot=k panic=-1".to_owned(),
        format!("pvpanic_mmio.port={:#x}", crate::bus::PVPANIC_PORT),
        // A stable TSC would be preferred, but it does not survive a move to another host.
        "clocksource=kvm-clock swiotlb=noforce".to_owned(),
        host::boot_args(class).to_owned(),
    ];
    let devices =
        config.disks.len() + usize::from(config.vsock.is_some()) + config.networks.len() + 1;
    for index in 0..devices {
        words.push(format!(
            "virtio_mmio.device={}K@{:#x}:{}",
            MMIO_SIZE >> 10,
            MMIO_BASE + index as u64 * MMIO_SIZE,
            MMIO_IRQ + index as u32
        ));
    }
    words.push(config.kernel_args.clone());
    words.retain(|word| !word.is_empty());
    words.join(" ")
}

/// The file that a machine's socket device made, to be removed when the VM ends.
pub fn vsock_socket(config: &VmConfig) -> Option<&Path> {
    config.vsock.as_ref().map(|vsock| vsock.socket.as_path())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> VmConfig {
        VmConfig::from_json(
            br#"{"id":"vm-1","vcpus":1,"memory_mib":128,"kernel":"/k","kernel_args":"x=1",
                 "disks":[{"id":"root","path":"/d"}],"vsock":{"guest_cid":3,"socket":"/s"}}"#,
        )
        .unwrap()
    }

    #[test]
    fn every_device_is_announced_and_the_users_words_come_last() {
        let line = command_line(&config(), HostClass::Hardware);
        assert!(line.contains("virtio_mmio.device=4K@0xd0000000:5 "));
        assert!(line.contains("virtio_mmio.device=4K@0xd0002000:7 "));
        assert!(!line.contains("0xd0003000"));
        assert!(line.ends_with(" x=1"), "{line}");
        assert!(!line.contains("noxsave"));
        assert!(command_line(&config(), HostClass::Emulated).contains("noxsave"));
    }

    #[test]
    fn a_mac_is_the_given_one_or_a_local_one_of_the_vms_own() {
        let net = |mac: Option<&str>| NetConfig {
            tap: "tap0".into(),
            mac: mac.map(str::to_owned),
        };
        let of = |mac| super::mac(&net(mac), "vm-1", 0);
        assert_eq!(
            of(Some("02:00:00:0a:0b:0c")).unwrap(),
            [2, 0, 0, 10, 11, 12]
        );
        assert_eq!(of(None).unwrap()[0], 2);
        assert_ne!(
            of(None).unwrap(),
            super::mac(&net(None), "vm-2", 0).unwrap()
        );
        for wrong in [
            "",
            "02:00",
            "03:00:00:00:00:00",
            "2:0:0:0:0:0",
            "02:00:00:00:00:0g",
        ] {
            assert!(of(Some(wrong)).is_err(), "{wrong}");
        }
    }
}
