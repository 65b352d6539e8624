//! What a chain asks for (virtio 1.2, 5.2.6).
//!
//! ```text
//!  readable: type u32, reserved u32, sector u64 | data to write, or 16-byte ranges
//!  writable: data to read                       | status u8, the last byte
//! ```
//! How the bytes are cut into buffers says nothing (2.7.4). All is checked here before a byte of
//! the disk is touched.

use vm_memory::GuestMemoryMmap;

use super::backend::SECTOR_BYTES;
use crate::virtio::DeviceError;
use crate::virtio::chain::Chain;

/// The header's length in bytes.
pub(super) const HEADER_BYTES: u64 = 16;
/// GET_ID's answer in bytes.
pub(super) const ID_BYTES: usize = 20;
/// The most ranges in one discard.
pub(super) const DISCARD_SEGMENTS_MAX: u32 = 64;
/// The most sectors in one range of a discard: 1 GiB.
pub(super) const DISCARD_SECTORS_MAX: u32 = 1 << 21;
/// The most ranges in one write-zeroes.
pub(super) const ZEROES_SEGMENTS_MAX: u32 = 1;
/// The most sectors in one write-zeroes: 64 MiB, which may have to be written in full.
pub(super) const ZEROES_SECTORS_MAX: u32 = 1 << 17;
/// The most data buffers of a request: the queue's size less header and status.
pub(super) const DATA_SEGMENTS_MAX: u32 = 254;
/// The most bytes in one data buffer.
pub(super) const SEGMENT_BYTES_MAX: u32 = 256 << 10;
/// The most bytes that a request moves: what the two limits above allow.
pub(super) const DATA_BYTES_MAX: u64 = DATA_SEGMENTS_MAX as u64 * SEGMENT_BYTES_MAX as u64;

const RANGE_BYTES: usize = 16;

/// Request types (5.2.6; linux/virtio_blk.h).
pub(super) mod kind {
    pub(in crate::block) const IN: u32 = 0;
    pub(in crate::block) const OUT: u32 = 1;
    pub(in crate::block) const FLUSH: u32 = 4;
    pub(in crate::block) const GET_ID: u32 = 8;
    pub(in crate::block) const DISCARD: u32 = 11;
    pub(in crate::block) const WRITE_ZEROES: u32 = 13;
}

/// A request's status byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoErr = 1,
    Unsupported = 2,
}

/// A part of the disk, within its size.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) len_bytes: u64,
    pub(super) unmap: bool,
}

/// The ranges of a discard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ranges {
    list: [Range; DISCARD_SEGMENTS_MAX as usize],
    count: usize,
}

impl Ranges {
    pub(super) fn as_slice(&self) -> &[Range] {
        &self.list[..self.count]
    }
}

/// A checked request.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::large_enum_variant)] // One at a time, on the stack.
pub(super) enum Request {
    Read(Range),
    Write(Range),
    Flush,
    GetId,
    Discard(Ranges),
    WriteZeroes(Ranges),
}

/// What the disk allows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) disk_bytes: u64,
    pub(super) read_only: bool,
    pub(super) discard: bool,
    pub(super) write_zeroes: bool,
}

/// Where the chain's status byte is, as an offset into its writable bytes.
///
/// # Errors
/// When the chain has no writable byte: nothing can be answered.
pub(super) fn status_offset(chain: &Chain) -> Result<u64, DeviceError> {
    chain
        .writable_len_bytes()
        .checked_sub(1)
        .ok_or(DeviceError::Driver("block request without a status byte"))
}

/// Reads and checks the request in `chain`. The inner error is the status to answer with.
///
/// # Errors
/// When the chain has no room for a status, or guest memory cannot be read.
pub(super) fn parse(
    chain: &Chain,
    memory: &GuestMemoryMmap,
    limits: Limits,
) -> Result<Result<Request, Status>, DeviceError> {
    let data_in = status_offset(chain)?;
    let mut header = [0; HEADER_BYTES as usize];
    if chain.read(memory, 0, &mut header)? < header.len() {
        return Ok(Err(Status::IoErr));
    }
    let [kind, _reserved, low, high] = words(&header);
    let sector = u64::from(high) << 32 | u64::from(low);
    let data_out = chain.readable_len_bytes() - HEADER_BYTES;
    let request = match kind {
        kind::IN => limits.data_range(sector, data_in).map(Request::Read),
        kind::OUT if limits.read_only => Err(Status::IoErr),
        kind::OUT => limits.data_range(sector, data_out).map(Request::Write),
        kind::FLUSH => Ok(Request::Flush),
        kind::GET_ID if data_in < ID_BYTES as u64 => Err(Status::IoErr),
        kind::GET_ID => Ok(Request::GetId),
        kind::DISCARD if limits.discard => limits
            .ranges(chain, memory, data_out, kind)?
            .map(Request::Discard),
        kind::WRITE_ZEROES if limits.write_zeroes => limits
            .ranges(chain, memory, data_out, kind)?
            .map(Request::WriteZeroes),
        _ => Err(Status::Unsupported),
    };
    Ok(request)
}

impl Limits {
    fn data_range(&self, sector: u64, len_bytes: u64) -> Result<Range, Status> {
        if len_bytes > DATA_BYTES_MAX || !len_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(Status::IoErr);
        }
        self.range(sector, len_bytes, false)
    }

    fn range(&self, sector: u64, len_bytes: u64, unmap: bool) -> Result<Range, Status> {
        let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Status::IoErr)?;
        let end = offset.checked_add(len_bytes).ok_or(Status::IoErr)?;
        if end > self.disk_bytes {
            return Err(Status::IoErr);
        }
        Ok(Range {
            offset,
            len_bytes,
            unmap,
        })
    }

    /// The ranges of a discard or write-zeroes (5.2.6: struct virtio_blk_discard_write_zeroes).
    fn ranges(
        &self,
        chain: &Chain,
        memory: &GuestMemoryMmap,
        data_out: u64,
        kind: u32,
    ) -> Result<Result<Ranges, Status>, DeviceError> {
        let discard = kind == kind::DISCARD;
        let (segments_max, sectors_max) = if discard {
            (DISCARD_SEGMENTS_MAX, DISCARD_SECTORS_MAX)
        } else {
            (ZEROES_SEGMENTS_MAX, ZEROES_SECTORS_MAX)
        };
        let whole = data_out > 0 && data_out.is_multiple_of(RANGE_BYTES as u64);
        if self.read_only || !whole || data_out > u64::from(segments_max) * RANGE_BYTES as u64 {
            return Ok(Err(Status::IoErr));
        }
        let mut bytes = [0; DISCARD_SEGMENTS_MAX as usize * RANGE_BYTES];
        let bytes = &mut bytes[..data_out as usize];
        chain.read(memory, HEADER_BYTES, bytes)?;
        let mut ranges = Ranges {
            list: [Range::default(); DISCARD_SEGMENTS_MAX as usize],
            count: 0,
        };
        for (place, piece) in ranges.list.iter_mut().zip(bytes.chunks_exact(RANGE_BYTES)) {
            let [low, high, sectors, flags] = words(piece);
            // Bit 0 is unmap, which a discard must not set; the others are reserved.
            if flags & !1 != 0 || (discard && flags != 0) {
                return Ok(Err(Status::Unsupported));
            }
            if sectors > sectors_max {
                return Ok(Err(Status::IoErr));
            }
            let sector = u64::from(high) << 32 | u64::from(low);
            let len_bytes = u64::from(sectors) * SECTOR_BYTES;
            match self.range(sector, len_bytes, flags == 1) {
                Ok(range) => *place = range,
                Err(status) => return Ok(Err(status)),
            }
            ranges.count += 1;
        }
        Ok(Ok(ranges))
    }
}

/// Four little-endian words.
fn words(bytes: &[u8]) -> [u32; 4] {
    let mut words = [0; 4];
    for (word, piece) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *word = u32::from_le_bytes(*piece);
    }
    words
}
