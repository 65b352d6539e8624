//! A running machine of 512 MiB with a warm Python, forked: its pause; from the call, and from the moment that
//! its guest was at rest, to the first instruction of the last child (R1); to the answer of all to their
//! wake (R3); a statement of Python and `true` in all of them (R4); memory per child; and how cost follows
//! depth and what was written.

use std::io;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ratoon_engine::fork::{ForkSpec, Forked};
use ratoon_engine::runtime::RuntimeClient;
use ratoon_engine::vm::launch::Vm;

use super::phases::Timeline;
use super::{Plan, exec, series, verdict};
use crate::budget::Budget;
use crate::host::processors;
use crate::machine::{go_on, monotonic_ns};
use crate::proc;
use crate::samples::{Readiness, Samples, number, percentile};
use crate::sandbox::{Sandboxes, Warm, cell, metrics, pid};

const NAME: &str = "fork";
const MIB: u64 = 512;
const FEW: u32 = 10;
const MANY: u32 = 100;
const DEPTHS: [usize; 3] = [1, 8, 64];
const DIRTY_MIB: usize = 100;
const PAUSE_TARGETS_MS: [(u32, f64); 2] = [(50, 2.0), (99, 5.0)];
const R1_TARGETS_MS: [(&str, f64); 2] = [
    ("fork(1): guest at rest to R1", 4.0),
    ("fork(1): guest at rest to R1, shells", 1.5),
];
const PRIVATE_TARGET_KIB: f64 = 1.5 * 1024.0;

/// Runs it.
///
/// # Errors
/// When a machine does not come up.
pub fn run(plan: &Plan<'_>, samples: &mut Samples) -> Result<()> {
    one_child(plan, &plan.budget.part(0.3), samples)?;
    deep(plan, &plan.budget.part(0.3), samples)?;
    let few = plan.budget.part(0.15);
    let mut seconds = wide(plan, &few, samples, FEW, false)?;
    if plan.quick {
        return Ok(());
    }
    for shells in [false, true] {
        if plan.runs.is_none() && !plan.budget.fits(seconds) {
            let how = if shells { ", shells" } else { "" };
            let why = format!(
                "fork({MANY}){how}: it would take some {:.0} s, and the scenario has {:.0} s left \
                 (`--time` gives more, `--runs 1 fork` takes as long as it takes)",
                seconds.as_secs_f64(),
                plan.budget.left().as_secs_f64()
            );
            samples.missing(NAME, "ratoon", why)?;
            continue;
        }
        seconds = wide(plan, &plan.budget, samples, MANY, shells)?;
    }
    Ok(())
}

struct Family {
    /// From the call.
    asked_ns: u64,
    forked: Forked,
    children: Vec<Vm>,
}

fn fork(sandboxes: &Sandboxes, vm: &Vm, client: &mut RuntimeClient, count: u32) -> Result<Family> {
    let spec = ForkSpec::new(count);
    let asked_ns = monotonic_ns();
    let mut forked = sandboxes
        .engine()
        .fork_with(vm.dir(), client, &spec, None)?;
    let children = std::mem::take(&mut forked.children);
    let children = children.into_iter().collect::<Result<_, _>>()?;
    Ok(Family {
        asked_ns,
        forked,
        children,
    })
}

/// Milliseconds from the call until the last child ran.
fn all_run(family: &Family) -> Result<f64> {
    let mut last = 0;
    for vm in &family.children {
        last = last.max(metrics(vm)?.phases.first_instruction_ns);
    }
    Ok(last.saturating_sub(family.asked_ns) as f64 / 1e6)
}

fn one_child(plan: &Plan<'_>, budget: &Budget<'_>, samples: &mut Samples) -> Result<()> {
    let warm = plan.parts.warm.of(plan.parts, MIB)?;
    // It has been frozen once: the first freeze is another, since memory is shared before it.
    let (vm, mut client) = warm.original()?;
    let shells = warm.sandboxes.beside(MIB, 2)?;
    let rounds = plan.rounds(100, 5);
    for round in budget.part(0.8).rounds(rounds) {
        for (sandboxes, how) in [(&warm.sandboxes, ""), (&shells, ", shells")] {
            once(samples, sandboxes, &vm, &mut client, round, how)?;
        }
    }
    for (percent, target) in PAUSE_TARGETS_MS {
        verdict_of(samples, "pause of the parent's vCPUs", percent, target);
    }
    for (what, target) in R1_TARGETS_MS {
        verdict_of(samples, what, 50, target);
        verdict_of(samples, what, 99, 2.0 * target);
    }
    // Much was written since the last fork: the pages themselves are made once, which takes a guest long.
    cell(
        &mut client,
        &format!("junk = bytearray({})", DIRTY_MIB << 20),
    )?;
    for round in budget.rounds(plan.rounds(5, 1) + 1) {
        go_on()?;
        let write = format!(
            "for at in range(0, len(junk), 4096): junk[at] = {}",
            round + 1
        );
        cell(&mut client, &write)?;
        let family = fork(&shells, &vm, &mut client, 1)?;
        if round > 0 {
            let what = format!("pause, {DIRTY_MIB} MiB written since the last fork");
            let pause = family.forked.pause.as_secs_f64() * 1e3;
            let series = series(NAME, "ratoon", what, "ms", Readiness::None);
            samples.add(&series, round, pause)?;
        }
    }
    drop(client);
    vm.end()?;
    Ok(())
}

fn once(
    samples: &mut Samples,
    sandboxes: &Sandboxes,
    vm: &Vm,
    client: &mut RuntimeClient,
    round: usize,
    how: &'static str,
) -> Result<()> {
    go_on()?;
    let from = Instant::now();
    let family = fork(sandboxes, vm, client, 1)?;
    let r3 = from.elapsed().as_secs_f64() * 1e3;
    let r1 = all_run(&family)?;
    let stopped = family.forked.stopped.as_secs_f64() * 1e3;
    let pause = family.forked.pause.as_secs_f64() * 1e3;
    let mut add = |what: &str, value, readiness| {
        let what = format!("{what}{how}");
        samples.add(&series(NAME, "ratoon", what, "ms", readiness), round, value)
    };
    add("pause of the parent's vCPUs", pause, Readiness::None)?;
    add("call to the guest at rest", stopped, Readiness::None)?;
    add("fork(1): call to R1", r1, Readiness::R1)?;
    add("fork(1): guest at rest to R1", r1 - stopped, Readiness::R1)?;
    add("fork(1): call to all awake", r3, Readiness::R3)?;
    for child in &family.children {
        let timeline = Timeline {
            spawned_ns: child.spawned_ns(),
            phases: metrics(child)?.phases,
            answered_ns: None,
        };
        timeline.add(samples, NAME, format!("fork(1){how}"), round)?;
    }
    // A new shell is ready before the next round.
    drop(family);
    std::thread::sleep(Duration::from_millis(100));
    Ok(())
}

fn verdict_of(samples: &mut Samples, what: &str, percent: u32, target: f64) {
    if let Some(found) = percentile(samples.of(NAME, "ratoon", what), percent) {
        samples.note(format!(
            "{what}: p{percent} {} ms, target {target}: {}",
            number(found),
            verdict(found <= target)
        ));
    }
}

/// Children of children, each of which has written to memory and disk.
fn deep(plan: &Plan<'_>, budget: &Budget<'_>, samples: &mut Samples) -> Result<()> {
    let warm = plan.parts.warm.of(plan.parts, MIB)?;
    let sandboxes = &warm.sandboxes;
    let (mut vm, mut client) = sandboxes.restore(Warm::SNAPSHOT)?;
    let deepest = if plan.quick { 8 } else { DEPTHS[2] };
    for depth in budget.rounds(deepest).map(|round| round + 1) {
        go_on()?;
        cell(
            &mut client,
            "open('/srv/deep', 'a').write('deeper'); junk = bytearray(b'y' * 65536)",
        )?;
        let mut family = fork(sandboxes, &vm, &mut client, 1)?;
        let r1 = all_run(&family)? - family.forked.stopped.as_secs_f64() * 1e3;
        let pause = family.forked.pause.as_secs_f64() * 1e3;
        if DEPTHS.contains(&depth) {
            let what = [
                (
                    format!("depth {depth}: guest at rest to R1"),
                    r1,
                    Readiness::R1,
                ),
                (format!("depth {depth}: pause"), pause, Readiness::None),
            ];
            for (what, value, readiness) in what {
                samples.add(&series(NAME, "ratoon", what, "ms", readiness), 0, value)?;
            }
        }
        let mut child = family.children.pop().context("one child")?;
        client = child.runtime()?;
        std::mem::replace(&mut vm, child).end()?;
    }
    drop(client);
    vm.end()?;
    Ok(())
}

/// So many children at once; returns how long [`MANY`] are to take.
fn wide(
    plan: &Plan<'_>,
    budget: &Budget<'_>,
    samples: &mut Samples,
    count: u32,
    shells: bool,
) -> Result<Duration> {
    let warm = plan.parts.warm.of(plan.parts, MIB)?;
    let (vm, mut client) = warm.sandboxes.restore(Warm::SNAPSHOT)?;
    let how = if shells { ", shells" } else { "" };
    let ready = if shells { count as usize } else { 0 };
    let sandboxes = warm.sandboxes.beside(MIB, ready)?;
    let mut took = Duration::ZERO;
    for round in 0..plan.rounds(3, 1) {
        // A round cannot be cut: a next one has to fit.
        if round > 0 && plan.runs.is_none() && !budget.fits(took) {
            break;
        }
        let begun = Instant::now();
        go_on()?;
        // What a guest needs by itself: one that is warm, as often as there are children.
        let alone = Mutex::new(Vec::new());
        for _ in 0..5 {
            let from = Instant::now();
            cell(&mut client, "1 + 1")?;
            let statement = from.elapsed();
            let from = Instant::now();
            exec(&mut client, &["true"], &mut io::sink())?;
            push(&alone, (statement, from.elapsed()));
        }
        let from = Instant::now();
        let family = fork(&sandboxes, &vm, &mut client, count)?;
        let r3 = from.elapsed().as_secs_f64() * 1e3;
        let r1 = all_run(&family)?;
        let mut children = family.children;
        let from = Instant::now();
        in_all(&mut children, |client| cell(client, "1 + 1").map(drop))?;
        let statement = from.elapsed().as_secs_f64() * 1e3;
        for (child, vm) in children.iter().enumerate() {
            let at = round * count as usize + child;
            let (own, guest) = (proc::memory(pid(vm)?)?, proc::guest_memory(pid(vm)?)?);
            let mut add = |what: &str, kib: u64| {
                let what = format!("{what}, one of {count} children after a statement{how}");
                let series = series(NAME, "ratoon", what, "KiB", Readiness::R4);
                samples.add(&series, at, kib as f64)
            };
            add("private, VMM", own.values().map(|m| m.private_kib).sum())?;
            add("private, guest memory", guest.private_kib)?;
            add("proportional, guest memory", guest.pss_kib)?;
        }
        let from = Instant::now();
        in_all(&mut children, |client| {
            exec(client, &["true"], &mut io::sink()).map(drop)
        })?;
        let r4 = from.elapsed().as_secs_f64() * 1e3;
        let from = Instant::now();
        for vm in children {
            vm.end()?;
        }
        let ended = from.elapsed().as_secs_f64() * 1e3;
        let mut add = |what: &str, value, readiness| {
            let what = format!("fork({count}): {what}{how}");
            samples.add(&series(NAME, "ratoon", what, "ms", readiness), round, value)
        };
        add("call to all run", r1, Readiness::R1)?;
        let rest = family.forked.stopped.as_secs_f64() * 1e3;
        add("guest at rest to all run", r1 - rest, Readiness::R1)?;
        add("call to all awake", r3, Readiness::R3)?;
        add("a statement in all", statement, Readiness::R4)?;
        add("true in all", r4, Readiness::R4)?;
        add("all ended", ended, Readiness::None)?;
        let alone = alone.into_inner().unwrap_or_default();
        let median = |pick: fn(&(Duration, Duration)) -> f64| {
            let values: Vec<f64> = alone.iter().map(pick).collect();
            percentile(&values, 50).unwrap_or_default()
        };
        let share = f64::from(count) / processors() as f64;
        let own_statement = median(|it| it.0.as_secs_f64() * 1e3) * share;
        let own_true = median(|it| it.1.as_secs_f64() * 1e3) * share;
        let mut ratio = |what: &str, value: f64| {
            let what = format!("fork({count}): {what}, of what guests cost by themselves{how}");
            let series = series(NAME, "ratoon", what, "ratio", Readiness::R4);
            samples.add(&series, round, value)
        };
        ratio("a statement in all", statement / own_statement)?;
        ratio("true in all", r4 / own_true)?;
        took = begun.elapsed();
    }
    let what = format!("private, VMM, one of {count} children after a statement{how}");
    let worst = samples.of(NAME, "ratoon", &what).iter().copied();
    let worst = worst.fold(0.0, f64::max);
    samples.note(format!(
        "{what}: at most {} KiB, target {PRIVATE_TARGET_KIB}: {}",
        number(worst),
        verdict(worst <= PRIVATE_TARGET_KIB)
    ));
    drop(client);
    vm.end()?;
    Ok(took * MANY / count)
}

fn push<T>(list: &Mutex<Vec<T>>, value: T) {
    if let Ok(mut list) = list.lock() {
        list.push(value);
    }
}

/// The same in each child.
fn in_all(
    children: &mut [Vm],
    what: impl Fn(&mut RuntimeClient) -> Result<()> + Sync,
) -> Result<()> {
    let todo = Mutex::new(children.iter_mut());
    let failures = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        // As many at once as the host has processors, and one that waits.
        for _ in 0..=processors() {
            scope.spawn(|| {
                loop {
                    let next = todo.lock().map_or(None, |mut todo| todo.next());
                    let Some(vm) = next else { break };
                    let done = vm.runtime().map_err(Into::into).and_then(|mut client| {
                        what(&mut client)?;
                        vm.keep_runtime(client);
                        Ok(())
                    });
                    if let Err(error) = done {
                        push(&failures, error);
                    }
                }
            });
        }
    });
    match failures.into_inner().unwrap_or_default().pop() {
        Some(error) => Err(error),
        None => Ok(()),
    }
}
