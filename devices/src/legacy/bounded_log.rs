//! A log file that a guest can write to for ever: two files of half the limit each.
//!
//! ```text
//!  append --> <log>  -- half the limit reached --> renamed to <log>.1, begun anew
//! ```
//!
//! How it fails: opening says why; after that nothing does. Bytes that cannot be written (a full
//! disk, a folder gone) are counted and the next bytes tried again, so that the guest never stops.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Why a log could not be opened. The caller names the file.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The file cannot be opened for appending.
    #[error("open for appending: its directory must exist and be writable for this user")]
    Open(#[source] io::Error),
    /// No eventfd.
    #[error("event descriptor: raise the limit of open files (ulimit -n)")]
    Eventfd(#[source] io::Error),
}

/// A log of bounded size.
#[derive(Debug)]
pub struct BoundedLog {
    path: PathBuf,
    previous: PathBuf,
    half_bytes: u64,
    /// `None` after a failure, until a file could be opened again.
    file: Option<File>,
    len_bytes: u64,
    lost_bytes: u64,
}

impl BoundedLog {
    /// The smallest limit in bytes; a smaller one is taken for it.
    pub const MIN_LIMIT_BYTES: u64 = 8 << 10;

    /// Opens `path`, readable for its owner alone, and goes on at its end. It and `<path>.1`
    /// together stay within `limit_bytes`.
    ///
    /// # Errors
    /// [`LogError::Open`].
    pub fn open(path: &Path, limit_bytes: u64) -> Result<Self, LogError> {
        let mut previous = path.as_os_str().to_owned();
        previous.push(".1");
        let mut log = Self {
            path: path.to_owned(),
            previous: previous.into(),
            half_bytes: limit_bytes.max(Self::MIN_LIMIT_BYTES) / 2,
            file: None,
            len_bytes: 0,
            lost_bytes: 0,
        };
        log.open_file().map_err(LogError::Open)?;
        Ok(log)
    }

    /// Bytes that could not be written.
    pub fn lost_bytes(&self) -> u64 {
        self.lost_bytes
    }

    /// Writes `bytes` at the end, into a new file each time that one is full.
    pub fn append(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        while !rest.is_empty() {
            match self.append_some(rest) {
                Ok(count) => rest = &rest[count..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    // Once for each loss that doubles, not for each byte of a full disk.
                    let before = self.lost_bytes;
                    self.lost_bytes += rest.len() as u64;
                    if before.leading_zeros() != self.lost_bytes.leading_zeros() {
                        let log = self.path.display();
                        tracing::warn!(%log, %error, lost_bytes = self.lost_bytes, "log");
                    }
                    return;
                }
            }
        }
    }

    fn append_some(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.len_bytes >= self.half_bytes {
            // A rename that fails (the name is a directory's, say) must not let the file grow.
            if std::fs::rename(&self.path, &self.previous).is_err() {
                std::fs::remove_file(&self.path)?;
            }
            self.file = None;
        }
        if self.file.is_none() {
            self.open_file()?;
        }
        let room = usize::try_from(self.half_bytes.saturating_sub(self.len_bytes));
        let count = bytes.len().min(room.unwrap_or(usize::MAX));
        let file = self.file.as_mut().ok_or(io::ErrorKind::NotFound)?;
        let count = file.write(&bytes[..count])?;
        self.len_bytes += count as u64;
        match count {
            // Full at opening: the next round renames it.
            0 if self.len_bytes < self.half_bytes => Err(io::ErrorKind::WriteZero.into()),
            _ => Ok(count),
        }
    }

    fn open_file(&mut self) -> io::Result<()> {
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&self.path)?;
        self.len_bytes = file.metadata()?.len();
        self.file = Some(file);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: u64 = BoundedLog::MIN_LIMIT_BYTES;

    fn read(path: &Path) -> String {
        String::from_utf8(std::fs::read(path).unwrap()).unwrap()
    }

    #[test]
    fn both_files_stay_within_the_limit_and_hold_the_last_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut log = BoundedLog::open(&path, LIMIT).unwrap();
        let mut all = String::new();
        for line in 0..10_000 {
            let line = format!("line {line}\n");
            log.append(line.as_bytes());
            all += &line;
        }
        let kept = read(&folder.path().join("log.1")) + &read(&path);
        assert!(kept.len() as u64 <= LIMIT, "{} bytes", kept.len());
        assert!(kept.len() as u64 >= LIMIT / 2);
        assert!(all.ends_with(&kept));
        assert_eq!(log.lost_bytes(), 0);
    }

    #[test]
    fn a_write_larger_than_the_limit_is_bounded_too() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut log = BoundedLog::open(&path, 0).unwrap();
        log.append(&vec![b'x'; 3 * LIMIT as usize + 1]);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 1);
        let previous = std::fs::metadata(folder.path().join("log.1")).unwrap();
        assert_eq!(previous.len(), LIMIT / 2);
    }

    #[test]
    fn an_old_log_is_gone_on_with() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        BoundedLog::open(&path, LIMIT).unwrap().append(b"one ");
        BoundedLog::open(&path, LIMIT).unwrap().append(b"two");
        assert_eq!(read(&path), "one two");
    }

    #[test]
    fn a_log_in_no_folder_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let error = BoundedLog::open(&folder.path().join("none/log"), LIMIT).unwrap_err();
        let LogError::Open(source) = error else {
            panic!("{error:?}");
        };
        assert_eq!(source.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_full_disk_costs_bytes_and_nothing_else() {
        // Every write to /dev/full fails with ENOSPC.
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        std::os::unix::fs::symlink("/dev/full", &path).unwrap();
        let mut log = BoundedLog::open(&path, LIMIT).unwrap();
        log.append(b"lost");
        log.append(b"too");
        assert_eq!(log.lost_bytes(), 7);
        // Space again.
        std::fs::remove_file(&path).unwrap();
        log.file = None;
        log.append(b"kept");
        assert_eq!(read(&path), "kept");
        assert_eq!(log.lost_bytes(), 7);
    }

    #[test]
    fn a_rename_that_fails_does_not_let_the_file_grow() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        std::fs::create_dir(folder.path().join("log.1")).unwrap();
        let mut log = BoundedLog::open(&path, LIMIT).unwrap();
        log.append(&vec![b'x'; 2 * LIMIT as usize + 5]);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 5);
    }
}
