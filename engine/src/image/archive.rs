//! Reads tar streams, one entry after another, trusting nothing.
//!
//! Formats: POSIX ustar and pax (IEEE Std 1003.1, pax), and GNU's long names, as docker, buildah,
//! GNU tar and mmdebstrap write them. The blocks are walked here and not by the tar crate's
//! iterator, which would hold a long name of any length in memory and takes a stream that breaks
//! off between two entries for a whole one.

use std::io::{self, Read};

use tar::{EntryType, Header};

use super::error::{Error, Result};
use super::stream::Budget;

const BLOCK_BYTES: usize = 512;
/// Linux's PATH_MAX, less the NUL.
const MAX_PATH_BYTES: usize = 4095;
/// Linux's NAME_MAX.
const MAX_NAME_BYTES: usize = 255;
/// A pax header: names, sizes, attributes.
const MAX_PAX_BYTES: u64 = 1 << 20;
/// Names and values of one entry's extended attributes: ext4 keeps them in one block of 4 KiB.
const MAX_XATTR_BYTES: usize = 3584;
const XATTR_PREFIX: &str = "SCHILY.xattr.";

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Folder,
    /// The target as written; never followed here.
    Symlink(Vec<u8>),
    /// The target's components from the root.
    HardLink(Vec<Vec<u8>>),
    /// In debugfs' words: `p`, `c <major> <minor>`, `b <major> <minor>`.
    Device(String),
}

/// One entry, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// Components from the root: no empty ones, no `.`, no `..`.
    pub(super) path: Vec<Vec<u8>>,
    pub(super) kind: Kind,
    /// Permission, set-id and sticky bits.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Seconds since 1970.
    pub(super) mtime: i64,
    /// Bytes of a file.
    pub(super) size: u64,
    pub(super) xattrs: Vec<(String, Vec<u8>)>,
}

impl Entry {
    /// The path for people.
    pub(super) fn shown(&self) -> String {
        String::from_utf8_lossy(&self.path.join(&b'/')).into_owned()
    }
}

/// Overrides that came in headers before the entry's own.
#[derive(Debug, Default)]
struct Extra {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<i64>,
    xattrs: Vec<(String, Vec<u8>)>,
}

/// A tar being read.
pub(super) struct Archive<'r> {
    reader: Box<dyn Read + 'r>,
    name: String,
    budget: Budget,
    /// Of the next byte.
    offset: u64,
    /// Of the entry handed out: its data and the padding that nobody read yet.
    left: u64,
    padding: u64,
}

impl<'r> Archive<'r> {
    /// `name` stands in errors.
    pub(super) fn new(reader: Box<dyn Read + 'r>, name: &str, budget: &Budget) -> Self {
        Self {
            reader,
            name: name.to_owned(),
            budget: budget.clone(),
            offset: 0,
            left: 0,
            padding: 0,
        }
    }

    /// Where the data of the entry handed out last begin, in bytes from the start.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// The next entry, or none at the end mark. Its data are then read from this archive.
    pub(super) fn next(&mut self) -> Result<Option<Entry>> {
        let mut extra = Extra::default();
        loop {
            self.skip_rest()?;
            let at = self.offset;
            let Some(header) = self.header()? else {
                return Ok(None);
            };
            // Extension headers count too: a stream of nothing else must end.
            self.budget.count_entry(&self.name)?;
            let size = header
                .entry_size()
                .map_err(|error| self.damaged(at, error.to_string()))?;
            match header.entry_type() {
                EntryType::GNULongName => extra.path = Some(self.long_name(size)?),
                EntryType::GNULongLink => extra.link = Some(self.long_name(size)?),
                EntryType::XHeader => self.pax(size, &mut extra)?,
                EntryType::XGlobalHeader => {
                    // Comments, such as git's; nothing we use may be set for all entries.
                    if size > MAX_PAX_BYTES {
                        return Err(self.over("bytes of a pax header", MAX_PAX_BYTES));
                    }
                    self.hold(size);
                }
                _ => return self.entry(&header, at, size, extra).map(Some),
            }
        }
    }

    fn entry(&mut self, header: &Header, at: u64, size: u64, extra: Extra) -> Result<Entry> {
        let size = extra.size.unwrap_or(size);
        let raw_path = extra
            .path
            .unwrap_or_else(|| header.path_bytes().into_owned());
        let path = self.components(&raw_path, &raw_path)?;
        let raw_link = extra
            .link
            .or_else(|| header.link_name_bytes().map(std::borrow::Cow::into_owned))
            .unwrap_or_default();
        let number =
            |value: io::Result<u64>| value.map_err(|error| self.damaged(at, error.to_string()));
        let mode = header
            .mode()
            .map_err(|error| self.damaged(at, error.to_string()))?;
        let uid = extra.uid.map_or_else(|| number(header.uid()), Ok)?;
        let gid = extra.gid.map_or_else(|| number(header.gid()), Ok)?;
        let mtime = match extra.mtime {
            Some(mtime) => mtime,
            None => number(header.mtime())? as i64,
        };
        let kind = self.kind(header, at, &raw_path, &raw_link)?;
        // Links and folders carry no data, whatever their size field says (some writers put a hard
        // link's target size there).
        let size = if kind == Kind::File { size } else { 0 };
        let id = |id: u64| {
            u32::try_from(id).map_err(|_| self.damaged(at, format!("owner {id} is over 32 bits")))
        };
        let entry = Entry {
            path,
            mode: mode & 0o7777,
            uid: id(uid)?,
            gid: id(gid)?,
            mtime: mtime.clamp(0, i64::from(i32::MAX)),
            size,
            xattrs: extra.xattrs,
            kind,
        };
        self.hold(size);
        Ok(entry)
    }

    fn kind(&self, header: &Header, at: u64, path: &[u8], link: &[u8]) -> Result<Kind> {
        let device = |letter: char| -> Result<Kind> {
            let part = |value: io::Result<Option<u32>>| {
                value
                    .map_err(|error| self.damaged(at, error.to_string()))
                    .map(Option::unwrap_or_default)
            };
            let (major, minor) = (part(header.device_major())?, part(header.device_minor())?);
            // The kernel's 12 and 20 bits (include/linux/kdev_t.h).
            if major > 0xfff || minor > 0xf_ffff {
                return Err(self.damaged(at, format!("device {major}:{minor} cannot exist")));
            }
            Ok(Kind::Device(format!("{letter} {major} {minor}")))
        };
        match header.entry_type() {
            EntryType::Regular | EntryType::Continuous if path.ends_with(b"/") => Ok(Kind::Folder),
            EntryType::Regular | EntryType::Continuous => Ok(Kind::File),
            EntryType::Directory => Ok(Kind::Folder),
            EntryType::Symlink if link.is_empty() || link.len() > MAX_PATH_BYTES => {
                Err(self.refuse(path, "its link target is empty or over 4095 bytes"))
            }
            EntryType::Symlink => Ok(Kind::Symlink(link.to_vec())),
            EntryType::Link => Ok(Kind::HardLink(self.components(link, path)?)),
            EntryType::Char => device('c'),
            EntryType::Block => device('b'),
            EntryType::Fifo => Ok(Kind::Device("p".into())),
            EntryType::GNUSparse => Err(self.refuse(
                path,
                "it is stored sparse: pack again without `tar --sparse`",
            )),
            other => Err(self.refuse(
                path,
                &format!(
                    "entry type {:#04x} is not one of a file system",
                    other.as_byte()
                ),
            )),
        }
    }

    /// Splits a path; refuses what would leave the image. A leading `/` means the image's root.
    fn components(&self, path: &[u8], entry: &[u8]) -> Result<Vec<Vec<u8>>> {
        if path.len() > MAX_PATH_BYTES {
            return Err(self.refuse(&entry[..entry.len().min(80)], "its path is over 4095 bytes"));
        }
        let mut components = Vec::new();
        for component in path.split(|byte| *byte == b'/') {
            match component {
                b"" | b"." => continue,
                b".." => return Err(self.refuse(entry, "`..` could lead out of the image")),
                _ => {}
            }
            if component.len() > MAX_NAME_BYTES {
                return Err(self.refuse(entry, "a name in its path is over 255 bytes"));
            }
            if component.iter().any(|byte| matches!(byte, 0 | b'\n')) {
                return Err(self.refuse(entry, "a name in its path holds a NUL or a line break"));
            }
            components.push(component.to_vec());
        }
        Ok(components)
    }

    /// A GNU long name: the data of its own entry, with a NUL at the end.
    fn long_name(&mut self, size: u64) -> Result<Vec<u8>> {
        if size > MAX_PATH_BYTES as u64 + 1 {
            return Err(self.over("bytes of a path", MAX_PATH_BYTES as u64));
        }
        let mut name = self.small(size)?;
        let end = name
            .iter()
            .position(|byte| *byte == 0)
            .unwrap_or(name.len());
        name.truncate(end);
        Ok(name)
    }

    fn pax(&mut self, size: u64, extra: &mut Extra) -> Result<()> {
        if size > MAX_PAX_BYTES {
            return Err(self.over("bytes of a pax header", MAX_PAX_BYTES));
        }
        let at = self.offset;
        let bytes = self.small(size)?;
        let mut xattr_bytes = 0;
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let (key, value, after) = pax_record(rest)
                .ok_or_else(|| self.damaged(at, "a pax record does not parse".into()))?;
            rest = after;
            let bad = || self.damaged(at, format!("pax record {key} is not a number"));
            let text = std::str::from_utf8(value).unwrap_or_default();
            let number = || text.parse::<u64>().map_err(|_| bad());
            match key {
                "path" => extra.path = Some(value.to_vec()),
                "linkpath" => extra.link = Some(value.to_vec()),
                "size" => extra.size = Some(number()?),
                "uid" => extra.uid = Some(number()?),
                "gid" => extra.gid = Some(number()?),
                "mtime" => {
                    let seconds = text.split('.').next().unwrap_or_default();
                    extra.mtime = Some(seconds.parse().map_err(|_| bad())?);
                }
                _ if key.starts_with("GNU.sparse.") => {
                    return Err(self.damaged(
                        at,
                        "it was packed with `tar --sparse`: pack again without it".into(),
                    ));
                }
                _ => {
                    let Some(name) = key.strip_prefix(XATTR_PREFIX) else {
                        continue;
                    };
                    if !keep_xattr(name) {
                        continue;
                    }
                    xattr_bytes += name.len() + value.len();
                    if xattr_bytes > MAX_XATTR_BYTES {
                        return Err(self.over(
                            "bytes of extended attributes of a file",
                            MAX_XATTR_BYTES as u64,
                        ));
                    }
                    extra.xattrs.push((name.to_owned(), value.to_vec()));
                }
            }
        }
        Ok(())
    }

    /// Reads the data of an extension header, whose size was checked.
    fn small(&mut self, size: u64) -> Result<Vec<u8>> {
        self.hold(size);
        let mut bytes = vec![0; size as usize];
        let at = self.offset;
        match io::Read::read_exact(self, &mut bytes) {
            Ok(()) => Ok(bytes),
            Err(error) => Err(self.read_error(at, error)),
        }
    }

    /// One header, or none at the end mark.
    fn header(&mut self) -> Result<Option<Header>> {
        let at = self.offset;
        let mut block = [0; BLOCK_BYTES];
        let mut filled = 0;
        while filled < BLOCK_BYTES {
            match self.reader.read(&mut block[filled..]) {
                Ok(0) => {
                    return Err(
                        self.damaged(at, "it ends without an end mark: it is cut short".into())
                    );
                }
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.read_error(at, error)),
            }
        }
        self.offset += BLOCK_BYTES as u64;
        if block.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let header = Header::from_byte_slice(&block);
        let sum: u32 = block[..148]
            .iter()
            .chain(&block[156..])
            .map(|byte| u32::from(*byte))
            .sum();
        let sum = sum + 8 * u32::from(b' ');
        if header.cksum().ok() != Some(sum) {
            return Err(self.damaged(at, "no tar header with a right checksum here".into()));
        }
        Ok(Some(header.clone()))
    }

    fn hold(&mut self, size: u64) {
        self.left = size;
        let over = size % BLOCK_BYTES as u64;
        self.padding = if over == 0 {
            0
        } else {
            BLOCK_BYTES as u64 - over
        };
    }

    /// Passes over what is left of the entry before.
    fn skip_rest(&mut self) -> Result<()> {
        let mut left = self.left.saturating_add(self.padding);
        (self.left, self.padding) = (0, 0);
        let at = self.offset;
        let mut sink = [0; 16 << 10];
        while left > 0 {
            let want = left.min(sink.len() as u64) as usize;
            match self.reader.read(&mut sink[..want]) {
                Ok(0) => return Err(self.damaged(at, "it breaks off inside an entry".into())),
                Ok(read) => {
                    left -= read as u64;
                    self.offset += read as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.read_error(at, error)),
            }
        }
        Ok(())
    }

    /// Reads to the end of the stream, past the end mark: pipes and hashes want all of it.
    pub(super) fn drain(mut self) -> Result<()> {
        let at = self.offset;
        io::copy(&mut self.reader, &mut io::sink())
            .map(drop)
            .map_err(|error| self.read_error(at, error))
    }

    fn read_error(&self, at: u64, error: io::Error) -> Error {
        if error.get_ref().is_some_and(|inner| inner.is::<Error>()) {
            return Error::io("read", self.name.as_ref(), error);
        }
        if error.kind() == io::ErrorKind::UnexpectedEof {
            return self.damaged(at, "it breaks off inside an entry".into());
        }
        Error::io("read", self.name.as_ref(), error)
    }

    fn damaged(&self, offset: u64, reason: String) -> Error {
        Error::DamagedArchive {
            archive: self.name.clone(),
            offset,
            reason,
        }
    }

    fn over(&self, what: &'static str, limit: u64) -> Error {
        Error::OverLimit {
            archive: self.name.clone(),
            what,
            limit,
        }
    }

    fn refuse(&self, entry: &[u8], reason: &str) -> Error {
        Error::RefusedEntry {
            archive: self.name.clone(),
            entry: String::from_utf8_lossy(entry).into_owned(),
            reason: reason.to_owned(),
        }
    }
}

/// The data of the entry handed out last.
impl Read for Archive<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = self.left.min(buffer.len() as u64) as usize;
        if want == 0 {
            return Ok(0);
        }
        let read = self.reader.read(&mut buffer[..want])?;
        if read == 0 {
            return Err(self
                .damaged(self.offset, "it breaks off inside an entry".into())
                .into_io());
        }
        self.left -= read as u64;
        self.offset += read as u64;
        Ok(read)
    }
}

/// Splits `<length> <key>=<value>\n` off. The value may hold line breaks: the length counts.
fn pax_record(bytes: &[u8]) -> Option<(&str, &[u8], &[u8])> {
    let space = bytes.iter().take(20).position(|byte| *byte == b' ')?;
    let length: usize = std::str::from_utf8(&bytes[..space]).ok()?.parse().ok()?;
    let record = bytes.get(space + 1..length)?;
    let record = record.strip_suffix(b"\n")?;
    let equals = record.iter().position(|byte| *byte == b'=')?;
    let key = std::str::from_utf8(&record[..equals]).ok()?;
    Some((key, &record[equals + 1..], &bytes[length..]))
}

/// Which extended attributes mean something in a guest. A host's labels (`security.selinux`) and
/// overlayfs' own marks do not; POSIX ACLs have another form on disk than in an archive.
fn keep_xattr(name: &str) -> bool {
    let known = name.starts_with("user.")
        || name == "security.capability"
        || (name.starts_with("trusted.") && !name.starts_with("trusted.overlay."));
    known && name.len() <= MAX_NAME_BYTES && !name.contains(['\n', '\0'])
}
