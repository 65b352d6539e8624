//! `ratoon run --image debian -- true` as its user sees it, from the second time on, beside the same
//! command on a machine that runs.

use std::io;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use super::{Plan, exec, series, verdict};
use crate::machine::go_on;
use crate::samples::{Readiness, Samples, number, percentile};

const NAME: &str = "run";
const MIB: u64 = 256;
const FACTOR: f64 = 1.3;
const MORE_MS: f64 = 60.0;

/// Runs it.
///
/// # Errors
/// When a command fails.
pub fn run(plan: &Plan<'_>, samples: &mut Samples) -> Result<()> {
    let warm = plan.parts.warm.of(plan.parts, MIB)?;
    let (vm, mut client) = warm.original()?;
    let program = plan.parts.programs.vmm.with_file_name("ratoon");
    let state = tempfile::tempdir().context("a directory for `ratoon run`")?;
    // Round 0 makes the warm generation, if there is none.
    for round in plan.budget.rounds(plan.rounds(50, 5) + 1) {
        go_on()?;
        let from = Instant::now();
        exec(&mut client, &["true"], &mut io::sink())?;
        let command = from.elapsed().as_secs_f64() * 1e3;
        let from = Instant::now();
        let ended = Command::new(&program)
            .args(["run", "--image", &plan.parts.image, "--", "true"])
            .env("XDG_STATE_HOME", state.path())
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("starting {}", program.display()))?;
        let whole = from.elapsed().as_secs_f64() * 1e3;
        if !ended.status.success() {
            bail!(
                "ratoon run: {}: {}",
                ended.status,
                String::from_utf8_lossy(&ended.stderr)
            );
        }
        if round == 0 {
            continue;
        }
        let ours = series(NAME, "ratoon", "ratoon run -- true", "ms", Readiness::R4);
        samples.add(&ours, round, whole)?;
        let theirs = series(NAME, "never stopped", "true", "ms", Readiness::R4);
        samples.add(&theirs, round, command)?;
    }
    drop(client);
    vm.end()?;
    let p50 = |system, what| percentile(samples.of(NAME, system, what), 50);
    if let (Some(ours), Some(theirs)) = (
        p50("ratoon", "ratoon run -- true"),
        p50("never stopped", "true"),
    ) {
        let target = FACTOR * theirs + MORE_MS;
        samples.note(format!(
            "ratoon run, the second time: p50 {} ms, target {FACTOR} times {} + {MORE_MS} = {} ms: {}",
            number(ours),
            number(theirs),
            number(target),
            verdict(ours <= target)
        ));
    }
    Ok(())
}
