//! A process that a client started: its streams, its end, its limits.
//!
//! A call ends when the process has ended *and* its outputs are drained. Mostly the pipes are at
//! their end by then. When a background child keeps one open, what was in the pipe when the
//! process ended is still delivered, however long the client takes to accept it, and then the
//! pipe gets [`GRACE`] more; what comes later is lost, as with `docker exec`.
//!
//! ```text
//!   output --> client              until `output_limit`, and while there is a client
//!        \---> file in the guest   beyond that, and for a kept process without a client
//! ```

use std::time::{Duration, Instant};

use ratoon_protocol::{
    ErrorCode, ErrorReply, Event, ExecParams, ExitReport, ExitStatus, OutputReport, ProcessInfo,
    Usage,
};
use rustix::io::Errno;
use rustix::process::{Pid, Signal};

use crate::groups::Group;
use crate::pipes::{Medium, Pipes, Read};
use crate::session::Output;
use crate::sessions::{CallRef, Sessions, earlier};
use crate::spawn::Child;
use crate::spool::Spool;
use crate::swap::forms::{carried, carried_by_serde};
use crate::sys;

/// How long after its process has ended an output that is still open is listened to.
pub const GRACE: Duration = Duration::from_millis(100);

/// How long a process has between SIGTERM and SIGKILL at its time-out.
const TERM_GRACE: Duration = Duration::from_secs(2);

/// How much of a command line is kept for lists, in bytes.
const ARGV_LIMIT: usize = 256;

/// How it ended, and what it used.
#[derive(Debug, Clone, Copy)]
pub struct Ended {
    /// How.
    pub status: ExitStatus,
    /// What it and the children that it waited for used.
    pub usage: Usage,
    /// The kernel has killed it for want of memory.
    pub out_of_memory: bool,
}

/// One process. See the module.
#[derive(Debug)]
pub struct Process {
    /// Its process id.
    pub pid: i32,
    /// How it ended, when it has.
    pub ended: Option<Ended>,
    /// It outlives its client.
    pub keep: bool,
    /// We have killed it ourselves.
    pub killed: bool,
    group: Option<Group>,
    /// Each output: what the client has got, and what went elsewhere.
    sent: [u64; 2],
    limit: Option<u64>,
    spools: [Option<Spool>; 2],
    terminal: bool,
    argv: Vec<String>,
    tag: Option<String>,
    started_us: u64,
    /// The next step of its time-out.
    due: Option<Instant>,
    grace: Duration,
    timed_out: bool,
    tail: Option<Tail>,
}

/// What is still owed of outputs that outlive their process.
#[derive(Debug)]
struct Tail {
    /// Bytes of each output that were in the pipe when the process ended.
    owed: [u64; 2],
    /// Listen until then, but no shorter than until nothing is owed.
    until: Instant,
}

carried_by_serde!(ExitStatus);
carried_by_serde!(Usage);
carried!(Ended {
    status,
    usage,
    out_of_memory
});
carried!(Tail { owed, until });
carried!(Process {
    pid,
    ended,
    keep,
    killed,
    group,
    sent,
    limit,
    spools,
    terminal,
    argv,
    tag,
    started_us,
    due,
    grace,
    timed_out,
    tail
});

impl Process {
    /// A process that has just been started, and its descriptors.
    pub fn new(child: Child, params: ExecParams) -> (Self, Pipes) {
        let mut pipes = Pipes::default();
        let terminal = params.pty.is_some();
        let medium = match terminal {
            true => Medium::Terminal,
            false => Medium::Pipe,
        };
        if let Some(stdin) = child.stdin {
            pipes.set_input(stdin, medium);
        }
        for (output, fd) in Output::BOTH.into_iter().zip(child.outputs) {
            if let Some(fd) = fd {
                pipes.set_output(output, fd, medium, None);
            }
        }
        let process = Self {
            pid: child.pid,
            ended: None,
            keep: params.keep,
            group: child.group,
            sent: [0; 2],
            limit: params.output_limit,
            spools: [None, None],
            terminal,
            argv: clip(params.argv, params.shell),
            tag: params.tag.map(|mut tag| {
                tag.truncate(tag.floor_char_boundary(64));
                tag
            }),
            started_us: sys::boot_time_us(),
            due: params
                .timeout_ms
                .map(|ms| Instant::now() + Duration::from_millis(ms)),
            grace: params.grace_ms.map_or(TERM_GRACE, Duration::from_millis),
            timed_out: false,
            killed: false,
            tail: None,
        };
        (process, pipes)
    }

    /// Whether what was read can be what a process was.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self) -> Result<(), &'static str> {
        // These numbers are signalled.
        if self.pid <= 1 {
            return Err("a process has no number of its own");
        }
        if self.sent.iter().any(|&sent| sent > 1 << 62) {
            return Err("an output is longer than any");
        }
        let mut spools = self.spools.iter().flatten();
        spools.try_for_each(Spool::check)
    }

    /// Signals the process group; SIGKILL, the whole control group. The process is not yet reaped,
    /// so the number is still its own.
    ///
    /// # Errors
    /// SRCH when it has ended.
    pub fn signal(&mut self, signal: i32) -> rustix::io::Result<()> {
        if self.ended.is_some() {
            return Err(Errno::SRCH);
        }
        if signal == libc::SIGKILL {
            self.killed = true;
            if self
                .group
                .as_ref()
                .is_some_and(|group| group.kill().is_ok())
            {
                return Ok(());
            }
        }
        let pid = Pid::from_raw(self.pid).ok_or(Errno::SRCH)?;
        let signal = Signal::from_named_raw(signal)
            // SAFETY: a number in 1 to 64, checked by the caller; it is only passed to kill(2).
            .unwrap_or_else(|| unsafe { Signal::from_raw_unchecked(signal) });
        rustix::process::kill_process_group(pid, signal)
    }

    /// The client is lost. A kept process goes on; another is killed and its pipes forgotten.
    pub fn abandon(&mut self, pipes: &mut Pipes) {
        if self.keep {
            for spool in self.spools.iter_mut().flatten() {
                spool.detach();
            }
            return;
        }
        let _ = self.signal(libc::SIGKILL);
        pipes.close();
    }

    /// Where the outputs stand, for a client that takes it over: offsets from the process's start.
    pub fn attach(&mut self, have: [u64; 2]) -> Event {
        let mut from = self.sent;
        for (index, spool) in self.spools.iter_mut().enumerate() {
            if let Some(spool) = spool {
                from[index] = spool.attach(have[index]);
            }
        }
        Event::Attached {
            from,
            pty: self.terminal,
        }
    }

    /// Whether it has a terminal.
    pub fn has_terminal(&self) -> bool {
        self.terminal
    }

    /// Whether this output goes to a file, or waits for a client (`None`: it has no room).
    fn goes_to_file(&self, output: Output, at: Option<CallRef>) -> bool {
        let index = output as usize;
        let over = self.limit.is_some_and(|limit| self.sent[index] >= limit);
        let behind = self.spools[index].as_ref().is_some_and(Spool::owes);
        over || behind || (at.is_none() && self.keep)
    }

    /// Whether the output is to be polled.
    pub fn wants(&self, output: Output, at: Option<CallRef>, sessions: &Sessions) -> bool {
        self.goes_to_file(output, at) || at.is_some_and(|at| sessions.room(at, output) > 0)
    }

    /// Whether the client can be given more from a file at once.
    pub fn has_backlog(&self, at: Option<CallRef>, sessions: &Sessions) -> bool {
        Output::BOTH.into_iter().any(|output| {
            let spool = self.spools[output as usize].as_ref();
            spool.is_some_and(Spool::owes) && at.is_some_and(|at| sessions.room(at, output) > 0)
        })
    }

    /// Poll said something of an output, or there is backlog.
    pub fn read(
        &mut self,
        output: Output,
        readable: bool,
        pipes: &mut Pipes,
        at: Option<CallRef>,
        sessions: &mut Sessions,
        scratch: &mut [u8],
    ) {
        let index = output as usize;
        let to_file = self.goes_to_file(output, at);
        let mut room = match (to_file, at) {
            (true, _) => scratch.len(),
            (false, Some(at)) => sessions.room(at, output).min(scratch.len()),
            (false, None) => 0,
        };
        if let (false, Some(limit)) = (to_file, self.limit) {
            room = room.min(usize::try_from(limit - self.sent[index]).unwrap_or(usize::MAX));
        }
        match pipes.read(output, readable, &mut scratch[..room]) {
            Read::Nothing => {}
            Read::End => {
                let owes = self.spools[index].as_ref().is_some_and(Spool::owes);
                if let (Some(at), false) = (at, owes) {
                    sessions.output_ended(at, output);
                }
            }
            Read::Bytes(len) => {
                let bytes = &scratch[..len];
                if let Some(tail) = &mut self.tail {
                    tail.owed[index] = tail.owed[index].saturating_sub(len as u64);
                }
                match (to_file, at) {
                    (false, Some(at)) => {
                        sessions.output(at, output, bytes);
                        self.sent[index] += len as u64;
                    }
                    _ => self.spool(output).take(bytes),
                }
            }
        }
    }

    fn spool(&mut self, output: Output) -> &mut Spool {
        let index = output as usize;
        let stream = ["stdout", "stderr"][index.min(1)];
        let name = format!("{}-{}", self.pid, self.started_us);
        let sent = self.sent[index];
        self.spools[index].get_or_insert_with(|| Spool::new(&name, stream, sent))
    }

    /// Gives the client what it may have from the files.
    pub fn give_backlog(&mut self, at: CallRef, sessions: &mut Sessions, scratch: &mut [u8]) {
        for output in Output::BOTH {
            let room = sessions.room(at, output).min(scratch.len());
            let Some(spool) = &mut self.spools[output as usize] else {
                continue;
            };
            if room > 0 && spool.owes() {
                let len = spool.read(&mut scratch[..room]);
                sessions.output(at, output, &scratch[..len]);
            }
        }
    }

    /// Takes its time-out a step further if it is time; returns when to come again.
    pub fn check_time(&mut self, now: Instant) -> Option<Instant> {
        let due = self.due.filter(|_| self.ended.is_none())?;
        if now < due {
            return Some(due);
        }
        self.due = match self.timed_out {
            false => {
                self.timed_out = true;
                let _ = self.signal(libc::SIGTERM);
                Some(now + self.grace)
            }
            true => {
                let _ = self.signal(libc::SIGKILL);
                None
            }
        };
        self.due
    }

    /// Whether its call is over at `now`; otherwise, when to ask again (`None`: when something
    /// happens).
    pub fn is_over(&mut self, pipes: &Pipes, now: Instant) -> Result<(), Option<Instant>> {
        if self.ended.is_none() {
            return Err(None);
        }
        if self.spools.iter().flatten().any(Spool::owes) {
            return Err(None);
        }
        if !pipes.has_outputs() {
            return Ok(());
        }
        let tail = self.tail.get_or_insert_with(|| Tail {
            owed: Output::BOTH.map(|output| pipes.waiting(output)),
            until: now + GRACE,
        });
        // Somebody else may have read from the pipe: what is not there is not owed.
        let owes = Output::BOTH
            .into_iter()
            .any(|output| tail.owed[output as usize] > 0 && pipes.waiting(output) > 0);
        match owes {
            true => Err(Some(now + GRACE)),
            false if now >= tail.until => Ok(()),
            false => Err(Some(tail.until)),
        }
    }

    /// The call's reply, once the process has ended.
    pub fn report(&self) -> Result<ExitReport, ErrorReply> {
        let Some(ended) = self.ended else {
            return Err(ErrorReply::new(ErrorCode::Failed, "the process still runs"));
        };
        let reported = self.limit.is_some() || self.spools.iter().any(Option::is_some);
        let output = |index: usize| match &self.spools[index] {
            Some(spool) => spool.report(self.sent[index]),
            None => OutputReport {
                bytes: self.sent[index],
                sent: self.sent[index],
                ..OutputReport::default()
            },
        };
        Ok(ExitReport {
            status: ended.status,
            timed_out: self.timed_out,
            out_of_memory: ended.out_of_memory,
            usage: Some(ended.usage),
            outputs: reported.then(|| [output(0), output(1)]),
        })
    }

    /// A line of the list of processes.
    pub fn info(&self, attached: bool) -> ProcessInfo {
        ProcessInfo {
            pid: self.pid,
            argv: self.argv.clone(),
            tag: self.tag.clone(),
            started_us: self.started_us,
            ended: self.ended.map(|ended| ended.status),
            pty: self.terminal,
            keep: self.keep,
            attached,
        }
    }

    /// Its control group, when it is over.
    pub fn take_group(&mut self) -> Option<Group> {
        self.group.take()
    }

    /// When to look at it again.
    pub fn next(&self, at: Option<Instant>) -> Option<Instant> {
        earlier(at, self.due.filter(|_| self.ended.is_none()))
    }
}

fn clip(argv: Vec<String>, shell: Option<String>) -> Vec<String> {
    let mut left = ARGV_LIMIT;
    let words = match shell {
        Some(line) => vec!["sh".into(), "-c".into(), line],
        None => argv,
    };
    let mut clipped = Vec::new();
    for mut word in words {
        if left == 0 {
            break;
        }
        word.truncate(word.floor_char_boundary(left));
        left -= word.len().max(1).min(left);
        clipped.push(word);
    }
    clipped
}
