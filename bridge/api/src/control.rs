//! The bridge's control socket: one JSON object a line, one line in answer, in order.
//!
//! ```text
//! > {"add_vm":{"vm":"a1","socket":"/run/a1/vsock.sock_1025","run":"r7","branch":"main","budget":{"calls":50}}}
//! < {"vm_added":{"head":"5f1c…"}}
//! > {"mint_token":{"vm":"a1","ttl_s":600,"revoke_older":true}}
//! < {"token":{"token":"rtn_…","expires_in_s":600}}
//! > {"usage":{"run":"r7"}}
//! < {"usage":{"branches":[{"branch":"main",…}]}}
//! > {"remove_vm":{"vm":"a1"}}
//! < {"vm_removed":{"head":"77ab…"}}
//! ```
//!
//! With `add_vm` comes the listening socket itself, as a descriptor (`SCM_RIGHTS`): the bridge has a user of
//! its own, to whom a VM's folder is closed. [`Client`] makes it.
//!
//! A request that fails is answered with `{"error":{"message":"…"}}` and has changed nothing. The
//! socket's owner is trusted as the bridge's own operator is; nobody else can connect (mode 0600).

use std::fmt;
use std::io::{BufRead, BufReader, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::{Deserialize, Serialize};

use crate::amount::{Amount, Limits};
use crate::socket;

/// The longest line in either direction.
pub const MAX_LINE_BYTES: usize = 256 * 1024;
/// The longest time a token may live.
pub const MAX_TOKEN_TTL_S: u32 = 3600;
/// The longest VM, run or branch id.
pub const MAX_ID_BYTES: usize = 64;

/// What the bridge can be told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(clippy::large_enum_variant, reason = "there is one at a time")]
pub enum Request {
    /// Listens for a VM.
    AddVm(AddVm),
    /// Makes a token for a VM: at its start, at each wake, and before the last one expires.
    MintToken(MintToken),
    /// Stops listening for a VM, ends its calls and revokes its tokens.
    RemoveVm(RemoveVm),
    /// A VM that stood still goes on: that time is none of its run's.
    Rested(Rested),
    /// What a run has used.
    Usage(UsageOf),
    /// Which VMs there are.
    Status {},
}

/// A VM that may call models.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddVm {
    /// Its id, which no other VM of this bridge has.
    pub vm: String,
    /// Where to listen: what the VMM joins the guest's connections to, `<vsock socket>_<port>`.
    pub socket: PathBuf,
    /// The run that it works on.
    pub run: String,
    /// Its branch of the run. Two VMs never have the same.
    pub branch: String,
    /// The branch that it was forked from: its budget and its record go on from there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// What the branch may use. A run's first branch needs at least one limit.
    #[serde(default)]
    pub budget: Limits,
    /// The models it may use, of those in the configuration; all of them when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub models: Option<Vec<String>>,
}

/// A token that is wanted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MintToken {
    /// For which VM.
    pub vm: String,
    /// How long it is good for, in seconds: at most [`MAX_TOKEN_TTL_S`]. The bridge's configuration may shorten it.
    pub ttl_s: u32,
    /// Whether those minted before end now: so at a wake, before which the VM stood still. When a token is renewed
    /// they live on until they expire, for calls that are on their way.
    #[serde(default)]
    pub revoke_older: bool,
}

/// A VM to remove.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemoveVm {
    /// Its id.
    pub vm: String,
}

/// A VM that goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rested {
    /// Its id.
    pub vm: String,
}

/// A run to tell of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UsageOf {
    /// Its id.
    pub run: String,
}

/// The bridge's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// The VM may connect.
    VmAdded {
        /// The hash of the branch's last line.
        head: String,
        /// Processes of other users may connect, so the socket is to be opened to them.
        #[serde(default)]
        everyone: bool,
    },
    /// A token.
    Token {
        /// The token itself. It is nowhere else.
        token: Token,
        /// Its life, in seconds.
        expires_in_s: u32,
    },
    /// The VM is gone. Keep the head elsewhere: with it `audit` notices a record that was cut short.
    VmRemoved {
        /// The hash of the branch's last line.
        head: String,
    },
    /// It is noted.
    Rested {},
    /// What a run has used.
    Usage {
        /// By branch, in order of name.
        branches: Vec<BranchUsage>,
    },
    /// Which VMs there are.
    Status {
        /// Their ids, in order.
        vms: Vec<String>,
        /// Calls that are on their way.
        calls_in_flight: usize,
    },
    /// The request failed and changed nothing.
    Error {
        /// What failed, and the remedy.
        message: String,
    },
}

/// A token, which `Debug` does not show.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Token(pub String);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// What a branch has used, its children's share with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BranchUsage {
    /// The branch.
    pub branch: String,
    /// What it was forked from.
    pub parent: Option<String>,
    /// What it may use.
    pub budget: Limits,
    /// What is paid.
    pub spent: Amount,
    /// What calls that are on their way may still use.
    pub reserved: Amount,
    /// The hash of its record's last line.
    pub head: String,
}

/// Whether `id` may name a VM, a run or a branch: it becomes a file's name.
#[must_use]
pub fn is_id(id: &str) -> bool {
    !id.is_empty()
        && id.len() <= MAX_ID_BYTES
        && !id.starts_with('.')
        && id
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
}

/// Why the bridge did not answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No connection, or it broke.
    #[error("the bridge's control socket {} does not answer: is ratoon-bridge running?", .socket.display())]
    Io {
        /// Where.
        socket: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Nobody can listen for the VM.
    #[error("cannot listen at {} for a VM", .socket.display())]
    Listen {
        /// Where.
        socket: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// An answer that is none.
    #[error("the bridge at {} answers what this version does not know", .socket.display())]
    Strange {
        /// Where.
        socket: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// It refused.
    #[error("the bridge refuses: {0}")]
    Refused(String),
    /// An earlier call got no whole answer: what comes now would be that one's.
    #[error(
        "an earlier call to the bridge at {} got no whole answer: connect anew",
        .socket.display()
    )]
    Broken {
        /// Where.
        socket: PathBuf,
    },
}

/// The engine's end of the control socket.
#[derive(Debug)]
pub struct Client {
    socket: PathBuf,
    stream: BufReader<UnixStream>,
    /// A request is out whose answer has not come, at least not whole.
    broken: bool,
}

impl Client {
    /// Connects; each call waits for at most `timeout`.
    ///
    /// # Errors
    /// When nobody listens.
    pub fn connect(socket: &Path, timeout: Duration) -> Result<Self, ClientError> {
        let open = || {
            let stream = UnixStream::connect(socket)?;
            stream.set_read_timeout(Some(timeout))?;
            stream.set_write_timeout(Some(timeout))?;
            Ok(stream)
        };
        let stream = open().map_err(|source| ClientError::Io {
            socket: socket.to_owned(),
            source,
        })?;
        Ok(Self {
            socket: socket.to_owned(),
            stream: BufReader::new(stream),
            broken: false,
        })
    }

    /// Asks, and waits for the answer. For a VM that is added it listens first, and hands the socket over.
    ///
    /// # Errors
    /// When the bridge refuses or does not answer. If no whole answer came, in time and not too long,
    /// this client is of no more use: each further call is [`ClientError::Broken`].
    pub fn call(&mut self, request: &Request) -> Result<Reply, ClientError> {
        let Request::AddVm(add) = request else {
            return self.ask(request, None);
        };
        let listen = |source| ClientError::Listen {
            socket: add.socket.clone(),
            source,
        };
        let listener = socket::bind(&add.socket).map_err(listen)?;
        let reply = self.ask(request, Some(listener.as_fd()));
        let opened = match &reply {
            Ok(Reply::VmAdded { everyone: true, .. }) => socket::open_to_all(&add.socket),
            Ok(_) => Ok(()),
            // Nobody serves it.
            Err(_) => std::fs::remove_file(&add.socket),
        };
        match (reply, opened) {
            (Ok(_), Err(source)) => Err(listen(source)),
            (reply, _) => reply,
        }
    }

    fn ask(
        &mut self,
        request: &Request,
        with: Option<BorrowedFd<'_>>,
    ) -> Result<Reply, ClientError> {
        let socket = self.socket.clone();
        let strange = |source| ClientError::Strange {
            socket: socket.clone(),
            source,
        };
        let io = |source| ClientError::Io {
            socket: socket.clone(),
            source,
        };
        if self.broken {
            return Err(ClientError::Broken {
                socket: self.socket.clone(),
            });
        }
        let mut line = serde_json::to_vec(request).map_err(strange)?;
        line.push(b'\n');
        self.broken = true;
        self.send(&line, with).map_err(io)?;
        line.clear();
        self.stream
            .by_ref()
            .take(MAX_LINE_BYTES as u64)
            .read_until(b'\n', &mut line)
            .map_err(io)?;
        if line.last() != Some(&b'\n') {
            let kind = match line.len() {
                MAX_LINE_BYTES => std::io::ErrorKind::InvalidData,
                _ => std::io::ErrorKind::UnexpectedEof,
            };
            return Err(io(kind.into()));
        }
        self.broken = false;
        match serde_json::from_slice(&line).map_err(strange)? {
            Reply::Error { message } => Err(ClientError::Refused(message)),
            reply => Ok(reply),
        }
    }

    /// Sends a line, a descriptor with its first byte.
    fn send(&mut self, mut line: &[u8], with: Option<BorrowedFd<'_>>) -> std::io::Result<()> {
        let stream = self.stream.get_mut();
        if let Some(fd) = with {
            let fds = [fd];
            let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut room);
            control.push(SendAncillaryMessage::ScmRights(&fds));
            let first = [IoSlice::new(line)];
            let sent = sendmsg(&stream, &first, &mut control, SendFlags::NOSIGNAL)?;
            line = &line[sent..];
        }
        stream.write_all(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_a_plain_file_name() {
        for id in ["a", "run-7", "A.b_c", &"x".repeat(64)] {
            assert!(is_id(id), "{id}");
        }
        for id in [
            "",
            ".",
            "..",
            ".a",
            "a/b",
            "a b",
            "a\0",
            "é",
            &"x".repeat(65),
        ] {
            assert!(!is_id(id), "{id}");
        }
    }

    #[test]
    fn a_token_is_not_shown() {
        let reply = Reply::Token {
            token: Token("rtn_secret".into()),
            expires_in_s: 1,
        };
        assert!(!format!("{reply:?}").contains("secret"));
    }

    #[test]
    fn a_late_answer_is_not_taken_for_the_next_ones() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("control");
        let listener = std::os::unix::net::UnixListener::bind(&path).expect("a socket");
        let reply = b"{\"vm_removed\":{\"head\":\"x\"}}\n";
        let oversized = vec![b' '; MAX_LINE_BYTES + 1];
        for (says, kind) in [
            (Vec::new(), std::io::ErrorKind::WouldBlock),
            (oversized, std::io::ErrorKind::InvalidData),
            (reply[..9].to_vec(), std::io::ErrorKind::WouldBlock),
        ] {
            let mut client = Client::connect(&path, Duration::from_millis(50)).expect("a client");
            let (mut stream, _) = listener.accept().expect("a connection");
            // A reader's end of its own, so that an answer which nobody reads blocks nobody.
            let saying = std::thread::spawn(move || {
                stream.write_all(&says).expect("said");
                stream
            });
            match client.call(&Request::Status {}) {
                Err(ClientError::Io { source, .. }) => assert_eq!(source.kind(), kind),
                other => panic!("{other:?}"),
            }
            let mut stream = saying.join().expect("said");
            stream.write_all(reply).expect("said");
            let next = client.call(&Request::Status {});
            assert!(matches!(next, Err(ClientError::Broken { .. })), "{next:?}");
        }
        // A refusal is an answer.
        let mut client = Client::connect(&path, Duration::from_secs(9)).expect("a client");
        let (mut stream, _) = listener.accept().expect("a connection");
        stream
            .write_all(b"{\"error\":{\"message\":\"no\"}}\n{\"vm_removed\":{\"head\":\"x\"}}\n")
            .expect("said");
        let refused = client.call(&Request::Status {});
        assert!(matches!(refused, Err(ClientError::Refused(_))));
        client.call(&Request::Status {}).expect("an answer");
    }

    #[test]
    fn unknown_fields_are_refused() {
        let line = r#"{"mint_token":{"vm":"a","ttl_s":1,"forever":true}}"#;
        let error = serde_json::from_str::<Request>(line).unwrap_err();
        assert!(error.to_string().contains("unknown field `forever`"));
    }
}
