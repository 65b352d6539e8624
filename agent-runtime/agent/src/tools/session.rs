//! A shell, and a Python, that live as long as the run: directory, variables and functions stay from command to
//! command.
//!
//! ```text
//!   eval 'COMMAND' </dev/null 9>&-        on the shell's standard input
//!   echo "$?" >&9                         how we learn that it has ended, and how: no output can pretend to be this
//! ```
//!
//! What a command starts has neither the shell's input nor descriptor 9. A command that takes too long is killed with its
//! whole process group, the shell too; the next one gets a new shell in the same directory.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::event::PollFlags;
use rustix::io::Errno;

use super::capture::{Shown, Store};
use super::process::{Kind, Plan, Process, told};
use crate::clock::Moment;
use crate::json;
use crate::stop::{Stop, Waited, wait};

/// What runs a Python session: it reads lines of JSON, each a string of code.
const DRIVER: &str = include_str!("session.py");

/// Which interpreter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Language {
    /// bash, or sh where there is none.
    Shell,
    /// python3.
    Python,
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ran {
    /// With this status.
    Status(i32),
    /// With the session: `exit`, or a signal.
    Ended(String),
    /// It was killed: too long.
    TooLong,
    /// It was killed: the run ends.
    Stopped,
}

/// A session, or the wish for one.
#[derive(Debug)]
pub struct Session {
    language: Language,
    store: Arc<Store>,
    directory: PathBuf,
    process: Option<Process>,
}

impl Session {
    /// One that starts with its first command, in `directory`.
    pub fn new(language: Language, directory: &Path, store: Arc<Store>) -> Self {
        Self {
            language,
            store,
            directory: directory.to_owned(),
            process: None,
        }
    }

    /// Kills it. The next command starts another.
    pub fn restart(&mut self) {
        if let Some(mut process) = self.process.take() {
            if let Some(directory) = process.directory().filter(|dir| dir.is_dir()) {
                self.directory = directory;
            }
            process.kill();
            process.output.forget();
        }
    }

    /// Where the next session starts.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    fn argv(&self) -> Vec<OsString> {
        match self.language {
            Language::Shell if has("bash") => {
                ["bash", "--noprofile", "--norc"].map(OsString::from).into()
            }
            Language::Shell => vec!["/bin/sh".into()],
            Language::Python => ["python3", "-u", "-c", DRIVER].map(OsString::from).into(),
        }
    }

    fn line(&self, code: &str) -> String {
        match self.language {
            Language::Shell => format!("eval {} </dev/null 9>&-\necho \"$?\" >&9\n", quoted(code)),
            Language::Python => json::quoted(code) + "\n",
        }
    }

    /// Runs code to its end, or kills the session.
    pub fn run(
        &mut self,
        code: &str,
        limit: usize,
        until: Moment,
        stop: &Stop,
    ) -> io::Result<(Ran, Shown)> {
        if code.contains('\0') {
            return Err(io::Error::other("a command cannot have a byte 0"));
        }
        let line = self.line(code);
        // One that ended between two commands makes room for a new one.
        if self
            .process
            .as_mut()
            .is_some_and(|old| old.exit().is_some())
        {
            self.restart();
        }
        if self.process.is_none() {
            if !self.directory.is_dir() {
                self.directory = PathBuf::from("/");
            }
            let plan = Plan {
                argv: self.argv(),
                directory: &self.directory,
                kind: Kind::Session,
                limit,
            };
            self.process = Some(Process::start(&plan, &self.store)?);
        }
        let Some(process) = self.process.as_mut() else {
            return Err(io::Error::other("no session"));
        };
        let ran = Self::talk(process, line.as_bytes(), until, stop)?;
        if matches!(ran, Ran::TooLong | Ran::Stopped) {
            if let Some(directory) = process.directory().filter(|dir| dir.is_dir()) {
                self.directory = directory;
            }
            process.kill();
        }
        let shown = process.output.take(&self.store, limit);
        if !matches!(ran, Ran::Status(_)) {
            process.output.forget();
            self.process = None;
        }
        Ok((ran, shown))
    }

    fn talk(process: &mut Process, mut line: &[u8], until: Moment, stop: &Stop) -> io::Result<Ran> {
        let (Some(input), Some(status)) = (&process.input, &process.status) else {
            return Err(io::Error::other("a session without pipes"));
        };
        while !line.is_empty() {
            match rustix::io::write(input, line) {
                Ok(written) => line = &line[written..],
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let on = [(input.as_fd(), PollFlags::OUT), ended(process)];
                    match wait(&on, Some(until), stop)? {
                        Waited::Ready(0) => {}
                        Waited::Ready(_) => break,
                        Waited::Over => return Ok(Ran::TooLong),
                        Waited::Stopped => return Ok(Ran::Stopped),
                    }
                }
                // It has ended: how is seen below.
                Err(Errno::PIPE) => break,
                Err(error) => return Err(error.into()),
            }
        }
        let mut said = Vec::new();
        loop {
            let on = [(status.as_fd(), PollFlags::IN), ended(process)];
            match wait(&on, Some(until), stop)? {
                Waited::Ready(at) => {
                    // The status comes before the end: if it has not, it never will.
                    if read(status, &mut said)? || said.contains(&b'\n') || at == 1 {
                        break;
                    }
                }
                Waited::Over => return Ok(Ran::TooLong),
                Waited::Stopped => return Ok(Ran::Stopped),
            }
        }
        let words = String::from_utf8_lossy(&said);
        if let Some(status) = words.lines().next().and_then(|word| word.parse().ok())
            && said.contains(&b'\n')
        {
            return Ok(Ran::Status(status));
        }
        // Descriptor 9 closed, or the end: it will be there in a moment.
        match wait(&[ended(process)], Some(until), stop)? {
            Waited::Ready(_) => {}
            Waited::Over => return Ok(Ran::TooLong),
            Waited::Stopped => return Ok(Ran::Stopped),
        }
        let told = process.exit().map_or_else(|| "it ended".into(), told);
        Ok(Ran::Ended(told))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // The shell reads the end of its input and ends; what it left in the background goes on.
        if let Some(process) = &mut self.process {
            process.input = None;
        }
    }
}

fn ended(process: &Process) -> (BorrowedFd<'_>, PollFlags) {
    (process.ended(), PollFlags::IN)
}

/// Reads what is there; says whether nobody can write to it any more.
fn read(fd: &OwnedFd, into: &mut Vec<u8>) -> io::Result<bool> {
    let mut buffer = [0; 64];
    loop {
        match rustix::io::read(fd, &mut buffer) {
            Ok(0) => return Ok(true),
            Ok(read) => {
                // A status is a few digits; whoever writes more than that is no shell of ours.
                if into.len() < 64 {
                    into.extend_from_slice(&buffer[..read]);
                }
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
    }
}

/// A word for a shell.
pub fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// Whether there is such a program.
pub fn has(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
