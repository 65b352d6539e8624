//! Descriptors that the user has opened for the bridge's keys, as in `ratoon agent run … 3<key-file`.
//!
//! They are taken before any other process is started, so that the bridge alone inherits them. Nothing is read.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::fs::SeekFrom;
use rustix::io::{FdFlags, fcntl_setfd};

use super::BridgeConfig;

/// `O_CLOEXEC` as fdinfo shows it (proc_pid_fdinfo(5)).
const CLOSED_ON_EXEC: u32 = 0o2_000_000;

/// The descriptors, each at its own number.
#[derive(Debug, Default)]
pub struct Keys(Vec<OwnedFd>);

impl Keys {
    /// Takes those that the configuration names and that were inherited.
    pub fn take(config: &BridgeConfig) -> Self {
        let mut numbers = config.key_descriptors();
        numbers.sort_unstable();
        numbers.dedup();
        Self(numbers.into_iter().filter_map(take).collect())
    }

    /// Has `command` inherit them.
    pub(super) fn give(&self, command: &mut Command) {
        for fd in &self.0 {
            // A bridge before this one may have read it. What is no file cannot be read again: it says so.
            let _ = rustix::fs::seek(fd, SeekFrom::Start(0));
        }
        let numbers: Vec<RawFd> = self.0.iter().map(AsRawFd::as_raw_fd).collect();
        let inherit = move || {
            for number in &numbers {
                // SAFETY: the command is spawned while `Keys` lives, and the new process has the same descriptors.
                let fd = unsafe { BorrowedFd::borrow_raw(*number) };
                fcntl_setfd(fd, FdFlags::empty())?;
            }
            Ok(())
        };
        // SAFETY: between fork and exec there is only fcntl(2), which is async-signal-safe.
        unsafe { command.pre_exec(inherit) };
    }
}

fn take(number: RawFd) -> Option<OwnedFd> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{number}")).ok()?;
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?;
    let flags = u32::from_str_radix(flags.trim(), 8).ok()?;
    if flags & CLOSED_ON_EXEC != 0 {
        return None;
    }
    // SAFETY: it is open, and nobody owns it: all that this process opens is closed on exec.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    fcntl_setfd(&fd, FdFlags::CLOEXEC).ok()?;
    Some(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_this_process_has_opened_itself_is_no_key() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(take(file.as_raw_fd()).is_none());
        assert!(take(9999).is_none());
    }
}
