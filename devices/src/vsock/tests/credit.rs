//! Nobody sends more than the other side said it takes.

use super::*;
use crate::vsock::connection::BUF_ALLOC;

fn credit(op: Op, port: u32, buf_alloc: u32, fwd_cnt: u32) -> Header {
    Header {
        buf_alloc,
        fwd_cnt,
        ..header(op, 1024, port)
    }
}

/// A connection whose guest side takes `buf_alloc` bytes.
fn opened_with(guest: &mut Guest, buf_alloc: u32) -> (UnixStream, u32) {
    let host = ask(guest, 1024);
    let port = guest.expect(Op::Request).header.src_port;
    guest.send(credit(Op::Response, port, buf_alloc, 0), &[], &[]);
    guest.settle();
    assert!(read_some(&host).starts_with(b"OK "));
    (host, port)
}

/// Data bytes that came, without the requests for credit.
fn data_of(guest: &mut Guest) -> usize {
    let mut len = 0;
    while let Some(packet) = guest.next() {
        match packet.op() {
            Some(Op::Data) => len += packet.data.len(),
            Some(Op::CreditRequest) => {}
            other => panic!("{other:?}"),
        }
    }
    len
}

#[test]
fn the_guest_gets_no_more_than_its_credit_and_the_rest_when_it_has_read() {
    let mut guest = Guest::new();
    let (host, port) = opened_with(&mut guest, 10_000);
    assert_eq!(write_some(&host, &pattern(25_000)), 25_000);
    assert_eq!(data_of(&mut guest), 10_000);
    guest.send(credit(Op::CreditUpdate, port, 10_000, 4_000), &[], &[]);
    assert_eq!(data_of(&mut guest), 4_000);
    guest.send(credit(Op::CreditUpdate, port, 10_000, 14_000), &[], &[]);
    assert_eq!(data_of(&mut guest), 10_000);
    guest.send(credit(Op::CreditUpdate, port, 10_000, 24_000), &[], &[]);
    assert_eq!(data_of(&mut guest), 1_000);
}

#[test]
fn a_guest_without_credit_is_asked_for_it_once() {
    let mut guest = Guest::new();
    let (host, port) = opened_with(&mut guest, 0);
    (&host).write_all(b"x").unwrap();
    guest.expect(Op::CreditRequest);
    (&host).write_all(b"y").unwrap();
    guest.expect_nothing();
    guest.send(credit(Op::CreditUpdate, port, 0, 0), &[], &[]);
    guest.expect_nothing();
    guest.send(credit(Op::CreditUpdate, port, 10, 0), &[], &[]);
    assert_eq!(guest.expect(Op::Data).data, b"xy");
}

#[test]
fn a_guest_that_lies_about_what_it_took_only_starves_itself() {
    let mut guest = Guest::new();
    let (host, port) = opened_with(&mut guest, 1_000);
    write_some(&host, &pattern(5_000));
    assert_eq!(data_of(&mut guest), 1_000);
    for lie in [u32::MAX, 5_000, 1 << 31] {
        guest.send(credit(Op::CreditUpdate, port, 1_000, lie), &[], &[]);
        assert_eq!(data_of(&mut guest), 0, "taken {lie} of 1000");
    }
    guest.send(credit(Op::CreditUpdate, port, 1_000, 1_000), &[], &[]);
    assert_eq!(data_of(&mut guest), 1_000);
    assert_eq!(guest.failure(), None);
}

#[test]
fn a_slow_program_holds_the_guest_at_its_credit_and_one_byte_more_is_reset() {
    let mut guest = Guest::new();
    let (host, port) = opened(&mut guest, 1024);
    // What the Unix socket takes counts as forwarded: send until the credit is gone.
    let mut sent = 0_u32;
    let mut forwarded = 0_u32;
    let part = pattern(32 << 10);
    loop {
        let left = BUF_ALLOC - (sent - forwarded);
        if left == 0 {
            guest.send(credit(Op::CreditRequest, port, 1 << 20, 0), &[], &[]);
            let packet = guest.expect(Op::CreditUpdate);
            if packet.header.fwd_cnt == forwarded {
                break;
            }
            forwarded = packet.header.fwd_cnt;
            continue;
        }
        let len = part.len().min(left as usize);
        guest.send(data_header(1024, port, len), &part[..len], &[]);
        sent += len as u32;
        while let Some(packet) = guest.next() {
            assert_eq!(packet.op(), Some(Op::CreditUpdate));
            forwarded = packet.header.fwd_cnt;
        }
    }
    assert!(sent > BUF_ALLOC, "{sent}");
    guest.send(data_header(1024, port, 1), b"x", &[]);
    guest.expect(Op::Reset);
    // What was taken is lost only from the end.
    let got = read_some(&host);
    assert!(!got.is_empty() && got.len() as u32 <= sent);
}

#[test]
fn a_reading_program_costs_few_credit_updates() {
    let mut guest = Guest::new();
    let (host, port) = opened(&mut guest, 1024);
    let part = pattern(4 << 10);
    let mut updates = 0;
    let packets = 1024;
    for _ in 0..packets {
        guest.send(data_header(1024, port, part.len()), &part, &[]);
        guest.settle();
        updates += guest.inbox.drain(..).count();
        assert_eq!(read_some(&host).len(), part.len());
    }
    // 4 MiB, told at each half of 256 KiB.
    assert_eq!(updates, packets * part.len() / (BUF_ALLOC as usize / 2));
}

#[test]
fn the_answer_of_one_side_tells_the_credit_of_the_other() {
    let mut guest = Guest::new();
    let (host, port) = opened(&mut guest, 1024);
    guest.send(data_header(1024, port, 100), &pattern(100), &[]);
    guest.settle();
    (&host).write_all(b"x").unwrap();
    let header = guest.expect(Op::Data).header;
    assert_eq!((header.buf_alloc, header.fwd_cnt), (BUF_ALLOC, 100));
}
