//! Keys, and a process that does not give them away.
//!
//! A key comes from an inherited descriptor or from a command's output: never from the command line
//! or the environment, which other processes may read. What is read is zeroed; what stays is one
//! header value that is marked as sensitive and the patterns of the [`crate::mask`]. The process is
//! not dumpable: no core, and no other process of the same user reads its memory.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::process::{Command, Stdio};

use zeroize::Zeroizing;

use crate::config::KeySource;

/// The longest key.
pub const MAX_KEY_BYTES: usize = 4096;
/// The shortest: pieces of a shorter one are in any text, and masking would spoil it.
pub const MIN_KEY_BYTES: usize = 8;

/// A key.
pub struct Key(Zeroizing<Vec<u8>>);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(..)")
    }
}

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The descriptor cannot be read.
    #[error(
        "descriptor {fd} gives no key: open it for the bridge, as in `ratoon-bridge … {fd}<key-file`"
    )]
    Fd {
        /// Which.
        fd: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The command cannot be run.
    #[error("the key's command \"{program}\" does not run")]
    Command {
        /// Its name.
        program: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The command failed.
    #[error("the key's command \"{program}\" ended with {status}")]
    Failed {
        /// Its name.
        program: String,
        /// How.
        status: std::process::ExitStatus,
    },
    /// What was read is no key.
    #[error(
        "what was given as the key of \"{provider}\" is none: {MIN_KEY_BYTES} to {MAX_KEY_BYTES} visible ASCII characters on one line"
    )]
    Form {
        /// Whose.
        provider: String,
    },
}

impl Key {
    /// The key's bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Takes a key that is known already.
    ///
    /// # Errors
    /// When it cannot be one.
    pub fn new(provider: &str, mut bytes: Zeroizing<Vec<u8>>) -> Result<Self, KeyError> {
        while bytes.last().is_some_and(|byte| b"\r\n".contains(byte)) {
            bytes.pop();
        }
        let fits = (MIN_KEY_BYTES..=MAX_KEY_BYTES).contains(&bytes.len());
        if !fits || !bytes.iter().all(u8::is_ascii_graphic) {
            return Err(KeyError::Form {
                provider: provider.to_owned(),
            });
        }
        Ok(Self(bytes))
    }

    /// Reads a provider's key from where its configuration says.
    ///
    /// # Errors
    /// When there is none.
    pub fn load(provider: &str, source: &KeySource) -> Result<Option<Self>, KeyError> {
        match source {
            KeySource::None => Ok(None),
            KeySource::Fd(fd) => {
                let read = inherited(*fd)
                    .and_then(read_to_end)
                    .map_err(|source| KeyError::Fd { fd: *fd, source })?;
                Self::new(provider, read).map(Some)
            }
            KeySource::Command(argv) => {
                let program = argv.first().cloned().unwrap_or_default();
                let failed = |source| KeyError::Command {
                    program: program.clone(),
                    source,
                };
                let mut child = Command::new(&program)
                    .args(argv.get(1..).unwrap_or_default())
                    .stdin(Stdio::null())
                    .stdout(Stdio::piped())
                    .spawn()
                    .map_err(failed)?;
                let read = match child.stdout.take() {
                    Some(out) => read_to_end(out).map_err(failed)?,
                    None => Zeroizing::default(),
                };
                let status = child.wait().map_err(failed)?;
                // One that says too much is not listened to any longer, and may fail of that.
                if !status.success() && read.len() <= MAX_KEY_BYTES {
                    return Err(KeyError::Failed { program, status });
                }
                Self::new(provider, read).map(Some)
            }
        }
    }
}

fn inherited(fd: u32) -> io::Result<File> {
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    if fd <= 2 {
        return Err(io::Error::other("0, 1 and 2 are the standard streams"));
    }
    // SAFETY: fcntl only asks the kernel whether the number is an open descriptor.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, and nobody else owns it: keys are read once, first of all, before the
    // process has opened anything but its standard streams and its configuration, which is closed.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// Reads without growing a buffer, which would leave copies behind.
fn read_to_end(mut from: impl Read) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut buffer = Zeroizing::new(vec![0; MAX_KEY_BYTES + 3]);
    let mut len = 0;
    while len < buffer.len() {
        match from.read(&mut buffer[len..])? {
            0 => break,
            read => len += read,
        }
    }
    buffer.truncate(len);
    Ok(buffer)
}

/// Makes this process one whose memory nobody else reads: not dumpable, no core, no new privileges.
/// Called before a key is read.
///
/// # Errors
/// When the kernel refuses; then no key should be read.
pub fn harden() -> io::Result<()> {
    use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    setrlimit(
        Resource::Core,
        Rlimit {
            current: Some(0),
            maximum: Some(0),
        },
    )?;
    Ok(())
}

/// From here on no program that this process starts has more rights than it. Called when keys are
/// read: their commands may need more.
///
/// # Errors
/// When the kernel refuses.
pub fn no_new_privileges() -> io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(script: &str) -> Result<Option<Key>, KeyError> {
        let argv = ["sh", "-c", script].map(str::to_owned).to_vec();
        Key::load("p", &KeySource::Command(argv))
    }

    #[test]
    fn a_key_comes_from_a_commands_output() {
        let key = command("echo sk-abcdefgh").expect("a key").expect("one");
        assert_eq!(key.bytes(), b"sk-abcdefgh");
        assert_eq!(format!("{key:?}"), "Key(..)");
        assert!(matches!(command("exit 3"), Err(KeyError::Failed { .. })));
        for script in [
            "true",
            "echo short",
            "printf 'two\\nlines-of-it'",
            "head -c 9000 /dev/zero",
        ] {
            assert!(
                matches!(command(script), Err(KeyError::Form { .. })),
                "{script}"
            );
        }
    }

    #[test]
    fn a_descriptor_that_is_not_there_is_named() {
        for fd in [0, 2, 9999, u32::MAX] {
            let error = Key::load("p", &KeySource::Fd(fd)).unwrap_err();
            assert!(
                error.to_string().contains(&format!("descriptor {fd}")),
                "{error}"
            );
        }
    }
}
