//! What is written of a run beside its samples: `report.html` (one page, nothing outside of it is
//! needed), `summary.md`, `report.json`, and an HdrHistogram file for each figure whose latencies
//! count from planned arrivals.
//!
//! All of it is made of the samples alone, so `ratoon bench report DIR` makes it again. It fails when
//! files cannot be written.

mod histogram;
mod markdown;
mod page;
mod plot;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::analysis::Analysis;
use crate::record;
use crate::stats::bootstrap::Interval;
use crate::stats::number;

pub use markdown::markdown;

/// The page's name.
pub const PAGE: &str = "report.html";
/// The samples' name.
pub const SAMPLES: &str = "samples.jsonl";

/// Where the samples of `path`, a folder or a file, are.
pub fn samples_of(path: &Path) -> PathBuf {
    if path.is_dir() {
        path.join(SAMPLES)
    } else {
        path.to_owned()
    }
}

/// `ratoon bench report`: makes the reports of a run again. Returns the page.
///
/// # Errors
/// When samples cannot be read or reports not be written.
pub fn again(path: &Path, out: Option<&Path>) -> Result<PathBuf> {
    let file = samples_of(path);
    let recorded = record::read(&file)?;
    let analysis = Analysis::of(&recorded);
    if analysis.groups.is_empty() {
        bail!(
            "{} has no samples: its run ended before it took one",
            file.display()
        );
    }
    let out = match out {
        Some(out) => out.to_owned(),
        None => file.parent().map(Path::to_owned).unwrap_or_default(),
    };
    std::fs::create_dir_all(&out).with_context(|| format!("output folder {}", out.display()))?;
    write(&analysis, &out)?;
    Ok(out.join(PAGE))
}

/// Writes all reports into `out`.
///
/// # Errors
/// When a file cannot be written.
pub fn write(analysis: &Analysis, out: &Path) -> Result<()> {
    let put = |name: &str, bytes: &[u8]| {
        let path = out.join(name);
        std::fs::write(&path, bytes).with_context(|| format!("writing {}", path.display()))
    };
    put("summary.md", markdown(analysis).as_bytes())?;
    put(
        "report.json",
        &serde_json::to_vec_pretty(analysis).context("report.json")?,
    )?;
    put(PAGE, page::page(analysis).as_bytes())?;
    for (name, text) in histogram::files(analysis) {
        put(&name, text.as_bytes())?;
    }
    Ok(())
}

/// A value with its interval: `7.02 (6.90 to 7.15)`; an interval without an upper bound ends in
/// `or more`.
fn with_interval(value: Option<f64>, interval: Option<Interval>) -> (String, Option<String>) {
    let Some(value) = value else {
        return ("n/a".into(), None);
    };
    let interval = interval
        .filter(|interval| interval.low < interval.high)
        .map(|interval| {
            let open = if interval.open { " or more" } else { "" };
            format!(
                "{} to {}{open}",
                number(interval.low),
                number(interval.high)
            )
        });
    (number(value), interval)
}

/// `1.42 (1.38 to 1.47)`.
fn ratio_text(ratio: Option<(f64, Interval)>) -> Option<String> {
    let (value, interval) = ratio?;
    Some(format!(
        "{value:.2} ({:.2} to {:.2})",
        interval.low, interval.high
    ))
}

/// The command that repeats the run, in a checkout of its commit.
fn command(analysis: &Analysis) -> String {
    let args = analysis.host.command.get(1..).unwrap_or_default().join(" ");
    let commit = analysis.host.commit.trim_end_matches("-dirty");
    if commit.is_empty() {
        return format!("scripts/bench {args}");
    }
    format!("git checkout {commit} && scripts/bench {args}")
}

/// Facts of the host, as name and value.
fn facts(analysis: &Analysis) -> Vec<(&'static str, String)> {
    let host = &analysis.host;
    let or = |text: &str, none: &str| {
        if text.is_empty() {
            none.to_owned()
        } else {
            text.to_owned()
        }
    };
    let noise = |noise: &crate::host::Noise| {
        format!(
            "a fixed loop took {:.2} ms (median), {:.2} ms (slowest), and got {:.1} % of a processor; load {}",
            noise.median_ms,
            noise.max_ms,
            noise.cpu_share * 100.0,
            noise.loadavg
        )
    };
    let peers: Vec<String> = host
        .peers
        .iter()
        .map(|(name, version)| format!("{name}: {version}"))
        .collect();
    let class = match &*host.class {
        "emulated" => "no hardware virtualization: guest kernels run in KVM's instruction emulator",
        "hardware" => "hardware virtualization",
        _ => "unknown",
    };
    vec![
        ("measured", or(&host.date, "unknown")),
        ("commit", or(&host.commit, "unknown")),
        (
            "processor",
            format!("{} x {}", host.cpus, or(&host.cpu, "unknown")),
        ),
        ("memory", format!("{} MiB", host.memory_mib)),
        ("host kernel", format!("Linux {}", host.kernel)),
        (
            "KVM",
            format!("{} ({class})", or(&host.kvm.join(", "), "no module seen")),
        ),
        ("governor", or(&host.governor, "none to see")),
        ("peers", or(&peers.join("; "), "none")),
        ("noise before", noise(&host.noise_before)),
        (
            "noise after",
            analysis
                .noise_after
                .as_ref()
                .map_or_else(|| "not measured".into(), noise),
        ),
    ]
}

#[cfg(test)]
mod tests;
