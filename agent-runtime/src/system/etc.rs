//! Files of `/etc` that are different in each machine: they are in memory, mounted over the image's.
//!
//! ```text
//!   /etc/hostname, hosts, machine-id  <--bind--  /run/ratoon/.etc/...   a copy, made at boot
//! ```
//!
//! `wake` writes them before anything else runs. On the disk that would be a transaction of its journal, and a
//! write-back half a minute later, in each child of a fork; in memory it is a copy. Container engines do the same,
//! and programs know it: such a file can be written to, and not be replaced by another (`EBUSY`). So `/etc/resolv.conf`
//! is not among them: DHCP clients replace it.
//!
//! How it fails: a file that is a link or no file, or that cannot be mounted over, stays the image's; `wake` then
//! writes that.

use std::io;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, open};
use rustix::io::Errno;

use super::settings::ETC;
use super::{files, procfs};

/// Where they are.
const DIR: &str = "/run/ratoon/.etc";

/// A longer file stays on the disk.
const MAX_LEN: usize = 64 * 1024;

/// The files, and their modes where the image has none.
const FILES: [(&str, u32); 3] = [("hostname", 0o644), ("hosts", 0o644), ("machine-id", 0o444)];

/// At boot, before programs run.
///
/// # Errors
/// The first file's that could not be had in memory, with its name; the others are.
pub fn keep_in_memory() -> Result<(), (&'static str, io::Error)> {
    let mut result = Ok(());
    for dir in ["/run/ratoon", DIR] {
        match rustix::fs::mkdir(dir, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err((DIR, error.into())),
        }
    }
    for (name, mode) in FILES {
        let copied = copy(&Path::new(ETC).join(name), &Path::new(DIR).join(name), mode);
        match copied.and_then(|copied| if copied { mount(name) } else { Ok(()) }) {
            // A read-only image without the file.
            Ok(()) | Err(Errno::ROFS | Errno::NOENT) => {}
            Err(error) => result = result.and(Err((name, error.into()))),
        }
    }
    result
}

/// Whether `from` is a file to be had in memory, and `to` is like it. One that is not there is made: it is what the
/// other is mounted on.
fn copy(from: &Path, to: &Path, mode: u32) -> Result<bool, Errno> {
    let flags =
        OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = match open(from, flags, Mode::empty()) {
        Err(Errno::NOENT) => open(from, flags | OFlags::CREATE, Mode::from_raw_mode(mode))?,
        // A link.
        Err(Errno::LOOP) => return Ok(false),
        other => other?,
    };
    let stat = rustix::fs::fstat(&file)?;
    let len = usize::try_from(stat.st_size).unwrap_or(usize::MAX);
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || len > MAX_LEN {
        return Ok(false);
    }
    let mut buffer = Vec::new();
    let text = procfs::read_fd(&file, len + 1, &mut buffer)?;
    // Not all of it: it is not text.
    if text.len() != len {
        return Ok(false);
    }
    files::write_new(to, text.as_bytes(), stat.st_mode & 0o777)?;
    Ok(true)
}

fn mount(name: &str) -> Result<(), Errno> {
    rustix::mount::mount_bind(Path::new(DIR).join(name), Path::new(ETC).join(name))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    #[test]
    fn a_plain_small_text_is_copied_with_its_mode_and_nothing_else_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let to = path("copy");
        fs::write(path("plain"), "box\n").unwrap();
        fs::write(path("long"), vec![b'x'; MAX_LEN + 1]).unwrap();
        fs::write(path("bytes"), b"\xff\n").unwrap();
        symlink("plain", path("link")).unwrap();
        let mode = Mode::from_raw_mode(0o644);
        rustix::fs::mknodat(rustix::fs::CWD, path("fifo"), FileType::Fifo, mode, 0).unwrap();
        for name in ["long", "bytes", "link", "fifo"] {
            assert_eq!(copy(&path(name), &to, 0o644), Ok(false), "{name}");
            assert!(!to.exists(), "{name}");
        }
        assert_eq!(copy(&path("plain"), &to, 0o444), Ok(true));
        assert_eq!(fs::read_to_string(&to).unwrap(), "box\n");
        // One that is not there is made to be mounted on.
        assert_eq!(copy(&path("none"), &to, 0o444), Ok(true));
        assert_eq!(fs::read_to_string(&to).unwrap(), "");
        for made in ["none", "copy"] {
            let made = fs::metadata(path(made)).unwrap();
            assert_eq!((made.len(), made.mode() & 0o777), (0, 0o444));
        }
        assert_eq!(copy(&path("no/dir"), &to, 0o444), Err(Errno::NOENT));
    }
}
