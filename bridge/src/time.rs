//! Time as a budget: how long a branch has been at work, and for how long its calls were on their way.
//!
//! ```text
//!   begun --call--> at work --its last call ends--> idle --call--> at work        each: also for all branches above
//!                                                    `--the host says that it stood still--> that was rest
//! ```
//!
//! Wall time runs from the branch's first line on, without rest; working time is that of its calls, side by side ones
//! added up. A guest is not asked: what rests is the host's to say (a hold, a freeze), and while a call is open nothing
//! rests. Times are those of the record's lines, so that they can be read back.

use std::collections::BTreeMap;
use std::time::Duration;

use ratoon_bridge_api::amount::Limits;

/// A shorter rest is none: it is not worth a line.
const LEAST_REST_MS: u64 = 100;

/// The branches of a run.
#[derive(Debug, Default)]
pub struct Times(BTreeMap<String, Clock>);

/// One branch.
#[derive(Debug, Clone)]
struct Clock {
    parent: Option<String>,
    limits: Limits,
    begun_ms: u64,
    rested_ms: u64,
    worked_ms: u64,
    /// When something was last heard of a call of it or of a branch below.
    last_ms: u64,
    /// Calls on their way.
    open: u32,
}

/// What is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the run's {what} of {} s is over", .limit.as_secs())]
pub struct Over {
    what: &'static str,
    limit: Duration,
}

impl Clock {
    fn left(&self, now_ms: u64) -> Result<Duration, Over> {
        let wall_ms = now_ms
            .saturating_sub(self.begun_ms)
            .saturating_sub(self.rested_ms);
        let mut least = Duration::MAX;
        for (what, limit, used) in [
            ("wall time", self.limits.wall_ms, wall_ms),
            ("working time", self.limits.working_ms, self.worked_ms),
        ] {
            let Some(limit) = limit else { continue };
            if used >= limit {
                let limit = Duration::from_millis(limit);
                return Err(Over { what, limit });
            }
            least = least.min(Duration::from_millis(limit - used));
        }
        Ok(least)
    }
}

impl Times {
    /// A branch begins. Its parent must be there already.
    pub fn begin(&mut self, branch: &str, parent: Option<&str>, limits: Limits, now_ms: u64) {
        let clock = Clock {
            parent: parent.map(str::to_owned),
            limits,
            begun_ms: now_ms,
            rested_ms: 0,
            worked_ms: 0,
            last_ms: now_ms,
            open: 0,
        };
        self.0.insert(branch.to_owned(), clock);
        self.each_above(branch, |clock| clock.last_ms = clock.last_ms.max(now_ms));
    }

    /// A call of a branch is on its way.
    pub fn call(&mut self, branch: &str, now_ms: u64) {
        self.each_above(branch, |clock| {
            clock.open += 1;
            clock.last_ms = clock.last_ms.max(now_ms);
        });
    }

    /// A call of it has ended, and took so long.
    pub fn ended(&mut self, branch: &str, took: Duration, now_ms: u64) {
        let took = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        self.each_above(branch, |clock| {
            clock.open = clock.open.saturating_sub(1);
            clock.worked_ms = clock.worked_ms.saturating_add(took);
            clock.last_ms = clock.last_ms.max(now_ms);
        });
    }

    /// Whose rest it is that nothing was heard of a branch until now: its own, and that of those above that were idle
    /// as well.
    #[must_use]
    pub fn resting(&self, branch: &str, now_ms: u64) -> Vec<(String, u64)> {
        let mut found = Vec::new();
        let mut next = self.0.get_key_value(branch);
        while let Some((name, clock)) = next {
            let rest = now_ms.saturating_sub(clock.last_ms);
            if clock.open == 0 && rest >= LEAST_REST_MS {
                found.push((name.clone(), rest));
            }
            let parent = clock.parent.as_ref();
            next = parent.and_then(|parent| self.0.get_key_value(parent));
        }
        found
    }

    /// A branch has rested for so long.
    pub fn rested(&mut self, branch: &str, rest_ms: u64, now_ms: u64) {
        if let Some(clock) = self.0.get_mut(branch) {
            clock.rested_ms = clock.rested_ms.saturating_add(rest_ms);
            clock.last_ms = clock.last_ms.max(now_ms);
        }
    }

    /// How long a call that begins now may take: the least of what is left in the branch and in all above.
    ///
    /// # Errors
    /// What is over.
    pub fn left(&self, branch: &str, now_ms: u64) -> Result<Duration, Over> {
        let mut least = Duration::MAX;
        let mut next = self.0.get(branch);
        while let Some(clock) = next {
            least = least.min(clock.left(now_ms)?);
            next = clock.parent.as_ref().and_then(|parent| self.0.get(parent));
        }
        Ok(least)
    }

    fn each_above(&mut self, branch: &str, mut change: impl FnMut(&mut Clock)) {
        let mut next = Some(branch.to_owned());
        while let Some(clock) = next.and_then(|name| self.0.get_mut(&name)) {
            change(clock);
            next = clock.parent.clone();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(wall_s: u64, working_s: u64) -> Limits {
        Limits {
            wall_ms: Some(wall_s * 1000),
            working_ms: Some(working_s * 1000),
            ..Limits::default()
        }
    }

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    /// `main`, begun at 0, and its child `a`, begun at 10 s.
    fn family() -> Times {
        let mut times = Times::default();
        times.begin("main", None, limits(100, 30), 0);
        times.begin("a", Some("main"), Limits::default(), 10_000);
        times
    }

    #[test]
    fn a_childs_time_is_its_parents() {
        let mut times = family();
        assert_eq!(times.left("a", 60_000), Ok(seconds(30)));
        times.call("a", 60_000);
        times.ended("a", seconds(12), 72_000);
        assert_eq!(times.left("a", 72_000), Ok(seconds(18)));
        assert_eq!(times.left("main", 90_000), Ok(seconds(10)));
        let over = times.left("a", 100_000).unwrap_err();
        assert_eq!(over.to_string(), "the run's wall time of 100 s is over");
        times.ended("a", seconds(18), 90_000);
        let over = times.left("main", 90_000).unwrap_err();
        assert_eq!(over.to_string(), "the run's working time of 30 s is over");
    }

    #[test]
    fn only_what_was_idle_has_rested() {
        let mut times = family();
        times.begin("b", Some("main"), Limits::default(), 10_000);
        times.call("b", 20_000);
        // The run works, so its time goes on; the child's own does not.
        assert_eq!(times.resting("a", 50_000), [("a".into(), 40_000)]);
        times.ended("b", seconds(20), 40_000);
        let resting = times.resting("a", 50_000);
        assert_eq!(resting, [("a".into(), 40_000), ("main".into(), 10_000)]);
        for (branch, rest) in resting {
            times.rested(&branch, rest, 50_000);
        }
        assert_eq!(
            times.left("main", 50_000),
            Ok(seconds(10)),
            "of working time"
        );
        assert_eq!(times.resting("a", 50_000), [], "it counts once");
        assert!(times.left("main", 109_000).is_ok());
        assert!(times.left("main", 110_000).is_err());
        assert!(times.resting("none", 1).is_empty());
    }
}
