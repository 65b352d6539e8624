//! `ratoon kill`.

use std::process::ExitCode;

use ratoon_engine::Engine;
use ratoon_engine::vm::life;

use super::for_each;
use crate::failure::Failure;

/// End VMs at once, as if their power went.
#[derive(clap::Args)]
pub struct Args {
    /// Print what happened as JSON.
    #[arg(long)]
    json: bool,
    /// Names, ids or beginnings of ids.
    #[arg(required = true, value_name = "VM")]
    vms: Vec<String>,
}

pub fn run(engine: &Engine, args: &Args) -> Result<ExitCode, Failure> {
    for_each(engine, &args.vms, args.json, |entry| Ok(life::kill(entry)?))
}
