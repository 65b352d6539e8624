//! Reads through a real guest: sequential 1 MiB and random 4 KiB, from a raw image and from one
//! behind an empty layer.
//!
//! One program in the guest (Python, O_DIRECT, so that the guest's cache is not what is measured)
//! does all jobs and times each read itself. Before and after each job it stops and the harness
//! reads the VMM's CPU times and the disk's counters, so that a job's cost on the host is its own.
//! The image's blocks are in the host's page cache: the first pass over them is not counted.

use std::io::{self, Write};
use std::os::fd::AsFd;

use anyhow::{Result, bail};
use ratoon_engine::runtime::ExecIo;
use ratoon_protocol::ExecParams;
use serde::Deserialize;

use super::{Plan, series};
use crate::machine::{Ratoon, Shape, go_on};
use crate::proc::{self, Cpu};
use crate::samples::{Readiness, Samples};

const NAME: &str = "block";

/// In the guest: a line `begin JOB`, a line from us, the job, a line `end JSON`, a line from us.
const PROGRAM: &str = r#"
import json, mmap, os, random, sys, time
seq, rnd = int(sys.argv[1]), int(sys.argv[2])
buf = mmap.mmap(-1, 1 << 20)
def step(line):
    os.write(1, (line + "\n").encode()); os.read(0, 16)
def job(name, fd, size, offsets, counted):
    view = memoryview(buf)[:size]
    if counted: step("begin " + name)
    times = []
    for offset in offsets:
        t = time.perf_counter_ns()
        if os.preadv(fd, [view], offset) != size: sys.exit("short read")
        times.append(time.perf_counter_ns() - t)
    if counted: step("end " + json.dumps({"job": name, "size": size, "ns": times}))
random.seed(1)
spots = [random.randrange(64 << 20 >> 12) << 12 for _ in range(rnd)]
for name, dev in ("raw", "/dev/vdb"), ("layer", "/dev/vdc"):
    fd = os.open(dev, os.O_RDONLY | os.O_DIRECT)
    whole = [n << 20 for n in range(seq)]
    job(name, fd, 1 << 20, whole, False)
    job("sequential 1 MiB, " + name, fd, 1 << 20, whole, True)
    job("random 4 KiB, " + name, fd, 4096, spots, True)
"#;

#[derive(Deserialize)]
struct Ended {
    job: String,
    size: u64,
    ns: Vec<u64>,
}

/// CPU times and the disks' counts at one moment.
#[derive(Clone, Copy)]
struct Moment {
    cpu: Cpu,
    reads: u64,
}

struct Job {
    ended: Ended,
    before: Moment,
    after: Moment,
}

/// The program's standard output: answers each of its lines with the measurement that it waits for.
struct Conductor<'a> {
    vm: &'a Ratoon,
    go: io::PipeWriter,
    line: Vec<u8>,
    before: Option<Moment>,
    jobs: Vec<Job>,
}

impl Conductor<'_> {
    fn moment(&self) -> Result<Moment> {
        let reads = self
            .vm
            .metrics()?
            .devices
            .iter()
            .filter(|(name, _)| name.starts_with("block.") && name.ends_with(".reads"))
            .map(|(_, value)| value)
            .sum();
        Ok(Moment {
            cpu: proc::cpu(self.vm.pid())?,
            reads,
        })
    }

    fn line(&mut self, line: &str) -> Result<()> {
        let now = self.moment()?;
        if line.starts_with("begin ") {
            self.before = Some(now);
        } else if let (Some(json), Some(before)) = (line.strip_prefix("end "), self.before.take()) {
            self.jobs.push(Job {
                ended: serde_json::from_str(json)?,
                before,
                after: now,
            });
        }
        go_on()?;
        self.go.write_all(b"g\n")?;
        Ok(())
    }
}

impl Write for Conductor<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            if byte != b'\n' {
                self.line.push(byte);
                continue;
            }
            let line = String::from_utf8_lossy(&std::mem::take(&mut self.line)).into_owned();
            self.line(&line).map_err(io::Error::other)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Runs it.
///
/// # Errors
/// When the guest does not come up or its program fails.
pub fn run(plan: &Plan<'_>, samples: &mut Samples) -> Result<()> {
    let (seq, random) = if plan.quick { (8, 64) } else { (64, 512) };
    let shape = Shape {
        more_disks: vec![("raw", false), ("layered", true)],
        ..Shape::of(256)
    };
    let mut vm = Ratoon::spawn(plan.parts, &shape)?;
    let mut client = vm.ready(false)?.client;
    let (stdin, go) = io::pipe()?;
    let mut conductor = Conductor {
        vm: &vm,
        go,
        line: Vec::new(),
        before: None,
        jobs: Vec::new(),
    };
    let mut errors = Vec::new();
    let argv = [
        "python3",
        "-c",
        PROGRAM,
        &seq.to_string(),
        &random.to_string(),
    ];
    let status = client.exec(
        &ExecParams {
            argv: argv.map(str::to_owned).to_vec(),
            ..ExecParams::default()
        },
        ExecIo {
            stdin: Some(stdin.as_fd()),
            stdout: &mut conductor,
            stderr: &mut errors,
        },
    )?;
    let jobs = conductor.jobs;
    vm.stop()?;
    if status.status.shell_code() != 0 || jobs.len() != 4 {
        bail!(
            "the reader in the guest ended with {status:?}: {}",
            String::from_utf8_lossy(&errors)
        );
    }
    for job in &jobs {
        record(job, samples)?;
    }
    Ok(())
}

fn record(job: &Job, samples: &mut Samples) -> Result<()> {
    let ended = &job.ended;
    let mut add = |what: &str, unit, run, value| {
        let series = series(
            NAME,
            "ratoon",
            format!("{}: {what}", ended.job),
            unit,
            Readiness::None,
        );
        samples.add(&series, run, value)
    };
    for (index, ns) in ended.ns.iter().enumerate() {
        add("time in the guest", "ms", index, *ns as f64 / 1e6)?;
    }
    let (count, total_ns) = (ended.ns.len() as f64, ended.ns.iter().sum::<u64>() as f64);
    let bytes = count * ended.size as f64;
    add(
        "throughput",
        "MiB/s",
        0,
        bytes / (1 << 20) as f64 / (total_ns / 1e9),
    )?;
    let per_read = |from: u64, to: u64| to.saturating_sub(from) as f64 / count / 1e3;
    let (from, to) = (job.before.cpu, job.after.cpu);
    add(
        "host CPU a read, event loop",
        "µs",
        0,
        per_read(from.event_loop_ns, to.event_loop_ns),
    )?;
    add(
        "host CPU a read, vCPU",
        "µs",
        0,
        per_read(from.vcpus_ns, to.vcpus_ns),
    )?;
    let requests = job.after.reads.saturating_sub(job.before.reads) as f64;
    add("virtio requests a read", "count", 0, requests / count)
}
