//! `ratoon-scripted-model`: a model server that says what a script tells it to. For tests and demos.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use ratoon_scripted_model::{Script, Server};

/// Answers model calls from a script (no model is involved).
#[derive(Parser)]
#[command(name = "ratoon-scripted-model", version, max_term_width = 100)]
struct Cli {
    /// The script: JSON with "turns" and perhaps "key".
    script: PathBuf,
    /// Where to listen.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: String,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let started = std::fs::read(&cli.script)
        .map_err(|error| format!("{}: {error}", cli.script.display()))
        .and_then(|bytes| {
            serde_json::from_slice::<Script>(&bytes)
                .map_err(|error| format!("{} is no script: {error}", cli.script.display()))
        })
        .and_then(|script| {
            Server::start_at(&cli.listen, script)
                .map_err(|error| format!("cannot listen at {}: {error}", cli.listen))
        });
    match started {
        Ok(server) => {
            println!("{}", server.url());
            server.join();
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("ratoon-scripted-model: {error}");
            ExitCode::FAILURE
        }
    }
}
