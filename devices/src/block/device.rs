//! The device between the queue and a [`Backend`].

use std::io;
use std::path::Path;
use std::sync::Arc;

use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};
use vmm_sys_util::eventfd::EventFd;

use super::backend::{Backend, SECTOR_BYTES};
use super::request::{self, ID_BYTES, Limits, Request, Status};
use crate::virtio::chain::{Chain, Segment};
use crate::virtio::state::{DeviceState, RestoreError, RingState, Saved};
use crate::virtio::{Activation, Device, DeviceError, Interrupt, kick_again};

/// The device type's number (virtio 1.2, section 5).
pub(super) const DEVICE_TYPE: u32 = 2;
pub(super) const QUEUE_SIZE: u16 = 256;

/// Feature bits (virtio 1.2, 5.2.3).
pub(super) mod feature {
    pub(in crate::block) const SIZE_MAX: u64 = 1 << 1;
    pub(in crate::block) const SEG_MAX: u64 = 1 << 2;
    pub(in crate::block) const RO: u64 = 1 << 5;
    pub(in crate::block) const BLK_SIZE: u64 = 1 << 6;
    pub(in crate::block) const FLUSH: u64 = 1 << 9;
    pub(in crate::block) const TOPOLOGY: u64 = 1 << 10;
    pub(in crate::block) const DISCARD: u64 = 1 << 13;
    pub(in crate::block) const WRITE_ZEROES: u64 = 1 << 14;
}

/// Requests served in one turn of the event loop.
const TURN_REQUESTS: u32 = QUEUE_SIZE as u32;
/// Bytes moved in one turn, after which no other request is begun.
const TURN_BYTES: u64 = 8 << 20;
/// struct virtio_blk_config up to max_secure_erase_sectors, in bytes (virtio 1.2, 5.2.4).
const CONFIG_BYTES: usize = 60;

/// A disk.
///
/// A driver that has not agreed on VIRTIO_BLK_F_FLUSH gets a write-through disk: every write is on
/// stable storage before it is answered (5.2.5).
pub struct Block {
    backend: Box<dyn Backend>,
    id: [u8; ID_BYTES],
    read_only: bool,
    config: [u8; CONFIG_BYTES],
    active: Option<Active>,
    chain: Chain,
    counters: Counters,
}

struct Active {
    memory: GuestMemoryMmap,
    queue: Queue,
    interrupt: Interrupt,
    kicks: Arc<[EventFd]>,
    limits: Limits,
    write_through: bool,
}

#[derive(Debug, Default)]
struct Counters {
    reads: u64,
    writes: u64,
    read_bytes: u64,
    write_bytes: u64,
    flushes: u64,
    discards: u64,
    write_zeroes: u64,
    /// Requests answered with anything but OK.
    errors: u64,
    /// Those of them that the host failed.
    host_errors: u64,
}

impl Block {
    /// A disk with `backend`'s content. GET_ID answers with the first 20 bytes of `id`. Nothing is
    /// ever written when `read_only`.
    pub fn new(id: &str, backend: Box<dyn Backend>, read_only: bool) -> Self {
        let mut padded = [0; ID_BYTES];
        for (to, from) in padded.iter_mut().zip(id.bytes()) {
            *to = from;
        }
        Self {
            config: config(backend.as_ref()),
            backend,
            id: padded,
            read_only,
            active: None,
            chain: Chain::default(),
            counters: Counters::default(),
        }
    }

    pub(super) fn len_bytes(&self) -> u64 {
        self.backend.len_bytes()
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.read_only
    }
}

/// struct virtio_blk_config.
fn config(backend: &dyn Backend) -> [u8; CONFIG_BYTES] {
    let alignment = (u64::from(backend.discard_granularity_bytes()) / SECTOR_BYTES) as u32;
    let mut config = [0; CONFIG_BYTES];
    let mut put = |offset: usize, bytes: &[u8]| {
        config[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    put(0, &(backend.len_bytes() / SECTOR_BYTES).to_le_bytes()); // capacity
    put(8, &request::SEGMENT_BYTES_MAX.to_le_bytes()); // size_max
    put(12, &request::DATA_SEGMENTS_MAX.to_le_bytes()); // seg_max
    put(20, &(SECTOR_BYTES as u32).to_le_bytes()); // blk_size
    put(24, &[3, 0]); // physical_block_exp: 2^3 blocks, 4096 bytes; alignment_offset
    put(26, &8_u16.to_le_bytes()); // min_io_size, in blocks
    put(34, &1_u16.to_le_bytes()); // num_queues
    put(36, &request::DISCARD_SECTORS_MAX.to_le_bytes()); // max_discard_sectors
    put(40, &request::DISCARD_SEGMENTS_MAX.to_le_bytes()); // max_discard_seg
    put(44, &alignment.to_le_bytes()); // discard_sector_alignment
    put(48, &request::ZEROES_SECTORS_MAX.to_le_bytes()); // max_write_zeroes_sectors
    put(52, &request::ZEROES_SEGMENTS_MAX.to_le_bytes()); // max_write_zeroes_seg
    put(56, &[1]); // write_zeroes_may_unmap
    config
}

impl Device for Block {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        let common = 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | feature::SIZE_MAX
            | feature::SEG_MAX
            | feature::BLK_SIZE
            | feature::TOPOLOGY
            | feature::FLUSH;
        if self.read_only {
            common | feature::RO
        } else {
            common | feature::DISCARD | feature::WRITE_ZEROES
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let tail = usize::try_from(offset)
            .ok()
            .and_then(|offset| self.config.get(offset..))
            .unwrap_or_default();
        data.fill(0);
        for (to, from) in data.iter_mut().zip(tail) {
            *to = *from;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let queue = activation
            .queues
            .into_iter()
            .next()
            .ok_or(DeviceError::Driver("no queue for requests"))?;
        let agreed = |bit| activation.features & bit != 0;
        self.active = Some(Active {
            memory: activation.memory,
            queue,
            interrupt: activation.interrupt,
            kicks: activation.kicks,
            limits: Limits {
                disk_bytes: self.backend.len_bytes(),
                read_only: self.read_only,
                discard: agreed(feature::DISCARD),
                write_zeroes: agreed(feature::WRITE_ZEROES),
            },
            write_through: !agreed(feature::FLUSH),
        });
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn process_queue(&mut self, index: usize) -> Result<(), DeviceError> {
        let Self {
            backend,
            id,
            active: Some(active),
            chain,
            counters,
            ..
        } = self
        else {
            return Ok(());
        };
        let Active {
            memory,
            queue,
            interrupt,
            kicks,
            limits,
            write_through,
        } = active;
        let at = |source| DeviceError::Queue { index, source };
        let mut disk = Disk {
            backend: backend.as_mut(),
            id,
            counters,
            write_through: *write_through,
            buffers: Vec::new(),
        };
        let (mut used, mut bytes) = (0, 0);
        loop {
            queue.disable_notification(memory).map_err(at)?;
            while used < TURN_REQUESTS && bytes < TURN_BYTES && chain.pop(queue, memory, index)? {
                let written = disk.serve(chain, memory, *limits)?;
                bytes += chain.readable_len_bytes() + chain.writable_len_bytes();
                queue.add_used(memory, chain.head(), written).map_err(at)?;
                used += 1;
            }
            if !queue.enable_notification(memory).map_err(at)? {
                break;
            }
            if used >= TURN_REQUESTS || bytes >= TURN_BYTES {
                kick_again(kicks, index)?;
                break;
            }
        }
        if used > 0 && queue.needs_notification(memory).map_err(at)? {
            interrupt.used_buffer();
        }
        Ok(())
    }

    fn save(&self) -> Saved {
        let active = self.active.iter();
        Saved {
            rings: active.map(|active| RingState::of(&active.queue)).collect(),
            own: DeviceState::Block(self.own_state()),
        }
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        self.check_state(state)
    }

    fn write_back(&mut self) -> Result<(), DeviceError> {
        self.backend
            .write_back()
            .map_err(|source| DeviceError::Host {
                what: format!("writing the tables of disk {} back", self.backend.name()),
                source,
            })
    }

    fn prepare_layer(&mut self, path: &Path) -> Result<(), DeviceError> {
        self.backend
            .prepare_layer(path)
            .map_err(|error| DeviceError::Host {
                what: format!("making the next layer of disk {}", self.backend.name()),
                source: io::Error::other(error),
            })
    }

    fn push_layer(&mut self) -> Result<bool, DeviceError> {
        self.backend
            .push_layer()
            .map_err(|source| DeviceError::Host {
                what: format!("freezing the layer of disk {}", self.backend.name()),
                source,
            })
    }

    fn replace_layers(
        &mut self,
        replaced: std::ops::Range<usize>,
        path: &Path,
    ) -> Result<(), DeviceError> {
        self.backend
            .replace_layers(replaced, path)
            .map_err(|error| DeviceError::Host {
                what: format!("taking the merged layers of disk {}", self.backend.name()),
                source: io::Error::other(error),
            })
    }

    fn drop_prepared(&mut self) {
        self.backend.drop_prepared();
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let c = &self.counters;
        vec![
            ("reads", c.reads),
            ("writes", c.writes),
            ("read_bytes", c.read_bytes),
            ("write_bytes", c.write_bytes),
            ("flushes", c.flushes),
            ("discards", c.discards),
            ("write_zeroes", c.write_zeroes),
            ("errors", c.errors),
            ("host_errors", c.host_errors),
        ]
    }
}

/// What serving requests needs, for one turn.
struct Disk<'a> {
    backend: &'a mut dyn Backend,
    id: &'a [u8; ID_BYTES],
    counters: &'a mut Counters,
    write_through: bool,
    /// The data buffers of the request at hand.
    buffers: Vec<VolatileSlice<'a>>,
}

impl<'a> Disk<'a> {
    /// Serves one request, writes its status, and returns the bytes written to guest memory.
    fn serve(
        &mut self,
        chain: &Chain,
        memory: &'a GuestMemoryMmap,
        limits: Limits,
    ) -> Result<u32, DeviceError> {
        let status_offset = request::status_offset(chain)?;
        let outcome = match request::parse(chain, memory, limits)? {
            Ok(request) => self.perform(&request, chain, memory)?,
            Err(status) => Err(status),
        };
        let (status, data_bytes) = match outcome {
            Ok(bytes) => (Status::Ok, bytes),
            Err(status) => {
                self.counters.errors += 1;
                (status, 0)
            }
        };
        chain.write(memory, status_offset, &[status as u8])?;
        // Within u32: a chain is at most 2^32 - 1 bytes.
        Ok(data_bytes as u32 + 1)
    }

    fn perform(
        &mut self,
        request: &Request,
        chain: &Chain,
        memory: &'a GuestMemoryMmap,
    ) -> Result<Result<u64, Status>, DeviceError> {
        let mut written = 0;
        let (what, done) = match request {
            Request::Read(range) => {
                self.collect(memory, chain.writable(), 0, range.len_bytes)?;
                let done = self.backend.read_at(&self.buffers, range.offset);
                if done.is_ok() {
                    self.counters.reads += 1;
                    self.counters.read_bytes += range.len_bytes;
                    written = range.len_bytes;
                }
                ("read", done)
            }
            Request::Write(range) => {
                let header = request::HEADER_BYTES;
                self.collect(memory, chain.readable(), header, range.len_bytes)?;
                let done = self.backend.write_at(&self.buffers, range.offset);
                if done.is_ok() {
                    self.counters.writes += 1;
                    self.counters.write_bytes += range.len_bytes;
                }
                ("write", done.and_then(|()| self.settle()))
            }
            Request::Flush => {
                self.counters.flushes += 1;
                ("flush", self.backend.flush())
            }
            Request::GetId => {
                chain.write(memory, 0, self.id)?;
                written = ID_BYTES as u64;
                ("get-id", Ok(()))
            }
            Request::Discard(ranges) => {
                self.counters.discards += 1;
                let backend = &mut self.backend;
                let done = ranges
                    .as_slice()
                    .iter()
                    .filter(|range| range.len_bytes > 0)
                    .try_for_each(|range| backend.discard(range.offset, range.len_bytes));
                ("discard", done.and_then(|()| self.settle()))
            }
            Request::WriteZeroes(ranges) => {
                self.counters.write_zeroes += 1;
                let backend = &mut self.backend;
                let done = ranges
                    .as_slice()
                    .iter()
                    .filter(|range| range.len_bytes > 0)
                    .try_for_each(|range| {
                        backend.write_zeroes(range.offset, range.len_bytes, range.unmap)
                    });
                ("write-zeroes", done.and_then(|()| self.settle()))
            }
        };
        self.buffers.clear();
        Ok(match done {
            Ok(()) => Ok(written),
            Err(error) => {
                self.host_failed(what, &error);
                Err(Status::IoErr)
            }
        })
    }

    /// Gathers `len_bytes` of `segments`, from byte `skip` on, as buffers for the backend.
    fn collect(
        &mut self,
        memory: &'a GuestMemoryMmap,
        segments: &[Segment],
        mut skip: u64,
        len_bytes: u64,
    ) -> Result<(), DeviceError> {
        self.buffers.clear();
        let mut left = len_bytes;
        for segment in segments {
            let slices = memory
                .get_slices(
                    segment.address,
                    segment.len_bytes as usize,
                    Permissions::ReadWrite,
                )
                .map_err(DeviceError::Memory)?;
            for slice in slices {
                let slice = slice.map_err(DeviceError::Memory)?;
                let have = slice.len() as u64;
                let skipped = skip.min(have);
                skip -= skipped;
                let take = left.min(have - skipped);
                left -= take;
                if take > 0 {
                    let part = slice
                        .subslice(skipped as usize, take as usize)
                        .map_err(|error| DeviceError::Memory(error.into()))?;
                    self.buffers.push(part);
                }
            }
        }
        Ok(())
    }

    fn settle(&mut self) -> io::Result<()> {
        if self.write_through {
            self.backend.flush()
        } else {
            Ok(())
        }
    }

    fn host_failed(&mut self, what: &str, error: &io::Error) {
        self.counters.host_errors += 1;
        let count = self.counters.host_errors;
        if count.is_power_of_two() {
            let disk = self.backend.name();
            tracing::warn!(disk, what, %error, count, "the host failed a disk request");
        }
    }
}
