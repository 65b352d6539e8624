//! Files of /proc, in as few system calls as they allow.
//!
//! How it fails: the system's error; a file that goes on for ever is cut at the limit.

use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

/// The kernel fills at least a page with records as long as there are any (fs/seq_file.c), and
/// ours are below 1 KiB each: a shorter read was the last.
const SURELY_LAST: usize = 3 * 1024;

/// Reads at most `limit` bytes of a file into `buffer`, which is cleared before.
pub(super) fn read(
    path: impl AsRef<Path>,
    limit: usize,
    buffer: &mut Vec<u8>,
) -> Result<&str, Errno> {
    read_fd(&open(path)?, limit, buffer)
}

/// Opens a file for reading.
pub(super) fn open(path: impl AsRef<Path>) -> Result<OwnedFd, Errno> {
    rustix::fs::open(
        path.as_ref(),
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

/// [`read`] of an open file. What is not UTF-8 ends the text: the callers' lines are the kernel's.
pub(super) fn read_fd<'a>(
    file: &OwnedFd,
    limit: usize,
    buffer: &'a mut Vec<u8>,
) -> Result<&'a str, Errno> {
    const STEP: usize = 8 * 1024;
    buffer.clear();
    while buffer.len() < limit {
        let start = buffer.len();
        buffer.resize(start + STEP.min(limit - start), 0);
        let len = loop {
            match rustix::io::read(file, &mut buffer[start..]) {
                Err(Errno::INTR) => {}
                other => break other,
            }
        };
        let len = len.inspect_err(|_| buffer.clear())?;
        buffer.truncate(start + len);
        if len < SURELY_LAST.min(limit - start) {
            break;
        }
    }
    Ok(match std::str::from_utf8(buffer) {
        Ok(text) => text,
        Err(error) => {
            let valid = &buffer[..error.valid_up_to()];
            std::str::from_utf8(valid).unwrap_or_default()
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_up_to_the_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "x".repeat(20_000)).unwrap();
        let mut buffer = Vec::new();
        assert_eq!(read(&path, 1 << 20, &mut buffer).unwrap().len(), 20_000);
        assert_eq!(read(&path, 10_000, &mut buffer).unwrap().len(), 10_000);
        assert_eq!(
            read(dir.path().join("none"), 10, &mut buffer),
            Err(Errno::NOENT)
        );
    }

    #[test]
    fn what_is_not_text_ends_the_text() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, b"a b\n\xff\xfe c").unwrap();
        assert_eq!(read(&path, 100, &mut Vec::new()), Ok("a b\n"));
    }
}
