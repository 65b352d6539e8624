//! The socket device's rules, against a guest that behaves (`guest`) and one that does not.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use super::packet::{Header, NO_RECEIVE, NO_SEND, Op};

mod bounds;
mod closing;
mod credit;
mod guest;
mod hostile;
mod opening;
mod random;
mod saving;
mod waking;

use guest::{Guest, data_header, header};

/// A host program's connection to `port` of the guest, its line sent and not yet answered.
fn ask(guest: &Guest, port: u32) -> UnixStream {
    let stream = connect(guest);
    (&stream)
        .write_all(format!("CONNECT {port}\n").as_bytes())
        .unwrap();
    stream
}

/// A host program's connection, non-blocking, nothing sent.
fn connect(guest: &Guest) -> UnixStream {
    let stream = UnixStream::connect(guest.socket()).unwrap();
    stream.set_nonblocking(true).unwrap();
    stream
}

/// A connection that a host program opened to `port`, and the host's port.
fn opened(guest: &mut Guest, port: u32) -> (UnixStream, u32) {
    let stream = ask(guest, port);
    let host_port = guest.expect(Op::Request).header.src_port;
    guest.send(header(Op::Response, port, host_port), &[], &[]);
    guest.settle();
    assert_eq!(
        read_some(&stream),
        format!("OK {host_port}\n").into_bytes(),
        "the answer"
    );
    (stream, host_port)
}

/// A connection that the guest opened from `guest_port` to the host's `host_port`.
fn accepted(guest: &mut Guest, guest_port: u32, host_port: u32) -> UnixStream {
    let listener = UnixListener::bind(guest.port_path(host_port)).unwrap();
    guest.send(header(Op::Request, guest_port, host_port), &[], &[]);
    guest.expect(Op::Response);
    let (stream, _) = listener.accept().unwrap();
    stream.set_nonblocking(true).unwrap();
    stream
}

/// What can be read now.
fn read_some(mut stream: &UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut block = [0; 64 << 10];
    loop {
        match stream.read(&mut block) {
            Ok(0) => return bytes,
            Ok(len) => bytes.extend(&block[..len]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return bytes,
            Err(error) => panic!("{error}"),
        }
    }
}

/// Whether the stream is at its end: closed by the device, everything read.
fn ended(mut stream: &UnixStream) -> bool {
    matches!(stream.read(&mut [0; 1]), Ok(0))
}

/// Writes as much as the stream takes of `bytes`; how much that was.
fn write_some(mut stream: &UnixStream, bytes: &[u8]) -> usize {
    let mut done = 0;
    while done < bytes.len() {
        match stream.write(&bytes[done..]) {
            Ok(len) => done += len,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
            Err(error) => panic!("{error}"),
        }
    }
    done
}

/// Bytes that do not repeat soon.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i ^ ((i >> 8) * 7)) as u8).collect()
}
