//! Ratoon on the host: images, VM records and the life of a sandbox.
//!
//! ```no_run
//! use ratoon_engine::dirs::Dirs;
//! use ratoon_engine::runtime::ExecIo;
//! use ratoon_engine::vm::command::{CommandSpec, resolve};
//! use ratoon_engine::{Engine, RunSpec};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let engine = Engine::open(Dirs::from_env()?)?;
//! let mut started = engine.start(&RunSpec::new("debian"), None)?;
//! let mut runtime = started.vm.runtime()?;
//! let command = CommandSpec {
//!     argv: vec!["uname".into(), "-r".into()],
//!     ..CommandSpec::default()
//! };
//! let (mut out, mut err) = (Vec::new(), Vec::new());
//! let report = runtime.exec(
//!     &resolve(&started.command, &command)?,
//!     ExecIo { stdin: None, stdout: &mut out, stderr: &mut err },
//! )?;
//! assert_eq!(report.status.shell_code(), 0);
//! started.vm.end()?; // or drop it; `detach` would leave it running
//! # Ok(())
//! # }
//! ```

mod admission;
pub mod agent;
pub mod bridge;
pub mod commit;
mod cpu;
pub mod diff;
pub mod dirs;
mod engine;
mod fan_out;
pub mod fork;
pub mod image;
pub mod initramfs;
mod lineage;
mod pager;
mod renewal;
pub mod rollback;
pub mod snapshots;
/// The runtime in a guest.
pub mod runtime {
    pub use ratoon_client::RuntimeError;
    pub use ratoon_client::blocking::{CallIo, Client as RuntimeClient, Controller, ExecIo};
}
pub use ratoon_snapshot as snapshot;
pub mod steps;
pub mod tree;
pub mod vm;
mod warm;
pub mod working_set;

pub use admission::Refused;
pub use pager::PagerError;
pub use renewal::{RuntimeRef, StaleRuntime};

pub use engine::{
    DEFAULT_BOOT_TIMEOUT, DEFAULT_MEMORY_MIB, Engine, Programs, RunSpec, StartError, Started,
    image_command,
};
pub use warm::{WarmError, WarmGeneration, Warming};
