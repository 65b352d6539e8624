//! virtio-blk's requests, on a raw file or on a qcow2 layer over one.
//!
//! Rules: no panic; a reset revives; the backend is asked only for whole sectors within the disk,
//! and for no change of a read-only one; what it reads is what was written, also after it was
//! opened again; the base under a layer never changes.

#![no_main]

use std::fs::{self, File};
use std::io;
use std::os::fd::FromRawFd;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use ratoon_devices::block::{self, Backend, Block, RawFile, SECTOR_BYTES};
use ratoon_devices::virtio::testing::MockDriver;
use ratoon_fuzz::{kick_or_else, rarely, send_bytes};
use vm_memory::VolatileSlice;

/// Four clusters of a layer and a piece of a fifth.
const DISK_BYTES: usize = (256 << 10) + 3 * 512;
const SECTORS: u64 = DISK_BYTES as u64 / SECTOR_BYTES;

/// Request types (virtio 1.2, 5.2.6).
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// Between the device and its backend: holds what the disk must read as, and both to their rules.
struct Checked {
    inner: Box<dyn Backend>,
    model: Arc<Mutex<Vec<u8>>>,
    read_only: bool,
}

impl Checked {
    fn check(&self, offset: u64, len_bytes: u64, change: bool) -> std::ops::Range<usize> {
        assert!(offset.is_multiple_of(SECTOR_BYTES), "offset {offset}");
        assert!(len_bytes.is_multiple_of(SECTOR_BYTES), "{len_bytes} bytes");
        let end = offset.checked_add(len_bytes).expect("no overflow");
        assert!(end <= DISK_BYTES as u64, "beyond the end: {end}");
        assert!(!(change && self.read_only), "a change of a read-only disk");
        offset as usize..end as usize
    }

    fn content(&mut self, range: std::ops::Range<usize>) -> Vec<u8> {
        let mut bytes = vec![0xee; range.len()];
        self.inner
            .read_at(&[VolatileSlice::from(&mut bytes[..])], range.start as u64)
            .expect("a read from memory");
        bytes
    }

    /// The range reads as the model says.
    fn compare(&mut self, range: std::ops::Range<usize>) {
        let content = self.content(range.clone());
        let model = self.model.lock().expect("one thread");
        assert!(content == model[range.clone()], "content of {range:?}");
    }
}

fn len_bytes(buffers: &[VolatileSlice<'_>]) -> u64 {
    buffers.iter().map(|buffer| buffer.len() as u64).sum()
}

impl Backend for Checked {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn len_bytes(&self) -> u64 {
        self.inner.len_bytes()
    }

    fn discard_granularity_bytes(&self) -> u32 {
        self.inner.discard_granularity_bytes()
    }

    fn read_at(&mut self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        let range = self.check(offset, len_bytes(buffers), false);
        // The guest's buffers may lie over each other, so the content is read apart.
        self.compare(range);
        self.inner.read_at(buffers, offset)
    }

    fn write_at(&mut self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        let range = self.check(offset, len_bytes(buffers), true);
        let mut at = range.start;
        for buffer in buffers {
            let mut model = self.model.lock().expect("one thread");
            buffer.copy_to(&mut model[at..at + buffer.len()]);
            at += buffer.len();
        }
        let done = self.inner.write_at(buffers, offset);
        self.compare(range);
        done
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }

    fn discard(&mut self, offset: u64, len_bytes: u64) -> io::Result<()> {
        let range = self.check(offset, len_bytes, true);
        let done = self.inner.discard(offset, len_bytes);
        let content = self.content(range.clone());
        let mut model = self.model.lock().expect("one thread");
        let before = &mut model[range];
        let kept = |(now, before): (&u8, &u8)| *now == 0 || now == before;
        assert!(content.iter().zip(&*before).all(kept), "after a discard");
        before.copy_from_slice(&content);
        done
    }

    fn write_zeroes(&mut self, offset: u64, len_bytes: u64, may_unmap: bool) -> io::Result<()> {
        let range = self.check(offset, len_bytes, true);
        self.model.lock().expect("one thread")[range.clone()].fill(0);
        let done = self.inner.write_zeroes(offset, len_bytes, may_unmap);
        self.compare(range);
        done
    }
}

/// What the disk first holds: no sector is like another, the last quarter is zeroes.
fn original() -> &'static [u8] {
    static ORIGINAL: OnceLock<Vec<u8>> = OnceLock::new();
    ORIGINAL.get_or_init(|| {
        let mut bytes: Vec<u8> = (0..DISK_BYTES)
            .map(|at| (at / 512 * 31 + at) as u8)
            .collect();
        bytes[DISK_BYTES / 4 * 3..].fill(0);
        bytes
    })
}

/// A file in memory.
fn memory_file(content: &[u8]) -> File {
    // SAFETY: the name is a C string; the descriptor is new and ours.
    let file = unsafe {
        let fd = libc::memfd_create(c"disk".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0, "a memfd");
        File::from_raw_fd(fd)
    };
    std::os::unix::fs::FileExt::write_all_at(&file, content, 0).expect("a write to memory");
    file
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

/// A range of sectors on the disk; rarely any.
fn range(input: &mut Unstructured<'_>) -> Result<(u64, u32)> {
    if rarely(input)? {
        return Ok((input.arbitrary()?, input.int_in_range(0..=300)?));
    }
    let first = input.int_in_range(0..=SECTORS - 1)?;
    let most = (SECTORS - first) as u32;
    let few = input.int_in_range(0..=3u8)? > 0;
    let count = input.int_in_range(1..=if few { most.min(16) } else { most })?;
    Ok((first, count))
}

/// `bytes` cut in up to four.
fn cut<'a>(input: &mut Unstructured<'_>, bytes: &'a [u8]) -> Result<Vec<&'a [u8]>> {
    let mut pieces = Vec::new();
    let mut rest = bytes;
    for _ in 0..input.int_in_range(0..=3u8)? {
        if rest.len() > 1 {
            let (piece, tail) = rest.split_at(input.int_in_range(1..=rest.len() - 1)?);
            pieces.push(piece);
            rest = tail;
        }
    }
    pieces.push(rest);
    Ok(pieces)
}

/// One request.
fn request(driver: &mut MockDriver, input: &mut Unstructured<'_>) -> Result<()> {
    let mut kind = *input.choose(&[IN, IN, OUT, OUT, OUT, DISCARD, WRITE_ZEROES, FLUSH, GET_ID])?;
    let (sector, count) = range(input)?;
    let mut data_bytes = count * SECTOR_BYTES as u32;
    let mut readable = header(kind, sector).to_vec();
    let mut writable = Vec::new();
    match kind {
        OUT => {
            let fill: u8 = input.arbitrary()?;
            for sector in 0..count {
                readable.extend([fill.wrapping_add(sector as u8); SECTOR_BYTES as usize]);
            }
        }
        DISCARD | WRITE_ZEROES => {
            let many = if kind == DISCARD { 5 } else { 1 };
            for _ in 0..input.int_in_range(1..=many)? {
                let (sector, count) = range(input)?;
                let unmap = kind == WRITE_ZEROES && input.arbitrary()?;
                let flags = if rarely(input)? {
                    input.arbitrary()?
                } else {
                    u32::from(unmap)
                };
                readable.extend(sector.to_le_bytes());
                readable.extend(count.to_le_bytes());
                readable.extend(flags.to_le_bytes());
            }
        }
        IN | GET_ID => {
            if kind == GET_ID {
                data_bytes = 20;
            }
            if data_bytes < 2 || input.arbitrary()? {
                writable.push(data_bytes);
            } else {
                let first = input.int_in_range(1..=data_bytes - 1)?;
                writable.extend([first, data_bytes - first]);
            }
        }
        _ => {}
    }
    writable.push(1);
    if rarely(input)? {
        kind = input.int_in_range(0..=16)?;
        readable[..4].copy_from_slice(&kind.to_le_bytes());
    }
    if rarely(input)? {
        let keep = input.int_in_range(0..=readable.len())?;
        readable.truncate(keep);
    }
    if rarely(input)? {
        writable.pop();
    }
    let pieces = if readable.is_empty() {
        Vec::new()
    } else {
        cut(input, &readable)?
    };
    if pieces.is_empty() && writable.is_empty() {
        return Ok(());
    }
    send_bytes(driver, input, 0, &pieces, &writable)
}

fn drive(driver: &mut MockDriver, input: &mut Unstructured<'_>, features: u64) -> Result<()> {
    while !input.is_empty() {
        request(driver, input)?;
        if input.int_in_range(0..=3u8)? == 0 {
            // Several requests at one kick.
            continue;
        }
        kick_or_else(driver, input, 0, features)?;
        driver.run_kicks();
    }
    Ok(())
}

fn open_layer(folder: &Path) -> Box<dyn Backend> {
    let layer = folder.join("layer");
    block::open(&folder.join("base"), false, &[], Some(&layer)).expect("a layer")
}

fn run(mut input: Unstructured<'_>) -> Result<()> {
    let layered: bool = input.arbitrary()?;
    let read_only = !layered && rarely(&mut input)?;
    let features = if rarely(&mut input)? {
        input.arbitrary()?
    } else {
        u64::MAX
    };
    let model = Arc::new(Mutex::new(original().to_vec()));
    let folder = layered.then(|| tempfile::tempdir_in("/dev/shm").expect("a folder in memory"));
    let inner: Box<dyn Backend> = match &folder {
        Some(folder) => {
            fs::write(folder.path().join("base"), original()).expect("a base");
            open_layer(folder.path())
        }
        None => {
            let file = memory_file(original());
            Box::new(RawFile::from_file(file, Path::new("raw"), read_only).expect("a disk"))
        }
    };
    let checked = Checked {
        inner,
        model: Arc::clone(&model),
        read_only,
    };
    let mut driver = MockDriver::new(Block::new("disk", Box::new(checked), read_only));
    driver.probe(features);
    // Running out of input is the usual end.
    let _ = drive(&mut driver, &mut input, features);
    drop(driver);
    if let Some(folder) = folder {
        let mut again = Checked {
            inner: open_layer(folder.path()),
            model,
            read_only,
        };
        again.compare(0..DISK_BYTES);
        let now = fs::read(folder.path().join("base")).expect("the base");
        assert!(now == original(), "the base has changed");
    }
    Ok(())
}

fuzz_target!(|data: &[u8]| {
    let _ = run(Unstructured::new(data));
});
