//! The order to end now, and waiting that hears it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use crate::clock::{self, Moment};

/// Once set it stays so, and its descriptor readable.
#[derive(Debug)]
pub struct Stop {
    set: AtomicBool,
    fd: OwnedFd,
}

/// How a wait ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waited {
    /// The descriptor at this place is ready.
    Ready(usize),
    /// The time is over.
    Over,
    /// It is to end now.
    Stopped,
}

impl Stop {
    /// Not set.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            set: AtomicBool::new(false),
            fd: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// Sets it.
    pub fn set(&self) {
        self.set.store(true, Ordering::SeqCst);
        // It can only fail when it is readable already.
        let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
    }

    /// Whether it is set.
    pub fn is_set(&self) -> bool {
        self.set.load(Ordering::SeqCst)
    }
}

/// Waits until one of the descriptors is ready for what is said with it, the moment comes, or `stop` is set.
pub fn wait(
    on: &[(BorrowedFd<'_>, PollFlags)],
    until: Option<Moment>,
    stop: &Stop,
) -> io::Result<Waited> {
    let mut fds = vec![PollFd::from_borrowed_fd(stop.fd.as_fd(), PollFlags::IN)];
    fds.extend(
        on.iter()
            .map(|(fd, flags)| PollFd::from_borrowed_fd(*fd, *flags)),
    );
    loop {
        let left = until.map(|until| until.saturating_sub(clock::now()));
        let time = left.map(timespec);
        match poll(&mut fds, time.as_ref()) {
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
            Ok(_) => {}
        }
        if !fds[0].revents().is_empty() {
            return Ok(Waited::Stopped);
        }
        if let Some(at) = fds[1..].iter().position(|fd| !fd.revents().is_empty()) {
            return Ok(Waited::Ready(at));
        }
        if until.is_some_and(|until| clock::now() >= until) {
            return Ok(Waited::Over);
        }
    }
}

/// Sleeps; says whether it was to the end.
pub fn sleep(time: Duration, stop: &Stop) -> bool {
    matches!(wait(&[], Some(clock::now() + time), stop), Ok(Waited::Over))
}

fn timespec(time: Duration) -> Timespec {
    Timespec {
        // An hour at a time is long enough: the caller looks at the clock again.
        tv_sec: time.as_secs().min(3600) as i64,
        tv_nsec: i64::from(time.subsec_nanos()),
    }
}
