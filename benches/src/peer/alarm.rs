//! The end of a peer that hangs while it is asked something: calls of its runtime have no deadline of their own.
//!
//! A thread looks seldom, so that it is in no measurement's way, and kills a process whose time is over; who waits for it
//! hears that it has gone. A hang is seen at the latest after one and a half times its time.

use std::os::fd::OwnedFd;
use std::process::Child;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::clock::monotonic_ns;

/// Nothing is waited for.
const IDLE: u64 = u64::MAX;
/// The machine is not watched any more.
const OVER: u64 = 0;

/// Watches one process until it is dropped.
#[derive(Debug)]
pub struct Alarm {
    patience: Duration,
    /// CLOCK_MONOTONIC in ns when its time is over, [`IDLE`] or [`OVER`].
    due_ns: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Alarm {
    /// For a process that may take so long for each thing.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn of(child: &Child, patience: Duration) -> Result<Self> {
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let pid = pid.context("the peer's process id")?;
        // It is our child and not reaped: the pid is its own.
        let process = pidfd_open(pid, PidfdFlags::empty()).context("watching a peer")?;
        let due_ns = Arc::new(AtomicU64::new(IDLE));
        let due = Arc::clone(&due_ns);
        let thread = std::thread::Builder::new()
            .name("alarm".into())
            .spawn(move || watch(&process, &due, patience / 2))
            .context("a thread that watches a peer")?;
        Ok(Self {
            patience,
            due_ns,
            thread: Some(thread),
        })
    }

    /// Its time begins now.
    pub fn set(&self) {
        let patience = u64::try_from(self.patience.as_nanos()).unwrap_or(IDLE / 2);
        let due = monotonic_ns().saturating_add(patience);
        self.due_ns.store(due, Ordering::Relaxed);
    }

    /// Nothing is asked of it.
    pub fn rest(&self) {
        self.due_ns.store(IDLE, Ordering::Relaxed);
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        self.due_ns.store(OVER, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It cannot panic, and a destructor has nobody to tell.
            let _ = thread.join();
        }
    }
}

fn watch(process: &OwnedFd, due_ns: &AtomicU64, look: Duration) {
    loop {
        let due = due_ns.load(Ordering::Relaxed);
        if due == OVER {
            return;
        }
        if due < monotonic_ns() {
            // It has just ended: as good.
            let _ = pidfd_send_signal(process, Signal::KILL);
            return;
        }
        std::thread::park_timeout(look);
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::Instant;

    use super::*;

    #[test]
    fn who_is_asked_and_does_not_answer_is_ended_and_who_rests_is_not() {
        let sleeper = || Command::new("sleep").arg("1000").spawn().unwrap();
        let (mut asked, mut idle) = (sleeper(), sleeper());
        let patience = Duration::from_millis(100);
        let alarms = [&asked, &idle].map(|child| Alarm::of(child, patience).unwrap());
        alarms[0].set();
        alarms[1].set();
        alarms[1].rest();
        assert!(!asked.wait().unwrap().success());
        std::thread::sleep(3 * patience);
        assert_eq!(idle.try_wait().unwrap(), None);
        let from = Instant::now();
        drop(alarms);
        assert!(from.elapsed() < Duration::from_secs(60));
        idle.kill().unwrap();
        idle.wait().unwrap();
    }
}
