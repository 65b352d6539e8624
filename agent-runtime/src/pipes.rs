//! A call's descriptors: where its STDIN goes and its outputs come from.
//!
//! Pipes of a process or of work, a terminal, a socket, a regular file: each is read and written
//! without waiting, one frame a system call, and only as the client makes room.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown};
use serde::{Deserialize, Serialize};

use crate::session::Output;
use crate::sessions::{CallRef, Sessions};
use crate::spawn::{read_now, write_now};
use crate::swap::forms::{Fd, carried, carried_by_serde};

/// What kind of descriptor it is: how to read, write and end it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Medium {
    /// A pipe, blocking: another process may have the same one open.
    Pipe,
    /// A terminal's master, non-blocking.
    Terminal,
    /// A stream socket.
    Socket,
    /// A regular file, at its own position; it never makes us wait long.
    File,
}

#[derive(Debug)]
struct End {
    fd: Fd,
    medium: Medium,
    /// Files: read no more than this.
    left: u64,
}

/// What reading gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Read {
    /// Nothing now.
    Nothing,
    /// So many bytes.
    Bytes(usize),
    /// The end; the descriptor is closed.
    End,
}

/// The descriptors of one call. See the module.
#[derive(Debug, Default)]
pub struct Pipes {
    stdin: Option<End>,
    queue: VecDeque<u8>,
    stdin_ends: bool,
    outputs: [Option<End>; 3],
    /// Bytes that went in.
    pub written: u64,
    /// Why writing ended, other than by a reader that has gone.
    pub failure: Option<Errno>,
}

carried_by_serde!(Medium);
carried!(End { fd, medium, left });
// Only uploads look at the failure, and they do not go on.
carried!(Pipes { stdin, queue, stdin_ends, outputs, written; failure });

impl Pipes {
    /// Input goes here.
    pub fn set_input(&mut self, fd: OwnedFd, medium: Medium) {
        self.stdin = Some(End {
            fd: fd.into(),
            medium,
            left: 0,
        });
    }

    /// This output comes from here; `limit` is how much of a file is read.
    pub fn set_output(&mut self, output: Output, fd: OwnedFd, medium: Medium, limit: Option<u64>) {
        self.outputs[output as usize] = Some(End {
            fd: fd.into(),
            medium,
            left: limit.unwrap_or(u64::MAX),
        });
    }

    /// Whether the output is still open.
    pub fn has_output(&self, output: Output) -> bool {
        self.outputs[output as usize].is_some()
    }

    /// How many bytes of input wait.
    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    /// Whether any output is still open.
    pub fn has_outputs(&self) -> bool {
        self.outputs.iter().any(Option::is_some)
    }

    /// Whether input can still be written, or waits to be.
    pub fn has_input(&self) -> bool {
        self.stdin.is_some()
    }

    /// How many bytes wait in the output's pipe.
    pub fn waiting(&self, output: Output) -> u64 {
        let end = self.outputs[output as usize].as_ref();
        end.and_then(|end| rustix::io::ioctl_fionread(&end.fd).ok())
            .unwrap_or(0)
    }

    /// Forgets all of them: the writers and readers are told.
    pub fn close(&mut self) {
        self.stdin = None;
        self.queue = VecDeque::new();
        self.outputs = Default::default();
    }

    /// Closes one output.
    pub fn close_output(&mut self, output: Output) -> bool {
        self.outputs[output as usize].take().is_some()
    }

    /// The terminal, or the socket.
    pub fn any(&self) -> Option<BorrowedFd<'_>> {
        self.stdin.as_ref().map(|end| end.fd.as_fd())
    }

    /// The descriptor to poll for input room, or for the reader's end.
    pub fn stdin_poll(&self) -> Option<(RawFd, i16)> {
        let end = self.stdin.as_ref()?;
        let waiting = !self.queue.is_empty();
        match end.medium {
            // A file takes everything; a socket's and a terminal's other half is polled already.
            Medium::File => None,
            Medium::Terminal if !waiting => None,
            Medium::Socket if !waiting && self.has_outputs() => None,
            _ => Some((end.fd.as_raw_fd(), if waiting { libc::POLLOUT } else { 0 })),
        }
    }

    /// The descriptor to poll for output.
    pub fn output_poll(&self, output: Output) -> Option<RawFd> {
        self.outputs[output as usize]
            .as_ref()
            .map(|end| end.fd.as_raw_fd())
    }

    /// Input from the client for a descriptor that is yet to come.
    pub fn queue_input(&mut self, bytes: &[u8], end: bool) {
        self.stdin_ends |= end;
        self.queue.extend(bytes);
    }

    /// Input from the client.
    pub fn take_input(&mut self, bytes: &[u8], end: bool, at: CallRef, sessions: &mut Sessions) {
        self.stdin_ends |= end;
        if self.stdin.is_none() {
            sessions.stdin_closed(at);
            return;
        }
        self.queue.extend(bytes);
        self.write(Some(at), sessions);
    }

    /// Writes what goes now; closes after the last byte, or when nobody reads.
    pub fn write(&mut self, at: Option<CallRef>, sessions: &mut Sessions) {
        let Some(stdin) = &self.stdin else { return };
        while !self.queue.is_empty() {
            match stdin.write(self.queue.as_slices().0) {
                Ok(len) => {
                    self.queue.drain(..len);
                    self.written += len as u64;
                    if let Some(at) = at {
                        sessions.stdin_taken(at, len as u64);
                    }
                }
                Err(Errno::AGAIN | Errno::INTR) => return,
                Err(error) => {
                    if error != Errno::PIPE {
                        self.failure = Some(error);
                    }
                    return self.close_input(at, sessions);
                }
            }
        }
        if self.stdin_ends {
            if stdin.medium == Medium::Socket {
                let _ = rustix::net::shutdown(&stdin.fd, Shutdown::Write);
            } else if stdin.medium == Medium::Terminal {
                // As a person would: the end of input is a character.
                let _ = stdin.write(&[4]);
            }
            self.stdin = None;
            self.queue = VecDeque::new();
        }
    }

    /// Nobody reads the input any more.
    pub fn close_input(&mut self, at: Option<CallRef>, sessions: &mut Sessions) {
        self.stdin = None;
        self.queue = VecDeque::new();
        if let Some(at) = at {
            sessions.stdin_closed(at);
        }
    }

    /// Whether the client has sent all its input and it is written.
    pub fn input_is_over(&self) -> bool {
        self.stdin.is_none()
    }

    /// Poll said something of an output. `readable`: there are bytes; otherwise it is at its end.
    pub fn read(&mut self, output: Output, readable: bool, buffer: &mut [u8]) -> Read {
        let slot = &mut self.outputs[output as usize];
        let Some(end) = slot else {
            return Read::Nothing;
        };
        let read = match readable {
            true if buffer.is_empty() => return Read::Nothing,
            true => end.read(buffer),
            false => Ok(0),
        };
        match read {
            Err(Errno::AGAIN | Errno::INTR) => Read::Nothing,
            Ok(len) if len > 0 => Read::Bytes(len),
            // EIO: a terminal whose other side is closed.
            _ => {
                *slot = None;
                Read::End
            }
        }
    }
}

impl End {
    fn write(&self, bytes: &[u8]) -> rustix::io::Result<usize> {
        match self.medium {
            Medium::Pipe => write_now(self.fd.as_fd(), bytes),
            Medium::Socket => {
                rustix::net::send(&self.fd, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
            }
            Medium::Terminal | Medium::File => rustix::io::write(&self.fd, bytes),
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> rustix::io::Result<usize> {
        match self.medium {
            Medium::Pipe => read_now(self.fd.as_fd(), buffer),
            Medium::Socket => {
                rustix::net::recv(&self.fd, &mut *buffer, RecvFlags::DONTWAIT).map(|(len, _)| len)
            }
            Medium::Terminal => rustix::io::read(&self.fd, buffer),
            Medium::File => {
                let most = usize::try_from(self.left).unwrap_or(usize::MAX);
                let most = most.min(buffer.len());
                if most == 0 {
                    return Ok(0);
                }
                let len = rustix::io::read(&self.fd, &mut buffer[..most])?;
                self.left -= len as u64;
                Ok(len)
            }
        }
    }
}
