//! Runs the host programs that make and check disks.
//!
//! A child never outlives us: it gets SIGTERM when the thread that started it dies, however that
//! happens, and when the caller cancels.

use std::ffi::OsStr;
use std::io::{self, BufRead as _, BufReader, Read};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use super::Progress;
use super::error::{Context as _, Error, Result};

/// Lines of a failed tool's output that go into the error.
const DETAIL_LINES: usize = 6;
/// Longest line that is passed on, in bytes.
const LINE_BYTES: u64 = 4096;

/// A host program and the package that has it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tool {
    pub(super) name: &'static str,
    pub(super) package: &'static str,
}

pub(super) const MMDEBSTRAP: Tool = Tool {
    name: "mmdebstrap",
    package: "mmdebstrap",
};
pub(super) const MKE2FS: Tool = Tool {
    name: "mke2fs",
    package: "e2fsprogs",
};
pub(super) const DEBUGFS: Tool = Tool {
    name: "debugfs",
    package: "e2fsprogs",
};
pub(super) const E2FSCK: Tool = Tool {
    name: "e2fsck",
    package: "e2fsprogs",
};

impl Tool {
    /// Finds the program in `PATH`, then where Debian keeps system programs (a user's `PATH`
    /// lacks them).
    pub(super) fn find(self) -> Result<PathBuf> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        self.find_in(&path)
    }

    /// [`Tool::find`] with the search path given.
    pub(super) fn find_in(self, path: &OsStr) -> Result<PathBuf> {
        std::env::split_paths(path)
            .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
            .map(|folder| folder.join(self.name))
            .find(|candidate| candidate.is_file())
            .ok_or(Error::MissingTool {
                tool: self.name,
                package: self.package,
            })
    }

    /// A command in plain C locale, without input, that dies with us.
    pub(super) fn command(self) -> Result<Command> {
        let mut command = Command::new(self.find()?);
        command.env("LC_ALL", "C").stdin(Stdio::null());
        let parent = rustix::process::getpid();
        // SAFETY: runs between fork and exec; both calls are plain system calls without
        // allocation or locks.
        unsafe {
            command.pre_exec(move || {
                rustix::process::set_parent_process_death_signal(Some(
                    rustix::process::Signal::TERM,
                ))?;
                // The parent may have died before the line above.
                if rustix::process::getppid() != Some(parent) {
                    return Err(io::ErrorKind::Interrupted.into());
                }
                Ok(())
            });
        }
        Ok(command)
    }

    /// Runs to the end; hands back the exit code and what it printed on stdout and stderr.
    pub(super) fn run(
        self,
        command: Command,
        progress: &dyn Progress,
    ) -> Result<(ExitStatus, Vec<String>)> {
        let mut running = self.start(command, progress)?;
        // stdout first: the reader of stderr is a thread of its own.
        let mut lines = Vec::new();
        if let Some(stdout) = running.take_stdout() {
            let mut stdout = BufReader::new(stdout);
            while let Some(line) = next_line(&mut stdout) {
                lines.push(line);
            }
        }
        let (status, errors) = running.wait()?;
        lines.extend(errors);
        Ok((status, lines))
    }

    /// Starts it, with stdout to be taken and stderr going to `progress`.
    pub(super) fn start<'p>(
        self,
        mut command: Command,
        progress: &'p dyn Progress,
    ) -> Result<Running<'p>> {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().at("start", self.name.as_ref())?;
        let (send, lines) = channel();
        if let Some(stderr) = child.stderr.take() {
            std::thread::spawn(move || {
                let mut stderr = BufReader::new(stderr);
                while let Some(line) = next_line(&mut stderr) {
                    if send.send(line).is_err() {
                        break;
                    }
                }
            });
        }
        Ok(Running {
            tool: self,
            child,
            lines,
            seen: Vec::new(),
            progress,
        })
    }

    /// The error for a failed run.
    pub(super) fn failed(self, status: ExitStatus, output: &[String]) -> Error {
        let full = output
            .iter()
            .any(|line| line.contains("No space left on device"));
        if full {
            return Error::DiskFull {
                path: std::env::temp_dir(),
            };
        }
        let start = output.len().saturating_sub(DETAIL_LINES);
        Error::ToolFailed {
            tool: self.name,
            status: status.to_string(),
            detail: if output.is_empty() {
                "it said nothing".into()
            } else {
                output[start..].join("; ")
            },
        }
    }
}

/// One line without its end, at most [`LINE_BYTES`] long; progress bars that use `\r` count as
/// lines' ends too.
fn next_line(reader: &mut impl io::BufRead) -> Option<String> {
    let mut line = Vec::new();
    match reader
        .by_ref()
        .take(LINE_BYTES)
        .read_until(b'\n', &mut line)
    {
        Ok(0) | Err(_) => None,
        Ok(_) => {
            let text = String::from_utf8_lossy(&line);
            let text = text.trim_end_matches(['\n', '\r']);
            Some(text.rsplit('\r').next().unwrap_or_default().to_owned())
        }
    }
}

/// A started program. Dropping it stops it.
pub(super) struct Running<'p> {
    tool: Tool,
    child: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
    progress: &'p dyn Progress,
}

impl Running<'_> {
    /// Its standard output, once.
    pub(super) fn take_stdout(&mut self) -> Option<ChildStdout> {
        self.child.stdout.take()
    }

    /// Waits for it; passes its lines on; stops it when the caller cancels.
    pub(super) fn wait(mut self) -> Result<(ExitStatus, Vec<String>)> {
        loop {
            match self.lines.recv_timeout(Duration::from_millis(100)) {
                // debugfs and e2fsck begin with their version, on stderr.
                Ok(line) if line.starts_with("debugfs 1.") || line.starts_with("e2fsck 1.") => {}
                Ok(line) => {
                    self.progress.line(&line);
                    self.seen.push(line);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if self.progress.cancelled() {
                return Err(Error::Cancelled);
            }
        }
        let status = self.child.wait().at("wait for", self.tool.name.as_ref())?;
        Ok((status, std::mem::take(&mut self.seen)))
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if let Ok(Some(_)) = self.child.try_wait() {
            return;
        }
        let pid = rustix::process::Pid::from_child(&self.child);
        // SIGTERM, so that it can take its own mounts and temporary files down.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.child.wait();
    }
}
