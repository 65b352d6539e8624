//! What is known of a rollback that may be killed, and who puts it right then.
//!
//! ```text
//!   note -> old VMM aside -> new VMM woken, let live -> note: replaced -> old VMM killed -> no note
//!    `------ killed: back, the new one ended ------'      `- killed: forward, the old one ended -'
//! ```
//!
//! How it fails: a VMM that cannot be ended or reached; the note stays, and the next command tries again.

use std::fs::File;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::time::Duration;

use rustix::process::Signal;
use serde::{Deserialize, Serialize};

use super::{RollbackError, file};
use crate::vm::control::Control;
use crate::vm::process::ProcessRef;
use crate::vm::record::{Record, VmDir};
use crate::vm::store::{Store, StoreError};

/// How long a VMM may take to hold its vCPUs, or to say who it is.
const CONTROL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a killed VMM may take to be gone.
const KILL_TIMEOUT: Duration = Duration::from_secs(60);

/// Lies in the VM's folder while it is put back.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Note {
    /// The VM's record, with the old VMM.
    before: Record,
    was_paused: bool,
    /// The layers in its folder then. Its birth's may be among them, which no record names once they are merged.
    #[serde(default)]
    layers: Vec<PathBuf>,
    /// The new VMM lives without whoever started it.
    is_replaced: bool,
}

/// The sockets of the VMM that serves, and where those of the old one are meanwhile.
fn sockets(dir: &VmDir) -> [(PathBuf, PathBuf); 2] {
    [dir.control_socket(), dir.vsock_socket()].map(|path| {
        let aside = path.with_extension("old");
        (path, aside)
    })
}

/// Pauses the VMM and puts its sockets out of the way.
pub(super) fn set_aside(dir: &VmDir) -> Result<(), RollbackError> {
    Control::new(dir.control_socket(), CONTROL_TIMEOUT).pause()?;
    for (path, aside) in sockets(dir) {
        std::fs::rename(&path, aside).map_err(file(&path))?;
    }
    Ok(())
}

impl Note {
    pub(super) fn new(dir: &VmDir, before: Record, was_paused: bool) -> Self {
        Self {
            before,
            was_paused,
            layers: dir.layers(),
            is_replaced: false,
        }
    }

    fn read(dir: &VmDir) -> std::io::Result<Self> {
        let json = std::fs::read(dir.rollback_note())?;
        Ok(serde_json::from_slice(&json)?)
    }

    /// The old one or the new one is there, never half of it.
    pub(super) fn write(&self, dir: &VmDir) -> std::io::Result<()> {
        let path = dir.rollback_note();
        let temporary = path.with_extension("tmp");
        let written = std::fs::write(&temporary, serde_json::to_vec(self)?);
        let moved = written.and_then(|()| std::fs::rename(&temporary, path));
        if moved.is_err() {
            let _ = std::fs::remove_file(temporary);
        }
        moved
    }

    /// Nothing was done.
    pub(super) fn withdraw(dir: &VmDir) {
        let _ = std::fs::remove_file(dir.rollback_note());
    }

    /// From now on there is no way back.
    pub(super) fn replaced(&mut self, dir: &VmDir) {
        self.is_replaced = true;
        // On a full disk: whoever comes next would go back, which leaves one VM all the same.
        let _ = self.write(dir);
    }

    /// The old VMM goes on. The new one has ended.
    pub(super) fn back(&self, store: &Store, dir: &VmDir) -> Result<(), RollbackError> {
        for (path, aside) in sockets(dir) {
            if aside.exists() {
                std::fs::rename(&aside, &path).map_err(file(&path))?;
            }
        }
        let _ = std::fs::remove_file(dir.ready_socket());
        let _ = std::fs::remove_file(dir.exit_report());
        let mut given_up = Vec::new();
        let restored = store.update(dir, |now| {
            given_up = layers(now, dir);
            now.clone_from(&self.before);
        });
        if let Err(StoreError::NotFound(_)) = restored {
            // Removed meanwhile, and who did so knew the new one alone.
            end(self.before.vmm.as_ref());
        }
        restored?;
        given_up.extend(dir.borrowed_layers());
        let mut kept = layers(&self.before, dir);
        kept.extend_from_slice(&self.layers);
        remove_but(given_up, &kept);
        if !self.was_paused
            && let Err(error) = Control::new(dir.control_socket(), CONTROL_TIMEOUT).resume()
        {
            tracing::error!(%error, "VM {} stays paused", dir.id());
        }
        let _ = std::fs::remove_file(dir.rollback_note());
        Ok(())
    }

    /// The new VMM goes on: ends the old one, and removes what it wrote.
    pub(super) fn forward(&self, dir: &VmDir) {
        // Nobody waits for it but us; what it holds is freed when it is gone.
        end(self.before.vmm.as_ref());
        for (_, aside) in sockets(dir) {
            let _ = std::fs::remove_file(aside);
        }
        // Also what it has merged since its record was written. While somebody makes links to them all stay,
        // and go with the folder.
        if let (Ok(now), Ok(Some(_alone))) = (dir.read_record(), dir.layers_alone()) {
            remove_but(dir.layers(), &layers(&now, dir));
        }
        let _ = std::fs::remove_file(dir.rollback_note());
    }
}

/// Puts right what killed rollbacks have left. Those that are under way are left alone.
pub(crate) fn mend(store: &Store) -> Result<(), StoreError> {
    for dir in store.in_rollback()? {
        if let Err(error) = mend_one(store, &dir) {
            tracing::warn!(%error, "VM {} was being rolled back", dir.id());
        }
    }
    Ok(())
}

/// The old VMM of a VM that is being put back, or was when somebody was killed over it.
pub(crate) fn old_vmm(dir: &VmDir) -> Option<ProcessRef> {
    Note::read(dir).ok()?.before.vmm
}

fn mend_one(store: &Store, dir: &VmDir) -> Result<(), RollbackError> {
    let alone = File::open(dir.path()).map_err(file(dir.path()))?;
    if alone.try_lock().is_err() {
        return Ok(());
    }
    let note = match Note::read(dir) {
        // Over, meanwhile.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        read => read.map_err(file(&dir.rollback_note()))?,
    };
    if note.is_replaced {
        note.forward(dir);
        return Ok(());
    }
    let old = note.before.vmm.as_ref();
    let new = dir.read_record()?.vmm;
    end(new.as_ref().filter(|new| Some(*new) != old));
    // One that has no record yet ends by itself, and would take the sockets of the old one along.
    let [(control, aside), _] = sockets(dir);
    if aside.exists()
        && let Ok(status) = Control::new(control, CONTROL_TIMEOUT).status()
    {
        let new = i32::try_from(status.pid).ok().and_then(ProcessRef::of);
        end(new.as_ref().filter(|new| Some(*new) != old));
    }
    note.back(store, dir)
}

fn end(vmm: Option<&ProcessRef>) {
    if let Some(process) = vmm.and_then(ProcessRef::open) {
        let _ = process.signal(Signal::KILL);
        let _ = process.wait(KILL_TIMEOUT);
    }
}

/// Files of a VM's disks that are in its folder.
fn layers(record: &Record, dir: &VmDir) -> Vec<PathBuf> {
    let disks = record.config.disks.iter();
    disks
        .flat_map(|disk| disk.frozen.iter().chain(&disk.layer))
        .filter(|path| path.starts_with(dir.path()))
        .cloned()
        .collect()
}

fn remove_but(layers: Vec<PathBuf>, kept: &[PathBuf]) {
    for layer in layers.iter().filter(|layer| !kept.contains(layer)) {
        let _ = std::fs::remove_file(layer);
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;
    use crate::vm::record::tests::config;

    /// A process that stands for a VMM.
    fn vmm() -> (Child, Option<ProcessRef>) {
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        let process = ProcessRef::of(i32::try_from(child.id()).unwrap());
        (child, process)
    }

    /// A rollback that was killed: the old VMM is aside, the new one writes into a layer of its own.
    struct Killed {
        _temp: tempfile::TempDir,
        store: Store,
        dir: VmDir,
        old: Child,
        new: Child,
        before: Record,
        now: Record,
    }

    impl Killed {
        fn with_note(is_replaced: bool) -> Self {
            let temp = tempfile::tempdir().unwrap();
            let dir = VmDir::new(temp.path().join("0123456789ab"));
            std::fs::create_dir(dir.path()).unwrap();
            let ((old, old_process), (new, new_process)) = (vmm(), vmm());
            let record = |layer: &str, vmm| {
                let mut record = Record::new(config(&dir.id()), Some("box".into()), None);
                let disk = serde_json::json!({
                    "id": "root", "path": "/d", "layer": dir.path().join(layer)
                });
                record.config.disks = vec![serde_json::from_value(disk).unwrap()];
                record.vmm = vmm;
                record
            };
            let before = record("layer.qcow2", old_process);
            let now = record("layer-1.qcow2", new_process);
            let write = |name: &str| std::fs::write(dir.path().join(name), name).unwrap();
            // The last: its birth's, from a rollback before, and merged since.
            for name in ["layer.qcow2", "joined-0.qcow2", "back-old-0.qcow2"] {
                write(name);
            }
            let layers = dir.layers();
            for name in ["layer-1.qcow2", "back-abc-0.qcow2"] {
                write(name);
            }
            for (path, aside) in sockets(&dir) {
                std::fs::write(path, "new").unwrap();
                std::fs::write(aside, "old").unwrap();
            }
            dir.write_record(&now).unwrap();
            let note = Note {
                before: before.clone(),
                was_paused: true,
                layers,
                is_replaced,
            };
            note.write(&dir).unwrap();
            Self {
                store: Store::new(temp.path()),
                _temp: temp,
                dir,
                old,
                new,
                before,
                now,
            }
        }

        fn lives(child: &mut Child) -> bool {
            child.try_wait().unwrap().is_none()
        }

        fn files(&self) -> Vec<String> {
            let entries = std::fs::read_dir(self.dir.path()).unwrap();
            let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
            let mut names: Vec<_> = names.collect();
            names.sort();
            names
        }
    }

    impl Drop for Killed {
        fn drop(&mut self) {
            for child in [&mut self.old, &mut self.new] {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }

    #[test]
    fn a_vm_whose_rollback_was_killed_goes_on_as_it_was_and_the_new_one_ends() {
        let mut killed = Killed::with_note(false);
        mend(&killed.store).unwrap();
        assert!(Killed::lives(&mut killed.old) && !Killed::lives(&mut killed.new));
        assert_eq!(killed.dir.read_record().unwrap(), killed.before);
        assert_eq!(
            killed.files(),
            [
                "back-old-0.qcow2",
                "control.sock",
                "joined-0.qcow2",
                "layer.qcow2",
                "record.json",
                "vsock.sock"
            ]
        );
        let socket = std::fs::read(killed.dir.vsock_socket()).unwrap();
        assert_eq!(socket, b"old");
    }

    #[test]
    fn a_vm_that_was_replaced_before_its_rollback_was_killed_goes_on_as_the_new_one() {
        let mut killed = Killed::with_note(true);
        mend(&killed.store).unwrap();
        assert!(!Killed::lives(&mut killed.old) && Killed::lives(&mut killed.new));
        assert_eq!(killed.dir.read_record().unwrap(), killed.now);
        assert_eq!(
            killed.files(),
            [
                "control.sock",
                "layer-1.qcow2",
                "layers.lock",
                "record.json",
                "vsock.sock"
            ]
        );
        let socket = std::fs::read(killed.dir.vsock_socket()).unwrap();
        assert_eq!(socket, b"new");
    }

    #[test]
    fn a_rollback_that_is_under_way_is_left_alone_and_its_vm_is_not_swept() {
        let mut killed = Killed::with_note(false);
        let at_work = File::open(killed.dir.path()).unwrap();
        at_work.lock().unwrap();
        let files = killed.files();
        mend(&killed.store).unwrap();
        // Abandoned, by its record: whoever rolled it back would be gone.
        killed.now.owner = None;
        killed.dir.write_record(&killed.now).unwrap();
        assert!(killed.now.is_abandoned());
        assert!(killed.store.sweep().unwrap().abandoned.is_empty());
        assert!(Killed::lives(&mut killed.old) && Killed::lives(&mut killed.new));
        assert_eq!(killed.files(), files);
    }
}
