//! A runtime that serves on a Unix socket, and what the tests need around it.
#![allow(dead_code, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ratoon_client::RuntimeError;
use ratoon_client::blocking::{Client as RuntimeClient, ExecIo};
use ratoon_protocol::{Decoder, ExecParams, ExitStatus, Frame, Kind};

/// Long enough for a busy machine, short enough to end a test that would hang.
pub const LONG: Duration = Duration::from_secs(30);

/// The runtime, as a process that serves on a socket; killed when dropped.
pub struct Runtime {
    process: Child,
    dir: tempfile::TempDir,
}

impl Runtime {
    pub fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let process = Command::new(env!("CARGO_BIN_EXE_ratoon-runtime"))
            .arg("--serve-unix")
            .arg(dir.path().join("socket"))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let runtime = Self { process, dir };
        let start = Instant::now();
        while UnixStream::connect(runtime.socket()).is_err() {
            assert!(start.elapsed() < LONG, "the runtime does not listen");
            std::thread::sleep(Duration::from_millis(2));
        }
        runtime
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    pub fn stream(&self) -> UnixStream {
        let stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream
    }

    pub fn client(&self) -> RuntimeClient {
        RuntimeClient::from_stream(self.stream(), LONG).unwrap()
    }

    pub fn raw(&self) -> Raw {
        let mut raw = Raw {
            stream: self.stream(),
            decoder: Decoder::new(),
        };
        assert_eq!(raw.frame().unwrap().kind, Kind::Hello);
        raw
    }

    /// Waits for the runtime's own end.
    pub fn wait(&mut self) -> std::process::ExitStatus {
        self.process.wait().unwrap()
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A client that may say anything.
pub struct Raw {
    pub stream: UnixStream,
    decoder: Decoder,
}

impl Raw {
    pub fn send(&mut self, frame: &Frame) {
        self.stream.write_all(&frame.encode()).unwrap();
    }

    pub fn call(&mut self, id: u64, json: &str) {
        self.send(&Frame::new(Kind::Call, id, json.into()));
    }

    /// The next frame, `None` when the runtime has closed.
    pub fn frame(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                return Some(frame);
            }
            let mut bytes = [0; 65536];
            match self.stream.read(&mut bytes) {
                Ok(0) => return None,
                Ok(len) => self.decoder.feed(&bytes[..len]),
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// Skips to the frame of this kind for this call.
    pub fn frame_of(&mut self, kind: Kind, call: u64) -> Frame {
        loop {
            let frame = self.frame().expect("the runtime closed");
            if frame.kind == kind && frame.call == call {
                return frame;
            }
        }
    }
}

pub fn command(argv: &[&str]) -> ExecParams {
    ExecParams {
        argv: argv.iter().map(|&arg| arg.into()).collect(),
        ..ExecParams::default()
    }
}

pub fn sh(script: &str) -> ExecParams {
    command(&["sh", "-c", script])
}

#[derive(Debug, PartialEq, Eq)]
pub struct Ran {
    pub status: ExitStatus,
    pub out: String,
    pub err: String,
}

pub fn run(client: &mut RuntimeClient, params: &ExecParams) -> Result<Ran, RuntimeError> {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let io = ExecIo {
        stdin: None,
        stdout: &mut out,
        stderr: &mut err,
    };
    let status = client.exec(params, io)?;
    Ok(Ran {
        status: status.status,
        out: String::from_utf8(out).unwrap(),
        err: String::from_utf8(err).unwrap(),
    })
}

/// Runs with this descriptor as input; returns status and output.
pub fn run_with(
    client: &mut RuntimeClient,
    params: &ExecParams,
    stdin: &impl AsFd,
) -> (ExitStatus, Vec<u8>) {
    let mut out = Vec::new();
    let io = ExecIo {
        stdin: Some(stdin.as_fd()),
        stdout: &mut out,
        stderr: &mut std::io::sink(),
    };
    let status = client.exec(params, io).unwrap();
    (status.status, out)
}

/// Polls until `what` holds.
pub fn until(what: &str, holds: impl Fn() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < LONG, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Whether a process exists and is no zombie.
pub fn is_alive(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or("").starts_with(" Z"))
}
