//! The bridge's process, as the engine has it: started when first needed, told of VMs, ended with the last.
//!
//! ```text
//!   <state>/bridge/              locked by whoever starts it, adds a VM or ends it
//!     control.sock               where it is told of VMs and tokens (ratoon_bridge_api::control)
//!     process.json               which process, of which configuration
//!     bridge.log                 what it has to say
//!   <state>/vms/<id>/agent.json  that the VM may call models: its run and branch
//! ```
//!
//! There is one a state directory. It outlives the command that started it; a later one finds it again. When it has
//! died the next command that needs it (or [`Keeper`], while one is attached) starts it anew and tells it of the VMs
//! that are there: what they have used it reads in its record. How it fails: [`BridgeError`].

mod config;
mod keeper;
mod keys;
mod process;
mod vms;

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use ratoon_bridge_api::control::ClientError;

pub use config::{BridgeConfig, Chosen};
pub use keeper::Keeper;
pub use keys::Keys;
pub(crate) use process::sweep;
pub use process::{Bridge, Running};
pub use vms::{AgentFork, AgentVm, write_token};
pub(crate) use vms::{forget, forget_token_of, token_for};

use crate::engine::Engine;
use crate::runtime::RuntimeError;

/// Why there is no bridge, or why it does not do what it is told.
#[derive(Debug, thiserror::Error)]
pub enum BridgeError {
    /// No configuration.
    #[error(
        "there is no bridge configuration at {}: write one (docs/bridge.md, Configuration), or name one with \
         --bridge-config", path.display()
    )]
    NoConfig {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is none.
    #[error("{} is no bridge configuration (docs/bridge.md)", path.display())]
    Config {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// It would record wherever the bridge runs.
    #[error("\"records\" in {} must be an absolute path, not {}", path.display(), records.display())]
    Records {
        /// Which.
        path: PathBuf,
        /// What it says.
        records: PathBuf,
    },
    /// No such model.
    #[error(
        "there is no model {wanted:?} in {} that an agent can call: write PROVIDER/NAME, one of {}",
        path.display(), known.join(", ")
    )]
    Model {
        /// What was asked for.
        wanted: String,
        /// Where it was looked for.
        path: PathBuf,
        /// All that there are.
        known: Vec<String>,
    },
    /// Another one runs.
    #[error(
        "a bridge with another configuration ({}) serves VMs: end them, or `ratoon agent bridge stop`",
        running.display()
    )]
    Other {
        /// Its configuration.
        running: PathBuf,
    },
    /// There is none.
    #[error("no bridge runs: `ratoon agent run` starts one")]
    NotRunning,
    /// Its program.
    #[error(
        "starting {}: build ratoon-bridge beside ratoon, or name it with RATOON_BRIDGE", program.display()
    )]
    Program {
        /// Which.
        program: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It ended, or did not listen in time.
    #[error("the bridge did not start: {why} (its log is {})", log.display())]
    Start {
        /// Its own words.
        why: String,
        /// All of them.
        log: PathBuf,
    },
    /// A file, a lock or a process.
    #[error("{what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// It refuses, or does not answer.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A token cannot be handed over.
    #[error("handing VM {vm} its token")]
    Runtime {
        /// Which.
        vm: String,
        /// Why.
        #[source]
        source: RuntimeError,
    },
}

fn io<'a>(
    what: &'static str,
    path: &'a Path,
) -> impl FnOnce(std::io::Error) -> BridgeError + use<'a> {
    move |source| BridgeError::Io {
        what,
        path: path.to_owned(),
        source,
    }
}

/// Writes a JSON file so that a reader sees the old one or the new one.
pub(crate) fn write_json(path: &Path, value: &impl serde::Serialize) -> std::io::Result<()> {
    let folder = path
        .parent()
        .ok_or_else(|| std::io::Error::from(ErrorKind::InvalidInput))?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    serde_json::to_writer_pretty(&mut file, value)?;
    file.persist(path)?;
    Ok(())
}

impl Engine {
    /// The bridge of this engine's state directory.
    pub fn bridge(&self) -> Bridge {
        Bridge::new(
            self.dirs().state().join("bridge"),
            self.programs().bridge.clone(),
            self.store().clone(),
        )
    }
}
