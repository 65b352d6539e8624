//! userfaultfd(2): the descriptor and the few ioctls that a pager needs, from linux/userfaultfd.h.
//!
//! Why not the crate `userfaultfd`: building it takes libclang on every user's machine, and its
//! `copy`, which has the ioctls' partial results wrong, is not needed here.

use std::ffi::c_void;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, Setter, Updater, ioctl, opcode};
use rustix::mm::UserfaultfdFlags;

use crate::pages::PAGE_BYTES;

const GROUP: u8 = 0xaa;
const API: u64 = 0xaa;
const MISSING_SHMEM: u64 = 1 << 5;
const MINOR_SHMEM: u64 = 1 << 10;
const MODE_MISSING: u64 = 1 << 0;
const MODE_MINOR: u64 = 1 << 2;
const EVENT_PAGEFAULT: u8 = 0x12;
/// `struct uffd_msg`.
const MESSAGE_BYTES: usize = 32;
/// Messages read at once.
const MESSAGES: usize = 64;
/// How often a range that is being changed is tried again.
const TRIES: usize = 1000;

#[repr(C)]
struct ApiArg {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct RegisterArg {
    range: Range,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_zeropage` and `struct uffdio_continue` have one layout.
#[repr(C)]
struct ResolveArg {
    range: Range,
    mode: u64,
    /// Bytes that were resolved, or a negative error.
    done: i64,
}

const UFFDIO_API: Opcode = opcode::read_write::<ApiArg>(GROUP, 0x3f);
const UFFDIO_REGISTER: Opcode = opcode::read_write::<RegisterArg>(GROUP, 0x00);
const UFFDIO_WAKE: Opcode = opcode::read::<Range>(GROUP, 0x02);
const UFFDIO_ZEROPAGE: Opcode = opcode::read_write::<ResolveArg>(GROUP, 0x04);
const UFFDIO_CONTINUE: Opcode = opcode::read_write::<ResolveArg>(GROUP, 0x07);
/// On /dev/userfaultfd.
const USERFAULTFD_IOC_NEW: Opcode = opcode::none(GROUP, 0x00);

/// `USERFAULTFD_IOC_NEW`: its result is a descriptor.
struct New(u32);

// SAFETY: the argument is a plain number, the result a new descriptor that nobody else has.
unsafe impl Ioctl for New {
    type Output = OwnedFd;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        USERFAULTFD_IOC_NEW
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::without_provenance_mut(self.0 as usize)
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> rustix::io::Result<OwnedFd> {
        use std::os::fd::FromRawFd as _;
        // SAFETY: the kernel has just made it for us.
        Ok(unsafe { OwnedFd::from_raw_fd(out) })
    }
}

/// With what a range is resolved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum With {
    /// What the memfd has there.
    Memory,
    /// The system's zero page.
    Zeroes,
}

/// What became of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Resolved {
    /// It is there, or not ours any more.
    Yes,
    /// The process has gone.
    ProcessGone,
}

/// A userfaultfd. For as long as any copy of it is open, faults in what is registered wait.
#[derive(Debug)]
pub struct Userfaultfd(OwnedFd);

/// Whether this process may have a userfaultfd that also sees the kernel's own accesses.
///
/// # Errors
/// The system's word.
pub fn is_permitted() -> io::Result<()> {
    Userfaultfd::new().map(drop)
}

impl Userfaultfd {
    /// One of this process's memory, that also sees accesses by the kernel (KVM, reads into guest
    /// memory): from /dev/userfaultfd, else by the system call.
    ///
    /// # Errors
    /// `EPERM`: neither is permitted. `EINVAL`: Linux before 5.14.
    pub fn new() -> io::Result<Self> {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/userfaultfd");
        let fd = match device {
            // SAFETY: the ioctl takes flags and gives a descriptor.
            Ok(device) => unsafe { ioctl(&device, New(flags.bits())) },
            // SAFETY: the call only makes a descriptor; no memory is registered with it yet.
            Err(_) => unsafe { rustix::mm::userfaultfd(flags) },
        }?;
        let mut arg = ApiArg {
            api: API,
            features: MISSING_SHMEM | MINOR_SHMEM,
            ioctls: 0,
        };
        // SAFETY: the argument is `struct uffdio_api`.
        unsafe { ioctl(&fd, Updater::<UFFDIO_API, _>::new(&mut arg)) }?;
        Ok(Self(fd))
    }

    /// One that another process made and sent; `None` when it is something else, whose reads could wait or
    /// be without end.
    pub(super) fn from_fd(fd: OwnedFd) -> Option<Self> {
        use std::os::fd::AsRawFd as _;
        let what = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok()?;
        let flags = rustix::fs::fcntl_getfl(&fd).ok()?;
        let is_one = what.as_os_str() == "anon_inode:[userfaultfd]";
        (is_one && flags.contains(rustix::fs::OFlags::NONBLOCK)).then_some(Self(fd))
    }

    /// From now on the first touch of every page of a mapping of a memfd is a fault that waits.
    ///
    /// # Errors
    /// `EINVAL`: not a mapping of a memfd, or Linux before 5.14.
    pub fn register(&self, address: usize, length: usize) -> io::Result<()> {
        let mut arg = RegisterArg {
            range: Range {
                start: address as u64,
                len: length as u64,
            },
            mode: MODE_MISSING | MODE_MINOR,
            ioctls: 0,
        };
        // SAFETY: the argument is `struct uffdio_register`. Registering changes no byte of memory;
        // it only delays accesses.
        unsafe { ioctl(&self.0, Updater::<UFFDIO_REGISTER, _>::new(&mut arg)) }?;
        Ok(())
    }

    /// Reads the addresses of faults that wait; none when there are none just now.
    ///
    /// # Errors
    /// The system's word.
    pub(super) fn faults(&self, into: &mut Vec<u64>) -> io::Result<()> {
        let mut messages = [0; MESSAGES * MESSAGE_BYTES];
        into.clear();
        let length = match rustix::io::read(&self.0, &mut messages) {
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            other => other?,
        };
        for message in messages[..length].as_chunks::<MESSAGE_BYTES>().0 {
            // event u8, 7 reserved, flags u64, address u64
            if message[0] == EVENT_PAGEFAULT {
                into.push(crate::binary::number64(message, 16));
            }
        }
        Ok(())
    }

    /// Resolves all of a range, page-aligned, that is not resolved yet, and wakes who waits in it.
    /// Pages that are there already, or are not registered any more, are left alone.
    ///
    /// # Errors
    /// `EFAULT`: with [`With::Memory`], a page is not in the memfd.
    pub(super) fn resolve(&self, start: u64, length: u64, with: With) -> io::Result<Resolved> {
        let end = start + length;
        let (mut at, mut most, mut tries) = (start, length, 0);
        while at < end {
            let mut arg = ResolveArg {
                range: Range {
                    start: at,
                    len: most.min(end - at),
                },
                mode: 0,
                done: 0,
            };
            // SAFETY: the argument is that of both ioctls. They put pages where there are none, in
            // memory of a process that has registered it for that.
            let result = unsafe {
                match with {
                    With::Memory => ioctl(&self.0, Updater::<UFFDIO_CONTINUE, _>::new(&mut arg)),
                    With::Zeroes => ioctl(&self.0, Updater::<UFFDIO_ZEROPAGE, _>::new(&mut arg)),
                }
            };
            match result {
                Ok(()) => at += arg.range.len,
                // A part, up to a page that is there.
                Err(Errno::AGAIN) if arg.done > 0 => at += arg.done as u64,
                Err(Errno::AGAIN) if tries < TRIES => {
                    tries += 1;
                    std::thread::yield_now();
                }
                Err(Errno::EXIST) => at += PAGE_BYTES,
                // Not all of it is registered: page by page then.
                Err(Errno::NOENT) if most > PAGE_BYTES => most = PAGE_BYTES,
                Err(Errno::NOENT) => at += PAGE_BYTES,
                Err(Errno::SRCH) => return Ok(Resolved::ProcessGone),
                Err(error) => return Err(error.into()),
            }
        }
        self.wake(start, length)
    }

    /// Lets who waits in a range try again: whoever saw a page come meanwhile was not woken by it.
    fn wake(&self, start: u64, len: u64) -> io::Result<Resolved> {
        let range = Range { start, len };
        // SAFETY: the argument is `struct uffdio_range`; waking changes no memory.
        match unsafe { ioctl(&self.0, Setter::<UFFDIO_WAKE, _>::new(range)) } {
            Ok(()) => Ok(Resolved::Yes),
            Err(Errno::SRCH) => Ok(Resolved::ProcessGone),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
