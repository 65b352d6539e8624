//! Statistics over samples: percentiles, their intervals, tests and effect sizes. Nothing is
//! trimmed, nothing is assumed of the distribution. All that is random is seeded: the same samples
//! give the same figures. They cannot fail; what too few samples cannot tell is `None`.

pub mod bootstrap;
pub mod permutation;

/// The percentiles that are told, as per mille (p99.9 is 999).
pub const PERCENTILES: [u32; 5] = [500, 900, 950, 990, 999];

/// `p50`, `p99.9`.
pub fn percentile_name(per_mille: u32) -> String {
    match per_mille % 10 {
        0 => format!("p{}", per_mille / 10),
        rest => format!("p{}.{rest}", per_mille / 10),
    }
}

/// The value that `percent` % of the samples do not exceed; see [`per_mille`].
pub fn percentile(values: &[f64], percent: u32) -> Option<f64> {
    per_mille(values, percent * 10)
}

/// The value that `per_mille` ‰ of the samples do not exceed (nearest rank); `None` when there are
/// too few samples to tell: at least one must lie beyond, so p50 needs 2, p90 10, p95 20, p99 100,
/// p99.9 1000.
pub fn per_mille(values: &[f64], per_mille: u32) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    of_sorted(&sorted, per_mille)
}

/// [`per_mille`] of samples in ascending order.
pub fn of_sorted(sorted: &[f64], per_mille: u32) -> Option<f64> {
    sorted.get(rank(sorted.len(), per_mille)?).copied()
}

/// Which of `n` samples in ascending order is the percentile, from 0.
pub fn rank(n: usize, per_mille: u32) -> Option<usize> {
    let needed = 1000_usize.div_ceil(1000_usize.saturating_sub(per_mille as usize).max(1));
    if n < needed {
        return None;
    }
    Some((n * per_mille as usize).div_ceil(1000).max(1) - 1)
}

/// Three significant digits or so.
pub fn number(value: f64) -> String {
    if !value.is_finite() {
        return "n/a".into();
    }
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 0.1 || v == 0.0 => format!("{value:.2}"),
        v if v >= 0.001 => format!("{value:.4}"),
        _ => format!("{value:.2e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_needs_the_samples_that_carry_it() {
        let values: Vec<f64> = (1..=1000).map(f64::from).collect();
        assert_eq!(per_mille(&values, 999), Some(999.0));
        assert_eq!(per_mille(&values[..999], 999), None);
        assert_eq!(per_mille(&values[..20], 950), Some(19.0));
        assert_eq!(per_mille(&values[..19], 950), None);
        let values = &values[..100];
        assert_eq!(percentile(values, 50), Some(50.0));
        assert_eq!(percentile(values, 90), Some(90.0));
        assert_eq!(percentile(values, 99), Some(99.0));
        assert_eq!(percentile(&values[..99], 99), None);
        assert_eq!(percentile(&values[..9], 90), None);
        assert_eq!(percentile(&values[..1], 50), None);
        assert_eq!(percentile(&[], 50), None);
    }

    #[test]
    fn a_percentile_does_not_depend_on_the_order_of_samples() {
        assert_eq!(percentile(&[3.0, 1.0, 2.0], 50), Some(2.0));
    }

    #[test]
    fn percentiles_have_their_usual_names() {
        assert_eq!(
            PERCENTILES.map(percentile_name),
            ["p50", "p90", "p95", "p99", "p99.9"]
        );
    }

    #[test]
    fn small_values_keep_their_digits() {
        assert_eq!(number(0.0512), "0.0512");
        assert_eq!(number(0.000_05), "5.00e-5");
        assert_eq!(number(1234.4), "1234");
        assert_eq!(number(0.0), "0.00");
    }
}
