//! The files of a generation that a machine starts from.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ratoon_vmm_api::{GenerationConfig, HostClass, MemoryLayerConfig, Run, VmConfig};

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
        freezes: 1,
    }
}

/// The files of a generation, open.
pub(crate) struct Files {
    state: File,
    memory: Vec<File>,
}

impl Files {
    /// Opens them, or takes them from what the owner has sent.
    pub(crate) fn open(
        generation: &GenerationConfig,
        sent: Vec<OwnedFd>,
    ) -> Result<Self, StartError> {
        if generation.descriptors {
            let mut sent = sent.into_iter().map(File::from);
            let state = sent.next();
            let memory: Vec<_> = sent.take(generation.memory.len()).collect();
            return match state {
                Some(state) if memory.len() == generation.memory.len() => {
                    Ok(Self { state, memory })
                }
                _ => Err(StartError::Unfit(
                    "its owner has sent less descriptors than it has files".into(),
                )),
            };
        }
        let open = |path: &PathBuf| File::open(path).map_err(failed(path));
        let memory = generation.memory.iter().map(|layer| open(&layer.path));
        Ok(Self {
            state: open(&generation.state)?,
            memory: memory.collect::<Result<_, _>>()?,
        })
    }

    /// The layers of memory.
    pub(crate) fn layers(
        &mut self,
        generation: &GenerationConfig,
    ) -> Result<Vec<Layer>, StartError> {
        let files = std::mem::take(&mut self.memory);
        let layers = files.into_iter().zip(&generation.memory);
        let layer = |(file, layer): (File, &MemoryLayerConfig)| {
            let len = file.metadata().map_err(failed(&layer.path))?.len();
            let runs = match layer.runs.is_empty() {
                true => vec![Run { offset: 0, len }],
                false => layer.runs.clone(),
            };
            Ok(Layer {
                file: Arc::new(file),
                runs,
                packed: layer.packed,
                freezes: layer.freezes,
            })
        };
        layers.map(layer).collect()
    }

    /// Reads the state, and holds it against the configuration.
    pub(crate) fn state(
        &self,
        generation: &GenerationConfig,
        config: &VmConfig,
        class: HostClass,
    ) -> Result<MachineState, StartError> {
        let json = read(&self.state).map_err(failed(&generation.state))?;
        let state = MachineState::from_json(&json, class)?;
        fits(state, config)
    }
}

/// The whole file, by its offsets: siblings share the descriptor's own position.
fn read(file: &File) -> std::io::Result<Vec<u8>> {
    let len = file.metadata()?.len().min(MAX_LEN as u64 + 1);
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

fn fits(state: MachineState, config: &VmConfig) -> Result<MachineState, StartError> {
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
