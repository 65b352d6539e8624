//! Making a generation of a running VM, and waking what comes out of it.
//!
//! ```text
//!   runtime: processes stopped, wake expected -> VMM: freeze -> files here
//!   VMM: prepares -------------------------------'        `---> runtime: wake, processes go on
//! ```
//!
//! The connection over which this is asked goes on in every child (the VMM is told which it is): `wake` is
//! simply the next call on it, without a handshake.
//!
//! Whatever fails, the VM goes on: a freeze that did not happen is undone. When this process is killed in
//! the middle, the next one that turns to the VM wakes it (`standstill.rs`).

use std::sync::mpsc;
use std::time::{Duration, SystemTime};

use ratoon_client::RuntimeError;
use ratoon_protocol::{Awake, Call, FreezeParams, NetworkSet, Wake};
use ratoon_vmm_api::FrozenDisk;

use super::control::ControlError;
use super::record::{Record, VmDir};
use super::standstill::Standstill;
use super::taking::Taking;
pub(crate) use super::taking::birth;
pub use super::taking::{Generation, MemoryLayer, take};
use crate::runtime::RuntimeClient;

/// How long the guest may take to stop or wake its processes.
const GUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the frozen VM waits with its wake, at most, for what is started first.
const HEAD_START: Duration = Duration::from_millis(10);

/// Why a VM could not be frozen, or a child not woken.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// The runtime in the guest.
    #[error("the runtime in the VM: {what}")]
    Runtime {
        /// What it was asked for.
        what: &'static str,
        /// Why not.
        #[source]
        source: RuntimeError,
    },
    /// The VMM.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// A socket, or what came over it.
    #[error("taking over the frozen VM: {what}")]
    Transfer {
        /// Which step.
        what: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Another process is in the middle of a freeze.
    #[error("another process has been freezing the VM for {} s; try again when it has ended", after.as_secs())]
    Busy {
        /// How long it was waited for.
        after: Duration,
    },
    /// The system has no random numbers.
    #[error("no random numbers: {0}")]
    Random(getrandom::Error),
}

fn guest(what: &'static str) -> impl FnOnce(RuntimeError) -> FreezeError {
    move |source| FreezeError::Runtime { what, source }
}

pub(super) fn transfer(what: &'static str) -> impl FnOnce(std::io::Error) -> FreezeError {
    move |source| FreezeError::Transfer { what, source }
}

/// Freezes the VM in `dir`, whose root disk goes on in [`VmDir::next_layer`]. `client` is a connection to its runtime; `generation` is how the VM and its children call it.
///
/// # Errors
/// [`FreezeError`]; the VM goes on.
pub fn freeze(
    dir: &VmDir,
    client: &mut RuntimeClient,
    generation: &str,
) -> Result<Generation, FreezeError> {
    freeze_and(dir, client, generation, |_| {}, |frozen, _| frozen)
}

/// The frozen VM is woken when all of these are dropped, or 10 ms after the freeze: its guest would take a
/// processor from what is started meanwhile.
#[derive(Debug, Clone)]
pub struct Before {
    _wake: mpsc::Sender<()>,
}

/// As [`freeze`]; what is to be done with the generation begins before the VM is woken. `note` is told with which disks
/// the VM goes on, while nobody else can freeze it or put it back.
///
/// # Errors
/// [`FreezeError`]; the VM goes on, unless it is that which failed.
pub fn freeze_and<T>(
    dir: &VmDir,
    client: &mut RuntimeClient,
    generation: &str,
    note: impl FnOnce(&[FrozenDisk]) + Send,
    then: impl FnOnce(Generation, Before) -> T,
) -> Result<T, FreezeError> {
    // Nobody else until the wake.
    let standstill = Standstill::begin(dir, client, generation)?;
    let taking = match Taking::begin(dir, Some(client.host_port())) {
        Ok(taking) => taking,
        Err(error) => {
            standstill.over();
            return Err(error);
        }
    };
    let still = FreezeParams {
        processes: true,
        file_systems: false,
        until_wake: true,
    };
    if let Err(error) =
        client.call::<()>(&Call::Freeze(still), "stopped its processes", GUEST_TIMEOUT)
    {
        if matches!(error, RuntimeError::Call(_)) {
            // It has undone what it had done.
            standstill.over();
        }
        return Err(guest("it cannot stop its processes")(error));
    }
    crate::bridge::forget_token_of(dir, client);
    let expected = client.call::<()>(&Call::ExpectWake, "expected its wake", GUEST_TIMEOUT);
    let frozen = expected
        .map_err(guest("it cannot wait for its wake"))
        .and_then(|()| taking.go());
    let (before, wait) = mpsc::channel();
    let before = Before { _wake: before };
    let disks = frozen.as_ref().ok().map(|frozen| frozen.disks.clone());
    let mut once = Some((standstill, note));
    let mut go_on = || {
        // Whether it was frozen or not, it goes on as itself.
        let woken = wake(client, &Waking::itself(dir, generation));
        let (standstill, note) = once.take().unzip();
        if let (Some(note), Some(disks)) = (note, &disks) {
            note(disks);
        }
        if let (Ok(_), Some(standstill)) = (&woken, standstill) {
            standstill.over();
        }
        woken
    };
    let mut woken = None;
    let beside = (&mut woken, &mut go_on);
    let done = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("wake".into());
        let _ = thread.spawn_scoped(scope, move || {
            let (woken, go_on) = beside;
            // Either way it is time.
            let _ = wait.recv_timeout(HEAD_START);
            *woken = Some(go_on());
        });
        frozen.map(|frozen| then(frozen, before))
    });
    // Without a thread one after the other.
    let woken = woken.unwrap_or_else(go_on);
    let done = done?;
    woken?;
    Ok(done)
}

/// Who a VM is from now on.
#[derive(Clone, Default)]
pub struct Waking {
    /// Its id.
    pub id: String,
    /// What it comes from.
    pub generation: String,
    /// Which child of a fork it is, from 0, if it is one.
    pub index: Option<u32>,
    /// It is another machine than the one that was frozen.
    pub child: Option<Child>,
    /// What it calls models with, if it does.
    pub token: Option<String>,
}

/// What a child has of its own; its clock is set too.
#[derive(Debug, Clone, Default)]
pub struct Child {
    /// How it is called by others.
    pub hostname: Option<String>,
    /// Hardware addresses of its network devices.
    pub macs: Vec<String>,
    /// What the forker has to say to it.
    pub message: Option<String>,
}

impl Child {
    /// What the VM of this record is to have.
    pub fn of(record: &Record) -> Self {
        let config = &record.config;
        let networks = config.networks.iter().enumerate();
        Self {
            hostname: Some(record.hostname()),
            macs: networks
                .map(|(index, net)| net.mac_of(&config.id, index))
                .collect(),
            message: None,
        }
    }
}

impl std::fmt::Debug for Waking {
    /// Without the token.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Waking")
            .field("id", &self.id)
            .field("generation", &self.generation)
            .field("index", &self.index)
            .field("child", &self.child)
            .finish_non_exhaustive()
    }
}

impl Waking {
    /// A VM of this id.
    pub fn of(id: String, generation: &str) -> Self {
        Self {
            id,
            generation: generation.into(),
            ..Self::default()
        }
    }

    /// The frozen VM in `dir` itself.
    pub(super) fn itself(dir: &VmDir, generation: &str) -> Self {
        Self {
            index: dir.read_record().ok().and_then(|record| record.index()),
            token: crate::bridge::token_for(dir),
            ..Self::of(dir.id(), generation)
        }
    }

    /// A child that has this record.
    pub fn child(record: &Record, generation: &str) -> Self {
        Self {
            index: record.index(),
            child: Some(Child::of(record)),
            ..Self::of(record.id.clone(), generation)
        }
    }
}

/// Tells a VM who it is from now on, and lets its processes go on.
///
/// # Errors
/// [`FreezeError::Runtime`]: a child that cannot be woken must not run.
pub fn wake(client: &mut RuntimeClient, waking: &Waking) -> Result<Awake, FreezeError> {
    let mut entropy = [0; 32];
    getrandom::fill(&mut entropy).map_err(FreezeError::Random)?;
    let mut wake = Wake {
        generation: waking.generation.clone(),
        id: waking.id.clone(),
        entropy: hex(&entropy),
        index: waking.index,
        token: waking.token.clone(),
        thaw: true,
        ..Wake::default()
    };
    if let Some(child) = &waking.child {
        wake.child = true;
        wake.hostname.clone_from(&child.hostname);
        wake.message.clone_from(&child.message);
        wake.machine_id = Some(machine_id()?);
        let device = |(index, mac): (usize, &String)| NetworkSet {
            device: Some(format!("eth{index}")),
            mac: Some(mac.clone()),
            ..NetworkSet::default()
        };
        wake.networks = child.macs.iter().enumerate().map(device).collect();
        // The last, so that it is not old when it is sent. The frozen VM's own clock never stopped.
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        wake.time_us = now.ok().map(|now| now.as_micros() as u64);
    }
    client
        .call(&Call::Wake(Box::new(wake)), "woken", GUEST_TIMEOUT)
        .map_err(guest("it cannot be woken"))
}

/// A machine-id of its own: 32 hexadecimal digits.
///
/// # Errors
/// [`FreezeError::Random`].
pub fn machine_id() -> Result<String, FreezeError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(FreezeError::Random)?;
    Ok(hex(&bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
