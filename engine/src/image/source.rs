//! Named parts of a container image, from a folder or from inside a tar.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek as _, SeekFrom};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags, ResolveFlags};

use super::archive::{Archive, Kind};
use super::error::{Context as _, Error, Result};
use super::stream::{Budget, Limits};

/// Parts that we look at in a tar; a container image has far fewer, a root file system far more.
const MAX_PARTS: usize = 20_000;

/// Where the parts are.
pub(super) enum Source {
    /// An OCI layout folder.
    Folder(OwnedFd),
    /// A tar, not packed: each part's place in the file.
    Tar(File, HashMap<String, Part>),
}

/// One part of a tar.
pub(super) enum Part {
    /// Offset and length in bytes.
    Bytes(u64, u64),
    /// Another part's name (`docker save` links layers that are alike).
    Link(String),
}

impl Source {
    /// Opens a folder.
    pub(super) fn folder(path: &Path) -> Result<Self> {
        let flags = OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC;
        Ok(Self::Folder(
            rustix::fs::open(path, flags, Mode::empty()).at("open", path)?,
        ))
    }

    /// Lists a tar's parts. `shown` names it in errors.
    pub(super) fn tar(file: File, shown: &str, limits: Limits) -> Result<Self> {
        let mut parts = HashMap::new();
        let budget = Budget::new(limits);
        let reader = file.try_clone().at("open", shown.as_ref())?;
        let mut archive = Archive::new(
            Box::new(BufReader::with_capacity(1 << 20, reader)),
            shown,
            &budget,
        );
        while let Some(entry) = archive.next()? {
            if parts.len() >= MAX_PARTS {
                continue; // Not a container image; still read on, to see that the tar is whole.
            }
            let part = match &entry.kind {
                Kind::File => Part::Bytes(archive.offset(), entry.size),
                Kind::Symlink(target) => {
                    let Some(target) = beside(&entry.path, target) else {
                        continue;
                    };
                    Part::Link(target)
                }
                _ => continue,
            };
            parts.insert(entry.shown(), part);
        }
        Ok(Self::Tar(file, parts))
    }

    /// Whether there is such a part.
    pub(super) fn has(&self, name: &str) -> bool {
        match self {
            Self::Folder(_) => self.open(name).is_ok_and(|part| part.is_some()),
            Self::Tar(_, parts) => parts.contains_key(name),
        }
    }

    /// Opens a part; none when there is no such part. Gives its length in bytes too.
    pub(super) fn open(&self, name: &str) -> Result<Option<(Box<dyn Read>, u64)>> {
        match self {
            Self::Folder(root) => {
                let opened = rustix::fs::openat2(
                    root,
                    name,
                    OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK,
                    Mode::empty(),
                    ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS,
                );
                let file = match opened {
                    Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Ok(None),
                    other => File::from(other.at("open", name.as_ref())?),
                };
                let metadata = file.metadata().at("stat", name.as_ref())?;
                if !metadata.is_file() {
                    return Ok(None);
                }
                Ok(Some((Box::new(file), metadata.len())))
            }
            Self::Tar(file, parts) => {
                let part = match parts.get(name) {
                    Some(Part::Link(target)) => parts.get(target),
                    other => other,
                };
                // A link to a link is not followed: nobody writes that.
                let Some(Part::Bytes(offset, length)) = part else {
                    return Ok(None);
                };
                // A descriptor of its own place: parts are read one after another, never at once.
                let mut file = file.try_clone().at("open", name.as_ref())?;
                file.seek(SeekFrom::Start(*offset))
                    .at("read", name.as_ref())?;
                Ok(Some((Box::new(file.take(*length)), *length)))
            }
        }
    }

    /// Reads a small part whole.
    pub(super) fn read(
        &self,
        name: &str,
        limits: &Limits,
        archive: &str,
    ) -> Result<Option<Vec<u8>>> {
        let Some((reader, length)) = self.open(name)? else {
            return Ok(None);
        };
        if length > limits.manifest_bytes {
            return Err(Error::OverLimit {
                archive: format!("{archive}: {name}"),
                what: "bytes of a manifest",
                limit: limits.manifest_bytes,
            });
        }
        let mut bytes = Vec::new();
        reader
            .take(length)
            .read_to_end(&mut bytes)
            .at("read", name.as_ref())?;
        Ok(Some(bytes))
    }
}

/// Resolves a link target against the folder of the link, inside the tar only.
fn beside(link: &[Vec<u8>], target: &[u8]) -> Option<String> {
    let mut path: Vec<&[u8]> = if target.starts_with(b"/") {
        Vec::new()
    } else {
        link.split_last()?.1.iter().map(Vec::as_slice).collect()
    };
    for component in target.split(|byte| *byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." => drop(path.pop()?),
            name => path.push(name),
        }
    }
    String::from_utf8(path.join(&b'/')).ok()
}
