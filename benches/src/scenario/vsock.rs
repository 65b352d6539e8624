//! The socket device in a real guest: bulk either way, round trips, and what a command's streams
//! make of it.
//!
//! *Raw*: a program in the guest connects to a port of the host; one side writes, the other reads,
//! in pieces of 64 KiB; the clock is the host's. *Runtime*: a ping is the shortest thing that the
//! runtime can be asked; a command's output passes a pipe, the runtime and the protocol on its way.

use std::io::{self, Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ratoon_engine::runtime::{CallIo, RuntimeClient};
use ratoon_protocol::{Call, FileRead, FileWrite, Transferred};

use super::{Plan, exec, series, verdict};
use crate::machine::{Ratoon, Shape, accept, go_on};
use crate::samples::{Readiness, Samples, percentile};

const NAME: &str = "vsock";
const PORT: u32 = 5000;
const PIECE: usize = 64 * 1024;
const FILE_TARGET_PERCENT: f64 = 80.0;

/// In the guest: sends and takes `n` bytes a turn, then gives single bytes back.
const PROGRAM: &str = r#"
import socket, sys
n, turns, trips = map(int, sys.argv[1:4])
s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
s.connect((2, 5000))
piece = bytearray(65536)
for _ in range(turns):
    s.recv(1)
    for _ in range(n // len(piece)): s.sendall(piece)
    left = n
    while left: left -= s.recv_into(piece, min(left, len(piece)))
    s.sendall(b"d")
for _ in range(trips): s.sendall(s.recv(1))
"#;

/// Runs it.
///
/// # Errors
/// When the guest does not come up or its program fails.
pub fn run(plan: &Plan<'_>, samples: &mut Samples) -> Result<()> {
    let turns = plan.rounds(5, 2);
    let (mib, trips) = if plan.quick { (2, 20) } else { (8, 100) };
    let mut vm = Ratoon::spawn(plan.parts, &Shape::of(256))?;
    let listener = UnixListener::bind(format!("{}_{PORT}", vm.vsock().display()))?;
    let mut client = vm.ready(false)?.client;

    let ping = series(NAME, "ratoon", "runtime ping", "ms", Readiness::None);
    for trip in 0..trips {
        go_on()?;
        let from = Instant::now();
        client.ping(Duration::from_secs(60))?;
        samples.add(&ping, trip, from.elapsed().as_secs_f64() * 1e3)?;
    }
    raw(&mut client, &listener, samples, mib << 20, turns, trips)?;
    for turn in 0..turns {
        go_on()?;
        output(&mut client, samples, mib << 20, turn)?;
        files(&mut client, samples, mib << 20, turn)?;
    }
    for (file, raw) in [
        ("file upload", "raw host to guest"),
        ("file download", "raw guest to host"),
    ] {
        let p50 = |metric| percentile(samples.of(NAME, "ratoon", metric), 50);
        if let (Some(file_rate), Some(raw_rate)) = (p50(file), p50(raw)) {
            let share = file_rate / raw_rate * 100.0;
            let met = verdict(share >= FILE_TARGET_PERCENT);
            samples.note(format!(
                "{file}: {share:.0} % of {raw} (p50), target {FILE_TARGET_PERCENT} %: {met}"
            ));
        }
    }
    vm.stop()?;
    Ok(())
}

fn raw(
    client: &mut RuntimeClient,
    listener: &UnixListener,
    samples: &mut Samples,
    bytes: usize,
    turns: usize,
    trips: usize,
) -> Result<()> {
    let numbers = [bytes, turns, trips].map(|n| n.to_string());
    let argv = [
        "python3",
        "-c",
        PROGRAM,
        &numbers[0],
        &numbers[1],
        &numbers[2],
    ];
    std::thread::scope(|scope| {
        let ours = scope.spawn(|| -> Result<()> {
            let mut stream = accept(listener)?;
            for turn in 0..turns {
                go_on()?;
                bulk(&mut stream, samples, bytes, turn)?;
            }
            let trip_time = series(
                NAME,
                "ratoon",
                "raw round trip, 1 byte",
                "ms",
                Readiness::None,
            );
            for trip in 0..trips {
                go_on()?;
                let from = Instant::now();
                stream.write_all(b"p")?;
                stream.read_exact(&mut [0])?;
                samples.add(&trip_time, trip, from.elapsed().as_secs_f64() * 1e3)?;
            }
            Ok(())
        });
        let theirs = exec(client, &argv, &mut io::sink());
        match ours.join() {
            // The guest's own words explain ours.
            Ok(ours) => theirs.and(ours),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

fn bulk(stream: &mut UnixStream, samples: &mut Samples, bytes: usize, turn: usize) -> Result<()> {
    let rate = |from: Instant| bytes as f64 / (1 << 20) as f64 / from.elapsed().as_secs_f64();
    let mut piece = vec![0; PIECE];
    let from = Instant::now();
    stream.write_all(b"g")?;
    let mut left = bytes;
    while left > 0 {
        let most = left.min(PIECE);
        let len = stream.read(&mut piece[..most])?;
        if len == 0 {
            bail!("the guest closed its connection");
        }
        left -= len;
    }
    let to_host = series(
        NAME,
        "ratoon",
        "raw guest to host",
        "MiB/s",
        Readiness::None,
    );
    samples.add(&to_host, turn, rate(from))?;
    let from = Instant::now();
    for _ in 0..bytes / PIECE {
        stream.write_all(&piece)?;
    }
    stream
        .read_exact(&mut [0])
        .context("the guest's word that it has all")?;
    let to_guest = series(
        NAME,
        "ratoon",
        "raw host to guest",
        "MiB/s",
        Readiness::None,
    );
    samples.add(&to_guest, turn, rate(from))
}

/// Counts bytes from the first that comes to the last.
#[derive(Default)]
struct Meter {
    first: Option<Instant>,
    last: Option<Instant>,
    bytes: usize,
    first_bytes: usize,
}

impl Write for Meter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let now = Instant::now();
        if self.first.is_none() {
            self.first = Some(now);
            self.first_bytes = bytes.len();
        }
        self.last = Some(now);
        self.bytes += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn output(
    client: &mut RuntimeClient,
    samples: &mut Samples,
    bytes: usize,
    turn: usize,
) -> Result<()> {
    let mut meter = Meter::default();
    exec(
        client,
        &["head", "-c", &bytes.to_string(), "/dev/zero"],
        &mut meter,
    )?;
    let (Some(first), Some(last)) = (meter.first, meter.last) else {
        bail!("`head` put out nothing");
    };
    if meter.bytes != bytes {
        bail!("{} of {bytes} bytes of output came", meter.bytes);
    }
    let after_first = (meter.bytes - meter.first_bytes) as f64 / (1 << 20) as f64;
    let seconds = (last - first).as_secs_f64().max(1e-9);
    let stream = series(NAME, "ratoon", "command output", "MiB/s", Readiness::None);
    samples.add(&stream, turn, after_first / seconds)
}

/// A file in and out again, on the guest's tmpfs: the transfer's cost, not the disk's.
fn files(
    client: &mut RuntimeClient,
    samples: &mut Samples,
    bytes: usize,
    turn: usize,
) -> Result<()> {
    const PATH: &str = "/dev/shm/ratoon-bench";
    let mut file = tempfile::tempfile()?;
    file.set_len(bytes as u64)?;
    let write = Call::FileWrite(FileWrite {
        path: PATH.into(),
        ..FileWrite::default()
    });
    let read = Call::FileRead(FileRead {
        path: PATH.into(),
        ..FileRead::default()
    });
    for (metric, call) in [("file upload", write), ("file download", read)] {
        file.rewind()?;
        let mut meter = Meter::default();
        let from = Instant::now();
        let moved: Transferred = client.run(
            &call,
            &mut CallIo {
                stdin: Some(file.as_fd()),
                stdout: &mut meter,
                stderr: &mut io::sink(),
                data: &mut io::sink(),
                events: &mut |_| {},
            },
        )?;
        let rate = bytes as f64 / (1 << 20) as f64 / from.elapsed().as_secs_f64();
        if moved.bytes != bytes as u64 || !matches!(meter.bytes, n if n == 0 || n == bytes) {
            bail!("{metric}: {} of {bytes} bytes", moved.bytes);
        }
        let rates = series(NAME, "ratoon", metric, "MiB/s", Readiness::None);
        samples.add(&rates, turn, rate)?;
    }
    Ok(())
}
