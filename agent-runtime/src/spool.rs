//! Output that no client takes: a file in the guest, bounded, and the last bytes of it.
//!
//! How it fails: what the disk does not take is counted as lost; the process never notices.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::PathBuf;

use ratoon_protocol::OutputReport;

use crate::swap::forms::carried;

/// How much of one output is kept, bytes.
const LIMIT: u64 = 64 << 20;

/// How much of an output's end the report shows, bytes.
const TAIL: usize = 4096;

/// Where the files are: on the disk, or in memory when that is read-only.
const DIRS: [&str; 2] = ["/var/lib/ratoon/output", "/run/ratoon/output"];

/// One output's file. See the module.
#[derive(Debug)]
pub struct Spool {
    file: Option<File>,
    path: PathBuf,
    /// Offset in the output of the file's first byte.
    start: u64,
    /// Bytes in the file.
    kept: u64,
    /// Bytes that came.
    seen: u64,
    tail: Vec<u8>,
    /// Up to where a client has taken it, as an offset in the file; `None`: nobody does.
    reader: Option<u64>,
}

carried!(Spool {
    file,
    path,
    start,
    kept,
    seen,
    tail,
    reader
});

impl Spool {
    /// A new file, named `<name>.<stream>`, for what follows the output's first `start` bytes.
    pub fn new(name: &str, stream: &str, start: u64) -> Self {
        let name = format!("{name}.{stream}");
        let open = |dir: &&str| -> io::Result<(File, PathBuf)> {
            DirBuilder::new().recursive(true).mode(0o755).create(dir)?;
            let path = PathBuf::from(dir).join(&name);
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW)
                .open(&path)?;
            Ok((file, path))
        };
        let (file, path) = match DIRS.iter().find_map(|dir| open(dir).ok()) {
            Some((file, path)) => (Some(file), path),
            None => (None, PathBuf::new()),
        };
        Self {
            file,
            path,
            start,
            kept: 0,
            seen: 0,
            tail: Vec::new(),
            reader: None,
        }
    }

    /// Whether what was read can be what a spool was.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self) -> Result<(), &'static str> {
        let fits = self.kept <= LIMIT.min(self.seen)
            && self.reader.is_none_or(|at| at <= self.kept)
            && self.start.max(self.seen) <= 1 << 62;
        match fits {
            true => Ok(()),
            false => Err("an output's file has more than came"),
        }
    }

    /// More output.
    pub fn take(&mut self, bytes: &[u8]) {
        let whole = self.kept == self.seen;
        self.seen += bytes.len() as u64;
        let overlong = (self.tail.len() + bytes.len()).saturating_sub(TAIL);
        self.tail.drain(..overlong.min(self.tail.len()));
        self.tail.extend(&bytes[bytes.len().saturating_sub(TAIL)..]);
        // After a gap nothing more: the file has the output's bytes without a hole.
        if let (true, Some(mut file)) = (whole, self.file.as_ref()) {
            let room = usize::try_from(LIMIT - self.kept).unwrap_or(usize::MAX);
            let part = &bytes[..bytes.len().min(room)];
            match file.write(part) {
                Ok(len) => self.kept += len as u64,
                Err(_) => self.seen = self.seen.max(self.kept + 1),
            }
        }
    }

    /// A client takes it from `have`, an offset in the output; returns where that really begins.
    pub fn attach(&mut self, have: u64) -> u64 {
        let at = have.clamp(self.start, self.start + self.kept);
        self.reader = Some(at - self.start);
        at
    }

    /// The client is gone.
    pub fn detach(&mut self) {
        self.reader = None;
    }

    /// Whether the client still has something to take from the file.
    pub fn owes(&self) -> bool {
        self.reader.is_some_and(|at| at < self.kept)
    }

    /// Reads what the client takes next.
    pub fn read(&mut self, buffer: &mut [u8]) -> usize {
        let (Some(at), Some(file)) = (self.reader, &self.file) else {
            return 0;
        };
        let len = file.read_at(buffer, at).unwrap_or(0);
        // What cannot be read back is passed over.
        self.reader = Some(if len == 0 { self.kept } else { at + len as u64 });
        len
    }

    /// How much of the output came before the file, and how much to it.
    pub fn total(&self) -> u64 {
        self.start + self.seen
    }

    /// For the reply.
    pub fn report(&self, sent: u64) -> OutputReport {
        let has_file = self.kept > 0;
        OutputReport {
            bytes: self.total(),
            sent,
            file: has_file.then(|| self.path.to_string_lossy().into_owned()),
            kept: self.kept,
            tail: String::from_utf8_lossy(&self.tail).into_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_memory(start: u64) -> Spool {
        Spool {
            file: Some(tempfile::tempfile().unwrap()),
            path: "x".into(),
            start,
            kept: 0,
            seen: 0,
            tail: Vec::new(),
            reader: None,
        }
    }

    #[test]
    fn a_late_client_reads_on_where_the_earlier_one_stopped() {
        let mut spool = in_memory(100);
        spool.take(b"hello ");
        spool.take(b"world");
        assert_eq!(spool.attach(102), 102);
        let mut buffer = [0; 64];
        let len = spool.read(&mut buffer);
        assert_eq!(&buffer[..len], b"llo world");
        assert!(!spool.owes());
        spool.take(b"!");
        assert!(spool.owes());
        assert_eq!(spool.attach(0), 100);
        assert_eq!(spool.total(), 112);
    }

    #[test]
    fn the_report_has_counts_and_the_end() {
        let mut spool = in_memory(10);
        spool.take(&vec![b'a'; 3 * TAIL]);
        spool.take(b"end");
        let report = spool.report(10);
        assert_eq!(
            (report.bytes, report.kept),
            (10 + 3 * TAIL as u64 + 3, 3 * TAIL as u64 + 3)
        );
        assert_eq!(report.tail.len(), TAIL);
        assert!(report.tail.ends_with("aend"));
    }

    #[test]
    fn what_the_disk_does_not_take_is_counted() {
        let mut spool = in_memory(0);
        spool.file = Some(File::open("/dev/null").unwrap());
        spool.take(b"lost");
        let report = spool.report(0);
        assert_eq!((report.bytes, report.kept, report.file), (4, 0, None));
        assert_eq!(report.tail, "lost");
    }
}
