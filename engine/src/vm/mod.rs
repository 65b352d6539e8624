//! Virtual machines: records, start, life and end.
//!
//! ```text
//!  launch ──> starting ──(runtime connects)──> running <──> paused
//!                │                                │
//!                └── fails: nothing left          └──> stopped | failed | killed ── rm
//! ```
//!
//! * [`store`] and [`record`]: what is known of each VM, in a directory of its own.
//! * [`launch`]: from a description to a [`Vm`] whose runtime has connected.
//! * [`life`]: state, stop, kill and removal of VMs that any process started.
//! * [`freeze`]: a generation of a running VM. [`standstill`]: what becomes of a VM whose freeze was cut short.
//! * [`control`]: client of a VMM's control socket. [`serial`]: its console's log.

pub mod cgroup;
pub mod command;
mod connect;
pub mod control;
mod end;
pub mod freeze;
mod handle;
pub mod launch;
pub mod life;
pub mod process;
pub mod record;
pub mod serial;
pub mod shells;
mod spawn;
pub mod standstill;
pub mod store;
mod taking;
pub(crate) mod turns;

pub use end::EndCause;
pub(crate) use handle::reap;
pub use launch::{Launch, LaunchError, Machine, Vm};
