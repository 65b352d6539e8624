//! `ratoon snapshot`, `restore`, `suspend`, `pause`, `resume`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use ratoon_engine::Engine;
use ratoon_engine::snapshot::{PublicKey, SigningKey};
use ratoon_engine::snapshots::{Keep, RestoreSpec, SnapshotError, Taken};
use ratoon_engine::vm::control::Control;
use ratoon_engine::vm::launch::LaunchError;
use ratoon_engine::vm::life;
use ratoon_engine::vm::store::Entry;
use ratoon_engine::{StaleRuntime, StartError, Started, snapshot};
use serde::Serialize;

use super::for_each;
use crate::failure::{FAILED, Failure};
use crate::guest;
use crate::interrupt::{Ended, Interrupts, cancel_on_signals};
use crate::output;
use crate::progress::{ImageProgress, Spinner};

/// How long a VMM may take to hold its vCPUs.
const CONTROL_TIMEOUT: Duration = Duration::from_secs(10);

/// Take a snapshot of a running VM, which goes on.
///
/// It holds the VM's memory, processes and all that was written to its disk; `ratoon restore` starts
/// from it, as often as wanted.
#[derive(clap::Args)]
pub struct Args {
    /// Name, id or beginning of an id.
    #[arg(value_name = "VM")]
    vm: String,
    /// What to call the snapshot; default: its id alone.
    #[arg(value_name = "NAME")]
    name: Option<String>,
    /// Compress its memory: smaller on the disk, and each part is checked when it is restored. Takes
    /// longer to write, and userfaultfd(2) to restore.
    #[arg(long)]
    compress: bool,
    /// Sign it with this key; `ratoon snapshots key new` makes one.
    #[arg(long, value_name = "FILE")]
    sign_key: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Start a VM from a snapshot and leave it running; prints its id.
///
/// It goes on where the snapshot was taken, with a clock, random numbers, a hostname and a
/// machine-id of its own.
/// Connections from before are gone. `ratoon run --snapshot` runs a command in it instead.
#[derive(clap::Args)]
pub struct RestoreArgs {
    /// Name or id of the snapshot.
    #[arg(value_name = "SNAPSHOT")]
    snapshot: String,
    /// A name for the VM.
    #[arg(long)]
    name: Option<String>,
    /// Refuse a snapshot that none of these keys signed, or that is not what was signed: a public
    /// key's file, or its 64 hexadecimal digits. May be given several times.
    #[arg(long, value_name = "KEY", value_parser = trusted_key)]
    require_signature: Vec<PublicKey>,
    /// Leave it the runtime that it was snapshotted with, even if this Ratoon has a newer one.
    #[arg(long)]
    keep_runtime: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// A public key, itself or in a file.
pub fn trusted_key(text: &str) -> Result<PublicKey, String> {
    match PublicKey::try_from(text.to_owned()) {
        Ok(key) => Ok(key),
        Err(_) => PublicKey::read(Path::new(text)).map_err(|error| {
            let cause = std::error::Error::source(&error);
            let cause = cause.map(|cause| format!(": {cause}")).unwrap_or_default();
            format!("{error}{cause}")
        }),
    }
}

/// Take a snapshot of a running VM, then end it.
#[derive(clap::Args)]
pub struct SuspendArgs {
    /// Name, id or beginning of an id.
    #[arg(value_name = "VM")]
    vm: String,
    /// What to call the snapshot; default: the VM's name, or its id.
    #[arg(value_name = "NAME")]
    name: Option<String>,
    /// Compress its memory, as `ratoon snapshot --compress` does.
    #[arg(long)]
    compress: bool,
}

/// Hold a VM's processors until `resume`.
#[derive(clap::Args)]
pub struct VmsArgs {
    /// Names, ids or beginnings of ids.
    #[arg(required = true, value_name = "VM")]
    vms: Vec<String>,
    /// Print what happened as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct TakenReport<'a> {
    id: String,
    name: Option<&'a str>,
    pause_us: u64,
}

fn take(engine: &Engine, entry: &Entry, keep: Keep<'_>) -> Result<Taken, Failure> {
    let progress = ImageProgress::new(cancel_on_signals()?);
    let taken = engine.snapshot(&entry.dir, keep, &progress);
    drop(progress);
    taken.map_err(|error| match error {
        SnapshotError::Store(error) => stored(error),
        error => error.into(),
    })
}

/// Work on the store of snapshots that failed, or was ended by a signal.
pub fn stored(error: snapshot::Error) -> Failure {
    let code = match error {
        snapshot::Error::Cancelled => 130,
        _ => FAILED,
    };
    Failure::from(error).code(code)
}

pub fn run(engine: &Engine, args: &Args) -> Result<ExitCode, Failure> {
    let entry = guest::find_running(engine, &args.vm)?;
    // A key that cannot be read is told before the VM is frozen.
    let key = args.sign_key.as_deref().map(SigningKey::read).transpose()?;
    let keep = Keep {
        name: args.name.as_deref(),
        key: key.as_ref(),
        compressed: args.compress,
        ..Keep::default()
    };
    let taken = take(engine, &entry, keep)?;
    let id = taken.snapshot.id.to_string();
    if args.json {
        output::json(&TakenReport {
            id,
            name: args.name.as_deref(),
            pause_us: taken.pause.as_micros() as u64,
        })?;
    } else {
        output::line(args.name.as_deref().unwrap_or(&id))?;
    }
    Ok(ExitCode::SUCCESS)
}

pub fn restore(engine: &Engine, args: &RestoreArgs) -> Result<ExitCode, Failure> {
    let interrupts = Interrupts::listen()?;
    let spinner = Spinner::start(format!("restoring {}", args.snapshot));
    let spec = RestoreSpec {
        snapshot: args.snapshot.clone(),
        name: args.name.clone(),
        detached: true,
        timeout: Duration::from_secs(180),
        trusted: args.require_signature.clone(),
        keep_runtime: args.keep_runtime,
        ..RestoreSpec::default()
    };
    let started = engine.restore(&spec, Some(interrupts.cancel()));
    drop(spinner);
    let started = started.map_err(|error| failed(error, &interrupts))?;
    tell_stale(&started);
    let Some(record) = started.vm.detach() else {
        return Err(Failure::new("the VM is gone"));
    };
    if args.json {
        output::json(&serde_json::json!({ "id": record.id, "name": record.name }))?;
    } else {
        output::line(&record.id)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Says so when a VM has its snapshot's runtime still.
pub fn tell_stale(started: &Started) {
    if let Some(stale) = &started.stale_runtime {
        let record = started.vm.record();
        tell_stale_in(record.name.as_ref().unwrap_or(&record.id), stale);
    }
}

/// The same of VMs that the user knows as `vms`.
pub fn tell_stale_in(vms: &str, stale: &StaleRuntime) {
    let mut line = format!("note: the runtime in {vms} stays as the snapshot has it: {stale}");
    let mut cause = std::error::Error::source(stale);
    while let Some(error) = cause {
        line += &format!(": {error}");
        cause = error.source();
    }
    eprintln!("{line}");
}

/// A restore that failed.
pub fn failed(error: SnapshotError, interrupts: &Interrupts) -> Failure {
    match error {
        SnapshotError::Start(StartError::Launch(error)) => {
            if matches!(error, LaunchError::Cancelled)
                && let Some(ended) = interrupts.ended()
            {
                return Failure::silent(ended.code());
            }
            let console = error.serial().to_vec();
            Failure::from(error).console(&console)
        }
        SnapshotError::Store(snapshot::Error::Cancelled) => {
            Failure::silent(interrupts.ended().map_or(FAILED, Ended::code))
        }
        error => Failure::from(error),
    }
}

pub fn suspend(engine: &Engine, args: &SuspendArgs) -> Result<ExitCode, Failure> {
    let entry = guest::find_running(engine, &args.vm)?;
    let own = entry
        .record
        .as_ref()
        .ok()
        .and_then(|record| record.name.clone());
    let name = args.name.clone().or(own).unwrap_or_else(|| entry.dir.id());
    let keep = Keep {
        name: Some(&name),
        compressed: args.compress,
        ..Keep::default()
    };
    take(engine, &entry, keep)?;
    life::kill(&entry)?;
    life::remove(engine.store(), &entry, true)?;
    output::line(&name)?;
    Ok(ExitCode::SUCCESS)
}

pub fn pause(engine: &Engine, args: &VmsArgs) -> Result<ExitCode, Failure> {
    for_each(engine, &args.vms, args.json, |entry| {
        Ok(Control::new(entry.dir.control_socket(), CONTROL_TIMEOUT)
            .pause()?
            .state)
    })
}

pub fn resume(engine: &Engine, args: &VmsArgs) -> Result<ExitCode, Failure> {
    for_each(engine, &args.vms, args.json, |entry| {
        Ok(Control::new(entry.dir.control_socket(), CONTROL_TIMEOUT)
            .resume()?
            .state)
    })
}
