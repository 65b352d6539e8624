//! `ratoon agent run`.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use ratoon_bridge_api::amount::Limits;
use ratoon_client::blocking::Client;
use ratoon_engine::agent::{Branch, Run};
use ratoon_engine::bridge::{AgentVm, BridgeConfig, Chosen, Keeper, Keys, write_token};
use ratoon_engine::vm::{LaunchError, Vm};
use ratoon_engine::{Engine, RunSpec, StartError};
use ratoon_protocol::{AgentEvent, AgentLimits, Profile, Task, Wire};

use super::finish::{Finish, Watch};
use super::session::{Agent, Heard, Left};
use super::steps::Keeping;
use super::stop::{Stop, Stopped};
use super::tree::{LeftOut, Tree, pack};
use super::work::{self, DIRECTORY};
use crate::failure::{FAILED, Failure};
use crate::progress::Spinner;
use crate::{guest, output, units};

/// The first branch.
pub const MAIN: &str = "main";
/// An answer has no more tokens, whatever the model could.
const MOST_ANSWER_TOKENS: u32 = 32_000;
/// The bridge refuses calls so long after the agent should have ended by itself: it counts from before the machine's
/// start of the agent.
const LATE: Duration = Duration::from_secs(60);
/// So many calls for each step: retries, and the children of forks.
const CALLS_A_STEP: u64 = 4;

/// Let a model work on a directory in a new machine, and show what it did.
///
/// The machine starts from the image and has neither a network nor a key: it calls the model through
/// ratoon-bridge, which this command starts if need be. What the model says and does comes on standard
/// error, the patch on standard output. The machine is removed at the end, unless --keep or -d leaves it.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  ratoon agent run --model anthropic/sonnet --dir . 'make the tests pass' > fix.patch
  ratoon agent run --model local/qwen --dir app --apply --max-steps 30 'rename foo to bar'
  ratoon agent run --model anthropic/sonnet --dir . --hold-before 3 -d 'find the bug'
  ratoon agent fork RUN -n 4 --score 'make test && echo 1'

^C tells the agent to end; a second one ends the machine.
Exit codes: 0 the model is done; 1 it gave up; 10 --max-steps; 11 --timeout; 12 the budget is used up; 13 to 16
trouble with the model; 125 ratoon failed; 130 cancelled.")]
pub struct Args {
    /// Name or digest of the image.
    #[arg(long, default_value = "debian")]
    image: String,
    /// The model, as the bridge's configuration has it.
    #[arg(long, value_name = "PROVIDER/NAME")]
    model: String,
    /// What to work on: it is copied into the machine, as /work.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Do the same to DIR at the end, if that has not changed meanwhile.
    #[arg(long, requires = "dir", conflicts_with = "detach")]
    apply: bool,
    /// Write the patch into this file.
    #[arg(long, value_name = "FILE", conflicts_with = "detach")]
    patch: Option<PathBuf>,
    /// Which tools the model is shown; by default those that its kind knows.
    #[arg(long, value_enum)]
    profile: Option<Tools>,
    /// A name for the machine.
    #[arg(long)]
    name: Option<String>,
    /// Memory of the machine, such as 512M or 2G.
    #[arg(long, short, value_name = "SIZE", default_value = "512M", value_parser = units::memory_mib)]
    memory: u64,
    /// Virtual CPUs.
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u32,
    /// Most calls of the model.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    max_steps: u32,
    /// Most tokens that the model may make, with all children of forks.
    #[arg(long, value_name = "N")]
    max_tokens_out: Option<u64>,
    /// Most money, in US dollars, with all children of forks; the model needs a price.
    #[arg(long, value_name = "USD", value_parser = microusd)]
    max_money: Option<u64>,
    /// Most time, but for that in which it is held.
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = units::duration)]
    timeout: Duration,
    /// Most time of calls of the model, added up, with all children of forks.
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    max_model_time: Option<Duration>,
    /// Hold before this step (from 1), for `ratoon agent fork`; may be given several times.
    #[arg(long, value_name = "STEP")]
    hold_before: Vec<u32>,
    /// Keep the machine as it is before each step, for `ratoon agent fork --at STEP`: at least the last N (1 to 64), and
    /// at most twice as many. An attached command does it (this one, `attach`; so not with -d); without one the agent
    /// waits.
    #[arg(long, value_name = "N", conflicts_with = "detach", value_parser = clap::value_parser!(u32).range(1..=64))]
    keep_steps: Option<u32>,
    /// Leave the machine at the end.
    #[arg(long)]
    keep: bool,
    /// Print the run's id and leave the agent at work: see `ratoon agent attach`.
    #[arg(long, short)]
    detach: bool,
    /// Print events as JSON, a line each, and the result as the last line.
    #[arg(long)]
    json: bool,
    /// The bridge's configuration; by default ratoon/bridge.json below $XDG_CONFIG_HOME or ~/.config.
    #[arg(long, value_name = "FILE")]
    bridge_config: Option<PathBuf>,
    /// How long the machine may take to boot.
    #[arg(long, value_name = "TIME", default_value = "180s", value_parser = units::duration)]
    boot_timeout: Duration,
    /// What the model is to do.
    #[arg(value_name = "TASK")]
    task: String,
}

/// `--profile`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Tools {
    Anthropic,
    Openai,
    Minimal,
}

/// Money that is limited can only be spent on what has a price.
pub fn has_price(config: &BridgeConfig, chosen: &Chosen) -> Result<(), Failure> {
    if chosen.has_price {
        return Ok(());
    }
    Err(Failure::new(format!(
        "--max-money: {}/{} has no price in {}",
        chosen.provider,
        chosen.model,
        config.path.display()
    ))
    .hint("add \"price\" to the model there, or limit --max-tokens-out")
    .code(2))
}

/// Reads dollars as millionths of one.
pub fn microusd(text: &str) -> Result<u64, String> {
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let fits = digits(whole) && digits(part) && !(whole.is_empty() && part.is_empty());
    if !fits || part.len() > 6 {
        return Err("write dollars: 2, 0.50".to_owned());
    }
    format!("{whole}{part:0<6}")
        .parse()
        .ok()
        .filter(|money| *money > 0)
        .ok_or_else(|| "write a sum over 0: 2, 0.50".to_owned())
}

fn profile(asked: Option<Tools>, wire: Wire) -> Profile {
    match (asked, wire) {
        (Some(Tools::Anthropic), _) | (None, Wire::Messages) => Profile::Anthropic,
        (Some(Tools::Openai), _) | (None, Wire::Responses | Wire::Chat) => Profile::Openai,
        (Some(Tools::Minimal), _) => Profile::Minimal,
    }
}

/// A run on its way: its machine goes with it.
struct Begun {
    run: Run,
    vm: Vm,
    client: Client,
}

pub fn run(engine: &Engine, args: &Args) -> Result<ExitCode, Failure> {
    let config = BridgeConfig::find(args.bridge_config.as_deref())
        .map_err(|error| Failure::from(error).code(2))?;
    // Before any other process is started.
    let keys = Arc::new(Keys::take(&config));
    let chosen = config
        .model(&args.model)
        .map_err(|error| Failure::from(error).code(2))?;
    if args.max_money.is_some() {
        has_price(&config, &chosen)?;
    }
    let program = &engine.programs().agent;
    File::open(program).map_err(|error| work::missing_program(program, &error))?;
    let stop = Stop::listen()?;
    engine.bridge().ensure(&config, &keys)?;
    let id = engine.runs().begin()?;
    let profile = profile(args.profile, chosen.wire);
    let mut run = Run::new(
        id.clone(),
        args.task.clone(),
        args.model.clone(),
        Some(profile),
    );
    run.keep_steps = args.keep_steps;
    let begun = begin(engine, args, (&config, &keys), &chosen, &stop, run);
    if begun.is_err() {
        engine.runs().forget(&id);
        // The machine is gone: it may have been the last.
        engine.bridge().sweep();
    }
    let begun = begun?;
    work_on(engine, args, (config, keys), &chosen, &stop, begun)
}

/// Starts the machine, with all that it needs.
fn begin(
    engine: &Engine,
    args: &Args,
    bridge: (&BridgeConfig, &Keys),
    chosen: &Chosen,
    stop: &Stop,
    mut run: Run,
) -> Result<Begun, Failure> {
    let runs = engine.runs();
    run.config.clone_from(&bridge.0.path);
    run.records.clone_from(&bridge.0.records);
    let base = base(engine, &run.id, args.dir.as_deref())?;
    if let Some(dir) = &args.dir {
        run.directory = Some(std::fs::canonicalize(dir)?);
        let tree = Tree::read(base.try_clone()?, "")?;
        run.digest = Some(tree.digest(&LeftOut::of(&tree)));
    }
    runs.write(&run)?;
    let spinner = Spinner::start(format!("booting {}", args.image));
    let spec = RunSpec {
        name: args.name.clone(),
        cpus: args.cpus,
        memory_mib: args.memory,
        detached: true,
        boot_timeout: args.boot_timeout,
        ..RunSpec::new(args.image.clone())
    };
    let started = engine.start(&spec, Some(stop.cancel()));
    drop(spinner);
    let mut vm = started.map_err(|error| not_started(error, stop))?.vm;
    let mut client = vm.runtime()?;
    let spinner = Spinner::start("copying the directory and the agent into the machine".into());
    work::upload(&mut client, args.dir.is_some().then_some(&base))?;
    work::put_program(&mut client, &engine.programs().agent)?;
    drop(spinner);
    let note = AgentVm {
        control: engine.bridge().control(),
        run: run.id.clone(),
        branch: MAIN.into(),
        parent: None,
        models: vec![chosen.model.clone()],
        heads: runs.heads(&run.id),
    };
    let token = engine.bridge().add(bridge, vm.dir(), &note, budget(args))?;
    write_token(&mut client, &token)?;
    run.branches.push(Branch {
        name: MAIN.into(),
        vm: vm.record().id.clone(),
        ..Branch::default()
    });
    runs.write(&run)?;
    Ok(Begun { run, vm, client })
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn budget(args: &Args) -> Limits {
    Limits {
        calls: Some(u64::from(args.max_steps) * CALLS_A_STEP),
        output_tokens: args.max_tokens_out,
        cost_microusd: args.max_money,
        wall_ms: Some(millis(args.timeout.saturating_add(LATE))),
        working_ms: args.max_model_time.map(millis),
        ..Limits::default()
    }
}

/// Packs what is to be uploaded, and keeps it: what is done is told by it.
fn base(engine: &Engine, run: &str, dir: Option<&Path>) -> Result<File, Failure> {
    let path = engine.runs().base(run);
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create_new(true).mode(0o600);
    let file = file.open(&path)?;
    let Some(dir) = dir else {
        let mut builder = tar::Builder::new(file);
        builder.finish()?;
        return Ok(builder.into_inner()?);
    };
    let unreadable = |error| Failure::new(format!("cannot read {}: {error}", dir.display()));
    if !std::fs::metadata(dir).map_err(unreadable)?.is_dir() {
        return Err(Failure::new(format!("{} is no directory", dir.display())).code(2));
    }
    pack(dir, file).map_err(unreadable)
}

fn not_started(error: StartError, stop: &Stop) -> Failure {
    match (error, stop.stopped()) {
        (StartError::Launch(LaunchError::Cancelled), stopped) => {
            Failure::silent(stopped.map_or(FAILED, Stopped::code))
        }
        (StartError::Launch(LaunchError::Config(error)), _) => Failure::from(error).code(2),
        (StartError::Launch(error), _) => {
            let console = error.serial().to_vec();
            Failure::from(error).console(&console)
        }
        (error, _) => Failure::from(error),
    }
}

fn task(args: &Args, chosen: &Chosen, run: &Run) -> Task {
    let wall_ms = millis(args.timeout);
    Task {
        run: run.id.clone(),
        branch: MAIN.into(),
        wire: chosen.wire,
        model: chosen.model.clone(),
        profile: profile(args.profile, chosen.wire),
        prompt: args.task.clone(),
        system: None,
        directory: DIRECTORY.into(),
        max_tokens: chosen.max_output_tokens.min(MOST_ANSWER_TOKENS),
        temperature: None,
        seed: None,
        limits: AgentLimits {
            steps: args.max_steps,
            wall_ms,
            working_ms: wall_ms,
            ..AgentLimits::default()
        },
        hold_before: args.hold_before.clone(),
        boundaries: args.keep_steps.is_some(),
    }
}

fn work_on(
    engine: &Engine,
    args: &Args,
    (config, keys): (BridgeConfig, Arc<Keys>),
    chosen: &Chosen,
    stop: &Stop,
    begun: Begun,
) -> Result<ExitCode, Failure> {
    let Begun {
        run,
        vm,
        mut client,
    } = begun;
    let mut agent = Agent::new()?;
    let task = task(args, chosen, &run);
    stop.agent(agent.orders.clone(), client.controller());
    let dir = vm.dir().clone();
    let keeper = match args.detach {
        true => None,
        false => Some(Keeper::start(
            engine.bridge(),
            config,
            keys,
            vec![dir.clone()],
            |text| eprintln!("note: {text}"),
        )?),
    };
    if !args.json && !args.detach {
        eprintln!("run {} in machine {}", run.id, dir.id());
    }
    let mut vm = Some(vm);
    let mut keeping = Keeping::of(engine, &run, &dir, &agent.orders);
    let mut watch = Watch::new(args.json);
    let left = agent.start(&mut client, &task, &mut |heard| match heard {
        Heard::Pid(pid) => {
            let written = engine.runs().update(&run.id, |run| run.pid = Some(pid));
            if let Err(error) = written {
                eprintln!("note: {error}");
            }
            // From here on it is no loss when this command goes.
            vm.take().map(Vm::detach);
            true
        }
        Heard::Event(event) => {
            watch.event(event);
            if let Some(keeping) = &mut keeping {
                keeping.event(event);
            }
            // It has its task.
            !(args.detach && matches!(event, AgentEvent::Started { .. }))
        }
    });
    drop(client);
    drop(keeper);
    if vm.is_some() {
        // It never ran.
        drop(vm);
        engine.bridge().sweep();
        return Err(match left {
            Ok(_) => Failure::silent(stop.stopped().map_or(FAILED, Stopped::code)),
            Err(error) => guest::failure(error, "the agent does not start in the VM"),
        });
    }
    if args.detach && stop.stopped().is_none() && matches!(left, Ok(Left::Running)) {
        output::line(&run.id)?;
        return Ok(ExitCode::SUCCESS);
    }
    let finish = Finish {
        engine,
        run: &run,
        branch: MAIN,
        patch: args.patch.as_deref(),
        apply: args.apply,
        keep: args.keep,
        json: args.json,
    };
    finish.after(left, watch.ended, stop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn money_is_dollars_and_six_digits() {
        assert_eq!(microusd("2"), Ok(2_000_000));
        assert_eq!(microusd("0.50"), Ok(500_000));
        assert_eq!(microusd(".000001"), Ok(1));
        for odd in [
            "",
            ".",
            "0",
            "-1",
            "1.2.3",
            "1e3",
            "0.0000001",
            "99999999999999999999",
        ] {
            assert!(microusd(odd).is_err(), "{odd}");
        }
    }

    #[test]
    fn the_tools_are_those_that_the_models_kind_knows() {
        assert_eq!(profile(None, Wire::Messages), Profile::Anthropic);
        assert_eq!(profile(None, Wire::Chat), Profile::Openai);
        assert_eq!(
            profile(Some(Tools::Minimal), Wire::Messages),
            Profile::Minimal
        );
    }
}
