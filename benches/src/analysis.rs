//! What a run's samples say: figures with percentiles and intervals, systems beside each other, the
//! phases of a start, what is missing. Tables, page and JSON are made of this alone.
//!
//! Figures that differ in nothing but their system are one [`Group`]. It cannot fail: what is not
//! there is left out, and told in [`Analysis::gaps`].

use std::collections::{BTreeMap, HashMap};

use serde::Serialize;

use crate::host::{Host, Noise};
use crate::record::{Missing, Outcome, Readiness, Record, Recorded, Series};
use crate::stats::bootstrap::{self, Interval};
use crate::stats::{self, PERCENTILES, percentile_name};

/// Whose figures others are held against.
pub const OURS: &str = "ratoon";
/// The scenario that measures the harness itself.
pub const NULL: &str = "null";
/// The harness's own share may be this much of the shortest latency.
const OVERHEAD_MAX: f64 = 0.01;
/// Noise before and after may differ by this much, and a processor's share be short by as much.
const NOISE_MAX: f64 = 0.05;

/// One percentile.
#[derive(Debug, Clone, Serialize)]
pub struct Percentile {
    /// `p50` …
    pub name: String,
    /// Of the samples, nearest rank; none when they are too few.
    pub value: Option<f64>,
    /// 95 % bootstrap interval.
    pub interval: Option<Interval>,
}

/// One system's samples of one figure.
#[derive(Debug, Clone, Serialize)]
pub struct Figure {
    /// Whose.
    pub system: String,
    /// How many samples.
    pub n: usize,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// The percentiles that are told of all figures.
    pub percentiles: Vec<Percentile>,
    /// How many times [`OURS`]' median this one's is, with its 95 % interval.
    pub ratio_to_ours: Option<(f64, Interval)>,
    /// Ascending.
    #[serde(skip)]
    pub sorted: Vec<f64>,
    /// As taken, with their rounds.
    #[serde(skip)]
    pub taken: Vec<(usize, f64)>,
    /// Whether latencies count from planned arrivals.
    pub from_intended_start: bool,
}

impl Figure {
    /// The percentile of this name.
    pub fn percentile(&self, per_mille: u32) -> Option<&Percentile> {
        let place = PERCENTILES.iter().position(|&p| p == per_mille)?;
        self.percentiles.get(place)
    }

    /// The median, if samples are enough.
    pub fn p50(&self) -> Option<f64> {
        self.percentile(500)?.value
    }
}

/// One figure of all systems that have it.
#[derive(Debug, Clone, Serialize)]
pub struct Group {
    /// Scenario, case, metric, unit and readiness; its system says nothing.
    #[serde(flatten)]
    pub what: Series,
    /// One a system, ours first.
    pub figures: Vec<Figure>,
}

impl Group {
    /// Metric and case in one line.
    pub fn title(&self) -> String {
        let comma = if self.what.case.is_empty() { "" } else { ", " };
        format!("{}{comma}{}", self.what.metric, self.what.case)
    }
}

/// The phases of the start whose total is the median of its kind.
#[derive(Debug, Clone, Serialize)]
pub struct Waterfall {
    /// The scenario.
    pub scenario: String,
    /// Its parameters.
    pub case: String,
    /// Whose start.
    pub system: String,
    /// Of which round.
    pub round: usize,
    /// Unit of the lengths.
    pub unit: String,
    /// Name and length, in order, one after the other.
    pub phases: Vec<(String, f64)>,
}

/// How a scenario went.
#[derive(Debug, Clone, Serialize)]
pub struct Went {
    /// Its name.
    pub name: String,
    /// How it ended.
    pub outcome: Outcome,
    /// How long it took.
    pub seconds: f64,
    /// What failed.
    pub error: Option<String>,
}

/// The harness's own share.
#[derive(Debug, Clone, Serialize)]
pub struct Overhead {
    /// Median of the null scenario in ms.
    pub null_p50_ms: f64,
    /// The shortest latency reported: its name and median in ms.
    pub shortest: (String, f64),
    /// The first by the second.
    pub share: f64,
    /// Whether that is little enough.
    pub ok: bool,
}

/// All of a run.
#[derive(Debug, Clone, Serialize)]
pub struct Analysis {
    /// Where, with what, when.
    pub host: Host,
    /// Whether the run was to be short.
    pub quick: bool,
    /// Noise after it.
    pub noise_after: Option<Noise>,
    /// Why not all is here that was asked for.
    pub partial: Option<String>,
    /// How the scenarios went.
    pub scenarios: Vec<Went>,
    /// Figures, in the order of their first samples.
    pub groups: Vec<Group>,
    /// Starts by phase.
    pub waterfalls: Vec<Waterfall>,
    /// The harness's own share, when the null scenario ran.
    pub overhead: Option<Overhead>,
    /// Figures that there are not.
    pub missing: Vec<Missing>,
    /// Verdicts and what was seen.
    pub notes: Vec<String>,
    /// What a reader must know before believing the figures: partial, noisy, out of time.
    pub gaps: Vec<String>,
}

/// What is the same of the figures of one group.
fn without_system(series: &Series) -> Series {
    Series {
        system: "".into(),
        ..series.clone()
    }
}

#[derive(Default)]
struct Gathered {
    taken: Vec<(usize, f64)>,
    intended: bool,
}

impl Analysis {
    /// Of what a file has.
    pub fn of(recorded: &Recorded) -> Self {
        Self::of_records(&recorded.records, recorded.torn.as_deref())
    }

    /// Of a run's records. `torn`: what was wrong with the end of their file.
    pub fn of_records(records: &[Record], torn: Option<&str>) -> Self {
        let mut analysis = Self {
            host: Host::default(),
            quick: false,
            noise_after: None,
            partial: Some("its run was killed: the file has no end".into()),
            scenarios: Vec::new(),
            groups: Vec::new(),
            waterfalls: Vec::new(),
            overhead: None,
            missing: Vec::new(),
            notes: Vec::new(),
            gaps: Vec::new(),
        };
        let mut order: Vec<Series> = Vec::new();
        let mut known: HashMap<Series, BTreeMap<(bool, String), Gathered>> = HashMap::new();
        for record in records {
            match record {
                Record::Run { host, quick, .. } => {
                    analysis.host = (**host).clone();
                    analysis.quick = *quick;
                }
                Record::Sample(sample) => {
                    let what = without_system(&sample.series);
                    let systems = known.entry(what.clone()).or_insert_with(|| {
                        order.push(what);
                        BTreeMap::new()
                    });
                    let system = sample.series.system.to_string();
                    // Ours sorts first.
                    let gathered = systems.entry((system != OURS, system)).or_default();
                    gathered.taken.push((sample.round, sample.value));
                    gathered.intended |= sample.start_s.is_some();
                }
                Record::Missing(missing) => analysis.missing.push(missing.clone()),
                Record::Note { text } => analysis.notes.push(text.clone()),
                Record::Scenario {
                    name,
                    outcome,
                    seconds,
                    error,
                } => analysis.scenarios.push(Went {
                    name: name.clone(),
                    outcome: *outcome,
                    seconds: *seconds,
                    error: error.clone(),
                }),
                Record::End {
                    noise_after,
                    partial,
                } => {
                    analysis.noise_after.clone_from(noise_after);
                    analysis.partial.clone_from(partial);
                }
            }
        }
        for what in order {
            let systems = known.remove(&what).unwrap_or_default();
            analysis.groups.push(group(what, systems));
        }
        analysis.waterfalls = waterfalls(&analysis.groups);
        analysis.overhead = overhead(&analysis.groups);
        analysis.gaps = gaps(&analysis, torn);
        analysis
    }

    /// The scenarios that have figures, in their order, the harness's own last.
    pub fn scenario_names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for group in &self.groups {
            if !names.contains(&&*group.what.scenario) {
                names.push(&group.what.scenario);
            }
        }
        // The harness itself is of the least interest.
        names.sort_by_key(|name| *name == NULL);
        names
    }
}

fn group(what: Series, systems: BTreeMap<(bool, String), Gathered>) -> Group {
    let mut figures: Vec<Figure> = systems
        .into_iter()
        .map(|((_, system), gathered)| figure(system, gathered))
        .collect();
    if let Some((ours, others)) = figures.split_first_mut()
        && ours.system == OURS
    {
        for other in others {
            other.ratio_to_ours = bootstrap::ratio(&other.sorted, &ours.sorted, 500);
        }
    }
    Group { what, figures }
}

fn figure(system: String, gathered: Gathered) -> Figure {
    let mut sorted: Vec<f64> = gathered.taken.iter().map(|(_, value)| *value).collect();
    sorted.sort_by(f64::total_cmp);
    let intervals = bootstrap::percentiles(&sorted, &PERCENTILES);
    let percentiles = PERCENTILES
        .iter()
        .zip(intervals)
        .map(|(&per_mille, interval)| Percentile {
            name: percentile_name(per_mille),
            value: stats::of_sorted(&sorted, per_mille),
            interval,
        })
        .collect();
    Figure {
        system,
        n: sorted.len(),
        min: sorted.first().copied().unwrap_or_default(),
        max: sorted.last().copied().unwrap_or_default(),
        percentiles,
        ratio_to_ours: None,
        sorted,
        taken: gathered.taken,
        from_intended_start: gathered.intended,
    }
}

/// For each scenario, case and system with phases: those of the round whose total is the median.
fn waterfalls(groups: &[Group]) -> Vec<Waterfall> {
    type Key = (String, String, String, String);
    type Rounds = BTreeMap<usize, Vec<(String, f64)>>;
    let mut all: Vec<(Key, Rounds)> = Vec::new();
    for group in groups.iter().filter(|group| group.what.is_phase()) {
        let name = group.what.metric.trim_start_matches("phase: ");
        for figure in &group.figures {
            let key = (
                group.what.scenario.to_string(),
                group.what.case.to_string(),
                figure.system.clone(),
                group.what.unit.to_string(),
            );
            let place = all.iter().position(|(known, _)| *known == key);
            let place = place.unwrap_or_else(|| {
                all.push((key, Rounds::new()));
                all.len() - 1
            });
            for (round, value) in &figure.taken {
                let phases = all[place].1.entry(*round).or_default();
                phases.push((name.to_owned(), *value));
            }
        }
    }
    all.into_iter()
        .filter_map(|((scenario, case, system, unit), rounds)| {
            let total = |phases: &[(String, f64)]| phases.iter().map(|(_, ms)| ms).sum::<f64>();
            let mut by_total: Vec<(usize, Vec<(String, f64)>)> = rounds.into_iter().collect();
            by_total.sort_by(|a, b| total(&a.1).total_cmp(&total(&b.1)));
            let middle = by_total.len().checked_sub(1)? / 2;
            let (round, phases) = by_total.swap_remove(middle);
            Some(Waterfall {
                scenario,
                case,
                system,
                round,
                unit,
                phases,
            })
        })
        .collect()
}

/// Milliseconds in a unit of time.
pub fn to_ms(value: f64, unit: &str) -> f64 {
    match unit {
        "s" => value * 1e3,
        "us" | "µs" => value / 1e3,
        "ns" => value / 1e6,
        _ => value,
    }
}

/// Holds the null scenario against the shortest latency. Phases are parts of one, stamped by the VMM
/// itself; they are shown, but not reported as latencies.
fn overhead(groups: &[Group]) -> Option<Overhead> {
    let null = groups.iter().find(|group| group.what.scenario == NULL)?;
    let null_p50_ms = to_ms(null.figures.first()?.p50()?, &null.what.unit);
    let shortest = groups
        .iter()
        .filter(|group| {
            group.what.is_time() && group.what.scenario != NULL && !group.what.is_phase()
        })
        .flat_map(|group| group.figures.iter().map(move |figure| (group, figure)))
        .filter_map(|(group, figure)| {
            let name = format!("{}: {}", group.what.scenario, group.title());
            Some((name, to_ms(figure.p50()?, &group.what.unit)))
        })
        .filter(|(_, p50)| *p50 > 0.0)
        .min_by(|a, b| a.1.total_cmp(&b.1))?;
    let share = null_p50_ms / shortest.1;
    Some(Overhead {
        null_p50_ms,
        shortest,
        share,
        ok: share < OVERHEAD_MAX,
    })
}

fn gaps(analysis: &Analysis, torn: Option<&str>) -> Vec<String> {
    let mut gaps = Vec::new();
    if let Some(why) = &analysis.partial {
        gaps.push(format!("Partial: {why}."));
    }
    if let Some(torn) = torn {
        gaps.push(format!("The file of samples is torn: {torn}."));
    }
    for went in &analysis.scenarios {
        let name = &went.name;
        match went.outcome {
            Outcome::Done => {}
            Outcome::OutOfTime => gaps.push(format!(
                "{name}: its time ({:.0} s) was over before its rounds: fewer samples than planned.",
                went.seconds
            )),
            Outcome::Failed => gaps.push(format!(
                "{name}: failed: {}",
                went.error.as_deref().unwrap_or("it did not say why")
            )),
            Outcome::Interrupted => gaps.push(format!("{name}: interrupted.")),
            Outcome::NotBegun => gaps.push(format!("{name}: not begun.")),
        }
    }
    gaps.extend(noise_gaps(
        &analysis.host.noise_before,
        analysis.noise_after.as_ref(),
    ));
    if let Some(overhead) = analysis.overhead.as_ref().filter(|overhead| !overhead.ok) {
        gaps.push(format!(
            "The harness's own share is {:.1} % of the shortest latency ({}): more than {} %.",
            overhead.share * 100.0,
            overhead.shortest.0,
            OVERHEAD_MAX * 100.0
        ));
    }
    gaps
}

fn noise_gaps(before: &Noise, after: Option<&Noise>) -> Vec<String> {
    let mut gaps = Vec::new();
    for (when, noise) in [("before", Some(before)), ("after", after)] {
        if let Some(noise) = noise.filter(|noise| noise.cpu_share < 1.0 - NOISE_MAX) {
            gaps.push(format!(
                "The machine was busy {when} the run: a loop got {:.0} % of a processor. Times are \
                 not to be compared with another run's; ratios within this run, counts and memory \
                 suffer less.",
                noise.cpu_share * 100.0
            ));
        }
    }
    if let Some(after) = after {
        let change = after.median_ms / before.median_ms - 1.0;
        if change.abs() > NOISE_MAX {
            gaps.push(format!(
                "The processor's speed changed by {:+.0} % between the begin and the end of the run.",
                change * 100.0
            ));
        }
    }
    gaps
}

/// Latencies up to a point of a start: what the page shows first.
pub fn is_headline(group: &Group) -> bool {
    group.what.is_time()
        && group.what.readiness != Readiness::None
        && group.what.readiness != Readiness::R0
        && !group.what.is_phase()
}

#[cfg(test)]
#[path = "analysis_tests.rs"]
mod tests;
