//! Bytes between a program in the guest and the host, over whatever stream joins them: bulk either way in
//! pieces of 64 KiB, and round trips of one byte. The clock is the host's.
//!
//! It fails when the guest's program does; its own words then explain ours.

use std::io::{self, Read, Write};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use ratoon_engine::runtime::RuntimeClient;

use super::exec::counters;
use super::{exec, series};
use crate::machine::{Ratoon, go_on};
use crate::samples::{Readiness, Samples};

/// The metric of bulk from the guest.
pub const TO_HOST: &str = "raw guest to host";
/// The metric of bulk to the guest.
pub const TO_GUEST: &str = "raw host to guest";
const PIECE: usize = 64 * 1024;

/// In the guest, with a socket and an address in place of CONNECT: sends and takes `n` bytes a turn, then
/// gives single bytes back.
const PROGRAM: &str = r#"
import socket, sys
n, turns, trips = map(int, sys.argv[1:4])
s, address = CONNECT
s.connect(address)
if s.family == socket.AF_INET: s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
piece = bytearray(65536)
for _ in range(turns):
    s.recv(1)
    for _ in range(n // len(piece)): s.sendall(piece)
    left = n
    while left: left -= s.recv_into(piece, min(left, len(piece)))
    s.sendall(b"d")
for _ in range(trips): s.sendall(s.recv(1))
"#;

/// How much is moved.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Each way in a turn; a multiple of 64 KiB.
    pub bytes: usize,
    /// Turns.
    pub turns: usize,
    /// Round trips after them.
    pub trips: usize,
}

/// Moves it. `connect` is Python: a socket, and the address of who `accept`s.
///
/// # Errors
/// When the guest's program fails, or does not connect.
pub fn run<S: Read + Write>(
    scenario: &'static str,
    vm: &Ratoon,
    client: &mut RuntimeClient,
    samples: &mut Samples,
    load: Load,
    connect: &str,
    accept: impl FnOnce() -> Result<S> + Send,
) -> Result<()> {
    let program = PROGRAM.replace("CONNECT", connect);
    let numbers = [load.bytes, load.turns, load.trips].map(|n| n.to_string());
    let argv = [
        "python3",
        "-c",
        &program,
        &numbers[0],
        &numbers[1],
        &numbers[2],
    ];
    std::thread::scope(|scope| {
        let ours = scope.spawn(|| -> Result<()> {
            let mut stream = accept()?;
            for turn in 0..load.turns {
                go_on()?;
                bulk(scenario, vm, &mut stream, samples, load.bytes, turn)?;
            }
            let trip_time = series(
                scenario,
                "ratoon",
                "raw round trip, 1 byte",
                "ms",
                Readiness::None,
            );
            for trip in 0..load.trips {
                go_on()?;
                let from = Instant::now();
                stream.write_all(b"p")?;
                stream.read_exact(&mut [0])?;
                samples.add(&trip_time, trip, from.elapsed().as_secs_f64() * 1e3)?;
            }
            Ok(())
        });
        let theirs = exec(client, &argv, &mut io::sink());
        match (ours.join(), theirs) {
            // One side's failure is the other's, too: who was first is not known.
            (Ok(Err(ours)), Err(theirs)) => Err(ours.context(format!("{theirs:#}"))),
            (Ok(ours), theirs) => theirs.and(ours),
            (Err(panic), _) => std::panic::resume_unwind(panic),
        }
    })
}

fn bulk(
    scenario: &'static str,
    vm: &Ratoon,
    stream: &mut (impl Read + Write),
    samples: &mut Samples,
    bytes: usize,
    turn: usize,
) -> Result<()> {
    let mut piece = vec![0; PIECE];
    let haul = Haul::begin(scenario, vm)?;
    stream.write_all(b"g")?;
    let mut left = bytes;
    while left > 0 {
        let most = left.min(PIECE);
        let read = stream.read(&mut piece[..most]);
        let len = read.with_context(|| {
            format!("{TO_HOST}: turn {turn}: {left} of {bytes} bytes are missing")
        })?;
        if len == 0 {
            bail!("the guest closed its connection");
        }
        left -= len;
    }
    haul.end(samples, TO_HOST, bytes, turn)?;
    let haul = Haul::begin(scenario, vm)?;
    for number in 0..bytes / PIECE {
        let written = stream.write_all(&piece);
        written.with_context(|| format!("{TO_GUEST}: turn {turn}: piece {number}"))?;
    }
    stream
        .read_exact(&mut [0])
        .with_context(|| format!("{TO_GUEST}: turn {turn}: the guest's word that it has all"))?;
    haul.end(samples, TO_GUEST, bytes, turn)
}

/// Bytes that are being moved.
pub struct Haul<'a> {
    scenario: &'static str,
    vm: &'a Ratoon,
    from: Instant,
    instructions: Option<u64>,
}

impl<'a> Haul<'a> {
    /// They begin to move.
    ///
    /// # Errors
    /// When the VMM does not tell its counters.
    pub fn begin(scenario: &'static str, vm: &'a Ratoon) -> Result<Self> {
        let instructions = counters(&vm.metrics()?)[0];
        Ok(Self {
            scenario,
            vm,
            from: Instant::now(),
            instructions,
        })
    }

    /// They are there: adds their rate and what they cost the guest's kernel.
    ///
    /// # Errors
    /// When the VMM does not tell its counters, or samples cannot be written.
    pub fn end(self, samples: &mut Samples, what: &str, bytes: usize, turn: usize) -> Result<()> {
        let seconds = self.from.elapsed().as_secs_f64();
        let mib = bytes as f64 / (1 << 20) as f64;
        let rate = series(
            self.scenario,
            "ratoon",
            what.to_owned(),
            "MiB/s",
            Readiness::None,
        );
        samples.add(&rate, turn, mib / seconds)?;
        if let (Some(before), Some(after)) = (self.instructions, counters(&self.vm.metrics()?)[0]) {
            let what = format!("{what}: guest-kernel instructions");
            let cost = series(self.scenario, "ratoon", what, "/MiB", Readiness::None);
            samples.add(&cost, turn, after.saturating_sub(before) as f64 / mib)?;
        }
        Ok(())
    }
}
