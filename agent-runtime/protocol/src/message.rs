//! What the JSON payloads say. Unknown fields are ignored, unknown calls refused by name.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    AttachParams, CodeName, CodeRun, CodeStart, EntropyAdd, ExecParams, FileList, FileMkdir,
    FileMove, FilePath, FileRead, FileRemove, FileWatch, FileWrite, FreezeParams, HostnameSet,
    MetricsParams, NetworkSet, PortConnect, ResizeParams, RuntimeSwap, SessionParams, SignalParams,
    TimeSet, TreePack, TreeUnpack, Wake,
};

/// The runtime's first frame on a connection.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The runtime's own version, e.g. `0.1.0`.
    pub runtime: String,
    /// The names of the calls that it serves.
    pub methods: Vec<String>,
    /// CLOCK_BOOTTIME of the guest when the runtime started to serve, in microseconds.
    #[serde(default)]
    pub ready_at_us: u64,
}

macro_rules! calls {
    ($($(#[$doc:meta])* $name:literal $variant:ident $(($params:ty))?,)*) => {
        /// What a client asks for.
        #[derive(Debug, Clone, PartialEq, Serialize)]
        #[serde(tag = "method", content = "params")]
        pub enum Call {
            $($(#[$doc])* #[serde(rename = $name)] $variant $(($params))?,)*
        }

        impl Call {
            /// The names of all calls, as [`Hello`] announces them.
            pub const METHODS: &'static [&'static str] = &[$($name),*];

            /// Its name.
            pub fn method(&self) -> &'static str {
                match self {
                    $(calls!(@pattern $variant $(($params))?) => $name,)*
                }
            }

            fn from_raw(raw: Raw) -> Result<Self, ErrorReply> {
                match raw.method.as_str() {
                    $($name => calls!(@make raw $name $variant $(($params))?),)*
                    other => Err(ErrorReply::new(
                        ErrorCode::UnknownMethod,
                        format!("this runtime has no call `{}`", other.escape_debug()),
                    )),
                }
            }
        }
    };
    (@pattern $variant:ident) => { Self::$variant };
    (@pattern $variant:ident ($params:ty)) => { Self::$variant(_) };
    (@make $raw:ident $name:literal $variant:ident) => { Ok(Self::$variant) };
    (@make $raw:ident $name:literal $variant:ident ($params:ty)) => {
        params($name, $raw.params).map(Self::$variant)
    };
}

calls! {
    /// Answer with [`Pong`].
    "ping" Ping,
    /// Name this connection's session, or take one up again.
    "session" Session(SessionParams),
    /// The session, and all that was begun in it, is over; replies `null`, then the connection ends.
    "session.end" SessionEnd,
    /// Run a program.
    "exec" Exec(Box<ExecParams>),
    /// Take a kept process over.
    "attach" Attach(AttachParams),
    /// Send a signal to a process.
    "signal" Signal(SignalParams),
    /// Change a terminal's size.
    "resize" Resize(ResizeParams),
    /// List the processes of exec calls: an array of [`crate::ProcessInfo`].
    "processes" Processes,
    /// Read a file.
    "file.read" FileRead(FileRead),
    /// Write a file.
    "file.write" FileWrite(FileWrite),
    /// Describe a file: [`crate::FileEntry`].
    "file.stat" FileStat(FilePath),
    /// List a directory.
    "file.list" FileList(FileList),
    /// Make a directory.
    "file.mkdir" FileMkdir(FileMkdir),
    /// Remove a file or directory.
    "file.remove" FileRemove(FileRemove),
    /// Rename a file or directory.
    "file.rename" FileRename(FileMove),
    /// Copy a file or directory.
    "file.copy" FileCopy(FileMove),
    /// Tell what changes.
    "file.watch" FileWatch(FileWatch),
    /// A tree out, as tar.
    "tree.pack" TreePack(TreePack),
    /// A tree in, as tar.
    "tree.unpack" TreeUnpack(TreeUnpack),
    /// Start an interpreter.
    "code.start" CodeStart(CodeStart),
    /// Run code in one.
    "code.run" CodeRun(CodeRun),
    /// Interrupt what it runs.
    "code.interrupt" CodeInterrupt(CodeName),
    /// Begin anew with it.
    "code.restart" CodeRestart(CodeName),
    /// End it.
    "code.stop" CodeStop(CodeName),
    /// List them: an array of [`crate::CodeContext`].
    "code.list" CodeList,
    /// Reach a server in the guest.
    "port.connect" PortConnect(PortConnect),
    /// List servers: an array of [`crate::Port`].
    "port.list" PortList,
    /// How the machine is: [`crate::Metrics`].
    "metrics" Metrics(MetricsParams),
    /// Set the clock.
    "time.set" TimeSet(TimeSet),
    /// Reseed the kernel's random numbers.
    "entropy.add" EntropyAdd(EntropyAdd),
    /// Name the machine.
    "hostname.set" HostnameSet(HostnameSet),
    /// Configure a network device.
    "network.set" NetworkSet(NetworkSet),
    /// Write all file systems back; replies `null`.
    "sync" Sync,
    /// Bring processes and file systems to a halt.
    "freeze" Freeze(FreezeParams),
    /// Let them go on.
    "thaw" Thaw(FreezeParams),
    /// From the next answer on, wait for `wake`; replies `null`.
    "expect_wake" ExpectWake,
    /// Become somebody else.
    "wake" Wake(Box<Wake>),
    /// Who this machine is: [`crate::Awake`].
    "whoami" Whoami,
    /// Another runtime takes over; its bytes follow: [`crate::Swapped`].
    "runtime.swap" RuntimeSwap(RuntimeSwap),
    /// Write file systems back and end the machine. The reply (`null`) comes before the end.
    "shutdown" Shutdown,
}

#[derive(Deserialize)]
struct Raw {
    method: String,
    #[serde(default)]
    params: Value,
}

fn params<T: for<'de> Deserialize<'de>>(method: &str, value: Value) -> Result<T, ErrorReply> {
    let value = match value {
        Value::Null => Value::Object(serde_json::Map::new()),
        value => value,
    };
    serde_json::from_value(value).map_err(|error| {
        ErrorReply::new(
            ErrorCode::BadRequest,
            format!("parameters of `{method}`: {error}"),
        )
    })
}

impl Call {
    /// Reads the payload of a [`crate::Kind::Call`] frame.
    ///
    /// # Errors
    /// [`ErrorCode::BadRequest`] when it is not a call at all or its parameters do not fit,
    /// [`ErrorCode::UnknownMethod`] when this side has no such call.
    pub fn parse(payload: &[u8]) -> Result<Self, ErrorReply> {
        let raw: Raw = serde_json::from_slice(payload).map_err(|error| {
            ErrorReply::new(ErrorCode::BadRequest, format!("not a call: {error}"))
        })?;
        Self::from_raw(raw)
    }

    /// Whether [`crate::Kind::Stdin`] frames follow the call.
    pub fn takes_input(&self) -> bool {
        match self {
            Self::Exec(params) => params.stdin || params.pty.is_some(),
            Self::Attach(_)
            | Self::FileWrite(_)
            | Self::TreeUnpack(_)
            | Self::PortConnect(_)
            | Self::RuntimeSwap(_) => true,
            _ => false,
        }
    }
}

/// Reply of `ping`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pong {
    /// CLOCK_BOOTTIME of the guest, in microseconds.
    pub uptime_us: u64,
}

/// What happens in a call that goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The process of an exec call runs.
    Started {
        /// Its process id in the guest.
        pid: i32,
    },
    /// An attach call has the process; its outputs go on here.
    Attached {
        /// Where, in bytes from the process's start: STDOUT and STDERR of this call begin there.
        from: [u64; 2],
        /// It has a terminal.
        #[serde(default)]
        pty: bool,
    },
    /// A watch call sees all that happens from now on.
    Watching,
    /// A port call has its server.
    Connected,
    /// Of a newer runtime.
    #[serde(other)]
    Unknown,
}

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorReply {
    /// For programs.
    pub code: ErrorCode,
    /// For people: what failed, on what, and why.
    pub message: String,
}

impl ErrorReply {
    /// An error with its words.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }
}

impl std::fmt::Display for ErrorReply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ErrorReply {}

/// The kinds of failure that a program may want to tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The request is not well formed.
    BadRequest,
    /// The runtime has no such call.
    UnknownMethod,
    /// The call id is in use on this connection (or is 0): the connection ends.
    DuplicateCall,
    /// The other side broke the protocol; comes with call 0 and is the connection's last frame.
    Protocol,
    /// Over [`crate::MAX_OPEN_CALLS`].
    TooManyCalls,
    /// No such program, directory, user or call.
    NotFound,
    /// The program may not be executed, the file not be touched.
    PermissionDenied,
    /// It is there already.
    Exists,
    /// The context or process is in use.
    Busy,
    /// Another client has the process now.
    TakenOver,
    /// The client took no more of it.
    Cancelled,
    /// No room: disk, memory or processes.
    NoSpace,
    /// The guest lacks what it takes (a kernel feature, an interpreter).
    Unsupported,
    /// Anything else that the guest's kernel refused; the message has its reason.
    #[serde(other)]
    Failed,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_reads_as_it_was_written() {
        let call = Call::Exec(Box::new(ExecParams {
            argv: vec!["true".into()],
            env: vec![("A".into(), "b=c".into())],
            ..ExecParams::default()
        }));
        assert_eq!(
            Call::parse(&serde_json::to_vec(&call).unwrap()).unwrap(),
            call
        );
        let ping = serde_json::to_vec(&Call::Ping).unwrap();
        assert_eq!(Call::parse(&ping).unwrap(), Call::Ping);
    }

    #[test]
    fn every_announced_method_is_known() {
        for method in Call::METHODS {
            let payload = format!(r#"{{"method":"{method}"}}"#);
            match Call::parse(payload.as_bytes()) {
                Ok(call) => assert_eq!(call.method(), *method),
                Err(error) => assert_eq!(error.code, ErrorCode::BadRequest, "{method}: {error}"),
            }
        }
    }

    #[test]
    fn unknown_fields_are_ignored_and_unknown_calls_refused_by_name() {
        let call =
            Call::parse(br#"{"method":"exec","params":{"argv":["x"],"later":1},"too":2}"#).unwrap();
        assert!(matches!(call, Call::Exec(_)));
        let error = Call::parse(br#"{"method":"fly"}"#).unwrap_err();
        assert_eq!(error.code, ErrorCode::UnknownMethod);
        assert!(error.message.contains("`fly`"));
        assert_eq!(Call::parse(b"[").unwrap_err().code, ErrorCode::BadRequest);
    }

    #[test]
    fn an_error_code_of_a_newer_runtime_is_still_an_error() {
        let reply: ErrorReply =
            serde_json::from_str(r#"{"code":"from_the_future","message":"m"}"#).unwrap();
        assert_eq!(reply.code, ErrorCode::Failed);
    }
}
