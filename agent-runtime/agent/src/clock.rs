//! The guest's clock: CLOCK_BOOTTIME, which a frozen and restored guest sees go on without a gap.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// A moment: the time since boot.
pub type Moment = Duration;

/// Now.
pub fn now() -> Moment {
    let now = clock_gettime(ClockId::Boottime);
    Duration::new(
        u64::try_from(now.tv_sec).unwrap_or(0),
        u32::try_from(now.tv_nsec).unwrap_or(0),
    )
}

/// Milliseconds, with three places.
pub fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}
