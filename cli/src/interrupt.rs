//! What ^C and its like do to a foreground run.
//!
//! ```text
//!  booting: any signal ends the wait (the cancel descriptor becomes readable)
//!  command: the first SIGINT, SIGTERM or SIGQUIT goes to the command; a second one, or 10 s in
//!           which the command does not end, ends the VM. SIGHUP (the terminal is gone) ends it.
//! ```

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ratoon_engine::runtime::Controller;
use rustix::pipe::{PipeFlags, pipe_with};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;

/// Set by ^C and its like: long work then cleans up and ends.
static CANCELLED: AtomicBool = AtomicBool::new(false);

/// From now on signals set the flag that is given, and do nothing else.
pub fn cancel_on_signals() -> std::io::Result<&'static AtomicBool> {
    // The flag alone wakes nobody, but the work asks often.
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for _ in signals.forever() {
                CANCELLED.store(true, Ordering::Relaxed);
            }
        })?;
    Ok(&CANCELLED)
}

/// How long a command may take to heed a signal.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why the run is ended from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// By this signal.
    Signal(i32),
    /// `--timeout` passed.
    Timeout,
}

impl Ended {
    /// The exit code that says so: as a shell for signals, as timeout(1) for time.
    pub fn code(self) -> u8 {
        match self {
            Self::Signal(signal) => 128u8.wrapping_add(signal as u8),
            Self::Timeout => 124,
        }
    }
}

/// Listens to signals from its making on.
#[derive(Debug)]
pub struct Interrupts {
    shared: Arc<Shared>,
    cancel: OwnedFd,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Written once; the read end is `cancel`.
    wake: OwnedFd,
}

#[derive(Debug, Default)]
struct State {
    controller: Option<Controller>,
    first: Option<i32>,
    ended: Option<Ended>,
}

impl Interrupts {
    /// Starts to listen.
    pub fn listen() -> std::io::Result<Self> {
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGQUIT, SIGHUP])?;
        let (cancel, wake) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            wake,
        });
        let listener = shared.clone();
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                for signal in signals.forever() {
                    Shared::signal(&listener, signal);
                }
            })?;
        Ok(Self { shared, cancel })
    }

    /// Readable once the run is to end.
    pub fn cancel(&self) -> BorrowedFd<'_> {
        self.cancel.as_fd()
    }

    /// From now on a command runs that hears of signals.
    pub fn command(&self, controller: Controller) {
        let mut state = self.shared.lock();
        if state.ended.is_some() {
            controller.cancel();
        }
        state.controller = Some(controller);
    }

    /// Ends the run after this time.
    pub fn end_after(&self, timeout: Duration) -> std::io::Result<()> {
        Shared::end_after(&self.shared, timeout, Ended::Timeout)
    }

    /// Why the run is ended from outside, if it is.
    pub fn ended(&self) -> Option<Ended> {
        self.shared.lock().ended
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn signal(this: &Arc<Self>, signal: i32) {
        let mut state = this.lock();
        match &state.controller {
            Some(controller) if state.first.is_none() && signal != SIGHUP => {
                controller.signal(signal);
                state.first = Some(signal);
                drop(state);
                if Self::end_after(this, PATIENCE, Ended::Signal(signal)).is_err() {
                    this.end(Ended::Signal(signal));
                }
            }
            _ => {
                let signal = state.first.unwrap_or(signal);
                drop(state);
                this.end(Ended::Signal(signal));
            }
        }
    }

    fn end_after(this: &Arc<Self>, time: Duration, ended: Ended) -> std::io::Result<()> {
        let this = this.clone();
        // It need not be stopped: the process ends when the run is over.
        std::thread::Builder::new()
            .name("timer".into())
            .spawn(move || {
                std::thread::sleep(time);
                this.end(ended);
            })?;
        Ok(())
    }

    fn end(&self, ended: Ended) {
        let mut state = self.lock();
        state.ended.get_or_insert(ended);
        if let Some(controller) = &state.controller {
            controller.cancel();
        }
        // Full means that it is readable already.
        let _ = rustix::io::write(&self.wake, b"!");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn readable(interrupts: &Interrupts) -> bool {
        rustix::io::read(interrupts.cancel(), &mut [0]).is_ok()
    }

    #[test]
    fn while_booting_the_first_signal_ends_the_run() {
        let interrupts = Interrupts::listen().unwrap();
        assert!(!readable(&interrupts));
        Shared::signal(&interrupts.shared, SIGTERM);
        assert!(readable(&interrupts));
        assert_eq!(interrupts.ended(), Some(Ended::Signal(SIGTERM)));
        assert_eq!(Ended::Signal(SIGTERM).code(), 143);
        assert_eq!(Ended::Signal(SIGINT).code(), 130);
    }

    #[test]
    fn the_first_reason_counts() {
        let interrupts = Interrupts::listen().unwrap();
        interrupts.shared.end(Ended::Timeout);
        Shared::signal(&interrupts.shared, SIGINT);
        assert_eq!(interrupts.ended(), Some(Ended::Timeout));
        assert_eq!(Ended::Timeout.code(), 124);
    }
}
