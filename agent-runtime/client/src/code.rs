//! Code over the async client: `code.*`. A *context* is an interpreter in the guest that keeps its
//! state from cell to cell; it lives until it is stopped or the machine ends, whoever is connected.
//!
//! What a cell writes and shows are the guest's words: check them before they are shown on a
//! terminal or in a browser. How it fails: as its call and the connection do, [`RuntimeError`]; that
//! a cell raised an exception is no failure but its [`CodeEnd::status`].

use std::task::{Context, Poll};

use ratoon_protocol::{Call, CodeContext, CodeData, CodeEnd, CodeName, CodeRun, CodeStart};

use crate::client::Client;
use crate::error::RuntimeError;
use crate::lines::Lines;
use crate::running::{Reader, Running};

/// The longest value that is taken, in bytes of JSON; the runtime sends at most 9 MiB.
const VALUE_LIMIT: usize = 10 << 20;

/// A cell that runs. Dropped, its outputs are closed and it goes on; see [`Client::code_interrupt`].
pub struct Cell {
    running: Running,
    values: Lines,
}

/// Something that a cell brings, in order within its kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CellEvent {
    /// It wrote this to standard output.
    Stdout(Vec<u8>),
    /// It wrote this to standard error.
    Stderr(Vec<u8>),
    /// It shows a value, or this is the value of its last expression.
    Value(CodeData),
}

/// All that a cell brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CellOutput {
    /// How it ended.
    pub end: CodeEnd,
    /// The beginning of its output, up to the limit.
    pub stdout: Vec<u8>,
    /// The beginning of its errors, up to the limit.
    pub stderr: Vec<u8>,
    /// The values that it showed, with the one of its last expression, up to the limit.
    pub values: Vec<CodeData>,
    /// Whether there was more than the limit of any; that was thrown away.
    pub truncated: bool,
}

impl Cell {
    /// What comes next; `None` when all has come: then [`Cell::finish`]. May be dropped and called
    /// again. A cell whose output is not asked for waits when a window (256 KiB) of it is full.
    ///
    /// # Errors
    /// [`RuntimeError::Violation`]: a value that is none. When the call fails this is `None`, and
    /// [`Cell::finish`] says why.
    pub async fn next(&mut self) -> Result<Option<CellEvent>, RuntimeError> {
        loop {
            if let Some(value) = self.values.next()? {
                return Ok(Some(CellEvent::Value(value)));
            }
            match std::future::poll_fn(|context| self.poll(context)).await {
                Some(Piece::Event(event)) => return Ok(Some(event)),
                Some(Piece::Values(bytes)) => self.values.feed(&bytes),
                None => return Ok(None),
            }
        }
    }

    /// Whatever of the three comes first; `None` when all are at their end.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Piece>> {
        let running = &mut self.running;
        let stdout = poll(&mut running.stdout, context);
        if let Poll::Ready(Some(bytes)) = stdout {
            return Poll::Ready(Some(Piece::Event(CellEvent::Stdout(bytes))));
        }
        let stderr = poll(&mut running.stderr, context);
        if let Poll::Ready(Some(bytes)) = stderr {
            return Poll::Ready(Some(Piece::Event(CellEvent::Stderr(bytes))));
        }
        let data = poll(&mut running.data, context);
        if let Poll::Ready(Some(bytes)) = data {
            return Poll::Ready(Some(Piece::Values(bytes)));
        }
        match stdout.is_ready() && stderr.is_ready() && data.is_ready() {
            true => Poll::Ready(None),
            false => Poll::Pending,
        }
    }

    /// Waits for its end; what was not asked for is thrown away.
    ///
    /// # Errors
    /// As [`Running::result`].
    pub async fn finish(self) -> Result<CodeEnd, RuntimeError> {
        self.running.result().await
    }

    /// Collects all to its end: at most `limit` bytes of each output, and values of as many bytes of
    /// JSON together.
    ///
    /// # Errors
    /// As [`Cell::finish`], and [`RuntimeError::Violation`] for a value that is none.
    pub async fn output(mut self, limit: usize) -> Result<CellOutput, RuntimeError> {
        let (mut stdout, mut stderr, mut values) = (Vec::new(), Vec::new(), Vec::new());
        let (mut truncated, mut left) = (false, limit);
        while let Some(event) = self.next().await? {
            let (all, bytes) = match event {
                CellEvent::Stdout(bytes) => (&mut stdout, bytes),
                CellEvent::Stderr(bytes) => (&mut stderr, bytes),
                CellEvent::Value(value) => {
                    match left.checked_sub(json_len(&value)) {
                        Some(rest) => {
                            left = rest;
                            values.push(value);
                        }
                        None => truncated = true,
                    }
                    continue;
                }
            };
            let room = limit - all.len();
            all.extend_from_slice(&bytes[..bytes.len().min(room)]);
            truncated |= bytes.len() > room;
        }
        Ok(CellOutput {
            end: self.finish().await?,
            stdout,
            stderr,
            values,
            truncated,
        })
    }
}

/// What [`Cell::poll`] finds.
enum Piece {
    Event(CellEvent),
    Values(Vec<u8>),
}

/// The next bytes, `None` at the end, or when it breaks off: the call's result says why.
fn poll(reader: &mut Reader, context: &mut Context<'_>) -> Poll<Option<Vec<u8>>> {
    reader
        .poll_chunk(context)
        .map(|chunk| chunk.unwrap_or_default())
}

fn json_len(value: &CodeData) -> usize {
    serde_json::to_vec(value).map_or(usize::MAX, |json| json.len())
}

fn name(context: &str) -> CodeName {
    CodeName {
        context: context.into(),
    }
}

impl Client {
    /// Starts an interpreter.
    ///
    /// # Errors
    /// [`RuntimeError::Call`] when the guest has none of this language or the name is taken, and as
    /// [`Client::call`].
    pub async fn code_start(&self, params: CodeStart) -> Result<CodeContext, RuntimeError> {
        self.call(Call::CodeStart(params)).await
    }

    /// Runs a cell: in a context, or in the default one of its language.
    ///
    /// # Errors
    /// As [`Client::begin`]; that there is no such context, or that it is busy, is said by
    /// [`Cell::finish`].
    pub async fn code_run(&self, params: CodeRun) -> Result<Cell, RuntimeError> {
        let running = self.begin(Call::CodeRun(params)).await?;
        let values = Lines::new(VALUE_LIMIT);
        Ok(Cell { running, values })
    }

    /// Interrupts what a context runs, as Ctrl-C does.
    ///
    /// # Errors
    /// [`RuntimeError::Call`] when there is no such context, and as [`Client::call`].
    pub async fn code_interrupt(&self, context: &str) -> Result<(), RuntimeError> {
        self.call(Call::CodeInterrupt(name(context))).await
    }

    /// Starts a context's interpreter anew: its state is gone, its name and settings stay.
    ///
    /// # Errors
    /// As [`Client::code_interrupt`].
    pub async fn code_restart(&self, context: &str) -> Result<CodeContext, RuntimeError> {
        self.call(Call::CodeRestart(name(context))).await
    }

    /// Ends a context.
    ///
    /// # Errors
    /// As [`Client::code_interrupt`].
    pub async fn code_stop(&self, context: &str) -> Result<(), RuntimeError> {
        self.call(Call::CodeStop(name(context))).await
    }

    /// All contexts.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub async fn code_list(&self) -> Result<Vec<CodeContext>, RuntimeError> {
        self.call(Call::CodeList).await
    }
}
