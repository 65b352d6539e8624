//! The socket device in a real guest: bulk either way, round trips, and what a command's streams
//! make of it.
//!
//! *Raw*: a program in the guest connects to a port of the host; one side writes, the other reads,
//! in pieces of 64 KiB; the clock is the host's. *Runtime*: a ping is the shortest thing that the
//! runtime can be asked; a command's output passes a pipe, the runtime and the protocol on its way.

use std::io::{self, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ratoon_engine::runtime::{CallIo, RuntimeClient};
use ratoon_protocol::{Call, FileRead, FileWrite, Transferred};

use super::exec::counters;
use super::raw::{self, Haul, Load};
use super::{Plan, exec, series, verdict};
use crate::machine::{Ratoon, Shape, accept, go_on};
use crate::samples::{Readiness, Samples, percentile};

const NAME: &str = "vsock";
const PORT: u32 = 5000;
const FILE_TARGET_PERCENT: f64 = 80.0;

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
    let load = Load {
        bytes: mib << 20,
        turns,
        trips,
    };
    let connect = format!("socket.socket(socket.AF_VSOCK), (2, {PORT})");
    raw::run(NAME, &vm, &mut client, samples, load, &connect, || {
        accept(&listener)
    })?;
    for turn in plan.budget.rounds(turns) {
        go_on()?;
        output(&vm, &mut client, samples, mib << 20, turn)?;
        files(&vm, &mut client, samples, mib << 20, turn)?;
    }
    local_files(&mut client, samples, mib << 20, turns)?;
    note(samples);
    vm.stop()?;
    Ok(())
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
    vm: &Ratoon,
    client: &mut RuntimeClient,
    samples: &mut Samples,
    bytes: usize,
    turn: usize,
) -> Result<()> {
    let instructions = counters(&vm.metrics()?)[0];
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
    samples.add(&stream, turn, after_first / seconds)?;
    if let (Some(before), Some(after)) = (instructions, counters(&vm.metrics()?)[0]) {
        let what = "command output: guest-kernel instructions, start and all";
        let cost = series(NAME, "ratoon", what, "/MiB", Readiness::None);
        let mib = bytes as f64 / (1 << 20) as f64;
        samples.add(&cost, turn, after.saturating_sub(before) as f64 / mib)?;
    }
    Ok(())
}

/// A file in and out again, on the guest's tmpfs: the transfer's cost, not the disk's.
fn files(
    vm: &Ratoon,
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
        let haul = Haul::begin(NAME, vm)?;
        let moved: Transferred = client.run(
            &call,
            &mut CallIo {
                stdin: Some(file.as_fd()),
                stdout: &mut meter,
                stderr: &mut io::sink(),
                data: &mut io::sink(),
                events: &mut |_| {},
                ended: &mut |_| {},
            },
        )?;
        if moved.bytes != bytes as u64 || !matches!(meter.bytes, n if n == 0 || n == bytes) {
            bail!("{metric}: {} of {bytes} bytes", moved.bytes);
        }
        haul.end(samples, metric, bytes, turn)?;
    }
    Ok(())
}

/// In the guest: writes and reads a file as the runtime does, in pieces of 64 KiB; prints seconds.
const LOCAL: &str = r#"
import os, sys, time
n, turns = map(int, sys.argv[1:3])
piece = bytearray(65536)
for _ in range(turns):
    fd = os.open("/dev/shm/ratoon-bench.new", os.O_RDWR | os.O_CREAT)
    start = time.monotonic()
    for _ in range(n // len(piece)): os.write(fd, piece)
    os.rename("/dev/shm/ratoon-bench.new", "/dev/shm/ratoon-bench")
    print("local file write", time.monotonic() - start, sep="\t")
    os.lseek(fd, 0, 0)
    start = time.monotonic()
    while os.readv(fd, [piece]): pass
    print("local file read", time.monotonic() - start, sep="\t")
    os.close(fd)
"#;

fn local_files(
    client: &mut RuntimeClient,
    samples: &mut Samples,
    bytes: usize,
    turns: usize,
) -> Result<()> {
    go_on()?;
    let mut printed = Vec::new();
    let [bytes_word, turns] = [bytes, turns].map(|n| n.to_string());
    exec(
        client,
        &["python3", "-c", LOCAL, &bytes_word, &turns],
        &mut printed,
    )?;
    let printed = String::from_utf8(printed).context("what the guest's program prints")?;
    for (index, line) in printed.lines().enumerate() {
        let (name, seconds) = line.split_once('\t').context("name and seconds")?;
        let mib = bytes as f64 / (1 << 20) as f64;
        let rate = series(NAME, "guest", name, "MiB/s", Readiness::None);
        samples.add(&rate, index / 2, mib / seconds.parse::<f64>()?)?;
    }
    Ok(())
}

/// Holds files against what they are made of: the way through vsock, and the file itself.
fn note(samples: &mut Samples) {
    let p50 = |samples: &Samples, system, metric| percentile(samples.of(NAME, system, metric), 50);
    for (file, raw, local) in [
        ("file upload", raw::TO_GUEST, "local file write"),
        ("file download", raw::TO_HOST, "local file read"),
    ] {
        let rates = (
            p50(samples, "ratoon", file),
            p50(samples, "ratoon", raw),
            p50(samples, "guest", local),
        );
        let (Some(rate), Some(way), Some(local_rate)) = rates else {
            continue;
        };
        let share = rate / way * 100.0;
        let both = 1.0 / (1.0 / way + 1.0 / local_rate);
        let of_both = rate / both * 100.0;
        let met = verdict(share >= FILE_TARGET_PERCENT);
        samples.note(format!(
            "{file}: {share:.0} % of {raw} (p50), target {FILE_TARGET_PERCENT} %: {met}; \
             {of_both:.0} % of {raw} and {local} one after the other"
        ));
    }
}
