//! A cache of the suite's own, in which kernel and images are the user's: his warm generations stay as they are,
//! and here one is made once for all tests, with an interpreter in it. Where guests are emulated that is the
//! difference between a second and a minute for each machine.
//!
//! It is made when it is first wanted, and removed by [`end`]. A test that starts this program once more hands its
//! own on with [`share`].

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use tempfile::TempDir;

use crate::Ratoon;

/// Where the cache of the tests that have started this process is.
const SHARED: &str = "RATOON_TESTS_CACHE_HOME";

/// What most tests run: a program that is read from the disk for the first time costs seconds there. Whatever of
/// it the image has not is left out.
const WARM_UP: &str = "cd /usr/bin; \
    for name in bash cat cmp cp date dd env grep head hostname id less ls md5sum mkdir mkfifo mount nproc od pgrep \
        rm sed seq setsid sha256sum sleep sort stat stty sync tail tee top touch tr tty umount uname wc yes; do \
        [ -e $name ] && set -- \"$@\" $name; done; \
    cat \"$@\" > /dev/null; \
    cd /usr/lib/x86_64-linux-gnu; \
    cat libacl.so.1 libattr.so.1 libblkid.so.1 libcap.so.2 libcrypto.so.3 libmount.so.1 libpcre2-8.so.0 \
        libproc2.so.0 libselinux.so.1 libsystemd.so.0 libtinfo.so.6 > /dev/null 2>&1; \
    python3 -c 'import errno, hashlib, json, random, secrets, signal, socket, uuid'";

static OWN: OnceLock<TempDir> = OnceLock::new();
static PYTHON: OnceLock<Result<(), String>> = OnceLock::new();

/// The user's cache of kernels and images.
pub fn users() -> PathBuf {
    let base = std::env::var_os("XDG_CACHE_HOME").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache"),
        PathBuf::from,
    );
    base.join("ratoon")
}

/// What XDG_CACHE_HOME is for all that the tests start.
pub fn home() -> PathBuf {
    match std::env::var_os(SHARED) {
        Some(theirs) => theirs.into(),
        None => OWN.get_or_init(another).path().to_owned(),
    }
}

/// The suite's cache.
pub fn dir() -> PathBuf {
    home().join("ratoon")
}

/// Has the command's tests use this cache; with the generation that has Python.
pub fn share(command: &mut Command) -> &mut Command {
    with_python();
    command.env(SHARED, home())
}

/// Makes the generation of 256 MiB with Python, unless that has been done.
pub fn with_python() {
    if std::env::var_os(SHARED).is_some() {
        return;
    }
    let made = PYTHON.get_or_init(|| {
        let args = ["image", "warm", "debian", "--memory", "256M"];
        let args = args.iter().chain(&["--exec", WARM_UP]);
        let done = Ratoon::new().run(args);
        // Tried once: the others need not wait for the same.
        match done.status.success() {
            true => Ok(()),
            false => Err(format!("{done:?}")),
        }
    });
    if let Err(why) = made {
        panic!("there is no generation with Python: {why}");
    }
}

/// Another one like it, without any warm generation.
///
/// # Panics
/// When /tmp takes no files.
pub fn another() -> TempDir {
    let own = tempfile::Builder::new()
        .prefix("ratoon-test-cache-")
        .tempdir_in("/tmp")
        .expect("/tmp takes a directory");
    let (from, to) = (users(), own.path().join("ratoon"));
    std::fs::create_dir(&to).expect("a directory");
    std::os::unix::fs::symlink(from.join("kernel"), to.join("kernel")).expect("a link");
    if from.join("images").exists() {
        copy_links(&from.join("images"), &to.join("images"));
    }
    own
}

/// Copies a tree, but for what is large and never written.
fn copy_links(from: &Path, to: &Path) {
    std::fs::create_dir(to).expect("a directory");
    for entry in std::fs::read_dir(from).expect("a directory").flatten() {
        let target = to.join(entry.file_name());
        let kind = entry.file_type().expect("its kind");
        if kind.is_dir() {
            copy_links(&entry.path(), &target);
        } else if entry.file_name() == "disk.ext4" {
            std::os::unix::fs::symlink(entry.path(), &target).expect("a link");
        } else {
            std::fs::copy(entry.path(), &target).expect("a copy");
        }
    }
}

/// Removes it; to be called after the last test.
///
/// # Panics
/// When it cannot be removed.
pub fn end() {
    if let Some(own) = OWN.get() {
        std::fs::remove_dir_all(own.path()).expect("the cache can be removed");
    }
}
