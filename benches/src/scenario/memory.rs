//! Memory of the VMM beyond its guest's: 1 vCPU, 128 MiB, after the runtime has answered (R3).
//!
//! Every mapping counts but the guest's memfd. Resident is what we hold against the target;
//! private is what one more VM costs, since all VMMs share the program's text.

use std::time::Duration;

use anyhow::Result;

use super::{Plan, series, verdict};
use crate::machine::{Ratoon, Shape, go_on};
use crate::proc;
use crate::samples::{Readiness, Samples, number};

const NAME: &str = "memory";
const TARGET_KIB: f64 = 3.0 * 1024.0;

/// Runs it.
///
/// # Errors
/// When a VM does not come up.
pub fn run(plan: &Plan<'_>, samples: &mut Samples) -> Result<()> {
    for round in 1..=plan.rounds(3, 1) {
        go_on()?;
        let mut vm = Ratoon::spawn(plan.parts, &Shape::of(128))?;
        let mut client = vm.ready(false)?.client;
        client.ping(Duration::from_secs(60))?;
        let parts = proc::memory(vm.pid())?;
        let mut add = |metric: String, kib: u64| {
            let series = series(NAME, "ratoon", metric, "KiB", Readiness::R3);
            samples.add(&series, round, kib as f64)
        };
        add("resident".into(), parts.values().map(|m| m.rss_kib).sum())?;
        add(
            "proportional".into(),
            parts.values().map(|m| m.pss_kib).sum(),
        )?;
        add(
            "private".into(),
            parts.values().map(|m| m.private_kib).sum(),
        )?;
        for (part, memory) in &parts {
            add(format!("resident: {part}"), memory.rss_kib)?;
        }
        for (part, memory) in &parts {
            add(format!("private: {part}"), memory.private_kib)?;
        }
        vm.stop()?;
    }
    let values = samples.of(NAME, "ratoon", "resident");
    let worst = values.iter().copied().fold(0.0, f64::max);
    let note = format!(
        "memory (R3): at most {} KiB resident beyond the guest's, target {TARGET_KIB} KiB: {}",
        number(worst),
        verdict(worst <= TARGET_KIB)
    );
    samples.note(note);
    Ok(())
}
