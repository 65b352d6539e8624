//! What the figures were measured on, and how quiet it was.
//!
//! Facts that cannot be read are left empty: they never stop a run. The noise floor is the time of
//! a fixed loop of user instructions, before and after: when its spread is wide or its median
//! moved, the figures beside it are worth less, and the summary says so.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ratoon_vmm_api::HostClass;
use serde::{Deserialize, Serialize};

use crate::machine::Process;

/// How long a peer may take to say its version.
const PATIENCE: Duration = Duration::from_secs(5);
/// No version is longer.
const SAID_MAX_BYTES: usize = 4096;

/// Facts of the host and of the programs measured.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Host {
    /// When the run began, UTC, as `date` prints it.
    pub date: String,
    /// The command line, without folders.
    pub command: Vec<String>,
    /// Commit of the working tree in which the harness runs; `-dirty` with changes.
    pub commit: String,
    /// Model of the processor.
    pub cpu: String,
    /// Logical processors.
    pub cpus: usize,
    /// Frequency governor.
    pub governor: String,
    /// Host memory in MiB.
    pub memory_mib: u64,
    /// Host kernel.
    pub kernel: String,
    /// Loaded KVM modules.
    pub kvm: Vec<String>,
    /// How guest kernels run: `hardware` (VT-x, AMD-V) or `emulated`.
    pub class: String,
    /// The peers measured beside us, by name, and their versions.
    pub peers: BTreeMap<String, String>,
    /// Noise before the run; after it: [`crate::record::Record::End`].
    pub noise_before: Noise,
}

/// How long the fixed loop took.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Noise {
    /// Median of the loop, in milliseconds.
    pub median_ms: f64,
    /// Its slowest turn.
    pub max_ms: f64,
    /// How much of one processor the loop got, 0 to 1: what is missing went to others.
    pub cpu_share: f64,
    /// /proc/loadavg.
    pub loadavg: String,
}

fn read(path: &str) -> String {
    fs::read_to_string(path)
        .map(|text| text.trim().to_owned())
        .unwrap_or_default()
}

fn output(program: &str, args: &[&str]) -> String {
    Command::new(program)
        .args(args)
        .output()
        .ok()
        .filter(|output| output.status.success())
        .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
        .unwrap_or_default()
}

/// What a program of somebody else's says within [`PATIENCE`]; empty when it says nothing until then.
fn output_in_time(program: &Path, args: &[&str]) -> String {
    let mut command = Command::new(program);
    command
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let Ok(child) = command.spawn() else {
        return String::new();
    };
    let mut process = Process(child);
    let from = Instant::now();
    while matches!(process.0.try_wait(), Ok(None)) {
        if from.elapsed() > PATIENCE {
            return String::new();
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut said = Vec::new();
    // A child of its own may still hold the pipe: only what is there already.
    if let Some(out) = &process.0.stdout
        && rustix::io::ioctl_fionread(out).is_ok_and(|bytes| bytes > 0)
    {
        said.resize(SAID_MAX_BYTES, 0);
        let len = rustix::io::read(out, &mut said).unwrap_or(0);
        said.truncate(len);
    }
    String::from_utf8_lossy(&said).trim().to_owned()
}

/// Logical processors that this process may use.
pub fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Measures the noise floor: 31 turns of a loop of twenty million steps, a second or so in all.
pub fn noise() -> Noise {
    let loadavg = read("/proc/loadavg");
    let cpu_time = || rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    let (begin, cpu_begin) = (Instant::now(), cpu_time());
    let mut times: Vec<f64> = (0..31)
        .map(|turn| {
            let start = Instant::now();
            let mut x: u64 = turn + 1;
            for _ in 0..20_000_000 {
                x = std::hint::black_box(x.wrapping_mul(5).wrapping_add(1));
            }
            start.elapsed().as_secs_f64() * 1e3
        })
        .collect();
    let wall = begin.elapsed().as_secs_f64();
    let cpu_end = cpu_time();
    let cpu = (cpu_end.tv_sec - cpu_begin.tv_sec) as f64
        + (cpu_end.tv_nsec - cpu_begin.tv_nsec) as f64 / 1e9;
    times.sort_by(f64::total_cmp);
    Noise {
        median_ms: times[times.len() / 2],
        max_ms: times[times.len() - 1],
        cpu_share: cpu / wall,
        loadavg,
    }
}

/// Reads the facts and measures the noise. `peers`: names and versions.
pub fn facts(peers: BTreeMap<String, String>) -> Host {
    Host {
        peers,
        noise_before: noise(),
        ..facts_without_noise()
    }
}

/// Reads the facts.
pub fn facts_without_noise() -> Host {
    let cpuinfo = read("/proc/cpuinfo");
    let cpu = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map(|line| line.trim_start_matches([' ', '\t', ':']).to_owned())
        .unwrap_or_default();
    let memory_mib = read("/proc/meminfo")
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok())
        .unwrap_or(0)
        / 1024;
    let mut kvm: Vec<String> = fs::read_dir("/sys/module")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with("kvm"))
        .collect();
    kvm.sort();
    // Where things lie on this machine is nobody's business: `--peer qemu=/a/b` is `--peer qemu=b`.
    let base = |arg: String| {
        let (name, path) = arg.split_once('=').unwrap_or(("", &arg));
        let file = path.rsplit('/').next().unwrap_or_default();
        if name.is_empty() {
            file.to_owned()
        } else {
            format!("{name}={file}")
        }
    };
    Host {
        date: output("date", &["-u", "+%Y-%m-%dT%H:%M:%SZ"]),
        command: std::env::args().map(base).collect(),
        commit: output("git", &["describe", "--always", "--dirty"]),
        cpu,
        cpus: processors(),
        governor: read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        memory_mib,
        kernel: read("/proc/sys/kernel/osrelease"),
        kvm,
        class: match HostClass::detect() {
            HostClass::Hardware => "hardware",
            HostClass::Emulated => "emulated",
        }
        .into(),
        peers: BTreeMap::new(),
        noise_before: Noise::default(),
    }
}

/// What each peer says of its version.
pub fn versions(peers: &BTreeMap<String, PathBuf>) -> BTreeMap<String, String> {
    let version = |path: &PathBuf| {
        let said = output_in_time(path, &["--version"]);
        said.lines().next().unwrap_or("unknown version").to_owned()
    };
    peers
        .iter()
        .map(|(name, path)| (name.clone(), version(path)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_that_does_not_say_its_version_holds_nobody_up() {
        let said = |script: &str| output_in_time(Path::new("sh"), &["-c", script]);
        assert_eq!(said("echo one; echo two"), "one\ntwo");
        assert_eq!(said("sleep 1 & echo mine"), "mine");
        assert_eq!(said("exit 3"), "");
        assert_eq!(output_in_time(Path::new("/no/such/peer"), &[]), "");
        let from = Instant::now();
        assert_eq!(said("exec sleep 1000"), "");
        assert!(from.elapsed() < 10 * PATIENCE);
    }
}
