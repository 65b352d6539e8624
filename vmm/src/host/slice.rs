//! How long a vCPU runs before another's turn, where guest kernels are emulated.
//!
//! A guest that was kept waiting has timers to see to when its turn comes: some ten thousand instructions, 10 ms
//! there. With the scheduler's usual slice of 3 ms many busy guests do nothing else; 100 forked children on two
//! processors were not through after ten minutes, and with this slice after twenty seconds.

use std::io;

/// The longest that the kernel takes (SCHED(7), `sched_runtime` of SCHED_OTHER since Linux 6.12; older ones
/// ignore it).
const LONGEST_NS: u64 = 100_000_000;

/// Gives the calling thread the longest slice; its policy and nice value stay.
///
/// # Errors
/// The kernel's: the thread keeps what it had.
pub fn lengthen() -> io::Result<()> {
    let mut attr = get()?;
    let policy = i32::try_from(attr.sched_policy).unwrap_or(-1);
    if policy == libc::SCHED_OTHER || policy == libc::SCHED_BATCH {
        attr.sched_runtime = LONGEST_NS;
        set(&attr)?;
    }
    Ok(())
}

/// Room for the kernel's answer, of the size that it was given first.
fn get() -> io::Result<libc::sched_attr> {
    // SAFETY: all-zero is a value of this plain C struct.
    let mut attr: libc::sched_attr = unsafe { std::mem::zeroed() };
    let size = size_of::<libc::sched_attr>() as u32;
    // SAFETY: `attr` is writable and `size` bytes long; 0 is the calling thread.
    let done = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attr, size, 0) };
    match done {
        0 => Ok(attr),
        _ => Err(io::Error::last_os_error()),
    }
}

fn set(attr: &libc::sched_attr) -> io::Result<()> {
    // SAFETY: `attr` says its own size, as `sched_getattr` filled it in; 0 is the calling thread.
    match unsafe { libc::syscall(libc::SYS_sched_setattr, 0, std::ptr::from_ref(attr), 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_has_the_longer_slice_and_all_else_as_before() {
        let thread = std::thread::spawn(|| {
            // SAFETY: no memory is involved; the thread becomes nicer, which anybody may.
            unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 3) };
            lengthen().unwrap();
            get().unwrap()
        });
        let attr = thread.join().unwrap();
        assert_eq!(attr.sched_nice, 3);
        assert_eq!(attr.sched_policy, libc::SCHED_OTHER as u32);
        if attr.sched_runtime != 0 {
            assert_eq!(attr.sched_runtime, LONGEST_NS);
        }
    }
}
