//! Machines asked for by a Poisson process: what callers wait who do not wait for each other.
//!
//! The arrivals are drawn before the first one, with a fixed seed. Each restores a machine from the warm
//! snapshot, runs `true` and ends it. Latency counts from the moment at which the caller was *meant* to come:
//! a stall makes all who come meanwhile wait, and is seen in all of them (no coordinated omission).
//!
//! Rates are shares of what the host can do, as a few restores one after the other tell: a fixed rate would be
//! idleness on one host and a queue without end on another. Where a queue grows all the same, callers beyond
//! those that may be inside wait, and their time counts.

use std::io;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;

use super::{Plan, exec, series};
use crate::arrivals::poisson;
use crate::host::processors;
use crate::machine::go_on;
use crate::samples::{Readiness, Samples, number};
use crate::sandbox::{Sandboxes, Warm};

const NAME: &str = "sustained";
const MIB: u64 = 256;
const SEED: u64 = 0x5241_544f_4f4e;
/// Shares of the host's capacity.
const LOADS: [f64; 3] = [0.25, 0.5, 0.75];
/// Callers that may be inside at once.
const INSIDE_MAX: usize = 64;
/// No more arrivals than these in one load.
const ARRIVALS_MAX: usize = 5_000;

/// Runs it.
///
/// # Errors
/// When a machine does not come up.
pub fn run(plan: &Plan<'_>, samples: &mut Samples) -> Result<()> {
    let warm = plan.parts.warm.of(plan.parts, MIB)?;
    let capacity = capacity(&warm.sandboxes)?;
    let loads = if plan.quick { &LOADS[1..2] } else { &LOADS[..] };
    for (index, &load) in loads.iter().enumerate() {
        let rate = capacity * load;
        // A half for the arrivals' time, the rest for who is late.
        let time = plan.budget.part(1.0 / (loads.len() - index) as f64).left();
        let most = plan.runs.unwrap_or(ARRIVALS_MAX);
        let time = time.min(Duration::from_secs(600)).mul_f64(0.7);
        let arrivals = arrivals(rate, time, most);
        samples.note(format!(
            "sustained: {load} of this host's {} a second: {} arrivals at {} a second, seed {SEED:#x}",
            number(capacity),
            arrivals.len(),
            number(rate)
        ));
        let came = serve(&warm.sandboxes, &arrivals)?;
        for (round, (meant, waited)) in came.into_iter().enumerate() {
            let series = series(
                NAME,
                "ratoon",
                "meant arrival to the end of true",
                "ms",
                Readiness::R4,
            );
            let series = series.case(format!("load {load}"));
            samples.add_from(&series, round, waited.as_secs_f64() * 1e3, meant)?;
        }
    }
    Ok(())
}

/// Restores a second that the host can do, its processors shared by as many callers.
fn capacity(sandboxes: &Sandboxes) -> Result<f64> {
    let callers = processors();
    const EACH: usize = 2;
    one(sandboxes)?;
    let from = Instant::now();
    std::thread::scope(|scope| -> Result<()> {
        let serve = || (0..EACH).try_for_each(|_| one(sandboxes));
        let callers: Vec<_> = (0..callers).map(|_| scope.spawn(serve)).collect();
        for caller in callers {
            caller
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        Ok(())
    })?;
    Ok((callers * EACH) as f64 / from.elapsed().as_secs_f64())
}

fn one(sandboxes: &Sandboxes) -> Result<()> {
    go_on()?;
    let (vm, mut client) = sandboxes.restore(Warm::SNAPSHOT)?;
    exec(&mut client, &["true"], &mut io::sink())?;
    drop(client);
    vm.end()?;
    Ok(())
}

/// How many callers are inside.
#[derive(Default)]
struct Door {
    inside: Mutex<usize>,
    left: Condvar,
}

impl Door {
    fn enter(&self) {
        let inside = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
        let mut inside = self
            .left
            .wait_while(inside, |inside| *inside >= INSIDE_MAX)
            .unwrap_or_else(PoisonError::into_inner);
        *inside += 1;
    }

    fn leave(&self) {
        *self.inside.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.left.notify_one();
    }
}

/// Serves all; when each was meant to come, and how long it waited from then on until its command had ended.
fn serve(sandboxes: &Sandboxes, arrivals: &[Duration]) -> Result<Vec<(Instant, Duration)>> {
    let door = Door::default();
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let mut callers = Vec::new();
        for &offset in arrivals {
            let meant = begun + offset;
            std::thread::sleep(meant.saturating_duration_since(Instant::now()));
            // An interrupt is told by who is inside.
            if go_on().is_err() {
                break;
            }
            door.enter();
            let door = &door;
            callers.push(scope.spawn(move || {
                let restored = (|| -> Result<_> {
                    go_on()?;
                    let (vm, mut client) = sandboxes.restore(Warm::SNAPSHOT)?;
                    exec(&mut client, &["true"], &mut io::sink())?;
                    Ok((vm, meant.elapsed()))
                })();
                let served = restored.and_then(|(vm, waited)| {
                    vm.end()?;
                    Ok((meant, waited))
                });
                door.leave();
                served
            }));
        }
        let mut served = Vec::new();
        for caller in callers {
            let one = caller
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            served.push(one?);
        }
        go_on()?;
        Ok(served)
    })
}

/// When callers come within `time`; one at least.
fn arrivals(rate: f64, time: Duration, most: usize) -> Vec<Duration> {
    let mut arrivals: Vec<Duration> = poisson(SEED, rate)
        .take_while(|at| *at < time)
        .take(most)
        .collect();
    if arrivals.is_empty() {
        arrivals.push(Duration::ZERO);
    }
    arrivals
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn callers_come_within_the_time_and_no_more_than_are_wanted() {
        let time = Duration::from_secs(100);
        let all = arrivals(5.0, time, usize::MAX);
        assert!((400..600).contains(&all.len()), "{}", all.len());
        assert!(all.iter().all(|at| *at < time));
        assert_eq!(arrivals(5.0, time, 7), all[..7]);
        assert_eq!(arrivals(1e-9, time, 7), [Duration::ZERO]);
    }
}
