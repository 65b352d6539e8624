//! The poll loop: sockets, processes, timers. One thread; nothing in it waits except `poll`.
//!
//! A round: poll; take what clients sent and do it; read outputs, write inputs; reap; end calls
//! that are over; send. SIGCHLD comes through a signalfd that stands before the pipes in the poll
//! set, so that a round that sees a death sees the pipe's end too. Reaping is `waitpid(-1)`, here
//! and nowhere else (orphans of others come to PID 1 as well); processes are in the table before
//! the loop can reap them.
//!
//! What is not urgent (a process has started, an output is at its end) waits up to [`LAZY`] for
//! company: a system call costs much on some hosts, and most commands end sooner.
//!
//! How it fails: a connection that breaks is closed and its processes are killed, group by group;
//! connections not from the host are refused; when descriptors run out, accepting pauses.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use ratoon_protocol::{ErrorCode, ErrorReply, ExitStatus, MAX_PAYLOAD_LEN};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use rustix::process::{Signal, WaitOptions};

use crate::power;
use crate::process::Process;
use crate::session::{Action, Output, Session};
use crate::spawn::Spawner;
use crate::sys::{self, PollFd, poll_fd};

/// How long a frame that is not urgent may wait.
pub const LAZY: Duration = Duration::from_millis(250);

/// How many connections are served at once.
pub const MAX_CONNECTIONS: usize = 64;

/// How long accepting pauses when descriptors or memory run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(500);

struct Connection {
    fd: OwnedFd,
    session: Session,
    /// Whether connect(2) is decided.
    connected: bool,
    /// When unsent frames that are not urgent go out.
    flush_at: Option<Instant>,
    /// Send what is unsent, then close.
    closing: bool,
    /// The socket takes no more for now.
    blocked: bool,
}

/// The machine is ending: who asked, and how far it is.
struct Ending {
    connection: u64,
    call: u64,
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
    listener: OwnedFd,
    signals: OwnedFd,
    spawner: Spawner,
    is_machine: bool,
    ready_at_us: u64,
    connections: BTreeMap<u64, Connection>,
    next_connection: u64,
    processes: Vec<Process>,
    ending: Option<Ending>,
    accept_again: Option<Instant>,
    scratch: Vec<u8>,
    polls: Vec<PollFd>,
    tokens: Vec<Token>,
}

/// What a poll entry is about. Processes are meant by place: the table changes only between polls.
#[derive(Debug, Clone, Copy)]
enum Token {
    Signals,
    Listener,
    Connection(u64),
    Stdin(usize),
    Output(usize, Output),
}

impl Server {
    /// A server on a listening, non-blocking socket. `signals` is from [`sys::block_signals`],
    /// `null` is /dev/null. `is_machine`: this is PID 1 and `shutdown` ends the machine; otherwise
    /// it ends [`Server::run`].
    pub fn new(listener: OwnedFd, signals: OwnedFd, null: OwnedFd, is_machine: bool) -> Self {
        Self {
            listener,
            signals,
            spawner: Spawner::new(null),
            is_machine,
            ready_at_us: sys::boot_time_us(),
            connections: BTreeMap::new(),
            next_connection: 0,
            processes: Vec::new(),
            ending: None,
            accept_again: None,
            scratch: vec![0; MAX_PAYLOAD_LEN],
            polls: Vec::new(),
            tokens: Vec::new(),
        }
    }

    /// Serves a connection that was made, or is being made, elsewhere.
    pub fn add(&mut self, fd: OwnedFd, connected: bool) {
        let connection = Connection {
            fd,
            session: Session::new(self.ready_at_us),
            connected,
            flush_at: None,
            closing: false,
            blocked: false,
        };
        self.connections.insert(self.next_connection, connection);
        self.next_connection += 1;
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
            let deadline = self.settle(now);
            self.prepare_poll(now);
            let timeout = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            sys::poll(&mut self.polls, timeout)?;
            self.handle_polled();
        }
    }

    fn prepare_poll(&mut self, now: Instant) {
        self.polls.clear();
        self.tokens.clear();
        let mut add = |fd, events, token| {
            self.polls.push(poll_fd(fd, events));
            self.tokens.push(token);
        };
        add(self.signals.as_raw_fd(), libc::POLLIN, Token::Signals);
        if self.accept_again.is_none_or(|at| now >= at) && self.connections.len() < MAX_CONNECTIONS
        {
            add(self.listener.as_raw_fd(), libc::POLLIN, Token::Listener);
        }
        for (&id, connection) in &self.connections {
            let mut events = 0;
            if !connection.connected || connection.blocked {
                events |= libc::POLLOUT;
            }
            if connection.connected && !connection.closing && connection.session.wants_input() {
                events |= libc::POLLIN;
            }
            add(connection.fd.as_raw_fd(), events, Token::Connection(id));
        }
        for (index, process) in self.processes.iter().enumerate() {
            let Some(connection) = process.connection.and_then(|id| self.connections.get(&id))
            else {
                continue;
            };
            if let Some((fd, events)) = process.stdin_poll() {
                add(fd, events, Token::Stdin(index));
            }
            for output in Output::BOTH {
                if let Some(fd) = process.output_poll(output, &connection.session) {
                    add(fd, libc::POLLIN, Token::Output(index, output));
                }
            }
        }
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
                Token::Stdin(index) => self.stdin_ready(index, revents),
                Token::Output(index, output) => {
                    self.output_ready(index, output, revents & libc::POLLIN != 0);
                }
                Token::Connection(id) => self.connection_ready(id, revents),
                Token::Listener => self.accept(),
                Token::Signals => died = true,
            }
        }
        if died {
            self.reap();
        }
    }

    fn stdin_ready(&mut self, index: usize, revents: i16) {
        let Some(process) = self.processes.get_mut(index) else {
            return;
        };
        let Some(connection) = process
            .connection
            .and_then(|id| self.connections.get_mut(&id))
        else {
            return;
        };
        if revents & libc::POLLERR != 0 {
            process.close_stdin(&mut connection.session);
        } else {
            process.write_stdin(&mut connection.session);
        }
    }

    fn output_ready(&mut self, index: usize, output: Output, readable: bool) {
        let Some(process) = self.processes.get_mut(index) else {
            return;
        };
        if let Some(connection) = process
            .connection
            .and_then(|id| self.connections.get_mut(&id))
        {
            process.read_output(output, readable, &mut self.scratch, &mut connection.session);
        }
    }

    fn connection_ready(&mut self, id: u64, revents: i16) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        if !connection.connected {
            connection.connected = true;
            if revents & (libc::POLLERR | libc::POLLHUP) != 0 {
                eprintln!(
                    "ratoon-runtime: the host does not take the control connection; waiting for it to connect"
                );
                self.connections.remove(&id);
                return;
            }
        }
        connection.blocked &= revents & libc::POLLOUT == 0;
        if revents & libc::POLLIN != 0 {
            match rustix::net::recv(&connection.fd, &mut self.scratch[..], RecvFlags::DONTWAIT) {
                Ok((len, _)) if len > 0 => self.received(id, len),
                Err(Errno::AGAIN | Errno::INTR) => {}
                _ => self.lose(id),
            }
        } else if revents & (libc::POLLERR | libc::POLLHUP | libc::POLLNVAL) != 0 {
            self.lose(id);
        }
    }

    fn received(&mut self, id: u64, len: usize) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let mut actions = Vec::new();
        let result = connection
            .session
            .receive(&self.scratch[..len], &mut actions);
        connection.closing |= result.is_err();
        for action in actions {
            self.act(id, action);
        }
        if let Err(violation) = result {
            eprintln!("ratoon-runtime: a client breaks the protocol, closing: {violation}");
            if let Some(connection) = self.connections.get_mut(&id) {
                connection.session.close(&violation);
            }
            self.abandon_processes(id);
        }
    }

    fn act(&mut self, id: u64, action: Action) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let session = &mut connection.session;
        match action {
            Action::Ping { call } => session.pong(call, sys::boot_time_us()),
            Action::Start { call, params } => {
                if self.ending.is_some() {
                    let error = ErrorReply::new(ErrorCode::Failed, "the machine is shutting down");
                    return session.refused(call, &error);
                }
                match self.spawner.spawn(&params) {
                    Ok(child) => {
                        session.started(call, child.pid);
                        self.processes.push(Process::new(child, id, call));
                    }
                    Err(error) => session.refused(call, &error.reply()),
                }
            }
            Action::Signal {
                call,
                target,
                signal,
            } => {
                let result = find(&mut self.processes, id, target)
                    .filter(|process| process.status.is_none())
                    .map_or(Err(Errno::SRCH), |process| process.signal(signal));
                match result {
                    Ok(()) => session.done(call),
                    Err(error) => {
                        let code = match error {
                            Errno::SRCH => ErrorCode::NotFound,
                            _ => ErrorCode::Failed,
                        };
                        let message = format!("signal {signal} to call {target}: {error}");
                        session.refused(call, &ErrorReply::new(code, message));
                    }
                }
            }
            Action::Shutdown { call } if self.ending.is_some() => {
                let error = ErrorReply::new(ErrorCode::Failed, "the machine is shutting down");
                session.refused(call, &error);
            }
            Action::Shutdown { call } => self.begin_ending(id, call),
            Action::Stdin { call, bytes, end } => {
                if let Some(process) = find(&mut self.processes, id, call) {
                    process.queue_stdin(&bytes, end, session);
                }
            }
            Action::StopOutput { call, output } => {
                if let Some(process) = find(&mut self.processes, id, call) {
                    process.stop_output(output, session);
                }
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

    /// The connection is gone: so are its processes. (A later protocol will let calls outlive it.)
    fn lose(&mut self, id: u64) {
        self.connections.remove(&id);
        self.abandon_processes(id);
    }

    fn abandon_processes(&mut self, id: u64) {
        for process in &mut self.processes {
            if process.connection == Some(id) {
                process.abandon();
            }
        }
    }

    /// Takes away every dead child; true when there is no child at all any more.
    fn reap(&mut self) -> bool {
        let mut signal = [0; size_of::<libc::signalfd_siginfo>()];
        let _ = rustix::io::read(&self.signals, &mut signal);
        loop {
            let (pid, status) = match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some(dead)) => dead,
                Ok(None) => return false,
                Err(error) => return error == Errno::CHILD,
            };
            let pid = pid.as_raw_nonzero().get();
            let status = match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => ExitStatus::Code(code),
                (None, Some(signal)) => ExitStatus::Signal(signal),
                (None, None) => continue,
            };
            let ours = self.processes.iter_mut();
            for process in ours.filter(|process| process.pid == pid && process.status.is_none()) {
                process.status = Some(status);
            }
        }
    }

    /// Ends calls that are over, sends what is due; returns when to look again.
    fn settle(&mut self, now: Instant) -> Option<Instant> {
        let mut deadline = self.ending.as_ref().map(|ending| ending.until);
        let mut earlier = |at: Option<Instant>| {
            deadline = match (deadline, at) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            }
        };
        self.processes.retain_mut(|process| {
            let connection = process
                .connection
                .and_then(|id| self.connections.get_mut(&id));
            let Some(connection) = connection else {
                return process.status.is_none();
            };
            match (process.is_over(now), process.status) {
                (Ok(()), Some(status)) => {
                    connection.session.ended(process.call, status);
                    false
                }
                (Err(at), _) => {
                    earlier(at);
                    true
                }
                (Ok(()), None) => true,
            }
        });
        let mut lost = Vec::new();
        for (&id, connection) in &mut self.connections {
            match connection.flush(now) {
                Ok(at) if connection.closing && connection.session.unsent().is_empty() => {
                    debug_assert!(at.is_none());
                    lost.push(id);
                }
                Ok(at) => earlier(at),
                Err(_) => lost.push(id),
            }
        }
        for id in lost {
            self.lose(id);
        }
        if self.accept_again.is_some_and(|at| now >= at) {
            self.accept_again = None;
        }
        earlier(self.accept_again);
        deadline
    }

    fn begin_ending(&mut self, connection: u64, call: u64) {
        self.ending = Some(Ending {
            connection,
            call,
            stage: Stage::Terminating,
            until: Instant::now() + power::TERM_GRACE,
        });
        self.signal_everything(Signal::TERM);
    }

    fn signal_everything(&mut self, signal: Signal) {
        if self.is_machine {
            power::signal_all(signal);
        } else {
            let alive = self
                .processes
                .iter()
                .filter(|process| process.status.is_none());
            for process in alive {
                let _ = process.signal(signal.as_raw());
            }
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
                if let Some(connection) = self.connections.get_mut(&ending.connection) {
                    connection.session.done(ending.call);
                }
            }
            Stage::Lingering => return due || !self.connections.contains_key(&ending.connection),
            _ => {}
        }
        false
    }
}

impl Connection {
    /// Sends what is due; returns when what is left is.
    fn flush(&mut self, now: Instant) -> rustix::io::Result<Option<Instant>> {
        if !self.connected || self.blocked || self.session.unsent().is_empty() {
            return Ok(None);
        }
        if !self.session.is_urgent() && !self.closing {
            let at = *self.flush_at.get_or_insert(now + LAZY);
            if now < at {
                return Ok(Some(at));
            }
        }
        self.flush_at = None;
        while !self.session.unsent().is_empty() {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match rustix::net::send(&self.fd, self.session.unsent(), flags) {
                Ok(len) => self.session.sent(len),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.blocked = true;
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }
}

fn find(processes: &mut [Process], connection: u64, call: u64) -> Option<&mut Process> {
    processes
        .iter_mut()
        .find(|process| process.connection == Some(connection) && process.call == call)
}
