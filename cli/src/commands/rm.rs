//! `ratoon rm`.

use std::process::ExitCode;

use ratoon_engine::Engine;
use ratoon_engine::vm::life;

use super::for_each;
use crate::failure::Failure;

/// Remove VMs that have ended: their record, logs and what they wrote to their disk.
#[derive(clap::Args)]
pub struct Args {
    /// Also those that run (they are killed) and those whose record is broken.
    #[arg(long, short)]
    force: bool,
    /// Print what happened as JSON.
    #[arg(long)]
    json: bool,
    /// Names, ids or beginnings of ids.
    #[arg(required = true, value_name = "VM")]
    vms: Vec<String>,
}

pub fn run(engine: &Engine, args: &Args) -> Result<ExitCode, Failure> {
    if args.force && args.vms.len() > 1 {
        let found = args
            .vms
            .iter()
            .filter_map(|vm| engine.store().find(vm).ok());
        life::kill_all(&found.collect::<Vec<_>>());
    }
    for_each(engine, &args.vms, args.json, |entry| {
        life::remove(engine.store(), entry, args.force)?;
        Ok("removed")
    })
}
