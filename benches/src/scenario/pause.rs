//! How long a machine stands still when it is frozen for a snapshot or a fork: as the VMM says, and as
//! a program in the guest sees it that reads the clock all the time.
//!
//! Only the machine is frozen here, without a word to the runtime: that would stop the program
//! first and let it go on last. The gaps that the program sees without any freeze (the guest's own
//! timer interrupts) are measured in turn with those during one. The pages written since the last
//! freeze are copied; `first pause` is that of the machine that had booted, which copies none.

use anyhow::{Context, Result};
use ratoon_engine::vm::freeze;
use std::time::Duration;

use super::{Plan, series, verdict};
use crate::machine::go_on;
use crate::samples::{Readiness, Samples, number, percentile};
use crate::sandbox::{Warm, cell};

const NAME: &str = "pause";
/// Guest memory in MiB and the target of the pause in milliseconds.
const SIZES: [(u64, Option<f64>); 3] = [(256, None), (1024, Some(2.0)), (4096, Some(4.0))];

/// Reads the clock for a while; the longest gap in milliseconds.
const SPIN: &str = "
def spin(seconds, now=time.monotonic_ns):
    worst, last = 0, now()
    end = last + int(seconds * 1e9)
    while last < end:
        this = now()
        if this - last > worst:
            worst = this - last
        last = this
    return worst / 1e6
";
const SPIN_SECONDS: f64 = 0.5;

/// Runs it.
///
/// # Errors
/// When a machine does not come up or cannot be frozen.
pub fn run(plan: &Plan<'_>, samples: &mut Samples) -> Result<()> {
    let sizes = if plan.quick { &SIZES[..1] } else { &SIZES[..] };
    for (index, &(mib, target)) in sizes.iter().enumerate() {
        let warm = plan.parts.warm.of(plan.parts, mib)?;
        let first = series(NAME, "ratoon", "first pause", "ms", Readiness::None);
        let first_ms = warm.first_pause.as_secs_f64() * 1e3;
        samples.add(&first.case(case(mib)), 0, first_ms)?;
        let (vm, mut client) = warm.sandboxes.restore(Warm::SNAPSHOT)?;
        cell(&mut client, SPIN)?;
        let gap = |client: &mut _| -> Result<f64> {
            let printed = cell(client, &format!("print(spin({SPIN_SECONDS}))"))?;
            printed.trim().parse().context("the gap that the guest saw")
        };
        let budget = plan.budget.part(1.0 / (sizes.len() - index) as f64);
        for round in budget.rounds(plan.rounds(100, 5)) {
            go_on()?;
            let mut add = |what: &str, value| {
                let series = series(NAME, "ratoon", what.to_owned(), "ms", Readiness::None);
                samples.add(&series.case(case(mib)), round, value)
            };
            add("gap without a freeze", gap(&mut client)?)?;
            let dir = vm.dir();
            let (seen, frozen) = std::thread::scope(|scope| {
                let frozen = scope.spawn(|| {
                    std::thread::sleep(Duration::from_secs_f64(SPIN_SECONDS));
                    freeze::take(dir, None)
                });
                (gap(&mut client), frozen.join())
            });
            let frozen = frozen.map_err(|panic| std::panic::resume_unwind(panic))??;
            add("gap with a freeze", seen?)?;
            add("pause", frozen.pause.as_secs_f64() * 1e3)?;
        }
        drop(client);
        vm.end()?;
        let p50 = |what| percentile(samples.of_case(NAME, "ratoon", &case(mib), what), 50);
        if let (Some(with), Some(without), Some(pause)) = (
            p50("gap with a freeze"),
            p50("gap without a freeze"),
            p50("pause"),
        ) {
            let target = target.map_or(String::new(), |target| {
                format!(", target {target} ms: {}", verdict(with <= target))
            });
            samples.note(format!(
                "pause, {mib} MiB: gap p50 {} ms{target} (without a freeze {} ms; the VMM's own \
                 figure {} ms)",
                number(with),
                number(without),
                number(pause)
            ));
        }
    }
    Ok(())
}

fn case(mib: u64) -> String {
    format!("{mib} MiB")
}
