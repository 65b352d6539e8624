//! A process of an exec call: its pipes, its input queue, and when its call is over.
//!
//! A call ends when the process has ended *and* both outputs are drained. Mostly both pipes are at
//! their end by then. When a background child keeps one open, what was in the pipe when the
//! process ended is still delivered, however long the client takes to accept it, and then the
//! pipe gets [`GRACE`] more; what comes later is lost, as with `docker exec`.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use ratoon_protocol::ExitStatus;
use rustix::io::Errno;
use rustix::process::{Pid, Signal};

use crate::session::{Output, Session};
use crate::spawn::{self, Child};

/// How long after its process has ended an output that is still open is listened to.
pub const GRACE: Duration = Duration::from_millis(100);

/// One process and its call. See the module.
#[derive(Debug)]
pub struct Process {
    /// Its process id.
    pub pid: i32,
    /// The connection of its call, `None` when that is lost and the process only waits for reaping.
    pub connection: Option<u64>,
    /// Its call.
    pub call: u64,
    /// How it ended, when it has.
    pub status: Option<ExitStatus>,
    stdin: Option<OwnedFd>,
    stdin_queue: VecDeque<u8>,
    stdin_ends: bool,
    outputs: [Option<OwnedFd>; 2],
    /// Set when the process has ended and a pipe is still open.
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

impl Process {
    /// A process that has just been started for `call` of `connection`.
    pub fn new(child: Child, connection: u64, call: u64) -> Self {
        Self {
            pid: child.pid,
            connection: Some(connection),
            call,
            status: None,
            stdin: child.stdin,
            stdin_queue: VecDeque::new(),
            stdin_ends: false,
            outputs: child.outputs.map(Some),
            tail: None,
        }
    }

    /// Signals the process group. The process is not yet reaped, so the number is still its own.
    pub fn signal(&self, signal: i32) -> rustix::io::Result<()> {
        let pid = Pid::from_raw(self.pid).ok_or(Errno::SRCH)?;
        let signal = Signal::from_named_raw(signal)
            // SAFETY: a number in 1 to 64, checked by the session; it is only passed to kill(2).
            .unwrap_or_else(|| unsafe { Signal::from_raw_unchecked(signal) });
        rustix::process::kill_process_group(pid, signal)
    }

    /// The connection is lost: ends the process, forgets its pipes.
    pub fn abandon(&mut self) {
        if self.status.is_none() {
            let _ = self.signal(libc::SIGKILL);
        }
        self.connection = None;
        self.stdin = None;
        self.stdin_queue = VecDeque::new();
        self.outputs = [None, None];
    }

    /// The descriptor to poll for input room or for the reader's end.
    pub fn stdin_poll(&self) -> Option<(RawFd, i16)> {
        let fd = self.stdin.as_ref()?.as_raw_fd();
        let events = if self.stdin_queue.is_empty() {
            0
        } else {
            libc::POLLOUT
        };
        Some((fd, events))
    }

    /// The descriptor to poll for output, if the session has room for it.
    pub fn output_poll(&self, output: Output, session: &Session) -> Option<RawFd> {
        let fd = self.outputs[output as usize].as_ref()?;
        (session.room(self.call, output) > 0).then(|| fd.as_raw_fd())
    }

    /// Input from the client.
    pub fn queue_stdin(&mut self, bytes: &[u8], end: bool, session: &mut Session) {
        self.stdin_ends |= end;
        if self.stdin.is_none() {
            session.stdin_closed(self.call);
            return;
        }
        self.stdin_queue.extend(bytes);
        self.write_stdin(session);
    }

    /// Writes what the pipe takes; closes it after the last byte, or when nobody reads.
    pub fn write_stdin(&mut self, session: &mut Session) {
        let Some(fd) = &self.stdin else { return };
        while !self.stdin_queue.is_empty() {
            match spawn::write_now(fd.as_fd(), self.stdin_queue.as_slices().0) {
                Ok(written) => {
                    self.stdin_queue.drain(..written);
                    session.stdin_taken(self.call, written as u64);
                }
                Err(Errno::AGAIN | Errno::INTR) => return,
                Err(_) => return self.close_stdin(session),
            }
        }
        if self.stdin_ends {
            self.stdin = None;
            self.stdin_queue = VecDeque::new();
        }
    }

    /// Nobody reads the input any more.
    pub fn close_stdin(&mut self, session: &mut Session) {
        self.stdin = None;
        self.stdin_queue = VecDeque::new();
        session.stdin_closed(self.call);
    }

    /// The client wants no more of an output.
    pub fn stop_output(&mut self, output: Output, session: &mut Session) {
        if self.outputs[output as usize].take().is_some() {
            session.output_ended(self.call, output);
        }
    }

    /// Poll said something of an output. `readable`: there are bytes; otherwise it is at its end.
    pub fn read_output(
        &mut self,
        output: Output,
        readable: bool,
        scratch: &mut [u8],
        session: &mut Session,
    ) {
        let index = output as usize;
        let Some(fd) = &self.outputs[index] else {
            return;
        };
        let room = session.room(self.call, output).min(scratch.len());
        if readable && room == 0 {
            return;
        }
        let read = match readable {
            true => spawn::read_now(fd.as_fd(), &mut scratch[..room]),
            false => Ok(0),
        };
        match read {
            Err(Errno::AGAIN | Errno::INTR) => {}
            Ok(len) if len > 0 => {
                session.output(self.call, output, &scratch[..len]);
                if let Some(tail) = &mut self.tail {
                    tail.owed[index] = tail.owed[index].saturating_sub(len as u64);
                }
            }
            _ => {
                self.outputs[index] = None;
                session.output_ended(self.call, output);
            }
        }
    }

    /// Whether the call is over at `now`; otherwise, when to ask again (`None`: when something
    /// happens).
    pub fn is_over(&mut self, now: Instant) -> Result<(), Option<Instant>> {
        if self.status.is_none() {
            return Err(None);
        }
        if self.outputs.iter().all(Option::is_none) {
            return Ok(());
        }
        let outputs = &self.outputs;
        let tail = self.tail.get_or_insert_with(|| Tail {
            owed: Output::BOTH.map(|output| {
                let fd = outputs[output as usize].as_ref();
                fd.and_then(|fd| rustix::io::ioctl_fionread(fd).ok())
                    .unwrap_or(0)
            }),
            until: now + GRACE,
        });
        // Somebody else may have read from the pipe: what is not there is not owed.
        let owes = outputs.iter().zip(&tail.owed).any(|(output, &owed)| {
            let is_empty = |fd: &OwnedFd| rustix::io::ioctl_fionread(fd) == Ok(0);
            owed > 0 && output.as_ref().is_some_and(|fd| !is_empty(fd))
        });
        match owes {
            true => Err(Some(now + GRACE)),
            false if now >= tail.until => Ok(()),
            false => Err(Some(tail.until)),
        }
    }
}
