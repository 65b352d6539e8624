//! The files of a generation that a machine starts from.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use ratoon_vmm_api::{GenerationConfig, HostClass, Run, VmConfig};

use crate::memory::Layer;
use crate::start::StartError;
use crate::state::{MAX_LEN, MachineState, StateError};

fn failed(path: &Path) -> impl FnOnce(std::io::Error) -> StartError {
    |source| StartError::Generation {
        path: path.to_owned(),
        source,
    }
}

/// A layer that is all of memory.
pub(crate) fn whole(file: File, len: u64) -> Layer {
    Layer {
        file: Arc::new(file),
        runs: vec![Run { offset: 0, len }],
        packed: false,
    }
}

/// Opens the layers of memory.
pub(crate) fn layers(generation: &GenerationConfig) -> Result<Vec<Layer>, StartError> {
    let open = |layer: &ratoon_vmm_api::MemoryLayerConfig| {
        let file = File::open(&layer.path).map_err(failed(&layer.path))?;
        let len = file.metadata().map_err(failed(&layer.path))?.len();
        let runs = match layer.runs.is_empty() {
            true => vec![Run { offset: 0, len }],
            false => layer.runs.clone(),
        };
        Ok(Layer {
            file: Arc::new(file),
            runs,
            packed: layer.packed,
        })
    };
    generation.memory.iter().map(open).collect()
}

/// Reads the state, and holds it against the configuration.
pub(crate) fn state(
    generation: &GenerationConfig,
    config: &VmConfig,
    class: HostClass,
) -> Result<MachineState, StartError> {
    let path = &generation.state;
    let file = File::open(path).map_err(failed(path))?;
    let mut json = Vec::new();
    file.take(MAX_LEN as u64 + 1)
        .read_to_end(&mut json)
        .map_err(failed(path))?;
    let state = MachineState::from_json(&json, class)?;
    let unfit = |what: &str, found: u64, wanted: u64| {
        StartError::Unfit(format!("it has {found} {what}, the machine {wanted}"))
    };
    if state.memory_mib != config.memory_mib {
        return Err(unfit("MiB of memory", state.memory_mib, config.memory_mib));
    }
    if state.vcpus.len() != config.vcpus as usize {
        return Err(unfit(
            "vCPUs",
            state.vcpus.len() as u64,
            u64::from(config.vcpus),
        ));
    }
    if state.vcpus.iter().any(|vcpu| vcpu.cpuid.len() > 1024) {
        return Err(StateError::Damaged("the list of CPUID").into());
    }
    Ok(state)
}
