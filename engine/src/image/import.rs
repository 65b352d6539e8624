//! Imports an image from a file or folder: looks what it is, and takes it that way.

use std::fs::{self, File};
use std::io::{Read, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use super::Progress;
use super::archive::Archive;
use super::build::RECIPES;
use super::config::{ContainerConfig, Image, check_name};
use super::error::{Context as _, Error, Result};
use super::ext4;
use super::oci::{Plan, Reader};
use super::scratch::Scratch;
use super::source::Source;
use super::store::{ImageStore, NewImage};
use super::stream::{Budget, Limits, Packing, packing, unpack};
use super::tool::{DEBUGFS, E2FSCK, MKE2FS};
use super::tree::{Fix, Summary, Tree};

/// Raised when the same source would give another disk than before.
const IMPORT_VERSION: u32 = 1;
const COPY_BYTES: usize = 1 << 20;

/// What a source is. Without it, the content decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImportKind {
    /// A root file system in a folder.
    Folder,
    /// A tar of a root file system, plain, gzip or zstd, as `docker export` gives.
    Tar,
    /// An ext4 file system in a file.
    Ext4,
    /// An OCI image layout: a folder, or a tar of it.
    Oci,
    /// A docker-archive tar, as `docker save` gives.
    DockerArchive,
}

impl ImportKind {
    /// All kinds with their names on the command line.
    pub const ALL: [(&str, Self); 5] = [
        ("dir", Self::Folder),
        ("tar", Self::Tar),
        ("ext4", Self::Ext4),
        ("oci", Self::Oci),
        ("docker", Self::DockerArchive),
    ];

    /// For people.
    pub fn shown(self) -> &'static str {
        match self {
            Self::Folder => "a root file system folder",
            Self::Tar => "a root file system tar",
            Self::Ext4 => "a raw ext4 file",
            Self::Oci => "an OCI layout",
            Self::DockerArchive => "a docker archive",
        }
    }
}

/// One import at work.
struct Import<'i> {
    path: &'i Path,
    shown: String,
    limits: Limits,
    scratch: &'i Scratch,
    progress: &'i dyn Progress,
}

/// What the source turned out to be, opened.
enum Opened {
    Folder,
    Tar(File),
    Ext4(File),
    Container(ImportKind, Source),
}

impl ImageStore {
    /// Imports `source` and names it `name`. `kind` overrides the look at the content. A source
    /// whose bytes were imported before is not unpacked again.
    ///
    /// # Errors
    /// Any of [`Error`]; the store is as before then.
    pub fn import(
        &self,
        source: &Path,
        kind: Option<ImportKind>,
        name: &str,
        progress: &dyn Progress,
    ) -> Result<Image> {
        self.import_with(source, kind, name, &Limits::default(), progress)
    }

    /// [`ImageStore::import`] with other limits.
    ///
    /// # Errors
    /// As [`ImageStore::import`].
    pub fn import_with(
        &self,
        source: &Path,
        kind: Option<ImportKind>,
        name: &str,
        limits: &Limits,
        progress: &dyn Progress,
    ) -> Result<Image> {
        check_name(name)?;
        if RECIPES.contains(&name) {
            return Err(Error::ReservedName {
                name: name.to_owned(),
            });
        }
        let full = source.canonicalize().at("open", source)?;
        let source = full.as_path();
        let metadata = fs::metadata(source).at("open", source)?;
        for tool in [MKE2FS, DEBUGFS, E2FSCK] {
            tool.find()?;
        }
        let key = if metadata.is_dir() {
            self.check_folder(source)?;
            unique_key(source)
        } else if metadata.is_file() {
            key_of_file(source, kind, progress)?
        } else {
            return Err(Error::UnknownFormat {
                path: source.to_path_buf(),
                reason: "it is neither a file nor a folder".into(),
            });
        };
        let _making = self.making(&key, progress)?;
        if let Some(image) = self.by_key(&key)? {
            return self.name_image(&image, name, false);
        }
        // Before the work, so that nobody waits for a refusal; looked at again when publishing.
        self.check_free(name, None)?;
        let scratch = self.scratch()?;
        let shown = source
            .file_name()
            .unwrap_or(source.as_os_str())
            .to_string_lossy()
            .into_owned();
        let import = Import {
            path: source,
            shown,
            limits: *limits,
            scratch: &scratch,
            progress,
        };
        let (kind, container) = import.make(kind)?;
        let what = kind
            .shown()
            .trim_start_matches("an ")
            .trim_start_matches("a ")
            .to_owned();
        let new = NewImage {
            blob: import.blob(),
            source: format!("{what} {}", import.shown),
            key: &key,
            container,
            name,
            take_name: false,
        };
        self.publish(new, progress)
    }

    /// A folder that holds the store would be copied into itself.
    fn check_folder(&self, source: &Path) -> Result<()> {
        let store = self.root();
        if store.starts_with(source) {
            return Err(Error::WrongKind {
                path: source.to_path_buf(),
                expected: ImportKind::Folder.shown(),
                reason: format!(
                    "it holds the image store {}: copy what you want out of it",
                    store.display()
                ),
            });
        }
        Ok(())
    }
}

impl Import<'_> {
    fn blob(&self) -> PathBuf {
        self.scratch.path().join("blob")
    }

    /// Makes `blob/disk.ext4` in the scratch folder.
    fn make(&self, kind: Option<ImportKind>) -> Result<(ImportKind, ContainerConfig)> {
        self.progress.step(&format!("reading {}", self.shown));
        let opened = self.open(kind)?;
        let blob = self.blob();
        fs::create_dir(&blob).at("create", &blob)?;
        let disk = blob.join("disk.ext4");
        match opened {
            Opened::Folder => {
                self.make_from_folder(&disk)?;
                Ok((ImportKind::Folder, ContainerConfig::default()))
            }
            Opened::Tar(file) => {
                let tree = self.unpack_tar(file)?;
                self.make_from_tree(tree, &disk)?;
                Ok((ImportKind::Tar, ContainerConfig::default()))
            }
            Opened::Ext4(file) => {
                self.make_from_ext4(&file, &disk)?;
                Ok((ImportKind::Ext4, ContainerConfig::default()))
            }
            Opened::Container(kind, source) => {
                let (tree, plan) = self.unpack_container(kind, &source)?;
                self.make_from_tree(tree, &disk)?;
                Ok((kind, plan.container))
            }
        }
    }

    fn wrong(&self, expected: ImportKind, reason: &str) -> Error {
        Error::WrongKind {
            path: self.path.to_path_buf(),
            expected: expected.shown(),
            reason: reason.to_owned(),
        }
    }

    /// Finds out what the source is, or checks that it is what `kind` says.
    fn open(&self, kind: Option<ImportKind>) -> Result<Opened> {
        if self.path.is_dir() {
            let source = Source::folder(self.path)?;
            let layout = source.has("oci-layout") && source.has("index.json");
            return match kind {
                None if layout => Ok(Opened::Container(ImportKind::Oci, source)),
                Some(ImportKind::Oci) if layout => Ok(Opened::Container(ImportKind::Oci, source)),
                Some(ImportKind::Oci) => {
                    Err(self.wrong(ImportKind::Oci, "it lacks oci-layout or index.json"))
                }
                None | Some(ImportKind::Folder) => Ok(Opened::Folder),
                Some(other) => Err(self.wrong(other, "it is a folder")),
            };
        }
        let mut file = File::open(self.path).at("open", self.path)?;
        let mut start = [0; 512];
        let length = read_start(&file, &mut start).at("read", self.path)?;
        let is_ext4 = ext4::has_magic(&file);
        match kind {
            Some(ImportKind::Folder) => return Err(self.wrong(ImportKind::Folder, "it is a file")),
            Some(ImportKind::Ext4) => return Ok(Opened::Ext4(file)),
            None if is_ext4 && !is_tar(&start[..length]) => return Ok(Opened::Ext4(file)),
            _ => {}
        }
        match packing(&start[..length]) {
            Packing::Plain if kind.is_none() && !is_tar(&start[..length]) => {
                return Err(Error::UnknownFormat {
                    path: self.path.to_path_buf(),
                    reason: if length == 0 {
                        "it is empty"
                    } else {
                        "its first bytes are no format's mark"
                    }
                    .into(),
                });
            }
            Packing::Plain => {}
            Packing::Other(name, program) => {
                return Err(Error::UnknownFormat {
                    path: self.path.to_path_buf(),
                    reason: format!("it is packed with {name}: unpack it with `{program}`"),
                });
            }
            Packing::Gzip | Packing::Zstd => file = self.unpack_file(file)?,
        }
        self.open_tar(file, kind)
    }

    /// A tar, not packed: a root file system or a container image.
    fn open_tar(&self, file: File, kind: Option<ImportKind>) -> Result<Opened> {
        let again = file.try_clone().at("open", self.path)?;
        let source = Source::tar(again, &self.shown, self.limits)?;
        let oci = source.has("oci-layout") && source.has("index.json");
        let docker = self.reader(&source).is_docker();
        match kind {
            Some(ImportKind::Oci) | None if oci => Ok(Opened::Container(ImportKind::Oci, source)),
            Some(ImportKind::DockerArchive) | None if docker => {
                Ok(Opened::Container(ImportKind::DockerArchive, source))
            }
            Some(ImportKind::Oci) => {
                Err(self.wrong(ImportKind::Oci, "it lacks oci-layout or index.json"))
            }
            Some(ImportKind::DockerArchive) => Err(self.wrong(
                ImportKind::DockerArchive,
                "it has no manifest.json of docker's form",
            )),
            _ => Ok(Opened::Tar(file)),
        }
    }

    fn reader<'s>(&'s self, source: &'s Source) -> Reader<'s> {
        Reader {
            source,
            archive: &self.shown,
            limits: self.limits,
            progress: self.progress,
        }
    }

    /// Unpacks a gzip or zstd file into the scratch folder, within the limits.
    fn unpack_file(&self, file: File) -> Result<File> {
        self.progress.step(&format!("unpacking {}", self.shown));
        let budget = Budget::new(self.limits);
        let mut reader = unpack(file, &self.shown, &budget).at("read", self.path)?;
        let path = self.scratch.path().join("plain.tar");
        let mut plain = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .at("create", &path)?;
        let mut buffer = vec![0; COPY_BYTES];
        loop {
            self.check_cancelled()?;
            let read = reader.read(&mut buffer).at("unpack", self.path)?;
            if read == 0 {
                break;
            }
            plain.write_all(&buffer[..read]).at("write", &path)?;
        }
        plain.seek(SeekFrom::Start(0)).at("read", &path)?;
        Ok(plain)
    }

    fn unpack_tar(&self, mut file: File) -> Result<Tree> {
        self.progress.step(&format!("unpacking {}", self.shown));
        file.seek(SeekFrom::Start(0)).at("read", self.path)?;
        let budget = Budget::new(self.limits);
        let mut tree = Tree::create(&self.scratch.path().join("tree"))?;
        tree.begin_layer(&self.shown);
        let reader = unpack(file, &self.shown, &budget).at("read", self.path)?;
        let mut archive = Archive::new(reader, &self.shown, &budget);
        let mut entries = 0_u64;
        while let Some(entry) = archive.next()? {
            self.check_cancelled()?;
            tree.put(&entry, &mut archive, self.progress)?;
            entries += 1;
        }
        if entries == 0 {
            return Err(self.wrong(ImportKind::Tar, "it has no entries"));
        }
        Ok(tree)
    }

    fn unpack_container(&self, kind: ImportKind, source: &Source) -> Result<(Tree, Plan)> {
        let reader = self.reader(source);
        self.progress.step("checking digests");
        let plan = match kind {
            ImportKind::Oci => reader.plan_oci()?,
            _ => reader.plan_docker()?,
        };
        self.progress
            .line(&format!("config sha256:{}", plan.identity));
        let mut tree = Tree::create(&self.scratch.path().join("tree"))?;
        reader.unpack(&plan, &mut tree)?;
        Ok((tree, plan))
    }

    fn make_from_tree(&self, tree: Tree, disk: &Path) -> Result<()> {
        self.progress.step("making the disk");
        let folder = tree.path().to_path_buf();
        let (summary, fixes) = tree.finish()?;
        ext4::make(
            &folder,
            disk,
            self.scratch.path(),
            &summary,
            &fixes,
            self.progress,
        )
    }

    fn make_from_folder(&self, disk: &Path) -> Result<()> {
        let (summary, fixes) = self.survey()?;
        self.progress.step("making the disk");
        ext4::make(
            self.path,
            disk,
            self.scratch.path(),
            &summary,
            &fixes,
            self.progress,
        )
    }

    /// Counts what a folder holds. For a normal user the files are the user's own, whoever they
    /// belonged to: they become root's in the image, and the caller is told.
    fn survey(&self) -> Result<(Summary, Vec<Fix>)> {
        let root = fs::metadata(self.path).at("stat", self.path)?;
        let user = rustix::process::geteuid();
        let mut summary = Summary {
            bytes: 0,
            entries: 1,
        };
        let mut fixes = Vec::new();
        let mut work = vec![self.path.to_path_buf()];
        while let Some(folder) = work.pop() {
            self.check_cancelled()?;
            for entry in fs::read_dir(&folder).at("list", &folder)? {
                let path = entry.at("list", &folder)?.path();
                let metadata = fs::symlink_metadata(&path).at("stat", &path)?;
                if metadata.dev() != root.dev() {
                    return Err(self.wrong(
                        ImportKind::Folder,
                        &format!(
                            "another file system is mounted on {}: unmount it",
                            path.display()
                        ),
                    ));
                }
                summary.entries += 1;
                summary.bytes += metadata.len().next_multiple_of(4096);
                let over = |what, limit| {
                    Err(Error::OverLimit {
                        archive: self.shown.clone(),
                        what,
                        limit,
                    })
                };
                if summary.entries > self.limits.entries {
                    return over("entries", self.limits.entries);
                }
                if summary.bytes > self.limits.total_bytes {
                    return over("bytes", self.limits.total_bytes);
                }
                if !user.is_root() && metadata.uid() == user.as_raw() {
                    fixes.push(self.root_owned(&path)?);
                }
                if metadata.is_dir() {
                    work.push(path);
                }
            }
        }
        if summary.entries == 1 {
            return Err(self.wrong(ImportKind::Folder, "it is empty"));
        }
        if !fixes.is_empty() {
            self.progress
                .line("not root: files of the current user become root's in the image");
        }
        Ok((summary, fixes))
    }

    fn root_owned(&self, path: &Path) -> Result<Fix> {
        let inside = path.strip_prefix(self.path).unwrap_or(path);
        match inside.to_str() {
            Some(inside) if !inside.contains('\n') => Ok(Fix {
                path: format!("/{inside}"),
                uid: Some(0),
                gid: Some(0),
                ..Fix::default()
            }),
            _ => Err(self.wrong(
                ImportKind::Folder,
                &format!(
                    "the name of {} is not plain UTF-8: rename it",
                    path.display()
                ),
            )),
        }
    }

    /// Copies the data, not the holes, then lets e2fsck look at the copy.
    fn make_from_ext4(&self, file: &File, disk: &Path) -> Result<()> {
        ext4::check_superblock(file, self.path)?;
        let size = file.metadata().at("stat", self.path)?.len();
        if size > self.limits.total_bytes {
            return Err(Error::OverLimit {
                archive: self.shown.clone(),
                what: "bytes of a disk",
                limit: self.limits.total_bytes,
            });
        }
        self.progress.step(&format!("copying {}", self.shown));
        let copy = File::create_new(disk).at("create", disk)?;
        copy.set_len(size).at("size", disk)?;
        let mut buffer = vec![0; COPY_BYTES];
        let mut offset = 0;
        while offset < size {
            self.check_cancelled()?;
            match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(offset)) {
                Ok(data) => offset = data,
                Err(rustix::io::Errno::NXIO) => break,
                Err(errno) => return Err(Error::io("read", self.path, errno.into())),
            }
            let want = (size - offset).min(buffer.len() as u64) as usize;
            file.read_exact_at(&mut buffer[..want], offset)
                .at("read", self.path)?;
            if buffer[..want].iter().any(|byte| *byte != 0) {
                copy.write_all_at(&buffer[..want], offset)
                    .at("write", disk)?;
            }
            offset += want as u64;
            self.progress.bytes(offset, Some(size));
        }
        drop(copy);
        self.progress.step("checking the file system");
        ext4::check_and_mend(disk, self.path, self.progress)
    }

    fn check_cancelled(&self) -> Result<()> {
        if self.progress.cancelled() {
            Err(Error::Cancelled)
        } else {
            Ok(())
        }
    }
}

/// `ustar` at 257 in both POSIX's and GNU's form.
fn is_tar(start: &[u8]) -> bool {
    start.get(257..262) == Some(b"ustar".as_slice())
}

fn read_start(file: &File, start: &mut [u8]) -> std::io::Result<usize> {
    let mut length = 0;
    while length < start.len() {
        match file.read_at(&mut start[length..], length as u64)? {
            0 => break,
            read => length += read,
        }
    }
    Ok(length)
}

/// The source's bytes and the kind asked for, hashed.
fn key_of_file(path: &Path, kind: Option<ImportKind>, progress: &dyn Progress) -> Result<String> {
    progress.step("hashing the source");
    let mut file = File::open(path).at("open", path)?;
    let total = file.metadata().at("stat", path)?.len();
    let mut hasher = blake3::Hasher::new();
    hasher.update(format!("ratoon import {IMPORT_VERSION} {kind:?}\0").as_bytes());
    let mut buffer = vec![0; COPY_BYTES];
    let mut done = 0;
    loop {
        if progress.cancelled() {
            return Err(Error::Cancelled);
        }
        let read = file.read(&mut buffer).at("read", path)?;
        if read == 0 {
            return Ok(hasher.finalize().to_hex().to_string());
        }
        hasher.update(&buffer[..read]);
        done += read as u64;
        progress.bytes(done, Some(total));
    }
}

/// A folder has no bytes to compare without reading all of it: each import is its own.
fn unique_key(path: &Path) -> String {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos());
    let text = format!(
        "ratoon folder {} {now} {}",
        path.display(),
        std::process::id()
    );
    blake3::hash(text.as_bytes()).to_hex().to_string()
}

/// Everything that parses a hostile archive, without making a disk: for the fuzz target.
/// `scratch` is an empty private folder. Says whether the archive was taken.
#[doc(hidden)]
pub fn fuzz_import(bytes: &[u8], container: bool, scratch: &Path) -> bool {
    let limits = Limits {
        total_bytes: 1 << 20,
        entries: 512,
        ratio_from_bytes: 64 << 10,
        ..Limits::default()
    };
    let attempt = || -> Result<Summary> {
        let mut tree = Tree::create(&scratch.join("tree"))?;
        tree.begin_layer("fuzz");
        let progress = super::Quiet;
        if container {
            let path = scratch.join("source.tar");
            fs::write(&path, bytes).at("write", &path)?;
            let source = Source::tar(File::open(&path).at("open", &path)?, "fuzz", limits)?;
            let reader = Reader {
                source: &source,
                archive: "fuzz",
                limits,
                progress: &progress,
            };
            let plan = if reader.is_docker() {
                reader.plan_docker()?
            } else {
                reader.plan_oci()?
            };
            reader.unpack(&plan, &mut tree)?;
        } else {
            let budget = Budget::new(limits);
            let reader = unpack(bytes, "fuzz", &budget).at("read", scratch)?;
            let mut archive = Archive::new(reader, "fuzz", &budget);
            while let Some(entry) = archive.next()? {
                if !tree.whiteout(&entry)? {
                    tree.put(&entry, &mut archive, &progress)?;
                }
            }
        }
        tree.finish().map(|(summary, _)| summary)
    };
    attempt().is_ok()
}
