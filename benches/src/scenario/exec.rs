//! The runtime's calls in a machine that runs: what a caller waits, beside the peers, and what each costs
//! the guest.
//!
//! All machines have been restored and woken, and run side by side; each call goes to all of them in turn, each
//! first in turn. Costs of ours come from KVM's statistics, read before and after each call; on a host that
//! emulates guest kernels `insn_emulation` counts their instructions exactly, and such counts are steady where
//! times are not. The guest's own share of a command is measured in the guest: one Python process starts
//! programs as the runtime does (posix_spawn, wait), with the guest's clock.

use std::collections::BTreeMap;
use std::io;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ratoon_engine::runtime::{CallIo, RuntimeClient};
use ratoon_engine::vm::launch::Vm;
use ratoon_protocol::{Call, CodeContext, CodeEnd, CodeRun, CodeStart, CodeStatus, Metrics};
use ratoon_vmm_api::MetricsReply;

use super::{Plan, exec, note_ratio, series, verdict};
use crate::machine::go_on;
use crate::peer::{self, Ability, Peers, Woken};
use crate::samples::{Readiness, Samples, number, percentile};
use crate::sandbox::{self, Warm};

const NAME: &str = "exec";
const MIB: u64 = 256;
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

/// In the guest: starts each program in turn so often, or for so many seconds; prints milliseconds.
const LOCAL: &str = r#"
import os, sys, time
over = time.monotonic() + float(sys.argv[2])
for round in range(int(sys.argv[1])):
    if round and time.monotonic() > over: break
    for name, argv in ("true", ["true"]), ("sh -c true", ["sh", "-c", "true"]):
        start = time.monotonic()
        os.waitpid(os.posix_spawnp(argv[0], argv, os.environ), 0)
        print(name, (time.monotonic() - start) * 1e3, sep="\t")
"#;

/// Runs it.
///
/// # Errors
/// When our machine does not come up or a call fails. A peer that fails is n/a.
pub fn run(plan: &Plan<'_>, samples: &mut Samples) -> Result<()> {
    let warm = plan.parts.warm.of(plan.parts, MIB)?;
    let (vm, mut client) = warm.sandboxes.restore(Warm::SNAPSHOT)?;
    let metrics: Metrics = client.call(&Call::Metrics(Default::default()), "told", PATIENCE)?;
    let resident = metrics.runtime_memory as f64 / 1024.0;
    let what = series(NAME, "ratoon", "resident, idle", "KiB", Readiness::None);
    samples.add(&what, 0, resident)?;
    beside_peers(plan, samples, &vm, &mut client)?;
    if !plan.quick {
        let part = plan.budget.part(0.5);
        local(&mut client, samples, plan.rounds(30, 5), part.left())?;
        code(plan, &vm, &mut client, samples)?;
    }
    drop(client);
    vm.end()?;
    note(samples, resident);
    Ok(())
}

/// A call, and how it is made.
type Asked = (
    &'static str,
    Readiness,
    fn(&mut RuntimeClient) -> Result<()>,
);

const CALLS: [Asked; 3] = [
    ("ping", Readiness::None, |client| {
        Ok(client.ping(PATIENCE).map(drop)?)
    }),
    ("exec true", Readiness::R4, |client| {
        exec(client, &["true"], &mut io::sink())
    }),
    (
        "statement in the default context",
        Readiness::R4,
        |client| sandbox::cell(client, "1 + 1").map(drop),
    ),
];

fn beside_peers(
    plan: &Plan<'_>,
    samples: &mut Samples,
    vm: &Vm,
    client: &mut RuntimeClient,
) -> Result<()> {
    let adapters = peer::adapters(&plan.parts.peers, plan.patience());
    let mut peers = Peers::of(&adapters, NAME, Ability::Calls, samples)?;
    let mut places = BTreeMap::new();
    for name in peers.names_with_ours() {
        let place = peers.attempt(name, samples, |peer| {
            plan.parts.saved.of(peer, plan.parts, MIB, plan.patience())
        })?;
        places.extend(place.map(|place| (name, place)));
    }
    let mut machines: BTreeMap<&str, Woken<'_>> = BTreeMap::new();
    for (&name, place) in &places {
        let woken = peers.attempt(name, samples, |peer| peer::wake(peer, place))?;
        machines.extend(woken.map(|woken| (name, woken)));
    }
    let names = peers.names_with_ours();
    let budget = plan.budget.part(if plan.quick { 1.0 } else { 0.5 });
    // The first round pays for what was never touched.
    for round in budget.rounds(plan.rounds(100, 10) + 1) {
        for name in peer::order(&names, round) {
            for (what, readiness, call) in CALLS {
                go_on()?;
                if name == "ratoon" {
                    let done = Measured::of(vm, || call(client))?;
                    if round > 0 {
                        done.add(samples, what, round, readiness)?;
                    }
                    continue;
                }
                let Some(machine) = machines.get_mut(name) else {
                    continue;
                };
                let client = &mut machine.client;
                let ms = peers.attempt(name, samples, |_| {
                    machine.running.asked(|| {
                        let from = Instant::now();
                        call(client)?;
                        Ok(from.elapsed().as_secs_f64() * 1e3)
                    })
                })?;
                if let Some(ms) = ms.filter(|_| round > 0) {
                    samples.add(&series(NAME, name, what, "ms", readiness), round, ms)?;
                }
            }
        }
    }
    for name in names {
        for (what, ..) in CALLS {
            note_ratio(samples, NAME, "", what, name);
        }
    }
    Ok(())
}

/// One call: its time, and what it cost the guest.
struct Measured {
    ms: f64,
    costs: [Option<u64>; COUNTERS.len()],
}

impl Measured {
    fn of(vm: &Vm, call: impl FnOnce() -> Result<()>) -> Result<Self> {
        go_on()?;
        let before = counters(&sandbox::metrics(vm)?);
        let from = Instant::now();
        call()?;
        let ms = from.elapsed().as_secs_f64() * 1e3;
        let after = counters(&sandbox::metrics(vm)?);
        let cost = |index: usize| Some(after[index]?.saturating_sub(before[index]?));
        Ok(Self {
            ms,
            costs: std::array::from_fn(cost),
        })
    }

    fn add(
        &self,
        samples: &mut Samples,
        what: &str,
        round: usize,
        readiness: Readiness,
    ) -> Result<()> {
        let ms = series(NAME, "ratoon", what.to_owned(), "ms", readiness);
        samples.add(&ms, round, self.ms)?;
        for ((_, name), cost) in COUNTERS.into_iter().zip(self.costs) {
            if let Some(cost) = cost {
                let what = format!("{what}: {name}");
                let what = series(NAME, "ratoon", what, "count", Readiness::None);
                samples.add(&what, round, cost as f64)?;
            }
        }
        Ok(())
    }
}

/// What KVM has counted for all vCPUs; `None` for what it does not count here.
pub fn counters(metrics: &MetricsReply) -> [Option<u64>; COUNTERS.len()] {
    let sum = |name| {
        let of = |vcpu: &ratoon_vmm_api::VcpuStats| vcpu.get(name).copied();
        metrics.vcpus.iter().map(of).sum::<Option<u64>>()
    };
    COUNTERS.map(|(name, _)| sum(name))
}

fn local(
    client: &mut RuntimeClient,
    samples: &mut Samples,
    rounds: usize,
    time: Duration,
) -> Result<()> {
    go_on()?;
    let mut printed = Vec::new();
    let (rounds, seconds) = (rounds.to_string(), time.as_secs().to_string());
    let argv = ["python3", "-c", LOCAL, &rounds, &seconds];
    exec(client, &argv, &mut printed)?;
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

fn code(plan: &Plan<'_>, vm: &Vm, client: &mut RuntimeClient, samples: &mut Samples) -> Result<()> {
    for (round, what) in ["first Python context", "second Python context"]
        .into_iter()
        .enumerate()
    {
        let started = Measured::of(vm, || {
            let start = CodeStart {
                context: Some(format!("c{round}")),
                ..CodeStart::default()
            };
            let call = Call::CodeStart(start);
            Ok(client
                .call(&call, "started", PATIENCE)
                .map(|_: CodeContext| ())?)
        })?;
        started.add(samples, what, 0, Readiness::R4)?;
    }
    // The first cell imports and compiles what later ones have.
    for round in plan.budget.rounds(plan.rounds(50, 10) + 1) {
        let params = CodeRun {
            code: format!("x = {round}; x + 1"),
            context: Some("c0".into()),
            ..CodeRun::default()
        };
        let what = if round == 0 { "first cell" } else { "cell" };
        let ran = Measured::of(vm, || {
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
        ran.add(samples, what, round.max(1) - 1, Readiness::R4)?;
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
