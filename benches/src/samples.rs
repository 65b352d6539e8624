//! Samples: every one is written as a JSON line the moment it is taken, so that a run that is
//! stopped keeps what it has; and the summaries made of them.
//!
//! A percentile is only given when at least one sample lies beyond it: p50 from 2 samples on, p90
//! from 10, p99 from 100. Nothing is trimmed. It fails when the file cannot be written.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

/// How ready "ready" is, for latencies (the words of the design).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Readiness {
    /// Not a latency up to a point of a start.
    None,
    /// Registers set, no guest instruction run.
    R0,
    /// The VM runs.
    R1,
    /// The runtime in the guest has answered.
    R3,
    /// The runtime says on the console that it serves: the R3 that a machine without vsock has.
    #[serde(rename = "R3'")]
    R3Console,
    /// A command has run and its result is here.
    R4,
}

impl Readiness {
    fn name(self) -> &'static str {
        match self {
            Self::None => "",
            Self::R0 => "R0",
            Self::R1 => "R1",
            Self::R3 => "R3",
            Self::R3Console => "R3'",
            Self::R4 => "R4",
        }
    }
}

/// What a series of samples is: its scenario, whose it is, and what is measured in which unit.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Series {
    /// The scenario.
    pub scenario: &'static str,
    /// `ratoon` or the peer's name.
    pub system: &'static str,
    /// What.
    pub metric: String,
    /// Unit of the value.
    pub unit: &'static str,
    /// For latencies, up to which point.
    pub readiness: Readiness,
}

#[derive(Serialize)]
struct Line<'a> {
    #[serde(flatten)]
    series: &'a Series,
    run: usize,
    value: f64,
}

/// The samples of a run of the harness.
#[derive(Debug)]
pub struct Samples {
    file: File,
    values: BTreeMap<Series, Vec<f64>>,
    order: Vec<Series>,
    notes: Vec<String>,
}

impl Samples {
    /// Samples that are written to `path`.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("samples {}", path.display()))?;
        Ok(Self {
            file,
            values: BTreeMap::new(),
            order: Vec::new(),
            notes: Vec::new(),
        })
    }

    /// Keeps one sample of `series`, taken in round `run` of its scenario.
    ///
    /// # Errors
    /// When the file cannot be written (a full disk): the samples before are in it.
    pub fn add(&mut self, series: &Series, run: usize, value: f64) -> Result<()> {
        let mut line = serde_json::to_vec(&Line { series, run, value })?;
        line.push(b'\n');
        self.file.write_all(&line).context("writing a sample")?;
        if !self.values.contains_key(series) {
            self.order.push(series.clone());
        }
        self.values.entry(series.clone()).or_default().push(value);
        Ok(())
    }

    /// A line for the summary: what is missing, or a verdict.
    pub fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    /// The samples of the series with this scenario, system and metric, as taken.
    pub fn of(&self, scenario: &str, system: &str, metric: &str) -> &[f64] {
        self.values
            .iter()
            .find(|(s, _)| s.scenario == scenario && s.system == system && s.metric == metric)
            .map_or(&[], |(_, values)| values.as_slice())
    }

    /// The summary as Markdown.
    pub fn markdown(&self) -> String {
        use std::fmt::Write as _;
        let mut out = String::from(
            "| scenario | what | up to | system | unit | n | p50 | p90 | p99 | max |\n\
             |---|---|---|---|---|---:|---:|---:|---:|---:|\n",
        );
        for series in &self.order {
            let values = &self.values[series];
            let cell = |p| percentile(values, p).map_or("n/a".into(), number);
            let max = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let _ = writeln!(
                out,
                "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
                series.scenario,
                series.metric,
                series.readiness.name(),
                series.system,
                series.unit,
                values.len(),
                cell(50),
                cell(90),
                cell(99),
                number(max)
            );
        }
        if !self.notes.is_empty() {
            out.push('\n');
            for note in &self.notes {
                let _ = writeln!(out, "* {note}");
            }
        }
        out
    }
}

/// The value that `percent` % of the samples do not exceed (nearest rank); `None` when there are
/// too few samples to tell.
pub fn percentile(values: &[f64], percent: u32) -> Option<f64> {
    let n = values.len();
    let needed = 100 / (100 - percent as usize).max(1);
    if n < needed {
        return None;
    }
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (n * percent as usize).div_ceil(100).max(1);
    sorted.get(rank - 1).copied()
}

/// Three significant digits or so.
pub fn number(value: f64) -> String {
    if !value.is_finite() {
        return "n/a".into();
    }
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series() -> Series {
        Series {
            scenario: "start",
            system: "ratoon",
            metric: "spawn".into(),
            unit: "ms",
            readiness: Readiness::R1,
        }
    }

    #[test]
    fn a_percentile_needs_the_samples_that_carry_it() {
        let values: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(percentile(&values, 50), Some(50.0));
        assert_eq!(percentile(&values, 90), Some(90.0));
        assert_eq!(percentile(&values, 99), Some(99.0));
        assert_eq!(percentile(&values[..99], 99), None);
        assert_eq!(percentile(&values[..9], 90), None);
        assert_eq!(percentile(&values[..1], 50), None);
        assert_eq!(percentile(&[], 50), None);
    }

    #[test]
    fn a_percentile_does_not_depend_on_the_order_of_samples() {
        assert_eq!(percentile(&[3.0, 1.0, 2.0], 50), Some(2.0));
    }

    #[test]
    fn every_sample_is_a_line_of_its_own_and_the_summary_counts_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("samples.jsonl");
        let mut samples = Samples::create(&path).unwrap();
        samples.add(&series(), 0, 4.5).unwrap();
        samples.add(&series(), 1, 5.5).unwrap();
        let text = std::fs::read_to_string(path).unwrap();
        let lines: Vec<serde_json::Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[1]["value"], 5.5);
        assert_eq!(lines[1]["readiness"], "R1");
        assert!(
            samples
                .markdown()
                .contains("| start | spawn | R1 | ratoon | ms | 2 | 4.50 | n/a | n/a | 5.50 |"),
            "{}",
            samples.markdown()
        );
    }
}
