//! Another runtime takes this one's place: same process, same children, same connections.
//!
//! ```text
//!   runtime.swap: bytes --> memfd --> length, BLAKE3, ELF --> (what cannot go on ends) --> rehearsal
//!      --> state in a memfd --> execve(new) --take-over--> reads the state, serves, replies
//!                                    \--(refuses)--> execve(old) --take-back--> reads it, answers why
//! ```
//!
//! What goes on: processes with their pipes, terminals, time-outs and spools; interpreters; downloads;
//! connections to ports; sessions and connections with every byte that was received or is unsent; who
//! the machine is. What cannot: work on threads (trees, watches, `sync`), uploads, ports that are being
//! called. The swap waits [`PATIENCE`] for these to end, then gives up.
//!
//! How it fails: until execve nothing has changed, and the call's error says why. After it, the new
//! runtime makes second descriptors of all that the state names before it closes the first: when it
//! refuses, the old one finds everything as it left it. Only a runtime that dies after its rehearsal
//! takes the machine with it.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use ratoon_protocol::{Call, ErrorCode, ErrorReply, RuntimeSwap, Swapped};
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::Value;

use crate::boot::one_line;
use crate::code::Contexts;
use crate::server::Server;
use crate::sessions::{CallRef, Sessions};
use crate::spawn::Spawner;
use crate::sys;
use crate::system::{self, Identity};
use crate::task::{Job, Task};

pub(crate) mod forms;
mod rehearsal;
pub mod state;

use forms::{Carried, Fd, member, members, put};
use state::StateError;

/// How long what cannot go on may take to end.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// The longest binary, in bytes.
const MAX_BINARY_LEN: u64 = 64 << 20;

/// Most bytes that are held for clients: the state has them twice as long.
const MAX_HELD: usize = 16 << 20;

/// Longest reason that an old runtime is given, in bytes.
const MAX_REASON: usize = 1024;

fn failed(message: impl Into<String>) -> ErrorReply {
    ErrorReply::new(ErrorCode::Failed, message)
}

/// A runtime that comes.
#[derive(Debug)]
pub struct Incoming {
    binary: OwnedFd,
    len: u64,
    digest: blake3::Hash,
    /// When to wait no longer for what cannot go on.
    pub until: Option<Instant>,
}

impl Incoming {
    /// A place for it; also the descriptor to which its bytes go.
    ///
    /// # Errors
    /// It is too long, its digest is none, there is no memory.
    pub fn begin(params: &RuntimeSwap) -> Result<(Self, OwnedFd), ErrorReply> {
        let bad = |message| ErrorReply::new(ErrorCode::BadRequest, message);
        if !(1..=MAX_BINARY_LEN).contains(&params.bytes) {
            return Err(bad(format!(
                "a runtime has 1 to {MAX_BINARY_LEN} bytes, not {}",
                params.bytes
            )));
        }
        let digest = blake3::Hash::from_hex(&params.blake3)
            .map_err(|_| bad("`blake3` is not 64 hexadecimal digits".into()))?;
        let short = |error: Errno| {
            let message = format!("no place for the new runtime: {error}");
            ErrorReply::new(ErrorCode::NoSpace, message)
        };
        let binary = memory("ratoon-runtime", true).map_err(short)?;
        // What is written beyond its end is refused by the kernel.
        ftruncate(&binary, params.bytes).map_err(short)?;
        fcntl_add_seals(&binary, SealFlags::GROW | SealFlags::SHRINK).map_err(short)?;
        let second = rustix::io::fcntl_dupfd_cloexec(&binary, 3).map_err(short)?;
        let incoming = Self {
            binary,
            len: params.bytes,
            digest,
            until: None,
        };
        Ok((incoming, second))
    }

    /// What a client is told whose bytes were not taken.
    pub fn not_written(error: Errno) -> ErrorReply {
        match error {
            Errno::PERM => {
                let message = "more bytes came than were announced";
                ErrorReply::new(ErrorCode::BadRequest, message)
            }
            error => ErrorReply::new(
                ErrorCode::NoSpace,
                format!("cannot keep the new runtime: {error}"),
            ),
        }
    }

    /// All of it has come, `written` bytes: is it what was announced?
    fn check(&self, written: u64) -> Result<(), ErrorReply> {
        let bad = |message| Err(ErrorReply::new(ErrorCode::BadRequest, message));
        if written != self.len {
            let message = format!("only {written} of the runtime's {} bytes came", self.len);
            return bad(message);
        }
        let unreadable = |error: io::Error| failed(format!("cannot read the new runtime: {error}"));
        // Nobody changes it any more.
        fcntl_add_seals(&self.binary, SealFlags::WRITE | SealFlags::SEAL)
            .map_err(|error| unreadable(error.into()))?;
        let file = File::from(self.binary.try_clone().map_err(unreadable)?);
        let mut hasher = blake3::Hasher::new();
        let (mut piece, mut at) = (vec![0; 64 << 10], 0);
        while at < self.len {
            let len = file.read_at(&mut piece, at).map_err(unreadable)?;
            if len == 0 {
                return Err(failed("the new runtime has lost its end"));
            }
            if at == 0 && !is_program(&piece[..len]) {
                return bad("the new runtime is not an ELF program for x86-64".into());
            }
            hasher.update(&piece[..len]);
            at += len as u64;
        }
        let found = hasher.finalize();
        if found != self.digest {
            let message = format!("the new runtime's BLAKE3 is {found}, not {}", self.digest);
            return bad(message);
        }
        Ok(())
    }
}

/// `e_ident`, `e_type` and `e_machine` of an ELF header (elf(5)): 64 bits, little-endian, a program.
fn is_program(header: &[u8]) -> bool {
    let kind = header.get(16..20);
    header.starts_with(b"\x7fELF\x02\x01\x01") && matches!(kind, Some([2 | 3, 0, 62, 0]))
}

/// A file in memory.
fn memory(name: &str, executable: bool) -> rustix::io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let said = match executable {
        true => MemfdFlags::EXEC,
        false => MemfdFlags::NOEXEC_SEAL,
    };
    match memfd_create(name, flags | said) {
        // A kernel before 6.3 does not want to be told.
        Err(Errno::INVAL) => memfd_create(name, flags),
        result => result,
    }
}

/// What goes from one runtime to the next.
pub(crate) struct Arriving {
    /// The call that asked for it.
    swap: CallRef,
    /// The process's name in lists.
    name: String,
    pub(crate) is_machine: bool,
    pub(crate) listener: Fd,
    pub(crate) sessions: Sessions,
    pub(crate) tasks: Vec<Task>,
    pub(crate) spawner: Spawner,
    pub(crate) contexts: Contexts,
    pub(crate) identity: Identity,
}

impl Arriving {
    fn read(state: Value) -> Result<Self, StateError> {
        let mut all = members(state)?;
        let arriving = Self {
            swap: member(&mut all, "swap")?,
            name: member(&mut all, "name")?,
            is_machine: member(&mut all, "is_machine")?,
            listener: member(&mut all, "listener")?,
            sessions: member(&mut all, "sessions")?,
            tasks: member(&mut all, "tasks")?,
            spawner: member(&mut all, "spawner")?,
            contexts: member(&mut all, "contexts")?,
            identity: member(&mut all, "identity")?,
        };
        arriving.sessions.check().map_err(StateError::Wrong)?;
        arriving.contexts.check().map_err(StateError::Wrong)?;
        for task in &arriving.tasks {
            if let Job::Process(process) = &task.job {
                process.check().map_err(StateError::Wrong)?;
            }
        }
        Ok(arriving)
    }
}

impl Server {
    /// Swaps if a new runtime has come and nothing is in the way; gives up if that takes too long.
    /// Returns only when this runtime goes on; true when there is something new to settle.
    pub(crate) fn swap_when_due(&mut self, now: Instant) -> bool {
        let has_come = |task: &Task| {
            matches!(task.job, Job::Swap(_))
                && task.pipes.input_is_over()
                && task.pipes.failure.is_none()
        };
        let Some(index) = self.tasks.iter().position(has_come) else {
            return false;
        };
        let in_the_way = self.in_the_way();
        let written = self.tasks[index].pipes.written;
        let Job::Swap(incoming) = &mut self.tasks[index].job else {
            return false;
        };
        let first = incoming.until.is_none();
        let until = *incoming.until.get_or_insert(now + PATIENCE);
        // What is wrong with it is told at once.
        let checked = if first {
            incoming.check(written)
        } else {
            Ok(())
        };
        if checked.is_ok() && !in_the_way.is_empty() && now < until {
            return first;
        }
        let task = self.tasks.remove(index);
        let (Some(at), Job::Swap(incoming)) = (task.at, task.job) else {
            return false;
        };
        let result = checked.and_then(|()| match in_the_way.is_empty() {
            true => self.hand_over(at, &incoming),
            false => {
                let message = format!(
                    "{} did not end within {} s, and cannot go on in another runtime",
                    in_the_way.into_iter().collect::<Vec<_>>().join(", "),
                    PATIENCE.as_secs()
                );
                Err(ErrorReply::new(ErrorCode::Busy, message))
            }
        });
        let Err(error) = result;
        self.sessions.fail(at, &error);
        true
    }

    /// What cannot go on, by the names of its calls.
    fn in_the_way(&self) -> BTreeSet<&'static str> {
        let mut all = BTreeSet::new();
        for task in &self.tasks {
            match &task.job {
                Job::Work(work) => all.insert(work.method),
                Job::Upload(_) => all.insert("file.write"),
                Job::Port { dial: Some(_), .. } => all.insert("port.connect"),
                _ => false,
            };
        }
        if self.identity.is_waiting() || !self.waiting.is_empty() {
            all.insert("expect_wake");
        }
        if system::are_processes_frozen() || system::are_file_systems_frozen() {
            all.insert("freeze");
        }
        if self.ending.is_some() {
            all.insert("shutdown");
        }
        all
    }

    /// What [`Arriving::read`] reads.
    fn parting(&self, swap: CallRef) -> Value {
        let name = rustix::thread::name().unwrap_or_default();
        let mut all = serde_json::Map::new();
        for (name, value) in [
            ("swap", swap.carry()),
            ("name", name.to_string_lossy().into()),
            ("is_machine", self.is_machine.carry()),
            ("listener", self.listener.carry()),
            ("sessions", self.sessions.carry()),
            ("tasks", self.tasks.carry()),
            ("spawner", self.spawner.carry()),
            ("contexts", self.contexts.carry()),
            ("identity", self.identity.carry()),
        ] {
            put(&mut all, name, value);
        }
        Value::Object(all)
    }

    /// Becomes the new runtime; returns when that is not to be.
    fn hand_over(&mut self, at: CallRef, incoming: &Incoming) -> Result<Infallible, ErrorReply> {
        let queued = self.tasks.iter().map(|task| task.pipes.queued());
        let held = self.sessions.held() + queued.sum::<usize>();
        if held > MAX_HELD {
            let message = format!(
                "{held} bytes wait for clients or programs, and only {MAX_HELD} can be handed over: try again"
            );
            return Err(ErrorReply::new(ErrorCode::Busy, message));
        }
        let refused = |error: StateError| failed(format!("the state: {}", one_line(&error)));
        let system = |what: &'static str| {
            move |error: Errno| failed(format!("cannot hand over: {what}: {error}"))
        };
        let old = rustix::fs::open(
            "/proc/self/exe",
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(system("/proc/self/exe, to come back to"))?;
        let state = in_memory(&self.parting(at)).map_err(refused)?;
        rehearsal::rehearse(&incoming.binary, state, &mut self.spawner)?;
        // The rehearsal has used a control group: once more, and nothing changes from here on.
        let parting = self.parting(at);
        let state = in_memory(&parting).map_err(refused)?;
        let mut through = state::descriptors(&parting).map_err(refused)?;
        through.extend([state.as_raw_fd(), old.as_raw_fd()]);
        let number = |fd: &OwnedFd| fd.as_raw_fd().to_string();
        let args = arguments("--take-over", &[&number(&state), &number(&old)]);
        let error = execute(&incoming.binary, &args, &through);
        Err(failed(format!("cannot execute the new runtime: {error}")))
    }
}

/// execve with these descriptors left open; the error, and all are as before.
fn execute(program: &OwnedFd, args: &[CString], through: &BTreeSet<RawFd>) -> io::Error {
    let set = |closes| {
        let mut all = through.iter();
        all.try_for_each(|&fd| sys::close_on_exec(fd, closes))
    };
    let error = match set(false) {
        Ok(()) => sys::execute(program.as_fd(), args),
        Err(error) => error,
    };
    // They are open, so it cannot fail.
    let _ = set(true);
    error
}

/// The program's own name and these; what has a zero byte in it is left out.
fn arguments(first: &str, more: &[&str]) -> Vec<CString> {
    let own = std::env::args().next();
    let own = own.unwrap_or_else(|| "ratoon-runtime".into());
    let all = [own.as_str(), first]
        .into_iter()
        .chain(more.iter().copied());
    all.filter_map(|arg| CString::new(arg).ok()).collect()
}

fn in_memory(state: &Value) -> Result<OwnedFd, StateError> {
    let failed = |error: io::Error| StateError::System("write it", error);
    let mut file = File::from(memory("ratoon-state", false).map_err(|error| failed(error.into()))?);
    file.write_all(&state::encode(state)?).map_err(failed)?;
    Ok(file.into())
}

fn from_memory(fd: RawFd) -> Result<Value, StateError> {
    let failed = |error| StateError::System("read it", error);
    let file = File::from(sys::duplicate(fd).map_err(failed)?);
    let len = file.metadata().map_err(failed)?.len();
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    if len > state::MAX_LEN * 2 {
        return Err(StateError::TooLong(len));
    }
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, 0).map_err(failed)?;
    state::decode(&bytes)
}

/// While it is there, this process may have as many descriptors as it can get: those of a state are
/// open twice for a moment.
struct ManyDescriptors(Rlimit);

impl ManyDescriptors {
    fn allow() -> Self {
        let before = getrlimit(Resource::Nofile);
        let most = Rlimit {
            current: before.maximum,
            ..before
        };
        // Most states do without.
        let _ = setrlimit(Resource::Nofile, most);
        Self(before)
    }
}

impl Drop for ManyDescriptors {
    fn drop(&mut self) {
        let _ = setrlimit(Resource::Nofile, self.0);
    }
}

/// `--check-state`: whether this runtime could go on with the state that is open as `fd`.
///
/// # Errors
/// [`StateError`].
pub fn check(fd: RawFd) -> Result<(), StateError> {
    let _many = ManyDescriptors::allow();
    let mut state = from_memory(fd)?;
    state::descriptors(&state)?;
    state::stand_in(&mut state, fd);
    Arriving::read(state).map(drop)
}

/// A server that goes on with the state open as `fd`. `back`: the old runtime; or else this is the
/// old one again, and `refusal` says why.
///
/// # Errors
/// [`StateError`]; nothing that the state names was touched.
pub fn resume(
    fd: RawFd,
    back: Option<RawFd>,
    refusal: Option<&str>,
    signals: OwnedFd,
) -> Result<Server, StateError> {
    let many = ManyDescriptors::allow();
    let state = from_memory(fd)?;
    let mut first = state::descriptors(&state)?;
    let arriving = Arriving::read(state)?;
    let (at, name) = (arriving.swap, arriving.name.clone());
    let mut server = Server::arrive(arriving, signals)
        .map_err(|error| StateError::System("begin to serve", error))?;
    first.extend([fd].into_iter().chain(back));
    for fd in first {
        // Nobody else has it: what the state names is open a second time.
        drop(sys::inherited(fd));
    }
    drop(many);
    // execveat has named the process after a descriptor.
    if let Ok(name) = CString::new(name) {
        let _ = rustix::thread::set_name(&name);
    }
    // Who has died meanwhile.
    server.reap();
    match refusal {
        None => {
            let swapped = Swapped {
                runtime: env!("CARGO_PKG_VERSION").into(),
                methods: Call::METHODS.iter().map(|&name| name.into()).collect(),
            };
            server.sessions.reply(at, &swapped);
        }
        Some(why) => {
            let message = format!("the new runtime did not take over: {why}");
            server.sessions.fail(at, &failed(message));
        }
    }
    Ok(server)
}

/// Executes the old runtime again, which goes on with its state as it was; returns only when even that
/// fails.
pub fn give_back(state: RawFd, old: RawFd, why: &str) -> io::Error {
    // The one after it has no use for it, nor do the programs that it starts.
    let old = match sys::inherited(old) {
        Ok(old) => old,
        Err(error) => return error,
    };
    let why = &why[..why.floor_char_boundary(MAX_REASON)];
    let why = why.replace(char::is_control, " ");
    let args = arguments("--take-back", &[&state.to_string(), &why]);
    sys::execute(old.as_fd(), &args)
}

#[cfg(test)]
mod tests;
