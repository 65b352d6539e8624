//! The record of a run: what was asked, what was answered, what it cost, what was refused.
//!
//! ```text
//! RECORDS/RUN/lock            held by the bridge that writes the run
//! RECORDS/RUN/BRANCH.jsonl    one line an entry, appended, never changed
//! RECORDS/RUN/bodies/HASH     requests and answers, by the BLAKE3 hash of the stored bytes
//!
//! line 0   {"seq":0,"prev":P,"time_ms":…,"kind":"begin",…}     P: the parent's head, else zeros
//! line 1   {"seq":1,"prev":hash(line 0),…}
//! ```
//!
//! A line's hash is over its stored bytes without the newline (so nobody has to agree on a canonical
//! form of JSON), keyed with [`LINE_CONTEXT`]. The first line of a fork names its parent's head: the
//! branches of a run are one tree of hashes. Secrets are masked before a byte is stored or hashed.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::amount::{Amount, Limits};

/// The format that this code writes.
pub const FORMAT: u32 = 1;
/// Sets a line's hash apart from every other use of BLAKE3.
pub const LINE_CONTEXT: &str = "ratoon 2026-11-22 record line v1";
/// The longest line that is written or read.
pub const MAX_LINE_BYTES: usize = 64 * 1024;

/// A hash, in hexadecimal.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Hash(pub String);

impl Hash {
    /// What the first line of a run has as `prev`.
    #[must_use]
    pub fn zero() -> Self {
        Self("0".repeat(64))
    }

    /// A line's hash.
    #[must_use]
    pub fn of_line(line: &[u8]) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(LINE_CONTEXT);
        hasher.update(line);
        Self(hasher.finalize().to_hex().to_string())
    }

    /// A stored body's hash: also its file's name.
    #[must_use]
    pub fn of_body(bytes: &[u8]) -> Self {
        Self(blake3::hash(bytes).to_hex().to_string())
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// Its place, from 0.
    pub seq: u64,
    /// The hash of the line before; of line 0, of the parent's last line at the fork.
    pub prev: Hash,
    /// When, in milliseconds since 1970.
    pub time_ms: u64,
    /// What.
    #[serde(flatten)]
    pub entry: Entry,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Entry {
    /// A branch begins: always line 0, and only there.
    Begin {
        /// [`FORMAT`].
        format: u32,
        /// The run.
        run: String,
        /// The branch.
        branch: String,
        /// What it was forked from.
        parent: Option<Parent>,
        /// What it may use.
        budget: Limits,
    },
    /// A VM works on the branch from now on.
    Vm {
        /// Its id.
        vm: String,
    },
    /// A token was minted.
    Token {
        /// For which VM.
        vm: String,
        /// The first digits of the token's hash.
        id: String,
        /// Its life, in seconds.
        ttl_s: u32,
    },
    /// A call is about to be sent. If no `answer` follows, the bridge ended in between, and all that
    /// was reserved counts as used; the next bridge that opens the run adds such an answer.
    Call {
        /// Its number in this branch.
        call: u64,
        /// From which VM.
        vm: String,
        /// `messages`, `count_tokens`, `chat` or `responses`.
        wire: String,
        /// The provider's name in the configuration.
        provider: String,
        /// The model as the guest names it.
        model: String,
        /// What makes a repetition recognisable.
        step: Option<Step>,
        /// The same for the same request, whatever output limit the budget gave it.
        digest: Hash,
        /// The request as the bridge rebuilt it.
        request: Body,
        /// Provider-side tools that were left out.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        withheld: Vec<String>,
        /// What was put aside of the budget.
        reserved: Amount,
    },
    /// A call has ended. Of a call whose bridge ended before it, this is added when the run is opened
    /// again: `cut`, with what had come of the answer, all that was reserved as `charged`, and 0 for
    /// what nobody knows any more.
    Answer {
        /// Its number.
        call: u64,
        /// How.
        ending: Ending,
        /// The HTTP status that the guest got.
        status: u16,
        /// The answer's media type.
        media_type: String,
        /// The answer as the guest got it, as far as it came.
        body: Body,
        /// What it cost.
        charged: Amount,
        /// Of the input tokens, those that the provider had in its cache.
        cached_tokens: u64,
        /// How often it was sent.
        attempts: u32,
        /// From the request's last byte to the answer's first, in microseconds.
        first_byte_us: u64,
        /// Until the answer's last byte.
        total_us: u64,
    },
    /// A stored answer was given again.
    Replay {
        /// The call whose answer it was.
        call: u64,
        /// To which VM.
        vm: String,
    },
    /// A request was refused.
    Refused {
        /// From which VM.
        vm: String,
        /// The error's code: `x-ratoon-error` of the answer.
        code: String,
        /// Why.
        message: String,
    },
    /// A VM left.
    VmGone {
        /// Its id.
        vm: String,
        /// Refusals that are not in the record, since there were too many.
        refusals_untold: u64,
    },
    /// The host had the branch stand still until now: a hold, a freeze. That is none of its wall time.
    Rest {
        /// Milliseconds since something was last heard of its calls.
        ms: u64,
    },
    /// The last line was incomplete when the bridge came back, and was taken away.
    Torn {
        /// How long it was.
        bytes: u64,
    },
}

/// Where a branch begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parent {
    /// The parent's name.
    pub branch: String,
    /// The parent's last line at the fork.
    pub seq: u64,
    /// That line's hash.
    pub head: Hash,
}

/// What makes a repeated call recognisable, with run and branch.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// The step of the loop.
    pub step: u64,
    /// Which try of this step.
    pub attempt: u32,
}

/// A stored body.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Body {
    /// Its hash and its file's name.
    pub hash: Hash,
    /// Its length in bytes.
    pub len: u64,
}

impl Body {
    /// The body that has no byte. It needs no file.
    #[must_use]
    pub fn empty() -> Self {
        Self {
            hash: Hash::of_body(b""),
            len: 0,
        }
    }
}

/// How a call ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// The answer is whole: only such a one is ever given again.
    Complete,
    /// The provider answered with an error, before or within its stream.
    ProviderError,
    /// The provider could not be reached, or hung up before it answered.
    Unreachable,
    /// It said nothing for too long.
    TimedOut,
    /// The stream ended before its end.
    Cut,
    /// The answer was larger than allowed.
    TooLarge,
    /// The guest hung up.
    GuestGone,
    /// The VM was removed.
    Removed,
}

/// The folder of a run.
#[must_use]
pub fn run_dir(records: &Path, run: &str) -> PathBuf {
    records.join(run)
}

/// The file of a branch.
#[must_use]
pub fn branch_file(run_dir: &Path, branch: &str) -> PathBuf {
    run_dir.join(format!("{branch}.jsonl"))
}

/// The file of a body.
#[must_use]
pub fn body_file(run_dir: &Path, hash: &Hash) -> PathBuf {
    run_dir.join("bodies").join(&hash.0)
}
