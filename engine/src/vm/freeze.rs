//! Making a generation of a running VM, and waking what comes out of it.
//!
//! ```text
//!   runtime: processes stopped, wake expected -> VMM: freeze -> files here
//!                                                   `-> runtime: wake, processes go on
//! ```
//!
//! The connection over which this is asked goes on in every child (the VMM is told which it is): `wake` is
//! simply the next call on it, without a handshake.
//!
//! Whatever fails, the VM goes on: a freeze that did not happen is undone. When this process is killed in
//! the middle, the next one that turns to the VM wakes it (`standstill.rs`).

use std::fs::File;
use std::io::{IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use ratoon_client::RuntimeError;
use ratoon_protocol::{Awake, Call, FreezeParams, NetworkSet, Wake};
use ratoon_vmm_api::{FreezeRequest, FrozenDisk, FrozenMeta, Run};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::control::{Control, ControlError};
use super::process::timespec;
use super::record::{Record, VmDir};
use super::standstill::Standstill;
use crate::lineage::ROOT;
use crate::runtime::RuntimeClient;

/// How long the guest may take to stop or wake its processes.
const GUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the VMM may take: it copies what was written to memory since the last freeze.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(300);
/// How often the wait for the generation looks whether the VMM has refused.
const LOOK: Duration = Duration::from_millis(20);
/// The longest state that is taken, in bytes.
const MAX_META_LEN: u64 = 64 << 20;

/// A frozen VM: immutable files, and its state.
#[derive(Debug)]
pub struct Generation {
    /// The VMM's blob.
    pub state: String,
    /// The memory's layers, the lowest first.
    pub layers: Vec<MemoryLayer>,
    /// Its disks' layers, immutable but for the topmost, in which the VM goes on.
    pub disks: Vec<FrozenDisk>,
    /// How long no vCPU ran.
    pub pause: Duration,
    /// When the VMM was asked for it: its guest was at rest then.
    pub asked: Instant,
    /// The host's vsock port of the connection to the runtime that goes on in children, if it was named.
    pub control_port: Option<u32>,
}

/// One layer of frozen memory.
#[derive(Debug)]
pub struct MemoryLayer {
    /// The file.
    pub file: File,
    /// Which parts of memory it has.
    pub runs: Vec<Run>,
    /// They are end to end in the file, not where they are in memory.
    pub packed: bool,
    /// How many freezes it stands for: layers of many are merged.
    pub freezes: u32,
}

impl Generation {
    /// The frozen layers of a disk, the lowest first.
    pub fn frozen(&self, disk: &str) -> &[PathBuf] {
        let disk = self.disks.iter().find(|it| it.id == disk);
        disk.map_or(&[], |disk| &disk.frozen)
    }

    /// How many layers of freezes each of [`Self::frozen`] stands for.
    pub fn freezes(&self, disk: &str) -> Vec<u32> {
        let disk = self.disks.iter().find(|it| it.id == disk);
        disk.map_or_else(Vec::new, |disk| disk.freezes().collect())
    }

    /// How many freezes its memory and this disk of it stand for: what is merged counts as what it was.
    pub fn depth(&self, disk: &str) -> (usize, usize) {
        let memory = self.layers.iter().map(|layer| layer.freezes as usize);
        let disk = self.freezes(disk).into_iter().map(|it| it as usize);
        (memory.sum(), disk.sum())
    }
}

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
    freeze_and(dir, client, generation, |frozen| frozen)
}

/// As [`freeze`]; what is to be done with the generation begins while the VM is woken.
///
/// # Errors
/// [`FreezeError`]; the VM goes on, unless it is that which failed.
pub fn freeze_and<T>(
    dir: &VmDir,
    client: &mut RuntimeClient,
    generation: &str,
    then: impl FnOnce(Generation) -> T,
) -> Result<T, FreezeError> {
    // Nobody else until the wake.
    let standstill = Standstill::begin(dir, client, generation)?;
    let still = FreezeParams {
        processes: true,
        file_systems: false,
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
    let expected = client.call::<()>(&Call::ExpectWake, "expected its wake", GUEST_TIMEOUT);
    let frozen = expected
        .map_err(guest("it cannot wait for its wake"))
        .and_then(|()| take(dir, Some(client.host_port())));
    // Whether it was frozen or not, it goes on as itself.
    let waking = Waking::itself(dir, generation);
    std::thread::scope(|scope| {
        let woken = scope.spawn(|| {
            let woken = wake(client, &waking);
            if woken.is_ok() {
                standstill.over();
            }
            woken
        });
        let done = frozen.map(then);
        let woken = match woken.join() {
            Ok(woken) => woken,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        let done = done?;
        woken?;
        Ok(done)
    })
}

/// Freezes the machine in `dir` as it is, without a word to its runtime: a child of it would not
/// wait for its wake. `control_port`: see [`FreezeRequest`].
///
/// # Errors
/// [`FreezeError`]; the VM goes on.
pub fn take(dir: &VmDir, control_port: Option<u32>) -> Result<Generation, FreezeError> {
    let begun = Instant::now();
    let socket = dir.freeze_socket();
    let _ = std::fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).map_err(transfer("a socket for it"))?;
    listener
        .set_nonblocking(true)
        .map_err(transfer("a socket for it"))?;
    let request = FreezeRequest {
        socket: socket.clone(),
        next_layers: [(ROOT.to_owned(), dir.next_layer())].into(),
        control_port,
    };
    let control = Control::new(dir.control_socket(), FREEZE_TIMEOUT);
    let taken = std::thread::scope(|scope| {
        let asked = scope.spawn(|| control.freeze(&request));
        let mut received = None;
        // It sends before it replies: once it has replied, what is to come is there.
        loop {
            let over = asked.is_finished();
            let mut fds = [PollFd::new(&listener, PollFlags::IN)];
            let _ = poll(&mut fds, Some(&timespec(LOOK)));
            if let Ok((stream, _)) = listener.accept() {
                received = Some(receive(&stream));
                break;
            }
            if over {
                break;
            }
        }
        let reply = match asked.join() {
            Ok(reply) => reply?,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        let (meta, files) = received
            .unwrap_or_else(|| Err(std::io::ErrorKind::UnexpectedEof.into()))
            .map_err(transfer("its files"))?;
        if meta.layers.len() != files.len() {
            let mismatch = std::io::Error::other("not as many files as layers");
            return Err(transfer("its files")(mismatch));
        }
        let layers = files.into_iter().zip(meta.layers);
        Ok(Generation {
            state: meta.state,
            layers: layers
                .map(|(file, layer)| MemoryLayer {
                    file,
                    runs: layer.runs,
                    packed: layer.packed,
                    freezes: layer.freezes,
                })
                .collect(),
            disks: meta.disks,
            pause: Duration::from_nanos(reply.pause_ns),
            asked: begun,
            control_port,
        })
    });
    let _ = std::fs::remove_file(&socket);
    taken
}

fn receive(stream: &UnixStream) -> std::io::Result<(FrozenMeta, Vec<File>)> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let mut fds = [PollFd::from_borrowed_fd(stream.as_fd(), PollFlags::IN)];
    poll(&mut fds, Some(&timespec(FREEZE_TIMEOUT)))?;
    recvmsg(
        stream,
        &mut [IoSliceMut::new(&mut byte)],
        &mut ancillary,
        flags,
    )?;
    let mut files: Vec<File> = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .map(|fd: OwnedFd| fd.into())
        .collect();
    if files.is_empty() {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    let mut json = Vec::new();
    let mut state = files.remove(0);
    std::io::Seek::rewind(&mut state)?;
    state.take(MAX_META_LEN).read_to_end(&mut json)?;
    Ok((serde_json::from_slice(&json)?, files))
}

/// Who a VM is from now on.
#[derive(Debug, Clone, Default)]
pub struct Waking {
    /// Its id.
    pub id: String,
    /// What it comes from.
    pub generation: String,
    /// Which child of a fork it is, from 0, if it is one.
    pub index: Option<u32>,
    /// It is another machine than the one that was frozen.
    pub child: Option<Child>,
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
