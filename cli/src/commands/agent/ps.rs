//! `ratoon agent ps`, `ratoon agent tree`.

use std::collections::BTreeMap;
use std::process::ExitCode;

use ratoon_bridge_api::amount::Amount;
use ratoon_engine::Engine;
use ratoon_engine::agent::{Branch, Run};
use ratoon_engine::steps;
use ratoon_engine::vm::life::{self, Status};
use serde::Serialize;

use super::show;
use crate::failure::Failure;
use crate::{output, units};

/// List runs of agents: those with a machine, or all with -a.
#[derive(clap::Args)]
pub struct Args {
    /// Also those whose machines are gone.
    #[arg(long, short)]
    all: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Show a run's branches: who was forked from whom, what became of each, at which steps it can be forked, what it has
/// used.
#[derive(clap::Args)]
pub struct TreeArgs {
    /// The run's id, the beginning of it, or its machine's name.
    #[arg(value_name = "RUN")]
    run: String,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// A run with what is known of its machines.
#[derive(Serialize)]
struct Told {
    #[serde(flatten)]
    run: Run,
    /// By branch: what its machine does, if it is there.
    machines: BTreeMap<String, Status>,
    /// By branch: what is used, where a bridge can tell.
    used: BTreeMap<String, Amount>,
    /// By branch: the steps at which it can be forked.
    kept: BTreeMap<String, Vec<u32>>,
}

fn told(engine: &Engine, run: Run) -> Told {
    let status = |branch: &Branch| {
        let entry = engine.store().find(&branch.vm).ok()?;
        let is_it = entry.dir.id() == branch.vm;
        is_it.then(|| (branch.name.clone(), life::info(&entry).status))
    };
    let machines = run.branches.iter().filter_map(status).collect();
    let steps = |branch: &Branch| {
        let entry = engine.store().find(&branch.vm).ok()?;
        let kept = steps::kept(&entry.dir);
        let kept: Vec<u32> = kept.iter().map(|it| it.step).collect();
        (entry.dir.id() == branch.vm && !kept.is_empty()).then(|| (branch.name.clone(), kept))
    };
    let kept = run.branches.iter().filter_map(steps).collect();
    // Without a bridge nobody counts: the record tells (`ratoon agent log`).
    let used = engine.bridge().usage(&run.id).unwrap_or_default();
    let used = used.into_iter().map(|it| (it.branch, it.spent)).collect();
    Told {
        run,
        machines,
        used,
        kept,
    }
}

/// What a branch does, or how it ended.
fn state(run: &Run, branch: &Branch, machines: &BTreeMap<String, Status>) -> String {
    let was_forked = run
        .branches
        .iter()
        .any(|it| it.parent.as_ref() == Some(&branch.name));
    match (branch.ending, machines.get(&branch.name)) {
        (Some(ending), _) => show::word(ending).to_owned(),
        (None, Some(status)) => status.to_string(),
        (None, None) if was_forked => "forked".into(),
        (None, None) => branch
            .exit_code
            .map_or_else(|| "gone".into(), |code| format!("exit code {code}")),
    }
}

pub fn run(engine: &Engine, args: &Args) -> Result<ExitCode, Failure> {
    let runs = engine.runs().list()?.into_iter();
    let mut all: Vec<Told> = runs.map(|run| told(engine, run)).collect();
    all.retain(|told| args.all || !told.machines.is_empty());
    if args.json {
        output::json(&all)?;
        return Ok(ExitCode::SUCCESS);
    }
    let row = |told: &Told| {
        let states = told.run.branches.iter();
        let states: Vec<_> = states
            .map(|branch| state(&told.run, branch, &told.machines))
            .collect();
        let mut prompt: String = show::clean(&told.run.prompt).chars().take(40).collect();
        if prompt.len() < told.run.prompt.len() {
            prompt.push('…');
        }
        vec![
            told.run.id.clone(),
            units::age_of(told.run.created_ms),
            told.run.model.clone(),
            told.run.branches.len().to_string(),
            states.first().cloned().unwrap_or_else(|| "-".into()),
            prompt,
        ]
    };
    let rows: Vec<_> = all.iter().map(row).collect();
    let head = ["RUN", "AGE", "MODEL", "BRANCHES", "STATUS", "TASK"];
    output::write(output::table(&head, &rows).as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

pub fn tree(engine: &Engine, args: &TreeArgs) -> Result<ExitCode, Failure> {
    let told = told(engine, super::find(engine, &args.run)?);
    if args.json {
        output::json(&told)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut rows = Vec::new();
    below(engine, &told, None, 0, &mut rows);
    let head = [
        "BRANCH", "STATUS", "STEPS", "KEPT", "SCORE", "OUT", "VM", "PATCH", "STEERED",
    ];
    output::write(output::table(&head, &rows).as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

fn below(
    engine: &Engine,
    told: &Told,
    parent: Option<&str>,
    deep: usize,
    rows: &mut Vec<Vec<String>>,
) {
    for branch in &told.run.branches {
        if branch.parent.as_deref() != parent || deep > told.run.branches.len() {
            continue;
        }
        let patch = engine.runs().patch(&told.run.id, &branch.name);
        let used = told.used.get(&branch.name);
        let kept = told.kept.get(&branch.name).map(|steps| {
            let steps: Vec<String> = steps.iter().map(u32::to_string).collect();
            steps.join(",")
        });
        let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".into());
        let mut steer = show::clean(branch.steer.as_deref().unwrap_or("-"));
        if let Some((end, _)) = steer.char_indices().nth(40) {
            steer.truncate(end);
            steer.push('…');
        }
        let mut status = state(&told.run, branch, &told.machines);
        if branch.kept {
            status.push_str(", kept");
        }
        rows.push(vec![
            format!("{}{}", "  ".repeat(deep), branch.name),
            status,
            branch.steps.to_string(),
            or_none(kept),
            or_none(branch.score.map(|score| score.to_string())),
            or_none(used.map(|used| used.output_tokens.to_string())),
            branch.vm.clone(),
            or_none(patch.exists().then(|| patch.display().to_string())),
            steer,
        ]);
        below(engine, told, Some(&branch.name), deep + 1, rows);
    }
}
