//! Rules of the analysis, with records made by hand.

use super::*;
use crate::record::{SCHEMA, Sample};

/// A run's records without their end.
pub fn run() -> Vec<Record> {
    vec![Record::Run {
        schema: SCHEMA,
        host: Box::new(Host {
            noise_before: Noise {
                median_ms: 20.0,
                max_ms: 21.0,
                cpu_share: 1.0,
                loadavg: String::new(),
            },
            ..Host::default()
        }),
        quick: false,
    }]
}

/// A sample of `start`.
pub fn sample(system: &'static str, metric: &'static str, round: usize, value: f64) -> Record {
    Record::Sample(Sample {
        series: Series {
            scenario: "start".into(),
            system: system.into(),
            case: "".into(),
            metric: metric.into(),
            unit: "ms".into(),
            readiness: Readiness::R1,
        },
        round,
        value,
        at_s: 0.0,
        start_s: None,
    })
}

fn end() -> Record {
    Record::End {
        noise_after: None,
        partial: None,
    }
}

#[test]
fn systems_of_one_figure_are_one_group_with_ours_first() {
    let mut records = run();
    for round in 0..10 {
        records.push(sample("firecracker", "x", round, 20.0 + round as f64));
        records.push(sample("ratoon", "x", round, 10.0 + round as f64 / 2.0));
    }
    records.push(end());
    let analysis = Analysis::of_records(&records, None);
    assert_eq!(analysis.groups.len(), 1);
    let [ours, peer] = &analysis.groups[0].figures[..] else {
        panic!("{:?}", analysis.groups);
    };
    assert_eq!((&*ours.system, &*peer.system), ("ratoon", "firecracker"));
    assert!(ours.ratio_to_ours.is_none());
    let (ratio, interval) = peer.ratio_to_ours.unwrap();
    assert_eq!(ratio, 2.0);
    assert!(interval.low < 2.0 && interval.high > 2.0);
    assert!(analysis.gaps.is_empty(), "{:?}", analysis.gaps);
}

#[test]
fn a_run_without_an_end_is_partial() {
    let mut records = run();
    records.push(sample("ratoon", "x", 0, 1.0));
    let analysis = Analysis::of_records(&records, Some("the last line has no end"));
    assert!(analysis.gaps[0].contains("killed"), "{:?}", analysis.gaps);
    assert!(analysis.gaps[1].contains("torn"), "{:?}", analysis.gaps);
}

#[test]
fn a_waterfall_is_a_single_start_the_one_in_the_middle() {
    let mut records = run();
    for (round, times) in [(1, [1.0, 9.0]), (2, [2.0, 3.0]), (3, [0.5, 0.5])] {
        records.push(sample("ratoon", "phase: a", round, times[0]));
        records.push(sample("ratoon", "phase: b", round, times[1]));
    }
    let analysis = Analysis::of_records(&records, None);
    let [waterfall] = &analysis.waterfalls[..] else {
        panic!("{:?}", analysis.waterfalls);
    };
    assert_eq!(waterfall.round, 2);
    assert_eq!(
        waterfall.phases,
        [("a".to_owned(), 2.0), ("b".to_owned(), 3.0)]
    );
}

#[test]
fn the_harness_s_share_is_held_against_the_shortest_latency() {
    let null = |value| {
        let Record::Sample(mut it) = sample("harness", "a call that does nothing", 0, value) else {
            unreachable!("a sample is one")
        };
        it.series.scenario = NULL.into();
        Record::Sample(it)
    };
    let of = |null_ms: f64| {
        let mut records = run();
        records.extend([null(null_ms), null(null_ms)]);
        for value in [5.0, 5.0] {
            records.push(sample("ratoon", "x", 0, value));
            records.push(sample("ratoon", "phase: short", 0, 0.001));
        }
        records.push(end());
        Analysis::of_records(&records, None)
    };
    let overhead = of(0.0005).overhead.unwrap();
    assert!(overhead.ok && (overhead.share - 0.0001).abs() < 1e-9);
    assert_eq!(overhead.shortest.0, "start: x");
    let too_much = of(0.1);
    assert!(!too_much.overhead.unwrap().ok);
    assert!(
        too_much.gaps[0].contains("own share"),
        "{:?}",
        too_much.gaps
    );
}

#[test]
fn a_busy_machine_and_one_whose_speed_changed_are_told() {
    let noise = |median_ms, cpu_share| Noise {
        median_ms,
        max_ms: median_ms,
        cpu_share,
        loadavg: String::new(),
    };
    assert!(noise_gaps(&noise(20.0, 0.99), Some(&noise(20.5, 0.99))).is_empty());
    let gaps = noise_gaps(&noise(20.0, 0.5), Some(&noise(30.0, 0.99)));
    assert!(gaps[0].contains("50 %"), "{gaps:?}");
    assert!(gaps[1].contains("+50 %"), "{gaps:?}");
}
