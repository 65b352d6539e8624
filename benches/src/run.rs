//! A run: scenarios one after the other, each within its share of the time, and the reports at the
//! end. A scenario that fails is told, and the next one runs; a signal or a full disk ends the run, and
//! what there is until then is reported as partial.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::analysis::Analysis;
use crate::budget::Budget;
use crate::interrupt::{self, is_stopped};
use crate::machine::Parts;
use crate::record::Outcome;
use crate::samples::Samples;
use crate::scenario::Plan;
use crate::scenario::choice::Choice;
use crate::{host, report, setup};

/// A full run takes no longer, building and the last rounds aside.
const FULL: Duration = Duration::from_secs(14 * 60);
/// A quick one.
const QUICK: Duration = Duration::from_secs(105);
/// With a number of rounds that the user gave, however long they take.
const NO_LIMIT: Duration = Duration::from_secs(365 * 24 * 3600);

/// What to measure, and how.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Two minutes in all: fewer scenarios, fewer rounds.
    #[arg(long)]
    quick: bool,
    /// Folder for samples.jsonl and what is made of it; made when missing.
    #[arg(long, value_name = "DIR", default_value = "bench-results")]
    out: PathBuf,
    /// How many rounds each scenario does, however long they take.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    runs: Option<u32>,
    /// How long the whole run may take; default: 840, with --quick 105.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=86_400))]
    time: Option<u32>,
    /// A peer to measure beside us; may be given more than once. QEMU is found on the PATH.
    #[arg(long = "peer", value_name = "NAME=PATH", value_parser = setup::peer)]
    peers: Vec<(String, PathBuf)>,
    /// The image whose disk guests boot from.
    #[arg(long, default_value = "debian")]
    image: String,
    /// What to measure; default: all.
    #[arg(value_enum)]
    pub scenarios: Vec<Choice>,
}

/// How the scenarios went.
struct Went {
    code: ExitCode,
    /// Why not all is there that was asked for.
    partial: Option<String>,
}

/// Runs the scenarios, each within its share of what is left of the time.
fn measure(args: &Args, parts: &Parts, samples: &mut Samples) -> Went {
    let whole = match (args.runs, args.time) {
        (_, Some(seconds)) => Duration::from_secs(seconds.into()),
        (Some(_), None) => NO_LIMIT,
        (None, None) if args.quick => QUICK,
        (None, None) => FULL,
    };
    let begun = Instant::now();
    let chosen = Choice::plan(&args.scenarios, args.quick);
    let share = |choices: &[Choice]| -> f64 { choices.iter().map(|c| c.share(args.quick)).sum() };
    let mut went = Went {
        code: ExitCode::SUCCESS,
        partial: None,
    };
    let mut failed = Vec::new();
    let mut late = Vec::new();
    let machines: BTreeSet<u64> = chosen
        .iter()
        .flat_map(|choice| choice.machines(args.quick))
        .copied()
        .collect();
    if !machines.is_empty() {
        eprintln!("ratoon-bench: booting what will be restored …");
        // Whoever wants one that could not be made tries again, and says why not.
        parts.warm.make(parts, &machines);
    }
    // As many at a time as there are processors.
    let turns = machines.len().div_ceil(host::processors()).max(1);
    let boot = begun.elapsed() / u32::try_from(turns).unwrap_or(1);
    for (index, choice) in chosen.iter().enumerate() {
        let name = choice.name();
        let left = whole.saturating_sub(begun.elapsed());
        let least = match choice.boots() {
            // A boot, and as much again for what it was booted for.
            true => 2 * boot,
            false => Duration::ZERO,
        };
        let is_late = left.is_zero() || left < least;
        if is_stopped() || samples.is_torn() || is_late {
            if is_late {
                let why = format!(
                    "of the run's {} s {} were left, too few for it",
                    whole.as_secs(),
                    left.as_secs()
                );
                // That it cannot be written is told by the end.
                let _ = samples.missing(name.clone(), "ratoon", why);
                late.push(name.clone());
            }
            samples.scenario_ended(&name, Outcome::NotBegun, 0.0, None);
            continue;
        }
        let plan = Plan {
            parts,
            quick: args.quick,
            runs: args.runs.map(|n| n as usize),
            budget: Budget::of(left.mul_f64(choice.share(args.quick) / share(&chosen[index..]))),
        };
        eprintln!("ratoon-bench: {name} …");
        let from = Instant::now();
        let result = choice.run(&plan, samples);
        let took = from.elapsed().as_secs_f64();
        let (outcome, error) = match result {
            Ok(()) if plan.budget.ran_out() => (Outcome::OutOfTime, None),
            Ok(()) => (Outcome::Done, None),
            Err(_) if is_stopped() => {
                went.code = ExitCode::from(130);
                (Outcome::Interrupted, None)
            }
            Err(error) => {
                eprintln!("ratoon-bench: {name}: {error:#}");
                went.code = ExitCode::FAILURE;
                failed.push(name.clone());
                (Outcome::Failed, Some(format!("{error:#}")))
            }
        };
        samples.scenario_ended(&name, outcome, took, error);
    }
    if is_stopped() {
        went.code = ExitCode::from(130);
        went.partial = Some("interrupted".into());
    } else if !failed.is_empty() {
        went.partial = Some(format!("failed: {}", failed.join(", ")));
    } else if !late.is_empty() {
        went.partial = Some(format!("no time was left for {}", late.join(", ")));
    }
    went
}

/// Runs the scenarios and writes the reports.
///
/// # Errors
/// When something to run with is missing, or no output can be written.
pub fn run(args: &Args) -> Result<ExitCode> {
    let parts = setup::parts(&args.image, &args.peers)?;
    interrupt::watch_signals()?;
    std::fs::create_dir_all(&args.out)
        .with_context(|| format!("output folder {}", args.out.display()))?;
    let host = host::facts(host::versions(&parts.peers));
    let mut samples = Samples::create(&args.out.join("samples.jsonl"), &host, args.quick)?;
    let went = measure(args, &parts, &mut samples);
    // Machines that scenarios shared end here: they are no noise of the host's.
    drop(parts);
    // Who has pressed ^C does not wait for it.
    let noise_after = (!is_stopped()).then(host::noise);
    samples.end(noise_after, went.partial);
    let analysis = Analysis::of_records(samples.records(), None);
    // A closed terminal takes no table; the files have it.
    let _ = std::io::stdout().write_all(report::markdown(&analysis).as_bytes());
    report::write(&analysis, &args.out)?;
    eprintln!(
        "ratoon-bench: the page: {}",
        args.out.join(report::PAGE).display()
    );
    Ok(went.code)
}
