//! Descriptors: how many there may be, and those that come over the control socket.

use std::collections::VecDeque;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketType, recvmsg, sockopt,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};

/// Descriptors that come with one read; more are closed.
const MOST_AT_ONCE: usize = 4;
/// Descriptors that wait for their request.
const MOST_WAITING: usize = 16;
const PIECE: usize = 4096;

/// Reads once, into `bytes`; descriptors go into `fds`. Zero at the end.
///
/// # Errors
/// Those of the socket.
pub async fn receive(
    stream: &UnixStream,
    bytes: &mut Vec<u8>,
    fds: &mut VecDeque<OwnedFd>,
) -> io::Result<usize> {
    stream
        .async_io(Interest::READABLE, || {
            let mut piece = [0; PIECE];
            let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_AT_ONCE))];
            let mut control = RecvAncillaryBuffer::new(&mut room);
            let mut parts = [IoSliceMut::new(&mut piece)];
            let got = recvmsg(stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?.bytes;
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    fds.extend(rights);
                }
            }
            fds.truncate(MOST_WAITING);
            bytes.extend_from_slice(&piece[..got]);
            Ok(got)
        })
        .await
}

/// Takes a descriptor that somebody sent as the socket to listen at for a VM.
///
/// # Errors
/// When it is none.
pub fn listener(fd: OwnedFd) -> io::Result<UnixListener> {
    let listens =
        sockopt::socket_acceptconn(&fd)? && sockopt::socket_type(&fd)? == SocketType::STREAM;
    if !listens {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let listener = std::os::unix::net::UnixListener::from(fd);
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

/// Lets this process have as many descriptors as it may: each connection is one, each call two or
/// three.
///
/// # Errors
/// When the kernel refuses.
pub fn raise_descriptors() -> io::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limit.maximum,
            ..limit
        },
    )?;
    Ok(())
}

/// How many connections of guests there may be: as configured, but never more than half of the
/// descriptors; the others are for calls, records and listeners.
pub(crate) fn most_connections(configured: u32) -> usize {
    let all = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    (configured as usize).min(usize::try_from(all / 2).unwrap_or(usize::MAX))
}
