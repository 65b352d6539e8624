//! From the kernel's first user instruction to a usable root: what PID 1 does before it serves.
//!
//! ```text
//!  initramfs: /init (this program), /dev, /proc, /new
//!    1  /dev (devtmpfs), /proc          2  ratoon.* from /proc/cmdline
//!    3  wait for the root disk          4  mount it on /new
//!    5  move /dev and /proc into it, make /new the root
//!    6  /sys, cgroup2, devpts, shm, mqueue, /run; loopback; hostname; a kernel that rests
//! ```
//!
//! The program's own file stays in the initramfs: nothing of it is in the image.
//! How it fails: [`BootError`] names the step; the caller prints it and ends. A file system that
//! only some programs need (mqueue, …) and that cannot be mounted is told in one line and left out.
//! System calls are few on purpose: each costs 0.3 ms on hosts without hardware virtualization.

use std::ffi::{CStr, CString};
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::MountFlags;
use rustix::process::{Resource, Rlimit};

/// How long the root disk may take to appear.
pub const DISK_WAIT: Duration = Duration::from_secs(10);

/// Where the root is mounted before it becomes the root; the initramfs has this directory.
const NEW_ROOT: &CStr = c"/new";

/// What the kernel command line says to the runtime.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// `ratoon.root=`: the root disk, default `/dev/vda`.
    pub root: String,
    /// `ratoon.rootfs=`: its file system, default `ext4`.
    pub root_fs: String,
    /// `ratoon.rootflags=ro|rw`: default `rw`.
    pub read_only: bool,
    /// `ratoon.hostname=`: default `sandbox`.
    pub hostname: String,
    /// `ratoon.ready=console`: say [`READY_LINE`] on the console when the runtime serves, for a
    /// host that has no vsock to be told by. Not said otherwise: a line costs time.
    pub ready_on_console: bool,
}

/// What the kernel does every so often for its own sake, and how seldom it may. kcompactd looks twice a second
/// whether it should make huge pages ready; at 0 it sleeps until one is missed. The counts of memory are gathered
/// each second; 10 s are as good. Neighbours that the kernel itself keeps reachable are seen to each 5 s; there are
/// none. Together they were all that an idle guest did: 4 % of a processor where guest kernels are emulated.
///
/// A processor keeps pages that became free for itself, a tenth of a small machine's memory, and gives them up with
/// the counts: an idle guest's host would have waited minutes for them. At most a 256th it may keep.
const QUIET: [(&str, &str); 5] = [
    ("/proc/sys/vm/compaction_proactiveness", "0"),
    ("/proc/sys/vm/stat_interval", "10"),
    ("/proc/sys/vm/percpu_pagelist_high_fraction", "256"),
    (
        "/proc/sys/net/ipv4/neigh/default/interval_probe_time_ms",
        "3600000",
    ),
    (
        "/proc/sys/net/ipv6/neigh/default/interval_probe_time_ms",
        "3600000",
    ),
];

/// See [`Options::ready_on_console`].
pub const READY_LINE: &str = "ratoon-runtime: ready";

impl Default for Options {
    fn default() -> Self {
        Self {
            root: "/dev/vda".into(),
            root_fs: "ext4".into(),
            read_only: false,
            hostname: "sandbox".into(),
            ready_on_console: false,
        }
    }
}

impl Options {
    /// Reads them out of a kernel command line; words of others are skipped.
    ///
    /// # Errors
    /// [`BootError::Option`] for a `ratoon.` word that is unknown or makes no sense: better a line
    /// on the console than a machine that is not what was asked for.
    pub fn parse(command_line: &str) -> Result<Self, BootError> {
        let mut options = Self::default();
        for word in command_line.split_ascii_whitespace() {
            let Some(word) = word.strip_prefix("ratoon.") else {
                continue;
            };
            let bad = || BootError::Option(format!("ratoon.{}", word.escape_debug()));
            let (name, value) = word.split_once('=').ok_or_else(bad)?;
            let target = match name {
                "root" if value.starts_with("/dev/") => &mut options.root,
                "rootfs" if !value.is_empty() => &mut options.root_fs,
                "hostname" if (1..=64).contains(&value.len()) => &mut options.hostname,
                "rootflags" if matches!(value, "ro" | "rw") => {
                    options.read_only = value == "ro";
                    continue;
                }
                "ready" if value == "console" => {
                    options.ready_on_console = true;
                    continue;
                }
                _ => return Err(bad()),
            };
            value.clone_into(target);
        }
        Ok(options)
    }
}

/// Why the machine does not come up.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A word of the kernel command line.
    #[error("kernel command line: `{0}` is not an option of this runtime")]
    Option(String),
    /// /proc/cmdline.
    #[error("cannot read /proc/cmdline")]
    CommandLine(#[source] io::Error),
    /// The root disk did not appear.
    #[error("root disk {disk} has not appeared within {} s", DISK_WAIT.as_secs())]
    NoDisk {
        /// Its name.
        disk: String,
        /// What the last look said.
        #[source]
        source: io::Error,
    },
    /// The root disk does not mount.
    #[error("cannot mount {disk} as {fs}")]
    Root {
        /// Which disk.
        disk: String,
        /// As which file system.
        fs: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file system that nothing works without.
    #[error("cannot mount {0}")]
    Mount(String, #[source] io::Error),
    /// The image lacks a directory and cannot be given one.
    #[error("the image has no directory {0} and is read-only: add it to the image, or boot it rw")]
    NoDirectory(String),
    /// Another step.
    #[error("cannot {0}")]
    Step(&'static str, #[source] io::Error),
}

/// Does all of the module's steps.
///
/// # Errors
/// See [`BootError`].
pub fn boot() -> Result<Options, BootError> {
    let options = early()?;
    wait_for(&options.root)?;
    mount_root(&options)?;
    enter_root()?;
    finish(&options);
    Ok(options)
}

fn mount(
    source: &CStr,
    target: &CStr,
    fs: &CStr,
    flags: MountFlags,
    data: &CStr,
) -> Result<(), Errno> {
    rustix::mount::mount(source, target, fs, flags, data)
}

const NO_PROGRAMS: MountFlags = MountFlags::NOSUID
    .union(MountFlags::NODEV)
    .union(MountFlags::NOEXEC);

fn early() -> Result<Options, BootError> {
    for (fs, target, flags) in [
        (c"devtmpfs", c"/dev", MountFlags::NOSUID),
        (c"proc", c"/proc", NO_PROGRAMS),
    ] {
        match mount(fs, target, fs, flags, c"") {
            // The kernel may have mounted /dev itself.
            Ok(()) | Err(Errno::BUSY) => {}
            Err(error) => {
                let name = target.to_string_lossy().into_owned();
                return Err(BootError::Mount(name, error.into()));
            }
        }
    }
    let command_line = fs::read("/proc/cmdline").map_err(BootError::CommandLine)?;
    Options::parse(&String::from_utf8_lossy(&command_line))
}

fn wait_for(disk: &str) -> Result<(), BootError> {
    let start = Instant::now();
    let mut pause = Duration::from_millis(5);
    loop {
        let Err(error) = rustix::fs::stat(disk) else {
            return Ok(());
        };
        if start.elapsed() >= DISK_WAIT {
            return Err(BootError::NoDisk {
                disk: disk.into(),
                source: error.into(),
            });
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

fn mount_root(options: &Options) -> Result<(), BootError> {
    let failed = |source| BootError::Root {
        disk: options.root.clone(),
        fs: options.root_fs.clone(),
        source,
    };
    let text = |text: &str| CString::new(text).map_err(|error| failed(error.into()));
    let (disk, fs) = (text(&options.root)?, text(&options.root_fs)?);
    let mut flags = MountFlags::NOATIME;
    if options.read_only {
        flags |= MountFlags::RDONLY;
    }
    mount(&disk, NEW_ROOT, &fs, flags, c"").map_err(|error| failed(error.into()))
}

fn enter_root() -> Result<(), BootError> {
    for (from, to) in [(c"/dev", c"/new/dev"), (c"/proc", c"/new/proc")] {
        let mut result = rustix::mount::mount_move(from, to);
        if result == Err(Errno::NOENT) {
            make_directory(to)?;
            result = rustix::mount::mount_move(from, to);
        }
        let name = from.to_string_lossy().into_owned();
        result.map_err(|error| BootError::Mount(name, error.into()))?;
    }
    let step = |what| move |error: Errno| BootError::Step(what, error.into());
    rustix::process::chdir(NEW_ROOT).map_err(step("enter the root file system"))?;
    rustix::mount::mount_move(c".", c"/").map_err(step("move the root file system to /"))?;
    rustix::process::chroot(c".").map_err(step("make the root file system the root"))?;
    rustix::process::chdir(c"/").map_err(step("enter the new root"))
}

fn make_directory(path: &CStr) -> Result<(), BootError> {
    let shown = || {
        let path = path.to_string_lossy();
        path.strip_prefix("/new").unwrap_or(&path).to_owned()
    };
    match rustix::fs::mkdir(path, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(Errno::ROFS) => Err(BootError::NoDirectory(shown())),
        Err(error) => Err(BootError::Mount(shown(), error.into())),
    }
}

/// What a machine needs and can be short of: told, not fatal.
fn finish(options: &Options) {
    let run = NO_PROGRAMS.difference(MountFlags::NOEXEC);
    let shm = run;
    // Source, where, options, data. devtmpfs is empty: its directories are made first time round.
    let mounts: [(&CStr, &CStr, MountFlags, &CStr); 6] = [
        (c"sysfs", c"/sys", NO_PROGRAMS, c""),
        (c"cgroup2", c"/sys/fs/cgroup", NO_PROGRAMS, c"nsdelegate"),
        (
            c"devpts",
            c"/dev/pts",
            NO_PROGRAMS.difference(MountFlags::NODEV),
            c"gid=5,mode=620,ptmxmode=666",
        ),
        (c"tmpfs", c"/dev/shm", shm, c"mode=1777"),
        (c"mqueue", c"/dev/mqueue", NO_PROGRAMS, c""),
        (c"tmpfs", c"/run", run, c"mode=755"),
    ];
    for (fs, target, flags, data) in mounts {
        if let Err(error) = mount_or_make(fs, target, flags, data) {
            warn(&error);
        }
    }
    // As udev makes them; programs and shells (`<(…)`) count on them.
    for (to, link) in [
        (c"/proc/self/fd", c"/dev/fd"),
        (c"/proc/self/fd/0", c"/dev/stdin"),
        (c"/proc/self/fd/1", c"/dev/stdout"),
        (c"/proc/self/fd/2", c"/dev/stderr"),
    ] {
        let _ = rustix::fs::symlink(to, link);
    }
    if let Err(error) = crate::sys::loopback_up() {
        warn(&BootError::Step("bring the loopback interface up", error));
    }
    if let Err(error) = rustix::system::sethostname(options.hostname.as_bytes()) {
        warn(&BootError::Step("set the hostname", error.into()));
    }
    // Programs may raise their limit of open files; the kernel's first value is 4096.
    let files = Rlimit {
        current: Some(1024),
        maximum: Some(1 << 19),
    };
    let _ = rustix::process::setrlimit(Resource::Nofile, files);
    for (setting, value) in QUIET {
        if let Err(error) = fs::write(setting, value)
            // Another kernel does not have it.
            && error.kind() != io::ErrorKind::NotFound
        {
            warn(&BootError::Step(
                "have the kernel rest when nothing is to be done",
                error,
            ));
        }
    }
    if !options.read_only {
        write_hosts(&options.hostname);
    }
    if let Err((name, error)) = crate::system::keep_in_memory() {
        eprintln!("ratoon-runtime: /etc/{name} stays on the disk: {error}");
    }
    if let Err(error) = crate::system::name_files(&options.hostname) {
        eprintln!("ratoon-runtime: {error}");
    }
}

fn mount_or_make(
    fs: &CStr,
    target: &CStr,
    flags: MountFlags,
    data: &CStr,
) -> Result<(), BootError> {
    let failed =
        |error: Errno| BootError::Mount(target.to_string_lossy().into_owned(), error.into());
    match mount(fs, target, fs, flags, data) {
        Err(Errno::NOENT) => {
            make_directory(target)?;
            mount(fs, target, fs, flags, data).map_err(failed)
        }
        result => result.map_err(failed),
    }
}

/// An image without /etc/hosts gets one, so that its own name resolves.
fn write_hosts(hostname: &str) {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let mode = Mode::from_raw_mode(0o644);
    if let Ok(file) = rustix::fs::open(c"/etc/hosts", flags, mode) {
        let text = format!("127.0.0.1\tlocalhost\n::1\tlocalhost\n127.0.1.1\t{hostname}\n");
        let _ = rustix::io::write(file, text.as_bytes());
    }
}

/// Opens /dev/null with a number above the standard descriptors, which a kernel without a console
/// leaves closed.
///
/// # Errors
/// [`BootError::Step`] when there is no /dev/null.
pub fn open_null() -> Result<OwnedFd, BootError> {
    loop {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let null = rustix::fs::open(c"/dev/null", flags, Mode::empty())
            .map_err(|error| BootError::Step("open /dev/null", error.into()))?;
        if std::os::fd::AsRawFd::as_raw_fd(&null) > 2 {
            return Ok(null);
        }
        // It fills the place of a standard descriptor for good.
        std::mem::forget(null);
    }
}

/// An error and its causes, on one line.
pub fn one_line(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let _ = write!(line, ": {error}");
        source = error.source();
    }
    line
}

fn warn(error: &BootError) {
    eprintln!("ratoon-runtime: {}; going on without", one_line(error));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_says_what_to_mount_and_the_rest_has_defaults() {
        let options = Options::parse("console=ttyS0 ratoon.hostname=box  quiet").unwrap();
        assert_eq!(options.hostname, "box");
        assert_eq!(options.root, "/dev/vda");
        let options = Options::parse(
            "ratoon.root=/dev/vdb ratoon.rootfs=erofs ratoon.rootflags=ro ratoon.ready=console\n",
        )
        .unwrap();
        assert_eq!(
            options,
            Options {
                root: "/dev/vdb".into(),
                root_fs: "erofs".into(),
                read_only: true,
                hostname: "sandbox".into(),
                ready_on_console: true,
            }
        );
    }

    #[test]
    fn a_word_that_makes_no_sense_is_refused_by_name() {
        for word in [
            "ratoon.rot=/dev/vda",
            "ratoon.root=vda",
            "ratoon.rootflags=maybe",
            "ratoon.hostname=",
            "ratoon.ready=yes",
            "ratoon.x",
        ] {
            match Options::parse(word) {
                Err(BootError::Option(found)) => assert_eq!(found, word),
                other => panic!("{word}: {other:?}"),
            }
        }
    }

    #[test]
    fn an_error_is_one_line_with_its_causes() {
        let error = BootError::Root {
            disk: "/dev/vda".into(),
            fs: "ext4".into(),
            source: Errno::INVAL.into(),
        };
        assert_eq!(
            one_line(&error),
            "cannot mount /dev/vda as ext4: Invalid argument (os error 22)"
        );
    }
}
