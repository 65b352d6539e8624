//! Nobody stands still while there is something to do: lost wake-ups, buffers that come late,
//! timers.

use std::sync::{Arc, Mutex};

use super::guest::{CID, EVENT, RX, RX_BUFFER};
use super::*;
use crate::virtio::state::{DeviceState, RestoreError, Saved};
use crate::virtio::testing::MockDriver;
use crate::virtio::{Activation, Device, DeviceError};
use crate::vsock::Vsock;

#[test]
fn data_that_found_no_buffer_goes_out_when_one_comes() {
    let mut guest = Guest::new();
    guest.refills = false;
    guest.probe();
    // One for the REQUEST.
    guest.refill(1);
    let (host, _) = opened(&mut guest, 1024);
    let data = pattern(1 << 20);
    let sent = write_some(&host, &data);
    guest.expect_nothing();
    // Nothing but new buffers happens from here on.
    let mut got = Vec::new();
    while got.len() < sent {
        guest.refill(1);
        got.extend(guest.expect(Op::Data).data);
    }
    assert_eq!(got, data[..got.len()]);
}

#[test]
fn a_request_that_found_no_buffer_goes_out_when_one_comes() {
    let mut guest = Guest::new();
    guest.refills = false;
    guest.probe();
    let _host = ask(&guest, 1024);
    guest.settle();
    assert!(guest.inbox.is_empty());
    guest.refill(1);
    guest.expect(Op::Request);
}

#[test]
fn resets_without_buffers_stop_the_guests_packets_and_buffers_let_them_go_on() {
    let mut guest = Guest::new();
    guest.refills = false;
    guest.probe();
    let mut asked = 0;
    // Far more refusals than the device keeps.
    while asked < 2000 && guest.may_queue() {
        guest.send(header(Op::Request, asked, 52), &[], &[]);
        guest.settle();
        asked += 1;
    }
    assert!(asked < 2000, "resets are kept without bound");
    let mut resets = 0;
    for _ in 0..asked {
        guest.refill(1);
        guest.settle();
        resets += guest.inbox.drain(..).count() as u32;
    }
    assert_eq!(resets, asked);
    assert_eq!(guest.sent_chains, guest.done_chains);
}

#[test]
fn packets_of_the_guest_are_one_kick_and_no_interrupt_until_there_are_many() {
    let mut guest = Guest::new();
    let host = accepted(&mut guest, 5000, 52);
    let (kicks, interrupts) = (guest.kicks, guest.interrupts);
    let told = |guest: &Guest| (guest.kicks - kicks, guest.interrupts - interrupts);
    for _ in 0..16 {
        guest.queue(data_header(5000, 52, 1000), &pattern(1000), &[]);
    }
    guest.flush();
    guest.settle();
    assert_eq!(read_some(&host).len(), 16_000);
    assert_eq!(told(&guest), (1, 0));
    // A packet for the guest tells it of all before.
    write_some(&host, b"x");
    guest.expect(Op::Data);
    assert_eq!(told(&guest), (1, 1));
    for _ in 0..3 {
        for _ in 0..16 {
            guest.queue(data_header(5000, 52, 1000), &pattern(1000), &[]);
        }
        guest.flush();
        guest.settle();
        read_some(&host);
    }
    assert_eq!(told(&guest), (4, 2));
}

#[test]
fn an_answer_to_packets_comes_with_the_interrupt_for_them() {
    let mut guest = Guest::new();
    let _host = accepted(&mut guest, 5000, 52);
    let interrupts = guest.interrupts;
    guest.send(header(Op::CreditRequest, 5000, 52), &[], &[]);
    guest.expect(Op::CreditUpdate);
    assert_eq!(guest.interrupts - interrupts, 1);
}

#[test]
fn a_guest_that_waits_for_its_send_buffer_gets_it_back() {
    let mut guest = Guest::new();
    let host = accepted(&mut guest, 5000, 52);
    let interrupts = guest.interrupts;
    // Half of Linux's send buffer is less than two of these.
    guest.send(data_header(5000, 52, 65_536), &pattern(65_536), &[]);
    guest.settle();
    assert_eq!(guest.interrupts - interrupts, 1);
    // Little that is left is told after a second, once.
    guest.send(data_header(5000, 52, 100), &pattern(100), &[]);
    guest.settle();
    assert_eq!(guest.interrupts - interrupts, 1);
    for _ in 0..2 {
        std::thread::sleep(std::time::Duration::from_millis(1100));
        guest.settle();
        assert_eq!(guest.interrupts - interrupts, 2);
    }
    read_some(&host);
}

#[test]
fn the_host_is_taken_in_turn() {
    let mut guest = Guest::new();
    let (first, first_port) = opened(&mut guest, 1024);
    let (second, second_port) = opened(&mut guest, 1024);
    write_some(&first, &pattern(100_000));
    write_some(&second, &pattern(100_000));
    guest.settle();
    let ports: Vec<u32> = guest.inbox.iter().map(|p| p.header.src_port).collect();
    let first_half = &ports[..ports.len() / 2];
    for port in [first_port, second_port] {
        let count = first_half.iter().filter(|p| **p == port).count();
        assert!(count.abs_diff(first_half.len() / 2) <= 1, "{ports:?}");
    }
}

#[test]
fn whole_buffers_are_filled() {
    let mut guest = Guest::new();
    let (host, _) = opened(&mut guest, 1024);
    write_some(&host, &pattern(10 * RX_BUFFER as usize));
    let packet = guest.expect(Op::Data);
    assert_eq!(
        packet.data.len() + guest::WHOLE_HEADER,
        RX_BUFFER as usize,
        "a packet of data"
    );
}

/// A device that the test can also call by name.
pub(super) struct Shared(pub(super) Arc<Mutex<Vsock>>);

impl Device for Shared {
    fn device_type(&self) -> u32 {
        self.0.lock().unwrap().device_type()
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[64; 3]
    }
    fn features(&self) -> u64 {
        self.0.lock().unwrap().features()
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.0.lock().unwrap().read_config(offset, data);
    }
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.0.lock().unwrap().activate(activation)
    }
    fn reset(&mut self) {
        self.0.lock().unwrap().reset();
    }
    fn process_queue(&mut self, index: usize) -> Result<(), DeviceError> {
        self.0.lock().unwrap().process_queue(index)
    }
    fn process_host(&mut self) -> Result<(), DeviceError> {
        self.0.lock().unwrap().process_host()
    }
    fn save(&self) -> Saved {
        self.0.lock().unwrap().save()
    }
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        self.0.lock().unwrap().restore(state)
    }
}

pub(super) fn shared() -> (Arc<Mutex<Vsock>>, MockDriver, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let device = Vsock::new(CID, &dir.path().join("v")).unwrap();
    let device = Arc::new(Mutex::new(device));
    let mut driver = MockDriver::new(Shared(Arc::clone(&device)));
    driver.probe(0);
    (device, driver, dir)
}

#[test]
fn the_driver_learns_of_a_lost_transport_even_when_its_buffer_comes_late() {
    let (device, mut driver, _dir) = shared();
    device.lock().unwrap().transport_reset().unwrap();
    assert_eq!(driver.used(EVENT), []);
    let sent = driver.send(EVENT, &[], &[4]);
    driver.write_memory(sent.writable[0], &[0xff; 4]);
    driver.kick(EVENT);
    assert_eq!(driver.used(EVENT)[0].len_bytes, 4);
    assert_eq!(driver.read_memory(sent.writable[0], 4), [0; 4]);
    // Once is enough.
    driver.send(EVENT, &[], &[4]);
    driver.kick(EVENT);
    assert_eq!(driver.used(EVENT), []);
}

#[test]
fn packets_that_waited_for_room_go_on_after_a_lost_transport() {
    let (device, mut driver, _dir) = shared();
    for port in 0..400 {
        driver.send(1, &[&header(Op::Request, port, 52).encode()], &[]);
        driver.kick(1);
        driver.run_kicks();
        driver.used(1);
        if driver.used(1).is_empty() && port >= 256 {
            break;
        }
    }
    device.lock().unwrap().transport_reset().unwrap();
    driver.used(1);
    while driver.run_kicks() {}
    assert!(!driver.used(1).is_empty(), "packets stay in their queue");
    driver.send(RX, &[], &[4096]);
    driver.kick(RX);
    assert_eq!(driver.used(RX).len(), 1);
}

#[test]
fn the_timer_runs_while_something_may_be_late_and_only_then() {
    let (device, mut driver, dir) = shared();
    assert!(!device.lock().unwrap().is_ticking());
    let host = UnixStream::connect(dir.path().join("v")).unwrap();
    host.set_nonblocking(true).unwrap();
    driver.transport.host_event();
    assert!(device.lock().unwrap().is_ticking(), "a silent program");
    (&host).write_all(b"CONNECT 5\n").unwrap();
    driver.send(RX, &[], &[4096]);
    driver.transport.host_event();
    let request = driver.used(RX);
    assert_eq!(request.len(), 1);
    assert!(device.lock().unwrap().is_ticking(), "an unanswered request");
    driver.send(1, &[&header(Op::Response, 5, 1 << 30).encode()], &[]);
    driver.kick(1);
    device.lock().unwrap().pass_time(std::time::Duration::ZERO);
    assert!(!device.lock().unwrap().is_ticking(), "an open connection");
    assert!(read_some(&host).starts_with(b"OK "));
    drop(host);
    // The close goes out long after the stream's end was seen: only then a buffer comes.
    driver.transport.host_event();
    for _ in 0..3 {
        driver.send(RX, &[], &[4096]);
    }
    driver.kick(RX);
    assert!(device.lock().unwrap().is_ticking(), "an unfinished close");
    device
        .lock()
        .unwrap()
        .pass_time(std::time::Duration::from_secs(3600));
    assert!(!device.lock().unwrap().is_ticking());
    assert!(
        device.lock().unwrap().counters().contains(&("open", 0)),
        "the guest did not finish in time"
    );
}

#[test]
fn a_guest_that_does_not_answer_gives_the_program_its_stream_back_closed() {
    let (device, mut driver, dir) = shared();
    let host = UnixStream::connect(dir.path().join("v")).unwrap();
    (&host).write_all(b"CONNECT 5\n").unwrap();
    driver.send(RX, &[], &[4096]);
    driver.send(RX, &[], &[4096]);
    driver.transport.host_event();
    device
        .lock()
        .unwrap()
        .pass_time(std::time::Duration::from_secs(3600));
    assert!(ended(&host));
    driver.used(RX);
    driver.kick(RX);
    // The guest is told, since it had been asked.
    assert_eq!(driver.used(RX).len(), 1);
}
