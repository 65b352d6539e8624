//! `ratoon-vmm`: reads one configuration, runs one VM, leaves a report.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use ratoon_vmm::birth::Birth;
use ratoon_vmm::clock::monotonic_ns;
use ratoon_vmm::event_loop::EventLoop;
use ratoon_vmm::machine::{Action, Machine};
use ratoon_vmm::pager::PagerLink;
use ratoon_vmm::shell::Shell;
use ratoon_vmm::start::Configured;
use ratoon_vmm::{causes, control};
use ratoon_vmm_api::{
    ExitReport, Inherited, MAX_MEMORY_MIB, MAX_VCPUS, MIN_MEMORY_MIB, Outcome, VmConfig, VmState,
};

/// A configuration longer than this is none.
const MAX_CONFIG_LEN: u64 = 16 << 20;

const HELP: &str = "\
Runs one virtual machine until it ends.

Usage: ratoon-vmm (--config FILE | --owned | --shell N:MIB) [OPTIONS]

  --config FILE      File with the VM's configuration (JSON)
  --control PATH     Unix socket to make for control
  --lifeline-fd FD   Inherited descriptor whose hang-up ends the VM (the read end of its owner's
                     pipe); one byte on it lets the VM live on
  --owned            These three come as descriptors from the owner, in one message on the Unix socket
                     that is standard input; the VMM leaves the owner's session and directory
  --shell N:MIB      A warm shell of N vCPUs and so much memory: makes what it can, waits on standard
                     input for what --owned gets there, and ends with its owner until that comes
  --paused           Build the VM but wait for POST /v1/resume before the first guest instruction
  -v, --verbose      Log also what is normal
  --openapi          Print the OpenAPI document of the control socket and end
  -h, --help         Print this and end
  -V, --version      Print the version and end

Exit status: 0 when the VM stopped as it or its owner wished, 1 when it failed, 2 for wrong flags.
";

/// The command line. Parsed by lexopt: clap would be a tenth of a VMM's resident memory.
#[derive(Default)]
struct Args {
    openapi: bool,
    config: Option<PathBuf>,
    control: Option<PathBuf>,
    lifeline_fd: Option<RawFd>,
    owned: bool,
    shell: Option<(u32, u64)>,
    paused: bool,
    verbose: bool,
}

impl Args {
    /// `None` when all that was asked for has been printed.
    fn parse() -> Result<Option<Self>, lexopt::Error> {
        use lexopt::prelude::{Long, Short, ValueExt};
        let mut args = Self::default();
        let mut parser = lexopt::Parser::from_env();
        while let Some(argument) = parser.next()? {
            match argument {
                Long("openapi") => args.openapi = true,
                Long("config") => args.config = Some(parser.value()?.into()),
                Long("control") => args.control = Some(parser.value()?.into()),
                Long("lifeline-fd") => args.lifeline_fd = Some(parser.value()?.parse()?),
                Long("owned") => args.owned = true,
                Long("shell") => args.shell = Some(parser.value()?.parse_with(shell_class)?),
                Long("paused") => args.paused = true,
                Long("verbose") | Short('v') => args.verbose = true,
                Long("help") | Short('h') => {
                    print!("{HELP}");
                    return Ok(None);
                }
                Long("version") | Short('V') => {
                    println!("ratoon-vmm {}", env!("CARGO_PKG_VERSION"));
                    return Ok(None);
                }
                other => return Err(other.unexpected()),
            }
        }
        let named = args.config.is_some() || args.control.is_some() || args.lifeline_fd.is_some();
        let owned = args.owned || args.shell.is_some();
        if owned && named || args.owned && args.shell.is_some() {
            return Err(
                "--owned and --shell exclude each other, --config, --control and --lifeline-fd"
                    .into(),
            );
        }
        Ok(Some(args))
    }
}

/// `2:512`: vCPUs and MiB.
fn shell_class(text: &str) -> Result<(u32, u64), &'static str> {
    let wrong = "write vCPUs:MiB";
    let (vcpus, mib) = text.split_once(':').ok_or(wrong)?;
    let class = (vcpus.parse().ok(), mib.parse().ok());
    match class {
        (Some(vcpus), Some(mib))
            if (1..=MAX_VCPUS).contains(&vcpus)
                && (MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&mib) =>
        {
            Ok((vcpus, mib))
        }
        _ => Err(wrong),
    }
}

type Failure = Box<dyn std::error::Error>;

/// Takes a descriptor that the parent process passed.
fn inherited(fd: RawFd, what: &str) -> Result<OwnedFd, Failure> {
    // Standard streams are never passed so, and a descriptor that is not open is a wrong flag.
    // SAFETY: F_GETFD only asks whether the number is an open descriptor.
    if fd < 3 || unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(format!("--{what} {fd}: no such open descriptor").into());
    }
    // SAFETY: it is open, it is above the standard streams, and nobody else takes it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
    Ok(fd)
}

/// What a VMM works with.
struct Given {
    config: VmConfig,
    control: Option<UnixListener>,
    lifeline: Option<OwnedFd>,
    /// The pager's socket and the generation's files, if there are; the rest only has to stay open.
    kept: Vec<OwnedFd>,
    /// What was made ahead.
    shell: Option<Shell>,
}

/// Makes a shell and waits for what it is to become; `None`: its owner has gone.
fn become_one(vcpus: u32, memory_mib: u64) -> Result<Option<Given>, Failure> {
    let _ = rustix::process::setsid();
    rustix::process::chdir("/")?;
    let shell = Shell::make(vcpus, memory_mib)?;
    let taken = Inherited::take_later()
        .map_err(|error| format!("--shell: standard input is not the owner's: {error}"))?;
    let Some((log, given)) = taken else {
        return Ok(None);
    };
    // SAFETY: both are open descriptors of ours; standard error is the VM's log from here on.
    if unsafe { libc::dup2(log.as_raw_fd(), libc::STDERR_FILENO) } < 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(Some(Given {
        config: read_config(given.config, "of the owner")?,
        control: Some(given.control),
        lifeline: Some(given.lifeline),
        kept: given.kept,
        shell: Some(shell),
    }))
}

fn given(args: &Args) -> Result<Given, Failure> {
    if args.owned {
        let given = Inherited::take()
            .map_err(|error| format!("--owned: standard input is not the owner's: {error}"))?;
        // It fails for the leader of a group, which then has a session or group of its own.
        let _ = rustix::process::setsid();
        rustix::process::chdir("/")?;
        return Ok(Given {
            config: read_config(given.config, "of the owner")?,
            control: Some(given.control),
            lifeline: Some(given.lifeline),
            kept: given.kept,
            shell: None,
        });
    }
    let path = args
        .config
        .as_deref()
        .ok_or("give a configuration: --config FILE, or --owned")?;
    let name = path.display().to_string();
    let file = File::open(path).map_err(|error| format!("configuration {name}: {error}"))?;
    Ok(Given {
        config: read_config(file, &name)?,
        control: match &args.control {
            Some(path) => Some(
                UnixListener::bind(path)
                    .map_err(|error| format!("control socket {}: {error}", path.display()))?,
            ),
            None => None,
        },
        lifeline: match args.lifeline_fd {
            Some(fd) => Some(inherited(fd, "lifeline-fd")?),
            None => None,
        },
        kept: Vec::new(),
        shell: None,
    })
}

fn read_config(file: File, name: &str) -> Result<VmConfig, Failure> {
    let mut json = Vec::new();
    file.take(MAX_CONFIG_LEN + 1)
        .read_to_end(&mut json)
        .map_err(|error| format!("configuration {name}: {error}"))?;
    if json.len() as u64 > MAX_CONFIG_LEN {
        return Err(format!("configuration {name} is longer than {MAX_CONFIG_LEN} bytes").into());
    }
    Ok(VmConfig::from_json(&json)?)
}

/// A socket that becomes readable when SIGTERM or SIGINT comes.
fn termination() -> Result<UnixStream, Failure> {
    let (read, write) = UnixStream::pair()?;
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        signal_hook::low_level::pipe::register(signal, write.try_clone()?)?;
    }
    Ok(read)
}

/// Writes the report under a temporary name, then renames it.
fn write_report(path: &Path, report: &ExitReport) -> std::io::Result<()> {
    let temporary = path.with_extension("tmp");
    let mut file = File::create(&temporary)?;
    file.write_all(&serde_json::to_vec(report).unwrap_or_default())?;
    std::fs::rename(&temporary, path)
}

/// What is left to do when the VM is over.
fn leave(config: &VmConfig, outcome: &Outcome) {
    if let Some(path) = &config.exit_report {
        let report = ExitReport {
            id: config.id.clone(),
            outcome: outcome.clone(),
        };
        if let Err(error) = write_report(path, &report) {
            tracing::error!(%error, path = %path.display(), "exit report");
        }
    }
    if *outcome == Outcome::Orphaned
        && let Some(dir) = &config.remove_when_orphaned
        && let Err(error) = std::fs::remove_dir_all(dir)
    {
        tracing::error!(%error, dir = %dir.display(), "cleaning up after the owner");
    }
}

/// The pager has failed: whoever touches memory that is missing waits for ever, so nobody is waited for.
fn give_up(config: &VmConfig, control: Option<&Path>, causes: Vec<String>) {
    let outcome = Outcome::Failed { causes };
    let sockets = [ratoon_vmm::start::vsock_socket(config), control];
    for socket in sockets.into_iter().flatten() {
        let _ = std::fs::remove_file(socket);
    }
    leave(config, &outcome);
    say(&outcome.to_string());
    // SAFETY: ends the process at once: other threads may hold locks that an orderly end wants.
    unsafe { libc::_exit(1) };
}

fn pager_link(
    args: &Args,
    config: &VmConfig,
    mut sent: impl Iterator<Item = OwnedFd>,
) -> Result<Option<PagerLink>, Failure> {
    if !config.generation.as_ref().is_some_and(|it| it.paged) {
        return Ok(None);
    }
    let socket = sent
        .next()
        .ok_or("the owner has sent no socket of a pager")?;
    let (config, control) = (config.clone(), args.control.clone());
    let give_up = move |causes| give_up(&config, control.as_deref(), causes);
    Ok(Some(PagerLink::new(socket, Box::new(give_up))))
}

fn build(
    config: VmConfig,
    shell: Option<Shell>,
    pager: Option<PagerLink>,
    sent: Vec<OwnedFd>,
    main_ns: u64,
) -> Result<Machine, Failure> {
    Ok(Configured::new(config, main_ns)
        .with_shell(shell)
        .with_pager(pager)
        .with_descriptors(sent)
        .with_memory()?
        .with_vcpus()?
        .loaded()?
        .machine()?)
}

fn run(args: &Args, main_ns: u64) -> Result<Outcome, Failure> {
    let (given, main_ns) = match args.shell {
        None => (given(args)?, main_ns),
        Some((vcpus, memory_mib)) => match become_one(vcpus, memory_mib)? {
            // A machine's time begins when it is asked for.
            Some(given) => (given, monotonic_ns()),
            None => return Ok(Outcome::Stopped),
        },
    };
    let Given {
        config,
        control,
        lifeline,
        kept,
        shell,
    } = given;
    let signals = termination()?;
    let remove_control = args.control.as_deref().map(RemoveOnDrop);

    let mut kept = kept.into_iter();
    let pager = pager_link(args, &config, &mut kept)?;
    let files = match &config.generation {
        Some(generation) if generation.descriptors => 1 + generation.memory.len(),
        _ => 0,
    };
    let files: Vec<OwnedFd> = kept.by_ref().take(files).collect();
    let birth = Birth::of(&config, &files)?;
    let _kept: Vec<OwnedFd> = kept.collect();
    let machine = match build(config.clone(), shell, pager, files, main_ns) {
        Ok(machine) => Arc::new(machine.with_birth(birth)),
        Err(error) => {
            let causes = causes(error.as_ref());
            leave(&config, &Outcome::Failed { causes });
            return Err(error);
        }
    };
    let mut events = EventLoop::new(
        machine.bus().virtio(),
        machine.ending().clone(),
        signals,
        lifeline,
    )?;
    if !args.paused {
        machine.perform(Action::Resume)?;
    }
    if let Some(listener) = control {
        control::start(listener, machine.clone())?;
    }
    let outcome = events.run(|| {
        trim_heap();
        forget_code();
    })?;
    machine.wind_down(&outcome);
    drop(events);
    if let Some(path) = ratoon_vmm::start::vsock_socket(&config) {
        // The device unlinks it when it is dropped, which the control thread's handle prevents.
        let _ = std::fs::remove_file(path);
    }
    drop(remove_control);
    leave(&config, &outcome);
    Ok(outcome)
}

struct RemoveOnDrop<'a>(&'a Path);

impl Drop for RemoveOnDrop<'_> {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(self.0);
    }
}

/// One heap for all threads: they allocate little, and an arena each would be resident for each VM.
fn one_arena() {
    // SAFETY: mallopt only sets a parameter of the allocator; no other thread runs yet.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Gives back what building the machine has used and freed.
fn trim_heap() {
    // SAFETY: malloc_trim only returns free pages to the system; it takes the allocator's own lock.
    unsafe { libc::malloc_trim(0) };
}

/// Unmaps the program's code: what built the machine is not needed again, and the rest comes back from
/// the page cache, a fault for each 64 KiB.
fn forget_code() {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let program = std::env::current_exe().unwrap_or_default();
    for line in maps.lines() {
        // Only code: read-only data was written by the relocations of a position-independent program.
        if !line.contains(" r-xp ") || !line.ends_with(&*program.to_string_lossy()) {
            continue;
        }
        let range = line
            .split(' ')
            .next()
            .and_then(|range| range.split_once('-'));
        let number = |text: &str| usize::from_str_radix(text, 16).ok();
        if let Some((start, end)) = range
            && let (Some(start), Some(end)) = (number(start), number(end))
        {
            // SAFETY: the mapping is the program's file, private and never written: its pages read the
            // same after this as before.
            unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED) };
        }
    }
}

/// To stderr, which may be a file on a full disk: `eprintln!` would panic.
fn say(words: &str) {
    let _ = writeln!(std::io::stderr(), "ratoon-vmm: {words}");
}

fn main() -> ExitCode {
    let main_ns = monotonic_ns();
    one_arena();
    let args = match Args::parse() {
        Ok(Some(args)) => args,
        Ok(None) => return ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("{error}; see ratoon-vmm --help"));
            return ExitCode::from(2);
        }
    };
    if args.openapi {
        println!("{}", control::openapi());
        return ExitCode::SUCCESS;
    }
    let level = if args.verbose {
        tracing::Level::INFO
    } else {
        tracing::Level::WARN
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        // A log on a full disk must not end the VM: complaining about it goes to the same place.
        .log_internal_errors(false)
        .init();
    match run(&args, main_ns) {
        Ok(outcome) if outcome.state() == VmState::Stopped => ExitCode::SUCCESS,
        Ok(outcome) => {
            say(&outcome.to_string());
            ExitCode::FAILURE
        }
        Err(error) => {
            say(&causes(error.as_ref()).join(": "));
            ExitCode::FAILURE
        }
    }
}
