//! What a request's chain says (virtio 1.2, 5.2.6): a 16-byte header to read, data, and one status
//! byte to write, the last.

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::GuestMemoryMmap;

use super::backend::SECTOR_BYTES;
use crate::virtio::DeviceError;
use crate::virtio::chain::Chain;

/// Length of `struct virtio_blk_req`'s fixed part, in bytes.
pub(super) const HEADER_BYTES: u64 = 16;
/// Length of `struct virtio_blk_discard_write_zeroes`, in bytes.
pub(super) const RANGE_BYTES: u64 = 16;
/// How many ranges one discard or write-zeroes may have.
pub(super) const MAX_RANGES: u32 = 16;
/// How long one such range may be, in sectors: 1 GiB.
pub(super) const MAX_RANGE_SECTORS: u32 = 1 << 21;
/// Length of the disk's name as GET_ID gives it.
pub(super) const ID_BYTES: usize = 20;
/// `flags` bit 0 of a write-zeroes range.
const UNMAP: u32 = 1;

/// A stretch of the disk, in bytes; it lies within it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) unmap: bool,
}

/// What to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// Fill the writable buffers but for the status byte.
    Read { offset: u64, len: u64 },
    /// Write the readable buffers after the header.
    Write { offset: u64, len: u64 },
    /// Make what was written durable.
    Flush,
    /// Give the disk's name.
    Id,
    /// Give space back.
    Discard(Vec<Range>),
    /// Make zeroes.
    WriteZeroes(Vec<Range>),
}

/// Why a request is not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It asks for what the disk does not have, or is malformed: VIRTIO_BLK_S_IOERR.
    Io,
    /// A type that the device does not know: VIRTIO_BLK_S_UNSUPP.
    Unsupported,
}

/// The disk, as far as a request is checked against it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) len_bytes: u64,
    pub(super) read_only: bool,
}

/// Reads a chain.
///
/// # Errors
/// Outside: guest memory that cannot be read, or no place for a status. Inside: why the request is
/// refused.
pub(super) fn parse(
    chain: &Chain,
    memory: &GuestMemoryMmap,
    disk: Limits,
) -> Result<Result<Request, Refusal>, DeviceError> {
    let Some(data_in) = chain.writable_len_bytes().checked_sub(1) else {
        return Err(DeviceError::Driver("block request without a status byte"));
    };
    let mut header = [0; HEADER_BYTES as usize];
    if chain.read(memory, 0, &mut header)? < header.len() {
        return Ok(Err(Refusal::Io));
    }
    let data_out = chain.readable_len_bytes() - HEADER_BYTES;
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(sector);
    let transfer = |len: u64| {
        let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Refusal::Io)?;
        let end = offset.checked_add(len).ok_or(Refusal::Io)?;
        if end > disk.len_bytes || !len.is_multiple_of(SECTOR_BYTES) {
            return Err(Refusal::Io);
        }
        Ok((offset, len))
    };
    let kind = u32::from_le_bytes([t0, t1, t2, t3]);
    let writes = matches!(
        kind,
        VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES
    );
    if writes && disk.read_only {
        return Ok(Err(Refusal::Io));
    }
    Ok(match kind {
        VIRTIO_BLK_T_IN => transfer(data_in).map(|(offset, len)| Request::Read { offset, len }),
        VIRTIO_BLK_T_OUT => transfer(data_out).map(|(offset, len)| Request::Write { offset, len }),
        VIRTIO_BLK_T_FLUSH => Ok(Request::Flush),
        VIRTIO_BLK_T_GET_ID if data_in >= ID_BYTES as u64 => Ok(Request::Id),
        VIRTIO_BLK_T_GET_ID => Err(Refusal::Io),
        VIRTIO_BLK_T_DISCARD => ranges(chain, memory, disk, data_out, 0)?.map(Request::Discard),
        VIRTIO_BLK_T_WRITE_ZEROES => {
            ranges(chain, memory, disk, data_out, UNMAP)?.map(Request::WriteZeroes)
        }
        _ => Err(Refusal::Unsupported),
    })
}

fn ranges(
    chain: &Chain,
    memory: &GuestMemoryMmap,
    disk: Limits,
    bytes: u64,
    known_flags: u32,
) -> Result<Result<Vec<Range>, Refusal>, DeviceError> {
    let count = bytes / RANGE_BYTES;
    if count == 0 || !bytes.is_multiple_of(RANGE_BYTES) || count > u64::from(MAX_RANGES) {
        return Ok(Err(Refusal::Io));
    }
    let mut ranges = Vec::with_capacity(count as usize);
    for index in 0..count {
        let mut entry = [0; RANGE_BYTES as usize];
        chain.read(memory, HEADER_BYTES + index * RANGE_BYTES, &mut entry)?;
        let [sector @ .., n0, n1, n2, n3, f0, f1, f2, f3] = entry;
        let sector = u64::from_le_bytes(sector);
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        // 5.2.6.2: unknown flags, and unmap with a discard, are UNSUPP.
        if flags & !known_flags != 0 {
            return Ok(Err(Refusal::Unsupported));
        }
        let end = sector.checked_add(u64::from(sectors));
        if sectors > MAX_RANGE_SECTORS || end.is_none_or(|end| end > disk.len_bytes / SECTOR_BYTES)
        {
            return Ok(Err(Refusal::Io));
        }
        ranges.push(Range {
            offset: sector * SECTOR_BYTES,
            len: u64::from(sectors) * SECTOR_BYTES,
            unmap: flags & UNMAP != 0,
        });
    }
    Ok(Ok(ranges))
}
