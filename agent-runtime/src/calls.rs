//! What each call does: at once, as a task of the loop, or as work on a thread.

use std::os::fd::OwnedFd;

use ratoon_protocol::{
    AttachParams, Call, ErrorCode, ErrorReply, Event, ExecParams, Pong, ResizeParams, SignalParams,
    Target,
};
use rustix::io::Errno;

use crate::files::{self, Upload};
use crate::pipes::{Medium, Pipes};
use crate::process::Process;
use crate::server::{Server, find};
use crate::session::Output;
use crate::sessions::CallRef;
use crate::spawn::set_size;
use crate::swap::Incoming;
use crate::sys;
use crate::system;
use crate::task::{Job, Task, Working};
use crate::work::Work;

/// How many processes, transfers and so on go on at once, of all clients.
const MAX_TASKS: usize = 1024;

impl Server {
    /// Begins a call.
    pub(crate) fn begin(&mut self, at: CallRef, request: Call) {
        if self.ending.is_some() && !matches!(request, Call::Ping) {
            let error = ErrorReply::new(ErrorCode::Failed, "the machine is shutting down");
            return self.sessions.fail(at, &error);
        }
        let result = quiet_enough(&request).and_then(|()| self.carry_out(at, request));
        if let Err(error) = result {
            self.sessions.fail(at, &error);
        }
    }

    fn carry_out(&mut self, at: CallRef, request: Call) -> Result<(), ErrorReply> {
        let method = request.method();
        match request {
            Call::Ping => self.sessions.reply(
                at,
                &Pong {
                    uptime_us: sys::boot_time_us(),
                },
            ),
            // The server has taken it before.
            Call::Session(_) => {}
            Call::SessionEnd => {
                self.sessions.end(at);
                self.abandon(at.session);
            }
            Call::Exec(params) => self.exec(at, *params)?,
            Call::Attach(params) => self.attach(at, params)?,
            Call::Signal(params) => self.signal(at, params)?,
            Call::Resize(params) => self.resize(at, params)?,
            Call::Processes => {
                let mut all = Vec::new();
                for task in &mut self.tasks {
                    let attached = task.at.is_some();
                    all.extend(task.process().map(|process| process.info(attached)));
                }
                self.sessions.reply(at, &all);
            }
            Call::FileRead(params) => {
                let download = files::open_read(&params)?;
                let mut pipes = Pipes::default();
                let fd = OwnedFd::from(download.file);
                pipes.set_output(Output::Stdout, fd, Medium::File, download.left);
                self.add_task(at, pipes, Job::Download { bytes: 0 })?;
            }
            Call::FileWrite(params) => {
                let upload = Upload::begin(&params)?;
                let fd = rustix::io::fcntl_dupfd_cloexec(upload.file(), 3)
                    .map_err(|error| short_of("descriptors", error))?;
                let mut pipes = Pipes::default();
                pipes.set_input(fd, Medium::File);
                self.add_task(at, pipes, Job::Upload(upload))?;
            }
            Call::FileStat(params) => self.sessions.reply(at, &files::stat(&params)?),
            Call::FileMkdir(params) => self.sessions.reply(at, &files::mkdir(&params)?),
            Call::FileRename(params) => self.sessions.reply(at, &files::rename(&params)?),
            Call::FileList(params) => self.work(at, method, files::list(params), false)?,
            Call::FileRemove(params) => self.work(at, method, files::remove(params), false)?,
            Call::FileCopy(params) => self.work(at, method, files::copy(params), false)?,
            Call::FileWatch(params) => self.work(at, method, files::watch(params), false)?,
            Call::TreePack(params) => self.work(at, method, files::pack(params), false)?,
            Call::TreeUnpack(params) => self.work(at, method, files::unpack(params), true)?,
            Call::CodeStart(params) => {
                let Self {
                    contexts,
                    spawner,
                    sessions,
                    ..
                } = self;
                contexts.start(at, params, spawner, sessions)?;
            }
            Call::CodeRun(params) => {
                let Self {
                    contexts,
                    spawner,
                    sessions,
                    ..
                } = self;
                contexts.run(at, params, spawner, sessions)?;
            }
            Call::CodeInterrupt(params) => {
                self.contexts.interrupt(at, &params, &mut self.sessions)?
            }
            Call::CodeRestart(params) => {
                let Self {
                    contexts,
                    spawner,
                    sessions,
                    ..
                } = self;
                contexts.restart(at, &params, spawner, sessions)?;
            }
            Call::CodeStop(params) => self.contexts.stop(at, &params, &mut self.sessions)?,
            Call::CodeList => {
                let list = self.contexts.list();
                self.sessions.reply(at, &list);
            }
            Call::PortConnect(params) => {
                let dial = system::connect(&params)?;
                let job = Job::Port {
                    dial: Some(dial),
                    received: 0,
                };
                self.add_task(at, Pipes::default(), job)?;
            }
            Call::PortList => self.sessions.reply(at, &system::ports()?),
            Call::Metrics(params) => self.sessions.reply(at, &system::metrics(&params)?),
            Call::TimeSet(params) => self.sessions.reply(at, &system::set_time(&params)?),
            Call::EntropyAdd(params) => self.sessions.reply(at, &system::add_entropy(&params)?),
            Call::HostnameSet(params) => self.sessions.reply(at, &system::set_hostname(&params)?),
            Call::NetworkSet(params) => self.sessions.reply(at, &system::set_network(&params)?),
            Call::Sync => self.work(at, method, system::sync(), false)?,
            Call::Freeze(params) => {
                self.spawner.prepare();
                self.work(at, method, system::freeze(params), false)?;
            }
            Call::Thaw(params) => self.work(at, method, system::thaw(params), false)?,
            Call::ExpectWake => {
                self.identity.expect_wake()?;
                self.sessions.reply(at, &());
            }
            Call::Wake(params) => {
                let awake = self.identity.wake(&params)?;
                self.spawner.set_child(self.identity.child());
                let thaw = params
                    .thaw
                    .then(|| system::Thaw::ready(self.identity.switch()));
                let thaw = match thaw.transpose() {
                    Ok(thaw) => thaw,
                    Err(error) => {
                        // It is not awake before its processes are.
                        self.identity.wait_on();
                        return Err(error);
                    }
                };
                // Processes want the processor as soon as they are told something or go on: the client is not to
                // wait for them.
                self.sessions.reply_now(at, &awake);
                self.contexts.reseed();
                if let Some(Err(error)) = thaw.map(system::Thaw::go) {
                    eprintln!("ratoon-runtime: it is not awake: {}", error.message);
                    self.identity.wait_on();
                }
            }
            Call::Whoami => {
                let awake = self.identity.whoami();
                self.sessions.reply(at, &awake);
            }
            Call::RuntimeSwap(params) => {
                if self
                    .tasks
                    .iter()
                    .any(|task| matches!(task.job, Job::Swap(_)))
                {
                    let message = "another runtime is on its way";
                    return Err(ErrorReply::new(ErrorCode::Busy, message));
                }
                let (incoming, fd) = Incoming::begin(&params)?;
                let mut pipes = Pipes::default();
                pipes.set_input(fd, Medium::File);
                self.add_task(at, pipes, Job::Swap(incoming))?;
            }
            Call::Shutdown => self.begin_ending(at),
        }
        Ok(())
    }

    fn add_task(&mut self, at: CallRef, pipes: Pipes, job: Job) -> Result<(), ErrorReply> {
        if self.tasks.len() >= MAX_TASKS {
            let message = format!("{MAX_TASKS} calls go on in this machine; wait for one");
            return Err(ErrorReply::new(ErrorCode::TooManyCalls, message));
        }
        self.tasks.push(Task {
            at: Some(at),
            pipes,
            job,
        });
        Ok(())
    }

    fn work(
        &mut self,
        at: CallRef,
        method: &'static str,
        work: Work,
        takes_input: bool,
    ) -> Result<(), ErrorReply> {
        let started = self.office.start(work, takes_input).map_err(|error| {
            ErrorReply::new(
                ErrorCode::NoSpace,
                format!("no thread for the call: {error}"),
            )
        })?;
        let mut pipes = Pipes::default();
        if let Some(input) = started.input {
            pipes.set_input(input, Medium::Pipe);
        }
        pipes.set_output(Output::Stdout, started.output, Medium::Pipe, None);
        let job = Job::Work(Working {
            method,
            number: started.number,
            result: None,
        });
        self.add_task(at, pipes, job)
    }

    fn exec(&mut self, at: CallRef, mut params: ExecParams) -> Result<(), ErrorReply> {
        if self.tasks.len() >= MAX_TASKS {
            let message = format!("{MAX_TASKS} calls go on in this machine; wait for one");
            return Err(ErrorReply::new(ErrorCode::TooManyCalls, message));
        }
        params.stdin |= params.pty.is_some();
        let child = self.spawner.spawn(&params).map_err(|error| error.reply())?;
        self.sessions.event(at, &Event::Started { pid: child.pid });
        let (process, pipes) = Process::new(child, params);
        self.add_task(at, pipes, Job::Process(Box::new(process)))
    }

    fn attach(&mut self, at: CallRef, params: AttachParams) -> Result<(), ErrorReply> {
        let task = by_pid(&mut self.tasks, params.pid)?;
        let previous = task.at.replace(at);
        if let Some(process) = task.process() {
            let event = process.attach(params.have);
            self.sessions.event_now(at, &event);
        }
        if !task.pipes.has_input() {
            self.sessions.stdin_closed(at);
        }
        if let Some(previous) = previous {
            let error = ErrorReply::new(ErrorCode::TakenOver, "another client has the process now");
            self.sessions.fail(previous, &error);
        }
        Ok(())
    }

    fn target(&mut self, at: CallRef, target: Target) -> Result<&mut Task, ErrorReply> {
        match (target.call, target.pid) {
            (Some(call), None) => find(&mut self.tasks, CallRef { call, ..at }).ok_or_else(|| {
                let message = format!("no exec call {call} is open on this connection");
                ErrorReply::new(ErrorCode::NotFound, message)
            }),
            (None, Some(pid)) => by_pid(&mut self.tasks, pid),
            _ => {
                let message = "name either a call or a pid";
                Err(ErrorReply::new(ErrorCode::BadRequest, message))
            }
        }
    }

    fn signal(&mut self, at: CallRef, params: SignalParams) -> Result<(), ErrorReply> {
        let signal = params.signal;
        if !(1..=64).contains(&signal) {
            let message = format!("signal {signal} is not 1 to 64");
            return Err(ErrorReply::new(ErrorCode::BadRequest, message));
        }
        let task = self.target(at, params.target)?;
        let result = task
            .process()
            .map_or(Err(Errno::SRCH), |process| process.signal(signal));
        result.map_err(|error| {
            let code = match error {
                Errno::SRCH => ErrorCode::NotFound,
                _ => ErrorCode::Failed,
            };
            ErrorReply::new(code, format!("signal {signal}: {error}"))
        })?;
        self.sessions.reply(at, &());
        Ok(())
    }

    fn resize(&mut self, at: CallRef, params: ResizeParams) -> Result<(), ErrorReply> {
        let task = self.target(at, params.target)?;
        let has_terminal = task.process().is_some_and(|process| process.has_terminal());
        let terminal = task.pipes.any().filter(|_| has_terminal).ok_or_else(|| {
            ErrorReply::new(
                ErrorCode::BadRequest,
                "the process has no terminal (any more)",
            )
        })?;
        set_size(terminal, params.size).map_err(|error| {
            ErrorReply::new(ErrorCode::Failed, format!("cannot set the size: {error}"))
        })?;
        self.sessions.reply(at, &());
        Ok(())
    }
}

/// Whether it may start a program.
pub(crate) fn starts_a_program(request: &Call) -> bool {
    matches!(
        request,
        Call::Exec(_) | Call::CodeStart(_) | Call::CodeRun(_) | Call::CodeRestart(_)
    )
}

/// While processes are frozen, one that is started would be frozen before it has executed its program, and
/// we would wait for it; while the disk is frozen, who writes to it waits. Neither must happen to the loop,
/// which is to hear of `thaw`.
fn quiet_enough(request: &Call) -> Result<(), ErrorReply> {
    let starts = starts_a_program(request);
    let writes = matches!(
        request,
        Call::FileWrite(_) | Call::FileMkdir(_) | Call::FileRename(_)
    );
    let frozen = if starts && system::are_processes_frozen() {
        "processes are"
    } else if (starts || writes) && system::are_file_systems_frozen() {
        "file system is"
    } else {
        return Ok(());
    };
    let message = format!("the machine's {frozen} frozen: `thaw` first");
    Err(ErrorReply::new(ErrorCode::Busy, message))
}

fn by_pid(tasks: &mut [Task], pid: i32) -> Result<&mut Task, ErrorReply> {
    tasks
        .iter_mut()
        .find(|task| matches!(&task.job, Job::Process(process) if process.pid == pid))
        .ok_or_else(|| {
            let message = format!("no process {pid} of an exec call is there (any more)");
            ErrorReply::new(ErrorCode::NotFound, message)
        })
}

fn short_of(what: &str, error: Errno) -> ErrorReply {
    ErrorReply::new(ErrorCode::NoSpace, format!("short of {what}: {error}"))
}
