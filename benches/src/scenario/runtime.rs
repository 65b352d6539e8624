//! The runtime's calls in a running guest: what a caller waits, and what each costs the guest.
//!
//! Costs come from KVM's statistics, read before and after each call; on a host that emulates guest
//! kernels `insn_emulation` counts their instructions exactly, and such counts are steady where times
//! are not. The guest's own share of a command is measured in the guest: one Python process starts
//! programs as the runtime does (posix_spawn, wait), with the guest's clock.

use std::io;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ratoon_engine::runtime::{CallIo, RuntimeClient};
use ratoon_protocol::{Call, CodeContext, CodeEnd, CodeRun, CodeStart, CodeStatus, Metrics};

use super::{Plan, exec, series, verdict};
use crate::machine::{Ratoon, Shape, go_on};
use crate::samples::{Readiness, Samples, number, percentile};

const NAME: &str = "runtime";
const PATIENCE: Duration = Duration::from_secs(60);
const PING_TARGET_MS: f64 = 8.0;
const MEMORY_TARGET_KIB: f64 = 3072.0;

/// KVM's counters that are told, and what of.
const COUNTERS: [(&str, &str); 4] = [
    ("insn_emulation", "guest-kernel instructions"),
    ("exits", "VM exits"),
    ("pf_taken", "page faults"),
    ("irq_injections", "interrupts"),
];

/// In the guest: starts each program in turn so often; prints milliseconds.
const LOCAL: &str = r#"
import os, sys, time
for _ in range(int(sys.argv[1])):
    for name, argv in ("true", ["true"]), ("sh -c true", ["sh", "-c", "true"]):
        start = time.monotonic()
        os.waitpid(os.posix_spawnp(argv[0], argv, os.environ), 0)
        print(name, (time.monotonic() - start) * 1e3, sep="\t")
"#;

/// Runs it.
///
/// # Errors
/// When the guest does not come up or a call fails.
pub fn run(plan: &Plan<'_>, samples: &mut Samples) -> Result<()> {
    let pings = plan.rounds(200, 20);
    let rounds = plan.rounds(100, 5);
    let mut vm = Ratoon::spawn(plan.parts, &Shape::of(256))?;
    let mut client = vm.ready(false)?.client;
    let metrics: Metrics = client.call(&Call::Metrics(Default::default()), "told", PATIENCE)?;
    let resident = metrics.runtime_memory as f64 / 1024.0;
    let what = series(NAME, "ratoon", "resident, idle", "KiB", Readiness::None);
    samples.add(&what, 0, resident)?;

    for round in 0..pings {
        timed(&vm, samples, "ping", round, Readiness::None, || {
            Ok(client.ping(PATIENCE).map(drop)?)
        })?;
    }
    for round in 0..rounds {
        timed(&vm, samples, "exec true", round, Readiness::R4, || {
            exec(&mut client, &["true"], &mut io::sink())
        })?;
    }
    local(&mut client, samples, rounds)?;
    code(&vm, &mut client, samples, pings)?;
    vm.stop()?;
    note(samples, resident);
    Ok(())
}

/// Times one call and takes what it cost the guest.
fn timed(
    vm: &Ratoon,
    samples: &mut Samples,
    what: &str,
    round: usize,
    readiness: Readiness,
    call: impl FnOnce() -> Result<()>,
) -> Result<()> {
    go_on()?;
    let before = counters(vm)?;
    let from = Instant::now();
    call()?;
    let ms = from.elapsed().as_secs_f64() * 1e3;
    let after = counters(vm)?;
    samples.add(&series(NAME, "ratoon", what, "ms", readiness), round, ms)?;
    for (index, (_, name)) in COUNTERS.into_iter().enumerate() {
        let what = series(
            NAME,
            "ratoon",
            format!("{what}: {name}"),
            "",
            Readiness::None,
        );
        if let (Some(before), Some(after)) = (before[index], after[index]) {
            samples.add(&what, round, after.saturating_sub(before) as f64)?;
        }
    }
    Ok(())
}

/// What KVM has counted for all vCPUs; `None` for what it does not count here.
pub fn counters(vm: &Ratoon) -> Result<[Option<u64>; COUNTERS.len()]> {
    let metrics = vm.metrics()?;
    let sum = |name| {
        let of = |vcpu: &ratoon_vmm_api::VcpuStats| vcpu.get(name).copied();
        metrics.vcpus.iter().map(of).sum::<Option<u64>>()
    };
    Ok(COUNTERS.map(|(name, _)| sum(name)))
}

fn local(client: &mut RuntimeClient, samples: &mut Samples, rounds: usize) -> Result<()> {
    go_on()?;
    let mut printed = Vec::new();
    let rounds = rounds.to_string();
    exec(client, &["python3", "-c", LOCAL, &rounds], &mut printed)?;
    let printed = String::from_utf8(printed).context("what the guest's program prints")?;
    for (index, line) in printed.lines().enumerate() {
        let (name, ms) = line.split_once('\t').context("name and milliseconds")?;
        let what = series(
            NAME,
            "guest",
            format!("local {name}"),
            "ms",
            Readiness::None,
        );
        samples.add(&what, index / 2, ms.parse()?)?;
    }
    Ok(())
}

fn code(vm: &Ratoon, client: &mut RuntimeClient, samples: &mut Samples, n: usize) -> Result<()> {
    for (round, what) in ["first Python context", "second Python context"]
        .into_iter()
        .enumerate()
    {
        timed(vm, samples, what, 0, Readiness::R4, || {
            let start = CodeStart {
                context: Some(format!("c{round}")),
                ..CodeStart::default()
            };
            let call = Call::CodeStart(start);
            Ok(client
                .call(&call, "started", PATIENCE)
                .map(|_: CodeContext| ())?)
        })?;
    }
    // The first cell imports and compiles what later ones have.
    for round in 0..=n {
        let params = CodeRun {
            code: format!("x = {round}; x + 1"),
            context: Some("c0".into()),
            ..CodeRun::default()
        };
        let what = if round == 0 { "first cell" } else { "cell" };
        timed(vm, samples, what, round.max(1) - 1, Readiness::R4, || {
            let mut shown = Vec::new();
            let end: CodeEnd = client.run(
                &Call::CodeRun(params),
                &mut CallIo {
                    stdin: None,
                    stdout: &mut io::sink(),
                    stderr: &mut io::sink(),
                    data: &mut shown,
                    events: &mut |_| {},
                    ended: &mut |_| {},
                },
            )?;
            anyhow::ensure!(end.status == CodeStatus::Ok && !shown.is_empty(), "{end:?}");
            Ok(())
        })?;
    }
    Ok(())
}

fn note(samples: &mut Samples, resident: f64) {
    let p50 = |system, what| percentile(samples.of(NAME, system, what), 50);
    let met = |value: f64, most: f64| verdict(value <= most);
    let mut notes = vec![format!(
        "runtime, idle: {} KiB resident, target {MEMORY_TARGET_KIB} KiB: {}",
        number(resident),
        met(resident, MEMORY_TARGET_KIB)
    )];
    if let Some(ping) = p50("ratoon", "ping") {
        notes.push(format!(
            "ping: p50 {} ms, target {PING_TARGET_MS} ms: {}",
            number(ping),
            met(ping, PING_TARGET_MS)
        ));
        if let Some(cell) = p50("ratoon", "cell") {
            notes.push(format!(
                "a warm cell: {} pings (p50), target 2: {}",
                number(cell / ping),
                met(cell / ping, 2.0)
            ));
        }
    }
    if let (Some(ours), Some(shell)) =
        (p50("ratoon", "exec true"), p50("guest", "local sh -c true"))
    {
        notes.push(format!(
            "exec true: {} times a local `sh -c true` (p50), target 1.2: {}",
            number(ours / shell),
            met(ours / shell, 1.2)
        ));
    }
    for note in notes {
        samples.note(note);
    }
}
