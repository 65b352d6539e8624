//! The machine's end: processes, file systems, power.
//!
//! ```text
//!  TERM to all --> (no child left, or TERM_GRACE) --> KILL to all --> sync, root read-only
//!     --> reply --> (the client has closed, or LINGER) --> power off
//! ```
//!
//! The server drives these steps from its loop; here is what each does. How it fails: it does not;
//! a step that the kernel refuses is told on the console and the next one follows.

use std::time::Duration;

use rustix::mount::MountFlags;
use rustix::process::Signal;

/// How long processes have between TERM and KILL.
pub const TERM_GRACE: Duration = Duration::from_secs(2);

/// How long a killed process may take to go, before the machine ends without it.
pub const KILL_GRACE: Duration = Duration::from_secs(1);

/// How long the client may take to read the reply and close.
pub const LINGER: Duration = Duration::from_millis(300);

/// Signals every process but PID 1. Only for PID 1: from another process it would reach the host's.
pub fn signal_all(signal: Signal) {
    if rustix::process::getpid().is_init() {
        // SAFETY: kill(-1) takes two integers; as PID 1 it means every process of this guest.
        unsafe { libc::kill(-1, signal.as_raw()) };
    }
}

/// Writes file systems back and makes the root read-only.
pub fn rest_file_systems() {
    rustix::fs::sync();
    let flags = MountFlags::RDONLY;
    if let Err(error) = rustix::mount::mount_remount("/", flags, c"") {
        // It has been synced all the same; an unkillable process may still hold a file open.
        eprintln!("ratoon-runtime: the root stays writable to the end: {error}");
    }
}

/// Cuts the power. Returns when the kernel refuses.
pub fn power_off() -> std::io::Error {
    match rustix::system::reboot(rustix::system::RebootCommand::PowerOff) {
        Ok(()) => std::io::Error::other("the kernel came back from power-off"),
        Err(error) => error.into(),
    }
}
