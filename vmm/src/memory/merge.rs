//! Layers of frozen memory merged into one, so that a chain of freezes does not get ever longer.
//!
//! ```text
//!  base | a | b | c | d        frozen again and again: each layer has what was written since the one below
//!  base | a |  b+c+d           merged: a file of its own; b, c and d live on for those who have them
//! ```
//!
//! Nothing is merged that is a snapshot's (packed), nor the base: those are files that others share. Of the rest
//! the youngest are taken, down to the first that is more than twice as large as all above it: so a byte
//! is copied as often as the logarithm of the whole, and not each time.
//!
//! It fails when there is no memory for the copy: the layers stay as they are.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use ratoon_vmm_api::Run;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use vm_memory::GuestMemoryMmap;

use super::freeze::{GAP_PAGES, Layer, PAGE, map_private, private_runs, regions};
use super::runs::{bytes, fewer, joined, minus};
use super::{MemoryError, memfd};

/// A layer of so many runs or more is kept as it is only if that is what it takes: each run is a mapping of
/// each child, of which `vm.max_map_count` allows 65530.
const MOST_RUNS: usize = 4096;
/// What is copied at a time, in bytes.
const PIECE: usize = 256 << 10;

/// The layers that may be merged begin here: over the base and a snapshot's differences.
pub fn floor(layers: &[Layer]) -> usize {
    let packed = layers.iter().skip(1).take_while(|layer| layer.packed);
    (1 + packed.count()).min(layers.len())
}

/// Takes from each layer what the layers over it hide, and with it those that have nothing left. What
/// the layers are together stays the same.
pub fn prune(layers: &mut Vec<Layer>) {
    let mut covered: Vec<Run> = Vec::new();
    for layer in layers.iter_mut().skip(1).rev() {
        let runs = std::mem::take(&mut layer.runs);
        // The place of a packed run depends on those before it.
        layer.runs = match layer.packed || covered.is_empty() {
            true => runs.clone(),
            false => minus(&runs, &covered),
        };
        covered = joined(covered.into_iter().chain(runs).collect());
    }
    let mut index = 1;
    while index < layers.len() {
        if layers[index].runs.is_empty() {
            let gone = layers.remove(index);
            // What hides it lies above: there is one, since nothing hides the topmost.
            if let Some(above) = layers.get_mut(index) {
                above.freezes += gone.freezes;
            }
        } else {
            index += 1;
        }
    }
}

/// Which layers are to be merged, so that at most `keep` are left over the floor; fewer than two: none.
pub fn plan(sizes: &[u64], keep: usize) -> Range<usize> {
    let mut start = sizes.len().saturating_sub(1);
    let mut sum = sizes.last().copied().unwrap_or(0);
    while start > 0 && (start >= keep || sizes[start - 1] <= sum.saturating_mul(2)) {
        start -= 1;
        sum = sum.saturating_add(sizes[start]);
    }
    start..sizes.len()
}

/// As [`plan`], of layers of memory by their numbers.
pub fn plan_layers(layers: &[Layer], keep: usize) -> Range<usize> {
    let floor = floor(layers);
    let sizes: Vec<u64> = layers[floor..]
        .iter()
        .map(|layer| bytes(&layer.runs))
        .collect();
    let range = plan(&sizes, keep);
    floor + range.start..floor + range.end
}

/// A new layer with all that the layers of `range` show, over those below. `total` is how long memory is, in
/// bytes.
///
/// # Errors
/// [`MemoryError::Freeze`]: no memory, or a layer that cannot be read.
pub fn merge(layers: &[Layer], range: Range<usize>, total: u64) -> Result<Layer, MemoryError> {
    let failed = |source| MemoryError::Freeze {
        what: "merge its memory's layers",
        source,
    };
    let merged = &layers[range.clone()];
    let runs = merged.iter().flat_map(|layer| layer.runs.iter().copied());
    let runs = fewer(joined(runs.collect()), GAP_PAGES * PAGE, MOST_RUNS);
    let file = memfd("ratoon-layer", total).map_err(|error| failed(error.into()))?;
    let stack: Vec<Placed<'_>> = layers[..range.end].iter().map(Placed::new).collect();
    let mut piece = vec![0; PIECE];
    for run in &runs {
        let mut at = run.offset;
        while at < run.offset + run.len {
            let (from, place, end) = find(&stack, at, run.offset + run.len).map_err(failed)?;
            copy(from, place, &file, at, end - at, &mut piece).map_err(failed)?;
            at = end;
        }
    }
    Ok(Layer {
        file,
        runs,
        packed: false,
        freezes: merged.iter().map(|layer| layer.freezes).sum(),
    })
}

/// Puts what was merged in the place of the layers that it was made of; the list may have got longer since, and
/// some of them may have been pruned. False: none of them is there any more.
pub fn install(layers: &mut Vec<Layer>, made_of: &[Layer], merged: Layer) -> bool {
    let is_one = |layer: &Layer| made_of.iter().any(|it| Arc::ptr_eq(&it.file, &layer.file));
    let Some(place) = layers.iter().position(is_one) else {
        return false;
    };
    let mut freezes = 0;
    layers.retain(|layer| {
        let is_one = is_one(layer);
        freezes += if is_one { layer.freezes } else { 0 };
        !is_one
    });
    layers.insert(place, Layer { freezes, ..merged });
    prune(layers);
    true
}

/// Maps `file` where these runs of it are and nothing was written since: the pages read as before. `runs` are
/// what the file shows of the memory. Private pages, and what lies close to them, stay as they are, as does what
/// is in `not`.
///
/// # Errors
/// When the system refuses; memory may then have holes, and the VM must end.
pub fn move_over(
    memory: &GuestMemoryMmap,
    file: &File,
    runs: &[Run],
    not: &[Run],
) -> Result<(), MemoryError> {
    let regions = regions(memory);
    let runs = &minus(runs, not);
    for run in runs {
        for (address, offset, len) in &regions {
            let start = run.offset.max(*offset);
            let end = (run.offset + run.len).min(offset + *len as u64);
            if start >= end {
                continue;
            }
            let here = address + (start - offset) as usize;
            let private = private_runs(here, (end - start) as usize)?;
            let private: Vec<Run> = private
                .into_iter()
                .map(|(at, len)| Run {
                    offset: start + (at - here) as u64,
                    len: len as u64,
                })
                .collect();
            let whole = Run {
                offset: start,
                len: end - start,
            };
            for clean in minus(&[whole], &private) {
                let at = address + (clean.offset - offset) as usize;
                map_private(at, clean.len as usize, file, clean.offset)?;
            }
        }
    }
    Ok(())
}

/// A layer with the place of each run in its file.
struct Placed<'l> {
    file: &'l File,
    runs: Vec<(Run, u64)>,
}

impl<'l> Placed<'l> {
    fn new(layer: &'l Layer) -> Self {
        let mut packed_at = 0;
        let mut runs: Vec<(Run, u64)> = Vec::with_capacity(layer.runs.len());
        for run in &layer.runs {
            let place = if layer.packed { packed_at } else { run.offset };
            packed_at += run.len;
            runs.push((*run, place));
        }
        runs.sort_unstable_by_key(|(run, _)| run.offset);
        Self {
            file: &layer.file,
            runs,
        }
    }
}

/// The file that counts at `offset`, the place in it, and up to where in memory.
fn find<'l>(
    stack: &[Placed<'l>],
    offset: u64,
    mut end: u64,
) -> std::io::Result<(&'l File, u64, u64)> {
    for layer in stack.iter().rev() {
        let next = layer.runs.partition_point(|(run, _)| run.offset <= offset);
        if let Some((run, place)) = next.checked_sub(1).map(|last| layer.runs[last])
            && offset < run.offset + run.len
        {
            let place = place + (offset - run.offset);
            return Ok((layer.file, place, end.min(run.offset + run.len)));
        }
        if let Some((run, _)) = layer.runs.get(next) {
            end = end.min(run.offset);
        }
    }
    Err(std::io::Error::other("no layer has this part of memory"))
}

/// Copies what is there and not zero; the rest stays a hole.
fn copy(
    from: &File,
    place: u64,
    to: &File,
    at: u64,
    len: u64,
    piece: &mut [u8],
) -> std::io::Result<()> {
    const PAGE_LEN: usize = PAGE as usize;
    let mut done = 0;
    while done < len {
        done = match seek(from, SeekFrom::Data(place + done)) {
            Ok(data) => data.saturating_sub(place).max(done),
            Err(Errno::NXIO) => break,
            // It has no holes that it could name.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => done,
            Err(errno) => return Err(errno.into()),
        };
        // Runs are whole pages, and so are their places.
        done &= !(PAGE - 1);
        if done >= len {
            break;
        }
        let now = (len - done).min(piece.len() as u64) as usize;
        let bytes = &mut piece[..now];
        from.read_exact_at(bytes, place + done)?;
        let pages = bytes.chunks(PAGE_LEN).enumerate();
        let mut full = pages.filter(|(_, page)| page.iter().any(|byte| *byte != 0));
        let mut stretch: Option<Range<usize>> = None;
        loop {
            let next = full.next().map(|(index, _)| index);
            match (&mut stretch, next) {
                (Some(open), Some(index)) if open.end == index => open.end += 1,
                (open, next) => {
                    if let Some(open) = open.take() {
                        let (first, last) = (open.start * PAGE_LEN, open.end * PAGE_LEN);
                        to.write_all_at(&bytes[first..last.min(now)], at + done + first as u64)?;
                    }
                    match next {
                        Some(index) => *open = Some(index..index + 1),
                        None => break,
                    }
                }
            }
        }
        done += now as u64;
    }
    Ok(())
}

#[cfg(test)]
#[path = "merge_tests.rs"]
mod tests;
