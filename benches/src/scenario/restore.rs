//! A machine from a snapshot: spawn to its first instruction (R1), to the runtime's answer to its
//! wake (R3), to the end of a first command (R4); beside the same on a machine that never stopped.
//!
//! The machine has Debian and a warm Python. Each round takes, in turn: a command and a wake on the
//! machine that never stopped, then a restore. The first round warms the page cache and is not
//! counted. The cold rounds drop the snapshot's and the image's pages from the page cache first.

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use ratoon_engine::runtime::RuntimeClient;
use ratoon_engine::vm::freeze::{self, Child, Waking};
use ratoon_engine::working_set;
use ratoon_protocol::{Call, FreezeParams};
use rustix::fs::{Advice, fadvise};

use super::{Plan, exec, series, verdict};
use crate::machine::{go_on, monotonic_ns};
use crate::samples::{Readiness, Samples, number, percentile};
use crate::sandbox::{Sandboxes, metrics};

const NAME: &str = "restore";
/// Guest memory in MiB; the targets are for the first.
const SIZES: [u64; 3] = [256, 1024, 4096];
const R1_TARGETS_MS: [(u32, f64); 2] = [(50, 3.0), (99, 6.0)];
const OWN_R3_TARGET_MS: f64 = 8.0;
const R4_TARGET: f64 = 1.15;
const COLD_TARGET: f64 = 2.0;
const COLD: &str = "cold page cache";
const COLD_WITHOUT: &str = "cold page cache, no working set";

/// Runs it.
///
/// # Errors
/// When a machine does not come up.
pub fn run(plan: &Plan<'_>, samples: &mut Samples) -> Result<()> {
    let sizes = if plan.quick { &SIZES[..1] } else { &SIZES[..] };
    for &mib in sizes {
        one_size(plan, samples, mib)?;
        note(samples, mib);
    }
    Ok(())
}

fn one_size(plan: &Plan<'_>, samples: &mut Samples, mib: u64) -> Result<()> {
    let sandboxes = Sandboxes::new(plan.parts)?;
    let (vm, client) = sandboxes.boot(mib)?;
    drop(client);
    sandboxes.snapshot(&vm, "bench")?;
    vm.end()?;
    let (steady, mut steady_client) = sandboxes.boot(mib)?;
    let rounds = if mib == SIZES[0] { 100 } else { 30 };
    for round in 0..=plan.rounds(rounds, 5) {
        go_on()?;
        let (command, wake) = never_stopped(&mut steady_client)?;
        let restored = restored(&sandboxes)?;
        if round == 0 {
            continue;
        }
        let mut add = |system, what: &str, value, readiness| {
            let series = series(NAME, system, format!("{what}, {mib} MiB"), "ms", readiness);
            samples.add(&series, round, value)
        };
        add("never stopped", "true", command, Readiness::R4)?;
        add("never stopped", "wake", wake, Readiness::R3)?;
        add(
            "ratoon",
            "spawn to first instruction",
            restored.r1,
            Readiness::R1,
        )?;
        for (name, value) in restored.phases {
            add("ratoon", name, value, Readiness::R0)?;
        }
        add(
            "ratoon",
            "spawn to wake's answer",
            restored.r3,
            Readiness::R3,
        )?;
        add(
            "ratoon",
            "engine before the spawn",
            restored.before,
            Readiness::None,
        )?;
        add(
            "ratoon",
            "spawn to the end of true",
            restored.r4,
            Readiness::R4,
        )?;
    }
    cold(plan, samples, &sandboxes, mib, COLD_WITHOUT)?;
    let (vm, mut client) = sandboxes.restore("bench")?;
    exec(&mut client, &["true"], &mut io::sink())?;
    working_set::note(vm.dir());
    vm.end()?;
    cold(plan, samples, &sandboxes, mib, COLD)?;
    steady.end()?;
    Ok(())
}

/// Restores with nothing in the page cache.
fn cold(
    plan: &Plan<'_>,
    samples: &mut Samples,
    sandboxes: &Sandboxes,
    mib: u64,
    how: &str,
) -> Result<()> {
    for round in 0..plan.rounds(10, 3) {
        go_on()?;
        forget(sandboxes, &plan.parts.disk)?;
        let restored = restored(sandboxes)?;
        let what = format!("spawn to the end of true, {mib} MiB, {how}");
        let series = series(NAME, "ratoon", what, "ms", Readiness::R4);
        samples.add(&series, round, restored.r4)?;
    }
    Ok(())
}

/// Milliseconds of `true`, and of a wake, on a machine that is not a child.
fn never_stopped(client: &mut RuntimeClient) -> Result<(f64, f64)> {
    let from = Instant::now();
    exec(client, &["true"], &mut io::sink())?;
    let command = from.elapsed().as_secs_f64() * 1e3;
    let patience = std::time::Duration::from_secs(60);
    let still = FreezeParams {
        processes: true,
        file_systems: false,
        ..FreezeParams::default()
    };
    client.call::<()>(&Call::Freeze(still), "stopped its processes", patience)?;
    client.call::<()>(&Call::ExpectWake, "expected its wake", patience)?;
    // Another name each time, as a child gets one.
    let mut hostname = freeze::machine_id()?;
    hostname.truncate(12);
    let waking = Waking {
        id: "steady".into(),
        generation: "bench".into(),
        index: None,
        child: Some(Child {
            hostname: Some(hostname),
            ..Child::default()
        }),
    };
    let from = Instant::now();
    freeze::wake(client, &waking)?;
    Ok((command, from.elapsed().as_secs_f64() * 1e3))
}

/// One restore, in milliseconds after the spawn.
struct Restored {
    before: f64,
    r1: f64,
    r3: f64,
    r4: f64,
    phases: Vec<(&'static str, f64)>,
}

fn restored(sandboxes: &Sandboxes) -> Result<Restored> {
    let ms = |from: u64, to: u64| (to as f64 - from as f64) / 1e6;
    let called = monotonic_ns();
    let (vm, mut client) = sandboxes.restore("bench")?;
    let answered = monotonic_ns();
    exec(&mut client, &["true"], &mut io::sink())?;
    let ended = monotonic_ns();
    let phases = metrics(&vm)?.phases;
    let spawned = vm.spawned_ns();
    drop(client);
    vm.end()?;
    Ok(Restored {
        before: ms(called, spawned),
        r1: ms(spawned, phases.first_instruction_ns),
        r3: ms(spawned, answered),
        r4: ms(spawned, ended),
        phases: vec![
            ("phase: exec to main", ms(spawned, phases.main_ns)),
            (
                "phase: configuration",
                ms(phases.main_ns, phases.configured_ns),
            ),
            (
                "phase: VM and memory",
                ms(phases.configured_ns, phases.memory_ns),
            ),
            (
                "phase: irqchip and vCPU",
                ms(phases.memory_ns, phases.vcpus_ns),
            ),
            (
                "phase: state written",
                ms(phases.vcpus_ns, phases.loaded_ns),
            ),
            ("phase: devices", ms(phases.loaded_ns, phases.devices_ns)),
            (
                "phase: to first instruction",
                ms(phases.devices_ns, phases.first_instruction_ns),
            ),
        ],
    })
}

/// Drops what the page cache has of the snapshot and of the image.
fn forget(sandboxes: &Sandboxes, disk: &Path) -> Result<()> {
    let snapshot = sandboxes.engine().snapshots()?.get("bench")?;
    let mut files = vec![disk.to_owned()];
    for entry in std::fs::read_dir(&snapshot.folder)? {
        files.push(entry?.path());
    }
    for path in files {
        let file = File::open(path)?;
        file.sync_all()?;
        fadvise(&file, 0, None, Advice::DontNeed)?;
    }
    Ok(())
}

fn note(samples: &mut Samples, mib: u64) {
    let of = |system, what: &str, p| {
        percentile(samples.of(NAME, system, &format!("{what}, {mib} MiB")), p)
    };
    let mut notes = Vec::new();
    for (p, target) in R1_TARGETS_MS {
        if let Some(value) = of("ratoon", "spawn to first instruction", p) {
            notes.push(format!(
                "restore (R1), {mib} MiB: p{p} {} ms, target {target} ms at 256 MiB: {}",
                number(value),
                verdict(value <= target)
            ));
        }
    }
    let r3 = of("ratoon", "spawn to wake's answer", 50);
    if let (Some(ours), Some(theirs)) = (r3, of("never stopped", "wake", 50)) {
        notes.push(format!(
            "restore (R3), {mib} MiB: {} ms beyond a wake on a machine that never stopped (p50), \
             target {OWN_R3_TARGET_MS} ms at 256 MiB: {}",
            number(ours - theirs),
            verdict(ours - theirs <= OWN_R3_TARGET_MS)
        ));
    }
    let r4 = of("ratoon", "spawn to the end of true", 50);
    if let (Some(ours), Some(theirs)) = (r4, of("never stopped", "true", 50)) {
        notes.push(format!(
            "restore (R4), {mib} MiB: {} times `true` on a machine that never stopped (p50), target \
             {R4_TARGET}: {}",
            number(ours / theirs),
            verdict(ours / theirs <= R4_TARGET)
        ));
    }
    let what = format!("spawn to the end of true, {mib} MiB, {COLD}");
    let cold = percentile(samples.of(NAME, "ratoon", &what), 50);
    if let (Some(cold), Some(warm)) = (cold, r4) {
        notes.push(format!(
            "restore (R4), {mib} MiB, cold page cache: {} times the warm figure (p50), target \
             {COLD_TARGET}: {}",
            number(cold / warm),
            verdict(cold / warm <= COLD_TARGET)
        ));
    }
    for note in notes {
        samples.note(note);
    }
}
