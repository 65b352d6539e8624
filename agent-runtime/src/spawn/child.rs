//! The child between clone3(2) and execve(2).
//!
//! It runs in the parent's memory, on a stack of its own, while the parent's thread sleeps: it makes
//! system calls with what [`Shared`] holds, and nothing else. How it fails: it writes the step and
//! errno into [`Shared`] and exits.

use std::ffi::{c_char, c_int};
use std::os::fd::RawFd;
use std::ptr;

/// The child's steps, in order.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) enum Step {
    Session,
    Streams,
    Ids,
    Directory,
    Execute,
}

/// What parent and child share: the child reads its orders and writes how it failed.
#[repr(C)]
pub(super) struct Shared {
    pub(super) argv: *const *const c_char,
    pub(super) envp: *const *const c_char,
    pub(super) programs: *const *const c_char,
    pub(super) directory: *const c_char,
    pub(super) directory_required: bool,
    pub(super) ids: bool,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) groups: *const u32,
    pub(super) groups_len: usize,
    pub(super) fds: [RawFd; 3],
    /// Becomes descriptor 3; -1: none.
    pub(super) extra: RawFd,
    /// The streams are a terminal, to be the session's own.
    pub(super) terminal: bool,
    pub(super) step: Step,
    pub(super) errno: c_int,
    pub(super) tried: usize,
}

/// `struct clone_args` (linux/sched.h), version 2.
#[derive(Default)]
#[repr(C)]
pub(super) struct CloneArgs {
    pub(super) flags: u64,
    pub(super) pidfd: u64,
    pub(super) child_tid: u64,
    pub(super) parent_tid: u64,
    pub(super) exit_signal: u64,
    pub(super) stack: u64,
    pub(super) stack_size: u64,
    pub(super) tls: u64,
    pub(super) set_tid: u64,
    pub(super) set_tid_size: u64,
    pub(super) cgroup: u64,
}

/// linux/sched.h; libc has it with a type that does not fit.
pub(super) const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// clone3(2): the child runs [`child`] on the stack of `args`. Returns its process id, or -errno.
///
/// # Safety
/// `args` has CLONE_VM, CLONE_VFORK and a stack; it and `shared` and all they point to stay as they are
/// until this returns.
pub(super) unsafe fn clone_and_run(args: *const CloneArgs, shared: *mut Shared) -> i64 {
    let result: i64;
    // SAFETY: the parent's path changes rax, rcx and r11 alone, as a system call does. The child comes
    // back from the system call with a stack of its own, never touches this frame and never returns
    // from `child`; its registers are its own copies.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r12",
            "call r13",
            "ud2",
            "2:",
            inlateout("rax") libc::SYS_clone3 => result,
            in("rdi") args,
            in("rsi") size_of::<CloneArgs>(),
            in("r12") shared,
            in("r13") child as extern "C" fn(*mut Shared) -> !,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    result
}

extern "C" fn child(shared: *mut Shared) -> ! {
    // SAFETY: the parent passes a `Shared` and sleeps until we are done with it.
    let shared = unsafe { &mut *shared };
    let errno = child_steps(shared);
    // SAFETY: `shared` is valid as above; volatile for the parent's sake.
    unsafe { ptr::write_volatile(&raw mut shared.errno, errno) };
    // SAFETY: ends this process without any of the parent's exit handlers.
    unsafe { libc::_exit(127) }
}

fn errno() -> c_int {
    // SAFETY: points to this thread's errno, always valid. (The parent's: it sleeps.)
    unsafe { *libc::__errno_location() }
}

/// Returns errno of the step that failed; does not return when the program runs.
fn child_steps(shared: &mut Shared) -> c_int {
    // SAFETY: system calls with integers, or with pointers that the parent prepared and keeps
    // (see `Plan::run`). Ids go through raw system calls: libc's wrappers would try to change all
    // threads of the parent.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
        shared.step = Step::Session;
        if libc::setsid() < 0 {
            return errno();
        }
        shared.step = Step::Streams;
        for (target, &fd) in shared.fds.iter().enumerate() {
            if libc::dup2(fd, target as c_int) < 0 {
                return errno();
            }
        }
        if shared.terminal && libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
            return errno();
        }
        let joined = match shared.extra {
            -1 => 0,
            3 => libc::fcntl(3, libc::F_SETFD, 0),
            fd => libc::dup2(fd, 3),
        };
        if joined < 0 {
            return errno();
        }
        shared.step = Step::Ids;
        if shared.ids {
            let changed = libc::syscall(libc::SYS_setgroups, shared.groups_len, shared.groups) == 0
                && libc::syscall(libc::SYS_setresgid, shared.gid, shared.gid, shared.gid) == 0
                && libc::syscall(libc::SYS_setresuid, shared.uid, shared.uid, shared.uid) == 0;
            if !changed {
                return errno();
            }
        }
        shared.step = Step::Directory;
        if libc::chdir(shared.directory) < 0 && shared.directory_required {
            return errno();
        }
        shared.step = Step::Execute;
        // As execvp: what may not be executed is remembered, the search goes on.
        let mut failed = libc::ENOENT;
        let mut index = 0;
        loop {
            let program = *shared.programs.add(index);
            if program.is_null() {
                return failed;
            }
            libc::execve(program, shared.argv, shared.envp);
            match errno() {
                libc::ENOENT | libc::ENOTDIR if failed == libc::EACCES => {}
                libc::EACCES => {
                    failed = libc::EACCES;
                    shared.tried = index;
                }
                libc::ENOENT | libc::ENOTDIR => shared.tried = index,
                other => {
                    shared.tried = index;
                    return other;
                }
            }
            index += 1;
        }
    }
}
