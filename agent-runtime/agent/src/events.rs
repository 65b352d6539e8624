//! What happens, line by line on standard output.
//!
//! A thread writes, so that a host that does not read stops nothing until [`MAX_WAITING_BYTES`] wait; then the
//! loop waits too, and nothing is lost. When nobody can read any more (EPIPE) events are dropped and the run
//! goes on. Events of one run that a host has read up to `Held` leave nothing here: a fork's children say nothing twice.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ratoon_protocol::AgentEvent;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::stop::Stop;

/// How much may wait to be read.
const MAX_WAITING_BYTES: usize = 16 << 20;

/// The way out.
#[derive(Debug, Clone)]
pub struct Events {
    shared: Arc<Shared>,
    stop: Arc<Stop>,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    lines: VecDeque<Vec<u8>>,
    waiting_bytes: usize,
    writing: bool,
    broken: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Events {
    /// Writes to `out` from now on.
    pub fn to(out: OwnedFd, stop: Arc<Stop>) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let theirs = shared.clone();
        std::thread::Builder::new()
            .name("events".into())
            .spawn(move || write(&theirs, &out))?;
        Ok(Self { shared, stop })
    }

    /// Says something.
    pub fn say(&self, event: &AgentEvent) {
        let Ok(mut line) = serde_json::to_vec(event) else {
            return;
        };
        line.push(b'\n');
        let mut queue = self.shared.lock();
        while queue.waiting_bytes > MAX_WAITING_BYTES && !queue.broken && !self.stop.is_set() {
            queue = self
                .shared
                .changed
                .wait_timeout(queue, Duration::from_millis(200))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        if queue.broken {
            return;
        }
        queue.waiting_bytes += line.len();
        queue.lines.push_back(line);
        drop(queue);
        self.shared.changed.notify_all();
    }

    /// Says something in words.
    pub fn notice(&self, text: impl Into<String>) {
        self.say(&AgentEvent::Notice { text: text.into() });
    }

    /// Waits until all is written, or nobody can read it.
    pub fn flush(&self) {
        let mut queue = self.shared.lock();
        while (!queue.lines.is_empty() || queue.writing) && !queue.broken {
            queue = self
                .shared
                .changed
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn write(shared: &Shared, out: &OwnedFd) {
    loop {
        let mut queue = shared.lock();
        queue.writing = false;
        shared.changed.notify_all();
        let line = loop {
            if let Some(line) = queue.lines.pop_front() {
                break line;
            }
            queue = shared
                .changed
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        };
        queue.writing = true;
        queue.waiting_bytes -= line.len();
        drop(queue);
        if write_all(out, &line).is_err() {
            let mut queue = shared.lock();
            queue.broken = true;
            queue.lines.clear();
            shared.changed.notify_all();
            return;
        }
    }
}

fn write_all(out: &OwnedFd, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::write(out, bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let mut fds = [PollFd::from_borrowed_fd(out.as_fd(), PollFlags::OUT)];
                poll(&mut fds, None)?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pipe() -> (OwnedFd, OwnedFd) {
        rustix::pipe::pipe().expect("a pipe")
    }

    #[test]
    fn a_reader_that_is_slow_loses_nothing() {
        let (read, write) = pipe();
        let events = Events::to(write, Arc::new(Stop::new().expect("an eventfd"))).expect("events");
        let text = "x".repeat(100_000);
        for number in 0..20 {
            events.notice(format!("{number} {text}"));
        }
        let reader = std::thread::spawn(move || {
            let lines = io::BufRead::lines(io::BufReader::new(std::fs::File::from(read)));
            lines
                .take(20)
                .map(|line| line.expect("UTF-8"))
                .collect::<Vec<_>>()
        });
        events.flush();
        let lines = reader.join().expect("a thread");
        for (number, line) in lines.iter().enumerate() {
            assert!(line.contains(&format!("\"{number} xxx")) && line.len() > 100_000);
        }
    }

    #[test]
    fn nobody_who_reads_is_no_failure() {
        let (read, write) = pipe();
        drop(read);
        let events = Events::to(write, Arc::new(Stop::new().expect("an eventfd"))).expect("events");
        for _ in 0..1000 {
            events.notice("x".repeat(1000));
        }
        events.flush();
    }
}
