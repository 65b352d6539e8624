//! `ratoon agent fork`: one agent at a turn boundary becomes many, and the best takes its place.
//!
//! ```text
//!   hold -> held -> fork ------------------> each child: token by its wake, attached, Go -> ended -> scored -> best commits
//!   --at STEP: a boundary that was kept --'
//! ```
//!
//! The agent that was forked stays held; with --at STEP it does whatever it does. What fails for one child does not end
//! the others.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use ratoon_bridge_api::amount::Limits;
use ratoon_bridge_api::control::BranchUsage;
use ratoon_client::blocking::Client;
use ratoon_engine::Engine;
use ratoon_engine::agent::{Branch, Run};
use ratoon_engine::bridge::{AgentFork, AgentVm, Keeper};
use ratoon_engine::fork::ForkSpec;
use ratoon_engine::vm::life;
use ratoon_engine::vm::record::VmDir;
use ratoon_protocol::{Go, Order};

use super::finish::Ended;
use super::outcome::{Outcome, best, code, tell_all};
use super::score::score;
use super::session::{Agent, Heard, Left};
use super::show::Show;
use super::steer;
use super::steps::{self, At};
use super::stop::{Stop, Stopped};
use super::work::Work;
use crate::failure::Failure;
use crate::progress::Spinner;
use crate::{guest, units};

/// The most children: each has a machine, a thread and a connection here.
const MOST: u32 = 64;

/// Fork an agent between two of its steps: children that go on from the same machine and conversation.
///
/// Each has a branch of the run, a share of what is left of the budget, a seed of its own, and words to it if
/// --steer gives any. With --score the best takes the place of its parent; the others are removed, and their patches
/// kept. The agent that was forked stays held, or, with --at STEP, does whatever it does.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  ratoon agent fork r1a2b3c4 -n 4 --score 'make test && echo 1'
  ratoon agent fork box -n 2 --steer ideas.txt --keep all     # a line --- between what is for one and the next
  ratoon agent fork r1a2b3c4 --at 3 -n 1 --steer other-way.txt   # once more from step 3 on, if that was kept

The scorer runs in /work of each child when its agent has ended. The last number that it prints is the score, if it
ends with 0; the highest is the best, the first of equals.")]
pub struct Args {
    /// The run's id, the beginning of it, or its machine's name.
    #[arg(value_name = "RUN")]
    run: String,
    /// How many children, 1 to 64.
    #[arg(short = 'n', long = "count", value_name = "N", default_value_t = 2,
        value_parser = clap::value_parser!(u32).range(1..=i64::from(MOST)))]
    count: u32,
    /// Which branch, when several run.
    #[arg(long)]
    branch: Option<String>,
    /// Words for the children: a section for each, a line --- between them, or one section for all.
    #[arg(long, value_name = "FILE")]
    steer: Option<PathBuf>,
    /// Where: `next`, at the next turn boundary, or before a step that `ratoon agent run --keep-steps` kept
    /// (`ratoon agent tree` lists them).
    #[arg(long, value_name = "STEP", default_value = "next")]
    at: At,
    /// A line for /bin/sh in each child, whose number decides.
    #[arg(long, value_name = "CMD")]
    score: Option<String>,
    /// How long the scorer may take.
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = units::duration)]
    score_timeout: Duration,
    /// Which children stay: `best` (the default with --score) or `all`.
    #[arg(long, value_enum)]
    keep: Option<Keep>,
    /// With the best: write its patch into this file.
    #[arg(long, value_name = "FILE", requires = "score")]
    patch: Option<PathBuf>,
    /// With the best: do the same to the directory, if that has not changed meanwhile.
    #[arg(long, requires = "score")]
    apply: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// `--keep`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Keep {
    Best,
    All,
}

/// A child.
struct Child {
    branch: String,
    /// It is to be asked whether it waits before this step.
    at: Option<u32>,
    steer: Option<String>,
    dir: VmDir,
    agent: Agent,
    client: Client,
}

pub fn run(engine: &Engine, args: &Args) -> Result<ExitCode, Failure> {
    let keep = match (args.keep, &args.score) {
        (Some(Keep::Best), None) => {
            return Err(Failure::new("--keep best takes a --score to find it by").code(2));
        }
        (Some(keep), _) => keep,
        (None, Some(_)) => Keep::Best,
        (None, None) => Keep::All,
    };
    let steers = steer::steers(args.steer.as_deref(), args.count as usize)?;
    let run = super::find(engine, &args.run)?;
    let (config, keys) = super::config_of(&run)?;
    let (branch, entry, kept) = match args.at {
        At::Next => {
            let (branch, entry) = super::live_branch(engine, &run, args.branch.as_deref())?;
            (branch, entry, None)
        }
        At::Step(step) => steps::branch_with(engine, &run, args.branch.as_deref(), step)?,
    };
    let pid = match kept {
        None => super::at_work(&run, &branch)?,
        // Whatever became of it since.
        Some(_) => super::started(&run)?,
    };
    let bridge = engine.bridge();
    bridge.ensure_any(&config, &keys)?;
    let note = AgentVm::read(&entry.dir).ok_or_else(|| {
        Failure::new(format!(
            "machine {} is not known to the bridge",
            entry.dir.id()
        ))
    })?;
    let stop = Stop::listen()?;
    let agent = match kept {
        None => Some(steps::held(&entry, &run, pid, &stop)?),
        Some(_) => None,
    };
    let budget = share(&bridge.usage(&run.id)?, &branch.name, args.count)?;
    let names = run.free_names(&branch.name, args.count as usize);
    let spec = ForkSpec {
        detached: true,
        agent: Some(Arc::new(AgentFork {
            parent: note,
            branches: names.clone(),
            budget,
        })),
        parent: Some(entry.dir.id()),
        ..ForkSpec::new(args.count)
    };
    // Before there are any: a name that the bridge has heard once is not to be given again.
    let new = names.iter().zip(&steers).map(|(name, steer)| Branch {
        name: name.clone(),
        parent: Some(branch.name.clone()),
        steer: steer.clone(),
        ..Branch::default()
    });
    engine
        .runs()
        .update(&run.id, |run| run.branches.extend(new))?;
    let spinner = Spinner::start(format!("forking {}", branch.name));
    let forked = match &kept {
        None => engine.fork(&entry.dir, &spec, Some(stop.cancel()))?,
        Some(kept) => engine.fork_snapshot(&kept.snapshot, &spec, Some(stop.cancel()))?,
    };
    drop(spinner);
    let mut outcomes = Vec::new();
    let mut children = Vec::new();
    for ((name, steer), vm) in names.iter().zip(steers).zip(forked.children) {
        let mut outcome = Outcome {
            branch: name.clone(),
            ..Outcome::default()
        };
        let begun = vm.map_err(Failure::from).and_then(|mut vm| {
            let client = vm.runtime()?;
            let dir = vm.dir().clone();
            let agent = match &agent {
                Some(agent) => agent.in_child()?,
                None => Agent::of(pid)?,
            };
            vm.detach();
            Ok((dir, agent, client))
        });
        match begun {
            Ok((dir, agent, client)) => {
                outcome.vm = Some(dir.id());
                children.push(Child {
                    branch: name.clone(),
                    at: kept.as_ref().map(|kept| kept.step),
                    steer,
                    dir,
                    agent,
                    client,
                });
            }
            Err(failure) => outcome.error = Some(failure.words()),
        }
        outcomes.push(outcome);
    }
    engine.runs().update(&run.id, |run| {
        for child in &children {
            if let Some(branch) = run.branch_mut(&child.branch) {
                branch.vm = child.dir.id();
            }
        }
    })?;
    let mut dirs: Vec<VmDir> = children.iter().map(|child| child.dir.clone()).collect();
    dirs.push(entry.dir.clone());
    let tell = |text| eprintln!("note: {text}");
    let keeper = Keeper::start(bridge, config, Arc::new(keys), dirs, tell)?;
    let mut done = all_work(engine, args, &run, &stop, children);
    drop(keeper);
    for outcome in &mut outcomes {
        if let Some(done) = done.remove(&outcome.branch) {
            *outcome = done;
        }
    }
    engine.runs().update(&run.id, |run| {
        for outcome in &outcomes {
            if let Some(branch) = run.branch_mut(&outcome.branch) {
                branch.ending = outcome.ending;
                branch.steps = outcome.steps;
                branch.score = outcome.score;
            }
        }
    })?;
    match stop.stopped() {
        Some(Stopped::Kill(_)) => {
            for vm in outcomes.iter().filter_map(|outcome| outcome.vm.as_ref()) {
                let entry = engine.store().find(vm)?;
                life::remove(engine.store(), &entry, true)?;
            }
        }
        Some(Stopped::Leave(_)) => {}
        None if keep == Keep::Best => commit_best(engine, &run, &mut outcomes)?,
        None => {}
    }
    tell_all(args.json, &run, &outcomes)?;
    if let Some(stopped) = stop.stopped() {
        return Err(Failure::silent(stopped.code()));
    }
    if keep == Keep::All {
        return Ok(ExitCode::from(code(&outcomes)));
    }
    let best = outcomes.iter().find(|outcome| outcome.kept);
    let Some(vm) = best.and_then(|best| best.vm.as_ref()) else {
        return Err(
            Failure::new("no child has a score: all machines stay as they are").hint(format!(
                "`ratoon agent tree {}` shows them, `ratoon rm -f` removes them",
                run.id
            )),
        );
    };
    if args.patch.is_some() || args.apply {
        let mut client = guest::connect(&engine.store().find(vm)?)?;
        let work = Work::of(engine, &run, &mut client)?;
        work.deliver((engine, &run), args.patch.as_deref(), args.apply, true)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What each of `count` children may use of what a branch has left.
fn share(usage: &[BranchUsage], branch: &str, count: u32) -> Result<Limits, Failure> {
    let Some(usage) = usage.iter().find(|usage| usage.branch == branch) else {
        return Err(Failure::new(format!("the bridge has no branch {branch:?}")));
    };
    let used = usage.spent.plus(usage.reserved);
    let of = |what: &str, limit: Option<u64>, used: u64| match limit {
        None => Ok(None),
        Some(limit) => match limit.saturating_sub(used) / u64::from(count) {
            0 => Err(Failure::new(format!(
                "the budget of branch {branch} has too few {what} left for {count} children: {used} of {limit} are \
                 used"
            ))),
            share => Ok(Some(share)),
        },
    };
    let budget = &usage.budget;
    Ok(Limits {
        calls: of("calls", budget.calls, used.calls)?,
        input_tokens: of("input tokens", budget.input_tokens, used.input_tokens)?,
        output_tokens: of("output tokens", budget.output_tokens, used.output_tokens)?,
        cost_microusd: of("microdollars", budget.cost_microusd, used.cost_microusd)?,
        // Their parent's time is theirs.
        ..Limits::default()
    })
}

/// Lets all children go, and waits for their ends and scores.
fn all_work(
    engine: &Engine,
    args: &Args,
    run: &Run,
    stop: &Stop,
    children: Vec<Child>,
) -> BTreeMap<String, Outcome> {
    std::thread::scope(|scope| {
        let work = |(index, child): (usize, Child)| {
            scope.spawn(move || work(engine, args, run, stop, index as u64, child))
        };
        let threads: Vec<_> = children.into_iter().enumerate().map(work).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, Outcome>| match thread.join() {
            Ok(outcome) => (outcome.branch.clone(), outcome),
            Err(panic) => std::panic::resume_unwind(panic),
        };
        threads.into_iter().map(join).collect()
    })
}

fn work(engine: &Engine, args: &Args, run: &Run, stop: &Stop, seed: u64, child: Child) -> Outcome {
    let mut outcome = Outcome {
        branch: child.branch.clone(),
        vm: Some(child.dir.id()),
        ..Outcome::default()
    };
    if let Err(failure) = try_work(engine, args, run, stop, seed, child, &mut outcome) {
        outcome.error = Some(failure.words());
    }
    outcome
}

fn try_work(
    engine: &Engine,
    args: &Args,
    run: &Run,
    stop: &Stop,
    seed: u64,
    child: Child,
    outcome: &mut Outcome,
) -> Result<(), Failure> {
    let Child {
        branch,
        at,
        steer,
        mut agent,
        mut client,
        ..
    } = child;
    let go = Order::Go(Box::new(Go {
        branch: Some(branch.clone()),
        steer,
        seed: Some(seed),
        ..Go::default()
    }));
    let orders = agent.orders.clone();
    let nonce = steps::nonce();
    match at {
        None => orders.say(&go)?,
        Some(_) => orders.say(&Order::Hold {
            nonce: Some(nonce.clone()),
        })?,
    }
    // What it says before it is asked is what its parent said.
    let mut asked = at;
    let mut elsewhere = None;
    stop.agent(agent.orders.clone(), client.controller());
    let mut show = Show::of(&branch);
    let mut end = None;
    let left = agent.attach(&mut client, &mut |heard| {
        let Heard::Event(event) = heard else {
            return true;
        };
        if let Some(step) = asked {
            let Some(held) = steps::held_for(event, &nonce) else {
                return true;
            };
            asked = None;
            if held == step {
                // It cannot fail while we have the other end.
                let _ = orders.say(&go);
            } else {
                elsewhere = Some(held);
            }
            return elsewhere.is_none();
        }
        steps::pass(event, &orders);
        if !args.json {
            show.event(event);
        }
        end = Ended::of(event).or(end.take());
        true
    })?;
    if let (Some(step), Some(held)) = (at, elsewhere) {
        return Err(Failure::new(format!(
            "it waits before step {held}, not {step}: what was kept is of another moment"
        )));
    }
    let Some(end) = end else {
        return Err(Failure::new(match left {
            Left::Died(why) => format!("the agent's program failed: {why}"),
            Left::TakenOver => "another command has taken it over".into(),
            Left::Ended | Left::Running => "it was left".into(),
        }));
    };
    outcome.ending = Some(end.ending);
    outcome.steps = end.steps;
    let work = Work::of(engine, run, &mut client)?;
    outcome.files = Some(work.changes.len());
    std::fs::write(engine.runs().patch(&run.id, &branch), &work.patch.text)?;
    if let Some(command) = &args.score {
        match score(&mut client, command, &branch, args.score_timeout) {
            Ok(score) => outcome.score = Some(score),
            Err(why) => outcome.error = Some(why),
        }
    }
    Ok(())
}

/// The best takes its parent's place; all others go.
fn commit_best(engine: &Engine, run: &Run, outcomes: &mut [Outcome]) -> Result<(), Failure> {
    let Some(best) = best(outcomes) else {
        return Ok(());
    };
    let Some(vm) = &outcomes[best].vm else {
        return Ok(());
    };
    let entry = engine.store().find(vm)?;
    engine.commit(&entry)?;
    outcomes[best].kept = true;
    let name = outcomes[best].branch.clone();
    engine.runs().update(&run.id, |run| {
        if let Some(branch) = run.branch_mut(&name) {
            branch.kept = true;
        }
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use ratoon_bridge_api::amount::Amount;

    use super::*;

    #[test]
    fn children_share_what_is_left() {
        let usage = [BranchUsage {
            branch: "main".into(),
            parent: None,
            budget: Limits {
                calls: Some(10),
                output_tokens: Some(1000),
                ..Limits::default()
            },
            spent: Amount {
                calls: 1,
                output_tokens: 100,
                ..Amount::default()
            },
            reserved: Amount::default(),
            head: String::new(),
        }];
        let share_of = |count| share(&usage, "main", count);
        let each = share_of(4).unwrap();
        assert_eq!(
            (each.calls, each.output_tokens, each.cost_microusd),
            (Some(2), Some(225), None)
        );
        let failure = share_of(10).unwrap_err();
        assert!(failure.render().contains("too few calls"), "{failure:?}");
        assert!(share(&usage, "other", 1).is_err());
    }
}
