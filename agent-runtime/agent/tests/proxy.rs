//! Programs in the guest that know nothing of the bridge.

mod common;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use common::Host;
use ratoon_scripted_model::{Fault, Turn};
use serde_json::{Value, json};

struct Proxy {
    process: Child,
    address: String,
}

impl Proxy {
    fn start(host: &Host) -> Self {
        Self::of(host.command("proxy").args(["--port", "0"]))
    }

    fn of(command: &mut Command) -> Self {
        let mut process = command.spawn().expect("ratoon-agent");
        let mut line = String::new();
        BufReader::new(process.stdout.as_mut().expect("a pipe"))
            .read_line(&mut line)
            .expect("a line");
        let address = line.trim().strip_prefix("listening on ");
        Self {
            address: address.expect("where it listens").to_owned(),
            process,
        }
    }

    /// The processes that it has started.
    fn children(&self) -> Vec<i32> {
        let pid = self.process.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        let children = children.unwrap_or_default();
        let numbers = children.split_whitespace().map(str::parse);
        numbers.map(|pid| pid.expect("a number")).collect()
    }

    fn connect(&self) -> BufReader<TcpStream> {
        let stream = TcpStream::connect(&self.address).expect("it listens");
        let patience = Some(Duration::from_secs(30));
        stream.set_read_timeout(patience).expect("a socket");
        BufReader::new(stream)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn send(stream: &mut BufReader<TcpStream>, bytes: impl AsRef<[u8]>) {
    stream.get_mut().write_all(bytes.as_ref()).expect("sent");
}

/// The status, and the body with its chunks put together.
fn answer(stream: &mut BufReader<TcpStream>) -> (u16, String) {
    let mut status = None;
    let mut length = None;
    loop {
        let mut line = String::new();
        assert!(stream.read_line(&mut line).expect("a line") > 0, "it ended");
        let line = line.trim().to_lowercase();
        if status.is_none() {
            status = line.split(' ').nth(1).and_then(|word| word.parse().ok());
        } else if let Some(value) = line.strip_prefix("content-length: ") {
            length = value.parse::<usize>().ok();
        } else if line.is_empty() {
            break;
        }
    }
    let mut body = Vec::new();
    if let Some(length) = length {
        body.resize(length, 0);
        stream.read_exact(&mut body).expect("a body");
    } else {
        loop {
            let mut line = String::new();
            stream.read_line(&mut line).expect("a size");
            let size = usize::from_str_radix(line.trim(), 16).expect("a size");
            let mut piece = vec![0; size + 2];
            stream.read_exact(&mut piece).expect("a chunk");
            if size == 0 {
                break;
            }
            body.extend_from_slice(&piece[..size]);
        }
    }
    let body = String::from_utf8(body).expect("UTF-8");
    (status.expect("a status"), body)
}

fn request(body: &Value, headers: &str) -> String {
    let body = body.to_string();
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nauthorization: Bearer none\r\n{headers}content-length: {}\r\n\r\n{body}",
        body.len()
    )
}

fn hi(stream: bool) -> Value {
    json!({"model": "m", "max_tokens": 5, "stream": stream, "messages": [{"role": "user", "content": "hi"}]})
}

#[test]
fn requests_of_one_connection_get_their_answers() {
    let host = Host::start([
        Turn::text("One."),
        Turn::text("Two.").broken(Fault::Drip {
            bytes: 11,
            pause_ms: 1,
        }),
        Turn::text("Three."),
    ]);
    let proxy = Proxy::start(&host);
    let mut stream = proxy.connect();
    // Whoever names a token gets ours all the same.
    send(
        &mut stream,
        request(&hi(false), "X-Ratoon-Token: rtn_mine\r\n"),
    );
    let (status, body) = answer(&mut stream);
    assert_eq!(status, 200, "{body}");
    let body: Value = serde_json::from_str(&body).expect("JSON");
    assert_eq!(body["choices"][0]["message"]["content"], "One.");
    send(&mut stream, request(&hi(true), ""));
    let (status, body) = answer(&mut stream);
    assert_eq!(status, 200, "{body}");
    assert!(body.contains("Two.") && body.trim_end().ends_with("data: [DONE]"));
    // A body in chunks, in small pieces.
    let body = hi(false).to_string();
    let (one, two) = body.split_at(20);
    let chunked = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{one}\r\n{:x}\r\n{two}\r\n0\r\n\r\n",
        one.len(),
        two.len()
    );
    for piece in chunked.as_bytes().chunks(9) {
        send(&mut stream, piece);
    }
    let (status, body) = answer(&mut stream);
    assert_eq!(status, 200, "{body}");
    assert!(body.contains("Three."));
    host.check();
}

#[test]
fn what_the_bridge_refuses_comes_back_as_it_says_it() {
    let host = Host::start([]);
    let proxy = Proxy::start(&host);
    let mut stream = proxy.connect();
    send(&mut stream, "GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n");
    let (status, body) = answer(&mut stream);
    assert_eq!(status, 404, "{body}");
    send(
        &mut stream,
        request(&json!({"model": "m", "messages": [], "store_it": true}), ""),
    );
    assert_eq!(answer(&mut stream).0, 400);
    assert!(host.model.seen().is_empty());
}

#[test]
fn what_is_no_http_is_refused_and_harms_nobody() {
    let host = Host::start([Turn::text("One.")]);
    let proxy = Proxy::start(&host);
    let long = format!("POST / HTTP/1.1\r\na: {}", "x".repeat(70_000));
    for bytes in [
        "hello\r\n\r\n",
        "\0\0\0\0\r\n\r\n",
        "POST / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 1\r\n\r\nx",
        "POST / HTTP/1.1\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\ntransfer-encoding: gzip\r\n\r\n",
        &long,
    ] {
        let mut stream = proxy.connect();
        send(&mut stream, bytes);
        let (status, body) = answer(&mut stream);
        assert_eq!(status, 400, "{body}");
        assert_eq!(stream.read(&mut [0; 8]).expect("the end"), 0);
    }
    // Cut off in the middle.
    let whole = request(&hi(false), "");
    for len in [3, 60, whole.len() - 3] {
        let mut stream = proxy.connect();
        send(&mut stream, &whole[..len]);
    }
    let mut stream = proxy.connect();
    send(&mut stream, &whole);
    assert_eq!(answer(&mut stream).0, 200);
}

#[test]
fn a_bridge_that_is_not_there_is_told() {
    let host = Host::start([]);
    let proxy = Proxy::start(&host);
    std::fs::remove_file(host.token_file()).expect("a file");
    let mut stream = proxy.connect();
    send(&mut stream, request(&hi(false), ""));
    assert_eq!(answer(&mut stream).0, 503);
    std::fs::write(host.token_file(), "rtn_x").expect("a file");
    let mut stream = proxy.connect();
    send(&mut stream, request(&hi(false), ""));
    assert_eq!(answer(&mut stream).0, 401, "an old token is refused");
    std::fs::remove_file(host.folder.path().join("vm.sock_1025")).expect("a socket");
    let mut stream = proxy.connect();
    send(&mut stream, request(&hi(false), ""));
    assert_eq!(answer(&mut stream).0, 502);
}

#[test]
fn a_client_that_goes_ends_its_call() {
    let mut host = Host::start([Turn::text(&"word ".repeat(2000)).broken(Fault::Drip {
        bytes: 20,
        pause_ms: 20,
    })]);
    let proxy = Proxy::start(&host);
    let mut stream = proxy.connect();
    send(&mut stream, request(&hi(true), ""));
    stream.read_exact(&mut [0; 200]).expect("it begins");
    assert_eq!(host.calls_in_flight(), 1);
    drop(stream);
    let ended = (0..250).any(|_| {
        std::thread::sleep(Duration::from_millis(20));
        host.calls_in_flight() == 0
    });
    assert!(ended, "nobody reads it, and it goes on");
}

/// One of the errors that an SDK of either vendor knows.
fn is_an_error(body: &str, kind: &str) -> bool {
    let Ok(body) = serde_json::from_str::<Value>(body) else {
        return false;
    };
    body["error"]["type"] == kind && body["error"]["message"].is_string()
}

#[test]
fn two_hundred_connections_at_once_are_each_answered_and_the_bridge_stays_small() {
    let host = Host::start([Turn::text("One.").repeated()]);
    let proxy = Proxy::start(&host);
    let whole = request(&hi(false), "");
    let mut streams: Vec<_> = (0..200).map(|_| proxy.connect()).collect();
    for stream in &mut streams {
        send(stream, &whole);
    }
    let mut answers = [0, 0];
    for stream in &mut streams {
        match answer(stream) {
            (200, _) => answers[0] += 1,
            (429, body) => {
                assert!(is_an_error(&body, "rate_limit_error"), "{body}");
                answers[1] += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(answers[0] > 0 && answers[1] > 0, "{answers:?}");
    drop(streams);
    // All have their places again.
    let mut stream = proxy.connect();
    let served = (0..100).any(|_| {
        send(&mut stream, &whole);
        let is_served = answer(&mut stream).0 == 200;
        if !is_served {
            std::thread::sleep(Duration::from_millis(100));
            stream = proxy.connect();
        }
        is_served
    });
    assert!(served, "places were lost");
    let memory = host.bridge_memory_kib();
    assert!(memory < 32 << 10, "the bridge took {memory} KiB");
    host.check();
}

#[test]
fn a_body_that_is_too_large_is_told_though_it_is_still_sent() {
    let host = Host::start([Turn::text("One.")]);
    let proxy = Proxy::start(&host);
    let len = 64 << 20;
    let head =
        format!("POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len}\r\n\r\n");
    for chunked in [false, true] {
        let mut stream = proxy.connect();
        let mut sending = stream.get_ref().try_clone().expect("a socket");
        let head = match chunked {
            false => head.clone(),
            true => head.replace(
                &format!("content-length: {len}"),
                "transfer-encoding: chunked",
            ),
        };
        let sender = std::thread::spawn(move || {
            let piece = vec![b' '; 1 << 20];
            let mut all = sending.write_all(head.as_bytes());
            for _ in 0..64 {
                if chunked {
                    all = all.and_then(|()| sending.write_all(b"100000\r\n"));
                }
                all = all.and_then(|()| sending.write_all(&piece));
                if chunked {
                    all = all.and_then(|()| sending.write_all(b"\r\n"));
                }
            }
            let _ = sending.shutdown(Shutdown::Write);
            all
        });
        let (status, body) = answer(&mut stream);
        assert_eq!(status, 413, "{body}");
        assert!(is_an_error(&body, "invalid_request_error"), "{body}");
        // Who sends everything before reading anything gets there, too.
        sender.join().expect("it ends").expect("all is taken");
    }
    let mut stream = proxy.connect();
    send(&mut stream, request(&hi(false), ""));
    assert_eq!(answer(&mut stream).0, 200);
    let memory = host.bridge_memory_kib();
    assert!(memory < 32 << 10, "the bridge took {memory} KiB");
    host.check();
}

#[test]
fn a_bridge_that_ends_a_connection_without_a_word_is_told() {
    let host = Host::start([]);
    let path = host.folder.path().join("silent");
    let listener = std::os::unix::net::UnixListener::bind(&path).expect("a socket");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let _ = stream.expect("a connection").read(&mut [0; 100]);
        }
    });
    let mut command = host.command("proxy");
    let place = format!("unix:{}", path.display());
    let proxy = Proxy::of(command.args(["--port", "0"]).env("RATOON_BRIDGE", place));
    let mut stream = proxy.connect();
    send(&mut stream, request(&hi(false), ""));
    let (status, body) = answer(&mut stream);
    assert_eq!(status, 502, "{body}");
    assert!(is_an_error(&body, "api_error"), "{body}");
}

#[test]
fn a_proxy_that_dies_is_started_again_and_goes_with_its_keeper() {
    let host = Host::start([Turn::text("One.").repeated()]);
    let mut proxy = Proxy::of(host.command("proxy").args(["--keep", "--port", "0"]));
    let ask = |proxy: &Proxy| {
        let mut stream = proxy.connect();
        send(&mut stream, request(&hi(false), ""));
        answer(&mut stream).0
    };
    assert_eq!(ask(&proxy), 200);
    let kill = |pid: i32| {
        let pid = rustix::process::Pid::from_raw(pid).expect("a pid");
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("it is ours");
    };
    for _ in 0..2 {
        let [child] = proxy.children()[..] else {
            panic!("{:?}", proxy.children());
        };
        kill(child);
        // One that is dying may still take a connection with it.
        let until = Instant::now() + Duration::from_secs(10);
        while proxy.children().contains(&child) {
            assert!(Instant::now() < until, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
        // Who comes while there is none waits: the second time there is a pause.
        assert_eq!(ask(&proxy), 200);
        assert_ne!(proxy.children(), [child]);
    }
    let [child] = proxy.children()[..] else {
        panic!("{:?}", proxy.children());
    };
    proxy.process.kill().expect("it is ours");
    proxy.process.wait().expect("it ends");
    let until = Instant::now() + Duration::from_secs(10);
    while std::fs::metadata(format!("/proc/{child}")).is_ok() {
        assert!(Instant::now() < until, "the proxy outlives its keeper");
        std::thread::sleep(Duration::from_millis(10));
    }
}
