//! The scenarios. Each takes the run's parts and adds samples; it fails when a machine does.

pub mod agent;
pub mod block;
pub mod boot;
pub mod burst;
pub mod choice;
pub mod density;
pub mod exec;
pub mod fork;
pub mod memory;
pub mod net;
pub mod null;
pub mod pause;
pub mod phases;
mod raw;
pub mod restore;
pub mod run;
pub mod start;
pub mod sustained;
pub mod vsock;

use std::io::Write;
use std::time::Duration;

use anyhow::{Result, bail};
use ratoon_engine::runtime::{ExecIo, RuntimeClient};
use ratoon_protocol::ExecParams;

use crate::budget::Budget;
use crate::machine::Parts;
use crate::record::Text;
use crate::samples::{Readiness, Samples, Series, number, percentile};

/// What a scenario runs with.
#[derive(Debug)]
pub struct Plan<'a> {
    /// What machines are made of.
    pub parts: &'a Parts,
    /// As small as it can be and still say something.
    pub quick: bool,
    /// How many rounds, when the user says so.
    pub runs: Option<usize>,
    /// The scenario's time.
    pub budget: Budget<'a>,
}

/// How long a peer may take for anything, at least and at most.
const PEERS_PATIENCE: [Duration; 2] = [Duration::from_secs(30), Duration::from_secs(240)];

impl Plan<'_> {
    /// How long a peer may take for anything: a part of the scenario's time, so that one that hangs does not
    /// take all of a run's.
    fn patience(&self) -> Duration {
        let [least, most] = PEERS_PATIENCE;
        self.budget.left().clamp(least, most)
    }

    /// How many rounds a scenario does.
    fn rounds(&self, full: usize, quick: usize) -> usize {
        self.runs.unwrap_or(if self.quick { quick } else { full })
    }
}

fn series(
    scenario: &'static str,
    system: impl Into<Text>,
    metric: impl Into<String>,
    unit: &'static str,
    readiness: Readiness,
) -> Series {
    Series {
        scenario: scenario.into(),
        system: system.into(),
        case: "".into(),
        metric: Text::Owned(metric.into()),
        unit: unit.into(),
        readiness,
    }
}

/// Tells ours against a peer's, when both have a median.
fn note_ratio(samples: &mut Samples, scenario: &'static str, case: &str, metric: &str, peer: &str) {
    let p50 = |system| percentile(samples.of_case(scenario, system, case, metric), 50);
    if peer == "ratoon" {
        return;
    }
    if let (Some(ours), Some(theirs)) = (p50("ratoon"), p50(peer)) {
        let comma = if case.is_empty() { "" } else { ", " };
        samples.note(format!(
            "{scenario}{comma}{case}: {metric}: ours p50 {}, {peer} p50 {}, ratio {}; ours no more: {}",
            number(ours),
            number(theirs),
            number(ours / theirs),
            verdict(ours <= theirs)
        ));
    }
}

fn verdict(met: bool) -> &'static str {
    if met { "met" } else { "NOT met" }
}

/// Runs a command in the guest to its end.
pub fn exec(client: &mut RuntimeClient, argv: &[&str], stdout: &mut dyn Write) -> Result<()> {
    let mut errors = Vec::new();
    let params = ExecParams {
        argv: argv.iter().map(|&word| word.to_owned()).collect(),
        ..ExecParams::default()
    };
    let status = client.exec(
        &params,
        ExecIo {
            stdin: None,
            stdout,
            stderr: &mut errors,
        },
    )?;
    if status.status.shell_code() != 0 {
        bail!(
            "{} in the guest ended with {status:?}: {}",
            argv[0],
            String::from_utf8_lossy(&errors)
        );
    }
    Ok(())
}
