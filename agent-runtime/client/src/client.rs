//! The async client: a driver task owns the socket and the [`State`]; handles speak to it by channel.
//!
//! Output is acknowledged when it has been read by the user, so that a slow reader holds the guest's
//! program up and no more than a window for each stream waits here. A reader that is dropped says
//! stop. How it fails: a connection that fails ends every open call with [`RuntimeError::Closed`]
//! (the first to hear gets the reason); later calls get [`RuntimeError::Broken`].

use std::collections::BTreeMap;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use ratoon_protocol::{Call, MAX_PAYLOAD_LEN, Pong};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::io::{self, AsyncRead, AsyncReadExt, AsyncWriteExt, DuplexStream, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

use crate::RuntimeError;
use crate::state::{Happening, Output, State};

type Ended = oneshot::Sender<Result<Value, RuntimeError>>;

enum Wish {
    Call(Call, oneshot::Sender<Result<Running, RuntimeError>>),
    Input(u64, Vec<u8>, oneshot::Sender<()>),
    Taken(u64, Output, usize),
    Stop(u64, Output),
}

/// A connection to the runtime of one guest; cheap to clone. It closes when the last clone and the
/// last stream are dropped, and the runtime then ends what was begun over it.
#[derive(Clone)]
pub struct Client {
    wishes: mpsc::UnboundedSender<Wish>,
}

/// A call that goes on.
pub struct Running {
    /// Its id, for `signal` and `resize`.
    pub id: u64,
    /// Its input, if it takes any; dropping it is the end of input.
    pub stdin: Option<DuplexStream>,
    /// Its (first) output.
    pub stdout: Reader,
    /// Its errors.
    pub stderr: Reader,
    /// What comes beside the text.
    pub data: Reader,
    ended: oneshot::Receiver<Result<Value, RuntimeError>>,
}

/// An output of a call; at its end when the call is.
pub struct Reader {
    call: u64,
    output: Output,
    /// Never more than the window, which is acknowledged by what is read.
    chunks: mpsc::UnboundedReceiver<Vec<u8>>,
    current: Vec<u8>,
    at: usize,
    wishes: mpsc::UnboundedSender<Wish>,
}

impl Client {
    /// Takes a connection to the runtime; must be called in a tokio runtime.
    pub fn from_stream(stream: UnixStream) -> Self {
        let (wishes, heard) = mpsc::unbounded_channel();
        let driver = Driver {
            state: State::new(),
            calls: BTreeMap::new(),
            wishes: wishes.downgrade(),
        };
        tokio::spawn(driver.run(stream, heard));
        Self { wishes }
    }

    /// Begins a call with streams.
    ///
    /// # Errors
    /// [`RuntimeError::TooLarge`], [`RuntimeError::Broken`].
    pub async fn begin(&self, call: Call) -> Result<Running, RuntimeError> {
        let (tell, told) = oneshot::channel();
        let sent = self.wishes.send(Wish::Call(call, tell));
        sent.map_err(|_| RuntimeError::Broken)?;
        told.await.map_err(|_| RuntimeError::Broken)?
    }

    /// A call without streams.
    ///
    /// # Errors
    /// As [`Client::begin`] and [`Running::result`].
    pub async fn call<T: DeserializeOwned>(&self, call: Call) -> Result<T, RuntimeError> {
        self.begin(call).await?.result().await
    }

    /// Asks whether the runtime answers.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub async fn ping(&self) -> Result<Pong, RuntimeError> {
        self.call(Call::Ping).await
    }
}

impl Running {
    /// Waits for the end. Input is at its end; output that was not read is thrown away.
    ///
    /// # Errors
    /// [`RuntimeError::Call`] when it failed, [`RuntimeError::Violation`] when the result does not
    /// fit, and those about the connection.
    pub async fn result<T: DeserializeOwned>(self) -> Result<T, RuntimeError> {
        let Self {
            stdin,
            mut stdout,
            mut stderr,
            mut data,
            ended,
            ..
        } = self;
        drop(stdin);
        let (mut one, mut two, mut three) = (io::sink(), io::sink(), io::sink());
        // Not by dropping them: that would say stop to the guest.
        let _ = tokio::join!(
            io::copy(&mut stdout, &mut one),
            io::copy(&mut stderr, &mut two),
            io::copy(&mut data, &mut three),
        );
        let value = ended.await.map_err(|_| RuntimeError::Closed)??;
        serde_json::from_value(value)
            .map_err(|error| RuntimeError::Violation(format!("a result: {error}")))
    }
}

impl AsyncRead for Reader {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        if self.at == self.current.len() {
            match ready!(self.chunks.poll_recv(context)) {
                Some(chunk) => self.current = chunk,
                None => return Poll::Ready(Ok(())),
            }
            self.at = 0;
        }
        let len = buf.remaining().min(self.current.len() - self.at);
        buf.put_slice(&self.current[self.at..self.at + len]);
        self.at += len;
        let _ = self.wishes.send(Wish::Taken(self.call, self.output, len));
        Poll::Ready(Ok(()))
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let _ = self.wishes.send(Wish::Stop(self.call, self.output));
    }
}

struct Open {
    ended: Ended,
    outputs: [mpsc::UnboundedSender<Vec<u8>>; 3],
    /// Input that waits for room; empty: its end.
    input: Option<(Vec<u8>, oneshot::Sender<()>)>,
}

struct Driver {
    state: State,
    calls: BTreeMap<u64, Open>,
    wishes: mpsc::WeakUnboundedSender<Wish>,
}

impl Driver {
    async fn run(mut self, mut stream: UnixStream, mut heard: mpsc::UnboundedReceiver<Wish>) {
        if let Err(error) = self.drive(&mut stream, &mut heard).await {
            tracing::debug!("connection to a runtime: {error}");
            if let Some((_, open)) = self.calls.pop_first() {
                let _ = open.ended.send(Err(error));
            }
        }
    }

    async fn drive(
        &mut self,
        stream: &mut UnixStream,
        heard: &mut mpsc::UnboundedReceiver<Wish>,
    ) -> Result<(), RuntimeError> {
        let (mut reader, mut writer) = stream.split();
        let mut bytes = vec![0; MAX_PAYLOAD_LEN];
        let mut happenings = Vec::new();
        loop {
            let unsent = !self.state.unsent().is_empty();
            tokio::select! {
                wish = heard.recv() => match wish {
                    Some(wish) => self.wish(wish),
                    None => return Ok(()),
                },
                len = reader.read(&mut bytes) => {
                    let len = len.map_err(RuntimeError::Io)?;
                    if len == 0 {
                        return Err(RuntimeError::Closed);
                    }
                    self.state.receive(&bytes[..len], &mut happenings)?;
                    happenings.drain(..).for_each(|happening| self.happening(happening));
                    self.feed();
                }
                len = writer.write(self.state.unsent()), if unsent => {
                    let len = len.map_err(RuntimeError::Io)?;
                    self.state.sent(len);
                }
            }
        }
    }

    fn wish(&mut self, wish: Wish) {
        match wish {
            Wish::Call(call, tell) => {
                if let Err(Ok(running)) = tell.send(self.begin(&call)) {
                    drop(running);
                }
            }
            Wish::Input(call, bytes, tell) => {
                if let Some(open) = self.calls.get_mut(&call) {
                    open.input = Some((bytes, tell));
                    self.feed();
                }
            }
            Wish::Taken(call, output, len) => self.state.taken(call, output, len),
            Wish::Stop(call, output) => self.state.stop(call, output),
        }
    }

    fn begin(&mut self, call: &Call) -> Result<Running, RuntimeError> {
        let wishes = self.wishes.upgrade().ok_or(RuntimeError::Broken)?;
        let id = self.state.call(call)?;
        let (ended, end) = oneshot::channel();
        let reader = |output| {
            let (chunks, received) = mpsc::unbounded_channel();
            let reader = Reader {
                call: id,
                output,
                chunks: received,
                current: Vec::new(),
                at: 0,
                wishes: wishes.clone(),
            };
            (chunks, reader)
        };
        let (to_stdout, stdout) = reader(Output::Stdout);
        let (to_stderr, stderr) = reader(Output::Stderr);
        let (to_data, data) = reader(Output::Data);
        let open = Open {
            ended,
            outputs: [to_stdout, to_stderr, to_data],
            input: None,
        };
        self.calls.insert(id, open);
        let stdin = call.takes_input().then(|| {
            let (ours, theirs) = tokio::io::duplex(MAX_PAYLOAD_LEN);
            tokio::spawn(forward(id, theirs, wishes.clone()));
            ours
        });
        Ok(Running {
            id,
            stdin,
            stdout,
            stderr,
            data,
            ended: end,
        })
    }

    fn feed(&mut self) {
        for (&call, open) in &mut self.calls {
            let Some((bytes, _)) = &open.input else {
                continue;
            };
            let room = self.state.stdin_room(call);
            if room.is_some_and(|room| room < bytes.len()) {
                continue;
            }
            self.state.stdin(call, bytes, bytes.is_empty());
            if let Some((_, tell)) = open.input.take()
                && room.is_some()
            {
                let _ = tell.send(());
            }
        }
    }

    fn happening(&mut self, happening: Happening) {
        match happening {
            Happening::Output {
                call,
                output,
                bytes,
            } => {
                if let Some(open) = self.calls.get(&call) {
                    // A reader that was dropped has said stop.
                    let _ = open.outputs[output as usize].send(bytes);
                }
            }
            Happening::Reply { call, value } => self.end(call, Ok(value)),
            Happening::Failed { call, error } => self.end(call, Err(RuntimeError::Call(error))),
            Happening::Hello(_) | Happening::Event { .. } => {}
        }
    }

    fn end(&mut self, call: u64, result: Result<Value, RuntimeError>) {
        if let Some(open) = self.calls.remove(&call) {
            let _ = open.ended.send(result);
        }
    }
}

/// Passes a call's input on, one piece at a time, until the call takes no more.
async fn forward(call: u64, mut from: DuplexStream, wishes: mpsc::UnboundedSender<Wish>) {
    let mut bytes = vec![0; MAX_PAYLOAD_LEN / 4];
    while let Ok(len) = from.read(&mut bytes).await {
        let (tell, told) = oneshot::channel();
        let sent = wishes.send(Wish::Input(call, bytes[..len].to_vec(), tell));
        if sent.is_err() || told.await.is_err() || len == 0 {
            return;
        }
    }
}
