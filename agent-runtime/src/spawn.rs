//! Starts a program: new session and process group, pipes, ids, directory, environment.
//!
//! The child is made by clone(2) with CLONE_VM and CLONE_VFORK on a stack of its own: nothing is
//! copied, no page faults for page tables, and the parent goes on when the child has called
//! execve or has failed; then the failure lies in shared memory, with the step that failed. All
//! that the child needs is prepared before: it makes system calls and nothing else (`child.rs`). clone3 puts it
//! into its control group at birth: to move it there later waits for a grace period of the kernel.
//!
//! How it fails: [`SpawnError`], which names the program, directory or user and turns into an
//! [`ErrorReply`]. The out-of-memory score needs no care here: the kernel never picks PID 1
//! (`oom_unkillable_task`, mm/oom_kill.c), so the runtime keeps the score 0 that children inherit.

use std::ffi::{CString, c_char};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::ptr;

use ratoon_protocol::{ErrorCode, ErrorReply, ExecParams, Size};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::pty::OpenptFlags;

mod child;

use child::{CLONE_INTO_CGROUP, CloneArgs, Shared, Step, clone_and_run};

use crate::groups::{Group, Groups};
use crate::swap::forms::{Fd, carried};
use crate::users::{self, User, UserError};

/// The variable that says which child of a fork the machine is, when it is one.
pub const CHILD: &str = "RATOON_CHILD";

/// Where programs are looked up when the environment has no `PATH`.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Enough for the child's few frames and libc's.
const STACK_LEN: usize = 64 * 1024;

/// A process that runs, and our ends of its streams.
#[derive(Debug)]
pub struct Child {
    /// Its process id, session and process group.
    pub pid: i32,
    /// Its standard input, if it was asked for.
    pub stdin: Option<OwnedFd>,
    /// Its standard output and standard error. With a terminal, `stdin` and the first one are its
    /// master, non-blocking; otherwise all are blocking pipes: use [`read_now`] and [`write_now`]
    /// (another process may have opened the same pipe).
    pub outputs: [Option<OwnedFd>; 2],
    /// Its control group, if there are any.
    pub group: Option<Group>,
}

/// Why a program does not run.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// `argv` is empty.
    #[error("argv is empty: name a program")]
    NoProgram,
    /// A zero byte, or `=` in a variable's name.
    #[error("{0} cannot be passed to a program")]
    BadString(String),
    /// User or group.
    #[error("cannot run as the user")]
    User(#[source] UserError),
    /// A bare name that no directory of PATH has.
    #[error("command not found: `{program}` is in none of PATH={path}")]
    NotInPath {
        /// As asked for.
        program: String,
        /// The PATH searched.
        path: String,
    },
    /// The path has no file.
    #[error("no such program: {0}")]
    NoSuchProgram(String),
    /// The file is there; what its first line or ELF header asks for is not.
    #[error("{0} is there, but the interpreter or loader that it names is not")]
    NoInterpreter(String),
    /// A directory.
    #[error("{0} is a directory, not a program")]
    IsDirectory(String),
    /// No permission to execute.
    #[error("{0} is not executable (for this user)")]
    NotExecutable(String),
    /// Neither ELF nor `#!`.
    #[error("{0} is not in a format that this machine can execute (no `#!` line?)")]
    Format(String),
    /// No terminal to be had.
    #[error("cannot make a terminal")]
    Terminal(#[source] io::Error),
    /// The working directory.
    #[error("cannot start in directory {path}")]
    Directory {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Anything else.
    #[error("cannot {what}")]
    System {
        /// The step.
        what: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl SpawnError {
    /// As the client is told.
    pub fn reply(&self) -> ErrorReply {
        use io::ErrorKind::{NotADirectory, NotFound, PermissionDenied};
        let code = match self {
            Self::NoProgram | Self::BadString(_) => ErrorCode::BadRequest,
            Self::User(UserError::NoUser { .. } | UserError::NoGroup { .. })
            | Self::NotInPath { .. }
            | Self::NoSuchProgram(_)
            | Self::NoInterpreter(_) => ErrorCode::NotFound,
            Self::IsDirectory(_) | Self::NotExecutable(_) | Self::Format(_) => {
                ErrorCode::PermissionDenied
            }
            Self::Directory { source, .. } => match source.kind() {
                NotFound | NotADirectory => ErrorCode::NotFound,
                PermissionDenied => ErrorCode::PermissionDenied,
                _ => ErrorCode::Failed,
            },
            Self::System { source, .. } if source.raw_os_error() == Some(libc::EAGAIN) => {
                ErrorCode::NoSpace
            }
            Self::User(UserError::Read { .. }) | Self::System { .. } | Self::Terminal(_) => {
                ErrorCode::Failed
            }
        };
        let mut message = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(error) = source {
            message.push_str(": ");
            message.push_str(&error.to_string());
            source = error.source();
        }
        ErrorReply::new(code, message)
    }
}

/// Makes processes. Keeps what all of them need.
#[derive(Debug)]
pub struct Spawner {
    null: Fd,
    stack: Stack,
    groups: Option<Groups>,
    /// See [`CHILD`].
    child: Option<String>,
}

carried!(Spawner { null, groups, child; stack });

/// Where a child runs until it executes its program.
#[derive(Debug)]
struct Stack(Vec<u8>);

impl Default for Stack {
    fn default() -> Self {
        // Zeroed and so not touched before it is used.
        Self(vec![0; STACK_LEN])
    }
}

impl Spawner {
    /// `null` is an open /dev/null. `groups`: each process gets a control group.
    pub fn new(null: OwnedFd, groups: bool) -> Self {
        Self {
            null: null.into(),
            stack: Stack::default(),
            groups: (!groups).then(Groups::default),
            child: None,
        }
    }

    /// Which child of a fork this machine is: programs that are started from now on have it in their
    /// environment.
    pub fn set_child(&mut self, index: Option<u32>) {
        self.child = index.map(|index| index.to_string());
    }

    /// What the variable [`CHILD`] is to be, unless the caller says otherwise.
    pub fn child(&self) -> Option<&str> {
        self.child.as_deref()
    }

    /// The control groups, made when they are first wanted.
    fn groups(&mut self) -> &mut Groups {
        self.groups.get_or_insert_with(|| {
            Groups::set_up().unwrap_or_else(|error| {
                eprintln!("ratoon-runtime: no control groups: {error}; going on without");
                Groups::default()
            })
        })
    }

    /// Makes the control group above all others, if it is not there: it is to be frozen.
    pub fn prepare(&mut self) {
        self.groups();
    }

    /// A group whose process has ended.
    pub fn give_back(&mut self, group: Option<Group>) {
        if let (Some(groups), Some(group)) = (&mut self.groups, group) {
            groups.give_back(group);
        }
    }

    /// Starts a program; returns when it has been executed or has failed to.
    ///
    /// # Errors
    /// See [`SpawnError`]; nothing is left behind then.
    pub fn spawn(&mut self, params: &ExecParams) -> Result<Child, SpawnError> {
        self.spawn_with(params, None)
    }

    /// As [`Spawner::spawn`]; `extra` is the program's descriptor 3.
    ///
    /// # Errors
    /// See [`SpawnError`]; nothing is left behind then.
    pub fn spawn_with(
        &mut self,
        params: &ExecParams,
        extra: Option<OwnedFd>,
    ) -> Result<Child, SpawnError> {
        let user = match params.user.as_deref() {
            None | Some("" | "root" | "0") => User::root(),
            Some(spec) => users::find(spec, Path::new("/etc")).map_err(SpawnError::User)?,
        };
        let plan = Plan::new(params, &user, self.child())?;
        let streams = match params.pty {
            Some(size) => Streams::terminal(size, &user).map_err(SpawnError::Terminal)?,
            None => Streams::pipes(params.stdin).map_err(|source| SpawnError::System {
                what: "make a pipe".into(),
                source,
            })?,
        };
        let [stdin, stdout, stderr] = &streams.child;
        let fd = |own: Option<&OwnedFd>| own.map_or(self.null.as_raw_fd(), AsRawFd::as_raw_fd);
        let child_stderr = stderr.as_ref().or(stdout.as_ref());
        let fds = [stdin.as_ref(), stdout.as_ref(), child_stderr].map(fd);
        let extra = extra.as_ref().map(AsRawFd::as_raw_fd);
        let group = self.groups().take();
        let result = plan.run(
            fds,
            extra,
            params.pty.is_some(),
            group.as_ref(),
            &mut self.stack.0,
        );
        match result {
            Ok(pid) => Ok(Child {
                pid,
                stdin: streams.stdin,
                outputs: streams.outputs,
                group,
            }),
            Err(error) => {
                self.give_back(group);
                Err(error)
            }
        }
    }
}

/// Both ends of a child's standard streams.
struct Streams {
    child: [Option<OwnedFd>; 3],
    stdin: Option<OwnedFd>,
    outputs: [Option<OwnedFd>; 2],
}

impl Streams {
    fn pipes(with_stdin: bool) -> io::Result<Self> {
        let pipe = || pipe_with(PipeFlags::CLOEXEC);
        let (stdin_child, stdin) = match with_stdin {
            true => pipe().map(|(read, write)| (Some(read), Some(write)))?,
            false => (None, None),
        };
        let (stdout, stdout_child) = pipe()?;
        let (stderr, stderr_child) = pipe()?;
        Ok(Self {
            child: [stdin_child, Some(stdout_child), Some(stderr_child)],
            stdin,
            outputs: [Some(stdout), Some(stderr)],
        })
    }

    fn terminal(size: Size, user: &User) -> io::Result<Self> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = rustix::pty::openpt(flags)?;
        rustix::fs::fcntl_setfl(&master, rustix::fs::OFlags::NONBLOCK)?;
        rustix::pty::unlockpt(&master)?;
        let peer = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
        set_size(master.as_fd(), size)?;
        if user.uid != 0 {
            let owner = Some(rustix::fs::Uid::from_raw(user.uid));
            rustix::fs::fchown(&peer, owner, None)?;
        }
        let second = rustix::io::fcntl_dupfd_cloexec(&master, 3)?;
        let stdin = rustix::io::fcntl_dupfd_cloexec(&peer, 3)?;
        Ok(Self {
            child: [Some(stdin), Some(peer), None],
            stdin: Some(second),
            outputs: [Some(master), None],
        })
    }
}

/// Sets a terminal's size; its foreground process gets SIGWINCH.
///
/// # Errors
/// When the descriptor is no terminal.
pub fn set_size(terminal: BorrowedFd<'_>, size: Size) -> io::Result<()> {
    let size = rustix::termios::Winsize {
        ws_row: size.rows,
        ws_col: size.cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    Ok(rustix::termios::tcsetwinsize(terminal, size)?)
}

/// Everything the child needs, as C wants it.
struct Plan<'a> {
    argv: Vec<CString>,
    envp: Vec<CString>,
    /// What to try to execute, in order.
    programs: Vec<CString>,
    path: Option<String>,
    directory: CString,
    directory_required: bool,
    user: &'a User,
}

fn c_string(text: &str, what: &str) -> Result<CString, SpawnError> {
    CString::new(text).map_err(|_| SpawnError::BadString(format!("{what} with a zero byte")))
}

impl<'a> Plan<'a> {
    fn new(params: &ExecParams, user: &'a User, child: Option<&str>) -> Result<Self, SpawnError> {
        let shell;
        let argv = match &params.shell {
            Some(line) if params.argv.is_empty() => {
                shell = ["/bin/sh".to_owned(), "-c".to_owned(), line.clone()];
                &shell[..]
            }
            Some(_) => return Err(SpawnError::BadString("both argv and shell".into())),
            None => &params.argv,
        };
        let program = argv.first().ok_or(SpawnError::NoProgram)?;
        if program.is_empty() {
            return Err(SpawnError::NoProgram);
        }
        let argv = argv.iter().map(|arg| c_string(arg, "an argument"));
        let argv = argv.collect::<Result<Vec<_>, _>>()?;
        let mut envp = Vec::with_capacity(params.env.len() + 7);
        for (name, value) in &params.env {
            if name.is_empty() || name.contains('=') {
                let shown = format!("a variable named `{}`", name.escape_debug());
                return Err(SpawnError::BadString(shown));
            }
            envp.push(c_string(&format!("{name}={value}"), "a variable")?);
        }
        let given = |wanted: &str| {
            let mut found = params.env.iter().rev().filter(|(name, _)| name == wanted);
            found.next().map(|(_, value)| value.as_str())
        };
        let defaults = [
            ("PATH", DEFAULT_PATH),
            ("HOME", &user.home),
            ("USER", &user.name),
            ("LOGNAME", &user.name),
            ("LANG", "C.UTF-8"),
            ("TERM", "xterm-256color"),
        ];
        let wanted = if params.pty.is_some() { 6 } else { 5 };
        let child = child.map(|index| (CHILD, index));
        for (name, value) in defaults.into_iter().take(wanted).chain(child) {
            if given(name).is_none() {
                envp.push(c_string(&format!("{name}={value}"), "a variable")?);
            }
        }
        let (programs, path) = if program.contains('/') {
            (vec![c_string(program, "a program")?], None)
        } else {
            let path = given("PATH").unwrap_or(DEFAULT_PATH);
            let programs = path
                .split(':')
                .filter(|directory| !directory.is_empty())
                .map(|directory| c_string(&format!("{directory}/{program}"), "a program"))
                .collect::<Result<_, _>>()?;
            (programs, Some(path.to_owned()))
        };
        let directory = params.cwd.as_deref().unwrap_or(&user.home);
        Ok(Self {
            argv,
            envp,
            programs,
            path,
            directory: c_string(directory, "a directory")?,
            directory_required: params.cwd.is_some(),
            user,
        })
    }

    fn run(
        &self,
        fds: [RawFd; 3],
        extra: Option<RawFd>,
        terminal: bool,
        group: Option<&Group>,
        stack: &mut [u8],
    ) -> Result<i32, SpawnError> {
        let pointers = |strings: &[CString]| -> Vec<*const c_char> {
            let all = strings.iter().map(|string| string.as_ptr());
            all.chain([ptr::null()]).collect()
        };
        let (argv, envp, programs) = (
            pointers(&self.argv),
            pointers(&self.envp),
            pointers(&self.programs),
        );
        let mut shared = Shared {
            argv: argv.as_ptr(),
            envp: envp.as_ptr(),
            programs: programs.as_ptr(),
            directory: self.directory.as_ptr(),
            directory_required: self.directory_required,
            ids: !self.user.is_plain_root(),
            uid: self.user.uid,
            gid: self.user.gid,
            groups: self.user.groups.as_ptr(),
            groups_len: self.user.groups.len(),
            fds,
            extra: extra.unwrap_or(-1),
            terminal,
            step: Step::Session,
            errno: 0,
            tried: 0,
        };
        let mut args = CloneArgs {
            flags: (libc::CLONE_VM | libc::CLONE_VFORK) as u64,
            exit_signal: libc::SIGCHLD as u64,
            stack: stack.as_mut_ptr() as u64,
            // The ABI wants a stack's top at a multiple of 16.
            stack_size: ((stack.as_ptr() as u64 + stack.len() as u64) & !15)
                - stack.as_ptr() as u64,
            ..CloneArgs::default()
        };
        if let Some(group) = group {
            args.flags |= CLONE_INTO_CGROUP;
            args.cgroup = group.fd() as u64;
        }
        // SAFETY: `stack` and everything `shared` points to outlive the child's use of them, since
        // CLONE_VFORK holds this thread until the child has executed a program or has exited.
        let pid = unsafe { clone_and_run(&raw const args, &raw mut shared) };
        if pid < 0 {
            return Err(SpawnError::System {
                what: "make a process".into(),
                source: io::Error::from_raw_os_error(-pid as i32),
            });
        }
        let pid = pid as i32;
        // SAFETY: a plain integer that the child wrote before this thread went on; volatile, as
        // the compiler cannot see that writer.
        let errno = unsafe { ptr::read_volatile(&raw const shared.errno) };
        if errno == 0 {
            return Ok(pid);
        }
        // It has exited with nothing done: take it away, nobody else knows of it.
        if let Some(pid) = rustix::process::Pid::from_raw(pid) {
            let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
        }
        // SAFETY: as above.
        let (step, tried) = unsafe {
            (
                ptr::read_volatile(&raw const shared.step),
                ptr::read_volatile(&raw const shared.tried),
            )
        };
        Err(self.explain(step, io::Error::from_raw_os_error(errno), tried))
    }

    fn explain(&self, step: Step, source: io::Error, tried: usize) -> SpawnError {
        let system = |what: &str, source| SpawnError::System {
            what: what.into(),
            source,
        };
        match step {
            Step::Session => system("begin a session", source),
            Step::Streams => system("join the standard streams", source),
            Step::Ids => system(&format!("become user {}", self.user.name), source),
            Step::Directory => SpawnError::Directory {
                path: self.directory.to_string_lossy().into_owned(),
                source,
            },
            Step::Execute => self.explain_execute(source, tried),
        }
    }

    fn explain_execute(&self, source: io::Error, tried: usize) -> SpawnError {
        let name = |string: Option<&CString>| {
            string.map_or(String::new(), |name| name.to_string_lossy().into_owned())
        };
        let program = name(self.programs.get(tried));
        // Relative paths are meant from the child's directory.
        let directory = self.directory.to_string_lossy();
        let seen = |index| {
            let program = name(self.programs.get(index));
            fs::metadata(Path::new(directory.as_ref()).join(program)).ok()
        };
        match source.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR) => match &self.path {
                _ if seen(tried).is_some_and(|found| !found.is_dir()) => {
                    SpawnError::NoInterpreter(program)
                }
                Some(path) => SpawnError::NotInPath {
                    program: name(self.argv.first()),
                    path: path.clone(),
                },
                None => SpawnError::NoSuchProgram(program),
            },
            Some(libc::ENOEXEC) => SpawnError::Format(program),
            Some(libc::EACCES) => match seen(tried) {
                Some(found) if found.is_dir() => SpawnError::IsDirectory(program),
                _ => SpawnError::NotExecutable(program),
            },
            _ => SpawnError::System {
                what: format!("execute {program}"),
                source,
            },
        }
    }
}

/// Reads what is there without waiting, whatever the descriptor's flags say.
///
/// # Errors
/// `WOULDBLOCK` when nothing is there.
pub fn read_now(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> rustix::io::Result<usize> {
    let mut parts = [io::IoSliceMut::new(buffer)];
    rustix::io::preadv2(fd, &mut parts, u64::MAX, rustix::io::ReadWriteFlags::NOWAIT)
}

/// Writes what fits without waiting, whatever the descriptor's flags say.
///
/// # Errors
/// `WOULDBLOCK` when nothing fits, `PIPE` when nobody reads.
pub fn write_now(fd: BorrowedFd<'_>, bytes: &[u8]) -> rustix::io::Result<usize> {
    let parts = [io::IoSlice::new(bytes)];
    rustix::io::pwritev2(fd, &parts, u64::MAX, rustix::io::ReadWriteFlags::NOWAIT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn reading_and_writing_do_not_wait_on_a_blocking_pipe() {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let mut buffer = [0; 4096];
        let would_block = Err(rustix::io::Errno::AGAIN);
        assert_eq!(read_now(read.as_fd(), &mut buffer), would_block);
        while write_now(write.as_fd(), &buffer).is_ok() {}
        assert_eq!(write_now(write.as_fd(), &buffer), would_block);
        assert_eq!(read_now(read.as_fd(), &mut buffer), Ok(4096));
        drop(read);
        // Another test's child holds a copy of the read end between its fork and its exec.
        let deadline = Instant::now() + Duration::from_secs(10);
        let error = loop {
            match write_now(write.as_fd(), &buffer) {
                Ok(_) | Err(rustix::io::Errno::AGAIN) if Instant::now() < deadline => {
                    std::thread::yield_now();
                }
                result => break result,
            }
        };
        assert_eq!(error, Err(rustix::io::Errno::PIPE));
    }

    #[test]
    fn a_child_that_fails_leaves_no_zombie_and_says_the_step() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let mut spawner = Spawner::new(null.into(), false);
        let params = ExecParams {
            argv: vec!["true".into()],
            cwd: Some("/no/such".into()),
            ..ExecParams::default()
        };
        let error = spawner.spawn(&params).unwrap_err();
        assert!(
            matches!(&error, SpawnError::Directory { path, source }
                if path == "/no/such" && source.raw_os_error() == Some(libc::ENOENT)),
            "{error:?}"
        );
        let children = std::fs::read_to_string("/proc/thread-self/children").unwrap();
        assert_eq!(children, "");
    }
}
