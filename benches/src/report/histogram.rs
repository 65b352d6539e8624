//! Latencies that count from planned arrivals, as HdrHistogram files (`.hgrm`), which its plotter
//! and others read. Three significant digits, from 1 ns to an hour; beyond that is an hour.
//!
//! The exact samples are in `samples.jsonl`; this is a view of them. It cannot fail: a figure that
//! fits no histogram has no file.

use std::fmt::Write as _;

use hdrhistogram::Histogram;

use crate::analysis::{Analysis, Figure, to_ms};

const HOUR_NS: u64 = 3_600_000_000_000;
/// Steps in each half of the distance to 100 %, as HdrHistogram's own output has them.
const TICKS_PER_HALF: u32 = 5;
const NS_PER_MS: f64 = 1e6;

/// Names and texts of the files.
pub fn files(analysis: &Analysis) -> Vec<(String, String)> {
    let mut files = Vec::new();
    for group in analysis.groups.iter().filter(|it| it.what.is_time()) {
        for figure in group.figures.iter().filter(|it| it.from_intended_start) {
            let name = format!(
                "{} {} {}",
                group.what.scenario,
                group.title(),
                figure.system
            );
            if let Some(text) = of(figure, &group.what.unit) {
                files.push((format!("{}.hgrm", file_name(&name)), text));
            }
        }
    }
    files
}

/// Lower-case letters, digits and single dashes.
fn file_name(text: &str) -> String {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric());
    let words: Vec<String> = words
        .filter(|word| !word.is_empty())
        .map(str::to_ascii_lowercase)
        .collect();
    let mut name = words.join("-");
    name.truncate(120);
    name
}

fn of(figure: &Figure, unit: &str) -> Option<String> {
    let mut histogram: Histogram<u64> = Histogram::new_with_bounds(1, HOUR_NS, 3).ok()?;
    for value in &figure.sorted {
        let ns = to_ms(*value, unit) * NS_PER_MS;
        histogram.saturating_record((ns.max(1.0) as u64).min(HOUR_NS));
    }
    let mut out = format!(
        "{:>12} {:>14} {:>10} {:>14}\n\n",
        "Value", "Percentile", "TotalCount", "1/(1-Percentile)"
    );
    let mut total = 0;
    for step in histogram.iter_quantiles(TICKS_PER_HALF) {
        total += step.count_since_last_iteration();
        let quantile = step.quantile_iterated_to();
        let value = step.value_iterated_to() as f64 / NS_PER_MS;
        let _ = if quantile < 1.0 {
            writeln!(
                out,
                "{value:12.3} {quantile:14.12} {total:10} {:14.2}",
                1.0 / (1.0 - quantile)
            )
        } else {
            writeln!(out, "{value:12.3} {quantile:14.12} {total:10}")
        };
    }
    let _ = writeln!(
        out,
        "#[Mean    = {:12.3}, StdDeviation   = {:12.3}]",
        histogram.mean() / NS_PER_MS,
        histogram.stdev() / NS_PER_MS
    );
    let _ = writeln!(
        out,
        "#[Max     = {:12.3}, Total count    = {:12}]",
        histogram.max() as f64 / NS_PER_MS,
        histogram.len()
    );
    let _ = writeln!(
        out,
        "#[Buckets = {:12}, SubBuckets     = {:12}]",
        histogram.buckets(),
        2048
    );
    Some(out)
}
