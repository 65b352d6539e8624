//! The lines of `samples.jsonl`: what a run of the harness keeps, and reading it again.
//!
//! One JSON object a line, told apart by `kind`: `run` (first: schema, host, command), `scenario`
//! (one when it ends), `sample` (one the moment it is taken), `missing` (a figure that there is
//! not, and why), `note`, and `end` (last: noise after, whether the run is partial). A file without
//! `end` is one whose run was killed: partial. Nothing else is needed to make the report again.
//!
//! How it fails: a line that is no record is an error with its number, but for a last line without
//! its end, which is what a full disk or a kill leaves: that is told and left out. A file whose
//! schema is another is refused.

use std::borrow::Cow;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::host::{Host, Noise};

/// The version of the lines' shape; another is refused.
pub const SCHEMA: u32 = 2;
/// No line of ours is longer; a file that has one is none of ours.
const LINE_MAX_BYTES: u64 = 1 << 20;
/// More samples are not read: they would not be ours, and memory is bounded.
const RECORDS_MAX: usize = 20_000_000;

/// Text that is a constant when measured and owned when read.
pub type Text = Cow<'static, str>;

/// How ready "ready" is, for latencies (the words of the design).
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub enum Readiness {
    /// Not a latency up to a point of a start.
    #[default]
    #[serde(rename = "none")]
    None,
    /// Registers set, no guest instruction run.
    R0,
    /// The VM runs.
    R1,
    /// The control plane says that it runs.
    R2,
    /// The runtime in the guest has answered.
    R3,
    /// The runtime says on the console that it serves: the R3 that a machine without vsock has.
    #[serde(rename = "R3'")]
    R3Console,
    /// A command has run and its result is here.
    R4,
}

impl Readiness {
    /// As tables show it; empty for none.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "",
            Self::R0 => "R0",
            Self::R1 => "R1",
            Self::R2 => "R2",
            Self::R3 => "R3",
            Self::R3Console => "R3'",
            Self::R4 => "R4",
        }
    }
}

/// What a series of samples is: its scenario, whose it is, and what is measured in which unit.
///
/// Series that are equal but for `system` are the same figure of several systems: the report draws
/// them into one plot and tells their ratio. A metric that begins with `phase: ` is a part of a
/// start; the report draws those of one scenario, case and round one after the other.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Series {
    /// The scenario.
    pub scenario: Text,
    /// `ratoon` or the peer's name.
    pub system: Text,
    /// The scenario's parameters, e.g. `256 MiB, cold page cache`; may be empty.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub case: Text,
    /// What.
    pub metric: Text,
    /// Unit of the value: `ms`, `s`, `KiB`, `count`, `ratio`, or a rate such as `MiB/s`.
    pub unit: Text,
    /// For latencies, up to which point.
    #[serde(default)]
    pub readiness: Readiness,
}

impl Series {
    /// The same with parameters.
    pub fn case(self, case: impl Into<Text>) -> Self {
        Self {
            case: case.into(),
            ..self
        }
    }

    /// Whether values are times.
    pub fn is_time(&self) -> bool {
        matches!(&*self.unit, "s" | "ms" | "us" | "µs" | "ns")
    }

    /// Whether a larger value is the better one: rates.
    pub fn more_is_better(&self) -> bool {
        self.unit.ends_with("/s")
    }

    /// Whether it is a part of a start.
    pub fn is_phase(&self) -> bool {
        self.metric.starts_with("phase: ")
    }
}

/// One sample.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Which series it belongs to.
    #[serde(flatten)]
    pub series: Series,
    /// The round of its scenario, the same for all samples taken together.
    pub round: usize,
    /// In the series' unit.
    pub value: f64,
    /// Seconds from the run's begin until it was kept.
    #[serde(default)]
    pub at_s: f64,
    /// Seconds from the run's begin to when the operation began; with scheduled arrivals, to when
    /// it was *meant* to begin, from which its latency counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_s: Option<f64>,
}

/// A figure that there is not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Missing {
    /// The scenario.
    pub scenario: Text,
    /// Whose figure.
    pub system: Text,
    /// Why: what is not there, what failed.
    pub why: String,
}

/// How a scenario ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// With all that it was to measure.
    Done,
    /// Its time was over before its rounds were.
    OutOfTime,
    /// By a failure.
    Failed,
    /// By a signal.
    Interrupted,
    /// Not begun, as the run ended before.
    NotBegun,
}

/// One line of the file.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Record {
    /// The first line.
    Run {
        /// [`SCHEMA`].
        schema: u32,
        /// Machine, command, programs, noise before.
        host: Box<Host>,
        /// Whether the run was to be short.
        quick: bool,
    },
    /// One sample.
    Sample(Sample),
    /// A figure that there is not.
    Missing(Missing),
    /// For people: a verdict, something seen.
    Note {
        /// What.
        text: String,
    },
    /// A scenario has ended.
    Scenario {
        /// Its name.
        name: String,
        /// How it ended.
        outcome: Outcome,
        /// How long it took.
        seconds: f64,
        /// Of a failure: what failed.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    },
    /// The last line.
    End {
        /// Noise after the run.
        noise_after: Option<Noise>,
        /// Why not all is here that was asked for; none if it is.
        partial: Option<String>,
    },
}

/// All lines of a file.
#[derive(Debug)]
pub struct Recorded {
    /// In their order.
    pub records: Vec<Record>,
    /// What was wrong with the end of the file, if something was.
    pub torn: Option<String>,
}

/// Reads a file of samples.
///
/// # Errors
/// When it cannot be read, is empty, is of another schema, or a line of it is no record.
pub fn read(path: &Path) -> Result<Recorded> {
    let name = path.display();
    let file = File::open(path).with_context(|| format!("samples {name}"))?;
    if file.metadata().is_ok_and(|meta| meta.is_dir()) {
        bail!("samples {name} is a folder: name the samples.jsonl in it");
    }
    let mut reader = BufReader::new(file);
    let mut records = Vec::new();
    let mut torn = None;
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let mut limited = std::io::Read::take(&mut reader, LINE_MAX_BYTES);
        let length = limited
            .read_until(b'\n', &mut line)
            .with_context(|| format!("samples {name}, line {number}"))?;
        if length == 0 {
            break;
        }
        let whole = line.last() == Some(&b'\n');
        if !whole && length as u64 == LINE_MAX_BYTES {
            bail!(
                "samples {name}, line {number}: too long for a sample: not a file of `ratoon bench`"
            );
        }
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let record: Record = match serde_json::from_slice(&line) {
            Ok(record) => record,
            Err(_) if !whole && !records.is_empty() => {
                torn = Some(format!(
                    "the last line ({number}) has no end: it was being written when the run was \
                     killed or the disk full, and is left out"
                ));
                break;
            }
            Err(error) => {
                return Err(error).with_context(|| {
                    format!("samples {name}, line {number}: not a line of `ratoon bench`")
                });
            }
        };
        check(&record, records.is_empty())
            .with_context(|| format!("samples {name}, line {number}"))?;
        records.push(record);
        if records.len() > RECORDS_MAX {
            bail!("samples {name}: more than {RECORDS_MAX} lines");
        }
    }
    if records.is_empty() {
        bail!("samples {name} is empty: its run was ended before it began");
    }
    Ok(Recorded { records, torn })
}

fn check(record: &Record, first: bool) -> Result<()> {
    match record {
        Record::Run { schema, .. } if *schema != SCHEMA => bail!(
            "written by another version of the harness (schema {schema}, this one reads {SCHEMA}): \
             measure again, or use the harness of its commit"
        ),
        Record::Run { .. } if !first => bail!(
            "a second run begins: one file holds one run; split it at the lines of kind \"run\""
        ),
        Record::Run { .. } => Ok(()),
        _ if first => bail!("the first line is not of kind \"run\": the file's begin is missing"),
        Record::Sample(sample) if !sample.value.is_finite() => bail!("a value that is no number"),
        _ => Ok(()),
    }
}

#[cfg(test)]
#[path = "record_tests.rs"]
mod tests;
