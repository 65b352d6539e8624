//! What the reports promise their readers.

use super::*;
use crate::analysis::Analysis;
use crate::host::{Host, Noise};
use crate::record::{Missing, Outcome, Readiness, Record, SCHEMA, Sample, Series};

fn noise() -> Noise {
    Noise {
        median_ms: 20.0,
        max_ms: 21.0,
        cpu_share: 1.0,
        loadavg: "0.1 0.1 0.1".into(),
    }
}

fn run() -> Record {
    Record::Run {
        schema: SCHEMA,
        host: Box::new(Host {
            date: "2026-11-21T20:00:00Z".into(),
            commit: "abc1234".into(),
            command: vec!["ratoon-bench".into(), "--quick".into(), "start".into()],
            noise_before: noise(),
            ..Host::default()
        }),
        quick: true,
    }
}

fn sample(system: &str, metric: &str, unit: &str, round: usize, value: f64) -> Record {
    Record::Sample(Sample {
        series: Series {
            scenario: "start".into(),
            system: system.to_owned().into(),
            case: "256 MiB".into(),
            metric: metric.to_owned().into(),
            unit: unit.to_owned().into(),
            readiness: Readiness::R1,
        },
        round,
        value,
        at_s: 0.0,
        start_s: (metric == "request").then_some(0.0),
    })
}

fn records() -> Vec<Record> {
    let mut records = vec![run()];
    for round in 0..100_u16 {
        let value = 5.0 + f64::from(round) / 100.0;
        records.push(sample("ratoon", "spawn to R1", "ms", round.into(), value));
        records.push(sample(
            "qemu",
            "spawn to R1",
            "ms",
            round.into(),
            value * 3.0,
        ));
        records.push(sample("ratoon", "phase: memory", "ms", round.into(), 1.5));
        records.push(sample("ratoon", "request", "ms", round.into(), value));
    }
    records.push(sample("ratoon", "private", "KiB", 0, 492.0));
    records.push(Record::Missing(Missing {
        scenario: "start".into(),
        system: "<script>alert(1)</script>".into(),
        why: "crashed | \"x\"".into(),
    }));
    records.push(Record::Scenario {
        name: "start".into(),
        outcome: Outcome::OutOfTime,
        seconds: 12.0,
        error: None,
    });
    records.push(Record::End {
        noise_after: Some(noise()),
        partial: Some("interrupted".into()),
    });
    records
}

#[test]
fn the_page_needs_nothing_from_outside_and_runs_no_script() {
    let page = page::page(&Analysis::of_records(&records(), None));
    for outside in [
        "http:", "https:", "src=", "@import", "url(", "<script", "<link",
    ] {
        assert!(!page.contains(outside), "{outside}");
    }
    assert!(page.contains("&lt;script&gt;alert(1)&lt;/script&gt;"));
    assert!(page.contains("prefers-color-scheme: dark"));
}

#[test]
fn the_page_shows_distributions_a_start_by_phase_memory_and_what_is_missing() {
    let page = page::page(&Analysis::of_records(&records(), None));
    assert_eq!(page.matches("<svg class=\"plot\"").count(), 2);
    assert!(page.contains("<path class=\"line s0\""));
    assert!(page.contains("<path class=\"line s1\""));
    assert!(page.contains("A single start by its phases"));
    assert!(page.contains(">492 KiB<"));
    assert!(page.contains("Partial: interrupted."));
    assert!(page.contains("fewer samples than planned"));
    assert!(page.contains("git checkout abc1234 &amp;&amp; scripts/bench --quick start"));
    assert!(page.contains(">3.00<small>"), "the peer's ratio");
}

#[test]
fn the_summary_has_a_row_a_figure_and_escapes_its_cells() {
    let text = markdown(&Analysis::of_records(&records(), None));
    let row = text
        .lines()
        .find(|line| line.contains("| spawn to R1, 256 MiB | R1 | ratoon |"))
        .expect("our row");
    assert!(row.contains("| ms | 100 | 5.49 (5."), "{row}");
    assert!(row.contains("or more) | n/a | 5.99 |"), "{row}");
    assert!(text.contains("crashed \\| \"x\""));
    assert!(text.starts_with("> **Partial: interrupted.**"));
}

#[test]
fn latencies_from_planned_arrivals_have_a_histogram_whose_count_is_all_of_them() {
    let files = histogram::files(&Analysis::of_records(&records(), None));
    let [(name, text)] = &files[..] else {
        panic!("{files:?}");
    };
    assert_eq!(name, "start-request-256-mib-ratoon.hgrm");
    assert!(text.contains("Total count    =          100]"), "{text}");
    let last = text
        .lines()
        .rfind(|line| line.contains("1.000000000000"))
        .expect("the line of 100 %");
    assert!(last.trim_start().starts_with("5.99"), "{last}");
}

#[test]
fn reports_are_made_again_of_the_samples_alone() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut lines = String::new();
    for record in records() {
        lines.push_str(&serde_json::to_string(&record).expect("a record"));
        lines.push('\n');
    }
    std::fs::write(dir.path().join(SAMPLES), lines).expect("samples");
    let page = again(dir.path(), None).expect("a report");
    assert_eq!(page, dir.path().join(PAGE));
    let json = std::fs::read(dir.path().join("report.json")).expect("report.json");
    let json: serde_json::Value = serde_json::from_slice(&json).expect("JSON");
    let p50 = &json["groups"][0]["figures"][0]["percentiles"][0];
    assert_eq!((&p50["name"], &p50["value"]), (&"p50".into(), &5.49.into()));
    assert_eq!(json["host"]["commit"], "abc1234");
}

#[test]
fn a_run_without_a_sample_has_no_report_and_says_so() {
    let dir = tempfile::tempdir().expect("a folder");
    let line = serde_json::to_string(&run()).expect("a record");
    std::fs::write(dir.path().join(SAMPLES), line + "\n").expect("samples");
    let error = again(dir.path(), None).expect_err("no samples");
    assert!(error.to_string().contains("has no samples"), "{error:#}");
}
