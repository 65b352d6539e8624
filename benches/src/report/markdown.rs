//! A run as Markdown, for a terminal and a README. It cannot fail.

use std::fmt::Write as _;

use super::{command, facts, ratio_text, with_interval};
use crate::analysis::{Analysis, Figure, Group};
use crate::stats::{PERCENTILES, number};

/// The summary.
pub fn markdown(analysis: &Analysis) -> String {
    let mut out = String::new();
    for gap in &analysis.gaps {
        let _ = writeln!(out, "> **{gap}**\n");
    }
    for (name, value) in facts(analysis) {
        let _ = writeln!(out, "* {name}: {}", cell(&value));
    }
    let _ = writeln!(out, "* to repeat: `{}`\n", command(analysis));
    out.push_str(
        "Nearest-rank percentiles of all samples, nothing trimmed; in brackets the 95 % bootstrap \
         interval; n/a: too few samples to tell.\n\n\
         | scenario | what | up to | system | unit | n | p50 | p90 | p95 | p99 | p99.9 | max | times ours |\n\
         |---|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|\n",
    );
    for group in &analysis.groups {
        for figure in &group.figures {
            row(&mut out, group, figure);
        }
    }
    out.push('\n');
    if let Some(overhead) = &analysis.overhead {
        let _ = writeln!(
            out,
            "* the harness's own share: {} ns around a call that does nothing, {:.4} % of the \
             shortest latency ({}, {} ms)",
            number(overhead.null_p50_ms * 1e6),
            overhead.share * 100.0,
            cell(&overhead.shortest.0),
            number(overhead.shortest.1)
        );
    }
    for missing in &analysis.missing {
        let _ = writeln!(
            out,
            "* n/a: {}, {}: {}",
            missing.scenario,
            missing.system,
            cell(&missing.why)
        );
    }
    for note in &analysis.notes {
        let _ = writeln!(out, "* {}", cell(note));
    }
    out
}

fn row(out: &mut String, group: &Group, figure: &Figure) {
    let _ = write!(
        out,
        "| {} | {} | {} | {} | {} | {} |",
        cell(&group.what.scenario),
        cell(&group.title()),
        group.what.readiness.name(),
        cell(&figure.system),
        cell(&group.what.unit),
        figure.n
    );
    for per_mille in PERCENTILES {
        let percentile = figure.percentile(per_mille);
        let (value, interval) = with_interval(
            percentile.and_then(|it| it.value),
            percentile.and_then(|it| it.interval),
        );
        let _ = match interval {
            Some(interval) => write!(out, " {value} ({interval}) |"),
            None => write!(out, " {value} |"),
        };
    }
    let ratio = ratio_text(figure.ratio_to_ours).unwrap_or_default();
    let _ = writeln!(out, " {} | {ratio} |", number(figure.max));
}

/// Text in a cell: on one line, without the cells' own sign.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace(['\n', '\r'], " ")
}
