//! One machine of a peer: its folder, its process, and how it is seen to be ready.
//!
//! A saved machine goes on in the same folder, one process after another, since peers write the paths of
//! disk and sockets into what they save. The process dies with the harness (parent-death signal), and is
//! killed and reaped when [`Running`] is dropped; the folder goes with [`Place`].
//!
//! How it fails: a process that ends, or does not come so far in time, is an error with its last words.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ratoon_engine::runtime::RuntimeClient;
use ratoon_protocol::RUNTIME_PORT;
use tempfile::TempDir;

use super::alarm::Alarm;
use super::{Adapter, Guest};
use crate::clock::monotonic_ns;
use crate::machine::{Process, Ready, Seen, explain, go_on, last_words, new_dir, watch};

/// How often a new process is looked at for its API: a tenth of what it takes.
const API_LOOK: Duration = Duration::from_micros(200);
const LOG: &str = "vmm.log";
const SERIAL: &str = "serial.log";

/// A machine's folder.
#[derive(Debug)]
pub struct Place {
    dir: TempDir,
    patience: Duration,
}

impl Place {
    /// A new one. What is waited for in it may take so long.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new(patience: Duration) -> Result<Self> {
        let dir = new_dir()?;
        fs::create_dir(dir.path().join("saved")).context("a folder for the saved machine")?;
        Ok(Self { dir, patience })
    }

    /// A file in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The socket of the VMM's API.
    pub fn api(&self) -> PathBuf {
        self.file("api")
    }

    /// The socket of the guest's vsock.
    pub fn vsock(&self) -> PathBuf {
        self.file("vsock")
    }

    /// Where the guest's console goes: for who cannot name a file, its standard output.
    pub fn serial(&self) -> PathBuf {
        self.file(SERIAL)
    }

    /// The folder for the saved machine.
    pub fn saved(&self) -> PathBuf {
        self.file("saved")
    }

    /// A copy of the disk, with its holes.
    ///
    /// # Errors
    /// When `cp` fails.
    pub fn copy_disk(&self, disk: &Path) -> Result<PathBuf> {
        let copy = self.file("disk.img");
        let output = Command::new("cp")
            .args(["--sparse=always", "--reflink=auto", "--"])
            .args([disk, copy.as_path()])
            .output()
            .context("copying the disk for a peer")?;
        if !output.status.success() {
            let words = String::from_utf8_lossy(&output.stderr);
            bail!("copying the disk for a peer: {}", words.trim());
        }
        Ok(copy)
    }

    /// Boots `guest`.
    ///
    /// # Errors
    /// When the process cannot be made.
    pub fn boot(&self, peer: &dyn Adapter, guest: &Guest<'_>) -> Result<Running<'_>> {
        self.clear()?;
        let ready = UnixListener::bind(self.file(&format!("vsock_{RUNTIME_PORT}")))?;
        ready.set_nonblocking(true)?;
        self.spawn(peer.boot(guest, self)?, peer.has_vsock().then_some(ready))
    }

    /// Starts a process that goes on from what was saved; returns when it says that the machine runs, with the
    /// moment (CLOCK_MONOTONIC, ns).
    ///
    /// # Errors
    /// When the process ends, refuses or hangs.
    pub fn restore(&self, peer: &dyn Adapter) -> Result<(Running<'_>, u64)> {
        self.clear()?;
        let mut running = self.spawn(peer.restore(self)?, None)?;
        let from = Instant::now();
        while UnixStream::connect(self.api()).is_err() {
            go_on()?;
            running.alive()?;
            if from.elapsed() > self.patience {
                bail!(
                    "no API within {} s; {}",
                    self.patience.as_secs_f32(),
                    self.words()
                );
            }
            std::thread::sleep(API_LOOK);
        }
        peer.resume(self).map_err(|error| running.explain(error))?;
        Ok((running, monotonic_ns()))
    }

    /// What an earlier process left that would be in the way.
    fn clear(&self) -> Result<()> {
        let port = format!("vsock_{RUNTIME_PORT}");
        for name in ["api", "vsock", &port, SERIAL, LOG] {
            match fs::remove_file(self.file(name)) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("removing the old {name}"));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn spawn(&self, mut command: Command, ready: Option<UnixListener>) -> Result<Running<'_>> {
        command
            // Some keep throw-away layers there.
            .env("TMPDIR", self.dir.path())
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .stdout(fs::File::create(self.serial())?)
            .stderr(fs::File::create(self.file(LOG))?);
        let in_child = || {
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
            Ok(())
        };
        // SAFETY: between fork and exec the closure makes one system call (prctl) and nothing else.
        unsafe { command.pre_exec(in_child) };
        let spawned_ns = monotonic_ns();
        let child = command
            .spawn()
            .with_context(|| format!("starting {}", command.get_program().display()))?;
        let process = Process(child);
        Ok(Running {
            alarm: Alarm::of(&process.0, self.patience)?,
            place: self,
            process,
            ready,
            spawned_ns,
        })
    }

    fn words(&self) -> String {
        last_words(self.dir.path(), &[LOG, SERIAL])
    }
}

/// A machine's process.
#[derive(Debug)]
pub struct Running<'p> {
    place: &'p Place,
    /// Before the process: it is not watched when it is reaped.
    alarm: Alarm,
    process: Process,
    ready: Option<UnixListener>,
    /// CLOCK_MONOTONIC right before the process was made, in nanoseconds.
    pub spawned_ns: u64,
}

impl Running<'_> {
    /// Its process.
    pub fn pid(&self) -> u32 {
        self.process.0.id()
    }

    /// Waits for the console's ready line, and for the runtime's connection if it can make one.
    ///
    /// # Errors
    /// When the process ends first or it takes too long.
    pub fn ready(&mut self) -> Result<Seen> {
        let patience = self.place.patience;
        let seen = watch(
            &mut self.process,
            self.spawned_ns,
            &self.place.serial(),
            true,
            self.ready.as_ref(),
            patience,
        );
        seen.map_err(|error| self.explain(error))
    }

    /// Waits for the runtime's first HELLO, the ready line on the way.
    ///
    /// # Errors
    /// When the process ends first or it takes too long.
    pub fn hello(&mut self) -> Result<Ready> {
        let seen = self.ready()?;
        let spawned_ns = self.spawned_ns;
        Ready::of(seen, spawned_ns).map_err(|error| self.explain(error))
    }

    /// A new connection to the runtime, as far as its HELLO.
    ///
    /// # Errors
    /// When nobody answers.
    pub fn connect(&mut self) -> Result<RuntimeClient> {
        RuntimeClient::connect(&self.place.vsock(), self.place.patience)
            .context("calling the runtime")
            .map_err(|error| self.explain(error))
    }

    /// Asks something of it; when that takes longer than it may, it is killed. An error has its last words.
    ///
    /// # Errors
    /// That of the question.
    pub fn asked<T>(&mut self, question: impl FnOnce() -> Result<T>) -> Result<T> {
        self.alarm.set();
        let answer = question();
        self.alarm.rest();
        answer.map_err(|error| self.explain(error))
    }

    /// An error if it has ended.
    ///
    /// # Errors
    /// With its last words.
    pub fn alive(&mut self) -> Result<()> {
        match self.process.0.try_wait()? {
            Some(status) => bail!("it ended ({status}); {}", self.place.words()),
            None => Ok(()),
        }
    }

    /// The same error with the process's last words, unless it has them.
    pub fn explain(&mut self, error: anyhow::Error) -> anyhow::Error {
        // A process that dies closes its sockets first.
        std::thread::sleep(Duration::from_millis(50));
        let error = match self.process.0.try_wait() {
            Ok(Some(status)) => error.context(format!("it ended ({status})")),
            _ => error,
        };
        explain(error, &self.place.words())
    }
}
