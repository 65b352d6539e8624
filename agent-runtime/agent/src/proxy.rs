//! `ratoon-agent proxy`: the bridge at 127.0.0.1, for programs in the guest that know nothing of it.
//!
//! ```text
//!  SDK --HTTP/1.1--> 127.0.0.1:8019 --vsock--> bridge
//!         each head gets x-ratoon-token      answers pass as they come, byte for byte
//! ```
//!
//! A connection here is one there. What goes to the bridge is read as HTTP, so that each request's head is found and
//! gets the token of that moment; nothing else is changed: what may not go on is for the bridge to refuse. What comes
//! back is copied. How it fails: bytes that are no HTTP, a connection too many, and a bridge that is not there are
//! answered with an error and the connection ends; so it does when the machine wakes as another, and SDKs connect anew.
//! An answer may come before the request's end (a body that is too large): what the client still sends is read then
//! and thrown away, since closing over unread bytes would take the answer from it.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use rustix::event::PollFlags;

use crate::bridge::{Bridge, Broken, Connection};
use crate::clock::{self, Moment};
use crate::http::{Framing, MAX_HEAD_BYTES, MAX_HEADERS, Malformed};
use crate::stop::{Stop, Waited, wait};

/// Connections at once: fewer than the bridge serves of one machine (`bridge/src/server.rs`), which says nothing to
/// those that are too many.
const MAX_CONNECTIONS: usize = 60;
/// Connections that wait to be told that they are too many; more are closed.
const MAX_REFUSED: usize = 256;
/// How long one of them may take to read its answer.
const BRIEF: Duration = Duration::from_secs(1);
/// How long a client that has its answer is listened to.
const LINGER: Duration = Duration::from_secs(10);
const STACK_BYTES: usize = 192 << 10;
const PIECE: usize = 16 << 10;
/// How long a client may take to take what it is sent. It may be silent as long as it likes: it waits for an answer.
const PATIENCE: Duration = Duration::from_secs(600);
/// How long the bridge may take to read.
const SENDING: Duration = Duration::from_secs(60);

/// Takes the port.
///
/// # Errors
/// When it is not free, or the environment names no bridge.
pub fn listen(port: u16) -> io::Result<TcpListener> {
    Bridge::of_environment().map_err(io::Error::other)?;
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).map_err(|error| {
        let text = format!("127.0.0.1:{port} cannot be listened at: {error}");
        io::Error::new(error.kind(), text)
    })
}

/// Says where it listens.
///
/// # Errors
/// When the listener has no address.
pub fn say(listener: &TcpListener) -> io::Result<()> {
    let mut out = io::stdout();
    let address = listener.local_addr()?;
    // Whoever started it may not care.
    let _ = writeln!(out, "listening on {address}").and_then(|()| out.flush());
    Ok(())
}

/// Serves at a port until the process ends.
///
/// # Errors
/// The port is not free, or the environment names no bridge.
pub fn serve_at(port: u16) -> io::Result<()> {
    let listener = listen(port)?;
    say(&listener)?;
    serve(&listener)
}

/// Serves until the process ends.
///
/// # Errors
/// When the environment names no bridge, or there is no thread.
pub fn serve(listener: &TcpListener) -> io::Result<()> {
    let bridge = Arc::new(Bridge::of_environment().map_err(io::Error::other)?);
    let open = Arc::new(AtomicUsize::new(0));
    let too_many = refuser()?;
    loop {
        let client = match listener.accept() {
            Ok((client, _)) => client,
            Err(error) => {
                // Out of descriptors, as a rule: they come back when connections end.
                eprintln!("ratoon-agent: no connection accepted: {error}");
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        let Some(place) = Place::take(&open) else {
            if let Err(TrySendError::Disconnected(_)) = too_many.try_send(client) {
                return Err(io::Error::other("the thread that refuses has ended"));
            }
            continue;
        };
        let bridge = bridge.clone();
        let serving = std::thread::Builder::new()
            .name("client".into())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let _place = place;
                if let Err(why) = connection(&bridge, &client) {
                    refuse(&client, why.status(), &why.to_string());
                }
                linger(&client, LINGER);
            });
        if let Err(error) = serving {
            eprintln!("ratoon-agent: no thread for a connection: {error}");
        }
    }
}

/// A thread that tells connections that they are too many, and closes them a little later: at once would take the
/// answer from a client that is still asking.
fn refuser() -> io::Result<SyncSender<TcpStream>> {
    let (sender, clients) = sync_channel::<TcpStream>(MAX_REFUSED);
    let tell = move || {
        let mut told: VecDeque<(TcpStream, Moment)> = VecDeque::new();
        loop {
            let next = match told.front() {
                None => clients.recv().map_err(RecvTimeoutError::from),
                Some((_, until)) => clients.recv_timeout(until.saturating_sub(clock::now())),
            };
            match next {
                Ok(client) => {
                    let _ = client.set_nonblocking(true);
                    refuse(&client, 429, "too many connections at once: wait");
                    let _ = client.shutdown(Shutdown::Write);
                    told.push_back((client, clock::now() + BRIEF));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            while let Some((_, until)) = told.front()
                && (*until <= clock::now() || told.len() > MAX_REFUSED)
            {
                told.pop_front();
            }
        }
    };
    std::thread::Builder::new()
        .name("refuser".into())
        .stack_size(STACK_BYTES)
        .spawn(tell)?;
    Ok(sender)
}

/// A connection's place among all.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(open: &Arc<AtomicUsize>) -> Option<Self> {
        let before = open.fetch_add(1, Ordering::SeqCst);
        let place = Self(open.clone());
        (before < MAX_CONNECTIONS).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Why a connection ends before its first answer.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("the bridge cannot be reached: {0}")]
    NoBridge(Broken),
    #[error("{0}")]
    NoToken(String),
}

impl Refused {
    fn status(&self) -> u16 {
        match self {
            Self::Malformed(_) => 400,
            Self::NoBridge(_) => 502,
            Self::NoToken(_) => 503,
        }
    }
}

fn refuse(mut client: &TcpStream, status: u16, why: &str) {
    let (kind, wait) = match status {
        429 => ("rate_limit_error", "retry-after: 1\r\n"),
        400 => ("invalid_request_error", ""),
        _ => ("api_error", ""),
    };
    // In the form of each API: their errors differ only in what they have besides.
    let body = serde_json::json!({
        "type": "error",
        "error": {"type": kind, "message": why, "param": null, "code": "ratoon_proxy"},
    })
    .to_string();
    let head = format!(
        "HTTP/1.1 {status} Refused\r\ncontent-type: application/json\r\nconnection: close\r\n{wait}x-ratoon-error: proxy\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    // Who has gone hears nothing.
    let _ = client.write_all(head.as_bytes());
    let _ = client.write_all(body.as_bytes());
}

/// Ends a connection: nothing more is said, and what the client says is thrown away until it ends, too.
fn linger(mut client: &TcpStream, time: Duration) {
    let until = clock::now() + time;
    let _ = client.shutdown(Shutdown::Write);
    let mut piece = [0; PIECE];
    loop {
        let left = until.saturating_sub(clock::now());
        if left.is_zero() || client.set_read_timeout(Some(left)).is_err() {
            return;
        }
        match client.read(&mut piece) {
            Ok(read) if read > 0 => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            _ => return,
        }
    }
}

/// Serves a client. An error may still be told: nothing has been.
fn connection(bridge: &Bridge, client: &TcpStream) -> Result<(), Refused> {
    let _ = client.set_nodelay(true);
    let _ = client.set_write_timeout(Some(PATIENCE));
    let new_stop = || Stop::new().map_err(|error| Refused::NoBridge(error.into()));
    // Set when there are no more answers.
    let over = Arc::new(new_stop()?);
    let mut from_client = Requests {
        client,
        read: Vec::new(),
        over: &over,
    };
    let Some(first) = from_client.head()? else {
        return Ok(());
    };
    let token = bridge.token().map_err(Refused::NoToken)?;
    // Set when answers are not to be waited for.
    let stop = Arc::new(new_stop()?);
    let upstream = Arc::new(bridge.connect(&stop).map_err(Refused::NoBridge)?);
    let back = {
        let (upstream, stop, over) = (upstream.clone(), stop.clone(), over.clone());
        let client = client
            .try_clone()
            .map_err(|error| Refused::NoBridge(error.into()))?;
        std::thread::Builder::new()
            .name("answers".into())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                if !copy_back(&upstream, &client, &stop) && !stop.is_set() {
                    refuse(&client, 502, "the bridge ended the connection");
                }
                // No more answers: no more requests either.
                let _ = client.shutdown(Shutdown::Write);
                over.set();
            })
            .map_err(|error| Refused::NoBridge(error.into()))?
    };
    let mut next = Some((first, token));
    while let Some((head, token)) = next {
        match from_client.forward(&head, &token, &upstream, &stop) {
            Ok(()) => {}
            // The bridge listens no more: it may have answered.
            Err(Unsent::Upstream) => break,
            Err(Unsent::Client) => {
                stop.set();
                break;
            }
        }
        // What is wrong with a later request can only be told by the connection's end: an answer may be on its way.
        next = match (from_client.head(), bridge.token()) {
            (Ok(Some(head)), Ok(token)) => Some((head, token)),
            (Ok(None), _) => None,
            _ => {
                stop.set();
                None
            }
        };
    }
    // The bridge ends a call whose client has gone, and what it costs with it.
    upstream.ends_here();
    from_client.throw_away();
    let _ = back.join();
    Ok(())
}

/// Whether anything came back.
fn copy_back(upstream: &Connection, mut client: &TcpStream, stop: &Stop) -> bool {
    let mut piece = vec![0; PIECE];
    let mut has_come = false;
    while let Ok(read) = upstream.receive(&mut piece, None, stop)
        && read > 0
    {
        has_come = true;
        if client.write_all(&piece[..read]).is_err() {
            break;
        }
    }
    has_come
}

/// Whose fault it is that a request could not be sent on.
enum Unsent {
    Client,
    Upstream,
}

/// A request's head.
struct Head {
    /// Its bytes, without a token and without the empty line.
    bytes: Vec<u8>,
    body: Option<Framing>,
}

/// Requests of one client.
struct Requests<'a> {
    client: &'a TcpStream,
    read: Vec<u8>,
    /// No more are wanted.
    over: &'a Stop,
}

impl Requests<'_> {
    fn more(&mut self) -> io::Result<bool> {
        let client = [(self.client.as_fd(), PollFlags::IN)];
        if matches!(wait(&client, None, self.over)?, Waited::Stopped) {
            return Ok(false);
        }
        let mut piece = [0; PIECE];
        let read = self.client.read(&mut piece)?;
        self.read.extend_from_slice(&piece[..read]);
        Ok(read > 0)
    }

    /// Reads on until no more requests are wanted, or none come: so the client comes to read its answer.
    fn throw_away(&mut self) {
        while let Ok(true) = self.more() {
            self.read.clear();
        }
    }

    /// The next head; none when the client has no more.
    fn head(&mut self) -> Result<Option<Head>, Malformed> {
        loop {
            if let Some(head) = self.parsed()? {
                return Ok(Some(head));
            }
            if self.read.len() > MAX_HEAD_BYTES {
                return Err(Malformed("the head is too long"));
            }
            match self.more() {
                Ok(true) => {}
                Ok(false) | Err(_) if self.read.is_empty() => return Ok(None),
                Ok(false) | Err(_) => return Err(Malformed("the head ended before its end")),
            }
        }
    }

    fn parsed(&mut self) -> Result<Option<Head>, Malformed> {
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut request = httparse::Request::new(&mut headers);
        let len = match request.parse(&self.read) {
            Ok(httparse::Status::Complete(len)) => len,
            Ok(httparse::Status::Partial) => return Ok(None),
            Err(_) => return Err(Malformed("the request's head")),
        };
        let (Some(method), Some(path), Some(version)) =
            (request.method, request.path, request.version)
        else {
            return Err(Malformed("the request's first line"));
        };
        let all = || {
            request
                .headers
                .iter()
                .map(|header| (header.name, header.value))
        };
        let body = Framing::of(all())?;
        let mut bytes = format!("{method} {path} HTTP/1.{version}\r\n").into_bytes();
        for (name, value) in all() {
            // Only the guest's host may say who it is; two tokens would be refused.
            if name.eq_ignore_ascii_case("x-ratoon-token") {
                continue;
            }
            bytes.extend_from_slice(name.as_bytes());
            bytes.extend_from_slice(b": ");
            bytes.extend_from_slice(value);
            bytes.extend_from_slice(b"\r\n");
        }
        self.read.drain(..len);
        Ok(Some(Head { bytes, body }))
    }

    /// Sends a request on, its body as it comes.
    fn forward(
        &mut self,
        head: &Head,
        token: &str,
        upstream: &Connection,
        stop: &Stop,
    ) -> Result<(), Unsent> {
        let mut bytes = head.bytes.clone();
        bytes.extend_from_slice(format!("x-ratoon-token: {token}\r\n\r\n").as_bytes());
        let send = |bytes: &[u8]| {
            let sent = upstream.send(bytes, Some(clock::now() + SENDING), stop);
            sent.map_err(|_| Unsent::Upstream)
        };
        send(&bytes)?;
        let Some(mut framing) = head.body.clone() else {
            return Ok(());
        };
        let mut ended = framing == Framing::Length(0);
        let mut meant = Vec::new();
        while !ended {
            if self.read.is_empty() && !self.more().map_err(|_| Unsent::Client)? {
                // No more are wanted, or the client has gone in the middle.
                return Err(match self.over.is_set() {
                    true => Unsent::Upstream,
                    false => Unsent::Client,
                });
            }
            let taken;
            meant.clear();
            (taken, ended) = framing
                .take(&self.read, &mut meant)
                .map_err(|_| Unsent::Client)?;
            send(&self.read[..taken])?;
            self.read.drain(..taken);
        }
        Ok(())
    }
}
