//! The task that owns the socket and the [`State`]; handles speak to it by channel.
//!
//! ```text
//!   settling (HELLO, `session`; deadline) --> serving --- lost ---> dialling (linger) --> settling
//! ```
//!
//! Only a resumable client has a way back. How it fails: a connection that fails for good ends
//! every open call with [`RuntimeError::Closed`] (the first to hear gets the reason).

use std::collections::BTreeMap;
use std::io;
use std::pin::Pin;
use std::time::Duration;

use ratoon_protocol::{Call, Event, Hello, MAX_PAYLOAD_LEN};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::RuntimeError;
use crate::running::{Chunk, Reader, Running, Stdin};
use crate::state::{Happening, Output, State};

/// So many events of a call wait for its user; those beyond are dropped.
const EVENTS_LIMIT: usize = 16;

/// More than this waits to be sent only to a runtime that sends and does not read: all windows of
/// all calls that it allows.
const UNSENT_LIMIT: usize = 128 << 20;

/// How long the first pause before another connection is, and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// How long the runtime has to hear that a named session is over.
const LEAVE_TIME: Duration = Duration::from_secs(2);

/// Says HELLO's words, or why it never came.
pub(crate) type Greeted = oneshot::Sender<Result<Hello, RuntimeError>>;

/// A connection that is being made.
pub(crate) type Dialling = Pin<Box<dyn Future<Output = Result<UnixStream, RuntimeError>> + Send>>;

/// What handles ask for.
pub(crate) enum Wish {
    Call(Call, oneshot::Sender<Result<Running, RuntimeError>>),
    /// Input, and whom to tell when it is framed; dropped when the call takes no more.
    Input(u64, Vec<u8>, oneshot::Sender<()>),
    InputEnd(u64),
    Taken(u64, Output, usize),
    Stop(u64, Output),
}

/// How a lost connection is made again.
pub(crate) struct WayBack {
    /// Makes a connection to the runtime's port.
    pub(crate) dial: Box<dyn FnMut() -> Dialling + Send>,
    /// How long the session waits for it in the guest.
    pub(crate) linger: Duration,
}

struct Open {
    ended: oneshot::Sender<Result<Value, RuntimeError>>,
    events: mpsc::Sender<Event>,
    outputs: [mpsc::UnboundedSender<Chunk>; 3],
    /// Input that waits for room.
    input: Option<(Vec<u8>, oneshot::Sender<()>)>,
    /// Nothing follows it.
    input_ended: bool,
}

/// See the module.
pub(crate) struct Driver {
    state: State,
    calls: BTreeMap<u64, Open>,
    wishes: mpsc::WeakUnboundedSender<Wish>,
    greet: Option<Greeted>,
    /// HELLO has come on this connection.
    greeted: bool,
    /// How long HELLO and `session` may take.
    timeout: Duration,
}

type Wishes = mpsc::UnboundedReceiver<Wish>;

impl Driver {
    pub(crate) fn new(
        state: State,
        wishes: mpsc::WeakUnboundedSender<Wish>,
        greet: Greeted,
        timeout: Duration,
    ) -> Self {
        Self {
            state,
            calls: BTreeMap::new(),
            wishes,
            greet: Some(greet),
            greeted: false,
            timeout,
        }
    }

    /// Serves until the last handle is dropped or the connection is lost for good.
    pub(crate) async fn run(
        mut self,
        mut stream: UnixStream,
        mut heard: Wishes,
        mut back: Option<WayBack>,
    ) {
        let mut lost_at = None;
        let error = loop {
            let mut error = match self.drive(&mut stream, &mut heard, &mut lost_at).await {
                Ok(()) => return,
                Err(error) => error,
            };
            let may_return = self.greet.is_none() && is_loss(&error);
            if let Some(back) = back.as_mut().filter(|_| may_return) {
                tracing::debug!("a connection to a runtime is lost, making another: {error}");
                let at = *lost_at.get_or_insert_with(Instant::now);
                match self.come_back(back, &mut heard, at).await {
                    Ok(Some(next)) => {
                        stream = next;
                        continue;
                    }
                    Ok(None) => return,
                    Err(why) => error = why,
                }
            }
            break error;
        };
        tracing::debug!("connection to a runtime: {error}");
        if let Some(greet) = self.greet.take() {
            let _ = greet.send(Err(error));
        } else if let Some((_, open)) = self.calls.pop_first() {
            let _ = open.ended.send(Err(error));
        }
    }

    /// Serves one connection; `Ok` when the last handle is dropped. A session with a name is ended
    /// then, as far as this connection still carries it; otherwise it ends when it has lingered.
    async fn drive(
        &mut self,
        stream: &mut UnixStream,
        heard: &mut Wishes,
        lost_at: &mut Option<Instant>,
    ) -> Result<(), RuntimeError> {
        let mut leaving = false;
        let served = self.serve(stream, heard, lost_at, &mut leaving).await;
        if leaving { Ok(()) } else { served }
    }

    async fn serve(
        &mut self,
        stream: &mut UnixStream,
        heard: &mut Wishes,
        lost_at: &mut Option<Instant>,
        leaving: &mut bool,
    ) -> Result<(), RuntimeError> {
        let (mut reader, mut writer) = stream.split();
        let mut bytes = vec![0; MAX_PAYLOAD_LEN];
        let mut happenings = Vec::new();
        self.greeted = false;
        let late = tokio::time::sleep(self.timeout);
        let left = tokio::time::sleep(LEAVE_TIME);
        tokio::pin!(late, left);
        // The other side takes nothing any more; what it still sent is read before we say so.
        let mut deaf = false;
        loop {
            let unsent = !deaf && !self.state.unsent().is_empty();
            let settled = self.greeted && !self.state.is_naming();
            if settled {
                *lost_at = None;
            }
            tokio::select! {
                wish = heard.recv(), if !*leaving => match wish {
                    Some(wish) => self.wish(wish),
                    None if self.state.end_session() => {
                        *leaving = true;
                        left.as_mut().reset(Instant::now() + LEAVE_TIME);
                    }
                    None => return Ok(()),
                },
                () = &mut left, if *leaving => return Ok(()),
                len = reader.read(&mut bytes) => {
                    let len = match len {
                        Ok(0) => return Err(RuntimeError::Closed),
                        Err(error) if is_hang_up(&error) => return Err(RuntimeError::Closed),
                        len => len.map_err(RuntimeError::Io)?,
                    };
                    self.state.receive(&bytes[..len], &mut happenings)?;
                    happenings.drain(..).for_each(|happening| self.happening(happening));
                    self.feed();
                    if self.state.unsent().len() > UNSENT_LIMIT {
                        let what = "it sends and does not read";
                        return Err(RuntimeError::Violation(what.into()));
                    }
                }
                len = writer.write(self.state.unsent()), if unsent => {
                    match len {
                        Err(error) if is_hang_up(&error) => deaf = true,
                        len => self.state.sent(len.map_err(RuntimeError::Io)?),
                    }
                }
                () = &mut late, if !settled => {
                    let (what, within) = ("said HELLO", self.timeout);
                    return Err(RuntimeError::Timeout { what, within });
                }
            }
        }
    }

    /// Makes another connection, as often as it takes while the session lingers; `None` when the last
    /// handle is dropped meanwhile.
    async fn come_back(
        &mut self,
        back: &mut WayBack,
        heard: &mut Wishes,
        lost_at: Instant,
    ) -> Result<Option<UnixStream>, RuntimeError> {
        self.state.reconnect()?;
        let mut pause = FIRST_PAUSE;
        let until = tokio::time::sleep_until(lost_at + back.linger);
        tokio::pin!(until);
        loop {
            let waited = tokio::time::sleep(pause);
            let attempt = async {
                waited.await;
                (back.dial)().await
            };
            tokio::pin!(attempt);
            let failure = loop {
                tokio::select! {
                    wish = heard.recv() => match wish {
                        Some(wish) => self.wish(wish),
                        None => return Ok(None),
                    },
                    made = &mut attempt => match made {
                        Ok(stream) => return Ok(Some(stream)),
                        Err(error) => break error,
                    },
                    () = &mut until => {
                        let (what, within) = ("taken the session up again", back.linger);
                        return Err(RuntimeError::Timeout { what, within });
                    }
                }
            };
            tracing::debug!("no connection to the runtime yet: {failure}");
            pause = (pause * 2).min(LONGEST_PAUSE);
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
            Wish::InputEnd(call) => {
                if let Some(open) = self.calls.get_mut(&call) {
                    open.input_ended = true;
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
        let (tell_end, ended) = oneshot::channel();
        let (to_events, events) = mpsc::channel(EVENTS_LIMIT);
        let (to_stdout, stdout) = Reader::new(id, Output::Stdout, wishes.clone());
        let (to_stderr, stderr) = Reader::new(id, Output::Stderr, wishes.clone());
        let (to_data, data) = Reader::new(id, Output::Data, wishes.clone());
        let open = Open {
            ended: tell_end,
            events: to_events,
            outputs: [to_stdout, to_stderr, to_data],
            input: None,
            input_ended: false,
        };
        self.calls.insert(id, open);
        let end_on_drop = !matches!(call, Call::FileWrite(_));
        Ok(Running {
            id,
            stdin: call
                .takes_input()
                .then(|| Stdin::new(id, wishes, end_on_drop)),
            stdout,
            stderr,
            data,
            events,
            ended,
        })
    }

    /// Frames the input for which there is room.
    fn feed(&mut self) {
        for (&call, open) in &mut self.calls {
            if let Some((bytes, tell)) = open.input.take() {
                match self.state.stdin_room(call) {
                    Some(room) if room < bytes.len() => {
                        open.input = Some((bytes, tell));
                        continue;
                    }
                    Some(_) => {
                        self.state.stdin(call, &bytes, false);
                        let _ = tell.send(());
                    }
                    // Its writer is told by the drop.
                    None => {}
                }
            }
            if std::mem::take(&mut open.input_ended) {
                self.state.stdin(call, &[], true);
            }
        }
    }

    fn happening(&mut self, happening: Happening) {
        match happening {
            Happening::Output {
                call,
                output,
                bytes,
            } => self.tell(call, output, Chunk::Bytes(bytes)),
            Happening::OutputEnd { call, output } => self.tell(call, output, Chunk::End),
            Happening::Reply { call, value } => {
                for output in [Output::Stdout, Output::Stderr, Output::Data] {
                    self.tell(call, output, Chunk::End);
                }
                self.end(call, Ok(value));
            }
            Happening::Failed { call, error } => self.end(call, Err(RuntimeError::Call(error))),
            Happening::Hello(hello) => {
                self.greeted = true;
                if let Some(greet) = self.greet.take() {
                    let _ = greet.send(Ok(hello));
                }
            }
            Happening::Event { call, event } => {
                if let Some(open) = self.calls.get(&call) {
                    let _ = open.events.try_send(event);
                }
            }
        }
    }

    fn tell(&self, call: u64, output: Output, chunk: Chunk) {
        if let Some(open) = self.calls.get(&call) {
            // A reader that was dropped has said stop.
            let _ = open.outputs[output as usize].send(chunk);
        }
    }

    fn end(&mut self, call: u64, result: Result<Value, RuntimeError>) {
        if let Some(open) = self.calls.remove(&call) {
            let _ = open.ended.send(result);
        }
    }
}

fn is_hang_up(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset};
    matches!(error.kind(), BrokenPipe | ConnectionReset)
}

/// Whether another connection may go on where this one broke off.
fn is_loss(error: &RuntimeError) -> bool {
    matches!(
        error,
        RuntimeError::Closed | RuntimeError::Io(_) | RuntimeError::Timeout { .. }
    )
}
