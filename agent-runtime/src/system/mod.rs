//! The machine itself: ports, metrics, time, entropy, names, network, quiet, and who it is.
//!
//! ```text
//!   at once, on the loop:  ports  metrics  settings (time, entropy, hostname, machine-id)  network
//!   on a thread:           quiet (sync, freeze, thaw)
//!   polled by the loop:    dial (a connection to a server in the guest)
//!   state of the server:   identity (expect_wake, wake, whoami)
//!   at boot:               etc (what differs between machines is in memory)
//! ```
//!
//! **What programs see.** After `wake` these files are in `/run/ratoon/`, which must be a tmpfs,
//! each with its value and a newline: `generation`, `id`, `index`, `wakes`, `message` (mode 0644,
//! absent when there is none), and `token` (mode 0400 of root, without newline, absent when there
//! is none). `wakes` is written last: a program that has seen it grow sees the rest (docs/fork-safety.md).
//!
//! **Whom it touches.** A runtime that is not the machine's init (a test on somebody's host) sets
//! no clock, name, network and freezes nothing: these calls answer `unsupported`.
//!
//! How it fails: an [`ErrorReply`] that names what was to be done, on what, and the system's
//! reason. Parameters are checked whole before the first thing is done.

mod connections;
mod dial;
mod etc;
mod files;
mod identity;
mod metrics;
mod netlink;
mod network;
mod ports;
mod prepared;
mod procfs;
mod quiet;
mod settings;

use ratoon_protocol::{ErrorCode, ErrorReply};
use rustix::io::Errno;

pub use dial::{Dial, Progress, connect};
pub use etc::keep_in_memory;
pub use identity::Identity;
pub use metrics::metrics;
pub use network::set_network;
pub use ports::ports;
pub use quiet::{
    Thaw, are_file_systems_frozen, are_processes_frozen, freeze, programs_wait, sync, thaw,
};
pub use settings::{add_entropy, name_files, set_hostname, set_time};

/// The system's refusal of `what`, as the client is to hear it.
fn failed(what: impl std::fmt::Display, error: Errno) -> ErrorReply {
    let code = match error {
        Errno::NOENT | Errno::NODEV => ErrorCode::NotFound,
        Errno::ACCESS | Errno::PERM | Errno::ROFS => ErrorCode::PermissionDenied,
        Errno::EXIST => ErrorCode::Exists,
        Errno::NOSPC | Errno::DQUOT | Errno::NOMEM | Errno::MFILE | Errno::NFILE => {
            ErrorCode::NoSpace
        }
        Errno::OPNOTSUPP | Errno::NOSYS | Errno::NOTTY | Errno::AFNOSUPPORT => {
            ErrorCode::Unsupported
        }
        Errno::BUSY | Errno::AGAIN => ErrorCode::Busy,
        _ => ErrorCode::Failed,
    };
    ErrorReply::new(code, format!("{what}: {error}"))
}

fn bad_request(message: impl Into<String>) -> ErrorReply {
    ErrorReply::new(ErrorCode::BadRequest, message)
}

/// Refuses what only the machine's init may do.
fn only_init(what: &str) -> Result<(), ErrorReply> {
    if rustix::process::getpid().is_init() {
        return Ok(());
    }
    let message = format!("{what}: this runtime is not the machine's init and leaves it alone");
    Err(ErrorReply::new(ErrorCode::Unsupported, message))
}

/// Text of a client, for an error message: short, and without control characters.
fn shown(text: &str) -> String {
    text.chars().take(80).flat_map(char::escape_debug).collect()
}
