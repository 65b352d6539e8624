//! What the bridge costs: `cargo run --release -p ratoon-bridge --example overhead -- PATH-OF-ratoon-bridge`
//!
//! A loopback model answers at once. Each round asks it by way of the bridge and directly, by turns;
//! then 20 streams run side by side. Prints medians, 99th percentiles and the bridge's peak memory.

use std::io::{BufRead as _, BufReader, Read as _, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ratoon_bridge_api::amount::Limits;
use ratoon_bridge_api::control::{AddVm, Client, MintToken, Reply, Request};
use ratoon_scripted_model::{Fault, Script, Server, Turn};

const ROUNDS: usize = 500;
const STREAMS: usize = 20;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let program = std::env::args()
        .nth(1)
        .ok_or("give the path of ratoon-bridge")?;
    let slow = Turn::text(&"word ".repeat(100)).broken(Fault::Drip {
        bytes: 200,
        pause_ms: 20,
    });
    let model = Server::start(Script::new([
        slow.repeated().when("slowly"),
        Turn::text("ok").repeated(),
    ]))?;
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name);
    let config = serde_json::json!({
        "records": path("runs"),
        "limits": {"vm_requests_a_minute": 1_000_000, "vm_calls": STREAMS},
        "providers": [{"name": "p", "base_url": model.url(), "key": "none", "wires": ["chat"],
                       "models": [{"id": "m", "max_output_tokens": 100}]}],
    });
    std::fs::write(path("config"), config.to_string())?;
    let mut process = Command::new(program)
        .args(["serve", "--lifeline", "--config"])
        .arg(path("config"))
        .arg("--control")
        .arg(path("control"))
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    while !path("control").exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(50));
    let mut control = Client::connect(&path("control"), Duration::from_secs(5))?;
    let socket = path("vm.sock");
    control.call(&Request::AddVm(AddVm {
        vm: "vm".into(),
        socket: socket.clone(),
        run: "run".into(),
        branch: "main".into(),
        parent: None,
        budget: Limits {
            calls: Some(1_000_000),
            ..Limits::default()
        },
        models: None,
    }))?;
    let mint = MintToken {
        vm: "vm".into(),
        ttl_s: 3600,
        revoke_older: false,
    };
    let Reply::Token { token, .. } = control.call(&Request::MintToken(mint))? else {
        return Err("no token".into());
    };
    let address = model.url().trim_start_matches("http://").to_owned();
    for stream in [false, true] {
        let mut bridged = UnixStream::connect(&socket)?;
        let mut direct = std::net::TcpStream::connect(&address)?;
        direct.set_nodelay(true)?;
        let (mut with, mut without) = (Vec::new(), Vec::new());
        let mut bridge_reader = BufReader::new(bridged.try_clone()?);
        let mut direct_reader = BufReader::new(direct.try_clone()?);
        for _ in 0..ROUNDS {
            with.push(ask(
                &mut bridged,
                &mut bridge_reader,
                &token.0,
                stream,
                "hi",
            )?);
            without.push(ask(
                &mut direct,
                &mut direct_reader,
                &token.0,
                stream,
                "hi",
            )?);
        }
        with.sort();
        without.sort();
        let at = |times: &[Duration], percent: usize| times[times.len() * percent / 100];
        println!(
            "{}: p50 {:?} by the bridge, {:?} without; p99 {:?}, {:?}",
            if stream {
                "first byte of a stream"
            } else {
                "whole request"
            },
            at(&with, 50),
            at(&without, 50),
            at(&with, 99),
            at(&without, 99),
        );
    }
    std::thread::scope(|scope| {
        for _ in 0..STREAMS {
            scope.spawn(|| {
                let mut stream = UnixStream::connect(&socket).ok()?;
                let mut reader = BufReader::new(stream.try_clone().ok()?);
                ask(&mut stream, &mut reader, &token.0, true, "slowly").ok()
            });
        }
    });
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.id()))?;
    for line in status.lines().filter(|line| line.starts_with("VmHWM")) {
        println!(
            "{STREAMS} streams at once: peak memory {}",
            &line[6..].trim()
        );
    }
    drop(process.stdin.take());
    process.wait()?;
    Ok(())
}

/// Asks; gives the time until the first byte of the body of a stream, or the last of a document.
fn ask(
    stream: &mut impl Write,
    reader: &mut BufReader<impl std::io::Read>,
    token: &str,
    streamed: bool,
    words: &str,
) -> Result<Duration, Failure> {
    let body = format!(
        "{{\"model\":\"m\",\"max_tokens\":100,\"stream\":{streamed},\"stream_options\":{{\"include_usage\":true}},\"messages\":[{{\"role\":\"user\",\"content\":\"{words}\"}}]}}"
    );
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\nx-ratoon-token: {token}\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let since = Instant::now();
    stream.write_all(request.as_bytes())?;
    let mut line = String::new();
    while reader.read_line(&mut line)? > 2 {
        line.clear();
    }
    let mut first = None;
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        let len = usize::from_str_radix(line.trim_end(), 16)?;
        let mut piece = vec![0; len + 2];
        reader.read_exact(&mut piece)?;
        first.get_or_insert_with(|| since.elapsed());
        if len == 0 {
            let whole = since.elapsed();
            return Ok(first.filter(|_| streamed).unwrap_or(whole));
        }
    }
}
