//! The device on a tap of the kernel's, in a network namespace of its own: root only.

use std::ffi::CString;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd};
use std::process::Command;
use std::time::{Duration, Instant};

use super::*;

/// IEEE 802's number for local experiments.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];

/// Runs `test` in a thread with a network namespace that ends with it. Takes root, /dev/net/tun and
/// the `ip` command (Debian: iproute2).
fn in_own_network(test: fn()) {
    let thread = std::thread::spawn(move || {
        // SAFETY: this thread alone gets another network namespace; it has no sockets.
        let outcome = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        assert_eq!(outcome, 0, "{}", io::Error::last_os_error());
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn ip(arguments: &str) {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .unwrap();
    assert!(output.status.success(), "ip {arguments}: {output:?}");
}

/// A packet socket of the host on interface `name`.
fn packet_socket(name: &str) -> std::fs::File {
    let protocol = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: no memory is involved.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, i32::from(protocol)) };
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    // SAFETY: `fd` is new and nobody else's.
    let socket = unsafe { std::fs::File::from_raw_fd(fd) };
    let name = CString::new(name).unwrap();
    // SAFETY: a sockaddr_ll is plain data, of which all zeroes is a value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    // SAFETY: `name` is a string that ends with zero.
    address.sll_ifindex = unsafe { libc::if_nametoindex(name.as_ptr()) } as i32;
    // SAFETY: the pointer and the length are those of one sockaddr_ll.
    let outcome = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as u32,
        )
    };
    assert_eq!(outcome, 0, "{}", io::Error::last_os_error());
    socket
}

fn ethernet(text: &[u8]) -> Vec<u8> {
    let mut frame = [&[0xff; 6][..], &MAC, &ETHERTYPE, text].concat();
    frame.resize(60, 0);
    frame
}

#[test]
fn frames_cross_a_real_tap_both_ways_as_root() {
    in_own_network(|| {
        ip("tuntap add dev rt0 mode tap");
        ip("link set rt0 up");
        let mut driver = MockDriver::new(Net::open("rt0", MAC).unwrap());
        let mut host = packet_socket("rt0");
        driver.probe(u64::MAX);
        assert_eq!(driver.status() & status::DEVICE_NEEDS_RESET, 0);

        driver.send(TX, &[&HEADER, &ethernet(b"from the guest")], &[]);
        driver.kick(TX);
        let mut buffer = [0; 2048];
        // The kernel's own packets (IPv6 neighbours) come as well.
        loop {
            let len = host.read(&mut buffer).unwrap();
            if buffer[12..14] == ETHERTYPE {
                assert_eq!(buffer[..len], ethernet(b"from the guest"));
                break;
            }
        }

        for _ in 0..200 {
            driver.send(RX, &[], &[1530]);
        }
        driver.kick(RX);
        io::Write::write_all(&mut host, &ethernet(b"from the host")).unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        let frame = loop {
            driver.transport.host_event();
            let frames = driver.used(RX).into_iter().map(|used| {
                let descriptor = MockDriver::areas(RX)[0] + 16 * u64::from(used.head);
                let at = driver.read_memory(descriptor, 8).try_into().unwrap();
                driver.read_memory(u64::from_le_bytes(at), used.len_bytes as usize)
            });
            let ours = frames.into_iter().find(|frame| frame[24..26] == ETHERTYPE);
            if let Some(frame) = ours {
                break frame;
            }
            assert!(Instant::now() < deadline, "no frame came");
            std::thread::yield_now();
        };
        assert_eq!(frame[10..12], [1, 0], "num_buffers");
        assert_eq!(frame[HEADER_BYTES..], ethernet(b"from the host"));
    });
}

#[test]
fn a_tap_in_use_or_of_another_kind_is_named_as_root() {
    in_own_network(|| {
        ip("tuntap add dev rt0 mode tap");
        let first = Tap::open("rt0").unwrap();
        let error = Tap::open("rt0").unwrap_err();
        assert!(
            matches!(&error, TapError::Busy(name, _) if name == "rt0"),
            "{error:?}"
        );
        drop(first);
        assert!(Tap::open("rt0").is_ok());
        let error = Tap::open("lo").unwrap_err();
        assert!(
            matches!(&error, TapError::Kind(name, _) if name == "lo"),
            "{error:?}"
        );
    });
}

#[test]
fn a_tap_that_does_not_exist_says_how_to_make_it_as_root() {
    let error = Tap::open("ratoon-none").unwrap_err();
    assert_eq!(
        error.to_string(),
        "tap \"ratoon-none\" does not exist; make it: ip tuntap add dev ratoon-none mode tap \
         user \"$USER\" && ip link set ratoon-none up"
    );
}

#[test]
fn a_name_that_no_interface_can_have_is_refused_as_root() {
    for name in ["", "sixteen-bytes-xx", "a/b", "a b", "a\0b"] {
        let error = Tap::open(name).unwrap_err();
        assert!(
            matches!(&error, TapError::Name(n) if n == name),
            "{error:?}"
        );
    }
}
