//! Starts a program: new session and process group, pipes, ids, directory, environment.
//!
//! The child is made by clone(2) with CLONE_VM and CLONE_VFORK on a stack of its own: nothing is
//! copied, no page faults for page tables, and the parent goes on when the child has called
//! execve or has failed; then the failure lies in shared memory, with the step that failed. All
//! that the child needs is prepared before: it makes system calls and nothing else.
//!
//! How it fails: [`SpawnError`], which names the program, directory or user and turns into an
//! [`ErrorReply`]. The out-of-memory score needs no care here: the kernel never picks PID 1
//! (`oom_unkillable_task`, mm/oom_kill.c), so the runtime keeps the score 0 that children inherit.

use std::ffi::{CString, c_char, c_int, c_void};
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::ptr;

use ratoon_protocol::{ErrorCode, ErrorReply, ExecParams};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::users::{self, User, UserError};

/// Where programs are looked up when the environment has no `PATH`.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Enough for the child's few frames and libc's.
const STACK_LEN: usize = 64 * 1024;

/// A process that runs, and our ends of its pipes. All are blocking pipes: use
/// `RWF_NOWAIT` (another process may have opened the same pipe).
#[derive(Debug)]
pub struct Child {
    /// Its process id, session and process group.
    pub pid: i32,
    /// Its standard input, if it was asked for.
    pub stdin: Option<OwnedFd>,
    /// Its standard output and standard error.
    pub outputs: [OwnedFd; 2],
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
            Self::User(UserError::Read { .. }) | Self::System { .. } => ErrorCode::Failed,
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
    null: OwnedFd,
    stack: Vec<u8>,
}

impl Spawner {
    /// `null` is an open /dev/null.
    pub fn new(null: OwnedFd) -> Self {
        Self {
            null,
            // Zeroed and so not touched before it is used.
            stack: vec![0; STACK_LEN],
        }
    }

    /// Starts a program; returns when it has been executed or has failed to.
    ///
    /// # Errors
    /// See [`SpawnError`]; nothing is left behind then.
    pub fn spawn(&mut self, params: &ExecParams) -> Result<Child, SpawnError> {
        let user = match params.user.as_deref() {
            None | Some("" | "root" | "0") => User::root(),
            Some(spec) => users::find(spec, Path::new("/etc")).map_err(SpawnError::User)?,
        };
        let plan = Plan::new(params, &user)?;
        let pipe = || {
            pipe_with(PipeFlags::CLOEXEC).map_err(|error| SpawnError::System {
                what: "make a pipe".into(),
                source: error.into(),
            })
        };
        let (stdin_child, stdin) = match params.stdin {
            true => pipe().map(|(read, write)| (Some(read), Some(write)))?,
            false => (None, None),
        };
        let (stdout, stdout_child) = pipe()?;
        let (stderr, stderr_child) = pipe()?;
        let child_stdin = stdin_child.as_ref().unwrap_or(&self.null);
        let fds = [child_stdin, &stdout_child, &stderr_child].map(AsRawFd::as_raw_fd);
        let pid = plan.run(fds, &mut self.stack)?;
        Ok(Child {
            pid,
            stdin,
            outputs: [stdout, stderr],
        })
    }
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
    fn new(params: &ExecParams, user: &'a User) -> Result<Self, SpawnError> {
        let program = params.argv.first().ok_or(SpawnError::NoProgram)?;
        if program.is_empty() {
            return Err(SpawnError::NoProgram);
        }
        let argv = params.argv.iter().map(|arg| c_string(arg, "an argument"));
        let argv = argv.collect::<Result<Vec<_>, _>>()?;
        let mut envp = Vec::with_capacity(params.env.len() + 5);
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
        ];
        for (name, value) in defaults {
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

    fn run(&self, fds: [RawFd; 3], stack: &mut [u8]) -> Result<i32, SpawnError> {
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
            step: Step::Session,
            errno: 0,
            tried: 0,
        };
        // 16-byte alignment, as the ABI asks of a stack's top.
        let top = stack.as_mut_ptr_range().end.map_addr(|end| end & !15);
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
        // SAFETY: `stack` and everything `shared` points to outlive the child's use of them, since
        // CLONE_VFORK holds this thread until the child has executed a program or has exited.
        // `child` runs on that stack, only makes system calls and writes to `shared`.
        let pid = unsafe { libc::clone(child, top.cast(), flags, (&raw mut shared).cast()) };
        if pid < 0 {
            return Err(SpawnError::System {
                what: "make a process".into(),
                source: io::Error::last_os_error(),
            });
        }
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

/// The child's steps, in order.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
enum Step {
    Session,
    Streams,
    Ids,
    Directory,
    Execute,
}

/// What parent and child share: the child reads its orders and writes how it failed.
#[repr(C)]
struct Shared {
    argv: *const *const c_char,
    envp: *const *const c_char,
    programs: *const *const c_char,
    directory: *const c_char,
    directory_required: bool,
    ids: bool,
    uid: u32,
    gid: u32,
    groups: *const u32,
    groups_len: usize,
    fds: [RawFd; 3],
    step: Step,
    errno: c_int,
    tried: usize,
}

extern "C" fn child(shared: *mut c_void) -> c_int {
    // SAFETY: the parent passes a `Shared` and sleeps until we are done with it.
    let shared = unsafe { &mut *shared.cast::<Shared>() };
    let errno = child_steps(shared);
    // SAFETY: `shared` is valid as above; volatile for the parent's sake.
    unsafe { ptr::write_volatile(&raw mut shared.errno, errno) };
    // SAFETY: ends this process without any of the parent's exit handlers.
    unsafe { libc::_exit(127) }
}

fn errno() -> c_int {
    // SAFETY: points to this thread's errno, always valid. (The parent's: it sleeps.)
    unsafe { *libc::__errno_location() }
}

/// Returns errno of the step that failed; does not return when the program runs.
fn child_steps(shared: &mut Shared) -> c_int {
    // SAFETY: system calls with integers, or with pointers that the parent prepared and keeps
    // (see `Plan::run`). Ids go through raw system calls: libc's wrappers would try to change all
    // threads of the parent.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
        shared.step = Step::Session;
        if libc::setsid() < 0 {
            return errno();
        }
        shared.step = Step::Streams;
        for (target, &fd) in shared.fds.iter().enumerate() {
            if libc::dup2(fd, target as c_int) < 0 {
                return errno();
            }
        }
        shared.step = Step::Ids;
        if shared.ids {
            let changed = libc::syscall(libc::SYS_setgroups, shared.groups_len, shared.groups) == 0
                && libc::syscall(libc::SYS_setresgid, shared.gid, shared.gid, shared.gid) == 0
                && libc::syscall(libc::SYS_setresuid, shared.uid, shared.uid, shared.uid) == 0;
            if !changed {
                return errno();
            }
        }
        shared.step = Step::Directory;
        if libc::chdir(shared.directory) < 0 && shared.directory_required {
            return errno();
        }
        shared.step = Step::Execute;
        // As execvp: what may not be executed is remembered, the search goes on.
        let mut failed = libc::ENOENT;
        let mut index = 0;
        loop {
            let program = *shared.programs.add(index);
            if program.is_null() {
                return failed;
            }
            libc::execve(program, shared.argv, shared.envp);
            match errno() {
                libc::ENOENT | libc::ENOTDIR if failed == libc::EACCES => {}
                libc::EACCES => {
                    failed = libc::EACCES;
                    shared.tried = index;
                }
                libc::ENOENT | libc::ENOTDIR => shared.tried = index,
                other => {
                    shared.tried = index;
                    return other;
                }
            }
            index += 1;
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
    use std::os::fd::AsFd;

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
        let mut spawner = Spawner::new(null.into());
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
