//! `ratoon bench`: becomes `ratoon-bench`, the program beside this one that measures.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use crate::failure::Failure;

/// Measure this machine: starts, restores, forks, beside peers (`ratoon bench --help`).
#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub struct Args {
    /// What `ratoon-bench` is given.
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "ARGS"
    )]
    pub args: Vec<OsString>,
}

/// `RATOON_BENCH` where it is set, else `ratoon-bench` beside this executable.
fn program() -> PathBuf {
    let named = std::env::var_os("RATOON_BENCH").filter(|name| !name.is_empty());
    named.map_or_else(
        || {
            let this = std::env::current_exe().unwrap_or_default();
            this.with_file_name("ratoon-bench")
        },
        PathBuf::from,
    )
}

pub fn run(args: &Args) -> Result<ExitCode, Failure> {
    let program = program();
    // Only returns when it could not.
    let error = Command::new(&program).args(&args.args).exec();
    let failure = Failure::new(format!("{} cannot be run: {error}", program.display()));
    Err(match error.kind() {
        ErrorKind::NotFound => failure.hint(
            "`ratoon bench` runs the program `ratoon-bench` beside `ratoon`: build it with \
             `cargo build --release` in Ratoon's repository (`scripts/bench` does all of it), or name \
             it in RATOON_BENCH",
        ),
        _ => failure,
    })
}
