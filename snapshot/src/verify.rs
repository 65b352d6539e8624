//! Reading all of a snapshot again and proving it.

use std::path::Path;

use crate::Progress;
use crate::content::hash_file;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::manifest::Manifest;
use crate::memory::hash_memory;
use crate::snapshot::Snapshot;
use crate::store::Store;

impl Store {
    /// Reads every byte of a snapshot, of those that its memory lies over, and of the layers of
    /// other snapshots that it names, and checks it against its hashes. Holes are not read.
    ///
    /// # Errors
    /// [`Error::Damaged`] and [`Error::DamagedChunk`] name the file; as
    /// [`Store::get`] and [`Store::memory`] besides.
    pub fn verify(&self, wanted: &str, progress: &dyn Progress) -> Result<Snapshot> {
        let snapshot = self.get(wanted)?;
        let _held = snapshot.hold()?;
        drop(self.memory(&snapshot)?);
        for layer in self.chain(&snapshot)? {
            layer.state()?;
            verify_content(&layer.folder, &layer.manifest, progress)?;
        }
        let known = self.list()?.snapshots;
        for layer in &snapshot.manifest.layers {
            let Some(external) = layer.external else {
                continue;
            };
            let kept = known.iter().find_map(|other| {
                let mut layers = other.manifest.layers.iter();
                let kept = layers.find(|it| it.file.is_some() && it.blake3 == external)?;
                Some(other.folder.join(kept.file.as_ref()?))
            });
            // What no snapshot here keeps may be an image; a restore refuses what is missing.
            if let Some(path) = kept {
                progress.step("checking a disk layer");
                let file = crate::files::open_sized(&path, layer.length)?;
                expect(&path, hash_file(&file, &path, progress)?, external)?;
            }
        }
        Ok(snapshot)
    }
}

/// Checks memory and disk layers in `folder`.
pub(crate) fn verify_content(
    folder: &Path,
    manifest: &Manifest,
    progress: &dyn Progress,
) -> Result<()> {
    progress.step("checking memory");
    let (path, found) = hash_memory(folder, &manifest.memory, progress)?;
    expect(&path, found, manifest.memory.blake3)?;
    for layer in &manifest.layers {
        let Some(name) = &layer.file else {
            continue; // Whoever keeps it checks it.
        };
        progress.step("checking a disk layer");
        let path = folder.join(name);
        let file = crate::files::open_sized(&path, layer.length)?;
        expect(&path, hash_file(&file, &path, progress)?, layer.blake3)?;
    }
    Ok(())
}

fn expect(path: &Path, found: Digest, wanted: Digest) -> Result<()> {
    if found == wanted {
        return Ok(());
    }
    Err(Error::damaged(
        path,
        format!("its content has the hash {found} and not {wanted}"),
    ))
}
