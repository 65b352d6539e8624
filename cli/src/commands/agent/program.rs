//! Programs with a loop of their own: `ratoon run --model`, and what `exec`, `shell` and `fork` do on such a machine.
//!
//! ```text
//!   wanted --bind--> bound: the bridge knows the machine, its guest has a token, the proxy listens there --> over
//!                      `- left running: exec and fork take it up again, a fork's children are branches of the run
//! ```
//!
//! In the guest `ratoon-agent proxy --keep` speaks the APIs at 127.0.0.1; the variables that the vendors' SDKs heed
//! lead there. How it fails: binding fails the command; taking up again is told, and the command runs all the same: it
//! may not be about models at all.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;

use ratoon_bridge_api::amount::Limits;
use ratoon_client::RuntimeError;
use ratoon_client::blocking::{CallIo, Client, Controller};
use ratoon_engine::Engine;
use ratoon_engine::agent::{Branch, Run};
use ratoon_engine::bridge::{AgentFork, AgentVm, BridgeConfig, Chosen, Keeper, Keys, write_token};
use ratoon_engine::vm::record::VmDir;
use ratoon_protocol::{Call, ExecParams, ExitReport, LOOPBACK_PORT, ProcessInfo};

use super::run::{MAIN, has_price, microusd};
use super::session::PROGRAM;
use super::work;
use crate::failure::Failure;
use crate::guest;

/// What the proxy's process is called in lists.
const TAG: &str = "ratoon-proxy";
/// What the proxy says when it listens.
const LISTENS: &[u8] = b"listening on";
/// More of what it says is not kept, in bytes.
const MAX_WORDS: usize = 4096;

/// `--model` and what goes with it.
#[derive(Debug, Default, clap::Args)]
#[group(skip)]
#[command(next_help_heading = "A model for the command (docs/agent.md, Any program)")]
pub struct Args {
    /// Let programs in the VM call this model, as the bridge's configuration has it; several times for several.
    #[arg(long, value_name = "PROVIDER/NAME")]
    model: Vec<String>,
    /// Most calls of the model.
    #[arg(long, value_name = "N", default_value_t = 1000, requires = "model", value_parser = clap::value_parser!(u64).range(1..))]
    max_calls: u64,
    /// Most tokens that the model may make.
    #[arg(long, value_name = "N", requires = "model", value_parser = clap::value_parser!(u64).range(1..))]
    max_tokens_out: Option<u64>,
    /// Most money, in US dollars; the model needs a price.
    #[arg(long, value_name = "USD", requires = "model", value_parser = microusd)]
    max_money: Option<u64>,
    /// The bridge's configuration; by default ratoon/bridge.json below $XDG_CONFIG_HOME or ~/.config.
    #[arg(long, value_name = "FILE", requires = "model")]
    bridge_config: Option<PathBuf>,
}

/// Models that a machine is to have.
pub struct Wanted {
    config: BridgeConfig,
    keys: Arc<Keys>,
    models: Vec<Chosen>,
    budget: Limits,
    /// As they were named.
    names: String,
}

impl Args {
    /// What is wanted, if anything. To be called before any other process is started: keys may be inherited.
    pub fn wanted(&self) -> Result<Option<Wanted>, Failure> {
        if self.model.is_empty() {
            return Ok(None);
        }
        let wrong = |error| Failure::from(error).code(2);
        let config = BridgeConfig::find(self.bridge_config.as_deref()).map_err(wrong)?;
        let keys = Arc::new(Keys::take(&config));
        let models: Result<Vec<Chosen>, _> =
            self.model.iter().map(|name| config.model(name)).collect();
        let models = models.map_err(wrong)?;
        if self.max_money.is_some() {
            for model in &models {
                has_price(&config, model)?;
            }
        }
        Ok(Some(Wanted {
            config,
            keys,
            models,
            budget: Limits {
                calls: Some(self.max_calls),
                output_tokens: self.max_tokens_out,
                cost_microusd: self.max_money,
                ..Limits::default()
            },
            names: self.model.join(", "),
        }))
    }
}

impl Wanted {
    /// Makes sure that there is a bridge, before time is spent on a machine.
    pub fn prepare(&self, engine: &Engine) -> Result<(), Failure> {
        let program = &engine.programs().agent;
        std::fs::File::open(program).map_err(|error| work::missing_program(program, &error))?;
        Ok(engine.bridge().ensure(&self.config, &self.keys)?)
    }

    /// Binds a new machine to its models, as a run that does `what`.
    pub fn bind(
        self,
        engine: &Engine,
        dir: &VmDir,
        client: &mut Client,
        what: &str,
    ) -> Result<Bound, Failure> {
        let runs = engine.runs();
        let id = runs.begin()?;
        let bound = self.try_bind(engine, dir, client, &id, what);
        if bound.is_err() {
            engine.bridge().remove(dir);
            runs.forget(&id);
        }
        bound
    }

    fn try_bind(
        self,
        engine: &Engine,
        dir: &VmDir,
        client: &mut Client,
        id: &str,
        what: &str,
    ) -> Result<Bound, Failure> {
        let runs = engine.runs();
        let mut run = Run::new(id.to_owned(), what.to_owned(), self.names, None);
        run.config.clone_from(&self.config.path);
        run.records.clone_from(&self.config.records);
        run.branches.push(Branch {
            name: MAIN.into(),
            vm: dir.id(),
            ..Branch::default()
        });
        let note = AgentVm {
            control: engine.bridge().control(),
            run: id.to_owned(),
            branch: MAIN.into(),
            parent: None,
            models: self.models.into_iter().map(|it| it.model).collect(),
            heads: runs.heads(id),
        };
        work::put_program(client, &engine.programs().agent)?;
        let bridge = (&self.config, &*self.keys);
        let token = engine.bridge().add(bridge, dir, &note, self.budget)?;
        write_token(client, &token)?;
        serve(dir, client)?;
        runs.write(&run)?;
        Ok(Bound {
            run: id.to_owned(),
            variables: variables(&note),
            config: self.config,
            keys: self.keys,
        })
    }
}

/// A machine whose programs may call models.
pub struct Bound {
    /// Its run.
    pub run: String,
    /// What its programs find in their environment.
    pub variables: Vec<(String, String)>,
    config: BridgeConfig,
    keys: Arc<Keys>,
}

impl Bound {
    /// The run of a machine that was bound before, if it was: with a new token, a bridge and a proxy, as far as they
    /// can be had.
    pub fn again(engine: &Engine, dir: &VmDir, client: &mut Client) -> Option<Self> {
        let bound = Self::of(engine, dir)?;
        let ready = bound
            .bridge(engine)
            .and_then(|()| Ok(engine.bridge().renew_token(dir)?))
            .and_then(|()| serve(dir, client));
        if let Err(failure) = ready {
            eprint!("note: no model can be called: {}", words(&failure));
        }
        Some(bound)
    }

    fn of(engine: &Engine, dir: &VmDir) -> Option<Self> {
        let note = AgentVm::read(dir)?;
        let run = engine.runs().find(&note.run, None).ok()?;
        // A loop of ours has its own way.
        if run.profile.is_some() {
            return None;
        }
        let (config, keys) = super::config_of(&run)
            .inspect_err(|failure| {
                eprint!("note: no model can be called: {}", words(failure));
            })
            .ok()?;
        Some(Self {
            run: run.id,
            variables: variables(&note),
            config,
            keys: Arc::new(keys),
        })
    }

    fn bridge(&self, engine: &Engine) -> Result<(), Failure> {
        Ok(engine.bridge().ensure_any(&self.config, &self.keys)?)
    }

    /// Looks after the bridge and the machines' tokens while a command is attached.
    pub fn keep(&self, engine: &Engine, dirs: Vec<VmDir>) -> io::Result<Keeper> {
        let (config, keys) = (self.config.clone(), Arc::clone(&self.keys));
        Keeper::start(engine.bridge(), config, keys, dirs, |text| {
            eprintln!("note: {text}");
        })
    }

    /// The program has ended, and its machine is about to go.
    pub fn over(&self, engine: &Engine, dir: &VmDir, exit_code: Option<u8>) {
        engine.bridge().remove(dir);
        let written = engine.runs().update(&self.run, |run| {
            if let Some(branch) = run.branches.iter_mut().find(|it| it.vm == dir.id()) {
                branch.exit_code = exit_code;
            }
        });
        if let Err(error) = written {
            eprintln!("note: {error}");
        }
    }
}

/// A fork of a machine whose programs may call models: its children are branches of the run, and draw on what their
/// parent has left.
pub struct Forking {
    /// The machine's.
    pub bound: Bound,
    /// For the engine.
    pub agent: Arc<AgentFork>,
}

impl Forking {
    /// For a fork of the machine in `dir`, if it is bound.
    pub fn of(engine: &Engine, dir: &VmDir, count: u32) -> Option<Self> {
        let bound = Bound::of(engine, dir)?;
        let parent = AgentVm::read(dir)?;
        let named = bound.bridge(engine).and_then(|()| {
            let mut branches = Vec::new();
            // Before there are any: a name that the bridge has heard once is not to be given again.
            engine.runs().update(&bound.run, |run| {
                branches = run.free_names(&parent.branch, count as usize);
                run.branches.extend(branches.iter().map(|name| Branch {
                    name: name.clone(),
                    parent: Some(parent.branch.clone()),
                    ..Branch::default()
                }));
            })?;
            Ok(branches)
        });
        let branches = named
            .inspect_err(|failure| {
                eprint!("note: the children can call no model: {}", words(failure));
            })
            .ok()?;
        let agent = Arc::new(AgentFork {
            parent,
            branches,
            budget: Limits::default(),
        });
        Some(Self { bound, agent })
    }

    /// Notes the children's machines, by index.
    pub fn begun(&self, engine: &Engine, children: &BTreeMap<usize, VmDir>) {
        let written = engine.runs().update(&self.bound.run, |run| {
            for (index, dir) in children {
                if let Some(name) = self.agent.branches.get(*index)
                    && let Some(branch) = run.branch_mut(name)
                {
                    branch.vm = dir.id();
                }
            }
        });
        if let Err(error) = written {
            eprintln!("note: {error}");
        }
    }
}

/// What the vendors' SDKs look at, and the model's name.
fn variables(note: &AgentVm) -> Vec<(String, String)> {
    let base = format!("http://127.0.0.1:{LOOPBACK_PORT}");
    let mut all = vec![
        ("OPENAI_BASE_URL", format!("{base}/v1")),
        ("OPENAI_API_KEY", "none".to_owned()),
        ("ANTHROPIC_BASE_URL", base),
        ("ANTHROPIC_API_KEY", "none".to_owned()),
    ];
    if let Some(model) = note.models.first() {
        all.push(("RATOON_MODEL", model.clone()));
    }
    all.into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}

/// A failure within a note.
fn words(failure: &Failure) -> String {
    let text = failure.render();
    text.trim_start_matches("error: ").to_owned()
}

/// Starts the proxy in the guest, unless it is there.
fn serve(dir: &VmDir, client: &mut Client) -> Result<(), Failure> {
    let failed = |error| guest::failure(error, "the VM's processes");
    let processes: Vec<ProcessInfo> = client
        .call(&Call::Processes, "listed processes", guest::CALL_TIMEOUT)
        .map_err(failed)?;
    let is_it = |it: &ProcessInfo| it.tag.as_deref() == Some(TAG) && it.ended.is_none();
    if processes.iter().any(is_it) {
        return Ok(());
    }
    // A connection of its own: leaving it is how it is left running.
    let mut client = guest::connect_at(dir)?;
    let mut heard = Heard {
        said: Vec::new(),
        controller: client.controller(),
    };
    let mut errors = Words::default();
    let call = Call::Exec(Box::new(ExecParams {
        argv: vec![PROGRAM.into(), "proxy".into(), "--keep".into()],
        cwd: Some("/".into()),
        keep: true,
        tag: Some(TAG.into()),
        ..ExecParams::default()
    }));
    let mut io = CallIo {
        stdin: None,
        stdout: &mut heard,
        stderr: &mut errors,
        data: &mut io::sink(),
        events: &mut |_| {},
        ended: &mut |_| {},
    };
    let ended: Result<ExitReport, _> = client.run(&call, &mut io);
    match ended {
        Err(RuntimeError::Cancelled) => Ok(()),
        Ok(_) => {
            let words = super::show::clean(String::from_utf8_lossy(&errors.0).trim());
            Err(Failure::new(format!(
                "the models' proxy does not start in the VM: {words}"
            )))
        }
        Err(error) => Err(guest::failure(
            error,
            "the models' proxy does not start in the VM",
        )),
    }
}

/// Leaves the proxy when it listens.
struct Heard {
    said: Vec<u8>,
    controller: Controller,
}

impl Write for Heard {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.said.len() < MAX_WORDS {
            self.said.extend_from_slice(bytes);
        }
        if self.said.starts_with(LISTENS) {
            self.controller.cancel();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The beginning of what it says of its failure.
#[derive(Default)]
struct Words(Vec<u8>);

impl Write for Words {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() < MAX_WORDS {
            self.0.extend_from_slice(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variables_lead_both_vendors_sdks_to_the_proxy() {
        let note = AgentVm {
            control: "/c".into(),
            run: "r".into(),
            branch: MAIN.into(),
            parent: None,
            models: vec!["one".into(), "two".into()],
            heads: "/h".into(),
        };
        let all: BTreeMap<_, _> = variables(&note).into_iter().collect();
        // OpenAI's have the version in their base, Anthropic's add it.
        assert_eq!(all["OPENAI_BASE_URL"], "http://127.0.0.1:8019/v1");
        assert_eq!(all["ANTHROPIC_BASE_URL"], "http://127.0.0.1:8019");
        assert_eq!(all["RATOON_MODEL"], "one");
        let keys = ["OPENAI_API_KEY", "ANTHROPIC_API_KEY"];
        assert!(keys.iter().all(|name| all[*name] == "none"));
    }
}
