//! A saved device loses no frame and no buffer.

use super::*;
use crate::virtio::state::through_json;

const LARGE: u64 = MERGEABLE | 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

/// Into a new device, whose tap is the other end of a new wire.
fn move_on(driver: &mut MockDriver) -> UnixDatagram {
    let state = through_json(&driver.transport.save());
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_nonblocking(true).unwrap();
    let net = Net::new(Box::new(Wire(theirs)), MAC);
    driver.restore(net, &state).unwrap();
    assert_eq!(driver.transport.save(), state);
    ours
}

#[test]
fn buffers_that_were_taken_for_frames_to_come_are_there_for_the_new_tap() {
    let (mut driver, wire) = driver(LARGE | EVENT_IDX);
    let sent: Vec<Sent> = (0..40).map(|_| driver.send(RX, &[], &[4096])).collect();
    driver.kick(RX);
    for byte in 0..3 {
        wire.send(&frame(byte, 60)).unwrap();
    }
    driver.transport.host_event();
    assert_eq!(driver.used(RX).len(), 3);
    let state = driver.transport.save();
    assert_eq!(state.rings[RX].next_used, 3);
    assert_eq!(state.rings[RX].next_avail, 3, "what is held is given back");

    let wire = move_on(&mut driver);
    wire.send(&frame(7, 9000)).unwrap();
    driver.run_kicks();
    let used = driver.used(RX);
    assert_eq!(used.len(), 3, "one frame in three buffers");
    assert_eq!(used[0].head, u32::from(sent[3].head));
    assert_eq!(bytes_of(&driver, &sent[3], 12)[10..], [3, 0]);
    assert_eq!(driver.read_memory(sent[4].writable[0], 4096), [7; 4096]);
    assert_eq!(driver.take_interrupt(), (Interrupt::USED_BUFFER, true));
}

#[test]
fn the_device_that_was_saved_goes_on_with_the_buffers_that_it_holds() {
    let (mut driver, wire) = driver(LARGE | EVENT_IDX);
    for _ in 0..20 {
        driver.send(RX, &[], &[4096]);
    }
    driver.kick(RX);
    wire.send(&frame(1, 60)).unwrap();
    driver.transport.host_event();
    driver.transport.save();
    for byte in 0..2 {
        wire.send(&frame(byte, 60)).unwrap();
    }
    driver.transport.host_event();
    let heads: Vec<u32> = driver.used(RX).iter().map(|used| used.head).collect();
    assert_eq!(heads, [0, 1, 2]);
}

#[test]
fn a_frame_that_the_guest_had_queued_is_sent_once_by_the_new_device() {
    let (mut driver, wire) = driver(EVENT_IDX);
    driver.send(TX, &[&frame(1, 60)], &[]);
    driver.kick(TX);
    driver.send(TX, &[&frame(2, 60)], &[]);
    let new_wire = move_on(&mut driver);
    driver.run_kicks();
    assert_eq!(wire.recv(&mut [0; 100]).unwrap(), 72);
    let mut buffer = [0; 100];
    assert_eq!(new_wire.recv(&mut buffer).unwrap(), 72);
    assert_eq!(buffer[HEADER_BYTES], 2);
    assert!(new_wire.recv(&mut buffer).is_err(), "once");
    assert_eq!(driver.used(TX).len(), 2);
}

#[test]
fn a_child_sends_nothing_in_the_name_of_its_parent() {
    let addressed = |source: [u8; 6], byte: u8| {
        let mut frame = frame(byte, 60);
        frame[HEADER_BYTES + 6..][..6].copy_from_slice(&source);
        frame
    };
    let child = [2, 0, 0, 0, 0, 8];
    let (mut driver, _wire) = driver(EVENT_IDX);
    driver.send(TX, &[&addressed(MAC, 1)], &[]);
    let state = through_json(&driver.transport.save());
    let (wire, theirs) = UnixDatagram::pair().unwrap();
    wire.set_nonblocking(true).unwrap();
    theirs.set_nonblocking(true).unwrap();
    let net = Net::new(Box::new(Wire(theirs)), child);
    driver.restore(net, &state).unwrap();
    let split = addressed(MAC, 2);
    driver.send(TX, &[&split[..20], &split[20..]], &[]);
    driver.send(TX, &[&addressed(child, 3)], &[]);
    // Of a bridge in the guest.
    driver.send(TX, &[&addressed([2, 0, 0, 0, 0, 9], 4)], &[]);
    driver.send(TX, &[&HEADER], &[]);
    driver.run_kicks();
    driver.kick(TX);
    let mut buffer = [0; 100];
    let mut sent = Vec::new();
    while let Ok(len) = wire.recv(&mut buffer) {
        sent.push((len, buffer[HEADER_BYTES]));
    }
    assert_eq!(sent[..2], [(72, 3), (72, 4)]);
    assert_eq!(counter(&driver, "tx_dropped"), 2);
    assert_eq!(driver.used(TX).len(), 5, "the guest has its buffers back");
}

#[test]
fn segmentation_without_checksums_is_refused_in_a_state_too() {
    let (mut driver, _wire) = driver(LARGE);
    let mut state = driver.transport.save();
    state.driver_features &= !(1 << VIRTIO_NET_F_GUEST_CSUM);
    let net = Net::new(Box::new(Wire(UnixDatagram::unbound().unwrap())), MAC);
    let refused = driver.restore(net, &state).unwrap_err();
    let text = "the device does not start where it was";
    assert_eq!(refused.to_string(), text);
}
