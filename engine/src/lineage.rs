//! What a VM comes from, so that a snapshot holds only what is new.
//!
//! ```text
//!  memory   [ a | b | c ]      layers of the frozen VM, the lowest first
//!  disk     image, [ x | y ]   frozen layers over the image
//!             `-- snapshot S: its record says that S is a, b and x
//!  new snapshot over S: memory c as a difference, disk x by its digest, disk y linked
//! ```
//!
//! A base has to be in the store that is written to, whole itself or a difference at most
//! [`MAX_DEPTH`] deep, and is held while it is written over. When the difference would be half of the
//! whole or more, or in too many pieces, memory is written whole. What a guest has freed is a run
//! that is a hole in its layer's file: it hides what is below, and costs nothing.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use ratoon_devices::block::merge;
use ratoon_snapshot::{
    Digest, Layer, MemoryFile, MemoryKind, Pages, Progress, Run, Snapshot, Store, Writer, hold,
    populated,
};
use ratoon_vmm_api::{MemoryLayerConfig, layers_within};

use crate::snapshots::SnapshotError;
use crate::vm::freeze::{Generation, MemoryLayer};
use crate::vm::record::{Ancestor, Record, VmDir};

/// Differences that lie over each other: each costs a restore mappings, and the reader of a page
/// nothing.
const MAX_DEPTH: usize = 8;
/// Runs of one difference. Each is a mapping of the restored VM, a microsecond or two of its start;
/// `vm.max_map_count` allows 65530 in all. With more, those with the smallest gaps between them are
/// joined.
const MAX_RUNS: usize = 1024;
/// A snapshot's disk has at most so many layers; more are merged into one.
const MERGE_ABOVE: usize = 16;
/// The disk that images are for.
pub(crate) const ROOT: &str = "root";

/// A layer of memory, with the place of each of its runs in its file.
#[derive(Debug)]
struct Placed {
    file: File,
    /// Ascending by offset.
    runs: Vec<(Run, u64)>,
    /// It has the runs end to end.
    packed: bool,
}

/// Memory of several layers: the topmost that has a page counts.
#[derive(Debug)]
pub(crate) struct Layered {
    layers: Vec<Placed>,
    /// How many freezes each stands for.
    freezes: Vec<u32>,
}

impl Layered {
    pub(crate) fn new(layers: Vec<MemoryLayer>) -> Self {
        let freezes = layers.iter().map(|layer| layer.freezes).collect();
        let placed = layers.into_iter().map(|layer| {
            let mut packed_at = 0;
            let mut runs: Vec<(Run, u64)> = Vec::with_capacity(layer.runs.len());
            for run in layer.runs {
                let run = Run {
                    offset: run.offset,
                    length: run.len,
                };
                let place = if layer.packed { packed_at } else { run.offset };
                packed_at += run.length;
                runs.push((run, place));
            }
            runs.sort_unstable_by_key(|(run, _)| run.offset);
            Placed {
                file: layer.file,
                runs,
                packed: layer.packed,
            }
        });
        Self {
            layers: placed.collect(),
            freezes,
        }
    }

    /// The file that counts at `offset`, the place in it, and up to where in memory.
    fn at(&self, offset: u64, end: u64) -> std::io::Result<(&File, u64, u64)> {
        let mut end = end;
        for layer in self.layers.iter().rev() {
            let next = layer.runs.partition_point(|(run, _)| run.offset <= offset);
            if let Some((run, place)) = next.checked_sub(1).map(|last| layer.runs[last])
                && offset < run.end()
            {
                return Ok((
                    &layer.file,
                    place + (offset - run.offset),
                    end.min(run.end()),
                ));
            }
            if let Some((run, _)) = layer.runs.get(next) {
                end = end.min(run.offset);
            }
        }
        Err(std::io::Error::other("no layer has this part of memory"))
    }

    /// Where there is anything.
    pub(crate) fn populated(&self) -> Result<Vec<Run>, ratoon_snapshot::Error> {
        self.content(0)
    }

    /// Where the layers from this one on have anything in their files.
    fn content(&self, from: usize) -> Result<Vec<Run>, ratoon_snapshot::Error> {
        let mut content = Vec::new();
        for layer in self.layers.iter().skip(from) {
            let runs = layer.runs.iter().map(|(run, _)| *run);
            match layer.packed {
                true => content.extend(runs),
                false => {
                    content.extend(common(&runs.collect::<Vec<_>>(), &populated(&layer.file)?))
                }
            }
        }
        Ok(joined(content))
    }

    /// What the layers from this one on have.
    fn changed(&self, from: usize) -> Vec<Run> {
        let layers = self.layers.iter().skip(from);
        let runs = layers.flat_map(|layer| layer.runs.iter().map(|(run, _)| *run));
        joined(runs.collect())
    }
}

impl Pages for Layered {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> std::io::Result<()> {
        let mut done = 0;
        while done < into.len() {
            let at = offset + done as u64;
            let (file, place, end) = self.at(at, offset + into.len() as u64)?;
            let len = (end - at) as usize;
            file.read_exact_at(&mut into[done..done + len], place)?;
            done += len;
        }
        Ok(())
    }
}

/// What is in both; both ascend.
fn common(one: &[Run], other: &[Run]) -> Vec<Run> {
    let (mut one, mut other) = (one.iter().peekable(), other.iter().peekable());
    let mut common = Vec::new();
    while let (Some(a), Some(b)) = (one.peek(), other.peek()) {
        let (offset, end) = (a.offset.max(b.offset), a.end().min(b.end()));
        if offset < end {
            let length = end - offset;
            common.push(Run { offset, length });
        }
        // The one that ends first can have nothing more in common.
        match a.end() < b.end() {
            true => drop(one.next()),
            false => drop(other.next()),
        }
    }
    common
}

/// The same pages in ascending runs that do not touch.
fn joined(mut runs: Vec<Run>) -> Vec<Run> {
    runs.sort_unstable_by_key(|run| run.offset);
    let mut joined: Vec<Run> = Vec::new();
    for run in runs {
        match joined.last_mut() {
            Some(last) if run.offset <= last.end() => {
                last.length = last.length.max(run.end() - last.offset);
            }
            _ => joined.push(run),
        }
    }
    joined
}

/// At most `most` runs with all that these have: the smallest gaps are filled.
fn fewer(runs: Vec<Run>, most: usize) -> Vec<Run> {
    if runs.len() <= most {
        return runs;
    }
    let mut gaps: Vec<u64> = runs
        .windows(2)
        .map(|pair| pair[1].offset - pair[0].end())
        .collect();
    gaps.sort_unstable();
    // So many of the smallest have to go; equal ones go together.
    let filled = gaps[runs.len() - most - 1];
    let mut fewer: Vec<Run> = Vec::new();
    for run in runs {
        match fewer.last_mut() {
            Some(last) if run.offset - last.end() <= filled => {
                last.length = run.end() - last.offset
            }
            _ => fewer.push(run),
        }
    }
    fewer
}

fn bytes(runs: &[Run]) -> u64 {
    runs.iter().map(|run| run.length).sum()
}

/// A snapshot that a frozen VM comes from.
#[derive(Debug)]
pub(crate) struct Base {
    pub(crate) snapshot: Snapshot,
    ancestor: Ancestor,
    /// It cannot be removed meanwhile.
    _held: File,
}

impl Base {
    /// The youngest snapshot in `store` that a VM comes from.
    pub(crate) fn of(store: &Store, record: &Record, frozen: &Generation) -> Option<Self> {
        let (memory_layers, disk_layers) = frozen.depth(ROOT);
        record.ancestors.iter().rev().find_map(|ancestor| {
            let snapshot = store.get(&ancestor.snapshot).ok()?;
            let held = snapshot.hold().ok()?;
            let fits = ancestor.memory_layers <= memory_layers
                && ancestor.disk_layers <= disk_layers
                && snapshot.manifest.memory.bytes == record.config.memory_mib << 20;
            fits.then(|| Self {
                snapshot,
                ancestor: ancestor.clone(),
                _held: held,
            })
        })
    }

    /// Its layers of the root disk. They may be fewer than the VM's, and have the same content.
    fn layers(&self) -> impl Iterator<Item = &Layer> {
        let layers = self.snapshot.manifest.layers.iter();
        layers.filter(|layer| layer.disk == ROOT)
    }

    /// The runs to be written over its memory; none: write memory whole.
    ///
    /// # Errors
    /// That a file of memory cannot be looked at.
    pub(crate) fn difference(
        &self,
        store: &Store,
        memory: &Layered,
    ) -> Result<Option<(Vec<Run>, Digest)>, ratoon_snapshot::Error> {
        let below = match store.memory_files(&self.snapshot) {
            Ok(files) => files,
            // It is damaged, or lies over one that is: nothing is to depend on it.
            Err(_) => return Ok(None),
        };
        // A pager serves chunks, and mappings of files do not go over it.
        let is_plain = below.iter().all(|file| file.kind == MemoryKind::Plain);
        if !is_plain || below.len() > MAX_DEPTH {
            return Ok(None);
        }
        // A merged layer that has something new is taken whole: what it has of the old is not wrong.
        let freezes = memory.freezes.iter().copied();
        let new = layers_within(freezes, self.ancestor.memory_layers);
        let runs = fewer(memory.changed(new), MAX_RUNS);
        let is_small = bytes(&memory.content(new)?) * 2 <= bytes(&memory.populated()?);
        Ok(is_small.then_some((runs, self.snapshot.manifest.memory.blake3)))
    }
}

/// Writes the root disk's frozen layers: those of `base` by name, the others as files, or all as
/// one when they have become many.
///
/// # Errors
/// [`SnapshotError`].
pub(crate) fn write_disk(
    writer: &mut Writer,
    base: Option<&Base>,
    (frozen, freezes): (&[PathBuf], &[u32]),
    image: &Path,
    merged: &Path,
    progress: &dyn Progress,
) -> Result<(), SnapshotError> {
    // A merged layer that has something new is taken whole, over the old that it has too.
    let of = |base: &Base| layers_within(freezes.iter().copied(), base.ancestor.disk_layers);
    let known = base.map_or(0, of);
    let named = base.map_or(0, |base| base.layers().count());
    if named + (frozen.len() - known) > MERGE_ABOVE {
        progress.step("merging disk layers");
        let mut keep_on = || !progress.cancelled();
        let _ = std::fs::remove_file(merged);
        merge(frozen, 0, image, merged, &mut keep_on)?;
        let linked = writer.layer_linked(ROOT, "root-merged.qcow2", merged, progress);
        // It has its name in the snapshot.
        let _ = std::fs::remove_file(merged);
        linked?;
        return Ok(());
    }
    for layer in base.iter().flat_map(|base| base.layers()) {
        writer.external_layer(ROOT, layer.blake3, layer.length, layer.blake3);
    }
    for (number, path) in frozen.iter().enumerate().skip(known) {
        writer.layer_linked(ROOT, &format!("root-{number}.qcow2"), path, progress)?;
    }
    Ok(())
}

/// A snapshot's memory, for the VMM: what is to be mapped, and the folder of the snapshot with the
/// chunks that lie under all of it, if there is one.
///
/// # Errors
/// See [`Store::memory_files`].
pub(crate) fn memory_layers(
    store: &Store,
    snapshot: &Snapshot,
) -> Result<(Vec<MemoryLayerConfig>, Option<PathBuf>), ratoon_snapshot::Error> {
    let mut files = store.memory_files(snapshot)?;
    let in_chunks = |file: &MemoryFile| file.kind == MemoryKind::Chunks;
    let chunks = match files.first().is_some_and(in_chunks) {
        true => files.remove(0).path.parent().map(Path::to_owned),
        false => None,
    };
    let counting = files
        .into_iter()
        // Without runs the VMM would take it for whole memory.
        .filter(|file| !(file.is_difference && file.runs.is_empty()));
    let layers = counting.map(|file| MemoryLayerConfig {
        path: file.path,
        packed: file.is_difference,
        freezes: 1,
        runs: file
            .runs
            .iter()
            .map(|run| ratoon_vmm_api::Run {
                offset: run.offset,
                len: run.length,
            })
            .collect(),
    });
    Ok((layers.collect(), chunks))
}

/// Keeps the snapshots in which these layers lie, for as long as the descriptors live, but for the one that is `held`
/// already. A VM's own are in none: its folder has a record.
///
/// # Errors
/// [`ratoon_snapshot::Error::NotFound`] for one that has gone.
pub(crate) fn hold_layers(
    layers: &[PathBuf],
    held: Option<&Path>,
) -> Result<Vec<OwnedFd>, ratoon_snapshot::Error> {
    let folders: BTreeSet<_> = layers.iter().filter_map(|layer| layer.parent()).collect();
    let stored = folders
        .into_iter()
        .filter(|folder| Some(*folder) != held && !VmDir::new(*folder).record().exists());
    stored.map(|folder| Ok(hold(folder)?.into())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(offset: u64, length: u64) -> Run {
        Run { offset, length }
    }

    fn layer(packed: bool, runs: &[(u64, u64)], bytes: &[u8]) -> MemoryLayer {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        let runs = runs.iter();
        MemoryLayer {
            file,
            runs: runs
                .map(|&(offset, len)| ratoon_vmm_api::Run { offset, len })
                .collect(),
            packed,
            freezes: 1,
        }
    }

    #[test]
    fn the_topmost_layer_that_has_a_byte_counts() {
        let memory = Layered::new(vec![
            layer(false, &[(0, 8)], b"aaaaaaaa"),
            layer(true, &[(1, 2), (5, 1)], b"bbB"),
            layer(false, &[(2, 2)], b"..cc"),
        ]);
        let mut bytes = [0; 8];
        memory.read_at(0, &mut bytes).unwrap();
        assert_eq!(&bytes, b"abccaBaa");
        let mut bytes = [0; 3];
        memory.read_at(3, &mut bytes).unwrap();
        assert_eq!(&bytes, b"caB");
        assert_eq!(memory.changed(1), [run(1, 3), run(5, 1)]);
        assert_eq!(memory.changed(2), [run(2, 2)]);
        assert_eq!(memory.changed(3), []);
        assert!(memory.read_at(7, &mut bytes).is_err(), "beyond the end");
    }

    #[test]
    fn a_merged_layer_with_something_new_counts_as_new() {
        let mut merged = layer(false, &[(2, 3)], b"..mmm");
        merged.freezes = 3;
        let layers = vec![layer(false, &[(0, 8)], b"aaaaaaaa"), merged];
        let memory = Layered::new(layers);
        // The base, and the first of the three that were merged: it was a snapshot.
        for depth in [1, 2, 3] {
            let new = layers_within(memory.freezes.iter().copied(), depth);
            assert_eq!(memory.changed(new), [run(2, 3)], "{depth}");
        }
        let new = layers_within(memory.freezes.iter().copied(), 4);
        assert_eq!(memory.changed(new), []);
    }

    #[test]
    fn what_was_freed_hides_what_is_below_and_is_no_content() {
        const PAGE: usize = 4096;
        let all = (0, 4 * PAGE as u64);
        let mut freed = layer(false, &[all], &[]);
        freed.file.set_len(all.1).unwrap();
        freed.file.write_all_at(&[2; PAGE], PAGE as u64).unwrap();
        freed.runs[0].len -= PAGE as u64;
        let base = layer(false, &[all], &[1; 4 * PAGE]);
        let memory = Layered::new(vec![base, freed]);
        let page = PAGE as u64;
        assert_eq!(memory.changed(1), [run(0, 3 * page)]);
        assert_eq!(memory.content(1).unwrap(), [run(page, page)]);
        assert_eq!(memory.populated().unwrap(), [run(0, 4 * page)]);
        let mut bytes = [9; 4 * PAGE];
        memory.read_at(0, &mut bytes).unwrap();
        let firsts: Vec<u8> = bytes.iter().step_by(PAGE).copied().collect();
        assert_eq!(firsts, [0, 2, 0, 1]);
    }

    #[test]
    fn common_runs_are_those_of_both() {
        let one = [run(0, 10), run(20, 10), run(40, 10)];
        let other = [run(5, 20), run(28, 14), run(49, 100)];
        let both = [run(5, 5), run(20, 5), run(28, 2), run(40, 2), run(49, 1)];
        assert_eq!(common(&one, &other), both);
        assert_eq!(common(&other, &one), both);
        assert_eq!(common(&one, &[]), []);
    }

    #[test]
    fn the_smallest_gaps_are_filled_when_there_are_too_many_runs() {
        let runs = [run(0, 1), run(2, 1), run(10, 1), run(13, 1), run(20, 5)];
        assert_eq!(fewer(runs.to_vec(), 5), runs);
        assert_eq!(
            fewer(runs.to_vec(), 4),
            [run(0, 3), run(10, 1), run(13, 1), run(20, 5)]
        );
        assert_eq!(fewer(runs.to_vec(), 2), [run(0, 3), run(10, 15)]);
        assert_eq!(fewer(runs.to_vec(), 1), [run(0, 25)]);
        // Equal gaps: fewer than allowed, never more.
        let even: Vec<Run> = (0..10).map(|at| run(at * 4, 1)).collect();
        assert_eq!(fewer(even, 5), [run(0, 37)]);
    }

    #[test]
    fn a_layer_of_a_snapshot_keeps_it_and_one_of_a_machine_keeps_nothing() {
        use rustix::fs::{FlockOperation, flock};
        let temp = tempfile::tempdir().unwrap();
        let [vm, one, other] = ["0123456789ab", "one", "other"].map(|name| temp.path().join(name));
        for folder in [&vm, &one, &other] {
            std::fs::create_dir(folder).unwrap();
            std::fs::write(folder.join("manifest.json"), "{}").unwrap();
        }
        std::fs::write(vm.join("record.json"), "{}").unwrap();
        let is_kept = |folder: &Path| {
            let manifest = File::open(folder.join("manifest.json")).unwrap();
            flock(manifest, FlockOperation::NonBlockingLockExclusive).is_err()
        };
        let layer = |folder: &Path, number| folder.join(format!("root-{number}.qcow2"));
        let layers = [layer(&one, 0), layer(&one, 1), layer(&vm, 2)];
        assert!(hold_layers(&layers, Some(&one)).unwrap().is_empty());
        let held = hold_layers(&layers, None).unwrap();
        assert_eq!(held.len(), 1);
        assert_eq!(
            [&vm, &one, &other].map(|it| is_kept(it)),
            [false, true, false]
        );
        drop(held);
        assert!(!is_kept(&one));
        std::fs::remove_dir_all(&one).unwrap();
        let gone = hold_layers(&layers, None).unwrap_err();
        assert!(
            matches!(gone, ratoon_snapshot::Error::NotFound { .. }),
            "{gone}"
        );
    }
}
