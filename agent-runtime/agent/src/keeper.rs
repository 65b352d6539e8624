//! `ratoon-agent proxy --keep`: the proxy's process, started again whenever it has died.
//!
//! ```text
//!  keeper: has the port --starts--> proxy: has it too, as its standard input
//!     ^                               |
//!     `--- again, after a pause <--- ended
//! ```
//!
//! While there is no proxy, clients wait in the port's queue. When the keeper dies the proxy does, too: so the port is
//! free for another keeper, which the host starts. How it fails: [`keep`] says why, before it listens.

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd as _, OwnedFd};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};

use crate::proxy;

/// One that ended sooner is not started again at once.
const SHORT: Duration = Duration::from_secs(1);

/// Keeps a proxy at this port until the process ends.
///
/// # Errors
/// When the port is not free, the environment names no bridge, or no process can be made.
pub fn keep(port: u16) -> io::Result<()> {
    let listener = proxy::listen(port)?;
    // A machine that is short of memory has larger programs to end. It takes root; without, it is as others.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-999");
    proxy::say(&listener)?;
    loop {
        let begun = Instant::now();
        let status = Command::new("/proc/self/exe")
            .args(["proxy", "--kept-by", &std::process::id().to_string()])
            .stdin(Stdio::from(OwnedFd::from(listener.try_clone()?)))
            .status()?;
        eprintln!("ratoon-agent: the proxy ended ({status}) and is started again");
        if begun.elapsed() < SHORT {
            std::thread::sleep(SHORT);
        }
    }
}

/// Serves as a keeper's proxy.
///
/// # Errors
/// When standard input is no port, or the keeper is not there any more.
pub fn serve_for(keeper: i32) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // It may have died before.
    if getppid().map(Pid::as_raw_nonzero).map(i32::from) != Some(keeper) {
        return Err(io::Error::other("the keeper has gone"));
    }
    let listener = io::stdin().as_fd().try_clone_to_owned()?;
    proxy::serve(&TcpListener::from(listener))
}
