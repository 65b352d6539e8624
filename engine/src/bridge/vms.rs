//! VMs that may call models: what the bridge is told of them, and their tokens.
//!
//! A VM's `agent.json` says that it is one. So whoever freezes it, removes it, or starts another bridge knows, by
//! whichever command: each wake of such a VM names a new token and ends the older ones, so that no generation holds one
//! that is good.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::Duration;

use ratoon_bridge_api::amount::Limits;
use ratoon_bridge_api::control::{
    AddVm, Client, MAX_TOKEN_TTL_S, MintToken, RemoveVm, Reply, Request, Token,
};
use ratoon_protocol::{BRIDGE_PORT, Call, FileRemove, FileWrite, Transferred};
use serde::{Deserialize, Serialize};

use super::process::{BRIEF, CALL_TIMEOUT, strange, sweep};
use super::{BridgeError, io, write_json};
use crate::runtime::{CallIo, RuntimeClient, RuntimeError};
use crate::vm::record::VmDir;
use crate::vm::standstill;
use crate::vm::store::Store;

/// Where a guest has its token.
const TOKEN_FILE: &str = "/run/ratoon/token";
/// How long a runtime may take to accept a connection, and to remove a file.
const GUEST_TIMEOUT: Duration = Duration::from_secs(60);

/// A VM that may call models.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentVm {
    /// The bridge's control socket.
    pub control: PathBuf,
    /// Its run.
    pub run: String,
    /// Its branch of the run.
    pub branch: String,
    /// The branch that it comes from.
    #[serde(default)]
    pub parent: Option<String>,
    /// The models that it may use.
    pub models: Vec<String>,
    /// A file for the hashes of records' last lines, a line for each VM that has gone: `BRANCH=HASH`.
    pub heads: PathBuf,
}

/// How children of a fork come to their branches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentFork {
    /// The VM that is forked.
    pub parent: AgentVm,
    /// The branch of each child, by its index; none: the only child goes on as its parent's.
    pub branches: Vec<String>,
    /// What each of them may use.
    pub budget: Limits,
}

impl AgentVm {
    /// What is written about the VM in `dir`; `None`: it calls no models.
    pub fn read(dir: &VmDir) -> Option<Self> {
        let bytes = std::fs::read(dir.agent_note()).ok()?;
        serde_json::from_slice(&bytes).ok()
    }
}

impl AgentFork {
    /// For the one child that goes on with a VM's branch: that VM is gone.
    pub fn resumed(vm: AgentVm) -> Self {
        Self {
            parent: vm,
            branches: Vec::new(),
            budget: Limits::default(),
        }
    }

    /// Tells the bridge of the child in `dir`, and gives its token.
    pub(crate) fn introduce(&self, dir: &VmDir, index: u32) -> Result<String, BridgeError> {
        let parent = &self.parent;
        let vm = match self.branches.get(index as usize) {
            None => parent.clone(),
            Some(branch) => AgentVm {
                branch: branch.clone(),
                parent: Some(parent.branch.clone()),
                ..parent.clone()
            },
        };
        introduce(dir, &vm, self.budget).map(|token| token.0)
    }
}

/// Tells the bridge that listens there of the VM in `dir`, and gives its token. A branch that is there goes on.
pub(super) fn introduce(dir: &VmDir, vm: &AgentVm, budget: Limits) -> Result<Token, BridgeError> {
    let mut client = Client::connect(&vm.control, CALL_TIMEOUT)?;
    let mut socket = dir.vsock_socket().into_os_string();
    socket.push(format!("_{BRIDGE_PORT}"));
    let note = dir.agent_note();
    write_json(&note, vm).map_err(io("writing", &note))?;
    let added = client.call(&Request::AddVm(AddVm {
        vm: dir.id(),
        socket: socket.into(),
        run: vm.run.clone(),
        branch: vm.branch.clone(),
        parent: vm.parent.clone(),
        budget,
        models: Some(vm.models.clone()),
    }));
    if let Err(error) = added {
        let _ = std::fs::remove_file(&note);
        return Err(error.into());
    }
    mint(&mut client, &dir.id(), true)
}

pub(super) fn mint(
    client: &mut Client,
    vm: &str,
    revoke_older: bool,
) -> Result<Token, BridgeError> {
    let request = Request::MintToken(MintToken {
        vm: vm.to_owned(),
        ttl_s: MAX_TOKEN_TTL_S,
        revoke_older,
    });
    match client.call(&request)? {
        Reply::Token { token, .. } => Ok(token),
        _ => Err(strange()),
    }
}

/// Writes a token into the guest of the VM in `dir`.
pub(super) fn hand_over(dir: &VmDir, token: &Token) -> Result<(), BridgeError> {
    let written = standstill::connect(dir, GUEST_TIMEOUT)
        .and_then(|mut client| write_token(&mut client, token));
    written.map_err(|source| BridgeError::Runtime {
        vm: dir.id(),
        source,
    })
}

/// Writes a token into the guest: root's alone, in memory.
///
/// # Errors
/// Those of the call.
pub fn write_token(client: &mut RuntimeClient, token: &Token) -> Result<(), RuntimeError> {
    let (read, mut write) = std::io::pipe().map_err(RuntimeError::Input)?;
    // It fits the pipe.
    write
        .write_all(token.0.as_bytes())
        .map_err(RuntimeError::Input)?;
    drop(write);
    let call = Call::FileWrite(FileWrite {
        path: TOKEN_FILE.into(),
        mode: Some(0o600),
        owner: Some("root".into()),
        parents: true,
        ..FileWrite::default()
    });
    let mut io = CallIo {
        stdin: Some(read.as_fd()),
        stdout: &mut std::io::sink(),
        stderr: &mut std::io::sink(),
        data: &mut std::io::sink(),
        events: &mut |_| {},
        ended: &mut |_| {},
    };
    client.run::<Transferred>(&call, &mut io).map(drop)
}

/// For a wake of the VM in `dir` as itself: a new token, after which older ones are good for nothing. `None`: it calls
/// no models, or there is no bridge (who starts another one gives it a token).
pub(crate) fn token_for(dir: &VmDir) -> Option<String> {
    let vm = AgentVm::read(dir)?;
    let minted = Client::connect(&vm.control, BRIEF)
        .map_err(BridgeError::from)
        .and_then(|mut client| mint(&mut client, &dir.id(), true));
    match minted {
        Ok(token) => Some(token.0),
        Err(error) => {
            tracing::warn!(%error, "VM {} wakes without a token", dir.id());
            None
        }
    }
}

/// Before the VM in `dir` is frozen, its processes standing still: its token's file goes. (That it is revoked at the
/// wake is what counts; so it is not even lying about.)
pub(crate) fn forget_token_of(dir: &VmDir, client: &mut RuntimeClient) {
    if !dir.agent_note().exists() {
        return;
    }
    let call = Call::FileRemove(FileRemove {
        path: TOKEN_FILE.into(),
        missing_ok: true,
        ..FileRemove::default()
    });
    let removed: Result<Transferred, _> = client.call(&call, "removed a file", GUEST_TIMEOUT);
    if let Err(error) = removed {
        tracing::warn!(%error, "the token of VM {}", dir.id());
    }
}

/// The VM in `dir` goes: its bridge, if it has one, forgets it, and ends when it was the last.
pub(crate) fn forget(store: &Store, dir: &VmDir) {
    let Some(vm) = AgentVm::read(dir) else {
        return;
    };
    crate::steps::forget(store, dir, &vm);
    let Ok(mut client) = Client::connect(&vm.control, CALL_TIMEOUT) else {
        return;
    };
    remove(&mut client, dir);
    drop(client);
    if let Some(folder) = vm.control.parent() {
        sweep(folder, store, true);
    }
}

/// Removes a VM from the bridge and keeps its record's head. `false`: the bridge still has it.
pub(super) fn remove(client: &mut Client, dir: &VmDir) -> bool {
    let request = Request::RemoveVm(RemoveVm { vm: dir.id() });
    let head = match client.call(&request) {
        Ok(Reply::VmRemoved { head }) => head,
        Ok(_) => return true,
        Err(error) => {
            tracing::warn!(%error, "VM {} at the bridge", dir.id());
            return matches!(error, ratoon_bridge_api::control::ClientError::Refused(_));
        }
    };
    if let Some(vm) = AgentVm::read(dir) {
        let mut options = OpenOptions::new();
        let kept = options
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&vm.heads)
            .and_then(|mut file| file.write_all(format!("{}={head}\n", vm.branch).as_bytes()));
        if let Err(error) = kept {
            tracing::warn!(%error, "keeping a head in {}", vm.heads.display());
        }
    }
    true
}
