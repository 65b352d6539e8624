//! Processes: `exec`, `attach`, `signal`, `resize`, `processes`.

use serde::{Deserialize, Serialize};

/// Parameters of `exec`; EVENT `started` when it runs, the reply is [`ExitReport`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecParams {
    /// Program and arguments; the program is looked up in the new environment's `PATH`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub argv: Vec<String>,
    /// Instead of `argv`: a line for `/bin/sh -c`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shell: Option<String>,
    /// The environment, name and value. `PATH`, `HOME`, `USER`, `LOGNAME` and `LANG` are added
    /// where they are missing (and `TERM` with a terminal); nothing else is.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<(String, String)>,
    /// Where to start; default the user's home, or `/` when there is no such directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// `user` or `user:group`, each by name or number, as in the guest's `/etc/passwd` and
    /// `/etc/group`; default root. Without a group: the user's own and supplementary ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Whether the client will send [`crate::Kind::Stdin`] frames; otherwise it is `/dev/null`.
    #[serde(default)]
    pub stdin: bool,
    /// Give it a terminal of its own instead of pipes: STDIN is what is typed, STDOUT the screen,
    /// STDERR stays empty. Implies `stdin`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pty: Option<Size>,
    /// After so long all its processes get SIGTERM, and SIGKILL after `grace_ms` more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// Default 2000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grace_ms: Option<u64>,
    /// Send at most so many bytes of each output; what comes after goes to a file in the guest that
    /// the reply names, with the counts and the last bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_limit: Option<u64>,
    /// It outlives its client: when the connection (or its session) ends, its output goes to files
    /// in the guest, and `attach` takes it up again.
    #[serde(default)]
    pub keep: bool,
    /// A name for people and for `processes`, at most 64 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
}

/// A terminal's size, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Lines.
    pub rows: u16,
    /// Columns.
    pub cols: u16,
}

/// Which process: by the exec or attach call of this connection, or by process id (`processes`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// The id of the call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub call: Option<u64>,
    /// The process id that EVENT `started` told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
}

/// Parameters of `signal`; the reply is `null`. SIGKILL goes to every process of the call, wherever
/// it has hidden (its cgroup); others go to its process group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignalParams {
    /// Whose.
    #[serde(flatten)]
    pub target: Target,
    /// Linux signal number, 1 to 64.
    pub signal: i32,
}

/// Parameters of `resize`; the reply is `null`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResizeParams {
    /// Whose terminal.
    #[serde(flatten)]
    pub target: Target,
    /// Its new size.
    #[serde(flatten)]
    pub size: Size,
}

/// Parameters of `attach`: from here on as for the `exec` that started it, with STDIN, outputs and
/// reply. Whoever had it before gets ERROR `taken_over`. EVENT `attached` says where the outputs go on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachParams {
    /// The process.
    pub pid: i32,
    /// What the client has of stdout and stderr, in bytes from the process's start.
    #[serde(default)]
    pub have: [u64; 2],
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

/// Reply of `exec` and `attach`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitReport {
    /// How it ended: `{"code": N}` or `{"signal": N}` among the other members.
    #[serde(flatten)]
    pub status: ExitStatus,
    /// It had reached its time-out.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub timed_out: bool,
    /// The kernel killed one of its processes for want of memory.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub out_of_memory: bool,
    /// What it used; absent where the guest has no cgroups.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    /// stdout and stderr, when `output_limit` was given or a part went to a file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outputs: Option<[OutputReport; 2]>,
}

/// What all processes of a call used together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// In user mode, microseconds.
    pub user_us: u64,
    /// In the kernel, microseconds.
    pub system_us: u64,
    /// Most memory at one time, bytes; 0 where the guest does not count it.
    #[serde(default)]
    pub memory_peak: u64,
}

/// What became of an output.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputReport {
    /// How much the process wrote, bytes.
    pub bytes: u64,
    /// How much of it was sent, from the start: bytes.
    pub sent: u64,
    /// The file with what followed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// How much of it is in the file, bytes; the rest was over the limit for files, and is lost.
    #[serde(default)]
    pub kept: u64,
    /// The last bytes that were not sent, at most 4096, as text (U+FFFD for what is not UTF-8).
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub tail: String,
}

/// A line of the reply of `processes`: those of exec calls, running or kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessInfo {
    /// Process id.
    pub pid: i32,
    /// Program and arguments, at most 256 bytes in all.
    pub argv: Vec<String>,
    /// As given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// CLOCK_BOOTTIME when it began, microseconds.
    pub started_us: u64,
    /// How it ended, when it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<ExitStatus>,
    /// It has a terminal.
    #[serde(default)]
    pub pty: bool,
    /// It outlives its client.
    #[serde(default)]
    pub keep: bool,
    /// A client has it.
    #[serde(default)]
    pub attached: bool,
}

/// Parameters of `session`: must be the first call of a connection. Calls of a session outlive the
/// connection; the reply is [`SessionReply`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionParams {
    /// The session's name: 16 to 64 characters that nobody can guess, of the client's choice.
    pub id: String,
    /// How long it waits for a new connection, milliseconds; default 60000, at most a day.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub linger_ms: Option<u64>,
    /// What the client has of calls that it still waits for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub have: Vec<Have>,
}

/// How much of a call's outputs a client has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Have {
    /// The call.
    pub call: u64,
    /// Bytes of STDOUT, STDERR and DATA.
    #[serde(default)]
    pub outputs: [u64; 3],
}

/// Reply of `session`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionReply {
    /// The session was there.
    pub resumed: bool,
    /// Its open calls, and those whose end the client has not confirmed. What the client waits for
    /// and is not among them never arrived: it sends that again.
    #[serde(default)]
    pub calls: Vec<HaveInput>,
}

/// How much of a call's input the runtime has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HaveInput {
    /// The call.
    pub call: u64,
    /// Bytes of STDIN that arrived.
    #[serde(default)]
    pub stdin: u64,
}
