//! From the spawn of `ratoon-vmm` to the first guest instruction (R1), phase by phase.
//!
//! The VMM stamps its phases with CLOCK_MONOTONIC; the harness reads the same clock right before
//! the spawn. The first round only warms the page cache and is not counted. Each VM is stopped and
//! its process reaped before the next begins.

use anyhow::Result;

use super::phases::Timeline;
use super::{Plan, series, verdict};
use crate::machine::{Ratoon, Shape, go_on};
use crate::samples::{Readiness, Samples, number, percentile};

const NAME: &str = "start";
const P50_TARGET_MS: f64 = 5.0;
const P99_TARGET_MS: f64 = 10.0;

/// Runs it.
///
/// # Errors
/// When a VM does not start or stop.
pub fn run(plan: &Plan<'_>, samples: &mut Samples) -> Result<()> {
    let shape = Shape::of(128);
    for round in plan.budget.rounds(plan.rounds(100, 20) + 1) {
        go_on()?;
        let mut vm = Ratoon::spawn(plan.parts, &shape)?;
        let phases = vm.running()?.phases;
        let spawned = vm.spawned_ns;
        let stop = vm.stop()?;
        if round == 0 {
            continue;
        }
        let total = series(
            NAME,
            "ratoon",
            "spawn to first instruction",
            "ms",
            Readiness::R1,
        );
        let r1 = phases.first_instruction_ns.saturating_sub(spawned);
        samples.add(&total, round, r1 as f64 / 1e6)?;
        let timeline = Timeline {
            spawned_ns: spawned,
            phases,
            answered_ns: None,
        };
        timeline.add(samples, NAME, "", round)?;
        let end = series(
            NAME,
            "ratoon",
            "stop to process gone",
            "ms",
            Readiness::None,
        );
        samples.add(&end, round, stop.as_secs_f64() * 1e3)?;
    }
    let values = samples.of(NAME, "ratoon", "spawn to first instruction");
    let check = |p, target| {
        percentile(values, p).map_or_else(
            || format!("p{p}: too few samples"),
            |value| {
                format!(
                    "p{p} {} ms, target {target} ms: {}",
                    number(value),
                    verdict(value <= target)
                )
            },
        )
    };
    let note = format!(
        "start (R1): {}; {}",
        check(50, P50_TARGET_MS),
        check(99, P99_TARGET_MS)
    );
    samples.note(note);
    Ok(())
}
