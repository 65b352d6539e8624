//! The async client against runtimes that are played here: what they say is up to each test.

use ratoon_protocol::{
    Decoder, ErrorCode, ExecParams, FileList, FileRead, Frame, FreezeParams, Kind, STREAM_WINDOW,
};
use std::time::UNIX_EPOCH;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

const SHORT: Duration = Duration::from_millis(50);
const LONG: Duration = Duration::from_secs(10);

/// The end of a connection that a runtime has.
struct Peer {
    stream: UnixStream,
    decoder: Decoder,
}

impl Peer {
    async fn say(&mut self, frame: Frame) {
        self.stream.write_all(&frame.encode()).await.unwrap();
    }

    async fn json(&mut self, kind: Kind, call: u64, text: &str) {
        self.say(Frame::new(kind, call, text.into())).await;
    }

    async fn hear(&mut self) -> Frame {
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                return frame;
            }
            let mut bytes = [0; 4096];
            let len = self.stream.read(&mut bytes).await.unwrap();
            assert!(len > 0, "the client has closed");
            self.decoder.feed(&bytes[..len]);
        }
    }

    async fn hear_call(&mut self) -> (u64, serde_json::Value) {
        let frame = self.hear().await;
        assert_eq!(frame.kind, Kind::Call);
        (frame.call, serde_json::from_slice(&frame.payload).unwrap())
    }
}

async fn greeted() -> (Client, Peer) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut peer = Peer {
        stream: theirs,
        decoder: Decoder::new(),
    };
    peer.json(Kind::Hello, 0, r#"{"runtime":"0","methods":[]}"#)
        .await;
    (Client::from_stream(ours, LONG).await.unwrap(), peer)
}

fn output(call: u64, offset: u64, bytes: &[u8], end: bool) -> Frame {
    Frame {
        kind: Kind::Stdout,
        call,
        offset,
        end,
        payload: bytes.to_vec(),
    }
}

fn exec() -> Call {
    Call::Exec(Box::new(ExecParams {
        argv: vec!["x".into()],
        ..ExecParams::default()
    }))
}

#[tokio::test]
async fn silence_instead_of_hello_is_a_timeout() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let result = Client::from_stream(ours, SHORT).await.map(|_| ());
    assert!(
        matches!(result, Err(RuntimeError::Timeout { what: "said HELLO", within }) if within == SHORT)
    );
}

#[tokio::test]
async fn an_output_that_breaks_off_is_not_taken_for_the_whole() {
    let (client, mut peer) = greeted().await;
    let mut failed = client.begin(exec()).await.unwrap();
    let mut lost = client.begin(exec()).await.unwrap();
    let mut bytes = Vec::new();
    for call in [1, 2] {
        peer.say(output(call, 0, b"half", false)).await;
    }
    let no = r#"{"code":"no_space","message":"full"}"#;
    peer.json(Kind::Error, 1, no).await;
    let cut = failed.stdout.read_to_end(&mut bytes).await.unwrap_err();
    assert_eq!(bytes, b"half");
    let inner = cut.into_inner().unwrap();
    let cut = inner.downcast_ref::<RuntimeError>();
    assert!(matches!(cut, Some(RuntimeError::CutShort)));
    let why = failed.result::<()>().await;
    assert!(matches!(why, Err(RuntimeError::Call(error)) if error.code == ErrorCode::NoSpace));
    drop(peer);
    assert!(lost.stdout.read_to_end(&mut bytes).await.is_err());
    assert!(matches!(
        lost.result::<()>().await,
        Err(RuntimeError::Closed)
    ));
    assert!(matches!(client.ping().await, Err(RuntimeError::Broken)));
}

#[tokio::test]
async fn an_output_may_end_while_its_call_goes_on() {
    let (client, mut peer) = greeted().await;
    let mut running = client.begin(exec()).await.unwrap();
    peer.say(output(1, 0, b"all", true)).await;
    let mut bytes = Vec::new();
    running.stdout.read_to_end(&mut bytes).await.unwrap();
    assert_eq!(bytes, b"all");
    peer.json(Kind::Reply, 1, "7").await;
    assert_eq!(running.result::<u32>().await.unwrap(), 7);
}

#[tokio::test]
async fn what_is_not_read_is_not_acknowledged_and_what_is_dropped_is_stopped() {
    let (client, mut peer) = greeted().await;
    let mut running = client.begin(exec()).await.unwrap();
    peer.hear_call().await;
    let half = STREAM_WINDOW / 2;
    for part in 0..4 {
        let piece = vec![0; 64 * 1024];
        peer.say(output(1, part * piece.len() as u64, &piece, false))
            .await;
    }
    let mut bytes = vec![0; half as usize];
    running.stdout.read_exact(&mut bytes).await.unwrap();
    let ack = Frame::ack(1, Kind::Stdout, half);
    assert_eq!(peer.hear().await, ack);
    drop(running.stdout);
    let stop = peer.hear().await;
    assert_eq!(
        (stop.kind, stop.acked_stream(), stop.end),
        (Kind::Ack, Some(Kind::Stdout), true)
    );
}

#[tokio::test]
async fn a_lie_ends_the_connection_by_name() {
    let (client, mut peer) = greeted().await;
    let running = client.begin(exec()).await.unwrap();
    peer.say(output(1, 5, b"x", false)).await;
    match running.result::<()>().await {
        Err(RuntimeError::Violation(what)) => {
            assert_eq!(what, "call 1: Stdout goes on at 0, not at 5");
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(client.ping().await, Err(RuntimeError::Broken)));
}

#[tokio::test]
async fn an_endless_line_is_refused() {
    let (client, mut peer) = greeted().await;
    let list = client.list(FileList::default(), 9);
    let flood = async {
        peer.hear_call().await;
        for part in 0..3 {
            let piece = vec![b' '; 64 * 1024];
            let frame = output(1, part * piece.len() as u64, &piece, false);
            peer.say(frame).await;
        }
    };
    let (listed, ()) = tokio::join!(list, flood);
    match listed {
        Err(RuntimeError::Violation(what)) => assert_eq!(what, "a line of more than 131072 bytes"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_file_longer_than_the_limit_is_refused() {
    let (client, mut peer) = greeted().await;
    let answer = async {
        let (call, asked) = peer.hear_call().await;
        let path = "/f".into();
        let params = FileRead {
            path,
            length: Some(4),
            ..FileRead::default()
        };
        assert_eq!(asked["params"], serde_json::to_value(params).unwrap());
        peer.say(output(call, 0, b"four", true)).await;
        peer.json(Kind::Reply, call, r#"{"bytes":4}"#).await;
    };
    let (read, ()) = tokio::join!(client.read_to_vec("/f", 3), answer);
    let limited = matches!(read, Err(RuntimeError::OverLimit { limit: 3, .. }));
    assert!(limited, "{read:?}");
}

#[tokio::test]
async fn calls_about_the_machine_say_what_they_mean() {
    let (client, mut peer) = greeted().await;
    let runtime = tokio::spawn(async move {
        let mut heard = Vec::new();
        for _ in 0..7 {
            let (call, asked) = peer.hear_call().await;
            heard.push(asked.to_string());
            peer.json(Kind::Reply, call, "null").await;
        }
        heard
    });
    client.add_entropy(&[1, 0xab]).await.unwrap();
    client.set_hostname("h").await.unwrap();
    let time = UNIX_EPOCH + Duration::from_millis(5);
    client.set_time(time).await.unwrap();
    let what = FreezeParams {
        processes: true,
        file_systems: false,
        ..FreezeParams::default()
    };
    client.freeze(what).await.unwrap();
    client.thaw(what).await.unwrap();
    client.expect_wake().await.unwrap();
    client.sync().await.unwrap();
    let processes = r#"{"file_systems":false,"processes":true,"until_wake":false}"#;
    assert_eq!(
        runtime.await.unwrap(),
        [
            r#"{"method":"entropy.add","params":{"hex":"01ab"}}"#.to_owned(),
            r#"{"method":"hostname.set","params":{"hostname":"h"}}"#.to_owned(),
            r#"{"method":"time.set","params":{"time_us":5000}}"#.to_owned(),
            format!(r#"{{"method":"freeze","params":{processes}}}"#),
            format!(r#"{{"method":"thaw","params":{processes}}}"#),
            r#"{"method":"expect_wake"}"#.to_owned(),
            r#"{"method":"sync"}"#.to_owned(),
        ]
    );
}

#[tokio::test]
async fn a_session_that_nobody_takes_up_ends_in_time() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut peer = Peer {
        stream: theirs,
        decoder: Decoder::new(),
    };
    peer.json(Kind::Hello, 0, r#"{"runtime":"0","methods":[]}"#)
        .await;
    let mut first = Some(ours);
    let dial = move || {
        let stream = first.take().ok_or(RuntimeError::Closed);
        std::future::ready(stream)
    };
    let client = Client::resumable(dial, LONG, SHORT).await.unwrap();
    drop(peer);
    let late = client.ping().await;
    assert!(
        matches!(late, Err(RuntimeError::Timeout { what: "taken the session up again", within }) if within == SHORT),
        "{late:?}"
    );
}

#[tokio::test]
async fn lost_connections_do_not_add_to_what_a_slow_reader_holds() {
    let (dialled, mut peers) = mpsc::unbounded_channel();
    let dial = move || {
        let (ours, theirs) = UnixStream::pair().unwrap();
        dialled.send(theirs).unwrap();
        std::future::ready(Ok(ours))
    };
    let hello = r#"{"runtime":"0","methods":[]}"#;
    let runtime = tokio::spawn(async move {
        let mut asked_from = Vec::new();
        for round in 0..3 {
            let mut peer = Peer {
                stream: peers.recv().await.unwrap(),
                decoder: Decoder::new(),
            };
            peer.json(Kind::Hello, 0, hello).await;
            let (naming, asked) = peer.hear_call().await;
            asked_from.push(asked["params"]["have"][0]["outputs"][0].as_u64());
            let known = r#"{"resumed":true,"calls":[{"call":2}]}"#;
            let reply = [r#"{"resumed":false}"#, known, known][round];
            peer.json(Kind::Reply, naming, reply).await;
            if round == 0 {
                peer.hear_call().await;
            }
            for part in 0..4 {
                let piece = vec![b'x'; 64 * 1024];
                peer.say(output(2, part * piece.len() as u64, &piece, false))
                    .await;
            }
            if round == 2 {
                // The reader has taken it all by now, or will: that is acknowledged here too.
                while peer.hear().await.offset < STREAM_WINDOW {}
                peer.say(output(2, STREAM_WINDOW, b"end", true)).await;
                peer.json(Kind::Reply, 2, "1").await;
            }
        }
        asked_from
    });
    let client = Client::resumable(dial, LONG, LONG).await.unwrap();
    let mut running = client.begin(exec()).await.unwrap();
    let mut bytes = vec![0; STREAM_WINDOW as usize];
    // Nothing is read until the last round: each is told that we have nothing.
    tokio::time::sleep(SHORT * 4).await;
    running.stdout.read_exact(&mut bytes).await.unwrap();
    let mut rest = Vec::new();
    running.stdout.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest, b"end");
    assert_eq!(running.result::<u32>().await.unwrap(), 1);
    assert_eq!(runtime.await.unwrap(), [None, Some(0), Some(0)]);
}
