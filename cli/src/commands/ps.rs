//! `ratoon ps`.

use std::process::ExitCode;

use ratoon_engine::Engine;
use ratoon_engine::vm::life::{Status, VmInfo};

use crate::failure::Failure;
use crate::{output, units};

/// List VMs.
#[derive(clap::Args)]
pub struct Args {
    /// Also those that have ended.
    #[arg(long, short)]
    all: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Print ids alone, one a line.
    #[arg(long, short, conflicts_with = "json")]
    quiet: bool,
}

pub fn run(engine: &Engine, args: &Args) -> Result<ExitCode, Failure> {
    let mut vms = engine.vms()?;
    // A broken record is always shown: it may belong to a VM that runs.
    vms.retain(|vm| args.all || vm.status.is_live() || vm.status == Status::Broken);
    if args.json {
        output::json(&vms)?;
    } else if args.quiet {
        let ids: String = vms.iter().map(|vm| format!("{}\n", vm.id)).collect();
        output::write(ids.as_bytes())?;
    } else {
        let head = [
            "ID", "NAME", "IMAGE", "STATUS", "CPUS", "MEMORY", "AGE", "PID",
        ];
        let rows: Vec<_> = vms.iter().map(row).collect();
        output::write(output::table(&head, &rows).as_bytes())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn row(vm: &VmInfo) -> Vec<String> {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
    let known = vm.status != Status::Broken;
    vec![
        vm.id.clone(),
        or_dash(vm.name.clone()),
        or_dash(vm.image.clone()),
        vm.status.to_string(),
        or_dash(known.then(|| vm.cpus.to_string())),
        or_dash(known.then(|| units::bytes(vm.memory_mib << 20))),
        or_dash(known.then(|| units::age_of(vm.created_ms))),
        or_dash(vm.pid.map(|pid| pid.to_string())),
    ]
}
