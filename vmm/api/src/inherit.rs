//! What a VMM gets from the process that starts it: descriptors, over the Unix socket that is its
//! standard input.
//!
//! One message of one byte carries them in this order: the configuration (a file), the listening
//! control socket, the read end of the owner's lifeline, the pager's socket when the configuration says
//! that there is one, the generation's files when it says that they come so, then any that only have to
//! stay open. So the
//! owner can use `posix_spawn`, whose cost does not grow with the owner's memory as that of `fork`
//! does, and no other child of it ever has these descriptors.
//!
//! A shell gets the same message later, with the VM's log in front.

use std::fs::File;
use std::io::{Error, ErrorKind, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// So many descriptors go with a message (the kernel's SCM_MAX_FD).
const MAX_FDS: usize = 253;

/// Sends a VMM's descriptors, in their order, to the other end of `socket`, which becomes its
/// standard input.
///
/// # Errors
/// More descriptors than the kernel passes at once.
pub fn send_descriptors(socket: &UnixStream, fds: &[BorrowedFd<'_>]) -> std::io::Result<()> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if fds.len() > MAX_FDS || !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Error::other("too many descriptors for one VMM"));
    }
    let byte = [IoSlice::new(b"v")];
    sendmsg(socket, &byte, &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Descriptors of a VMM whose owner speaks to it over standard input.
#[derive(Debug)]
pub struct Inherited {
    /// The configuration, JSON.
    pub config: File,
    /// The control socket.
    pub control: UnixListener,
    /// Its hang-up ends the VM.
    pub lifeline: OwnedFd,
    /// The pager's and the generation's, if the configuration says so; the rest only stay open as long as
    /// the process lives.
    pub kept: Vec<OwnedFd>,
}

impl Inherited {
    /// Takes them from standard input.
    ///
    /// # Errors
    /// When that is no such socket, or less than three descriptors come.
    pub fn take() -> std::io::Result<Self> {
        Self::of(receive()?)
    }

    /// Takes a shell's: as [`Inherited::take`], and the VM's log. `None`: the owner has gone.
    ///
    /// # Errors
    /// See there.
    pub fn take_later() -> std::io::Result<Option<(File, Self)>> {
        let mut fds = match receive() {
            Ok(fds) => fds,
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(error),
        };
        if fds.is_empty() {
            return Err(Error::other("no descriptors came"));
        }
        let log = fds.remove(0).into();
        Ok(Some((log, Self::of(fds)?)))
    }

    fn of(fds: Vec<OwnedFd>) -> std::io::Result<Self> {
        let mut fds = fds.into_iter();
        match (fds.next(), fds.next(), fds.next()) {
            (Some(config), Some(control), Some(lifeline)) => Ok(Self {
                config: config.into(),
                control: control.into(),
                lifeline,
                kept: fds.collect(),
            }),
            _ => Err(Error::other("less than three descriptors came")),
        }
    }
}

/// One message's descriptors, from standard input.
fn receive() -> std::io::Result<Vec<OwnedFd>> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let stdin = std::io::stdin();
    let flags = RecvFlags::CMSG_CLOEXEC;
    let into = &mut [IoSliceMut::new(&mut byte)];
    let received = recvmsg(&stdin, into, &mut ancillary, flags)?;
    if received.bytes != 1 {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    let fds = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    Ok(fds.flatten().collect())
}
