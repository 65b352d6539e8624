//! The kernel calls for which rustix has no safe form: vsock addresses, signalfd, and the fork
//! that shares memory. Every `unsafe` of the runtime is in here or in [`crate::spawn`].

use std::ffi::{CString, c_char};
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

/// vsock context id of the host (`VMADDR_CID_HOST`, linux/vm_sockets.h).
pub const CID_HOST: u32 = 2;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn owned(result: libc::c_int) -> io::Result<OwnedFd> {
    let fd = check(result)?;
    // SAFETY: the kernel has just made this descriptor for us; nothing else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn vm_address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: sockaddr_vm is plain integers; all zeroes is a value of it.
    let mut address: libc::sockaddr_vm = unsafe { mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

const VM_ADDRESS_LEN: libc::socklen_t = mem::size_of::<libc::sockaddr_vm>() as libc::socklen_t;

fn vsock_socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: takes three integers.
    owned(unsafe { libc::socket(libc::AF_VSOCK, kind, 0) })
}

/// A listening vsock socket for every context id.
pub fn vsock_listen(port: u32) -> io::Result<OwnedFd> {
    let fd = vsock_socket()?;
    let address = vm_address(libc::VMADDR_CID_ANY, port);
    // SAFETY: `address` lives through the call and has the length given.
    check(unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), VM_ADDRESS_LEN) })?;
    // SAFETY: takes two integers.
    check(unsafe { libc::listen(fd.as_raw_fd(), 128) })?;
    Ok(fd)
}

/// Begins to connect to a port of the host; the socket is writable when it is decided.
pub fn vsock_connect_host(port: u32) -> io::Result<OwnedFd> {
    let fd = vsock_socket()?;
    let address = vm_address(CID_HOST, port);
    // SAFETY: `address` lives through the call and has the length given.
    let result = check(unsafe {
        libc::connect(fd.as_raw_fd(), (&raw const address).cast(), VM_ADDRESS_LEN)
    });
    match result {
        Ok(_) => Ok(fd),
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(fd),
        Err(error) => Err(error),
    }
}

/// Accepts a connection, non-blocking, and the vsock context id of its peer (`None` when the
/// listener is of another family).
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<(OwnedFd, Option<u32>)> {
    let mut address = vm_address(0, 0);
    let mut len = VM_ADDRESS_LEN;
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: the kernel writes at most `len` bytes to `address`; both live through the call.
    let fd = owned(unsafe {
        libc::accept4(
            listener.as_raw_fd(),
            (&raw mut address).cast(),
            &raw mut len,
            flags,
        )
    })?;
    let is_vsock = i32::from(address.svm_family) == libc::AF_VSOCK && len == VM_ADDRESS_LEN;
    Ok((fd, is_vsock.then_some(address.svm_cid)))
}

/// Blocks SIGCHLD and makes it readable from a descriptor; blocks SIGPIPE, which must not hit us and
/// must keep its default action for the programs that we start. No other signal ends PID 1.
pub fn block_signals() -> io::Result<OwnedFd> {
    // SAFETY: the sets are ours, sigset_t is plain data, and only this thread's mask changes.
    unsafe {
        let mut blocked: libc::sigset_t = mem::zeroed();
        libc::sigemptyset(&raw mut blocked);
        libc::sigaddset(&raw mut blocked, libc::SIGCHLD);
        libc::sigaddset(&raw mut blocked, libc::SIGPIPE);
        check(libc::sigprocmask(
            libc::SIG_BLOCK,
            &raw const blocked,
            std::ptr::null_mut(),
        ))?;
        let mut child: libc::sigset_t = mem::zeroed();
        libc::sigemptyset(&raw mut child);
        libc::sigaddset(&raw mut child, libc::SIGCHLD);
        owned(libc::signalfd(
            -1,
            &raw const child,
            libc::SFD_CLOEXEC | libc::SFD_NONBLOCK,
        ))
    }
}

/// A child that is dead and taken away.
pub struct Dead {
    /// Its process id.
    pub pid: i32,
    /// As wait(2) tells it.
    pub status: libc::c_int,
    /// What it and its own dead children used.
    pub used: libc::rusage,
}

/// Takes away one dead child, whichever, without waiting; `None` when none is dead.
///
/// # Errors
/// ECHILD when there is no child at all.
pub fn reap() -> io::Result<Option<Dead>> {
    // SAFETY: rusage is plain integers; all zeroes is a value of it.
    let mut used: libc::rusage = unsafe { mem::zeroed() };
    let mut status = 0;
    // SAFETY: both pointers are to locals that live through the call.
    let pid = check(unsafe { libc::wait4(-1, &raw mut status, libc::WNOHANG, &raw mut used) })?;
    Ok((pid > 0).then_some(Dead { pid, status, used }))
}

/// Whether the kernel says that it has killed this process, which has just died, for want of memory.
/// Its log is where it says whom; so much of that is looked at as `scratch` holds.
pub fn died_of_want(pid: i32, scratch: &mut [u8]) -> bool {
    /// SYSLOG_ACTION_READ_ALL (linux/syslog.h): the last of the log, which stays as it is.
    const READ_ALL: i32 = 3;
    // SAFETY: the kernel writes at most so many bytes as the slice has.
    let len = unsafe {
        libc::syscall(
            libc::SYS_syslog,
            READ_ALL,
            scratch.as_mut_ptr(),
            scratch.len(),
        )
    };
    // None that we may read: nobody can tell.
    let len = usize::try_from(len).unwrap_or(0);
    names_victim(&scratch[..len], pid)
}

/// Whether a kernel log has the line of mm/oom_kill.c that names this process.
fn names_victim(log: &[u8], pid: i32) -> bool {
    let words = format!("Killed process {pid} (");
    log.windows(words.len())
        .any(|window| window == words.as_bytes())
}

/// What [`poll`] waits for: a raw descriptor (-1: none) and POLLIN, POLLOUT.
pub type PollFd = libc::pollfd;

/// A poll entry.
pub fn poll_fd(fd: RawFd, events: i16) -> PollFd {
    PollFd {
        fd,
        events,
        revents: 0,
    }
}

/// poll(2); a time-out rounds up to milliseconds, an interruption counts as nothing ready.
pub fn poll(fds: &mut [PollFd], timeout: Option<Duration>) -> io::Result<()> {
    let ms = timeout.map_or(-1, |time| {
        i32::try_from(time.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
    });
    // SAFETY: pointer and length are those of one slice, which only the kernel writes meanwhile.
    // The descriptors are numbers; a closed one is reported as POLLNVAL.
    match check(unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, ms) }) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => {
            for fd in fds {
                fd.revents = 0;
            }
            Ok(())
        }
        Err(error) => Err(error),
    }
}

/// A second descriptor, closed by execve, for one that is known by its number alone.
pub fn duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: takes three integers; a number that is no descriptor's is refused.
    owned(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) })
}

/// Whether execve closes this descriptor.
pub fn close_on_exec(fd: RawFd, closes: bool) -> io::Result<()> {
    let flags = if closes { libc::FD_CLOEXEC } else { 0 };
    // SAFETY: takes three integers.
    check(unsafe { libc::fcntl(fd, libc::F_SETFD, flags) }).map(drop)
}

/// Takes over a descriptor that came through execve and that nothing else in this process owns.
pub fn inherited(fd: RawFd) -> io::Result<OwnedFd> {
    close_on_exec(fd, true)?;
    owned(fd)
}

/// execveat(2) of an open program, with this environment. Returns only when it fails.
pub fn execute(program: BorrowedFd<'_>, args: &[CString]) -> io::Error {
    let mut argv: Vec<*const c_char> = args.iter().map(|arg| arg.as_ptr()).collect();
    argv.push(std::ptr::null());
    // SAFETY: `argv` is an array of strings that live through the call, with a null at its end, and
    // `environ` is the C library's own; nobody changes it. The path is empty: the descriptor is meant.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            program.as_raw_fd(),
            c"".as_ptr(),
            argv.as_ptr(),
            environ,
            libc::AT_EMPTY_PATH,
        );
    }
    io::Error::last_os_error()
}

// SAFETY: the C library's (environ(7)).
unsafe extern "C" {
    static environ: *const *const c_char;
}

/// Brings the loopback interface up; the kernel gives it its addresses.
pub fn loopback_up() -> io::Result<()> {
    // SAFETY: takes three integers.
    let fd =
        owned(unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: ifreq is plain data; the ioctl reads name and flags from it.
    unsafe {
        let mut request: libc::ifreq = mem::zeroed();
        request.ifr_name[0] = b'l' as libc::c_char;
        request.ifr_name[1] = b'o' as libc::c_char;
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        check(libc::ioctl(
            fd.as_raw_fd(),
            libc::SIOCSIFFLAGS as libc::Ioctl,
            &raw const request,
        ))?;
    }
    Ok(())
}

/// Microseconds of CLOCK_BOOTTIME.
pub fn boot_time_us() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    (time.tv_sec as u64) * 1_000_000 + (time.tv_nsec as u64) / 1_000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_victim_is_found_by_its_number() {
        let log = b"<6>[ 108.05] oom-kill:constraint=CONSTRAINT_NONE,task=tail,pid=56,uid=0\n\
            <3>[ 108.07] Out of memory: Killed process 56 (tail) total-vm:18936kB\n";
        assert!(names_victim(log, 56));
        assert!(!names_victim(log, 5) && !names_victim(log, 560));
        assert!(!names_victim(b"", 56));
    }
}
