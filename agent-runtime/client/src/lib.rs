//! Talks to the runtime in a guest: processes, files, code, ports. The wire is `docs/protocol.md`.
//!
//! ```text
//!  blocking::Client --- link (socket, deadlines) ---+
//!                                                   +--- state (frames, ids, offsets; no I/O)
//!  Client (async) ----- driver (tokio task) --------+
//! ```
//!
//! ```no_run
//! use std::path::Path;
//! use std::time::Duration;
//!
//! use ratoon_client::{Client, RuntimeError, protocol::ExecParams};
//!
//! # async fn example() -> Result<(), RuntimeError> {
//! let client = Client::connect(Path::new("vm.vsock"), Duration::from_secs(5)).await?;
//! client.write_bytes("/tmp/names", b"b\na\n").await?;
//! let sort = ExecParams {
//!     argv: vec!["sort".into(), "/tmp/names".into()],
//!     ..ExecParams::default()
//! };
//! let output = client.exec(sort).await?.output(64 * 1024).await?;
//! assert_eq!(output.stdout, b"a\nb\n");
//! # Ok(())
//! # }
//! ```
//!
//! - [`Client`] makes calls, many at a time: [`Client::exec`], [`Client::read`], [`Client::code_run`],
//!   [`Client::dial`], …; and any other by [`Client::begin`] and [`Client::call`].
//! - [`Client::resumable`] outlives a lost connection.
//! - `examples/` has whole programs: run a command, copy a tree in and a result out, keep state in
//!   an interpreter.
//!
//! The guest is hostile: everything that comes from it is checked by [`state`] before it is
//! believed; no more than a window (256 KiB) of each stream waits for its reader, and what is
//! collected has a limit that the caller names. Text is the guest's own, and may hold control
//! characters. How it fails: [`RuntimeError`]; after one that is about the connection
//! ([`RuntimeError::is_about_connection`]) the client is of no more use. The async client's calls wait
//! as long as the guest lets them: `tokio::time::timeout` gives them a deadline.

pub mod blocking;
mod client;
mod code;
mod driver;
mod error;
mod files;
mod lines;
mod machine;
mod process;
mod running;
pub mod state;

pub use client::Client;
pub use code::{Cell, CellEvent, CellOutput};
pub use error::RuntimeError;
pub use files::{Incoming, Items};
pub use machine::PortStream;
pub use process::{Process, ProcessOutput};
pub use ratoon_protocol as protocol;
pub use running::{Reader, Running, Stdin};
