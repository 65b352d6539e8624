//! The whole of a machine's state, as it is written.

use ratoon_devices::legacy::SerialState;
use ratoon_devices::virtio::state::TransportState;
use ratoon_vmm_api::HostClass;
use serde::{Deserialize, Serialize};

use super::{MAX_LEN, StateError, VERSION, VcpuState, VmState};

/// A virtio device's state.
#[derive(Debug, Serialize, Deserialize)]
pub struct DeviceState {
    /// Its name on the bus, e.g. `block.root`.
    pub name: String,
    /// Its registers, queues and own state.
    pub transport: TransportState,
}

impl DeviceState {
    /// Whether it holds the connection that goes on.
    pub fn has_control(&self) -> bool {
        use ratoon_devices::virtio::state::DeviceState as Own;
        matches!(&self.transport.device, Own::Vsock(vsock) if vsock.control.is_some())
    }
}

/// A machine, apart from its memory and disks.
#[derive(Debug, Serialize, Deserialize)]
pub struct MachineState {
    version: u32,
    /// Which Ratoon wrote it.
    #[serde(default)]
    pub ratoon: String,
    host_class: HostClass,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// One a vCPU.
    pub vcpus: Vec<VcpuState>,
    /// KVM's own devices.
    pub vm: VmState,
    /// The console.
    pub serial: SerialState,
    /// In the order of their addresses.
    pub devices: Vec<DeviceState>,
}

/// What must be readable in every version.
#[derive(Deserialize)]
struct Version {
    version: u32,
}

impl MachineState {
    /// The state of a machine of `memory_mib` on a host of `host_class`, without its parts.
    pub fn new(
        host_class: HostClass,
        memory_mib: u64,
        vcpus: Vec<VcpuState>,
        vm: VmState,
        serial: SerialState,
        devices: Vec<DeviceState>,
    ) -> Self {
        Self {
            version: VERSION,
            ratoon: env!("CARGO_PKG_VERSION").into(),
            host_class,
            memory_mib,
            vcpus,
            vm,
            serial,
            devices,
        }
    }

    /// As JSON.
    ///
    /// # Errors
    /// None that a state of ours has.
    pub fn to_json(&self) -> Result<String, StateError> {
        serde_json::to_string(self).map_err(StateError::Json)
    }

    /// Reads what [`MachineState::to_json`] wrote, for a host of class `here`.
    ///
    /// # Errors
    /// [`StateError`]: too long, damaged, of another version or kind of host.
    pub fn from_json(json: &[u8], here: HostClass) -> Result<Self, StateError> {
        if json.len() > MAX_LEN {
            return Err(StateError::Damaged("it is too long"));
        }
        // One pass over a good state; a second one tells what is wrong with another.
        let state = match serde_json::from_slice::<Self>(json) {
            Ok(state) if state.version == VERSION => state,
            read => {
                let Version { version } = serde_json::from_slice(json).map_err(StateError::Json)?;
                return Err(match read.err() {
                    Some(error) if version == VERSION => StateError::Json(error),
                    _ => StateError::Version { found: version },
                });
            }
        };
        if state.host_class != here {
            return Err(StateError::HostClass {
                found: state.host_class,
                here,
            });
        }
        Ok(state)
    }
}
