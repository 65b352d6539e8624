//! Starting the VMM's process with what it inherits.
//!
//! The configuration travels in a memfd, the control socket and the lifeline as descriptors; the
//! VMM gets no path to look up for them, an empty environment, a session of its own (a ^C at the
//! terminal is the command's to forward) and its log as standard error.

use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use ratoon_vmm_api::VmConfig;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{FdFlags, fcntl_setfd};

/// What a VMM inherits.
pub(super) struct Inherited<'a> {
    /// The bound control socket.
    pub control: UnixListener,
    /// The read end of its owner's pipe.
    pub lifeline: OwnedFd,
    /// A connection to the pager of its memory.
    pub pager: Option<&'a OwnedFd>,
    /// Descriptors that only have to stay open, such as an image's lock.
    pub keep_open: &'a [OwnedFd],
}

/// Starts `program` for `config`; its log goes to `log`.
///
/// # Errors
/// When the process cannot be made; nothing has been started then.
pub(super) fn spawn(
    program: &Path,
    config: &VmConfig,
    log: &Path,
    inherited: Inherited<'_>,
) -> std::io::Result<Child> {
    let config_fd = config_file(config)?;
    let log = std::fs::OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(log)?;
    let mut command = Command::new(program);
    command
        .arg("--config-fd")
        .arg(config_fd.as_raw_fd().to_string())
        .arg("--control-fd")
        .arg(inherited.control.as_raw_fd().to_string())
        .arg("--lifeline-fd")
        .arg(inherited.lifeline.as_raw_fd().to_string());
    let mut passed: Vec<RawFd> = vec![
        config_fd.as_raw_fd(),
        inherited.control.as_raw_fd(),
        inherited.lifeline.as_raw_fd(),
    ];
    if let Some(pager) = inherited.pager {
        command.arg("--pager-fd").arg(pager.as_raw_fd().to_string());
        passed.push(pager.as_raw_fd());
    }
    passed.extend(inherited.keep_open.iter().map(AsRawFd::as_raw_fd));
    command
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log);
    let in_child = move || {
        for &fd in &passed {
            // SAFETY: the descriptors are open in the parent until `spawn` has returned, and the
            // child has copies of them under the same numbers.
            let fd = unsafe { BorrowedFd::borrow_raw(fd) };
            fcntl_setfd(fd, FdFlags::empty())?;
        }
        rustix::process::setsid()?;
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes only two kinds of system call (fcntl,
    // setsid); it neither allocates nor locks. `passed` was allocated before the fork.
    unsafe { command.pre_exec(in_child) };
    command.spawn()
}

fn config_file(config: &VmConfig) -> std::io::Result<File> {
    let mut file = File::from(memfd_create("vm-config", MemfdFlags::CLOEXEC)?);
    file.write_all(&serde_json::to_vec(config).map_err(std::io::Error::other)?)?;
    file.rewind()?;
    Ok(file)
}
