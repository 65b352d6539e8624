//! Frozen layers made into one, so that a disk does not get ever more of them.
//!
//! The new layer says of every cluster what the layers together say: what is only in those below, or in the
//! base, stays there. A cluster that reads as zeroes says so itself, and hides what is below. Nobody may
//! write the layers meanwhile; the locks see to it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use imago::ShallowMapping;
use rustix::fs::fdatasync;

use super::file::OpenError;
use super::layered::{Access, CLUSTER_BYTES, open_frozen, open_over};
use super::make;

/// Makes a layer at `into` with all that `frozen` have, the lowest first, from number `first` on; it lies over
/// those before that, and the raw image at `base_path`. `keep_on` is asked for each piece.
///
/// # Errors
/// See [`OpenError`]; nothing is left at `into`. [`OpenError::LayerCreate`] with
/// [`io::ErrorKind::Interrupted`] when `keep_on` says no.
pub fn merge(
    frozen: &[PathBuf],
    first: usize,
    base_path: &Path,
    into: &Path,
    keep_on: &mut dyn FnMut() -> bool,
) -> Result<(), OpenError> {
    let first = first.min(frozen.len());
    let (files, source, _) = open_frozen(frozen, base_path)?;
    let (_, under, below) = open_frozen(&frozen[..first], base_path)?;
    let failed = |source| OpenError::LayerCreate {
        path: into.to_owned(),
        source,
    };
    let file = make::create(into, below)?;
    let merged = open_over(&file, into, under, below, true).and_then(|target| {
        let source = Source {
            disk: source,
            top: files.len() - 1,
            // The base is file 0.
            first: first + 1,
        };
        let copied = source.copy(&target, below.len_bytes, keep_on);
        copied
            .and_then(|()| {
                target.flush()?;
                Ok(fdatasync(&file)?)
            })
            .map_err(failed)
    });
    if merged.is_err() {
        // The first error is the one to tell.
        let _ = std::fs::remove_file(into);
    }
    merged
}

/// The layers as one disk.
struct Source {
    disk: Arc<Access>,
    /// The number of the topmost file, and of the lowest that is merged.
    top: usize,
    first: usize,
}

impl Source {
    /// Whether one of the layers to be merged has what is at `start`, and for how many bytes, at most `len`,
    /// that is so.
    fn is_in(&self, start: u64, mut len: u64) -> io::Result<(bool, u64)> {
        let mut level: &Access = &self.disk;
        for _ in (self.first..=self.top).rev() {
            let (mapping, length) = level.get_shallow_mapping(start, len)?;
            len = len.min(length);
            match mapping {
                ShallowMapping::Indirect { layer, offset, .. } if offset == start => level = layer,
                _ => return Ok((true, len)),
            }
        }
        Ok((false, len))
    }

    fn copy(
        &self,
        target: &Access,
        disk_bytes: u64,
        keep_on: &mut dyn FnMut() -> bool,
    ) -> io::Result<()> {
        let cluster = u64::from(CLUSTER_BYTES);
        let mut bytes = vec![0; CLUSTER_BYTES as usize];
        let mut start = 0;
        while start < disk_bytes {
            if !keep_on() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let (is_in, length) = self.is_in(start, disk_bytes - start)?;
            let end = match start + length {
                end if end >= disk_bytes => disk_bytes,
                end => end - end % cluster,
            };
            if !is_in && end > start {
                start = end;
                continue;
            }
            // A layer with smaller clusters may have a part of this one: it is taken whole.
            let end = end.max(disk_bytes.min(start + cluster));
            while start < end {
                let whole = cluster.min(disk_bytes - start);
                let bytes = &mut bytes[..whole as usize];
                self.disk.read(&mut *bytes, start)?;
                match bytes.iter().all(|byte| *byte == 0) {
                    true => target.write_zeroes(start, whole)?,
                    false => target.write(&*bytes, start)?,
                }
                start += whole;
                if start < end && !keep_on() {
                    return Err(io::ErrorKind::Interrupted.into());
                }
            }
        }
        Ok(())
    }
}
