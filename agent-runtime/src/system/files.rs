//! Small files of the system (`/etc/hostname` and the like) that the runtime reads and rewrites.
//!
//! How it fails: the system's error. Never by waiting: what somebody has put in the place of the
//! file (a FIFO, a device) is neither read nor written.

use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, open};
use rustix::io::Errno;

use super::procfs;

/// Puts `bytes` in the place of a file, whole or not at all. Where its directory is read-only or
/// the file is a mount (as container images have it), they are written into the file that is there.
pub(super) fn replace(path: &Path, bytes: &[u8], mode: u32) -> Result<(), Errno> {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().ok_or(Errno::INVAL)?);
    name.push(".ratoon");
    let draft = path.with_file_name(name);
    let result = write_new(&draft, bytes, mode).and_then(|()| rustix::fs::rename(&draft, path));
    match result {
        Ok(()) => Ok(()),
        Err(error) => {
            let _ = rustix::fs::unlink(&draft);
            match error {
                Errno::ROFS | Errno::BUSY => write_into(path, bytes).map_err(|second| {
                    // The first reason is the one to tell, unless there was such a file.
                    if second == Errno::NOENT {
                        error
                    } else {
                        second
                    }
                }),
                _ => Err(error),
            }
        }
    }
}

/// Writes over the beginning of a file that is there; one that is not there is no error.
pub(super) fn write_over(path: &Path, bytes: &[u8]) -> Result<(), Errno> {
    let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    match open(path, flags, Mode::empty()) {
        Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error),
        Ok(file) => write_all(&file, bytes),
    }
}

/// Removes a file; one that is not there is no error.
pub(super) fn remove(path: &Path) -> Result<(), Errno> {
    match rustix::fs::unlink(path) {
        Err(Errno::NOENT) => Ok(()),
        other => other,
    }
}

/// The text of a regular file of at most `limit` bytes; `None` when it is anything else.
pub(super) fn read(path: &Path, limit: usize) -> Result<Option<String>, Errno> {
    let file = match open(
        path,
        OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC,
        Mode::empty(),
    ) {
        Err(Errno::NOENT) => return Ok(Some(String::new())),
        other => other?,
    };
    let stat = rustix::fs::fstat(&file)?;
    let len = usize::try_from(stat.st_size).unwrap_or(usize::MAX);
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || len > limit {
        return Ok(None);
    }
    let mut buffer = Vec::new();
    let text = procfs::read_fd(&file, limit + 1, &mut buffer)?.len();
    // Cut short: not text, or it is growing.
    if text != buffer.len() || text > limit {
        return Ok(None);
    }
    Ok(String::from_utf8(buffer).ok())
}

/// Makes a file of this mode, whatever the umask is; one that was there is removed.
pub(super) fn write_new(path: &Path, bytes: &[u8], mode: u32) -> Result<(), Errno> {
    remove(path)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let mode = Mode::from_raw_mode(mode);
    let file = open(path, flags, mode)?;
    rustix::fs::fchmod(&file, mode)?;
    write_all(&file, bytes)
}

fn write_into(path: &Path, bytes: &[u8]) -> Result<(), Errno> {
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = open(path, flags, Mode::empty())?;
    let stat = rustix::fs::fstat(&file)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(Errno::INVAL);
    }
    rustix::fs::ftruncate(&file, 0)?;
    write_all(&file, bytes)
}

fn write_all(file: &OwnedFd, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::write(file, bytes) {
            Ok(0) => return Err(Errno::IO),
            Ok(len) => bytes = &bytes[len..],
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    #[test]
    fn a_file_is_replaced_whole_with_its_mode() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("name");
        std::fs::write(dir.path().join("target"), "of a link").unwrap();
        symlink("target", &path).unwrap();
        replace(&path, b"new\n", 0o400).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "new\n");
        let metadata = std::fs::symlink_metadata(&path).unwrap();
        assert!(metadata.is_file());
        assert_eq!(metadata.mode() & 0o7777, 0o400);
        let target = std::fs::read_to_string(dir.path().join("target")).unwrap();
        assert_eq!(target, "of a link");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_failure_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("is-a-directory");
        std::fs::create_dir_all(path.join("x")).unwrap();
        assert_eq!(replace(&path, b"new", 0o644), Err(Errno::ISDIR));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        assert_eq!(
            replace(&dir.path().join("none/x"), b"", 0o644),
            Err(Errno::NOENT)
        );
    }

    #[test]
    fn what_is_no_file_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        let mode = Mode::from_raw_mode(0o644);
        rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::Fifo, mode, 0).unwrap();
        assert_eq!(read(&path, 100), Ok(None));
        assert_eq!(write_into(&path, b"x"), Err(Errno::NXIO));
        assert_eq!(write_into(Path::new("/dev/null"), b"x"), Err(Errno::INVAL));
    }

    #[test]
    fn what_is_too_long_or_not_text_is_not_taken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        assert_eq!(read(&path, 4), Ok(Some(String::new())));
        std::fs::write(&path, "1234").unwrap();
        assert_eq!(read(&path, 4), Ok(Some("1234".into())));
        assert_eq!(read(&path, 3), Ok(None));
        std::fs::write(&path, b"12\xff4").unwrap();
        assert_eq!(read(&path, 4), Ok(None));
    }
}
