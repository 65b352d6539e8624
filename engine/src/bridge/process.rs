//! Finding the bridge's process, starting it, ending it.
//!
//! ```text
//!   none --ensure--> starting --listens--> running --stop, or no VM is left--> none
//!                       `- ended first: told with its last words    `- died: none, found by its start time
//! ```

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ratoon_bridge_api::amount::Limits;
use ratoon_bridge_api::control::{
    BranchUsage, Client, ClientError, Reply, Request, Rested, Token, UsageOf,
};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};

use super::vms::{self, AgentVm};
use super::{BridgeConfig, BridgeError, Keys, io, write_json};
use crate::pager;
use crate::vm::process::ProcessRef;
use crate::vm::record::VmDir;
use crate::vm::store::Store;

/// How long the folder's lock is waited for: whoever has it may be starting a bridge.
const LOCK_PATIENCE: Duration = Duration::from_secs(150);
/// How long a bridge may take to listen: the command that gives a key may ask a person.
const START_TIMEOUT: Duration = Duration::from_secs(120);
/// How often it is looked whether it listens.
const LOOK: Duration = Duration::from_millis(10);
/// How long it may take to answer. Removing a VM waits for its calls' ends.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(15);
/// How long, for a command that is about something else, or while a VM stands still.
pub(super) const BRIEF: Duration = Duration::from_secs(3);
/// How long it may take to end when it is told to.
const END_TIMEOUT: Duration = Duration::from_secs(15);
/// One without a VM for so long after its start was started by a command that was killed then.
const FORGOTTEN: Duration = Duration::from_secs(600);
/// So much of its log's end is looked at for its last words, in bytes.
const LAST_WORDS: usize = 4096;

/// The bridge of a state directory. See the module.
#[derive(Debug, Clone)]
pub struct Bridge {
    folder: PathBuf,
    program: PathBuf,
    store: Store,
}

/// A bridge that runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    /// Its process.
    pub process: ProcessRef,
    /// Its configuration.
    pub config: PathBuf,
    /// BLAKE3 of that file when it was started.
    pub digest: String,
    /// Where it records runs.
    pub records: PathBuf,
}

impl Bridge {
    pub(super) fn new(folder: PathBuf, program: PathBuf, store: Store) -> Self {
        Self {
            folder,
            program,
            store,
        }
    }

    /// Its control socket.
    pub fn control(&self) -> PathBuf {
        self.folder.join("control.sock")
    }

    /// Its log.
    pub fn log(&self) -> PathBuf {
        self.folder.join("bridge.log")
    }

    /// The process, if it runs.
    pub fn running(&self) -> Option<Running> {
        running(&self.folder)
    }

    /// Makes sure that one runs: the one that is there, whatever its configuration, or one with this.
    ///
    /// # Errors
    /// [`BridgeError`].
    pub fn ensure_any(&self, config: &BridgeConfig, keys: &Keys) -> Result<(), BridgeError> {
        let _lock = self.lock()?;
        match self.running() {
            Some(_) => Ok(()),
            None => self.ensure_locked(config, keys),
        }
    }

    /// Makes sure that it runs with this configuration.
    ///
    /// # Errors
    /// [`BridgeError`].
    pub fn ensure(&self, config: &BridgeConfig, keys: &Keys) -> Result<(), BridgeError> {
        let _lock = self.lock()?;
        self.ensure_locked(config, keys)
    }

    /// Tells it of a VM that may call models from now on, and gives the VM's token. It is started if need be.
    ///
    /// # Errors
    /// [`BridgeError`]; the VM cannot call models then.
    pub fn add(
        &self,
        (config, keys): (&BridgeConfig, &Keys),
        dir: &VmDir,
        vm: &AgentVm,
        budget: Limits,
    ) -> Result<Token, BridgeError> {
        // Until the VM is there, nobody ends it for want of one.
        let _lock = self.lock()?;
        self.ensure_locked(config, keys)?;
        vms::introduce(dir, vm, budget)
    }

    /// Gives a VM that it knows another token, which is written into the guest. Older ones live on until they expire.
    ///
    /// # Errors
    /// [`BridgeError`].
    pub fn renew_token(&self, dir: &VmDir) -> Result<(), BridgeError> {
        let token = vms::mint(&mut self.client()?, &dir.id(), false)?;
        vms::hand_over(dir, &token)
    }

    /// The VM goes on, which stood still for the host's sake: that is none of its run's time.
    ///
    /// # Errors
    /// [`BridgeError`].
    pub fn rested(&self, dir: &VmDir) -> Result<(), BridgeError> {
        let request = Request::Rested(Rested { vm: dir.id() });
        self.client()?.call(&request)?;
        Ok(())
    }

    /// A VM that is about to go calls no more models. The bridge ends when it was the last.
    pub fn remove(&self, dir: &VmDir) {
        vms::forget(&self.store, dir);
    }

    /// What a run has used, by branch.
    ///
    /// # Errors
    /// [`BridgeError`].
    pub fn usage(&self, run: &str) -> Result<Vec<BranchUsage>, BridgeError> {
        let request = Request::Usage(UsageOf { run: run.into() });
        match self.client()?.call(&request)? {
            Reply::Usage { branches } => Ok(branches),
            _ => Err(strange()),
        }
    }

    /// The ids of VMs that it knows.
    ///
    /// # Errors
    /// [`BridgeError`].
    pub fn vms(&self) -> Result<Vec<String>, BridgeError> {
        vms_of(&mut self.client()?)
    }

    /// Removes VMs that have gone, and ends it when none is left.
    pub fn sweep(&self) {
        sweep(&self.folder, &self.store, true);
    }

    /// Ends it, whoever still needs it. `false`: it did not run.
    ///
    /// # Errors
    /// [`BridgeError`].
    pub fn stop(&self) -> Result<bool, BridgeError> {
        let _lock = self.lock()?;
        end(&self.folder)
    }

    pub(super) fn client(&self) -> Result<Client, BridgeError> {
        if self.running().is_none() {
            return Err(BridgeError::NotRunning);
        }
        Ok(Client::connect(&self.control(), CALL_TIMEOUT)?)
    }

    fn lock(&self) -> Result<File, BridgeError> {
        pager::lock(&self.folder, LOCK_PATIENCE).map_err(io("locking", &self.folder))
    }

    fn ensure_locked(&self, config: &BridgeConfig, keys: &Keys) -> Result<(), BridgeError> {
        if let Some(running) = self.running() {
            if running.digest == config.digest {
                return Ok(());
            }
            if !self.vms()?.is_empty() {
                return Err(BridgeError::Other {
                    running: running.config,
                });
            }
            end(&self.folder)?;
        }
        self.start(config, keys)?;
        self.tell_of_vms();
        Ok(())
    }

    fn start(&self, config: &BridgeConfig, keys: &Keys) -> Result<(), BridgeError> {
        let log = self.log();
        let mut options = OpenOptions::new();
        // What an earlier one had to say is of no use any more.
        let file = options.write(true).create(true).truncate(true).mode(0o600);
        let file = file.open(&log).map_err(io("writing", &log))?;
        let mut command = Command::new(&self.program);
        command
            .args(["serve", "--config"])
            .arg(&config.path)
            .arg("--control")
            .arg(self.control())
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(file)
            // ^C at the terminal is the command's.
            .process_group(0);
        keys.give(&mut command);
        let mut child = command.spawn().map_err(|source| BridgeError::Program {
            program: self.program.clone(),
            source,
        })?;
        if let Err(error) = self.wait_until_it_listens(&mut child, config) {
            let _ = child.kill();
            let _ = child.wait();
            return Err(error);
        }
        // It may end before this process: somebody has to take note, or it stays a zombie.
        let _ = std::thread::Builder::new()
            .name("bridge".into())
            .spawn(move || child.wait());
        Ok(())
    }

    fn wait_until_it_listens(
        &self,
        child: &mut Child,
        config: &BridgeConfig,
    ) -> Result<(), BridgeError> {
        let failed = |why: String| BridgeError::Start {
            why,
            log: self.log(),
        };
        let end = Instant::now() + START_TIMEOUT;
        loop {
            let process = i32::try_from(child.id()).ok().and_then(ProcessRef::of);
            // It listens before it has given up all that it does not need, and answers after.
            let vms = Client::connect(&self.control(), CALL_TIMEOUT)
                .map_err(BridgeError::from)
                .and_then(|mut client| vms_of(&mut client));
            if let (Some(process), Ok(_)) = (process, vms) {
                let state = Running {
                    process,
                    config: config.path.clone(),
                    digest: config.digest.clone(),
                    records: config.records.clone(),
                };
                let path = state_file(&self.folder);
                return write_json(&path, &state).map_err(io("writing", &path));
            }
            match child.try_wait() {
                Ok(Some(status)) => {
                    return Err(failed(
                        last_words(&self.log())
                            .unwrap_or_else(|| format!("it ended ({status}) without a word")),
                    ));
                }
                _ if Instant::now() > end => {
                    let within = START_TIMEOUT.as_secs();
                    return Err(failed(format!("it did not listen within {within} s")));
                }
                _ => std::thread::sleep(LOOK),
            }
        }
    }

    /// VMs that the one before knew. What cannot be told is told to whoever needs that VM.
    fn tell_of_vms(&self) {
        for entry in self.store.list().unwrap_or_default() {
            let lives = entry.record.as_ref().is_ok_and(|it| it.vmm_is_alive());
            let Some(vm) = AgentVm::read(&entry.dir).filter(|_| lives) else {
                continue;
            };
            let told = vms::introduce(&entry.dir, &vm, Limits::default())
                .and_then(|token| vms::hand_over(&entry.dir, &token));
            if let Err(error) = told {
                tracing::warn!(%error, "VM {} at the new bridge", entry.dir.id());
            }
        }
    }
}

pub(super) fn strange() -> BridgeError {
    BridgeError::Client(ClientError::Refused(
        "an answer to another question: its version is not this one's".into(),
    ))
}

pub(super) fn vms_of(client: &mut Client) -> Result<Vec<String>, BridgeError> {
    match client.call(&Request::Status {})? {
        Reply::Status { vms, .. } => Ok(vms),
        _ => Err(strange()),
    }
}

fn state_file(folder: &Path) -> PathBuf {
    folder.join("process.json")
}

pub(super) fn running(folder: &Path) -> Option<Running> {
    let bytes = std::fs::read(state_file(folder)).ok()?;
    let running: Running = serde_json::from_slice(&bytes).ok()?;
    running.process.is_alive().then_some(running)
}

/// With the lock held.
fn end(folder: &Path) -> Result<bool, BridgeError> {
    let state = state_file(folder);
    let process = running(folder).and_then(|running| running.process.open());
    if let Some(process) = &process {
        for signal in [Signal::TERM, Signal::KILL] {
            process
                .signal(signal)
                .map_err(io("ending the bridge of", folder))?;
            let ended = process.wait(END_TIMEOUT);
            if ended.map_err(io("ending the bridge of", folder))? {
                break;
            }
        }
    }
    let _ = std::fs::remove_file(state);
    // It has a user of its own, to whom this folder is closed.
    let _ = std::fs::remove_file(folder.join("control.sock"));
    Ok(process.is_some())
}

/// Removes VMs that have gone from the bridge of this folder, and ends it when it has lost its last one (with
/// `if_idle`: when it has none). Whoever is at work with it is not disturbed, and trouble is told to whoever needs it.
pub(crate) fn sweep(folder: &Path, store: &Store, if_idle: bool) {
    let Ok(state) = std::fs::metadata(state_file(folder)) else {
        return;
    };
    let age = state.modified().ok().and_then(|begun| begun.elapsed().ok());
    let is_forgotten = age.is_some_and(|age| age > FORGOTTEN);
    let Ok(_lock) = pager::lock(folder, Duration::ZERO) else {
        return;
    };
    if running(folder).is_none() {
        // A VM that lives needs another bridge: the next `ratoon agent` command starts it.
        return;
    }
    let Ok(mut client) = Client::connect(&folder.join("control.sock"), BRIEF) else {
        return;
    };
    let Ok(mut left) = vms_of(&mut client) else {
        return;
    };
    let before = left.len();
    left.retain(|id| {
        let dir = VmDir::new(store.root().join(id));
        let lives = dir.read_record().is_ok_and(|record| {
            record.vmm_is_alive() || (record.vmm.is_none() && record.owner_is_alive())
        });
        lives || !vms::remove(&mut client, &dir)
    });
    if left.is_empty() && (before > 0 || if_idle || is_forgotten) {
        drop(client);
        let _ = end(folder);
    }
}

/// The last line of a log that says something, without control characters.
fn last_words(log: &Path) -> Option<String> {
    let bytes = std::fs::read(log).ok()?;
    let end = &bytes[bytes.len().saturating_sub(LAST_WORDS)..];
    let text = String::from_utf8_lossy(end);
    let line = text.lines().rev().find(|line| !line.trim().is_empty())?;
    let line = line.trim_start_matches("ratoon-bridge: ");
    Some(line.chars().filter(|c| !c.is_control()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bridge(folder: &Path, program: &str) -> (Bridge, BridgeConfig) {
        let config = folder.join("bridge.json");
        let records = folder.join("runs").display().to_string();
        let json = serde_json::json!({"records": records, "providers": []});
        std::fs::write(&config, json.to_string()).unwrap();
        let store = Store::new(folder.join("vms"));
        let bridge = Bridge::new(folder.join("bridge"), program.into(), store);
        (bridge, BridgeConfig::read(&config).unwrap())
    }

    #[test]
    fn a_bridge_that_ends_before_it_listens_is_told_with_its_last_words() {
        let temp = tempfile::tempdir().unwrap();
        let program = temp.path().join("bridge.sh");
        std::fs::write(
            &program,
            "#!/bin/sh\necho 'ratoon-bridge: no key' >&2\nexit 1\n",
        )
        .unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&program, mode).unwrap();
        let (bridge, config) = bridge(temp.path(), &program.display().to_string());
        match bridge.ensure(&config, &Keys::default()).unwrap_err() {
            BridgeError::Start { why, .. } => assert_eq!(why, "no key"),
            other => panic!("{other:?}"),
        }
        assert!(bridge.running().is_none());
        assert!(!bridge.stop().unwrap());
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let temp = tempfile::tempdir().unwrap();
        let (bridge, config) = bridge(temp.path(), "/none/ratoon-bridge");
        let error = bridge.ensure(&config, &Keys::default()).unwrap_err();
        assert!(error.to_string().contains("/none/ratoon-bridge"), "{error}");
        let error = bridge.usage("run").unwrap_err();
        assert!(matches!(error, BridgeError::NotRunning), "{error}");
    }

    #[test]
    fn a_bridge_that_died_does_not_run() {
        let temp = tempfile::tempdir().unwrap();
        let mut process = ProcessRef::current().unwrap();
        let state = |process: &ProcessRef| Running {
            process: process.clone(),
            config: "/c".into(),
            digest: "d".into(),
            records: "/r".into(),
        };
        write_json(&state_file(temp.path()), &state(&process)).unwrap();
        assert!(running(temp.path()).is_some());
        process.start_ticks += 1;
        write_json(&state_file(temp.path()), &state(&process)).unwrap();
        assert!(running(temp.path()).is_none());
    }
}
