//! `exec_command` and `write_stdin`: each command is a process of its own, which may go on behind the answer.

use std::ffi::OsString;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::io::Errno;
use serde::Deserialize;

use super::capture::Store;
use super::process::{Kind, Plan, Process, told};
use super::session::has;
use super::{Outcome, failed};
use crate::clock::{self, Moment};
use crate::stop::{Stop, Waited, wait};

/// How many may run at once; one more ends the oldest.
const MAX_RUNNING: usize = 16;
/// Bytes of a token, about.
const TOKEN_BYTES: u64 = 4;

/// The arguments of `exec_command`.
#[derive(Debug, Clone, Deserialize)]
pub struct Exec {
    cmd: String,
    #[serde(default)]
    workdir: Option<String>,
    #[serde(default)]
    shell: Option<String>,
    #[serde(default)]
    tty: bool,
    #[serde(default)]
    yield_time_ms: Option<u64>,
    #[serde(default)]
    max_output_tokens: Option<u64>,
}

/// The arguments of `write_stdin`.
#[derive(Debug, Clone, Deserialize)]
pub struct Write {
    session_id: u64,
    #[serde(default)]
    chars: String,
    #[serde(default)]
    yield_time_ms: Option<u64>,
    #[serde(default)]
    max_output_tokens: Option<u64>,
}

/// Processes that run.
#[derive(Debug)]
pub struct Running {
    store: Arc<Store>,
    last: u64,
    all: Vec<(u64, Process)>,
}

impl Running {
    /// None.
    pub fn new(store: Arc<Store>) -> Self {
        Self {
            store,
            last: 0,
            all: Vec::new(),
        }
    }

    /// Kills all of them.
    pub fn kill(&mut self) {
        for (_, mut process) in self.all.drain(..) {
            process.kill();
        }
    }

    /// Starts a command and waits a while for its end.
    pub fn exec(
        &mut self,
        exec: &Exec,
        directory: &Path,
        output_bytes: usize,
        until: Moment,
        stop: &Stop,
    ) -> Outcome {
        if exec.cmd.contains('\0') {
            return failed("a command cannot have a byte 0");
        }
        let shell = exec
            .shell
            .clone()
            .unwrap_or_else(|| if has("bash") { "bash" } else { "/bin/sh" }.to_owned());
        let directory = exec
            .workdir
            .as_ref()
            .filter(|dir| !dir.is_empty())
            .map_or_else(|| directory.to_owned(), |dir| directory.join(dir));
        if !directory.is_dir() {
            return failed(format!("{} is no directory", directory.display()));
        }
        let limit = limit(exec.max_output_tokens, output_bytes);
        let plan = Plan {
            argv: vec![OsString::from(shell), "-c".into(), exec.cmd.clone().into()],
            directory: &directory,
            kind: if exec.tty {
                Kind::Terminal
            } else {
                Kind::Alone
            },
            limit,
        };
        let process = match Process::start(&plan, &self.store) {
            Ok(process) => process,
            Err(error) => return failed(format!("the command cannot be started: {error}")),
        };
        if self.all.len() >= MAX_RUNNING {
            let (_, mut oldest) = self.all.remove(0);
            oldest.kill();
        }
        self.last += 1;
        self.all.push((self.last, process));
        let pause = pause(exec.yield_time_ms.unwrap_or(10_000));
        self.look(self.last, pause, limit, output_bytes, until, stop)
    }

    /// Writes to a command, if there is something to write, and waits a while for more of it.
    pub fn write(
        &mut self,
        write: &Write,
        output_bytes: usize,
        until: Moment,
        stop: &Stop,
    ) -> Outcome {
        let Some((_, process)) = self.all.iter_mut().find(|(id, _)| *id == write.session_id) else {
            return failed(format!(
                "there is no running command with session_id {}",
                write.session_id
            ));
        };
        if !write.chars.is_empty() {
            let Some(input) = &process.input else {
                return failed(
                    "this command has no standard input: start it with \"tty\": true to write to it",
                );
            };
            let mut bytes = write.chars.as_bytes();
            let patience = until.min(clock::now() + Duration::from_secs(5));
            while !bytes.is_empty() {
                match rustix::io::write(input, bytes) {
                    Ok(written) => bytes = &bytes[written..],
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => {
                        let on = [(input.as_fd(), PollFlags::OUT)];
                        if !matches!(wait(&on, Some(patience), stop), Ok(Waited::Ready(_))) {
                            return failed("the command does not read what is written to it");
                        }
                    }
                    // It has ended: that is told below.
                    Err(_) => break,
                }
            }
        }
        let default = if write.chars.is_empty() { 5000 } else { 250 };
        self.look(
            write.session_id,
            pause(write.yield_time_ms.unwrap_or(default)),
            limit(write.max_output_tokens, output_bytes),
            output_bytes,
            until,
            stop,
        )
    }

    fn look(
        &mut self,
        id: u64,
        pause: Duration,
        limit: usize,
        next_limit: usize,
        until: Moment,
        stop: &Stop,
    ) -> Outcome {
        let Some(at) = self.all.iter().position(|(other, _)| *other == id) else {
            return failed("there is no such command");
        };
        let since = clock::now();
        let process = &mut self.all[at].1;
        let on = [(process.ended(), PollFlags::IN)];
        let waited = wait(&on, Some(until.min(since + pause)), stop);
        if matches!(waited, Ok(Waited::Stopped)) {
            self.kill();
            return failed("cancelled: the command was killed");
        }
        let exit = process.exit();
        process.output.limit(limit);
        let shown = process.output.take(&self.store, next_limit);
        let seconds = clock::now().saturating_sub(since).as_secs_f64();
        let state = match exit {
            Some(status) => format!("Process ended: {}", told(status)),
            None => format!("Process is running with session ID {id}"),
        };
        let error = exit.is_some_and(|status| !status.success());
        if exit.is_some() {
            self.all.remove(at);
        }
        Outcome {
            output: format!(
                "Wall time: {seconds:.1} seconds\n{state}\nOutput:\n{}",
                shown.text
            ),
            error,
            file: shown.file,
            finish: None,
        }
    }
}

fn pause(ms: u64) -> Duration {
    Duration::from_millis(ms.clamp(50, 600_000))
}

fn limit(tokens: Option<u64>, most: usize) -> usize {
    let bytes = tokens.map_or(u64::MAX, |tokens| tokens.saturating_mul(TOKEN_BYTES));
    usize::try_from(bytes).unwrap_or(usize::MAX).min(most)
}
