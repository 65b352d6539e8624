//! `ratoon agent`: a model at work in a machine that has neither keys nor a network.

mod attach;
mod bridge;
mod diff;
mod finish;
mod fork;
mod log;
mod outcome;
mod patch;
pub mod program;
mod ps;
mod resume;
mod run;
mod score;
mod session;
mod show;
mod steer;
mod steps;
mod stop;
mod tree;
mod work;

use std::process::ExitCode;

pub use log::{AuditCommand, audit};
use ratoon_engine::Engine;
use ratoon_engine::agent::{Branch, Run};
use ratoon_engine::bridge::{BridgeConfig, Keys};
use ratoon_engine::vm::life::{self, Status};
use ratoon_engine::vm::store::Entry;

use crate::failure::Failure;

/// Let a model work on a directory, in a machine that has neither keys nor a network.
#[derive(clap::Subcommand)]
pub enum Command {
    Run(Box<run::Args>),
    Attach(attach::Args),
    Resume(resume::Args),
    Ps(ps::Args),
    Fork(Box<fork::Args>),
    Tree(ps::TreeArgs),
    Diff(diff::Args),
    Log(log::Args),
    #[command(subcommand)]
    Bridge(bridge::Command),
}

/// Does it.
pub fn run(engine: &Engine, command: Command) -> Result<ExitCode, Failure> {
    match command {
        Command::Run(args) => run::run(engine, &args),
        Command::Attach(args) => attach::run(engine, &args),
        Command::Resume(args) => resume::run(engine, &args),
        Command::Ps(args) => ps::run(engine, &args),
        Command::Fork(args) => fork::run(engine, &args),
        Command::Tree(args) => ps::tree(engine, &args),
        Command::Diff(args) => diff::run(engine, &args),
        Command::Log(args) => log::run(engine, &args),
        Command::Bridge(command) => bridge::run(engine, &command),
    }
}

/// A run by its id, the beginning of one, or the name of a machine that works on it.
fn find(engine: &Engine, text: &str) -> Result<Run, Failure> {
    let vm = engine.store().find(text).ok().map(|entry| entry.dir.id());
    Ok(engine.runs().find(text, vm.as_deref())?)
}

/// The process of a run's agent, the same in all its machines.
fn started(run: &Run) -> Result<i32, Failure> {
    run.pid
        .ok_or_else(|| Failure::new(format!("the agent of run {} never started", run.id)))
}

/// A branch whose machine is there: the one that is named, or the only one.
fn live_branch(
    engine: &Engine,
    run: &Run,
    named: Option<&str>,
) -> Result<(Branch, Entry), Failure> {
    let known = || {
        let names: Vec<&str> = run.branches.iter().map(|it| it.name.as_str()).collect();
        format!("run {} has {}", run.id, names.join(", "))
    };
    if let Some(name) = named
        && run.branch(name).is_none()
    {
        return Err(Failure::new(format!("there is no branch {name:?}")).hint(known()));
    }
    let mut live = Vec::new();
    for branch in &run.branches {
        if named.is_some_and(|name| name != branch.name) {
            continue;
        }
        if let Ok(entry) = engine.store().find(&branch.vm)
            && entry.dir.id() == branch.vm
            && matches!(life::info(&entry).status, Status::Running | Status::Paused)
        {
            live.push((branch.clone(), entry));
        }
    }
    if live.len() > 1 {
        return Err(
            Failure::new(format!("several branches of run {} run", run.id))
                .hint("name one with --branch: `ratoon agent tree` shows them")
                .code(2),
        );
    }
    live.pop().ok_or_else(|| {
        let what = named.map_or_else(
            || format!("no machine of run {} is there any more", run.id),
            |name| format!("the machine of branch {name} of run {} is gone", run.id),
        );
        Failure::new(what).hint(
            "what it has done is in its patch if it was kept: `ratoon agent tree` tells; `ratoon agent log` has \
             its record",
        )
    })
}

/// The process of a branch's agent, if it is at work still.
fn at_work(run: &Run, branch: &Branch) -> Result<i32, Failure> {
    if run.profile.is_none() {
        let text = format!("run {} is a program's, which has its own loop", run.id);
        return Err(Failure::new(text).hint(format!(
            "`ratoon exec {0}` and `ratoon fork {0}` work on its machine",
            branch.vm
        )));
    }
    if let Some(ending) = branch.ending {
        let how = show::word(ending);
        let text = format!("the agent of branch {} has ended: {how}", branch.name);
        return Err(Failure::new(text).hint(format!(
            "`ratoon agent diff {} --branch {}` shows what it did",
            run.id, branch.name
        )));
    }
    started(run)
}

/// The configuration that a run was started with, and keys for a bridge that must be started again.
fn config_of(run: &Run) -> Result<(BridgeConfig, Keys), Failure> {
    let config = BridgeConfig::read(&run.config)?;
    let keys = Keys::take(&config);
    Ok((config, keys))
}
