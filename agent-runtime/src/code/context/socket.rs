//! Control sockets: how they are made, and how a context learns who is at the other end.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;

use ratoon_protocol::{ErrorCode, ErrorReply};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
    recvmsg,
};

use crate::swap::forms::Fd;

/// Two ends of a control socket.
pub(in crate::code) fn socket_pair() -> Result<(OwnedFd, OwnedFd), ErrorReply> {
    let flags = SocketFlags::CLOEXEC;
    rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(|error| ErrorReply::new(ErrorCode::NoSpace, format!("no socket: {error}")))
}

/// Receives the first message, and from the kernel who sent it: what a guest program says of its
/// own process id is not to be believed, we signal it as root.
pub(super) fn receive_with_pid(
    control: &Fd,
    scratch: &mut [u8],
) -> rustix::io::Result<(usize, Option<i32>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(scratch)];
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(control, &mut parts, &mut ancillary, flags)?;
    let mut pid = None;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmCredentials(who) = message {
            pid = Some(who.pid.as_raw_nonzero().get());
        }
    }
    Ok((received.bytes, pid))
}
