//! Tests of whole imports: archives made here, disks looked at with debugfs.

mod archives;
mod containers;
mod disks;
mod stores;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tar::{Builder, EntryType, Header};
use tempfile::TempDir;

use super::*;

/// A store in a folder of its own, and room for sources.
struct Lab {
    folder: TempDir,
    store: ImageStore,
}

impl Lab {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = ImageStore::open(&folder.path().join("cache")).unwrap();
        Self { folder, store }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    fn import(&self, source: &Path, kind: Option<ImportKind>) -> Result<Image> {
        self.store.import(source, kind, "it", &Quiet)
    }

    /// Imports a tar as a root file system.
    fn import_tar(&self, tar: &[u8]) -> Result<Image> {
        self.import(&self.write("source.tar", tar), Some(ImportKind::Tar))
    }

    /// Nothing half-made: no blob, no name, no scratch folder.
    fn assert_untouched(&self) {
        for folder in ["blobs", "names", "keys", "tmp"] {
            let left: Vec<_> = fs::read_dir(self.store.root().join(folder))
                .unwrap()
                .collect();
            assert!(left.is_empty(), "{folder}: {left:?}");
        }
    }
}

/// What debugfs says of a disk.
fn debugfs(image: &Image, request: &str) -> String {
    let output = Command::new(tool::DEBUGFS.find().unwrap())
        .args(["-R", request])
        .arg(&image.disk)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        said.split_once('\n').map_or("", |s| s.1)
    )
}

fn content(image: &Image, path: &str) -> String {
    debugfs(image, &format!("cat \"{path}\""))
}

fn stat(image: &Image, path: &str) -> String {
    debugfs(image, &format!("stat \"{path}\""))
}

fn exists(image: &Image, path: &str) -> bool {
    !stat(image, path).contains("File not found")
}

/// e2fsck finds nothing.
fn assert_sound(image: &Image) {
    let output = Command::new(tool::E2FSCK.find().unwrap())
        .arg("-fn")
        .arg(&image.disk)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
}

/// Makes tars, sound and hostile.
struct Tar(Builder<Vec<u8>>);

impl Tar {
    fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    /// Any entry; the name and the link go in as they are.
    fn entry(mut self, kind: EntryType, name: &str, link: &str, mode: u32, data: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(1000);
        header.set_gid(1001);
        header.set_mtime(1_700_000_000);
        header.set_size(data.len() as u64);
        if matches!(kind, EntryType::Char | EntryType::Block) {
            header.set_device_major(1).unwrap();
            header.set_device_minor(3).unwrap();
        }
        header.set_cksum();
        self.0.append(&header, data).unwrap();
        self
    }

    fn file(self, name: &str, data: &str) -> Self {
        self.entry(EntryType::Regular, name, "", 0o644, data.as_bytes())
    }

    fn folder(self, name: &str) -> Self {
        self.entry(EntryType::Directory, name, "", 0o755, b"")
    }

    fn symlink(self, name: &str, target: &str) -> Self {
        self.entry(EntryType::Symlink, name, target, 0o777, b"")
    }

    fn hard_link(self, name: &str, target: &str) -> Self {
        self.entry(EntryType::Link, name, target, 0o644, b"")
    }

    fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut data = Vec::new();
        for (key, value) in records {
            let base = key.len() + value.len() + 3;
            let mut length = base + 1;
            while length != base + length.to_string().len() {
                length += 1;
            }
            data.extend_from_slice(format!("{length} {key}=").as_bytes());
            data.extend_from_slice(value);
            data.push(b'\n');
        }
        self.entry(EntryType::XHeader, "pax", "", 0o644, &data)
    }

    fn done(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}
