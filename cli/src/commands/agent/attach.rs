//! `ratoon agent attach`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use ratoon_engine::Engine;
use ratoon_engine::bridge::Keeper;
use ratoon_protocol::{Go, Order};

use super::finish::{Finish, Watch};
use super::session::{Agent, Heard};
use super::steps::{self, Keeping};
use super::stop::Stop;
use crate::failure::Failure;
use crate::guest;

/// Take up the stream of an agent that runs, wherever it was left.
///
/// It goes on as `ratoon agent run` does: what the agent says comes on standard error, the patch at its end
/// on standard output, and then the machine is removed, unless --keep leaves it.
#[derive(clap::Args)]
pub struct Args {
    /// The run's id, the beginning of it, or its machine's name.
    #[arg(value_name = "RUN")]
    run: String,
    /// Which branch, when several run.
    #[arg(long)]
    branch: Option<String>,
    /// Let it go on, if it is held; with --steer also if it is not, from the next turn boundary.
    #[arg(long)]
    go: bool,
    /// With --go: words to it before its next step.
    #[arg(long, value_name = "TEXT", requires = "go")]
    steer: Option<String>,
    /// Do the same to the directory at the end, if that has not changed meanwhile.
    #[arg(long)]
    apply: bool,
    /// Write the patch into this file.
    #[arg(long, value_name = "FILE")]
    patch: Option<PathBuf>,
    /// Leave the machine at the end.
    #[arg(long)]
    keep: bool,
    /// Print events as JSON, a line each, and the result as the last line.
    #[arg(long)]
    json: bool,
}

pub fn run(engine: &Engine, args: &Args) -> Result<ExitCode, Failure> {
    let run = super::find(engine, &args.run)?;
    let (config, keys) = super::config_of(&run)?;
    let (branch, entry) = super::live_branch(engine, &run, args.branch.as_deref())?;
    let pid = super::at_work(&run, &branch)?;
    let bridge = engine.bridge();
    bridge.ensure_any(&config, &keys)?;
    bridge.renew_token(&entry.dir)?;
    let stop = Stop::listen()?;
    let mut client = guest::connect(&entry)?;
    let mut agent = Agent::of(pid)?;
    let orders = agent.orders.clone();
    let mut go = args.go.then(|| {
        Order::Go(Box::new(Go {
            steer: args.steer.clone(),
            ..Go::default()
        }))
    });
    // Before it is told to hold: what waits to be kept is kept first.
    let keeping = Keeping::of(engine, &run, &entry.dir, &orders);
    let mut keeping = keeping.map(Keeping::attached).transpose()?;
    let nonce = steps::nonce();
    if go.is_some() {
        // It says then that it is held, whoever has heard so before.
        orders.say(&Order::Hold {
            nonce: Some(nonce.clone()),
        })?;
    }
    stop.agent(agent.orders.clone(), client.controller());
    let keeper = Keeper::start(
        bridge.clone(),
        config,
        Arc::new(keys),
        vec![entry.dir.clone()],
        |text| eprintln!("note: {text}"),
    )?;
    let mut watch = Watch::new(args.json);
    watch.hints = !args.go;
    let left = agent.attach(&mut client, &mut |heard| {
        let Heard::Event(event) = heard else {
            return true;
        };
        if steps::held_for(event, &nonce).is_some() {
            // Else its time is over earlier. The order itself cannot fail while we have the other end.
            let _ = bridge.rested(&entry.dir);
            let _ = go.take().map(|go| orders.say(&go));
            return true;
        }
        watch.event(event);
        if let Some(keeping) = &mut keeping {
            keeping.event(event);
        }
        true
    });
    drop(client);
    drop(keeper);
    let finish = Finish {
        engine,
        run: &run,
        branch: &branch.name,
        patch: args.patch.as_deref(),
        apply: args.apply,
        keep: args.keep,
        json: args.json,
    };
    finish.after(left, watch.ended, &stop)
}
