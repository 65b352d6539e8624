//! What is done at turn boundaries: they are kept, or an agent is asked whether it waits at one.

use std::time::SystemTime;

use ratoon_engine::Engine;
use ratoon_engine::agent::{Branch, Run};
use ratoon_engine::snapshot::Quiet;
use ratoon_engine::steps::KeptStep;
use ratoon_engine::vm::record::VmDir;
use ratoon_engine::vm::store::Entry;
use ratoon_protocol::{AgentEvent, Order};

use super::finish::Ended;
use super::session::{Agent, Heard, Left, Orders};
use super::show::{self, Show};
use super::stop::Stop;
use crate::failure::Failure;
use crate::guest;

/// `--at`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    /// The next boundary.
    Next,
    /// The boundary before this step.
    Step(u32),
}

impl std::str::FromStr for At {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match (text, text.parse()) {
            ("next", _) => Ok(Self::Next),
            (_, Ok(step)) if step > 0 => Ok(Self::Step(step)),
            _ => Err("write next, or the number of a step, from 1"),
        }
    }
}

/// Keeps an agent's boundaries while a command is attached to it.
pub struct Keeping<'a> {
    engine: &'a Engine,
    dir: VmDir,
    orders: Orders,
    wanted: usize,
    /// What is heard before this echo was said before; the echo tells where it waits.
    old_until: Option<String>,
    waits_at: Option<u32>,
}

impl<'a> Keeping<'a> {
    /// For a run that wants it, whose agent starts now.
    pub fn of(engine: &'a Engine, run: &Run, dir: &VmDir, orders: &Orders) -> Option<Self> {
        Some(Self {
            engine,
            dir: dir.clone(),
            orders: orders.clone(),
            wanted: run.keep_steps?.max(1) as usize,
            old_until: None,
            waits_at: None,
        })
    }

    /// The agent has been at work before, and says so once more.
    pub fn attached(mut self) -> std::io::Result<Self> {
        let nonce = nonce();
        self.orders.say(&Order::Echo {
            nonce: nonce.clone(),
        })?;
        self.old_until = Some(nonce);
        Ok(self)
    }

    /// Keeps the boundary that an event tells of, and lets the agent go on.
    pub fn event(&mut self, event: &AgentEvent) {
        match event {
            AgentEvent::Boundary { step } => self.waits_at = Some(*step),
            AgentEvent::Echo { nonce, boundary } if self.old_until.as_ref() == Some(nonce) => {
                self.old_until = None;
                self.waits_at = *boundary;
            }
            AgentEvent::Step { .. } | AgentEvent::Going { .. } | AgentEvent::Ended { .. } => {
                self.waits_at = None;
            }
            _ => {}
        }
        if self.old_until.is_none()
            && let Some(step) = self.waits_at.take()
        {
            self.keep(step);
        }
    }

    /// What cannot be kept is told.
    fn keep(&self, step: u32) {
        let kept = self.engine.keep_step(&self.dir, step, self.wanted, &Quiet);
        if let Err(error) = kept {
            let words = Failure::from(error).words();
            eprintln!("note: the boundary before step {step} is not kept: {words}");
        }
        // It cannot fail while we have the other end.
        let _ = self.orders.say(&Order::Kept { step });
    }
}

/// A word that no other order has.
pub fn nonce() -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let now = now.map_or(0, |now| now.as_nanos());
    format!("{}-{now}", std::process::id())
}

/// The step before which the agent waits, if this answers the order with that nonce.
pub fn held_for(event: &AgentEvent, asked: &str) -> Option<u32> {
    match event {
        AgentEvent::Held {
            step,
            nonce: Some(nonce),
        } if nonce == asked => Some(*step),
        _ => None,
    }
}

/// Lets an agent pass a boundary that nobody keeps.
pub fn pass(event: &AgentEvent, orders: &Orders) {
    if let AgentEvent::Boundary { step } = event {
        // It cannot fail while we have the other end.
        let _ = orders.say(&Order::Kept { step: *step });
    }
}

/// A branch that was kept before `step`: the one that is named, or the only one. Its machine need not run.
pub fn branch_with(
    engine: &Engine,
    run: &Run,
    named: Option<&str>,
    step: u32,
) -> Result<(Branch, Entry, Option<KeptStep>), Failure> {
    let mut found = Vec::new();
    let mut known = Vec::new();
    for branch in &run.branches {
        let Ok(entry) = engine.store().find(&branch.vm) else {
            continue;
        };
        if entry.dir.id() != branch.vm || named.is_some_and(|name| name != branch.name) {
            continue;
        }
        let kept = ratoon_engine::steps::kept(&entry.dir);
        known.extend(
            kept.iter()
                .map(|it| format!("{} of {}", it.step, branch.name)),
        );
        if let Some(kept) = kept.into_iter().find(|it| it.step == step) {
            found.push((branch.clone(), entry, Some(kept)));
        }
    }
    if found.len() > 1 {
        let text = format!("step {step} of several branches of run {} was kept", run.id);
        return Err(Failure::new(text)
            .hint("name one with --branch: `ratoon agent tree` shows them")
            .code(2));
    }
    found.pop().ok_or_else(|| {
        let failure = Failure::new(format!("step {step} of run {} is not kept", run.id));
        failure.hint(match known.is_empty() {
            true => "`ratoon agent run --keep-steps N` keeps steps, and they go with their machine"
                .into(),
            false => format!("kept are steps {}", known.join(", ")),
        })
    })
}

/// Takes the agent over and waits until it holds.
pub fn held(entry: &Entry, run: &Run, pid: i32, stop: &Stop) -> Result<Agent, Failure> {
    let mut client = guest::connect(entry)?;
    let mut agent = Agent::of(pid)?;
    let nonce = nonce();
    agent.orders.say(&Order::Hold {
        nonce: Some(nonce.clone()),
    })?;
    stop.agent(agent.orders.clone(), client.controller());
    let mut show = Show::default();
    let mut end = None;
    let mut holds = false;
    let left = agent.attach(&mut client, &mut |heard| {
        let Heard::Event(event) = heard else {
            return true;
        };
        holds |= held_for(event, &nonce).is_some();
        if !matches!(event, AgentEvent::Held { .. }) || holds {
            show.event(event);
        }
        end = Ended::of(event).or(end.take());
        !holds
    });
    drop(client);
    stop.forget_agents();
    if let Some(stopped) = stop.stopped() {
        return Err(Failure::silent(stopped.code()));
    }
    match (left, end) {
        (Ok(Left::Running), _) if holds => Ok(agent),
        (_, Some(end)) => Err(Failure::new(format!(
            "the agent of run {} has ended ({}): there is nothing to fork",
            run.id,
            show::word(end.ending)
        ))
        .hint(
            "start it with --hold-before STEP, or -d, and fork it while it works; or with --keep-steps, and fork it \
             --at STEP",
        )),
        (Ok(Left::TakenOver), _) => Err(Failure::new(
            "another command has taken the agent over meanwhile",
        )),
        (Ok(Left::Died(why)), _) => Err(Failure::new(format!("the agent's program failed: {why}"))),
        (Ok(_), None) => Err(Failure::new("the agent has ended before")),
        (Err(error), _) => Err(guest::broken(entry, error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_is_next_or_a_step() {
        assert_eq!("next".parse(), Ok(At::Next));
        assert_eq!("12".parse(), Ok(At::Step(12)));
        for odd in ["", "0", "-1", "last", "1.5", "99999999999"] {
            assert!(odd.parse::<At>().is_err(), "{odd}");
        }
    }

    #[test]
    fn only_the_answer_to_this_order_counts() {
        let held = |nonce: Option<&str>| AgentEvent::Held {
            step: 4,
            nonce: nonce.map(str::to_owned),
        };
        assert_eq!(held_for(&held(Some("a")), "a"), Some(4));
        assert_eq!(held_for(&held(Some("b")), "a"), None);
        assert_eq!(held_for(&held(None), "a"), None);
        assert_eq!(held_for(&AgentEvent::Boundary { step: 4 }, "a"), None);
    }
}
