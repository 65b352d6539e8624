//! Runs the host programs that make and check disks.
//!
//! A child never outlives us. It runs in a process group of its own, beside a shell that waits for
//! the end of a pipe which only we hold: however we die, the pipe ends and the shell sends SIGTERM
//! to the group. (A parent-death signal would reach mmdebstrap's first process alone, which leaves
//! such signals to the others.)

use std::ffi::OsStr;
use std::io::{self, BufRead as _, BufReader, Read};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::Progress;
use super::error::{Context as _, Error, Result};

/// Lines of a failed tool's output that go into the error.
const DETAIL_LINES: usize = 6;
/// How often a silent program's caller is asked whether to go on.
const TICK: Duration = Duration::from_millis(100);
const TICK_SPEC: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};
/// Longest line that is passed on, in bytes.
const LINE_BYTES: u64 = 4096;

/// Runs `"$@"`; see the module's text. The watcher ignores the signal that it sends.
const WATCHED: &str = r#"
exec 3<&0 </dev/null
(trap '' TERM; read -r _ <&3; kill -TERM 0) >/dev/null 2>&1 &
exec "$@" 3<&-
"#;

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

    /// A command in plain C locale, without input, that dies with us. Arguments can be added.
    pub(super) fn command(self) -> Result<Command> {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", WATCHED, self.name]).arg(self.find()?);
        command.env("LC_ALL", "C").process_group(0);
        Ok(command)
    }

    /// Runs to the end; hands back the exit code and what it printed on stdout and stderr.
    pub(super) fn run(
        self,
        command: Command,
        progress: &dyn Progress,
    ) -> Result<(ExitStatus, Vec<String>)> {
        let mut running = self.start(command, progress)?;
        let mut lines = Vec::new();
        let mut stdout = BufReader::new(&mut running);
        while let Some(line) = next_line(&mut stdout) {
            lines.push(line);
        }
        let (status, errors) = running.wait()?;
        lines.extend(errors);
        Ok((status, lines))
    }

    /// Starts it. Its stdout is read from the result; its stderr goes to `progress` meanwhile.
    pub(super) fn start<'p>(
        self,
        mut command: Command,
        progress: &'p dyn Progress,
    ) -> Result<Running<'p>> {
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
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

/// A started program. Reading gives its standard output; dropping stops it.
pub(super) struct Running<'p> {
    tool: Tool,
    child: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
    progress: &'p dyn Progress,
}

impl Running<'_> {
    /// Waits for it, after its output was read; stops it when the caller cancels.
    pub(super) fn wait(mut self) -> Result<(ExitStatus, Vec<String>)> {
        loop {
            if self.progress.cancelled() {
                return Err(Error::Cancelled);
            }
            match self.lines.recv_timeout(TICK) {
                Ok(line) => self.pass_on(line),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        // `Child::wait` would close the watcher's pipe first, which stops the child.
        let status = loop {
            match self
                .child
                .try_wait()
                .at("wait for", self.tool.name.as_ref())?
            {
                Some(status) => break status,
                None if self.progress.cancelled() => return Err(Error::Cancelled),
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        Ok((status, std::mem::take(&mut self.seen)))
    }

    fn pass_on(&mut self, line: String) {
        // debugfs and e2fsck begin with their version, on stderr.
        if line.starts_with("debugfs 1.") || line.starts_with("e2fsck 1.") {
            return;
        }
        self.progress.line(&line);
        self.seen.push(line);
    }
}

impl Read for Running<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            while let Ok(line) = self.lines.try_recv() {
                self.pass_on(line);
            }
            if self.progress.cancelled() {
                return Err(Error::Cancelled.into_io());
            }
            let Some(stdout) = self.child.stdout.as_mut() else {
                return Ok(0);
            };
            let mut ready = [PollFd::new(stdout, PollFlags::IN)];
            match poll(&mut ready, Some(&TICK_SPEC)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return stdout.read(buffer),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if let Ok(Some(_)) = self.child.try_wait() {
            return;
        }
        let group = rustix::process::Pid::from_child(&self.child);
        // SIGTERM, so that it can take its own mounts and temporary files down.
        let _ = rustix::process::kill_process_group(group, rustix::process::Signal::TERM);
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::super::Quiet;
    use super::*;

    const SH: Tool = Tool {
        name: "sh",
        package: "dash",
    };

    #[test]
    fn a_dropped_program_is_stopped_with_its_children() {
        let mut command = SH.command().unwrap();
        command.args(["-c", "sleep 1000 & echo started; wait"]);
        let mut running = SH.start(command, &Quiet).unwrap();
        let mut said = [0; 8];
        running.read_exact(&mut said).unwrap();
        let stdout = running.child.stdout.take();
        drop(running);
        // The pipe ends when the last process that holds it is gone.
        let mut rest = Vec::new();
        stdout.unwrap().read_to_end(&mut rest).unwrap();
        assert_eq!((&said, rest.as_slice()), (b"started\n", &[][..]));
    }

    #[test]
    fn a_programs_status_and_output_come_back() {
        let mut command = SH.command().unwrap();
        command.args(["-c", "echo out; echo err >&2; exit 3"]);
        let (status, lines) = SH.run(command, &Quiet).unwrap();
        assert_eq!(status.code(), Some(3));
        assert_eq!(lines, ["out", "err"]);
        assert_eq!(
            SH.failed(status, &lines).to_string(),
            "sh failed (exit status: 3): out; err"
        );
    }
}
