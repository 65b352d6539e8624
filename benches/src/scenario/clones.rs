//! Memory of 20 machines from one snapshot that have been woken and do nothing: of each VMM beyond
//! its guest's memory, and of all of them together with it.

use anyhow::Result;

use super::{Plan, series, verdict};
use crate::machine::go_on;
use crate::proc;
use crate::samples::{Readiness, Samples, number};
use crate::sandbox::{Sandboxes, pid};

const NAME: &str = "clones";
const CLONES: usize = 20;
const PRIVATE_TARGET_KIB: f64 = 1.5 * 1024.0;

/// Runs it.
///
/// # Errors
/// When a machine does not come up.
pub fn run(plan: &Plan<'_>, samples: &mut Samples) -> Result<()> {
    let sandboxes = Sandboxes::new(plan.parts)?;
    let (vm, client) = sandboxes.boot(256)?;
    drop(client);
    sandboxes.snapshot(&vm, "bench")?;
    vm.end()?;
    let mut clones = Vec::new();
    for _ in 0..plan.rounds(CLONES, CLONES) {
        go_on()?;
        clones.push(sandboxes.restore("bench")?);
    }
    for (round, (vm, _)) in clones.iter().enumerate() {
        let pid = pid(vm)?;
        let own = proc::memory(pid)?;
        let guest = proc::guest_memory(pid)?;
        let mut add = |what: &str, kib: u64| {
            let series = series(NAME, "ratoon", what, "KiB", Readiness::R3);
            samples.add(&series, round, kib as f64)
        };
        add("private, VMM", own.values().map(|m| m.private_kib).sum())?;
        add("proportional, VMM", own.values().map(|m| m.pss_kib).sum())?;
        add("private, guest memory", guest.private_kib)?;
        add("proportional, guest memory", guest.pss_kib)?;
        for (part, memory) in &own {
            add(&format!("private: {part}"), memory.private_kib)?;
        }
    }
    let worst = |what| {
        let values = samples.of(NAME, "ratoon", what);
        values.iter().copied().fold(0.0, f64::max)
    };
    let sum = |what| samples.of(NAME, "ratoon", what).iter().sum::<f64>();
    let notes = [
        format!(
            "an idle clone: at most {} KiB private of the VMM's, target {PRIVATE_TARGET_KIB} KiB: {}",
            number(worst("private, VMM")),
            verdict(worst("private, VMM") <= PRIVATE_TARGET_KIB)
        ),
        format!(
            "{} clones: {} KiB in all (PSS, guest memory included)",
            clones.len(),
            number(sum("proportional, VMM") + sum("proportional, guest memory"))
        ),
    ];
    for note in notes {
        samples.note(note);
    }
    for (vm, client) in clones {
        drop(client);
        vm.end()?;
    }
    Ok(())
}
