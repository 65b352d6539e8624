//! `ratoon agent resume`: a branch whose machine is gone goes on in another, from a snapshot.

use std::process::ExitCode;
use std::sync::Arc;

use ratoon_engine::Engine;
use ratoon_engine::agent::{Branch, Run};
use ratoon_engine::bridge::{AgentFork, AgentVm};
use ratoon_engine::fork::ForkSpec;
use ratoon_engine::steps::{self, KeptStep};
use ratoon_engine::vm::life;

use super::stop::Stop;
use crate::failure::Failure;
use crate::output;
use crate::progress::Spinner;

/// Start an agent again whose machine was suspended, or has died; prints the new machine's id.
///
/// It goes on as the same branch, with what is left of its budget; answers of the model that it had
/// are given again from the record, and not paid for twice. From a kept step it waits until `ratoon
/// agent attach` takes it up; from a suspended machine it works on at once.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  ratoon suspend box && ratoon agent resume r1a2b3c4 --from box
  ratoon agent resume r1a2b3c4          # from the last step that --keep-steps kept")]
pub struct Args {
    /// The run's id, the beginning of it, or its machine's name.
    #[arg(value_name = "RUN")]
    run: String,
    /// Which branch, when the run has several.
    #[arg(long)]
    branch: Option<String>,
    /// A snapshot of its machine; by default the last step that was kept.
    #[arg(long, value_name = "SNAPSHOT", conflicts_with = "at")]
    from: Option<String>,
    /// The boundary before this step, if it was kept.
    #[arg(long, value_name = "STEP")]
    at: Option<u32>,
    /// A name for the machine.
    #[arg(long)]
    name: Option<String>,
}

pub fn run(engine: &Engine, args: &Args) -> Result<ExitCode, Failure> {
    let run = super::find(engine, &args.run)?;
    let (config, keys) = super::config_of(&run)?;
    let branch = branch(&run, args.branch.as_deref())?;
    super::at_work(&run, branch)?;
    let old = engine.store().find(&branch.vm).ok();
    let old = old.filter(|entry| entry.dir.id() == branch.vm);
    if let Some(old) = &old
        && life::info(old).status.is_live()
    {
        return Err(Failure::new(format!(
            "the machine of branch {} is there: {} is {}",
            branch.name,
            branch.vm,
            life::info(old).status
        ))
        .hint(format!(
            "`ratoon agent attach {}` takes it up; `ratoon rollback` puts it back",
            run.id
        )));
    }
    let kept = old
        .as_ref()
        .map_or_else(Vec::new, |old| steps::kept(&old.dir));
    let snapshot = from(args, &run, &kept)?;
    let step = kept.iter().find(|it| it.snapshot == snapshot);
    let step = step.map(|it| it.step);
    let stop = Stop::listen()?;
    let bridge = engine.bridge();
    bridge.ensure_any(&config, &keys)?;
    // It stays while the machine that it is of goes.
    let store = engine.snapshots()?;
    let held = store.get(&snapshot)?.hold()?;
    let mut name = args.name.clone();
    if let Some(old) = &old {
        let record = old.record.as_ref().ok();
        name = name.or_else(|| record.and_then(|record| record.name.clone()));
        life::remove(engine.store(), old, false)?;
        // It ends with the last machine that it knows.
        bridge.ensure_any(&config, &keys)?;
    }
    let model = run.model.split_once('/').map_or(&*run.model, |it| it.1);
    let spec = ForkSpec {
        detached: true,
        names: name.into_iter().collect(),
        agent: Some(Arc::new(AgentFork::resumed(AgentVm {
            control: bridge.control(),
            run: run.id.clone(),
            branch: branch.name.clone(),
            parent: branch.parent.clone(),
            models: vec![model.to_owned()],
            heads: engine.runs().heads(&run.id),
        }))),
        ..ForkSpec::new(1)
    };
    let spinner = Spinner::start(format!("starting {} again", branch.name));
    let started = engine.fork_snapshot(&snapshot, &spec, Some(stop.cancel()));
    drop((spinner, held));
    let hint = |failure: Failure| {
        let again = format!("ratoon agent resume {} --from {snapshot}", run.id);
        failure.hint(format!("the snapshot is there still: `{again}`"))
    };
    let mut children = started.map_err(|error| hint(error.into()))?.children;
    let vm = match children.pop() {
        Some(child) => child.map_err(|error| hint(error.into()))?,
        None => return Err(hint(Failure::new("no machine was started"))),
    };
    let dir = vm.dir().clone();
    let id = dir.id();
    vm.detach();
    engine.runs().update(&run.id, |run| {
        if let Some(branch) = run.branch_mut(&branch.name) {
            branch.vm.clone_from(&id);
        }
    })?;
    if let Some(step) = step {
        steps::inherit(engine, &dir, kept, step)?;
    }
    eprintln!(
        "run {} goes on in machine {id}: `ratoon agent attach {}`",
        run.id, run.id
    );
    output::line(&id)?;
    Ok(ExitCode::SUCCESS)
}

fn branch<'r>(run: &'r Run, named: Option<&str>) -> Result<&'r Branch, Failure> {
    match (named, run.branches.as_slice()) {
        (None, [branch]) => Ok(branch),
        (Some(name), _) => run
            .branch(name)
            .ok_or_else(|| Failure::new(format!("there is no branch {name:?}"))),
        (None, _) => Err(Failure::new(format!("run {} has several branches", run.id))
            .hint("name one with --branch: `ratoon agent tree` shows them")
            .code(2)),
    }
}

fn from(args: &Args, run: &Run, kept: &[KeptStep]) -> Result<String, Failure> {
    if let Some(named) = &args.from {
        return Ok(named.clone());
    }
    let found = match args.at {
        Some(step) => kept.iter().find(|it| it.step == step),
        None => kept.last(),
    };
    found.map(|kept| kept.snapshot.clone()).ok_or_else(|| {
        let what = args.at.map_or_else(
            || format!("no step of run {} is kept", run.id),
            |step| format!("step {step} of run {} is not kept", run.id),
        );
        Failure::new(what)
            .hint("name a snapshot of its machine with --from (`ratoon snapshots` lists them)")
    })
}
