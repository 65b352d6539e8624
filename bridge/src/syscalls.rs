//! The system calls that the process still makes once it serves.
//!
//! Three filters, of which the strictest answer counts: what nobody here ever does ends the process (`NEVER`); what
//! is not in `ALLOWED` fails with EPERM, since a library may try something new and do without; and `clone3` does not
//! exist (ENOSYS), so that glibc starts threads by `clone`, whose flags can be seen.

use std::collections::BTreeMap;

use libc::{AF_INET, AF_INET6, AF_UNIX, CLONE_THREAD, ENOSYS, EPERM};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter,
};

/// Why there are no filters.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// They cannot be built.
    #[error("the filter cannot be built")]
    Build(#[from] BackendError),
    /// The kernel takes none.
    #[error("the kernel refuses the filter: it needs CONFIG_SECCOMP_FILTER")]
    Install(#[from] seccompiler::Error),
}

/// Starting programs, looking into processes, changing the system: whoever tries it is not this program any more.
const NEVER: &[i64] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_kexec_load,
    libc::SYS_open_by_handle_at,
    libc::SYS_add_key,
    libc::SYS_keyctl,
    libc::SYS_request_key,
    libc::SYS_setuid,
    libc::SYS_setresuid,
    libc::SYS_capset,
];

/// What serving takes, by what it is for.
const ALLOWED: &[i64] = &[
    // Descriptors.
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_fcntl,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_pipe2,
    libc::SYS_eventfd2,
    libc::SYS_ioctl,
    // The record, and what name resolution reads.
    libc::SYS_openat,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_access,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_lseek,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_getdents64,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_flock,
    libc::SYS_ftruncate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fchmod,
    libc::SYS_getcwd,
    // The network; `socket` itself is below.
    libc::SYS_socketpair,
    libc::SYS_connect,
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_recvmmsg,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    // Memory.
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_brk,
    // Threads (`clone` is below), time, signals, the end.
    libc::SYS_clone3,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_prlimit64,
    libc::SYS_uname,
    libc::SYS_sysinfo,
    libc::SYS_getrandom,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_tgkill,
    libc::SYS_prctl,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// From here on this thread, and those that it starts, make no others.
///
/// # Errors
/// When the kernel takes no filter.
pub fn limit() -> Result<(), FilterError> {
    // The last one forbids to add another.
    install(
        listed(&[libc::SYS_clone3]),
        SeccompAction::Allow,
        SeccompAction::Errno(ENOSYS as u32),
    )?;
    install(
        listed(NEVER),
        SeccompAction::Allow,
        SeccompAction::KillProcess,
    )?;
    let mut allowed = listed(ALLOWED);
    let argument = |number, op, value| {
        let condition = SeccompCondition::new(number, SeccompCmpArgLen::Dword, op, value)?;
        SeccompRule::new(vec![condition])
    };
    let families =
        [AF_UNIX, AF_INET, AF_INET6].map(|family| argument(0, SeccompCmpOp::Eq, family as u64));
    let families = families.into_iter().collect::<Result<_, _>>()?;
    allowed.insert(libc::SYS_socket, families);
    // Threads, and no processes.
    let thread = CLONE_THREAD as u64;
    let threads = argument(0, SeccompCmpOp::MaskedEq(thread), thread)?;
    allowed.insert(libc::SYS_clone, vec![threads]);
    install(
        allowed,
        SeccompAction::Errno(EPERM as u32),
        SeccompAction::Allow,
    )
}

fn listed(calls: &[i64]) -> BTreeMap<i64, Vec<SeccompRule>> {
    calls.iter().map(|call| (*call, Vec::new())).collect()
}

fn install(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    listed: SeccompAction,
) -> Result<(), FilterError> {
    let filter = SeccompFilter::new(rules, otherwise, listed, TargetArch::x86_64)?;
    let program = BpfProgram::try_from(filter)?;
    Ok(apply_filter(&program)?)
}
