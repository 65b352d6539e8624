//! What a guest that gives no buffers, or a host program that comes and goes, cannot make grow.

use super::waking::shared;
use super::*;

#[test]
fn connections_that_the_guest_makes_and_resets_leave_nothing_behind() {
    let (device, mut driver, dir) = shared();
    let listener = UnixListener::bind(guest::port_path(&dir.path().join("v"), 52)).unwrap();
    for _ in 0..300 {
        for op in [Op::Request, Op::Reset] {
            driver.send(guest::TX, &[&header(op, 5000, 52).encode()], &[]);
            driver.kick(guest::TX);
        }
        drop(listener.accept().unwrap());
    }
    assert_eq!(driver.used(guest::TX).len(), 600);
    let device = device.lock().unwrap();
    assert!(device.connections.is_empty());
    assert!(device.by_ports.is_empty());
    assert!(device.waiting.is_empty(), "{}", device.waiting.len());
    assert!(device.resets.is_empty());
}

#[test]
fn programs_that_give_up_before_the_guest_was_asked_leave_nothing_behind() {
    let (device, mut driver, dir) = shared();
    for _ in 0..300 {
        let host = UnixStream::connect(dir.path().join("v")).unwrap();
        (&host).write_all(b"CONNECT 5\n").unwrap();
        driver.transport.host_event();
        assert_eq!(device.lock().unwrap().connections.len(), 1);
        drop(host);
        driver.transport.host_event();
    }
    let device = device.lock().unwrap();
    assert!(device.connections.is_empty());
    assert!(device.by_ports.is_empty(), "{}", device.by_ports.len());
    assert!(device.waiting.is_empty(), "{}", device.waiting.len());
    assert!(device.resets.is_empty(), "the guest knows of none");
}

#[test]
fn a_program_that_ends_its_line_and_goes_at_once_frees_its_place() {
    let (device, mut driver, dir) = shared();
    let host = UnixStream::connect(dir.path().join("v")).unwrap();
    (&host).write_all(b"CONNECT").unwrap();
    driver.transport.host_event();
    assert_eq!(device.lock().unwrap().streams.handshakes.len(), 1);
    (&host).write_all(b" 5\n").unwrap();
    drop(host);
    driver.transport.host_event();
    let device = device.lock().unwrap();
    assert!(device.streams.handshakes.is_empty());
    assert!(device.connections.is_empty());
}

#[test]
fn what_a_connection_owed_is_not_said_after_the_guest_left_it() {
    let mut guest = Guest::new();
    let host = accepted(&mut guest, 5000, 52);
    let data = pattern(4 * 60_000);
    for part in data.chunks(60_000) {
        guest.send(data_header(5000, 52, part.len()), part, &[]);
    }
    guest.settle();
    guest.inbox.clear();
    // An answer to the question would come after the connection's end.
    guest.queue(header(Op::CreditRequest, 5000, 52), &[], &[]);
    let shutdown = Header {
        flags: NO_SEND,
        ..header(Op::Shutdown, 5000, 52)
    };
    guest.queue(shutdown, &[], &[]);
    guest.queue(header(Op::Reset, 5000, 52), &[], &[]);
    guest.flush();
    guest.expect_nothing();
    assert!(!read_some(&host).is_empty());
}

#[test]
fn memory_for_a_slow_program_is_given_back_when_it_has_read() {
    let (device, mut driver, dir) = shared();
    let listener = UnixListener::bind(guest::port_path(&dir.path().join("v"), 52)).unwrap();
    driver.send(guest::RX, &[], &[4096]);
    driver.send(guest::TX, &[&header(Op::Request, 5000, 52).encode()], &[]);
    driver.kick(guest::TX);
    let (host, _) = listener.accept().unwrap();
    host.set_nonblocking(true).unwrap();
    for _ in 0..4 {
        let packet = data_header(5000, 52, 60_000).encode();
        driver.send(guest::TX, &[&packet, &pattern(60_000)], &[]);
    }
    driver.kick(guest::TX);
    let kept = |device: &crate::vsock::Vsock| -> Vec<usize> {
        let all = device.connections.values();
        all.map(|connection| connection.kept_bytes()).collect()
    };
    assert!(kept(&device.lock().unwrap())[0] > 0, "the stream takes all");
    let mut got = 0;
    while got < 4 * 60_000 {
        got += read_some(&host).len();
        driver.transport.host_event();
    }
    assert_eq!(kept(&device.lock().unwrap()), [0]);
}

#[test]
fn a_broken_ring_closes_the_streams_of_host_programs() {
    let mut guest = Guest::new();
    let (open, _) = opened(&mut guest, 1024);
    let asked = ask(&guest, 1024);
    let silent = connect(&guest);
    guest.settle();
    guest.driver.send(guest::TX, &[&[0; 43]], &[]);
    guest.driver.kick(guest::TX);
    assert!(guest.failure().is_some());
    assert!(ended(&open) && ended(&asked) && ended(&silent));
}

#[test]
fn the_longest_line_may_end_in_both_ways() {
    for end in ["\n", "\r\n"] {
        let mut guest = Guest::new();
        let host = connect(&guest);
        let line = format!("CONNECT {}{end}", u32::MAX);
        (&host).write_all(line.as_bytes()).unwrap();
        assert_eq!(guest.expect(Op::Request).header.dst_port, u32::MAX);
    }
}
