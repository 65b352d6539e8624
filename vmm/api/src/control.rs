//! Replies of the control socket, and the report that a VM leaves.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{HostClass, Run};

/// Where a VM is in its life.
///
/// ```text
/// created -> running <-> paused
///               \          /
///            stopped | failed
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// Built; no guest instruction has run.
    Created,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs are held between two instructions.
    Paused,
    /// It ended as it or its owner wished.
    Stopped,
    /// It ended because something went wrong.
    Failed,
}

/// Why a VM ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Outcome {
    /// The guest powered off.
    PoweredOff,
    /// The guest asked for a reset (`reboot`); a Ratoon VM ends then.
    Reset,
    /// The guest's kernel panicked; the serial log has its last words.
    Panicked,
    /// `stop` on the control socket, or SIGTERM.
    Stopped,
    /// The command that owned the VM went away.
    Orphaned,
    /// The VMM could not go on.
    Failed {
        /// The chain of causes, outermost first.
        causes: Vec<String>,
    },
}

impl Outcome {
    /// The state of a VM that ended so.
    pub fn state(&self) -> VmState {
        match self {
            Self::PoweredOff | Self::Reset | Self::Stopped | Self::Orphaned => VmState::Stopped,
            Self::Panicked | Self::Failed { .. } => VmState::Failed,
        }
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::PoweredOff => f.write_str("the guest powered off"),
            Self::Reset => f.write_str("the guest reset itself"),
            Self::Panicked => f.write_str("the guest's kernel panicked"),
            Self::Stopped => f.write_str("stopped"),
            Self::Orphaned => f.write_str("its owner went away"),
            Self::Failed { causes } => f.write_str(&causes.join(": ")),
        }
    }
}

/// What a VM leaves in the file named by `exit_report`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExitReport {
    /// The VM's id.
    pub id: String,
    /// Why it ended.
    pub outcome: Outcome,
}

/// `GET /v1/status`, and the reply to `POST /v1/pause`, `/v1/resume` and `/v1/stop`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StatusReply {
    /// The VM's id.
    pub id: String,
    /// Where it is in its life.
    pub state: VmState,
    /// The VMM's version.
    pub version: String,
    /// The VMM's process id.
    pub pid: u32,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// What kind of KVM it runs on.
    pub host_class: HostClass,
    /// Time since the VMM began, in milliseconds.
    pub uptime_ms: u64,
    /// The disks that have layers, as a freeze would find them.
    #[serde(default)]
    pub disks: Vec<FrozenDisk>,
}

/// When each phase of the start ended: CLOCK_MONOTONIC in nanoseconds, so that another process on
/// the host can subtract its own reading. In the order in which they happened.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Phases {
    /// `main` was entered.
    pub main_ns: u64,
    /// The configuration is read and checked.
    pub configured_ns: u64,
    /// Guest memory is mapped: new and empty, or a generation's.
    #[serde(default)]
    pub mapped_ns: u64,
    /// The VM exists in KVM with its memory slots.
    pub memory_ns: u64,
    /// The interrupt controller and vCPUs exist.
    pub vcpus_ns: u64,
    /// Kernel and initramfs are in guest memory; of a generation, its state is in the vCPUs.
    pub loaded_ns: u64,
    /// Devices are wired.
    pub devices_ns: u64,
    /// vCPU 0 is about to run its first instruction (R1).
    pub first_instruction_ns: u64,
    /// The first bytes for the guest were put before it over vsock: of a restore or a fork the `wake`. 0
    /// before, as are those below.
    #[serde(default)]
    pub wake_ns: u64,
    /// The first bytes from the guest came over vsock: of a boot its HELLO, of a restore or a fork its answer
    /// to the `wake` (R3).
    #[serde(default)]
    pub answer_ns: u64,
}

/// KVM's own statistics of one vCPU, by the kernel's names (`exits`, `insn_emulation`, …).
pub type VcpuStats = BTreeMap<String, u64>;

/// `GET /v1/metrics`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MetricsReply {
    /// When each phase of the start ended.
    pub phases: Phases,
    /// One map a vCPU; counters are since the VM's creation.
    pub vcpus: Vec<VcpuStats>,
    /// KVM's statistics of the VM as a whole.
    pub vm: VcpuStats,
    /// Ratoon's own counters by name, e.g. `block.root.reads`, `vsock.connections`.
    pub devices: BTreeMap<String, u64>,
}

/// `GET /v1/touched`: which of its memory the VM has touched so far.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TouchedReply {
    /// Ascending runs of whole pages, with what the kernel mapped around them; none when the kernel
    /// cannot tell (before Linux 6.7).
    pub runs: Vec<Run>,
}

/// The body of every reply that is not a success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorReply {
    /// What failed and why.
    pub error: String,
}

/// `POST /v1/freeze`: make a generation of the VM, which goes on as its first child.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FreezeRequest {
    /// A Unix stream socket on which the requester listens. The VMM connects and prepares what needs no pause,
    /// and freezes when it gets one byte there; it gives up when that connection ends. It answers there with one
    /// byte and descriptors (SCM_RIGHTS): a file with [`FrozenMeta`] as JSON, one with the machine's state for
    /// [`crate::GenerationConfig::state`], then the file of each memory layer, the lowest first, all of them
    /// immutable from then on.
    #[schema(value_type = String)]
    pub socket: PathBuf,
    /// Disks by id: where to make the layer that takes what is written from then on. Every disk
    /// that has a writable layer needs one.
    #[serde(default)]
    #[schema(value_type = BTreeMap<String, String>)]
    pub next_layers: BTreeMap<String, PathBuf>,
    /// The host's vsock port of the connection to the runtime that goes on in children: the number that
    /// the VMM answered to `CONNECT` with `OK`, or 1024 for the one that the guest made. No freeze
    /// without it; `None`: the newest that the guest made, if there is one.
    #[serde(default)]
    pub control_port: Option<u32>,
}

/// `POST /v1/birth`: the generation that the machine was started from, if that came as descriptors: it may lie
/// in memory alone, and whoever wants to start from it again gets it here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BirthRequest {
    /// As [`FreezeRequest::socket`].
    #[schema(value_type = String)]
    pub socket: PathBuf,
    /// What it is called ([`crate::GenerationConfig::id`]): another one is refused.
    pub id: String,
}

/// Reply of `POST /v1/freeze`, when the descriptors have been sent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FreezeReply {
    /// How long no vCPU could run, in nanoseconds; 0 if the VM was paused.
    pub pause_ns: u64,
}

/// What comes with a generation's descriptors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrozenMeta {
    /// See [`FreezeReply::pause_ns`].
    pub pause_ns: u64,
    /// From the requester's word until the guest slept, in nanoseconds; the pause began then.
    #[serde(default)]
    pub waited_ns: u64,
    /// One for each further descriptor.
    pub layers: Vec<FrozenLayer>,
    /// The disks that have layers.
    #[serde(default)]
    pub disks: Vec<FrozenDisk>,
}

/// The layers of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FrozenDisk {
    /// Its id.
    pub id: String,
    /// All its frozen layers, the lowest first: nobody writes them again.
    #[schema(value_type = Vec<String>)]
    pub frozen: Vec<PathBuf>,
    /// How many layers of freezes each stands for; none: one each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub freezes: Vec<u32>,
    /// Where the machine, as it goes on, writes. Not the one that was asked for when nothing had
    /// been written since the last freeze: that is not made then.
    #[schema(value_type = String)]
    pub layer: PathBuf,
}

/// A layer of frozen memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrozenLayer {
    /// Which parts of the file count.
    pub runs: Vec<Run>,
    /// See [`crate::MemoryLayerConfig::packed`].
    #[serde(default)]
    pub packed: bool,
    /// See [`crate::MemoryLayerConfig::freezes`].
    #[serde(default = "crate::config::one")]
    pub freezes: u32,
}

impl FrozenDisk {
    /// How many layers of freezes each frozen layer stands for.
    pub fn freezes(&self) -> impl Iterator<Item = u32> {
        let known = self.freezes.iter().copied();
        known.chain(std::iter::repeat(1)).take(self.frozen.len())
    }
}
