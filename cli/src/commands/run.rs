//! `ratoon run`.

use std::io::{IsTerminal, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use ratoon_engine::runtime::{ExecIo, RuntimeClient, RuntimeError};
use ratoon_engine::snapshot::PublicKey;
use ratoon_engine::snapshots::RestoreSpec;
use ratoon_engine::vm::command::{self, CommandSpec, ImageCommand};
use ratoon_engine::vm::{LaunchError, Vm};
use ratoon_engine::{Engine, RunSpec, StartError, Started};
use ratoon_protocol::{ErrorCode, ExecParams, ExitStatus};
use ratoon_vmm_api::NetConfig;
use serde::Serialize;

use super::agent::program;
use crate::failure::{FAILED, Failure};
use crate::interrupt::{Ended, Interrupts};
use crate::progress::Spinner;
use crate::{output, units};

/// How long a VM whose connection broke may take to be gone, so that it can be told why.
const END_PATIENCE: Duration = Duration::from_secs(5);
/// With `--json`, how much of each of the command's outputs is kept, in bytes.
const CAPTURE_LIMIT: usize = 16 << 20;

/// Start a VM and run a command in it, or leave it running with -d.
///
/// The VM starts from the image and is thrown away at the end: nothing that it writes reaches the
/// image. Standard output and standard error are the command's, apart; standard input is forwarded
/// unless it is a terminal (-i forwards that too). The exit code is the command's.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  ratoon run --image debian -- python3 -c 'print(6 * 7)'
  echo 'print(1)' | ratoon run -- python3 -
  ratoon run -e GREETING=hello -w /tmp -u nobody -- sh -c 'echo $GREETING; id'
  ratoon run --memory 2G --cpus 4 --timeout 5m -- make -j4
  ratoon run -d --name web          # leaves the machine running, prints its id
  ratoon run --model anthropic/sonnet -- python3 agent.py   # its SDK finds the model at 127.0.0.1

^C goes to the command first; a second ^C, or 10 s without an end, ends the VM.")]
pub struct Args {
    /// Name or digest of the image.
    #[arg(long, default_value = "debian")]
    pub image: String,
    /// Start from a snapshot, in place of an image.
    #[arg(long, conflicts_with_all = ["image", "cpus", "memory", "kernel", "kernel_arg"])]
    pub snapshot: Option<String>,
    /// With --snapshot: refuse one that none of these keys signed, as `ratoon restore` does.
    #[arg(long, value_name = "KEY", requires = "snapshot", value_parser = super::snapshot::trusted_key)]
    pub require_signature: Vec<PublicKey>,
    /// A name for the VM.
    #[arg(long)]
    pub name: Option<String>,
    /// Leave the VM running, print its id once its runtime has answered.
    #[arg(long, short)]
    pub detach: bool,
    /// Remove the VM at its end; always so without -d.
    #[arg(long, conflicts_with = "detach")]
    pub rm: bool,
    /// Virtual CPUs, 1 to 32.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub cpus: u32,
    /// Memory of the VM, such as 256M or 1G; the host gives only what the guest touches.
    #[arg(long, short, value_name = "SIZE", default_value = "512M", value_parser = units::memory_mib)]
    pub memory: u64,
    /// A variable in the command's environment; NAME alone takes its value from here.
    #[arg(long, short, value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// Directory in which the command starts.
    #[arg(long, short, value_name = "DIR")]
    pub workdir: Option<String>,
    /// Who runs the command: user, uid, user:group or uid:gid.
    #[arg(long, short, value_name = "USER")]
    pub user: Option<String>,
    /// Program in place of the image's entrypoint; empty for none.
    #[arg(long, value_name = "PROGRAM")]
    pub entrypoint: Option<String>,
    /// Uncompressed ELF vmlinux in place of the default (also RATOON_KERNEL).
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// A word for the kernel's command line.
    #[arg(long, value_name = "WORD", allow_hyphen_values = true)]
    pub kernel_arg: Vec<String>,
    /// An existing tap device to connect: tap=NAME[,mac=ADDRESS].
    #[arg(long, value_name = "tap=NAME", value_parser = units::network)]
    pub net: Vec<NetConfig>,
    /// End the VM when the command has run for so long; the exit code is then 124.
    #[arg(long, value_name = "TIME", value_parser = units::duration, conflicts_with = "detach")]
    pub timeout: Option<Duration>,
    /// Boot the VM, though it could start from the warm generation of its image.
    #[arg(long)]
    pub cold: bool,
    /// How long the VM may take to boot.
    #[arg(long, value_name = "TIME", default_value = "180s", value_parser = units::duration)]
    pub boot_timeout: Duration,
    /// Forward standard input even from a terminal.
    #[arg(long, short, conflicts_with_all = ["detach", "no_stdin"])]
    pub interactive: bool,
    /// Do not forward standard input.
    #[arg(long)]
    pub no_stdin: bool,
    /// Print one JSON document: the VM, the exit code and what the command wrote.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub program: program::Args,
    /// The command, or arguments for the image's entrypoint; the image's own command without it.
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// `run --json`.
#[derive(Serialize)]
struct Report {
    id: String,
    /// With --model: what `ratoon agent log` takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    run: Option<String>,
    exit_code: u8,
    /// The signal that ended the command.
    signal: Option<i32>,
    /// From the start to the runtime's answer.
    boot_ms: u64,
    /// From there to the command's end.
    run_ms: u64,
    stdout: String,
    stderr: String,
    /// Output beyond what is kept was dropped.
    truncated: bool,
}

pub fn run(engine: &Engine, args: &Args) -> Result<ExitCode, Failure> {
    if args.detach && !args.command.is_empty() {
        return Err(
            Failure::new("-d starts a machine without a command: leave the command out")
                .hint("run it in the foreground, without -d")
                .code(2),
        );
    }
    let mut spec = command_spec(args)?;
    let wanted = args.program.wanted()?;
    let interrupts = Interrupts::listen()?;
    if let Some(wanted) = &wanted {
        wanted.prepare(engine)?;
    }
    let begun = Instant::now();
    let booted = boot(engine, args, &interrupts);
    if booted.is_err() && wanted.is_some() {
        // It may have been started for this machine alone.
        engine.bridge().sweep();
    }
    let mut started = booted?;
    let mut client = match started.vm.runtime() {
        Ok(client) => client,
        Err(error) => return Err(broken(&started.vm, &interrupts, error)),
    };
    let boot_ms = millis(begun);
    let mut bound = None;
    if let Some(wanted) = wanted {
        let what = match args.detach {
            true => format!(
                "programs in {}",
                args.name.as_deref().unwrap_or("a machine")
            ),
            false => args.command.join(" "),
        };
        bound = Some(wanted.bind(engine, started.vm.dir(), &mut client, &what)?);
    }
    if args.detach {
        return detach(started.vm, args, bound.as_ref());
    }
    let dir = started.vm.dir().clone();
    let mut keeper = None;
    if let Some(bound) = &bound {
        spec.env.splice(0..0, bound.variables.clone());
        if !args.json {
            eprintln!("run {} in machine {}", bound.run, dir.id());
        }
        keeper = Some(bound.keep(engine, vec![dir.clone()])?);
    }
    let params = command::resolve(&started.command, &spec)?;
    interrupts.command(client.controller());
    if let Some(timeout) = args.timeout {
        interrupts.end_after(timeout)?;
    }
    let begun = Instant::now();
    let (result, captured) = exec(&mut client, &params, args);
    let run_ms = millis(begun);
    let result = result.map_err(|error| match error {
        RuntimeError::Call(error) => refused(&params, &error),
        error => broken(&started.vm, &interrupts, error),
    });
    ratoon_engine::working_set::note(&dir);
    drop(keeper);
    if let Some(bound) = &bound {
        let code = result.as_ref().ok().map(|status| status.shell_code());
        bound.over(engine, &dir, code);
    }
    // The layer is thrown away: nothing to write back, so the guest is not asked.
    let ended = started.vm.end();
    let status = result?;
    ended?;
    if args.json {
        output::json(&Report {
            id: dir.id(),
            run: bound.map(|bound| bound.run),
            exit_code: status.shell_code(),
            signal: match status {
                ExitStatus::Signal(signal) => Some(signal),
                ExitStatus::Code(_) => None,
            },
            boot_ms,
            run_ms,
            stdout: captured.0.text(),
            stderr: captured.1.text(),
            truncated: captured.0.truncated || captured.1.truncated,
        })?;
    }
    Ok(ExitCode::from(status.shell_code()))
}

fn millis(since: Instant) -> u64 {
    since.elapsed().as_millis() as u64
}

fn command_spec(args: &Args) -> Result<CommandSpec, Failure> {
    let mut env = Vec::new();
    for text in &args.env {
        if text.contains('=') {
            env.push(command::parse_env(text).map_err(|error| Failure::from(error).code(2))?);
        } else if let Some(value) = std::env::var_os(text) {
            let value = value.into_string().map_err(|_| {
                Failure::new(format!("the variable {text} here is not UTF-8")).code(2)
            })?;
            env.push((text.clone(), value));
        }
    }
    Ok(CommandSpec {
        argv: args.command.clone(),
        entrypoint: args.entrypoint.as_ref().map(|program| {
            Some(program.clone())
                .filter(|program| !program.is_empty())
                .into_iter()
                .collect()
        }),
        env,
        workdir: args.workdir.clone(),
        user: args.user.clone(),
    })
}

fn boot(engine: &Engine, args: &Args, interrupts: &Interrupts) -> Result<Started, Failure> {
    if let Some(snapshot) = &args.snapshot {
        let spinner = Spinner::start(format!("restoring {snapshot}"));
        let spec = RestoreSpec {
            snapshot: snapshot.clone(),
            name: args.name.clone(),
            networks: args.net.clone(),
            detached: args.detach,
            timeout: args.boot_timeout,
            trusted: args.require_signature.clone(),
            keep_runtime: false,
        };
        let started = engine.restore(&spec, Some(interrupts.cancel()));
        drop(spinner);
        let started = started.map_err(|error| super::snapshot::failed(error, interrupts))?;
        super::snapshot::tell_stale(&started);
        return Ok(started);
    }
    if !args.detach {
        // Better now than after a boot.
        let image = engine.images()?.get(&args.image)?;
        let image: ImageCommand = ratoon_engine::image_command(&image.config.container);
        command::resolve(&image, &command_spec(args)?)
            .map_err(|error| Failure::from(error).code(2))?;
    }
    let spinner = Spinner::start(format!("booting {}", args.image));
    let spec = RunSpec {
        image: args.image.clone(),
        name: args.name.clone(),
        cpus: args.cpus,
        memory_mib: args.memory,
        kernel: args.kernel.clone(),
        kernel_args: args.kernel_arg.clone(),
        networks: args.net.clone(),
        detached: args.detach,
        boot_timeout: args.boot_timeout,
        cold: args.cold,
    };
    let started = engine.start(&spec, Some(interrupts.cancel()));
    drop(spinner);
    let started = started.map_err(|error| not_started(error, interrupts))?;
    if started.made_warm {
        eprintln!(
            "note: {} was booted; later machines of this size start where its boot ended \
             (--cold boots)",
            args.image
        );
    }
    Ok(started)
}

/// A VM that did not start.
pub fn not_started(error: StartError, interrupts: &Interrupts) -> Failure {
    match error {
        StartError::Launch(LaunchError::Cancelled) => {
            let code = interrupts.ended().map_or(FAILED, Ended::code);
            Failure::silent(code)
        }
        StartError::Launch(LaunchError::Config(error)) => Failure::from(error).code(2),
        StartError::Launch(error) => {
            let console = error.serial().to_vec();
            Failure::from(error).console(&console)
        }
        error => Failure::from(error),
    }
}

fn detach(vm: Vm, args: &Args, bound: Option<&program::Bound>) -> Result<ExitCode, Failure> {
    let Some(record) = vm.detach() else {
        return Err(Failure::new("the VM is gone"));
    };
    if args.json {
        let mut told = serde_json::json!({ "id": record.id, "name": record.name });
        if let Some(bound) = bound {
            told["run"] = bound.run.as_str().into();
        }
        output::json(&told)?;
    } else {
        output::line(&record.id)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The runtime could not start the command.
fn refused(params: &ExecParams, error: &ratoon_protocol::ErrorReply) -> Failure {
    let program = params.argv.first().map_or("", String::as_str);
    let code = match error.code {
        ErrorCode::NotFound => 127,
        ErrorCode::PermissionDenied => 126,
        _ => FAILED,
    };
    // The guest's words, so not to be trusted with a terminal.
    let words: String = error.message.chars().flat_map(char::escape_debug).collect();
    let words = words.replace("\\'", "'").replace("\\\"", "\"");
    Failure::new(format!("cannot run {program:?} in the VM: {words}")).code(code)
}

/// The connection to the runtime came to an end before the command did.
fn broken(vm: &Vm, interrupts: &Interrupts, error: RuntimeError) -> Failure {
    match interrupts.ended() {
        Some(Ended::Timeout) => {
            return Failure::new("the command ran into --timeout").code(Ended::Timeout.code());
        }
        Some(ended) => return Failure::silent(ended.code()),
        None => {}
    }
    if !error.is_about_connection() {
        return Failure::from(error);
    }
    match vm.ended(END_PATIENCE) {
        Some(LaunchError::Ended { serial, source }) => {
            let mut failure = Failure::from(VmEnded(source)).console(&serial);
            failure = failure.hint("the console's whole log is kept for VMs started with -d");
            failure
        }
        _ => Failure::from(error),
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the VM ended while the command ran")]
struct VmEnded(#[source] ratoon_engine::vm::EndCause);

/// What a command wrote, up to a limit.
#[derive(Default)]
struct Capture {
    bytes: Vec<u8>,
    truncated: bool,
}

impl Capture {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }
}

impl Write for Capture {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let room = CAPTURE_LIMIT - self.bytes.len();
        self.bytes
            .extend_from_slice(&bytes[..bytes.len().min(room)]);
        self.truncated |= bytes.len() > room;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn exec(
    client: &mut RuntimeClient,
    params: &ExecParams,
    args: &Args,
) -> (Result<ExitStatus, RuntimeError>, (Capture, Capture)) {
    let stdin = std::io::stdin();
    let stdin = wants_stdin(args, stdin.as_fd()).then(|| stdin.as_fd());
    let mut captured = (Capture::default(), Capture::default());
    let result = if args.json {
        let io = ExecIo {
            stdin,
            stdout: &mut captured.0,
            stderr: &mut captured.1,
        };
        client.exec(params, io)
    } else {
        let io = ExecIo {
            stdin,
            stdout: &mut std::io::stdout().lock(),
            stderr: &mut std::io::stderr().lock(),
        };
        client.exec(params, io)
    };
    (result.map(|report| report.status), captured)
}

/// Standard input is forwarded when there can be something in it that is meant for the command:
/// not from a terminal without -i, where it would take what is typed for the shell.
fn wants_stdin(args: &Args, stdin: BorrowedFd<'_>) -> bool {
    if args.no_stdin {
        return false;
    }
    args.interactive || !(stdin.is_terminal() || is_dev_null(stdin))
}

fn is_dev_null(fd: BorrowedFd<'_>) -> bool {
    let Ok(file) = fd.try_clone_to_owned().map(std::fs::File::from) else {
        return false;
    };
    let (Ok(file), Ok(null)) = (file.metadata(), std::fs::metadata("/dev/null")) else {
        return false;
    };
    use std::os::unix::fs::MetadataExt;
    file.file_type().is_char_device() && file.rdev() == null.rdev()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn captured_output_is_bounded_and_says_when_it_was_cut() {
        let mut capture = Capture::default();
        let chunk = vec![b'x'; CAPTURE_LIMIT / 2 + 1];
        capture.write_all(&chunk).unwrap();
        assert!(!capture.truncated);
        capture.write_all(&chunk).unwrap();
        assert!(capture.truncated);
        assert_eq!(capture.bytes.len(), CAPTURE_LIMIT);
    }

    #[test]
    fn dev_null_is_known_from_other_devices() {
        let open = |path: &str| std::fs::File::open(path).unwrap();
        assert!(is_dev_null(open("/dev/null").as_fd()));
        assert!(!is_dev_null(open("/dev/zero").as_fd()));
    }

    #[test]
    fn a_program_that_is_not_there_is_127_and_the_guest_cannot_write_to_the_terminal() {
        let params = ExecParams {
            argv: vec!["x".into()],
            ..ExecParams::default()
        };
        let reply = ratoon_protocol::ErrorReply::new(ErrorCode::NotFound, "no \x1b[2J 'x'");
        assert_eq!(
            refused(&params, &reply).render(),
            "error: cannot run \"x\" in the VM: no \\u{1b}[2J 'x'\n"
        );
    }
}
