//! The state of a machine beside its memory and disks: what a generation's state blob holds.
//!
//! It is JSON. The rule for upgrades: members that a reader does not know are ignored, members that
//! a newer Ratoon adds have defaults; what cannot be read that way has a new [`VERSION`], and is
//! refused by name. Lengths are bounded before anything is believed; whether the bytes are those
//! that were written is for the manifest's hash to say.

mod machine;
mod vcpu;

use std::time::{SystemTime, UNIX_EPOCH};

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use ratoon_vmm_api::HostClass;
use serde::{Deserialize, Serialize};

pub use machine::{DeviceState, MachineState};
pub use vcpu::VcpuState;

/// The version of the state's form.
pub const VERSION: u32 = 1;

/// The longest state that is read, in bytes.
pub const MAX_LEN: usize = 64 << 20;

/// Why a state cannot be taken or used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// KVM refused.
    #[error("KVM refuses the {what} of the machine's state")]
    Kvm {
        /// Which part.
        what: &'static str,
        /// KVM's word.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// A model-specific register is not taken.
    #[error("this host does not take model-specific register {0:#x} of the machine's state")]
    Msr(u32),
    /// Not what a Ratoon wrote.
    #[error("the machine's state is damaged: {0}")]
    Damaged(&'static str),
    /// Not JSON of the right shape.
    #[error("the machine's state cannot be read")]
    Json(#[source] serde_json::Error),
    /// Of another version.
    #[error(
        "the machine's state has form {found}; this Ratoon reads form {VERSION}: use a newer one"
    )]
    Version {
        /// What it says.
        found: u32,
    },
    /// Of a host of another kind.
    #[error(
        "the machine was frozen on a host of another kind ({found:?}, this one is {here:?}): boot it anew"
    )]
    HostClass {
        /// Where it was frozen.
        found: HostClass,
        /// This host's.
        here: HostClass,
    },
}

/// The parts of KVM's VM, apart from vCPUs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VmState {
    /// PIC master, PIC slave, IOAPIC.
    irqchips: [Box<kvm_irqchip>; 3],
    pit: kvm_pit_state2,
    /// kvm-clock's value at the freeze; the guest goes on from there.
    clock_ns: u64,
    /// What the host's wall clock said then, in nanoseconds since 1970.
    #[serde(default)]
    realtime_ns: Option<u64>,
}

/// A guest that goes on so soon after the freeze has only been slow: its clocks have run meanwhile, and need not
/// be set by `wake`. Later its clocks stand where they stood, and no timer of its programs is late.
const MOMENT_NS: u64 = 1_000_000_000;

/// What kvm-clock says in a guest that was frozen at `frozen_ns` and goes on at `now_ns`.
fn clock(clock_ns: u64, frozen_ns: Option<u64>, now_ns: u64) -> u64 {
    match frozen_ns.and_then(|frozen| now_ns.checked_sub(frozen)) {
        Some(passed) if passed < MOMENT_NS => clock_ns.saturating_add(passed),
        _ => clock_ns,
    }
}

/// The host's wall clock, in nanoseconds since 1970.
fn realtime_ns() -> Option<u64> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
    u64::try_from(now.as_nanos()).ok()
}

fn step(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> StateError {
    move |source| StateError::Kvm { what, source }
}

const CHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

impl VmState {
    /// Reads it; no vCPU may run.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn save(vm: &VmFd) -> Result<Self, StateError> {
        let chip = |chip_id| {
            let mut chip = Box::new(kvm_irqchip {
                chip_id,
                ..kvm_irqchip::default()
            });
            vm.get_irqchip(&mut chip)
                .map_err(step("interrupt controller"))?;
            Ok(chip)
        };
        Ok(Self {
            clock_ns: vm.get_clock().map_err(step("clock"))?.clock,
            realtime_ns: realtime_ns(),
            irqchips: [chip(CHIPS[0])?, chip(CHIPS[1])?, chip(CHIPS[2])?],
            pit: vm.get_pit2().map_err(step("timer"))?,
        })
    }

    /// Writes it.
    ///
    /// # Errors
    /// When KVM refuses, or the state is damaged.
    pub fn restore(&self, vm: &VmFd) -> Result<(), StateError> {
        for (chip, id) in self.irqchips.iter().zip(CHIPS) {
            if chip.chip_id != id {
                return Err(StateError::Damaged("its interrupt controllers"));
            }
            vm.set_irqchip(chip).map_err(step("interrupt controller"))?;
        }
        vm.set_pit2(&self.pit).map_err(step("timer"))?;
        let clock = kvm_clock_data {
            clock: clock(self.clock_ns, self.realtime_ns, realtime_ns().unwrap_or(0)),
            ..kvm_clock_data::default()
        };
        vm.set_clock(&clock).map_err(step("clock"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_run_on_over_a_moment_and_stand_over_a_longer_time() {
        let frozen = 1_790_000_000_000_000_000;
        for (at, now, expected) in [
            (Some(frozen), frozen, 7),
            (Some(frozen), frozen + 30, 37),
            (Some(frozen), frozen + MOMENT_NS - 1, MOMENT_NS + 6),
            (Some(frozen), frozen + MOMENT_NS, 7),
            // The host's clock was set back.
            (Some(frozen), frozen - 1, 7),
            (Some(u64::MAX), 0, 7),
            (None, frozen, 7),
        ] {
            assert_eq!(clock(7, at, now), expected, "{at:?} {now}");
        }
    }
}
