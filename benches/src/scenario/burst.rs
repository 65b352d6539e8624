//! Many restores asked for at once: how long each waits, from the one moment at which all were asked for.
//!
//! Every caller is a thread, all let go together; each restores a machine from the same warm snapshot and runs
//! `true`. The machines live until the last one is done, so that no end is in anybody's way.

use std::io;
use std::sync::Barrier;

use anyhow::Result;
use ratoon_engine::vm::launch::Vm;
use ratoon_vmm_api::HostClass;

use super::{Plan, exec, series};
use crate::machine::{go_on, monotonic_ns};
use crate::samples::{Readiness, Samples};
use crate::sandbox::{Sandboxes, Warm, metrics};

const NAME: &str = "burst";
const MIB: u64 = 256;
const SIZES: [usize; 3] = [2, 8, 32];
/// Of so many busy guests for a processor each has less of it than its emulated timer takes, and none gets on.
const MOST_EMULATED: usize = 8;

/// Runs it.
///
/// # Errors
/// When a machine does not come up.
pub fn run(plan: &Plan<'_>, samples: &mut Samples) -> Result<()> {
    let warm = plan.parts.warm.of(plan.parts, MIB)?;
    let sizes = if plan.quick { &SIZES[1..2] } else { &SIZES[..] };
    let is_emulated = HostClass::detect() == HostClass::Emulated;
    let fits = |count: &&usize| !is_emulated || **count <= MOST_EMULATED;
    let sizes: Vec<usize> = sizes.iter().filter(fits).copied().collect();
    if is_emulated && !plan.quick {
        samples.note(format!(
            "burst: more than {MOST_EMULATED} at once are left to hosts with hardware virtualization"
        ));
    }
    for (index, &count) in sizes.iter().enumerate() {
        let budget = plan.budget.part(1.0 / (sizes.len() - index) as f64);
        for round in budget.rounds(plan.rounds(5, 1)) {
            go_on()?;
            once(&warm.sandboxes, samples, count, round)?;
        }
    }
    Ok(())
}

/// One machine's moments, CLOCK_MONOTONIC in ns.
struct Came {
    vm: Vm,
    ran: u64,
    answered: u64,
    ended: u64,
}

fn once(sandboxes: &Sandboxes, samples: &mut Samples, count: usize, round: usize) -> Result<()> {
    let together = Barrier::new(count + 1);
    let one = || -> Result<Came> {
        together.wait();
        let (vm, mut client) = sandboxes.restore(Warm::SNAPSHOT)?;
        let answered = monotonic_ns();
        exec(&mut client, &["true"], &mut io::sink())?;
        let ended = monotonic_ns();
        let ran = metrics(&vm)?.phases.first_instruction_ns;
        Ok(Came {
            vm,
            ran,
            answered,
            ended,
        })
    };
    let (asked, came) = std::thread::scope(|scope| {
        let callers: Vec<_> = (0..count).map(|_| scope.spawn(one)).collect();
        together.wait();
        let asked = monotonic_ns();
        let came: Vec<_> = callers.into_iter().map(|caller| caller.join()).collect();
        (asked, came)
    });
    let mut last = 0;
    for (index, came) in came.into_iter().enumerate() {
        let came = came.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        for (what, at, readiness) in [
            ("asked to running", came.ran, Readiness::R1),
            ("asked to wake's answer", came.answered, Readiness::R3),
            ("asked to the end of true", came.ended, Readiness::R4),
        ] {
            let series = series(NAME, "ratoon", what, "ms", readiness);
            let ms = at.saturating_sub(asked) as f64 / 1e6;
            samples.add(&series.case(case(count)), round * count + index, ms)?;
        }
        last = last.max(came.ended);
        came.vm.end()?;
    }
    let all = series(
        NAME,
        "ratoon",
        "asked to the last one's end",
        "ms",
        Readiness::R4,
    );
    let ms = last.saturating_sub(asked) as f64 / 1e6;
    samples.add(&all.case(case(count)), round, ms)
}

fn case(count: usize) -> String {
    format!("{count} at once")
}
