//! Which scenarios there are, and how much of a run's time each has.

use anyhow::Result;
use clap::ValueEnum;

use super::Plan;
use crate::samples::Samples;

/// A scenario.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Choice {
    /// The harness's own share of a latency: a no-op, timed like the rest.
    Null,
    /// Spawn to first guest instruction (R1), by phase.
    Start,
    /// Memory of the VMM beyond its guest's.
    Memory,
    /// Spawn to an answering runtime (R3), beside QEMU's microvm.
    Boot,
    /// Reads through a guest.
    Block,
    /// The socket device: throughput and round trips.
    Vsock,
    /// The runtime's calls: ping, commands, code.
    Runtime,
    /// Machines from a snapshot: to the first instruction, answer and command.
    Restore,
    /// How long a machine that is frozen stands still.
    Freeze,
    /// Memory of idle machines from one snapshot.
    Clones,
    /// Children of a running machine: one, a hundred, deep ones.
    Fork,
    /// `ratoon run`, whole, the second time.
    Run,
    /// All of them.
    All,
}

/// Scenarios in the order in which they run, each with its share of the time of a full run and of
/// a quick one, in seconds on the slowest host. None: not a part of a quick run, unless named.
const SHARES: [(Choice, u32, Option<u32>); 12] = [
    (Choice::Null, 1, Some(1)),
    (Choice::Start, 60, Some(12)),
    (Choice::Memory, 20, Some(15)),
    (Choice::Boot, 150, Some(30)),
    (Choice::Block, 80, None),
    (Choice::Vsock, 60, None),
    (Choice::Runtime, 60, None),
    (Choice::Restore, 150, Some(30)),
    (Choice::Freeze, 60, None),
    (Choice::Clones, 40, None),
    (Choice::Fork, 150, Some(30)),
    (Choice::Run, 40, None),
];

impl Choice {
    /// The chosen ones in the order in which they run; none named, or `all`: all of a run of this
    /// kind.
    pub fn plan(named: &[Self], quick: bool) -> Vec<Self> {
        let all = named.is_empty() || named.contains(&Self::All);
        SHARES
            .into_iter()
            .filter(|(choice, _, short)| {
                named.contains(choice) || (all && (!quick || short.is_some()))
            })
            .map(|(choice, _, _)| choice)
            .collect()
    }

    /// Its share of the time, to be held against those of the others.
    pub fn share(self, quick: bool) -> f64 {
        let find = SHARES.iter().find(|(choice, _, _)| *choice == self);
        find.map_or(1.0, |(_, long, short)| {
            f64::from(if quick { short.unwrap_or(20) } else { *long })
        })
    }

    /// As users name it.
    pub fn name(self) -> String {
        self.to_possible_value()
            .map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// Runs it.
    ///
    /// # Errors
    /// The scenario's.
    pub fn run(self, plan: &Plan<'_>, samples: &mut Samples) -> Result<()> {
        match self {
            Self::Null => super::null::run(plan, samples),
            Self::Start => super::start::run(plan, samples),
            Self::Memory => super::memory::run(plan, samples),
            Self::Boot => super::boot::run(plan, samples),
            Self::Block => super::block::run(plan, samples),
            Self::Vsock => super::vsock::run(plan, samples),
            Self::Runtime => super::runtime::run(plan, samples),
            Self::Restore => super::restore::run(plan, samples),
            Self::Freeze => super::freeze::run(plan, samples),
            Self::Clones => super::clones::run(plan, samples),
            Self::Fork => super::fork::run(plan, samples),
            Self::Run => super::run::run(plan, samples),
            // Never in a plan: it stands for the others.
            Self::All => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_scenario_has_a_share_and_is_a_part_of_a_full_run() {
        let every = Choice::value_variants().iter().copied();
        let every: Vec<Choice> = every.filter(|choice| *choice != Choice::All).collect();
        assert_eq!(Choice::plan(&[], false), every);
        assert_eq!(Choice::plan(&[Choice::All], false), every);
    }

    #[test]
    fn a_scenario_that_is_named_runs_also_when_short_runs_leave_it_out() {
        assert_eq!(Choice::plan(&[Choice::Block], true), [Choice::Block]);
        assert!(!Choice::plan(&[], true).contains(&Choice::Block));
    }
}
