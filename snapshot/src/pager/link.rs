//! The socket between a pager and a clone: packets (SOCK_SEQPACKET) of at most [`MAX_BYTES`].
//!
//! ```text
//!   pager -> clone  H version u32, bytes of memory u64   with the memfd; its first word
//!   clone -> pager  A count u32, count times: address u64, offset u64, length u64   with the userfaultfd
//!   clone -> pager  C                                    wants all of the memory in the memfd
//!   pager -> clone  D                                    it is
//!   pager -> clone  B                                    it lives; every few seconds
//!   pager -> clone  F reason                             the clone must end
//! ```
//!
//! Numbers are little-endian. A closed socket means that the other side has gone, a silent one that it hangs:
//! a pager says B from a thread that fetches nothing, whatever its storage does.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::uffd::Userfaultfd;
use crate::binary::{number32, number64};
use crate::manifest::MAX_REGIONS;
use crate::pages::PAGE_BYTES;

const VERSION: u32 = 2;
/// The longest packet.
const MAX_BYTES: usize = 4096;
const PART_BYTES: usize = 24;
/// How long a pager may be silent: while it opens its snapshot, and later. Long enough for a host that is
/// short of processors; a slow disk does not count.
pub const SILENCE: Duration = Duration::from_secs(30);
/// A silence is so many waits without a word. A clone that stood still as long as its pager did (a frozen
/// control group, say) misses one of them, and hears the pager in the next.
const WAITS: u32 = 3;

/// A part of a clone's memory: where it is mapped, and what of the memfd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Its address in the clone.
    pub address: u64,
    /// Its offset in memory.
    pub offset: u64,
    /// In bytes.
    pub length: u64,
}

/// What a pager has to say.
#[derive(Debug, PartialEq, Eq)]
pub enum Word {
    /// All of the memory is in the memfd; what is not, is zero.
    Complete,
    /// The clone must end, for this reason: its memory cannot be had.
    Failed(String),
    /// The pager has gone, and the clone must end.
    Gone,
    /// The pager has not said anything for so long, and the clone must end.
    Silent(Duration),
}

/// A clone's end.
#[derive(Debug)]
pub struct Link {
    socket: OwnedFd,
    silence: Duration,
}

/// What is said of a pager that hangs.
fn silent(silence: Duration) -> io::Error {
    let text = format!(
        "the pager has said nothing for {} s: let `ratoon-pager` go on (kill -CONT) or end it",
        silence.as_secs_f32()
    );
    io::Error::new(io::ErrorKind::TimedOut, text)
}

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the pager {what}"))
}

impl Link {
    /// On a socket that is connected to a pager, which may be silent for [`SILENCE`].
    pub fn new(socket: OwnedFd) -> Self {
        Self::with_silence(socket, SILENCE)
    }

    /// As [`Link::new`], with another silence; a pager says a word every [`BEAT`](super::BEAT) or so.
    pub fn with_silence(socket: OwnedFd, silence: Duration) -> Self {
        Self { socket, silence }
    }

    /// From now on nothing is waited for longer than this.
    fn wait_at_most(&self, time: Duration) -> io::Result<()> {
        use rustix::net::sockopt::{Timeout, set_socket_timeout};
        Ok(set_socket_timeout(&self.socket, Timeout::Recv, Some(time))?)
    }

    /// The clones' memory, to be mapped privately, and its length in bytes.
    ///
    /// # Errors
    /// The pager's word why there is none, or that it is of another version.
    pub fn memory(&self) -> io::Result<(File, u64)> {
        self.wait_at_most(self.silence)?;
        let packet = match receive(self.socket.as_fd()) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(silent(self.silence));
            }
            other => other?,
        };
        match (packet.bytes.split_first(), packet.fd) {
            (Some((b'H', rest)), Some(fd)) if rest.len() == 12 => match number32(rest, 0) {
                VERSION => Ok((File::from(fd), number64(rest, 4))),
                version => Err(broken(&format!(
                    "speaks version {version}, not {VERSION}: end the VMs of its snapshot first"
                ))),
            },
            (Some((b'F', reason)), _) => Err(io::Error::other(
                String::from_utf8_lossy(reason).into_owned(),
            )),
            (None, _) => Err(broken("has gone")),
            _ => Err(broken("says what it should not")),
        }
    }

    /// Hands the faults of these parts to the pager. The caller keeps `faults` open for as long as it
    /// lives: were all copies closed, missing pages would read as zero.
    ///
    /// # Errors
    /// When the pager has gone.
    pub fn attach(&self, faults: &Userfaultfd, parts: &[Part]) -> io::Result<()> {
        let mut bytes = vec![b'A'];
        bytes.extend((parts.len() as u32).to_le_bytes());
        for part in parts {
            for number in [part.address, part.offset, part.length] {
                bytes.extend(number.to_le_bytes());
            }
        }
        let none = SendFlags::empty();
        send(self.socket.as_fd(), &bytes, Some(faults.as_fd()), none)
    }

    /// Asks for all of the memory in the memfd; [`Word::Complete`] says that it is there.
    ///
    /// # Errors
    /// When the pager has gone.
    pub fn complete(&self) -> io::Result<()> {
        send(self.socket.as_fd(), b"C", None, SendFlags::empty())
    }

    /// Waits for the pager's next word, from one thread alone.
    pub fn wait(&self) -> Word {
        if self.wait_at_most(self.silence / WAITS).is_err() {
            return Word::Gone;
        }
        let mut waits = 0;
        loop {
            let packet = match receive(self.socket.as_fd()) {
                Ok(packet) => packet,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    waits += 1;
                    if waits == WAITS {
                        return Word::Silent(self.silence);
                    }
                    continue;
                }
                Err(_) => return Word::Gone,
            };
            match packet.bytes.split_first() {
                Some((b'B', [])) => waits = 0,
                Some((b'D', [])) => return Word::Complete,
                Some((b'F', reason)) => {
                    return Word::Failed(String::from_utf8_lossy(reason).into_owned());
                }
                _ => return Word::Gone,
            }
        }
    }
}

/// What a clone asks of its pager.
#[derive(Debug)]
pub(super) enum Request {
    Attach(Userfaultfd, Vec<Part>),
    Complete,
    /// It has gone, or speaks nonsense.
    Gone,
}

pub(super) fn send_hello(
    socket: BorrowedFd<'_>,
    memory: BorrowedFd<'_>,
    memory_bytes: u64,
) -> io::Result<()> {
    let mut bytes = vec![b'H'];
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(memory_bytes.to_le_bytes());
    send(socket, &bytes, Some(memory), SendFlags::empty())
}

/// Says that the pager lives. A clone that reads nothing, because it was stopped, is not waited for.
pub(super) fn send_beat(socket: BorrowedFd<'_>) {
    let _ = send(socket, b"B", None, SendFlags::DONTWAIT);
}

pub(super) fn send_complete(socket: BorrowedFd<'_>) -> io::Result<()> {
    send(socket, b"D", None, SendFlags::empty())
}

/// Also for a thread that must not wait for the clone: whoever reads nothing need not hear it.
pub(super) fn send_failed(socket: BorrowedFd<'_>, reason: &str) -> io::Result<()> {
    let mut bytes = vec![b'F'];
    bytes.extend(reason.as_bytes().iter().take(MAX_BYTES - 1));
    send(socket, &bytes, None, SendFlags::DONTWAIT)
}

/// Waits for a clone's next request. Parts are checked against memory of `memory_bytes`.
pub(super) fn request(socket: BorrowedFd<'_>, memory_bytes: u64) -> Request {
    let Ok(packet) = receive(socket) else {
        return Request::Gone;
    };
    match (packet.bytes.split_first(), packet.fd) {
        (Some((b'A', rest)), Some(fd)) => {
            match (parts(rest, memory_bytes), Userfaultfd::from_fd(fd)) {
                (Some(parts), Some(faults)) => Request::Attach(faults, parts),
                _ => Request::Gone,
            }
        }
        (Some((b'C', [])), None) => Request::Complete,
        _ => Request::Gone,
    }
}

fn parts(bytes: &[u8], memory_bytes: u64) -> Option<Vec<Part>> {
    let (count, rest) = bytes.split_first_chunk::<4>()?;
    let (raw, []) = rest.as_chunks::<PART_BYTES>() else {
        return None;
    };
    if raw.len() != u32::from_le_bytes(*count) as usize || raw.len() > MAX_REGIONS {
        return None;
    }
    raw.iter()
        .map(|raw| {
            let part = Part {
                address: number64(raw, 0),
                offset: number64(raw, 8),
                length: number64(raw, 16),
            };
            let end = part.offset.checked_add(part.length)?;
            let aligned = (part.address | part.offset | part.length).is_multiple_of(PAGE_BYTES);
            part.address.checked_add(part.length)?;
            (aligned && end <= memory_bytes).then_some(part)
        })
        .collect()
}

struct Packet {
    bytes: Vec<u8>,
    fd: Option<OwnedFd>,
}

fn send(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fd: Option<BorrowedFd<'_>>,
    flags: SendFlags,
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    loop {
        match sendmsg(
            socket,
            &[IoSlice::new(bytes)],
            &mut ancillary,
            SendFlags::NOSIGNAL | flags,
        ) {
            Err(Errno::INTR) => {}
            other => return Ok(other.map(drop)?),
        }
    }
}

/// One packet; an empty one when the other side has gone.
fn receive(socket: BorrowedFd<'_>) -> io::Result<Packet> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = vec![0; MAX_BYTES];
    let received = loop {
        match recvmsg(
            socket,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        ) {
            Err(Errno::INTR) => {}
            other => break other?,
        }
    };
    bytes.truncate(received.bytes);
    let fd = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .next();
    Ok(Packet { bytes, fd })
}
