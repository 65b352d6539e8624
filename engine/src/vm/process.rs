//! Naming a process so that a recycled pid is never taken for it.
//!
//! A pid alone is reused; a pid with its start time (field 22 of `/proc/<pid>/stat`, proc(5)) and
//! the boot's id is not. A signal goes through a pidfd that was opened *before* the start time was
//! compared, so it reaches that process or none.

use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// One process, for as long as this boot of the host lasts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRef {
    /// Its process id.
    pub pid: i32,
    /// When it started, in clock ticks after the host's boot.
    pub start_ticks: u64,
    /// The host's boot: `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
}

/// A living process.
#[derive(Debug)]
pub struct ProcessHandle(OwnedFd);

impl ProcessRef {
    /// This process.
    pub fn current() -> Option<Self> {
        Self::of(i32::try_from(std::process::id()).ok()?)
    }

    /// The process that has this pid now; `None` when there is none or it has ended (a zombie).
    pub fn of(pid: i32) -> Option<Self> {
        let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
        Some(Self {
            pid,
            start_ticks: living_start_ticks(&stat)?,
            boot_id: boot_id()?,
        })
    }

    /// A handle on the process, `None` when it has ended.
    pub fn open(&self) -> Option<ProcessHandle> {
        let handle = pidfd_open(Pid::from_raw(self.pid)?, PidfdFlags::empty()).ok()?;
        (Self::of(self.pid)? == *self).then_some(ProcessHandle(handle))
    }

    /// Whether it still runs.
    pub fn is_alive(&self) -> bool {
        Self::of(self.pid).is_some_and(|now| now == *self)
    }
}

impl ProcessHandle {
    /// The descriptor: readable once the process has ended.
    pub fn fd(&self) -> &OwnedFd {
        &self.0
    }

    /// Sends a signal; that the process has just ended is no error.
    ///
    /// # Errors
    /// `EPERM` for another user's process.
    pub fn signal(&self, signal: Signal) -> std::io::Result<()> {
        match pidfd_send_signal(&self.0, signal) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until the process has ended; `false` when `timeout` passed first.
    ///
    /// # Errors
    /// When the system refuses to wait.
    pub fn wait(&self, timeout: Duration) -> std::io::Result<bool> {
        let end = std::time::Instant::now() + timeout;
        loop {
            let left = end.saturating_duration_since(std::time::Instant::now());
            let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
            match poll(&mut fds, Some(&timespec(left))) {
                Ok(0) if left.is_zero() => return Ok(false),
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(true),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// A duration as poll(2) takes it; far ones are cut to a day, which every caller's loop repeats.
pub(crate) fn timespec(duration: Duration) -> Timespec {
    let duration = duration.min(Duration::from_secs(24 * 3600));
    Timespec {
        tv_sec: duration.as_secs() as i64,
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}

fn boot_id() -> Option<String> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned())
}

/// Field 22 of a stat line. The second field, the command's name, may hold spaces and
/// parentheses, so counting starts after the last `)`.
fn living_start_ticks(stat: &[u8]) -> Option<u64> {
    let after_name = stat.iter().rposition(|&byte| byte == b')')? + 1;
    let rest = std::str::from_utf8(stat.get(after_name..)?).ok()?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X" | "x") {
        return None;
    }
    // `state` is field 3.
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_spaces_and_parentheses_does_not_shift_the_fields() {
        let stat = b"7 (a) R (b) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20";
        assert_eq!(living_start_ticks(stat), Some(4242));
    }

    #[test]
    fn a_zombie_is_not_alive() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        // Its exit is seen when it has become a zombie; only then is it reaped.
        let handle =
            ProcessHandle(pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap());
        assert!(handle.wait(Duration::from_secs(60)).unwrap());
        assert_eq!(ProcessRef::of(pid), None);
        child.wait().unwrap();
    }

    #[test]
    fn a_reused_pid_is_another_process() {
        let mut reference = ProcessRef::current().unwrap();
        assert!(reference.is_alive());
        assert!(reference.open().is_some());
        reference.start_ticks += 1;
        assert!(!reference.is_alive());
        assert!(reference.open().is_none());
        let mut other_boot = ProcessRef::current().unwrap();
        other_boot.boot_id.push('x');
        assert!(!other_boot.is_alive());
    }

    #[test]
    fn a_stat_line_cut_short_is_no_process() {
        for stat in [&b""[..], b"7 (a", b"7 (a) S 1 2 3", b"7 (a) S \xff"] {
            assert_eq!(living_start_ticks(stat), None);
        }
    }
}
