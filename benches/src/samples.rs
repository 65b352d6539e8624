//! The samples of a run while it runs: each is written as a line of `samples.jsonl` (see
//! [`crate::record`]) the moment it is taken, and kept in memory for verdicts at the end.
//!
//! How it fails: when the file takes no more (a full disk) the error says so, and ends the
//! scenario; what came before is in the file, and what is in memory can still be reported.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};

use crate::clock::WallClock;
use crate::host::{Host, Noise};
use crate::record::{Missing, Outcome, Record, SCHEMA, Sample, Text};
pub use crate::record::{Readiness, Series};
pub use crate::stats::{number, percentile};

/// The samples of a run of the harness.
#[derive(Debug)]
pub struct Samples {
    file: File,
    path: PathBuf,
    begun: Instant,
    wall: WallClock,
    values: BTreeMap<Series, Vec<f64>>,
    records: Vec<Record>,
    /// The first failure to write, which ends the run.
    unwritten: Option<String>,
}

impl Samples {
    /// Samples that are written to `path`.
    ///
    /// # Errors
    /// When the file cannot be made or written.
    pub fn create(path: &Path, host: &Host, quick: bool) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("samples {}", path.display()))?;
        let mut samples = Self {
            file,
            path: path.to_owned(),
            begun: Instant::now(),
            wall: WallClock::now(),
            values: BTreeMap::new(),
            records: Vec::new(),
            unwritten: None,
        };
        samples.keep(Record::Run {
            schema: SCHEMA,
            host: Box::new(host.clone()),
            quick,
        })?;
        Ok(samples)
    }

    /// Keeps one sample of `series`, taken in round `run` of its scenario.
    ///
    /// # Errors
    /// When the file cannot be written (a full disk): the samples before are in it.
    pub fn add(&mut self, series: &Series, round: usize, value: f64) -> Result<()> {
        self.add_sample(series, round, value, None)
    }

    /// The same of an operation that began, or was meant to begin, at `start`.
    ///
    /// # Errors
    /// As [`Self::add`].
    pub fn add_from(
        &mut self,
        series: &Series,
        round: usize,
        value: f64,
        start: Instant,
    ) -> Result<()> {
        let start_s = start.saturating_duration_since(self.begun).as_secs_f64();
        self.add_sample(series, round, value, Some(start_s))
    }

    fn add_sample(
        &mut self,
        series: &Series,
        round: usize,
        value: f64,
        start_s: Option<f64>,
    ) -> Result<()> {
        if !value.is_finite() {
            let why = format!("{}: not a number in round {round}", series.metric);
            return self.missing(series.scenario.clone(), series.system.clone(), why);
        }
        self.values.entry(series.clone()).or_default().push(value);
        self.keep(Record::Sample(Sample {
            series: series.clone(),
            round,
            value,
            at_s: self.begun.elapsed().as_secs_f64(),
            start_s,
        }))
    }

    /// A figure that there is not, and why: n/a in the report.
    ///
    /// # Errors
    /// As [`Self::add`].
    pub fn missing(
        &mut self,
        scenario: impl Into<Text>,
        system: impl Into<Text>,
        why: impl Into<String>,
    ) -> Result<()> {
        self.keep(Record::Missing(Missing {
            scenario: scenario.into(),
            system: system.into(),
            why: why.into(),
        }))
    }

    /// A line for people: a verdict, something seen. That it cannot be written is told by the next
    /// sample or the end.
    pub fn note(&mut self, text: impl Into<String>) {
        let _ = self.keep(Record::Note { text: text.into() });
    }

    /// A scenario has ended. Steps of the wall clock until then are noted.
    pub fn scenario_ended(
        &mut self,
        name: &str,
        outcome: Outcome,
        seconds: f64,
        error: Option<String>,
    ) {
        if let Some(step) = self.wall.step() {
            self.note(format!(
                "the wall clock stepped by {step:+.3} s during {name}: latencies are of \
                 CLOCK_MONOTONIC, which does not step"
            ));
        }
        let _ = self.keep(Record::Scenario {
            name: name.into(),
            outcome,
            seconds,
            error,
        });
    }

    /// Ends the file. `partial`: why not all is here that was asked for.
    pub fn end(&mut self, noise_after: Option<Noise>, partial: Option<String>) {
        let partial = match (&self.unwritten, partial) {
            (Some(error), None) => Some(format!("samples could not be written: {error}")),
            (Some(error), Some(why)) => {
                Some(format!("{why}; samples could not be written: {error}"))
            }
            (None, partial) => partial,
        };
        let _ = self.keep(Record::End {
            noise_after,
            partial,
        });
    }

    fn keep(&mut self, record: Record) -> Result<()> {
        let line = serde_json::to_vec(&record);
        self.records.push(record);
        let mut line = line?;
        line.push(b'\n');
        // After a failure the line before may be torn: more would be garbage behind it.
        let written = match &self.unwritten {
            Some(before) => Err(std::io::Error::other(before.clone())),
            None => self.file.write_all(&line),
        };
        if let Err(error) = &written
            && self.unwritten.is_none()
        {
            self.unwritten = Some(error.to_string());
        }
        written.with_context(|| {
            format!(
                "writing a sample to {} (what came before is in it)",
                self.path.display()
            )
        })
    }

    /// Whether samples could not be written.
    pub fn is_torn(&self) -> bool {
        self.unwritten.is_some()
    }

    /// All that was kept, in its order.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// The samples without a case that have this scenario, system and metric, as taken.
    pub fn of(&self, scenario: &str, system: &str, metric: &str) -> &[f64] {
        self.of_case(scenario, system, "", metric)
    }

    /// The samples with this scenario, system, case and metric, as taken.
    pub fn of_case(&self, scenario: &str, system: &str, case: &str, metric: &str) -> &[f64] {
        self.values
            .iter()
            .find(|(s, _)| {
                s.scenario == scenario && s.system == system && s.case == case && s.metric == metric
            })
            .map_or(&[], |(_, values)| values.as_slice())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record;

    fn series() -> Series {
        Series {
            scenario: "start".into(),
            system: "ratoon".into(),
            case: "".into(),
            metric: "spawn".into(),
            unit: "ms".into(),
            readiness: Readiness::R1,
        }
    }

    #[test]
    fn every_sample_is_a_line_of_its_own_the_moment_it_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("samples.jsonl");
        let mut samples = Samples::create(&path, &Host::default(), false).unwrap();
        samples.add(&series(), 0, 4.5).unwrap();
        samples.add(&series().case("cold"), 1, 5.5).unwrap();
        let read = record::read(&path).unwrap();
        assert!(read.torn.is_none());
        let values: Vec<_> = read
            .records
            .iter()
            .filter_map(|record| match record {
                Record::Sample(sample) => Some((&*sample.series.case, sample.value)),
                _ => None,
            })
            .collect();
        assert_eq!(values, [("", 4.5), ("cold", 5.5)]);
        assert_eq!(samples.of("start", "ratoon", "spawn"), [4.5]);
        assert_eq!(samples.of_case("start", "ratoon", "cold", "spawn"), [5.5]);
    }

    #[test]
    fn a_value_that_is_no_number_is_missing_instead() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("samples.jsonl");
        let mut samples = Samples::create(&path, &Host::default(), false).unwrap();
        samples.add(&series(), 3, f64::INFINITY).unwrap();
        let records = record::read(&path).unwrap().records;
        assert!(matches!(&records[1], Record::Missing(missing) if missing.why.contains("round 3")));
    }

    #[test]
    fn a_full_disk_is_told_once_begun_and_what_was_taken_stays_in_memory() {
        let full = Path::new("/dev/full");
        let error = Samples::create(full, &Host::default(), false).unwrap_err();
        assert!(format!("{error:#}").contains("No space left"), "{error:#}");

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("samples.jsonl");
        let mut samples = Samples::create(&path, &Host::default(), false).unwrap();
        samples.file = File::create(full).unwrap();
        let error = samples.add(&series(), 0, 1.0).unwrap_err();
        assert!(format!("{error:#}").contains("No space left"), "{error:#}");
        assert!(samples.is_torn());
        samples.end(None, None);
        assert_eq!(samples.of("start", "ratoon", "spawn"), [1.0]);
        assert!(matches!(
            samples.records().last(),
            Some(Record::End { partial: Some(why), .. }) if why.contains("No space left")
        ));
    }
}
