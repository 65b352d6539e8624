//! The machine itself: ports, metrics, time, identity, and quiet for the moment of a freeze.

use serde::{Deserialize, Serialize};

/// Parameters of `port.connect`: STDIN goes to the server, STDOUT comes from it; EVENT `connected`
/// when there is one. The reply is [`crate::Transferred`] (bytes of both ways), when both are at
/// their end.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortConnect {
    /// TCP port.
    pub port: u16,
    /// An address of the guest; default 127.0.0.1, then ::1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
}

/// A server. `port.list` replies with an array of them, by port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// TCP port.
    pub port: u16,
    /// The address that it listens on, `0.0.0.0` and `::` for all.
    pub address: String,
    /// Whose it is, if that can be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
    /// The program's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub program: Option<String>,
}

/// Reply of `metrics`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// CLOCK_BOOTTIME, microseconds.
    pub uptime_us: u64,
    /// CLOCK_REALTIME, microseconds since 1970.
    pub time_us: u64,
    /// Processors.
    pub cpus: u32,
    /// Time that all processors together were busy since boot, microseconds.
    pub cpu_busy_us: u64,
    /// Load average of the last minute.
    pub load: f64,
    /// Memory, bytes.
    pub memory_total: u64,
    /// Memory that programs can still have, bytes.
    pub memory_available: u64,
    /// File cache, bytes.
    pub memory_cache: u64,
    /// Disk of `/`, bytes.
    pub disk_total: u64,
    /// Free on it, bytes.
    pub disk_free: u64,
    /// Bytes received on all network devices but the loopback.
    pub network_received: u64,
    /// Bytes sent on them.
    pub network_sent: u64,
    /// Threads of all processes, the kernel's own included (sysinfo(2)).
    pub processes: u32,
    /// The runtime's own resident memory, bytes.
    pub runtime_memory: u64,
    /// With `top` in the parameters: the processes that used most processor time.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub top: Vec<TopProcess>,
}

/// Parameters of `metrics`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetricsParams {
    /// How many processes to list, at most 100.
    #[serde(default)]
    pub top: u32,
}

/// A process of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopProcess {
    /// Process id.
    pub pid: i32,
    /// Its parent.
    pub ppid: i32,
    /// Owner's number.
    pub uid: u32,
    /// `R`, `S`, `D`, `Z`, `T`, as in /proc.
    pub state: String,
    /// Processor time since it began, microseconds.
    pub cpu_us: u64,
    /// Resident memory, bytes.
    pub memory: u64,
    /// Command line, at most 256 bytes.
    pub command: String,
}

/// Parameters of `time.set`; the reply is `null`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimeSet {
    /// CLOCK_REALTIME, microseconds since 1970.
    pub time_us: u64,
}

/// Parameters of `entropy.add`; the reply is `null`. The kernel's generator is reseeded at once.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntropyAdd {
    /// 1 to 512 bytes, as hexadecimal digits.
    pub hex: String,
}

/// Parameters of `hostname.set`; the reply is `null`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostnameSet {
    /// 1 to 63 letters, digits, `-` and `.`.
    pub hostname: String,
}

/// Parameters of `network.set`; the reply is `null`. What is not named stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkSet {
    /// The device; default `eth0`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Hardware address, `02:…`; the device goes down and up for it, and keeps what is not named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// All addresses that it has then, with prefix lengths: `10.0.0.2/24`, `fd00::2/64`; at most
    /// 16. IPv6 link-local ones are the kernel's own and stay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addresses: Option<Vec<String>>,
    /// Where everything else goes: one address for each family.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gateways: Vec<String>,
    /// Name servers: written to /etc/resolv.conf.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name_servers: Option<Vec<String>>,
    /// MTU in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
}

/// Parameters of `freeze` and `thaw`; the reply is `null`. Freeze writes back what is dirty. Thaw
/// undoes what freeze did, and is no error when nothing is frozen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FreezeParams {
    /// Stop all processes but the runtime's own (cgroup freezer).
    #[serde(default)]
    pub processes: bool,
    /// Freeze `/` (FIFREEZE), when it is on a disk: writers wait.
    #[serde(default)]
    pub file_systems: bool,
    /// A `wake` is to come: calls that start programs wait for it, and are not refused. Of `freeze` alone.
    #[serde(default)]
    pub until_wake: bool,
}

/// Parameters of `wake`: who this machine is from now on. Until it has come, a runtime that was
/// told to expect it (`expect_wake`) answers nothing but `ping`; other calls wait. Each step is
/// done, or the call fails and the runtime keeps waiting. The reply is [`Awake`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wake {
    /// The generation that this machine was started from.
    pub generation: String,
    /// The VM's id.
    pub id: String,
    /// This is another machine than the one that was told to expect it, not that one going on: TCP
    /// connections to elsewhere are reset if it has network devices (that `networks` names), and `index`
    /// and `message` are what this call says. Otherwise those two stay.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub child: bool,
    /// Which child of a fork, from 0: commands have it as RATOON_CHILD. None: it is not of a fork.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<u32>,
    /// As for `hostname.set`; default: stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// New `/etc/machine-id`, 32 hexadecimal digits; default: stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine_id: Option<String>,
    /// As for `time.set`; default: stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_us: Option<u64>,
    /// As for `entropy.add`, at least 16 bytes; required: a child must not share its parent's random numbers.
    pub entropy: String,
    /// As for `network.set`; default: stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkSet>,
    /// Further network devices.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub networks: Vec<NetworkSet>,
    /// As the last step, let all processes go on, as by `thaw`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub thaw: bool,
    /// A secret for this machine alone, handed to programs that ask; never written to disk, and
    /// forgotten by `expect_wake`: each `wake` names it, or there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    /// A word from the forker, for programs; see `child`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// Reply of `wake` and of `whoami`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Awake {
    /// As `wake` said, empty before the first.
    pub generation: String,
    /// As `wake` said.
    pub id: String,
    /// As `wake` said, else 0.
    pub index: u32,
    /// How often this machine was woken.
    pub wakes: u64,
    /// As `wake` said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// Parameters of `runtime.swap`: the new runtime's binary follows as STDIN, to its END. The reply is
/// [`Swapped`], by the new runtime, over the same connection; after an error the old one goes on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuntimeSwap {
    /// Length of the binary, at most 64 MiB.
    pub bytes: u64,
    /// BLAKE3 of it, 64 hexadecimal digits.
    pub blake3: String,
}

/// Reply of `runtime.swap`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Swapped {
    /// The version of the runtime that serves now, e.g. `0.1.0`.
    pub runtime: String,
    /// The calls that it knows, as in [`crate::Hello`].
    #[serde(default)]
    pub methods: Vec<String>,
}
