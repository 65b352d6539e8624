//! Netlink, as much of it as one network device and its connections take (rtnetlink(7),
//! sock_diag(7)): an encoder of requests and a reader of answers.
//!
//! ```text
//!   header 16: length u32, type u16, flags u16, sequence u32, port u32
//!   body: a fixed structure (ifinfomsg 16, ifaddrmsg 8, rtmsg 12, inet_diag_req_v2 56)
//!   attributes: length u16 (with these 4), type u16, value, padded to 4
//! ```
//!
//! Numbers are in the machine's byte order. How it fails: the kernel's own error; an answer that
//! does not come at once or does not fit is EBADMSG. It never waits: the kernel answers while
//! requests are sent and answers read.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, socket_with,
};

/// Bytes of `struct nlmsghdr` (linux/netlink.h).
const HEADER_LEN: usize = 16;

/// More than the kernel puts into one answer (NLMSG_GOODSIZE is at most 8 KiB) with room for the
/// description of a device.
const ANSWER_LEN: usize = 16 * 1024;

/// How many datagrams an answer may take.
const MAX_DATAGRAMS: usize = 1024;

/// A request.
#[derive(Debug, Clone)]
pub(super) struct Message(Vec<u8>);

impl Message {
    /// One with its fixed structure. It asks to be acknowledged.
    pub(super) fn new(kind: u16, flags: i32, fixed: &[u8]) -> Self {
        let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK | flags) as u16;
        let mut bytes = vec![0; HEADER_LEN];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(fixed);
        Self(bytes)
    }

    /// Adds an attribute.
    pub(super) fn with(mut self, kind: u16, value: &[u8]) -> Self {
        attribute(&mut self.0, kind, value);
        self
    }

    fn finish(mut self, sequence: u32) -> Vec<u8> {
        let len = self.0.len() as u32;
        self.0[..4].copy_from_slice(&len.to_ne_bytes());
        self.0[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.0
    }
}

/// Appends an attribute; also for those within another.
pub(super) fn attribute(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    bytes.extend_from_slice(&(value.len() as u16 + 4).to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// `struct ifinfomsg` (linux/rtnetlink.h).
pub(super) fn link_header(index: i32, flags: u32, change: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[4..8].copy_from_slice(&index.to_ne_bytes());
    bytes[8..12].copy_from_slice(&flags.to_ne_bytes());
    bytes[12..].copy_from_slice(&change.to_ne_bytes());
    bytes
}

/// `struct ifaddrmsg` (linux/if_addr.h).
pub(super) fn address_header(family: u8, prefix: u8, flags: u8, index: i32) -> [u8; 8] {
    let mut bytes = [family, prefix, flags, 0, 0, 0, 0, 0];
    bytes[4..].copy_from_slice(&index.to_ne_bytes());
    bytes
}

/// `struct rtmsg` (linux/rtnetlink.h) of a unicast route in the main table.
pub(super) fn route_header(
    family: u8,
    prefix: u8,
    protocol: u8,
    scope: u8,
    flags: u32,
) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[..2].copy_from_slice(&[family, prefix]);
    bytes[4..8].copy_from_slice(&[libc::RT_TABLE_MAIN, protocol, scope, libc::RTN_UNICAST]);
    bytes[8..].copy_from_slice(&flags.to_ne_bytes());
    bytes
}

/// A part of an answer: a message without its header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) kind: u16,
    pub(super) body: Vec<u8>,
}

/// Attributes, up to the first that does not fit.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        // The two high bits say "nested" and "network byte order".
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?) & 0x3fff;
        let value = bytes.get(4..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or(&[]);
        Some((kind, value))
    })
}

/// A conversation with the kernel.
pub(super) struct Socket {
    fd: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// For devices, addresses and routes, in the network namespace of this thread.
    pub(super) fn open() -> Result<Self, Errno> {
        // No protocol: NETLINK_ROUTE is 0.
        Self::with(None)
    }

    /// For sockets, in the same.
    pub(super) fn diag() -> Result<Self, Errno> {
        Self::with(Some(netlink::SOCK_DIAG))
    }

    fn with(protocol: Option<Protocol>) -> Result<Self, Errno> {
        let fd = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            protocol,
        )?;
        Ok(Self {
            fd,
            sequence: 0,
            buffer: vec![0; ANSWER_LEN],
        })
    }

    /// Asks; the parts of the answer, when the kernel has acknowledged it or ended its list.
    pub(super) fn ask(&mut self, message: Message) -> Result<Vec<Answer>, Errno> {
        self.sequence += 1;
        let bytes = message.finish(self.sequence);
        rustix::net::send(&self.fd, &bytes, SendFlags::empty())?;
        let mut answers = Vec::new();
        for _ in 0..MAX_DATAGRAMS {
            let flags = RecvFlags::DONTWAIT | RecvFlags::TRUNC;
            let (_, len) = match rustix::net::recv(&self.fd, &mut self.buffer[..], flags) {
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Err(Errno::BADMSG),
                other => other?,
            };
            let datagram = self.buffer.get(..len).ok_or(Errno::BADMSG)?;
            if take(datagram, self.sequence, &mut answers)? {
                return Ok(answers);
            }
        }
        Err(Errno::BADMSG)
    }
}

/// Takes a datagram's messages; true when the answer is complete.
fn take(mut bytes: &[u8], sequence: u32, answers: &mut Vec<Answer>) -> Result<bool, Errno> {
    let word = |bytes: &[u8], at: usize| -> Result<u32, Errno> {
        let word = bytes.get(at..at + 4).ok_or(Errno::BADMSG)?;
        Ok(u32::from_ne_bytes(
            word.try_into().map_err(|_| Errno::BADMSG)?,
        ))
    };
    while !bytes.is_empty() {
        let len = word(bytes, 0)? as usize;
        let message = bytes.get(..len).ok_or(Errno::BADMSG)?;
        let body = message.get(HEADER_LEN..).ok_or(Errno::BADMSG)?;
        let kind = u16::from_ne_bytes([message[4], message[5]]);
        if word(message, 8)? == sequence {
            match i32::from(kind) {
                libc::NLMSG_ERROR | libc::NLMSG_DONE => {
                    let code = word(body, 0)? as i32;
                    return match code {
                        0 => Ok(true),
                        code => Err(Errno::from_raw_os_error(code.saturating_neg())),
                    };
                }
                _ => answers.push(Answer {
                    kind,
                    body: body.to_vec(),
                }),
            }
        }
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or(&[]);
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_laid_out_as_the_kernel_reads_it() {
        let message = Message::new(
            libc::RTM_NEWADDR,
            libc::NLM_F_CREATE | libc::NLM_F_REPLACE,
            &address_header(libc::AF_INET as u8, 24, 0, 7),
        );
        let bytes = message
            .with(libc::IFA_LOCAL, &[10, 0, 0, 2])
            .with(3, b"abcde")
            .finish(9);
        let expected: [u8; 44] = [
            44, 0, 0, 0, 20, 0, 0x05, 0x05, 9, 0, 0, 0, 0, 0, 0, 0, // header
            2, 24, 0, 0, 7, 0, 0, 0, // ifaddrmsg
            8, 0, 2, 0, 10, 0, 0, 2, // IFA_LOCAL
            9, 0, 3, 0, b'a', b'b', b'c', b'd', b'e', 0, 0, 0,
        ];
        assert_eq!(bytes, expected);
        assert_eq!(
            link_header(7, 1, 3),
            [0, 0, 0, 0, 7, 0, 0, 0, 1, 0, 0, 0, 3, 0, 0, 0]
        );
        assert_eq!(
            route_header(10, 0, 4, 0, 4),
            [10, 0, 0, 0, 254, 4, 0, 1, 4, 0, 0, 0]
        );
    }

    #[test]
    fn attributes_read_as_they_were_written() {
        let mut bytes = Vec::new();
        attribute(&mut bytes, 1, b"abc");
        attribute(&mut bytes, 2, b"");
        assert_eq!(
            attributes(&bytes).collect::<Vec<_>>(),
            [(1, &b"abc"[..]), (2, b"")]
        );
    }

    #[test]
    fn attributes_that_do_not_fit_end_the_list() {
        for bytes in [
            &[][..],
            &[4],
            &[0, 0, 1, 0],
            &[3, 0, 1, 0],
            &[9, 0, 1, 0, 1],
            &[255; 8],
        ] {
            assert_eq!(attributes(bytes).count(), 0, "{bytes:?}");
        }
    }

    #[test]
    fn an_answer_that_is_cut_short_is_no_answer() {
        let whole = Message::new(libc::RTM_NEWLINK, 0, &[1; 16]).finish(1);
        for len in 1..whole.len() {
            assert_eq!(
                take(&whole[..len], 1, &mut Vec::new()),
                Err(Errno::BADMSG),
                "{len}"
            );
        }
        let mut answers = Vec::new();
        assert_eq!(take(&whole, 1, &mut answers), Ok(false));
        assert_eq!(
            answers,
            [Answer {
                kind: libc::RTM_NEWLINK,
                body: vec![1; 16]
            }]
        );
        // Of another request.
        assert_eq!(take(&whole, 2, &mut answers), Ok(false));
        assert_eq!(answers.len(), 1);
    }

    #[test]
    fn an_error_is_the_kernels() {
        let answer = |code: i32| {
            let kind = libc::NLMSG_ERROR as u16;
            let bytes = Message::new(kind, 0, &code.to_ne_bytes()).finish(1);
            take(&bytes, 1, &mut Vec::new())
        };
        assert_eq!(answer(0), Ok(true));
        assert_eq!(answer(-libc::ENODEV), Err(Errno::NODEV));
    }
}
