//! `ratoon fork`: children of a running VM, and a command in each of them.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ratoon_engine::Engine;
use ratoon_engine::fork::{ChildError, ForkError, ForkSpec, Forked, MAX_CHILDREN};
use ratoon_engine::runtime::{ExecIo, RuntimeError};
use ratoon_engine::vm::cgroup::Limits;
use ratoon_engine::vm::launch::{LaunchError, Vm};
use ratoon_engine::vm::record::VmDir;
use ratoon_protocol::ExecParams;
use serde::Serialize;

use super::agent::program::Forking;
use super::snapshot;
use crate::failure::{FAILED, Failure};
use crate::interrupt::Interrupts;
use crate::progress::Spinner;
use crate::{guest, output, units};

/// How much of each output `--json` holds, in bytes.
const CAPTURE_LIMIT: usize = 1 << 20;
/// Commands that run at once: each takes a thread and a connection.
const AT_ONCE: usize = 64;
/// How long a child whose connection broke may take to be gone, if it ends.
const END_PATIENCE: Duration = Duration::from_secs(2);

/// Fork a running VM: children that go on from the same memory, processes and files.
///
/// Each has a clock, random numbers, a hostname and a machine-id of its own, and nobody sees another's
/// writes. The VM itself goes on after a short pause. Without a command the children are left running and
/// their ids printed; with one it runs in each, RATOON_CHILD being 0, 1, … there, and the children end
/// after it.
#[derive(clap::Args)]
pub struct Args {
    /// Name, id or beginning of an id; with --snapshot a snapshot's.
    #[arg(value_name = "VM")]
    vm: String,
    /// How many children.
    #[arg(
        short = 'n',
        long = "count",
        value_name = "N",
        default_value_t = 1,
        allow_negative_numbers = true,
        value_parser = count
    )]
    count: u32,
    /// Give up children that are not ready after so long: 50ms, 2s.
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    deadline: Option<Duration>,
    /// Fork a stored snapshot.
    #[arg(long)]
    snapshot: bool,
    /// Call the children NAME-0, NAME-1, …
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// A word for the children, in /run/ratoon/message.
    #[arg(long, value_name = "TEXT")]
    message: Option<String>,
    /// Written into their records; may be given several times.
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label)]
    labels: Vec<(String, String)>,
    /// How much memory of the host each child may take: 256M. One that takes more is killed. Takes root.
    #[arg(long, value_name = "SIZE", value_parser = units::memory_mib)]
    memory_limit: Option<u64>,
    /// The same for all children together, with all that is forked from them.
    #[arg(long, value_name = "SIZE", value_parser = units::memory_mib)]
    tree_limit: Option<u64>,
    /// Leave the children running after the command.
    #[arg(long)]
    keep: bool,
    /// Print JSON, outputs in it.
    #[arg(long)]
    json: bool,
    /// What to run in each child.
    #[arg(last = true, value_name = "CMD")]
    command: Vec<String>,
}

fn count(text: &str) -> Result<u32, String> {
    let count = text.parse().ok();
    let count = count.filter(|count| (1..=MAX_CHILDREN).contains(count));
    count.ok_or_else(|| format!("choose 1 to {MAX_CHILDREN}"))
}

fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("write KEY=VALUE".to_owned()),
    }
}

/// What became of one child.
#[derive(Debug, Default, Serialize)]
struct Report {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    exit_code: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stdout: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stderr: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

#[derive(Serialize)]
struct Summary<'r> {
    generation: &'r str,
    pause_us: u64,
    children: &'r [Report],
}

pub fn run(engine: &Engine, args: &Args) -> Result<ExitCode, Failure> {
    let interrupts = Interrupts::listen()?;
    let names = match &args.name {
        Some(name) => (0..args.count)
            .map(|index| format!("{name}-{index}"))
            .collect(),
        None => Vec::new(),
    };
    let mut spec = ForkSpec {
        count: args.count,
        deadline: args.deadline,
        names,
        // The others end with this process, however it ends.
        detached: args.command.is_empty() || args.keep,
        networks: Vec::new(),
        message: args.message.clone(),
        limits: Limits {
            child: args.memory_limit.map(|mib| mib << 20),
            tree: args.tree_limit.map(|mib| mib << 20),
        },
        labels: args.labels.iter().cloned().collect::<BTreeMap<_, _>>(),
        agent: None,
        parent: None,
    };
    let spinner = Spinner::start(format!("forking {}", args.vm));
    let cancel = Some(interrupts.cancel());
    let mut forking = None;
    let forked = match args.snapshot {
        true => engine.fork_snapshot(&args.vm, &spec, cancel),
        false => {
            let entry = guest::find_live(engine, &args.vm)?;
            forking = Forking::of(engine, &entry.dir, args.count);
            spec.agent = forking.as_ref().map(|it| Arc::clone(&it.agent));
            engine.fork(&entry.dir, &spec, cancel)
        }
    };
    drop(spinner);
    let Forked {
        generation,
        pause,
        children,
        stale_runtime,
        ..
    } = forked.map_err(refused)?;
    if let Some(ended) = interrupts.ended() {
        return Err(Failure::silent(ended.code()));
    }
    if let Some(stale) = &stale_runtime {
        snapshot::tell_stale_in(&format!("children of {}", args.vm), stale);
    }
    let mut vms = Vec::new();
    let mut reports = Vec::new();
    for (index, child) in children.into_iter().enumerate() {
        let (vm, report) = begun(index, child);
        vms.push(vm);
        reports.push(report);
    }
    let all_started = vms.iter().all(Option::is_some);
    let dirs = vms.iter().enumerate();
    let dirs = dirs.filter_map(|(index, vm)| Some((index, vm.as_ref()?.dir().clone())));
    let dirs: BTreeMap<usize, VmDir> = dirs.collect();
    if let Some(forking) = &forking {
        forking.begun(engine, &dirs);
    }
    if !args.command.is_empty() {
        let bound = forking.as_ref().map(|it| &it.bound);
        let env = bound.map_or_else(Vec::new, |bound| bound.variables.clone());
        let keeper = bound
            .map(|bound| bound.keep(engine, dirs.values().cloned().collect()))
            .transpose()?;
        run_in_all((args, &env), &mut vms, &mut reports, &interrupts)?;
        drop(keeper);
    }
    let ended = interrupts.ended();
    if (args.command.is_empty() || args.keep) && ended.is_none() {
        for vm in vms.into_iter().flatten() {
            vm.detach();
        }
    } else if let Some(forking) = &forking {
        for (index, dir) in &dirs {
            let code = reports[*index].exit_code;
            let code = code.and_then(|code| u8::try_from(code).ok());
            forking.bound.over(engine, dir, code);
        }
    }
    show(args, &generation, pause, &reports)?;
    let code = reports.iter().filter_map(|report| report.exit_code);
    let code = code.into_iter().find(|code| *code != 0).unwrap_or(0);
    Ok(match ended {
        Some(ended) => ExitCode::from(ended.code()),
        None if !all_started => ExitCode::from(FAILED),
        None => ExitCode::from(u8::try_from(code).unwrap_or(FAILED)),
    })
}

fn refused(error: ForkError) -> Failure {
    let code = match &error {
        ForkError::Count(_) | ForkError::Names { .. } | ForkError::Networks { .. } => 2,
        _ => FAILED,
    };
    Failure::from(error).code(code)
}

fn begun(index: usize, child: Result<Vm, ChildError>) -> (Option<Vm>, Report) {
    let mut report = Report {
        index,
        ..Report::default()
    };
    match child {
        Ok(vm) => {
            report.id = Some(vm.record().id.clone());
            report.name.clone_from(&vm.record().name);
            (Some(vm), report)
        }
        Err(error) => {
            let console = match &error {
                ChildError::Launch(error) => LaunchError::serial(error).to_vec(),
                _ => Vec::new(),
            };
            let text = Failure::from(error).console(&console).render();
            let text = text.trim().trim_start_matches("error: ");
            report.error = Some(text.to_owned());
            (None, report)
        }
    }
}

/// Runs the command in all children, many at once.
fn run_in_all(
    (args, env): (&Args, &[(String, String)]),
    vms: &mut [Option<Vm>],
    reports: &mut [Report],
    interrupts: &Interrupts,
) -> Result<(), Failure> {
    let todo: Vec<_> = vms
        .iter_mut()
        .zip(reports)
        .filter_map(|(vm, report)| Some((vm.as_mut()?, report)))
        .collect();
    let workers = todo.len().clamp(1, AT_ONCE);
    let todo = Mutex::new(todo);
    std::thread::scope(|scope| {
        let work = || {
            loop {
                let next = todo.lock().map_or(None, |mut todo| todo.pop());
                let Some((vm, report)) = next else { break };
                if interrupts.ended().is_none() {
                    run_in(args, env, vm, report);
                }
            }
        };
        for _ in 0..workers {
            std::thread::Builder::new()
                .name("child".into())
                .spawn_scoped(scope, work)?;
        }
        Ok(())
    })
}

fn run_in(args: &Args, env: &[(String, String)], vm: &mut Vm, report: &mut Report) {
    let index = report.index;
    let (mut out, mut err) = (
        Lines::new(args, index, false),
        Lines::new(args, index, true),
    );
    let params = ExecParams {
        argv: args.command.clone(),
        env: env.to_vec(),
        ..ExecParams::default()
    };
    let io = ExecIo {
        stdin: None,
        stdout: &mut out,
        stderr: &mut err,
    };
    let done = vm.runtime().and_then(|mut client| client.exec(&params, io));
    match done {
        Ok(done) => report.exit_code = Some(i32::from(done.status.shell_code())),
        Err(RuntimeError::Call(error)) => {
            report.exit_code = Some(i32::from(guest::not_run(&error)));
            let program = args.command.first().map_or("", String::as_str);
            let failure = guest::refused(&error, &format!("cannot run {program:?}"));
            report.error = Some(words(&failure));
        }
        Err(error) => {
            report.exit_code = Some(i32::from(FAILED));
            let why = match error.is_about_connection() {
                true => vm.ended(END_PATIENCE),
                false => None,
            };
            let failure = why.map_or_else(|| Failure::from(error), Failure::from);
            report.error = Some(words(&failure));
        }
    }
    out.end();
    err.end();
    if args.json {
        report.stdout = Some(String::from_utf8_lossy(&out.held).into_owned());
        report.stderr = Some(String::from_utf8_lossy(&err.held).into_owned());
    }
}

fn words(failure: &Failure) -> String {
    let text = failure.render();
    text.trim().trim_start_matches("error: ").to_owned()
}

fn show(args: &Args, generation: &str, pause: Duration, reports: &[Report]) -> Result<(), Failure> {
    if args.json {
        return output::json(&Summary {
            generation,
            pause_us: pause.as_micros() as u64,
            children: reports,
        });
    }
    for report in reports {
        if let Some(error) = &report.error {
            eprintln!("child {}: {error}", report.index);
        } else if args.command.is_empty()
            && let Some(id) = &report.id
        {
            output::line(report.name.as_deref().unwrap_or(id))?;
        }
    }
    if args.command.is_empty() {
        return Ok(());
    }
    let row = |report: &Report| {
        vec![
            report.index.to_string(),
            report.id.clone().unwrap_or_else(|| "-".into()),
            report
                .exit_code
                .map_or_else(|| "-".into(), |code| code.to_string()),
        ]
    };
    let rows: Vec<_> = reports.iter().map(row).collect();
    // Its output is the commands' own: the table is told beside it.
    eprint!("{}", output::table(&["CHILD", "VM", "EXIT"], &rows));
    Ok(())
}

/// A child's output: whole lines with the child's number before them, or held for JSON.
struct Lines {
    prefix: String,
    is_error: bool,
    json: bool,
    held: Vec<u8>,
}

impl Lines {
    fn new(args: &Args, index: usize, is_error: bool) -> Self {
        Self {
            prefix: format!("[{index}] "),
            is_error,
            json: args.json,
            held: Vec::new(),
        }
    }

    fn put(&self, line: &[u8]) -> std::io::Result<()> {
        let mut text = self.prefix.clone().into_bytes();
        text.extend_from_slice(line);
        text.push(b'\n');
        match self.is_error {
            true => std::io::stderr().write_all(&text),
            false => std::io::stdout().write_all(&text),
        }
    }

    /// A last line without its end.
    fn end(&mut self) {
        if !self.json && !self.held.is_empty() {
            let line = std::mem::take(&mut self.held);
            let _ = self.put(&line);
        }
    }
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.json {
            let room = CAPTURE_LIMIT.saturating_sub(self.held.len());
            self.held.extend_from_slice(&bytes[..bytes.len().min(room)]);
            return Ok(bytes.len());
        }
        self.held.extend_from_slice(bytes);
        while let Some(end) = self.held.iter().position(|byte| *byte == b'\n') {
            let rest = self.held.split_off(end + 1);
            let line = std::mem::replace(&mut self.held, rest);
            self.put(&line[..end])?;
        }
        // A program that never ends its line.
        if self.held.len() > CAPTURE_LIMIT {
            self.end();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_of_children_that_cannot_be_is_refused_with_those_that_can() {
        assert_eq!(count("10000"), Ok(10_000));
        for odd in ["0", "-1", "10001", "4294967297", "two", ""] {
            assert_eq!(count(odd), Err("choose 1 to 10000".to_owned()), "{odd}");
        }
    }

    #[test]
    fn a_label_is_a_key_and_a_value() {
        assert_eq!(label("a=b=c"), Ok(("a".into(), "b=c".into())));
        assert!(label("a").is_err() && label("=b").is_err());
    }
}
