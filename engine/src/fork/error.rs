//! Why there is no fork, or no such child.

use std::time::Duration;

use super::MAX_CHILDREN;
use crate::admission::Refused;
use crate::bridge::BridgeError;
use crate::engine::StartError;
use crate::image;
use crate::runtime::RuntimeError;
use crate::snapshots::SnapshotError;
use crate::vm::control::ControlError;
use crate::vm::freeze::FreezeError;
use crate::vm::launch::LaunchError;
use crate::vm::record::RecordError;

/// Why nothing was forked. The VM goes on.
#[derive(Debug, thiserror::Error)]
pub enum ForkError {
    /// None, or too many.
    #[error("{0} children: choose 1 to {MAX_CHILDREN}")]
    Count(u32),
    /// Not one name for each.
    #[error("{names} names for {count} children: give as many, or none")]
    Names {
        /// How many there are.
        names: usize,
        /// How many it takes.
        count: u32,
    },
    /// Not one list of networks for each child.
    #[error(
        "the VM has {devices} network devices, and each of {count} children needs as many tap devices \
         of its own"
    )]
    Networks {
        /// Of the VM.
        devices: usize,
        /// How many children.
        count: u32,
    },
    /// This host has not enough of something.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The VM's record.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The runtime in the VM.
    #[error("the runtime in the VM")]
    Runtime(#[from] RuntimeError),
    /// The VM's VMM.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The freeze.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// The image that it stands on.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// Programs or records.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The snapshot.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// A descriptor or a thread.
    #[error("the system refuses {what}")]
    System {
        /// What was asked for.
        what: &'static str,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

impl From<LaunchError> for ForkError {
    fn from(error: LaunchError) -> Self {
        Self::Start(error.into())
    }
}

/// Why there is no such child. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum ChildError {
    /// It was not awake at the deadline.
    #[error("it was not ready within {} ms", .0.as_millis())]
    Late(Duration),
    /// The caller wanted no more.
    #[error("cancelled")]
    Cancelled,
    /// It did not start.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// It could not be told who it is: it has been ended.
    #[error(transparent)]
    Wake(#[from] FreezeError),
    /// The bridge does not take it.
    #[error(transparent)]
    Bridge(#[from] BridgeError),
    /// Its pager.
    #[error(transparent)]
    Snapshot(#[from] Box<SnapshotError>),
}
