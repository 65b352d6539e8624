//! `ratoon-bench`: measures Ratoon on this machine, with raw samples, and beside a peer.
//!
//! `docs/benchmarks.md` says what each figure means. It writes `samples.jsonl` (one line a sample,
//! as they are taken), `host.json` and `summary.md`, and prints the summary. ^C ends the run with
//! what there is; the summary then says that it is partial.

mod host;
mod machine;
mod proc;
mod samples;
mod sandbox;
mod scenario;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use ratoon_engine::Programs;
use ratoon_engine::dirs::Dirs;
use ratoon_engine::image::ImageStore;
use ratoon_engine::initramfs;

use machine::{Interrupted, Parts, STOP};
use samples::Samples;
use scenario::Plan;

/// Measures Ratoon on this machine.
///
/// Exit status: 0 when all scenarios ran, 1 when one failed, 130 when interrupted.
#[derive(Parser)]
#[command(name = "ratoon-bench", version)]
struct Args {
    /// Fewer rounds.
    #[arg(long)]
    quick: bool,
    /// Folder for samples.jsonl, host.json and summary.md; made when missing.
    #[arg(long, value_name = "DIR", default_value = "bench-results")]
    out: PathBuf,
    /// How many rounds each scenario does, in place of its own number.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    runs: Option<u32>,
    /// QEMU for the comparison; default: qemu-system-x86_64 on the PATH.
    #[arg(long, value_name = "PATH")]
    qemu: Option<PathBuf>,
    /// The image whose disk guests boot from.
    #[arg(long, default_value = "debian")]
    image: String,
    /// What to measure.
    #[arg(required = true, value_enum)]
    scenarios: Vec<Choice>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Choice {
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

impl Choice {
    const EACH: [Self; 11] = [
        Self::Start,
        Self::Memory,
        Self::Boot,
        Self::Block,
        Self::Vsock,
        Self::Runtime,
        Self::Restore,
        Self::Freeze,
        Self::Clones,
        Self::Fork,
        Self::Run,
    ];

    fn run(self, plan: &Plan<'_>, samples: &mut Samples) -> Result<()> {
        match self {
            Self::Start => scenario::start::run(plan, samples),
            Self::Memory => scenario::memory::run(plan, samples),
            Self::Boot => scenario::boot::run(plan, samples),
            Self::Block => scenario::block::run(plan, samples),
            Self::Vsock => scenario::vsock::run(plan, samples),
            Self::Runtime => scenario::runtime::run(plan, samples),
            Self::Restore => scenario::restore::run(plan, samples),
            Self::Freeze => scenario::freeze::run(plan, samples),
            Self::Clones => scenario::clones::run(plan, samples),
            Self::Fork => scenario::fork::run(plan, samples),
            Self::Run => scenario::run::run(plan, samples),
            Self::All => Self::EACH
                .into_iter()
                .try_for_each(|choice| choice.run(plan, samples)),
        }
    }
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
    if let Some(qemu) = &args.qemu
        && !qemu.is_file()
    {
        bail!("--qemu {}: no such program", qemu.display());
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
        qemu: args.qemu.clone().or_else(|| on_path("qemu-system-x86_64")),
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

fn run(args: &Args) -> Result<ExitCode> {
    let parts = parts(args)?;
    stop_on_signals()?;
    std::fs::create_dir_all(&args.out)
        .with_context(|| format!("output folder {}", args.out.display()))?;
    let mut host = host::facts(parts.qemu.as_deref());
    let mut samples = Samples::create(&args.out.join("samples.jsonl"))?;
    let plan = Plan {
        parts: &parts,
        quick: args.quick,
        runs: args.runs.map(|n| n as usize),
    };
    let chosen: Vec<Choice> = if args.scenarios.contains(&Choice::All) {
        Choice::EACH.to_vec()
    } else {
        args.scenarios.clone()
    };
    let mut code = ExitCode::SUCCESS;
    for choice in chosen {
        eprintln!("ratoon-bench: {choice:?} …");
        let Err(error) = choice.run(&plan, &mut samples) else {
            continue;
        };
        if error.is::<Interrupted>() || STOP.load(Ordering::Relaxed) {
            samples.note("PARTIAL: interrupted");
            code = ExitCode::from(130);
            break;
        }
        eprintln!("ratoon-bench: {choice:?}: {error:#}");
        samples.note(format!("{choice:?} FAILED: {error:#}"));
        code = ExitCode::FAILURE;
    }
    host.noise_after = Some(host::noise());
    let summary = format!("{}\n{}", host.markdown(), samples.markdown());
    std::fs::write(
        args.out.join("host.json"),
        serde_json::to_vec_pretty(&host)?,
    )
    .context("host.json")?;
    std::fs::write(args.out.join("summary.md"), &summary).context("summary.md")?;
    print!("{summary}");
    Ok(code)
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
