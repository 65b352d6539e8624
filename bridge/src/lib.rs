//! The bridge: how a guest without keys and without a network calls a model.
//!
//! ```text
//! guest --vsock--> VMM --VM's own Unix socket--> bridge --TLS--> the provider that the host names
//!                                                  |
//!                                          record, budgets, keys
//! ```
//!
//! A guest is hostile. What it sends is never passed on: [`json`] checks it, [`rules`] and [`request`]
//! rebuild it, [`server`] keeps its headers back, [`upstream`] attaches ours. [`budget`] and
//! [`record`] see each call before it is sent and after it ended ([`call`]), `relay` brings the
//! answer back in constant memory, and [`mask`] takes the host's secrets out of whatever is stored or
//! answered. The engine says over [`control`] which VMs there are. Before it serves, [`confine`] takes
//! from the process what it needs no more. docs/bridge.md has it all.

pub mod bridge;
pub mod budget;
pub mod call;
pub mod config;
pub mod confine;
pub mod control;
pub mod json;
pub mod key;
pub mod mask;
pub mod record;
pub mod refusal;
mod relay;
pub mod request;
pub mod rules;
pub mod scan;
pub mod server;
pub mod socket;
pub mod sse;
pub mod syscalls;
pub mod time;
pub mod token;
pub mod upstream;

pub use bridge::Bridge;
