//! Machines to measure that boot: a `ratoon-vmm` process of its own, without the engine; and how a machine
//! on its way up is watched, ours and a peer's (`peer/`) alike.
//!
//! Each machine has a directory of its own, gone when it is dropped; its process is killed and reaped
//! then. Should the harness itself be killed, the VMM's lifeline ends it.
//!
//! How it fails: a machine that ends or does not come up in time is an error with the last lines
//! that it said.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ratoon_engine::Programs;
use ratoon_engine::runtime::RuntimeClient;
use ratoon_engine::vm::control::Control;
use ratoon_protocol::RUNTIME_PORT;
use ratoon_vmm_api::{DiskConfig, MetricsReply, NetConfig, SerialConfig, VmConfig, VsockConfig};
use tempfile::TempDir;

pub use crate::clock::monotonic_ns;
pub use crate::interrupt::go_on;
use crate::interrupt::is_stopped;
use crate::peer::SavedPeers;
use crate::proc;
use crate::sandbox::WarmMachines;

/// How long a guest may take to come up.
const BOOT_PATIENCE: Duration = Duration::from_secs(240);
/// How long a stream from the guest may stand still.
const STALL: Duration = Duration::from_secs(30);
/// How long a VMM may take to end.
const END_PATIENCE: Duration = Duration::from_secs(30);
/// How often a wait looks: the resolution of boot times.
const LOOK: Duration = Duration::from_millis(2);
/// What the runtime says on the console with `ratoon.ready=console`.
const READY_LINE: &str = "ratoon-runtime: ready";

/// What all machines of a run are made of.
#[derive(Debug, Clone)]
pub struct Parts {
    /// `ratoon-vmm`, release build.
    pub vmm: PathBuf,
    /// The guest kernel.
    pub kernel: PathBuf,
    /// The initramfs with the runtime.
    pub initramfs: PathBuf,
    /// The image's disk, only read.
    pub disk: PathBuf,
    /// The peers given by `--peer NAME=PATH`.
    pub peers: BTreeMap<String, PathBuf>,
    /// The programs, for machines that the engine starts.
    pub programs: Programs,
    /// The cache that has kernel and images.
    pub cache: PathBuf,
    /// The image's name.
    pub image: String,
    /// What scenarios share.
    pub warm: Arc<WarmMachines>,
    /// The same of peers.
    pub saved: Arc<SavedPeers>,
}

/// Shape of one machine.
#[derive(Debug, Clone)]
pub struct Shape {
    /// Guest memory.
    pub memory_mib: u64,
    /// Further disks after the root: the image again, each behind a layer or not.
    pub more_disks: Vec<(&'static str, bool)>,
    /// Whether the runtime tells the console that it serves.
    pub ready_on_console: bool,
    /// Tap devices.
    pub networks: Vec<NetConfig>,
}

impl Shape {
    /// A machine of `memory_mib` with its root disk.
    pub fn of(memory_mib: u64) -> Self {
        Self {
            memory_mib,
            more_disks: Vec::new(),
            ready_on_console: false,
            networks: Vec::new(),
        }
    }
}

fn nap(from: Instant, what: &str, patience: Duration) -> Result<()> {
    go_on()?;
    if from.elapsed() > patience {
        bail!("{what} within {} s", patience.as_secs());
    }
    std::thread::sleep(LOOK);
    Ok(())
}

/// A child process that is killed and reaped when dropped.
#[derive(Debug)]
pub struct Process(pub Child);

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only when it has been reaped.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// One VM under `ratoon-vmm`.
#[derive(Debug)]
pub struct Ratoon {
    process: Process,
    control: Control,
    ready: UnixListener,
    _lifeline: OwnedFd,
    /// CLOCK_MONOTONIC right before the process was made, in nanoseconds.
    pub spawned_ns: u64,
    dir: TempDir,
}

/// A guest whose runtime has answered. Times are after the spawn.
pub struct Ready {
    /// The runtime.
    pub client: RuntimeClient,
    /// When its HELLO was there (R3).
    pub hello_ns: u64,
    /// When the console's ready line was there (R3'), if it was seen before the HELLO.
    pub console_ns: Option<u64>,
    /// CPU time of the VMM until that line.
    pub cpu_ns: Option<u64>,
}

impl Ready {
    /// Reads the HELLO of a machine whose runtime has called.
    ///
    /// # Errors
    /// When none comes.
    pub fn of(seen: Seen, spawned_ns: u64) -> Result<Self> {
        let stream = seen.stream.context("the runtime's connection")?;
        stream.set_nonblocking(false)?;
        let client = RuntimeClient::from_stream(stream, BOOT_PATIENCE)?;
        Ok(Self {
            client,
            hello_ns: monotonic_ns() - spawned_ns,
            console_ns: seen.console_ns,
            cpu_ns: seen.cpu_ns,
        })
    }
}

/// A directory for one machine.
///
/// # Errors
/// When it cannot be made.
pub fn new_dir() -> Result<TempDir> {
    tempfile::Builder::new()
        .prefix("ratoon-bench-")
        .tempdir()
        .context("a directory for the machine")
}

impl Ratoon {
    /// Starts one.
    ///
    /// # Errors
    /// When files or processes cannot be made.
    pub fn spawn(parts: &Parts, shape: &Shape) -> Result<Self> {
        let dir = new_dir()?;
        let at = |name: &str| dir.path().join(name);
        let disk = |id: &str, layer: bool| DiskConfig {
            id: id.into(),
            path: parts.disk.clone(),
            read_only: !layer,
            frozen: Vec::new(),
            freezes: Vec::new(),
            layer: layer.then(|| at(&format!("{id}.qcow2"))),
        };
        let mut disks = vec![disk("root", true)];
        disks.extend(shape.more_disks.iter().map(|(id, layer)| disk(id, *layer)));
        let ready_word = if shape.ready_on_console {
            "ratoon.ready=console"
        } else {
            ""
        };
        let config = VmConfig {
            id: "bench".into(),
            vcpus: 1,
            memory_mib: shape.memory_mib,
            generation: None,
            kernel: parts.kernel.clone(),
            initramfs: Some(parts.initramfs.clone()),
            kernel_args: ready_word.into(),
            disks,
            vsock: Some(VsockConfig {
                guest_cid: 3,
                socket: at("vsock"),
            }),
            networks: shape.networks.clone(),
            balloon: true,
            serial: Some(SerialConfig {
                log: at("serial.log"),
                limit_bytes: 1 << 20,
            }),
            exit_report: Some(at("exit.json")),
            remove_when_orphaned: Some(dir.path().to_owned()),
        };
        fs::write(at("config.json"), serde_json::to_vec(&config)?)?;
        let ready = UnixListener::bind(at(&format!("vsock_{RUNTIME_PORT}")))?;
        ready.set_nonblocking(true)?;
        let (lifeline, held) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        rustix::io::fcntl_setfd(&lifeline, rustix::io::FdFlags::empty())?;
        let log = fs::File::create(at("vmm.log"))?;
        let mut command = Command::new(&parts.vmm);
        command
            .arg("--config")
            .arg(at("config.json"))
            .arg("--control")
            .arg(at("control"))
            .arg("--lifeline-fd")
            .arg(lifeline.as_raw_fd().to_string())
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        // Nothing above this line is in the measured time: std makes the process by posix_spawn.
        let spawned_ns = monotonic_ns();
        let child = command
            .spawn()
            .with_context(|| format!("starting {}", parts.vmm.display()))?;
        drop(lifeline);
        Ok(Self {
            process: Process(child),
            control: Control::new(at("control"), Duration::from_secs(10)),
            ready,
            _lifeline: held,
            spawned_ns,
            dir,
        })
    }

    /// The VMM's process.
    pub fn pid(&self) -> u32 {
        self.process.0.id()
    }

    /// The socket by whose name the guest's connections find us (`<it>_<port>`).
    pub fn vsock(&self) -> PathBuf {
        self.dir.path().join("vsock")
    }

    /// An error if the VMM has ended.
    ///
    /// # Errors
    /// With its last words.
    pub fn alive(&mut self) -> Result<()> {
        if let Some(status) = self.process.0.try_wait()? {
            bail!(
                "the VMM ended ({status}); {}",
                last_words(self.dir.path(), &["vmm.log", "serial.log"])
            );
        }
        Ok(())
    }

    /// Waits for the first guest instruction (R1), seldom enough not to disturb it; returns the
    /// metrics.
    ///
    /// # Errors
    /// When the VMM ends first.
    pub fn running(&mut self) -> Result<MetricsReply> {
        let from = Instant::now();
        std::thread::sleep(Duration::from_millis(30));
        loop {
            self.alive()?;
            if self.dir.path().join("control").exists()
                && let Ok(metrics) = self.control.metrics()
                && metrics.phases.first_instruction_ns != 0
            {
                return Ok(metrics);
            }
            nap(from, "the guest ran no instruction", BOOT_PATIENCE)?;
        }
    }

    /// Counters.
    ///
    /// # Errors
    /// When the VMM does not answer.
    pub fn metrics(&self) -> Result<MetricsReply> {
        Ok(self.control.metrics()?)
    }

    /// Waits for the runtime's HELLO on its standing connection: R3; on the way for the console's
    /// ready line, if the shape asks for one (it comes before the HELLO).
    ///
    /// # Errors
    /// When the VMM ends or the guest takes too long.
    pub fn ready(&mut self, console: bool) -> Result<Ready> {
        let serial = self.dir.path().join("serial.log");
        let ready = Some(&self.ready);
        let spawned = self.spawned_ns;
        let seen = watch(
            &mut self.process,
            spawned,
            &serial,
            console,
            ready,
            BOOT_PATIENCE,
        );
        let words = || last_words(self.dir.path(), &["vmm.log", "serial.log"]);
        let seen = seen.map_err(|error| explain(error, &words()))?;
        Ready::of(seen, self.spawned_ns)
    }

    /// Stops the VM and waits for the whole end of its process. Returns how long that took.
    ///
    /// # Errors
    /// When it does not end.
    pub fn stop(mut self) -> Result<Duration> {
        let from = Instant::now();
        self.control.stop()?;
        while self.process.0.try_wait()?.is_none() {
            nap(from, "the VMM did not end", END_PATIENCE)?;
        }
        Ok(from.elapsed())
    }
}

/// Accepts one connection of the guest on `listener`.
///
/// # Errors
/// When none comes.
pub fn accept(listener: &UnixListener) -> Result<UnixStream> {
    let from = Instant::now();
    listener.set_nonblocking(true)?;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                stream.set_read_timeout(Some(STALL))?;
                stream.set_write_timeout(Some(STALL))?;
                return Ok(stream);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                nap(from, "the guest did not connect", BOOT_PATIENCE)?;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// What was seen of a machine on its way up. Times are after the spawn.
#[derive(Debug)]
pub struct Seen {
    /// The runtime's connection; none without vsock.
    pub stream: Option<UnixStream>,
    /// When the console's ready line was there, if it was looked for and came first.
    pub console_ns: Option<u64>,
    /// CPU time of the process until that line.
    pub cpu_ns: Option<u64>,
}

/// Watches a machine's console and the socket that its runtime calls, all machines in the same way: every
/// 2 ms. Returns with the runtime's connection; without a socket, with the ready line.
///
/// # Errors
/// When the process ends first or it takes too long.
pub fn watch(
    process: &mut Process,
    spawned_ns: u64,
    serial: &Path,
    console: bool,
    ready: Option<&UnixListener>,
    patience: Duration,
) -> Result<Seen> {
    let from = Instant::now();
    let mut seen = Seen {
        stream: None,
        console_ns: None,
        cpu_ns: None,
    };
    loop {
        if console && seen.console_ns.is_none() && says_ready(serial) {
            seen.console_ns = Some(monotonic_ns() - spawned_ns);
            seen.cpu_ns = Some(proc::cpu_total_ns(process.0.id())?);
        }
        match ready.map(UnixListener::accept) {
            Some(Ok((stream, _))) => {
                seen.stream = Some(stream);
                return Ok(seen);
            }
            None if seen.console_ns.is_some() => return Ok(seen),
            Some(Err(error)) if error.kind() != ErrorKind::WouldBlock => {
                return Err(error).context("the runtime's connection");
            }
            _ => {}
        }
        if let Some(status) = process.0.try_wait()? {
            bail!("the VMM ended ({status})");
        }
        nap(from, "the runtime did not call", patience)?;
    }
}

fn says_ready(serial: &Path) -> bool {
    fs::read(serial).is_ok_and(|bytes| {
        bytes
            .windows(READY_LINE.len())
            .any(|window| window == READY_LINE.as_bytes())
    })
}

/// The same error with a machine's last words behind it; but for an interrupt, which needs no reason.
pub fn explain(error: anyhow::Error, words: &str) -> anyhow::Error {
    match is_stopped() {
        true => error,
        false => anyhow::anyhow!("{error:#}; {words}"),
    }
}

/// The ends of these files of a machine.
pub fn last_words(dir: &Path, files: &[&str]) -> String {
    let mut words = String::from("its last words:");
    for file in files {
        let text = fs::read(dir.join(file)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        for line in lines.iter().skip(lines.len().saturating_sub(5)) {
            words.push_str(&format!("\n  {file}: {line}"));
        }
    }
    words
}
