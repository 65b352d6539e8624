//! `ratoon exec` and `ratoon shell`.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use ratoon_client::RuntimeError;
use ratoon_client::blocking::{Client, ExecIo};
use ratoon_engine::Engine;
use ratoon_engine::bridge::Keeper;
use ratoon_engine::vm::command;
use ratoon_engine::vm::store::Entry;
use ratoon_protocol::{ErrorCode, ExecParams, ExitReport};

use super::agent::program::Bound;
use crate::failure::Failure;
use crate::guest::{self, RawTerminal};
use crate::interrupt::Interrupts;
use crate::{output, units};

/// Run a command in a running VM.
///
/// Standard output and standard error are the command's, apart; standard input is forwarded unless
/// it is a terminal (-i forwards that too, -t gives the command a terminal of its own). The exit
/// code is the command's. When this program ends, so does the command, with all that it started.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  ratoon exec web -- ps aux
  ratoon exec -it web -- top
  tar c src | ratoon exec web -- tar x -C /root
  ratoon exec --timeout 10s -u nobody web -- sh -c 'make test'")]
pub struct Args {
    /// A variable in the command's environment; NAME alone takes its value from here.
    #[arg(long, short, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Directory in which the command starts.
    #[arg(long, short, value_name = "DIR")]
    workdir: Option<String>,
    /// Who runs the command: user, uid, user:group or uid:gid.
    #[arg(long, short, value_name = "USER")]
    user: Option<String>,
    /// Forward standard input even from a terminal.
    #[arg(long, short)]
    interactive: bool,
    /// Give the command a terminal.
    #[arg(long, short)]
    tty: bool,
    /// End the command (SIGTERM, then SIGKILL to all its processes) after so long; exit code 124.
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    timeout: Option<Duration>,
    /// Print what the command used (CPU time, memory) to standard error at its end.
    #[arg(long)]
    usage: bool,
    /// Name, id or beginning of an id.
    #[arg(value_name = "VM")]
    vm: String,
    /// The command and its arguments; after `--` it may begin with a dash.
    #[arg(trailing_var_arg = true, required = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// Open a shell in a running VM.
#[derive(clap::Args)]
pub struct ShellArgs {
    /// Who runs it: user, uid, user:group or uid:gid.
    #[arg(long, short, value_name = "USER")]
    user: Option<String>,
    /// Directory in which it starts.
    #[arg(long, short, value_name = "DIR")]
    workdir: Option<String>,
    /// Name, id or beginning of an id.
    #[arg(value_name = "VM")]
    vm: String,
}

pub fn run(engine: &Engine, args: &Args) -> Result<ExitCode, Failure> {
    let entry = guest::find(engine, &args.vm)?;
    let mut params = ExecParams {
        argv: args.command.clone(),
        cwd: args.workdir.clone(),
        user: args.user.clone(),
        timeout_ms: args.timeout.map(|time| time.as_millis() as u64),
        pty: args.tty.then(guest::terminal_size),
        ..ExecParams::default()
    };
    for text in &args.env {
        match std::env::var(text) {
            Ok(value) if !text.contains('=') => params.env.push((text.clone(), value)),
            _ if text.contains('=') => params
                .env
                .push(command::parse_env(text).map_err(|error| Failure::from(error).code(2))?),
            _ => {}
        }
    }
    let mut client = guest::connect(&entry)?;
    let bound = Bound::again(engine, &entry.dir, &mut client);
    let keeper = keep(engine, &entry, bound.as_ref(), &mut params)?;
    let report = exec(&mut client, &params, (&entry, args.interactive))?;
    drop(keeper);
    ratoon_engine::working_set::note(&entry.dir);
    if args.usage
        && let Some(usage) = report.usage
    {
        let _ = writeln!(
            std::io::stderr(),
            "user {:.3} s, system {:.3} s, memory {} KiB",
            usage.user_us as f64 / 1e6,
            usage.system_us as f64 / 1e6,
            usage.memory_peak / 1024
        );
    }
    if report.timed_out {
        return Err(Failure::new("the command ran into --timeout").code(124));
    }
    if report.out_of_memory {
        Failure::new("the guest's kernel killed the command: out of memory")
            .hint("`ratoon run --memory` gives a machine more")
            .report();
    }
    Ok(ExitCode::from(report.status.shell_code()))
}

pub fn shell(engine: &Engine, args: &ShellArgs) -> Result<ExitCode, Failure> {
    let entry = guest::find(engine, &args.vm)?;
    let mut client = guest::connect(&entry)?;
    let bound = Bound::again(engine, &entry.dir, &mut client);
    let mut in_all = ExecParams::default();
    let _keeper = keep(engine, &entry, bound.as_ref(), &mut in_all)?;
    let params = |shell: &str| ExecParams {
        argv: vec![shell.into(), "-l".into()],
        cwd: args.workdir.clone(),
        user: args.user.clone(),
        pty: guest::has_terminal().then(guest::terminal_size),
        env: std::env::var("TERM")
            .ok()
            .map(|term| ("TERM".into(), term))
            .into_iter()
            .chain(in_all.env.clone())
            .collect(),
        ..ExecParams::default()
    };
    let report = match try_exec(&mut client, &params("/bin/bash"), true)? {
        Err(RuntimeError::Call(error)) if error.code == ErrorCode::NotFound => {
            exec(&mut client, &params("/bin/sh"), (&entry, true))?
        }
        result => result.map_err(|error| failed(error, &entry, "/bin/bash"))?,
    };
    Ok(ExitCode::from(report.status.shell_code()))
}

/// In a machine whose programs may call models: they find them, while this lives.
fn keep(
    engine: &Engine,
    entry: &Entry,
    bound: Option<&Bound>,
    params: &mut ExecParams,
) -> Result<Option<Keeper>, Failure> {
    let Some(bound) = bound else {
        return Ok(None);
    };
    // What the caller names is put in their place.
    for (name, value) in &bound.variables {
        if !params.env.iter().any(|(named, _)| named == name) {
            params.env.push((name.clone(), value.clone()));
        }
    }
    Ok(Some(bound.keep(engine, vec![entry.dir.clone()])?))
}

fn exec(
    client: &mut Client,
    params: &ExecParams,
    (entry, interactive): (&Entry, bool),
) -> Result<ExitReport, Failure> {
    let program = params.argv.first().map_or("", String::as_str);
    try_exec(client, params, interactive)?.map_err(|error| failed(error, entry, program))
}

fn failed(error: RuntimeError, entry: &Entry, program: &str) -> Failure {
    match error {
        RuntimeError::Call(error) => {
            guest::refused(&error, &format!("cannot run {program:?} in the VM"))
                .code(guest::not_run(&error))
        }
        error => guest::broken(entry, error),
    }
}

fn try_exec(
    client: &mut Client,
    params: &ExecParams,
    interactive: bool,
) -> Result<Result<ExitReport, RuntimeError>, Failure> {
    let interrupts = Interrupts::listen()?;
    interrupts.command(client.controller());
    let raw = match params.pty.is_some() && guest::has_terminal() {
        true => {
            guest::follow_size(client.controller())?;
            Some(RawTerminal::enter()?)
        }
        false => None,
    };
    let stdin = std::io::stdin();
    let io = ExecIo {
        stdin: guest::stdin_fd(&stdin, interactive || raw.is_some()),
        stdout: &mut std::io::stdout().lock(),
        stderr: &mut std::io::stderr().lock(),
    };
    let result = client.exec(params, io);
    drop(raw);
    if let (Err(RuntimeError::Cancelled), Some(ended)) = (&result, interrupts.ended()) {
        return Err(Failure::silent(ended.code()));
    }
    output::write(b"")?;
    Ok(result)
}
