//! Quiet, for the moment of a freeze: processes stopped, what is dirty written back, `/` frozen.
//!
//! ```text
//!   freeze:  processes (cgroup freezer, at most 20 s) --> sync --> FIFREEZE      a failure undoes
//!   thaw:    FITHAW --> processes                                               what was done
//! ```
//!
//! All of it may take long and runs on threads; one at a time. While processes are frozen a program
//! cannot be started (it would freeze before its exec, and whoever waits for that with it), and
//! while file systems are frozen nothing may be written to `/`: the loop asks
//! [`programs_wait`], [`are_processes_frozen`] and [`are_file_systems_frozen`] before it does such a thing.
//! It hears of a freeze when that is asked for, before a thread begins it: a program that the loop is about to
//! execute then has been executed before.
//!
//! How it fails: `busy` when processes do not stop in time (one waits for a disk); `unsupported`
//! without the cgroup freezer; the system's reason otherwise. Nothing is frozen then that was not.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use ratoon_protocol::{ErrorCode, ErrorReply, FreezeParams};
use rustix::fs::{Mode, OFlags, StatVfsMountFlags};
use rustix::io::Errno;
use serde_json::Value;

use super::settings::last_error;
use super::{failed, only_init};
use crate::groups::BASE;
use crate::sys;
use crate::work::Work;

/// How long processes may take to stop.
const STOP_WAIT: Duration = Duration::from_secs(20);

/// _IOWR('X', 119, int) and _IOWR('X', 120, int), linux/fs.h.
const FIFREEZE: u32 = 0xc004_5877;
const FITHAW: u32 = 0xc004_5878;

/// Held by whoever freezes or thaws.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
/// True from before the first process stops until after the last goes on.
static PROCESSES: AtomicBool = AtomicBool::new(false);
/// The same for writers to `/`.
static FILE_SYSTEMS: AtomicBool = AtomicBool::new(false);

/// A `wake` will let processes go on.
static UNTIL_WAKE: AtomicBool = AtomicBool::new(false);

/// Freezes of processes that were asked for and have neither happened nor failed.
static STOPS_TO_COME: AtomicUsize = AtomicUsize::new(0);
/// The same of file systems.
static FREEZES_TO_COME: AtomicUsize = AtomicUsize::new(0);

/// Whether whoever wants to start a program now is to wait.
pub fn programs_wait() -> bool {
    STOPS_TO_COME.load(Ordering::SeqCst) > 0
        || (are_processes_frozen() && UNTIL_WAKE.load(Ordering::SeqCst))
}

/// Whether a program that is started now would stand still.
pub fn are_processes_frozen() -> bool {
    PROCESSES.load(Ordering::SeqCst)
}

/// Whether a write to `/` would wait, or soon.
pub fn are_file_systems_frozen() -> bool {
    FREEZES_TO_COME.load(Ordering::SeqCst) > 0 || FILE_SYSTEMS.load(Ordering::SeqCst)
}

/// A freeze on its way; dropped when it is over or will not be.
struct ToCome(Vec<&'static AtomicUsize>);

impl ToCome {
    fn of(params: FreezeParams) -> Self {
        let wanted = [
            (params.processes, &STOPS_TO_COME),
            (params.file_systems, &FREEZES_TO_COME),
        ];
        let counts = wanted.into_iter().filter(|(is_wanted, _)| *is_wanted);
        let counts: Vec<_> = counts.map(|(_, count)| count).collect();
        for count in &counts {
            count.fetch_add(1, Ordering::SeqCst);
        }
        Self(counts)
    }
}

impl Drop for ToCome {
    fn drop(&mut self) {
        for count in &self.0 {
            count.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

/// Writes all file systems back.
pub fn sync() -> Work {
    Box::new(|_| {
        rustix::fs::sync();
        Ok(Value::Null)
    })
}

/// Brings processes and file systems to a halt.
pub fn freeze(params: FreezeParams) -> Work {
    let to_come = ToCome::of(params);
    Box::new(move |_| {
        let _to_come = to_come;
        only_init("processes and file systems")?;
        let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let stops = params.processes && !are_processes_frozen();
        if stops {
            UNTIL_WAKE.store(params.until_wake, Ordering::SeqCst);
            PROCESSES.store(true, Ordering::SeqCst);
            if let Err(error) = stop(Path::new(BASE), STOP_WAIT) {
                PROCESSES.store(false, Ordering::SeqCst);
                return Err(error);
            }
        }
        rustix::fs::sync();
        if params.file_systems
            && !FILE_SYSTEMS.load(Ordering::SeqCst)
            && let Err(error) = freeze_root()
        {
            if stops {
                let _ = go_on(Path::new(BASE));
                PROCESSES.store(false, Ordering::SeqCst);
            }
            return Err(error);
        }
        Ok(Value::Null)
    })
}

/// Lets them go on.
pub fn thaw(params: FreezeParams) -> Work {
    Box::new(move |_| {
        let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        if params.file_systems {
            thaw_root()?;
        }
        if params.processes && are_processes_frozen() {
            go_on(Path::new(BASE))?;
            PROCESSES.store(false, Ordering::SeqCst);
        }
        Ok(Value::Null)
    })
}

/// Thaws `/` for a `wake` that has to write to it; processes stay as they are, so that none sees
/// the old identity.
pub(super) fn thaw_for_wake() -> Result<(), ErrorReply> {
    let _guard = alone()?;
    thaw_root()
}

/// The switch of [`Thaw`], opened ahead.
pub(super) fn open_switch() -> Result<OwnedFd, ErrorReply> {
    open_file(Path::new(BASE), "cgroup.freeze", OFlags::WRONLY)
}

/// The last step of a `wake`, all but done: processes go on, without a thread.
#[derive(Debug)]
pub struct Thaw<'s> {
    switch: Option<BorrowedFd<'s>>,
    _alone: MutexGuard<'static, ()>,
}

impl<'s> Thaw<'s> {
    /// `switch` is from `expect_wake`.
    ///
    /// # Errors
    /// `busy` while a freeze or thaw is under way.
    pub fn ready(switch: Option<BorrowedFd<'s>>) -> Result<Self, ErrorReply> {
        let _alone = alone()?;
        Ok(Self { switch, _alone })
    }

    /// Lets them go on, if they do not.
    ///
    /// # Errors
    /// The system's reason.
    pub fn go(self) -> Result<(), ErrorReply> {
        if !are_processes_frozen() {
            return Ok(());
        }
        match self.switch {
            Some(switch) => {
                rustix::io::write(switch, b"0").map_err(|error| failed("cgroup.freeze", error))?;
            }
            None => go_on(Path::new(BASE))?,
        }
        PROCESSES.store(false, Ordering::SeqCst);
        Ok(())
    }
}

/// Nobody else freezes or thaws; never waits.
fn alone() -> Result<MutexGuard<'static, ()>, ErrorReply> {
    match ONE_AT_A_TIME.try_lock() {
        Ok(guard) => Ok(guard),
        Err(TryLockError::Poisoned(guard)) => Ok(guard.into_inner()),
        Err(TryLockError::WouldBlock) => Err(failed("a freeze or thaw is under way", Errno::BUSY)),
    }
}

fn freeze_root() -> Result<(), ErrorReply> {
    let refused = |error| failed("cannot freeze /", error);
    if !is_on_disk().map_err(refused)? {
        return Ok(());
    }
    // Before the kernel does it: the loop must not begin a write meanwhile.
    FILE_SYSTEMS.store(true, Ordering::SeqCst);
    match root_ioctl(FIFREEZE) {
        Ok(()) => Ok(()),
        Err(error) => {
            FILE_SYSTEMS.store(false, Ordering::SeqCst);
            Err(refused(error))
        }
    }
}

fn thaw_root() -> Result<(), ErrorReply> {
    if !FILE_SYSTEMS.load(Ordering::SeqCst) {
        return Ok(());
    }
    match root_ioctl(FITHAW) {
        // EINVAL: somebody in the guest has thawed it.
        Ok(()) | Err(Errno::INVAL) => {
            FILE_SYSTEMS.store(false, Ordering::SeqCst);
            Ok(())
        }
        Err(error) => Err(failed("cannot thaw /", error)),
    }
}

/// Whether `/` is on a block device (others have major number 0) and can be written to.
fn is_on_disk() -> Result<bool, Errno> {
    let device = rustix::fs::stat("/")?.st_dev;
    let flags = rustix::fs::statvfs("/")?.f_flag;
    Ok(rustix::fs::major(device) != 0 && !flags.contains(StatVfsMountFlags::RDONLY))
}

fn root_ioctl(request: u32) -> Result<(), Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open("/", flags, Mode::empty())?;
    // SAFETY: the kernel ignores the argument of both (fs/ioctl.c), an integer.
    let result = unsafe { libc::ioctl(root.as_raw_fd(), request as libc::Ioctl, 0) };
    if result < 0 {
        Err(last_error())
    } else {
        Ok(())
    }
}

fn open_file(group: &Path, name: &str, flags: OFlags) -> Result<OwnedFd, ErrorReply> {
    let path = group.join(name);
    rustix::fs::open(&path, flags | OFlags::CLOEXEC, Mode::empty()).map_err(|error| match error {
        Errno::NOENT => ErrorReply::new(
            ErrorCode::Unsupported,
            format!(
                "{}: the guest has no cgroup freezer: {error}",
                path.display()
            ),
        ),
        _ => failed(path.display(), error),
    })
}

/// Stops all processes of a control group, and waits until they stand still.
fn stop(group: &Path, wait: Duration) -> Result<(), ErrorReply> {
    let switch = open_file(group, "cgroup.freeze", OFlags::WRONLY)?;
    let events = open_file(group, "cgroup.events", OFlags::RDONLY)?;
    let turn = |text: &[u8]| {
        let written = rustix::io::write(&switch, text);
        written.map_err(|error| failed(format_args!("{}", group.display()), error))
    };
    turn(b"1")?;
    let result = wait_until_frozen(group, &events, Instant::now() + wait);
    if result.is_err() {
        // The first failure is the one to tell.
        let _ = turn(b"0");
    }
    result
}

fn wait_until_frozen(group: &Path, events: &OwnedFd, until: Instant) -> Result<(), ErrorReply> {
    loop {
        let mut text = [0; 128];
        let len = rustix::io::pread(events, &mut text, 0)
            .map_err(|error| failed(format_args!("{}/cgroup.events", group.display()), error))?;
        if is_frozen(&text[..len]) {
            return Ok(());
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let message = "processes do not stop: one waits for a disk or device in the kernel";
            return Err(ErrorReply::new(ErrorCode::Busy, message));
        }
        // cgroup.events tells of its changes with POLLPRI (admin-guide/cgroup-v2).
        let mut polls = [sys::poll_fd(events.as_raw_fd(), libc::POLLPRI)];
        sys::poll(&mut polls, Some(left)).map_err(|error| {
            let error = Errno::from_io_error(&error).unwrap_or(Errno::IO);
            failed("cannot wait for processes to stop", error)
        })?;
    }
}

fn is_frozen(events: &[u8]) -> bool {
    events
        .split(|byte| *byte == b'\n')
        .any(|line| line == b"frozen 1")
}

fn go_on(group: &Path) -> Result<(), ErrorReply> {
    let switch = open_file(group, "cgroup.freeze", OFlags::WRONLY)?;
    let written = rustix::io::write(&switch, b"0");
    written
        .map(|_| ())
        .map_err(|error| failed(format_args!("{}", group.display()), error))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;
    use std::process::Command;

    use super::*;

    #[test]
    fn frozen_is_a_line_of_its_own() {
        assert!(is_frozen(b"populated 1\nfrozen 1\n"));
        for text in [
            "",
            "populated 1\nfrozen 0\n",
            "frozen 11\n",
            "unfrozen 1\n",
            "frozen 1 ",
        ] {
            assert!(!is_frozen(text.as_bytes()), "{text}");
        }
    }

    #[test]
    fn programs_wait_from_the_moment_that_a_freeze_is_asked_for() {
        let params = FreezeParams {
            processes: true,
            file_systems: false,
            until_wake: false,
        };
        let before = STOPS_TO_COME.load(Ordering::SeqCst);
        let work = freeze(params);
        assert!(programs_wait());
        // No thread could be had for it.
        drop(work);
        assert_eq!(STOPS_TO_COME.load(Ordering::SeqCst), before);
    }

    #[test]
    fn a_machine_without_the_freezer_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let error = stop(dir.path(), STOP_WAIT).unwrap_err();
        assert_eq!(error.code, ErrorCode::Unsupported);
        assert!(error.message.contains("cgroup.freeze"), "{error}");
    }

    #[test]
    fn processes_that_do_not_stop_are_let_go_again() {
        // Stands in for a control group whose process waits for a disk.
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("cgroup.freeze"), "").unwrap();
        fs::write(dir.path().join("cgroup.events"), "populated 1\nfrozen 0\n").unwrap();
        let error = stop(dir.path(), Duration::from_millis(1)).unwrap_err();
        assert_eq!(error.code, ErrorCode::Busy);
        // One descriptor, so the texts follow each other here.
        let switched = fs::read_to_string(dir.path().join("cgroup.freeze")).unwrap();
        assert_eq!(switched, "10");
    }

    /// A control group of this test alone.
    fn real_group() -> PathBuf {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let mount = mounts.lines().find(|line| line.contains(" cgroup2 "));
        let mount = mount
            .expect("cgroup2 is mounted")
            .split(' ')
            .nth(1)
            .unwrap();
        let group = Path::new(mount).join(format!("ratoon-test-{}", std::process::id()));
        fs::create_dir(&group).unwrap();
        group
    }

    #[test]
    fn a_process_of_the_group_stands_still_until_it_may_go_on_as_root() {
        let group = real_group();
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let result = fs::write(group.join("cgroup.procs"), child.id().to_string())
            .map_err(|error| error.to_string())
            .and_then(|()| stop(&group, STOP_WAIT).map_err(|error| error.message));
        let events = fs::read(group.join("cgroup.events"));
        let thawed = go_on(&group);
        child.kill().unwrap();
        child.wait().unwrap();
        fs::remove_dir(&group).unwrap();
        assert_eq!(result, Ok(()));
        assert!(is_frozen(&events.unwrap()));
        assert_eq!(thawed, Ok(()));
    }

    #[test]
    fn a_wake_with_nothing_frozen_has_nothing_to_thaw() {
        assert_eq!(thaw_for_wake(), Ok(()));
        assert_eq!(Thaw::ready(None).and_then(Thaw::go), Ok(()));
    }
}
