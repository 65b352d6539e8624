//! The runtime in a restored VM is as old as its snapshot: the host's takes its place.
//!
//! ```text
//!   woken VM --(its runtime is the host's, or newer)--> as it is
//!            --(another)--> the host's binary, over vsock --> it goes on with all that runs
//!                                                     \--(refused)--> as it was; the user is told
//! ```
//!
//! Which runtime a VM has stands in its record, and in the manifest of its snapshots: the binary's
//! BLAKE3, the file that it came from (so that nothing has to be hashed while that is the same), and
//! its version. How it fails: a VM whose runtime stays is a VM all the same; only one that ends
//! meanwhile is an error.

use std::path::{Path, PathBuf};
use std::time::Duration;

use ratoon_snapshot::{About, Digest};
use serde::{Deserialize, Serialize};

use crate::engine::Engine;
use crate::runtime::{RuntimeClient, RuntimeError};
use crate::snapshots::{SnapshotError, file_identity, label};
use crate::vm::launch::{LaunchError, Vm};

/// How long the new runtime may take: the way of two megabytes into an emulated guest is seconds.
const PATIENCE: Duration = Duration::from_secs(300);

/// How long a VM whose connection broke may take to be gone, if it ends.
const END_PATIENCE: Duration = Duration::from_secs(2);

/// A runtime's binary.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuntimeRef {
    /// BLAKE3 of its bytes, 64 hexadecimal digits.
    pub digest: String,
    /// The file that it came from, and in which state that was; empty when the file system cannot tell.
    #[serde(default)]
    pub file: String,
}

/// Why the runtime in a VM is still the snapshot's. The VM runs.
#[derive(Debug, thiserror::Error)]
pub enum StaleRuntime {
    /// The host's own cannot be read.
    #[error("cannot read this host's runtime {}", path.display())]
    Read {
        /// Where it should be.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The one in the VM did not let itself be replaced.
    #[error("it did not take this host's")]
    Refused(#[source] RuntimeError),
}

impl RuntimeRef {
    /// The runtime at `path`, and its bytes.
    pub(crate) fn read(path: &Path) -> std::io::Result<(Self, Vec<u8>)> {
        // Before the bytes: what is written meanwhile is then taken for another file.
        let file = file_identity(path).unwrap_or_default();
        let bytes = std::fs::read(path)?;
        let digest = Digest::of(&bytes).to_string();
        Ok((Self { digest, file }, bytes))
    }

    /// The one that a snapshot was taken with, if it says so.
    pub(crate) fn of(about: &About) -> Option<Self> {
        let digest = about.runtime?.to_string();
        let file = about.labels.get(label::RUNTIME_FILE).cloned();
        let file = file.unwrap_or_default();
        Some(Self { digest, file })
    }
}

impl Engine {
    /// Gives a woken VM this host's runtime; if it does not take it, why.
    pub(crate) fn renew(
        &self,
        vm: &mut Vm,
        about: &About,
    ) -> Result<Option<StaleRuntime>, SnapshotError> {
        let mut client = vm.runtime()?;
        match renew(&mut client, about, &self.programs().runtime) {
            Ok(renewed) => {
                if let Some(runtime) = renewed {
                    vm.renewed(&runtime).map_err(LaunchError::from)?;
                }
                vm.keep_runtime(client);
                Ok(None)
            }
            // The connection is gone, and perhaps the VM.
            Err(StaleRuntime::Refused(error)) if error.is_about_connection() => {
                match vm.ended(END_PATIENCE) {
                    Some(ended) => Err(ended.into()),
                    None => Ok(Some(StaleRuntime::Refused(error))),
                }
            }
            Err(stale) => {
                vm.keep_runtime(client);
                Ok(Some(stale))
            }
        }
    }
}

/// Gives the VM of a snapshot the runtime at `path`, unless it has it or a newer one. `client` is a
/// connection to its runtime. Returns what it has then, when it is another one.
fn renew(
    client: &mut RuntimeClient,
    about: &About,
    path: &Path,
) -> Result<Option<RuntimeRef>, StaleRuntime> {
    let theirs = RuntimeRef::of(about);
    let file = theirs.as_ref().map(|theirs| theirs.file.as_str());
    let is_same_file =
        file.is_some_and(|file| !file.is_empty()) && file == file_identity(path).as_deref();
    let version = about.labels.get(label::RUNTIME_VERSION);
    let is_newer = version.is_some_and(|version| is_newer(version, env!("CARGO_PKG_VERSION")));
    if is_same_file || is_newer {
        return Ok(None);
    }
    let (ours, binary) = RuntimeRef::read(path).map_err(|source| StaleRuntime::Read {
        path: path.to_owned(),
        source,
    })?;
    if theirs.is_some_and(|theirs| theirs.digest == ours.digest) {
        return Ok(None);
    }
    let swapped = client.swap_runtime(&binary, &ours.digest, PATIENCE);
    swapped.map_err(StaleRuntime::Refused)?;
    Ok(Some(ours))
}

/// Whether version `theirs` comes after `ours`; what is no version does not.
fn is_newer(theirs: &str, ours: &str) -> bool {
    let parts = |version: &str| -> Option<Vec<u64>> {
        let parts = version.split('.').map(|part| part.parse().ok());
        parts.collect()
    };
    match (parts(theirs), parts(ours)) {
        (Some(theirs), Some(ours)) => theirs > ours,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_later_version_is_newer() {
        for (theirs, ours, newer) in [
            ("0.1.0", "0.1.0", false),
            ("0.1.1", "0.1.0", true),
            ("0.10.0", "0.9.9", true),
            ("0.0.9", "0.1.0", false),
            ("1.0.0", "0.9.0", true),
            ("", "0.1.0", false),
            ("two", "0.1.0", false),
        ] {
            assert_eq!(is_newer(theirs, ours), newer, "{theirs} and {ours}");
        }
    }

    #[test]
    fn a_runtime_is_known_by_its_bytes_and_by_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("runtime");
        std::fs::write(&path, "one").unwrap();
        let (one, bytes) = RuntimeRef::read(&path).unwrap();
        assert_eq!(bytes, b"one");
        assert_eq!(one.digest, Digest::of(b"one").to_string());
        std::fs::write(&path, "another").unwrap();
        let (other, _) = RuntimeRef::read(&path).unwrap();
        assert_ne!(one.digest, other.digest);
        assert_ne!(one.file, other.file);
    }
}
