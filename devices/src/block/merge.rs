//! Frozen layers made into one, so that a disk does not get ever more of them.
//!
//! The new layer says of every cluster what the layers together say: what is only in the base stays
//! there. Nobody may write the layers meanwhile; the locks see to it.

use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::fdatasync;

use super::file::OpenError;
use super::layered::{CLUSTER_BYTES, locate, open_frozen, open_over, raw};
use super::make::{self, Below};
use super::places::Place;

/// Makes a layer at `into`, over the raw image at `base_path`, with all that `frozen` have, the
/// lowest first. `keep_on` is asked before each 64 KiB.
///
/// # Errors
/// See [`OpenError`]; nothing is left at `into`. [`OpenError::LayerCreate`] with
/// [`io::ErrorKind::Interrupted`] when `keep_on` says no.
pub fn merge(
    frozen: &[PathBuf],
    base_path: &Path,
    into: &Path,
    keep_on: &mut dyn FnMut() -> bool,
) -> Result<(), OpenError> {
    let (files, source, below) = open_frozen(frozen, base_path)?;
    let below = Below {
        path: base_path,
        format: "raw",
        len_bytes: below.len_bytes,
    };
    let failed = |source| OpenError::LayerCreate {
        path: into.to_owned(),
        source,
    };
    let file = make::create(into, below)?;
    let merged = raw(&files[0]).map_err(failed).and_then(|base| {
        let target = open_over(&file, into, base, below, true)?;
        let mut copy = || {
            let mut bytes = vec![0; CLUSTER_BYTES as usize];
            for start in (0..below.len_bytes).step_by(CLUSTER_BYTES as usize) {
                if !keep_on() {
                    return Err(io::ErrorKind::Interrupted.into());
                }
                let whole = u64::from(CLUSTER_BYTES).min(below.len_bytes - start);
                let place = locate(&source, files.len() - 1, start, whole)?;
                if matches!(place, Place::In { file: 0, .. }) {
                    continue;
                }
                let bytes = &mut bytes[..whole as usize];
                source.read(&mut *bytes, start)?;
                match bytes.iter().all(|byte| *byte == 0) {
                    true => target.write_zeroes(start, whole)?,
                    false => target.write(&*bytes, start)?,
                }
            }
            target.flush()?;
            Ok(fdatasync(&file)?)
        };
        copy().map_err(failed)
    });
    if merged.is_err() {
        // The first error is the one to tell.
        let _ = std::fs::remove_file(into);
    }
    merged
}
