//! What the host's side does: programs that connect, streams that become ready, time that passes.

use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;

use super::MAX_CONNECTIONS;
use super::connection::{Connection, Phase, Ports};
use super::device::{Backlog, FIRST_HOST_PORT, Vsock};
use super::queues::{Queues, RX};
use super::streams::{Accepted, Seen, Step, Streams};
use crate::virtio::DeviceError;

/// Rounds of events looked at in one turn.
const TURN_EVENTS: usize = 16;
/// How long the guest may take to answer a REQUEST; generous, as guests may be emulated.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

impl Vsock {
    /// Takes all that happened on the host's side.
    pub(super) fn look(&mut self, queues: &mut Queues) -> Result<(), DeviceError> {
        if self.backlog != Backlog::Empty {
            self.accept();
        }
        for _ in 0..TURN_EVENTS {
            let seen = self.streams.wait();
            if seen.is_empty() {
                if self.backlog == Backlog::More {
                    queues.again(RX)?;
                }
                return Ok(());
            }
            for seen in seen {
                self.event(queues, seen)?;
            }
        }
        // More may wait, and the event loop is told of news only.
        queues.again(RX)
    }

    fn event(&mut self, queues: &mut Queues, seen: Seen) -> Result<(), DeviceError> {
        if Streams::is_listener(seen.token) {
            self.accept();
        } else if self.streams.is_timer(seen.token) {
            return self.ticked(queues, Instant::now());
        } else if self.streams.handshakes.contains_key(&seen.token) {
            self.handshake(seen.token);
            // The line and the end of the stream can come as one event.
            self.stream_event(seen);
        } else {
            self.stream_event(seen);
        }
        Ok(())
    }

    /// The timer ticked.
    fn ticked(&mut self, queues: &mut Queues, now: Instant) -> Result<(), DeviceError> {
        queues.notify_late()?;
        self.expire(now);
        Ok(())
    }

    /// What happened to a connection's stream.
    fn stream_event(&mut self, seen: Seen) {
        if let Some(connection) = self.connections.get_mut(&seen.token) {
            let gone = seen.flags.intersects(EventFlags::HUP | EventFlags::ERR);
            if gone && connection.phase == Phase::Asked {
                // Nobody waits for the answer.
                self.end(seen.token);
                return;
            }
            if gone || seen.flags.intersects(EventFlags::IN | EventFlags::RDHUP) {
                connection.readable = true;
            }
            if gone {
                connection.host_takes_no_more();
            }
            if gone || seen.flags.contains(EventFlags::OUT) {
                connection.flush();
            }
            self.settle(seen.token, Ok(()));
        }
    }

    fn accept(&mut self) {
        for _ in 0..MAX_CONNECTIONS {
            match self.streams.accept(self.room()) {
                Ok(Accepted::Handshake(token)) => self.handshake(token),
                Ok(Accepted::TurnedAway) => self.counters.refused += 1,
                Ok(Accepted::None) => {
                    self.backlog = Backlog::Empty;
                    return;
                }
                Err(error) => {
                    if self.backlog != Backlog::Failing {
                        tracing::warn!(%error, "vsock: host programs wait, trying again each second");
                    }
                    self.backlog = Backlog::Failing;
                    self.streams.tick(true);
                    return;
                }
            }
        }
        self.backlog = Backlog::More;
    }

    fn handshake(&mut self, token: u64) {
        match self.streams.step(token) {
            Step::Wait => {}
            Step::Drop => {
                self.streams.handshakes.remove(&token);
            }
            Step::Connect(port) => {
                let Some(handshake) = self.streams.handshakes.remove(&token) else {
                    return;
                };
                let ports = Ports {
                    host: self.free_host_port(port),
                    guest: port,
                };
                let deadline = Instant::now() + CONNECT_TIMEOUT;
                self.streams.tick(true);
                self.add(token, Connection::asked(handshake.stream, ports, deadline));
            }
        }
    }

    /// A port of the host that no connection to `guest` has. There are more ports than connections.
    fn free_host_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_host_port;
            self.next_host_port = host.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            if !self.by_ports.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }

    /// Ends what is late at `now`; stops the timer when nothing can be late any more.
    fn expire(&mut self, now: Instant) {
        self.streams
            .handshakes
            .retain(|_, handshake| handshake.deadline > now);
        let late: Vec<u64> = self
            .connections
            .iter()
            .filter(|(_, connection)| connection.deadline.is_some_and(|deadline| deadline <= now))
            .map(|(token, _)| *token)
            .collect();
        for token in late {
            self.end(token);
        }
        let ticks = self.backlog == Backlog::Failing
            || !self.streams.handshakes.is_empty()
            || self.connections.values().any(|c| c.deadline.is_some());
        self.streams.tick(ticks);
    }

    /// As if the timer ticked after `time`.
    #[cfg(test)]
    pub(super) fn pass_time(&mut self, time: Duration) {
        let now = Instant::now() + time;
        self.with_queues(|device, queues| device.ticked(queues, now))
            .unwrap();
    }

    #[cfg(test)]
    pub(super) fn is_ticking(&self) -> bool {
        self.streams.is_ticking()
    }
}
