//! Persistent interpreters: the calls `code.*`.
//!
//! Each context is a process that runs a driver (`python.py`, `node.js`, `bash.sh`, part of this
//! binary). Standard output and error are pipes that we read; descriptor 3 is a socket on which
//! we say what to run and the driver how it went (`wire.rs` has what it says):
//!
//! ```text
//!   client --code.run--> Contexts --{"run":code}\n--> driver      (Bash: 8 digits, then the code)
//!              a wake -->         --{"reseed":1}\n--> Node          (Bash: R and 7 digits; Python: SIGWINCH)
//!          <--STDOUT,STDERR-- pipes <-- the cell
//!          <--DATA,REPLY---- socket <-- values, the cell's end
//! ```
//!
//! Python contexts are forked from a *zygote*, an interpreter that has started before: one for each
//! user (and `PATH`, `PYTHON*`, `LD_*`). A context is a session and process group of its own; an
//! interrupt is SIGINT to that group, as Ctrl-C in a terminal. Node and Bash have a control group
//! each; Python contexts share that of their zygote, so what leaves its session there outlives `stop`.
//!
//! All of it lives in the server's loop: nothing here waits. How it fails: an interpreter that is not
//! there is [`ErrorCode::Unsupported`]; one that ends or says garbage takes its context with it, and
//! the cell's reply says [`ratoon_protocol::CodeStatus::Died`].

use std::collections::BTreeMap;
use std::os::fd::{OwnedFd, RawFd};
use std::time::Instant;

use ratoon_protocol::{
    CodeContext, CodeError, CodeName, CodeRun, CodeStart, ErrorCode, ErrorReply, ExecParams,
    ExitStatus, Language,
};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal};
use serde::Serialize;

use crate::groups::Group;
use crate::session::Output;
use crate::sessions::{CallRef, Sessions, earlier};
use crate::spawn::Spawner;
use crate::swap::forms::{carried, carried_by_serde};

mod context;
mod wire;
mod zygote;

use context::{Context, refusal, socket_pair};
use zygote::Zygote;

const NODE_DRIVER: &str = include_str!("node.js");
const BASH_DRIVER: &str = include_str!("bash.sh");

/// How many contexts there may be at a time.
pub const MAX_CONTEXTS: usize = 64;

/// Longest code of a cell, in bytes.
pub const MAX_CODE_LEN: usize = 60 * 1024;

/// To whom the contexts answer; see the methods of [`Sessions`].
pub trait Answers {
    /// How many bytes of an output may be given now.
    fn room(&self, at: CallRef, output: Output) -> usize;
    /// Gives output, at most as much as there is room.
    fn output(&mut self, at: CallRef, output: Output, bytes: &[u8]);
    /// Ends a call with its result.
    fn reply<T: Serialize>(&mut self, at: CallRef, value: &T);
    /// Ends a call with an error.
    fn fail(&mut self, at: CallRef, error: &ErrorReply);
}

impl Answers for Sessions {
    fn room(&self, at: CallRef, output: Output) -> usize {
        Self::room(self, at, output)
    }

    fn output(&mut self, at: CallRef, output: Output, bytes: &[u8]) {
        Self::output(self, at, output, bytes);
    }

    fn reply<T: Serialize>(&mut self, at: CallRef, value: &T) {
        Self::reply(self, at, value);
    }

    fn fail(&mut self, at: CallRef, error: &ErrorReply) {
        Self::fail(self, at, error);
    }
}

/// All contexts. See the module.
#[derive(Debug, Default)]
pub struct Contexts {
    contexts: BTreeMap<u64, Context>,
    zygotes: BTreeMap<u64, Zygote>,
    next: u64,
    /// Of interpreters that have ended.
    groups: Vec<Group>,
}

carried_by_serde!(CodeStart);
carried_by_serde!(CodeError);
carried!(Contexts {
    contexts,
    zygotes,
    next,
    groups
});

/// Which descriptor a token means, beside those of a context (0 to 2).
const ZYGOTE: u64 = 3;

impl Contexts {
    /// `code.start`: answers when it is up.
    ///
    /// # Errors
    /// The name is bad or taken, or the interpreter cannot be started.
    pub fn start(
        &mut self,
        at: CallRef,
        params: CodeStart,
        spawner: &mut Spawner,
        _answers: &mut impl Answers,
    ) -> Result<(), ErrorReply> {
        let name = match &params.context {
            Some(name) => name.clone(),
            None => (1..)
                .map(|number: u64| format!("context-{number}"))
                .find(|name| self.find(name).is_none())
                .unwrap_or_default(),
        };
        let number = self.create(name, params, spawner)?;
        if let Some(context) = self.contexts.get_mut(&number) {
            context.waiting = Some(at);
        }
        Ok(())
    }

    /// `code.run`: answers when the cell has ended.
    ///
    /// # Errors
    /// No such context, it is busy, the code is too long, the interpreter cannot be started.
    pub fn run(
        &mut self,
        at: CallRef,
        params: CodeRun,
        spawner: &mut Spawner,
        _answers: &mut impl Answers,
    ) -> Result<(), ErrorReply> {
        if params.code.len() >= MAX_CODE_LEN {
            let message = format!(
                "the cell has {} bytes, it must be below {MAX_CODE_LEN}: write it to a file and run that",
                params.code.len()
            );
            return Err(ErrorReply::new(ErrorCode::BadRequest, message));
        }
        let number = match &params.context {
            Some(name) => self.find(name).ok_or_else(|| unknown(name))?,
            None => {
                let language = params.language;
                let name = format!("default-{}", word(language));
                match self.find(&name) {
                    Some(number) => number,
                    None => {
                        let params = CodeStart {
                            language,
                            ..CodeStart::default()
                        };
                        self.create(name, params, spawner)?
                    }
                }
            }
        };
        let Some(context) = self.contexts.get_mut(&number) else {
            return Ok(());
        };
        if context.params.language == Language::Bash && params.code.contains('\0') {
            let message = "Bash cannot run code with a zero byte";
            return Err(ErrorReply::new(ErrorCode::BadRequest, message));
        }
        context.run(at, params)
    }

    /// `code.interrupt`.
    ///
    /// # Errors
    /// No such context.
    pub fn interrupt(
        &mut self,
        at: CallRef,
        params: &CodeName,
        answers: &mut impl Answers,
    ) -> Result<(), ErrorReply> {
        self.named(&params.context)?.interrupt(Instant::now());
        answers.reply(at, &());
        Ok(())
    }

    /// `code.restart`: a new interpreter by the old one's name; answers when it is up.
    ///
    /// # Errors
    /// No such context, or the interpreter cannot be started.
    pub fn restart(
        &mut self,
        at: CallRef,
        params: &CodeName,
        spawner: &mut Spawner,
        _answers: &mut impl Answers,
    ) -> Result<(), ErrorReply> {
        let old = self.remove(&params.context)?;
        let number = self.create(params.context.clone(), old, spawner)?;
        if let Some(context) = self.contexts.get_mut(&number) {
            context.waiting = Some(at);
        }
        Ok(())
    }

    /// `code.stop`.
    ///
    /// # Errors
    /// No such context.
    pub fn stop(
        &mut self,
        at: CallRef,
        params: &CodeName,
        answers: &mut impl Answers,
    ) -> Result<(), ErrorReply> {
        self.remove(&params.context)?;
        answers.reply(at, &());
        Ok(())
    }

    /// `code.list`.
    pub fn list(&self) -> Vec<CodeContext> {
        let shown = self.contexts.values().filter(|context| !context.hidden);
        shown.map(Context::info).collect()
    }

    /// Whether what was read can be what contexts were.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self) -> Result<(), &'static str> {
        let numbers = self.contexts.keys().chain(self.zygotes.keys());
        if numbers.max().is_some_and(|&number| number > self.next) || self.next > 1 << 61 {
            return Err("a context has a number that was not given");
        }
        let contexts = self
            .contexts
            .values()
            .map(|context| (context.pid, context.wire()));
        let zygotes = self
            .zygotes
            .values()
            .map(|zygote| (Some(zygote.pid), &zygote.wire));
        for (pid, wire) in contexts.chain(zygotes) {
            // These numbers are signalled.
            if pid.is_some_and(|pid| pid <= 1) {
                return Err("an interpreter has no number of its own");
            }
            wire.check()?;
        }
        Ok(())
    }

    /// Gives all interpreters new random numbers, after the machine has become another one.
    pub fn reseed(&mut self) {
        for context in self.contexts.values_mut() {
            let mut seed = [0; 4];
            // The kernel has been given entropy just now; it does not fail then.
            let _ = rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty());
            context.reseed(u32::from_ne_bytes(seed));
        }
    }

    fn find(&self, name: &str) -> Option<u64> {
        let mut all = self.contexts.iter();
        all.find(|(_, context)| !context.hidden && context.name == name)
            .map(|(&number, _)| number)
    }

    fn named(&mut self, name: &str) -> Result<&mut Context, ErrorReply> {
        let mut all = self.contexts.values_mut();
        all.find(|context| !context.hidden && context.name == name)
            .ok_or_else(|| unknown(name))
    }

    /// Kills a context and frees its name; returns how it was started.
    fn remove(&mut self, name: &str) -> Result<CodeStart, ErrorReply> {
        let context = self.named(name)?;
        context.hidden = true;
        context.kill(None);
        let params = context.params.clone();
        self.reap_by_zygotes();
        Ok(params)
    }

    fn create(
        &mut self,
        name: String,
        params: CodeStart,
        spawner: &mut Spawner,
    ) -> Result<u64, ErrorReply> {
        for group in self.groups.drain(..) {
            spawner.give_back(Some(group));
        }
        if !(1..=64).contains(&name.len()) {
            let message = "a context's name is 1 to 64 bytes";
            return Err(ErrorReply::new(ErrorCode::BadRequest, message));
        }
        if self.find(&name).is_some() {
            let message = format!("there is a context `{}` already", name.escape_debug());
            return Err(ErrorReply::new(ErrorCode::Exists, message));
        }
        if self.contexts.len() >= MAX_CONTEXTS {
            let message = format!("there are {MAX_CONTEXTS} contexts: stop one");
            return Err(ErrorReply::new(ErrorCode::NoSpace, message));
        }
        let context = match params.language {
            Language::Python => self.fork(name, params, spawner)?,
            Language::Node => execute(name, params, &["node", "-e", NODE_DRIVER], spawner)?,
            Language::Bash => {
                let argv = ["bash", "--noprofile", "--norc", "-c", BASH_DRIVER, "bash"];
                execute(name, params, &argv, spawner)?
            }
        };
        let number = self.number();
        self.contexts.insert(number, context);
        Ok(number)
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn fork(
        &mut self,
        name: String,
        params: CodeStart,
        spawner: &mut Spawner,
    ) -> Result<Context, ErrorReply> {
        let known = self.zygotes.iter().find(|(_, zygote)| zygote.fits(&params));
        let number = match known {
            Some((&number, _)) => number,
            None => {
                let zygote = Zygote::start(&params, spawner)?;
                let number = self.number();
                self.zygotes.insert(number, zygote);
                number
            }
        };
        let short = |error| ErrorReply::new(ErrorCode::NoSpace, format!("no pipe: {error}"));
        let (control, theirs) = socket_pair()?;
        rustix::net::sockopt::set_socket_passcred(&control, true).map_err(short)?;
        let (stdout, child_stdout) = pipe_with(PipeFlags::CLOEXEC).map_err(short)?;
        let (stderr, child_stderr) = pipe_with(PipeFlags::CLOEXEC).map_err(short)?;
        if let Some(zygote) = self.zygotes.get(&number) {
            let fds: [OwnedFd; 3] = [theirs, child_stdout, child_stderr];
            if let Err(error) = zygote.fork(&params, spawner.child(), &fds) {
                let message = format!("python's zygote does not answer: {error}");
                self.lose_zygote(number, true);
                return Err(ErrorReply::new(ErrorCode::Failed, message));
            }
        }
        let mut context = Context::new(name, params, control, [Some(stdout), Some(stderr)]);
        context.zygote = Some(number);
        Ok(context)
    }

    /// Tells the descriptors to poll, with a token for [`Contexts::ready`].
    pub fn poll(&mut self, answers: &impl Answers, add: &mut dyn FnMut(RawFd, i16, u64)) {
        for (&number, zygote) in &self.zygotes {
            add(zygote.fd(), libc::POLLIN, number << 2 | ZYGOTE);
        }
        for (&number, context) in &mut self.contexts {
            context.poll(answers, |fd, events, which| {
                add(fd, events, number << 2 | which)
            });
        }
    }

    /// Poll said something of a descriptor. `scratch` is for what is read.
    pub fn ready(
        &mut self,
        token: u64,
        revents: i16,
        answers: &mut impl Answers,
        scratch: &mut [u8],
    ) {
        let (number, which) = (token >> 2, token & 3);
        if which != ZYGOTE {
            if let Some(context) = self.contexts.get_mut(&number) {
                context.ready(which, revents, answers, scratch);
            }
            return;
        }
        let Some(zygote) = self.zygotes.get_mut(&number) else {
            return;
        };
        let contexts = &mut self.contexts;
        let is_there = zygote.hear(scratch, |pid, status| {
            let fate = match libc::WIFSIGNALED(status) {
                true => ExitStatus::Signal(libc::WTERMSIG(status)),
                false => ExitStatus::Code(libc::WEXITSTATUS(status)),
            };
            let of_zygote = contexts.values_mut();
            let of_zygote = of_zygote.filter(|context| context.zygote == Some(number));
            // It only tells of those that we have given up.
            for context in of_zygote.filter(|context| context.wants_reaping() == Some(pid)) {
                context.reaped(Some(fate));
            }
        });
        if !is_there {
            self.lose_zygote(number, true);
        }
    }

    /// A zygote ends; its contexts live on, but for those that are not up.
    fn lose_zygote(&mut self, number: u64, kill: bool) {
        let Some(zygote) = self.zygotes.remove(&number) else {
            return;
        };
        let pid = Pid::from_raw(zygote.pid).filter(|_| kill);
        if let Some(pid) = pid {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
        let said = zygote.complaint();
        let of_zygote = self.contexts.values_mut();
        for context in of_zygote.filter(|context| context.zygote == Some(number)) {
            context.orphan();
            context.blame(said.clone());
        }
        self.groups.extend(zygote.group);
    }

    /// Lets zygotes reap what has been killed.
    fn reap_by_zygotes(&mut self) {
        for context in self.contexts.values_mut() {
            if let Some(pid) = context.wants_reaping()
                && !std::mem::replace(&mut context.is_reaped_for, true)
                && let Some(zygote) = context.zygote.and_then(|number| self.zygotes.get(&number))
            {
                // When it is gone, we hear of that too.
                let _ = zygote.reap(pid);
            }
        }
    }

    /// A child of ours, or an orphan, has ended.
    pub fn reaped(&mut self, pid: i32, status: ExitStatus, _answers: &mut impl Answers) {
        let zygote = self.zygotes.iter().find(|(_, zygote)| zygote.pid == pid);
        if let Some((&number, _)) = zygote {
            self.lose_zygote(number, false);
        }
        for context in self.contexts.values_mut() {
            if context.pid == Some(pid) {
                context.reaped(Some(status));
            }
        }
    }

    /// Goes on with what has come, keeps time; returns when to come again. To be called before each
    /// poll.
    pub fn due(&mut self, now: Instant, answers: &mut impl Answers) -> Option<Instant> {
        let mut next = None;
        let groups = &mut self.groups;
        self.contexts.retain(|_, context| {
            let is_over = context.settle(now, answers);
            if is_over {
                groups.extend(context.group.take());
            } else {
                next = earlier(next, context.next());
            }
            !is_over
        });
        self.reap_by_zygotes();
        next
    }

    /// A client has gone for good: its cells are interrupted, what they print is dropped.
    pub fn lost(&mut self, session: u64) {
        let now = Instant::now();
        for context in self.contexts.values_mut() {
            context.lost(session, now);
        }
    }

    /// The client takes no more of an output.
    pub fn stop_output(&mut self, at: CallRef, output: Output, _answers: &mut impl Answers) {
        for context in self.contexts.values_mut() {
            if context.stop_output(at, output) {
                return;
            }
        }
    }

    /// Signals all interpreters.
    pub fn signal_all(&mut self, signal: i32) {
        let Some(signal) = Signal::from_named_raw(signal) else {
            return;
        };
        for context in self.contexts.values() {
            context.signal(signal);
        }
        for zygote in self.zygotes.values() {
            if let Some(pid) = Pid::from_raw(zygote.pid) {
                let _ = rustix::process::kill_process(pid, signal);
            }
        }
    }
}

fn execute(
    name: String,
    params: CodeStart,
    argv: &[&str],
    spawner: &mut Spawner,
) -> Result<Context, ErrorReply> {
    let (control, theirs) = socket_pair()?;
    let exec = ExecParams {
        argv: argv.iter().copied().map(str::to_owned).collect(),
        env: params.env.clone(),
        cwd: params.cwd.clone(),
        user: params.user.clone(),
        ..ExecParams::default()
    };
    let child = spawner
        .spawn_with(&exec, Some(theirs))
        .map_err(|error| refusal(argv[0], &error))?;
    let mut context = Context::new(name, params, control, child.outputs);
    context.pid = Some(child.pid);
    context.group = child.group;
    Ok(context)
}

fn unknown(name: &str) -> ErrorReply {
    let message = format!("no context `{}` (any more)", name.escape_debug());
    ErrorReply::new(ErrorCode::NotFound, message)
}

fn word(language: Language) -> &'static str {
    match language {
        Language::Python => "python",
        Language::Node => "node",
        Language::Bash => "bash",
    }
}

#[cfg(test)]
mod tests;
