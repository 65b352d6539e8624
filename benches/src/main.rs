//! `ratoon-bench`: measures Ratoon on this machine, with raw samples, beside peers.
//!
//! `docs/benchmarks.md` says what each figure means. A run writes `samples.jsonl` (one line a
//! sample, as they are taken) and, at its end, what is made of it: `report.html`, `summary.md`,
//! `report.json`. ^C ends the run with what there is; the reports then say that it is partial.
//! `compare` tells two runs apart, `gate` holds counts against a baseline, `report` makes the reports
//! again.

mod analysis;
mod arrivals;
mod budget;
mod clock;
mod compare;
mod gate;
mod host;
mod interrupt;
mod machine;
mod peer;
mod proc;
mod record;
mod report;
mod run;
mod samples;
mod sandbox;
mod scenario;
mod setup;
mod stats;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Measures Ratoon on this machine, beside peers.
///
/// Exit status: 0 when all scenarios ran, 1 when one failed, 130 when interrupted.
#[derive(Parser)]
#[command(
    name = "ratoon-bench",
    bin_name = "ratoon bench",
    version,
    max_term_width = 100
)]
#[command(args_conflicts_with_subcommands = true)]
#[command(after_help = "Examples:
  ratoon bench --quick
  ratoon bench --out before start restore
  ratoon bench --peer firecracker=./firecracker boot
  ratoon bench compare before after
  ratoon bench report before
  ratoon bench gate

docs/benchmarks.md explains the method.")]
struct Cli {
    #[command(subcommand)]
    action: Option<Action>,
    #[command(flatten)]
    run: run::Args,
}

#[derive(Subcommand)]
enum Action {
    /// Tell what changed between two runs: folders or their samples.jsonl.
    Compare {
        /// The run before.
        first: PathBuf,
        /// The run after.
        second: PathBuf,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Hold counts and memory against the committed baseline; exit status 1 when one grew.
    Gate {
        /// The baseline.
        #[arg(long, value_name = "FILE", default_value = "benches/baseline.json")]
        baseline: PathBuf,
        /// Take the figures of now as the baseline of hosts of this class.
        #[arg(long)]
        renew: bool,
        /// The image whose disk guests boot from.
        #[arg(long, default_value = "debian")]
        image: String,
    },
    /// Make the reports of a run again, from its folder or samples.jsonl.
    Report {
        /// The run.
        run: PathBuf,
        /// Folder for them; default: beside the samples.
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
    },
}

fn dispatch(cli: &Cli) -> Result<ExitCode> {
    match &cli.action {
        None => return run::run(&cli.run),
        Some(Action::Compare {
            first,
            second,
            json,
        }) => {
            let comparison = compare::compare(first, second)?;
            if *json {
                println!("{}", serde_json::to_string_pretty(&comparison)?);
            } else {
                print!("{}", compare::text(&comparison));
            }
        }
        Some(Action::Gate {
            baseline,
            renew,
            image,
        }) => return gate::run(baseline, *renew, image),
        Some(Action::Report { run, out }) => {
            let page = report::again(run, out.as_deref())?;
            println!("{}", page.display());
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn main() -> ExitCode {
    match dispatch(&Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            if interrupt::is_stopped() {
                eprintln!("ratoon-bench: interrupted");
                return ExitCode::from(130);
            }
            eprintln!("ratoon-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn scenarios_and_actions_are_told_apart() {
        let parse = |words: &[&str]| Cli::try_parse_from(words).ok();
        let run = parse(&["ratoon-bench", "--quick", "start", "boot"]).unwrap();
        assert!(run.action.is_none() && run.run.scenarios.len() == 2);
        let compare = parse(&["ratoon-bench", "compare", "a", "b"]).unwrap();
        assert!(matches!(compare.action, Some(Action::Compare { .. })));
        assert!(parse(&["ratoon-bench", "--quick", "compare", "a", "b"]).is_none());
        assert!(parse(&["ratoon-bench", "--peer", "nobody=/bin/true"]).is_none());
        assert!(parse(&["ratoon-bench", "--peer", "qemu=/no/such/program"]).is_none());
    }
}
