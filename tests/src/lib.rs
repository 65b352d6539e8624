//! What the end-to-end tests stand on: the shipped programs, a state directory of their own for
//! each test, and a look at what is left behind.
//!
//! The programs come from `RATOON_BIN_DIR` (`scripts/test` sets it) or from beside the test's own
//! executable. Kernel and image come from the user's cache: `scripts/setup` puts them there. Warm generations are in
//! a cache of the suite's own (see [`cache`]).

use std::ffi::OsStr;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use ratoon_engine::dirs::Dirs;
use ratoon_engine::{Engine, Programs};
use tempfile::TempDir;

pub mod cache;

/// How long any one `ratoon` command may take before a test gives up on it. Guests are slow on
/// hosts without hardware virtualization.
pub const PATIENCE: Duration = Duration::from_secs(240);

/// Whether this host has a KVM that we may use; if not, why not.
///
/// # Errors
/// Why /dev/kvm cannot be opened.
pub fn kvm() -> std::io::Result<()> {
    std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map(drop)
}

/// The folder with `ratoon`, `ratoon-vmm` and `ratoon-runtime`.
pub fn bin_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os("RATOON_BIN_DIR") {
        return dir.into();
    }
    let exe = std::env::current_exe().expect("a test has an executable");
    // target/<triple>/<profile>/deps/e2e-… -> target/<triple>/<profile>
    exe.parent()
        .and_then(Path::parent)
        .expect("it lies in a target directory")
        .to_owned()
}

/// One of the shipped programs.
///
/// # Panics
/// When it has not been built.
pub fn program(name: &str) -> PathBuf {
    let path = bin_dir().join(name);
    assert!(
        path.exists(),
        "{} is missing: run scripts/test, or cargo build first",
        path.display()
    );
    path
}

/// The guest kernel in the user's cache.
pub fn kernel() -> PathBuf {
    cache::users().join("kernel/default/vmlinux")
}

/// What a command did.
#[derive(Debug)]
pub struct Done {
    /// Its exit status.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Done {
    /// The exit code; a signal is an error of the test.
    pub fn code(&self) -> i32 {
        self.status
            .code()
            .unwrap_or_else(|| panic!("ended by a signal: {self:?}"))
    }

    /// Checks that it succeeded, and gives its output.
    pub fn ok(self) -> Self {
        assert!(self.status.success(), "{self:?}");
        self
    }
}

/// Ratoon with a state directory of its own: VMs of other tests and of the user are not seen.
#[derive(Debug)]
pub struct Ratoon {
    state: TempDir,
}

impl Ratoon {
    /// A fresh state directory, with a short path: sockets live in it.
    #[expect(clippy::new_without_default, reason = "it makes a directory")]
    pub fn new() -> Self {
        let state = tempfile::Builder::new()
            .prefix("ratoon-test-")
            .tempdir_in("/tmp")
            .expect("/tmp takes a directory");
        Self { state }
    }

    /// The same; and machines of 256 MiB start from a generation in which Python is ready.
    pub fn warm() -> Self {
        cache::with_python();
        Self::new()
    }

    /// The directory that XDG_STATE_HOME names.
    pub fn state_dir(&self) -> &Path {
        self.state.path()
    }

    /// An engine in this process, of this directory, with the programs that the commands are.
    pub fn engine(&self) -> Engine {
        let programs = Programs {
            vmm: program("ratoon-vmm"),
            runtime: program("ratoon-runtime"),
            pager: program("ratoon-pager"),
            bridge: program("ratoon-bridge"),
            agent: program("ratoon-agent"),
        };
        Engine::new(
            Dirs::new(self.state_dir().join("ratoon"), cache::dir()),
            programs,
        )
    }

    /// The directory of VM records.
    pub fn vms_dir(&self) -> PathBuf {
        self.state.path().join("ratoon/vms")
    }

    /// A `ratoon` command, not yet started.
    pub fn command<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(program("ratoon"));
        command
            .args(args)
            .env("XDG_STATE_HOME", self.state.path())
            .env("XDG_CACHE_HOME", cache::home())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Runs `ratoon` to its end.
    pub fn run<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Done {
        finish(self.command(args).spawn().expect("ratoon can be started"))
    }

    /// Processes that were started with our state directory, or that have a file in it open (a VMM
    /// has an empty environment).
    pub fn processes(&self) -> Vec<i32> {
        let dir = self.state.path();
        let needle = format!("XDG_STATE_HOME={}", dir.display());
        let ours = |pid: &i32| {
            let environ = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            let named = environ
                .split(|byte| *byte == 0)
                .any(|variable| variable == needle.as_bytes());
            named
                || std::fs::read_dir(format!("/proc/{pid}/fd"))
                    .into_iter()
                    .flatten()
                    .flatten()
                    .filter_map(|fd| std::fs::read_link(fd.path()).ok())
                    .any(|file| file.starts_with(dir))
        };
        std::fs::read_dir("/proc")
            .expect("/proc is there")
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
            .filter(|pid| *pid != std::process::id() as i32)
            .filter(ours)
            .collect()
    }

    /// Waits until nothing of ours runs and no VM record is left.
    ///
    /// # Panics
    /// When something is left after 20 s; names it.
    pub fn nothing_is_left(&self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let processes = self.processes();
            let records: Vec<_> = std::fs::read_dir(self.vms_dir())
                .map(|dir| dir.flatten().map(|entry| entry.path()).collect())
                .unwrap_or_default();
            let records: Vec<&PathBuf> = records.iter().filter(|path| path.is_dir()).collect();
            if processes.is_empty() && records.is_empty() {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "left behind: processes {processes:?}, records {records:?}"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Ratoon {
    fn drop(&mut self) {
        for pid in self.processes() {
            if let Some(pid) = rustix::process::Pid::from_raw(pid) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }
}

/// Numbers that look random and are the same each time (splitmix64).
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// All that comes follows from the seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next one.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// One below `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.number() % end
    }

    /// One from 0 to 1.
    pub fn fraction(&mut self) -> f64 {
        self.below(1 << 20) as f64 / f64::from(1 << 20)
    }
}

/// Waits for a child within [`PATIENCE`] and collects its output.
///
/// # Panics
/// When it takes longer; it is killed then.
pub fn finish(child: Child) -> Done {
    finish_within(child, PATIENCE)
}

/// The same, with another patience.
///
/// # Panics
/// When it takes longer; it is killed then.
pub fn finish_within(mut child: Child, patience: Duration) -> Done {
    let collect = |stream: Option<Box<dyn Read + Send>>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(mut stream) = stream {
                let _ = stream.read_to_end(&mut bytes);
            }
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let stdout = collect(child.stdout.take().map(|s| Box::new(s) as _));
    let stderr = collect(child.stderr.take().map(|s| Box::new(s) as _));
    let deadline = Instant::now() + patience;
    let status = loop {
        if let Some(status) = child.try_wait().expect("it is our child") {
            break status;
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            panic!(
                "took longer than {patience:?}; stdout {:?}, stderr {:?}",
                stdout.join(),
                stderr.join()
            );
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    Done {
        status,
        stdout: stdout.join().unwrap_or_default(),
        stderr: stderr.join().unwrap_or_default(),
    }
}
