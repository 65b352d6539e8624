//! The block device's rules, through the transport; backends against a model.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use tempfile::TempDir;
use vm_memory::VolatileSlice;

use super::device::{QUEUE_SIZE, feature};
use super::request::{DISCARD_SEGMENTS_MAX, ZEROES_SECTORS_MAX, kind};
use super::*;
use crate::virtio::Interrupt;
use crate::virtio::mmio::status;
use crate::virtio::testing::{MockDriver, Sent};

mod backends;
mod layers;
mod opening;
mod requests;
mod saving;

const DISK_BYTES: u64 = 4 << 20;

/// Numbers that are the same in each run (splitmix64).
struct Seeded(u64);

impl Seeded {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..len.div_ceil(8))
            .flat_map(|_| self.next().to_le_bytes())
            .collect();
        bytes.truncate(len);
        bytes
    }
}

/// A directory with a disk of seeded bytes in it.
fn disk() -> (TempDir, PathBuf, Vec<u8>) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.raw");
    let content = Seeded(1).bytes(DISK_BYTES as usize);
    fs::write(&path, &content).unwrap();
    (directory, path, content)
}

fn read(backend: &mut dyn Backend, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; len];
    backend
        .read_at(&[VolatileSlice::from(bytes.as_mut_slice())], offset)
        .unwrap();
    bytes
}

fn write(backend: &mut dyn Backend, offset: u64, bytes: &[u8]) {
    let mut bytes = bytes.to_vec();
    backend
        .write_at(&[VolatileSlice::from(bytes.as_mut_slice())], offset)
        .unwrap();
}
