//! When the requests of a sustained load arrive: a Poisson process, seeded.
//!
//! Arrivals are planned before any of them is served, and latencies count from the planned times: a
//! stall then delays all who came meanwhile, as it would in life, and is not hidden by a loop that
//! waits for one answer before it asks again (coordinated omission). It cannot fail.

use std::time::Duration;

use fastrand::Rng;

/// Times from the begin of the load, ascending without end, `rate_per_s` a second on the mean. A
/// rate that is not positive gives none.
pub fn poisson(seed: u64, rate_per_s: f64) -> impl Iterator<Item = Duration> {
    let mut random = Rng::with_seed(seed);
    let mut at_s = 0.0_f64;
    std::iter::from_fn(move || {
        if rate_per_s.is_nan() || rate_per_s <= 0.0 {
            return None;
        }
        // 1 - [0, 1) is never 0, whose logarithm there is not.
        at_s += -(1.0 - random.f64()).ln() / rate_per_s;
        Duration::try_from_secs_f64(at_s).ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_have_the_mean_and_the_spread_of_a_poisson_process() {
        let times: Vec<f64> = poisson(1, 10.0)
            .take(20_000)
            .map(|time| time.as_secs_f64())
            .collect();
        let gaps: Vec<f64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(gaps.iter().all(|gap| *gap >= 0.0));
        let n = gaps.len() as f64;
        let mean = gaps.iter().sum::<f64>() / n;
        let spread = (gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / n).sqrt();
        assert!((mean - 0.1).abs() < 0.003, "{mean}");
        assert!((spread / mean - 1.0).abs() < 0.03, "{spread}");
    }

    #[test]
    fn the_same_seed_gives_the_same_arrivals() {
        let of = |seed| poisson(seed, 3.0).take(5).collect::<Vec<_>>();
        assert_eq!(of(7), of(7));
        assert_ne!(of(7), of(8));
    }

    #[test]
    fn without_a_rate_nobody_comes() {
        assert_eq!(poisson(1, 0.0).next(), None);
        assert_eq!(poisson(1, f64::NAN).next(), None);
    }
}
