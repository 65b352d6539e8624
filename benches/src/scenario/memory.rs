//! Memory of a VMM beyond its guest's: of one that has booted (1 vCPU, 128 MiB, R3), and of machines from
//! one snapshot that have been woken and have run a command, beside peers.
//!
//! Every mapping counts but the guest's memory. Resident is what we hold against the target; private is what
//! one more VM costs, since all VMMs share the program's text. Ours live side by side, as clones do; a peer's
//! are restored one after the other, as its saved machine has one disk and one socket: what it could share with
//! others counts as private there, so what is held against ours is what was written.

use std::io;
use std::time::Duration;

use anyhow::Result;

use super::{Plan, exec, note_ratio, series, verdict};
use crate::machine::{Ratoon, Shape, go_on};
use crate::peer::{self, Ability, Peers};
use crate::proc::{self, Memory};
use crate::samples::{Readiness, Samples, number};
use crate::sandbox::{Warm, pid};

const NAME: &str = "memory";
const MIB: u64 = 256;
const BOOTED: &str = "booted, 128 MiB";
const CLONE: &str = "clone of 256 MiB";
const CLONES: usize = 20;
/// What clones share is private to none of them: one alone would say nothing.
const CLONES_LEAST: usize = 3;
const RESIDENT_TARGET_KIB: f64 = 3.0 * 1024.0;
const PRIVATE_TARGET_KIB: f64 = 1.5 * 1024.0;

/// Runs it.
///
/// # Errors
/// When a VM of ours does not come up. A peer that fails is n/a.
pub fn run(plan: &Plan<'_>, samples: &mut Samples) -> Result<()> {
    if !plan.quick {
        for round in plan.budget.part(0.5).rounds(plan.rounds(3, 1)) {
            booted(plan, samples, round)?;
        }
        let worst = worst(samples, BOOTED, "resident, VMM");
        samples.note(format!(
            "memory (R3), booted: at most {} KiB resident beyond the guest's, target \
             {RESIDENT_TARGET_KIB} KiB: {}",
            number(worst),
            verdict(worst <= RESIDENT_TARGET_KIB)
        ));
    }
    clones(plan, samples)?;
    of_peers(plan, samples)
}

/// What is told of each machine.
fn add(
    samples: &mut Samples,
    system: &'static str,
    case: &'static str,
    readiness: Readiness,
    round: usize,
    [vmm, guest]: [Memory; 2],
) -> Result<()> {
    for (what, kib) in [
        ("resident, VMM", vmm.rss_kib),
        ("proportional, VMM", vmm.pss_kib),
        ("private, VMM", vmm.private_kib),
        ("written, VMM", vmm.dirty_kib),
        ("private, guest memory", guest.private_kib),
        ("written, guest memory", guest.dirty_kib),
        ("proportional, guest memory", guest.pss_kib),
    ] {
        let series = series(NAME, system, what, "KiB", readiness).case(case);
        samples.add(&series, round, kib as f64)?;
    }
    Ok(())
}

/// The same of ours, and private memory by part.
fn add_ours(
    samples: &mut Samples,
    case: &'static str,
    readiness: Readiness,
    round: usize,
    pid: u32,
) -> Result<()> {
    let parts = proc::memory(pid)?;
    let mut vmm = Memory::default();
    for part in parts.values() {
        vmm.rss_kib += part.rss_kib;
        vmm.pss_kib += part.pss_kib;
        vmm.private_kib += part.private_kib;
        vmm.dirty_kib += part.dirty_kib;
    }
    let memory = [vmm, proc::guest_memory(pid)?];
    add(samples, "ratoon", case, readiness, round, memory)?;
    for (part, memory) in &parts {
        let what = format!("private: {part}");
        let series = series(NAME, "ratoon", what, "KiB", readiness).case(case);
        samples.add(&series, round, memory.private_kib as f64)?;
    }
    Ok(())
}

fn booted(plan: &Plan<'_>, samples: &mut Samples, round: usize) -> Result<()> {
    go_on()?;
    let mut vm = Ratoon::spawn(plan.parts, &Shape::of(128))?;
    let mut client = vm.ready(false)?.client;
    client.ping(Duration::from_secs(60))?;
    add_ours(samples, BOOTED, Readiness::R3, round, vm.pid())?;
    vm.stop()?;
    Ok(())
}

fn clones(plan: &Plan<'_>, samples: &mut Samples) -> Result<()> {
    let warm = plan.parts.warm.of(plan.parts, MIB)?;
    let budget = plan.budget.part(0.7);
    let mut clones = Vec::new();
    let most = plan.rounds(CLONES, 5).max(CLONES_LEAST);
    while clones.len() < most && (clones.len() < CLONES_LEAST || budget.more()) {
        go_on()?;
        let (vm, mut client) = warm.sandboxes.restore(Warm::SNAPSHOT)?;
        exec(&mut client, &["true"], &mut io::sink())?;
        clones.push((vm, client));
    }
    for (round, (vm, _)) in clones.iter().enumerate() {
        add_ours(samples, CLONE, Readiness::R4, round, pid(vm)?)?;
    }
    let private = worst(samples, CLONE, "private, VMM");
    let sum = |what| -> f64 { samples.of_case(NAME, "ratoon", CLONE, what).iter().sum() };
    let all = sum("proportional, VMM") + sum("proportional, guest memory");
    let notes = [
        format!(
            "memory, an idle clone: at most {} KiB private of the VMM's, target \
             {PRIVATE_TARGET_KIB} KiB: {}",
            number(private),
            verdict(private <= PRIVATE_TARGET_KIB)
        ),
        format!(
            "memory, {} clones: {} KiB in all (PSS, guest memory included)",
            clones.len(),
            number(all)
        ),
    ];
    for note in notes {
        samples.note(note);
    }
    for (vm, client) in clones {
        drop(client);
        vm.end()?;
    }
    Ok(())
}

fn of_peers(plan: &Plan<'_>, samples: &mut Samples) -> Result<()> {
    let adapters = peer::adapters(&plan.parts.peers, plan.patience());
    let mut peers = Peers::of(&adapters, NAME, Ability::Restore, samples)?;
    let names = peers.names_with_ours();
    for round in plan.budget.rounds(plan.rounds(3, 1)) {
        for &name in &names {
            go_on()?;
            let memory = peers.attempt(name, samples, |peer| {
                let place = plan
                    .parts
                    .saved
                    .of(peer, plan.parts, MIB, plan.patience())?;
                let mut woken = peer::wake(peer, &place)?;
                let client = &mut woken.client;
                let ran = || exec(client, &["true"], &mut io::sink());
                woken.running.asked(ran)?;
                proc::of_peer(woken.running.pid(), MIB)
            })?;
            if let Some(memory) = memory {
                add(samples, name, CLONE, Readiness::R4, round, memory)?;
            }
        }
    }
    for name in names {
        for what in ["resident, VMM", "written, VMM", "written, guest memory"] {
            note_ratio(samples, NAME, CLONE, what, name);
        }
    }
    Ok(())
}

fn worst(samples: &Samples, case: &str, what: &str) -> f64 {
    let values = samples.of_case(NAME, "ratoon", case, what);
    values.iter().copied().fold(0.0, f64::max)
}
