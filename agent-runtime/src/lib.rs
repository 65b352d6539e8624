//! Ratoon's runtime: init of the guest, and the server that runs commands for the host.
//!
//! ```text
//!  main --(PID 1)--> boot: mounts, root disk, loopback --> server (the poll loop) --> power: the end
//!    \---(--serve-unix PATH, for tests)--------------------> |
//!                                                            +--> sessions > session: clients, frames
//!                                                            +--> calls: what each call does
//!          a call that goes on: task > pipes, process (spawn, groups, users, spool), work (a thread)
//!          what calls do: files  code (interpreters)  system (ports, metrics, names, freeze, wake)
//!          and in place of all of it: swap (another runtime goes on with what this one has)
//! ```
//!
//! One poll loop in which nothing blocks; what may take long has a thread. How it fails: start-up failures are
//! [`boot::BootError`], printed as one line on the console before PID 1 ends (and the kernel
//! panics, which the VMM reports); once it serves, a client's mistake ends the client's call or
//! connection, never the runtime. `docs/protocol.md` describes what it speaks.

pub mod boot;
mod calls;
pub mod code;
pub mod files;
pub mod groups;
pub mod pipes;
pub mod power;
pub mod process;
pub mod server;
pub mod session;
pub mod sessions;
pub mod spawn;
pub mod spool;
pub mod swap;
pub mod sys;
pub mod system;
pub mod task;
pub mod users;
pub mod work;
