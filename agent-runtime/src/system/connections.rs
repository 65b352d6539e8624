//! TCP connections of the machine that this one is a child of: reset before any process goes on.
//!
//! ```text
//!   /proc/net/sockstat{,6}: any TCP socket? --> list (NETLINK_SOCK_DIAG) --> those to elsewhere: SOCK_DESTROY
//! ```
//!
//! What has both its ends in this machine stays: peers on the loopback, and a socket's own address.
//! A program that reads or writes such a connection, or waits for it, gets ECONNABORTED. The kernel
//! tells the peer with a segment that leaves this machine in its parent's name; the VMM's network
//! device drops it (it sends nothing from the parent's hardware address), so that the parent's own
//! connection lives. So this comes before the devices get their new addresses.
//!
//! Layouts: `struct inet_diag_req_v2`, `inet_diag_sockid` and `inet_diag_msg` (linux/inet_diag.h).
//! How it fails: `unsupported` by a kernel without CONFIG_INET_DIAG_DESTROY when there is a connection
//! to reset; the system's reason otherwise.

use std::net::{IpAddr, Ipv6Addr};
use std::path::Path;

use ratoon_protocol::{ErrorCode, ErrorReply};
use rustix::io::Errno;

use super::netlink::{Answer, Message, Socket};
use super::{failed, procfs};

/// linux/sock_diag.h.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;

/// States of include/net/tcp_states.h, but TIME_WAIT (6), CLOSE (7) and LISTEN (10): those have no
/// peer that is still there.
const STATES: u32 = 0x1ffe & !(1 << 6 | 1 << 7 | 1 << 10);

/// Bytes of `struct inet_diag_sockid`, and where it is in a request and in an answer.
const ID_LEN: usize = 48;
const ID_IN_REQUEST: usize = 8;
const ID_IN_ANSWER: usize = 4;

/// Longest of the small files that count sockets.
const MAX_COUNTS: usize = 4096;

/// Resets what leads elsewhere; returns how many that were.
///
/// # Errors
/// See the module.
pub(super) fn reset() -> Result<usize, ErrorReply> {
    let mut socket = None;
    let mut count = 0;
    for (family, counts, word) in [
        (libc::AF_INET, "/proc/thread-self/net/sockstat", "TCP:"),
        (libc::AF_INET6, "/proc/thread-self/net/sockstat6", "TCP6:"),
    ] {
        if !has_sockets(Path::new(counts), word) {
            continue;
        }
        let socket = match &mut socket {
            Some(socket) => socket,
            empty => empty.insert(Socket::diag().map_err(refused("no netlink socket"))?),
        };
        let list = Message::new(
            SOCK_DIAG_BY_FAMILY,
            libc::NLM_F_DUMP,
            &request(family as u8, STATES, &[0; ID_LEN]),
        );
        let answers = socket.ask(list).map_err(refused("cannot list them"))?;
        for id in answers.iter().filter_map(elsewhere) {
            let destroy = Message::new(SOCK_DESTROY, 0, &request(family as u8, u32::MAX, id));
            match socket.ask(destroy) {
                Ok(_) => count += 1,
                // It has ended by itself.
                Err(Errno::NOENT) => {}
                Err(error) => return Err(refused("cannot end one")(error)),
            }
        }
    }
    Ok(count)
}

fn refused(what: &'static str) -> impl FnOnce(Errno) -> ErrorReply {
    move |error| match error {
        Errno::OPNOTSUPP | Errno::PROTONOSUPPORT => ErrorReply::new(
            ErrorCode::Unsupported,
            format!(
                "TCP connections: the guest's kernel cannot reset them (CONFIG_INET_DIAG_DESTROY): {error}"
            ),
        ),
        _ => failed(format_args!("TCP connections: {what}"), error),
    }
}

/// Whether there may be TCP sockets of a family: a list of them costs a walk over the kernel's table.
fn has_sockets(counts: &Path, word: &str) -> bool {
    // Not there without the family. What cannot be read is looked at more closely.
    match procfs::read(counts, MAX_COUNTS, &mut Vec::new()) {
        Err(Errno::NOENT) => false,
        Err(_) => true,
        Ok(text) => in_use(text, word) != Some(0),
    }
}

/// The number after `inuse` in a line that begins so.
fn in_use(text: &str, word: &str) -> Option<u64> {
    let mut lines = text.lines().map(str::split_ascii_whitespace);
    let mut words = lines.find_map(|mut words| (words.next() == Some(word)).then_some(words))?;
    words.find(|word| *word == "inuse")?;
    words.next()?.parse().ok()
}

/// `struct inet_diag_req_v2`.
fn request(family: u8, states: u32, id: &[u8; ID_LEN]) -> [u8; ID_IN_REQUEST + ID_LEN] {
    let mut bytes = [0; ID_IN_REQUEST + ID_LEN];
    bytes[..2].copy_from_slice(&[family, libc::IPPROTO_TCP as u8]);
    bytes[4..8].copy_from_slice(&states.to_ne_bytes());
    bytes[ID_IN_REQUEST..].copy_from_slice(id);
    bytes
}

/// The socket's identity, if its peer is not in this machine.
fn elsewhere(answer: &Answer) -> Option<&[u8; ID_LEN]> {
    if answer.kind != SOCK_DIAG_BY_FAMILY {
        return None;
    }
    let id = answer.body.get(ID_IN_ANSWER..)?.first_chunk::<ID_LEN>()?;
    let address = |at: usize| -> Option<IpAddr> {
        Some(match i32::from(answer.body[0]) {
            libc::AF_INET => IpAddr::from(<[u8; 4]>::try_from(&id[at..at + 4]).ok()?),
            _ => Ipv6Addr::from(<[u8; 16]>::try_from(&id[at..at + 16]).ok()?).to_canonical(),
        })
    };
    // Behind the two ports.
    let (own, peer) = (address(4)?, address(20)?);
    let is_here = peer.is_loopback() || peer == own || peer.is_unspecified();
    (!is_here).then_some(id)
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read};
    use std::net::{SocketAddr, TcpListener, TcpStream};
    use std::time::{Duration, Instant};

    use rustix::net::{AddressFamily, SocketType};

    use super::*;

    fn answer(family: i32, own: &str, peer: &str) -> Answer {
        let mut body = vec![0; 72];
        body[0] = family as u8;
        for (at, text) in [(8, own), (24, peer)] {
            match text.parse().unwrap() {
                IpAddr::V4(ip) => body[at..at + 4].copy_from_slice(&ip.octets()),
                IpAddr::V6(ip) => body[at..at + 16].copy_from_slice(&ip.octets()),
            }
        }
        Answer {
            kind: SOCK_DIAG_BY_FAMILY,
            body,
        }
    }

    #[test]
    fn only_a_peer_in_another_machine_is_elsewhere() {
        for (family, own, peer, expected) in [
            (libc::AF_INET, "10.0.0.2", "10.0.0.1", true),
            (libc::AF_INET, "127.0.0.1", "127.0.0.1", false),
            (libc::AF_INET, "127.0.0.1", "127.9.9.9", false),
            (libc::AF_INET, "10.0.0.2", "10.0.0.2", false),
            (libc::AF_INET, "0.0.0.0", "0.0.0.0", false),
            (libc::AF_INET6, "fd00::2", "fd00::1", true),
            (libc::AF_INET6, "::1", "::1", false),
            (libc::AF_INET6, "fd00::2", "fd00::2", false),
            (
                libc::AF_INET6,
                "::ffff:127.0.0.1",
                "::ffff:127.0.0.1",
                false,
            ),
            (libc::AF_INET6, "::ffff:10.0.0.2", "::ffff:10.0.0.1", true),
        ] {
            let answer = answer(family, own, peer);
            assert_eq!(elsewhere(&answer).is_some(), expected, "{own} {peer}");
        }
        let mut short = answer(libc::AF_INET, "10.0.0.2", "10.0.0.1");
        short.body.truncate(51);
        assert_eq!(elsewhere(&short), None);
    }

    #[test]
    fn sockets_are_counted_by_family() {
        let text =
            "sockets: used 9\nTCP: inuse 5 orphan 0 tw 3 alloc 7 mem 1\nUDP: inuse 2 mem 0\n";
        assert_eq!(in_use(text, "TCP:"), Some(5));
        assert_eq!(in_use(text, "TCP6:"), None);
        assert_eq!(in_use("TCP6: inuse 0\n", "TCP6:"), Some(0));
        assert_eq!(in_use("TCP: inuse\n", "TCP:"), None);
        assert!(!has_sockets(Path::new("/none/of/these"), "TCP:"));
    }

    /// Runs in a network namespace of its own that has addresses for both ends of a connection.
    fn in_own_network(test: fn()) {
        let thread = std::thread::spawn(move || {
            // SAFETY: leaves only this thread's network namespace; descriptors stay as they are.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0);
            let commands = [
                "link set lo up",
                "address add 10.9.9.1/32 dev lo",
                "address add 10.9.9.2/32 dev lo",
                "address add fd09::1/128 dev lo nodad",
                "address add fd09::2/128 dev lo nodad",
            ];
            for command in commands {
                let ip = std::process::Command::new("ip")
                    .args(command.split(' '))
                    .status();
                assert!(ip.unwrap().success(), "ip {command}");
            }
            test();
        });
        thread.join().unwrap();
    }

    /// Both ends of a connection from one address to another.
    fn connected(from: &str, to: &str) -> (TcpStream, TcpStream) {
        let own = SocketAddr::new(from.parse().unwrap(), 0);
        let listener = TcpListener::bind((to.parse::<IpAddr>().unwrap(), 0)).unwrap();
        let family = match own {
            SocketAddr::V4(_) => AddressFamily::INET,
            SocketAddr::V6(_) => AddressFamily::INET6,
        };
        let socket = rustix::net::socket(family, SocketType::STREAM, None).unwrap();
        rustix::net::bind(&socket, &own).unwrap();
        // The kernel makes the route to a new IPv6 address after the address.
        let peer = listener.local_addr().unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        while let Err(error) = rustix::net::connect(&socket, &peer) {
            assert_eq!(error, Errno::NETUNREACH);
            assert!(Instant::now() < deadline, "no route to {peer}");
            std::thread::yield_now();
        }
        (socket.into(), listener.accept().unwrap().0)
    }

    fn is_reset(stream: &TcpStream) -> bool {
        stream.set_nonblocking(true).unwrap();
        match (&mut &*stream).read(&mut [0]) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => false,
            // Which of two ends in one machine was the first is left to the kernel.
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::ConnectionAborted | ErrorKind::ConnectionReset
                ) =>
            {
                true
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn connections_to_elsewhere_end_and_those_within_the_machine_stay_as_root() {
        in_own_network(|| {
            assert_eq!(reset(), Ok(0), "no socket at all");
            let stay = [
                ("127.0.0.1", "127.0.0.1"),
                ("::1", "::1"),
                ("10.9.9.1", "10.9.9.1"),
            ];
            let stay = stay.map(|(from, to)| connected(from, to));
            let listener = TcpListener::bind("10.9.9.1:0").unwrap();
            assert_eq!(reset(), Ok(0), "none leads elsewhere");
            let end = [("10.9.9.2", "10.9.9.1"), ("fd09::2", "fd09::1")];
            let end = end.map(|(from, to)| connected(from, to));
            // Of each both ends are here, each the other's elsewhere; the second is already reset when
            // its turn comes, or not.
            let count = reset().unwrap();
            assert!((2..=4).contains(&count), "{count}");
            assert!(end.iter().all(|(from, _)| is_reset(from)));
            assert!(end.iter().all(|(_, to)| is_reset(to)));
            assert!(!stay.iter().any(|(from, to)| is_reset(from) || is_reset(to)));
            assert_eq!(reset(), Ok(0));
            listener.set_nonblocking(true).unwrap();
            let error = listener.accept().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::WouldBlock, "a server serves on");
        });
    }

    #[test]
    fn a_connection_that_nobody_has_accepted_ends_too_as_root() {
        in_own_network(|| {
            let listener = TcpListener::bind("10.9.9.1:0").unwrap();
            let peer = listener.local_addr().unwrap();
            let from = TcpStream::connect(peer).unwrap();
            // From the address that it goes to: within the machine.
            assert_eq!(from.local_addr().unwrap().ip(), peer.ip());
            assert_eq!(reset(), Ok(0));
            let own: SocketAddr = "10.9.9.2:0".parse().unwrap();
            let socket =
                rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
            rustix::net::bind(&socket, &own).unwrap();
            rustix::net::connect(&socket, &peer).unwrap();
            assert!(reset().unwrap() >= 1);
            assert!(is_reset(&socket.into()));
        });
    }

    #[test]
    fn a_request_is_laid_out_as_the_kernel_reads_it() {
        let mut id = [0; ID_LEN];
        id[0] = 0x1f;
        id[47] = 7;
        let bytes = request(libc::AF_INET as u8, STATES, &id);
        assert_eq!(bytes.len(), 56);
        assert_eq!(bytes[..8], [2, 6, 0, 0, 0x3e, 0x1b, 0, 0]);
        assert_eq!((bytes[8], bytes[55]), (0x1f, 7));
    }
}
