//! ^C: the end of a run in the middle.
//!
//! A scenario may be waiting for a guest that takes long. Instead of teaching each wait to look up, a signal
//! ends the processes that the harness has started: whoever waits for one of them hears at once that it has gone, and
//! what was measured until then is reported. A machine that is made meanwhile is ended too. Each gets SIGTERM,
//! and SIGKILL when it is still there half a second later.
//!
//! It cannot fail: what cannot be ended here ends with the harness, whose machines hang on a lifeline.

use std::collections::BTreeSet;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

/// Between two looks for processes that are still there.
const LOOK: Duration = Duration::from_millis(500);

/// Set by the first signal.
pub static STOP: AtomicBool = AtomicBool::new(false);

/// The run was stopped by a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interrupted;

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// Whether a signal has come.
pub fn is_stopped() -> bool {
    STOP.load(Ordering::Relaxed)
}

/// Whether to go on.
///
/// # Errors
/// [`Interrupted`] after a signal.
pub fn go_on() -> Result<()> {
    if is_stopped() {
        return Err(Interrupted.into());
    }
    Ok(())
}

/// From now on SIGINT, SIGTERM and SIGHUP end the run, and with it what it has started.
///
/// # Errors
/// When they cannot be caught.
pub fn watch_signals() -> Result<()> {
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    std::thread::spawn(move || {
        if signals.forever().next().is_some() {
            STOP.store(true, Ordering::Relaxed);
            let mut told = BTreeSet::new();
            loop {
                end(children(), &mut told);
                std::thread::sleep(LOOK);
            }
        }
    });
    Ok(())
}

/// SIGTERM for those of our children that were not `told` before, SIGKILL for those that were.
fn end(children: impl Iterator<Item = i32>, told: &mut BTreeSet<i32>) {
    for pid in children {
        let Some(raw) = Pid::from_raw(pid) else {
            continue;
        };
        // The descriptor first: the pid may be another process's by now, but not another child's.
        let Ok(process) = pidfd_open(raw, PidfdFlags::empty()) else {
            continue;
        };
        if parent(pid) != Some(own_pid()) {
            continue;
        }
        let signal = match told.insert(pid) {
            true => Signal::TERM,
            false => Signal::KILL,
        };
        // It has just ended: no matter.
        let _ = pidfd_send_signal(&process, signal);
    }
}

fn own_pid() -> i32 {
    rustix::process::getpid().as_raw_nonzero().get()
}

/// Processes whose parent is this one.
fn children() -> impl Iterator<Item = i32> {
    let ours = own_pid();
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(move |&pid| parent(pid) == Some(ours))
}

/// The parent of a process that has not ended (proc(5), fields 3 and 4 of stat).
fn parent(pid: i32) -> Option<i32> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    let stat = String::from_utf8_lossy(&stat);
    // The second field is a name in brackets, which may hold anything.
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    let state = fields.next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    fields.next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Stdio};

    use super::*;

    /// A shell that is ready to be told, and what it is told by.
    fn shell(script: &str) -> std::process::Child {
        let mut child = Command::new("sh")
            .args(["-c", script])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = [0; 6];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut ready).unwrap();
        assert_eq!(&ready, b"ready\n");
        child
    }

    #[test]
    fn who_does_not_go_when_told_is_killed_and_others_processes_are_left_alone() {
        let mut willing = shell("trap 'exit 7' TERM; echo ready; while :; do sleep 0.01; done");
        let mut deaf = shell("trap '' TERM; echo ready; while :; do sleep 0.01; done");
        let pids = [willing.id() as i32, deaf.id() as i32];
        assert!(pids.iter().all(|pid| children().any(|child| child == *pid)));
        assert!(!children().any(|child| child == 1 || child == own_pid()));
        let mut told = BTreeSet::new();
        end(pids.into_iter(), &mut told);
        assert_eq!(willing.wait().unwrap().code(), Some(7));
        assert_eq!(deaf.try_wait().unwrap(), None);
        // Ended and not yet reaped is not there any more.
        end(pids.into_iter(), &mut told);
        assert_eq!(deaf.wait().unwrap().signal(), Some(Signal::KILL.as_raw()));
    }
}
