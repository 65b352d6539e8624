//! Work that may take long: a thread with blocking pipes, so that the loop never waits for a disk.
//!
//! ```text
//!   STDIN frames --> loop --> pipe --> work --> pipe --> loop --> STDOUT frames
//!                                       \--- result, events ---> channel + eventfd --> loop
//! ```
//!
//! How it fails: an error ends the call; a panic of the work is an error of the call too. When the
//! client is lost the pipes close, and the work ends at its next read or write.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use ratoon_protocol::{ErrorCode, ErrorReply, Event};
use rustix::event::{EventfdFlags, eventfd};
use rustix::pipe::{PipeFlags, pipe_with};
use serde_json::Value;

/// Stack of a thread, in bytes; only what is touched takes memory. Trees are walked by recursion, at
/// most [`MAX_DEPTH`](crate::files::MAX_DEPTH) directories deep: tests go so far, unoptimized.
const STACK: usize = 1 << 20;

/// What a call has to do. The value is its reply.
pub type Work = Box<dyn FnOnce(Streams) -> Result<Value, ErrorReply> + Send>;

/// The work's ends of the call's streams. Dropped, they tell the other side.
pub struct Streams {
    /// STDIN of a call that takes input, to its end.
    pub input: Option<File>,
    /// STDOUT. A write that fails with EPIPE: the client takes no more, or is gone.
    pub output: Option<File>,
    /// For events.
    pub tell: Tell,
}

/// Tells the loop what happens in one piece of work.
#[derive(Clone)]
pub struct Tell {
    number: u64,
    sender: Sender<(u64, News)>,
    wake: Arc<OwnedFd>,
}

/// What the loop hears.
#[derive(Debug)]
pub enum News {
    /// The call goes on.
    Event(Event),
    /// It is over.
    End(Result<Value, ErrorReply>),
}

impl Tell {
    /// Sends an event of the call.
    pub fn event(&self, event: Event) {
        self.send(News::Event(event));
    }

    fn send(&self, news: News) {
        // Both fail only when the loop is gone, and the process with it.
        let _ = self.sender.send((self.number, news));
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
    }
}

/// The loop's ends of a piece of work's pipes.
pub struct Started {
    /// What it is called in [`Office::news`].
    pub number: u64,
    /// Takes STDIN.
    pub input: Option<OwnedFd>,
    /// Gives STDOUT.
    pub output: OwnedFd,
}

/// Starts work and hears of it.
pub struct Office {
    wake: Arc<OwnedFd>,
    sender: Sender<(u64, News)>,
    receiver: Receiver<(u64, News)>,
    next: u64,
}

impl Office {
    /// One for a server.
    ///
    /// # Errors
    /// When the kernel has no descriptor left.
    pub fn new() -> io::Result<Self> {
        let (sender, receiver) = channel();
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self {
            wake: Arc::new(wake),
            sender,
            receiver,
            next: 0,
        })
    }

    /// Readable when there is [`Office::news`].
    pub fn wake(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// What has happened, with the number of the work.
    pub fn news(&mut self) -> Vec<(u64, News)> {
        let _ = rustix::io::read(&*self.wake, &mut [0; 8]);
        self.receiver.try_iter().collect()
    }

    /// Begins work on a thread of its own.
    ///
    /// # Errors
    /// When there are no descriptors or threads left.
    pub fn start(&mut self, work: Work, takes_input: bool) -> io::Result<Started> {
        let (input, our_input) = match takes_input {
            true => pipe_with(PipeFlags::CLOEXEC).map(|(read, write)| (Some(read), Some(write)))?,
            false => (None, None),
        };
        let (our_output, output) = pipe_with(PipeFlags::CLOEXEC)?;
        let number = self.next;
        self.next += 1;
        let tell = Tell {
            number,
            sender: self.sender.clone(),
            wake: self.wake.clone(),
        };
        let streams = Streams {
            input: input.map(File::from),
            output: Some(output.into()),
            tell: tell.clone(),
        };
        std::thread::Builder::new()
            .name("work".into())
            .stack_size(STACK)
            .spawn(move || {
                let result = catch_unwind(AssertUnwindSafe(|| work(streams)));
                let result = result.unwrap_or_else(|_| {
                    Err(ErrorReply::new(
                        ErrorCode::Failed,
                        "the runtime made a mistake",
                    ))
                });
                tell.send(News::End(result));
            })?;
        Ok(Started {
            number,
            input: our_input,
            output: our_output,
        })
    }
}
