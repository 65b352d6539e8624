//! `ratoon stop`.

use std::process::ExitCode;
use std::time::Duration;

use ratoon_engine::Engine;
use ratoon_engine::vm::life;

use super::for_each;
use crate::failure::Failure;
use crate::units;

/// Shut VMs down: the guest is asked, and after the timeout its VMM ends it.
#[derive(clap::Args)]
pub struct Args {
    /// How long a guest may take.
    #[arg(long, short, value_name = "TIME", default_value = "30s", value_parser = units::duration)]
    timeout: Duration,
    /// Print what happened as JSON.
    #[arg(long)]
    json: bool,
    /// Names, ids or beginnings of ids.
    #[arg(required = true, value_name = "VM")]
    vms: Vec<String>,
}

pub fn run(engine: &Engine, args: &Args) -> Result<ExitCode, Failure> {
    for_each(engine, &args.vms, args.json, |entry| {
        Ok(life::stop(entry, args.timeout)?)
    })
}
