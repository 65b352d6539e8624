//! What /proc says of a VM's process: memory by part, CPU time by thread.
//!
//! It fails when the process has ended.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result};

/// The memfds of guest memory, as /proc shows them.
const GUEST_MEMFDS: &str = "/memfd:ratoon-";
/// A snapshot's memory.
const GUEST_FILE: &str = "/memory.bin";
const GUEST: &str = "guest";
/// A tick of /proc/PID/stat, as Linux has it on every x86-64 (USER_HZ is 100).
const TICK_NS: u64 = 10_000_000;

/// Memory of one part of a process, in KiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// Resident.
    pub rss_kib: u64,
    /// Resident, shared pages counted in part.
    pub pss_kib: u64,
    /// Resident and nobody else's.
    pub private_kib: u64,
    /// Of that, what was written: what one more process needs, however many there are.
    pub dirty_kib: u64,
}

impl Memory {
    /// Adds a line of a mapping, `Rss:  12 kB`; others than those that are told count nothing.
    fn count(&mut self, line: &str) {
        let mut words = line.split_ascii_whitespace();
        let key = words.next().unwrap_or_default();
        let Some(value) = words.next().and_then(|v| v.parse::<u64>().ok()) else {
            return;
        };
        match key {
            "Rss:" => self.rss_kib += value,
            "Pss:" => self.pss_kib += value,
            "Private_Clean:" => self.private_kib += value,
            "Private_Dirty:" => {
                self.private_kib += value;
                self.dirty_kib += value;
            }
            _ => {}
        }
    }
}

/// Memory of a peer's process: of the VMM, and of its guest, whose mappings are those of at least half its size.
///
/// # Errors
/// When the process has ended.
pub fn of_peer(pid: u32, guest_mib: u64) -> Result<[Memory; 2]> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).context("memory of the VMM")?;
    Ok(parse_peer(&smaps, guest_mib << 19))
}

fn parse_peer(smaps: &str, guest_min_bytes: u64) -> [Memory; 2] {
    let mut parts = [Memory::default(); 2];
    let mut part = 0;
    for line in smaps.lines() {
        if let Some((start, end)) = range(line) {
            part = usize::from(end.saturating_sub(start) >= guest_min_bytes);
        } else {
            parts[part].count(line);
        }
    }
    parts
}

/// The addresses of a line that begins a mapping.
fn range(line: &str) -> Option<(u64, u64)> {
    let (start, end) = line.split_ascii_whitespace().next()?.split_once('-')?;
    let hex = |text| u64::from_str_radix(text, 16).ok();
    hex(start).zip(hex(end))
}

/// A process's memory beyond its guest's, by part: `text` (the program's file, read-only), `data`
/// (its relocated and writable parts), `heap`, `stacks` (of all threads), `anonymous` (allocator
/// arenas and other mappings), `kvm` (the vCPU's run page), `other files`.
///
/// # Errors
/// When the process has ended.
pub fn memory(pid: u32) -> Result<BTreeMap<&'static str, Memory>> {
    let mut parts = all_memory(pid)?;
    parts.remove(GUEST);
    Ok(parts)
}

/// A process's memory that is its guest's.
///
/// # Errors
/// When the process has ended.
pub fn guest_memory(pid: u32) -> Result<Memory> {
    Ok(all_memory(pid)?.remove(GUEST).unwrap_or_default())
}

fn all_memory(pid: u32) -> Result<BTreeMap<&'static str, Memory>> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).context("memory of the VMM")?;
    Ok(parse_smaps(&smaps, &stack_pointers(pid)))
}

/// Where each thread's stack is, as far as the kernel tells (a thread on a CPU right now does not).
fn stack_pointers(pid: u32) -> Vec<u64> {
    threads(pid)
        .filter_map(|tid| fs::read_to_string(format!("/proc/{pid}/task/{tid}/syscall")).ok())
        .filter_map(|line| {
            // number, six arguments, stack pointer, instruction pointer
            let pointer = line.split_ascii_whitespace().rev().nth(1)?;
            u64::from_str_radix(pointer.strip_prefix("0x")?, 16).ok()
        })
        .collect()
}

fn threads(pid: u32) -> impl Iterator<Item = u32> {
    fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn parse_smaps(smaps: &str, stacks: &[u64]) -> BTreeMap<&'static str, Memory> {
    let mut parts: BTreeMap<&'static str, Memory> = BTreeMap::new();
    let mut part = GUEST;
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let Some(first) = words.next() else { continue };
        if first.ends_with(':') {
            parts.entry(part).or_default().count(line);
            continue;
        }
        let protection = words.next().unwrap_or_default();
        // After offset, device and inode comes the name, which may hold spaces.
        let name = words.nth(3).unwrap_or_default();
        part = classify(first, protection, name, stacks);
    }
    parts
}

/// The part that a mapping belongs to.
fn classify(range: &str, protection: &str, name: &str, stacks: &[u64]) -> &'static str {
    let (start, end) = range.split_once('-').unwrap_or_default();
    let hex = |text| u64::from_str_radix(text, 16).unwrap_or(0);
    let holds_stack = stacks
        .iter()
        .any(|pointer| (hex(start)..hex(end)).contains(pointer));
    match name {
        _ if name.starts_with(GUEST_MEMFDS) || name.ends_with(GUEST_FILE) => GUEST,
        "[heap]" => "heap",
        "[stack]" => "stacks",
        "" if holds_stack => "stacks",
        "" => "anonymous",
        _ if name.starts_with("[v") => "vdso",
        _ if name.starts_with("anon_inode:") => "kvm",
        _ if name.ends_with("/ratoon-vmm") && protection.contains('w') => "data",
        // `r--` of the file is constants, headers and, after relocation, read-only data.
        _ if name.ends_with("/ratoon-vmm") => "text",
        _ => "other files",
    }
}

/// CPU time in nanoseconds of the event loop's thread (the process's first one) and of all vCPU
/// threads, since they began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cpu {
    /// The event loop, which serves all devices' queues.
    pub event_loop_ns: u64,
    /// The vCPUs, guest time included.
    pub vcpus_ns: u64,
}

/// CPU time of all threads of a process that still live, in nanoseconds.
///
/// # Errors
/// When the process has ended.
pub fn cpu_total_ns(pid: u32) -> Result<u64> {
    threads(pid).map(|tid| thread_cpu_ns(pid, tid)).sum()
}

/// CPU time of a process with that of its threads that have ended, in nanoseconds; to some 10 ms.
///
/// # Errors
/// When the process has been waited for.
pub fn cpu_of_all_ns(pid: u32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).context("CPU time of a process")?;
    // The name may have anything in it; utime and stime are the 14th and 15th field (proc_pid_stat(5)).
    let (_, fields) = text.rsplit_once(')').context("no name in stat")?;
    let ticks = fields.split_ascii_whitespace().skip(11).take(2);
    let ticks = ticks.map(|ticks| Ok(ticks.parse::<u64>()?));
    let ticks: u64 = ticks.sum::<Result<u64>>()?;
    Ok(ticks * TICK_NS)
}

fn thread_cpu_ns(pid: u32, tid: u32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{tid}/schedstat"))
        .context("CPU time of the VMM")?;
    let first = text.split(' ').next().unwrap_or_default();
    first
        .parse()
        .with_context(|| format!("schedstat says {text:?}"))
}

/// Reads the CPU times of a VM's process from its threads' schedstat.
///
/// # Errors
/// When the process has ended.
pub fn cpu(pid: u32) -> Result<Cpu> {
    let mut cpu = Cpu {
        event_loop_ns: thread_cpu_ns(pid, pid)?,
        vcpus_ns: 0,
    };
    for tid in threads(pid) {
        let name = fs::read_to_string(format!("/proc/{pid}/task/{tid}/comm")).unwrap_or_default();
        if name.starts_with("vcpu") {
            cpu.vcpus_ns += thread_cpu_ns(pid, tid)?;
        }
    }
    Ok(cpu)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
7f0000000000-7f0008000000 rw-s 00000000 00:01 9 /memfd:ratoon-guest (deleted)
Rss:               9000 kB
Pss:               9000 kB
Private_Dirty:     9000 kB
7f0010000000-7f0010200000 r-xp 00000000 fe:00 7 /opt/ratoon-vmm
Rss:                800 kB
Pss:                400 kB
Private_Clean:        0 kB
7f0010200000-7f0010210000 rw-p 00000000 fe:00 7 /opt/ratoon-vmm
Rss:                 20 kB
Pss:                 20 kB
Private_Dirty:       20 kB
7f0020000000-7f0020200000 rw-p 00000000 00:00 0
Rss:                 12 kB
Pss:                 12 kB
Private_Dirty:       12 kB
7f0030000000-7f0030200000 rw-p 00000000 00:00 0
Rss:                 40 kB
Pss:                 40 kB
Private_Clean:        4 kB
Private_Dirty:       36 kB
VmFlags: rd wr mr
";

    #[test]
    fn memory_is_told_by_part() {
        let parts = parse_smaps(SMAPS, &[0x7f00_2000_1000]);
        let memory = |rss_kib, pss_kib, private_kib, dirty_kib| Memory {
            rss_kib,
            pss_kib,
            private_kib,
            dirty_kib,
        };
        assert_eq!(
            parts.into_iter().collect::<Vec<_>>(),
            [
                ("anonymous", memory(40, 40, 40, 36)),
                ("data", memory(20, 20, 20, 20)),
                ("guest", memory(9000, 9000, 9000, 9000)),
                ("stacks", memory(12, 12, 12, 12)),
                ("text", memory(800, 400, 0, 0)),
            ]
        );
    }

    #[test]
    fn a_peers_guest_is_its_largest_mappings() {
        let [vmm, guest] = parse_peer(SMAPS, 128 << 20);
        assert_eq!(guest.private_kib, 9000);
        assert_eq!(vmm.rss_kib, 800 + 20 + 12 + 40);
        assert_eq!(vmm.private_kib, 20 + 12 + 40);
        assert_eq!(vmm.dirty_kib, 20 + 12 + 36);
    }

    #[test]
    fn this_process_has_memory_and_cpu_time() {
        let pid = std::process::id();
        let rss: u64 = memory(pid).unwrap().values().map(|m| m.rss_kib).sum();
        assert!(rss > 0);
        assert!(cpu(pid).is_ok());
    }
}
