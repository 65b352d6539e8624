//! Persistent interpreters: `code.*`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// An interpreter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Language {
    /// `python3` of the guest.
    #[default]
    Python,
    /// `node` of the guest.
    Node,
    /// `bash` of the guest.
    Bash,
}

/// Parameters of `code.start`; the reply is [`CodeContext`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CodeStart {
    /// Which interpreter.
    #[serde(default)]
    pub language: Language,
    /// The context's name, of the caller's choice, 1 to 64 bytes; default: made up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context: Option<String>,
    /// Where to start; default the user's home.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// Environment, as for `exec`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<(String, String)>,
    /// As for `exec`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// A running interpreter. Reply of `code.start` and `code.restart`; `code.list` replies with an
/// array of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CodeContext {
    /// Its name.
    pub context: String,
    /// Which interpreter.
    pub language: Language,
    /// Its process id in the guest.
    pub pid: i32,
    /// How many cells have been run.
    pub count: u64,
    /// One is running now.
    pub busy: bool,
}

/// Parameters of `code.interrupt`, `code.restart` and `code.stop`. Interrupt and stop reply `null`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CodeName {
    /// Which context.
    pub context: String,
}

/// Parameters of `code.run`. STDOUT and STDERR are the cell's. DATA has a line of JSON for each
/// [`CodeData`]: what it displays, and at the end the value of its last expression. The reply is
/// [`CodeEnd`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CodeRun {
    /// The code of the cell; below 60 KiB.
    pub code: String,
    /// In which context; default: `default-<language>`, started when it is not there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context: Option<String>,
    /// Only without `context`.
    #[serde(default)]
    pub language: Language,
    /// Interrupt it after so long; what does not end within 2 s of that is killed, and with it the
    /// context.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
}

/// A value to be shown, in all forms that it has.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CodeData {
    /// It is the value of the last expression, not something displayed on the way.
    #[serde(default)]
    pub result: bool,
    /// By MIME type: `text/plain` always; `text/html`, `application/json` (as JSON, not text),
    /// `image/svg+xml`, `image/png` and `image/jpeg` (base64), `text/markdown`, `text/latex`.
    pub data: BTreeMap<String, Value>,
}

/// How a cell ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CodeStatus {
    /// To its end.
    Ok,
    /// By an exception, or for Bash a status other than 0.
    Error,
    /// Somebody called `code.interrupt`.
    Interrupted,
    /// It took too long.
    Timeout,
    /// The interpreter is gone (it exited, crashed or was killed), and all state with it.
    #[serde(other)]
    Died,
}

/// Reply of `code.run`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CodeEnd {
    /// The context that ran it.
    pub context: String,
    /// How many cells it has run, this one included.
    pub count: u64,
    /// How it ended.
    pub status: CodeStatus,
    /// Why, unless it is [`CodeStatus::Ok`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<CodeError>,
}

/// An exception.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CodeError {
    /// Its type, e.g. `ZeroDivisionError`; for Bash `ExitStatus`.
    pub name: String,
    /// Its message; for Bash the status.
    pub message: String,
    /// The traceback as the interpreter prints it, at most 32 KiB (its end is kept).
    pub traceback: String,
}
