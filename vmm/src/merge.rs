//! A machine that is frozen again and again: its layers are merged, so that a generation has few of them.
//!
//! ```text
//!  freeze .. freeze -- a thread: merged -- installed -- the machine moves over -- old files removed
//!                      |  reads only what nobody writes  |  in slices, vCPUs held for each
//!  freeze, and there are too many already: merged first, while the machine runs
//! ```
//!
//! A generation that was given away names the layers that it was made of, and these live on for whoever has
//! them. Only later ones name what was merged. Until it is installed nobody knows of it, so that a VMM that is
//! killed leaves at worst a file of a disk's that nobody names, which goes with the VM's folder.
//!
//! It fails when there is no memory or no space: a warning, and the layers stay as they are. A child of a child
//! of a child is frozen once each, so none of them merges in vain: what its parent has not done, it does when it is
//! frozen with too many.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use ratoon_devices::block;
use ratoon_vmm_api::{DiskConfig, Outcome, Run, VmState};

use crate::bus::lock;
use crate::machine::Machine;
use crate::memory::{self, MemoryError};

/// With so many layers of its own a machine that is frozen often merges them in the background.
const MANY: usize = 8;
/// With so many it merges them before it is frozen.
const TOO_MANY: usize = 16;
/// So many stay at most beside what was merged.
const KEEP: usize = 4;
/// Freezes of this machine after which it may be worth its while.
const OFTEN: usize = 4;
/// Mappings that a child of it would need; `vm.max_map_count` allows 65530.
const TOO_MANY_RUNS: usize = 16 << 10;
/// What moves over while the vCPUs are held once: mappings, and bytes of them.
const SLICE: (usize, u64) = (64, 16 << 20);
/// How often a file is tried that somebody may be making links to, or a copy of for a snapshot.
const RETRY: Duration = Duration::from_millis(250);
/// Below what runs the guest.
const NICE: i32 = 10;

/// What a machine has to do with its layers.
#[derive(Debug, Default)]
pub(crate) struct Merging {
    /// Freezes since the last time.
    freezes: AtomicUsize,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// Merged memory over whose old layers the machine still runs.
    unmoved: Mutex<Vec<Arc<File>>>,
    /// Layers of disks that the machine has no more.
    retired: Mutex<Vec<PathBuf>>,
}

impl Machine {
    /// Before a freeze: merges what has become too much, or waits until that is done.
    pub(crate) fn make_room(&self) {
        // Once for the thread that may be at it, once for what came since.
        for _ in 0..2 {
            let (own, runs) = self.depth();
            if own < TOO_MANY && runs < TOO_MANY_RUNS {
                return;
            }
            let thread = lock(&self.merging.thread).take();
            match thread {
                Some(thread) => drop(thread.join()),
                None => self.merge(),
            }
        }
    }

    /// After a freeze: begins what is due, on a thread of its own.
    pub fn merge_later(self: &Arc<Self>) {
        let merging = &self.merging;
        let often = merging.freezes.fetch_add(1, Ordering::Relaxed) + 1 >= OFTEN;
        let is_due = often && self.depth().0 >= MANY;
        let is_left = !lock(&merging.unmoved).is_empty() || !lock(&merging.retired).is_empty();
        let mut thread = lock(&merging.thread);
        let is_busy = thread.as_ref().is_some_and(|it| !it.is_finished());
        if is_busy || !(is_due || is_left) {
            return;
        }
        let machine = self.clone();
        let begun = std::thread::Builder::new()
            .name("merge".into())
            .stack_size(256 * 1024)
            .spawn(move || {
                let _ = rustix::process::setpriority_process(None, NICE);
                if is_due {
                    machine.merge();
                }
                machine.move_over();
                // Whoever has asked for the freeze makes links for some time yet.
                while machine.ending.outcome().is_none() {
                    machine.remove_retired();
                    let is_left = !lock(&machine.merging.retired).is_empty();
                    if !is_left || machine.depth().0 >= TOO_MANY {
                        break;
                    }
                    std::thread::sleep(RETRY);
                }
            });
        match begun {
            Ok(begun) => *thread = Some(begun),
            // The next freeze tries again.
            Err(error) => tracing::warn!(%error, "a thread to merge layers"),
        }
    }

    /// How many layers of its own it has, of memory or of a disk, and how many mappings the memory takes.
    fn depth(&self) -> (usize, usize) {
        let layers = lock(&self.layers);
        let runs = layers.iter().map(|layer| layer.runs.len()).sum();
        let memory = layers.len() - memory::floor(&layers);
        drop(layers);
        let disks = lock(&self.disks);
        let own = disks.iter().map(|disk| disk.frozen.len() - floor(disk));
        (own.max().unwrap_or(0).max(memory), runs)
    }

    fn merge(&self) {
        self.merging.freezes.store(0, Ordering::Relaxed);
        if let Err(error) = self.merge_memory() {
            tracing::warn!(%error, "memory's layers stay as they are");
        }
        let disks = lock(&self.disks).len();
        for index in 0..disks {
            if let Err(error) = self.merge_disk(index) {
                tracing::warn!(%error, "disk {index}: its layers stay as they are");
            }
        }
    }

    fn merge_memory(&self) -> Result<(), MemoryError> {
        let layers = lock(&self.layers).clone();
        let range = memory::plan_layers(&layers, KEEP);
        if range.len() < 2 {
            return Ok(());
        }
        let merged = memory::merge(&layers, range.clone(), self.config.memory_mib << 20)?;
        let file = merged.file.clone();
        if memory::install(&mut lock(&self.layers), &layers[range], merged) {
            lock(&self.merging.unmoved).push(file);
        }
        Ok(())
    }

    fn merge_disk(&self, index: usize) -> Result<(), Box<dyn std::error::Error>> {
        let disk = lock(&self.disks)[index].clone();
        let floor = floor(&disk);
        let size = |path: &PathBuf| std::fs::metadata(path).map_or(0, |it| it.blocks() * 512);
        let sizes: Vec<u64> = disk.frozen[floor..].iter().map(size).collect();
        let range = memory::plan(&sizes, KEEP);
        let range = floor + range.start..floor + range.end;
        let Some(into) = free_name(&disk).filter(|_| range.len() >= 2) else {
            return Ok(());
        };
        let mut keep_on = || self.ending.outcome().is_none();
        let frozen = &disk.frozen[..range.end];
        block::merge(frozen, range.start, &disk.path, &into, &mut keep_on)?;
        // No freeze meanwhile.
        let _layers = lock(&self.layers);
        let mut disks = lock(&self.disks);
        let now = &mut disks[index];
        let slot = self.bus.disk(&disk.id).filter(|_| {
            // Layers have only been added.
            now.frozen.get(..range.end) == Some(frozen)
        });
        let replaced = match slot {
            Some(slot) => lock(&slot.transport).replace_layers(range.clone(), &into),
            None => Err(ratoon_devices::virtio::DeviceError::Host {
                what: "taking merged layers".into(),
                source: std::io::ErrorKind::NotFound.into(),
            }),
        };
        if let Err(error) = replaced {
            let _ = std::fs::remove_file(&into);
            return Err(error.into());
        }
        now.freezes.resize(now.frozen.len(), 1);
        let freezes = now.freezes[range.clone()].iter().sum();
        now.freezes.splice(range.clone(), [freezes]);
        let old = now.frozen.splice(range, [into]);
        // What the machine was started from stays.
        let old = old.filter(|path| !self.birth.as_ref().is_some_and(|birth| birth.has(path)));
        lock(&self.merging.retired).extend(old);
        Ok(())
    }

    /// Has the machine run over merged memory, so that nobody needs the old files for its sake.
    fn move_over(&self) {
        loop {
            let Some(file) = lock(&self.merging.unmoved).pop() else {
                return;
            };
            let mut from = 0;
            loop {
                match self.move_slice(&file, from) {
                    Ok(Some(next)) => from = next,
                    Ok(None) => break,
                    Err(error) => {
                        // With holes in its memory it must not run on.
                        let causes = crate::causes(&error);
                        self.ending.end(Outcome::Failed { causes });
                        return;
                    }
                }
            }
        }
    }

    /// One slice of it, from this offset in memory on. Gives where the next one begins.
    fn move_slice(&self, file: &Arc<File>, from: u64) -> Result<Option<u64>, MemoryError> {
        let layers = lock(&self.layers);
        // What a later layer hides is not in its runs any more.
        let Some(layer) = layers.iter().find(|layer| Arc::ptr_eq(&layer.file, file)) else {
            return Ok(None);
        };
        let slice = slice(&layer.runs, from);
        let Some(last) = slice.last() else {
            return Ok(None);
        };
        let next = last.offset + last.len;
        let state = lock(&self.state);
        let was_running = match *state {
            VmState::Running => true,
            VmState::Paused => false,
            _ => return Ok(None),
        };
        if was_running {
            lock(&self.vcpus).hold();
        }
        let slots = self.bus.virtio().iter();
        let still: Vec<_> = slots.map(|slot| lock(&slot.transport)).collect();
        // What was given back reads as zero, whatever was there.
        let moved = memory::move_over(&self.memory, file, &slice, &self.free.runs());
        drop(still);
        if was_running && moved.is_ok() {
            lock(&self.vcpus).run();
        }
        moved.map(|()| Some(next))
    }

    /// Removes layers that the machine has no more, unless somebody is making links to what a generation
    /// of it has: whoever does holds the folder's lock for that.
    fn remove_retired(&self) {
        let mut retired = lock(&self.merging.retired);
        retired.retain(|path| {
            let lock = path.with_file_name(ratoon_vmm_api::LAYERS_LOCK);
            let mut options = File::options();
            let options = options.write(true).create(true).truncate(false);
            let alone = options.open(lock).and_then(|file| {
                file.try_lock()?;
                Ok(file)
            });
            let is_removed = alone.is_ok_and(|_alone| std::fs::remove_file(path).is_ok());
            !is_removed && path.exists()
        });
    }
}

/// The folder of a disk's own layers.
fn folder(disk: &DiskConfig) -> Option<&Path> {
    let folder = disk.layer.as_deref()?.parent()?;
    // An inherited descriptor is in none.
    (folder != Path::new("/dev/fd")).then_some(folder)
}

/// How many of the lowest frozen layers are not its own: a snapshot's, which others share.
fn floor(disk: &DiskConfig) -> usize {
    let Some(folder) = folder(disk) else {
        return disk.frozen.len();
    };
    let shared = disk
        .frozen
        .iter()
        .take_while(|path| !path.starts_with(folder));
    shared.count()
}

fn free_name(disk: &DiskConfig) -> Option<PathBuf> {
    let folder = folder(disk)?;
    let mut names = (0..).map(|number: u64| folder.join(format!("joined-{number}.qcow2")));
    names.find(|path| !path.exists())
}

/// The first runs from `from` on: so many and so much as one slice may be.
fn slice(runs: &[Run], from: u64) -> Vec<Run> {
    let (most, mut bytes) = SLICE;
    let mut slice = Vec::new();
    for run in runs.iter().filter(|run| run.offset + run.len > from) {
        if slice.len() == most || bytes == 0 {
            break;
        }
        let offset = run.offset.max(from);
        let len = (run.offset + run.len - offset).min(bytes);
        bytes -= len;
        slice.push(Run { offset, len });
    }
    slice
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_all_of_it_each_of_them_small() {
        let mut runs: Vec<Run> = (0..100)
            .map(|number| Run {
                offset: number << 20,
                len: 4096,
            })
            .collect();
        runs.push(Run {
            offset: 100 << 20,
            len: 40 << 20,
        });
        let (mut from, mut found, mut slices) = (0, 0, 0);
        loop {
            let slice = slice(&runs, from);
            let Some(last) = slice.last() else {
                break;
            };
            let bytes: u64 = slice.iter().map(|run| run.len).sum();
            assert!(slice.len() <= SLICE.0 && bytes <= SLICE.1);
            (from, found, slices) = (last.offset + last.len, found + bytes, slices + 1);
        }
        assert_eq!(found, 100 * 4096 + (40 << 20));
        assert_eq!(slices, 4);
    }

    #[test]
    fn what_is_a_snapshots_is_not_merged() {
        let disk = |frozen: &[&str], layer: &str| DiskConfig {
            id: "root".into(),
            path: "/image".into(),
            read_only: false,
            frozen: frozen.iter().map(Into::into).collect(),
            freezes: Vec::new(),
            layer: Some(layer.into()),
        };
        let own = disk(
            &["/s/a", "/s/b", "/vm/inherited-2", "/vm/layer"],
            "/vm/layer-1",
        );
        assert_eq!(floor(&own), 2);
        assert_eq!(floor(&disk(&["/dev/fd/7", "/dev/fd/8"], "/dev/fd/9")), 2);
    }
}
