//! `ratoon agent diff`.

use std::path::PathBuf;
use std::process::ExitCode;

use ratoon_engine::Engine;

use super::work::Work;
use crate::failure::Failure;
use crate::{guest, output};

/// Show what an agent has done so far, or has done.
#[derive(clap::Args)]
pub struct Args {
    /// The run's id, the beginning of it, or its machine's name.
    #[arg(value_name = "RUN")]
    run: String,
    /// Which branch; one whose machine is gone has its patch still.
    #[arg(long)]
    branch: Option<String>,
    /// Do the same to the directory, if that has not changed meanwhile.
    #[arg(long)]
    apply: bool,
    /// Write the patch into this file.
    #[arg(long, value_name = "FILE")]
    patch: Option<PathBuf>,
}

pub fn run(engine: &Engine, args: &Args) -> Result<ExitCode, Failure> {
    let run = super::find(engine, &args.run)?;
    if run.profile.is_none() {
        let text = format!("run {} is a program's: no directory was uploaded", run.id);
        return Err(Failure::new(text).hint("`ratoon cp VM:/path .` takes what it made"));
    }
    let live = super::live_branch(engine, &run, args.branch.as_deref());
    let (_, entry) = match live {
        Ok(live) => live,
        Err(failure) => {
            let name = args.branch.as_deref().or(match run.branches.as_slice() {
                [only] => Some(only.name.as_str()),
                _ => None,
            });
            let kept = name.map(|name| engine.runs().patch(&run.id, name));
            let Some(text) = kept.and_then(|path| std::fs::read(path).ok()) else {
                return Err(failure);
            };
            if args.apply {
                return Err(failure.hint("`git apply` takes the patch that was kept"));
            }
            match &args.patch {
                Some(file) => std::fs::write(file, &text)?,
                None => output::write(&text)?,
            }
            return Ok(ExitCode::SUCCESS);
        }
    };
    let mut client = guest::connect(&entry)?;
    let work = Work::of(engine, &run, &mut client)?;
    work.deliver((engine, &run), args.patch.as_deref(), args.apply, false)?;
    Ok(ExitCode::SUCCESS)
}
