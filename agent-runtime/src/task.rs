//! A call that goes on: its descriptors, and what it waits for.

use std::time::Instant;

use ratoon_protocol::{ErrorCode, ErrorReply, Event, Transferred};
use rustix::io::Errno;
use serde_json::Value;

use crate::files::Upload;
use crate::pipes::{Medium, Pipes, Read};
use crate::process::Process;
use crate::session::Output;
use crate::sessions::{CallRef, Sessions};
use crate::swap::Incoming;
use crate::swap::forms::{Carried, carried, member, members, put};
use crate::swap::state::StateError;
use crate::system::{Dial, Progress};

/// What a call does.
pub enum Job {
    /// A process.
    Process(Box<Process>),
    /// Work on a thread.
    Work(Working),
    /// A file is sent.
    Download {
        /// So much of it.
        bytes: u64,
    },
    /// A file comes.
    Upload(Upload),
    /// A runtime comes, to take this one's place.
    Swap(Incoming),
    /// A server in the guest.
    Port {
        /// While it is being called.
        dial: Option<Dial>,
        /// Bytes that came from it.
        received: u64,
    },
}

/// Work on a thread.
pub struct Working {
    /// The call's name.
    pub method: &'static str,
    /// Its number.
    pub number: u64,
    /// How it ended, when it has.
    pub result: Option<Result<Value, ErrorReply>>,
}

/// One call. See the module.
pub struct Task {
    /// Whose; `None` when the client is gone.
    pub at: Option<CallRef>,
    /// Its descriptors.
    pub pipes: Pipes,
    /// What it does.
    pub job: Job,
}

carried!(Task { at, pipes, job });

/// What cannot go on in another runtime is null: see [`crate::swap`].
impl Carried for Job {
    fn carry(&self) -> Value {
        let (kind, inner) = match self {
            Self::Process(process) => ("process", process.carry()),
            Self::Download { bytes } => ("download", bytes.carry()),
            Self::Port { received, .. } => ("port", received.carry()),
            Self::Work(_) | Self::Upload(_) | Self::Swap(_) => return Value::Null,
        };
        let mut all = serde_json::Map::new();
        put(&mut all, kind, inner);
        Value::Object(all)
    }

    fn arrive(value: Value) -> Result<Self, StateError> {
        let mut all = members(value)?;
        if all.contains_key("process") {
            let process = member(&mut all, "process")?;
            return Ok(Self::Process(Box::new(process)));
        }
        if all.contains_key("download") {
            let bytes = member(&mut all, "download")?;
            return Ok(Self::Download { bytes });
        }
        let received = member(&mut all, "port")?;
        Ok(Self::Port {
            dial: None,
            received,
        })
    }
}

/// Whether a task is over.
pub enum State {
    /// Look again then, or when something happens.
    Goes(Option<Instant>),
    /// Take it away.
    Over,
}

impl Task {
    /// The process, if it is one.
    pub fn process(&mut self) -> Option<&mut Process> {
        match &mut self.job {
            Job::Process(process) => Some(process),
            _ => None,
        }
    }

    /// The client is gone. True when the task is, too.
    pub fn abandon(&mut self) -> bool {
        self.at = None;
        match &mut self.job {
            Job::Process(process) => {
                process.abandon(&mut self.pipes);
                false
            }
            _ => true,
        }
    }

    /// Tells the descriptors to poll: events, and which output (none: input).
    pub fn poll(&self, sessions: &Sessions, mut add: impl FnMut(i32, i16, Option<Output>)) {
        if let Job::Port {
            dial: Some(dial), ..
        } = &self.job
        {
            add(dial.fd(), libc::POLLOUT, None);
            return;
        }
        if let Some((fd, events)) = self.pipes.stdin_poll() {
            add(fd, events, None);
        }
        for output in Output::BOTH {
            let Some(fd) = self.pipes.output_poll(output) else {
                continue;
            };
            let wanted = match &self.job {
                Job::Process(process) => process.wants(output, self.at, sessions),
                _ => self.at.is_some_and(|at| sessions.room(at, output) > 0),
            };
            if wanted {
                add(fd, libc::POLLIN, Some(output));
            }
        }
    }

    /// Whether the next poll must not wait.
    pub fn has_backlog(&self, sessions: &Sessions) -> bool {
        match &self.job {
            Job::Process(process) => process.has_backlog(self.at, sessions),
            _ => false,
        }
    }

    /// Poll said something of its input, or of the server that it calls.
    pub fn input_ready(&mut self, revents: i16, sessions: &mut Sessions) {
        if let Job::Port { dial, .. } = &mut self.job
            && let Some(calling) = dial
        {
            match calling.writable() {
                Ok(Progress::Waiting) => {}
                Ok(Progress::Connected(socket)) => {
                    *dial = None;
                    self.connected(socket, sessions);
                }
                Err(error) => self.fail(&error, sessions),
            }
            return;
        }
        // A socket hangs up when neither way is left.
        let gone = match self.job {
            Job::Port { .. } => libc::POLLERR | libc::POLLHUP,
            _ => libc::POLLERR,
        };
        if revents & gone != 0 {
            self.pipes.close_input(self.at, sessions);
        } else {
            self.pipes.write(self.at, sessions);
        }
    }

    fn connected(&mut self, socket: std::os::fd::OwnedFd, sessions: &mut Sessions) {
        let Some(at) = self.at else { return };
        match rustix::io::fcntl_dupfd_cloexec(&socket, 3) {
            Ok(second) => {
                self.pipes.set_input(second, Medium::Socket);
                self.pipes
                    .set_output(Output::Stdout, socket, Medium::Socket, None);
                sessions.event_now(at, &Event::Connected);
                self.pipes.write(Some(at), sessions);
            }
            Err(error) => {
                let error = ErrorReply::new(ErrorCode::Failed, format!("a descriptor: {error}"));
                self.fail(&error, sessions);
            }
        }
    }

    /// Ends the call with an error.
    fn fail(&mut self, error: &ErrorReply, sessions: &mut Sessions) {
        if let Some(at) = self.at.take() {
            sessions.fail(at, error);
        }
        self.pipes.close();
    }

    /// Input from the client.
    pub fn take_input(&mut self, bytes: &[u8], end: bool, sessions: &mut Sessions) {
        let Some(at) = self.at else { return };
        if matches!(&self.job, Job::Port { dial: Some(_), .. }) {
            return self.pipes.queue_input(bytes, end);
        }
        self.pipes.take_input(bytes, end, at, sessions);
    }

    /// Poll said something of an output. `readable`: there are bytes.
    pub fn output_ready(
        &mut self,
        output: Output,
        readable: bool,
        sessions: &mut Sessions,
        scratch: &mut [u8],
    ) {
        let Self { at, pipes, job } = self;
        if let Job::Process(process) = job {
            return process.read(output, readable, pipes, *at, sessions, scratch);
        }
        let Some(at) = *at else { return };
        let room = sessions.room(at, output).min(scratch.len());
        match pipes.read(output, readable, &mut scratch[..room]) {
            Read::Nothing => {}
            Read::End if matches!(job, Job::Port { .. }) => sessions.output_ended_now(at, output),
            Read::End => sessions.output_ended(at, output),
            Read::Bytes(len) => {
                sessions.output(at, output, &scratch[..len]);
                match job {
                    Job::Download { bytes } => *bytes += len as u64,
                    Job::Port { received, .. } => *received += len as u64,
                    _ => {}
                }
            }
        }
    }

    /// Gives the client what waits in files.
    pub fn give_backlog(&mut self, sessions: &mut Sessions, scratch: &mut [u8]) {
        if let (Some(at), Job::Process(process)) = (self.at, &mut self.job) {
            process.give_backlog(at, sessions, scratch);
        }
    }

    /// The client takes no more of an output; of an upload: it shall not be.
    pub fn stop_output(&mut self, output: Output, sessions: &mut Sessions) {
        let Some(at) = self.at else { return };
        if let (Job::Upload(_) | Job::Swap(_), Output::Stdout) = (&self.job, output) {
            // It has no output: this is how its client takes back what it has begun.
            let error = ErrorReply::new(ErrorCode::Cancelled, "the client has cancelled the file");
            return self.fail(&error, sessions);
        }
        if !self.pipes.close_output(output) {
            return;
        }
        sessions.output_ended(at, output);
        if let Job::Download { .. } = self.job {
            let error =
                ErrorReply::new(ErrorCode::Cancelled, "the client takes no more of the file");
            self.fail(&error, sessions);
        }
    }

    /// Ends the call if it is over.
    pub fn settle(&mut self, now: Instant, sessions: &mut Sessions) -> State {
        if let Job::Process(process) = &mut self.job {
            let next = process.check_time(now);
            return match process.is_over(&self.pipes, now) {
                Err(at) => State::Goes(crate::sessions::earlier(at, next)),
                // Nobody has it: it stays to be asked for.
                Ok(()) if self.at.is_none() && process.keep => State::Goes(None),
                Ok(()) => {
                    if let Some(at) = self.at {
                        for output in Output::BOTH {
                            sessions.output_ended(at, output);
                        }
                        sessions.settle(at, process.report());
                    }
                    State::Over
                }
            };
        }
        let Some(at) = self.at else {
            return State::Over;
        };
        match &mut self.job {
            Job::Work(work) if !self.pipes.has_outputs() => match work.result.take() {
                Some(result) => {
                    sessions.settle(at, result);
                    State::Over
                }
                None => State::Goes(None),
            },
            Job::Download { bytes } if !self.pipes.has_outputs() => {
                let reply = Transferred {
                    bytes: *bytes,
                    entries: 1,
                };
                sessions.reply(at, &reply);
                State::Over
            }
            Job::Upload(upload) if self.pipes.input_is_over() => {
                let result = match self.pipes.failure {
                    Some(error) => Err(write_failed(error)),
                    None => upload.finish(),
                };
                sessions.settle(at, result);
                State::Over
            }
            Job::Swap(_) if let Some(error) = self.pipes.failure => {
                sessions.fail(at, &Incoming::not_written(error));
                State::Over
            }
            // The server does it.
            Job::Swap(incoming) => State::Goes(incoming.until),
            Job::Port {
                dial: None,
                received,
            } if !self.pipes.has_outputs() && self.pipes.input_is_over() => {
                let reply = Transferred {
                    bytes: *received + self.pipes.written,
                    entries: 0,
                };
                sessions.reply(at, &reply);
                State::Over
            }
            _ => State::Goes(None),
        }
    }
}

fn write_failed(error: Errno) -> ErrorReply {
    let code = match error {
        Errno::NOSPC | Errno::DQUOT | Errno::FBIG => ErrorCode::NoSpace,
        _ => ErrorCode::Failed,
    };
    ErrorReply::new(code, format!("cannot write the file: {error}"))
}
