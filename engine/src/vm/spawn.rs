//! Starting the VMM's process with what it inherits.
//!
//! All of it travels as descriptors in one message over the socket that is the VMM's standard input:
//! the configuration in a memfd, the control socket, the lifeline. The VMM gets an empty environment
//! and its log as standard error; it leaves our session by itself (a ^C at the terminal is the
//! command's to forward). So there is nothing to do between fork and exec, and the process is made
//! by `posix_spawn`: `fork` would cost more with every megabyte that this process has.

use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use ratoon_vmm_api::{VmConfig, send_descriptors};

use super::shells::{Shells, with_log};
use rustix::fs::{MemfdFlags, memfd_create};

/// What a VMM inherits.
pub(super) struct Inherited<'a> {
    /// The bound control socket.
    pub control: UnixListener,
    /// The read end of its owner's pipe.
    pub lifeline: OwnedFd,
    /// A connection to the pager of its memory.
    pub pager: Option<&'a OwnedFd>,
    /// The files of the generation that it starts from.
    pub generation: &'a [OwnedFd],
    /// Descriptors that only have to stay open, such as an image's lock.
    pub keep_open: &'a [OwnedFd],
}

/// Starts `program` for what is `wanted`, or makes one of the shells that; its log goes to `log`.
///
/// # Errors
/// When the process cannot be made; nothing has been started then.
pub(super) fn spawn(
    program: &Path,
    wanted: &VmConfig,
    log: &Path,
    inherited: Inherited<'_>,
    shells: Option<&Shells>,
) -> std::io::Result<Child> {
    let config = config_file(wanted)?;
    let log = std::fs::OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(log)?;
    let mut fds = vec![
        config.as_fd(),
        inherited.control.as_fd(),
        inherited.lifeline.as_fd(),
    ];
    fds.extend(inherited.pager.map(AsFd::as_fd));
    fds.extend(inherited.generation.iter().map(AsFd::as_fd));
    fds.extend(inherited.keep_open.iter().map(AsFd::as_fd));
    // What a shell has made ahead is for machines that go on from a generation.
    if let (Some(shells), Some(_)) = (shells, &wanted.generation) {
        let class = (wanted.vcpus, wanted.memory_mib);
        if let Some(child) = shells.take(class, &with_log(&log, &fds)) {
            return Ok(child);
        }
    }
    let (ours, theirs) = UnixStream::pair()?;
    send_descriptors(&ours, &fds)?;
    Command::new(program)
        .arg("--owned")
        .env_clear()
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
}

fn config_file(config: &VmConfig) -> std::io::Result<File> {
    let mut file = File::from(memfd_create("vm-config", MemfdFlags::CLOEXEC)?);
    file.write_all(&serde_json::to_vec(config).map_err(std::io::Error::other)?)?;
    file.rewind()?;
    Ok(file)
}
