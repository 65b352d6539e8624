//! A built virtual machine and what may be asked of it: one enum of actions is the whole control
//! plane.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use ratoon_devices::vsock::{FIRST_RX_NS, FIRST_TX_NS};
use ratoon_vmm_api::{
    DiskConfig, HostClass, MetricsReply, Outcome, Phases, StatusReply, TouchedReply, VmConfig,
    VmState,
};

use crate::bus::{Bus, lock};
use crate::ending::Ending;
use crate::memory::{self, FreeMemory, Layer};
use crate::pager::Pager;
use crate::stats::StatsReader;
use crate::vcpu::Vcpus;

/// What a client of the control socket may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Where the VM is in its life.
    Status,
    /// Hold all vCPUs.
    Pause,
    /// Let them run again.
    Resume,
    /// End the VM.
    Stop,
    /// Counters and phases.
    Metrics,
    /// Which of its memory is mapped: what it has touched so far.
    Touched,
}

/// An action's result.
#[derive(Debug)]
pub enum Reply {
    /// Of all actions but these two.
    Status(StatusReply),
    /// Of [`Action::Metrics`].
    Metrics(Box<MetricsReply>),
    /// Of [`Action::Touched`].
    Touched(TouchedReply),
}

/// Why an action is refused.
#[derive(Debug, thiserror::Error)]
#[error("cannot {verb} a VM that is {}", name(*state))]
pub struct Refused {
    verb: &'static str,
    state: VmState,
}

impl Refused {
    pub(crate) fn new(verb: &'static str, state: VmState) -> Self {
        Self { verb, state }
    }
}

fn name(state: VmState) -> &'static str {
    match state {
        VmState::Created => "not started yet",
        VmState::Running => "running",
        VmState::Paused => "paused",
        VmState::Stopped => "stopped",
        VmState::Failed => "failed",
    }
}

/// The state after `action` in `state`: the one table of legal moves.
fn next(state: VmState, action: Action) -> Result<VmState, Refused> {
    use VmState::{Created, Failed, Paused, Running, Stopped};
    let refuse = |verb| Err(Refused { verb, state });
    match (action, state) {
        (Action::Status | Action::Metrics | Action::Touched, _) => Ok(state),
        (Action::Pause, Running | Paused) => Ok(Paused),
        (Action::Pause, Created | Stopped | Failed) => refuse("pause"),
        (Action::Resume, Created | Paused | Running) => Ok(Running),
        (Action::Resume, Stopped | Failed) => refuse("resume"),
        (Action::Stop, Created | Running | Paused) => Ok(Stopped),
        (Action::Stop, Stopped | Failed) => Ok(state),
    }
}

/// A virtual machine: devices wired, vCPUs waiting.
pub struct Machine {
    pub(crate) config: VmConfig,
    pub(crate) class: HostClass,
    pub(crate) started: Instant,
    pub(crate) phases: Phases,
    pub(crate) bus: Arc<Bus>,
    pub(crate) ending: Arc<Ending>,
    pub(crate) vcpus: Mutex<Vcpus>,
    pub(crate) state: Mutex<VmState>,
    pub(crate) vm_stats: Option<StatsReader>,
    pub(crate) vcpu_stats: Vec<StatsReader>,
    /// The generation that its memory lies over; none while memory is still its own alone.
    pub(crate) layers: Mutex<Vec<Layer>>,
    /// Where the lowest layer comes from as it is touched.
    pub(crate) pager: Option<Pager>,
    /// What the balloon takes back of it.
    pub(crate) free: Arc<FreeMemory>,
    /// What it was started from, if that may lie in memory alone.
    pub(crate) birth: Option<crate::birth::Birth>,
    /// What becomes of its layers when there are many.
    pub(crate) merging: crate::merge::Merging,
    /// Its disks: freezes add layers to what the configuration says.
    pub(crate) disks: Mutex<Vec<DiskConfig>>,
    // Last, and in this order: KVM's slots point into the memory.
    pub(crate) vm: kvm_ioctls::VmFd,
    pub(crate) memory: vm_memory::GuestMemoryMmap,
}

impl Machine {
    /// Does `action`.
    ///
    /// # Errors
    /// [`Refused`] when the VM's state does not allow it.
    pub fn perform(&self, action: Action) -> Result<Reply, Refused> {
        let mut state = lock(&self.state);
        if let Some(outcome) = self.ending.outcome() {
            *state = outcome.state();
        }
        let target = next(*state, action)?;
        if target != *state {
            match target {
                VmState::Running => lock(&self.vcpus).run(),
                VmState::Paused => lock(&self.vcpus).hold(),
                VmState::Stopped => self.ending.end(Outcome::Stopped),
                VmState::Created | VmState::Failed => {}
            }
            *state = target;
        }
        let now = *state;
        drop(state);
        Ok(match action {
            Action::Metrics => Reply::Metrics(Box::new(self.metrics())),
            Action::Touched => Reply::Touched(TouchedReply {
                runs: memory::touched(&self.memory).unwrap_or_default(),
            }),
            _ => Reply::Status(self.status(now)),
        })
    }

    /// Keeps what it was started from.
    #[must_use]
    pub fn with_birth(self, birth: Option<crate::birth::Birth>) -> Self {
        Self { birth, ..self }
    }

    /// Ends the vCPU threads; to be called once the VM is over.
    pub fn wind_down(&self, outcome: &Outcome) {
        lock(&self.vcpus).end();
        *lock(&self.state) = outcome.state();
    }

    /// The configuration.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// The bus with all devices.
    pub fn bus(&self) -> &Arc<Bus> {
        &self.bus
    }

    /// Where an end is told.
    pub fn ending(&self) -> &Arc<Ending> {
        &self.ending
    }

    fn status(&self, state: VmState) -> StatusReply {
        StatusReply {
            id: self.config.id.clone(),
            state,
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            vcpus: self.config.vcpus,
            memory_mib: self.config.memory_mib,
            host_class: self.class,
            uptime_ms: self.started.elapsed().as_millis() as u64,
            disks: self.frozen_disks(),
        }
    }

    fn metrics(&self) -> MetricsReply {
        let mut phases = self.phases.clone();
        phases.first_instruction_ns = lock(&self.vcpus).first_run_ns();
        let read = |stats: &StatsReader| stats.read().unwrap_or_default();
        let mut devices = std::collections::BTreeMap::new();
        for slot in self.bus.virtio() {
            for (counter, value) in lock(&slot.transport).counters() {
                match counter {
                    FIRST_RX_NS => phases.wake_ns = value,
                    FIRST_TX_NS => phases.answer_ns = value,
                    _ => {
                        devices.insert(format!("{}.{counter}", slot.name), value);
                    }
                }
            }
        }
        devices.insert(
            "serial.lost_bytes".into(),
            lock(self.bus.serial()).lost_bytes(),
        );
        MetricsReply {
            phases,
            vcpus: self.vcpu_stats.iter().map(read).collect(),
            vm: self.vm_stats.as_ref().map(read).unwrap_or_default(),
            devices,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_legal_moves_are_made_and_the_rest_is_refused_by_name() {
        use VmState::{Created, Failed, Paused, Running, Stopped};
        let to = |state, action| next(state, action).ok();
        assert_eq!(to(Created, Action::Resume), Some(Running));
        assert_eq!(to(Running, Action::Pause), Some(Paused));
        assert_eq!(to(Paused, Action::Pause), Some(Paused));
        assert_eq!(to(Paused, Action::Resume), Some(Running));
        assert_eq!(to(Paused, Action::Stop), Some(Stopped));
        assert_eq!(to(Failed, Action::Stop), Some(Failed));
        let refused = next(Stopped, Action::Resume).unwrap_err();
        assert_eq!(refused.to_string(), "cannot resume a VM that is stopped");
        assert!(next(Created, Action::Pause).is_err());
    }
}
