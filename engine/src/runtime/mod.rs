//! The host's end of the runtime protocol: a blocking client for the runtime in a guest.
//!
//! ```text
//!  RuntimeClient --- link (socket, deadlines) --- state (frames, ids, offsets; no I/O)
//! ```
//!
//! The guest is hostile: everything that comes from it is checked by [`state`] before it is
//! believed, nothing is allocated beyond the windows that the client grants, every wait has a
//! deadline or a [`Controller`] that ends it. How it fails: [`RuntimeError`]; after one that is
//! about the connection ([`RuntimeError::is_about_connection`]) the client is of no more use.

mod client;
mod error;
mod link;
pub mod state;

pub use client::{Controller, ExecIo, RuntimeClient};
pub use error::RuntimeError;
