//! Readers that unpack, count, hash and refuse bombs.

use std::cell::Cell;
use std::io::{self, BufRead, BufReader, Read};
use std::rc::Rc;

use flate2::bufread::MultiGzDecoder;
use sha2::{Digest as _, Sha256};

use super::error::Error;

/// Limits on what an archive may make of itself; an import that passes one is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the unpacked tars together, and of a raw disk.
    pub total_bytes: u64,
    /// Entries of all layers together.
    pub entries: u64,
    /// Unpacked bytes for one packed byte, looked at once `ratio_from_bytes` are unpacked.
    pub ratio: u64,
    /// Where the ratio begins to count, in unpacked bytes.
    pub ratio_from_bytes: u64,
    /// Layers of one container image.
    pub layers: u64,
    /// A manifest, index or config, in bytes.
    pub manifest_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            total_bytes: 64 << 30,
            entries: 4_000_000,
            ratio: 200,
            ratio_from_bytes: 256 << 20,
            layers: 512,
            manifest_bytes: 4 << 20,
        }
    }
}

/// What the import has used of its limits; shared by its readers.
#[derive(Debug, Clone)]
pub(super) struct Budget {
    pub(super) limits: Limits,
    pub(super) total_bytes: Rc<Cell<u64>>,
    pub(super) entries: Rc<Cell<u64>>,
}

impl Budget {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            total_bytes: Rc::default(),
            entries: Rc::default(),
        }
    }

    /// Counts one entry.
    pub(super) fn count_entry(&self, archive: &str) -> Result<(), Error> {
        self.entries.set(self.entries.get() + 1);
        if self.entries.get() > self.limits.entries {
            return Err(Error::OverLimit {
                archive: archive.to_owned(),
                what: "entries",
                limit: self.limits.entries,
            });
        }
        Ok(())
    }
}

/// How bytes are packed, by their first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Packing {
    Plain,
    Gzip,
    Zstd,
    /// Known and not read; the name and the program that unpacks it.
    Other(&'static str, &'static str),
}

/// Looks at the first bytes (RFC 1952, RFC 8878, the xz and bzip2 formats).
pub(super) fn packing(start: &[u8]) -> Packing {
    match start {
        [0x1f, 0x8b, ..] => Packing::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Packing::Zstd,
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Packing::Other("xz", "xz -d"),
        [b'B', b'Z', b'h', b'1'..=b'9', b'1', b'A', b'Y', ..] => {
            Packing::Other("bzip2", "bzip2 -d")
        }
        _ => Packing::Plain,
    }
}

/// Unpacks by content, within the limits. Errors come as [`Error`] inside [`io::Error`].
pub(super) fn unpack<'r>(
    reader: impl Read + 'r,
    archive: &str,
    budget: &Budget,
) -> io::Result<Box<dyn Read + 'r>> {
    let packed = Rc::new(Cell::new(0));
    let mut reader = BufReader::with_capacity(
        64 << 10,
        Counting {
            inner: reader,
            count: Rc::clone(&packed),
        },
    );
    let kind = packing(reader.fill_buf()?);
    let inner: Box<dyn Read + 'r> = match kind {
        Packing::Plain => Box::new(reader),
        Packing::Gzip => Box::new(MultiGzDecoder::new(reader)),
        Packing::Zstd => Box::new(zstd::stream::read::Decoder::with_buffer(reader)?),
        Packing::Other(name, program) => {
            return Err(Error::BadManifest {
                archive: archive.to_owned(),
                reason: format!(
                    "packed with {name}, which we do not read: unpack it with `{program}`"
                ),
            }
            .into_io());
        }
    };
    let ratio = if kind == Packing::Plain {
        u64::MAX
    } else {
        budget.limits.ratio
    };
    Ok(Box::new(Bounded {
        inner,
        archive: archive.to_owned(),
        budget: budget.clone(),
        packed,
        unpacked: 0,
        ratio,
    }))
}

struct Counting<R> {
    inner: R,
    count: Rc<Cell<u64>>,
}

impl<R: Read> Read for Counting<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.count.set(self.count.get() + read as u64);
        Ok(read)
    }
}

struct Bounded<'r> {
    inner: Box<dyn Read + 'r>,
    archive: String,
    budget: Budget,
    packed: Rc<Cell<u64>>,
    unpacked: u64,
    ratio: u64,
}

impl Read for Bounded<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self
            .inner
            .read(buffer)
            .map_err(|error| match error.kind() {
                // What the decoders say of broken or short input.
                io::ErrorKind::InvalidInput
                | io::ErrorKind::InvalidData
                | io::ErrorKind::UnexpectedEof
                | io::ErrorKind::Other
                    if error.get_ref().is_none_or(|inner| !inner.is::<Error>()) =>
                {
                    Error::DamagedArchive {
                        archive: self.archive.clone(),
                        offset: self.unpacked,
                        reason: error.to_string(),
                    }
                    .into_io()
                }
                _ => error,
            })?;
        self.unpacked += read as u64;
        let total = self.budget.total_bytes.get().saturating_add(read as u64);
        self.budget.total_bytes.set(total);
        let over = |what, limit| {
            Err(Error::OverLimit {
                archive: self.archive.clone(),
                what,
                limit,
            }
            .into_io())
        };
        let limits = &self.budget.limits;
        if total > limits.total_bytes {
            return over("unpacked bytes", limits.total_bytes);
        }
        if self.unpacked > limits.ratio_from_bytes
            && self.unpacked / self.packed.get().max(1) > self.ratio
        {
            return over("unpacked bytes for each packed byte", self.ratio);
        }
        Ok(read)
    }
}

/// Hashes what passes through.
pub(super) struct Hashing<R> {
    inner: R,
    hasher: Sha256,
}

impl<R: Read> Hashing<R> {
    pub(super) fn new(inner: R) -> Self {
        Self {
            inner,
            hasher: Sha256::new(),
        }
    }

    /// Reads to the end and gives the hash in hexadecimal.
    pub(super) fn finish(mut self) -> io::Result<String> {
        io::copy(&mut self, &mut io::sink())?;
        Ok(hex(&self.hasher.finalize()))
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..read]);
        Ok(read)
    }
}

/// Lower-case hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
