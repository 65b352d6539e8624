//! `ratoon snapshot`, `restore`, `suspend`, `snapshots`, `pause`, `resume`.

use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use ratoon_engine::Engine;
use ratoon_engine::snapshot::MemoryKind;
use ratoon_engine::snapshots::{RestoreSpec, SnapshotError, Taken};
use ratoon_engine::vm::control::Control;
use ratoon_engine::vm::launch::LaunchError;
use ratoon_engine::vm::life;
use ratoon_engine::vm::store::Entry;
use ratoon_engine::{StartError, snapshot};
use serde::Serialize;

use super::for_each;
use crate::failure::Failure;
use crate::guest;
use crate::interrupt::Interrupts;
use crate::progress::{ImageProgress, Spinner};
use crate::{output, units};

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
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Start a VM from a snapshot and leave it running; prints its id.
///
/// It goes on where the snapshot was taken, with a clock, random numbers and a machine-id of its own.
/// Connections from before are gone. `ratoon run --snapshot` runs a command in it instead.
#[derive(clap::Args)]
pub struct RestoreArgs {
    /// Name or id of the snapshot.
    #[arg(value_name = "SNAPSHOT")]
    snapshot: String,
    /// A name for the VM.
    #[arg(long)]
    name: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
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

/// List, check and remove snapshots.
#[derive(clap::Args)]
pub struct SnapshotsArgs {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    command: Option<SnapshotsCommand>,
}

#[derive(clap::Subcommand)]
enum SnapshotsCommand {
    /// Print a snapshot's manifest.
    Inspect {
        /// Name or id.
        snapshot: String,
    },
    /// Read all of a snapshot and check it against its hashes.
    Verify {
        /// Name or id.
        snapshot: String,
    },
    /// Remove snapshots.
    Rm {
        /// Names or ids.
        #[arg(required = true)]
        snapshots: Vec<String>,
    },
}

#[derive(Serialize)]
struct TakenReport<'a> {
    id: String,
    name: Option<&'a str>,
    pause_us: u64,
}

static NEVER: AtomicBool = AtomicBool::new(false);

fn take(
    engine: &Engine,
    entry: &Entry,
    name: Option<&str>,
    compress: bool,
) -> Result<Taken, Failure> {
    let progress = ImageProgress::new(&NEVER);
    let kind = match compress {
        true => MemoryKind::Chunks,
        false => MemoryKind::Plain,
    };
    let taken = engine.snapshot(&entry.dir, name, kind, &progress);
    drop(progress);
    Ok(taken?)
}

pub fn run(engine: &Engine, args: &Args) -> Result<ExitCode, Failure> {
    let entry = guest::find_running(engine, &args.vm)?;
    let taken = take(engine, &entry, args.name.as_deref(), args.compress)?;
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
        ..RestoreSpec::default()
    };
    let started = engine.restore(&spec, Some(interrupts.cancel()));
    drop(spinner);
    let started = started.map_err(|error| failed(error, &interrupts))?;
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
    take(engine, &entry, Some(&name), args.compress)?;
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

/// `snapshots --json`.
#[derive(Serialize)]
struct Row {
    id: String,
    names: Vec<String>,
    image: Option<String>,
    vcpus: u32,
    memory_mib: u64,
    created: u64,
    disk_bytes: u64,
}

pub fn snapshots(engine: &Engine, args: &SnapshotsArgs) -> Result<ExitCode, Failure> {
    let store = engine.snapshots()?;
    match &args.command {
        Some(SnapshotsCommand::Inspect { snapshot }) => {
            output::json(&store.get(snapshot)?.manifest)?;
        }
        Some(SnapshotsCommand::Verify { snapshot }) => {
            let progress = ImageProgress::new(&NEVER);
            let verified = store.verify(snapshot, &progress);
            drop(progress);
            verified?;
            output::line(&format!("{snapshot}: every byte is as it was written"))?;
        }
        Some(SnapshotsCommand::Rm { snapshots }) => {
            for snapshot in snapshots {
                store.remove(snapshot)?;
                output::line(snapshot)?;
            }
        }
        None => list(&store, args.json)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn list(store: &snapshot::Store, json: bool) -> Result<(), Failure> {
    let listing = store.list()?;
    let mut rows = Vec::new();
    for snapshot in &listing.snapshots {
        let manifest = &snapshot.manifest;
        rows.push(Row {
            id: snapshot.id.to_string(),
            names: snapshot.names.clone(),
            image: ratoon_engine::snapshots::image_of(snapshot).map(str::to_owned),
            vcpus: manifest.about.vcpus,
            memory_mib: manifest.about.memory_mib,
            created: manifest.created_unix_seconds,
            disk_bytes: snapshot.sizes()?.disk_bytes,
        });
    }
    for damaged in &listing.damaged {
        eprintln!("{}: {}", damaged.id, damaged.error);
    }
    if json {
        output::json(&rows)?;
        return Ok(());
    }
    let head = ["ID", "NAME", "IMAGE", "CPUS", "MEMORY", "AGE", "SIZE"];
    let rows: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            vec![
                row.id.chars().take(12).collect(),
                match row.names.is_empty() {
                    true => "-".into(),
                    false => row.names.join(","),
                },
                row.image.clone().unwrap_or_else(|| "-".into()),
                row.vcpus.to_string(),
                units::bytes(row.memory_mib << 20),
                units::age_of(row.created * 1000),
                units::bytes(row.disk_bytes),
            ]
        })
        .collect();
    output::write(output::table(&head, &rows).as_bytes())?;
    Ok(())
}
