//! What the JSON payloads say. Unknown fields are ignored, unknown calls refused by name.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The runtime's first frame on a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The runtime's own version, e.g. `0.1.0`.
    pub runtime: String,
    /// The names of the calls that it serves.
    pub methods: Vec<String>,
    /// CLOCK_BOOTTIME of the guest when the runtime started to serve, in microseconds.
    #[serde(default)]
    pub ready_at_us: u64,
}

/// What a client asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "method", content = "params", rename_all = "snake_case")]
pub enum Call {
    /// Answer with [`Pong`].
    Ping,
    /// Run a program; the reply is its [`ExitStatus`].
    Exec(ExecParams),
    /// Send a signal to the process group of an exec call of this connection; replies `null`.
    Signal(SignalParams),
    /// Write file systems back and end the machine. The reply (`null`) comes before the end.
    Shutdown,
}

impl Call {
    /// The names of all calls, as [`Hello`] announces them.
    pub const METHODS: [&'static str; 4] = ["ping", "exec", "signal", "shutdown"];

    /// Reads the payload of a [`crate::Kind::Call`] frame.
    ///
    /// # Errors
    /// [`ErrorCode::BadRequest`] when it is not a call at all or its parameters do not fit,
    /// [`ErrorCode::UnknownMethod`] when this side has no such call.
    pub fn parse(payload: &[u8]) -> Result<Self, ErrorReply> {
        #[derive(Deserialize)]
        struct Raw {
            method: String,
            #[serde(default)]
            params: Value,
        }
        fn params<T: for<'de> Deserialize<'de>>(
            method: &str,
            value: Value,
        ) -> Result<T, ErrorReply> {
            serde_json::from_value(value).map_err(|error| {
                ErrorReply::new(
                    ErrorCode::BadRequest,
                    format!("parameters of `{method}`: {error}"),
                )
            })
        }
        let raw: Raw = serde_json::from_slice(payload).map_err(|error| {
            ErrorReply::new(ErrorCode::BadRequest, format!("not a call: {error}"))
        })?;
        match raw.method.as_str() {
            "ping" => Ok(Self::Ping),
            "exec" => Ok(Self::Exec(params("exec", raw.params)?)),
            "signal" => Ok(Self::Signal(params("signal", raw.params)?)),
            "shutdown" => Ok(Self::Shutdown),
            other => Err(ErrorReply::new(
                ErrorCode::UnknownMethod,
                format!("this runtime has no call `{}`", other.escape_debug()),
            )),
        }
    }
}

/// Parameters of `exec`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecParams {
    /// Program and arguments; the program is looked up in the new environment's `PATH`.
    pub argv: Vec<String>,
    /// The environment, name and value. `PATH`, `HOME`, `USER`, `LOGNAME` and `LANG` are added
    /// where they are missing; nothing else is.
    #[serde(default)]
    pub env: Vec<(String, String)>,
    /// Where to start; default the user's home, or `/` when there is no such directory.
    #[serde(default)]
    pub cwd: Option<String>,
    /// `user` or `user:group`, each by name or number, as in the guest's `/etc/passwd` and
    /// `/etc/group`; default root. Without a group: the user's own and supplementary ones.
    #[serde(default)]
    pub user: Option<String>,
    /// Whether the client will send [`crate::Kind::Stdin`] frames; otherwise it is `/dev/null`.
    #[serde(default)]
    pub stdin: bool,
}

/// Parameters of `signal`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignalParams {
    /// The id of the exec call.
    pub call: u64,
    /// Linux signal number, 1 to 64.
    pub signal: i32,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitStatus {
    /// It returned this status, 0 to 255.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
}

impl ExitStatus {
    /// The status as a shell would show it: the code, or 128 and the signal.
    pub fn shell_code(self) -> u8 {
        match self {
            Self::Code(code) => code as u8,
            Self::Signal(signal) => 128u8.wrapping_add(signal as u8),
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
    /// The program may not be executed.
    PermissionDenied,
    /// Anything else that the guest's kernel refused; the message has its reason.
    #[serde(other)]
    Failed,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_reads_as_it_was_written() {
        let call = Call::Exec(ExecParams {
            argv: vec!["true".into()],
            env: vec![("A".into(), "b=c".into())],
            ..ExecParams::default()
        });
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
            if let Err(error) = Call::parse(payload.as_bytes()) {
                assert_eq!(error.code, ErrorCode::BadRequest, "{method}: {error}");
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
