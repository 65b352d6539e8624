//! Files and trees over the async client: `file.*`, `tree.*`.
//!
//! Parameters are the protocol's own types: a path, and with `root` a directory that it may not
//! leave. Names and targets in the answers are the guest's words: check them before they are used as
//! paths or shown on a terminal. How it fails: as its call and the connection do, [`RuntimeError`];
//! a file that is written and breaks off is left as it was.

use std::io;
use std::marker::PhantomData;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use ratoon_protocol::{
    Call, Event, FileChange, FileEntry, FileList, FileMkdir, FileMove, FilePath, FileRead,
    FileRemove, FileWatch, FileWrite, Transferred, TreePack, TreeUnpack,
};
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf};

use crate::client::Client;
use crate::error::RuntimeError;
use crate::lines::Lines;
use crate::running::{Running, fitting};

/// The longest line of JSON that is taken, in bytes: two paths of 4096 bytes, escaped, fit well.
const LINE_LIMIT: usize = 128 * 1024;

/// How much is read from a source at once.
const PIECE_LEN: usize = 16 * 1024;

/// Bytes that come from the guest. They end well only when the whole call did: reading fails with
/// [`RuntimeError::CutShort`] when they break off, and [`Incoming::finish`] says why.
pub struct Incoming {
    running: Running,
    /// The call's, when reading has come to the end.
    result: Option<Result<Transferred, RuntimeError>>,
}

impl Incoming {
    fn new(running: Running) -> Self {
        Self {
            running,
            result: None,
        }
    }

    /// Waits for the end; what was not read is thrown away.
    ///
    /// # Errors
    /// As [`Running::result`].
    pub async fn finish(self) -> Result<Transferred, RuntimeError> {
        match self.result {
            Some(result) => result,
            None => self.running.result().await,
        }
    }

    /// The end that a read has met: a good one, or an error.
    fn poll_end(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.result.is_none() {
            let end = ready!(self.running.poll_end(context));
            self.result = Some(end.and_then(fitting));
        }
        Poll::Ready(match &self.result {
            Some(Err(_)) => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                RuntimeError::CutShort,
            )),
            _ => Ok(()),
        })
    }
}

impl AsyncRead for Incoming {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let (had, room) = (buf.filled().len(), buf.remaining());
        match ready!(Pin::new(&mut self.running.stdout).poll_read(context, buf)) {
            Ok(()) if buf.filled().len() > had || room == 0 => Poll::Ready(Ok(())),
            _ => self.poll_end(context),
        }
    }
}

/// Values that come one by one. Dropping it ends the call.
pub struct Items<T> {
    /// Until the end has been told.
    running: Option<Running>,
    lines: Lines,
    of: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> Items<T> {
    fn new(running: Running) -> Self {
        Self {
            running: Some(running),
            lines: Lines::new(LINE_LIMIT),
            of: PhantomData,
        }
    }

    /// The next; `None` at the end. May be dropped and called again.
    ///
    /// # Errors
    /// As [`Running::result`], once; and [`RuntimeError::Violation`] for what is no such value.
    pub async fn next(&mut self) -> Result<Option<T>, RuntimeError> {
        loop {
            if let Some(value) = self.lines.next()? {
                return Ok(Some(value));
            }
            let Some(running) = &mut self.running else {
                return Ok(None);
            };
            match running.stdout.chunk().await {
                Ok(Some(bytes)) => self.lines.feed(&bytes),
                // A failure too: the result says why.
                Ok(None) | Err(_) => break,
            }
        }
        if let Some(running) = &mut self.running {
            let result = running.end().await;
            self.running = None;
            result?;
        }
        self.lines.finish()?;
        Ok(None)
    }
}

impl Client {
    /// Reads a file, or a part of it.
    ///
    /// # Errors
    /// As [`Client::begin`]; that there is no such file is said by the stream.
    pub async fn read(&self, params: FileRead) -> Result<Incoming, RuntimeError> {
        let running = self.begin(Call::FileRead(params)).await?;
        Ok(Incoming::new(running))
    }

    /// Reads a file of at most `limit` bytes.
    ///
    /// # Errors
    /// [`RuntimeError::Call`] when it cannot be read, [`RuntimeError::OverLimit`] when it is longer, and
    /// as [`Client::call`].
    pub async fn read_to_vec(&self, path: &str, limit: usize) -> Result<Vec<u8>, RuntimeError> {
        let params = FileRead {
            path: path.into(),
            // One more tells a file that is longer.
            length: Some((limit as u64).saturating_add(1)),
            ..FileRead::default()
        };
        let mut incoming = self.read(params).await?;
        let read = incoming.running.stdout.collect(limit).await;
        incoming.finish().await?;
        let (bytes, more) = read.map_err(RuntimeError::Io)?;
        match more {
            true => Err(RuntimeError::OverLimit { limit, of: "bytes" }),
            false => Ok(bytes),
        }
    }

    /// Writes what `source` gives, to its end, into a file. Without `append` and `offset` the file appears
    /// whole or not at all: not when `source` fails, nor when this future is dropped; nothing else is left
    /// behind either.
    ///
    /// # Errors
    /// [`RuntimeError::Call`] when the guest cannot write it, [`RuntimeError::Input`] when `source`
    /// fails, and as [`Client::begin`].
    pub async fn write(
        &self,
        params: FileWrite,
        source: impl AsyncRead + Unpin,
    ) -> Result<Transferred, RuntimeError> {
        let running = self.begin(Call::FileWrite(params)).await?;
        send(running, source).await
    }

    /// Writes these bytes as the whole of a file.
    ///
    /// # Errors
    /// As [`Client::write`].
    pub async fn write_bytes(&self, path: &str, bytes: &[u8]) -> Result<Transferred, RuntimeError> {
        let params = FileWrite {
            path: path.into(),
            ..FileWrite::default()
        };
        self.write(params, bytes).await
    }

    /// Writes these bytes at the end of a file, which is made when it is not there.
    ///
    /// # Errors
    /// As [`Client::write`].
    pub async fn append(&self, path: &str, bytes: &[u8]) -> Result<Transferred, RuntimeError> {
        let params = FileWrite {
            path: path.into(),
            append: true,
            ..FileWrite::default()
        };
        self.write(params, bytes).await
    }

    /// Describes a file, directory or link.
    ///
    /// # Errors
    /// [`RuntimeError::Call`] when it is not there, and as [`Client::call`].
    pub async fn stat(&self, params: FilePath) -> Result<FileEntry, RuntimeError> {
        self.call(Call::FileStat(params)).await
    }

    /// What is in a directory, one by one. (`depth` 0 is all below it, 1 what is in it.)
    ///
    /// # Errors
    /// As [`Client::begin`]; that there is no such directory is said by the first entry.
    pub async fn entries(&self, params: FileList) -> Result<Items<FileEntry>, RuntimeError> {
        let running = self.begin(Call::FileList(params)).await?;
        Ok(Items::new(running))
    }

    /// What is in a directory: at most `limit` entries.
    ///
    /// # Errors
    /// [`RuntimeError::Call`] when it cannot be read, [`RuntimeError::OverLimit`] when there are more,
    /// and as [`Client::call`].
    pub async fn list(
        &self,
        params: FileList,
        limit: usize,
    ) -> Result<Vec<FileEntry>, RuntimeError> {
        let mut entries = self.entries(params).await?;
        let mut list = Vec::new();
        while let Some(entry) = entries.next().await? {
            if list.len() == limit {
                let of = "entries";
                return Err(RuntimeError::OverLimit { limit, of });
            }
            list.push(entry);
        }
        Ok(list)
    }

    /// Makes a directory.
    ///
    /// # Errors
    /// [`RuntimeError::Call`] when it is there (without `parents`), and as [`Client::call`].
    pub async fn mkdir(&self, params: FileMkdir) -> Result<(), RuntimeError> {
        self.call(Call::FileMkdir(params)).await
    }

    /// Removes a file or directory; tells how many entries that were.
    ///
    /// # Errors
    /// [`RuntimeError::Call`] when it is not there, or a directory that is not empty (without
    /// `recursive`), and as [`Client::call`].
    pub async fn remove(&self, params: FileRemove) -> Result<Transferred, RuntimeError> {
        self.call(Call::FileRemove(params)).await
    }

    /// Gives a file or directory another name.
    ///
    /// # Errors
    /// [`RuntimeError::Call`] when the name is taken (without `replace`), and as [`Client::call`].
    pub async fn rename(&self, params: FileMove) -> Result<(), RuntimeError> {
        self.call(Call::FileRename(params)).await
    }

    /// Copies a file, or with `recursive` a directory, within the guest.
    ///
    /// # Errors
    /// As [`Client::rename`].
    pub async fn copy(&self, params: FileMove) -> Result<Transferred, RuntimeError> {
        self.call(Call::FileCopy(params)).await
    }

    /// Tells what changes from now on, until it is dropped or what is watched is gone.
    ///
    /// # Errors
    /// [`RuntimeError::Call`] when it cannot be watched, and as [`Client::begin`].
    pub async fn watch(&self, params: FileWatch) -> Result<Items<FileChange>, RuntimeError> {
        let running = self.begin(Call::FileWatch(params)).await?;
        let watching = |event| matches!(event, Event::Watching).then_some(());
        let (running, ()) = running.until(watching).await?;
        Ok(Items::new(running))
    }

    /// A tree of the guest as a tar archive. Its names and links are the guest's: unpack it with care.
    ///
    /// # Errors
    /// As [`Client::read`].
    pub async fn pack(&self, params: TreePack) -> Result<Incoming, RuntimeError> {
        let running = self.begin(Call::TreePack(params)).await?;
        Ok(Incoming::new(running))
    }

    /// Unpacks a tar archive into a directory of the guest, which is made when it is not there.
    ///
    /// # Errors
    /// [`RuntimeError::Call`] when the guest cannot unpack it, [`RuntimeError::Input`] when `archive`
    /// fails (what came before stays), and as [`Client::begin`].
    pub async fn unpack(
        &self,
        params: TreeUnpack,
        archive: impl AsyncRead + Unpin,
    ) -> Result<Transferred, RuntimeError> {
        let running = self.begin(Call::TreeUnpack(params)).await?;
        send(running, archive).await
    }
}

/// Sends a call its input and waits for its end.
async fn send(
    mut running: Running,
    mut source: impl AsyncRead + Unpin,
) -> Result<Transferred, RuntimeError> {
    if let Some(mut stdin) = running.stdin.take() {
        let mut piece = vec![0; PIECE_LEN];
        loop {
            let len = source.read(&mut piece).await.map_err(RuntimeError::Input)?;
            if len == 0 {
                let _ = stdin.shutdown().await;
                break;
            }
            // The call takes no more: its result says why.
            if stdin.write_all(&piece[..len]).await.is_err() {
                break;
            }
        }
    }
    running.result().await
}
