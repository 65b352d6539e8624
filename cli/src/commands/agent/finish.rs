//! What a command that is attached to one agent does with its events, and when it is left.

use std::path::Path;
use std::process::ExitCode;

use ratoon_engine::Engine;
use ratoon_engine::agent::Run;
use ratoon_engine::runtime::RuntimeError;
use ratoon_engine::vm::life;
use ratoon_protocol::{AgentEvent, AgentUsage, Ending};
use serde_json::json;

use super::session::Left;
use super::show::Show;
use super::stop::{Stop, Stopped};
use super::work::Work;
use crate::failure::Failure;
use crate::{guest, output};

/// How an agent ended.
#[derive(Debug, Clone)]
pub struct Ended {
    /// Why.
    pub ending: Ending,
    /// Its last words.
    pub text: String,
    /// Calls of the model.
    pub steps: u32,
    /// Tokens.
    pub usage: AgentUsage,
}

impl Ended {
    /// That of an event, if it is one.
    pub fn of(event: &AgentEvent) -> Option<Self> {
        match event {
            AgentEvent::Ended {
                ending,
                text,
                steps,
                usage,
            } => Some(Self {
                ending: *ending,
                text: text.clone(),
                steps: *steps,
                usage: *usage,
            }),
            _ => None,
        }
    }
}

/// What a command that is attached does with events: shows them, and keeps the end.
pub struct Watch {
    show: Show,
    json: bool,
    /// Whether to say, once, what can be done with one that is held.
    pub hints: bool,
    /// How it ended, when it has.
    pub ended: Option<Ended>,
}

impl Watch {
    /// Events for people, or as JSON.
    pub fn new(json: bool) -> Self {
        Self {
            show: Show::default(),
            json,
            hints: true,
            ended: None,
        }
    }

    /// Takes an event.
    pub fn event(&mut self, event: &AgentEvent) {
        if let Some(ended) = Ended::of(event) {
            self.ended = Some(ended);
        }
        match self.json {
            // Who reads no more is told by the exit code.
            true => drop(serde_json::to_string(event).map(|line| output::line(&line))),
            false => self.show.event(event),
        }
        if matches!(event, AgentEvent::Held { .. }) && !self.json && std::mem::take(&mut self.hints)
        {
            self.show.note(
                "it waits: `ratoon agent fork` forks it, `ratoon agent attach --go` lets it go on; ^C ends it",
            );
        }
    }
}

/// What is done when an agent is left.
pub struct Finish<'a> {
    /// The engine.
    pub engine: &'a Engine,
    /// Its run.
    pub run: &'a Run,
    /// Its branch.
    pub branch: &'a str,
    /// Where the patch goes.
    pub patch: Option<&'a Path>,
    /// Whether the directory becomes the same.
    pub apply: bool,
    /// Whether the machine stays.
    pub keep: bool,
    /// Whether the result is told as JSON.
    pub json: bool,
}

impl Finish<'_> {
    /// Delivers what was done, and removes the machine.
    pub fn after(
        &self,
        left: Result<Left, RuntimeError>,
        ended: Option<Ended>,
        stop: &Stop,
    ) -> Result<ExitCode, Failure> {
        let branch = self.run_now()?.branch(self.branch).cloned();
        let vm = branch.map(|branch| branch.vm).unwrap_or_default();
        match stop.stopped() {
            Some(Stopped::Kill(signal)) => {
                self.remove(&vm)?;
                return Err(Failure::silent(Stopped::Kill(signal).code()));
            }
            Some(stopped @ Stopped::Leave(_)) => return Err(Failure::silent(stopped.code())),
            None => {}
        }
        let entry = self.engine.store().find(&vm)?;
        let left = left.map_err(|error| {
            guest::broken(&entry, error).hint(format!(
                "the machine stays: `ratoon agent attach {}` takes it up again, `ratoon rm -f {vm}` removes it",
                self.run.id
            ))
        })?;
        let ended = match (left, ended) {
            (Left::TakenOver, _) => {
                return Err(
                    Failure::new("another command has taken the agent over").hint(format!(
                        "`ratoon agent attach {}` takes it back",
                        self.run.id
                    )),
                );
            }
            (_, Some(ended)) => ended,
            (Left::Died(why), None) => {
                return Err(
                    Failure::new(format!("the agent's program failed: {why}")).hint(format!(
                        "the machine stays: `ratoon shell {vm}`, `ratoon rm -f {vm}`"
                    )),
                );
            }
            (Left::Ended | Left::Running, None) => {
                return Err(Failure::new("the agent was left without an end"));
            }
        };
        self.engine.runs().update(&self.run.id, |run| {
            if let Some(branch) = run.branch_mut(self.branch) {
                branch.ending = Some(ended.ending);
                branch.steps = ended.steps;
            }
        })?;
        let mut client = guest::connect(&entry)?;
        let work = Work::of(self.engine, self.run, &mut client)?;
        drop(client);
        std::fs::write(
            self.engine.runs().patch(&self.run.id, self.branch),
            &work.patch.text,
        )?;
        let delivered = work.deliver((self.engine, self.run), self.patch, self.apply, self.json);
        if self.json {
            output::line(
                &json!({
                    "run": self.run.id, "branch": self.branch, "vm": vm, "ending": ended.ending,
                    "code": ended.ending.code(), "text": ended.text, "steps": ended.steps,
                    "usage": ended.usage, "files": work.changes.len(), "patch": work.patch.text,
                    "kept": self.keep,
                })
                .to_string(),
            )?;
        }
        if self.keep {
            eprintln!("machine {vm} stays: `ratoon shell {vm}`, `ratoon rm -f {vm}`");
        } else {
            self.remove(&vm)?;
        }
        // The patch is in the run's folder whatever became of it.
        delivered.map_err(|failure| {
            let patch = self.engine.runs().patch(&self.run.id, self.branch);
            failure.hint(format!("the patch is in {}", patch.display()))
        })?;
        Ok(ExitCode::from(ended.ending.code()))
    }

    fn run_now(&self) -> Result<Run, Failure> {
        Ok(self.engine.runs().find(&self.run.id, None)?)
    }

    fn remove(&self, vm: &str) -> Result<(), Failure> {
        let entry = self.engine.store().find(vm)?;
        Ok(life::remove(self.engine.store(), &entry, true)?)
    }
}
