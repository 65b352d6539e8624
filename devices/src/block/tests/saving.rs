//! A saved disk goes on with the request that waits; its files are whole before that.

use super::*;
use crate::virtio::state::{RestoreError, TransportState, through_json};

fn request(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

fn driver(backend: Box<dyn Backend>) -> MockDriver {
    let mut driver = MockDriver::new(Block::new("root", backend, false));
    driver.probe(u64::MAX);
    driver
}

fn write_sector(driver: &mut MockDriver, sector: u64, byte: u8) -> Sent {
    driver.send(0, &[&request(kind::OUT, sector), &[byte; 512]], &[1])
}

fn assert_ok(driver: &MockDriver, sent: &Sent) {
    let status = sent.writable[sent.writable.len() - 1];
    assert_eq!(driver.read_memory(status, 1), [0]);
}

#[test]
fn writes_and_reads_go_on_where_they_were() {
    let (_directory, path, content) = disk();
    let mut driver = driver(open(&path, false, &[], None).unwrap());
    // More than the ring's length, so that positions are not descriptors.
    for _ in 0..300 {
        write_sector(&mut driver, 1, 1);
        driver.kick(0);
        assert_eq!(driver.used(0).len(), 1);
    }
    driver.take_interrupt();
    let first = write_sector(&mut driver, 2, 2);
    let read = driver.send(0, &[&request(kind::IN, 1)], &[1536, 1]);
    driver.write_memory(first.writable[0], &[0xff]);
    // The driver wants to hear of the next used entry (used_event), and was told of none before.
    let used_event = MockDriver::areas(0)[1] + 4 + 2 * u64::from(QUEUE_SIZE);
    driver.write_memory(used_event, &300_u16.to_le_bytes());
    let state = through_json(&driver.transport.save());
    assert_eq!(state.rings[0].next_avail, 300);

    driver
        .restore(Block::new("none", open_copy(&path), false), &state)
        .unwrap();
    assert_eq!(driver.transport.save(), state);
    assert_eq!(driver.used(0), []);
    driver.run_kicks();
    assert_eq!(driver.used(0).len(), 2);
    assert_ok(&driver, &first);
    let bytes = driver.read_memory(read.writable[0], 1536);
    assert_eq!(bytes[..512], [1; 512]);
    assert_eq!(bytes[512..1024], [2; 512]);
    assert!(bytes[1024..] == content[1536..2048]);
    assert_eq!(driver.take_interrupt(), (Interrupt::USED_BUFFER, true));
}

/// A disk in a copy of the file, as a child has its own layer.
fn open_copy(path: &Path) -> Box<dyn Backend> {
    let copy = path.with_extension("copy");
    fs::copy(path, &copy).unwrap();
    open(&copy, false, &[], None).unwrap()
}

#[test]
fn a_layer_that_was_written_back_is_whole_in_its_file() {
    let (directory, base, _) = disk();
    let layer = directory.path().join("layer");
    let mut driver = driver(open(&base, false, &[], Some(&layer)).unwrap());
    for sector in [0, 1000, 5000] {
        let sent = write_sector(&mut driver, sector, sector as u8 + 1);
        driver.kick(0);
        assert_ok(&driver, &sent);
    }
    driver.transport.write_back().unwrap();
    // While the first one still has it open, with all its caches.
    let copy = directory.path().join("copy");
    fs::copy(&layer, &copy).unwrap();
    let mut twin = Layer::open(&copy, &[], &base).unwrap();
    for sector in [0, 1000, 5000] {
        let bytes = read(&mut twin, sector * 512, 512);
        assert_eq!(bytes, [sector as u8 + 1; 512]);
    }
    let sent = write_sector(&mut driver, 7, 7);
    driver.kick(0);
    assert_ok(&driver, &sent);
}

#[test]
fn another_disk_is_refused_by_name() {
    let (directory, path, _) = disk();
    let mut driver = driver(open(&path, false, &[], None).unwrap());
    let state = driver.transport.save();
    let small = directory.path().join("small.raw");
    fs::write(&small, vec![0; 1 << 20]).unwrap();
    let mut refusal = |path: &Path, read_only, state: &TransportState| {
        let backend = open(path, read_only, &[], None).unwrap();
        let refused = driver.restore(Block::new("root", backend, read_only), state);
        refused.unwrap_err()
    };
    assert_eq!(
        refusal(&small, false, &state).to_string(),
        "the disk's size in bytes was 4194304, in the new device it is 1048576"
    );
    let copy = directory.path().join("copy.raw");
    fs::copy(&path, &copy).unwrap();
    let refused = refusal(&copy, true, &state);
    assert!(
        matches!(refused, RestoreError::Features { .. }),
        "{refused}"
    );
    // A driver that wants nothing that a read-only disk lacks.
    let mut modest = state.clone();
    modest.driver_features &= !(feature::DISCARD | feature::WRITE_ZEROES);
    assert_eq!(
        refusal(&copy, true, &modest).to_string(),
        "whether the disk is read-only was false, in the new device it is true"
    );
}
