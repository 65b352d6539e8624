//! The agent's loop: what the host tells the program `ratoon-agent` in the guest, and what that says.
//!
//! It is an ordinary kept process (`exec` with `keep` and `stdin`), so it outlives connections, freezes and forks as
//! every process does, and `attach` takes it over. Each line of its standard input and output is one JSON object:
//!
//! ```text
//!  host                                        ratoon-agent loop
//!    |  -- Task ------------------------------> |   the first line
//!    |  <------------------- Event, Event, ... -|
//!    |  -- Order -----------------------------> |   whenever
//!    |  <------------------- Event::Ended ----- |   the last line; its code is the process's exit code
//! ```
//!
//! Between [`Event::Held`] (or [`Event::Boundary`]) and [`Order::Go`] the loop does nothing: no call is open, no tool runs. That is where a
//! machine is forked; each child gets an [`Order::Go`] that says who it is.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The vsock port of the host behind which the bridge listens (`<vsock socket>_1025`).
pub const BRIDGE_PORT: u32 = 1025;

/// Where guest programs find the bridge on 127.0.0.1, if nothing else is asked for.
pub const LOOPBACK_PORT: u16 = 8019;

/// Which API the model is called by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wire {
    /// `POST /v1/messages`.
    Messages,
    /// `POST /v1/chat/completions`.
    Chat,
    /// `POST /v1/responses`.
    Responses,
}

/// Which tools the model is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Profile {
    /// `bash`, `str_replace_based_edit_tool`, and ours.
    Anthropic,
    /// `exec_command`, `write_stdin`, `apply_patch`, `update_plan`, and ours.
    Openai,
    /// `bash` alone.
    Minimal,
}

/// When a run ends although its model would go on. What is spent (tokens, money, calls) is the bridge's to limit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AgentLimits {
    /// Calls of the model.
    pub steps: u32,
    /// Milliseconds from the first order on, by CLOCK_BOOTTIME; time held is not counted.
    pub wall_ms: u64,
    /// Milliseconds of model calls and tools together.
    pub working_ms: u64,
    /// Milliseconds of one tool call.
    pub tool_ms: u64,
    /// Answers of the model one after the other that are no valid call of a tool that it has.
    pub format_errors: u32,
    /// How often the same calls may come one after the other, or two kinds of calls in turn.
    pub repeats: u32,
    /// Bytes of a tool's output that the model is shown; the rest stays in a file in the guest.
    pub output_bytes: u64,
}

impl Default for AgentLimits {
    fn default() -> Self {
        Self {
            steps: 100,
            wall_ms: 3_600_000,
            working_ms: 3_600_000,
            tool_ms: 300_000,
            format_errors: 3,
            repeats: 4,
            output_bytes: 16 << 10,
        }
    }
}

/// What the agent is to do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Task {
    /// The run and its branch, as the record has them.
    pub run: String,
    /// See `run`.
    pub branch: String,
    /// How the model is called.
    pub wire: Wire,
    /// Its name, as the bridge knows it.
    pub model: String,
    /// Its tools.
    pub profile: Profile,
    /// The user's words.
    pub prompt: String,
    /// In place of the loop's own words on how to work.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system: Option<String>,
    /// The directory it works in, absolute.
    pub directory: String,
    /// Most tokens of an answer.
    pub max_tokens: u32,
    /// Not sent if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// Not sent if there is none, or the wire has no such thing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Its limits.
    #[serde(default)]
    pub limits: AgentLimits,
    /// Hold before each step whose number (from 1) is one of these.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hold_before: Vec<u32>,
    /// Say [`AgentEvent::Boundary`] before each step and wait there for [`Order::Kept`]: the host keeps a copy of the
    /// machine, from which it can go on once more.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub boundaries: bool,
}

/// What the host says on the way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "snake_case")]
pub enum Order {
    /// Hold at the next turn boundary. A run that is held already says [`AgentEvent::Held`] again.
    Hold {
        /// What `Held` repeats: so it is the answer to this, and not one to somebody before.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        nonce: Option<String>,
    },
    /// A copy of the machine at the boundary before this step was kept, or will not be: go on. At any other moment it
    /// says nothing.
    Kept {
        /// That of [`AgentEvent::Boundary`].
        step: u32,
    },
    /// Go on.
    Go(Box<Go>),
    /// Say [`AgentEvent::Echo`] at once, whatever it does: what it says before that is old.
    Echo {
        /// Repeated in the event.
        nonce: String,
    },
    /// End now: running tools are killed, the open call is closed.
    Cancel,
}

/// Who goes on, and how. What is missing stays as it was.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Go {
    /// Its branch from now on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<String>,
    /// The user's words to this branch, before its next step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steer: Option<String>,
    /// Its seed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Its limits; what has been used up counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<AgentLimits>,
    /// Hold before these steps.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hold_before: Vec<u32>,
}

/// What happens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum AgentEvent {
    /// The task was understood. `version` is the program's.
    Started {
        /// `CARGO_PKG_VERSION`.
        version: String,
    },
    /// The model is called.
    Step {
        /// From 1.
        step: u32,
    },
    /// The model says this, in pieces.
    Text {
        /// A piece.
        text: String,
    },
    /// The model's thoughts, in pieces, where it tells them.
    Thinking {
        /// A piece.
        text: String,
    },
    /// The model calls a tool.
    ToolCall {
        /// The call's id: as the model gave it, or, if that was there before, one that was not.
        id: String,
        /// The tool.
        tool: String,
        /// Its arguments: an object, or text where the model sent no JSON.
        arguments: Value,
    },
    /// What became of it.
    ToolResult {
        /// The call.
        id: String,
        /// Whether the model is told that it failed.
        error: bool,
        /// What the model is shown.
        output: String,
        /// A file in the guest with all of it, where it was cut.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        file: Option<String>,
        /// Its time.
        ms: u64,
    },
    /// An answer is complete.
    Answered {
        /// The step.
        step: u32,
        /// As the provider counts them.
        usage: AgentUsage,
        /// Milliseconds from the request to the first byte of the answer, and to its end.
        first_ms: f64,
        /// See `first_ms`.
        ms: f64,
        /// Milliseconds of the loop's own work since the last tool's end and until the first tool's start.
        own_ms: f64,
        /// The bridge gave a stored answer.
        replayed: bool,
    },
    /// Something that a user should know: a call that is tried again, an answer that was no valid call.
    Notice {
        /// In words.
        text: String,
    },
    /// At a turn boundary, before this step; it waits for [`Order::Go`].
    Held {
        /// The step that comes next.
        step: u32,
        /// That of the order to hold, if it had one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        nonce: Option<String>,
    },
    /// At a turn boundary, before this step ([`Task::boundaries`]); it waits for [`Order::Kept`].
    Boundary {
        /// The step that comes next.
        step: u32,
    },
    /// The answer to [`Order::Echo`].
    Echo {
        /// That of the order.
        nonce: String,
        /// It waits at the boundary before this step to be kept. (What it said of it then may be gone.)
        #[serde(default, skip_serializing_if = "Option::is_none")]
        boundary: Option<u32>,
    },
    /// It goes on, as this branch.
    Going {
        /// The branch.
        branch: String,
    },
    /// The last line.
    Ended {
        /// Why.
        ending: Ending,
        /// In words: the model's last ones, or what went wrong.
        text: String,
        /// Calls of the model.
        steps: u32,
        /// Of all of them.
        usage: AgentUsage,
    },
}

/// Tokens, as the provider counts them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AgentUsage {
    /// All of the input.
    pub input: u64,
    /// Of that: from the provider's cache.
    pub cached: u64,
    /// Of the output.
    pub output: u64,
}

/// Why a run has ended. Each has its exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// The model says that it is done.
    Finished,
    /// The model says that it cannot be done.
    GaveUp,
    /// Somebody cancelled it.
    Cancelled,
    /// [`AgentLimits::steps`].
    Steps,
    /// [`AgentLimits::wall_ms`] or `working_ms`.
    Time,
    /// The bridge: calls, tokens or money are spent.
    Budget,
    /// [`AgentLimits::format_errors`].
    Format,
    /// [`AgentLimits::repeats`].
    Repetition,
    /// The model declines to answer, or its answer is cut by its limit of tokens again and again.
    Refused,
    /// The bridge or the provider cannot be reached, or refuses the call for good.
    Model,
    /// The loop itself has a fault, or the guest fails it.
    Failed,
}

impl Ending {
    /// The program's exit code, and that of `ratoon agent run`.
    pub fn code(self) -> u8 {
        match self {
            Self::Finished => 0,
            Self::GaveUp => 1,
            Self::Cancelled => 130,
            Self::Steps => 10,
            Self::Time => 11,
            Self::Budget => 12,
            Self::Format => 13,
            Self::Repetition => 14,
            Self::Refused => 15,
            Self::Model => 16,
            Self::Failed => 125,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_as_documented() {
        let held = |nonce: Option<&str>| {
            let nonce = nonce.map(str::to_owned);
            serde_json::to_string(&AgentEvent::Held { step: 3, nonce }).unwrap()
        };
        assert_eq!(held(None), r#"{"event":"held","step":3}"#);
        assert_eq!(held(Some("x")), r#"{"event":"held","step":3,"nonce":"x"}"#);
        let order: Order = serde_json::from_str(r#"{"order":"hold"}"#).unwrap();
        assert_eq!(order, Order::Hold { nonce: None });
        let go = Order::Go(Box::new(Go {
            steer: Some("try it".into()),
            ..Go::default()
        }));
        let go = serde_json::to_string(&go).unwrap();
        assert_eq!(go, r#"{"order":"go","steer":"try it"}"#);
        let order: Order = serde_json::from_str(r#"{"order":"cancel"}"#).unwrap();
        assert_eq!(order, Order::Cancel);
    }

    #[test]
    fn endings_have_codes_of_their_own() {
        use Ending::*;
        let all = [
            Finished, GaveUp, Cancelled, Steps, Time, Budget, Format, Repetition, Refused, Model,
            Failed,
        ];
        let codes: std::collections::BTreeSet<u8> = all.map(Ending::code).into();
        assert_eq!(codes.len(), all.len());
    }
}
