//! Whether this host can take so many more VMs: asked before any is made, refused in words.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What a child takes of the host at least, in MiB: its VMM (half of one), KVM's tables, and what its guest
/// writes to be woken and to run one small command (docs/benchmarks.md). A guest that works takes more.
const CHILD_MIB: u64 = 8;
/// What is left to the host, in MiB.
const RESERVE_MIB: u64 = 256;
/// Descriptors that this process has for a VM that it started: lifeline, process, runtime, and a few while it starts.
const CHILD_DESCRIPTORS: u64 = 8;
/// Descriptors for all else.
const OWN_DESCRIPTORS: u64 = 128;

/// What this host has not enough of.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Memory.
    #[error(
        "{count} children would take {needed_mib} MiB of memory at least, and this host has \
         {available_mib} MiB to give: ask for fewer, or end other VMs"
    )]
    Memory {
        /// How many were asked for.
        count: u32,
        /// What they need, in MiB.
        needed_mib: u64,
        /// What there is, in MiB.
        available_mib: u64,
    },
    /// Descriptors.
    #[error(
        "{count} children take {needed} descriptors of this process, which may have {limit}: raise the limit \
         (ulimit -n), or ask for fewer"
    )]
    Descriptors {
        /// How many were asked for.
        count: u32,
        /// How many descriptors that takes.
        needed: u64,
        /// How many there can be.
        limit: u64,
    },
}

/// Whether it is 1 to `most`.
///
/// # Errors
/// The number itself.
pub(crate) fn count(count: u32, most: u32) -> Result<(), u32> {
    match (1..=most).contains(&count) {
        true => Ok(()),
        false => Err(count),
    }
}

/// Whether there is room for so many children of a VM with so much memory.
///
/// # Errors
/// [`Refused`].
pub(crate) fn children(count: u32, memory_mib: u64) -> Result<(), Refused> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    // Without /proc nothing is known, and nothing refused.
    if let Some(available_mib) = available_mib(&meminfo) {
        memory(count, memory_mib, available_mib)?;
    }
    let needed = u64::from(count) * CHILD_DESCRIPTORS + OWN_DESCRIPTORS;
    let limits = getrlimit(Resource::Nofile);
    let limit = limits.current.unwrap_or(u64::MAX);
    if needed <= limit {
        return Ok(());
    }
    let most = limits.maximum.unwrap_or(u64::MAX);
    let raised = Rlimit {
        current: Some(needed.min(most)),
        maximum: limits.maximum,
    };
    if needed <= most && setrlimit(Resource::Nofile, raised).is_ok() {
        return Ok(());
    }
    Err(Refused::Descriptors {
        count,
        needed,
        limit: most,
    })
}

fn memory(count: u32, memory_mib: u64, available_mib: u64) -> Result<(), Refused> {
    let needed_mib = u64::from(count) * CHILD_MIB.min(memory_mib);
    match needed_mib.saturating_add(RESERVE_MIB) <= available_mib {
        true => Ok(()),
        false => Err(Refused::Memory {
            count,
            needed_mib,
            available_mib: available_mib.saturating_sub(RESERVE_MIB),
        }),
    }
}

/// `MemAvailable` of /proc/meminfo (proc_meminfo(5)).
fn available_mib(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib >> 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fork_that_would_exhaust_the_host_is_refused_with_both_figures() {
        assert_eq!(memory(100, 512, 2048), Ok(()));
        let refused = memory(1000, 512, 2048).unwrap_err();
        assert_eq!(
            refused,
            Refused::Memory {
                count: 1000,
                needed_mib: 8000,
                available_mib: 1792
            }
        );
        let words = refused.to_string();
        assert!(
            words.contains("8000 MiB") && words.contains("1792 MiB"),
            "{words}"
        );
    }

    #[test]
    fn available_memory_is_read_as_the_kernel_writes_it() {
        let meminfo = "MemTotal:       24576000 kB\nMemAvailable:    2097152 kB\n";
        assert_eq!(available_mib(meminfo), Some(2048));
        assert_eq!(available_mib("MemAvailable: lots"), None);
    }
}
