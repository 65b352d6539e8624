//! `ratoon bench compare A B`: what changed between two runs, in words.
//!
//! A difference is told only when a permutation test finds one (5 %, corrected for the number of
//! figures by Holm's method) *and* the 95 % interval of the ratio of medians leaves 1 out. Otherwise
//! it says how large a difference these samples would have shown. It fails when a file cannot be
//! read or the two have no figure in common.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Result, bail};
use serde::Serialize;

use crate::analysis::{Analysis, Figure, Group};
use crate::host::Host;
use crate::record::{self, Series};
use crate::report::samples_of;
use crate::stats::bootstrap::{self, Interval};
use crate::stats::{number, permutation};

const ALPHA: f64 = 0.05;
/// Values that never vary are taken for counts from so many samples on.
const CONSTANT_FROM: usize = 3;
/// Noise floors that differ by more make times incomparable.
const NOISE_MAX: f64 = 0.05;

/// What there is to say of one figure.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub enum Verdict {
    /// Each sample of both is this value.
    Same {
        /// It.
        value: f64,
    },
    /// Neither varies, and they differ.
    Counts {
        /// First.
        before: f64,
        /// Then.
        after: f64,
    },
    /// The second is so many times the first.
    Differs {
        /// Of the medians.
        ratio: f64,
        /// 95 %.
        interval: Interval,
        /// Corrected.
        p: f64,
        /// Cliff's delta.
        delta: f64,
    },
    /// Nothing was shown.
    NoDifference {
        /// A change by this share would have been.
        would_show: Option<f64>,
        /// Corrected.
        p: f64,
    },
    /// Even sets that do not overlap would prove nothing.
    TooFew,
}

/// One figure in both runs.
#[derive(Debug, Clone, Serialize)]
pub struct Compared {
    /// Which.
    #[serde(flatten)]
    pub what: Series,
    /// Samples in each.
    pub n: (usize, usize),
    /// Medians, where samples are enough.
    pub p50: (Option<f64>, Option<f64>),
    /// What there is to say.
    #[serde(flatten)]
    pub verdict: Verdict,
    /// How many times the first's p99 the second's is, where both have 100 samples or more and the
    /// interval leaves 1 out.
    pub p99_ratio: Option<(f64, Interval)>,
}

/// The comparison of two runs.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    /// Why the two may not be comparable.
    pub caveats: Vec<String>,
    /// Figures of both.
    pub figures: Vec<Compared>,
    /// Figures that only one has, by name.
    pub only_first: Vec<String>,
    /// The same of the other.
    pub only_second: Vec<String>,
}

/// Compares the runs in two files or folders.
///
/// # Errors
/// When one cannot be read, or they have no figure in common.
pub fn compare(first: &Path, second: &Path) -> Result<Comparison> {
    let (first, second) = (samples_of(first), samples_of(second));
    let a = Analysis::of(&record::read(&first)?);
    let b = Analysis::of(&record::read(&second)?);
    let comparison = between(&a, &b);
    if comparison.figures.is_empty() {
        bail!(
            "{} and {} have no figure in common: nothing to compare",
            first.display(),
            second.display()
        );
    }
    Ok(comparison)
}

fn flat(analysis: &Analysis) -> Vec<(Series, &Group, &Figure)> {
    let mut all = Vec::new();
    for group in &analysis.groups {
        for figure in &group.figures {
            let series = Series {
                system: figure.system.clone().into(),
                ..group.what.clone()
            };
            all.push((series, group, figure));
        }
    }
    all
}

fn between(a: &Analysis, b: &Analysis) -> Comparison {
    let (flat_a, flat_b) = (flat(a), flat(b));
    let mut pairs = Vec::new();
    let mut only_first = Vec::new();
    for (series, _, figure) in &flat_a {
        match flat_b.iter().find(|(other, _, _)| other == series) {
            Some((_, _, other)) => pairs.push((series, *figure, *other)),
            None => only_first.push(name(series)),
        }
    }
    let only_second = flat_b
        .iter()
        .filter(|(series, _, _)| !flat_a.iter().any(|(other, _, _)| other == series))
        .map(|(series, _, _)| name(series))
        .collect();
    // Figures that cannot be told apart whatever they are do not cost the others.
    let testable: Vec<bool> = pairs
        .iter()
        .map(|(_, a, b)| permutation::smallest_p(a.n, b.n) < ALPHA && !constants(a, b))
        .collect();
    let p_values: Vec<f64> = pairs
        .iter()
        .zip(&testable)
        .filter(|(_, testable)| **testable)
        .map(|((_, a, b), _)| permutation::p_value(&a.sorted, &b.sorted))
        .collect();
    let mut corrected = permutation::holm(&p_values).into_iter();
    let figures = pairs
        .iter()
        .zip(&testable)
        .map(|((series, a, b), testable)| {
            let p = if *testable { corrected.next() } else { None };
            Compared {
                what: (*series).clone(),
                n: (a.n, b.n),
                p50: (a.p50(), b.p50()),
                verdict: verdict(a, b, p),
                p99_ratio: bootstrap::ratio(&b.sorted, &a.sorted, 990)
                    .filter(|(_, interval)| leaves_one_out(interval)),
            }
        })
        .collect();
    Comparison {
        caveats: caveats(a, b),
        figures,
        only_first,
        only_second,
    }
}

fn constant(figure: &Figure) -> bool {
    figure.n >= CONSTANT_FROM && figure.min == figure.max
}

fn constants(a: &Figure, b: &Figure) -> bool {
    constant(a) && constant(b)
}

fn leaves_one_out(interval: &Interval) -> bool {
    interval.low > 1.0 || interval.high < 1.0
}

/// `p`: corrected, if the figure could be tested.
fn verdict(a: &Figure, b: &Figure, p: Option<f64>) -> Verdict {
    if constants(a, b) {
        return if a.min == b.min {
            Verdict::Same { value: a.min }
        } else {
            Verdict::Counts {
                before: a.min,
                after: b.min,
            }
        };
    }
    let Some(p) = p else {
        return Verdict::TooFew;
    };
    let ratio = bootstrap::ratio(&b.sorted, &a.sorted, 500);
    match ratio {
        Some((ratio, interval)) if p < ALPHA && leaves_one_out(&interval) => Verdict::Differs {
            ratio,
            interval,
            p,
            delta: permutation::cliffs_delta(&a.sorted, &b.sorted),
        },
        _ => Verdict::NoDifference {
            would_show: ratio.map(|(ratio, interval)| {
                ((interval.high - ratio).max(ratio - interval.low) / ratio).max(0.0)
            }),
            p,
        },
    }
}

fn caveats(a: &Analysis, b: &Analysis) -> Vec<String> {
    let mut caveats = Vec::new();
    type Fact = (&'static str, fn(&Host) -> String);
    let facts: [Fact; 6] = [
        ("processor", |host| format!("{} x {}", host.cpus, host.cpu)),
        ("memory", |host| format!("{} MiB", host.memory_mib)),
        ("host kernel", |host| host.kernel.clone()),
        ("KVM", |host| {
            format!("{} {}", host.kvm.join(", "), host.class)
        }),
        ("governor", |host| host.governor.clone()),
        ("peers", |host| {
            let peers: Vec<&str> = host.peers.values().map(String::as_str).collect();
            peers.join("; ")
        }),
    ];
    for (name, of) in facts {
        let (first, second) = (of(&a.host), of(&b.host));
        if first != second {
            caveats.push(format!("another {name}: first “{first}”, then “{second}”"));
        }
    }
    let (first, second) = (a.host.noise_before.median_ms, b.host.noise_before.median_ms);
    if (second / first - 1.0).abs() > NOISE_MAX {
        caveats.push(format!(
            "the processor ran at another speed: a fixed loop took {first:.2} ms, then {second:.2} ms \
             ({:+.0} %); times differ by as much for no other reason",
            (second / first - 1.0) * 100.0
        ));
    }
    for (which, run) in [("first", a), ("second", b)] {
        caveats.extend(run.gaps.iter().map(|gap| format!("the {which} run: {gap}")));
    }
    caveats
}

fn name(series: &Series) -> String {
    let mut name = format!("{}: {}", series.scenario, series.metric);
    if !series.case.is_empty() {
        let _ = write!(name, ", {}", series.case);
    }
    if series.system != crate::analysis::OURS {
        let _ = write!(name, " ({})", series.system);
    }
    name
}

/// The words for a value that rose or fell.
fn direction(series: &Series, rose: bool) -> &'static str {
    match (
        series.is_time(),
        series.more_is_better() || series.unit == "ratio",
        rose,
    ) {
        (true, _, true) => "slower",
        (true, _, false) => "faster",
        (_, true, true) => "higher",
        (_, true, false) => "lower",
        (_, _, true) => "more",
        (_, _, false) => "less",
    }
}

/// `slower by 12 % (8 to 17)`; from twice on, times are easier to grasp.
fn change(series: &Series, ratio: f64, interval: &Interval) -> String {
    let word = direction(series, ratio > 1.0);
    if !(0.5..2.0).contains(&ratio) {
        return format!(
            "{word}: {} times ({} to {})",
            number(ratio),
            number(interval.low),
            number(interval.high)
        );
    }
    let percent = |ratio: f64| (ratio - 1.0).abs() * 100.0;
    let (one, other) = (percent(interval.low), percent(interval.high));
    let digits = usize::from(percent(ratio) < 10.0);
    format!(
        "{word} by {:.digits$} % ({:.digits$} to {:.digits$})",
        percent(ratio),
        one.min(other),
        one.max(other)
    )
}

/// The verdict as a sentence.
fn words(figure: &Compared) -> String {
    let (n_a, n_b) = figure.n;
    let sizes = if n_a == n_b {
        format!("n={n_a}")
    } else {
        format!("n={n_a} and {n_b}")
    };
    let mut text = match &figure.verdict {
        Verdict::Same { value } => format!("the same, always {}", number(*value)),
        Verdict::Counts { before, after } => {
            let change = if *before == 0.0 {
                String::new()
            } else {
                format!(" ({:+.2} %)", (after / before - 1.0) * 100.0)
            };
            format!(
                "{}: always {before}, then always {after}{change}",
                direction(&figure.what, after > before)
            )
        }
        Verdict::Differs {
            ratio,
            interval,
            p,
            delta,
        } => format!(
            "{}; {sizes}, p {}, effect {} ({delta:+.2})",
            change(&figure.what, *ratio, interval),
            if *p < 0.001 {
                "< 0.001".into()
            } else {
                format!("= {p:.3}")
            },
            permutation::delta_in_words(*delta)
        ),
        Verdict::NoDifference {
            would_show: Some(share),
            ..
        } => format!(
            "no difference that {sizes} can show (one of {:.0} % would have shown)",
            (share * 100.0).max(1.0)
        ),
        Verdict::NoDifference {
            would_show: None, ..
        } => format!("no difference that {sizes} can show"),
        Verdict::TooFew => format!("too few samples to tell ({sizes})"),
    };
    if let Some((ratio, interval)) = &figure.p99_ratio {
        let _ = write!(text, "; p99 {}", change(&figure.what, *ratio, interval));
    }
    text
}

/// The comparison for people: differences first.
pub fn text(comparison: &Comparison) -> String {
    let mut out = String::new();
    for caveat in &comparison.caveats {
        let _ = writeln!(out, "! {caveat}");
    }
    let differs = |figure: &&Compared| {
        matches!(
            figure.verdict,
            Verdict::Differs { .. } | Verdict::Counts { .. }
        ) || figure.p99_ratio.is_some()
    };
    let (changed, rest): (Vec<&Compared>, Vec<&Compared>) =
        comparison.figures.iter().partition(differs);
    let _ = writeln!(
        out,
        "{} of {} figures differ.",
        changed.len(),
        comparison.figures.len()
    );
    for (title, figures) in [("\nDifferent:", changed), ("\nThe rest:", rest)] {
        if figures.is_empty() {
            continue;
        }
        let _ = writeln!(out, "{title}");
        for figure in figures {
            let median = |value: Option<f64>| value.map_or_else(|| "n/a".into(), number);
            let _ = writeln!(
                out,
                "  {}{}\n      {}; p50 {} → {} {}",
                name(&figure.what),
                match figure.what.readiness.name() {
                    "" => String::new(),
                    name => format!(" [{name}]"),
                },
                words(figure),
                median(figure.p50.0),
                median(figure.p50.1),
                figure.what.unit
            );
        }
    }
    for (which, only) in [
        ("first", &comparison.only_first),
        ("second", &comparison.only_second),
    ] {
        if !only.is_empty() {
            let _ = writeln!(out, "\nOnly in the {which}: {}", only.join("; "));
        }
    }
    out
}

#[cfg(test)]
#[path = "compare_tests.rs"]
mod tests;
