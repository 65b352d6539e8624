//! `ratoon-agent proxy`: the bridge at 127.0.0.1, for programs in the guest that know nothing of it.
//!
//! ```text
//!  SDK --HTTP/1.1--> 127.0.0.1:8019 --vsock--> bridge
//!         each head gets x-ratoon-token      answers pass as they come, byte for byte
//! ```
//!
//! A connection here is one there. What goes to the bridge is read as HTTP, so that each request's head is found and
//! gets the token of that moment; nothing else is changed: what may not go on is for the bridge to refuse. What comes
//! back is copied. How it fails: bytes that are no HTTP, and a bridge that is not there, are answered with an error and
//! the connection ends; so it does when the machine wakes as another, and SDKs connect anew.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::bridge::{Bridge, Broken, Connection};
use crate::clock;
use crate::http::{Framing, MAX_HEAD_BYTES, MAX_HEADERS, Malformed};
use crate::stop::Stop;

/// Connections at once.
const MAX_CONNECTIONS: usize = 128;
const STACK_BYTES: usize = 192 << 10;
const PIECE: usize = 16 << 10;
/// How long a client may take to take what it is sent. It may be silent as long as it likes: it waits for an answer.
const PATIENCE: Duration = Duration::from_secs(600);
/// How long the bridge may take to read.
const SENDING: Duration = Duration::from_secs(60);

/// Serves until the process ends.
///
/// # Errors
/// When the port is not free, or the environment names no bridge.
pub fn serve(port: u16) -> io::Result<()> {
    let bridge = Arc::new(Bridge::of_environment().map_err(io::Error::other)?);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
    let mut out = io::stdout();
    // Whoever started it may not care.
    let _ = writeln!(out, "listening on {}", listener.local_addr()?).and_then(|()| out.flush());
    let open = Arc::new(AtomicUsize::new(0));
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
        let place = Place::take(&open);
        let Some(place) = place else {
            refuse(&client, 503, "too many connections at once");
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
                let _ = client.shutdown(Shutdown::Both);
            });
        if let Err(error) = serving {
            eprintln!("ratoon-agent: no thread for a connection: {error}");
        }
    }
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
    let body = serde_json::json!({
        "type": "error",
        "error": {"type": "api_error", "message": why, "code": "ratoon_proxy"},
    })
    .to_string();
    let head = format!(
        "HTTP/1.1 {status} Refused\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    // Who has gone hears nothing.
    let _ = client.write_all(head.as_bytes());
    let _ = client.write_all(body.as_bytes());
}

/// Serves a client. An error may still be told: nothing has been.
fn connection(bridge: &Bridge, client: &TcpStream) -> Result<(), Refused> {
    let _ = client.set_nodelay(true);
    let _ = client.set_write_timeout(Some(PATIENCE));
    let mut from_client = Requests {
        client,
        read: Vec::new(),
    };
    let Some(first) = from_client.head()? else {
        return Ok(());
    };
    let token = bridge.token().map_err(Refused::NoToken)?;
    let stop = Arc::new(Stop::new().map_err(|error| Refused::NoBridge(error.into()))?);
    let upstream = Arc::new(bridge.connect(&stop).map_err(Refused::NoBridge)?);
    let back = {
        let (upstream, stop) = (upstream.clone(), stop.clone());
        let client = client
            .try_clone()
            .map_err(|error| Refused::NoBridge(error.into()))?;
        std::thread::Builder::new()
            .name("answers".into())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                copy_back(&upstream, &client, &stop);
                // No more answers: no more requests either.
                let _ = client.shutdown(Shutdown::Both);
                stop.set();
            })
            .map_err(|error| Refused::NoBridge(error.into()))?
    };
    let mut next = Some((first, token));
    while let Some((head, token)) = next {
        if from_client
            .forward(&head, &token, &upstream, &stop)
            .is_err()
        {
            // The bridge may have said why it reads no more.
            break;
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
    let _ = back.join();
    Ok(())
}

fn copy_back(upstream: &Connection, mut client: &TcpStream, stop: &Stop) {
    let mut piece = vec![0; PIECE];
    while let Ok(read) = upstream.receive(&mut piece, None, stop)
        && read > 0
        && client.write_all(&piece[..read]).is_ok()
    {}
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
}

impl Requests<'_> {
    fn more(&mut self) -> io::Result<bool> {
        let mut piece = [0; PIECE];
        let read = self.client.read(&mut piece)?;
        self.read.extend_from_slice(&piece[..read]);
        Ok(read > 0)
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
    ) -> Result<(), Broken> {
        let mut bytes = head.bytes.clone();
        bytes.extend_from_slice(format!("x-ratoon-token: {token}\r\n\r\n").as_bytes());
        let send = |bytes: &[u8]| upstream.send(bytes, Some(clock::now() + SENDING), stop);
        send(&bytes)?;
        let Some(mut framing) = head.body.clone() else {
            return Ok(());
        };
        let mut ended = framing == Framing::Length(0);
        let mut meant = Vec::new();
        while !ended {
            if self.read.is_empty() && !self.more()? {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            let taken;
            meant.clear();
            (taken, ended) = framing
                .take(&self.read, &mut meant)
                .map_err(|error| io::Error::other(error.to_string()))?;
            send(&self.read[..taken])?;
            self.read.drain(..taken);
        }
        Ok(())
    }
}
