//! The clocks: CLOCK_MONOTONIC for latencies, and whether the wall clock stepped meanwhile.
//!
//! A step of the wall clock changes no latency; it is noted, as it tells that the host was being
//! set right, moved or stopped. It cannot fail.

use rustix::time::{ClockId, clock_gettime};

/// Less than this is the slewing that time daemons do all day.
const STEP_S: f64 = 0.05;

fn ns(clock: ClockId) -> i128 {
    let now = clock_gettime(clock);
    i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec)
}

/// CLOCK_MONOTONIC in nanoseconds, as the VMM stamps its phases.
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Watches the wall clock against the monotonic one.
#[derive(Debug)]
pub struct WallClock {
    ahead_ns: i128,
}

impl WallClock {
    /// From now on.
    pub fn now() -> Self {
        Self {
            ahead_ns: ns(ClockId::Realtime) - ns(ClockId::Monotonic),
        }
    }

    /// By how many seconds it has stepped since the last time that this was asked, if it has.
    pub fn step(&mut self) -> Option<f64> {
        let now = Self::now();
        let step = step_between(self.ahead_ns, now.ahead_ns);
        *self = now;
        step
    }
}

fn step_between(before_ns: i128, after_ns: i128) -> Option<f64> {
    let step_s = (after_ns - before_ns) as f64 / 1e9;
    (step_s.abs() >= STEP_S).then_some(step_s)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_told_with_its_direction_and_slewing_is_not() {
        assert_eq!(step_between(0, 40_000_000), None);
        assert_eq!(step_between(0, -40_000_000), None);
        assert_eq!(step_between(1_000_000_000, -2_000_000_000), Some(-3.0));
        assert_eq!(step_between(0, 60_000_000), Some(0.06));
    }

    #[test]
    fn a_step_is_told_once() {
        let mut wall = WallClock::now();
        wall.ahead_ns -= 5_000_000_000;
        let step = wall.step().unwrap();
        assert!((4.9..5.1).contains(&step), "{step}");
        assert_eq!(wall.step(), None);
    }
}
