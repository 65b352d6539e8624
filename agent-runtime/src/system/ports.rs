//! Which servers listen: /proc/net/tcp and tcp6, and whose the sockets are.
//!
//! How it fails: a file that cannot be read fails the call (but for IPv6, which a kernel may not
//! have); a process that ends meanwhile, or is not ours to see, leaves its servers without a name.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ratoon_protocol::{ErrorReply, Port};
use rustix::fs::{AtFlags, Mode, OFlags, RawDir, openat, readlinkat, statat};
use rustix::io::Errno;

use super::{failed, procfs};

/// How many servers the reply has room for: it is one frame.
const MAX_PORTS: usize = 256;

/// How much of a file is read: some 13,000 connections.
const MAX_BYTES: usize = 2 << 20;

/// How many descriptors are looked at to find owners, which costs a system call each.
const MAX_LOOKS: usize = 4096;

#[derive(Debug, Clone, PartialEq, Eq)]
struct Listener {
    address: IpAddr,
    port: u16,
    inode: u64,
}

/// The servers, by port and address; of more than 256 the lowest.
///
/// # Errors
/// When /proc cannot be read.
pub fn ports() -> Result<Vec<Port>, ErrorReply> {
    let mut buffer = Vec::new();
    let mut listeners = Vec::new();
    for path in ["/proc/net/tcp", "/proc/net/tcp6"] {
        match procfs::read(path, MAX_BYTES, &mut buffer) {
            Ok(text) => listeners.extend(text.lines().filter_map(listener)),
            Err(Errno::NOENT) if path.ends_with('6') => {}
            Err(error) => return Err(failed(path, error)),
        }
    }
    listeners.sort_by_key(|listener| (listener.port, listener.address, listener.inode));
    let mut owners = match listeners.is_empty() {
        true => HashMap::new(),
        false => owners(&listeners, &mut buffer),
    };
    let mut ports: Vec<_> = listeners
        .into_iter()
        .map(|listener| {
            let owner = owners.remove(&listener.inode);
            let (pid, program) = owner.unzip();
            Port {
                port: listener.port,
                address: listener.address.to_string(),
                pid,
                program,
            }
        })
        .collect();
    // Several sockets of one server (SO_REUSEPORT) are one server.
    ports.dedup();
    ports.truncate(MAX_PORTS);
    Ok(ports)
}

/// A line of the table, if it is a listening socket (state 0A, include/net/tcp_states.h):
/// `sl local remote st queues timer retransmits uid timeout inode …`, addresses as 32-bit words in
/// the machine's byte order (net/ipv4/tcp_ipv4.c).
fn listener(line: &str) -> Option<Listener> {
    let mut words = line.split_ascii_whitespace();
    let local = words.nth(1)?;
    if words.nth(1)? != "0A" {
        return None;
    }
    let inode = words.nth(5)?.parse().ok()?;
    let (address, port) = local.split_once(':')?;
    Some(Listener {
        address: ip(address)?,
        port: u16::from_str_radix(port, 16).ok()?,
        inode,
    })
}

fn ip(hex: &str) -> Option<IpAddr> {
    let word = |at: usize| {
        let digits = hex.get(at * 8..at * 8 + 8)?;
        u32::from_str_radix(digits, 16).ok().map(u32::to_ne_bytes)
    };
    match hex.len() {
        8 => Some(Ipv4Addr::from(word(0)?).into()),
        32 => {
            let mut bytes = [0; 16];
            for (at, part) in bytes.chunks_exact_mut(4).enumerate() {
                part.copy_from_slice(&word(at)?);
            }
            Some(Ipv6Addr::from(bytes).into())
        }
        _ => None,
    }
}

/// Process and program of each of the sockets, by inode.
fn owners(listeners: &[Listener], buffer: &mut Vec<u8>) -> HashMap<u64, (i32, String)> {
    let mut found = HashMap::new();
    let mut wanted: Vec<u64> = listeners.iter().map(|listener| listener.inode).collect();
    wanted.sort_unstable();
    wanted.dedup();
    let mut looks = MAX_LOOKS;
    let Ok(pids) = numbers("/proc") else {
        return found;
    };
    // The newest first: servers come late, and the kernel's own threads are all at the start.
    for pid in pids.into_iter().rev() {
        if found.len() == wanted.len() || looks == 0 {
            break;
        }
        let Ok(descriptors) = openat(
            rustix::fs::CWD,
            format!("/proc/{pid}/fd"),
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        ) else {
            continue;
        };
        // Kernel threads and others without descriptors: no need to list them.
        looks -= 1;
        let mut program = None;
        for fd in numbers_of(&descriptors).unwrap_or_default() {
            if looks == 0 {
                break;
            }
            looks -= 1;
            let name = fd.to_string();
            let Ok(target) = readlinkat(&descriptors, name.as_str(), Vec::with_capacity(64)) else {
                continue;
            };
            let Some(inode) = socket_inode(&target.to_string_lossy()) else {
                continue;
            };
            if wanted.binary_search(&inode).is_err() || found.contains_key(&inode) {
                continue;
            }
            let program: &String = program.get_or_insert_with(|| {
                let comm = procfs::read(format!("/proc/{pid}/comm"), 64, buffer);
                let comm = comm.unwrap_or("?").trim_end_matches('\n');
                // A terminal would obey control characters.
                comm.replace(char::is_control, "?")
            });
            found.insert(inode, (pid, program.clone()));
        }
    }
    found
}

fn socket_inode(target: &str) -> Option<u64> {
    let inode = target.strip_prefix("socket:[")?.strip_suffix(']')?;
    inode.parse().ok()
}

/// The entries of a directory whose names are numbers, in the kernel's order.
pub(super) fn numbers(path: &str) -> Result<Vec<i32>, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    numbers_of(&rustix::fs::open(path, flags, Mode::empty())?)
}

fn numbers_of(dir: &std::os::fd::OwnedFd) -> Result<Vec<i32>, Errno> {
    let mut space = Vec::with_capacity(16 * 1024);
    let mut entries = RawDir::new(dir, space.spare_capacity_mut());
    let mut numbers = Vec::new();
    while let Some(entry) = entries.next() {
        let name = entry?;
        let number = name.file_name().to_str().ok();
        numbers.extend(number.and_then(|name| name.parse::<i32>().ok()));
    }
    Ok(numbers)
}

/// The owner's number of a process.
pub(super) fn uid(pid: i32) -> Option<u32> {
    let stat = statat(rustix::fs::CWD, format!("/proc/{pid}"), AtFlags::empty());
    stat.ok().map(|stat| stat.st_uid)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    const TABLE: &str = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0000000000000000 100 0 0 10 0
   1: 0100007F:1F91 0100007F:9C40 01 00000000:00000000 00:00000000 00000000     0        0 4712 1 0000000000000000 20 4 30 10 -1
";

    #[test]
    fn only_listening_sockets_are_servers() {
        let found: Vec<_> = TABLE.lines().filter_map(listener).collect();
        let expected = Listener {
            address: Ipv4Addr::LOCALHOST.into(),
            port: 8080,
            inode: 4711,
        };
        assert_eq!(found, [expected]);
    }

    #[test]
    fn ipv6_addresses_are_words_in_the_machines_order() {
        let loopback = "00000000000000000000000001000000";
        assert_eq!(ip(loopback), Some(Ipv6Addr::LOCALHOST.into()));
        assert_eq!(
            ip("B80D0120000000000000000001000000"),
            Some("2001:db8::1".parse().unwrap())
        );
    }

    #[test]
    fn a_line_that_makes_no_sense_is_no_server() {
        for line in [
            "",
            "0:",
            "0: x y 0A",
            "0: 0100007F:1F90 0:0 0A 0 0 0 0 0 x",
            "0: 0100007F 0:0 0A 0 0 0 0 0 1",
            "0: 0100007F:12345 0:0 0A 0 0 0 0 0 1",
            "0: 010000:1F90 0:0 0A 0 0 0 0 0 1",
            "0: ä100007:1F90 0:0 0A 0 0 0 0 0 1",
            "0: 0100007F:1F90 0:0 0A 0 0 0 0 0 99999999999999999999",
        ] {
            assert_eq!(listener(line), None, "{line}");
        }
        assert_eq!(socket_inode("socket:[12]"), Some(12));
        for target in [
            "socket:[",
            "socket:[]",
            "socket:[-1]",
            "/socket:[1]",
            "pipe:[1]",
        ] {
            assert_eq!(socket_inode(target), None, "{target}");
        }
    }

    #[test]
    fn a_server_is_listed_with_its_process() {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = server.local_addr().unwrap().port();
        let found = ports().unwrap();
        let ours = found.iter().find(|found| found.port == port).unwrap();
        assert_eq!(ours.address, "127.0.0.1");
        assert_eq!(ours.pid, Some(std::process::id() as i32));
        assert!(ours.program.as_ref().is_some_and(|name| !name.is_empty()));
        drop(server);
        assert!(ports().unwrap().iter().all(|found| found.port != port));
    }
}
