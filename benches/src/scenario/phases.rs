//! The phases of a start, one after the other, as every scenario that starts machines tells them: series
//! `phase: …`, which the report draws as a waterfall.
//!
//! All but the first and the last are stamps of the VMM's own (`GET /v1/metrics`), of the clock that the
//! harness reads (CLOCK_MONOTONIC). A phase that a start does not have is left out.

use anyhow::Result;
use ratoon_vmm_api::Phases;

use super::series;
use crate::record::Text;
use crate::samples::{Readiness, Samples};

/// When one machine was asked for and when it had answered, in ns of CLOCK_MONOTONIC.
#[derive(Debug, Clone)]
pub struct Timeline {
    /// Right before its process was made.
    pub spawned_ns: u64,
    /// The VMM's stamps.
    pub phases: Phases,
    /// When the client had the answer to its wake, or the HELLO, if that was waited for.
    pub answered_ns: Option<u64>,
}

impl Timeline {
    /// Names and ends of the phases, in their order.
    fn ends(&self) -> Vec<(&'static str, u64, Readiness)> {
        use Readiness::{R0, R1, R3};
        let it = &self.phases;
        let mut ends = vec![
            ("phase: spawn", it.main_ns, R0),
            ("phase: configuration", it.configured_ns, R0),
            ("phase: memory", it.mapped_ns, R0),
            ("phase: KVM", it.memory_ns, R0),
            ("phase: vCPUs", it.vcpus_ns, R0),
            ("phase: kernel or state loaded", it.loaded_ns, R0),
            ("phase: devices", it.devices_ns, R0),
            (
                "phase: first guest instruction",
                it.first_instruction_ns,
                R1,
            ),
        ];
        // Of a boot the runtime speaks first.
        if it.wake_ns != 0 && it.wake_ns < it.answer_ns {
            ends.push(("phase: wake", it.wake_ns, R1));
            ends.push(("phase: answer", it.answer_ns, R3));
        } else {
            ends.push(("phase: guest boots and calls", it.answer_ns, R3));
        }
        if let Some(answered_ns) = self.answered_ns {
            ends.push(("phase: answer taken", answered_ns, R3));
        }
        ends.retain(|(_, end, _)| *end != 0);
        ends
    }

    /// Each phase's length in milliseconds.
    fn lengths(&self) -> Vec<(&'static str, f64, Readiness)> {
        let mut last = self.spawned_ns;
        let mut lengths = Vec::new();
        for (name, end, readiness) in self.ends() {
            // A wake may wait for the guest before its first instruction.
            lengths.push((name, end.saturating_sub(last) as f64 / 1e6, readiness));
            last = last.max(end);
        }
        lengths
    }

    /// Adds the phases of this round.
    ///
    /// # Errors
    /// When samples cannot be written.
    pub fn add(
        &self,
        samples: &mut Samples,
        scenario: &'static str,
        case: impl Into<Text>,
        round: usize,
    ) -> Result<()> {
        let case = case.into();
        for (name, ms, readiness) in self.lengths() {
            let what = series(scenario, "ratoon", name, "ms", readiness).case(case.clone());
            samples.add(&what, round, ms)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timeline() -> Timeline {
        Timeline {
            spawned_ns: 1_000_000,
            phases: Phases {
                main_ns: 2_000_000,
                configured_ns: 2_500_000,
                mapped_ns: 3_000_000,
                memory_ns: 4_000_000,
                vcpus_ns: 5_000_000,
                loaded_ns: 6_000_000,
                devices_ns: 7_000_000,
                first_instruction_ns: 8_000_000,
                wake_ns: 9_000_000,
                answer_ns: 29_000_000,
            },
            answered_ns: Some(30_000_000),
        }
    }

    #[test]
    fn phases_follow_each_other_and_add_up_to_the_whole() {
        let lengths = timeline().lengths();
        assert_eq!(lengths[0], ("phase: spawn", 1.0, Readiness::R0));
        assert_eq!(lengths[8], ("phase: wake", 1.0, Readiness::R1));
        assert_eq!(lengths[9], ("phase: answer", 20.0, Readiness::R3));
        let sum: f64 = lengths.iter().map(|(_, ms, _)| ms).sum();
        assert!((sum - 29.0).abs() < 1e-9);
    }

    #[test]
    fn a_boot_has_no_wake_and_what_did_not_happen_is_left_out() {
        let mut boot = timeline();
        boot.phases.wake_ns = 29_500_000;
        boot.answered_ns = None;
        let names: Vec<_> = boot.lengths().iter().map(|(name, ..)| *name).collect();
        assert!(!names.contains(&"phase: wake"));
        assert_eq!(names.last(), Some(&"phase: guest boots and calls"));
        boot.phases.answer_ns = 0;
        boot.phases.wake_ns = 0;
        assert_eq!(boot.lengths().len(), 8);
    }

    #[test]
    fn a_wake_that_waited_for_the_guest_makes_no_phase_negative() {
        let mut early = timeline();
        early.phases.wake_ns = 7_500_000;
        let sum: f64 = early.lengths().iter().map(|(_, ms, _)| ms).sum();
        assert!(early.lengths().iter().all(|(_, ms, _)| *ms >= 0.0));
        assert!((sum - 29.0).abs() < 1e-9);
    }
}
