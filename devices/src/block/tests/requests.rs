use super::*;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

fn range(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    let mut range = [0; 16];
    range[..8].copy_from_slice(&sector.to_le_bytes());
    range[8..12].copy_from_slice(&sectors.to_le_bytes());
    range[12..].copy_from_slice(&flags.to_le_bytes());
    range
}

struct Bed {
    driver: MockDriver,
    path: PathBuf,
    content: Vec<u8>,
    _directory: TempDir,
}

impl Bed {
    fn new(read_only: bool) -> Self {
        let (directory, path, content) = disk();
        let backend = open(&path, read_only, &[], None).unwrap();
        let mut driver = MockDriver::new(Block::new("root", backend, read_only));
        driver.probe(u64::MAX);
        Self {
            driver,
            path,
            content,
            _directory: directory,
        }
    }

    /// Sends one request and returns its status and the used length.
    fn ask(&mut self, readable: &[&[u8]], writable: &[u32]) -> (u8, u32, Sent) {
        let sent = self.driver.send(0, readable, writable);
        self.driver.kick(0);
        let used = self.driver.used(0);
        assert_eq!(used.len(), 1, "{:?}", self.driver.transport.failure());
        assert_eq!(used[0].head, u32::from(sent.head));
        let last = writable.len() - 1;
        let at = sent.writable[last] + u64::from(writable[last]) - 1;
        let status = self.driver.read_memory(at, 1)[0];
        (status, used[0].len_bytes, sent)
    }

    fn status(&mut self, readable: &[&[u8]], writable: &[u32]) -> u8 {
        self.ask(readable, writable).0
    }

    fn counter(&self, name: &str) -> u64 {
        let all = self.driver.transport.counters();
        all.iter().find(|(n, _)| *n == name).unwrap().1
    }

    fn assert_unchanged(&self) {
        assert!(fs::read(&self.path).unwrap() == self.content);
    }

    fn assert_needs_reset(mut self, reason: &str) {
        self.driver.kick(0);
        let failure = self.driver.transport.failure().map(ToString::to_string);
        assert_eq!(
            failure,
            Some(format!("the driver broke the virtio rules: {reason}"))
        );
        assert_eq!(self.driver.used(0), []);
        self.driver.probe(u64::MAX);
        let read = header(kind::IN, 0);
        assert_eq!(self.status(&[&read], &[512, 1]), OK, "a reset revives");
        self.assert_unchanged();
    }
}

#[test]
fn a_read_fills_its_buffers_and_a_write_reaches_the_file() {
    let mut bed = Bed::new(false);
    let (status, len, sent) = bed.ask(&[&header(kind::IN, 3)], &[1024, 512, 1]);
    assert_eq!((status, len), (OK, 1537));
    assert!(bed.driver.read_memory(sent.writable[0], 1024) == bed.content[1536..2560]);
    assert!(bed.driver.read_memory(sent.writable[1], 512) == bed.content[2560..3072]);
    let (one, two) = ([1; 512], [2; 1024]);
    let (status, len, _) = bed.ask(&[&header(kind::OUT, 9), &one, &two], &[1]);
    assert_eq!((status, len), (OK, 1));
    bed.content[9 * 512..10 * 512].fill(1);
    bed.content[10 * 512..12 * 512].fill(2);
    bed.assert_unchanged();
    let counters = ["reads", "read_bytes", "writes", "write_bytes", "errors"];
    assert_eq!(
        counters.map(|name| bed.counter(name)),
        [1, 1536, 1, 1536, 0]
    );
    let cause = bed.driver.take_interrupt();
    assert_eq!(cause, (Interrupt::USED_BUFFER, true));
}

#[test]
fn the_cut_into_buffers_means_nothing() {
    let mut bed = Bed::new(false);
    let read = header(kind::IN, 1);
    // Header in three buffers, the status at the end of the data's.
    let (status, len, sent) = bed.ask(&[&read[..1], &read[1..9], &read[9..]], &[100, 413]);
    assert_eq!((status, len), (OK, 513));
    assert!(bed.driver.read_memory(sent.writable[0], 100) == bed.content[512..612]);
    assert!(bed.driver.read_memory(sent.writable[1], 412) == bed.content[612..1024]);
    let mut write = header(kind::OUT, 2).to_vec();
    write.extend([9; 512]);
    assert_eq!(bed.status(&[&write], &[1]), OK);
    bed.content[1024..1536].fill(9);
    bed.assert_unchanged();
}

#[test]
fn what_lies_beyond_the_end_is_an_io_error() {
    let mut bed = Bed::new(false);
    let end = DISK_BYTES / 512;
    for sector in [end, end - 1, u64::MAX, u64::MAX / 512, 1 << 55] {
        assert_eq!(bed.status(&[&header(kind::IN, sector)], &[1024, 1]), IOERR);
        assert_eq!(
            bed.status(&[&header(kind::OUT, sector), &[0; 1024]], &[1]),
            IOERR
        );
        assert_eq!(
            bed.status(&[&header(kind::DISCARD, 0), &range(sector, 2, 0)], &[1]),
            IOERR
        );
        assert_eq!(
            bed.status(
                &[&header(kind::WRITE_ZEROES, 0), &range(sector, 2, 1)],
                &[1]
            ),
            IOERR
        );
    }
    assert_eq!(bed.status(&[&header(kind::IN, end - 2)], &[1024, 1]), OK);
    assert_eq!((bed.counter("errors"), bed.counter("host_errors")), (20, 0));
    bed.assert_unchanged();
}

#[test]
fn a_short_header_or_a_part_of_a_sector_is_an_io_error() {
    let mut bed = Bed::new(false);
    assert_eq!(bed.status(&[&header(kind::IN, 0)[..15]], &[512, 1]), IOERR);
    assert_eq!(bed.status(&[], &[512, 1]), IOERR);
    assert_eq!(bed.status(&[&header(kind::IN, 0)], &[511, 1]), IOERR);
    assert_eq!(bed.status(&[&header(kind::OUT, 0), &[0; 513]], &[1]), IOERR);
    bed.assert_unchanged();
}

#[test]
fn a_request_larger_than_the_limits_is_an_io_error() {
    let (mut bed, calls) = scripted(None, u64::MAX);
    // Many descriptors may name one buffer: that makes more than memory holds.
    let buffer = bed.driver.allocate(4 << 20);
    let asked = bed.driver.allocate(17);
    bed.driver.write_memory(asked, &header(kind::IN, 0));
    let mut chain = vec![(asked, 16, false)];
    chain.extend([(buffer, 4 << 20, true); 16]);
    chain.push((asked + 16, 1, true));
    let head = bed.driver.lay_chain(0, &chain);
    bed.driver.offer(0, head);
    bed.driver.kick(0);
    assert_eq!(bed.driver.used(0).len(), 1);
    assert_eq!(bed.driver.read_memory(asked + 16, 1), [IOERR]);
    assert_eq!(*calls.lock().unwrap(), [""; 0]);
}

#[test]
fn an_unknown_type_is_unsupported() {
    let mut bed = Bed::new(false);
    for kind in [2, 3, 5, 10, 12, 14, u32::MAX] {
        assert_eq!(bed.status(&[&header(kind, 0)], &[512, 1]), UNSUPP);
    }
    bed.assert_unchanged();
}

#[test]
fn no_room_for_a_status_needs_a_reset() {
    let mut bed = Bed::new(false);
    bed.driver.send(0, &[&header(kind::OUT, 0), &[0; 512]], &[]);
    bed.assert_needs_reset("block request without a status byte");
}

#[test]
fn a_buffer_outside_memory_needs_a_reset() {
    let mut bed = Bed::new(false);
    let head = bed
        .driver
        .lay_chain(0, &[(u64::MAX - 100, 16, false), (0x20_0000, 1, true)]);
    bed.driver.offer(0, head);
    bed.assert_needs_reset("buffer outside guest memory");
}

#[test]
fn the_id_is_padded_with_zeroes_to_20_bytes() {
    let mut bed = Bed::new(true);
    let (status, len, sent) = bed.ask(&[&header(kind::GET_ID, 0)], &[20, 1]);
    assert_eq!((status, len), (OK, 21));
    let mut id = *b"root\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    assert_eq!(bed.driver.read_memory(sent.writable[0], 20), id);
    assert_eq!(bed.status(&[&header(kind::GET_ID, 0)], &[19, 1]), IOERR);
    let backend = open(&bed.path, true, &[], None).unwrap();
    let long = Block::new("a name of more than 20 bytes", backend, true);
    bed.driver = MockDriver::new(long);
    bed.driver.probe(0);
    let (_, _, sent) = bed.ask(&[&header(kind::GET_ID, 0)], &[20, 1]);
    id.copy_from_slice(b"a name of more than ");
    assert_eq!(bed.driver.read_memory(sent.writable[0], 20), id);
}

#[test]
fn a_read_only_disk_says_so_and_is_never_written() {
    let mut bed = Bed::new(true);
    let offered = bed.driver.offered();
    assert_ne!(offered & feature::RO, 0);
    assert_eq!(offered & (feature::DISCARD | feature::WRITE_ZEROES), 0);
    assert_eq!(bed.status(&[&header(kind::OUT, 0), &[0; 512]], &[1]), IOERR);
    assert_eq!(
        bed.status(&[&header(kind::DISCARD, 0), &range(0, 8, 0)], &[1]),
        UNSUPP
    );
    assert_eq!(
        bed.status(&[&header(kind::WRITE_ZEROES, 0), &range(0, 8, 0)], &[1]),
        UNSUPP
    );
    assert_eq!(bed.status(&[&header(kind::FLUSH, 0)], &[1]), OK);
    bed.assert_unchanged();
}

#[test]
fn zeroes_and_discards_are_done_in_their_range_alone() {
    let mut bed = Bed::new(false);
    for (flags, sector) in [(0, 16), (1, 64)] {
        let ranges = range(sector, 9, flags);
        assert_eq!(
            bed.status(&[&header(kind::WRITE_ZEROES, 0), &ranges], &[1]),
            OK
        );
        bed.content[sector as usize * 512..(sector as usize + 9) * 512].fill(0);
    }
    bed.assert_unchanged();
    let ranges = [range(128, 8, 0), range(256, 16, 0), range(0, 0, 0)].concat();
    assert_eq!(bed.status(&[&header(kind::DISCARD, 0), &ranges], &[1]), OK);
    bed.content[128 * 512..136 * 512].fill(0);
    bed.content[256 * 512..272 * 512].fill(0);
    bed.assert_unchanged();
    assert_eq!(
        (bed.counter("discards"), bed.counter("write_zeroes")),
        (1, 2)
    );
}

#[test]
fn ranges_that_break_a_rule_change_nothing() {
    let mut bed = Bed::new(false);
    let discard = header(kind::DISCARD, 0);
    let zeroes = header(kind::WRITE_ZEROES, 0);
    let good = range(0, 8, 0);
    // The good range comes first: all are checked before any is done.
    for (bad, want) in [
        (range(8, 8, 1), UNSUPP),
        (range(8, 8, 2), UNSUPP),
        (range(DISK_BYTES / 512, 1, 0), IOERR),
        (range(0, u32::MAX, 0), IOERR),
    ] {
        assert_eq!(bed.status(&[&discard, &good, &bad], &[1]), want);
    }
    let many = good.repeat(DISCARD_SEGMENTS_MAX as usize + 1);
    assert_eq!(bed.status(&[&discard, &many], &[1]), IOERR);
    assert_eq!(bed.status(&[&discard, &good[..15]], &[1]), IOERR);
    assert_eq!(bed.status(&[&discard], &[1]), IOERR);
    assert_eq!(bed.status(&[&zeroes, &good, &good], &[1]), IOERR);
    assert_eq!(bed.status(&[&zeroes, &range(0, 8, 4)], &[1]), UNSUPP);
    let large = range(0, ZEROES_SECTORS_MAX + 1, 0);
    assert_eq!(bed.status(&[&zeroes, &large], &[1]), IOERR);
    bed.assert_unchanged();
}

#[test]
fn a_full_queue_is_served_at_one_kick() {
    let mut bed = Bed::new(false);
    // Two descriptors each.
    for sector in 0..u64::from(QUEUE_SIZE / 2) {
        bed.driver.send(0, &[&header(kind::IN, sector)], &[513]);
    }
    bed.driver.kick(0);
    assert_eq!(bed.driver.used(0).len(), usize::from(QUEUE_SIZE / 2));
}

#[test]
fn a_long_turn_ends_and_goes_on_by_itself() {
    let mut bed = Bed::new(false);
    for _ in 0..6 {
        bed.driver.send(0, &[&header(kind::IN, 0)], &[2 << 20, 1]);
    }
    bed.driver.kick(0);
    assert_eq!(bed.driver.used(0).len(), 4, "8 MiB");
    assert!(bed.driver.run_kicks());
    assert_eq!(bed.driver.used(0).len(), 2);
    assert!(!bed.driver.run_kicks());
}

#[test]
fn the_configuration_is_the_specifications() {
    let mut bed = Bed::new(false);
    let config = bed.driver.read_config(0, 64);
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!(u64::from(word(0)), DISK_BYTES / 512, "capacity");
    assert_eq!((word(8), word(12)), (256 << 10, 254), "size_max, seg_max");
    assert_eq!(word(20), 512, "blk_size");
    assert_eq!(config[24..28], [3, 0, 8, 0], "topology");
    assert_eq!(config[34..36], [1, 0], "num_queues");
    assert_eq!((word(36), word(40), word(44)), (1 << 21, 64, 8), "discard");
    assert_eq!(
        (word(48), word(52), config[56]),
        (1 << 17, 1, 1),
        "write zeroes"
    );
    assert_eq!(config[60..], [0; 4], "beyond the end");
    let backend = RawFile::open(&bed.path, true).err();
    assert!(matches!(backend, Some(OpenError::Locked { .. })));
}

/// A backend whose calls are noted, and fail as told.
struct Scripted {
    calls: Arc<Mutex<Vec<&'static str>>>,
    errno: Option<i32>,
}

impl Scripted {
    fn call(&self, name: &'static str) -> io::Result<()> {
        self.calls.lock().unwrap().push(name);
        self.errno
            .map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)))
    }
}

impl Backend for Scripted {
    fn name(&self) -> &str {
        "scripted"
    }

    fn len_bytes(&self) -> u64 {
        DISK_BYTES
    }

    fn read_at(&mut self, _: &[VolatileSlice<'_>], _: u64) -> io::Result<()> {
        self.call("read")
    }

    fn write_at(&mut self, _: &[VolatileSlice<'_>], _: u64) -> io::Result<()> {
        self.call("write")
    }

    fn flush(&mut self) -> io::Result<()> {
        self.call("flush")
    }

    fn discard(&mut self, _: u64, _: u64) -> io::Result<()> {
        self.call("discard")
    }

    fn write_zeroes(&mut self, _: u64, _: u64, _: bool) -> io::Result<()> {
        self.call("zeroes")
    }
}

fn scripted(errno: Option<i32>, features: u64) -> (Bed, Arc<Mutex<Vec<&'static str>>>) {
    let calls = Arc::new(Mutex::new(Vec::new()));
    let backend = Scripted {
        calls: Arc::clone(&calls),
        errno,
    };
    let mut bed = Bed::new(false);
    bed.driver = MockDriver::new(Block::new("", Box::new(backend), false));
    bed.driver.probe(features);
    (bed, calls)
}

#[test]
fn a_host_that_fails_costs_the_request_and_not_the_device() {
    for errno in [libc::ENOSPC, libc::EIO] {
        let (mut bed, calls) = scripted(Some(errno), u64::MAX);
        assert_eq!(bed.status(&[&header(kind::OUT, 0), &[0; 512]], &[1]), IOERR);
        assert_eq!(bed.status(&[&header(kind::IN, 0)], &[512, 1]), IOERR);
        assert_eq!(bed.status(&[&header(kind::FLUSH, 0)], &[1]), IOERR);
        assert_eq!(
            bed.status(&[&header(kind::DISCARD, 0), &range(0, 8, 0)], &[1]),
            IOERR
        );
        assert_eq!(
            bed.status(&[&header(kind::WRITE_ZEROES, 0), &range(0, 8, 0)], &[1]),
            IOERR
        );
        assert_eq!(
            *calls.lock().unwrap(),
            ["write", "read", "flush", "discard", "zeroes"]
        );
        assert_eq!((bed.counter("errors"), bed.counter("host_errors")), (5, 5));
        assert_eq!(bed.driver.status() & status::DEVICE_NEEDS_RESET, 0);
    }
}

#[test]
fn a_driver_without_flush_gets_write_through() {
    for (features, want) in [
        (u64::MAX, &["write", "zeroes"][..]),
        (!feature::FLUSH, &["write", "flush", "zeroes", "flush"][..]),
    ] {
        let (mut bed, calls) = scripted(None, features);
        assert_eq!(bed.status(&[&header(kind::OUT, 0), &[0; 512]], &[1]), OK);
        assert_eq!(
            bed.status(&[&header(kind::WRITE_ZEROES, 0), &range(0, 8, 0)], &[1]),
            OK
        );
        assert_eq!(*calls.lock().unwrap(), want);
    }
}

#[test]
fn what_was_not_agreed_on_is_unsupported() {
    let (mut bed, calls) = scripted(None, 0);
    assert_eq!(
        bed.status(&[&header(kind::DISCARD, 0), &range(0, 8, 0)], &[1]),
        UNSUPP
    );
    assert_eq!(
        bed.status(&[&header(kind::WRITE_ZEROES, 0), &range(0, 8, 0)], &[1]),
        UNSUPP
    );
    assert_eq!(*calls.lock().unwrap(), [""; 0]);
}
