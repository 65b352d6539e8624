//! The host's side of a network device: an existing tap, or for tests a socket that looks like one.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
};

use super::HEADER_BYTES;

const TUN: &str = "/dev/net/tun";

/// Why a tap cannot be used. Each names the remedy.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// Not a name that an interface can have.
    #[error(
        "tap {0:?} is no interface name: 1 to {max} bytes without blanks or '/'",
        max = libc::IFNAMSIZ - 1
    )]
    Name(String),
    /// No such interface.
    #[error(
        "tap {0:?} does not exist; make it: ip tuntap add dev {0} mode tap user \"$USER\" && \
         ip link set {0} up"
    )]
    Missing(String),
    /// The kernel has no taps, or this user may not use them.
    #[error("open {TUN}: load the module (modprobe tun) and let this user read and write it")]
    Open(#[source] io::Error),
    /// The tap belongs to another user.
    #[error(
        "tap {0:?} belongs to another user; delete it and make it again: ip tuntap add dev {0} \
         mode tap user \"$USER\""
    )]
    Owner(String, #[source] io::Error),
    /// The tap is another process's.
    #[error("tap {0:?} is in use; stop the VM that has it, or make a tap for this one")]
    Busy(String, #[source] io::Error),
    /// The interface is not a tap, or one with several queues.
    #[error("{0:?} is no single-queue tap; make one: ip tuntap add dev NAME mode tap")]
    Kind(String, #[source] io::Error),
    /// Something else.
    #[error("tap {name:?}: {call}; the kernel must be 4.8 or newer")]
    Call {
        /// Its name.
        name: String,
        /// The ioctl.
        call: &'static str,
        /// The kernel's word.
        #[source]
        source: io::Error,
    },
}

/// What carries frames: each read or write is one frame after a virtio_net_hdr of
/// [`HEADER_BYTES`]; neither blocks.
pub trait Backend: Send {
    /// Readable when a frame waits.
    fn fd(&self) -> BorrowedFd<'_>;

    /// The guest takes what these negotiated features say: checksums left out, large frames.
    ///
    /// # Errors
    /// When the host cannot do so.
    fn set_offloads(&mut self, features: u64) -> io::Result<()> {
        let _ = features;
        Ok(())
    }
}

/// An attached tap.
#[derive(Debug)]
pub struct Tap {
    file: OwnedFd,
}

impl Tap {
    /// Attaches to the existing tap `name`.
    ///
    /// # Errors
    /// [`TapError`].
    pub fn open(name: &str) -> Result<Self, TapError> {
        let bad = |c: char| c == '/' || c == '\0' || c.is_whitespace();
        if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains(bad) {
            return Err(TapError::Name(name.into()));
        }
        // TUNSETIFF would make a tap that is not there, and take it away with this process.
        let c_name = CString::new(name).map_err(|_| TapError::Name(name.into()))?;
        // SAFETY: `c_name` is a string that ends with zero and outlives the call.
        if unsafe { libc::if_nametoindex(c_name.as_ptr()) } == 0 {
            return Err(TapError::Missing(name.into()));
        }
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::open(TUN, flags, Mode::empty())
            .map_err(|error| TapError::Open(error.into()))?;

        // SAFETY: an ifreq is plain data, of which all zeroes is a value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *place = byte as libc::c_char;
        }
        let wanted = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = wanted as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes one ifreq.
        let outcome = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &mut request) };
        check(outcome).map_err(|source| match source.raw_os_error() {
            Some(libc::EPERM) => TapError::Owner(name.into(), source),
            Some(libc::EBUSY) => TapError::Busy(name.into(), source),
            Some(libc::EINVAL) => TapError::Kind(name.into(), source),
            _ => TapError::Call {
                name: name.into(),
                call: "TUNSETIFF",
                source,
            },
        })?;

        let mut tap = Self { file };
        let size = HEADER_BYTES as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int.
        let outcome = unsafe { libc::ioctl(tap.file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &size) };
        let call = |call, source| TapError::Call {
            name: name.into(),
            call,
            source,
        };
        check(outcome).map_err(|source| call("TUNSETVNETHDRSZ", source))?;
        tap.set_offloads(0)
            .map_err(|source| call("TUNSETOFFLOAD", source))?;
        Ok(tap)
    }
}

impl Backend for Tap {
    fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn set_offloads(&mut self, features: u64) -> io::Result<()> {
        let mut flags: libc::c_uint = 0;
        for (feature, flag) in [
            (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
            (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
            (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
        ] {
            if features & 1 << feature != 0 {
                flags |= flag;
            }
        }
        // SAFETY: TUNSETOFFLOAD takes its flags by value.
        check(unsafe {
            libc::ioctl(
                self.file.as_raw_fd(),
                libc::TUNSETOFFLOAD,
                libc::c_ulong::from(flags),
            )
        })
    }
}

fn check(outcome: libc::c_int) -> io::Result<()> {
    if outcome < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
