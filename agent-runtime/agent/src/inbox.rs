//! Orders, read from standard input by a thread of their own.
//!
//! `Cancel` and `Echo` take effect where they are read; all others wait for the next turn boundary. The end of
//! standard input is not an order: the host may be gone, and the run goes on.

use std::collections::VecDeque;
use std::io::{self, BufRead, Read};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ratoon_protocol::{AgentEvent, Order};

use crate::events::Events;
use crate::stop::Stop;

/// The longest line; a task has a prompt.
pub const MAX_LINE_BYTES: u64 = 16 << 20;
/// How many orders may wait.
const MAX_ORDERS: usize = 1024;

/// Orders that wait.
#[derive(Debug)]
pub struct Inbox {
    waiting: Mutex<Waiting>,
    changed: Condvar,
    stop: Arc<Stop>,
}

#[derive(Debug, Default)]
struct Waiting {
    orders: VecDeque<Order>,
    ended: bool,
    /// The boundary at which the loop waits to be kept.
    boundary: Option<u32>,
}

impl Inbox {
    /// Reads `from` until its end.
    pub fn start(
        from: impl BufRead + Send + 'static,
        stop: Arc<Stop>,
        events: Events,
    ) -> io::Result<Arc<Self>> {
        let inbox = Arc::new(Self {
            waiting: Mutex::default(),
            changed: Condvar::new(),
            stop,
        });
        let theirs = inbox.clone();
        std::thread::Builder::new()
            .name("orders".into())
            .spawn(move || theirs.read(from, &events))?;
        Ok(inbox)
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self, mut from: impl BufRead, events: &Events) {
        loop {
            let line = match read_line(&mut from) {
                Ok(Some(line)) => line,
                Ok(None) => break,
                Err(error) => {
                    events.notice(format!("no order can be read any more: {error}"));
                    break;
                }
            };
            if line.trim_ascii().is_empty() {
                continue;
            }
            match serde_json::from_slice::<Order>(&line) {
                Ok(Order::Cancel) => {
                    self.stop.set();
                    self.changed.notify_all();
                }
                Ok(Order::Echo { nonce }) => {
                    let boundary = self.lock().boundary;
                    events.say(&AgentEvent::Echo { nonce, boundary });
                }
                Ok(order) => {
                    let mut waiting = self.lock();
                    if waiting.orders.len() < MAX_ORDERS {
                        waiting.orders.push_back(order);
                    }
                    drop(waiting);
                    self.changed.notify_all();
                }
                Err(error) => events.notice(format!("a line is no order and is ignored: {error}")),
            }
        }
        self.lock().ended = true;
        self.changed.notify_all();
    }

    /// The loop waits at this boundary to be kept, or no more.
    pub fn at(&self, boundary: Option<u32>) {
        self.lock().boundary = boundary;
    }

    /// The next order, if one waits.
    pub fn take(&self) -> Option<Order> {
        self.lock().orders.pop_front()
    }

    /// Waits for the next order; none when it is to end now, or when no order can come any more.
    pub fn next(&self) -> Option<Order> {
        let mut waiting = self.lock();
        loop {
            if self.stop.is_set() {
                return None;
            }
            if let Some(order) = waiting.orders.pop_front() {
                return Some(order);
            }
            if waiting.ended {
                return None;
            }
            // A machine that is held may stand for days: nothing wakes up but for orders.
            waiting = self
                .changed
                .wait_timeout(waiting, Duration::from_secs(3600))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

/// A line, without more than [`MAX_LINE_BYTES`] in memory; none at the end.
pub fn read_line(from: &mut impl BufRead) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    let read = from.take(MAX_LINE_BYTES).read_until(b'\n', &mut line)?;
    if read as u64 == MAX_LINE_BYTES && line.last() != Some(&b'\n') {
        return Err(io::Error::other("a line is too long"));
    }
    Ok((read > 0).then_some(line))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inbox(text: &'static str) -> (Arc<Inbox>, Arc<Stop>) {
        let stop = Arc::new(Stop::new().expect("an eventfd"));
        let (_, write) = rustix::pipe::pipe().expect("a pipe");
        let events = Events::to(write, stop.clone()).expect("events");
        let inbox = Inbox::start(text.as_bytes(), stop.clone(), events).expect("a thread");
        (inbox, stop)
    }

    #[test]
    fn lines_that_are_no_orders_are_passed_over() {
        let (inbox, _) = inbox("nonsense\n\n{\"order\":\"hold\"}\n{\"order\":\"fly\"}\n");
        assert_eq!(inbox.next(), Some(Order::Hold { nonce: None }));
        assert_eq!(inbox.next(), None, "nothing can come any more");
    }

    #[test]
    fn a_cancel_overtakes_what_waits() {
        let (inbox, stop) = inbox("{\"order\":\"hold\"}\n{\"order\":\"cancel\"}\n");
        while !stop.is_set() {
            std::thread::yield_now();
        }
        assert_eq!(inbox.next(), None);
    }
}
