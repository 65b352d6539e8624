//! One virtual machine in one process.
//!
//! [`start`] builds a [`machine::Machine`] phase by phase; its vCPUs run on threads of their own
//! ([`vcpu`]), its devices on one [`event_loop`], its [`control`] socket on another thread. Every
//! exit of a vCPU goes to the [`bus`] as hostile input. What is special about hosts without
//! hardware virtualization is in [`host`].
//!
//! ```text
//!   vCPU threads --exits--> Bus --(lock)--> MmioTransport --> device
//!        ^                                       ^
//!        | hold/run/end                          | kicks, host descriptors
//!   control thread (HTTP) --Action--> Machine    event loop (main thread)
//! ```

pub mod birth;
pub mod boot;
pub mod bus;
pub mod clock;
pub mod control;
pub mod cpuid;
pub mod ending;
pub mod event_loop;
pub mod freeze;
mod generation;
pub mod host;
pub mod machine;
pub mod memory;
mod merge;
mod opening;
pub mod pager;
pub mod shell;
pub mod start;
pub mod state;
pub mod stats;
pub mod vcpu;
mod wiring;

/// The messages of an error and of all its causes, outermost first.
pub fn causes(error: &dyn std::error::Error) -> Vec<String> {
    let mut causes = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        causes.push(error.to_string());
        next = error.source();
    }
    causes
}
