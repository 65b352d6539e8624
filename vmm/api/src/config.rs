//! The configuration of one virtual machine, and what makes it unusable.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The most vCPUs that one machine can have: the guest kernel is built for 32.
pub const MAX_VCPUS: u32 = 32;
/// The least memory, in MiB, that the guest kernel and the runtime come up in.
pub const MIN_MEMORY_MIB: u64 = 64;
/// The most memory, in MiB: what fits the 40-bit guest-physical space of every host we support,
/// less the hole below 4 GiB.
pub const MAX_MEMORY_MIB: u64 = 512 * 1024;
/// The most disks.
pub const MAX_DISKS: usize = 8;
/// The most frozen layers of one disk.
pub const MAX_FROZEN_LAYERS: usize = 60;
/// A file in the folder of a disk's layers. A VMM removes layers that it has merged only with a lock on it
/// (`flock`), and so do others, shared, who make links to the layers of a generation: from before the freeze.
pub const LAYERS_LOCK: &str = "layers.lock";
/// The most network devices.
pub const MAX_NETWORKS: usize = 4;

/// One virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// The VM's id, as it appears in logs and replies.
    pub id: String,
    /// Virtual CPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u32,
    /// Guest memory in MiB, [`MIN_MEMORY_MIB`] to [`MAX_MEMORY_MIB`].
    pub memory_mib: u64,
    /// Start from this generation, in place of booting: vCPUs, memory and devices must be those of
    /// the machine that was frozen.
    #[serde(default)]
    pub generation: Option<GenerationConfig>,
    /// An uncompressed ELF `vmlinux`; not read with a `generation`.
    #[schema(value_type = String)]
    pub kernel: PathBuf,
    /// An uncompressed cpio archive (newc).
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub initramfs: Option<PathBuf>,
    /// Words added at the end of the kernel's command line.
    #[serde(default)]
    pub kernel_args: String,
    /// In the guest they are `/dev/vda`, `/dev/vdb`, … in this order.
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    /// The socket device; its absence means that nobody can talk to the runtime.
    #[serde(default)]
    pub vsock: Option<VsockConfig>,
    /// Network devices, `eth0`, `eth1`, … in this order.
    #[serde(default)]
    pub networks: Vec<NetConfig>,
    /// The device by which the guest gives back memory that it does not use.
    #[serde(default = "yes")]
    pub balloon: bool,
    /// Where the serial console goes; without it, its bytes are dropped.
    #[serde(default)]
    pub serial: Option<SerialConfig>,
    /// A file that gets the [`crate::ExitReport`] when the VM ends, written atomically.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub exit_report: Option<PathBuf>,
    /// A directory that the VMM removes, with all in it, when its lifeline (`--lifeline-fd`) is
    /// cut: for a machine that must not outlive the command that made it.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub remove_when_orphaned: Option<PathBuf>,
}

fn yes() -> bool {
    true
}

/// A frozen machine to start from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GenerationConfig {
    /// What it is called, for whoever asks the machine for it again ([`crate::BirthRequest`]).
    #[serde(default)]
    pub id: String,
    /// The file of its state.
    #[schema(value_type = String)]
    pub state: PathBuf,
    /// Its memory's layers, the lowest first; when it is `paged`, what lies over the memory that
    /// comes from there.
    pub memory: Vec<MemoryLayerConfig>,
    /// The lowest layer comes from a pager, as it is touched. A connection to that pager is the first
    /// descriptor that the owner sends after the three that each VMM gets.
    #[serde(default)]
    pub paged: bool,
    /// The files are the next descriptors that the owner sends: the state's, then each layer's; their paths
    /// here are only what they are called. So a generation that lies in memory alone can be started from.
    #[serde(default)]
    pub descriptors: bool,
}

/// One layer of a generation's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MemoryLayerConfig {
    /// The file; mapped, never written.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// The parts of it that count; none: the whole.
    #[serde(default)]
    pub runs: Vec<Run>,
    /// The file has the runs end to end in their order, and nothing else. Otherwise it is as long
    /// as the memory, and each run is where it is in memory.
    #[serde(default)]
    pub packed: bool,
    /// How many layers of freezes it stands for: 1, or more when they were merged.
    #[serde(default = "one")]
    pub freezes: u32,
}

pub(crate) fn one() -> u32 {
    1
}

/// How many of the lowest layers lie wholly within the first `depth` freezes, when each stands for so many of
/// them: what was merged keeps its place.
pub fn layers_within(freezes: impl IntoIterator<Item = u32>, depth: usize) -> usize {
    let mut sum = 0_usize;
    let ends = freezes.into_iter().map(|count| {
        sum = sum.saturating_add(count as usize);
        sum
    });
    ends.take_while(|end| *end <= depth).count()
}

/// A part of a memory layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Run {
    /// The first byte; guest memory without its hole. A multiple of 4096.
    pub offset: u64,
    /// How many bytes. A multiple of 4096.
    pub len: u64,
}

/// One block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// What the guest reads as the disk's serial number; at most 20 ASCII bytes.
    pub id: String,
    /// The disk's content: a raw file. Opened read-only when `read_only` is set or there is a
    /// `layer`. `/dev/fd/N` here, in `frozen` and in `layer` is a descriptor that the VMM inherited.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// The guest may only read.
    #[serde(default)]
    pub read_only: bool,
    /// qcow2 files over `path`, the lowest first: what was written before the machine, or those that
    /// it comes from, were frozen. Only read, and only with a `layer` over them; at most
    /// [`MAX_FROZEN_LAYERS`].
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub frozen: Vec<PathBuf>,
    /// How many layers of freezes each of `frozen` stands for; none: one each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub freezes: Vec<u32>,
    /// A qcow2 file over all these that takes all writes; made when it does not exist.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub layer: Option<PathBuf>,
}

/// The socket device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context id, 3 to 2^32 - 2.
    pub guest_cid: u32,
    /// The Unix socket that the VMM makes: `CONNECT <port>\n` on it reaches a port in the guest.
    /// A guest that connects to port N of the host reaches the socket `<path>_<N>`.
    #[schema(value_type = String)]
    pub socket: PathBuf,
}

/// One network device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// The name of an existing tap device, at most 15 bytes.
    pub tap: String,
    /// The guest's MAC address, `02:00:00:00:00:01`; made from the VM's id when absent.
    #[serde(default)]
    pub mac: Option<String>,
}

impl NetConfig {
    /// The guest's MAC address of network device `index` of the VM `id`: the one given, or a locally
    /// administered one made from the id (FNV-1a).
    pub fn mac_of(&self, id: &str, index: usize) -> String {
        self.mac.clone().unwrap_or_else(|| {
            let hash = id.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
            });
            let [a, b, c, d, ..] = hash.to_be_bytes();
            let last = index as u8;
            format!("02:{a:02x}:{b:02x}:{c:02x}:{d:02x}:{last:02x}")
        })
    }
}

/// The serial console's log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SerialConfig {
    /// The file. When it is full it is renamed to `<log>.1` and begun anew.
    #[schema(value_type = String)]
    pub log: PathBuf,
    /// How large both files together may become, in bytes.
    pub limit_bytes: u64,
}

/// Why a configuration is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConfigError {
    /// Not the JSON of a [`VmConfig`].
    Json(String),
    /// Zero or too many vCPUs.
    Vcpus(u32),
    /// Too little or too much memory.
    Memory(u64),
    /// Too many disks.
    Disks(usize),
    /// Too many network devices.
    Networks(usize),
    /// The disk's id is longer than 20 bytes or not ASCII.
    DiskId(String),
    /// The disk has a layer and is read-only.
    ReadOnlyLayer(String),
    /// The disk has frozen layers and no writable one.
    FrozenOnly(String),
    /// Too many frozen layers.
    FrozenLayers(usize),
    /// The guest's context id is one of the reserved ones.
    GuestCid(u32),
    /// The VM's id has characters other than letters, digits, `-`, `_`, `.`, or is not 1 to 64 long.
    Id(String),
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Json(why) => write!(f, "the VM's configuration is not valid: {why}"),
            Self::Vcpus(n) => write!(f, "{n} vCPUs: choose 1 to {MAX_VCPUS}"),
            Self::Memory(mib) => write!(
                f,
                "{mib} MiB of memory: choose {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB} MiB"
            ),
            Self::Disks(n) => write!(f, "{n} disks: at most {MAX_DISKS}"),
            Self::Networks(n) => write!(f, "{n} network devices: at most {MAX_NETWORKS}"),
            Self::DiskId(id) => write!(
                f,
                "disk id {id:?}: at most 20 ASCII letters, digits and signs"
            ),
            Self::ReadOnlyLayer(id) => write!(
                f,
                "disk {id:?} is read-only and has a writable layer: drop one of the two"
            ),
            Self::FrozenOnly(id) => write!(
                f,
                "disk {id:?} has frozen layers and no writable one: give it a layer"
            ),
            Self::FrozenLayers(n) => write!(
                f,
                "{n} frozen layers of a disk: at most {MAX_FROZEN_LAYERS}; start from an older \
                 snapshot"
            ),
            Self::GuestCid(cid) => {
                write!(f, "guest CID {cid} is reserved: choose 3 to 4294967294")
            }
            Self::Id(id) => write!(
                f,
                "VM id {id:?}: 1 to 64 letters, digits, '-', '_' or '.', not starting with '.'"
            ),
        }
    }
}

impl std::error::Error for ConfigError {}

impl VmConfig {
    /// Reads and checks a configuration.
    ///
    /// # Errors
    /// A [`ConfigError`] that names the first thing wrong.
    pub fn from_json(json: &[u8]) -> Result<Self, ConfigError> {
        let config: Self =
            serde_json::from_slice(json).map_err(|error| ConfigError::Json(error.to_string()))?;
        config.check()?;
        Ok(config)
    }

    /// Checks what the types alone do not say. Files are not looked at.
    ///
    /// # Errors
    /// A [`ConfigError`] that names the first thing wrong.
    pub fn check(&self) -> Result<(), ConfigError> {
        let id_char = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if self.id.is_empty()
            || self.id.len() > 64
            || self.id.starts_with('.')
            || !self.id.chars().all(id_char)
        {
            return Err(ConfigError::Id(self.id.clone()));
        }
        if !(1..=MAX_VCPUS).contains(&self.vcpus) {
            return Err(ConfigError::Vcpus(self.vcpus));
        }
        if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&self.memory_mib) {
            return Err(ConfigError::Memory(self.memory_mib));
        }
        if self.disks.len() > MAX_DISKS {
            return Err(ConfigError::Disks(self.disks.len()));
        }
        if self.networks.len() > MAX_NETWORKS {
            return Err(ConfigError::Networks(self.networks.len()));
        }
        for disk in &self.disks {
            if disk.id.len() > 20 || !disk.id.chars().all(|c| c.is_ascii_graphic()) {
                return Err(ConfigError::DiskId(disk.id.clone()));
            }
            if disk.read_only && disk.layer.is_some() {
                return Err(ConfigError::ReadOnlyLayer(disk.id.clone()));
            }
            if disk.layer.is_none() && !disk.frozen.is_empty() {
                return Err(ConfigError::FrozenOnly(disk.id.clone()));
            }
            if disk.frozen.len() > MAX_FROZEN_LAYERS {
                return Err(ConfigError::FrozenLayers(disk.frozen.len()));
            }
        }
        if let Some(vsock) = &self.vsock
            && (vsock.guest_cid < 3 || vsock.guest_cid == u32::MAX)
        {
            return Err(ConfigError::GuestCid(vsock.guest_cid));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> VmConfig {
        VmConfig::from_json(
            br#"{"id":"vm-1","vcpus":1,"memory_mib":128,"kernel":"/k",
                 "disks":[{"id":"root","path":"/d","layer":"/l"}],
                 "vsock":{"guest_cid":3,"socket":"/s"}}"#,
        )
        .unwrap()
    }

    #[test]
    fn a_configuration_reads_back_as_it_was_written() {
        let json = serde_json::to_vec(&sample()).unwrap();
        assert_eq!(VmConfig::from_json(&json).unwrap(), sample());
    }

    #[test]
    fn each_limit_is_refused_by_name() {
        let refuse = |change: fn(&mut VmConfig)| {
            let mut config = sample();
            change(&mut config);
            config.check().unwrap_err()
        };
        assert_eq!(refuse(|c| c.vcpus = 0), ConfigError::Vcpus(0));
        assert_eq!(refuse(|c| c.vcpus = 1000), ConfigError::Vcpus(1000));
        assert_eq!(refuse(|c| c.memory_mib = 63), ConfigError::Memory(63));
        assert_eq!(
            refuse(|c| c.id = "../x".into()),
            ConfigError::Id("../x".into())
        );
        assert_eq!(refuse(|c| c.id.clear()), ConfigError::Id(String::new()));
        assert_eq!(
            refuse(|c| c.disks = vec![c.disks[0].clone(); 9]),
            ConfigError::Disks(9)
        );
        assert_eq!(
            refuse(|c| c.disks[0].read_only = true),
            ConfigError::ReadOnlyLayer("root".into())
        );
        assert_eq!(
            refuse(|c| c.disks[0].frozen = vec!["/f".into(); 61]),
            ConfigError::FrozenLayers(61)
        );
        assert_eq!(
            refuse(|c| {
                c.disks[0].frozen = vec!["/f".into()];
                c.disks[0].layer = None;
            }),
            ConfigError::FrozenOnly("root".into())
        );
        assert_eq!(
            refuse(|c| c.disks[0].id = "x".repeat(21)),
            ConfigError::DiskId("x".repeat(21))
        );
        assert_eq!(
            refuse(|c| c.vsock.as_mut().unwrap().guest_cid = 2),
            ConfigError::GuestCid(2)
        );
    }

    #[test]
    fn an_unknown_field_is_refused_by_name() {
        let error =
            VmConfig::from_json(br#"{"id":"a","vcpus":1,"memory_mib":128,"kernel":"/k","cpus":2}"#)
                .unwrap_err();
        assert!(error.to_string().contains("`cpus`"), "{error}");
    }
}
