//! A guest that breaks rules: those of sockets cost it the connection, those of rings the device
//! until it is reset.

use super::guest::{CID, RX, TX};
use super::*;
use crate::virtio::mmio::status;

#[test]
fn a_packet_of_an_unknown_operation_or_type_is_reset() {
    let mut guest = Guest::new();
    for (op, kind) in [(0, 1), (8, 1), (u16::MAX, 1), (1, 2), (5, 0), (1, u16::MAX)] {
        let mut packet = header(Op::Request, 5000, 52);
        packet.op = op;
        packet.kind = kind;
        guest.send(packet, &[], &[]);
        guest.expect(Op::Reset);
    }
    assert_eq!(guest.failure(), None);
}

#[test]
fn a_reset_is_never_answered() {
    let mut guest = Guest::new();
    for kind in [1, 2, 77] {
        let mut packet = header(Op::Reset, 5000, 52);
        packet.kind = kind;
        guest.send(packet, &[], &[]);
        packet.dst_cid = 99;
        guest.send(packet, &[], &[]);
        guest.expect_nothing();
    }
}

#[test]
fn a_context_id_that_is_not_the_guests_is_not_answered() {
    let mut guest = Guest::new();
    for cid in [0, 1, 2, u64::from(CID) + (1 << 32), u64::MAX] {
        let mut packet = header(Op::Request, 5000, 52);
        packet.src_cid = cid;
        guest.send(packet, &[], &[]);
        guest.expect_nothing();
    }
    assert_eq!(guest.counter("refused"), 5);
}

#[test]
fn what_does_not_fit_the_connections_state_resets_it() {
    for op in [Op::Data, Op::Shutdown, Op::CreditUpdate, Op::Request] {
        let mut guest = Guest::new();
        let host = ask(&guest, 1024);
        let port = guest.expect(Op::Request).header.src_port;
        guest.send(header(op, 1024, port), &[], &[]);
        guest.expect(Op::Reset);
        assert!(ended(&host), "{op:?} before the answer");
    }
    for op in [Op::Request, Op::Response] {
        let mut guest = Guest::new();
        let (host, port) = opened(&mut guest, 1024);
        guest.send(header(op, 1024, port), &[], &[]);
        guest.expect(Op::Reset);
        assert!(ended(&host), "{op:?} on an open connection");
    }
}

#[test]
fn data_after_the_guest_said_it_was_the_last_resets() {
    let mut guest = Guest::new();
    let (_host, port) = opened(&mut guest, 1024);
    let shutdown = Header {
        flags: NO_SEND,
        ..header(Op::Shutdown, 1024, port)
    };
    guest.send(shutdown, &[], &[]);
    guest.send(data_header(1024, port, 1), b"x", &[]);
    guest.expect(Op::Reset);
}

#[test]
fn packets_of_no_connection_are_reset() {
    let mut guest = Guest::new();
    for op in [
        Op::Response,
        Op::Shutdown,
        Op::Data,
        Op::CreditUpdate,
        Op::CreditRequest,
    ] {
        guest.send(header(op, 5000, 52), &[], &[]);
        guest.expect(Op::Reset);
    }
}

#[test]
fn a_guest_cannot_take_the_ports_of_a_connection_to_it() {
    let mut guest = Guest::new();
    let (host, port) = opened(&mut guest, 1024);
    let _listener = UnixListener::bind(guest.port_path(port)).unwrap();
    guest.send(header(Op::Request, 1024, port), &[], &[]);
    guest.expect(Op::Reset);
    assert!(ended(&host));
}

/// Expects NEEDS_RESET for `reason`, and a device that works after a reset.
fn assert_needs_reset(mut guest: Guest, reason: &str) {
    assert_eq!(guest.failure().as_deref(), Some(reason));
    assert_ne!(guest.driver.status() & status::DEVICE_NEEDS_RESET, 0);
    guest.refills = true;
    guest.probe();
    guest.settle();
    opened(&mut guest, 1024);
}

#[test]
fn a_packet_without_a_whole_header_breaks_the_ring() {
    let mut guest = Guest::new();
    guest.driver.send(TX, &[&[0; 43]], &[]);
    guest.driver.kick(TX);
    assert_needs_reset(
        guest,
        "the driver broke the virtio rules: vsock packet without a whole header",
    );
}

#[test]
fn a_packet_shorter_than_it_says_breaks_the_ring() {
    for len in [1, 4096, u32::MAX] {
        let mut guest = Guest::new();
        let packet = Header {
            len,
            ..header(Op::Data, 5000, 52)
        };
        guest.send(packet, &[], &[]);
        assert_needs_reset(
            guest,
            "the driver broke the virtio rules: vsock packet shorter than it says",
        );
    }
}

#[test]
fn a_buffer_without_room_for_data_breaks_the_ring() {
    for len in [1, 43, 44] {
        let mut guest = Guest::new();
        guest.refills = false;
        guest.probe();
        guest.driver.send(RX, &[], &[len]);
        guest.send(header(Op::Request, 5000, 52), &[], &[]);
        guest.settle();
        assert_needs_reset(
            guest,
            "the driver broke the virtio rules: vsock buffer without room for data",
        );
    }
}
