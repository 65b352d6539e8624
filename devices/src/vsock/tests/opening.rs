//! How connections come to be, from either side.

use super::guest::CID;
use super::*;
use crate::vsock::{HOST_CID, MAX_CONNECTIONS, Vsock, VsockError};

#[test]
fn a_host_program_reaches_a_port_of_the_guest_and_bytes_flow_both_ways() {
    let mut guest = Guest::new();
    let (host, port) = opened(&mut guest, 1024);
    (&host).write_all(b"ping").unwrap();
    let packet = guest.expect(Op::Data);
    assert_eq!(packet.data, b"ping");
    assert_eq!(packet.header.src_cid, HOST_CID);
    assert_eq!(packet.header.dst_port, 1024);
    guest.send(data_header(1024, port, 4), b"pong", &[]);
    guest.settle();
    assert_eq!(read_some(&host), b"pong");
}

#[test]
fn the_first_data_each_way_is_stamped_once_and_a_handshake_is_none() {
    use crate::vsock::{FIRST_RX_NS, FIRST_TX_NS};
    let mut guest = Guest::new();
    let stamps = |guest: &Guest| [FIRST_RX_NS, FIRST_TX_NS].map(|name| guest.counter(name));
    let (host, port) = opened(&mut guest, 1024);
    assert_eq!(stamps(&guest), [0, 0]);
    (&host).write_all(b"wake").unwrap();
    guest.expect(Op::Data);
    let [woken, unanswered] = stamps(&guest);
    assert!(woken > 0);
    assert_eq!(unanswered, 0);
    guest.send(data_header(1024, port, 5), b"awake", &[]);
    guest.settle();
    let first = stamps(&guest);
    assert_eq!(first[0], woken);
    assert!(first[1] >= woken);
    (&host).write_all(b"more").unwrap();
    guest.expect(Op::Data);
    assert_eq!(stamps(&guest), first);
}

#[test]
fn bytes_right_behind_the_line_are_the_first_data() {
    let mut guest = Guest::new();
    let host = connect(&guest);
    (&host).write_all(b"CONNECT 7\nearly").unwrap();
    let port = guest.expect(Op::Request).header.src_port;
    guest.expect_nothing();
    guest.send(header(Op::Response, 7, port), &[], &[]);
    assert_eq!(guest.expect(Op::Data).data, b"early");
}

#[test]
fn a_line_may_come_in_pieces() {
    let mut guest = Guest::new();
    let host = connect(&guest);
    for byte in b"CONNECT 1024" {
        (&host).write_all(&[*byte]).unwrap();
        guest.expect_nothing();
    }
    (&host).write_all(b"\n").unwrap();
    assert_eq!(guest.expect(Op::Request).header.dst_port, 1024);
}

#[test]
fn a_program_that_sends_something_else_is_let_go() {
    let mut guest = Guest::new();
    for wrong in [
        &b"GET / HTTP/1.1\r\n"[..],
        b"CONNECT x\n",
        b"CONNECT 00000000000000000001\n",
        b"\n",
        b"CONNECT 1024 but no end of line",
    ] {
        let host = connect(&guest);
        (&host).write_all(wrong).unwrap();
        guest.expect_nothing();
        let end = (&host).read(&mut [0; 1]);
        assert!(
            // Closed with our bytes unread, or after it took them.
            matches!(&end, Ok(0))
                || matches!(&end, Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset),
            "{end:?} after {wrong:?}"
        );
    }
    assert_eq!(guest.counter("open"), 0);
}

#[test]
fn a_port_that_the_guest_refuses_closes_the_stream_without_an_answer() {
    let mut guest = Guest::new();
    let host = ask(&guest, 9);
    let port = guest.expect(Op::Request).header.src_port;
    guest.send(header(Op::Reset, 9, port), &[], &[]);
    guest.expect_nothing();
    assert!(ended(&host));
    assert_eq!(guest.counter("open"), 0);
}

#[test]
fn the_guest_reaches_the_socket_of_a_port_and_bytes_flow_both_ways() {
    let mut guest = Guest::new();
    let host = accepted(&mut guest, 5000, 52);
    guest.send(data_header(5000, 52, 5), b"hello", &[]);
    guest.settle();
    assert_eq!(read_some(&host), b"hello");
    (&host).write_all(b"world").unwrap();
    let packet = guest.expect(Op::Data);
    assert_eq!(packet.data, b"world");
    assert_eq!((packet.header.src_port, packet.header.dst_port), (52, 5000));
}

#[test]
fn a_port_of_the_host_where_nobody_listens_is_refused() {
    let mut guest = Guest::new();
    guest.send(header(Op::Request, 5000, 52), &[], &[]);
    let reset = guest.expect(Op::Reset).header;
    assert_eq!((reset.src_port, reset.dst_port), (52, 5000));
    assert_eq!(guest.counter("refused"), 1);
}

#[test]
fn a_context_id_that_is_nobodys_is_refused_at_once() {
    let mut guest = Guest::new();
    let mut request = header(Op::Request, 5000, 52);
    request.dst_cid = 77;
    guest.send(request, &[], &[]);
    let reset = guest.expect(Op::Reset).header;
    assert_eq!((reset.src_cid, reset.dst_cid), (77, u64::from(CID)));
}

#[test]
fn data_in_many_descriptors_arrives_whole() {
    let mut guest = Guest::new();
    let host = accepted(&mut guest, 5000, 52);
    let data = pattern(3000);
    for cuts in [
        // Header apart, header and data together, a header in pieces, data in pieces.
        &[guest::WHOLE_HEADER][..],
        &[],
        &[1, 20, 43],
        &[44, 45, 1000, 1001, 2999],
        &[30, 60, 90],
    ] {
        guest.send(data_header(5000, 52, data.len()), &data, cuts);
        guest.settle();
        assert_eq!(read_some(&host), data, "cut at {cuts:?}");
    }
    assert_eq!(guest.failure(), None);
}

#[test]
fn no_more_connections_than_the_limit_and_the_next_is_reset() {
    let mut guest = Guest::new();
    let listener = UnixListener::bind(guest.port_path(52)).unwrap();
    let mut streams = Vec::new();
    for port in 0..MAX_CONNECTIONS as u32 {
        guest.send(header(Op::Request, port, 52), &[], &[]);
        guest.expect(Op::Response);
        streams.push(listener.accept().unwrap());
    }
    guest.send(header(Op::Request, 1 << 20, 52), &[], &[]);
    guest.expect(Op::Reset);
    let host = ask(&guest, 1024);
    guest.expect_nothing();
    let mut byte = [0];
    let end = (&host).read(&mut byte);
    assert!(!matches!(&end, Ok(1..)), "{end:?}");
    assert_eq!(guest.counter("open"), MAX_CONNECTIONS as u64);
    // Room again when one goes.
    guest.send(header(Op::Reset, 0, 52), &[], &[]);
    guest.send(header(Op::Request, 1 << 20, 52), &[], &[]);
    guest.expect(Op::Response);
}

#[test]
fn two_connections_do_not_mix() {
    let mut guest = Guest::new();
    let (first, first_port) = opened(&mut guest, 1024);
    let (second, second_port) = opened(&mut guest, 1024);
    assert_ne!(first_port, second_port);
    guest.send(data_header(1024, second_port, 3), b"two", &[]);
    guest.send(data_header(1024, first_port, 3), b"one", &[]);
    guest.settle();
    assert_eq!(read_some(&first), b"one");
    assert_eq!(read_some(&second), b"two");
}

#[test]
fn the_configuration_space_is_the_context_id() {
    let mut guest = Guest::new();
    assert_eq!(
        guest.driver.read_config(0, 16),
        [&u64::from(CID).to_le_bytes()[..], &[0; 8]].concat()
    );
}

#[test]
fn a_reset_of_the_device_closes_every_stream_and_it_works_again() {
    let mut guest = Guest::new();
    let (old, _) = opened(&mut guest, 1024);
    guest.probe();
    assert!(ended(&old));
    guest.settle();
    opened(&mut guest, 1024);
}

#[test]
fn a_program_that_came_before_the_driver_is_served_when_it_is_there() {
    let mut guest = Guest::new();
    guest.driver.reset();
    let _host = ask(&guest, 1024);
    guest.settle();
    guest.probe();
    guest.expect(Op::Request);
}

#[test]
fn a_file_that_is_no_socket_is_never_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("precious");
    std::fs::write(&path, b"data").unwrap();
    let error = Vsock::new(CID, &path).err().unwrap();
    assert!(matches!(&error, VsockError::NotASocket { .. }), "{error:?}");
    assert_eq!(std::fs::read(&path).unwrap(), b"data");
}

#[test]
fn a_listener_of_somebody_else_is_used_and_left() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("given");
    let listener = UnixListener::bind(&path).unwrap();
    let device = Vsock::with_listener(CID, listener, &dir.path().join("v")).unwrap();
    drop(device);
    assert!(path.exists());
}
