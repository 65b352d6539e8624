//! Why talking to a runtime fails.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use ratoon_protocol::{ErrorReply, FrameError, MAX_PAYLOAD_LEN};

/// Why talking to a runtime fails.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The runtime refused or failed this call; the connection is well.
    #[error(transparent)]
    Call(ErrorReply),
    /// A request that does not fit a frame (argv and environment together); nothing was sent.
    #[error(
        "the request is {len} bytes long and a call takes at most {MAX_PAYLOAD_LEN}: pass large data by file or stdin"
    )]
    TooLarge {
        /// Its length, in bytes.
        len: usize,
    },
    /// The client's own output; the call was seen to its end.
    #[error("cannot write the command's {stream}")]
    Output {
        /// `stdout` or `stderr`.
        stream: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The client's own input: a command was given end-of-file instead, a file is left as it was.
    #[error("cannot read what is to be sent to the guest")]
    Input(#[source] io::Error),
    /// The VM's vsock socket.
    #[error("cannot connect to {}", path.display())]
    Connect {
        /// The Unix socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The VMM did not join the connection to the guest's port.
    #[error("nobody listens on vsock port {port} of the guest")]
    NotListening {
        /// The port.
        port: u32,
    },
    /// No answer in time.
    #[error("the runtime has not {what} within {} ms", within.as_millis())]
    Timeout {
        /// What it should have done.
        what: &'static str,
        /// How long it had.
        within: Duration,
    },
    /// The connection has ended.
    #[error("the guest has closed the connection")]
    Closed,
    /// The socket.
    #[error("the connection to the guest fails")]
    Io(#[source] io::Error),
    /// Bytes that are no frame.
    #[error("the runtime does not speak the protocol")]
    Frame(#[source] FrameError),
    /// A frame that breaks a rule.
    #[error("the runtime breaks the protocol: {0}")]
    Violation(String),
    /// The runtime says that we broke a rule and has closed the connection.
    #[error("the runtime has closed the connection")]
    Rejected(#[source] ErrorReply),
    /// [`crate::blocking::Controller::cancel`] was called.
    #[error("cancelled")]
    Cancelled,
    /// More came than the caller wants to hold.
    #[error("the guest sends more than {limit} {of}: read it as a stream, or set a higher limit")]
    OverLimit {
        /// The caller's limit.
        limit: usize,
        /// Of what: `bytes`, `entries`.
        of: &'static str,
    },
    /// An output ended before its call said so: the call failed, or the connection is lost.
    #[error("the output breaks off: the call's result says why")]
    CutShort,
    /// The client failed before.
    #[error("this connection has failed before; make a new one")]
    Broken,
}

impl RuntimeError {
    /// Whether the connection is of no more use after this.
    pub fn is_about_connection(&self) -> bool {
        match self {
            Self::Call(_)
            | Self::TooLarge { .. }
            | Self::Output { .. }
            | Self::Input(_)
            | Self::OverLimit { .. }
            | Self::CutShort => false,
            Self::Connect { .. }
            | Self::NotListening { .. }
            | Self::Timeout { .. }
            | Self::Closed
            | Self::Io(_)
            | Self::Frame(_)
            | Self::Violation(_)
            | Self::Rejected(_)
            | Self::Cancelled
            | Self::Broken => true,
        }
    }
}
