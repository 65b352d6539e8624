//! How the machine is, from a handful of reads; its processes only when asked for them.
//!
//! How it fails: a file of /proc that cannot be read fails the call; a number in it that cannot be
//! read counts as 0; a process that ends meanwhile is left out.

use ratoon_protocol::{ErrorReply, Metrics, MetricsParams, TopProcess};
use rustix::time::{ClockId, clock_gettime};

use super::{bad_request, failed, ports, procfs};

/// Microseconds of a tick in /proc: USER_HZ is 100 (asm-generic/param.h).
const TICK_US: u64 = 10_000;

/// Bytes of a page in /proc.
const PAGE_BYTES: u64 = 4096;

/// How many processes are looked at for the top ones, at two or three system calls each.
const MAX_SCANNED: usize = 2048;

/// How many may be asked for.
const MAX_TOP: u32 = 100;

/// How much of a command line is told, in bytes of its JSON text: all of them fit one frame.
const MAX_COMMAND: usize = 256;

/// How much of a file is read.
const MAX_BYTES: usize = 64 * 1024;

/// Numbers of the machine and, if asked, its busiest processes.
///
/// # Errors
/// `bad_request` for more than 100 processes; the system's when /proc cannot be read.
pub fn metrics(params: &MetricsParams) -> Result<Metrics, ErrorReply> {
    if params.top > MAX_TOP {
        return Err(bad_request(format!(
            "top {}: at most {MAX_TOP}",
            params.top
        )));
    }
    let mut buffer = Vec::new();
    let mut read = |path: &str, take: &mut dyn FnMut(&str)| {
        let text = procfs::read(path, MAX_BYTES, &mut buffer);
        text.map(take).map_err(|error| failed(path, error))
    };
    let mut metrics = Metrics {
        uptime_us: crate::sys::boot_time_us(),
        time_us: {
            let time = clock_gettime(ClockId::Realtime);
            (time.tv_sec as u64) * 1_000_000 + (time.tv_nsec as u64) / 1_000
        },
        ..Metrics::default()
    };
    read("/proc/stat", &mut |text| processors(text, &mut metrics))?;
    read("/proc/meminfo", &mut |text| memory(text, &mut metrics))?;
    read("/proc/net/dev", &mut |text| network(text, &mut metrics))?;
    read("/proc/self/statm", &mut |text| {
        metrics.runtime_memory = pages(text.split_ascii_whitespace().nth(1));
    })?;
    // The load average is fixed-point with 16 bits (SI_LOAD_SHIFT, linux/kernel.h).
    let info = rustix::system::sysinfo();
    metrics.load = info.loads[0] as f64 / 65536.0;
    metrics.processes = info.procs.into();
    let disk = rustix::fs::statvfs("/").map_err(|error| failed("/", error))?;
    metrics.disk_total = disk.f_blocks.saturating_mul(disk.f_frsize);
    metrics.disk_free = disk.f_bavail.saturating_mul(disk.f_frsize);
    if params.top > 0 {
        metrics.top = top(params.top as usize, &mut buffer)?;
    }
    Ok(metrics)
}

fn number(word: Option<&str>) -> u64 {
    word.and_then(|word| word.parse().ok()).unwrap_or(0)
}

fn pages(word: Option<&str>) -> u64 {
    number(word).saturating_mul(PAGE_BYTES)
}

/// `cpu user nice system idle iowait irq softirq steal …` in ticks, then a line for each processor.
fn processors(text: &str, metrics: &mut Metrics) {
    for line in text.lines() {
        let Some(rest) = line.strip_prefix("cpu") else {
            break;
        };
        if !rest.starts_with(' ') {
            metrics.cpus += 1;
            continue;
        }
        let busy = rest.split_ascii_whitespace().enumerate();
        let busy = busy.filter(|(at, _)| matches!(at, 0..=2 | 5..=7));
        let ticks = busy.fold(0u64, |sum, (_, word)| {
            sum.saturating_add(number(Some(word)))
        });
        metrics.cpu_busy_us = ticks.saturating_mul(TICK_US);
    }
}

/// `Name:   123 kB`
fn memory(text: &str, metrics: &mut Metrics) {
    let mut shared = 0;
    for line in text.lines() {
        let Some((name, value)) = line.split_once(':') else {
            continue;
        };
        let bytes = number(value.split_ascii_whitespace().next()).saturating_mul(1024);
        match name {
            "MemTotal" => metrics.memory_total = bytes,
            "MemAvailable" => metrics.memory_available = bytes,
            "Buffers" | "Cached" => {
                metrics.memory_cache = metrics.memory_cache.saturating_add(bytes);
            }
            "Shmem" => shared = bytes,
            _ => {}
        }
    }
    // tmpfs counts as cached, but cannot be dropped.
    metrics.memory_cache = metrics.memory_cache.saturating_sub(shared);
}

/// `  eth0: bytes packets … (8 words received) bytes …` after two lines of headings.
fn network(text: &str, metrics: &mut Metrics) {
    for line in text.lines().skip(2) {
        let Some((name, counts)) = line.rsplit_once(": ").or_else(|| line.split_once(':')) else {
            continue;
        };
        if name.trim() == "lo" {
            continue;
        }
        let mut words = counts.split_ascii_whitespace();
        let received = number(words.next());
        let sent = number(words.nth(7));
        metrics.network_received = metrics.network_received.saturating_add(received);
        metrics.network_sent = metrics.network_sent.saturating_add(sent);
    }
}

struct Scanned {
    pid: i32,
    ppid: i32,
    state: char,
    cpu_us: u64,
    memory: u64,
    name: String,
}

fn top(count: usize, buffer: &mut Vec<u8>) -> Result<Vec<TopProcess>, ErrorReply> {
    let pids = ports::numbers("/proc").map_err(|error| failed("/proc", error))?;
    let mut all: Vec<_> = pids
        .into_iter()
        .take(MAX_SCANNED)
        .filter_map(|pid| scanned(procfs::read(format!("/proc/{pid}/stat"), 4096, buffer).ok()?))
        .collect();
    all.sort_by_key(|process| (std::cmp::Reverse(process.cpu_us), process.pid));
    all.truncate(count);
    let described = all.into_iter().filter_map(|process| {
        let uid = ports::uid(process.pid)?;
        let path = format!("/proc/{}/cmdline", process.pid);
        let command = match procfs::open(path) {
            Ok(file) => {
                buffer.resize(2 * MAX_COMMAND, 0);
                let len = rustix::io::read(&file, &mut buffer[..]).unwrap_or(0);
                command(&buffer[..len], &process.name)
            }
            Err(_) => command(b"", &process.name),
        };
        Some(TopProcess {
            pid: process.pid,
            ppid: process.ppid,
            uid,
            state: process.state.to_string(),
            cpu_us: process.cpu_us,
            memory: process.memory,
            command,
        })
    });
    Ok(described.collect())
}

/// `pid (name) state ppid …` (proc_pid_stat(5)); the name may hold anything, `) R 1` too.
fn scanned(text: &str) -> Option<Scanned> {
    let (pid, rest) = text.split_once(" (")?;
    let (name, rest) = rest.rsplit_once(") ")?;
    let words: Vec<&str> = rest.split_ascii_whitespace().take(22).collect();
    let word = |at: usize| words.get(at).copied();
    let state = word(0)?.chars().next().filter(char::is_ascii_alphabetic)?;
    Some(Scanned {
        pid: pid.parse().ok()?,
        ppid: word(1)?.parse().ok()?,
        state,
        cpu_us: number(word(11))
            .saturating_add(number(word(12)))
            .saturating_mul(TICK_US),
        memory: pages(word(21)),
        name: name.to_owned(),
    })
}

/// A command line for people: blanks between the words, no control characters (a terminal would
/// obey them), bounded. Kernel threads and dead processes have none: `[name]`.
fn command(line: &[u8], name: &str) -> String {
    let line = match line.strip_suffix(b"\0").unwrap_or(line) {
        b"" => format!("[{name}]"),
        line => String::from_utf8_lossy(line).into_owned(),
    };
    let mut shown = String::new();
    let mut len = 0;
    for char in line.chars() {
        let char = match char {
            '\0' => ' ',
            char if char.is_control() => '?',
            char => char,
        };
        len += char.len_utf8() + usize::from(matches!(char, '"' | '\\'));
        if len > MAX_COMMAND {
            break;
        }
        shown.push(char);
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_is_all_but_idle_and_waiting() {
        let mut metrics = Metrics::default();
        processors(
            "cpu  1 2 4 1000 2000 8 16 32 500 600\ncpu0 1 2 3 4\ncpu1 1\nintr 5\ncpu2 1\n",
            &mut metrics,
        );
        assert_eq!(metrics.cpus, 2);
        assert_eq!(metrics.cpu_busy_us, 63 * 10_000);
    }

    #[test]
    fn cache_is_what_can_be_dropped() {
        let mut metrics = Metrics::default();
        let text = "MemTotal: 100 kB\nMemFree: 1 kB\nMemAvailable:  50 kB\nBuffers: 3 kB\n\
                    Cached: 20 kB\nSwapCached: 99 kB\nShmem: 8 kB\n";
        memory(text, &mut metrics);
        assert_eq!(metrics.memory_total, 100 << 10);
        assert_eq!(metrics.memory_available, 50 << 10);
        assert_eq!(metrics.memory_cache, 15 << 10);
    }

    #[test]
    fn the_loopback_is_no_network() {
        let mut metrics = Metrics::default();
        let text = "Inter-|   Receive\n face |bytes\n    lo:  77 1 0 0 0 0 0 0 77 1 0 0 0 0 0 0\n  \
                    eth0: 1000 5 0 0 0 0 0 0 300 4 0 0 0 0 0 0\neth1:5 1 0 0 0 0 0 0 6 1 0\n";
        network(text, &mut metrics);
        assert_eq!(metrics.network_received, 1005);
        assert_eq!(metrics.network_sent, 306);
    }

    #[test]
    fn nonsense_counts_as_nothing() {
        let nonsense = "cpu \ncpu  x -1 18446744073709551615 18446744073709551616\ncpuä\n:\n::\n\
                        MemTotal:\nMemTotal: 18446744073709551615 kB\nShmem: 9 kB\n: : :\neth0: \n";
        let mut metrics = Metrics::default();
        processors(nonsense, &mut metrics);
        memory(nonsense, &mut metrics);
        network(nonsense, &mut metrics);
        assert_eq!(metrics.memory_total, u64::MAX);
        assert_eq!(metrics.memory_cache, 0);
        // A sum that does not fit is the largest number.
        assert_eq!(metrics.network_received, u64::MAX);
        assert_eq!(metrics.network_sent, 0);
    }

    #[test]
    fn a_name_cannot_forge_the_fields_after_it() {
        let text = "7 (a) R 1 (b) Z 3 7 7 0 -1 4194560 1 0 0 0 5 6 0 0 20 0 1 0 100 4096 2 18 0\n";
        let process = scanned(text).unwrap();
        assert_eq!((process.pid, process.ppid), (7, 3));
        assert_eq!(process.name, "a) R 1 (b");
        assert_eq!(process.state, 'Z');
        assert_eq!(process.cpu_us, 110_000);
        assert_eq!(process.memory, 8192);
        for text in [
            "",
            "7",
            "7 (",
            "7 (a)",
            "7 (a) ",
            "7 (a) R",
            "7 (a) 5 1",
            "x (a) R 1 1",
        ] {
            assert!(scanned(text).is_none(), "{text}");
        }
    }

    #[test]
    fn a_command_line_is_bounded_and_cannot_drive_a_terminal() {
        assert_eq!(command(b"sh\0-c\0a b\0", "sh"), "sh -c a b");
        assert_eq!(command(b"", "kthreadd"), "[kthreadd]");
        assert_eq!(command(b"a\x1b[2J\xff\n", "a"), "a?[2J\u{fffd}?");
        let quotes = command(&[b'"'; 1000], "x");
        assert_eq!(serde_json::to_string(&quotes).unwrap().len(), 256 + 2);
    }

    #[test]
    fn this_machine_has_numbers() {
        let metrics = metrics(&MetricsParams { top: 100 }).unwrap();
        assert!(metrics.cpus >= 1 && metrics.cpu_busy_us > 0);
        assert!(metrics.memory_available <= metrics.memory_total);
        assert!(metrics.memory_total > 0 && metrics.disk_total >= metrics.disk_free);
        assert!(metrics.runtime_memory > 0 && metrics.processes > 0);
        assert!((1..=100).contains(&metrics.top.len()));
        let busiest = metrics.top.iter().map(|process| process.cpu_us);
        assert!(busiest.is_sorted_by(|a, b| a >= b));
        assert!(serde_json::to_vec(&metrics).unwrap().len() < ratoon_protocol::MAX_PAYLOAD_LEN);
    }

    #[test]
    fn more_than_a_hundred_are_refused() {
        let error = super::metrics(&MetricsParams { top: 101 }).unwrap_err();
        assert_eq!(error, bad_request("top 101: at most 100"));
    }
}
