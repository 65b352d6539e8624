//! Who has brought a VM to a standstill for a freeze, and who lets it go on when they are gone.
//!
//! ```text
//!   begin: lock on the VM's folder, `standstill` written -> processes stopped, frozen, woken -> over: removed
//!   killed in between: `standstill` is there, the lock is free -> the next engine process wakes the VM
//! ```
//!
//! The note on the host says it, not the guest: it is there before the first word to the runtime, and a
//! runtime of any age can be woken. The VM wakes as itself, with new entropy; a wake that was not needed
//! does no harm.
//!
//! How it fails: somebody else is at work for longer than the caller waits ([`FreezeError::Busy`]), or the
//! runtime cannot be reached or woken; the note stays, and the next command tries again.

use std::fs::{File, TryLockError};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::control::Control;
use super::freeze::{FreezeError, Waking, machine_id, transfer, wake};
use super::record::VmDir;
use super::store::Store;
use crate::runtime::{RuntimeClient, RuntimeError};

/// How often a wait looks whether the other process has finished.
const LOOK: Duration = Duration::from_millis(10);
/// How long a runtime may go on with what it was told by the process that was killed.
const SETTLE: Duration = Duration::from_secs(40);
/// How often it is asked meanwhile.
const ASK: Duration = Duration::from_millis(100);
/// How long [`mend_idle`] may take for one VM.
const BRIEF: Duration = Duration::from_secs(5);
/// How long its VMM may take to say where its disks go on.
const CONTROL_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest generation that is taken from a note, in bytes.
const MAX_GENERATION: usize = 128;

/// A VM that this process alone may stop.
#[derive(Debug)]
pub(crate) struct Standstill {
    note: PathBuf,
    /// Held until the end.
    _alone: File,
}

impl Standstill {
    /// Waits until nobody else freezes the VM, wakes it if the last one was killed over it, and notes
    /// that from now on it may stand still. `client` is a connection to its runtime.
    pub(super) fn begin(
        dir: &VmDir,
        client: &mut RuntimeClient,
        generation: &str,
    ) -> Result<Self, FreezeError> {
        // Two at once would thaw each other's processes and take each other's files.
        let alone = File::open(dir.path()).map_err(transfer("its directory"))?;
        alone.lock().map_err(transfer("its directory"))?;
        dir.sweep_left();
        let note = dir.standstill();
        if note.exists() {
            wake_again(dir, client, SETTLE)?;
        }
        std::fs::write(&note, generation).map_err(transfer("a note that it stands still"))?;
        Ok(Self {
            note,
            _alone: alone,
        })
    }

    /// The VM goes on, or never stopped.
    pub(super) fn over(self) {
        // A note that stays costs a wake that nobody needed.
        let _ = std::fs::remove_file(&self.note);
    }
}

/// Lets the VM in `dir` go on if whoever froze it was killed; waits while somebody is at work.
///
/// # Errors
/// [`FreezeError::Busy`] after `patience`, and others of [`FreezeError`]: calls of its runtime would wait.
pub fn mend(dir: &VmDir, patience: Duration) -> Result<(), FreezeError> {
    let note = dir.standstill();
    if !note.exists() {
        return Ok(());
    }
    let end = Instant::now() + patience;
    let left = || end.saturating_duration_since(Instant::now());
    let alone = File::open(dir.path()).map_err(transfer("its directory"))?;
    loop {
        match alone.try_lock() {
            Ok(()) => break,
            Err(TryLockError::WouldBlock) if left().is_zero() => {
                return Err(FreezeError::Busy { after: patience });
            }
            Err(TryLockError::WouldBlock) => std::thread::sleep(LOOK),
            Err(TryLockError::Error(error)) => return Err(transfer("its directory")(error)),
        }
        if !note.exists() {
            return Ok(());
        }
    }
    // Whoever had the lock may have finished meanwhile.
    if !note.exists() {
        return Ok(());
    }
    let mut client = RuntimeClient::connect(&dir.vsock_socket(), left()).map_err(|source| {
        FreezeError::Runtime {
            what: "it was left frozen by a process that was killed, and cannot be reached",
            source,
        }
    })?;
    wake_again(dir, &mut client, left().min(SETTLE))?;
    std::fs::remove_file(&note).map_err(transfer("the note that it stands still"))
}

/// A connection to the runtime of the VM in `dir`, which goes on first if it was left frozen.
///
/// # Errors
/// Those of [`RuntimeClient::connect`].
pub(crate) fn connect(dir: &VmDir, timeout: Duration) -> Result<RuntimeClient, RuntimeError> {
    // What keeps it from being mended keeps its runtime from answering: that is told then.
    let _ = mend(dir, timeout);
    RuntimeClient::connect(&dir.vsock_socket(), timeout)
}

/// As [`mend`], for a VM that nobody asks anything of just now: it waits for nobody, and trouble is told
/// to whoever needs the VM.
pub(crate) fn mend_idle(dir: &VmDir) {
    let is_free = || File::open(dir.path()).is_ok_and(|folder| folder.try_lock().is_ok());
    if dir.standstill().exists() && is_free() {
        let _ = mend(dir, BRIEF);
    }
}

/// The lock is ours. What the runtime was told before may still go on: it is asked until it has settled.
fn wake_again(
    dir: &VmDir,
    client: &mut RuntimeClient,
    patience: Duration,
) -> Result<(), FreezeError> {
    let end = Instant::now() + patience;
    let noted = std::fs::read_to_string(dir.standstill()).unwrap_or_default();
    let is_generation = (1..=MAX_GENERATION).contains(&noted.len())
        && noted.bytes().all(|byte| byte.is_ascii_alphanumeric());
    let generation = match is_generation {
        true => noted,
        // Killed before it was written.
        false => machine_id()?,
    };
    loop {
        match wake(client, &Waking::itself(dir, &generation)) {
            Err(FreezeError::Runtime {
                source: RuntimeError::Call(_),
                ..
            }) if Instant::now() < end => std::thread::sleep(ASK),
            woken => {
                woken?;
                note_disks(dir);
                return Ok(());
            }
        }
    }
}

/// Whoever was killed may not have written down where the VM goes on.
fn note_disks(dir: &VmDir) {
    let status = Control::new(dir.control_socket(), CONTROL_TIMEOUT).status();
    if let (Ok(status), Some(root)) = (status, dir.path().parent()) {
        // The next freeze writes it down as well.
        let _ = Store::new(root).update(dir, |record| record.goes_on_in(&status.disks));
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;
    use std::path::Path;
    use std::thread::JoinHandle;

    use ratoon_protocol::{ErrorCode, ErrorReply, Frame, Kind};
    use ratoon_vmm_api::HostClass;

    use super::*;
    use crate::vm::record::Record;
    use crate::vm::record::tests::config;

    const PATIENCE: Duration = Duration::from_secs(60);

    /// A runtime's stand-in behind the vsock socket: refuses `busy` wakes, then takes one, and ends with
    /// its words.
    fn runtime(dir: &VmDir, busy: usize) -> JoinHandle<Vec<String>> {
        let listener = UnixListener::bind(dir.vsock_socket()).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut bytes = [0; 4096];
            let len = stream.read(&mut bytes).unwrap();
            assert_eq!(&bytes[..len], b"CONNECT 1024\n");
            stream.write_all(b"OK 1073741824\n").unwrap();
            let hello = br#"{"runtime":"0.1.0","methods":["wake"],"ready_at_us":1}"#;
            let hello = Frame::new(Kind::Hello, 0, hello.to_vec());
            stream.write_all(&hello.encode()).unwrap();
            let mut said = Vec::new();
            while said.len() <= busy {
                let len = stream.read(&mut bytes).unwrap();
                let call = u64::from_le_bytes(bytes[8..16].try_into().unwrap());
                said.push(String::from_utf8_lossy(&bytes[24..len]).into_owned());
                let (kind, json) = match said.len() <= busy {
                    true => {
                        let error = ErrorReply::new(ErrorCode::Busy, "a freeze is under way");
                        (Kind::Error, serde_json::to_vec(&error).unwrap())
                    }
                    false => {
                        let awake = br#"{"generation":"g","id":"i","index":0,"wakes":1}"#;
                        (Kind::Reply, awake.to_vec())
                    }
                };
                stream
                    .write_all(&Frame::new(kind, call, json).encode())
                    .unwrap();
            }
            said
        })
    }

    fn folder() -> (tempfile::TempDir, VmDir) {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("0123456789ab");
        std::fs::create_dir(&path).unwrap();
        (temp, VmDir::new(path))
    }

    #[test]
    fn a_vm_that_nobody_froze_is_not_spoken_to() {
        let (_temp, dir) = folder();
        // There is no runtime: a word to it would fail.
        mend(&dir, PATIENCE).unwrap();
        mend_idle(&dir);
    }

    #[test]
    fn a_vm_that_was_left_frozen_is_woken_as_itself_when_its_runtime_is_ready_for_it() {
        let (_temp, dir) = folder();
        std::fs::write(dir.standstill(), "abc123").unwrap();
        let runtime = runtime(&dir, 2);
        mend(&dir, PATIENCE).unwrap();
        let said = runtime.join().unwrap();
        assert_eq!(said.len(), 3);
        let wake: serde_json::Value = serde_json::from_str(&said[2]).unwrap();
        assert_eq!(wake["method"], "wake");
        assert_eq!(wake["params"]["generation"], "abc123");
        assert_eq!(wake["params"]["id"], "0123456789ab");
        assert_eq!(wake["params"]["thaw"], true);
        // Its own clock never stopped.
        assert!(wake["params"]["time_us"].is_null());
        assert!(!dir.standstill().exists());
        // It is mended once.
        mend(&dir, PATIENCE).unwrap();
    }

    /// A VMM's stand-in behind the control socket: says once that its disk goes on in `layer`, over `frozen`.
    fn vmm(dir: &VmDir, frozen: &Path, layer: &Path) -> JoinHandle<()> {
        let listener = UnixListener::bind(dir.control_socket()).unwrap();
        let status = serde_json::json!({
            "id": dir.id(), "state": "running", "version": "0", "pid": 1, "vcpus": 1, "memory_mib": 1,
            "host_class": HostClass::Hardware, "uptime_ms": 1,
            "disks": [{"id": "root", "frozen": [frozen], "layer": layer}],
        });
        let body = status.to_string();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut bytes = [0; 4096];
            let len = stream.read(&mut bytes).unwrap();
            assert!(bytes[..len].starts_with(b"GET /v1/status"));
            let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close";
            write!(
                stream,
                "{head}\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            )
            .unwrap();
        })
    }

    #[test]
    fn where_a_vm_goes_on_whose_freezer_was_killed_is_written_down() {
        let (_temp, dir) = folder();
        let [before, now] = ["layer.qcow2", "layer-1.qcow2"].map(|name| dir.path().join(name));
        let mut record = Record::new(config(&dir.id()), None, None);
        let disk = serde_json::json!({"id": "root", "path": "/d", "layer": before});
        record.config.disks = vec![serde_json::from_value(disk).unwrap()];
        dir.write_record(&record).unwrap();
        std::fs::write(dir.standstill(), "abc123").unwrap();
        let (runtime, vmm) = (runtime(&dir, 0), vmm(&dir, &before, &now));
        mend(&dir, PATIENCE).unwrap();
        let disk = dir.read_record().unwrap().config.disks.swap_remove(0);
        assert_eq!((disk.frozen, disk.layer), (vec![before], Some(now)));
        runtime.join().unwrap();
        vmm.join().unwrap();
    }

    #[test]
    fn who_is_at_work_is_waited_for_and_not_disturbed() {
        let (_temp, dir) = folder();
        std::fs::write(dir.standstill(), "abc123").unwrap();
        let other = File::open(dir.path()).unwrap();
        other.lock().unwrap();
        let patience = Duration::from_millis(30);
        match mend(&dir, patience) {
            Err(FreezeError::Busy { after }) => assert_eq!(after, patience),
            other => panic!("{other:?}"),
        }
        mend_idle(&dir);
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| mend(&dir, PATIENCE));
            std::fs::remove_file(dir.standstill()).unwrap();
            drop(other);
            waits.join().unwrap().unwrap();
        });
    }

    #[test]
    fn what_killed_processes_left_in_its_folder_goes_and_what_living_ones_use_stays() {
        let (_temp, dir) = folder();
        let dead = std::process::Command::new("true").spawn().unwrap();
        let dead_pid = dead.id();
        dead.wait_with_output().unwrap();
        for name in [
            format!("freeze-{dead_pid}-0.sock"),
            format!("merged-{dead_pid}-7.qcow2"),
            "layer-1.qcow2".into(),
        ] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let mut used = [dir.merged_layer(), dir.merged_layer(), dir.freeze_socket()];
        for path in &used {
            std::fs::write(path, "").unwrap();
        }
        dir.sweep_left();
        let left = std::fs::read_dir(dir.path()).unwrap();
        let left = left.map(|entry| entry.unwrap().path());
        let mut left: Vec<_> = left
            .filter(|path| *path != dir.path().join("layer-1.qcow2"))
            .collect();
        left.sort();
        used.sort();
        assert_eq!(left, used);
    }

    #[test]
    fn a_vm_that_cannot_be_reached_stays_noted() {
        let (_temp, dir) = folder();
        std::fs::write(dir.standstill(), "").unwrap();
        match mend(&dir, PATIENCE) {
            Err(FreezeError::Runtime { source, .. }) => assert!(source.is_about_connection()),
            other => panic!("{other:?}"),
        }
        assert!(dir.standstill().exists());
    }
}
