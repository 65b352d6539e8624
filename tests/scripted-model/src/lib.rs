//! A model server for tests that says what a [`Script`] tells it to.
//!
//! It speaks Anthropic's Messages, OpenAI's Chat Completions and OpenAI's Responses, streamed and
//! not, and breaks in all the ways that real ones do ([`Fault`]). Every request is kept and checked
//! ([`Server::violations`]): each tool call answered once, the one right credential and no other,
//! nothing that would let the provider act for a guest. It shares no code with the bridge, so that a
//! mistake there is not one here too.
//!
//! ```
//! use ratoon_scripted_model::{Script, Server, Turn};
//!
//! let server = Server::start(Script::new([Turn::text("Hello.")]).with_key("sk-right-key"))?;
//! println!("{}", server.url()); // http://127.0.0.1:…
//! assert!(server.violations().is_empty());
//! # Ok::<(), std::io::Error>(())
//! ```

mod answer;
mod check;
mod script;
mod serve;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

pub use script::{Fault, Script, ToolCall, Turn};
use tokio::sync::oneshot;

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Its path.
    pub path: String,
    /// Its headers, names in lower case, in order.
    pub headers: Vec<(String, String)>,
    /// Its body.
    pub body: serde_json::Value,
    /// Its body's bytes.
    pub bytes: Vec<u8>,
}

/// What the server remembers.
#[derive(Debug)]
struct Memory {
    script: Script,
    used: Vec<bool>,
    seen: Vec<Seen>,
    violations: Vec<String>,
    ids: u64,
}

/// A running server; it ends when this is dropped.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    memory: Arc<Mutex<Memory>>,
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts one on a free port of 127.0.0.1.
    ///
    /// # Errors
    /// When there is none.
    pub fn start(script: Script) -> io::Result<Self> {
        Self::start_at("127.0.0.1:0", script)
    }

    /// Starts one at an address.
    ///
    /// # Errors
    /// When it is not free.
    pub fn start_at(address: &str, script: Script) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let memory = Arc::new(Mutex::new(Memory {
            used: vec![false; script.turns.len()],
            script,
            seen: Vec::new(),
            violations: Vec::new(),
            ids: 0,
        }));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let (end, ended) = oneshot::channel();
        let shared = memory.clone();
        let thread = std::thread::Builder::new()
            .name("scripted-model".into())
            .spawn(move || runtime.block_on(serve::until(listener, shared, ended)))?;
        Ok(Self {
            address,
            memory,
            end: Some(end),
            thread: Some(thread),
        })
    }

    /// Its base URL, without `/v1`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// All requests so far.
    #[must_use]
    pub fn seen(&self) -> Vec<Seen> {
        lock(&self.memory).seen.clone()
    }

    /// What was wrong with requests so far.
    #[must_use]
    pub fn violations(&self) -> Vec<String> {
        lock(&self.memory).violations.clone()
    }

    /// Waits until it is told to end from elsewhere: never.
    pub fn join(mut self) {
        if let Some(thread) = self.thread.take() {
            // Its panic is shown by itself.
            let _ = thread.join();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn lock(memory: &Mutex<Memory>) -> MutexGuard<'_, Memory> {
    memory.lock().unwrap_or_else(PoisonError::into_inner)
}
