//! What qcow2 layers cost beside a raw file: CPU and time of each request, opening, memory.
//!
//!     cargo run --release -p ratoon-devices --example block_backends [DIRECTORY]
//!
//! It makes files of 1 GiB in DIRECTORY (default: the folder for temporary files), all of which
//! then lie in the page cache, and removes them. Raw and layer take turns in short rounds, so that
//! a noisy machine troubles both; each figure is the median over the rounds. CPU is that of this
//! process (CLOCK_PROCESS_CPUTIME_ID), user and kernel.

use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::Instant;

use ratoon_devices::block::{self, Backend};
use rustix::time::{ClockId, clock_gettime};
use vm_memory::VolatileSlice;

type Outcome<T> = Result<T, Box<dyn Error>>;

const DISK_BYTES: u64 = 1 << 30;
const ROUNDS: usize = 15;
const OPENINGS: usize = 101;

/// One way of asking.
struct Work {
    name: &'static str,
    request_bytes: usize,
    random: bool,
    write: bool,
    /// Requests a round.
    count: u64,
}

const WORKS: [Work; 4] = [
    Work {
        name: "read 4 KiB random",
        request_bytes: 4096,
        random: true,
        write: false,
        count: 20_000,
    },
    Work {
        name: "read 1 MiB in order",
        request_bytes: 1 << 20,
        random: false,
        write: false,
        count: 200,
    },
    Work {
        name: "write 4 KiB random",
        request_bytes: 4096,
        random: true,
        write: true,
        count: 20_000,
    },
    Work {
        name: "write 1 MiB in order",
        request_bytes: 1 << 20,
        random: false,
        write: true,
        count: 200,
    },
];

fn cpu_nanos() -> u64 {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// One round; CPU and wall time of a request in nanoseconds.
fn round(
    backend: &mut dyn Backend,
    work: &Work,
    seed: u64,
    memory: &mut [u8],
) -> Outcome<[f64; 2]> {
    let places = DISK_BYTES / work.request_bytes as u64;
    let mut state = seed;
    let (cpu, start) = (cpu_nanos(), Instant::now());
    for index in 0..work.count {
        let place = if work.random {
            // A linear congruential generator's high bits: enough for places.
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % places
        } else {
            (seed * work.count + index) % places
        };
        let offset = place * work.request_bytes as u64;
        // The guest's buffers are pages.
        let pages: Vec<_> = memory[..work.request_bytes]
            .chunks_mut(if work.random { 4096 } else { 64 << 10 })
            .map(VolatileSlice::from)
            .collect();
        if work.write {
            backend.write_at(&pages, offset)?;
        } else {
            backend.read_at(&pages, offset)?;
        }
    }
    let (wall, cpu) = (start.elapsed(), cpu_nanos() - cpu);
    Ok([cpu as f64, wall.as_nanos() as f64].map(|nanos| nanos / work.count as f64))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Rounds of all backends by turns, after one unmeasured round each.
fn compare(work: &Work, backends: &mut [(&str, Box<dyn Backend>)]) -> Outcome<()> {
    let mut memory = vec![7; work.request_bytes];
    let mut samples = vec![[Vec::new(), Vec::new()]; backends.len()];
    for turn in 0..=ROUNDS {
        for ((_, backend), samples) in backends.iter_mut().zip(&mut samples) {
            let figures = round(backend.as_mut(), work, turn as u64, &mut memory)?;
            if turn > 0 {
                for (list, figure) in samples.iter_mut().zip(figures) {
                    list.push(figure);
                }
            }
        }
    }
    let mut first = None;
    for ((name, _), samples) in backends.iter().zip(samples) {
        let [cpu, wall] = samples.map(median);
        let base = *first.get_or_insert(cpu);
        println!(
            "{:<22} {name:<18} {:>9.2} us CPU {:>9.2} us wall {:>+6.1} % CPU",
            work.name,
            cpu / 1000.0,
            wall / 1000.0,
            (cpu / base - 1.0) * 100.0
        );
    }
    Ok(())
}

/// A file full of bytes that are not zero.
fn fill(path: &Path) -> Outcome<()> {
    let mut file = File::create(path)?;
    let mut megabyte = vec![0_u8; 1 << 20];
    for (at, byte) in megabyte.iter_mut().enumerate() {
        *byte = (at / 4096 + at) as u8 | 1;
    }
    for _ in 0..DISK_BYTES >> 20 {
        file.write_all(&megabyte)?;
    }
    Ok(file.sync_all()?)
}

fn fill_backend(backend: &mut dyn Backend) -> Outcome<()> {
    let mut megabyte = vec![5_u8; 1 << 20];
    for index in 0..DISK_BYTES >> 20 {
        backend.write_at(&[VolatileSlice::from(&mut megabyte[..])], index << 20)?;
    }
    Ok(backend.flush()?)
}

/// All of a disk of 1 GiB in `depth` frozen layers, each with every `depth`th piece of 64 KiB, under
/// an empty top: as scattered as it can be.
fn chain(base: &Path, folder: &Path, depth: u64) -> Outcome<Box<dyn Backend>> {
    const PIECE: u64 = 64 << 10;
    let name = |level: u64| folder.join(format!("chain-{depth}-{level}"));
    let mut backend = block::open(base, false, &[], Some(&name(0)))?;
    let mut piece = vec![3_u8; PIECE as usize];
    for level in 0..depth {
        for offset in (level * PIECE..DISK_BYTES).step_by((depth * PIECE) as usize) {
            backend.write_at(&[VolatileSlice::from(&mut piece[..])], offset)?;
        }
        backend.prepare_layer(&name(level + 1))?;
        backend.write_back()?;
        if !backend.push_layer()? {
            return Err("the layer was not frozen".into());
        }
    }
    drop(backend);
    let frozen: Vec<_> = (0..depth).map(name).collect();
    Ok(block::open(base, false, &frozen, Some(&name(depth)))?)
}

/// Reads all files anew, in order: the page cache then holds each as the kernel's readahead has it,
/// however small the pieces were in which it was written.
fn settle(folder: &Path) -> Outcome<()> {
    use rustix::fs::{Advice, fadvise};
    for entry in std::fs::read_dir(folder)? {
        let mut file = File::open(entry?.path())?;
        file.sync_all()?;
        fadvise(&file, 0, None, Advice::DontNeed)?;
        std::io::copy(&mut file, &mut std::io::sink())?;
    }
    Ok(())
}

/// What a freeze does with a disk within the pause, and before it.
fn freezes(base: &Path, folder: &Path) -> Outcome<()> {
    let name = |level: usize| folder.join(format!("freeze-{level}"));
    let mut times = [const { Vec::new() }; 2];
    let mut piece = vec![3_u8; 4096];
    for round in 0..3 {
        let mut backend = block::open(base, false, &[], Some(&name(0)))?;
        for level in 1..=block::MAX_FROZEN {
            for offset in 0..16 {
                backend.write_at(
                    &[VolatileSlice::from(&mut piece[..])],
                    (offset + round) << 20,
                )?;
            }
            let start = Instant::now();
            backend.prepare_layer(&name(level))?;
            times[0].push(start.elapsed().as_nanos() as f64 / 1000.0);
            let start = Instant::now();
            backend.write_back()?;
            backend.push_layer()?;
            times[1].push(start.elapsed().as_nanos() as f64 / 1000.0);
        }
        drop(backend);
        for level in 0..=block::MAX_FROZEN {
            std::fs::remove_file(name(level))?;
        }
    }
    for (name, mut list) in ["next layer, made ahead", "freeze, in the pause"]
        .into_iter()
        .zip(times)
    {
        list.sort_by(f64::total_cmp);
        let at = |share: usize| list[(list.len() - 1) * share / 100];
        println!("{name:<24} p50 {:>8.0} us  p99 {:>8.0} us", at(50), at(99));
    }
    Ok(())
}

/// Anonymous memory in bytes (proc(5): RssAnon).
fn anonymous_bytes() -> Outcome<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .ok_or("no RssAnon in /proc/self/status")?;
    Ok(line.trim().trim_end_matches("kB").trim().parse::<u64>()? << 10)
}

/// Making a layer and opening it, opening it again, opening a raw file.
fn openings(base: &Path, folder: &Path) -> Outcome<()> {
    let mut times = [const { Vec::new() }; 3];
    for index in 0..OPENINGS {
        let layer = folder.join(format!("new-{index}"));
        for (list, layer) in times.iter_mut().zip([Some(&layer), Some(&layer), None]) {
            let start = Instant::now();
            let backend =
                block::open(base, layer.is_none(), &[], layer.map(|path| path.as_path()))?;
            list.push(start.elapsed().as_nanos() as f64 / 1000.0);
            drop(backend);
        }
        std::fs::remove_file(&layer)?;
    }
    for (name, mut list) in ["layer, made and opened", "layer, opened", "raw, opened"]
        .into_iter()
        .zip(times)
    {
        list.sort_by(f64::total_cmp);
        let at = |share: usize| list[(list.len() - 1) * share / 100];
        println!("{name:<24} p50 {:>8.0} us  p99 {:>8.0} us", at(50), at(99));
    }
    Ok(())
}

fn main() -> Outcome<()> {
    let folder = match std::env::args_os().nth(1) {
        Some(parent) => tempfile::tempdir_in(parent)?,
        None => tempfile::tempdir()?,
    };
    let folder = folder.path();
    let (base, raw) = (folder.join("base"), folder.join("raw"));
    fill(&base)?;
    fill(&raw)?;
    openings(&base, folder)?;
    freezes(&base, folder)?;

    let before = anonymous_bytes()?;
    let empty = block::open(&base, false, &[], Some(&folder.join("empty")))?;
    println!(
        "memory of an open, empty layer: {} KiB",
        (anonymous_bytes()? - before) >> 10
    );
    let before = anonymous_bytes()?;
    let mut full = block::open(&base, false, &[], Some(&folder.join("full")))?;
    fill_backend(full.as_mut())?;
    println!(
        "memory of a layer of 1 GiB, all written: {} KiB",
        (anonymous_bytes()? - before) >> 10
    );
    // The page cache may hold one file in larger pieces than another; a layer's file that is read
    // as a raw one shows what is due to that.
    let control = folder.join("control");
    fill_backend(block::open(&base, false, &[], Some(&control))?.as_mut())?;
    let raw = block::open(&raw, false, &[], None)?;
    let control = block::open(&control, true, &[], None)?;
    let mut backends = [
        ("raw", raw),
        ("raw, layer's file", control),
        ("layer, from base", empty),
        ("layer, own", full),
        ("1 frozen", chain(&base, folder, 1)?),
        ("4 frozen", chain(&base, folder, 4)?),
        ("16 frozen", chain(&base, folder, 16)?),
    ];
    settle(folder)?;
    for work in WORKS.iter().filter(|work| !work.write) {
        compare(work, &mut backends)?;
    }
    // A layer that is written is no longer one that reads from its base.
    let [raw, _, _, full, ..] = backends;
    let mut backends = [raw, full];
    for work in WORKS.iter().filter(|work| work.write) {
        compare(work, &mut backends)?;
    }
    // The first write of a cluster: what is not written of it is copied from the base.
    let mut fresh = block::open(&base, false, &[], Some(&folder.join("fresh")))?;
    for work in WORKS.iter().filter(|work| work.write) {
        let mut memory = vec![9; work.request_bytes];
        let [cpu, wall] = round(fresh.as_mut(), work, 0, &mut memory)?;
        println!(
            "{:<22} {:<18} {:>9.2} us CPU {:>9.2} us wall",
            work.name,
            "layer, first",
            cpu / 1000.0,
            wall / 1000.0
        );
    }
    Ok(())
}
