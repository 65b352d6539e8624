//! Freeze: a running machine becomes a generation, and goes on as its first child.
//!
//! ```text
//!   empty disk layers made, what was written to memory copied; the requester says that its guest is at rest
//!   vCPUs held -> devices locked, disks' tables written back -> state read -> the empty layers are
//!   |             the tops now -> memory mapped privately -> vCPUs run
//!   |---------------------------------- the pause -----------------------------------------| then
//!   the requester gets the files; the old mapping is torn down; the generation's file is sealed
//! ```
//!
//! Whatever fails before memory is touched leaves the machine as it was, maybe with a disk layer more. A failure after that (no
//! address space, no memory) may leave holes in it: the machine ends, and says so.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;
use ratoon_devices::virtio::mmio::MmioTransport;
use ratoon_vmm_api::{
    FreezeReply, FreezeRequest, FrozenDisk, FrozenLayer, FrozenMeta, HostClass, Outcome, VmState,
};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::bus::lock;
use crate::machine::{Machine, Refused};
use crate::memory::{self, Layer, MemoryError};
use crate::pager::PagerError;
use crate::state::{DeviceState, MachineState, StateError, VcpuState};
use crate::stats::wait_until_asleep;

/// So many files go with one message (the kernel's SCM_MAX_FD, less the two of the state).
const MAX_LAYERS: usize = 251;

/// Why a machine cannot be frozen.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// Its state does not allow it.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// A vCPU or KVM's devices.
    #[error(transparent)]
    State(#[from] StateError),
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The rest of its memory.
    #[error(transparent)]
    Pager(#[from] PagerError),
    /// A device cannot be brought to rest.
    #[error("device {name}")]
    Device {
        /// Which.
        name: String,
        /// Why.
        #[source]
        source: ratoon_devices::virtio::DeviceError,
    },
    /// The connection that is to go on.
    #[error(
        "no open connection has the host's vsock port {0}, so children could not be woken; connect \
         to the runtime again"
    )]
    NoControl(u32),
    /// A disk whose layer would not be frozen.
    #[error("disk {0} has a writable layer: say where its next one is to be made")]
    NoNextLayer(String),
    /// No such disk.
    #[error("there is no disk {0} to make a layer for")]
    NoDisk(String),
    /// The requester's socket.
    #[error("the socket {} for the generation", path.display())]
    Socket {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The requester has gone, or thought better of it.
    #[error("the freeze was given up before it began")]
    GivenUp,
    /// So many freezes that its memory has too many layers.
    #[error("the machine was frozen {MAX_LAYERS} times: restore it from a snapshot to go on")]
    TooManyLayers,
}

impl Machine {
    /// Makes a generation and sends it.
    ///
    /// # Errors
    /// [`FreezeError`]; the machine goes on, except after a failure of memory.
    pub fn freeze(&self, request: &FreezeRequest) -> Result<FreezeReply, FreezeError> {
        self.make_room();
        // All that may fail or take long and needs no pause.
        if let Some(pager) = &self.pager {
            pager.complete()?;
        }
        let socket =
            UnixStream::connect(&request.socket).map_err(|source| FreezeError::Socket {
                path: request.socket.clone(),
                source,
            })?;
        let kvm = |source| StateError::Kvm {
            what: "list of model-specific registers",
            source,
        };
        let msrs = Kvm::new().and_then(|kvm| kvm.get_msr_index_list());
        let msrs = msrs.map_err(kvm)?.as_slice().to_vec();

        let count = lock(&self.layers).len();
        if count >= MAX_LAYERS {
            return Err(FreezeError::TooManyLayers);
        }
        let ahead = match count {
            0 => None,
            _ => Some(memory::ahead(&self.memory)?),
        };
        self.prepare_disks(request)?;
        // No lock is held meanwhile: the guest runs until it is at rest, and so may a merge.
        let wanted = is_wanted(&socket);
        let from = Instant::now();
        if wanted && *lock(&self.state) == VmState::Running {
            // What it still does now would be done again by each child.
            wait_until_asleep(&self.vcpu_stats, self.patience());
        }
        let waited_ns = from.elapsed().as_nanos() as u64;
        let mut layers = lock(&self.layers);
        let frozen = match wanted {
            true => self.freeze_now(request, msrs, ahead, &mut layers),
            false => Err(FreezeError::GivenUp),
        };
        if frozen.is_err() {
            self.drop_prepared();
        }
        let (state, aside, pause_ns) = frozen?;
        memory::prune(&mut layers);
        let meta = FrozenMeta {
            pause_ns,
            waited_ns,
            layers: described(&layers),
            disks: self.frozen_disks(),
        };
        let json = state.to_json()?;
        let sent = file_with("ratoon-state", json.as_bytes())
            .and_then(|state| send(&socket, &meta, state.as_fd(), &layers));
        // Nobody waits for it.
        drop(aside);
        if let [first] = layers.as_slice() {
            // Nobody can write it any more; should a mapping linger, it is only not sealed.
            let _ = rustix::fs::fcntl_add_seals(&*first.file, SealFlags::WRITE);
        }
        sent.map_err(|source| FreezeError::Socket {
            path: request.socket.clone(),
            source,
        })?;
        Ok(FreezeReply { pause_ns })
    }

    /// How long a guest at rest may take until it sleeps: the way of its runtime from the last answer to the next wait.
    fn patience(&self) -> Duration {
        match self.class {
            HostClass::Emulated => Duration::from_millis(40),
            HostClass::Hardware => Duration::from_millis(1),
        }
    }

    /// The pause and its end; the state, and how long it took in nanoseconds.
    fn freeze_now(
        &self,
        request: &FreezeRequest,
        msrs: Vec<u32>,
        ahead: Option<memory::Ahead>,
        layers: &mut Vec<Layer>,
    ) -> Result<(MachineState, Option<memory::Aside>, u64), FreezeError> {
        let state = lock(&self.state);
        let was_running = match *state {
            VmState::Running => true,
            VmState::Paused => false,
            state => return Err(Refused::new("freeze", state).into()),
        };
        let from = Instant::now();
        lock(&self.vcpus).hold();
        let frozen = self.freeze_held(request, msrs, ahead, layers);
        // With holes in its memory it must not run on.
        let is_whole = !matches!(frozen, Err(FreezeError::Memory(_)));
        if was_running && is_whole {
            lock(&self.vcpus).run();
        }
        let pause_ns = match was_running {
            true => from.elapsed().as_nanos() as u64,
            false => 0,
        };
        drop(state);
        if let Err(FreezeError::Memory(error)) = &frozen {
            let causes = crate::causes(error);
            self.ending.end(Outcome::Failed { causes });
        }
        let (state, aside) = frozen?;
        Ok((state, aside, pause_ns))
    }

    /// With all vCPUs held.
    fn freeze_held(
        &self,
        request: &FreezeRequest,
        msrs: Vec<u32>,
        ahead: Option<memory::Ahead>,
        layers: &mut Vec<Layer>,
    ) -> Result<(MachineState, Option<memory::Aside>), FreezeError> {
        // With all locks taken the event loop stands still, and with it every device.
        let mut slots: Vec<_> = self
            .bus
            .virtio()
            .iter()
            .map(|slot| (slot.name.as_str(), lock(&slot.transport)))
            .collect();
        for (name, transport) in &mut slots {
            transport
                .write_back()
                .map_err(|source| FreezeError::Device {
                    name: (*name).to_owned(),
                    source,
                })?;
        }
        let vcpus = self.save_vcpus(msrs)?;
        let vm = crate::state::VmState::save(&self.vm)?;
        if let Some(port) = request.control_port {
            for (_, transport) in &mut slots {
                transport.keep_connection(port);
            }
        }
        let devices: Vec<DeviceState> = slots
            .iter()
            .map(|(name, transport)| DeviceState {
                name: (*name).to_owned(),
                transport: transport.save(),
            })
            .collect();
        if let Some(port) = request.control_port
            && !devices.iter().any(DeviceState::has_control)
        {
            return Err(FreezeError::NoControl(port));
        }
        let serial = lock(self.bus.serial()).save();
        self.push_layers(request, &mut slots)?;
        let state = MachineState::new(
            self.class,
            self.config.memory_mib,
            vcpus,
            vm,
            serial,
            devices,
        );
        let aside = match ahead {
            None => {
                self.free.take();
                let (layer, aside) = memory::first(&self.memory, &memory::file_of(&self.memory))?;
                layers.push(layer);
                Some(aside)
            }
            Some(ahead) => {
                let (layer, aside) = memory::again(&self.memory, ahead, &self.free.take())?;
                if !layer.runs.is_empty() {
                    layers.push(layer);
                }
                Some(aside)
            }
        };
        Ok((state, aside))
    }

    /// Makes the layers that take the disks' writes after the freeze.
    fn prepare_disks(&self, request: &FreezeRequest) -> Result<(), FreezeError> {
        for disk in lock(&self.disks).iter() {
            if disk.layer.is_some() && !request.next_layers.contains_key(&disk.id) {
                return Err(FreezeError::NoNextLayer(disk.id.clone()));
            }
        }
        for (id, path) in &request.next_layers {
            let name = disk_name(id);
            let slot = self.bus.virtio().iter().find(|slot| slot.name == name);
            let slot = slot.ok_or_else(|| FreezeError::NoDisk(id.clone()))?;
            let prepared = lock(&slot.transport).prepare_layer(path);
            if let Err(source) = prepared {
                self.drop_prepared();
                return Err(FreezeError::Device { name, source });
            }
        }
        Ok(())
    }

    fn drop_prepared(&self) {
        for slot in self.bus.virtio() {
            lock(&slot.transport).drop_prepared();
        }
    }

    /// Freezes the disks' layers, which have been written back.
    fn push_layers(
        &self,
        request: &FreezeRequest,
        slots: &mut [(&str, MutexGuard<'_, MmioTransport>)],
    ) -> Result<(), FreezeError> {
        for disk in lock(&self.disks).iter_mut() {
            let Some(next) = request.next_layers.get(&disk.id) else {
                continue;
            };
            let name = disk_name(&disk.id);
            for (_, transport) in slots.iter_mut().filter(|(slot, _)| *slot == name) {
                let pushed = transport.push_layer();
                let pushed = pushed.map_err(|source| FreezeError::Device {
                    name: name.clone(),
                    source,
                })?;
                if pushed {
                    disk.freezes.resize(disk.frozen.len(), 1);
                    disk.frozen.extend(disk.layer.replace(next.clone()));
                    disk.freezes.push(1);
                }
            }
        }
        Ok(())
    }

    pub(crate) fn frozen_disks(&self) -> Vec<FrozenDisk> {
        let disks = lock(&self.disks);
        let layered = disks.iter().filter_map(|disk| {
            Some(FrozenDisk {
                id: disk.id.clone(),
                frozen: disk.frozen.clone(),
                freezes: disk.freezes.clone(),
                layer: disk.layer.clone()?,
            })
        });
        layered.collect()
    }

    fn save_vcpus(&self, msrs: Vec<u32>) -> Result<Vec<VcpuState>, StateError> {
        let saved = Arc::new(Mutex::new(BTreeMap::new()));
        let into = saved.clone();
        lock(&self.vcpus).visit(move |index, vcpu| {
            let state = VcpuState::save(vcpu, &msrs);
            lock(&into).insert(index, state);
        });
        let saved = std::mem::take(&mut *lock(&saved));
        if saved.len() != self.config.vcpus as usize {
            return Err(StateError::Damaged("a vCPU has ended"));
        }
        saved.into_values().collect()
    }
}

/// A disk's name on the bus.
fn disk_name(id: &str) -> String {
    format!("block.{id}")
}

/// What a requester is told of layers.
pub(crate) fn described(layers: &[Layer]) -> Vec<FrozenLayer> {
    let described = layers.iter().map(|layer| FrozenLayer {
        runs: layer.runs.clone(),
        packed: layer.packed,
        freezes: layer.freezes,
    });
    described.collect()
}

/// Waits for the requester's word.
pub(crate) fn is_wanted(mut socket: &UnixStream) -> bool {
    let mut byte = [0];
    socket.read_exact(&mut byte).is_ok()
}

fn file_with(name: &str, bytes: &[u8]) -> std::io::Result<OwnedFd> {
    let mut file = File::from(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?);
    file.write_all(bytes)?;
    Ok(file.into())
}

/// One byte, with what there is to know, the state and the layers.
pub(crate) fn send(
    socket: &UnixStream,
    meta: &FrozenMeta,
    state: BorrowedFd<'_>,
    layers: &[Layer],
) -> std::io::Result<()> {
    let meta = file_with("ratoon-generation", &serde_json::to_vec(meta)?)?;
    let mut fds: Vec<BorrowedFd<'_>> = vec![meta.as_fd(), state];
    fds.extend(layers.iter().map(|layer| layer.file.as_fd()));
    let mut space = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(std::io::Error::other("too many files for one message"));
    }
    let sent = sendmsg(
        socket,
        &[IoSlice::new(b"g")],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )?;
    match sent {
        1 => Ok(()),
        _ => Err(std::io::ErrorKind::WriteZero.into()),
    }
}
