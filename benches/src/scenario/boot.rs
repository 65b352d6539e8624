//! From spawn to a runtime that answers, beside QEMU's microvm in the same run.
//!
//! Both boot the same kernel, initramfs and disk (read-only, behind a throw-away layer) with 256
//! MiB and one vCPU, in turn, the order changing each round. This host may have no vhost-vsock,
//! without which QEMU has no vsock; what both have is the console, so the runtime says there that
//! it serves (R3'), and the same loop watches both files. Ours also has R3, the HELLO over vsock.

use anyhow::Result;
use ratoon_vmm::host;

use super::{Plan, series, verdict};
use crate::machine::{Ratoon, Shape, boot_qemu, go_on};
use crate::samples::{Readiness, Samples, number, percentile};

const NAME: &str = "boot";
const R3_TARGET_S: f64 = 12.0;

/// The kernel's words for QEMU: ours without pvpanic, whose device QEMU is not given. QEMU itself
/// adds its virtio-mmio devices.
fn qemu_words() -> String {
    let class = host::boot_args(host::detect());
    format!(
        "console=ttyS0 quiet reboot=k panic=-1 8250.nr_uarts=1 tsc=reliable no_timer_check \
         random.trust_cpu=on {class} ratoon.ready=console"
    )
}

/// Runs it.
///
/// # Errors
/// When our VM does not come up. A peer that fails is noted, and n/a.
pub fn run(plan: &Plan<'_>, samples: &mut Samples) -> Result<()> {
    let shape = Shape {
        ready_on_console: true,
        ..Shape::of(256)
    };
    let mut peer = plan.parts.qemu.clone();
    if peer.is_none() {
        samples.note("boot: no QEMU found: n/a for the peer");
    }
    for round in 1..=plan.rounds(5, 2) {
        for ours in [round % 2 == 1, round % 2 == 0] {
            go_on()?;
            if ours {
                boot_ours(plan, &shape, samples, round)?;
            } else if let Some(qemu) = &peer {
                match boot_qemu(qemu, plan.parts, &shape, &qemu_words()) {
                    Ok((ns, cpu_ns)) => console(samples, "qemu-microvm", round, ns, cpu_ns)?,
                    Err(error) => {
                        go_on()?;
                        samples.note(format!("boot: QEMU failed in round {round}: {error:#}"));
                        peer = None;
                    }
                }
            }
        }
    }
    conclude(samples);
    Ok(())
}

const METRIC: &str = "spawn to the console's ready line";
const METRIC_CPU: &str = "host CPU to the console's ready line";
const METRIC_HELLO: &str = "spawn to HELLO";

/// Adds what is measured alike on both: the time, and the process's CPU time, which other load on
/// the machine changes less.
fn console(
    samples: &mut Samples,
    system: &'static str,
    round: usize,
    ns: u64,
    cpu_ns: u64,
) -> Result<()> {
    for (metric, ns) in [(METRIC, ns), (METRIC_CPU, cpu_ns)] {
        let series = series(NAME, system, metric, "s", Readiness::R3Console);
        samples.add(&series, round, ns as f64 / 1e9)?;
    }
    Ok(())
}

fn boot_ours(plan: &Plan<'_>, shape: &Shape, samples: &mut Samples, round: usize) -> Result<()> {
    let mut vm = Ratoon::spawn(plan.parts, shape)?;
    let ready = vm.ready(true)?;
    let metrics = vm.metrics()?;
    vm.stop()?;
    if let (Some(ns), Some(cpu_ns)) = (ready.console_ns, ready.cpu_ns) {
        console(samples, "ratoon", round, ns, cpu_ns)?;
    }
    let hello = series(NAME, "ratoon", METRIC_HELLO, "s", Readiness::R3);
    samples.add(&hello, round, ready.hello_ns as f64 / 1e9)?;
    for counter in ["insn_emulation", "exits"] {
        let total: u64 = metrics.vcpus.iter().filter_map(|v| v.get(counter)).sum();
        let metric = format!("KVM {counter} to R3");
        let series = series(NAME, "ratoon", metric, "count", Readiness::R3);
        samples.add(&series, round, total as f64)?;
    }
    Ok(())
}

fn conclude(samples: &mut Samples) {
    let p50 = |system, metric| percentile(samples.of(NAME, system, metric), 50);
    let mut notes = Vec::new();
    if let Some(ours) = p50("ratoon", METRIC_HELLO) {
        notes.push(format!(
            "boot (R3): p50 {} s, target {R3_TARGET_S} s: {}",
            number(ours),
            verdict(ours <= R3_TARGET_S)
        ));
    }
    for (metric, what) in [(METRIC, "time"), (METRIC_CPU, "host CPU")] {
        if let (Some(ours), Some(peer)) = (p50("ratoon", metric), p50("qemu-microvm", metric)) {
            notes.push(format!(
                "boot (R3'), {what}: ours p50 {} s, QEMU microvm p50 {} s, ratio {}; ours no \
                 more: {}",
                number(ours),
                number(peer),
                number(ours / peer),
                verdict(ours <= peer)
            ));
        }
    }
    for note in notes {
        samples.note(note);
    }
}
