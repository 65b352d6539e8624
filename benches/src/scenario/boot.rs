//! From spawn to a runtime that answers, beside the peers.
//!
//! All boot the same kernel, initramfs and disk with 256 MiB and one vCPU, in turn, each first in turn. R3 is the
//! runtime's HELLO over vsock, with those that have it; R3' its line on the console, which all have. The same
//! loop watches both, of all systems.

use anyhow::Result;

use super::phases::Timeline;
use super::{Plan, note_ratio, series, verdict};
use crate::machine::{Ratoon, Ready, Shape, go_on};
use crate::peer::{self, Ability, Adapter, Guest, Peers, Place};
use crate::samples::{Readiness, Samples, number, percentile};

const NAME: &str = "boot";
const MIB: u64 = 256;
const R3_TARGET_S: f64 = 12.0;
const METRIC: &str = "spawn to the console's ready line";
const METRIC_CPU: &str = "host CPU to the console's ready line";
const METRIC_HELLO: &str = "spawn to HELLO";

/// Runs it.
///
/// # Errors
/// When our VM does not come up. A peer that fails is n/a.
pub fn run(plan: &Plan<'_>, samples: &mut Samples) -> Result<()> {
    let adapters = peer::adapters(&plan.parts.peers, plan.patience());
    let mut peers = Peers::of(&adapters, NAME, Ability::Boot, samples)?;
    let names = peers.names_with_ours();
    for round in plan.budget.rounds(plan.rounds(5, 1)) {
        for name in peer::order(&names, round) {
            go_on()?;
            if name == "ratoon" {
                boot_ours(plan, samples, round)?;
                continue;
            }
            let booted = peers.attempt(name, samples, |peer| {
                let booted = boot_peer(peer, plan);
                if let Err(error) = &booted {
                    plan.parts
                        .saved
                        .cannot_boot(peer.name(), &format!("{error:#}"));
                }
                booted
            })?;
            if let Some(booted) = booted {
                booted.add(name, samples, round)?;
            }
        }
    }
    conclude(samples, &names);
    Ok(())
}

/// What is measured alike on all, in nanoseconds.
struct Booted {
    hello: Option<u64>,
    console: Option<u64>,
    cpu: Option<u64>,
}

impl Booted {
    fn add(&self, system: &'static str, samples: &mut Samples, round: usize) -> Result<()> {
        for (metric, readiness, ns) in [
            (METRIC_HELLO, Readiness::R3, self.hello),
            (METRIC, Readiness::R3Console, self.console),
            (METRIC_CPU, Readiness::R3Console, self.cpu),
        ] {
            if let Some(ns) = ns {
                let series = series(NAME, system, metric, "s", readiness);
                samples.add(&series, round, ns as f64 / 1e9)?;
            }
        }
        Ok(())
    }

    fn of(ready: &Ready) -> Self {
        Self {
            hello: Some(ready.hello_ns),
            console: ready.console_ns,
            cpu: ready.cpu_ns,
        }
    }
}

fn boot_peer(peer: &dyn Adapter, plan: &Plan<'_>) -> Result<Booted> {
    let place = Place::new(plan.patience())?;
    let guest = Guest::of(peer, plan.parts, MIB, &place)?;
    let mut running = place.boot(peer, &guest)?;
    if peer.has_vsock() {
        return Ok(Booted::of(&running.hello()?));
    }
    let seen = running.ready()?;
    Ok(Booted {
        hello: None,
        console: seen.console_ns,
        cpu: seen.cpu_ns,
    })
}

fn boot_ours(plan: &Plan<'_>, samples: &mut Samples, round: usize) -> Result<()> {
    let shape = Shape {
        ready_on_console: true,
        ..Shape::of(MIB)
    };
    let mut vm = Ratoon::spawn(plan.parts, &shape)?;
    let ready = vm.ready(true)?;
    let metrics = vm.metrics()?;
    let spawned_ns = vm.spawned_ns;
    vm.stop()?;
    Booted::of(&ready).add("ratoon", samples, round)?;
    let timeline = Timeline {
        spawned_ns,
        phases: metrics.phases,
        answered_ns: Some(spawned_ns + ready.hello_ns),
    };
    timeline.add(samples, NAME, "", round)?;
    for counter in ["insn_emulation", "exits"] {
        let total: u64 = metrics.vcpus.iter().filter_map(|v| v.get(counter)).sum();
        let metric = format!("KVM {counter} to R3");
        let series = series(NAME, "ratoon", metric, "count", Readiness::R3);
        samples.add(&series, round, total as f64)?;
    }
    Ok(())
}

fn conclude(samples: &mut Samples, names: &[&'static str]) {
    if let Some(ours) = percentile(samples.of(NAME, "ratoon", METRIC_HELLO), 50) {
        samples.note(format!(
            "boot (R3): p50 {} s, target {R3_TARGET_S} s: {}",
            number(ours),
            verdict(ours <= R3_TARGET_S)
        ));
    }
    for peer in names {
        for metric in [METRIC_HELLO, METRIC, METRIC_CPU] {
            note_ratio(samples, NAME, "", metric, peer);
        }
    }
}
