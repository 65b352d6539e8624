//! The harness's own share of a latency: the same path (two readings of CLOCK_MONOTONIC, a series, a
//! sample written to the file) around a call that does nothing.
//!
//! What lies between the two readings, and so in every latency, is what this shows; writing the
//! sample comes after, outside of it, as everywhere. It fails when samples cannot be written.

use std::hint::black_box;

use anyhow::Result;

use super::{Plan, series};
use crate::clock::monotonic_ns;
use crate::machine::go_on;
use crate::samples::{Readiness, Samples};

/// The scenario's name.
pub const NAME: &str = "null";
/// What it measures.
pub const METRIC: &str = "a call that does nothing";

/// What is called: not inlined, with a result, as the calls that are measured.
#[inline(never)]
fn nothing(round: usize) -> Result<usize> {
    Ok(black_box(round))
}

/// Runs it.
///
/// # Errors
/// When samples cannot be written.
pub fn run(plan: &Plan<'_>, samples: &mut Samples) -> Result<()> {
    for round in plan.budget.rounds(plan.rounds(2000, 1000)) {
        go_on()?;
        let from = monotonic_ns();
        nothing(round)?;
        let to = monotonic_ns();
        let what = series(NAME, "harness", METRIC, "ns", Readiness::None);
        samples.add(&what, round, (to - from) as f64)?;
    }
    Ok(())
}
