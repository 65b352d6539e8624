//! Commands that talk to a running VM's guest: the connection, terminals, and what its errors become.

use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use ratoon_client::RuntimeError;
use ratoon_client::blocking::{CallIo, Client, Controller};
use ratoon_engine::Engine;
use ratoon_engine::vm::EndCause;
use ratoon_engine::vm::life::{self, Status};
use ratoon_engine::vm::process::ProcessRef;
use ratoon_engine::vm::record::VmDir;
use ratoon_engine::vm::standstill;
use ratoon_engine::vm::store::Entry;
use ratoon_protocol::{Call, ErrorCode, ErrorReply, Size, Transferred};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use signal_hook::consts::SIGWINCH;
use signal_hook::iterator::Signals;

use crate::failure::{FAILED, Failure};

/// How long a guest may take to accept a connection: longer than its VMM waits for a pager that hangs, whose
/// end says why.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a freeze by another process may take: it may have to fetch all of a large machine's memory.
const FREEZE_PATIENCE: Duration = Duration::from_secs(360);
/// How long a VM whose connection broke may take to be gone, if it ends.
const END_PATIENCE: Duration = Duration::from_secs(2);
/// How long it may take for a call without streams.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(60);

/// Does a call that moves bytes, and says no more than whether it was done.
pub fn transfer(
    client: &mut Client,
    call: &Call,
    stdin: Option<BorrowedFd<'_>>,
    stdout: &mut dyn Write,
) -> Result<(), RuntimeError> {
    let mut io = CallIo {
        stdin,
        stdout,
        stderr: &mut io::sink(),
        data: &mut io::sink(),
        events: &mut |_| {},
        ended: &mut |_| {},
    };
    client.run::<Transferred>(call, &mut io).map(drop)
}

/// Finds a VM by name, id or prefix.
pub fn find(engine: &Engine, name: &str) -> Result<Entry, Failure> {
    Ok(engine.store().find(name)?)
}

/// Finds a VM that runs.
pub fn find_running(engine: &Engine, name: &str) -> Result<Entry, Failure> {
    let entry = find(engine, name)?;
    check_running(&entry)?;
    Ok(entry)
}

/// Finds a VM that runs or is paused.
pub fn find_live(engine: &Engine, name: &str) -> Result<Entry, Failure> {
    let entry = find(engine, name)?;
    match life::info(&entry).status {
        Status::Paused => Ok(entry),
        _ => check_running(&entry).map(|()| entry),
    }
}

fn check_running(entry: &Entry) -> Result<(), Failure> {
    match life::info(entry).status {
        Status::Running => Ok(()),
        Status::Failed => Err(Failure::from(VmFailed {
            id: entry.dir.id(),
            source: EndCause::of(&entry.dir),
        })),
        status => {
            let failure = Failure::new(format!("VM {} is {status}", entry.dir.id()));
            Err(failure.hint("`ratoon ps -a` lists all VMs"))
        }
    }
}

/// It ended, and not as anybody wished.
#[derive(Debug, thiserror::Error)]
#[error("VM {id} has failed")]
struct VmFailed {
    id: String,
    #[source]
    source: EndCause,
}

/// What a broken connection to a VM's runtime becomes: why the VM ended, if it did.
pub fn broken(entry: &Entry, error: RuntimeError) -> Failure {
    let process = entry
        .record
        .as_ref()
        .ok()
        .and_then(|record| record.vmm.as_ref());
    let has_ended = process
        .map(ProcessRef::open)
        .is_some_and(|process| process.is_none_or(|it| it.wait(END_PATIENCE).unwrap_or(false)));
    match has_ended && error.is_about_connection() {
        true => Failure::from(VmFailed {
            id: entry.dir.id(),
            source: EndCause::of(&entry.dir),
        }),
        false => Failure::from(error),
    }
}

/// Connects to its runtime.
pub fn connect(entry: &Entry) -> Result<Client, Failure> {
    check_running(entry)?;
    standstill::mend(&entry.dir, FREEZE_PATIENCE)?;
    dial(&entry.dir).map_err(|error| broken(entry, error))
}

/// Connects to the runtime of a VM that runs; one that a killed command left frozen goes on first.
pub fn connect_at(dir: &VmDir) -> Result<Client, Failure> {
    standstill::mend(dir, FREEZE_PATIENCE)?;
    Ok(dial(dir)?)
}

fn dial(dir: &VmDir) -> Result<Client, RuntimeError> {
    Client::connect(&dir.vsock_socket(), CONNECT_TIMEOUT)
}

/// What a failed call becomes. The guest's words are not to be trusted with a terminal.
pub fn failure(error: RuntimeError, what: &str) -> Failure {
    match error {
        RuntimeError::Call(error) => refused(&error, what),
        error => Failure::from(error),
    }
}

/// The runtime refused or failed a call.
pub fn refused(error: &ErrorReply, what: &str) -> Failure {
    let words: String = error.message.chars().flat_map(char::escape_debug).collect();
    let words = words.replace("\\'", "'").replace("\\\"", "\"");
    Failure::new(format!("{what}: {words}"))
}

/// The exit code of a command that could not be run.
pub fn not_run(error: &ErrorReply) -> u8 {
    match error.code {
        ErrorCode::NotFound => 127,
        ErrorCode::PermissionDenied => 126,
        _ => FAILED,
    }
}

/// This process's terminal, raw while this lives: what is typed goes to the guest as it is.
pub struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// Makes standard input raw.
    pub fn enter() -> io::Result<Self> {
        let stdin = io::stdin();
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Drain, &raw)?;
        Ok(Self { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Drain, &self.before);
        let _ = io::stdout().flush();
    }
}

/// The size of the terminal that standard output is, or a usual one.
pub fn terminal_size() -> Size {
    match tcgetwinsize(io::stdout()) {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => Size {
            rows: size.ws_row,
            cols: size.ws_col,
        },
        _ => Size { rows: 24, cols: 80 },
    }
}

/// Tells the guest's terminal each new size of ours.
pub fn follow_size(controller: Controller) -> io::Result<()> {
    let mut signals = Signals::new([SIGWINCH])?;
    std::thread::Builder::new()
        .name("size".into())
        .spawn(move || {
            for _ in signals.forever() {
                controller.resize(terminal_size());
            }
        })?;
    Ok(())
}

/// Whether standard input and output are a terminal.
pub fn has_terminal() -> bool {
    io::stdin().is_terminal() && io::stdout().is_terminal()
}

/// Whether a descriptor is /dev/null: nothing to forward then.
pub fn is_null(fd: BorrowedFd<'_>) -> bool {
    let (Ok(stat), Ok(null)) = (rustix::fs::fstat(fd), rustix::fs::stat("/dev/null")) else {
        return false;
    };
    stat.st_rdev == null.st_rdev && stat.st_mode == null.st_mode
}

/// Standard input, if it is to be forwarded.
pub fn stdin_fd<'a>(stdin: &'a io::Stdin, interactive: bool) -> Option<BorrowedFd<'a>> {
    let fd = stdin.as_fd();
    (interactive || !(stdin.is_terminal() || is_null(fd))).then_some(fd)
}
