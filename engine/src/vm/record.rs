//! A VM's record: what is written about it, and how it reads back.
//!
//! `record.json` is replaced by rename, so a reader sees the old or the new one. What cannot be
//! read (cut short by a full disk, edited by hand, from a newer Ratoon) is an error that names the
//! file; it never stops other records from being used.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::SystemTime;

use ratoon_vmm_api::{ExitReport, FrozenDisk, VmConfig};
use serde::{Deserialize, Serialize};

use super::cgroup::Group;
use super::process::ProcessRef;
use crate::commit::Replaces;
use crate::renewal::RuntimeRef;

/// The record format that this version writes.
const FORMAT: u32 = 1;
/// A longer file is no record.
const MAX_RECORD_LEN: u64 = 1 << 20;

/// An image as a VM was started from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRef {
    /// The name that was asked for.
    pub name: String,
    /// What it stood for then.
    pub digest: String,
}

/// A snapshot that a VM comes from: one that it was started from, or that was taken of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ancestor {
    /// Its id.
    pub snapshot: String,
    /// How many layers of the VM's memory, from the lowest, are its memory. Merged ones count as what they were.
    pub memory_layers: usize,
    /// How many frozen layers of the VM's root disk, from the lowest, are its disk, counted so too.
    pub disk_layers: usize,
}

/// Where a child of a fork comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parent {
    /// The id of the VM that was forked, which may be gone; `None`: it is a stored snapshot.
    pub vm: Option<String>,
    /// The generation that all children of that fork come from.
    pub generation: String,
    /// Which of them it is, from 0.
    pub index: u32,
    /// The host's vsock port of the connection to the runtime that went on through the freeze.
    #[serde(default)]
    pub control_port: Option<u32>,
}

/// What is written about a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The record's format; see [`RecordError::Format`].
    pub format: u32,
    /// The VM's id, also its directory's name.
    pub id: String,
    /// Its name, unique among all records.
    pub name: Option<String>,
    /// The image of its root disk.
    pub image: Option<ImageRef>,
    /// When it was made, in milliseconds after the Unix epoch.
    pub created_ms: u64,
    /// It belongs to the process in `owner` and is removed with it.
    pub ephemeral: bool,
    /// The runtime in the guest has answered once.
    pub ready: bool,
    /// The process that started it.
    pub owner: Option<ProcessRef>,
    /// Its VMM, from the moment that there is one.
    pub vmm: Option<ProcessRef>,
    /// What the VMM was told, without a generation to start from. Freezes add layers to its disks.
    pub config: VmConfig,
    /// The snapshots that it comes from, the oldest first.
    #[serde(default)]
    pub ancestors: Vec<Ancestor>,
    /// The runtime in the guest.
    #[serde(default)]
    pub runtime: Option<RuntimeRef>,
    /// The folder of the snapshot that it was started from.
    #[serde(default)]
    pub restored_from: Option<PathBuf>,
    /// It is a child of a fork.
    #[serde(default)]
    pub parent: Option<Parent>,
    /// The user's own words.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Its control group, if its memory is limited.
    #[serde(default)]
    pub group: Option<Group>,
    /// Others that end because it has taken its parent's place, until they have. See [`crate::commit`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replaces: Option<Replaces>,
}

/// Why a record cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The file is not there or cannot be read.
    #[error("reading {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file could not be replaced.
    #[error("writing {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file's content is not a record.
    #[error("{} is damaged", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// The record is of another version of Ratoon.
    #[error("{} has format {format}; this Ratoon reads format {FORMAT}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Its format.
        format: u32,
    },
    /// The record was copied or moved from another VM's directory.
    #[error("{} belongs to VM {id}", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// The id that it names.
        id: String,
    },
}

/// The files of one VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmDir(PathBuf);

impl VmDir {
    /// The files under `path`, whose last component is the VM's id.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The VM's id.
    pub fn id(&self) -> String {
        self.0
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default()
    }

    /// The [`Record`].
    pub fn record(&self) -> PathBuf {
        self.0.join("record.json")
    }

    /// The serial console's newest output; older output is in the file with `.1` at its end.
    pub fn serial_log(&self) -> PathBuf {
        self.0.join("serial.log")
    }

    /// What the VMM has to say.
    pub fn vmm_log(&self) -> PathBuf {
        self.0.join("vmm.log")
    }

    /// The VMM's control socket.
    pub fn control_socket(&self) -> PathBuf {
        self.0.join("control.sock")
    }

    /// The Unix socket through which the host reaches the guest.
    pub fn vsock_socket(&self) -> PathBuf {
        self.0.join("vsock.sock")
    }

    /// The Unix socket to which the guest's runtime connects when it serves.
    pub fn ready_socket(&self) -> PathBuf {
        self.0
            .join(format!("vsock.sock_{}", ratoon_protocol::RUNTIME_PORT))
    }

    /// What the guest writes to its root disk before it is frozen for the first time.
    pub fn layer(&self) -> PathBuf {
        self.0.join("layer.qcow2")
    }

    /// The first name that is free for it.
    pub fn free_layer(&self) -> PathBuf {
        let first = self.layer();
        match first.exists() {
            true => self.next_layer(),
            false => first,
        }
    }

    /// A Unix socket on which a generation may come to this process: a name that is free. A VMM that was asked by
    /// another one, killed since, must not find us there.
    pub fn freeze_socket(&self) -> PathBuf {
        self.0.join(own_name("freeze", "sock"))
    }

    /// Removes the sockets of processes that were killed in a freeze, and the merged layers of those that were
    /// while they wrote a snapshot.
    pub(crate) fn sweep_left(&self) {
        let merged = self.files_like("merged-", ".qcow2");
        for path in self.files_like("freeze-", ".sock").iter().chain(&merged) {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let pid = name.split('-').nth(1).unwrap_or_default();
            if !Path::new("/proc").join(pid).exists() {
                let _ = std::fs::remove_file(path);
            }
        }
    }

    fn files_like(&self, prefix: &str, suffix: &str) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(&self.0).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names
            .filter(|name| name.starts_with(prefix) && name.ends_with(suffix))
            .map(|name| self.0.join(name))
            .collect()
    }

    /// There while the VM may stand still for a freeze; holds the generation. See [`super::standstill`].
    pub fn standstill(&self) -> PathBuf {
        self.0.join("standstill")
    }

    /// There when the VM may call models. See [`crate::bridge`].
    pub fn agent_note(&self) -> PathBuf {
        self.0.join("agent.json")
    }

    /// Boundaries of the agent in it that were kept. See [`crate::steps`].
    pub fn steps_note(&self) -> PathBuf {
        self.0.join("steps.json")
    }

    /// There while the VM is put back to a snapshot; holds the record from before. See [`crate::rollback`].
    pub fn rollback_note(&self) -> PathBuf {
        self.0.join("rollback.json")
    }

    /// What the guest writes to its root disk after its next freeze: a name that is free.
    pub fn next_layer(&self) -> PathBuf {
        let name = |number: u64| self.0.join(format!("layer-{number}.qcow2"));
        let taken = (1..).take_while(|number| name(*number).exists());
        name(taken.last().map_or(1, |number| number + 1))
    }

    /// A frozen layer of its root disk that it has in common with the VM from which it was forked.
    pub fn inherited_layer(&self, number: usize) -> PathBuf {
        self.0.join(format!("inherited-{number}.qcow2"))
    }

    /// What all frozen layers of its root disk have, while this process writes a snapshot: a name that is free.
    pub fn merged_layer(&self) -> PathBuf {
        self.0.join(own_name("merged", "qcow2"))
    }

    /// Frozen layers of another VM that it was about to get, and has not got.
    pub(crate) fn borrowed_layers(&self) -> Vec<PathBuf> {
        self.files_like("back-", ".qcow2")
    }

    /// One that it has in common with a holder of a generation that it is put back to.
    pub(crate) fn borrowed_layer(&self, generation: &str, number: usize) -> PathBuf {
        self.0.join(format!("back-{generation}-{number}.qcow2"))
    }

    /// Keeps the layers of the VM's generations in its folder, while there are links to be made to them: to be
    /// taken before the freeze. See [`ratoon_vmm_api::LAYERS_LOCK`].
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn hold_layers(&self) -> std::io::Result<std::fs::File> {
        let file = self.layers_lock()?;
        file.lock_shared()?;
        Ok(file)
    }

    /// As [`Self::hold_layers`], for who removes some of them; `None`: somebody makes links.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn layers_alone(&self) -> std::io::Result<Option<std::fs::File>> {
        use std::fs::TryLockError;
        let file = self.layers_lock()?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    fn layers_lock(&self) -> std::io::Result<std::fs::File> {
        let mut options = std::fs::OpenOptions::new();
        let options = options.write(true).create(true).truncate(false).mode(0o600);
        options.open(self.0.join(ratoon_vmm_api::LAYERS_LOCK))
    }

    /// All layers of disks in its folder.
    pub(crate) fn layers(&self) -> Vec<PathBuf> {
        self.files_like("", ".qcow2")
    }

    /// The VMM's [`ExitReport`].
    pub fn exit_report(&self) -> PathBuf {
        self.0.join("exit.json")
    }

    /// Reads the VMM's last word; `None` when it left none.
    pub fn read_exit_report(&self) -> Option<ExitReport> {
        serde_json::from_slice(&read_limited(&self.exit_report()).ok()?).ok()
    }

    /// Reads the record.
    ///
    /// # Errors
    /// [`RecordError`] when there is none or it is not usable.
    pub fn read_record(&self) -> Result<Record, RecordError> {
        /// What every format has.
        #[derive(Deserialize)]
        struct Versioned {
            format: u32,
        }
        let path = self.record();
        let json = match read_limited(&path) {
            Ok(json) => json,
            Err(source) => return Err(RecordError::Read { path, source }),
        };
        let parsed = serde_json::from_slice(&json).and_then(|Versioned { format }| {
            if format == FORMAT {
                serde_json::from_slice(&json).map(Ok)
            } else {
                Ok(Err(format))
            }
        });
        match parsed {
            Ok(Ok(record)) => {
                let record: Record = record;
                if record.id == self.id() {
                    Ok(record)
                } else {
                    Err(RecordError::Foreign {
                        path,
                        id: record.id,
                    })
                }
            }
            Ok(Err(format)) => Err(RecordError::Format { path, format }),
            Err(source) => Err(RecordError::Damaged { path, source }),
        }
    }

    /// Replaces the record. The caller holds the store's lock.
    ///
    /// # Errors
    /// [`RecordError::Write`]; the old record is then still whole.
    pub fn write_record(&self, record: &Record) -> Result<(), RecordError> {
        let path = self.record();
        let temporary = self.0.join("record.tmp");
        let write = || {
            let json = serde_json::to_vec_pretty(record).map_err(std::io::Error::other)?;
            let mut file = std::fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&temporary)?;
            file.write_all(&json)?;
            std::fs::rename(&temporary, &path)
        };
        write().map_err(|source| {
            // Best effort: on a full disk the remainder would only be in the way.
            let _ = std::fs::remove_file(&temporary);
            RecordError::Write {
                path: path.clone(),
                source,
            }
        })
    }
}

/// A file's name that no other process and no other thread of this one takes.
fn own_name(what: &str, extension: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("{what}-{}-{number}.{extension}", std::process::id())
}

/// How a VM calls itself: its name where that can be a hostname (RFC 1123), else its id.
pub fn hostname(name: Option<&str>, id: &str) -> String {
    let fits = |name: &&str| {
        let has_ends = |part: &str| {
            let ends = [part.as_bytes().first(), part.as_bytes().last()];
            ends.iter()
                .all(|end| end.is_some_and(u8::is_ascii_alphanumeric))
        };
        let is_inner = |byte: u8| byte.is_ascii_alphanumeric() || b"-.".contains(&byte);
        name.len() <= 63 && name.bytes().all(is_inner) && name.split('.').all(has_ends)
    };
    name.filter(fits).unwrap_or(id).to_owned()
}

impl Record {
    /// Where its disks go on after a freeze.
    pub(crate) fn goes_on_in(&mut self, disks: &[FrozenDisk]) {
        for disk in &mut self.config.disks {
            if let Some(frozen) = disks.iter().find(|frozen| frozen.id == disk.id) {
                disk.frozen.clone_from(&frozen.frozen);
                disk.freezes.clone_from(&frozen.freezes);
                disk.layer = Some(frozen.layer.clone());
            }
        }
    }

    /// See [`hostname`].
    pub fn hostname(&self) -> String {
        hostname(self.name.as_deref(), &self.id)
    }

    /// A record of a VM that is about to be started by this process.
    pub fn new(config: VmConfig, name: Option<String>, image: Option<ImageRef>) -> Self {
        Self {
            format: FORMAT,
            id: config.id.clone(),
            name,
            image,
            created_ms: unix_ms(SystemTime::now()),
            ephemeral: true,
            ready: false,
            owner: ProcessRef::current(),
            vmm: None,
            config,
            ancestors: Vec::new(),
            runtime: None,
            restored_from: None,
            parent: None,
            labels: BTreeMap::new(),
            group: None,
            replaces: None,
        }
    }

    /// Which child of its fork it is, from 0, if it is one.
    pub fn index(&self) -> Option<u32> {
        self.parent.as_ref().map(|parent| parent.index)
    }

    /// Whether its VMM runs.
    pub fn vmm_is_alive(&self) -> bool {
        self.vmm.as_ref().is_some_and(ProcessRef::is_alive)
    }

    /// Whether the process that started it runs.
    pub fn owner_is_alive(&self) -> bool {
        self.owner.as_ref().is_some_and(ProcessRef::is_alive)
    }

    /// Whether nobody will ever use it again: its owner went away before it was handed out, or it
    /// was to go with its owner.
    pub fn is_abandoned(&self) -> bool {
        (self.ephemeral || !self.ready) && !self.owner_is_alive()
    }
}

fn unix_ms(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}

fn read_limited(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)?
        .take(MAX_RECORD_LEN)
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
#[path = "record_tests.rs"]
pub(crate) mod tests;
