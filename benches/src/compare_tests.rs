//! What a comparison says, and what it must not.

use fastrand::Rng;

use super::*;
use crate::record::{Readiness, Record, SCHEMA, Sample};

fn series(metric: &'static str, unit: &'static str) -> Series {
    Series {
        scenario: "start".into(),
        system: "ratoon".into(),
        case: "".into(),
        metric: metric.into(),
        unit: unit.into(),
        readiness: Readiness::R1,
    }
}

fn run(figures: &[(Series, Vec<f64>)]) -> Analysis {
    let mut host = Host::default();
    host.noise_before.median_ms = 20.0;
    host.noise_before.cpu_share = 1.0;
    let mut records = vec![Record::Run {
        schema: SCHEMA,
        host: Box::new(host),
        quick: false,
    }];
    for (series, values) in figures {
        for (round, value) in values.iter().enumerate() {
            records.push(Record::Sample(Sample {
                series: series.clone(),
                round,
                value: *value,
                at_s: 0.0,
                start_s: None,
            }));
        }
    }
    records.push(Record::End {
        noise_after: None,
        partial: None,
    });
    Analysis::of_records(&records, None)
}

fn noisy(seed: u64, middle: f64, n: usize) -> Vec<f64> {
    let mut random = Rng::with_seed(seed);
    (0..n)
        .map(|_| middle * (0.95 + random.f64() / 10.0))
        .collect()
}

fn one(unit: &'static str, a: Vec<f64>, b: Vec<f64>) -> String {
    let what = series("x", unit);
    let comparison = between(&run(&[(what.clone(), a)]), &run(&[(what, b)]));
    words(&comparison.figures[0])
}

#[test]
fn a_slower_run_is_told_with_how_much_and_the_interval_of_that() {
    let words = one("ms", noisy(1, 10.0, 50), noisy(2, 11.2, 50));
    assert!(words.starts_with("slower by 1"), "{words}");
    assert!(
        words.contains(" % (") && words.contains("p < 0.001"),
        "{words}"
    );
    assert!(words.contains("effect large (+"), "{words}");
    let words = one("MiB/s", noisy(1, 10.0, 50), noisy(2, 9.0, 50));
    assert!(words.starts_with("lower by 1"), "{words}");
    let words = one("KiB", noisy(1, 10.0, 50), noisy(2, 40.0, 50));
    assert!(words.starts_with("more: 4.0"), "{words}");
}

#[test]
fn the_same_source_twice_has_no_difference_and_says_what_would_have_shown() {
    let words = one("ms", noisy(1, 10.0, 20), noisy(2, 10.0, 20));
    assert!(
        words.starts_with("no difference that n=20 can show (one of "),
        "{words}"
    );
}

#[test]
fn few_samples_prove_nothing_however_far_apart() {
    let words = one("ms", vec![1.0, 1.1], vec![9.0, 9.1]);
    assert_eq!(words, "too few samples to tell (n=2)");
}

#[test]
fn counts_that_never_vary_are_compared_as_they_are() {
    assert_eq!(
        one("count", vec![7.0; 3], vec![7.0; 4]),
        "the same, always 7.00"
    );
    assert_eq!(
        one("count", vec![200.0; 3], vec![203.0; 3]),
        "more: always 200, then always 203 (+1.50 %)"
    );
    assert_eq!(
        one("count", vec![0.0; 3], vec![2.0; 3]),
        "more: always 0, then always 2"
    );
}

#[test]
fn a_tail_that_grew_is_told_beside_a_median_that_did_not() {
    let a = noisy(1, 10.0, 200);
    let mut b = noisy(2, 10.0, 200);
    for value in &mut b[..10] {
        *value = 80.0;
    }
    let words = one("ms", a, b);
    assert!(words.starts_with("no difference"), "{words}");
    assert!(words.contains("p99 slower: 7."), "{words}");
}

#[test]
fn among_many_figures_without_a_difference_none_is_found() {
    let names: Vec<&'static str> = vec!["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"];
    let of = |seed: u64| {
        let figures: Vec<_> = names
            .iter()
            .enumerate()
            .map(|(index, name)| (series(name, "ms"), noisy(seed + index as u64, 10.0, 30)))
            .collect();
        run(&figures)
    };
    let found: usize = (0..4)
        .map(|turn| {
            let comparison = between(&of(turn * 100), &of(5000 + turn * 100));
            comparison
                .figures
                .iter()
                .filter(|figure| matches!(figure.verdict, Verdict::Differs { .. }))
                .count()
        })
        .sum();
    assert!(found <= 1, "{found} of 40 figures");
}

#[test]
fn what_only_one_run_has_and_another_machine_are_told() {
    let mut b = run(&[
        (series("y", "ms"), noisy(1, 1.0, 9)),
        (series("x", "ms"), vec![1.0; 9]),
    ]);
    b.host.kernel = "7.0".into();
    b.host.noise_before.median_ms = 30.0;
    let a = run(&[(series("x", "ms"), vec![1.0; 9])]);
    let comparison = between(&a, &b);
    assert_eq!(comparison.only_second, ["start: y"]);
    let text = text(&comparison);
    assert!(text.contains("! another host kernel"), "{text}");
    assert!(text.contains("another speed: a fixed loop took 20.00 ms, then 30.00 ms (+50 %)"));
    assert!(text.contains("0 of 1 figures differ."), "{text}");
}
