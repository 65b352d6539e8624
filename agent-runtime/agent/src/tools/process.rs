//! Processes of tools: each is a session of its own, so that all it starts can be killed, and its output is drained
//! to its end by a thread, so that what stays behind neither blocks nor dies of a closed pipe.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, Signal};

use super::capture::{Capture, Shown, Store};

/// The descriptor on which a session says that a command has ended. Old shells know only one digit.
const STATUS: i32 = 9;
/// More than a pipe holds: what was written before a command's end is within so much.
const DRAIN_BYTES: usize = 1 << 20;

/// What is to be started.
#[derive(Debug)]
pub struct Plan<'a> {
    /// The program and its arguments.
    pub argv: Vec<OsString>,
    /// Where.
    pub directory: &'a Path,
    /// How it is spoken to.
    pub kind: Kind,
    /// How much of its output is shown.
    pub limit: usize,
}

/// How a process is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Not at all: its input is empty.
    Alone,
    /// By a terminal.
    Terminal,
    /// By lines on a pipe; it says on [`STATUS`] when it is done with one.
    Session,
}

/// A process that runs, or has ended and was not waited for.
#[derive(Debug)]
pub struct Process {
    child: Child,
    pidfd: OwnedFd,
    /// Its input: a pipe's or a terminal's end, which does not block.
    pub input: Option<OwnedFd>,
    /// Where a session says that it is done.
    pub status: Option<OwnedFd>,
    /// Its output.
    pub output: Output,
}

/// Keeps [`STATUS`] occupied here, so that nothing of ours has that number when a child gets it.
#[derive(Debug)]
pub struct Reserved(#[expect(dead_code, reason = "held")] OwnedFd);

impl Reserved {
    /// Occupies it.
    pub fn new() -> io::Result<Self> {
        let null = std::fs::File::open("/dev/null")?;
        Ok(Self(rustix::io::fcntl_dupfd_cloexec(&null, STATUS)?))
    }
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(pipe_with(PipeFlags::CLOEXEC)?)
}

fn not_blocking(fd: OwnedFd) -> io::Result<OwnedFd> {
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
    Ok(fd)
}

/// A new terminal: our end and the other.
fn terminal() -> io::Result<(OwnedFd, OwnedFd)> {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&ours)?;
    unlockpt(&ours)?;
    let name = ptsname(&ours, Vec::new())?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let theirs = rustix::fs::open(name.as_c_str(), flags, Mode::empty())?;
    let size = rustix::termios::Winsize {
        ws_row: 24,
        ws_col: 80,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    rustix::termios::tcsetwinsize(&ours, size)?;
    Ok((ours, theirs))
}

impl Process {
    /// Starts it.
    pub fn start(plan: &Plan<'_>, store: &Arc<Store>) -> io::Result<Self> {
        let mut words = plan.argv.iter();
        let program = words.next().ok_or_else(|| io::Error::other("no program"))?;
        let mut command = Command::new(program);
        command
            .args(words)
            .current_dir(plan.directory)
            .env("PAGER", "cat")
            .env("GIT_PAGER", "cat")
            .env("MANPAGER", "cat")
            .env("GIT_TERMINAL_PROMPT", "0")
            .env("PWD", plan.directory)
            .env_remove("RATOON_BRIDGE")
            .env_remove("RATOON_TOKEN_FILE")
            .env_remove("RATOON_AGENT_DIR");
        let (mut input, mut status) = (None, None);
        let mut status_end = None;
        let output = if plan.kind == Kind::Terminal {
            let (ours, theirs) = terminal()?;
            command
                .env("TERM", "xterm-256color")
                .stdin(theirs.try_clone()?)
                .stdout(theirs.try_clone()?)
                .stderr(theirs);
            let ours = not_blocking(ours)?;
            input = Some(ours.try_clone()?);
            ours
        } else {
            let (read, write) = pipe()?;
            command
                .env("TERM", "dumb")
                .stdin(Stdio::null())
                .stdout(write.try_clone()?)
                .stderr(write);
            not_blocking(read)?
        };
        if plan.kind == Kind::Session {
            let (theirs, ours) = pipe()?;
            command.stdin(theirs);
            input = Some(not_blocking(ours)?);
            let (ours, theirs) = pipe()?;
            status = Some(not_blocking(ours)?);
            status_end = Some(theirs);
        }
        let raw_status = status_end.as_ref().map(|fd| fd.as_raw_fd());
        let has_terminal = plan.kind == Kind::Terminal;
        // SAFETY: between fork and exec the closure makes system calls alone, with integers that it owns.
        unsafe {
            command.pre_exec(move || {
                let done = libc::setsid() >= 0
                    && (!has_terminal || libc::ioctl(0, libc::TIOCSCTTY, 0) >= 0)
                    && match raw_status {
                        None => true,
                        Some(STATUS) => libc::fcntl(STATUS, libc::F_SETFD, 0) >= 0,
                        Some(fd) => libc::dup2(fd, STATUS) >= 0,
                    };
                if done {
                    Ok(())
                } else {
                    Err(io::Error::last_os_error())
                }
            });
        }
        let mut child = command.spawn()?;
        // The other ends of the pipes are the child's alone from here on.
        drop(command);
        drop(status_end);
        let pid = Pid::from_child(&child);
        let opened = rustix::process::pidfd_open(pid, PidfdFlags::empty());
        let started = opened.map_err(io::Error::from).and_then(|pidfd| {
            let output = Output::start(output, Capture::new(store.clone(), plan.limit))?;
            Ok((pidfd, output))
        });
        match started {
            Ok((pidfd, output)) => Ok(Self {
                child,
                pidfd,
                input,
                status,
                output,
            }),
            Err(error) => {
                // It is ours and just begun.
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    /// Readable when it has ended.
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// How it has ended, if it has.
    pub fn exit(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Where it is.
    pub fn directory(&self) -> Option<PathBuf> {
        std::fs::read_link(format!("/proc/{}/cwd", self.child.id())).ok()
    }

    /// Kills it and all in its process group.
    pub fn kill(&mut self) {
        // When it is gone there is nobody to kill; its group may still have others.
        let _ = rustix::process::kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        let _ = self.child.wait();
    }
}

/// How a process ended, in a few words.
pub fn told(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => "it ended".into(),
    }
}

/// A process's output, drained by a thread until nobody can write to it any more.
#[derive(Debug, Clone)]
pub struct Output(Arc<Draining>);

#[derive(Debug)]
struct Draining {
    fd: OwnedFd,
    capture: Mutex<Option<Capture>>,
}

impl Output {
    fn start(fd: OwnedFd, capture: Capture) -> io::Result<Self> {
        let shared = Arc::new(Draining {
            fd,
            capture: Mutex::new(Some(capture)),
        });
        let theirs = shared.clone();
        std::thread::Builder::new()
            .name("output".into())
            .stack_size(128 << 10)
            .spawn(move || {
                while theirs.wait() {
                    if theirs.read(&mut theirs.lock(), DRAIN_BYTES) {
                        return;
                    }
                }
            })?;
        Ok(Self(shared))
    }

    /// What came since the last time, all that was written before now included; `limit` for what comes next.
    pub fn take(&self, store: &Arc<Store>, limit: usize) -> Shown {
        let mut capture = self.0.lock();
        self.0.read(&mut capture, DRAIN_BYTES);
        let next = Capture::new(store.clone(), limit);
        capture
            .replace(next)
            .map(Capture::finish)
            .unwrap_or_default()
    }

    /// What comes is kept no more.
    pub fn forget(&self) {
        self.0.lock().take();
    }

    /// Shows less of what is being taken.
    pub fn limit(&self, limit: usize) {
        if let Some(capture) = self.0.lock().as_mut() {
            capture.limit(limit);
        }
    }
}

impl Draining {
    fn lock(&self) -> MutexGuard<'_, Option<Capture>> {
        self.capture.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(self.fd.as_fd(), PollFlags::IN)];
        matches!(poll(&mut fds, None), Ok(_) | Err(Errno::INTR))
    }

    /// Reads what is there, `most` at most; says whether it is the end.
    fn read(&self, capture: &mut Option<Capture>, most: usize) -> bool {
        let mut buffer = [0; 32 << 10];
        let mut all = 0;
        while all < most {
            match rustix::io::read(&self.fd, &mut buffer) {
                // A terminal's other end is closed: EIO.
                Ok(0) | Err(Errno::IO) => return true,
                Ok(read) => {
                    all += read;
                    if let Some(capture) = capture {
                        capture.push(&buffer[..read]);
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return false,
                Err(_) => return true,
            }
        }
        false
    }
}
