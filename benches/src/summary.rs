//! A run's figures as a table for people: percentiles of each series, what is missing, host facts.
//!
//! It cannot fail: what is not there is `n/a`.

use std::fmt::Write as _;

use crate::host::{Host, Noise};
use crate::record::{Record, Series};
use crate::stats::{number, percentile};

/// Series in the order of their first sample, with their values.
fn series(records: &[Record]) -> Vec<(&Series, Vec<f64>)> {
    let mut all: Vec<(&Series, Vec<f64>)> = Vec::new();
    let mut known = std::collections::HashMap::new();
    for record in records {
        let Record::Sample(sample) = record else {
            continue;
        };
        let index = *known.entry(&sample.series).or_insert_with(|| {
            all.push((&sample.series, Vec::new()));
            all.len() - 1
        });
        all[index].1.push(sample.value);
    }
    all
}

/// The summary as Markdown.
pub fn markdown(records: &[Record]) -> String {
    let mut out = String::new();
    if let Some(Record::Run { host, .. }) = records.first() {
        facts(&mut out, host);
    }
    if let Some(Record::End {
        noise_after,
        partial,
    }) = records.last()
    {
        let after = noise_after
            .as_ref()
            .map_or_else(|| "not measured".into(), noise);
        let _ = writeln!(out, "* noise after: {after}");
        if let Some(why) = partial {
            let _ = writeln!(out, "* PARTIAL: {why}");
        }
    }
    out.push_str(
        "\n| scenario | what | up to | system | unit | n | p50 | p90 | p99 | max |\n\
         |---|---|---|---|---|---:|---:|---:|---:|---:|\n",
    );
    for (series, values) in series(records) {
        let cell = |p| percentile(&values, p).map_or("n/a".into(), number);
        let max = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let comma = if series.case.is_empty() { "" } else { ", " };
        let _ = writeln!(
            out,
            "| {} | {}{comma}{} | {} | {} | {} | {} | {} | {} | {} | {} |",
            series.scenario,
            series.metric,
            series.case,
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
    out.push('\n');
    for record in records {
        let _ = match record {
            Record::Note { text } => writeln!(out, "* {text}"),
            Record::Missing(it) => {
                writeln!(out, "* {}: {}: n/a: {}", it.scenario, it.system, it.why)
            }
            _ => Ok(()),
        };
    }
    out
}

fn noise(noise: &Noise) -> String {
    format!(
        "{:.2} ms median, {:.2} ms max, {:.0} % of a processor, load {}",
        noise.median_ms,
        noise.max_ms,
        noise.cpu_share * 100.0,
        noise.loadavg
    )
}

fn facts(out: &mut String, host: &Host) {
    let or = |text: &str, none: &str| {
        if text.is_empty() {
            none.to_owned()
        } else {
            text.to_owned()
        }
    };
    let peers: Vec<String> = host
        .peers
        .iter()
        .map(|(name, version)| format!("{name}: {version}"))
        .collect();
    let _ = write!(
        out,
        "* {}, commit {}, `{}`\n* {} x {}, {} MiB, Linux {}, KVM modules: {} ({}); governor: {}\n\
         * peers: {}\n* noise before: {}\n",
        host.date,
        host.commit,
        host.command.join(" "),
        host.cpus,
        host.cpu,
        host.memory_mib,
        host.kernel,
        host.kvm.join(", "),
        host.class,
        or(&host.governor, "none to see"),
        or(&peers.join("; "), "none"),
        noise(&host.noise_before),
    );
}
