//! `ratoon-bridge`: holds keys, forwards guests' model calls, enforces rules. See docs/bridge.md.

use std::fs::File;
use std::io::{IsTerminal as _, Read as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use ratoon_bridge::config::Config;
use ratoon_bridge::confine::Confined;
use ratoon_bridge::{Bridge, control, key, socket};
use tokio::io::AsyncReadExt as _;
use tokio::signal::unix::{SignalKind, signal};

/// Holds keys, forwards guests' model calls and enforces rules.
#[derive(Parser)]
#[command(name = "ratoon-bridge", version, max_term_width = 100)]
#[command(after_help = "Example, with the key on descriptor 3:
  ratoon-bridge serve --config bridge.json --control bridge.sock 3<key-file

Exit codes: 0 ended as it was told; 1 failed; 2 wrong usage.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve until SIGTERM, SIGINT or the end of the lifeline.
    Serve {
        /// The configuration (docs/bridge.md).
        #[arg(long)]
        config: PathBuf,
        /// Where to listen for the engine.
        #[arg(long)]
        control: PathBuf,
        /// End when standard input ends: when whoever started this has gone.
        #[arg(long)]
        lifeline: bool,
    },
    /// Check the record of a run.
    Verify {
        /// The run's folder.
        run: PathBuf,
        /// A head that was kept, as BRANCH=HASH: it must be in the record.
        #[arg(long = "head", value_name = "BRANCH=HASH")]
        heads: Vec<String>,
    },
}

type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Serve {
            config,
            control,
            lifeline,
        } => serve(&config, &control, lifeline),
        Command::Verify { run, heads } => verify(&run, &heads),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ratoon-bridge: {}", control::chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn serve(config: &Path, control: &Path, lifeline: bool) -> Result<(), Failure> {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_max_level(tracing::Level::INFO)
        .init();
    key::harden().map_err(|error| format!("this process cannot hide its memory: {error}"))?;
    let mut config = read_config(config)?;
    // Once confined it is in that folder.
    let records = std::mem::replace(&mut config.records, ".".into());
    if let Err(error) = socket::raise_descriptors() {
        tracing::warn!("the limit of open descriptors stays as it is: {error}");
    }
    // Keys are read while this is the only thread, and before anything else is open.
    let bridge = Bridge::new(config)?;
    let listener = ratoon_bridge_api::socket::bind(control)
        .map_err(|error| format!("cannot listen at {}: {error}", control.display()))?;
    listener.set_nonblocking(true)?;
    tracing::info!("listening at {}", control.display());
    let confined = Confined::now(&records)?;
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(run(&confined, bridge, listener, lifeline))
}

fn read_config(path: &Path) -> Result<Config, Failure> {
    let read = || {
        let mut bytes = Vec::new();
        File::open(path)?.take(1 << 20).read_to_end(&mut bytes)?;
        Ok::<_, std::io::Error>(bytes)
    };
    let bytes = read().map_err(|error| format!("{} cannot be read: {error}", path.display()))?;
    Ok(Config::parse(&bytes)?)
}

async fn run(
    _: &Confined,
    bridge: std::sync::Arc<Bridge>,
    listener: UnixListener,
    lifeline: bool,
) -> Result<(), Failure> {
    let listener = tokio::net::UnixListener::from_std(listener)?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::spawn(control::serve(bridge.clone(), listener));
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        () = end_of_input(), if lifeline => {}
    }
    bridge.end().await;
    Ok(())
}

async fn end_of_input() {
    let ended = async {
        let input = std::io::stdin().as_fd().try_clone_to_owned()?;
        let mut input = tokio::net::unix::pipe::Receiver::from_owned_fd(input)?;
        let mut rest = [0; 64];
        while input.read(&mut rest).await? > 0 {}
        Ok::<_, std::io::Error>(())
    };
    if let Err(error) = ended.await {
        tracing::warn!("the lifeline is no pipe, so this ends: {error}");
    }
}

fn verify(run: &Path, heads: &[String]) -> Result<(), Failure> {
    let mut kept = Vec::new();
    for head in heads {
        let (branch, hash) = head
            .split_once('=')
            .ok_or_else(|| format!("\"{head}\" is not BRANCH=HASH"))?;
        kept.push((branch.to_owned(), hash.to_owned()));
    }
    let report = ratoon_bridge_api::audit::verify_run(run, &kept)?;
    for (branch, (lines, head)) in &report.branches {
        println!("{branch}\t{lines} lines\t{head}");
    }
    println!("{} bodies; all as written", report.bodies);
    Ok(())
}
