//! The generation that a machine was started from, kept so that it can be started from again: for as long as one
//! of its children lives, wherever its parent is.
//!
//! It costs descriptors, and what of its memory the machine itself has no more.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use ratoon_vmm_api::{
    BirthRequest, FreezeReply, FrozenDisk, FrozenMeta, GenerationConfig, VmConfig,
};

use crate::freeze::{described, is_wanted, send};
use crate::memory::Layer;

/// Why it cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum BirthError {
    /// It has none, or another.
    #[error("the machine was not started from generation {0}")]
    Another(String),
    /// A file, or the requester's socket.
    #[error("the socket {} for the generation, or a file of it", path.display())]
    Send {
        /// Which socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// What a machine was started from.
#[derive(Debug)]
pub struct Birth {
    generation: GenerationConfig,
    state: File,
    layers: Vec<Layer>,
    disks: Vec<FrozenDisk>,
}

impl Birth {
    /// Of a machine with this configuration; its owner has sent `files`. `None`: its generation is a snapshot's
    /// and is found there.
    ///
    /// # Errors
    /// When there are no more descriptors.
    pub fn of(config: &VmConfig, files: &[OwnedFd]) -> std::io::Result<Option<Self>> {
        let Some(generation) = config.generation.clone().filter(|it| it.descriptors) else {
            return Ok(None);
        };
        let Some((state, memory)) = files.split_first() else {
            return Ok(None);
        };
        let layers = memory.iter().zip(&generation.memory).map(|(file, layer)| {
            Ok(Layer {
                file: Arc::new(File::from(file.try_clone()?)),
                runs: layer.runs.clone(),
                packed: layer.packed,
                freezes: layer.freezes,
            })
        });
        let layers = layers.collect::<std::io::Result<_>>()?;
        let disks = config.disks.iter().filter_map(|disk| {
            Some(FrozenDisk {
                id: disk.id.clone(),
                frozen: disk.frozen.clone(),
                freezes: disk.freezes.clone(),
                layer: disk.layer.clone()?,
            })
        });
        Ok(Some(Self {
            state: File::from(state.try_clone()?),
            layers,
            disks: disks.collect(),
            generation,
        }))
    }

    /// Whether a layer of a disk belongs to it.
    pub(crate) fn has(&self, layer: &PathBuf) -> bool {
        self.disks.iter().any(|disk| disk.frozen.contains(layer))
    }

    fn send(&self, request: &BirthRequest) -> std::io::Result<()> {
        let socket = UnixStream::connect(&request.socket)?;
        if !is_wanted(&socket) {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        let meta = FrozenMeta {
            pause_ns: 0,
            waited_ns: 0,
            layers: described(&self.layers),
            disks: self.disks.clone(),
        };
        send(&socket, &meta, self.state.as_fd(), &self.layers)
    }
}

/// Sends it to whoever asks.
///
/// # Errors
/// [`BirthError`].
pub fn give(birth: Option<&Birth>, request: &BirthRequest) -> Result<FreezeReply, BirthError> {
    let birth = birth.filter(|birth| birth.generation.id == request.id);
    let birth = birth.ok_or_else(|| BirthError::Another(request.id.clone()))?;
    birth.send(request).map_err(|source| BirthError::Send {
        path: request.socket.clone(),
        source,
    })?;
    Ok(FreezeReply::default())
}
