//! A saved device goes on in another process: the control connection without a lost or doubled
//! byte, all others with a reset.

use std::sync::{Arc, Mutex};

use tempfile::TempDir;

use super::guest::{CID, EVENT, Packet, TX, port_path};
use super::random::Dice;
use super::waking::{Shared, shared};
use super::*;
use crate::virtio::state::{DeviceState, TransportState, through_json};
use crate::vsock::connection::BUF_ALLOC;
use crate::vsock::{CONTROL_PORT, ResetState, Vsock, VsockState};

mod hostile;

const PORT: u32 = 5000;

/// Another process's device, with a context id of its own, and who listens there for the control
/// connection.
fn elsewhere() -> (TempDir, Vsock, UnixListener) {
    let (dir, device) = deserted();
    let listener = UnixListener::bind(port_path(&dir.path().join("v"), CONTROL_PORT)).unwrap();
    (dir, device, listener)
}

/// Another process's device, and nobody who listens.
fn deserted() -> (TempDir, Vsock) {
    let dir = tempfile::tempdir().unwrap();
    let device = Vsock::new(7, &dir.path().join("v")).unwrap();
    (dir, device)
}

/// The guest in another process; the host's end of its control connection.
fn move_on(guest: &mut Guest) -> UnixStream {
    let state = through_json(&guest.driver.transport.save());
    let (dir, device, listener) = elsewhere();
    guest.restore(dir, device, &state).unwrap();
    assert_eq!(guest.driver.transport.save(), state);
    let (stream, _) = listener.accept().unwrap();
    stream.set_nonblocking(true).unwrap();
    stream
}

fn own(state: &TransportState) -> &VsockState {
    match &state.device {
        DeviceState::Vsock(own) => own,
        other => panic!("{other:?}"),
    }
}

fn credit(op: Op, len: usize, buf_alloc: u32, fwd_cnt: u32) -> Header {
    Header {
        len: len as u32,
        buf_alloc,
        fwd_cnt,
        ..header(op, PORT, CONTROL_PORT)
    }
}

/// The control connection, whose guest side takes `buf_alloc` bytes.
fn control(guest: &mut Guest, buf_alloc: u32) -> UnixStream {
    let listener = UnixListener::bind(guest.port_path(CONTROL_PORT)).unwrap();
    guest.send(credit(Op::Request, 0, buf_alloc, 0), &[], &[]);
    guest.expect(Op::Response);
    let (stream, _) = listener.accept().unwrap();
    stream.set_nonblocking(true).unwrap();
    stream
}

/// The data that came; any reset is a failure.
fn data_of(guest: &mut Guest) -> (Vec<u8>, Option<Header>) {
    let (mut data, mut last) = (Vec::new(), None);
    while let Some(packet) = guest.next() {
        assert!(
            matches!(
                packet.op(),
                Some(Op::Data | Op::CreditRequest | Op::CreditUpdate)
            ),
            "{packet:?}"
        );
        data.extend(packet.data);
        last = Some(packet.header);
    }
    (data, last)
}

/// What the device had written to a stream that it has closed; the kernel then says whether bytes
/// of ours were left in it.
fn drain(mut stream: &UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut block = [0; 64 << 10];
    loop {
        match stream.read(&mut block) {
            Ok(0) => return bytes,
            Ok(len) => bytes.extend(&block[..len]),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return bytes,
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn bytes_under_way_on_the_control_connection_are_neither_lost_nor_doubled() {
    let mut guest = Guest::new();
    let old = control(&mut guest, 10_000);
    let to_guest = pattern(25_000);
    assert_eq!(write_some(&old, &to_guest), 25_000);
    let (mut got, _) = data_of(&mut guest);
    assert_eq!(got.len(), 10_000);
    // All the credit there is; the old program reads none of it.
    let to_host = pattern(BUF_ALLOC as usize);
    for part in to_host.chunks(32 << 10) {
        guest.send(credit(Op::Data, part.len(), 10_000, 0), part, &[]);
    }
    let (more, _) = data_of(&mut guest);
    assert!(more.is_empty());
    let state = guest.driver.transport.save();
    let saved = own(&state).control.as_ref().unwrap();
    assert!(!saved.to_host.is_empty());
    assert_eq!(saved.to_guest, to_guest[10_000..]);

    let new = move_on(&mut guest);
    assert!(data_of(&mut guest).0.is_empty(), "still no credit");
    let mut host_got = drain(&old);
    host_got.extend(read_some(&new));
    assert!(host_got == to_host);

    guest.send(credit(Op::CreditUpdate, 0, 10_000, 10_000), &[], &[]);
    got.extend(data_of(&mut guest).0);
    assert_eq!(got.len(), 20_000, "no more than its credit");
    (&new).write_all(b"wake").unwrap();
    guest.send(credit(Op::CreditUpdate, 0, 10_000, 20_000), &[], &[]);
    let (rest, last) = data_of(&mut guest);
    got.extend(rest);
    assert!(got == [&to_guest[..], b"wake"].concat());
    let last = last.unwrap();
    assert_eq!((last.fwd_cnt, last.buf_alloc), (BUF_ALLOC, BUF_ALLOC));

    guest.send(credit(Op::Data, 3, 10_000, 20_000), b"ack", &[]);
    guest.settle();
    assert_eq!(read_some(&new), b"ack");
}

#[test]
fn the_device_that_was_saved_goes_on_undisturbed() {
    let mut guest = Guest::new();
    let host = control(&mut guest, 1_000);
    write_some(&host, &pattern(3_000));
    assert_eq!(data_of(&mut guest).0.len(), 1_000);
    guest.driver.transport.save();
    guest.send(credit(Op::CreditUpdate, 0, 5_000, 1_000), &[], &[]);
    assert!(data_of(&mut guest).0 == pattern(3_000)[1_000..]);
    guest.send(credit(Op::Data, 1, 5_000, 3_000), b"x", &[]);
    guest.settle();
    assert_eq!(read_some(&host), b"x");
}

#[test]
fn whatever_the_moments_every_byte_of_the_control_connection_arrives_once() {
    for seed in 1..=40 {
        let mut dice = Dice(seed * 7919);
        let mut guest = Guest::new();
        let mut alloc = 3_000;
        let mut host = control(&mut guest, alloc);
        let (to_guest, to_host) = (pattern(60_000), pattern(400_000));
        let (mut host_wrote, mut guest_wrote) = (0, 0);
        let (mut guest_got, mut host_got) = (Vec::new(), Vec::new());
        let (mut device_credit, mut taken) = (BUF_ALLOC, 0);
        let mut moves = 0;
        while guest_got.len() < to_guest.len() || host_got.len() < to_host.len() {
            match dice.roll(6) {
                0 => {
                    let end = (host_wrote + dice.roll(9_000)).min(to_guest.len());
                    host_wrote += write_some(&host, &to_guest[host_wrote..end]);
                }
                1 | 2 => {
                    let room = device_credit.wrapping_sub(guest_wrote as u32) as usize;
                    let len = dice.roll(30_000).min(to_host.len() - guest_wrote).min(room);
                    let data = &to_host[guest_wrote..guest_wrote + len];
                    let op = if len == 0 {
                        Op::CreditRequest
                    } else {
                        Op::Data
                    };
                    guest.send(credit(op, len, alloc, taken), data, &[]);
                    guest_wrote += len;
                }
                3 => {
                    taken = guest_got.len() as u32;
                    alloc = 1 + dice.roll(5_000) as u32;
                    guest.send(credit(Op::CreditUpdate, 0, alloc, taken), &[], &[]);
                }
                4 => host_got.extend(read_some(&host)),
                _ if dice.roll(3) == 0 => {
                    if dice.roll(2) == 0 {
                        guest.step();
                    }
                    let new = move_on(&mut guest);
                    host_got.extend(drain(&std::mem::replace(&mut host, new)));
                    moves += 1;
                }
                _ => {}
            }
            if dice.roll(2) == 0 {
                guest.settle();
            }
            while let Some(packet) = guest.inbox.pop_front() {
                assert_ne!(packet.op(), Some(Op::Reset), "seed {seed}");
                device_credit = packet.header.fwd_cnt.wrapping_add(BUF_ALLOC);
                guest_got.extend(packet.data);
            }
        }
        assert!(moves > 0);
        assert!(guest_got == to_guest, "seed {seed}");
        assert!(host_got == to_host, "seed {seed}");
        assert_eq!(guest.failure(), None);
    }
}

#[test]
fn other_connections_and_half_open_ones_are_reset() {
    let mut guest = Guest::new();
    let _control = control(&mut guest, 1_000);
    let (_first, first_port) = opened(&mut guest, 77);
    let _second = accepted(&mut guest, 88, 52);
    let _half_open = ask(&guest, 99);
    let asked = guest.expect(Op::Request).header;
    let new = move_on(&mut guest);
    let mut reset: Vec<(u32, u32)> = std::iter::from_fn(|| guest.next())
        .map(|Packet { header, .. }| {
            assert_eq!(header.op, Op::Reset as u16);
            assert_eq!(header.src_cid, crate::vsock::HOST_CID);
            (header.src_port, header.dst_port)
        })
        .collect();
    reset.sort_unstable();
    assert_eq!(reset, [(52, 88), (first_port, 77), (asked.src_port, 99)]);
    assert_eq!(guest.counter("open"), 1);
    (&new).write_all(b"x").unwrap();
    assert_eq!(guest.expect(Op::Data).data, b"x");
    // A port that a reset connection had is not given again at once.
    let (_, port) = opened(&mut guest, 77);
    assert!(port > asked.src_port);
}

#[test]
fn resets_wait_for_buffers_and_may_be_saved_once_more() {
    let mut guest = Guest::new();
    let _control = control(&mut guest, 1_000);
    let _others: Vec<_> = (0..300)
        .map(|port| accepted_at(&mut guest, 10_000 + port))
        .collect();
    guest.refills = false;
    // Those that the guest has given already.
    let _new = move_on(&mut guest);
    let mut resets = std::iter::from_fn(|| guest.next()).count();
    assert_eq!(resets, 64);
    let _new = move_on(&mut guest);
    guest.refills = true;
    guest.refill(64);
    resets += std::iter::from_fn(|| guest.next()).count();
    assert_eq!(resets, 300);
}

fn accepted_at(guest: &mut Guest, port: u32) -> UnixStream {
    let path = guest.port_path(port);
    let stream = accepted(guest, port, port);
    std::fs::remove_file(path).unwrap();
    stream
}

#[test]
fn without_a_program_that_takes_it_the_control_connection_is_reset_and_counted() {
    let mut guest = Guest::new();
    let _control = control(&mut guest, 1_000);
    let state = through_json(&guest.driver.transport.save());
    let (dir, device) = deserted();
    guest.restore(dir, device, &state).unwrap();
    let reset = guest.expect(Op::Reset).header;
    assert_eq!((reset.src_port, reset.dst_port), (CONTROL_PORT, PORT));
    guest.expect_nothing();
    assert_eq!(guest.counter("control_lost"), 1);
    // The runtime connects again.
    accepted(&mut guest, PORT + 1, CONTROL_PORT);
}

#[test]
fn a_stream_that_is_given_is_joined_without_any_path() {
    let mut guest = Guest::new();
    let _control = control(&mut guest, 1_000);
    let state = through_json(&guest.driver.transport.save());
    let (dir, device) = deserted();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let device = device.with_control_stream(theirs);
    guest.restore(dir, device, &state).unwrap();
    ours.write_all(b"wake").unwrap();
    assert_eq!(guest.expect(Op::Data).data, b"wake");
    guest.send(credit(Op::Data, 2, 1_000, 4), b"ok", &[]);
    guest.settle();
    let mut answer = [0; 2];
    ours.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"ok");
}

#[test]
fn a_stream_that_nothing_is_joined_to_is_closed() {
    let mut guest = Guest::new();
    let state = guest.driver.transport.save();
    let (dir, device) = deserted();
    let (ours, theirs) = UnixStream::pair().unwrap();
    guest
        .restore(dir, device.with_control_stream(theirs), &state)
        .unwrap();
    assert!(ended(&ours));
}

#[test]
fn a_control_connection_that_is_closing_is_reset() {
    for flags in [NO_SEND, NO_RECEIVE] {
        let mut guest = Guest::new();
        let _control = control(&mut guest, 1_000);
        let header = Header {
            flags,
            ..credit(Op::Shutdown, 0, 1_000, 0)
        };
        guest.send(header, &[], &[]);
        guest.settle();
        let state = guest.driver.transport.save();
        let ended = ResetState {
            host_cid: crate::vsock::HOST_CID,
            host_port: CONTROL_PORT,
            guest_port: PORT,
        };
        assert_eq!(own(&state).control, None);
        assert_eq!(own(&state).resets, [ended]);
    }
    let mut guest = Guest::new();
    drop(control(&mut guest, 0));
    assert_eq!(own(&guest.driver.transport.save()).control, None);
}

#[test]
fn of_two_control_connections_the_newer_goes_on() {
    let mut guest = Guest::new();
    let _old = control(&mut guest, 1_000);
    std::fs::remove_file(guest.port_path(CONTROL_PORT)).unwrap();
    let _new = accepted(&mut guest, PORT + 1, CONTROL_PORT);
    let state = guest.driver.transport.save();
    let own = own(&state);
    assert_eq!(own.control.as_ref().unwrap().guest_port, PORT + 1);
    assert_eq!(own.resets.len(), 1);
    assert_eq!(own.resets[0].guest_port, PORT);
}

#[test]
fn the_connection_that_is_named_goes_on_whoever_began_it() {
    let mut guest = Guest::new();
    let _standing = control(&mut guest, 1_000);
    let (_older, _) = opened(&mut guest, 77);
    let (_named, port) = opened(&mut guest, 1024);
    let (_newer, _) = opened(&mut guest, 1024);
    guest.driver.transport.keep_connection(port);
    // That is saved too: the next save names the same.
    let new = move_on(&mut guest);
    (&new).write_all(b"wake").unwrap();
    let resets = std::iter::from_fn(|| guest.next()).filter(|packet| match packet.op() {
        Some(Op::Reset) => true,
        _ => {
            assert_eq!(packet.data, b"wake");
            let ports = (packet.header.src_port, packet.header.dst_port);
            assert_eq!(ports, (port, 1024));
            false
        }
    });
    assert_eq!(resets.count(), 3);
    assert_eq!(guest.counter("open"), 1);
    // Nobody has the port: none goes on.
    guest.driver.transport.keep_connection(port + 9);
    let state = guest.driver.transport.save();
    assert_eq!(own(&state).control, None);
    assert_eq!(own(&state).resets.len(), 1);
}

#[test]
fn the_guest_keeps_its_context_id() {
    let mut guest = Guest::new();
    let _control = control(&mut guest, 1_000);
    move_on(&mut guest);
    let config = guest.driver.read_config(0, 8);
    assert_eq!(config, u64::from(CID).to_le_bytes());
}

#[test]
fn packets_of_which_the_guest_was_not_told_do_not_stay_with_the_device() {
    let mut guest = Guest::new();
    let _control = control(&mut guest, 1_000);
    for _ in 0..5 {
        guest.send(credit(Op::Data, 1, 1_000, 0), b"x", &[]);
    }
    guest.settle();
    assert!(guest.done_chains < guest.sent_chains, "not told yet");
    let new = move_on(&mut guest);
    guest.settle();
    assert_eq!(guest.done_chains, guest.sent_chains);
    for _ in 0..200 {
        guest.send(credit(Op::Data, 1, 1_000, 0), b"x", &[]);
        guest.settle();
    }
    assert_eq!(read_some(&new).len(), 200);
    assert_eq!(guest.failure(), None);
}

#[test]
fn credit_that_the_guest_asked_for_comes_from_the_new_device() {
    let mut guest = Guest::new();
    guest.refills = false;
    guest.probe();
    // One for the RESPONSE.
    guest.refill(1);
    let _old = control(&mut guest, 1_000);
    guest.send(credit(Op::CreditRequest, 0, 1_000, 0), &[], &[]);
    guest.expect_nothing();
    let _new = move_on(&mut guest);
    guest.refill(1);
    guest.expect(Op::CreditUpdate);
}

#[test]
fn a_transport_reset_that_found_no_buffer_is_told_by_the_new_device() {
    let (device, mut driver, _dir) = shared();
    device.lock().unwrap().transport_reset().unwrap();
    let state = through_json(&driver.transport.save());
    let (_new_dir, new) = deserted();
    let new = Shared(Arc::new(Mutex::new(new)));
    driver.restore(new, &state).unwrap();
    let sent = driver.send(EVENT, &[], &[4]);
    driver.run_kicks();
    assert_eq!(driver.used(EVENT)[0].len_bytes, 4);
    assert_eq!(driver.read_memory(sent.writable[0], 4), [0; 4]);
}

#[test]
fn packets_that_the_guest_had_queued_are_taken_by_the_new_device() {
    let mut guest = Guest::new();
    let old = control(&mut guest, 1_000);
    guest.queue(credit(Op::Data, 5, 1_000, 0), b"later", &[]);
    let new = move_on(&mut guest);
    guest.settle();
    assert_eq!(drain(&old), b"");
    assert_eq!(read_some(&new), b"later");
}

#[test]
fn a_device_that_needs_a_reset_takes_no_connection_along() {
    let mut guest = Guest::new();
    let _control = control(&mut guest, 1_000);
    let head = guest.driver.lay_chain(TX, &[(0, 4, false)]);
    guest.driver.offer(TX, head);
    guest.driver.kick(TX);
    assert!(guest.failure().is_some());
    let state = through_json(&guest.driver.transport.save());
    let (dir, device) = deserted();
    guest.restore(dir, device, &state).unwrap();
    guest.probe();
    guest.expect_nothing();
    control(&mut guest, 1_000);
}
