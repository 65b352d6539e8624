//! One interpreter: its descriptors, the cell that it runs, its end.
//!
//! ```text
//!   Starting --H--> Up --(exit, crash, stop, limits)--> Dying --(reaped)--> drained --> gone
//! ```
//!
//! A cell's end is said on the control socket and may overtake what lies in the pipes: at that
//! time the bytes in each pipe are counted and delivered first. In the poll set the control socket
//! stands before the pipes, so that a pipe that is not readable in the round in which the answer
//! came is empty, and no system call is needed to know.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use ratoon_protocol::{
    CodeContext, CodeError, CodeRun, CodeStart, CodeStatus, ErrorCode, ErrorReply, ExitStatus,
    Language,
};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use rustix::process::{Pid, Signal};

mod carried;
mod ending;
mod socket;
mod timing;

use crate::groups::Group;
use crate::session::Output;
use crate::sessions::CallRef;
use crate::spawn::{SpawnError, read_now};
use crate::swap::forms::Fd;

use ending::died;
use socket::receive_with_pid;
pub(super) use socket::socket_pair;

use super::Answers;
use super::wire::{Garbage, Outcome, Step, Wire};

/// How long an interpreter may take to start.
const START_LIMIT: Duration = Duration::from_secs(180);

/// How long a cell has after the interrupt of its time-out.
const INTERRUPT_GRACE: Duration = Duration::from_secs(2);

/// A cell that runs for longer shows its output as it comes.
const TICK: Duration = Duration::from_millis(100);

/// An interrupt that comes so soon after its cell may be too early for the interpreter to heed: it
/// is sent again after as long.
const EARLY: Duration = Duration::from_millis(500);

/// What is kept of an output while no cell runs: its last bytes, for the next cell.
const LATE_LIMIT: usize = 32 * 1024;

/// A cell that runs, or is to run.
#[derive(Debug)]
struct Cell {
    /// Whose; `None` when the client is gone.
    at: Option<CallRef>,
    /// Until it is sent.
    code: Option<String>,
    timeout: Option<Duration>,
    /// When it was sent.
    since: Option<Instant>,
    /// The next step of its time-out.
    due: Option<Instant>,
    tick: Option<Instant>,
    again: Option<Instant>,
    interrupted: bool,
    timed_out: bool,
    /// The client takes no more of these.
    stopped: [bool; 3],
}

/// One interpreter. See the module.
#[derive(Debug)]
pub struct Context {
    /// How it was asked for.
    pub params: CodeStart,
    /// Its name.
    pub name: String,
    /// It has been stopped: its name is free.
    pub hidden: bool,
    /// The number of its zygote, if it has one.
    pub zygote: Option<u64>,
    is_orphan: bool,
    /// Its process id, when it is known.
    pub pid: Option<i32>,
    /// Its control group, if it is its own.
    pub group: Option<Group>,
    /// Its zygote has been told to reap it.
    pub is_reaped_for: bool,
    /// The call that waits for it to be up.
    pub waiting: Option<CallRef>,
    count: u64,
    cell: Option<Cell>,
    up: bool,
    /// It has been asked whether all interrupts of the last cell have come, and has not answered.
    calming: bool,
    up_by: Option<Instant>,
    control: Option<Fd>,
    outputs: [Option<Fd>; 2],
    wire: Wire,
    outbox: Vec<u8>,
    late: [Vec<u8>; 2],
    /// What is in the pipes at the cell's end and not yet read, when that has been asked.
    owed: [Option<u64>; 2],
    /// In this round: polled; read and perhaps not empty; the control socket was read.
    watched: [bool; 2],
    left: [bool; 2],
    heard: bool,
    blocked: bool,
    /// It has been killed, and why if not by its own fault.
    dying: bool,
    verdict: Option<CodeError>,
    refused: Option<i32>,
    /// It is reaped; with how it ended, if anybody knows.
    gone: bool,
    fate: Option<ExitStatus>,
}

/// An interpreter that cannot be executed.
pub(super) fn refusal(program: &str, error: &SpawnError) -> ErrorReply {
    match error {
        SpawnError::NotInPath { .. } => {
            let language = program.trim_end_matches('3');
            let message = format!("no {language} in this image: {}", error.reply().message);
            ErrorReply::new(ErrorCode::Unsupported, message)
        }
        error => error.reply(),
    }
}

impl Context {
    /// An interpreter that has just been asked for. `control` and `outputs` are our ends.
    pub fn new(
        name: String,
        params: CodeStart,
        control: OwnedFd,
        outputs: [Option<OwnedFd>; 2],
    ) -> Self {
        Self {
            params,
            name,
            hidden: false,
            zygote: None,
            is_orphan: false,
            pid: None,
            group: None,
            is_reaped_for: false,
            waiting: None,
            count: 0,
            cell: None,
            up: false,
            calming: false,
            up_by: Some(Instant::now() + START_LIMIT),
            control: Some(control.into()),
            outputs: outputs.map(|pipe| pipe.map(Fd::from)),
            wire: Wire::default(),
            outbox: Vec::new(),
            late: [Vec::new(), Vec::new()],
            owed: [None; 2],
            watched: [false; 2],
            left: [false; 2],
            heard: false,
            blocked: false,
            dying: false,
            verdict: None,
            refused: None,
            gone: false,
            fate: None,
        }
    }

    /// What its driver says.
    pub(super) fn wire(&self) -> &Wire {
        &self.wire
    }

    /// As the client is told.
    pub fn info(&self) -> CodeContext {
        CodeContext {
            context: self.name.clone(),
            language: self.params.language,
            pid: self.pid.unwrap_or(0),
            count: self.count,
            busy: self.cell.is_some(),
        }
    }

    /// Runs a cell, as soon as it is up.
    ///
    /// # Errors
    /// It runs another one.
    pub fn run(&mut self, at: CallRef, params: CodeRun) -> Result<(), ErrorReply> {
        if self.cell.is_some() {
            let message = format!(
                "context `{}` runs a cell: wait for it, or interrupt it",
                self.name.escape_debug()
            );
            return Err(ErrorReply::new(ErrorCode::Busy, message));
        }
        self.count += 1;
        self.cell = Some(Cell {
            at: Some(at),
            code: Some(params.code),
            timeout: params.timeout_ms.map(Duration::from_millis),
            since: None,
            due: None,
            tick: None,
            again: None,
            interrupted: false,
            timed_out: false,
            stopped: [false; 3],
        });
        if self.up && !self.calming {
            self.send_cell();
        }
        Ok(())
    }

    fn send_cell(&mut self) {
        let now = Instant::now();
        let Some(cell) = &mut self.cell else { return };
        let Some(code) = cell.code.take() else { return };
        cell.since = Some(now);
        cell.due = cell.timeout.map(|timeout| now + timeout);
        if self.params.language == Language::Python {
            cell.tick = Some(now + TICK);
        }
        self.owed = [None; 2];
        let request = match self.params.language {
            Language::Bash => format!("{:08}{code}", code.len()),
            _ => format!("{}\n", serde_json::json!({ "run": code })),
        };
        self.say(request.as_bytes());
    }

    fn say(&mut self, bytes: &[u8]) {
        self.outbox.extend_from_slice(bytes);
        self.write();
    }

    fn write(&mut self) {
        let Some(control) = &self.control else { return };
        while !self.outbox.is_empty() {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match rustix::net::send(control, &self.outbox, flags) {
                Ok(len) if len == self.outbox.len() => self.outbox = Vec::new(),
                Ok(len) => {
                    self.outbox.drain(..len);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                // Reading will tell.
                Err(_) => self.outbox = Vec::new(),
            }
        }
    }

    /// New random numbers, after the machine has become another one. Python is told by a signal (its
    /// default is to be ignored), which is there before the process does anything else, though it be in
    /// the middle of a cell. The others hear of it when they next listen: Node when it waits, Bash after
    /// its cell. `seed` is of this call alone.
    pub fn reseed(&mut self, seed: u32) {
        if self.dying || self.gone {
            return;
        }
        match self.params.language {
            Language::Python => {
                // Nobody knows its process before it is up: what it has of random numbers then is
                // made at its fork.
                if let Some(pid) = self.pid.and_then(Pid::from_raw) {
                    let _ = rustix::process::kill_process(pid, Signal::WINCH);
                }
            }
            Language::Node => self.say(b"{\"reseed\":1}\n"),
            Language::Bash => self.say(format!("R{:07}", seed % 10_000_000).as_bytes()),
        }
    }

    /// Sends a signal to it and to what it has started in the foreground.
    pub fn signal(&self, signal: Signal) {
        if let Some(pid) = self.pid.and_then(Pid::from_raw).filter(|_| !self.gone) {
            let _ = rustix::process::kill_process_group(pid, signal);
        }
    }

    /// Ends it: kills it and all that it started. `why` is told to whom it matters.
    pub fn kill(&mut self, why: Option<CodeError>) {
        if !self.dying {
            self.dying = true;
            self.verdict = why;
        }
        if self
            .group
            .as_ref()
            .is_none_or(|group| group.kill().is_err())
        {
            self.signal(Signal::KILL);
        }
        if self.pid.is_none() {
            // Nobody knows it yet: it ends by itself when nobody listens.
            self.control = None;
            self.gone = true;
        }
    }

    /// Whether its zygote is to reap it.
    pub fn wants_reaping(&self) -> Option<i32> {
        self.pid
            .filter(|_| self.dying && !self.gone && self.zygote.is_some())
    }

    /// Whether something was printed since the last cell ended.
    #[cfg(test)]
    pub fn has_late_output(&self) -> bool {
        self.late.iter().any(|late| !late.is_empty())
    }

    /// Its zygote has gone: nobody can tell how it ends, unless it comes to us as an orphan.
    pub fn orphan(&mut self) {
        self.zygote = None;
        self.is_orphan = true;
    }

    /// It has ended and been reaped.
    pub fn reaped(&mut self, fate: Option<ExitStatus>) {
        if !self.gone {
            // What it has started ends with it; the number is still its group's, if there is any.
            self.kill(None);
            self.gone = true;
            self.fate = fate;
        }
    }

    /// Its client has gone.
    pub fn lost(&mut self, session: u64, now: Instant) {
        if self.waiting.is_some_and(|at| at.session == session) {
            self.waiting = None;
        }
        let cell = self.cell.as_mut();
        if let Some(cell) = cell.filter(|cell| cell.at.is_some_and(|at| at.session == session)) {
            cell.at = None;
            if !cell.interrupted {
                self.interrupt(now);
            }
        }
    }

    /// The client takes no more of an output; false: it is not of this context.
    pub fn stop_output(&mut self, at: CallRef, output: Output) -> bool {
        match &mut self.cell {
            Some(cell) if cell.at == Some(at) => {
                cell.stopped[output as usize] = true;
                true
            }
            _ => false,
        }
    }

    fn room(&self, output: Output, answers: &impl Answers) -> usize {
        room(self.cell.as_ref(), output, answers)
    }

    /// Tells what to poll: the descriptor, its events, and which it is (0: control socket).
    pub fn poll(&mut self, answers: &impl Answers, mut add: impl FnMut(RawFd, i16, u64)) {
        self.heard = false;
        self.left = [false; 2];
        self.watched = [false; 2];
        if let Some(control) = self.control.as_ref().filter(|_| !self.blocked) {
            let more = match self.outbox.is_empty() {
                true => 0,
                false => libc::POLLOUT,
            };
            add(control.as_raw_fd(), libc::POLLIN | more, 0);
        }
        for output in Output::BOTH {
            let index = output as usize;
            if let Some(pipe) = &self.outputs[index]
                && self.room(output, answers) > 0
            {
                self.watched[index] = true;
                add(pipe.as_raw_fd(), libc::POLLIN, index as u64 + 1);
            }
        }
    }

    /// Poll said something of a descriptor.
    pub fn ready(
        &mut self,
        which: u64,
        revents: i16,
        answers: &mut impl Answers,
        scratch: &mut [u8],
    ) {
        match which {
            0 => {
                if revents & libc::POLLOUT != 0 {
                    self.write();
                }
                if revents & (libc::POLLIN | libc::POLLHUP | libc::POLLERR) != 0 {
                    self.hear(scratch);
                }
            }
            1 => self.read(Output::Stdout, revents, answers, scratch),
            _ => self.read(Output::Stderr, revents, answers, scratch),
        }
    }

    /// Reads the control socket; false when there was nothing.
    fn hear(&mut self, scratch: &mut [u8]) -> bool {
        let Some(control) = &self.control else {
            return false;
        };
        let received = match self.pid {
            Some(_) => rustix::net::recv(control, &mut *scratch, RecvFlags::DONTWAIT)
                .map(|(len, _)| (len, None)),
            None => receive_with_pid(control, scratch),
        };
        match received {
            Ok((len, pid)) if len > 0 => {
                self.heard = true;
                self.pid = self.pid.or(pid);
                self.wire.feed(&scratch[..len]);
                true
            }
            Err(Errno::AGAIN | Errno::INTR) => false,
            _ => {
                self.control = None;
                self.kill(None);
                false
            }
        }
    }

    fn read(
        &mut self,
        output: Output,
        revents: i16,
        answers: &mut impl Answers,
        scratch: &mut [u8],
    ) {
        let index = output as usize;
        let room = self.room(output, answers).min(scratch.len());
        let Some(pipe) = &self.outputs[index] else {
            return;
        };
        if room == 0 {
            self.left[index] = true;
            return;
        }
        let read = match revents & libc::POLLIN != 0 {
            true => read_now(pipe.as_fd(), &mut scratch[..room]),
            false => Ok(0),
        };
        match read {
            Err(Errno::AGAIN | Errno::INTR) => {}
            Ok(len) if len > 0 => {
                self.left[index] = len == room;
                if let Some(owed) = &mut self.owed[index] {
                    *owed = owed.saturating_sub(len as u64);
                }
                self.deliver(output, &scratch[..len], answers);
            }
            _ => self.outputs[index] = None,
        }
    }

    fn deliver(&mut self, output: Output, bytes: &[u8], answers: &mut impl Answers) {
        let Some(cell) = &self.cell else {
            let late = &mut self.late[output as usize];
            late.extend_from_slice(bytes);
            if late.len() > LATE_LIMIT {
                late.drain(..late.len() - LATE_LIMIT);
            }
            return;
        };
        if let Some(at) = cell.at.filter(|_| !cell.stopped[output as usize]) {
            answers.output(at, output, bytes);
        }
    }

    /// Whether everything that was in the pipes has been delivered.
    fn is_drained(&mut self) -> bool {
        for index in 0..2 {
            if self.outputs[index].is_none() {
                self.owed[index] = Some(0);
            }
            if self.owed[index] == Some(0) {
                continue;
            }
            let known_empty = self.heard && self.watched[index] && !self.left[index];
            let waiting = match (&self.outputs[index], known_empty) {
                (Some(pipe), false) => rustix::io::ioctl_fionread(pipe).unwrap_or(0),
                _ => 0,
            };
            // Somebody else may have read from the pipe: what is not there is not owed.
            let owed = self.owed[index].map_or(waiting, |owed| owed.min(waiting));
            self.owed[index] = Some(owed);
        }
        self.owed == [Some(0); 2]
    }

    /// Goes on with what has come; true when it is over with the context.
    pub fn settle(&mut self, now: Instant, answers: &mut impl Answers) -> bool {
        self.give_late(answers);
        if self.pump(answers).is_err() {
            self.wire = Wire::default();
            let message = "its control channel carried what no driver says; it was killed";
            self.control = None;
            self.kill(Some(died(message)));
        }
        if self.is_orphan && self.dying {
            self.reaped(None);
        }
        if self.gone && !self.blocked {
            // It is dead: what it still had to say is there.
            let mut scratch = [0; 4096];
            while !self.blocked && self.hear(&mut scratch) {
                self.heard = false;
                if self.pump(answers).is_err() {
                    self.control = None;
                }
            }
        }
        let late = self.late.iter().any(|late| !late.is_empty()) && self.cell.is_some();
        self.heard = false;
        if self.gone && !self.blocked && !late && (self.cell.is_none() || self.is_drained()) {
            self.conclude(answers);
            return true;
        }
        self.check_time(now);
        false
    }

    /// What came while no cell ran is the next one's.
    fn give_late(&mut self, answers: &mut impl Answers) {
        if self.cell.is_none() {
            return;
        }
        for output in Output::BOTH {
            let index = output as usize;
            while !self.late[index].is_empty() {
                let len = self.room(output, answers).min(self.late[index].len());
                if len == 0 {
                    break;
                }
                let rest = self.late[index].split_off(len);
                let bytes = std::mem::replace(&mut self.late[index], rest);
                self.deliver(output, &bytes, answers);
            }
        }
    }

    fn pump(&mut self, answers: &mut impl Answers) -> Result<(), Garbage> {
        loop {
            if self.wire.at_end() {
                let late = self.late.iter().any(|late| !late.is_empty()) && self.cell.is_some();
                if late || !self.is_drained() {
                    self.blocked = true;
                    return Ok(());
                }
            }
            let cell = self.cell.as_ref();
            let step = self.wire.next(|output| room(cell, output, answers))?;
            self.blocked = false;
            match step {
                Step::More => return Ok(()),
                Step::Blocked => {
                    self.blocked = true;
                    return Ok(());
                }
                Step::Bytes(output, bytes) => {
                    let cell = cell.filter(|cell| !cell.stopped[output as usize]);
                    if let (Some(at), false) = (cell.and_then(|cell| cell.at), bytes.is_empty()) {
                        answers.output(at, output, bytes);
                    }
                }
                Step::Hello if !self.up => self.greet(answers),
                Step::Refused(errno) if !self.up => self.refused = Some(errno),
                Step::End(outcome) => self.finish(outcome, answers)?,
                Step::Calm if self.calming => {
                    self.calming = false;
                    self.up_by = None;
                    self.begin(answers);
                }
                Step::Hello | Step::Calm | Step::Refused(_) | Step::Reaped(..) => {
                    return Err(Garbage);
                }
            }
        }
    }

    fn greet(&mut self, answers: &mut impl Answers) {
        self.up = true;
        self.up_by = None;
        if let Some(at) = self.waiting.take() {
            answers.reply(at, &self.info());
        }
        self.begin(answers);
    }

    /// Sends the cell that waits, unless it was interrupted meanwhile.
    fn begin(&mut self, answers: &mut impl Answers) {
        match &self.cell {
            Some(cell) if cell.interrupted => {
                let error = died("it was interrupted before it began");
                let _ = self.finish(Some(error), answers);
            }
            _ => self.send_cell(),
        }
    }

    fn finish(&mut self, outcome: Outcome, answers: &mut impl Answers) -> Result<(), Garbage> {
        let cell = self.cell.take().ok_or(Garbage)?;
        let status = match &outcome {
            _ if cell.timed_out => CodeStatus::Timeout,
            None => CodeStatus::Ok,
            Some(_) if cell.interrupted => CodeStatus::Interrupted,
            Some(_) => CodeStatus::Error,
        };
        if let Some(at) = cell.at {
            let end = self.end(status, outcome);
            answers.reply(at, &end);
        }
        self.owed = [None; 2];
        let signalled = cell.since.is_some() && (cell.interrupted || cell.timed_out);
        if signalled && self.params.language == Language::Node {
            self.calming = true;
            self.up_by = Some(Instant::now() + START_LIMIT);
            self.say(b"{\"calm\":1}\n");
        }
        Ok(())
    }
}

/// How much of an output may be taken: of one that nobody wants, all.
fn room(cell: Option<&Cell>, output: Output, answers: &impl Answers) -> usize {
    match cell {
        Some(cell) if !cell.stopped[output as usize] => {
            cell.at.map_or(usize::MAX, |at| answers.room(at, output))
        }
        _ => usize::MAX,
    }
}
