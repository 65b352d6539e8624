//! Freeze: a running machine becomes a generation, and goes on as its first child.
//!
//! ```text
//!   vCPUs held -> devices locked, disks flushed -> state read -> memory mapped privately -> vCPUs run
//!   |------------------------------- the pause ------------------------------------------|  then
//!   the requester gets the files; the old mapping is torn down; the generation's file is sealed
//! ```
//!
//! Whatever fails before memory is touched leaves the machine as it was. A failure after that (no
//! address space, no memory) may leave holes in it: the machine ends, and says so.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{IoSlice, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use kvm_ioctls::Kvm;
use ratoon_vmm_api::{FreezeReply, FreezeRequest, FrozenLayer, FrozenMeta, Outcome, VmState};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::bus::lock;
use crate::machine::{Machine, Refused};
use crate::memory::{self, Layer, MemoryError};
use crate::pager::PagerError;
use crate::state::{DeviceState, MachineState, StateError, VcpuState};

/// So many files go with one message (the kernel's SCM_MAX_FD, less the one of the state).
const MAX_LAYERS: usize = 252;

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
    /// A disk.
    #[error("disk {disk}")]
    Disk {
        /// Which.
        disk: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The requester's socket.
    #[error("the socket {} for the generation", path.display())]
    Socket {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
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
        let mut layers = lock(&self.layers);
        if layers.len() >= MAX_LAYERS {
            return Err(FreezeError::TooManyLayers);
        }
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

        let state = lock(&self.state);
        let was_running = match *state {
            VmState::Running => true,
            VmState::Paused => false,
            state => return Err(Refused::new("freeze", state).into()),
        };
        let from = Instant::now();
        lock(&self.vcpus).hold();
        let frozen = self.freeze_held(request, msrs, &mut layers);
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
        drop(aside);
        if let [first] = layers.as_slice() {
            // Nobody can write it any more; should a mapping linger, it is only not sealed.
            let _ = rustix::fs::fcntl_add_seals(&*first.file, SealFlags::WRITE);
        }
        let json = state.to_json()?;
        send(&socket, json, &layers).map_err(|source| FreezeError::Socket {
            path: request.socket.clone(),
            source,
        })?;
        Ok(FreezeReply { pause_ns })
    }

    /// With all vCPUs held.
    fn freeze_held(
        &self,
        request: &FreezeRequest,
        msrs: Vec<u32>,
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
        copy_layers(&self.config.disks, &request.copy_layers)?;
        let vcpus = self.save_vcpus(msrs)?;
        let vm = crate::state::VmState::save(&self.vm)?;
        let devices = slots
            .iter()
            .map(|(name, transport)| DeviceState {
                name: (*name).to_owned(),
                transport: transport.save(),
            })
            .collect();
        let serial = lock(self.bus.serial()).save();
        let state = MachineState::new(
            self.class,
            self.config.memory_mib,
            vcpus,
            vm,
            serial,
            devices,
        );
        let aside = match layers.is_empty() {
            true => {
                let (layer, aside) = memory::first(&self.memory, &memory::file_of(&self.memory))?;
                layers.push(layer);
                Some(aside)
            }
            false => {
                let layer = memory::again(&self.memory)?;
                if !layer.runs.is_empty() {
                    layers.push(layer);
                }
                None
            }
        };
        Ok((state, aside))
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

/// Copies the writable layers of disks; they have been flushed.
fn copy_layers(
    disks: &[ratoon_vmm_api::DiskConfig],
    copies: &BTreeMap<String, PathBuf>,
) -> Result<(), FreezeError> {
    for (id, to) in copies {
        let layer = disks.iter().find(|disk| disk.id == *id);
        let layer = layer.and_then(|disk| disk.layer.as_deref());
        let copied = match layer {
            Some(layer) => copy_sparse(layer, to),
            None => Err(std::io::Error::other("it has no writable layer")),
        };
        copied.map_err(|source| FreezeError::Disk {
            disk: id.clone(),
            source,
        })?;
    }
    Ok(())
}

/// Copies what there is of a file, and leaves its holes.
fn copy_sparse(from: &Path, to: &Path) -> std::io::Result<()> {
    use rustix::fs::{SeekFrom, copy_file_range, ftruncate, seek};
    let source = File::open(from)?;
    let target = File::create_new(to)?;
    let len = source.metadata()?.len();
    ftruncate(&target, len)?;
    let mut at = 0;
    while at < len {
        let start = match seek(&source, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = seek(&source, SeekFrom::Hole(start))?;
        let (mut read, mut write) = (start, start);
        while read < end {
            let most = (end - read) as usize;
            if copy_file_range(&source, Some(&mut read), &target, Some(&mut write), most)? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
        }
        at = end;
    }
    Ok(())
}

/// One byte, with the state and the layers.
fn send(socket: &UnixStream, state: String, layers: &[Layer]) -> std::io::Result<()> {
    let meta = FrozenMeta {
        state,
        layers: layers
            .iter()
            .map(|layer| FrozenLayer {
                runs: layer.runs.clone(),
            })
            .collect(),
    };
    let fd = rustix::fs::memfd_create("ratoon-state", MemfdFlags::CLOEXEC)?;
    let mut file = File::from(fd);
    file.write_all(&serde_json::to_vec(&meta)?)?;
    let state: OwnedFd = file.into();
    let mut fds: Vec<BorrowedFd<'_>> = vec![state.as_fd()];
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
