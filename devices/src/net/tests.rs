//! The network device's rules, with a datagram socket for a tap: it keeps frames apart and cuts
//! those that do not fit, as a tap does.

use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;

use super::*;
use crate::virtio::mmio::status;
use crate::virtio::testing::{MEMORY_LEN, MockDriver, Sent};

mod real_tap;
mod saving;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const HEADER: [u8; HEADER_BYTES] = [0; HEADER_BYTES];
const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;

struct Wire(UnixDatagram);

impl Backend for Wire {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A device that has not been probed, and the host's end of its wire.
fn device() -> (MockDriver, UnixDatagram) {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_nonblocking(true).unwrap();
    let net = Net::new(Box::new(Wire(theirs)), MAC);
    (MockDriver::new(net), ours)
}

fn driver(features: u64) -> (MockDriver, UnixDatagram) {
    let (mut driver, wire) = device();
    driver.probe(features);
    (driver, wire)
}

fn frame(byte: u8, len: usize) -> Vec<u8> {
    [&HEADER[..], &vec![byte; len]].concat()
}

fn counter(driver: &MockDriver, name: &str) -> u64 {
    let all = driver.transport.counters();
    all.iter().find(|(n, _)| *n == name).unwrap().1
}

fn bytes_of(driver: &MockDriver, sent: &Sent, len: usize) -> Vec<u8> {
    driver.read_memory(sent.writable[0], len)
}

/// Expects NEEDS_RESET for `reason` after a kick, and a device that works after a reset.
fn assert_needs_reset(mut driver: MockDriver, wire: &UnixDatagram, queue: usize, reason: &str) {
    wire.send(&frame(1, 60)).unwrap();
    driver.transport.host_event();
    driver.kick(queue);
    let failure = driver.transport.failure().map(ToString::to_string);
    assert_eq!(
        failure,
        Some(format!("the driver broke the virtio rules: {reason}"))
    );
    while wire.recv(&mut [0; 100]).is_ok() {}
    driver.probe(0);
    assert_eq!(driver.status() & status::DEVICE_NEEDS_RESET, 0);
    driver.send(TX, &[&frame(9, 60)], &[]);
    driver.kick(TX);
    assert_eq!(wire.recv(&mut [0; 100]).unwrap(), 72, "a reset revives");
}

#[test]
fn a_frame_from_the_guest_is_on_the_wire_whole() {
    let (mut driver, wire) = driver(0);
    driver.send(TX, &[&HEADER, b"a frame ", b"in pieces"], &[]);
    driver.kick(TX);
    let mut buffer = [0; 100];
    let len = wire.recv(&mut buffer).unwrap();
    assert_eq!(&buffer[HEADER_BYTES..len], b"a frame in pieces");
    assert_eq!(driver.used(TX)[0].len_bytes, 0);
    assert_eq!(driver.take_interrupt(), (Interrupt::USED_BUFFER, true));
    assert_eq!(counter(&driver, "tx_bytes"), 17);
}

#[test]
fn a_frame_for_the_guest_fills_one_chain() {
    let (mut driver, wire) = driver(0);
    let first = driver.send(RX, &[], &[12, 1518]);
    driver.send(RX, &[], &[1530]);
    driver.kick(RX);
    wire.send(&frame(0xab, 64)).unwrap();
    driver.transport.host_event();
    let used = driver.used(RX);
    assert_eq!(used.len(), 1);
    assert_eq!(used[0].len_bytes, 76);
    assert_eq!(bytes_of(&driver, &first, 12)[10..], [1, 0], "num_buffers");
    assert_eq!(driver.read_memory(first.writable[1], 64), [0xab; 64]);
    assert_eq!(driver.read_memory(first.writable[1] + 64, 1), [0]);
}

#[test]
fn a_frame_waits_for_the_driver_to_give_room() {
    let (mut driver, wire) = driver(0);
    wire.send(&frame(1, 64)).unwrap();
    driver.transport.host_event();
    driver.send(RX, &[], &[1530]);
    driver.kick(RX);
    assert_eq!(driver.used(RX).len(), 1);
}

#[test]
fn a_mergeable_frame_spans_chains_and_says_how_many() {
    let (mut driver, wire) = driver(MERGEABLE);
    let chains: Vec<Sent> = (0..8).map(|_| driver.send(RX, &[], &[512])).collect();
    driver.kick(RX);
    wire.send(&frame(0xcd, 1200)).unwrap();
    wire.send(&frame(0xef, 100)).unwrap();
    driver.transport.host_event();
    let used = driver.used(RX);
    let lens: Vec<u32> = used.iter().map(|used| used.len_bytes).collect();
    assert_eq!(lens, [512, 512, 188, 112]);
    assert_eq!(bytes_of(&driver, &chains[0], 12)[10..], [3, 0]);
    assert_eq!(bytes_of(&driver, &chains[2], 188), [0xcd; 188]);
    assert_eq!(bytes_of(&driver, &chains[3], 12)[10..], [1, 0]);
    assert_eq!(counter(&driver, "rx_frames"), 2);
}

#[test]
fn a_large_frame_waits_until_all_of_it_has_room() {
    let large = MERGEABLE | 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4;
    let (mut driver, wire) = driver(large);
    wire.send(&frame(5, 60_000)).unwrap();
    for _ in 0..8 {
        driver.send(RX, &[], &[4096]);
    }
    driver.kick(RX);
    driver.transport.host_event();
    assert_eq!(driver.used(RX), []);
    for _ in 0..9 {
        driver.send(RX, &[], &[4096]);
    }
    driver.kick(RX);
    let used = driver.used(RX);
    assert_eq!(used.len(), 15);
    assert_eq!(used.iter().map(|u| u.len_bytes).sum::<u32>(), 60_012);
    assert_eq!(counter(&driver, "rx_dropped"), 0);
}

#[test]
fn a_frame_larger_than_its_chain_is_dropped_not_cut() {
    let (mut driver, wire) = driver(0);
    driver.send(RX, &[], &[100]);
    driver.kick(RX);
    wire.send(&frame(1, 89)).unwrap();
    wire.send(&frame(2, 88)).unwrap();
    driver.transport.host_event();
    let used = driver.used(RX);
    assert_eq!(used.len(), 1);
    assert_eq!(used[0].len_bytes, 100);
    assert_eq!(counter(&driver, "rx_dropped"), 1);
}

#[test]
fn an_endless_flood_from_the_host_gives_others_their_turn() {
    /// Never runs dry; each frame is too large for its chain.
    struct Flood(std::fs::File);
    impl Backend for Flood {
        fn fd(&self) -> BorrowedFd<'_> {
            self.0.as_fd()
        }
    }
    let zero = std::fs::File::open("/dev/zero").unwrap();
    let mut driver = MockDriver::new(Net::new(Box::new(Flood(zero)), MAC));
    driver.probe(0);
    driver.send(RX, &[], &[1530]);
    driver.kick(RX);
    assert_eq!(counter(&driver, "rx_dropped"), u64::from(TURN_FRAMES));
    assert!(driver.run_kicks(), "the device wants to go on");
    assert_eq!(counter(&driver, "rx_dropped"), 2 * u64::from(TURN_FRAMES));
}

#[test]
fn the_mac_is_in_the_configuration_and_nothing_behind_it() {
    let (mut driver, _wire) = driver(0);
    assert_eq!(driver.read_config(0, 8), [2, 0, 0, 0, 0, 7, 0, 0]);
    assert_eq!(driver.read_config(0xf00 - 1, 1), [0]);
}

#[test]
fn segmentation_without_checksums_is_refused() {
    for feature in [VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_HOST_TSO6] {
        let (mut driver, _wire) = device();
        driver.probe(1 << feature);
        assert_eq!(
            driver.transport.failure().map(ToString::to_string),
            Some("the driver broke the virtio rules: segmentation without checksums".into())
        );
    }
}

#[test]
fn a_frame_too_large_to_send_is_dropped() {
    let (mut driver, wire) = driver(0);
    driver.send(TX, &[&frame(0, 65_551)], &[]);
    driver.kick(TX);
    assert_eq!(driver.used(TX).len(), 1);
    assert_eq!(counter(&driver, "tx_dropped"), 1);
    assert!(wire.recv(&mut [0; 100]).is_err());
}

#[test]
fn a_wire_without_a_host_drops_frames_and_lives() {
    let (mut driver, wire) = driver(0);
    drop(wire);
    driver.send(TX, &[&frame(0, 60)], &[]);
    driver.send(RX, &[], &[1530]);
    driver.kick(TX);
    driver.kick(RX);
    driver.transport.host_event();
    assert_eq!(counter(&driver, "tx_dropped"), 1);
    assert!(!driver.transport.needs_reset());
}

#[test]
fn a_used_event_in_the_future_holds_the_interrupt_back() {
    let (mut driver, _wire) = driver(1 << VIRTIO_RING_F_EVENT_IDX);
    let used_event = MockDriver::areas(TX)[1] + 4 + 2 * u64::from(driver.queue_size(TX));
    driver.write_memory(used_event, &1_u16.to_le_bytes());
    driver.send(TX, &[&frame(0, 60)], &[]);
    driver.kick(TX);
    assert_eq!(driver.take_interrupt(), (0, false));
    driver.send(TX, &[&frame(0, 60)], &[]);
    driver.kick(TX);
    assert_eq!(driver.take_interrupt(), (Interrupt::USED_BUFFER, true));
}

#[test]
fn the_no_interrupt_flag_holds_the_interrupt_back() {
    let (mut driver, _wire) = driver(0);
    driver.write_memory(MockDriver::areas(TX)[1], &1_u16.to_le_bytes());
    driver.send(TX, &[&frame(0, 60)], &[]);
    driver.kick(TX);
    assert_eq!(driver.take_interrupt(), (0, false));
}

#[test]
fn a_writable_buffer_to_send_needs_a_reset() {
    let (mut driver, wire) = driver(0);
    driver.send(TX, &[&HEADER], &[16]);
    assert_needs_reset(driver, &wire, TX, "writable buffer in the transmit queue");
}

#[test]
fn a_frame_shorter_than_its_header_needs_a_reset() {
    let (mut driver, wire) = driver(0);
    driver.send(TX, &[&HEADER[..11]], &[]);
    assert_needs_reset(driver, &wire, TX, "frame shorter than its header");
}

#[test]
fn a_readable_buffer_to_receive_needs_a_reset() {
    let (mut driver, wire) = driver(0);
    driver.send(RX, &[b"x"], &[1530]);
    assert_needs_reset(driver, &wire, RX, "readable buffer in the receive queue");
}

#[test]
fn a_receive_buffer_smaller_than_a_header_needs_a_reset() {
    let (mut driver, wire) = driver(MERGEABLE);
    driver.send(RX, &[], &[11]);
    assert_needs_reset(driver, &wire, RX, "receive buffer smaller than a header");
}

#[test]
fn an_empty_buffer_needs_a_reset() {
    let (mut driver, wire) = driver(0);
    driver.send(TX, &[&HEADER, b""], &[]);
    assert_needs_reset(driver, &wire, TX, "empty buffer in a chain");
}

#[test]
fn buffers_outside_memory_need_a_reset() {
    for (queue, writable) in [(RX, true), (TX, false)] {
        let (mut driver, wire) = driver(0);
        let head = driver.lay_chain(queue, &[(MEMORY_LEN - 16, 1530, writable)]);
        driver.offer(queue, head);
        assert_needs_reset(driver, &wire, queue, "buffer outside guest memory");
    }
}
