//! Interrupts and time-outs.

use std::time::{Duration, Instant};

use ratoon_protocol::Language;
use rustix::process::{Pid, Signal};

use super::ending::died;
use super::{Context, EARLY, INTERRUPT_GRACE, START_LIMIT};
use crate::sessions::earlier;

/// Node dies of an interrupt in the moment in which it changes hands between its watchdog (code that
/// runs) and its handler (code that waits): it is sent when this change is likely to be over.
const SETTLE: Duration = Duration::from_millis(50);

impl Context {
    /// Whether an interrupt may get lost: Bash waits for a command that it was just about to start
    /// and that has not got it; Node changes hands between its watchdog and its handler.
    fn may_miss(&self) -> bool {
        self.params.language != Language::Python
    }

    /// Interrupts its cell.
    pub fn interrupt(&mut self, now: Instant) {
        let may_miss = self.may_miss();
        let Some(cell) = &mut self.cell else { return };
        cell.interrupted = true;
        match cell.since {
            None => {}
            // What asks for it may have seen the cell print, just before it begins to wait.
            Some(_) if self.params.language == Language::Node => {
                cell.again = Some(now + SETTLE);
            }
            Some(since) => {
                if may_miss || now.saturating_duration_since(since) < EARLY {
                    cell.again = Some(now + EARLY);
                }
                self.signal(Signal::INT);
            }
        }
    }

    /// Does what is due.
    pub(super) fn check_time(&mut self, now: Instant) {
        let is_due = |at: Option<Instant>| at.is_some_and(|at| now >= at);
        if is_due(self.up_by.take_if(|at| now >= *at)) {
            self.kill(Some(died(format!(
                "it was not up after {} s",
                START_LIMIT.as_secs()
            ))));
        }
        let may_miss = self.may_miss();
        let Some(cell) = &mut self.cell else { return };
        let tick = is_due(cell.tick.take_if(|at| now >= *at));
        let again = is_due(cell.again.take_if(|at| now >= *at));
        if again && may_miss {
            cell.again = Some(now + EARLY);
        }
        let due = is_due(cell.due.take_if(|at| now >= *at));
        let kill = due && cell.timed_out;
        if due && !kill {
            cell.timed_out = true;
            cell.due = Some(now + INTERRUPT_GRACE);
        }
        if tick
            && !self.gone
            && let Some(pid) = self.pid.and_then(Pid::from_raw)
        {
            let _ = rustix::process::kill_process(pid, Signal::URG);
        }
        if kill {
            let mut error = died("it took too long and did not heed its interrupt; it was killed");
            error.name = "Timeout".into();
            self.kill(Some(error));
        } else if due || again {
            self.signal(Signal::INT);
        }
    }

    /// When to look at it again.
    pub fn next(&self) -> Option<Instant> {
        let cell = self.cell.as_ref().filter(|_| !self.dying);
        let times = cell.map_or([None; 3], |cell| [cell.due, cell.tick, cell.again]);
        times
            .into_iter()
            .fold(self.up_by.filter(|_| !self.dying), earlier)
    }
}
