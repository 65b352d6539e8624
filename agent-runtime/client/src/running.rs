//! A call that goes on, and its streams.
//!
//! ```text
//!   Stdin --(a piece at a time, when the window has room)--> driver --> guest
//!   Reader <--(a window at most)-- driver <-- guest;  what is read is acknowledged
//! ```
//!
//! A [`Reader`] ends well when the guest has said END, or the call has ended well; when the call
//! failed before that, or the connection is lost, it fails, so that half an output is not taken for
//! the whole. [`Running::result`] says why, and whether the call went well in the end.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use ratoon_protocol::{Event, MAX_PAYLOAD_LEN};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::sync::{mpsc, oneshot};

use crate::RuntimeError;
use crate::driver::Wish;
use crate::state::Output;

/// How much input is handed to the driver at once; it waits there until the guest has room for it.
const PIECE_LEN: usize = MAX_PAYLOAD_LEN / 4;

/// What a call's end is told by.
pub(crate) type End = oneshot::Receiver<Result<Value, RuntimeError>>;

/// A call that goes on. Dropping it is the end of its input and says stop to its outputs.
pub struct Running {
    /// Its id, for `signal` and `resize`.
    pub id: u64,
    /// Its input, if it takes any.
    pub stdin: Option<Stdin>,
    /// Its (first) output.
    pub stdout: Reader,
    /// Its errors.
    pub stderr: Reader,
    /// What comes beside the text.
    pub data: Reader,
    pub(crate) events: mpsc::Receiver<Event>,
    pub(crate) ended: End,
}

impl Running {
    /// The next event of the call; `None` when it has ended.
    pub async fn event(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// Waits for the event that says that the call goes on; when it ended instead, says why.
    pub(crate) async fn until<T>(
        mut self,
        wanted: impl Fn(Event) -> Option<T>,
    ) -> Result<(Self, T), RuntimeError> {
        while let Some(event) = self.event().await {
            if let Some(found) = wanted(event) {
                return Ok((self, found));
            }
        }
        let _: Value = self.result().await?;
        Err(RuntimeError::Violation(
            "a call ended well and never began".into(),
        ))
    }

    /// Waits for the end, whatever the streams do; once.
    pub(crate) async fn end(&mut self) -> Result<Value, RuntimeError> {
        std::future::poll_fn(|context| self.poll_end(context)).await
    }

    pub(crate) fn poll_end(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Result<Value, RuntimeError>> {
        let ended = ready!(Pin::new(&mut self.ended).poll(context));
        Poll::Ready(ended.unwrap_or(Err(RuntimeError::Closed)))
    }

    /// Waits for the end. Input is at its end; output that was not read is thrown away.
    ///
    /// # Errors
    /// [`RuntimeError::Call`] when it failed, [`RuntimeError::Violation`] when the result does not
    /// fit, and those about the connection.
    pub async fn result<T: DeserializeOwned>(mut self) -> Result<T, RuntimeError> {
        if let Some(stdin) = &mut self.stdin {
            stdin.end();
        }
        // Not by dropping them: that would say stop to the guest.
        tokio::join!(
            self.stdout.discard(),
            self.stderr.discard(),
            self.data.discard()
        );
        fitting(self.end().await?)
    }
}

/// A result as what it should be.
pub(crate) fn fitting<T: DeserializeOwned>(value: Value) -> Result<T, RuntimeError> {
    serde_json::from_value(value)
        .map_err(|error| RuntimeError::Violation(format!("a result: {error}")))
}

/// What the driver tells a reader. A channel that closes without an end: the call failed.
pub(crate) enum Chunk {
    /// Not empty.
    Bytes(Vec<u8>),
    /// Nothing follows.
    End,
}

/// An output of a call. Dropped before its end, it says stop to the guest, as a closed pipe does.
pub struct Reader {
    call: u64,
    output: Output,
    /// Never more than the window, which is acknowledged by what is read.
    chunks: mpsc::UnboundedReceiver<Chunk>,
    current: Vec<u8>,
    at: usize,
    ended: bool,
    wishes: mpsc::UnboundedSender<Wish>,
}

impl Reader {
    pub(crate) fn new(
        call: u64,
        output: Output,
        wishes: mpsc::UnboundedSender<Wish>,
    ) -> (mpsc::UnboundedSender<Chunk>, Self) {
        let (sender, chunks) = mpsc::unbounded_channel();
        let reader = Self {
            call,
            output,
            chunks,
            current: Vec::new(),
            at: 0,
            ended: false,
            wishes,
        };
        (sender, reader)
    }

    /// The next bytes, not empty, as they came; `None` at the end. May be dropped and called again.
    ///
    /// # Errors
    /// [`RuntimeError::CutShort`] as an [`io::Error`]: the call failed or its connection is lost.
    pub async fn chunk(&mut self) -> io::Result<Option<Vec<u8>>> {
        std::future::poll_fn(|context| self.poll_chunk(context)).await
    }

    pub(crate) fn poll_chunk(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<Option<Vec<u8>>>> {
        if !ready!(self.poll_fill(context))? {
            return Poll::Ready(Ok(None));
        }
        let start = std::mem::replace(&mut self.at, self.current.len());
        let mut bytes = self.used_up();
        bytes.drain(..start);
        Poll::Ready(Ok(Some(bytes)))
    }

    /// Whether there are bytes (in `current`, from `at`) or the end.
    fn poll_fill(&mut self, context: &mut Context<'_>) -> Poll<io::Result<bool>> {
        if self.at < self.current.len() {
            return Poll::Ready(Ok(true));
        }
        if self.ended {
            return Poll::Ready(Ok(false));
        }
        match ready!(self.chunks.poll_recv(context)) {
            Some(Chunk::Bytes(bytes)) => {
                (self.current, self.at) = (bytes, 0);
                Poll::Ready(Ok(true))
            }
            Some(Chunk::End) => {
                self.ended = true;
                Poll::Ready(Ok(false))
            }
            None => {
                let error = io::Error::new(io::ErrorKind::UnexpectedEof, RuntimeError::CutShort);
                Poll::Ready(Err(error))
            }
        }
    }

    /// All of `current` has been read.
    fn used_up(&mut self) -> Vec<u8> {
        let len = std::mem::take(&mut self.at);
        let _ = self.wishes.send(Wish::Taken(self.call, self.output, len));
        std::mem::take(&mut self.current)
    }

    async fn discard(&mut self) {
        while let Ok(Some(_)) = self.chunk().await {}
    }

    /// Reads to the end; keeps `limit` bytes and says whether there were more.
    pub(crate) async fn collect(&mut self, limit: usize) -> io::Result<(Vec<u8>, bool)> {
        let mut bytes = Vec::new();
        self.take(limit as u64).read_to_end(&mut bytes).await?;
        let mut more = false;
        while self.chunk().await?.is_some() {
            more = true;
        }
        Ok((bytes, more))
    }
}

impl AsyncRead for Reader {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if ready!(self.poll_fill(context))? {
            let len = buf.remaining().min(self.current.len() - self.at);
            buf.put_slice(&self.current[self.at..self.at + len]);
            self.at += len;
            if self.at == self.current.len() {
                self.used_up();
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.wishes.send(Wish::Stop(self.call, self.output));
        }
    }
}

/// The input of a call. A write is done when the driver has it; `flush` waits until the guest's
/// window has taken it. Shutting down is the end of input, and so is dropping it, but for
/// `file.write`: there what breaks off must not be taken for the whole file. A call that takes no more
/// fails the write with [`io::ErrorKind::BrokenPipe`].
pub struct Stdin {
    call: u64,
    wishes: mpsc::UnboundedSender<Wish>,
    /// A piece that the driver has not framed yet.
    pending: Option<oneshot::Receiver<()>>,
    ended: bool,
    end_on_drop: bool,
}

impl Stdin {
    pub(crate) fn new(call: u64, wishes: mpsc::UnboundedSender<Wish>, end_on_drop: bool) -> Self {
        Self {
            call,
            wishes,
            pending: None,
            ended: false,
            end_on_drop,
        }
    }

    /// The end, after what is pending: the driver keeps the order.
    fn end(&mut self) {
        if !std::mem::replace(&mut self.ended, true) {
            let _ = self.wishes.send(Wish::InputEnd(self.call));
        }
    }

    /// Waits until the driver has framed what it was given.
    fn poll_pending(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(pending) = &mut self.pending {
            let told = ready!(Pin::new(pending).poll(context));
            self.pending = None;
            if told.is_err() {
                self.ended = true;
            }
        }
        Poll::Ready(Ok(()))
    }
}

fn takes_no_more() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the call takes no more input")
}

impl AsyncWrite for Stdin {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_pending(context))?;
        if self.ended {
            return Poll::Ready(Err(takes_no_more()));
        }
        let piece = &buf[..buf.len().min(PIECE_LEN)];
        if piece.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let (tell, told) = oneshot::channel();
        let wish = Wish::Input(self.call, piece.to_vec(), tell);
        if self.wishes.send(wish).is_err() {
            return Poll::Ready(Err(takes_no_more()));
        }
        self.pending = Some(told);
        Poll::Ready(Ok(piece.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_pending(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.end();
        Poll::Ready(Ok(()))
    }
}

impl Drop for Stdin {
    fn drop(&mut self) {
        if self.end_on_drop {
            self.end();
        }
    }
}
