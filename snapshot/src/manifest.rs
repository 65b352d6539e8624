//! `manifest.json`: what a snapshot is.
//!
//! Upgrade rule: within a format version members may be added and are ignored by a Ratoon that does
//! not know them; whatever an older Ratoon would misread takes a new version, and a newer version
//! is refused by name before anything else is looked at.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::files;
use crate::pages::PAGE_BYTES;
use crate::signature::Signature;

/// The format that this crate writes, and the newest that it reads.
pub const FORMAT_VERSION: u32 = 1;
/// A longer manifest is refused unread.
pub const MAX_MANIFEST_BYTES: u64 = 1 << 20;
/// Disk layers of one snapshot.
pub const MAX_LAYERS: usize = 64;
/// Memory regions of one snapshot.
pub const MAX_REGIONS: usize = 16;
/// Guest memory of one snapshot: 16 TiB, so that sums of sizes cannot overflow.
pub(crate) const MAX_MEMORY_BYTES: u64 = 1 << 44;
/// The VMM's blob.
pub(crate) const MAX_STATE_BYTES: u64 = 64 << 20;
/// The largest of both indexes, which are read whole.
const MAX_INDEX_BYTES: u64 = 256 << 20;
const MAX_FEATURES: usize = 4096;
const MAX_LABELS: usize = 64;
const MAX_WORD_BYTES: usize = 128;
const MAX_LABEL_BYTES: usize = 1024;
const MAX_VCPUS: u32 = 1024;

/// A snapshot, described. [`Manifest::parse`] is the only way from bytes to one, so a manifest
/// in hand keeps the rules below.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT_VERSION`] when it was written.
    pub format: u32,
    /// The version of Ratoon that wrote it.
    pub ratoon: String,
    /// When, in seconds since 1970.
    pub created_unix_seconds: u64,
    /// Guest memory.
    pub memory: Memory,
    /// `state.bin`: opaque, made and read by the VMM.
    pub state: Blob,
    /// Disk layers, each disk's base first.
    #[serde(default)]
    pub layers: Vec<Layer>,
    /// What only the engine and the user care for.
    #[serde(flatten)]
    pub about: About,
    /// Who vouches for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signature: Option<Signature>,
}

/// The part of a manifest that the caller of [`Writer::finish`](crate::Writer::finish) gives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// What the guest saw of the CPU.
    pub cpu: Cpu,
    /// BLAKE3 of the kernel file, if that was there: a machine that runs has its kernel in memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<Digest>,
    /// The root disk's image, if it came from one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<Digest>,
    /// BLAKE3 of the runtime in the guest, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime: Option<Digest>,
    /// Virtual CPUs, at least 1.
    pub vcpus: u32,
    /// Memory as the user asked for it, in MiB.
    pub memory_mib: u64,
    /// The id of the snapshot that this VM was started from. It need not be in the store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Digest>,
    /// The user's own words.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// What the guest saw of the CPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpu {
    /// CPUID's vendor string.
    pub vendor: String,
    /// Feature words, opaque here; a host must offer all of them.
    pub features: Vec<String>,
}

/// A file with its hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blob {
    /// Its length in bytes.
    pub length: u64,
    /// BLAKE3 of its bytes.
    pub blake3: Digest,
}

/// A stretch of guest memory. Regions lie end to end in the memory's offsets, in the order given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Its first guest physical address, page-aligned.
    pub guest_address: u64,
    /// Its length in bytes, whole pages.
    pub length: u64,
}

/// How memory is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryKind {
    /// `memory.bin`, ready to be mapped.
    Plain,
    /// `memory.chunks`, served by a pager.
    Chunks,
}

/// Guest memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// All regions together.
    pub bytes: u64,
    /// Where in guest memory they are.
    pub regions: Vec<Region>,
    /// Which file holds it.
    pub kind: MemoryKind,
    /// That file's length in bytes.
    pub file_length: u64,
    /// The content hash (docs/snapshots.md). Without a base it is the same for both kinds.
    pub blake3: Digest,
    /// `memory.runs` of a difference or `memory.index` of chunks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<Blob>,
    /// The content hash of the memory that this one is the difference from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<Digest>,
}

/// One layer of a disk. It has either a file or an external digest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Which disk of the VM.
    pub disk: String,
    /// The file in the snapshot's folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// What it is when it is kept elsewhere: an image, or a layer of another snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub external: Option<Digest>,
    /// Its length in bytes.
    pub length: u64,
    /// Its content hash.
    pub blake3: Digest,
}

/// Read before all else, so that a newer format is refused by name and not for its shape.
#[derive(Deserialize)]
struct Head {
    format: u32,
    #[serde(default)]
    ratoon: serde_json::Value,
}

impl Manifest {
    /// Reads a manifest and checks every rule. `path` is named in errors.
    ///
    /// # Errors
    /// [`Error::NewerFormat`], [`Error::Damaged`].
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        let damaged = |reason: String| Error::damaged(path, reason);
        if bytes.len() as u64 > MAX_MANIFEST_BYTES {
            return Err(damaged(format!("longer than {MAX_MANIFEST_BYTES} bytes")));
        }
        let head: Head =
            serde_json::from_slice(bytes).map_err(|error| damaged(error.to_string()))?;
        if head.format > FORMAT_VERSION {
            let writer = head.ratoon.as_str().unwrap_or("of unknown version");
            return Err(Error::NewerFormat {
                path: path.to_path_buf(),
                found: head.format,
                known: FORMAT_VERSION,
                writer: writer
                    .chars()
                    .filter(|c| !c.is_control())
                    .take(64)
                    .collect(),
            });
        }
        let manifest: Self =
            serde_json::from_slice(bytes).map_err(|error| damaged(error.to_string()))?;
        manifest.check().map_err(damaged)?;
        Ok(manifest)
    }

    /// The bytes for `manifest.json`.
    pub(crate) fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut bytes =
            serde_json::to_vec_pretty(self).map_err(|error| Error::request(error.to_string()))?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// All rules, each refused in words.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.format == 0 {
            return Err("there is no format 0".into());
        }
        check_word("ratoon", &self.ratoon)?;
        self.memory.check()?;
        if self.state.length > MAX_STATE_BYTES {
            return Err(format!("a state of more than {MAX_STATE_BYTES} bytes"));
        }
        self.about.check()?;
        if self.layers.len() > MAX_LAYERS {
            return Err(format!("more than {MAX_LAYERS} layers"));
        }
        let mut names = Vec::new();
        for layer in &self.layers {
            check_word("disk", &layer.disk)?;
            match (&layer.file, layer.external) {
                (Some(file), None) => {
                    check_layer_file(file)?;
                    if names.contains(&file) {
                        return Err(format!("two layers in the file `{file}`"));
                    }
                    names.push(file);
                }
                (None, Some(_)) => {}
                _ => return Err("a layer needs either a file or an external digest".into()),
            }
            if i64::try_from(layer.length).is_err() {
                return Err("a layer longer than a file can be".into());
            }
        }
        Ok(())
    }
}

impl About {
    fn check(&self) -> Result<(), String> {
        check_word("cpu.vendor", &self.cpu.vendor)?;
        if self.cpu.features.len() > MAX_FEATURES {
            return Err(format!("more than {MAX_FEATURES} CPU features"));
        }
        for feature in &self.cpu.features {
            check_word("cpu.features", feature)?;
        }
        if self.vcpus == 0 || self.vcpus > MAX_VCPUS {
            return Err(format!("vcpus is not within 1 to {MAX_VCPUS}"));
        }
        if self.memory_mib > MAX_MEMORY_BYTES >> 20 {
            return Err("memory_mib is over 16 TiB".into());
        }
        if self.labels.len() > MAX_LABELS {
            return Err(format!("more than {MAX_LABELS} labels"));
        }
        for (name, value) in &self.labels {
            check_word("label", name)?;
            if value.len() > MAX_LABEL_BYTES || value.chars().any(char::is_control) {
                return Err(format!(
                    "label `{name}` has control characters or over {MAX_LABEL_BYTES} bytes"
                ));
            }
        }
        Ok(())
    }
}

impl Memory {
    fn check(&self) -> Result<(), String> {
        check_regions(&self.regions, self.bytes)?;
        if self
            .index
            .is_some_and(|index| index.length > MAX_INDEX_BYTES)
        {
            return Err(format!("an index of more than {MAX_INDEX_BYTES} bytes"));
        }
        match (self.kind, self.base, self.index) {
            (MemoryKind::Plain, None, None) => {
                if self.file_length != self.bytes {
                    return Err("plain memory's file_length differs from its bytes".into());
                }
            }
            (MemoryKind::Plain, Some(_), Some(_)) => {
                if self.file_length > self.bytes || !self.file_length.is_multiple_of(PAGE_BYTES) {
                    return Err("a difference that is not part of its memory".into());
                }
            }
            (MemoryKind::Chunks, None, Some(_)) => {
                if self.file_length > self.bytes {
                    return Err("chunks that are longer than their memory".into());
                }
            }
            _ => return Err("kind, base and index of memory do not go together".into()),
        }
        Ok(())
    }
}

/// Regions ascend without overlap, are whole pages, and make up `bytes`.
pub(crate) fn check_regions(regions: &[Region], bytes: u64) -> Result<(), String> {
    if regions.is_empty() || regions.len() > MAX_REGIONS {
        return Err(format!("memory needs 1 to {MAX_REGIONS} regions"));
    }
    let mut free_from = 0;
    let mut sum = 0_u64;
    for region in regions {
        if region.length == 0 || (region.guest_address | region.length) % PAGE_BYTES != 0 {
            return Err("a memory region that is not whole pages".into());
        }
        if region.guest_address < free_from {
            return Err("memory regions overlap or are out of order".into());
        }
        free_from = region
            .guest_address
            .checked_add(region.length)
            .ok_or("a memory region beyond the end of addresses")?;
        sum = sum
            .checked_add(region.length)
            .filter(|sum| *sum <= MAX_MEMORY_BYTES)
            .ok_or("more than 16 TiB of memory")?;
    }
    if sum != bytes {
        return Err(format!(
            "memory regions make up {sum} bytes and not {bytes}"
        ));
    }
    Ok(())
}

fn check_word(what: &str, word: &str) -> Result<(), String> {
    if word.is_empty() || word.len() > MAX_WORD_BYTES || word.chars().any(char::is_control) {
        return Err(format!(
            "`{what}` is empty, over {MAX_WORD_BYTES} bytes, or has control characters"
        ));
    }
    Ok(())
}

/// One file name, plain, not hidden, and none of ours.
pub(crate) fn check_layer_file(name: &str) -> Result<(), String> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if name.is_empty()
        || name.len() > 64
        || !name.as_bytes()[0].is_ascii_alphanumeric()
        || !name.bytes().all(plain)
        || files::OURS.contains(&name)
    {
        return Err(
            "a layer's file is named with 1 to 64 of a-z A-Z 0-9 . _ - (a letter or digit first) \
             and not as one of a snapshot's own files"
                .into(),
        );
    }
    Ok(())
}
