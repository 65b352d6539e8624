//! How many machines from one snapshot the host takes: until its memory, the latency of the next one, or the
//! scenario's time is at an end. Which it was is noted.
//!
//! Each machine is restored, runs `true` and then waits. Latency is broken when the last five took, at the median,
//! three times what the first five did; memory, when less than a tenth of the host's, or 1 GiB, is available: the
//! host's other work is not to be harmed.

use std::fs;
use std::io;

use anyhow::{Context, Result};

use super::{Plan, exec, series};
use crate::machine::{go_on, monotonic_ns};
use crate::proc;
use crate::samples::{Readiness, Samples, number, percentile};
use crate::sandbox::{Warm, pid};

const NAME: &str = "density";
const MIB: u64 = 256;
const MOST: usize = 1_000;
const LATENCY_FACTOR: f64 = 3.0;
const MEMORY_FLOOR_KIB: u64 = 1 << 20;
/// Machines whose latencies are compared.
const FEW: usize = 5;

/// Runs it.
///
/// # Errors
/// When a machine does not come up.
pub fn run(plan: &Plan<'_>, samples: &mut Samples) -> Result<()> {
    let warm = plan.parts.warm.of(plan.parts, MIB)?;
    let [total, before] = memory()?;
    let floor = MEMORY_FLOOR_KIB.max(total / 10);
    let mut machines = Vec::new();
    let mut latencies = Vec::new();
    // Ends need their time too.
    let budget = plan.budget.part(0.8);
    let most = plan.rounds(MOST, 15);
    let mut why = format!("{most} were asked for");
    loop {
        if machines.len() >= most {
            break;
        }
        if machines.len() >= FEW && !budget.more() {
            why = "its time was over".into();
            break;
        }
        if memory()?[1] < floor {
            why = format!("less than {floor} KiB of the host's memory were available");
            break;
        }
        go_on()?;
        let asked = monotonic_ns();
        let (vm, mut client) = warm.sandboxes.restore(Warm::SNAPSHOT)?;
        exec(&mut client, &["true"], &mut io::sink())?;
        let ms = (monotonic_ns() - asked) as f64 / 1e6;
        let what = series(
            NAME,
            "ratoon",
            "asked to the end of true",
            "ms",
            Readiness::R4,
        );
        samples.add(&what, machines.len(), ms)?;
        latencies.push(ms);
        machines.push((vm, client));
        if let Some((first, last)) = broken(&latencies) {
            why = format!(
                "the last {FEW} took {} ms (p50), the first {}",
                number(last),
                number(first)
            );
            break;
        }
    }
    let count = machines.len();
    let used = before.saturating_sub(memory()?[1]) as f64 / count.max(1) as f64;
    let mut proportional = 0;
    for (vm, _) in &machines {
        let pid = pid(vm)?;
        let own: u64 = proc::memory(pid)?.values().map(|part| part.pss_kib).sum();
        proportional += own + proc::guest_memory(pid)?.pss_kib;
    }
    let proportional = proportional as f64 / count.max(1) as f64;
    for (what, unit, value) in [
        ("machines", "machines", count as f64),
        ("host memory a machine", "KiB", used),
        ("proportional memory a machine", "KiB", proportional),
    ] {
        let series = series(NAME, "ratoon", what, unit, Readiness::R4);
        samples.add(&series, 0, value)?;
    }
    samples.note(format!(
        "density: {count} machines of {MIB} MiB, no more since {why}; {} KiB each of the host's \
         available memory, {} KiB each by PSS",
        number(used),
        number(proportional)
    ));
    for (vm, client) in machines {
        drop(client);
        vm.end()?;
    }
    Ok(())
}

/// Medians of the first and the last few, when latency is broken.
fn broken(latencies: &[f64]) -> Option<(f64, f64)> {
    if latencies.len() < 2 * FEW {
        return None;
    }
    let first = percentile(&latencies[..FEW], 50)?;
    let last = percentile(&latencies[latencies.len() - FEW..], 50)?;
    (last > LATENCY_FACTOR * first).then_some((first, last))
}

/// The host's memory in KiB: all, and what is available.
fn memory() -> Result<[u64; 2]> {
    parse(&fs::read_to_string("/proc/meminfo").context("/proc/meminfo")?)
        .context("/proc/meminfo does not say what is available")
}

fn parse(meminfo: &str) -> Option<[u64; 2]> {
    let of = |key: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(key))?;
        line.split_ascii_whitespace().next()?.parse().ok()
    };
    Some([of("MemTotal:")?, of("MemAvailable:")?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latency_is_broken_by_several_slow_machines_and_not_by_one() {
        let mut latencies = vec![10.0; 9];
        latencies.push(1000.0);
        assert_eq!(broken(&latencies), None);
        latencies.extend([40.0, 40.0]);
        assert_eq!(broken(&latencies), Some((10.0, 40.0)));
        assert_eq!(broken(&[10.0, 90.0, 90.0, 90.0, 90.0, 90.0]), None);
    }

    #[test]
    fn available_memory_is_read() {
        let text = "MemTotal:  100 kB\nMemFree: 3 kB\nMemAvailable:   70 kB\n";
        assert_eq!(parse(text), Some([100, 70]));
        assert_eq!(parse("MemTotal:  100 kB\n"), None);
    }
}
