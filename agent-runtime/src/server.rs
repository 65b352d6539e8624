//! The poll loop: sockets, tasks, timers. One thread; nothing in it waits except `poll`.
//!
//! A round: poll; take what clients sent and do it (`calls.rs`); read outputs, write inputs;
//! reap; end calls that are over; send. SIGCHLD comes through a signalfd that stands before the
//! pipes in the poll set, so that a round that sees a death sees the pipe's end too. Reaping is
//! here and nowhere else (orphans of others come to PID 1 as well); processes are in the table
//! before the loop can reap them.
//!
//! What is not urgent (a process has started, an output is at its end) waits up to
//! [`crate::sessions::LAZY`] for company: a system call costs much on some hosts, and most commands
//! end sooner.
//!
//! How it fails: a connection that breaks is closed and its tasks end, unless its session has a
//! name; connections not from the host are refused; when descriptors run out, accepting pauses.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use ratoon_protocol::{Call, ExitStatus, MAX_PAYLOAD_LEN, Usage};
use rustix::process::Signal;

use crate::calls::starts_a_program;
use crate::code::Contexts;
use crate::power;
use crate::process::Ended;
use crate::session::{Action, Output};
use crate::sessions::{CallRef, Heard, Sessions, earlier};
use crate::spawn::Spawner;
use crate::swap::Arriving;
use crate::swap::forms::Fd;
use crate::sys::{self, PollFd, poll_fd};
use crate::system::{self, Identity};
use crate::task::{Job, State, Task};
use crate::work::{News, Office};

/// How long accepting pauses when descriptors or memory run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(500);

/// How many processes that have ended, and that nobody has asked for, are remembered.
const MAX_KEPT: usize = 64;

/// The machine is ending: who asked, and how far it is.
pub(crate) struct Ending {
    pub(crate) at: CallRef,
    stage: Stage,
    until: Instant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Terminating,
    Killing,
    Lingering,
}

/// The server. See the module.
pub struct Server {
    pub(crate) listener: Fd,
    signals: OwnedFd,
    pub(crate) is_machine: bool,
    accept_again: Option<Instant>,
    pub(crate) sessions: Sessions,
    pub(crate) tasks: Vec<Task>,
    pub(crate) spawner: Spawner,
    pub(crate) office: Office,
    pub(crate) contexts: Contexts,
    pub(crate) identity: Identity,
    /// What waits for `wake`: calls and what followed them, with their session.
    pub(crate) waiting: VecDeque<(u64, Action)>,
    pub(crate) ending: Option<Ending>,
    scratch: Vec<u8>,
    polls: Vec<PollFd>,
    tokens: Vec<Token>,
}

/// What a poll entry is about. Tasks are meant by place: the table changes only between polls.
#[derive(Debug, Clone, Copy)]
enum Token {
    Signals,
    Listener,
    Work,
    Session(u64),
    Task(usize, Option<Output>),
    Code(u64),
}

impl Server {
    /// A server on a listening, non-blocking socket. `signals` is from [`sys::block_signals`],
    /// `null` is /dev/null. `is_machine`: this is PID 1 and `shutdown` ends the machine; otherwise
    /// it ends [`Server::run`].
    ///
    /// # Errors
    /// When the kernel has no descriptor left.
    pub fn new(
        listener: OwnedFd,
        signals: OwnedFd,
        null: OwnedFd,
        is_machine: bool,
    ) -> io::Result<Self> {
        Ok(Self {
            listener: listener.into(),
            signals,
            is_machine,
            accept_again: None,
            sessions: Sessions::new(sys::boot_time_us()),
            tasks: Vec::new(),
            spawner: Spawner::new(null, is_machine),
            office: Office::new()?,
            contexts: Contexts::default(),
            identity: Identity::default(),
            waiting: VecDeque::new(),
            ending: None,
            scratch: vec![0; MAX_PAYLOAD_LEN],
            polls: Vec::new(),
            tokens: Vec::new(),
        })
    }

    /// One that goes on where another runtime of this process has stopped.
    ///
    /// # Errors
    /// When the kernel has no descriptor left.
    pub(crate) fn arrive(from: Arriving, signals: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            listener: from.listener,
            signals,
            is_machine: from.is_machine,
            accept_again: None,
            sessions: from.sessions,
            tasks: from.tasks,
            spawner: from.spawner,
            office: Office::new()?,
            contexts: from.contexts,
            identity: from.identity,
            waiting: VecDeque::new(),
            ending: None,
            scratch: vec![0; MAX_PAYLOAD_LEN],
            polls: Vec::new(),
            tokens: Vec::new(),
        })
    }

    /// Whether this is PID 1, to whose end the machine's belongs.
    pub fn is_machine(&self) -> bool {
        self.is_machine
    }

    /// Serves a connection that was made, or is being made, elsewhere.
    pub fn add(&mut self, fd: OwnedFd, connected: bool) {
        self.sessions.add(fd, connected);
    }

    /// Serves until `shutdown` has been called and done.
    ///
    /// # Errors
    /// Only when `poll` itself fails: nothing can be served then.
    pub fn run(&mut self) -> io::Result<()> {
        loop {
            let now = Instant::now();
            if self.advance_ending(now) {
                return Ok(());
            }
            let mut deadline = self.settle(now);
            if self.swap_when_due(now) {
                deadline = self.settle(now);
            }
            self.identity.put_away();
            let backlog = self.prepare_poll(now);
            let timeout = match backlog {
                true => Some(Duration::ZERO),
                false => deadline.map(|at| at.saturating_duration_since(Instant::now())),
            };
            sys::poll(&mut self.polls, timeout)?;
            self.handle_polled();
            if backlog {
                self.give_backlog();
            }
        }
    }

    /// Collects what to poll; true when something can go on without.
    fn prepare_poll(&mut self, now: Instant) -> bool {
        self.polls.clear();
        self.tokens.clear();
        let mut add = |fd, events, token| {
            self.polls.push(poll_fd(fd, events));
            self.tokens.push(token);
        };
        add(self.signals.as_raw_fd(), libc::POLLIN, Token::Signals);
        if self.accept_again.is_none_or(|at| now >= at) && self.sessions.has_room() {
            add(self.listener.as_raw_fd(), libc::POLLIN, Token::Listener);
        }
        self.sessions
            .poll(|fd, events, id| add(fd, events, Token::Session(id)));
        let mut backlog = false;
        let mut works = false;
        for (index, task) in self.tasks.iter().enumerate() {
            works |= matches!(task.job, Job::Work(_));
            backlog |= task.has_backlog(&self.sessions);
            task.poll(&self.sessions, |fd, events, output| {
                add(fd, events, Token::Task(index, output));
            });
        }
        if works {
            let wake = self.office.wake().as_raw_fd();
            add(wake, libc::POLLIN, Token::Work);
        }
        self.contexts
            .poll(&self.sessions, &mut |fd, events, token| {
                add(fd, events, Token::Code(token));
            });
        backlog
    }

    fn handle_polled(&mut self) {
        let mut died = false;
        // Places in the table stay as polled: this round only adds to it.
        for at in 0..self.polls.len() {
            let revents = self.polls[at].revents;
            if revents == 0 {
                continue;
            }
            match self.tokens[at] {
                Token::Task(index, output) => self.task_ready(index, output, revents),
                Token::Session(id) => {
                    let heard = self.sessions.ready(id, revents, &mut self.scratch);
                    self.heard(id, heard);
                }
                Token::Code(token) => {
                    self.contexts
                        .ready(token, revents, &mut self.sessions, &mut self.scratch);
                }
                Token::Work => self.hear_of_work(),
                Token::Listener => self.accept(),
                Token::Signals => died = true,
            }
        }
        if died {
            self.reap();
        }
        self.release();
    }

    /// After a `wake`: what waited for it goes on. Not at once but at the round's end: connections that
    /// did not survive the freeze were reset before the wake came, and their calls are not a child's.
    fn release(&mut self) {
        let is_over = !self.identity.is_waiting() && !system::programs_wait();
        if is_over && !self.waiting.is_empty() {
            for (session, action) in std::mem::take(&mut self.waiting) {
                self.act(session, action);
            }
        }
    }

    fn task_ready(&mut self, index: usize, output: Option<Output>, revents: i16) {
        let Some(task) = self.tasks.get_mut(index) else {
            return;
        };
        match output {
            None => task.input_ready(revents, &mut self.sessions),
            Some(output) => task.output_ready(
                output,
                revents & libc::POLLIN != 0,
                &mut self.sessions,
                &mut self.scratch,
            ),
        }
    }

    fn give_backlog(&mut self) {
        for task in &mut self.tasks {
            task.give_backlog(&mut self.sessions, &mut self.scratch);
        }
    }

    fn hear_of_work(&mut self) {
        for (number, news) in self.office.news() {
            let task = self
                .tasks
                .iter_mut()
                .find(|task| matches!(&task.job, Job::Work(work) if work.number == number));
            let Some(task) = task else { continue };
            match (news, &mut task.job) {
                (News::Event(event), _) => {
                    if let Some(at) = task.at {
                        self.sessions.event_now(at, &event);
                    }
                }
                (News::End(end), Job::Work(work)) => work.result = Some(end),
                _ => {}
            }
        }
    }

    fn heard(&mut self, id: u64, heard: Heard) {
        match heard {
            Heard::Nothing => {}
            Heard::Gone => self.abandon(id),
            Heard::Actions { actions, broken } => {
                for action in actions {
                    self.act(id, action);
                }
                if let Some(violation) = broken {
                    self.sessions.close(id, &violation);
                    self.abandon(id);
                }
            }
        }
    }

    pub(crate) fn act(&mut self, session: u64, action: Action) {
        if self.waits(session, &action) {
            // A client may say stop as often as it likes, and need be heard but once.
            let known = |(waits, earlier): &(u64, Action)| *waits == session && *earlier == action;
            let is_stop = matches!(action, Action::StopOutput { .. });
            if !(is_stop && self.waiting.iter().any(known)) {
                self.waiting.push_back((session, action));
            }
            return;
        }
        match action {
            Action::Begin { call, request } => {
                let at = CallRef { session, call };
                if let Call::Session(params) = &request {
                    if let Some(id) = self.sessions.name(at, params) {
                        let heard = self.sessions.pending(id);
                        self.heard(id, heard);
                    }
                    return;
                }
                self.begin(at, request);
            }
            Action::Stdin { call, bytes, end } => {
                let at = CallRef { session, call };
                if let Some(task) = find(&mut self.tasks, at) {
                    task.take_input(&bytes, end, &mut self.sessions);
                }
            }
            Action::StopOutput { call, output } => {
                let at = CallRef { session, call };
                if let Some(task) = find(&mut self.tasks, at) {
                    task.stop_output(output, &mut self.sessions);
                } else {
                    self.contexts.stop_output(at, output, &mut self.sessions);
                }
            }
        }
    }

    /// Whether it has to wait for `wake`: a call, or what follows one that waits.
    fn waits(&self, session: u64, action: &Action) -> bool {
        // What waits already goes first.
        let is_waiting = self.identity.is_waiting();
        let programs_wait = !is_waiting && system::programs_wait();
        if !is_waiting && !programs_wait && self.waiting.is_empty() {
            return false;
        }
        match action {
            // A wake will come, and whoever is to bring it is heard.
            Action::Begin { request, .. } if programs_wait => starts_a_program(request),
            Action::Begin { request, .. } => !matches!(
                request,
                Call::Ping | Call::Wake(_) | Call::Session(_) | Call::SessionEnd
            ),
            Action::Stdin { call: of, .. } | Action::StopOutput { call: of, .. } => {
                let begins = |(waits, earlier): &(u64, Action)| {
                    let begun = matches!(earlier, Action::Begin { call, .. } if call == of);
                    *waits == session && begun
                };
                self.waiting.iter().any(begins)
            }
        }
    }

    fn accept(&mut self) {
        match sys::accept(self.listener.as_fd()) {
            Ok((fd, None | Some(sys::CID_HOST))) => self.add(fd, true),
            Ok((_, Some(cid))) => {
                eprintln!(
                    "ratoon-runtime: refused a connection from vsock context {cid}: only the host may call"
                );
            }
            Err(error) => {
                let short = [libc::EMFILE, libc::ENFILE, libc::ENOMEM, libc::ENOBUFS];
                if error
                    .raw_os_error()
                    .is_some_and(|code| short.contains(&code))
                {
                    self.accept_again = Some(Instant::now() + ACCEPT_PAUSE);
                }
                // Otherwise the peer has gone again.
            }
        }
    }

    /// A session has ended: so do its tasks, but for those that are to be kept.
    pub(crate) fn abandon(&mut self, session: u64) {
        self.waiting.retain(|(waits, _)| *waits != session);
        self.tasks.retain_mut(|task| {
            !(task.at.is_some_and(|at| at.session == session) && task.abandon())
        });
        self.contexts.lost(session);
    }

    /// Takes away every dead child; true when there is no child at all any more.
    pub(crate) fn reap(&mut self) -> bool {
        let mut signal = [0; size_of::<libc::signalfd_siginfo>()];
        let _ = rustix::io::read(&self.signals, &mut signal);
        loop {
            let dead = match sys::reap() {
                Ok(Some(dead)) => dead,
                Ok(None) => return false,
                Err(error) => return error.raw_os_error() == Some(libc::ECHILD),
            };
            let status = if libc::WIFEXITED(dead.status) {
                ExitStatus::Code(libc::WEXITSTATUS(dead.status))
            } else if libc::WIFSIGNALED(dead.status) {
                ExitStatus::Signal(libc::WTERMSIG(dead.status))
            } else {
                continue;
            };
            let micros = |time: libc::timeval| time.tv_sec as u64 * 1_000_000 + time.tv_usec as u64;
            let usage = Usage {
                user_us: micros(dead.used.ru_utime),
                system_us: micros(dead.used.ru_stime),
                memory_peak: dead.used.ru_maxrss as u64 * 1024,
            };
            let mut ours = self.tasks.iter_mut().filter_map(Task::process);
            if let Some(process) =
                ours.find(|process| process.pid == dead.pid && process.ended.is_none())
            {
                let killed = status == ExitStatus::Signal(libc::SIGKILL) && !process.killed;
                process.ended = Some(Ended {
                    status,
                    usage,
                    out_of_memory: killed && sys::died_of_want(dead.pid, &mut self.scratch),
                });
            }
            self.contexts.reaped(dead.pid, status, &mut self.sessions);
        }
    }

    /// Ends calls that are over, sends what is due; returns when to look again.
    fn settle(&mut self, now: Instant) -> Option<Instant> {
        let mut next = self.ending.as_ref().map(|ending| ending.until);
        let Self {
            tasks,
            sessions,
            spawner,
            ..
        } = self;
        tasks.retain_mut(|task| match task.settle(now, sessions) {
            State::Goes(at) => {
                next = earlier(next, at);
                true
            }
            State::Over => {
                if let Some(process) = task.process() {
                    spawner.give_back(process.take_group());
                }
                false
            }
        });
        forget_old(tasks);
        next = earlier(next, self.contexts.due(now, &mut self.sessions));
        let mut gone = Vec::new();
        next = earlier(next, self.sessions.flush(now, &mut gone));
        for id in gone {
            self.abandon(id);
        }
        if self.accept_again.is_some_and(|at| now >= at) {
            self.accept_again = None;
        }
        earlier(next, self.accept_again)
    }

    pub(crate) fn begin_ending(&mut self, at: CallRef) {
        self.ending = Some(Ending {
            at,
            stage: Stage::Terminating,
            until: Instant::now() + power::TERM_GRACE,
        });
        self.signal_everything(Signal::TERM);
    }

    fn signal_everything(&mut self, signal: Signal) {
        if self.is_machine {
            power::signal_all(signal);
        } else {
            for process in self.tasks.iter_mut().filter_map(Task::process) {
                let _ = process.signal(signal.as_raw());
            }
            self.contexts.signal_all(signal.as_raw());
        }
    }

    /// Takes the machine's end a step further if it is time; true when the server is to stop.
    fn advance_ending(&mut self, now: Instant) -> bool {
        if self.ending.is_none() {
            return false;
        }
        let nobody_left = self.reap();
        let Some(ending) = &mut self.ending else {
            return false;
        };
        let due = now >= ending.until;
        match ending.stage {
            Stage::Terminating if due && !nobody_left => {
                ending.stage = Stage::Killing;
                ending.until = now + power::KILL_GRACE;
                self.signal_everything(Signal::KILL);
            }
            Stage::Terminating | Stage::Killing if due || nobody_left => {
                ending.stage = Stage::Lingering;
                ending.until = now + power::LINGER;
                if self.is_machine {
                    power::rest_file_systems();
                }
                self.sessions.reply(ending.at, &());
            }
            Stage::Lingering => return due || !self.sessions.contains(ending.at.session),
            _ => {}
        }
        false
    }
}

/// Kept processes that have ended are remembered up to a number; the oldest go first.
fn forget_old(tasks: &mut Vec<Task>) {
    let is_old = |task: &Task| match &task.job {
        Job::Process(process) => task.at.is_none() && process.ended.is_some(),
        _ => false,
    };
    let mut many = tasks.iter().filter(|task| is_old(task)).count();
    tasks.retain(|task| {
        let forget = many > MAX_KEPT && is_old(task);
        many -= usize::from(forget);
        !forget
    });
}

pub(crate) fn find(tasks: &mut [Task], at: CallRef) -> Option<&mut Task> {
    tasks.iter_mut().find(|task| task.at == Some(at))
}
