//! Working sets: what a restored VM touched until its first command was over is noted beside its
//! snapshot, and read ahead by the next restore. Trouble with one never keeps a VM from starting.

use std::os::fd::OwnedFd;
use std::time::Duration;

use ratoon_snapshot::{
    MemoryKind, Run, Snapshot, has_working_set, read_working_set, record_working_set,
};
use rustix::fs::{Advice, fadvise};

use crate::vm::control::Control;
use crate::vm::record::VmDir;

/// How long the VMM may take to look at its page tables.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Notes what the VM in `dir` has touched, if it was restored from a snapshot that has no working
/// set yet. To be called when its first command is over; later calls cost one look at a file.
pub fn note(dir: &VmDir) {
    let Ok(record) = dir.read_record() else {
        return;
    };
    let Some(folder) = record.restored_from.as_deref() else {
        return;
    };
    if has_working_set(folder) {
        return;
    }
    let Ok(touched) = Control::new(dir.control_socket(), TIMEOUT).touched() else {
        return;
    };
    let runs: Vec<Run> = touched
        .runs
        .iter()
        .map(|run| Run {
            offset: run.offset,
            length: run.len,
        })
        .collect();
    if runs.is_empty() {
        return;
    }
    if let Err(error) = record_working_set(folder, record.config.memory_mib << 20, &runs) {
        tracing::debug!(%error, "no working set");
    }
}

/// Has the kernel read the snapshot's working set, if it has one and its memory is a plain file (a
/// pager reads it by itself). On a thread of its own: it is of use while the VM is built.
pub(crate) fn read_ahead(snapshot: &Snapshot) {
    match read_working_set(&snapshot.folder, snapshot.manifest.memory.bytes) {
        Ok(None) => {}
        Err(error) => {
            tracing::warn!(%error, "snapshot {}: it is restored without", snapshot.id);
        }
        Ok(Some(runs)) => {
            let memory = &snapshot.manifest.memory;
            let path = snapshot.folder.join("memory.bin");
            if memory.kind != MemoryKind::Plain || memory.base.is_some() {
                return;
            }
            let Ok(file) = std::fs::File::open(path).map(OwnedFd::from) else {
                return;
            };
            let read = move || {
                for run in runs {
                    let length = std::num::NonZeroU64::new(run.length);
                    let _ = fadvise(&file, run.offset, length, Advice::WillNeed);
                }
            };
            // Without it, pages are read as they are touched.
            let _ = std::thread::Builder::new()
                .name("read-ahead".into())
                .spawn(read);
        }
    }
}
