//! All clients: their sessions, and the sockets over which they are reached.
//!
//! A session that has a name stays when its socket is lost, for as long as its client asked; its
//! tasks wait then, as with a client that does not read. All others end with their connection.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use ratoon_protocol::{ErrorCode, ErrorReply, Event, SessionParams, SessionReply};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use serde::Serialize;

use crate::session::{Action, Output, Session, Violation};
use crate::swap::forms::{Fd, carried};

/// How long a frame that is not urgent may wait.
pub const LAZY: Duration = Duration::from_millis(250);

/// How many connections are served at once.
pub const MAX_CONNECTIONS: usize = 64;

/// How long a session waits for its client unless that said otherwise, and at most.
const LINGER: Duration = Duration::from_secs(60);
const MAX_LINGER: Duration = Duration::from_secs(24 * 60 * 60);

/// Which call, of which session. Sessions are numbered by the server; numbers are not used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct CallRef {
    /// The session's number.
    pub session: u64,
    /// The client's id of the call.
    pub call: u64,
}

struct Socket {
    fd: Fd,
    /// Whether connect(2) is decided.
    connected: bool,
    /// When unsent frames that are not urgent go out.
    flush_at: Option<Instant>,
    /// Send what is unsent, then close.
    closing: bool,
    /// The socket takes no more for now.
    blocked: bool,
}

struct Client {
    session: Session,
    socket: Option<Socket>,
    name: Option<String>,
    linger: Duration,
    /// When a session without a socket ends.
    ends_at: Option<Instant>,
}

carried!(CallRef { session, call });
carried!(Socket {
    fd,
    connected,
    flush_at,
    closing,
    blocked
});
carried!(Client {
    session,
    socket,
    name,
    linger,
    ends_at
});
carried!(Sessions {
    clients,
    next,
    ready_at_us
});

/// What became of a socket that was ready.
pub enum Heard {
    /// Nothing to do.
    Nothing,
    /// The session has ended: so do its tasks.
    Gone,
    /// Do this; `broken`: the client broke the protocol after that, its tasks end.
    Actions {
        /// In order.
        actions: Vec<Action>,
        /// The rule that was broken.
        broken: Option<Violation>,
    },
}

/// All clients. See the module.
pub struct Sessions {
    clients: BTreeMap<u64, Client>,
    next: u64,
    ready_at_us: u64,
}

impl Sessions {
    /// None yet. `ready_at_us` is CLOCK_BOOTTIME when the runtime began to serve.
    pub fn new(ready_at_us: u64) -> Self {
        Self {
            clients: BTreeMap::new(),
            next: 0,
            ready_at_us,
        }
    }

    /// Serves a connection that was made, or is being made, elsewhere.
    pub fn add(&mut self, fd: OwnedFd, connected: bool) {
        let socket = Socket {
            fd: fd.into(),
            connected,
            flush_at: None,
            closing: false,
            blocked: false,
        };
        let client = Client {
            session: Session::new(self.ready_at_us),
            socket: Some(socket),
            name: None,
            linger: LINGER,
            ends_at: None,
        };
        self.clients.insert(self.next, client);
        self.next += 1;
    }

    /// How many bytes are held for clients.
    pub fn held(&self) -> usize {
        let sessions = self.clients.values().map(|client| client.session.held());
        sessions.sum()
    }

    /// Whether what was read can be what sessions were.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self) -> Result<(), &'static str> {
        if self.clients.keys().any(|&id| id >= self.next) {
            return Err("a session has a number that was not given");
        }
        let mut clients = self.clients.values();
        clients.try_for_each(|client| client.session.check())
    }

    /// Whether one more connection is welcome.
    pub fn has_room(&self) -> bool {
        self.clients.len() < MAX_CONNECTIONS
    }

    /// Whether the session is there, with or without a client.
    pub fn contains(&self, id: u64) -> bool {
        self.clients.contains_key(&id)
    }

    /// Tells the descriptors to poll, with the session's number.
    pub fn poll(&self, mut add: impl FnMut(i32, i16, u64)) {
        for (&id, client) in &self.clients {
            let Some(socket) = &client.socket else {
                continue;
            };
            let mut events = 0;
            if !socket.connected || socket.blocked {
                events |= libc::POLLOUT;
            }
            if socket.connected && !socket.closing && client.session.wants_input() {
                events |= libc::POLLIN;
            }
            add(socket.fd.as_raw_fd(), events, id);
        }
    }

    /// Poll said something of a session's socket. `scratch` is for what is read.
    pub fn ready(&mut self, id: u64, revents: i16, scratch: &mut [u8]) -> Heard {
        let Some(client) = self.clients.get_mut(&id) else {
            return Heard::Nothing;
        };
        let Some(socket) = &mut client.socket else {
            return Heard::Nothing;
        };
        if !socket.connected {
            socket.connected = true;
            if revents & (libc::POLLERR | libc::POLLHUP) != 0 {
                eprintln!(
                    "ratoon-runtime: the host does not take the control connection; waiting for it to connect"
                );
                return self.lose(id);
            }
        }
        socket.blocked &= revents & libc::POLLOUT == 0;
        if revents & libc::POLLIN != 0 {
            match rustix::net::recv(&socket.fd, &mut *scratch, RecvFlags::DONTWAIT) {
                Ok((len, _)) if len > 0 => {
                    let mut actions = Vec::new();
                    let broken = client.session.receive(&scratch[..len], &mut actions).err();
                    Heard::Actions { actions, broken }
                }
                Err(Errno::AGAIN | Errno::INTR) => Heard::Nothing,
                _ => self.lose(id),
            }
        } else if revents & (libc::POLLERR | libc::POLLHUP | libc::POLLNVAL) != 0 {
            self.lose(id)
        } else {
            Heard::Nothing
        }
    }

    /// The client broke the protocol: tells it why; the connection closes when that is sent, and
    /// the session does not outlive it.
    pub fn close(&mut self, id: u64, violation: &Violation) {
        eprintln!("ratoon-runtime: a client breaks the protocol, closing: {violation}");
        if let Some(client) = self.clients.get_mut(&id) {
            client.session.close(violation);
        }
        self.hang_up(id);
    }

    /// A socket is lost.
    fn lose(&mut self, id: u64) -> Heard {
        match self.clients.get_mut(&id) {
            Some(client) if client.name.is_some() => {
                client.socket = None;
                client.session.detach();
                client.ends_at = Some(Instant::now() + client.linger);
                Heard::Nothing
            }
            _ => {
                self.clients.remove(&id);
                Heard::Gone
            }
        }
    }

    /// Carries out a `session` call: names the session `at`, or gives its connection to the one that
    /// has that name. What the connection sent after the call may then be taken by [`Sessions::pending`].
    pub fn name(&mut self, at: CallRef, params: &SessionParams) -> Option<u64> {
        let id = params.id.as_str();
        let fits = (16..=64).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic());
        if !fits {
            let message = "a session's id is 16 to 64 printable ASCII characters";
            self.break_off(at, &ErrorReply::new(ErrorCode::BadRequest, message));
            return None;
        }
        let linger = params
            .linger_ms
            .map_or(LINGER, Duration::from_millis)
            .min(MAX_LINGER);
        let known = self
            .clients
            .iter()
            .find(|(_, client)| client.name.as_deref() == Some(id))
            .map(|(&known, _)| known);
        let Some(known) = known else {
            let client = self.clients.get_mut(&at.session)?;
            client.session.name();
            client.name = Some(id.to_owned());
            client.linger = linger;
            client.session.reply(at.call, &SessionReply::default());
            return Some(at.session);
        };
        let mut newcomer = self.clients.remove(&at.session)?;
        let client = self.clients.get_mut(&known)?;
        match client
            .session
            .resume(&mut newcomer.session, at.call, &params.have)
        {
            Ok(calls) => {
                // Its old socket, if any, is closed: there is one client.
                client.socket = newcomer.socket;
                client.ends_at = None;
                client.linger = linger;
                let reply = SessionReply {
                    resumed: true,
                    calls,
                };
                client.session.reply(at.call, &reply);
                client.session.say_again();
                Some(known)
            }
            Err(violation) => {
                self.clients.insert(at.session, newcomer);
                self.close(at.session, &violation);
                None
            }
        }
    }

    fn break_off(&mut self, at: CallRef, error: &ErrorReply) {
        self.fail(at, error);
        self.hang_up(at.session);
    }

    /// Closes the connection when what is unsent has gone out; the session does not outlive it.
    fn hang_up(&mut self, id: u64) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.name = None;
            if let Some(socket) = &mut client.socket {
                socket.closing = true;
            }
        }
    }

    /// Carries out a `session.end` call.
    pub fn end(&mut self, at: CallRef) {
        self.reply(at, &());
        self.hang_up(at.session);
    }

    /// What a connection has sent behind its `session` call.
    pub fn pending(&mut self, id: u64) -> Heard {
        let Some(client) = self.clients.get_mut(&id) else {
            return Heard::Nothing;
        };
        let mut actions = Vec::new();
        let broken = client.session.receive(&[], &mut actions).err();
        Heard::Actions { actions, broken }
    }

    /// Sends what is due; appends sessions that have ended. Returns when to come again.
    pub fn flush(&mut self, now: Instant, gone: &mut Vec<u64>) -> Option<Instant> {
        let mut next: Option<Instant> = None;
        let mut lost = Vec::new();
        for (&id, client) in &mut self.clients {
            let at = match &mut client.socket {
                None => {
                    if client.ends_at.is_some_and(|at| now >= at) {
                        client.name = None;
                        lost.push(id);
                    }
                    client.ends_at
                }
                Some(socket) => match socket.flush(&mut client.session, now) {
                    Ok(_) if socket.closing && client.session.unsent().is_empty() => {
                        lost.push(id);
                        None
                    }
                    Ok(at) => at,
                    Err(_) => {
                        lost.push(id);
                        None
                    }
                },
            };
            next = earlier(next, at);
        }
        for id in lost {
            match self.lose(id) {
                Heard::Gone => gone.push(id),
                _ => {
                    next = earlier(
                        next,
                        self.clients.get(&id).and_then(|client| client.ends_at),
                    )
                }
            }
        }
        next
    }

    fn with(&mut self, at: CallRef, change: impl FnOnce(&mut Session)) {
        if let Some(client) = self.clients.get_mut(&at.session) {
            change(&mut client.session);
        }
    }

    /// How many bytes of an output may be framed now; 0 while there is no client.
    pub fn room(&self, at: CallRef, output: Output) -> usize {
        match self.clients.get(&at.session) {
            Some(client) if client.socket.is_some() => client.session.room(at.call, output),
            _ => 0,
        }
    }

    /// See [`Session::output`].
    pub fn output(&mut self, at: CallRef, output: Output, bytes: &[u8]) {
        self.with(at, |session| session.output(at.call, output, bytes));
    }

    /// See [`Session::output_ended`].
    pub fn output_ended(&mut self, at: CallRef, output: Output) {
        self.with(at, |session| session.output_ended(at.call, output));
    }

    /// As [`Sessions::output_ended`], and says so at once: the call goes on.
    pub fn output_ended_now(&mut self, at: CallRef, output: Output) {
        self.with(at, |session| {
            session.output_ended(at.call, output);
            session.hurry();
        });
    }

    /// See [`Session::stdin_taken`].
    pub fn stdin_taken(&mut self, at: CallRef, len_bytes: u64) {
        self.with(at, |session| session.stdin_taken(at.call, len_bytes));
    }

    /// See [`Session::stdin_closed`].
    pub fn stdin_closed(&mut self, at: CallRef) {
        self.with(at, |session| session.stdin_closed(at.call));
    }

    /// See [`Session::event`].
    pub fn event(&mut self, at: CallRef, event: &Event) {
        self.with(at, |session| session.event(at.call, event));
    }

    /// As [`Sessions::event`], and sends it at once.
    pub fn event_now(&mut self, at: CallRef, event: &Event) {
        self.with(at, |session| {
            session.event(at.call, event);
            session.hurry();
        });
    }

    /// See [`Session::reply`].
    pub fn reply<T: Serialize>(&mut self, at: CallRef, value: &T) {
        self.with(at, |session| session.reply(at.call, value));
    }

    /// As [`Sessions::reply`]; what the socket takes of it is sent at once.
    pub fn reply_now<T: Serialize>(&mut self, at: CallRef, value: &T) {
        self.reply(at, value);
        if let Some(client) = self.clients.get_mut(&at.session)
            && let Some(socket) = &mut client.socket
        {
            client.session.hurry();
            // A lost connection is noticed when it is polled.
            let _ = socket.flush(&mut client.session, Instant::now());
        }
    }

    /// See [`Session::fail`].
    pub fn fail(&mut self, at: CallRef, error: &ErrorReply) {
        self.with(at, |session| session.fail(at.call, error));
    }

    /// Ends a call as its result says.
    pub fn settle<T: Serialize>(&mut self, at: CallRef, result: Result<T, ErrorReply>) {
        match result {
            Ok(value) => self.reply(at, &value),
            Err(error) => self.fail(at, &error),
        }
    }
}

/// The earlier of two times, of which none means never.
pub fn earlier(a: Option<Instant>, b: Option<Instant>) -> Option<Instant> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

impl Socket {
    /// Sends what is due; returns when what is left is.
    fn flush(
        &mut self,
        session: &mut Session,
        now: Instant,
    ) -> rustix::io::Result<Option<Instant>> {
        if !self.connected || self.blocked || session.unsent().is_empty() {
            return Ok(None);
        }
        if !session.is_urgent() && !self.closing {
            let at = *self.flush_at.get_or_insert(now + LAZY);
            if now < at {
                return Ok(Some(at));
            }
        }
        self.flush_at = None;
        while !session.unsent().is_empty() {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match rustix::net::send(&self.fd, session.unsent(), flags) {
                Ok(len) => session.sent(len),
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
