//! What ^C does to a command that is attached to agents.
//!
//! ```text
//!   before they run: any signal ends the wait (the cancel descriptor becomes readable)
//!   then: the first SIGINT, SIGTERM or SIGQUIT tells them to end; a second one, or 30 s without an end, ends
//!         their machines. SIGHUP (the terminal is gone) leaves them alone.
//! ```

use std::io::{self, PipeReader, PipeWriter, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ratoon_client::blocking::Controller;
use ratoon_protocol::Order;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;

use super::session::Orders;

/// How long agents may take to end when they are told to.
const PATIENCE: Duration = Duration::from_secs(30);

/// What is to be done about signals.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stopped {
    /// Machines are to be ended.
    Kill(i32),
    /// They are left as they are.
    Leave(i32),
}

impl Stopped {
    /// The exit code that says so.
    pub fn code(self) -> u8 {
        let (Self::Kill(signal) | Self::Leave(signal)) = self;
        128u8.wrapping_add(signal as u8)
    }
}

/// Listens to signals from its making on.
#[derive(Debug)]
pub struct Stop {
    shared: Arc<Shared>,
    cancel: PipeReader,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    wake: PipeWriter,
}

#[derive(Debug, Default)]
struct State {
    agents: Vec<(Orders, Controller)>,
    first: Option<i32>,
    stopped: Option<Stopped>,
}

impl Stop {
    /// Starts to listen.
    pub fn listen() -> io::Result<Self> {
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGQUIT, SIGHUP])?;
        let (cancel, wake) = io::pipe()?;
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            wake,
        });
        let heard = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                for signal in signals.forever() {
                    Shared::signal(&heard, signal);
                }
            })?;
        Ok(Self { shared, cancel })
    }

    /// Readable once the command is to end.
    pub fn cancel(&self) -> BorrowedFd<'_> {
        self.cancel.as_fd()
    }

    /// From now on this agent hears of signals.
    pub fn agent(&self, orders: Orders, controller: Controller) {
        let mut state = self.shared.lock();
        if state.stopped.is_some() {
            controller.cancel();
        } else if state.first.is_some() {
            let _ = orders.say(&Order::Cancel);
        }
        state.agents.push((orders, controller));
    }

    /// Agents that are to be told are other ones from now on.
    pub fn forget_agents(&self) {
        self.shared.lock().agents.clear();
    }

    /// Whether a signal ends the command.
    pub fn stopped(&self) -> Option<Stopped> {
        self.shared.lock().stopped
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn signal(this: &Arc<Self>, signal: i32) {
        let mut state = this.lock();
        if signal == SIGHUP {
            return this.end(state, Stopped::Leave(signal));
        }
        if state.first.is_some() || state.agents.is_empty() {
            let first = state.first.unwrap_or(signal);
            return this.end(state, Stopped::Kill(first));
        }
        state.first = Some(signal);
        for (orders, _) in &state.agents {
            // One that has gone needs not be told.
            let _ = orders.say(&Order::Cancel);
        }
        drop(state);
        let _ = writeln!(io::stderr(), "cancelling; a second ^C ends the machine");
        let later = Arc::clone(this);
        let timer = std::thread::Builder::new().name("timer".into());
        // It need not be stopped: the process ends when all is over.
        let _ = timer.spawn(move || {
            std::thread::sleep(PATIENCE);
            later.end(later.lock(), Stopped::Kill(signal));
        });
    }

    fn end(&self, mut state: MutexGuard<'_, State>, stopped: Stopped) {
        if state.stopped.is_some() {
            return;
        }
        state.stopped = Some(stopped);
        for (_, controller) in &state.agents {
            controller.cancel();
        }
        let _ = (&self.wake).write_all(b"!");
    }
}
