//! What the gate measures: a VMM's start, calls in a machine that runs, a restore, a fork.
//!
//! Of counts the smallest of a few rounds is taken, as what disturbs them (a timer's tick, a page that
//! was dropped) only ever adds; of memory the median. System calls are counted by strace and the host's
//! instructions by perf, where they are installed and the processor counts: both run the VMM unchanged. How it fails: when a machine does not come up; what a host cannot count is
//! a figure that says so.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use ratoon_engine::fork::ForkSpec;
use ratoon_engine::runtime::RuntimeClient;
use ratoon_engine::vm::launch::Vm;

use super::{Measured, Tolerance};
use crate::machine::{Parts, Ratoon, Shape};
use crate::proc;
use crate::sandbox::{self, Warm, cell, metrics, pid};
use crate::scenario::exec;
use crate::setup::on_path;

const MIB: u64 = 256;
const ROUNDS: usize = 5;
const SHORT_ROUNDS: usize = 25;
const TRACED_ROUNDS: usize = 3;
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(60);

const EXACT: Tolerance = tolerance(0.0, 2.0);
const COUNT: Tolerance = tolerance(5.0, 5.0);
/// Up to 19 % was seen between runs on a busy host; what a guest does by the clock is in its counts, and so is
/// whether it had time to fall idle before a call: some 4000, which is much of a ping.
const GUEST: Tolerance = tolerance(25.0, 6000.0);
const EXITS: Tolerance = tolerance(25.0, 10.0);
/// 1 %.
const FAULTS: Tolerance = tolerance(10.0, 10.0);
/// 4 %.
const MEMORY: Tolerance = tolerance(10.0, 64.0);
/// 5 %. (What a child of a fork has written is no figure: 36 %.)
const GUEST_MEMORY: Tolerance = tolerance(20.0, 256.0);
/// 15 %.
const RATIO: Tolerance = tolerance(25.0, 0.05);

const START: &str = "vmm/src/start.rs, and `strace -f` of a VMM";
const SIZE: &str = "smaps of a VMM: `ratoon bench memory` tells it by part";
const RUNTIME: &str = "agent-runtime/src: `ratoon bench exec` has the same counts call by call";
const CLONES: &str = "engine/src/snapshots and vmm/src (restore); agent-runtime's wake";

const fn tolerance(percent: f64, absolute: f64) -> Tolerance {
    Tolerance { percent, absolute }
}

struct Figures(Vec<Measured>);

impl Figures {
    fn add(
        &mut self,
        name: impl Into<String>,
        unit: &'static str,
        value: Result<f64, String>,
        tolerance: Tolerance,
        look: &'static str,
    ) {
        self.0.push(Measured {
            name: name.into(),
            unit,
            value,
            tolerance,
            look,
        });
    }
}

fn least(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::INFINITY, f64::min)
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// Measures all of it, in about a minute where guest kernels are emulated.
///
/// # Errors
/// When a machine does not come up.
pub fn measure(parts: &Parts) -> Result<Vec<Measured>> {
    let mut figures = Figures(Vec::new());
    eprintln!("ratoon-bench: gate: a VMM's start …");
    traced(parts, &mut figures)?;
    instructions(parts, &mut figures)?;
    eprintln!("ratoon-bench: gate: calls, restore, fork …");
    let warm = parts.warm.of(parts, MIB)?;
    let (vm, mut client) = warm.original()?;
    let command = calls(&vm, &mut client, &mut figures)?;
    // While it lives: what two machines share is private to neither.
    restores(&warm, command, &mut figures)?;
    forks(&warm, &vm, &mut client, &mut figures)?;
    drop(client);
    vm.end()?;
    Ok(figures.0)
}

/// A program that runs the VMM under another.
fn wrapper(dir: &Path, before: &str, vmm: &Path) -> Result<PathBuf> {
    let quoted = vmm.to_string_lossy().replace('\'', "'\\''");
    let path = dir.join("vmm");
    fs::write(
        &path,
        format!("#!/bin/sh\nexec {before} '{quoted}' \"$@\"\n"),
    )?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

fn wrapped(parts: &Parts, dir: &Path, before: &str) -> Result<()> {
    let parts = Parts {
        vmm: wrapper(dir, before, &parts.vmm)?,
        ..parts.clone()
    };
    let mut vm = Ratoon::spawn(&parts, &Shape::of(128))?;
    vm.running()?;
    vm.stop()?;
    Ok(())
}

/// System calls until the first guest instruction, by strace.
fn traced(parts: &Parts, figures: &mut Figures) -> Result<()> {
    let counted = match on_path("strace") {
        None => Err("strace is not installed".to_owned()),
        Some(strace) => (0..TRACED_ROUNDS)
            .map(|_| {
                let dir = tempfile::Builder::new().prefix("ratoon-bench-").tempdir()?;
                let log = dir.path().join("strace.log");
                let before = format!("{} -f -q -o {}", strace.display(), log.display());
                wrapped(parts, dir.path(), &before)?;
                system_calls(&fs::read_to_string(&log)?)
            })
            .collect::<Result<Vec<_>>>()
            .map_err(|error| format!("under strace: {error:#}")),
    };
    let of = |pick: fn(&(f64, f64)) -> f64| {
        let counts = counted.as_ref().map_err(Clone::clone)?;
        Ok(least(&counts.iter().map(pick).collect::<Vec<_>>()))
    };
    let name = "start: system calls to the first guest instruction";
    figures.add(name, "count", of(|it| it.0), COUNT, START);
    let name = "start: ioctls to the first guest instruction";
    figures.add(name, "count", of(|it| it.1), EXACT, START);
    Ok(())
}

/// System calls and ioctls in strace's log, up to the first KVM_RUN.
fn system_calls(log: &str) -> Result<(f64, f64)> {
    let (mut calls, mut ioctls) = (0, 0);
    for line in log.lines() {
        let call = line
            .trim_start_matches(|c: char| c.is_ascii_digit())
            .trim_start();
        // Ends of calls that were told before, signals, and ends of threads.
        if call.starts_with(['<', '-', '+']) {
            continue;
        }
        calls += 1;
        if call.starts_with("ioctl(") {
            ioctls += 1;
            if call.contains("KVM_RUN") {
                return Ok((f64::from(calls), f64::from(ioctls)));
            }
        }
    }
    bail!("{calls} system calls and no KVM_RUN among them")
}

/// Instructions of the VMM on the host, from its begin to its end, by the processor's counters. (The
/// VMM is a static position-independent program; valgrind's tools crash on it.)
fn instructions(parts: &Parts, figures: &mut Figures) -> Result<()> {
    let counted = match on_path("perf") {
        None => Err("perf is not installed".to_owned()),
        Some(perf) => (0..TRACED_ROUNDS)
            .map(|_| {
                let dir = tempfile::Builder::new().prefix("ratoon-bench-").tempdir()?;
                let out = dir.path().join("perf.out");
                let before = format!(
                    "{} stat -x, -e instructions:u -o {}",
                    perf.display(),
                    out.display()
                );
                wrapped(parts, dir.path(), &before)?;
                counter(&fs::read_to_string(&out).context("perf wrote nothing")?)
            })
            .collect::<Result<Vec<_>>>()
            .map_err(|error| format!("perf: {error:#}")),
    };
    let name = "start and stop: the VMM's own instructions on the host";
    let value = counted.map(|counts| least(&counts));
    figures.add(
        name,
        "count",
        value,
        COUNT,
        "`perf record -e instructions:u` of a VMM's start",
    );
    Ok(())
}

/// The counter in perf's list.
fn counter(out: &str) -> Result<f64> {
    let line = out.lines().find(|line| line.contains(",instructions"));
    let value = line.context("it told no counter")?.split(',').next();
    let value = value.unwrap_or_default();
    value
        .parse()
        .map_err(|_| anyhow::anyhow!("this machine has no counter of instructions: {value}"))
}

/// What KVM has counted for all vCPUs of a machine.
#[derive(Debug, Clone, Copy)]
struct Counts {
    instructions: Option<f64>,
    exits: Option<f64>,
    faults: Option<f64>,
}

fn counts(vm: &Vm) -> Result<Counts> {
    let metrics = metrics(vm)?;
    let sum = |name| {
        let of = |vcpu: &ratoon_vmm_api::VcpuStats| vcpu.get(name).map(|&count| count as f64);
        metrics.vcpus.iter().map(of).sum::<Option<f64>>()
    };
    Ok(Counts {
        instructions: sum("insn_emulation"),
        exits: sum("exits"),
        faults: sum("pf_taken"),
    })
}

fn since(after: Option<f64>, before: Option<f64>) -> Option<f64> {
    Some(after? - before?)
}

fn counted(value: Option<f64>) -> Result<f64, String> {
    value.ok_or_else(|| "KVM does not count it here".into())
}

/// Guest-kernel instructions and exits of each call; returns those of `true`.
fn calls(vm: &Vm, client: &mut RuntimeClient, figures: &mut Figures) -> Result<Option<f64>> {
    type Call = fn(&mut RuntimeClient) -> Result<()>;
    // The shorter a call, the more often it is made: one of them meets no tick of the guest's clock.
    let calls: [(&str, usize, Call); 3] = [
        ("ping", SHORT_ROUNDS, |client| {
            Ok(client.ping(PATIENCE).map(drop)?)
        }),
        ("exec true", ROUNDS, |client| {
            exec(client, &["true"], &mut io::sink())
        }),
        ("a Python statement", SHORT_ROUNDS, |client| {
            cell(client, "1 + 1").map(drop)
        }),
    ];
    let mut command = None;
    for (name, rounds, call) in calls {
        let (mut instructions, mut exits) = (None, None);
        // The first one touches what was never touched.
        for round in 0..=rounds {
            let before = counts(vm)?;
            call(client)?;
            let after = counts(vm)?;
            if round == 0 {
                continue;
            }
            let fewer = |least: Option<f64>, now: Option<f64>| match (least, now) {
                (Some(least), Some(now)) => Some(least.min(now)),
                (None, now) => now,
                (least, None) => least,
            };
            instructions = fewer(instructions, since(after.instructions, before.instructions));
            exits = fewer(exits, since(after.exits, before.exits));
        }
        let what = format!("{name}: guest-kernel instructions");
        figures.add(what, "count", counted(instructions), GUEST, RUNTIME);
        let what = format!("{name}: VM exits");
        figures.add(what, "count", counted(exits), EXITS, RUNTIME);
        if name == "exec true" {
            command = instructions;
        }
    }
    Ok(command)
}

/// Memory of a machine's VMM that nobody shares, and of its guest that it has written, in KiB.
fn private(vm: &Vm) -> Result<(f64, f64)> {
    let pid = pid(vm)?;
    let own: u64 = proc::memory(pid)?.values().map(|it| it.private_kib).sum();
    Ok((own as f64, proc::guest_memory(pid)?.dirty_kib as f64))
}

/// Memory of a child that has run a statement.
fn forks(warm: &Warm, vm: &Vm, client: &mut RuntimeClient, figures: &mut Figures) -> Result<()> {
    let mut own = Vec::new();
    // The first freeze is another: memory is shared before it.
    for round in 0..=TRACED_ROUNDS {
        let engine = warm.sandboxes.engine();
        let mut forked = engine.fork_with(vm.dir(), client, &ForkSpec::new(1), None)?;
        let mut child = forked.children.pop().context("one child")??;
        cell(&mut child.runtime()?, "1 + 1")?;
        if round > 0 {
            own.push(private(&child)?.0);
        }
        child.end()?;
    }
    let name = "fork: a child's VMM, private memory after a statement";
    figures.add(name, "KiB", Ok(median(&mut own)), MEMORY, SIZE);
    Ok(())
}

/// What a restore costs until its first command has ended. `command`: what that alone costs.
fn restores(warm: &Warm, command: Option<f64>, figures: &mut Figures) -> Result<()> {
    let (mut instructions, mut exits, mut faults) = (Vec::new(), Vec::new(), Vec::new());
    let (mut own, mut guest, mut resident) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..TRACED_ROUNDS {
        let (vm, mut client) = warm.sandboxes.restore(Warm::SNAPSHOT)?;
        exec(&mut client, &["true"], &mut io::sink())?;
        let counts = counts(&vm)?;
        instructions.extend(counts.instructions);
        exits.extend(counts.exits);
        faults.extend(counts.faults);
        let (vmm, memory) = private(&vm)?;
        own.push(vmm);
        guest.push(memory);
        let all = proc::memory(sandbox::pid(&vm)?)?;
        resident.push(all.values().map(|it| it.rss_kib).sum::<u64>() as f64);
        drop(client);
        vm.end()?;
    }
    let of = |values: &[f64]| counted((!values.is_empty()).then(|| least(values)));
    let name = "restore to the end of true: guest-kernel instructions";
    figures.add(name, "count", of(&instructions), GUEST, CLONES);
    let name = "restore to the end of true: VM exits";
    figures.add(name, "count", of(&exits), EXITS, CLONES);
    let name = "restore to the end of true: guest page faults that KVM took";
    figures.add(name, "count", of(&faults), FAULTS, CLONES);
    let name = "restore to the end of true, of true alone: guest-kernel instructions";
    let ratio = of(&instructions).and_then(|all| Ok(all / counted(command)?));
    figures.add(name, "ratio", ratio, RATIO, CLONES);
    let name = "a clone's VMM, private memory after true";
    figures.add(name, "KiB", Ok(median(&mut own)), MEMORY, SIZE);
    let name = "a clone's VMM, resident memory after true";
    figures.add(name, "KiB", Ok(median(&mut resident)), MEMORY, SIZE);
    let name = "a clone's guest memory, written after true";
    figures.add(name, "KiB", Ok(median(&mut guest)), GUEST_MEMORY, CLONES);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_calls_are_counted_to_the_first_kvm_run() {
        let log = "\
100 execve(\"/x\", [\"x\"], 0x0) = 0
100 ioctl(3, KVM_CREATE_VM, 0) = 4
101 read(5,  <unfinished ...>
100 --- SIGCHLD {si_signo=SIGCHLD} ---
101 <... read resumed>\"x\", 1) = 1
102 +++ exited with 0 +++
101 ioctl(6, KVM_RUN, 0 <unfinished ...>
100 close(3) = 0
";
        assert_eq!(system_calls(log).expect("counts"), (4.0, 2.0));
        assert!(system_calls("100 close(3) = 0\n").is_err());
    }

    #[test]
    fn a_counter_that_the_machine_does_not_have_is_told() {
        let out = "# started\n\n1234567,,instructions:u,100,100.00,,\n";
        assert_eq!(counter(out).expect("a count"), 1_234_567.0);
        let error = counter("<not supported>,,instructions:u,0,100.00,,\n").expect_err("none");
        assert!(error.to_string().contains("<not supported>"), "{error}");
        assert!(counter("").is_err());
    }
}
