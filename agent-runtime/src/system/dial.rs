//! A connection to a server in the guest, without waiting for it.
//!
//! ```text
//!   connect --> Dial --(writable)--> Connected(socket)
//!                ^  \--(writable)--> refused: the next address, or the error
//!                \-- poll POLLOUT
//! ```
//!
//! How it fails: `not_found` when nobody listens on any of the addresses; the first address's
//! reason is told, since that is the one that the user means. The kernel gives up a host that does
//! not answer after two minutes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use ratoon_protocol::{ErrorCode, ErrorReply, PortConnect};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use super::{bad_request, failed, shown};

/// A connection that is being made.
#[derive(Debug)]
pub struct Dial {
    socket: OwnedFd,
    address: SocketAddr,
    /// What to try when this one refuses, last first.
    left: Vec<SocketAddr>,
    /// Why the first address did not.
    first: Option<(SocketAddr, Errno)>,
}

/// How far a [`Dial`] is.
#[derive(Debug)]
pub enum Progress {
    /// Not yet: poll again, the descriptor may be another one.
    Waiting,
    /// Here it is, non-blocking.
    Connected(OwnedFd),
}

/// Begins to connect.
///
/// # Errors
/// `bad_request` for port 0 or a host that is not an IP address; the system's when no address can
/// be tried at all.
pub fn connect(params: &PortConnect) -> Result<Dial, ErrorReply> {
    if params.port == 0 {
        return Err(bad_request("port 0 is no port: name one of 1 to 65535"));
    }
    let hosts = match &params.host {
        None => vec![IpAddr::V6(Ipv6Addr::LOCALHOST), Ipv4Addr::LOCALHOST.into()],
        Some(host) => vec![host.parse().map_err(|_| {
            bad_request(format!(
                "host `{}` is not an IP address of the guest",
                shown(host)
            ))
        })?],
    };
    let mut left = hosts
        .into_iter()
        .map(|host| SocketAddr::new(host, params.port))
        .collect();
    let mut first = None;
    let (socket, address) = next(&mut left, &mut first)?;
    Ok(Dial {
        socket,
        address,
        left,
        first,
    })
}

impl Dial {
    /// Poll it for POLLOUT.
    pub fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Poll said something of the descriptor.
    ///
    /// # Errors
    /// When no address is left to try.
    pub fn writable(&mut self) -> Result<Progress, ErrorReply> {
        let result = rustix::net::sockopt::socket_error(&self.socket);
        match result.and_then(|error| error) {
            Ok(()) => {}
            Err(error) => {
                self.first.get_or_insert((self.address, error));
                (self.socket, self.address) = next(&mut self.left, &mut self.first)?;
                return Ok(Progress::Waiting);
            }
        }
        // No error may also mean: not decided yet.
        match rustix::net::getpeername(&self.socket) {
            Ok(_) => {}
            Err(_) => return Ok(Progress::Waiting),
        }
        let socket = rustix::io::fcntl_dupfd_cloexec(&self.socket, 3)
            .map_err(|error| failed("a descriptor for the connection", error))?;
        Ok(Progress::Connected(socket))
    }
}

/// A socket on its way to the next address.
fn next(
    left: &mut Vec<SocketAddr>,
    first: &mut Option<(SocketAddr, Errno)>,
) -> Result<(OwnedFd, SocketAddr), ErrorReply> {
    while let Some(address) = left.pop() {
        match begin(address) {
            Ok(socket) => return Ok((socket, address)),
            Err(error) => {
                first.get_or_insert((address, error));
            }
        }
    }
    let (address, error) = first.take().unwrap_or_else(|| {
        // Not reached: every attempt leaves its reason here.
        let nowhere = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0);
        (nowhere, Errno::ADDRNOTAVAIL)
    });
    Err(match error {
        Errno::CONNREFUSED => ErrorReply::new(
            ErrorCode::NotFound,
            format!("nobody listens on {address}: {error}"),
        ),
        _ => failed(format_args!("cannot connect to {address}"), error),
    })
}

fn begin(address: SocketAddr) -> Result<OwnedFd, Errno> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    // What is forwarded is often typed: small pieces must not wait for company.
    rustix::net::sockopt::set_tcp_nodelay(&socket, true)?;
    match rustix::net::connect(&socket, &address) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    use super::*;
    use crate::sys::{poll, poll_fd};

    fn finish(mut dial: Dial) -> Result<TcpStream, ErrorReply> {
        for _ in 0..16 {
            poll(&mut [poll_fd(dial.fd(), libc::POLLOUT)], None).unwrap();
            if let Progress::Connected(socket) = dial.writable()? {
                let stream = TcpStream::from(socket);
                stream.set_nonblocking(false).unwrap();
                return Ok(stream);
            }
        }
        panic!("no decision after 16 polls");
    }

    fn params(port: u16, host: Option<&str>) -> PortConnect {
        PortConnect {
            port,
            host: host.map(Into::into),
        }
    }

    fn free_port() -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port()
    }

    #[test]
    fn a_server_on_the_loopback_is_reached() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut ours = finish(connect(&params(port, None)).unwrap()).unwrap();
        let (mut theirs, _) = listener.accept().unwrap();
        ours.write_all(b"hi").unwrap();
        let mut bytes = [0; 2];
        theirs.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"hi");
    }

    #[test]
    fn a_server_on_ipv6_alone_is_reached_too() {
        let Ok(listener) = TcpListener::bind("[::1]:0") else {
            eprintln!("SKIPPED: this machine has no IPv6");
            return;
        };
        let port = listener.local_addr().unwrap().port();
        let ours = finish(connect(&params(port, None)).unwrap()).unwrap();
        assert_eq!(ours.peer_addr().unwrap(), listener.local_addr().unwrap());
    }

    #[test]
    fn the_first_address_names_the_failure() {
        let port = free_port();
        let error = connect(&params(port, None)).and_then(finish).unwrap_err();
        assert_eq!(error.code, ErrorCode::NotFound);
        assert_eq!(
            error.message,
            format!("nobody listens on 127.0.0.1:{port}: Connection refused (os error 111)")
        );
    }

    #[test]
    fn a_named_host_has_no_second_address() {
        let dial = connect(&params(free_port(), Some("127.0.0.2"))).unwrap();
        assert!(dial.left.is_empty());
        let error = finish(dial).unwrap_err();
        assert!(error.message.contains("127.0.0.2:"), "{error}");
    }

    #[test]
    fn what_is_no_address_is_refused_by_name() {
        let error = connect(&params(80, Some("local\nhost"))).unwrap_err();
        assert_eq!(
            error,
            bad_request("host `local\\nhost` is not an IP address of the guest")
        );
        let error = connect(&params(0, None)).unwrap_err();
        assert_eq!(error.code, ErrorCode::BadRequest);
    }
}
