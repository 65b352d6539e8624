//! Whether two sets of samples differ at all, and by how much in ranks: a permutation test of the rank
//! sum, and Cliff's delta. Neither assumes a distribution, nor minds an outlier. Seeded.
//!
//! The test's p-value is how often labels given at random set the two as far apart as they are.

use fastrand::Rng;

const PERMUTATIONS: usize = 9999;
const DRAWS_MAX: usize = 50_000_000;
const PERMUTATIONS_MIN: usize = 999;
const SEED: u64 = 0x7065_726d;

/// Midranks of both sets in one order, the first set's first; ties share theirs.
fn midranks(a: &[f64], b: &[f64]) -> Vec<f64> {
    let all: Vec<f64> = a.iter().chain(b).copied().collect();
    let mut order: Vec<usize> = (0..all.len()).collect();
    order.sort_by(|&x, &y| all[x].total_cmp(&all[y]));
    let mut ranks = vec![0.0; all.len()];
    let mut from = 0;
    while from < order.len() {
        let value = all[order[from]];
        let ties = order[from..]
            .iter()
            .take_while(|&&index| all[index] == value)
            .count();
        // Ranks from 1: the mean of from + 1 ..= from + ties.
        let shared = from as f64 + (ties as f64 + 1.0) / 2.0;
        for &index in &order[from..from + ties] {
            ranks[index] = shared;
        }
        from += ties;
    }
    ranks
}

/// Cliff's delta of `b` against `a`: how often a sample of `b` is above one of `a`, less how often it
/// is below, -1 to 1. 0 when either is empty.
pub fn cliffs_delta(a: &[f64], b: &[f64]) -> f64 {
    if a.is_empty() || b.is_empty() {
        return 0.0;
    }
    let ranks = midranks(a, b);
    let sum: f64 = ranks[a.len()..].iter().sum();
    let (n_a, n_b) = (a.len() as f64, b.len() as f64);
    let above = sum - n_b * (n_b + 1.0) / 2.0;
    2.0 * above / (n_a * n_b) - 1.0
}

/// What people call such a delta (thresholds of Romano and others, 2006).
pub fn delta_in_words(delta: f64) -> &'static str {
    match delta.abs() {
        size if size < 0.147 => "negligible",
        size if size < 0.33 => "small",
        size if size < 0.474 => "medium",
        _ => "large",
    }
}

/// The two-sided p-value that both sets come from one; 1 when either is empty.
pub fn p_value(a: &[f64], b: &[f64]) -> f64 {
    if a.is_empty() || b.is_empty() {
        return 1.0;
    }
    let mut ranks = midranks(a, b);
    let n = a.len();
    let expected = n as f64 * (ranks.len() as f64 + 1.0) / 2.0;
    let distance = |ranks: &[f64]| (ranks[..n].iter().sum::<f64>() - expected).abs();
    let seen = distance(&ranks);
    let permutations = (DRAWS_MAX / ranks.len()).clamp(PERMUTATIONS_MIN, PERMUTATIONS);
    let mut random = Rng::with_seed(SEED);
    let mut as_far = 1_usize;
    for _ in 0..permutations {
        // The first n of a shuffle are enough.
        for index in 0..n {
            let other = random.usize(index..ranks.len());
            ranks.swap(index, other);
        }
        // Sums of halves are exact, so that ties with what was seen count.
        as_far += usize::from(distance(&ranks) >= seen);
    }
    as_far as f64 / (permutations + 1) as f64
}

/// The smallest p-value that so many samples can give: sets that do not overlap at all.
pub fn smallest_p(n_a: usize, n_b: usize) -> f64 {
    let arrangements = (1..=n_a.min(n_b))
        .map(|k| (n_a.max(n_b) + k) as f64 / k as f64)
        .product::<f64>();
    (2.0 / arrangements).min(1.0)
}

/// P-values after Holm's correction: with many figures some differ by chance.
pub fn holm(p_values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p_values.len()).collect();
    order.sort_by(|&x, &y| p_values[x].total_cmp(&p_values[y]));
    let mut corrected = vec![1.0; p_values.len()];
    let mut largest = 0.0_f64;
    for (place, &index) in order.iter().enumerate() {
        largest = largest.max(p_values[index] * (p_values.len() - place) as f64);
        corrected[index] = largest.min(1.0);
    }
    corrected
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noisy(seed: u64, middle: f64, n: usize) -> Vec<f64> {
        let mut random = Rng::with_seed(seed);
        (0..n).map(|_| middle + random.f64()).collect()
    }

    #[test]
    fn sets_from_one_source_are_seldom_told_apart() {
        let apart = (0..40)
            .filter(|&seed| p_value(&noisy(seed, 1.0, 20), &noisy(seed + 1000, 1.0, 20)) < 0.05)
            .count();
        assert!(apart <= 6, "{apart} of 40 at 5 %");
    }

    #[test]
    fn sets_that_do_not_overlap_are_told_apart() {
        let p = p_value(&noisy(1, 1.0, 10), &noisy(2, 3.0, 10));
        assert!(p < 0.001, "{p}");
    }

    #[test]
    fn the_p_value_of_few_samples_is_that_of_all_their_arrangements() {
        // 2 of the 20 ways to take 3 of 6 are as far apart.
        let p = p_value(&[1.0, 2.0, 3.0], &[4.0, 5.0, 6.0]);
        assert!((p - 0.1).abs() < 0.015, "{p}");
        assert!((smallest_p(3, 3) - 0.1).abs() < 1e-9);
        assert!((smallest_p(2, 4) - 2.0 / 15.0).abs() < 1e-9);
        assert_eq!(smallest_p(0, 9), 1.0);
    }

    #[test]
    fn one_outlier_makes_no_difference() {
        let a = noisy(1, 1.0, 20);
        let mut b = noisy(2, 1.0, 20);
        let before = p_value(&a, &b) < 0.05;
        b[0] = 1e9;
        assert_eq!(p_value(&a, &b) < 0.05, before);
    }

    #[test]
    fn the_delta_has_the_sign_of_the_second_set() {
        assert_eq!(cliffs_delta(&[1.0, 2.0], &[3.0, 4.0]), 1.0);
        assert_eq!(cliffs_delta(&[3.0, 4.0], &[1.0, 2.0]), -1.0);
        assert_eq!(cliffs_delta(&[1.0, 2.0], &[1.0, 2.0]), 0.0);
        assert_eq!(cliffs_delta(&[5.0, 5.0], &[5.0]), 0.0);
        assert_eq!(cliffs_delta(&[], &[1.0]), 0.0);
        assert_eq!(delta_in_words(-0.2), "small");
        assert_eq!(delta_in_words(0.9), "large");
    }

    #[test]
    fn equal_sets_have_no_difference_at_all() {
        assert_eq!(p_value(&[5.0; 9], &[5.0; 9]), 1.0);
        assert_eq!(p_value(&[], &[5.0]), 1.0);
    }

    #[test]
    fn many_figures_need_more_each() {
        let corrected = holm(&[0.01, 0.04, 0.03]);
        for (found, wanted) in corrected.iter().zip([0.03, 0.06, 0.06]) {
            assert!((found - wanted).abs() < 1e-12, "{corrected:?}");
        }
        assert_eq!(holm(&[0.9, 0.8]), [1.0, 1.0]);
        assert!(holm(&[]).is_empty());
    }
}
