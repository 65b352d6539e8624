//! The client against runtimes that lie, stall or vanish.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::thread;

use ratoon_protocol::{Frame, Kind};

use super::*;

/// Long enough for a busy machine.
const LONG: Duration = Duration::from_secs(30);
/// Short: for deadlines that are meant to pass.
const SHORT: Duration = Duration::from_millis(30);

fn hello() -> Vec<u8> {
    Frame::new(Kind::Hello, 0, br#"{"runtime":"0","methods":[]}"#.to_vec()).encode()
}

/// A client whose runtime says HELLO, reads one call, says `answer` and then keeps its end open.
fn client(answer: Vec<u8>) -> (Client, thread::JoinHandle<UnixStream>) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let runtime = thread::spawn(move || {
        theirs.write_all(&hello()).unwrap();
        let mut call = [0; 4096];
        let _ = theirs.read(&mut call).unwrap();
        theirs.write_all(&answer).unwrap();
        theirs
    });
    (Client::from_stream(ours, LONG).unwrap(), runtime)
}

fn exec(client: &mut Client) -> Result<ExitReport, RuntimeError> {
    let params = ExecParams {
        argv: vec!["x".into()],
        ..ExecParams::default()
    };
    let io = ExecIo {
        stdin: None,
        stdout: &mut io::sink(),
        stderr: &mut io::sink(),
    };
    client.exec(&params, io)
}

#[test]
fn silence_instead_of_hello_is_a_timeout() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let result = Client::from_stream(ours, SHORT).map(|_| ());
    assert!(
        matches!(result, Err(RuntimeError::Timeout { what: "said HELLO", within }) if within == SHORT)
    );
}

#[test]
fn half_a_hello_and_then_silence_is_a_timeout() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(&hello()[..30]).unwrap();
    let result = Client::from_stream(ours, SHORT).map(|_| ());
    assert!(matches!(result, Err(RuntimeError::Timeout { .. })));
}

#[test]
fn silence_after_a_ping_is_a_timeout_and_the_client_is_broken() {
    let (mut client, _runtime) = client(Vec::new());
    assert!(matches!(
        client.ping(SHORT),
        Err(RuntimeError::Timeout { .. })
    ));
    assert!(matches!(client.ping(LONG), Err(RuntimeError::Broken)));
}

#[test]
fn a_vanished_runtime_is_told_as_closed() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(&hello()).unwrap();
    drop(theirs);
    let mut client = Client::from_stream(ours, LONG).unwrap();
    assert!(matches!(exec(&mut client), Err(RuntimeError::Closed)));
}

#[test]
fn a_lie_in_the_middle_of_a_command_ends_it_by_name() {
    let lie = Frame::new(Kind::Stdout, 77, b"x".to_vec()).encode();
    let (mut client, _runtime) = client(lie);
    match exec(&mut client) {
        Err(RuntimeError::Violation(what)) => {
            assert_eq!(what, "Stdout for call 77, which is not open");
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(client.ping(LONG), Err(RuntimeError::Broken)));
}

#[test]
fn an_end_that_no_process_can_have_is_not_believed() {
    for lie in [r#"{"code":256}"#, r#"{"signal":0}"#, r#"{"code":-1}"#, "7"] {
        let (mut client, _runtime) = client(Frame::new(Kind::Reply, 1, lie.into()).encode());
        let result = exec(&mut client);
        assert!(
            matches!(result, Err(RuntimeError::Violation(_))),
            "{lie}: {result:?}"
        );
    }
}

#[test]
fn a_runtime_that_reads_nothing_cannot_hold_a_client_that_cancels() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(&hello()).unwrap();
    let mut client = Client::from_stream(ours, LONG).unwrap();
    let controller = client.controller();
    let canceller = thread::spawn(move || {
        for signal in 1..=64 {
            controller.signal(signal);
        }
        controller.cancel();
    });
    let zero = std::fs::File::open("/dev/zero").unwrap();
    let params = ExecParams {
        argv: vec!["x".into()],
        ..ExecParams::default()
    };
    let io = ExecIo {
        stdin: Some(zero.as_fd()),
        stdout: &mut io::sink(),
        stderr: &mut io::sink(),
    };
    let result = client.exec(&params, io);
    assert!(matches!(result, Err(RuntimeError::Cancelled)), "{result:?}");
    canceller.join().unwrap();
}

/// What the client makes of a VMM that answers CONNECT like this.
fn connect(answer: &'static [u8]) -> Result<(), RuntimeError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock");
    let listener = UnixListener::bind(&path).unwrap();
    let vmm = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut line = [0; 13];
        stream.read_exact(&mut line).unwrap();
        assert_eq!(&line, b"CONNECT 1024\n");
        stream.write_all(answer).unwrap();
        stream
    });
    let result = Client::connect(&path, if answer.is_empty() { SHORT } else { LONG });
    vmm.join().unwrap();
    result.map(|_| ())
}

#[test]
fn a_handshake_that_is_not_ok_is_refused() {
    for (answer, shown) in [
        (&b"NO\n"[..], "NO"),
        (b"OK \n", "OK "),
        (b"OK 1x\n", "OK 1x"),
        (b"OK 10241024102410241024", "OK 10241024102410"),
    ] {
        match connect(answer) {
            Err(RuntimeError::Violation(what)) => {
                assert_eq!(what, format!("CONNECT was answered with \"{shown}\""));
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_vmm_that_closes_or_is_silent_is_told_apart() {
    assert!(matches!(connect(b""), Err(RuntimeError::Timeout { .. })));
    let dir = tempfile::tempdir().unwrap();
    let missing = Client::connect(&dir.path().join("none"), LONG).map(|_| ());
    assert!(matches!(missing, Err(RuntimeError::Connect { .. })));
    let path = dir.path().join("vsock");
    let listener = UnixListener::bind(&path).unwrap();
    let vmm = thread::spawn(move || drop(listener.accept().unwrap()));
    let refused = Client::connect(&path, LONG).map(|_| ());
    vmm.join().unwrap();
    assert!(matches!(
        refused,
        Err(RuntimeError::NotListening { port: 1024 })
    ));
}

#[test]
fn a_handshake_and_its_hello_may_come_in_one_piece() {
    let mut bytes = b"OK 1073741824\n".to_vec();
    bytes.extend(hello());
    assert!(connect(bytes.leak()).is_ok());
}

#[test]
fn a_connection_that_went_on_needs_no_hello_and_takes_none() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let mut client = Client::adopt(ours, 1 << 30).unwrap();
    assert_eq!(client.host_port(), 1 << 30);
    let runtime = thread::spawn(move || {
        let mut call = [0; 4096];
        let len = theirs.read(&mut call).unwrap();
        assert!(call[24..len].starts_with(br#"{"method":"ping""#));
        let pong = Frame::new(Kind::Reply, 1, br#"{"uptime_us":7}"#.to_vec());
        theirs.write_all(&pong.encode()).unwrap();
        let _ = theirs.read(&mut call).unwrap();
        theirs.write_all(&hello()).unwrap();
        theirs
    });
    assert_eq!(client.ping(LONG).unwrap().uptime_us, 7);
    let second = client.ping(LONG);
    assert!(matches!(second, Err(RuntimeError::Violation(what)) if what.contains("HELLO")));
    runtime.join().unwrap();
}
