//! A snapshot as one file: an uncompressed tar with a fixed order of entries.
//!
//! ```text
//! manifest.json  state.bin  [memory.runs | memory.index]  memory.bin.sparse | memory.chunks
//! <layer>.sparse …
//! ```
//!
//! A `.sparse` entry is the file without its holes: records of offset and length (64-bit
//! little-endian, bytes) and that many bytes, ascending; the last record is the file's length
//! with length 0. Import takes entries by the names that the manifest demands, in this order, and
//! refuses any other: no name from the tar ever becomes a path.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat};
use tar::{Archive, Builder, EntryType, Header};

use crate::content::CUT_BYTES;
use crate::digest::Digest;
use crate::error::{Context as _, Error, Result};
use crate::files;
use crate::manifest::{MAX_MANIFEST_BYTES, Manifest, Memory, MemoryKind};
use crate::pages::{Run, is_zero, populated_at};
use crate::signature::{self, PublicKey};
use crate::snapshot::Snapshot;
use crate::store::Store;
use crate::verify::verify_content;
use crate::writer::Writer;
use crate::{Progress, tick};

const SPARSE: &str = ".sparse";
const RECORD_BYTES: u64 = 16;

/// An entry after manifest and state.
struct Part {
    file: String,
    length: u64,
    sparse: bool,
}

/// The entries that a manifest demands, in order.
fn parts(manifest: &Manifest) -> Vec<Part> {
    let Memory {
        kind,
        index,
        file_length,
        ..
    } = &manifest.memory;
    let (index_file, file, sparse) = match kind {
        MemoryKind::Plain => (files::MEMORY_RUNS, files::MEMORY_PLAIN, true),
        MemoryKind::Chunks => (files::MEMORY_INDEX, files::MEMORY_CHUNKS, false),
    };
    let mut parts = Vec::new();
    if let Some(index) = index {
        parts.push(Part {
            file: index_file.to_owned(),
            length: index.length,
            sparse: false,
        });
    }
    parts.push(Part {
        file: file.to_owned(),
        length: *file_length,
        sparse,
    });
    for layer in &manifest.layers {
        if let Some(file) = &layer.file {
            parts.push(Part {
                file: file.clone(),
                length: layer.length,
                sparse: true,
            });
        }
    }
    parts
}

impl Store {
    /// Writes a snapshot into one file at `to`, which appears, or takes the place of what was there,
    /// when it is complete: killed before, nothing is left. What the snapshot builds on is not in
    /// it. The hashes are checked by whoever imports it.
    ///
    /// # Errors
    /// As [`Store::get`]; [`Error::Damaged`], [`Error::Io`], [`Error::DiskFull`],
    /// [`Error::Cancelled`].
    pub fn export(&self, wanted: &str, to: &Path, progress: &dyn Progress) -> Result<Snapshot> {
        let snapshot = self.get(wanted)?;
        let _held = snapshot.hold()?;
        let folder = match to.parent() {
            Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
            Some(parent) => parent,
            None => return Err(Error::request("a file is needed to export to")),
        };
        if to.is_dir() {
            let reason = format!("{} is a folder: name a file in it", to.display());
            return Err(Error::request(reason));
        }
        let (file, unfinished) = Unfinished::create(folder)?;
        let file = write_bundle(&snapshot, file, to, progress)?;
        file.sync_all().at("flush", to)?;
        unfinished.place(&file, to)?;
        files::sync_folder(folder)?;
        Ok(snapshot)
    }

    /// As [`Store::export`], into an open file or pipe, which is called `label` in errors.
    ///
    /// # Errors
    /// As [`Store::export`].
    pub fn export_into(
        &self,
        wanted: &str,
        to: File,
        label: &Path,
        progress: &dyn Progress,
    ) -> Result<Snapshot> {
        let snapshot = self.get(wanted)?;
        let _held = snapshot.hold()?;
        write_bundle(&snapshot, to, label, progress)?;
        Ok(snapshot)
    }

    /// Reads a snapshot from a file that [`Store::export`] wrote. It is verified whole before it
    /// is in the store or has a name. Unless `trusted` is empty, one of these has to have signed it.
    ///
    /// # Errors
    /// [`Error::Damaged`] and [`Error::DamagedChunk`] for a file that does not hold what its
    /// manifest says; those of [`Snapshot::check_signature`]; [`Error::NewerFormat`], [`Error::MissingBase`], [`Error::BadName`],
    /// [`Error::NameTaken`], [`Error::Io`], [`Error::DiskFull`], [`Error::Cancelled`].
    pub fn import(
        &self,
        from: &Path,
        name: Option<&str>,
        trusted: &[PublicKey],
        progress: &dyn Progress,
    ) -> Result<Snapshot> {
        self.import_from(files::open(from)?, from, name, trusted, progress)
    }

    /// As [`Store::import`], from an open file or pipe, which is called `from` in errors.
    ///
    /// # Errors
    /// As [`Store::import`].
    pub fn import_from(
        &self,
        file: File,
        from: &Path,
        name: Option<&str>,
        trusted: &[PublicKey],
        progress: &dyn Progress,
    ) -> Result<Snapshot> {
        let file = BufReader::with_capacity(1 << 20, file);
        let mut archive = Archive::new(file);
        // Raw: long names, links and other extensions are entries that nobody asked for.
        let entries = archive.entries().at("read", from)?.raw(true);
        let mut input = Import {
            entries,
            from,
            progress,
        };
        let (bytes, _) = input.small(files::MANIFEST, None, MAX_MANIFEST_BYTES)?;
        let manifest = Manifest::parse(&bytes, from)?;
        if !trusted.is_empty() {
            signature::check(&bytes, manifest.signature.as_ref(), trusted, from)?;
        }
        // Again when it is published; asked now, because what follows can take long.
        self.check_bases(from, &manifest)?;
        if let Some(name) = name {
            self.check_name(name, Digest::of(&bytes))?;
        }
        let writer = self.begin()?;
        let state = manifest.state;
        let (state_bytes, entry) = input.small(files::STATE, Some(state.length), state.length)?;
        if Digest::of(&state_bytes) != state.blake3 {
            return Err(Error::damaged(from, format!("the hash of {entry} differs")));
        }
        files::write_sealed(&writer.folder().join(files::STATE), &state_bytes)?;
        for part in parts(&manifest) {
            progress.step("importing");
            input.part(&writer, &part)?;
        }
        if input.entries.next().is_some() {
            return Err(Error::damaged(from, "it holds more than its snapshot"));
        }
        verify_content(writer.folder(), &manifest, progress)
            .map_err(|error| in_bundle(error, from))?;
        writer.publish(&bytes, &manifest, name)
    }
}

/// Names the imported file instead of the folder that is about to vanish.
fn in_bundle(error: Error, from: &Path) -> Error {
    let inside = |path: PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        PathBuf::from(format!("{}: {name}", from.display()))
    };
    match error {
        Error::Damaged { path, reason } => Error::Damaged {
            path: inside(path),
            reason,
        },
        Error::DamagedChunk {
            path,
            chunk,
            reason,
        } => Error::DamagedChunk {
            path: inside(path),
            chunk,
            reason,
        },
        other => other,
    }
}

/// Writes all entries; gives the file back.
fn write_bundle(
    snapshot: &Snapshot,
    file: File,
    path: &Path,
    progress: &dyn Progress,
) -> Result<File> {
    let mut out = Export {
        tar: Builder::new(BufWriter::with_capacity(1 << 20, file)),
        path,
        progress,
    };
    out.bytes(files::MANIFEST, &snapshot.bytes.0)?;
    out.bytes(files::STATE, &snapshot.state()?)?;
    for part in parts(&snapshot.manifest) {
        progress.step("exporting");
        out.part(&snapshot.folder, &part)?;
    }
    let buffered = out.tar.into_inner().at("write", path)?;
    buffered
        .into_inner()
        .map_err(|error| Error::io("write", path, error.into_error()))
}

/// A file without its name yet: it goes by itself, even after a kill, or, where the file system has
/// no nameless files, when this is dropped.
struct Unfinished(PathBuf);

impl Unfinished {
    fn create(folder: &Path) -> Result<(File, Self)> {
        let own = Self(folder.join(files::temporary_name()?));
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o644);
        let file = match rustix::fs::open(folder, flags, mode) {
            Ok(fd) => File::from(fd),
            Err(_) => files::create(&own.0)?,
        };
        Ok((file, own))
    }

    /// Gives the file its name.
    fn place(self, file: &File, to: &Path) -> Result<()> {
        if !self.0.exists() {
            let nameless = format!("/proc/self/fd/{}", file.as_raw_fd());
            linkat(CWD, nameless, CWD, &self.0, AtFlags::SYMLINK_FOLLOW).at("name", to)?;
        }
        fs::rename(&self.0, to).at("write", to)
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // There is nothing once it has its place.
        let _ = fs::remove_file(&self.0);
    }
}

struct Export<'e> {
    tar: Builder<BufWriter<File>>,
    path: &'e Path,
    progress: &'e dyn Progress,
}

impl Export<'_> {
    fn entry(&mut self, name: &str, length: u64, content: impl Read) -> Result<()> {
        let mut header = Header::new_gnu();
        header.set_size(length);
        header.set_mode(0o444);
        header.set_mtime(0);
        header.set_entry_type(EntryType::Regular);
        self.tar
            .append_data(&mut header, name, content)
            .at("write", self.path)
    }

    fn bytes(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        self.entry(name, bytes.len() as u64, bytes)
    }

    fn part(&mut self, folder: &Path, part: &Part) -> Result<()> {
        let path = folder.join(&part.file);
        let file = files::open_sized(&path, part.length)?;
        let runs = if part.sparse {
            populated_at(&file, &path)?
        } else {
            Vec::from([Run {
                offset: 0,
                length: part.length,
            }])
        };
        let content: u64 = runs.iter().map(|run| run.length).sum();
        let mut reader = Packed {
            file: &file,
            path: &path,
            sparse: part.sparse,
            total: part.length,
            runs: runs.iter(),
            header: Vec::new(),
            body: 0..0,
            ended: false,
            progress: self.progress,
            done: 0,
            content,
        };
        if part.sparse {
            let length = content + (runs.len() as u64 + 1) * RECORD_BYTES;
            self.entry(&format!("{}{SPARSE}", part.file), length, &mut reader)
        } else {
            self.entry(&part.file, content, &mut reader)
        }
    }
}

/// Reads a file as the bytes of its entry.
struct Packed<'p> {
    file: &'p File,
    path: &'p Path,
    sparse: bool,
    total: u64,
    runs: std::slice::Iter<'p, Run>,
    /// What is left of a record's header, last byte first.
    header: Vec<u8>,
    /// What is left of its bytes in the file.
    body: std::ops::Range<u64>,
    ended: bool,
    progress: &'p dyn Progress,
    done: u64,
    content: u64,
}

impl Read for Packed<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if let Some(byte) = self.header.pop() {
            let Some(first) = into.first_mut() else {
                self.header.push(byte);
                return Ok(0);
            };
            *first = byte;
            return Ok(1);
        }
        if self.body.is_empty() {
            let record = match self.runs.next() {
                Some(run) => {
                    self.body = run.offset..run.end();
                    (run.offset, run.length)
                }
                None if self.ended => return Ok(0),
                None => {
                    self.ended = true;
                    (self.total, 0)
                }
            };
            if self.sparse {
                self.header.extend(record.1.to_be_bytes());
                self.header.extend(record.0.to_be_bytes());
            }
            return self.read(into);
        }
        tick(self.progress, self.done, self.content).map_err(io::Error::other)?;
        let left = self.body.end - self.body.start;
        let count = left.min(into.len() as u64).min(CUT_BYTES);
        let part = &mut into[..count as usize];
        self.file
            .read_exact_at(part, self.body.start)
            .at("read", self.path)
            .map_err(io::Error::other)?;
        self.body.start += count;
        self.done += count;
        Ok(count as usize)
    }
}

struct Import<'i> {
    entries: tar::Entries<'i, BufReader<File>>,
    from: &'i Path,
    progress: &'i dyn Progress,
}

impl<'i> Import<'i> {
    /// The next entry, which has to be this one.
    fn entry(&mut self, name: &str) -> Result<tar::Entry<'i, BufReader<File>>> {
        let damaged = |reason: String| Error::damaged(self.from, reason);
        let entry = self
            .entries
            .next()
            .ok_or_else(|| damaged(format!("it ends before {name}")))?
            // The tar crate says in the same kind of error that the disk failed and that the
            // archive is no archive.
            .map_err(|error| damaged(format!("before {name}: {error}")))?;
        if entry.header().entry_type() != EntryType::Regular
            || *entry.path_bytes() != *name.as_bytes()
        {
            return Err(damaged(format!("it does not go on with {name}")));
        }
        Ok(entry)
    }

    /// Reads an entry into memory. Gives its name too.
    fn small<'n>(
        &mut self,
        name: &'n str,
        length: Option<u64>,
        limit: u64,
    ) -> Result<(Vec<u8>, &'n str)> {
        let mut entry = self.entry(name)?;
        let found = entry.size();
        if found > limit || length.is_some_and(|length| length != found) {
            let reason = format!("{name} is {found} bytes long");
            return Err(Error::damaged(self.from, reason));
        }
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).at("read", self.from)?;
        if bytes.len() as u64 != found {
            return Err(Error::damaged(self.from, format!("it ends within {name}")));
        }
        Ok((bytes, name))
    }

    fn part(&mut self, writer: &Writer, part: &Part) -> Result<()> {
        let path = writer.folder().join(&part.file);
        let name = match part.sparse {
            true => format!("{}{SPARSE}", part.file),
            false => part.file.clone(),
        };
        let mut entry = self.entry(&name)?;
        let file = files::create(&path)?;
        file.set_len(part.length).at("set the length of", &path)?;
        let mut copy = Copy {
            name: &name,
            from: self.from,
            to: &file,
            path: &path,
            progress: self.progress,
            buffer: vec![0; CUT_BYTES as usize],
            total: entry.size(),
        };
        if part.sparse {
            copy.records(&mut entry, part.length)?;
        } else {
            if entry.size() != part.length {
                return Err(copy.damaged("has the wrong length"));
            }
            copy.bytes(&mut entry, 0, part.length)?;
        }
        if entry.read(&mut [0]).at("read", self.from)? != 0 {
            return Err(copy.damaged("goes on after its end"));
        }
        files::seal(&file, &path)
    }
}

/// Copies one entry into its file.
struct Copy<'c> {
    name: &'c str,
    from: &'c Path,
    to: &'c File,
    path: &'c Path,
    progress: &'c dyn Progress,
    buffer: Vec<u8>,
    total: u64,
}

impl Copy<'_> {
    fn damaged(&self, reason: &str) -> Error {
        Error::damaged(self.from, format!("{} {reason}", self.name))
    }

    fn exact(&self, entry: &mut impl Read, into: &mut [u8]) -> Result<()> {
        match entry.read_exact(into) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err(self.damaged("breaks off"))
            }
            other => other.at("read", self.from),
        }
    }

    fn bytes(&mut self, entry: &mut impl Read, at: u64, length: u64) -> Result<()> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut done = 0;
        while done < length {
            let count = (length - done).min(buffer.len() as u64);
            let block = &mut buffer[..count as usize];
            self.exact(entry, block)?;
            if !is_zero(block) {
                self.to
                    .write_all_at(block, at + done)
                    .at("write", self.path)?;
            }
            done += count;
            tick(self.progress, at + done, self.total.max(at + done))?;
        }
        self.buffer = buffer;
        Ok(())
    }

    fn records(&mut self, entry: &mut impl Read, file_length: u64) -> Result<()> {
        let mut next = 0;
        loop {
            let (mut offset, mut length) = ([0; 8], [0; 8]);
            self.exact(entry, &mut offset)?;
            self.exact(entry, &mut length)?;
            let (offset, length) = (u64::from_le_bytes(offset), u64::from_le_bytes(length));
            let end = offset.checked_add(length);
            let Some(end) = end.filter(|end| offset >= next && *end <= file_length) else {
                return Err(self.damaged("has a record outside its file or out of order"));
            };
            if length == 0 {
                if offset != file_length {
                    return Err(self.damaged("has an empty record before its end"));
                }
                return Ok(());
            }
            self.bytes(entry, offset, length)?;
            next = end;
        }
    }
}
