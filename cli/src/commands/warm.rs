//! `ratoon image warm`.

use std::process::ExitCode;

use ratoon_engine::runtime::{ExecIo, RuntimeClient, RuntimeError};
use ratoon_engine::vm::command::{self, CommandSpec, ImageCommand};
use ratoon_engine::{Engine, RunSpec, WarmError, snapshot, snapshots::SnapshotError};
use serde_json::json;

use super::run::not_started;
use crate::failure::Failure;
use crate::interrupt::{Ended, Interrupts, cancel_on_signals};
use crate::progress::{ImageProgress, Spinner};
use crate::{output, units};

/// Boot an image once, run a warm-up in it, and have later VMs start from there.
///
/// What the warm-up has read stays in the guest's memory, what it writes stays on its disk, and what
/// it leaves running goes on in every later VM. An image's earlier warm generation of this size is
/// replaced.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  ratoon image warm debian --exec 'python3 -c \"import numpy\"'
  ratoon image warm app --memory 2G --exec './server >/dev/null 2>&1 &'
  ratoon run --image debian -- python3 -c 'import numpy'   # starts from there")]
pub struct Args {
    /// Name or digest of the image.
    image: String,
    /// A line for the image's shell; if it fails, nothing is kept. May be given several times.
    #[arg(long, short = 'x', value_name = "CMD")]
    exec: Vec<String>,
    /// Virtual CPUs of the VMs that are to start from it.
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u32,
    /// Their memory, such as 256M or 1G.
    #[arg(long, short, value_name = "SIZE", default_value = "512M", value_parser = units::memory_mib)]
    memory: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub fn run(engine: &Engine, args: &Args) -> Result<ExitCode, Failure> {
    let interrupts = Interrupts::listen()?;
    let spec = RunSpec {
        cpus: args.cpus,
        memory_mib: args.memory,
        ..RunSpec::new(&args.image)
    };
    let spinner = Spinner::start(format!("booting {}", args.image));
    let warming = engine.warming(&spec, Some(interrupts.cancel()));
    drop(spinner);
    let mut warming = warming.map_err(|error| match error {
        WarmError::Start(error) => not_started(error, &interrupts),
        error => error.into(),
    })?;
    let mut client = warming.started.vm.runtime()?;
    interrupts.command(client.controller());
    for line in &args.exec {
        exec(&mut client, &warming.started.command, line).map_err(|failure| {
            match interrupts.ended() {
                Some(ended) => Failure::silent(ended.code()),
                None => failure,
            }
        })?;
    }
    // The signal may have ended what the command only started.
    if let Some(ended) = interrupts.ended() {
        return Err(Failure::silent(ended.code()));
    }
    let progress = ImageProgress::new(cancel_on_signals()?);
    let kept = warming.keep(engine, client, &progress);
    drop(progress);
    let kept = kept.map_err(|error| match (&error, interrupts.ended()) {
        (WarmError::Snapshot(SnapshotError::Store(snapshot::Error::Cancelled)), ended) => {
            Failure::silent(ended.map_or(130, Ended::code))
        }
        _ => error.into(),
    })?;
    if args.json {
        output::json(&json!({
            "image_digest": kept.image_digest,
            "cpus": kept.cpus,
            "memory_mib": kept.memory_mib,
            "disk_bytes": kept.disk_bytes,
        }))?;
    } else {
        let size = units::bytes(kept.disk_bytes);
        output::line(&format!("{}: warm, {size} on the disk", args.image))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs a line as the image's user. What it prints is not what was asked for: standard error.
fn exec(client: &mut RuntimeClient, image: &ImageCommand, line: &str) -> Result<(), Failure> {
    let spec = CommandSpec {
        argv: vec!["sh".into(), "-c".into(), line.into()],
        entrypoint: Some(Vec::new()),
        ..CommandSpec::default()
    };
    let params = command::resolve(image, &spec)?;
    let io = ExecIo {
        stdin: None,
        stdout: &mut std::io::stderr(),
        stderr: &mut std::io::stderr(),
    };
    let report = client.exec(&params, io).map_err(|error| match error {
        RuntimeError::Call(error) => crate::guest::refused(&error, "the warm-up"),
        error => error.into(),
    })?;
    match report.status.shell_code() {
        0 => Ok(()),
        code => Err(Failure::new(format!(
            "the warm-up ended with exit code {code}: nothing was kept"
        ))
        .code(code)),
    }
}
