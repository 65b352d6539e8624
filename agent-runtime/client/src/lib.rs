//! Talks to the runtime in a guest: processes, files, code, ports. The wire is `docs/protocol.md`.
//!
//! ```text
//!  blocking::Client --- link (socket, deadlines) ---+
//!                                                   +--- state (frames, ids, offsets; no I/O)
//!  Client (async) ----- driver (tokio) -------------+
//! ```
//!
//! The guest is hostile: everything that comes from it is checked by [`state`] before it is
//! believed, nothing is allocated beyond the windows that the client grants, every wait has a
//! deadline or can be ended. How it fails: [`RuntimeError`]; after one that is about the connection
//! ([`RuntimeError::is_about_connection`]) the client is of no more use.

pub mod blocking;
mod client;
mod error;
pub mod state;

pub use client::{Client, Reader, Running};
pub use error::RuntimeError;
pub use ratoon_protocol as protocol;
