//! `ratoon agent bridge`.

use std::process::ExitCode;

use ratoon_engine::Engine;
use serde_json::json;

use crate::failure::Failure;
use crate::output;

/// The process that holds the keys.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Show whether it runs, with which configuration, and for which machines.
    Status {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// End it. Agents that are at work cannot call their models then, until another is started.
    Stop,
}

pub fn run(engine: &Engine, command: &Command) -> Result<ExitCode, Failure> {
    let bridge = engine.bridge();
    match command {
        Command::Status { json } => {
            let running = bridge.running();
            let vms = match &running {
                Some(_) => bridge.vms()?,
                None => Vec::new(),
            };
            if *json {
                output::json(&json!({
                    "running": running, "vms": vms, "log": bridge.log(),
                }))?;
            } else if let Some(running) = running {
                output::line(&format!(
                    "process {} with {}, recording in {}",
                    running.process.pid,
                    running.config.display(),
                    running.records.display()
                ))?;
                for vm in vms {
                    output::line(&vm)?;
                }
            } else {
                output::line("no bridge runs")?;
            }
        }
        Command::Stop => {
            let words = if bridge.stop()? {
                "stopped"
            } else {
                "no bridge runs"
            };
            output::line(words)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
