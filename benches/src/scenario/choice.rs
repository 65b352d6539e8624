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
    /// Spawn to an answering runtime (R3), beside peers.
    Boot,
    /// Machines from a snapshot: to the first instruction, answer and command, beside peers.
    Restore,
    /// The runtime's calls in a machine that runs, beside peers: ping, commands, code.
    Exec,
    /// Memory of a VMM beyond its guest's, booted and cloned, beside peers.
    Memory,
    /// How long a machine that is frozen stands still, as it sees it.
    Pause,
    /// Many restores at once.
    Burst,
    /// Machines asked for by a Poisson process, from when each was meant to be.
    Sustained,
    /// How many machines the host takes.
    Density,
    /// Children of a running machine: one, a hundred, deep ones.
    Fork,
    /// Reads through a guest.
    Block,
    /// The socket device: throughput and round trips.
    Vsock,
    /// The network device: TCP over a tap; needs root.
    Net,
    /// `ratoon run`, whole, the second time.
    Run,
    /// What an agent costs beyond its model and its tools.
    Agent,
    /// All of them.
    All,
}

/// Scenarios in the order in which they run, each with its share of the time of a full run and of
/// a quick one, in seconds on the slowest host. None: not a part of a quick run, unless named.
const SHARES: [(Choice, u32, Option<u32>); 16] = [
    (Choice::Null, 1, Some(1)),
    (Choice::Start, 25, Some(8)),
    (Choice::Boot, 80, Some(26)),
    (Choice::Restore, 200, Some(30)),
    (Choice::Exec, 40, Some(8)),
    (Choice::Memory, 40, Some(6)),
    (Choice::Pause, 40, None),
    (Choice::Burst, 40, Some(7)),
    (Choice::Sustained, 50, None),
    (Choice::Density, 30, None),
    (Choice::Fork, 200, None),
    (Choice::Block, 40, None),
    (Choice::Vsock, 40, None),
    (Choice::Net, 40, None),
    (Choice::Run, 30, None),
    (Choice::Agent, 150, None),
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

    /// The sizes in MiB of the warm machines that it restores: made ahead, side by side.
    pub fn machines(self, quick: bool) -> &'static [u64] {
        match self {
            Self::Restore | Self::Pause if !quick => &[256, 1024, 4096],
            Self::Restore | Self::Pause | Self::Exec | Self::Memory => &[256],
            Self::Burst | Self::Sustained | Self::Density | Self::Run => &[256],
            // They are the user's: `ratoon agent run` has the image's warm machine.
            Self::Agent => &[],
            Self::Fork => &[512],
            Self::Null
            | Self::Start
            | Self::Boot
            | Self::Block
            | Self::Vsock
            | Self::Net
            | Self::All => &[],
        }
    }

    /// Whether it boots a machine of its own, which nothing can cut.
    pub fn boots(self) -> bool {
        matches!(self, Self::Boot | Self::Block | Self::Vsock | Self::Net)
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
            Self::Boot => super::boot::run(plan, samples),
            Self::Restore => super::restore::run(plan, samples),
            Self::Exec => super::exec::run(plan, samples),
            Self::Memory => super::memory::run(plan, samples),
            Self::Pause => super::pause::run(plan, samples),
            Self::Burst => super::burst::run(plan, samples),
            Self::Sustained => super::sustained::run(plan, samples),
            Self::Density => super::density::run(plan, samples),
            Self::Fork => super::fork::run(plan, samples),
            Self::Block => super::block::run(plan, samples),
            Self::Vsock => super::vsock::run(plan, samples),
            Self::Net => super::net::run(plan, samples),
            Self::Run => super::run::run(plan, samples),
            Self::Agent => super::agent::run(plan, samples),
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
