//! How connections end, half by half, and that no byte is lost on the way.

use std::net::Shutdown;

use super::*;

fn shutdown(guest_port: u32, host_port: u32, flags: u32) -> Header {
    Header {
        flags,
        ..header(Op::Shutdown, guest_port, host_port)
    }
}

#[test]
fn the_hosts_half_close_reaches_the_guest_after_the_last_byte_and_the_guest_may_still_send() {
    let mut guest = Guest::new();
    let (host, port) = opened(&mut guest, 1024);
    (&host).write_all(b"last").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.expect(Op::Data).data, b"last");
    assert_eq!(guest.expect(Op::Shutdown).header.flags, NO_SEND);
    guest.send(data_header(1024, port, 5), b"reply", &[]);
    guest.settle();
    assert_eq!(read_some(&host), b"reply");
    guest.send(shutdown(1024, port, NO_SEND | NO_RECEIVE), &[], &[]);
    guest.expect(Op::Reset);
    assert!(ended(&host));
    assert_eq!(guest.counter("open"), 0);
}

#[test]
fn the_guests_half_close_reaches_the_host_after_the_last_byte_and_the_host_may_still_send() {
    let mut guest = Guest::new();
    let (host, port) = opened(&mut guest, 1024);
    guest.send(data_header(1024, port, 4), b"last", &[]);
    guest.send(shutdown(1024, port, NO_SEND), &[], &[]);
    guest.settle();
    assert_eq!(read_some(&host), b"last");
    assert!(ended(&host));
    (&host).write_all(b"reply").unwrap();
    assert_eq!(guest.expect(Op::Data).data, b"reply");
    drop(host);
    assert_eq!(guest.expect(Op::Shutdown).header.flags, NO_SEND);
    guest.expect(Op::Reset);
    assert_eq!(guest.counter("open"), 0);
}

#[test]
fn a_program_that_closes_makes_the_guest_close() {
    let mut guest = Guest::new();
    let (host, port) = opened(&mut guest, 1024);
    drop(host);
    let mut flags = 0;
    while flags != NO_SEND | NO_RECEIVE {
        flags |= guest.expect(Op::Shutdown).header.flags;
    }
    // Linux answers so.
    guest.send(header(Op::Reset, 1024, port), &[], &[]);
    guest.expect_nothing();
    assert_eq!(guest.counter("open"), 0);
}

#[test]
fn a_reset_of_the_guest_closes_the_hosts_stream() {
    let mut guest = Guest::new();
    let (host, port) = opened(&mut guest, 1024);
    guest.send(header(Op::Reset, 1024, port), &[], &[]);
    guest.expect_nothing();
    assert!(ended(&host));
    assert_eq!(guest.counter("open"), 0);
}

#[test]
fn a_guest_that_reads_no_more_stops_the_host_program() {
    let mut guest = Guest::new();
    let (host, port) = opened(&mut guest, 1024);
    guest.send(shutdown(1024, port, NO_RECEIVE), &[], &[]);
    guest.settle();
    let error = (&host).write(b"x").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
    guest.send(data_header(1024, port, 2), b"ok", &[]);
    guest.settle();
    assert_eq!(read_some(&host), b"ok");
}

#[test]
fn a_reset_for_a_slow_reader_after_a_clean_close_loses_nothing() {
    let mut guest = Guest::new();
    let (host, port) = opened(&mut guest, 1024);
    // More than the Unix socket takes, within the credit.
    let data = pattern(4 * 60_000);
    for part in data.chunks(60_000) {
        guest.send(data_header(1024, port, part.len()), part, &[]);
    }
    guest.expect(Op::CreditUpdate);
    // Linux sends both flags, and a reset when nobody answered for 8 s.
    guest.send(shutdown(1024, port, NO_SEND | NO_RECEIVE), &[], &[]);
    guest.send(header(Op::Reset, 1024, port), &[], &[]);
    guest.expect_nothing();
    let mut got = Vec::new();
    while got.len() < data.len() {
        let some = read_some(&host);
        assert!(!some.is_empty(), "{} of {} bytes", got.len(), data.len());
        got.extend(some);
        guest.expect_nothing();
    }
    assert_eq!(got, data);
    guest.expect_nothing();
    assert!(ended(&host));
    assert_eq!(guest.counter("open"), 0);
}

#[test]
fn the_ports_of_a_connection_that_only_delivers_can_be_used_again() {
    let mut guest = Guest::new();
    let host = accepted(&mut guest, 5000, 52);
    let data = pattern(4 * 60_000);
    for part in data.chunks(60_000) {
        guest.send(data_header(5000, 52, part.len()), part, &[]);
    }
    guest.expect(Op::CreditUpdate);
    guest.send(shutdown(5000, 52, NO_SEND | NO_RECEIVE), &[], &[]);
    guest.send(header(Op::Reset, 5000, 52), &[], &[]);
    guest.settle();
    std::fs::remove_file(guest.port_path(52)).unwrap();
    let second = accepted(&mut guest, 5000, 52);
    let mut got = Vec::new();
    while got.len() < data.len() {
        let some = read_some(&host);
        assert!(!some.is_empty(), "{} of {} bytes", got.len(), data.len());
        got.extend(some);
        guest.settle();
    }
    assert_eq!(got, data);
    guest.send(data_header(5000, 52, 3), b"new", &[]);
    guest.settle();
    assert_eq!(read_some(&second), b"new");
}

#[test]
fn what_a_program_wrote_before_it_closed_arrives_though_the_guest_still_sends() {
    let mut guest = Guest::new();
    let (host, port) = opened(&mut guest, 1024);
    let data = pattern(50_000);
    assert_eq!(write_some(&host, &data), data.len());
    drop(host);
    // The guest's bytes have no reader any more.
    guest.queue(data_header(1024, port, 5), b"hello", &[]);
    guest.queue(data_header(1024, port, 5), b"hello", &[]);
    guest.flush();
    let mut got = Vec::new();
    let mut flags = 0;
    while let Some(packet) = guest.next() {
        match packet.op() {
            Some(Op::Data) => got.extend(packet.data),
            Some(Op::Shutdown) => flags |= packet.header.flags,
            Some(Op::CreditUpdate) => {}
            other => panic!("{other:?} after {} bytes", got.len()),
        }
    }
    assert_eq!(got, data);
    assert_eq!(flags, NO_SEND | NO_RECEIVE);
}

#[test]
fn a_program_that_gives_up_before_the_guest_answers_frees_its_place() {
    let mut guest = Guest::new();
    let host = ask(&guest, 1024);
    let port = guest.expect(Op::Request).header.src_port;
    drop(host);
    guest.expect(Op::Reset);
    assert_eq!(guest.counter("open"), 0);
    guest.send(header(Op::Response, 1024, port), &[], &[]);
    guest.expect(Op::Reset);
}

#[test]
fn a_guest_that_was_never_asked_is_not_told_of_the_end() {
    let mut guest = Guest::new();
    guest.refills = false;
    guest.probe();
    for _ in 0..100 {
        let host = ask(&guest, 1024);
        guest.settle();
        drop(host);
        guest.settle();
    }
    assert_eq!(guest.counter("open"), 0);
    guest.refills = true;
    guest.refill(64);
    guest.expect_nothing();
}
