//! A pager and its clones in one process, with real faults. They need a userfaultfd that sees the
//! kernel's accesses, hence `_as_root`.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::mm::{Advice, MapFlags, ProtFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tempfile::TempDir;

use super::*;
use crate::chunks::source::{Content, PageSource};
use crate::error::{Error, Result};
use crate::pages::Run;

const CHUNK: usize = 64 << 10;
/// The last chunk is short.
const BYTES: usize = 20 * CHUNK + 3 * PAGE;
const PAGE: usize = 4096;
/// A chunk of zeroes.
const ZERO: u64 = 7;
const BAD: u64 = 9;
const PATIENCE: Duration = Duration::from_secs(60);

/// Each page is filled with a byte of its own.
fn byte_at(offset: usize) -> u8 {
    match (offset / CHUNK) as u64 {
        ZERO => 0,
        _ => (offset / PAGE % 251 + 1) as u8,
    }
}

/// A chunk whose storage may not answer.
const STUCK: u64 = 11;

#[derive(Default)]
struct Source {
    fetched: Arc<Mutex<Vec<u64>>>,
    is_damaged: bool,
    /// While somebody holds it the storage does not answer.
    stuck: Arc<Mutex<()>>,
}

impl PageSource for Source {
    fn memory_bytes(&self) -> u64 {
        BYTES as u64
    }

    fn chunk_bytes(&self) -> u32 {
        CHUNK as u32
    }

    fn is_zero(&self, chunk: u64) -> bool {
        chunk == ZERO
    }

    fn chunk(&self, chunk: u64, into: &mut [u8]) -> Result<Content> {
        if chunk == STUCK {
            drop(self.stuck.lock().unwrap());
        }
        self.fetched.lock().unwrap().push(chunk);
        if self.is_damaged && chunk == BAD {
            return Err(Error::DamagedChunk {
                path: "memory.chunks".into(),
                chunk,
                reason: "a test".into(),
            });
        }
        for (place, byte) in into.iter_mut().enumerate() {
            *byte = byte_at(chunk as usize * CHUNK + place);
        }
        Ok(Content::Data)
    }
}

struct Lab {
    _folder: TempDir,
    path: PathBuf,
    fetched: Arc<Mutex<Vec<u64>>>,
    pager: JoinHandle<Result<()>>,
}

fn seqpacket() -> OwnedFd {
    let flags = SocketFlags::CLOEXEC;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
}

/// A pager that listens there.
fn pager_at(path: &Path, fetch: Duration) -> Pager {
    let listener = seqpacket();
    rustix::net::bind(&listener, &SocketAddrUnix::new(path).unwrap()).unwrap();
    rustix::net::listen(&listener, 8).unwrap();
    Pager {
        listener,
        path: path.to_owned(),
        linger: Duration::from_millis(200),
        beat: Duration::from_millis(20),
        fetch,
    }
}

fn link_to(path: &Path, silence: Duration) -> Link {
    let socket = seqpacket();
    rustix::net::connect(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    Link::with_silence(socket, silence)
}

impl Lab {
    fn new(is_damaged: bool, working_set: Vec<Run>) -> Self {
        let source = Source {
            is_damaged,
            ..Source::default()
        };
        Self::of(source, PATIENCE, working_set)
    }

    fn of(source: Source, fetch: Duration, working_set: Vec<Run>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pager.sock");
        let fetched = source.fetched.clone();
        let pager = pager_at(&path, fetch);
        Self {
            _folder: folder,
            path,
            fetched,
            pager: std::thread::spawn(move || pager.run(Box::new(source), &working_set)),
        }
    }

    fn clone(&self) -> Clone {
        let link = link_to(&self.path, SILENCE);
        let (file, bytes) = link.memory().unwrap();
        assert_eq!(bytes, BYTES as u64);
        // SAFETY: a new mapping at an address of the system's choice.
        let mapping = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                BYTES,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
                &file,
                0,
            )
        }
        .unwrap() as usize;
        let faults = Userfaultfd::new().unwrap();
        faults.register(mapping, BYTES).unwrap();
        let part = Part {
            address: mapping as u64,
            offset: 0,
            length: BYTES as u64,
        };
        link.attach(&faults, &[part]).unwrap();
        Clone {
            link,
            file,
            mapping,
            faults: Some(faults),
        }
    }

    /// The chunks that were fetched, sorted.
    fn fetched(&self) -> Vec<u64> {
        let mut fetched = self.fetched.lock().unwrap().clone();
        fetched.sort_unstable();
        fetched
    }

    /// Waits for the pager's end.
    fn end(self) {
        self.pager.join().unwrap().unwrap();
        assert!(!self.path.exists());
    }
}

/// Its mapping is left behind: it goes with the process.
struct Clone {
    link: Link,
    file: File,
    mapping: usize,
    faults: Option<Userfaultfd>,
}

impl Clone {
    fn read(&self, offset: usize) -> u8 {
        read(self.mapping, offset)
    }

    fn write(&self, offset: usize, byte: u8) {
        assert!(offset < BYTES);
        // SAFETY: within the mapping, which is never unmapped, and in no reference.
        unsafe { std::ptr::write_volatile((self.mapping + offset) as *mut u8, byte) };
    }
}

fn read(mapping: usize, offset: usize) -> u8 {
    assert!(offset < BYTES);
    // SAFETY: within the mapping, which is never unmapped.
    unsafe { std::ptr::read_volatile((mapping + offset) as *const u8) }
}

/// Waits until it is so.
fn eventually(is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "it never was");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn clones_read_what_the_source_has_and_each_chunk_is_fetched_once_as_root() {
    let lab = Lab::new(false, Vec::new());
    let clones = [lab.clone(), lab.clone()];
    std::thread::scope(|scope| {
        for (number, clone) in clones.iter().enumerate() {
            scope.spawn(move || {
                for page in 0..BYTES / PAGE {
                    // From both ends, so that they meet.
                    let page = match number {
                        0 => page,
                        _ => BYTES / PAGE - 1 - page,
                    };
                    let at = page * PAGE + page % PAGE;
                    assert_eq!(clone.read(at), byte_at(at), "page {page}");
                }
            });
        }
    });
    let expected: Vec<u64> = (0..=20).filter(|chunk| *chunk != ZERO).collect();
    assert_eq!(lab.fetched(), expected);
    drop(clones);
    lab.end();
}

#[test]
fn the_kernels_own_accesses_wait_for_the_page_too_as_root() {
    let lab = Lab::new(false, Vec::new());
    let clone = lab.clone();
    let out = tempfile::tempfile().unwrap();
    // SAFETY: the mapping is never unmapped, and nobody writes it here.
    let memory = unsafe { std::slice::from_raw_parts(clone.mapping as *const u8, BYTES) };
    out.write_all_at(memory, 0).unwrap();
    let mut copy = vec![0; BYTES];
    out.read_exact_at(&mut copy, 0).unwrap();
    assert!(
        copy.iter()
            .enumerate()
            .all(|(at, byte)| *byte == byte_at(at))
    );
    drop(clone);
    lab.end();
}

#[test]
fn a_clones_writes_are_its_own_and_pages_given_back_are_the_generations_again_as_root() {
    let lab = Lab::new(false, Vec::new());
    let (clone, sibling) = (lab.clone(), lab.clone());
    // The first touch is a write: of a page with content, of one without.
    let (full, zero) = (3 * CHUNK + PAGE, ZERO as usize * CHUNK + PAGE);
    for at in [full, zero] {
        clone.write(at, 255);
        assert_eq!((clone.read(at), clone.read(at + 1)), (255, byte_at(at)));
        assert_eq!(sibling.read(at), byte_at(at));
        let mut byte = [0];
        clone.file.read_exact_at(&mut byte, at as u64).unwrap();
        assert_eq!(byte[0], byte_at(at));
        // SAFETY: the page lies within the mapping; no reference to it exists.
        unsafe { rustix::mm::madvise((clone.mapping + at) as *mut _, PAGE, Advice::LinuxDontNeed) }
            .unwrap();
        assert_eq!(clone.read(at), byte_at(at));
    }
    // Nobody can change what others will read.
    assert!(clone.file.write_at(b"x", 0).is_err());
    assert!(clone.file.set_len(0).is_err());
    drop((clone, sibling));
    lab.end();
}

#[test]
fn a_chunk_that_is_not_what_it_was_is_told_and_no_byte_of_it_is_read_as_root() {
    let lab = Lab::new(true, Vec::new());
    let (mut clone, sibling) = (lab.clone(), lab.clone());
    let mapping = clone.mapping;
    let reads = Arc::new(AtomicUsize::new(0));
    let counted = reads.clone();
    let reader = std::thread::spawn(move || {
        read(mapping, BAD as usize * CHUNK);
        counted.fetch_add(1, Ordering::SeqCst);
    });
    match clone.link.wait() {
        Word::Failed(reason) => assert!(reason.contains("chunk 9 is damaged"), "{reason}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(clone.link.wait(), Word::Gone);
    assert_eq!(reads.load(Ordering::SeqCst), 0);
    // Others go on.
    assert_eq!(sibling.read(0), byte_at(0));
    // In a VM the process ends; here its thread has to be let go.
    drop(clone.faults.take());
    reader.join().unwrap();
    drop((clone, sibling));
    lab.end();
}

#[test]
fn all_of_the_memory_is_in_the_file_once_it_was_asked_for_as_root() {
    let lab = Lab::new(false, Vec::new());
    let clone = lab.clone();
    clone.link.complete().unwrap();
    assert_eq!(clone.link.wait(), Word::Complete);
    let mut copy = vec![0; BYTES];
    clone.file.read_exact_at(&mut copy, 0).unwrap();
    assert!(
        copy.iter()
            .enumerate()
            .all(|(at, byte)| *byte == byte_at(at))
    );
    drop(clone);
    lab.end();
}

#[test]
fn the_working_set_is_fetched_before_it_is_touched_and_nothing_else_as_root() {
    let run = |offset: usize, length: usize| Run {
        offset: offset as u64,
        length: length as u64,
    };
    let set = vec![run(PAGE, PAGE), run(5 * CHUNK - PAGE, 4 * CHUNK)];
    let lab = Lab::new(false, set);
    let clone = lab.clone();
    eventually(|| lab.fetched() == [0, 4, 5, 6, 8]);
    assert_eq!(clone.read(6 * CHUNK), byte_at(6 * CHUNK));
    assert_eq!(clone.read(BYTES - 1), byte_at(BYTES - 1));
    assert_eq!(lab.fetched(), [0, 4, 5, 6, 8, 20]);
    drop(clone);
    lab.end();
}

#[test]
fn a_clone_that_claims_what_it_has_not_is_hung_up_on_as_root() {
    let lab = Lab::new(false, Vec::new());
    let page = PAGE as u64;
    for (address, offset, length) in [
        (0, 0, BYTES as u64 + page),
        (0, BYTES as u64, page),
        (1, 0, page),
        (0, 1, page),
        (0, 0, 1),
        (0, u64::MAX - page + 1, page),
        (u64::MAX - page + 1, 0, page),
    ] {
        let socket = seqpacket();
        rustix::net::connect(&socket, &SocketAddrUnix::new(&lab.path).unwrap()).unwrap();
        let link = Link::new(socket);
        link.memory().unwrap();
        let part = Part {
            address,
            offset,
            length,
        };
        let faults = Userfaultfd::new().unwrap();
        link.attach(&faults, &[part]).unwrap();
        assert_eq!(link.wait(), Word::Gone, "{part:?}");
    }
    lab.end();
}

#[test]
fn who_waits_for_storage_that_does_not_answer_is_told_and_others_go_on_as_root() {
    let stuck = Arc::new(Mutex::new(()));
    let source = Source {
        stuck: stuck.clone(),
        ..Source::default()
    };
    let lab = Lab::of(source, Duration::from_millis(100), Vec::new());
    let hangs = stuck.lock().unwrap();
    let (mut clone, completes, sibling) = (lab.clone(), lab.clone(), lab.clone());
    let mapping = clone.mapping;
    let reader = std::thread::spawn(move || read(mapping, STUCK as usize * CHUNK));
    completes.link.complete().unwrap();
    for waits in [&clone, &completes] {
        match waits.link.wait() {
            Word::Failed(reason) => assert!(reason.contains("storage"), "{reason}"),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(sibling.read(0), byte_at(0));
    drop(hangs);
    drop(clone.faults.take());
    reader.join().unwrap();
    drop((clone, completes, sibling));
    lab.end();
}

const STOPPED: &str = "RATOON_TEST_STOPPED_PAGER";

/// Not a test of its own: the process that the next one stops.
#[test]
fn a_pager_to_be_stopped() {
    let Some(path) = std::env::var_os(STOPPED) else {
        return;
    };
    let pager = pager_at(Path::new(&path), PATIENCE);
    pager.run(Box::new(Source::default()), &[]).unwrap();
}

#[test]
fn a_pager_that_was_stopped_is_silent_and_one_that_works_is_not() {
    const SHORT: Duration = Duration::from_secs(2);
    use rustix::process::{Pid, Signal, kill_process};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pager.sock");
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "pager::tests::a_pager_to_be_stopped"])
        .env(STOPPED, &path)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    eventually(|| path.exists());
    // Bound a moment before it listens.
    eventually(|| {
        let address = SocketAddrUnix::new(&path).unwrap();
        rustix::net::connect(seqpacket(), &address).is_ok()
    });
    let link = link_to(&path, SHORT);
    link.memory().unwrap();
    // It has nothing to say but that it lives, and says so for longer than it may be silent.
    let waits = std::thread::spawn(move || (link.wait(), link));
    std::thread::sleep(SHORT * 2);
    assert!(!waits.is_finished());

    let pid = Pid::from_child(&child);
    kill_process(pid, Signal::STOP).unwrap();
    let (word, link) = waits.join().unwrap();
    assert_eq!(word, Word::Silent(SHORT));
    // It takes connections as it is, and that is all.
    let refused = link_to(&path, SHORT).memory().unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::TimedOut);
    assert!(
        refused.to_string().contains("has said nothing for 2 s"),
        "{refused}"
    );

    kill_process(pid, Signal::CONT).unwrap();
    drop(link);
    assert!(child.wait().unwrap().success());
    assert!(!path.exists());
}
