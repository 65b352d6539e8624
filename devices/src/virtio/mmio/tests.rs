//! The transport's rules, with [`Echo`] behind it.

use std::sync::{Arc, Mutex};

use vm_memory::GuestAddress;

use super::super::testing::{Call, Descriptor, Echo, MEMORY_LEN, MockDriver, NEXT, WRITE};
use super::*;

const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;

fn driver() -> (MockDriver, Arc<Mutex<Vec<Call>>>) {
    let device = Echo::default();
    let calls = device.calls();
    (MockDriver::new(device), calls)
}

fn take(calls: &Mutex<Vec<Call>>) -> Vec<Call> {
    std::mem::take(&mut *calls.lock().unwrap())
}

fn failure(driver: &MockDriver) -> String {
    let error = driver.transport.failure().expect("needs reset");
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

fn counter(driver: &MockDriver, name: &str) -> u64 {
    let all = driver.transport.counters();
    all.iter().find(|(n, _)| *n == name).unwrap().1
}

/// The driver was told, the device is silent, and a reset gives a working device.
fn assert_reset_revives(driver: &mut MockDriver, calls: &Mutex<Vec<Call>>) {
    assert_eq!(
        driver.status() & status::DEVICE_NEEDS_RESET,
        status::DEVICE_NEEDS_RESET
    );
    let (causes, raised) = driver.take_interrupt();
    assert_eq!(
        (causes & Interrupt::CONFIG_CHANGE, raised),
        (Interrupt::CONFIG_CHANGE, true)
    );
    take(calls);
    driver.kick(0);
    driver.transport.host_event();
    assert_eq!(take(calls), []);

    driver.probe(0);
    assert_eq!(driver.status(), RUNNING);
    let sent = driver.send(0, &[b"again"], &[5]);
    driver.kick(0);
    assert_eq!(driver.read_memory(sent.writable[0], 5), b"again");
}

/// Probes, lets `spoil` do its worst, kicks, and expects NEEDS_RESET for `reason`.
fn kick_needs_reset(spoil: impl FnOnce(&mut MockDriver), reason: &str) {
    let (mut driver, calls) = driver();
    driver.probe(0);
    spoil(&mut driver);
    driver.kick(0);
    assert_eq!(failure(&driver), reason);
    assert_reset_revives(&mut driver, &calls);
}

#[test]
fn a_probe_as_linux_does_it_ends_running_and_echoes() {
    let (mut driver, calls) = driver();
    assert_eq!(driver.read32(register::MAGIC_VALUE), 0x7472_6976);
    assert_eq!(driver.read32(register::VERSION), 2);
    assert_eq!(driver.read32(register::DEVICE_ID), Echo::DEVICE_TYPE);
    driver.write32(register::QUEUE_SEL, 1);
    assert_eq!(driver.read32(register::QUEUE_NUM_MAX), 64);
    driver.write32(register::QUEUE_SEL, 2);
    assert_eq!(driver.read32(register::QUEUE_NUM_MAX), 0);

    assert_eq!(driver.probe(0), VERSION_1);
    assert_eq!(driver.status(), RUNNING);
    assert_eq!(take(&calls), [Call::Activate(VERSION_1), Call::Host]);

    let sent = driver.send(1, &[b"hel", b"lo"], &[2, 8]);
    driver.kick(1);
    assert_eq!(driver.used(1)[0].len_bytes, 5);
    assert_eq!(driver.read_memory(sent.writable[0], 2), b"he");
    assert_eq!(driver.read_memory(sent.writable[1], 4), b"llo\0");
    assert_eq!(driver.take_interrupt(), (Interrupt::USED_BUFFER, true));
    assert_eq!(driver.read32(register::INTERRUPT_STATUS), 0);
}

#[test]
fn features_not_offered_are_refused() {
    let (mut driver, _) = driver();
    assert!(!driver.negotiate(VERSION_1 | 1));
    assert_eq!(driver.status(), DRIVER);
    assert_eq!(driver.transport.failure().map(ToString::to_string), None);
}

#[test]
fn features_without_version_1_are_refused() {
    let (mut driver, _) = driver();
    assert!(!driver.negotiate(1 << VIRTIO_RING_F_EVENT_IDX));
    assert_eq!(driver.status(), DRIVER);
}

#[test]
fn a_step_that_is_not_in_the_table_is_refused() {
    let (mut driver, calls) = driver();
    for before in [0, ACKNOWLEDGED, DRIVER, NEGOTIATED] {
        for value in 1..0x80_u32 {
            driver.reset();
            for (_, to) in TRANSITIONS.iter().filter(|(_, to)| *to <= before) {
                driver.write32(register::DRIVER_FEATURES_SEL, 1);
                driver.write32(register::DRIVER_FEATURES, 1);
                driver.write32(register::STATUS, *to);
            }
            assert_eq!(driver.status(), before);
            if !TRANSITIONS.contains(&(before, value)) {
                driver.write32(register::STATUS, value);
                assert_eq!(driver.status(), before, "{before} to {value}");
            }
        }
    }
    assert_eq!(take(&calls), []);
}

#[test]
fn failed_stops_the_device_until_reset() {
    let (mut driver, calls) = driver();
    driver.probe(0);
    driver.add_status(status::FAILED);
    assert_eq!(driver.status(), RUNNING | status::FAILED);
    take(&calls);
    driver.kick(0);
    assert_eq!(take(&calls), []);
    driver.reset();
    assert_eq!(driver.status(), 0);
    assert_eq!(take(&calls), [Call::Reset]);
}

#[test]
fn a_queue_register_is_writable_between_features_ok_and_ready_only() {
    let (mut driver, _) = driver();
    driver.reset();
    driver.write32(register::QUEUE_READY, 1);
    assert_eq!(driver.read32(register::QUEUE_READY), 0);
    assert!(driver.negotiate(VERSION_1));
    driver.set_up_queue(0);
    assert_eq!(driver.read32(register::QUEUE_READY), 1);
    let before = counter(&driver, "refused_writes");
    driver.write32(register::QUEUE_NUM, 3);
    assert_eq!(counter(&driver, "refused_writes"), before + 1);
    driver.write32(register::QUEUE_READY, 0);
    assert_eq!(driver.read32(register::QUEUE_READY), 0);
    // Not ready once more: now the size is taken, and is found wrong at DRIVER_OK.
    driver.write32(register::QUEUE_NUM, 3);
    driver.write32(register::QUEUE_READY, 1);
    driver.set_up_queue(1);
    driver.add_status(status::DRIVER_OK);
    assert_eq!(failure(&driver), "queue 0: invalid queue size");
}

#[test]
fn queues_or_features_written_after_driver_ok_need_a_reset() {
    for offset in [
        register::DRIVER_FEATURES,
        register::QUEUE_NUM,
        register::QUEUE_READY,
        register::QUEUE_DESC_LOW,
        register::QUEUE_DEVICE_HIGH,
    ] {
        let (mut driver, calls) = driver();
        driver.probe(0);
        driver.write32(offset, 0);
        assert_eq!(
            failure(&driver),
            "the driver broke the virtio rules: queues or features written after DRIVER_OK"
        );
        assert_reset_revives(&mut driver, &calls);
    }
}

#[test]
fn driver_ok_with_a_queue_not_ready_needs_a_reset() {
    let (mut driver, calls) = driver();
    driver.negotiate(VERSION_1);
    driver.set_up_queue(0);
    driver.add_status(status::DRIVER_OK);
    assert_eq!(
        failure(&driver),
        "the driver broke the virtio rules: DRIVER_OK with a queue not ready"
    );
    assert_eq!(take(&calls), [], "the device never saw it");
    assert_reset_revives(&mut driver, &calls);
}

#[test]
fn rings_outside_memory_need_a_reset() {
    for (offset, address) in [
        (register::QUEUE_DESC_LOW, MEMORY_LEN - 16),
        (register::QUEUE_DRIVER_LOW, MEMORY_LEN),
        (register::QUEUE_DEVICE_LOW, u64::MAX - 0xf),
    ] {
        let (mut driver, calls) = driver();
        driver.negotiate(VERSION_1);
        driver.set_up_queue(0);
        driver.set_up_queue(1);
        driver.write32(register::QUEUE_READY, 0);
        driver.write32(offset, address as u32);
        driver.write32(offset + 4, (address >> 32) as u32);
        driver.write32(register::QUEUE_READY, 1);
        driver.add_status(status::DRIVER_OK);
        assert_eq!(
            failure(&driver),
            "the driver broke the virtio rules: rings outside guest memory"
        );
        assert_reset_revives(&mut driver, &calls);
    }
}

#[test]
fn a_ring_out_of_alignment_needs_a_reset() {
    let (mut driver, calls) = driver();
    driver.negotiate(VERSION_1);
    driver.set_up_queue(0);
    driver.set_up_queue(1);
    driver.write32(register::QUEUE_READY, 0);
    driver.write32(register::QUEUE_DESC_LOW, 0x2_0008);
    driver.write32(register::QUEUE_READY, 1);
    driver.add_status(status::DRIVER_OK);
    assert_eq!(
        failure(&driver),
        "queue 1: virtio queue descriptor table breaks alignment constraints"
    );
    assert_reset_revives(&mut driver, &calls);
}

#[test]
fn a_chain_that_loops_needs_a_reset() {
    kick_needs_reset(
        |driver| {
            let address = driver.allocate(16);
            for (slot, next) in [(0, 1), (1, 0)] {
                let descriptor = Descriptor {
                    address,
                    len_bytes: 16,
                    flags: NEXT,
                    next,
                };
                driver.set_descriptor(0, slot, descriptor);
            }
            driver.offer(0, 0);
        },
        "the driver broke the virtio rules: chain that loops or leaves its descriptor table",
    );
}

#[test]
fn a_next_index_out_of_range_needs_a_reset() {
    kick_needs_reset(
        |driver| {
            let descriptor = Descriptor {
                address: driver.allocate(16),
                len_bytes: 16,
                flags: NEXT,
                next: 64,
            };
            driver.set_descriptor(0, 0, descriptor);
            driver.offer(0, 0);
        },
        "the driver broke the virtio rules: chain that loops or leaves its descriptor table",
    );
}

#[test]
fn a_head_out_of_range_needs_a_reset() {
    kick_needs_reset(
        |driver| driver.offer(0, 64),
        "the driver broke the virtio rules: chain that loops or leaves its descriptor table",
    );
}

#[test]
fn an_available_index_too_far_ahead_needs_a_reset() {
    kick_needs_reset(
        |driver| driver.set_available_index(0, 65),
        "queue 0: invalid available ring index (more descriptors to process than queue size)",
    );
}

#[test]
fn an_empty_buffer_needs_a_reset() {
    kick_needs_reset(
        |driver| {
            let address = driver.allocate(16);
            let head = driver.lay_chain(0, &[(address, 0, false)]);
            driver.offer(0, head);
        },
        "the driver broke the virtio rules: empty buffer in a chain",
    );
}

#[test]
fn a_buffer_outside_memory_needs_a_reset() {
    for (address, len_bytes) in [
        (MEMORY_LEN, 1),
        (MEMORY_LEN - 1, 2),
        (u64::MAX, 2),
        (0x20_0000, u32::MAX),
    ] {
        kick_needs_reset(
            |driver| {
                let head = driver.lay_chain(0, &[(address, len_bytes, true)]);
                driver.offer(0, head);
            },
            "the driver broke the virtio rules: buffer outside guest memory",
        );
    }
}

#[test]
fn lengths_that_overflow_in_sum_need_a_reset() {
    kick_needs_reset(
        |driver| {
            let address = driver.allocate(16);
            let buffers = [(address, 16, false), (address, u32::MAX, false)];
            let head = driver.lay_chain(0, &buffers);
            driver.offer(0, head);
        },
        "the driver broke the virtio rules: chain that loops or leaves its descriptor table",
    );
}

#[test]
fn a_readable_buffer_after_a_writable_one_needs_a_reset() {
    kick_needs_reset(
        |driver| {
            let address = driver.allocate(16);
            let head = driver.lay_chain(0, &[(address, 8, true), (address, 8, false)]);
            driver.offer(0, head);
        },
        "the driver broke the virtio rules: readable buffer after a writable one",
    );
}

#[test]
fn an_indirect_table_longer_than_the_queue_needs_a_reset() {
    kick_needs_reset(
        |driver| {
            let table = driver.allocate(16 * 65);
            let buffer = driver.allocate(16);
            for slot in 0..65_u16 {
                let at = table + 16 * u64::from(slot);
                driver.write_memory(at, &buffer.to_le_bytes());
                driver.write_memory(at + 8, &1_u32.to_le_bytes());
                let flags = if slot < 64 { NEXT } else { 0 };
                driver.write_memory(at + 12, &flags.to_le_bytes());
                driver.write_memory(at + 14, &(slot + 1).to_le_bytes());
            }
            const INDIRECT: u16 = 4;
            let descriptor = Descriptor {
                address: table,
                len_bytes: 16 * 65,
                flags: INDIRECT,
                next: 0,
            };
            driver.set_descriptor(0, 0, descriptor);
            driver.offer(0, 0);
        },
        "the driver broke the virtio rules: chain longer than its queue",
    );
}

#[test]
fn kicks_before_driver_ok_are_kept_for_it() {
    let (mut driver, calls) = driver();
    driver.negotiate(VERSION_1);
    driver.set_up_queue(0);
    driver.set_up_queue(1);
    driver.send(1, &[b"early"], &[5]);
    driver.transport.kick(1);
    assert_eq!(take(&calls), []);
    driver.add_status(status::DRIVER_OK);
    assert_eq!(
        take(&calls),
        [Call::Activate(VERSION_1), Call::Host, Call::Queue(1)]
    );
    assert_eq!(driver.used(1).len(), 1);
}

#[test]
fn a_reset_drops_kicks_interrupts_and_selectors() {
    let (mut driver, calls) = driver();
    driver.probe(0);
    driver.send(0, &[b"x"], &[1]);
    driver.kick(0);
    driver.reset();
    assert_eq!(driver.read32(register::INTERRUPT_STATUS), 0);
    assert_eq!(driver.read32(register::QUEUE_READY), 0);
    take(&calls);
    driver.kick(0);
    driver.reset();
    driver.probe(0);
    assert_eq!(take(&calls), [Call::Activate(VERSION_1), Call::Host]);
}

#[test]
fn a_kick_of_no_queue_is_counted_and_dropped() {
    let (mut driver, _) = driver();
    driver.probe(0);
    let before = counter(&driver, "refused_writes");
    driver.write32(register::QUEUE_NOTIFY, 2);
    driver.write32(register::QUEUE_NOTIFY, u32::MAX);
    assert_eq!(counter(&driver, "refused_writes"), before + 2);
    assert_eq!(driver.status(), RUNNING);
}

#[test]
fn configuration_space_takes_any_width_and_stays_in_bounds() {
    let (mut driver, _) = driver();
    driver.probe(0);
    driver
        .transport
        .write(register::CONFIG, &0x1122_3344_5566_7788_u64.to_le_bytes());
    driver.transport.write(register::CONFIG + 1, &[0]);
    let mut eight = [0xff; 8];
    driver.transport.read(register::CONFIG, &mut eight);
    assert_eq!(u64::from_le_bytes(eight), 0x1122_3344_5566_0088);
    let mut two = [0xff; 2];
    driver.transport.read(register::CONFIG + 7, &mut two);
    assert_eq!(two, [0x11, 0], "beyond the device's own");
    for (offset, len) in [
        (register::CONFIG, 3),
        (REGION_LEN - 1, 2),
        (REGION_LEN, 1),
        (u64::MAX, 8),
        (0, 0),
        (0, 8),
    ] {
        let mut data = vec![0xff; len];
        driver.transport.read(offset, &mut data);
        assert_eq!(data, vec![0; len], "{offset:#x}");
        let before = counter(&driver, "refused_writes");
        driver.transport.write(offset, &data);
        assert_eq!(counter(&driver, "refused_writes"), before + 1);
    }
}

#[test]
fn configuration_is_not_written_before_driver() {
    let (mut driver, _) = driver();
    driver.add_status(status::ACKNOWLEDGE);
    driver.transport.write(register::CONFIG, &[7]);
    assert_eq!(driver.read_config(0, 1), [0]);
}

#[test]
fn the_generation_changes_with_the_configuration() {
    let (mut driver, _) = driver();
    let before = driver.read32(register::CONFIG_GENERATION);
    driver.transport.interrupt().config_change();
    assert_ne!(driver.read32(register::CONFIG_GENERATION), before);
}

#[test]
fn there_are_no_shared_memory_regions() {
    let (mut driver, _) = driver();
    driver.write32(register::SHM_SEL, 0);
    assert_eq!(driver.read32(register::SHM_LEN_LOW), u32::MAX);
    assert_eq!(driver.read32(register::SHM_LEN_HIGH), u32::MAX);
}

#[test]
fn one_eventfd_a_queue() {
    let (driver, _) = driver();
    assert_eq!(driver.transport.queue_eventfds().len(), 2);
    // Non-blocking: an empty one says so.
    let error = driver.transport.queue_eventfds()[0].read().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
}

#[test]
fn iovecs_cover_the_asked_bytes_and_no_more() {
    use super::super::chain::{Iovecs, Segment};
    let (mut driver, _) = driver();
    let at = driver.allocate(64);
    driver.write_memory(at, b"0123456789");
    let segment = |offset, len_bytes| Segment {
        address: GuestAddress(at + offset),
        len_bytes,
    };
    let segments = [segment(0, 4), segment(6, 4)];
    let file = tempfile::tempfile().unwrap();
    let iovecs = Iovecs::new(driver.memory(), &segments, 2, 5).unwrap();
    assert_eq!(iovecs.len_bytes(), 5);
    assert_eq!(iovecs.write_to(std::os::fd::AsFd::as_fd(&file)).unwrap(), 5);
    let mut written = [0; 8];
    let count = std::os::unix::fs::FileExt::read_at(&file, &mut written, 0).unwrap();
    assert_eq!(&written[..count], b"23678");
}

#[test]
fn a_writable_flag_is_the_drivers_word_on_direction() {
    let (mut driver, _) = driver();
    driver.probe(0);
    let address = driver.allocate(16);
    driver.write_memory(address, b"kept");
    let descriptor = Descriptor {
        address,
        len_bytes: 4,
        flags: WRITE,
        next: 0,
    };
    driver.set_descriptor(0, 0, descriptor);
    driver.offer(0, 0);
    driver.kick(0);
    assert_eq!(driver.used(0)[0].len_bytes, 0, "nothing to echo");
    assert_eq!(driver.read_memory(address, 4), b"kept");
}
