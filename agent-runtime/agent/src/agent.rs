//! The loop: boundary, call, tools, and again, until there is an ending.
//!
//! ```text
//!   boundary: orders, holding, limits --> Step, the model's answer --> Answered, its calls --> boundary
//!        |                                      |                            |
//!        +--------------------------------------+----------------------------+--> Ended
//! ```
//!
//! At the boundary nothing is open: that is where a machine is forked. The history is valid there, and also after
//! every ending: each call has its result, if only "not run".

mod answer;

use std::fs::File;
use std::io::BufReader;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ratoon_protocol::{AgentEvent, AgentUsage, Ending, Go, Order, Profile, Task};

use crate::bridge::Bridge;
use crate::call::{Answered, CallError, Caller};
use crate::clock::{self, Moment};
use crate::events::Events;
use crate::history::{History, Part};
use crate::inbox::{Inbox, read_line};
use crate::repetition::Repetition;
use crate::stop::Stop;
use crate::tools::Tools;
use crate::wire::{self, Delta, Settings};

/// How a run ends, in the words of its last line.
type Ended = (Ending, String);

/// `ratoon-agent loop`: the exit code.
pub fn run_loop() -> u8 {
    let started = || -> std::io::Result<_> {
        let stop = Arc::new(Stop::new()?);
        let out = rustix::io::fcntl_dupfd_cloexec(std::io::stdout(), 0)?;
        let events = Events::to(out, stop.clone())?;
        let orders: OwnedFd = rustix::io::fcntl_dupfd_cloexec(std::io::stdin(), 0)?;
        Ok((stop, events, BufReader::new(File::from(orders))))
    };
    let (stop, events, mut orders) = match started() {
        Ok(started) => started,
        Err(error) => {
            eprintln!("ratoon-agent: the loop cannot start: {error}");
            return Ending::Failed.code();
        }
    };
    let task = match read_line(&mut orders) {
        Ok(Some(line)) => serde_json::from_slice::<Task>(&line)
            .map_err(|error| format!("the first line is no task: {error}")),
        Ok(None) => Err("standard input ended before a task".into()),
        Err(error) => Err(format!("no task can be read: {error}")),
    };
    let made = task.and_then(|task| {
        let inbox = Inbox::start(orders, stop.clone(), events.clone())
            .map_err(|error| format!("no thread can be started: {error}"))?;
        Agent::new(task, stop, events.clone(), inbox)
    });
    let ((ending, text), steps, usage) = match made {
        Ok(mut agent) => {
            let ended = agent.run();
            (ended, agent.steps, agent.usage)
        }
        Err(why) => ((Ending::Failed, why), 0, AgentUsage::default()),
    };
    events.say(&AgentEvent::Ended {
        ending,
        text,
        steps,
        usage,
    });
    events.flush();
    ending.code()
}

struct Agent {
    task: Task,
    bridge: Bridge,
    stop: Arc<Stop>,
    events: Events,
    inbox: Arc<Inbox>,
    settings: Settings,
    history: History,
    tools: Tools,
    repetition: Repetition,
    steps: u32,
    usage: AgentUsage,
    started: Moment,
    held: Duration,
    working: Duration,
    /// It is to hold at the next boundary; and the nonce of that order.
    hold: Option<Option<String>>,
    /// Answers one after the other that are no valid call, and that were cut.
    format_errors: u32,
    cut: u32,
    /// Since when the loop itself works.
    idle_since: Moment,
}

impl Agent {
    fn new(task: Task, stop: Arc<Stop>, events: Events, inbox: Arc<Inbox>) -> Result<Self, String> {
        let bridge = Bridge::of_environment()?;
        let directory = Path::new(&task.directory);
        if !directory.is_absolute() || !directory.is_dir() {
            return Err(format!(
                "the directory {:?} is not there; make it in the image or before the run",
                task.directory
            ));
        }
        let tools = Tools::new(task.profile, directory)
            .map_err(|error| format!("tools cannot run here: {error}"))?;
        let settings = Settings {
            system: task.system.clone().unwrap_or_else(|| system(&task)),
            tools: Tools::json(task.profile, task.wire),
            encrypted_reasoning: true,
        };
        events.say(&AgentEvent::Started {
            version: env!("CARGO_PKG_VERSION").into(),
        });
        Ok(Self {
            task,
            bridge,
            stop,
            events,
            inbox,
            settings,
            history: History::default(),
            tools,
            repetition: Repetition::default(),
            steps: 0,
            usage: AgentUsage::default(),
            started: clock::now(),
            held: Duration::ZERO,
            working: Duration::ZERO,
            hold: None,
            format_errors: 0,
            cut: 0,
            idle_since: clock::now(),
        })
    }

    fn run(&mut self) -> Ended {
        self.history.push(Part::Text(self.task.prompt.clone()));
        let ended = loop {
            match self.turn() {
                Ok(()) => {}
                Err(ended) => break ended,
            }
        };
        if ended.0 == Ending::Cancelled {
            self.tools.kill();
        }
        ended
    }

    /// A turn; an error is the run's end, whichever it is.
    fn turn(&mut self) -> Result<(), Ended> {
        self.boundary()?;
        self.steps += 1;
        let step = self.steps;
        self.events.say(&AgentEvent::Step { step });
        let body = wire::body(&self.task, &self.settings, &self.history);
        let asked = clock::now();
        let own = asked.saturating_sub(self.idle_since);
        let answered = self.ask(&body, step);
        let came = clock::now();
        self.working += came.saturating_sub(asked);
        let answered = match answered {
            Ok(answered) => answered,
            Err(CallError::NoEncryption(_)) if self.settings.encrypted_reasoning => {
                // The same step again, without what this provider does not have.
                self.settings.encrypted_reasoning = false;
                self.steps -= 1;
                self.idle_since = came;
                return Ok(());
            }
            Err(error) => return Err(self.no_answer(error)),
        };
        self.answered(answered, step, own, came)
    }

    fn ask(&mut self, body: &str, step: u32) -> Result<Answered, CallError> {
        let until = self.until();
        let caller = Caller {
            bridge: &self.bridge,
            wire: self.task.wire,
            stop: &self.stop,
            events: &self.events,
        };
        let events = &self.events;
        let mut on = |delta: Delta<'_>| {
            events.say(&match delta {
                Delta::Text(text) => AgentEvent::Text { text: text.into() },
                Delta::Thinking(text) => AgentEvent::Thinking { text: text.into() },
            });
        };
        caller.call(body, step, until, &mut self.history.ids, &mut on)
    }

    fn no_answer(&self, error: CallError) -> Ended {
        match error {
            CallError::Stopped => cancelled(),
            CallError::Over => self.time(),
            CallError::Budget(text) => (Ending::Budget, text),
            CallError::NoEncryption(text) | CallError::Model(text) => (Ending::Model, text),
        }
    }

    /// Orders, holding and limits, with nothing open.
    fn boundary(&mut self) -> Result<(), Ended> {
        while let Some(order) = self.inbox.take() {
            match order {
                Order::Hold { nonce } => self.hold = Some(nonce),
                Order::Go(go) => {
                    self.hold = None;
                    self.go(*go);
                }
                // Kept: there is nothing that waits for it here. Echo: the inbox has answered it.
                Order::Kept { .. } | Order::Echo { .. } => {}
                Order::Cancel => self.stop.set(),
            }
        }
        let next = self.steps + 1;
        let since = clock::now();
        let waited = self.wait_here(next);
        self.inbox.at(None);
        let time = clock::now().saturating_sub(since);
        self.held += time;
        self.idle_since += time;
        waited?;
        if self.stop.is_set() {
            return Err(cancelled());
        }
        if self.steps >= self.task.limits.steps {
            let steps = self.task.limits.steps;
            return Err((
                Ending::Steps,
                format!("the limit of {steps} steps is reached"),
            ));
        }
        if self.left().is_zero() {
            return Err(self.time());
        }
        Ok(())
    }

    /// Waits before a step: to be kept, and while it is held.
    fn wait_here(&mut self, step: u32) -> Result<(), Ended> {
        let mut kept = !self.task.boundaries;
        if !kept {
            self.inbox.at(Some(step));
            self.events.say(&AgentEvent::Boundary { step });
        }
        let mut said = false;
        loop {
            let hold = self.hold.is_some() || self.task.hold_before.contains(&step);
            if kept && !hold {
                return Ok(());
            }
            // Each order to hold is answered: another client of the host's may not have seen the first answer.
            if hold && !said {
                let nonce = self.hold.clone().flatten();
                self.events.say(&AgentEvent::Held { step, nonce });
                said = true;
            }
            match self.inbox.next() {
                Some(Order::Go(go)) => {
                    self.hold = None;
                    self.task.hold_before.retain(|other| *other != step);
                    self.go(*go);
                    return Ok(());
                }
                Some(Order::Hold { nonce }) => {
                    self.hold = Some(nonce);
                    said = false;
                }
                Some(Order::Kept { step: of }) => {
                    kept |= of == step;
                    if kept {
                        self.inbox.at(None);
                    }
                }
                Some(Order::Echo { .. }) => {}
                Some(Order::Cancel) => return Err(cancelled()),
                None if self.stop.is_set() => return Err(cancelled()),
                None => {
                    let why = "it is held, and standard input has ended: nobody can say go";
                    return Err((Ending::Failed, why.into()));
                }
            }
        }
    }

    fn go(&mut self, go: Go) {
        if let Some(branch) = go.branch {
            self.task.branch = branch;
        }
        if let Some(words) = go.steer {
            self.history.push(Part::Text(words));
            // What it is told now may be to do the same again.
            self.repetition = Repetition::default();
        }
        self.task.seed = go.seed.or(self.task.seed);
        if let Some(limits) = go.limits {
            self.task.limits = limits;
        }
        if !go.hold_before.is_empty() {
            self.task.hold_before = go.hold_before;
        }
        self.events.say(&AgentEvent::Going {
            branch: self.task.branch.clone(),
        });
    }

    /// What the run has left of its time.
    fn left(&self) -> Duration {
        let limits = &self.task.limits;
        let gone = clock::now()
            .saturating_sub(self.started)
            .saturating_sub(self.held);
        let wall = Duration::from_millis(limits.wall_ms).saturating_sub(gone);
        let working = Duration::from_millis(limits.working_ms).saturating_sub(self.working);
        wall.min(working)
    }

    /// When its time is over.
    fn until(&self) -> Moment {
        clock::now().saturating_add(self.left())
    }

    fn time(&self) -> Ended {
        let limits = &self.task.limits;
        let text = format!(
            "the run's time is over ({} s in all, {} s of work)",
            limits.wall_ms / 1000,
            limits.working_ms / 1000
        );
        (Ending::Time, text)
    }
}

fn cancelled() -> Ended {
    (Ending::Cancelled, "the run was cancelled".into())
}

/// The loop's own words on how to work.
fn system(task: &Task) -> String {
    let end = match task.profile {
        Profile::Minimal => {
            "To run a command, call the tool bash. When the task is done, answer in words, without a tool call: that ends the work."
        }
        _ => {
            "When the task is done, or cannot be done, call finish, or answer without a tool call: that ends the work."
        }
    };
    format!(
        "You work on a task by yourself, in a Linux machine of your own, with the tools that you have. Nobody answers questions: decide yourself, and go on until the task is done. The working directory is {}. Look before you change things, check what you did, and keep commands from waiting for input. {end}",
        task.directory
    )
}
