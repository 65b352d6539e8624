//! The agent's loop in the guest, and a way for other programs there to reach the bridge.
//!
//! ```text
//!  orders (stdin) --> inbox --+                        +--> call --> bridge (vsock) --> the model
//!                             +--> agent: the loop ----+--> tools: shell, exec, edit, patch, ...
//!  events (stdout) <----------+       |  history, wire (what is said, as each API has it)
//! ```
//!
//! One thread goes through the turns; others read orders, write events and drain what processes write. Nothing
//! of a run is outside this process and its tools' processes, so a copy of the machine has all of it. How it
//! fails: a run always ends with one `Ended` line; what a model, a tool or the bridge does wrong is told to the
//! model or becomes the ending, never a panic. `docs/agent.md` is for users.

mod agent;
mod bridge;
mod call;
mod clock;
mod events;
mod history;
mod http;
mod inbox;
mod json;
mod keeper;
mod proxy;
mod repetition;
mod sse;
mod stop;
mod text_calls;
mod tools;
mod wire;

pub use agent::run_loop;
pub use keeper::{keep as keep_proxy, serve_for as serve_proxy_for};
pub use proxy::serve_at as serve_proxy;
