//! Processes over the async client: `exec`, `attach`, `processes`.
//!
//! A [`Process`] that is dropped is at the end of its input and its outputs are closed; it is not
//! killed (see [`Process::kill`]) until the connection ends. How it fails: as its call and the
//! connection do, [`RuntimeError`].

use ratoon_protocol::{
    AttachParams, Call, Event, ExecParams, ExitReport, ProcessInfo, ResizeParams, SignalParams,
    Size, Target,
};

use crate::blocking::checked;
use crate::client::Client;
use crate::error::RuntimeError;
use crate::running::{End, Reader, Running, Stdin};

/// A process in the guest.
pub struct Process {
    /// Its id in the guest.
    pub pid: i32,
    /// Where in the process's outputs those of this call begin, in bytes; not 0 after `attach`.
    pub from: [u64; 2],
    /// Its input, when it was asked for; dropping it is the end of input.
    pub stdin: Option<Stdin>,
    /// Its output. A reader that is not read holds the process up; one that is dropped closes the
    /// process's end.
    pub stdout: Reader,
    /// Its errors, likewise.
    pub stderr: Reader,
    client: Client,
    /// The call, without the streams above.
    rest: Rest,
}

struct Rest {
    id: u64,
    data: Reader,
    events: tokio::sync::mpsc::Receiver<Event>,
    ended: End,
}

/// All that a process wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessOutput {
    /// How it ended.
    pub report: ExitReport,
    /// The beginning of its output, up to the limit.
    pub stdout: Vec<u8>,
    /// The beginning of its errors, up to the limit.
    pub stderr: Vec<u8>,
    /// Whether it wrote more than the limit to either; that was thrown away.
    pub truncated: bool,
}

impl Client {
    /// Starts a program.
    ///
    /// # Errors
    /// [`RuntimeError::Call`] when it cannot be started, and as [`Client::begin`].
    pub async fn exec(&self, params: ExecParams) -> Result<Process, RuntimeError> {
        let running = self.begin(Call::Exec(Box::new(params))).await?;
        let started = |event| match event {
            Event::Started { pid } => Some(pid),
            _ => None,
        };
        let (running, pid) = running.until(started).await?;
        Ok(Process::new(self.clone(), running, pid, [0, 0]))
    }

    /// Takes a process over.
    ///
    /// # Errors
    /// [`RuntimeError::Call`] when there is none of this pid, and as [`Client::begin`].
    pub async fn attach(&self, params: AttachParams) -> Result<Process, RuntimeError> {
        let running = self.begin(Call::Attach(params)).await?;
        let attached = |event| match event {
            Event::Attached { from, .. } => Some(from),
            _ => None,
        };
        let (running, from) = running.until(attached).await?;
        Ok(Process::new(self.clone(), running, params.pid, from))
    }

    /// The processes that the runtime has started.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub async fn processes(&self) -> Result<Vec<ProcessInfo>, RuntimeError> {
        self.call(Call::Processes).await
    }
}

impl Process {
    fn new(client: Client, running: Running, pid: i32, from: [u64; 2]) -> Self {
        let rest = Rest {
            id: running.id,
            data: running.data,
            events: running.events,
            ended: running.ended,
        };
        Self {
            pid,
            from,
            stdin: running.stdin,
            stdout: running.stdout,
            stderr: running.stderr,
            client,
            rest,
        }
    }

    fn target(&self) -> Target {
        Target {
            call: Some(self.rest.id),
            pid: None,
        }
    }

    /// Sends a signal (1 to 64) to its process group; SIGKILL reaches all its descendants.
    ///
    /// # Errors
    /// [`RuntimeError::Call`] when it has ended, and as [`Client::call`].
    pub async fn signal(&self, signal: i32) -> Result<(), RuntimeError> {
        let target = self.target();
        let call = Call::Signal(SignalParams { target, signal });
        self.client.call(call).await
    }

    /// Kills it and all its descendants.
    ///
    /// # Errors
    /// As [`Process::signal`].
    pub async fn kill(&self) -> Result<(), RuntimeError> {
        self.signal(9).await
    }

    /// Sets the size of its terminal.
    ///
    /// # Errors
    /// [`RuntimeError::Call`] when it has none, and as [`Client::call`].
    pub async fn resize(&self, size: Size) -> Result<(), RuntimeError> {
        let target = self.target();
        let call = Call::Resize(ResizeParams { target, size });
        self.client.call(call).await
    }

    /// Ends its input and waits for its end; output that was not read is thrown away.
    ///
    /// # Errors
    /// As [`Running::result`].
    pub async fn wait(self) -> Result<ExitReport, RuntimeError> {
        let running = Running {
            id: self.rest.id,
            stdin: self.stdin,
            stdout: self.stdout,
            stderr: self.stderr,
            data: self.rest.data,
            events: self.rest.events,
            ended: self.rest.ended,
        };
        checked(running.result().await?)
    }

    /// Ends its input and collects its outputs, at most `limit` bytes of each.
    ///
    /// # Errors
    /// As [`Process::wait`].
    pub async fn output(mut self, limit: usize) -> Result<ProcessOutput, RuntimeError> {
        self.stdin = None;
        let (stdout, stderr) = tokio::join!(self.stdout.collect(limit), self.stderr.collect(limit));
        // The call knows better why than its streams.
        let report = self.wait().await?;
        let (stdout, stderr) = (
            stdout.map_err(RuntimeError::Io)?,
            stderr.map_err(RuntimeError::Io)?,
        );
        Ok(ProcessOutput {
            report,
            truncated: stdout.1 || stderr.1,
            stdout: stdout.0,
            stderr: stderr.0,
        })
    }
}
