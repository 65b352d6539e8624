//! `ratoon-bench`: measures Ratoon on this machine, with raw samples, beside peers.
//!
//! `docs/benchmarks.md` says what each figure means. A run writes `samples.jsonl` (one line a
//! sample, as they are taken) and, at its end, what is made of it: `report.html`, `summary.md`,
//! `report.json`. ^C ends the run with what there is; the reports then say that it is partial.

mod analysis;
mod arrivals;
mod budget;
mod clock;
mod host;
mod machine;
mod peer;
mod proc;
mod record;
mod report;
mod samples;
mod sandbox;
mod scenario;
mod stats;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use ratoon_engine::Programs;
use ratoon_engine::dirs::Dirs;
use ratoon_engine::image::ImageStore;
use ratoon_engine::initramfs;

use analysis::Analysis;
use budget::Budget;
use machine::{Interrupted, Parts, STOP};
use record::Outcome;
use samples::Samples;
use scenario::Plan;
use scenario::choice::Choice;

/// A full run takes no longer, building and the last round aside.
const FULL: Duration = Duration::from_secs(14 * 60);
/// A quick one.
const QUICK: Duration = Duration::from_secs(105);

/// Measures Ratoon on this machine.
///
/// Exit status: 0 when all scenarios ran, 1 when one failed, 130 when interrupted.
#[derive(Parser)]
#[command(name = "ratoon-bench", version, max_term_width = 100)]
struct Args {
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
    #[arg(long = "peer", value_name = "NAME=PATH", value_parser = peer)]
    peers: Vec<(String, PathBuf)>,
    /// The image whose disk guests boot from.
    #[arg(long, default_value = "debian")]
    image: String,
    /// What to measure; default: all.
    #[arg(value_enum)]
    scenarios: Vec<Choice>,
}

/// Peers that adapters exist for.
const PEERS: [&str; 3] = ["firecracker", "cloud-hypervisor", "qemu"];

fn peer(text: &str) -> Result<(String, PathBuf), String> {
    let (name, path) = text.split_once('=').ok_or("NAME=PATH is wanted")?;
    if !PEERS.contains(&name) {
        return Err(format!("no peer {name}; there are {}", PEERS.join(", ")));
    }
    let path = PathBuf::from(path);
    if !path.is_file() {
        return Err(format!("{}: no such program", path.display()));
    }
    Ok((name.to_owned(), path))
}

/// A release build has no table of debugging lines; a debug build's figures would mean nothing.
fn release_program(path: PathBuf) -> Result<PathBuf> {
    let bytes = std::fs::read(&path)
        .with_context(|| format!("{}: run `cargo build --release` first", path.display()))?;
    if bytes.windows(12).any(|window| window == b".debug_line\0") {
        bail!(
            "{} is a debug build: run `cargo build --release` and use its programs",
            path.display()
        );
    }
    std::path::absolute(&path).context("the program's path")
}

fn on_path(program: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?)
        .map(|dir| dir.join(program))
        .find(|path| path.is_file())
}

fn parts(args: &Args) -> Result<Parts> {
    let bin = match std::env::var_os("RATOON_BIN_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => std::env::current_exe()?
            .parent()
            .map(Path::to_owned)
            .unwrap_or_default(),
    };
    let dirs = Dirs::from_env()?;
    let runtime = release_program(bin.join("ratoon-runtime"))?;
    let kernel = dirs.default_kernel();
    if !kernel.is_file() {
        bail!(
            "no guest kernel {}: run guest-kernel/build",
            kernel.display()
        );
    }
    std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .context("/dev/kvm: `ratoon doctor` says how to mend it")?;
    let mut peers: BTreeMap<String, PathBuf> = args.peers.iter().cloned().collect();
    if let Some(qemu) = on_path("qemu-system-x86_64") {
        peers.entry("qemu".into()).or_insert(qemu);
    }
    let vmm = release_program(bin.join("ratoon-vmm"))?;
    Ok(Parts {
        programs: Programs {
            vmm: vmm.clone(),
            runtime: runtime.clone(),
            pager: release_program(bin.join("ratoon-pager"))?,
        },
        cache: dirs.cache().to_owned(),
        image: args.image.clone(),
        vmm,
        kernel,
        initramfs: initramfs::ensure(&runtime, &dirs.cache().join("initramfs"))?,
        disk: ImageStore::open(dirs.cache())?.get(&args.image)?.disk,
        warm: std::sync::Arc::default(),
        saved: std::sync::Arc::default(),
        peers,
    })
}

fn stop_on_signals() -> Result<()> {
    let mut signals = signal_hook::iterator::Signals::new([
        signal_hook::consts::SIGINT,
        signal_hook::consts::SIGTERM,
    ])?;
    std::thread::spawn(move || {
        for _ in signals.forever() {
            STOP.store(true, Ordering::Relaxed);
        }
    });
    Ok(())
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
        (Some(_), None) => Duration::MAX / 4,
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
    for (index, choice) in chosen.iter().enumerate() {
        let name = choice.name();
        if STOP.load(Ordering::Relaxed) || samples.is_torn() {
            samples.scenario_ended(&name, Outcome::NotBegun, 0.0, None);
            continue;
        }
        let left = whole.saturating_sub(begun.elapsed());
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
            Err(error) if error.is::<Interrupted>() || STOP.load(Ordering::Relaxed) => {
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
    if STOP.load(Ordering::Relaxed) {
        went.partial = Some("interrupted".into());
    } else if !failed.is_empty() {
        went.partial = Some(format!("failed: {}", failed.join(", ")));
    }
    went
}

fn run(args: &Args) -> Result<ExitCode> {
    let parts = parts(args)?;
    stop_on_signals()?;
    std::fs::create_dir_all(&args.out)
        .with_context(|| format!("output folder {}", args.out.display()))?;
    let host = host::facts(host::versions(&parts.peers));
    let mut samples = Samples::create(&args.out.join("samples.jsonl"), &host, args.quick)?;
    let went = measure(args, &parts, &mut samples);
    samples.end(Some(host::noise()), went.partial);
    let analysis = Analysis::of_records(samples.records(), None);
    print!("{}", report::markdown(&analysis));
    report::write(&analysis, &args.out)?;
    eprintln!(
        "ratoon-bench: the page: {}",
        args.out.join(report::PAGE).display()
    );
    Ok(went.code)
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("ratoon-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
