//! A machine from a snapshot: spawn to running (R1), to the runtime's answer to its wake (R3), to the end of
//! a first command (R4); beside peers, and beside the same on a machine that runs.
//!
//! The machine has Debian and a warm Python. Each round takes, in turn, each first in turn: a command and a wake
//! on a machine that runs, a restore of each kind, one of each peer. The first round warms the page cache and is not
//! counted. The cold rounds drop the snapshot's and the image's pages from the page cache first.
//!
//! R1 of ours is the first guest instruction; of a peer, the moment that its API says that the machine runs.

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use ratoon_engine::runtime::RuntimeClient;
use ratoon_engine::vm::freeze;
use ratoon_engine::working_set;
use rustix::fs::{Advice, fadvise};

use super::phases::Timeline;
use super::{Plan, exec, note_ratio, series, verdict};
use crate::budget::Budget;
use crate::machine::{go_on, monotonic_ns};
use crate::peer::{self, Ability, Adapter, Peers};
use crate::samples::{Readiness, Samples, number, percentile};
use crate::sandbox::{Sandboxes, Warm, child, metrics, still};

const NAME: &str = "restore";
/// Guest memory in MiB; the targets and the peers are for the first.
const SIZES: [u64; 3] = [256, 1024, 4096];
const R1_TARGETS_MS: [(u32, f64); 2] = [(50, 3.0), (99, 6.0)];
const OWN_R3_TARGET_MS: f64 = 8.0;
const R4_TARGET: f64 = 1.15;
const COLD_TARGET: f64 = 2.0;
const R1: &str = "spawn to running";
const R3: &str = "spawn to wake's answer";
const R4: &str = "spawn to the end of true";
const RUNS_ON: &str = "never stopped";
/// The snapshot whose memory is compressed.
const COMPRESSED: &str = "bench-compressed";

/// Runs it.
///
/// # Errors
/// When a machine does not come up.
pub fn run(plan: &Plan<'_>, samples: &mut Samples) -> Result<()> {
    let sizes = if plan.quick { &SIZES[..1] } else { &SIZES[..] };
    for (index, &mib) in sizes.iter().enumerate() {
        let part = plan.budget.part(1.0 / (sizes.len() - index) as f64);
        let budget = if index == 0 && sizes.len() > 1 {
            // It has the peers, the kinds, and most rounds.
            plan.budget.part(0.6)
        } else {
            part
        };
        one_size(plan, &budget, samples, mib)?;
        note(samples, mib);
    }
    Ok(())
}

/// A way to restore ours.
struct Kind<'s> {
    case: String,
    sandboxes: &'s Sandboxes,
    snapshot: &'static str,
}

fn one_size(plan: &Plan<'_>, budget: &Budget<'_>, samples: &mut Samples, mib: u64) -> Result<()> {
    let warm = plan.parts.warm.of(plan.parts, mib)?;
    let (steady, mut steady_client) = warm.original()?;
    let with_shells = warm.sandboxes.beside(mib, 2)?;
    let mut kinds = vec![
        Kind {
            case: case(mib),
            sandboxes: &warm.sandboxes,
            snapshot: Warm::SNAPSHOT,
        },
        Kind {
            case: format!("{}, shells", case(mib)),
            sandboxes: &with_shells,
            snapshot: Warm::SNAPSHOT,
        },
    ];
    if !plan.quick && mib == SIZES[0] {
        warm.sandboxes.snapshot(&steady, COMPRESSED, true)?;
        kinds.push(Kind {
            case: format!("{}, compressed, pager running", case(mib)),
            sandboxes: &warm.sandboxes,
            snapshot: COMPRESSED,
        });
    }
    let adapters = peer::adapters(&plan.parts.peers, plan.patience());
    let adapters = if mib == SIZES[0] { &adapters[..] } else { &[] };
    let mut peers = Peers::of(adapters, NAME, Ability::Restore, samples)?;
    let names = peers.names_with_ours();
    let most = if mib == SIZES[0] { 100 } else { 30 };
    let warm_rounds = budget.part(if plan.quick { 1.0 } else { 0.7 });
    for round in warm_rounds.rounds(plan.rounds(most, 10) + 1) {
        go_on()?;
        let runs_on = runs_on(&mut steady_client)?;
        if round > 0 {
            for (what, ms, readiness) in runs_on {
                let series = series(NAME, RUNS_ON, what, "ms", readiness).case(case(mib));
                samples.add(&series, round, ms)?;
            }
        }
        for name in peer::order(&names, round) {
            go_on()?;
            if name == "ratoon" {
                for kind in &kinds {
                    let restored = restored(kind.sandboxes, kind.snapshot)?;
                    if round > 0 {
                        restored.add(samples, name, &kind.case, round)?;
                    }
                }
                continue;
            }
            let restored = peers.attempt(name, samples, |peer| restored_peer(peer, plan, mib))?;
            if let Some(restored) = restored.filter(|_| round > 0) {
                restored.add(samples, name, &case(mib), round)?;
            }
        }
    }
    for name in names {
        for metric in [R1, R3, R4] {
            note_ratio(samples, NAME, &case(mib), metric, name);
        }
    }
    drop(steady_client);
    steady.end()?;
    if plan.quick {
        return Ok(());
    }
    let disk = &plan.parts.disk;
    let rounds = plan.rounds(10, 3);
    let without = format!("{}, cold page cache, no working set", case(mib));
    for (share, how) in [(0.5, &without), (1.0, &cold_case(mib))] {
        let part = budget.part(share);
        for round in part.rounds(rounds) {
            go_on()?;
            forget(&warm.sandboxes, Warm::SNAPSHOT, disk)?;
            let restored = restored(&warm.sandboxes, Warm::SNAPSHOT)?;
            restored.add(samples, "ratoon", how, round)?;
        }
        if how == &without {
            let (vm, mut client) = warm.sandboxes.restore(Warm::SNAPSHOT)?;
            exec(&mut client, &["true"], &mut io::sink())?;
            working_set::note(vm.dir());
            vm.end()?;
        }
    }
    Ok(())
}

fn case(mib: u64) -> String {
    format!("{mib} MiB")
}

fn cold_case(mib: u64) -> String {
    format!("{mib} MiB, cold page cache")
}

/// Milliseconds of `true`, and of a wake, on a machine that runs.
fn runs_on(client: &mut RuntimeClient) -> Result<[(&'static str, f64, Readiness); 2]> {
    let from = Instant::now();
    exec(client, &["true"], &mut io::sink())?;
    let command = from.elapsed().as_secs_f64() * 1e3;
    still(client)?;
    let waking = child()?;
    let from = Instant::now();
    freeze::wake(client, &waking)?;
    let wake = from.elapsed().as_secs_f64() * 1e3;
    Ok([
        ("true", command, Readiness::R4),
        ("wake", wake, Readiness::R3),
    ])
}

/// One restore, in milliseconds after the spawn.
struct Restored {
    /// The engine's work before.
    before: Option<f64>,
    r1: f64,
    r3: f64,
    r4: f64,
    timeline: Option<Timeline>,
}

impl Restored {
    fn add(
        &self,
        samples: &mut Samples,
        system: &'static str,
        case: &str,
        round: usize,
    ) -> Result<()> {
        for (what, ms, readiness) in [
            (R1, Some(self.r1), Readiness::R1),
            (R3, Some(self.r3), Readiness::R3),
            (R4, Some(self.r4), Readiness::R4),
            ("engine before the spawn", self.before, Readiness::None),
        ] {
            if let Some(ms) = ms {
                let series = series(NAME, system, what, "ms", readiness).case(case.to_owned());
                samples.add(&series, round, ms)?;
            }
        }
        match &self.timeline {
            Some(timeline) => timeline.add(samples, NAME, case.to_owned(), round),
            None => Ok(()),
        }
    }
}

fn ms(from: u64, to: u64) -> f64 {
    (to as f64 - from as f64) / 1e6
}

fn restored(sandboxes: &Sandboxes, snapshot: &str) -> Result<Restored> {
    let called = monotonic_ns();
    let (vm, mut client) = sandboxes.restore(snapshot)?;
    let answered = monotonic_ns();
    exec(&mut client, &["true"], &mut io::sink())?;
    let ended = monotonic_ns();
    let phases = metrics(&vm)?.phases;
    let spawned = vm.spawned_ns();
    drop(client);
    vm.end()?;
    Ok(Restored {
        before: Some(ms(called, spawned)),
        r1: ms(spawned, phases.first_instruction_ns),
        r3: ms(spawned, answered),
        r4: ms(spawned, ended),
        timeline: Some(Timeline {
            spawned_ns: spawned,
            phases,
            answered_ns: Some(answered),
        }),
    })
}

fn restored_peer(peer: &dyn Adapter, plan: &Plan<'_>, mib: u64) -> Result<Restored> {
    let place = plan
        .parts
        .saved
        .of(peer, plan.parts, mib, plan.patience())?;
    let mut woken = peer::wake(peer, &place)?;
    let client = &mut woken.client;
    let ended = woken.running.asked(|| {
        exec(client, &["true"], &mut io::sink())?;
        Ok(monotonic_ns())
    })?;
    let spawned = woken.running.spawned_ns;
    Ok(Restored {
        before: None,
        r1: ms(spawned, woken.running_ns),
        r3: ms(spawned, woken.answered_ns),
        r4: ms(spawned, ended),
        timeline: None,
    })
}

/// Drops what the page cache has of the snapshot and of the image.
fn forget(sandboxes: &Sandboxes, snapshot: &str, disk: &Path) -> Result<()> {
    let snapshot = sandboxes.engine().snapshots()?.get(snapshot)?;
    let mut files = vec![disk.to_owned()];
    let mut folders = vec![snapshot.folder.clone()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder)? {
            let path = entry?.path();
            match path.is_dir() {
                true => folders.push(path),
                false => files.push(path),
            }
        }
    }
    for path in files {
        let file = File::open(&path).with_context(|| path.display().to_string())?;
        file.sync_all()?;
        fadvise(&file, 0, None, Advice::DontNeed)?;
    }
    Ok(())
}

fn note(samples: &mut Samples, mib: u64) {
    let of = |system, case: &str, what: &str, p| {
        percentile(samples.of_case(NAME, system, case, what), p)
    };
    let warm = case(mib);
    let mut notes = Vec::new();
    for (p, target) in R1_TARGETS_MS {
        if let Some(value) = of("ratoon", &warm, R1, p) {
            notes.push(format!(
                "restore (R1), {mib} MiB: p{p} {} ms, target {target} ms at 256 MiB: {}",
                number(value),
                verdict(value <= target)
            ));
        }
    }
    let r3 = of("ratoon", &warm, R3, 50);
    if let (Some(ours), Some(theirs)) = (r3, of(RUNS_ON, &warm, "wake", 50)) {
        notes.push(format!(
            "restore (R3), {mib} MiB: {} ms beyond a wake on a machine that never stopped (p50), \
             target {OWN_R3_TARGET_MS} ms at 256 MiB: {}",
            number(ours - theirs),
            verdict(ours - theirs <= OWN_R3_TARGET_MS)
        ));
    }
    let r4 = of("ratoon", &warm, R4, 50);
    if let (Some(ours), Some(theirs)) = (r4, of(RUNS_ON, &warm, "true", 50)) {
        notes.push(format!(
            "restore (R4), {mib} MiB: {} times `true` on a machine that never stopped (p50), target \
             {R4_TARGET}: {}",
            number(ours / theirs),
            verdict(ours / theirs <= R4_TARGET)
        ));
    }
    let cold = of("ratoon", &cold_case(mib), R4, 50);
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
