//! The entropy device's rules, through the transport.

use super::*;
use crate::virtio::mmio::status;
use crate::virtio::state::through_json;
use crate::virtio::testing::{MEMORY_LEN, MockDriver};

fn driver() -> MockDriver {
    let mut driver = MockDriver::new(Rng::new());
    driver.probe(u64::MAX);
    driver
}

fn assert_needs_reset(mut driver: MockDriver, reason: &str) {
    driver.kick(0);
    let failure = driver.transport.failure().map(ToString::to_string);
    assert_eq!(
        failure,
        Some(format!("the driver broke the virtio rules: {reason}"))
    );
    driver.probe(0);
    assert_eq!(driver.status() & status::DEVICE_NEEDS_RESET, 0);
    driver.send(0, &[], &[32]);
    driver.kick(0);
    assert_eq!(driver.used(0)[0].len_bytes, 32, "a reset revives");
}

#[test]
fn a_request_is_filled_and_differs_from_the_next() {
    let mut driver = driver();
    let one = driver.send(0, &[], &[600, 32]);
    let two = driver.send(0, &[], &[632]);
    driver.kick(0);
    let used = driver.used(0);
    assert_eq!(used.len(), 2);
    assert_eq!(used[0].len_bytes, 632);
    let first = driver.read_memory(one.writable[0], 600);
    let second = driver.read_memory(two.writable[0], 600);
    assert_ne!(first, second);
    // All zero with a chance of 2^-256.
    assert_ne!(driver.read_memory(one.writable[1], 32), [0; 32]);
    assert_eq!(driver.take_interrupt(), (Interrupt::USED_BUFFER, true));
}

#[test]
fn a_request_gets_no_more_than_the_cap() {
    let mut driver = driver();
    let sent = driver.send(0, &[], &[3 << 20]);
    driver.kick(0);
    assert_eq!(u64::from(driver.used(0)[0].len_bytes), MAX_REQUEST_BYTES);
    let beyond = driver.read_memory(sent.writable[0] + MAX_REQUEST_BYTES, 4096);
    assert_eq!(beyond, [0; 4096]);
}

#[test]
fn a_full_queue_is_served_at_one_kick() {
    let mut driver = driver();
    for _ in 0..QUEUE_SIZE {
        driver.send(0, &[], &[8]);
    }
    driver.kick(0);
    assert_eq!(driver.used(0).len(), usize::from(QUEUE_SIZE));
    let counters = driver.transport.counters();
    assert!(counters.contains(&("requests", 64)), "{counters:?}");
    assert!(counters.contains(&("bytes", 512)), "{counters:?}");
}

#[test]
fn a_readable_buffer_needs_a_reset() {
    let mut driver = driver();
    driver.send(0, &[b"x"], &[8]);
    assert_needs_reset(driver, "readable buffer in an entropy request");
}

#[test]
fn an_empty_buffer_needs_a_reset() {
    let mut driver = driver();
    driver.send(0, &[], &[0]);
    assert_needs_reset(driver, "empty buffer in a chain");
}

#[test]
fn a_buffer_outside_memory_needs_a_reset() {
    let mut driver = driver();
    let head = driver.lay_chain(0, &[(MEMORY_LEN - 8, 16, true)]);
    driver.offer(0, head);
    assert_needs_reset(driver, "buffer outside guest memory");
}

#[test]
fn a_saved_device_serves_the_request_that_waits() {
    let mut driver = driver();
    for _ in 0..3 {
        driver.send(0, &[], &[8]);
    }
    driver.kick(0);
    assert_eq!(driver.used(0).len(), 3);
    driver.take_interrupt();
    let sent = driver.send(0, &[], &[32]);
    let state = through_json(&driver.transport.save());
    driver.restore(Rng::new(), &state).unwrap();
    assert_eq!(driver.transport.save(), state);
    driver.run_kicks();
    assert_eq!(driver.used(0)[0].len_bytes, 32);
    assert_ne!(driver.read_memory(sent.writable[0], 32), [0; 32]);
}

#[test]
fn two_children_do_not_get_the_same_bytes() {
    let bytes = [(); 2].map(|()| {
        let mut driver = driver();
        let sent = driver.send(0, &[], &[32]);
        let state = driver.transport.save();
        driver.restore(Rng::new(), &state).unwrap();
        driver.run_kicks();
        driver.read_memory(sent.writable[0], 32)
    });
    assert_ne!(bytes[0], bytes[1]);
}
