//! The socket between a VM's process and its pager: what each end may be told by the other.
//!
//! Rules: no panic; a VM's process hears that its pager has gone when it says what it should not; a pager hangs
//! up on whoever does, and serves the next one. Needs root, or a userfaultfd that the kernel's accesses wait for.

#![no_main]

use std::fs::File;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::Duration;

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use ratoon_fuzz::rarely;
use ratoon_snapshot::pager::{BEAT, FETCH, Link, Pager, SILENCE, Userfaultfd, Word};
use ratoon_snapshot::{Content, PAGE_BYTES, PageSource};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, sendmsg,
};

const MEMORY: u64 = 64 * PAGE_BYTES;
const CHUNK: u32 = 4 * PAGE_BYTES as u32;
/// Numbers at which something could tip over.
const EDGES: [u64; 7] = [
    0,
    1,
    PAGE_BYTES,
    MEMORY,
    MEMORY + PAGE_BYTES,
    u64::MAX - 4095,
    u64::MAX,
];

struct Source;

impl PageSource for Source {
    fn memory_bytes(&self) -> u64 {
        MEMORY
    }

    fn chunk_bytes(&self) -> u32 {
        CHUNK
    }

    fn is_zero(&self, chunk: u64) -> bool {
        chunk.is_multiple_of(3)
    }

    fn chunk(&self, _: u64, into: &mut [u8]) -> ratoon_snapshot::Result<Content> {
        into.fill(1);
        Ok(Content::Data)
    }
}

fn socket() -> OwnedFd {
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC, None).expect("a socket")
}

/// The path of a pager that serves until the process ends.
static PAGER: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = tempfile::tempdir_in("/dev/shm").expect("a folder in memory");
    let path = folder.path().join("pager.sock");
    let listener = socket();
    rustix::net::bind(&listener, &SocketAddrUnix::new(&path).expect("short")).expect("bound");
    rustix::net::listen(&listener, 8).expect("it listens");
    let pager = Pager {
        listener,
        path: path.clone(),
        linger: Duration::from_secs(1 << 30),
        beat: BEAT,
        fetch: FETCH,
    };
    std::thread::spawn(move || {
        let _folder = folder;
        pager.run(Box::new(Source), &[])
    });
    path
});

fn connect() -> OwnedFd {
    let socket = socket();
    let address = SocketAddrUnix::new(&*PAGER).expect("short");
    rustix::net::connect(&socket, &address).expect("the pager takes the next one");
    socket
}

fn send(to: BorrowedFd<'_>, bytes: &[u8], fd: Option<BorrowedFd<'_>>) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<_> = fd.into_iter().collect();
    if !fds.is_empty() {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
    }
    // The other end may have hung up, or have enough of us.
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let _ = sendmsg(to, &[IoSlice::new(bytes)], &mut ancillary, flags);
}

fn number(input: &mut Unstructured<'_>, sound: u64) -> Result<u64> {
    if rarely(input)? {
        return Ok(*input.choose(&EDGES)?);
    }
    Ok(sound)
}

/// What a clone may say, mostly sound.
fn request(input: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    if input.ratio(1, 4)? {
        return Ok(vec![b'C']);
    }
    if rarely(input)? {
        let length = input.int_in_range(0..=64_usize)?;
        return Ok(input.bytes(length)?.to_vec());
    }
    let count = input.int_in_range(0..=4_u32)?;
    let mut bytes = vec![b'A'];
    bytes.extend((number(input, u64::from(count))? as u32).to_le_bytes());
    for _ in 0..count {
        let pages = input.int_in_range(1..=64_u64)?;
        let first = input.int_in_range(0..=64 - pages)?;
        bytes.extend(number(input, (1 << 40) + first * PAGE_BYTES)?.to_le_bytes());
        bytes.extend(number(input, first * PAGE_BYTES)?.to_le_bytes());
        bytes.extend(number(input, pages * PAGE_BYTES)?.to_le_bytes());
    }
    Ok(bytes)
}

/// A descriptor that goes with it: the right one, another, or none.
fn descriptor(input: &mut Unstructured<'_>) -> Result<Option<OwnedFd>> {
    let other = |path: &str| File::open(path).ok().map(OwnedFd::from);
    Ok(match input.int_in_range(0..=5_u8)? {
        0 => None,
        1 => other("/dev/null"),
        2 => other("/dev/zero"),
        _ => Userfaultfd::new()
            .ok()
            .and_then(|faults| faults.as_fd().try_clone_to_owned().ok()),
    })
}

/// A hostile VM's process.
fn clone(input: &mut Unstructured<'_>) -> Result<()> {
    let ours = connect();
    for _ in 0..input.int_in_range(1..=3_u8)? {
        let (bytes, fd) = (request(input)?, descriptor(input)?);
        send(ours.as_fd(), &bytes, fd.as_ref().map(AsFd::as_fd));
    }
    let _ = rustix::net::shutdown(&ours, rustix::net::Shutdown::Write);
    // Until it has hung up.
    let mut bytes = [0; 4096];
    while let Ok((1.., _)) = rustix::net::recv(&ours, &mut bytes[..], RecvFlags::empty()) {}
    let (_, memory_bytes) = Link::new(connect())
        .memory()
        .expect("it serves the next one");
    assert_eq!(memory_bytes, MEMORY);
    Ok(())
}

/// What a pager may say, mostly sound.
fn word(input: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    if rarely(input)? {
        let length = input.int_in_range(0..=64_usize)?;
        return Ok(input.bytes(length)?.to_vec());
    }
    Ok(match input.int_in_range(0..=3_u8)? {
        0 => {
            let mut bytes = vec![b'H'];
            bytes.extend((number(input, 2)? as u32).to_le_bytes());
            bytes.extend(number(input, MEMORY)?.to_le_bytes());
            bytes
        }
        1 => vec![b'B'],
        2 => vec![b'D'],
        _ => {
            let mut bytes = vec![b'F'];
            let length = input.int_in_range(0..=64_usize)?;
            bytes.extend(input.bytes(length)?);
            bytes
        }
    })
}

/// A hostile pager.
fn pager(input: &mut Unstructured<'_>) -> Result<()> {
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .expect("a pair of sockets");
    let count = input.int_in_range(1..=6_u8)?;
    for _ in 0..count {
        let (bytes, fd) = (word(input)?, descriptor(input)?);
        send(ours.as_fd(), &bytes, fd.as_ref().map(AsFd::as_fd));
    }
    drop(ours);
    let link = Link::with_silence(theirs, SILENCE);
    let _ = link.memory();
    let mut words = 0;
    while link.wait() != Word::Gone {
        words += 1;
        assert!(words <= count, "more words than packets");
    }
    Ok(())
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Unstructured::new(bytes);
    // An input that ends early is no finding.
    let _ = match input.arbitrary() {
        Ok(true) => clone(&mut input),
        _ => pager(&mut input),
    };
});
