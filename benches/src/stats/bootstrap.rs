//! Bootstrap confidence intervals: the samples are drawn again from themselves, with replacement, and
//! the middle 95 % of what the figure then is is its interval. Seeded by the number of samples.
//!
//! An interval says how far the figure may be off by the luck of the draw; it knows nothing of what
//! was wrong with the machine all along. Below [`FEWEST`] samples there is none.

use fastrand::Rng;
use serde::{Deserialize, Serialize};

use super::rank;

/// Fewer samples give no interval: drawn again they would say that they are all there is.
pub const FEWEST: usize = 5;
/// How often is drawn again; fewer for very many samples, to bound the time.
const RESAMPLES: usize = 2000;
const DRAWS_MAX: usize = 40_000_000;
const RESAMPLES_MIN: usize = 200;
const SEED: u64 = 0x7261_746f_6f6e;

/// 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Its lower end.
    pub low: f64,
    /// Its upper end.
    pub high: f64,
    /// The upper end is the largest sample: the samples set no bound, the true value may lie beyond.
    pub open: bool,
}

/// Draws `n` of `n` samples again and again; `see` gets how often each was drawn.
fn draw_again(n: usize, seed: u64, mut see: impl FnMut(&[u32])) {
    let resamples = (DRAWS_MAX / n.max(1)).clamp(RESAMPLES_MIN, RESAMPLES);
    let mut random = Rng::with_seed(SEED ^ seed);
    let mut drawn = vec![0_u32; n];
    for _ in 0..resamples {
        drawn.fill(0);
        for _ in 0..n {
            drawn[random.usize(..n)] += 1;
        }
        see(&drawn);
    }
}

/// The sample at `rank` of what was drawn.
fn at_rank(drawn: &[u32], rank: usize) -> usize {
    let mut seen = 0_usize;
    for (index, &times) in drawn.iter().enumerate() {
        seen += times as usize;
        if seen > rank {
            return index;
        }
    }
    drawn.len().saturating_sub(1)
}

fn middle(mut values: Vec<f64>) -> (f64, f64) {
    values.sort_by(f64::total_cmp);
    let last = values.len() - 1;
    let at = |share: f64| values[(share * last as f64).round() as usize];
    (at(0.025), at(0.975))
}

/// Intervals of percentiles of samples in ascending order; `None` for those that the samples do not
/// carry.
pub fn percentiles(sorted: &[f64], per_mille: &[u32]) -> Vec<Option<Interval>> {
    let n = sorted.len();
    let ranks: Vec<Option<usize>> = per_mille.iter().map(|&p| rank(n, p)).collect();
    if n < FEWEST {
        return vec![None; per_mille.len()];
    }
    let mut found: Vec<Vec<f64>> = vec![Vec::new(); per_mille.len()];
    draw_again(n, n as u64, |drawn| {
        for (found, rank) in found.iter_mut().zip(&ranks) {
            if let Some(rank) = rank {
                found.push(sorted[at_rank(drawn, *rank)]);
            }
        }
    });
    found
        .into_iter()
        .map(|values| {
            if values.is_empty() {
                return None;
            }
            let (low, high) = middle(values);
            // Of samples that are all alike the largest is no sign of a bound that is missing.
            let open = high >= sorted[n - 1] && sorted[0] < sorted[n - 1];
            Some(Interval { low, high, open })
        })
        .collect()
}

/// How many times `a`'s percentile is `b`'s, with its interval; both ascending. `None` when either
/// has too few samples or `a`'s percentile is zero.
pub fn ratio(b: &[f64], a: &[f64], per_mille: u32) -> Option<(f64, Interval)> {
    if b.len() < FEWEST || a.len() < FEWEST {
        return None;
    }
    let (rank_b, rank_a) = (rank(b.len(), per_mille)?, rank(a.len(), per_mille)?);
    if a[rank_a] == 0.0 {
        return None;
    }
    let draws = |sorted: &[f64], rank, seed| {
        let mut found = Vec::new();
        draw_again(sorted.len(), seed, |drawn| {
            found.push(sorted[at_rank(drawn, rank)]);
        });
        found
    };
    // Different seeds: of equal numbers of samples the same would be drawn in both.
    let (of_b, of_a) = (draws(b, rank_b, 1), draws(a, rank_a, 2));
    let ratios: Vec<f64> = of_b
        .into_iter()
        .zip(of_a)
        .filter(|(_, a)| *a != 0.0)
        .map(|(b, a)| b / a)
        .collect();
    if ratios.is_empty() {
        return None;
    }
    let (low, high) = middle(ratios);
    let interval = Interval {
        low,
        high,
        open: false,
    };
    Some((b[rank_b] / a[rank_a], interval))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Samples 1 to n.
    fn ramp(n: u32) -> Vec<f64> {
        (1..=n).map(f64::from).collect()
    }

    #[test]
    fn the_interval_of_a_median_is_that_of_the_binomial() {
        // For n = 100 the 95 % interval of the median is the 40th to the 61st sample or close by.
        let interval = percentiles(&ramp(100), &[500])[0].unwrap();
        assert!((39.0..=42.0).contains(&interval.low), "{interval:?}");
        assert!((58.0..=61.0).contains(&interval.high), "{interval:?}");
        assert!(!interval.open);
    }

    #[test]
    fn the_interval_of_a_tail_that_few_samples_reach_is_open() {
        let found = percentiles(&ramp(100), &[990, 999]);
        assert!(found[0].unwrap().open, "{found:?}");
        assert_eq!(found[1], None, "100 samples carry no p99.9");
    }

    #[test]
    fn more_samples_give_a_narrower_interval() {
        let width = |n| {
            let interval = percentiles(&ramp(n), &[500])[0].unwrap();
            (interval.high - interval.low) / f64::from(n)
        };
        assert!(width(1000) < width(100) / 2.0);
    }

    #[test]
    fn the_same_samples_give_the_same_interval() {
        assert_eq!(
            percentiles(&ramp(50), &[500, 900]),
            percentiles(&ramp(50), &[500, 900])
        );
    }

    #[test]
    fn too_few_samples_have_no_interval() {
        assert_eq!(percentiles(&ramp(4), &[500]), [None]);
        assert_eq!(percentiles(&[], &[500]), [None]);
        assert_eq!(ratio(&ramp(4), &ramp(50), 500), None);
    }

    #[test]
    fn samples_that_are_all_alike_have_an_interval_without_width() {
        let interval = percentiles(&[7.0; 20], &[500])[0].unwrap();
        assert_eq!(
            (interval.low, interval.high, interval.open),
            (7.0, 7.0, false)
        );
    }

    #[test]
    fn a_ratio_has_its_true_value_in_its_interval() {
        let mut random = Rng::with_seed(3);
        let mut noisy = |middle: f64| {
            let mut values: Vec<f64> = (0..200).map(|_| middle + random.f64()).collect();
            values.sort_by(f64::total_cmp);
            values
        };
        let (a, b) = (noisy(10.0), noisy(12.0));
        let (value, interval) = ratio(&b, &a, 500).unwrap();
        let true_ratio = 12.5 / 10.5;
        assert!((interval.low..=interval.high).contains(&true_ratio));
        assert!((interval.low..=interval.high).contains(&value));
        assert!(interval.high - interval.low < 0.05, "{interval:?}");
        assert_eq!(ratio(&b, &[0.0; 50], 500), None, "no times nothing");
    }
}
