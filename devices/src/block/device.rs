//! The device: features, configuration space, and the queue's requests, one after another.

use std::sync::Arc;

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};
use vmm_sys_util::eventfd::EventFd;

use super::backend::{Backend, SECTOR_BYTES};
use super::request::{
    self, HEADER_BYTES, ID_BYTES, Limits, MAX_RANGE_SECTORS, MAX_RANGES, Refusal, Request,
};
use crate::virtio::chain::{Chain, Segment};
use crate::virtio::{Activation, Device, DeviceError, Interrupt, kick_again};

const QUEUE_SIZE: u16 = 256;
/// Requests served in one turn of the event loop.
const TURN_REQUESTS: u16 = QUEUE_SIZE;
/// Data buffers in one request: the queue's length less header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// log2 of the physical block in logical blocks: 4 KiB.
const PHYSICAL_BLOCK_EXP: u8 = 3;
/// How many errors of the host's file are logged; more are only counted.
const LOGGED_ERRORS: u64 = 10;

/// A disk.
pub struct Block {
    backend: Box<dyn Backend>,
    id: [u8; ID_BYTES],
    limits: Limits,
    active: Option<Active>,
    chain: Chain,
    counters: Counters,
}

struct Active {
    memory: GuestMemoryMmap,
    queue: Queue,
    interrupt: Interrupt,
    kicks: Arc<[EventFd]>,
    /// The driver sends no flushes: each write is made durable at once (5.2.6.2).
    write_through: bool,
}

#[derive(Default)]
struct Counters {
    reads: u64,
    read_bytes: u64,
    writes: u64,
    write_bytes: u64,
    flushes: u64,
    discards: u64,
    refused: u64,
    host_errors: u64,
}

impl Block {
    /// A disk that the guest knows as `id` (its first 20 bytes count).
    pub fn new(id: &str, backend: Box<dyn Backend>, read_only: bool) -> Self {
        let mut padded = [0; ID_BYTES];
        let len = id.len().min(ID_BYTES);
        padded[..len].copy_from_slice(&id.as_bytes()[..len]);
        Self {
            limits: Limits {
                len_bytes: backend.len_bytes(),
                read_only,
            },
            backend,
            id: padded,
            active: None,
            chain: Chain::default(),
            counters: Counters::default(),
        }
    }

    /// `struct virtio_blk_config` (5.2.4).
    fn config(&self) -> [u8; 60] {
        let granularity = self.backend.discard_granularity_bytes() / SECTOR_BYTES as u32;
        let mut config = [0; 60];
        let mut put = |offset: usize, bytes: &[u8]| {
            config[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        put(0, &(self.limits.len_bytes / SECTOR_BYTES).to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &(SECTOR_BYTES as u32).to_le_bytes());
        put(24, &[PHYSICAL_BLOCK_EXP]);
        put(26, &1_u16.to_le_bytes()); // min_io_size
        put(34, &1_u16.to_le_bytes()); // num_queues
        put(36, &MAX_RANGE_SECTORS.to_le_bytes());
        put(40, &MAX_RANGES.to_le_bytes());
        put(44, &granularity.to_le_bytes());
        put(48, &MAX_RANGE_SECTORS.to_le_bytes());
        put(52, &MAX_RANGES.to_le_bytes());
        put(56, &[1]); // write_zeroes_may_unmap
        config
    }
}

impl Device for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        let mut features = 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_TOPOLOGY
            | 1 << VIRTIO_BLK_F_FLUSH;
        features |= if self.limits.read_only {
            1 << VIRTIO_BLK_F_RO
        } else {
            1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        };
        features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        data.fill(0);
        if let Some(from) = usize::try_from(offset)
            .ok()
            .and_then(|offset| config.get(offset..))
        {
            let len = data.len().min(from.len());
            data[..len].copy_from_slice(&from[..len]);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let mut queues = activation.queues.into_iter();
        let queue = queues
            .next()
            .ok_or(DeviceError::Driver("no queue for requests"))?;
        self.active = Some(Active {
            memory: activation.memory,
            queue,
            interrupt: activation.interrupt,
            kicks: activation.kicks,
            write_through: activation.features & 1 << VIRTIO_BLK_F_FLUSH == 0,
        });
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn process_queue(&mut self, index: usize) -> Result<(), DeviceError> {
        let Some(mut active) = self.active.take() else {
            return Ok(());
        };
        let result = self.turn(&mut active, index);
        self.active = Some(active);
        result
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let counters = &self.counters;
        vec![
            ("reads", counters.reads),
            ("read_bytes", counters.read_bytes),
            ("writes", counters.writes),
            ("write_bytes", counters.write_bytes),
            ("flushes", counters.flushes),
            ("discards", counters.discards),
            ("refused", counters.refused),
            ("host_errors", counters.host_errors),
        ]
    }
}

impl Block {
    /// Serves what waits, at most [`TURN_REQUESTS`].
    fn turn(&mut self, active: &mut Active, index: usize) -> Result<(), DeviceError> {
        let at = |source| DeviceError::Queue { index, source };
        let mut used = 0;
        loop {
            while used < TURN_REQUESTS
                && self.chain.pop(&mut active.queue, &active.memory, index)?
            {
                let len = self.serve(&active.memory, active.write_through)?;
                active
                    .queue
                    .add_used(&active.memory, self.chain.head(), len)
                    .map_err(at)?;
                used += 1;
            }
            if !active
                .queue
                .enable_notification(&active.memory)
                .map_err(at)?
            {
                break;
            }
            if used == TURN_REQUESTS {
                kick_again(&active.kicks, index)?;
                break;
            }
        }
        if used > 0
            && active
                .queue
                .needs_notification(&active.memory)
                .map_err(at)?
        {
            active.interrupt.used_buffer();
        }
        Ok(())
    }

    /// Does the request in `self.chain`; returns how many bytes of its buffers were written.
    fn serve(&mut self, memory: &GuestMemoryMmap, write_through: bool) -> Result<u32, DeviceError> {
        let (status, written) = match request::parse(&self.chain, memory, self.limits)? {
            Ok(request) => match self.perform(&request, memory, write_through)? {
                Ok(written) => (VIRTIO_BLK_S_OK, written),
                Err(error) => {
                    self.host_error(&request, &error);
                    (VIRTIO_BLK_S_IOERR, 0)
                }
            },
            Err(refusal) => {
                self.counters.refused += 1;
                match refusal {
                    Refusal::Io => (VIRTIO_BLK_S_IOERR, 0),
                    Refusal::Unsupported => (VIRTIO_BLK_S_UNSUPP, 0),
                }
            }
        };
        let status_at = self.chain.writable_len_bytes() - 1;
        self.chain.write(memory, status_at, &[status as u8])?;
        // A request is at most one queue of 32-bit buffers; a driver that sums past 32 bits gets
        // the largest number, which says no more than "all of it".
        Ok(u32::try_from(written + 1).unwrap_or(u32::MAX))
    }

    /// Outside: guest memory that cannot be reached. Inside: the host's file.
    fn perform(
        &mut self,
        request: &Request,
        memory: &GuestMemoryMmap,
        write_through: bool,
    ) -> Result<std::io::Result<u64>, DeviceError> {
        let counters = &mut self.counters;
        let backend = &mut self.backend;
        let mut written = 0;
        let result = match request {
            Request::Read { offset, len } => {
                counters.reads += 1;
                counters.read_bytes += len;
                written = *len;
                let access = Permissions::Write;
                let buffers = slices(memory, self.chain.writable(), 0, *len, access)?;
                backend.read_at(&buffers, *offset)
            }
            Request::Write { offset, len } => {
                counters.writes += 1;
                counters.write_bytes += len;
                let access = Permissions::Read;
                let buffers = slices(memory, self.chain.readable(), HEADER_BYTES, *len, access)?;
                let result = backend.write_at(&buffers, *offset);
                if write_through {
                    result.and_then(|()| backend.flush())
                } else {
                    result
                }
            }
            Request::Flush => {
                counters.flushes += 1;
                backend.flush()
            }
            Request::Id => {
                written = ID_BYTES as u64;
                self.chain.write(memory, 0, &self.id)?;
                Ok(())
            }
            Request::Discard(ranges) => {
                counters.discards += 1;
                ranges
                    .iter()
                    .try_for_each(|range| backend.discard(range.offset, range.len))
            }
            Request::WriteZeroes(ranges) => {
                counters.writes += 1;
                ranges.iter().try_for_each(|range| {
                    backend.write_zeroes(range.offset, range.len, range.unmap)
                })
            }
        };
        Ok(result.map(|()| written))
    }

    fn host_error(&mut self, request: &Request, error: &std::io::Error) {
        self.counters.host_errors += 1;
        if self.counters.host_errors <= LOGGED_ERRORS {
            tracing::warn!(disk = self.backend.name(), ?request, %error, "the guest gets an I/O error");
        }
    }
}

/// The bytes `skip..skip + len` of `segments` as memory.
fn slices<'m>(
    memory: &'m GuestMemoryMmap,
    segments: &[Segment],
    mut skip: u64,
    mut len: u64,
    access: Permissions,
) -> Result<Vec<VolatileSlice<'m>>, DeviceError> {
    let mut slices = Vec::with_capacity(segments.len());
    for segment in segments {
        let have = u64::from(segment.len_bytes);
        let skipped = skip.min(have);
        skip -= skipped;
        let take = len.min(have - skipped);
        len -= take;
        if take == 0 {
            continue;
        }
        let start = vm_memory::GuestAddress(segment.address.0 + skipped);
        for slice in memory
            .get_slices(start, take as usize, access)
            .map_err(DeviceError::Memory)?
        {
            slices.push(slice.map_err(DeviceError::Memory)?);
        }
    }
    Ok(slices)
}
