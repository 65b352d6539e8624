//! The frame of both binary indexes: a header of 32 bytes, entries of one size, a BLAKE3 of all
//! of it. Numbers are little-endian.
//!
//! ```text
//!  0  8  magic
//!  8  4  version, 1
//! 12  4  unit: bytes of a page or a chunk
//! 16  8  bytes of memory
//! 24  8  count of entries
//! 32     entries
//!    32  BLAKE3 of everything before
//! ```

use std::path::Path;

use crate::error::{Error, Result};

const VERSION: u32 = 1;
const HEADER_BYTES: usize = 32;
const HASH_BYTES: usize = 32;

/// What a header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) unit_bytes: u32,
    pub(crate) memory_bytes: u64,
    pub(crate) count: u64,
}

/// The length of an index in bytes; the count must be within its limit.
pub(crate) fn length(count: u64, entry_bytes: usize) -> u64 {
    (HEADER_BYTES + HASH_BYTES) as u64 + count * entry_bytes as u64
}

/// Puts header, entries and hash together.
pub(crate) fn write(magic: [u8; 8], header: Header, entries: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + entries.len() + HASH_BYTES);
    bytes.extend(magic);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(header.unit_bytes.to_le_bytes());
    bytes.extend(header.memory_bytes.to_le_bytes());
    bytes.extend(header.count.to_le_bytes());
    bytes.extend(entries);
    let hash = blake3::hash(&bytes);
    bytes.extend(hash.as_bytes());
    bytes
}

/// Takes an index apart after checking magic, version, count, length and hash, in this order.
pub(crate) fn read<'b, const N: usize>(
    bytes: &'b [u8],
    magic: [u8; 8],
    max_count: u64,
    path: &Path,
) -> Result<(Header, &'b [[u8; N]])> {
    let damaged = |reason: &str| Error::damaged(path, reason);
    let Some((head, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
        return Err(damaged("it breaks off in the header"));
    };
    if head[..8] != magic {
        return Err(damaged("it does not begin as such a file does"));
    }
    let version = number32(head, 8);
    if version > VERSION {
        return Err(Error::NewerFormat {
            path: path.to_path_buf(),
            found: version,
            known: VERSION,
            writer: "of unknown version".into(),
        });
    }
    let header = Header {
        unit_bytes: number32(head, 12),
        memory_bytes: number64(head, 16),
        count: number64(head, 24),
    };
    if version != VERSION || header.count > max_count {
        return Err(damaged("its header makes no sense"));
    }
    if bytes.len() as u64 != length(header.count, N) {
        return Err(damaged("its length does not fit its header"));
    }
    let Some((entries, hash)) = rest.split_last_chunk::<HASH_BYTES>() else {
        return Err(damaged("it breaks off before its hash"));
    };
    if blake3::hash(&bytes[..bytes.len() - HASH_BYTES]) != *hash {
        return Err(damaged("its hash does not fit its content"));
    }
    Ok((header, entries.as_chunks::<N>().0))
}

/// The four bytes at `at`, which the caller knows to be there.
pub(crate) fn number32(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4]
        .iter()
        .rev()
        .fold(0, |number, byte| number << 8 | u32::from(*byte))
}

/// The eight bytes at `at`, which the caller knows to be there.
pub(crate) fn number64(bytes: &[u8], at: usize) -> u64 {
    u64::from(number32(bytes, at + 4)) << 32 | u64::from(number32(bytes, at))
}
