//! Lists of runs: ascending, not empty, and apart.

use ratoon_vmm_api::Run;

fn end(run: &Run) -> u64 {
    run.offset + run.len
}

/// The same bytes in runs that ascend and do not touch.
pub(super) fn joined(mut runs: Vec<Run>) -> Vec<Run> {
    runs.sort_unstable_by_key(|run| run.offset);
    let mut all: Vec<Run> = Vec::with_capacity(runs.len());
    for run in runs {
        match all.last_mut() {
            Some(last) if run.offset <= end(last) => {
                last.len = last.len.max(end(&run) - last.offset);
            }
            _ => all.push(run),
        }
    }
    all
}

/// What of `runs` is not in `without`; both ascend and are apart.
pub(super) fn minus(runs: &[Run], without: &[Run]) -> Vec<Run> {
    let mut left = Vec::with_capacity(runs.len());
    let mut from = 0;
    for run in runs {
        while from < without.len() && end(&without[from]) <= run.offset {
            from += 1;
        }
        let mut at = run.offset;
        for hole in &without[from..] {
            if hole.offset >= end(run) {
                break;
            }
            if hole.offset > at {
                left.push(Run {
                    offset: at,
                    len: hole.offset - at,
                });
            }
            at = at.max(end(hole));
        }
        if at < end(run) {
            left.push(Run {
                offset: at,
                len: end(run) - at,
            });
        }
    }
    left
}

/// What is in both; both ascend and are apart.
pub(super) fn both(runs: &[Run], others: &[Run]) -> Vec<Run> {
    minus(runs, &minus(runs, others))
}

/// At most `most` runs with all that these have, and gaps of up to `gap` bytes filled in any case: the smallest
/// gaps go first.
pub(super) fn fewer(runs: Vec<Run>, gap: u64, most: usize) -> Vec<Run> {
    let mut filled = gap;
    if runs.len() > most {
        let gaps = runs.windows(2).map(|pair| pair[1].offset - end(&pair[0]));
        let mut gaps: Vec<u64> = gaps.collect();
        gaps.sort_unstable();
        filled = filled.max(gaps[runs.len() - most - 1]);
    }
    let mut fewer: Vec<Run> = Vec::new();
    for run in runs {
        match fewer.last_mut() {
            Some(last) if run.offset - end(last) <= filled => last.len = end(&run) - last.offset,
            _ => fewer.push(run),
        }
    }
    fewer
}

/// How many bytes they are.
pub(super) fn bytes(runs: &[Run]) -> u64 {
    runs.iter().map(|run| run.len).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(list: &[(u64, u64)]) -> Vec<Run> {
        let runs = list.iter().map(|&(offset, len)| Run { offset, len });
        runs.collect()
    }

    #[test]
    fn what_touches_or_overlaps_is_one_run() {
        let all = joined(runs(&[(8, 2), (0, 4), (4, 1), (9, 5), (20, 1)]));
        assert_eq!(all, runs(&[(0, 5), (8, 6), (20, 1)]));
    }

    #[test]
    fn what_is_taken_away_is_gone_and_nothing_else() {
        let some = runs(&[(0, 10), (20, 10), (40, 10)]);
        let without = runs(&[(0, 2), (4, 1), (9, 12), (25, 1), (38, 20)]);
        let left = runs(&[(2, 2), (5, 4), (21, 4), (26, 4)]);
        assert_eq!(minus(&some, &without), left);
        assert_eq!(minus(&some, &[]), some);
        assert_eq!(minus(&some, &runs(&[(0, 100)])), []);
        let shared = runs(&[(0, 2), (4, 1), (9, 1), (20, 1), (25, 1), (40, 10)]);
        assert_eq!(both(&some, &without), shared);
    }

    #[test]
    fn small_gaps_are_filled_and_the_next_larger_ones_when_there_are_too_many_runs() {
        let some = runs(&[(0, 1), (2, 1), (10, 1), (13, 1), (20, 5)]);
        assert_eq!(fewer(some.clone(), 0, 5), some);
        let wanted = runs(&[(0, 3), (10, 1), (13, 1), (20, 5)]);
        assert_eq!(fewer(some.clone(), 1, 5), wanted);
        assert_eq!(fewer(some.clone(), 0, 2), runs(&[(0, 3), (10, 15)]));
        assert_eq!(fewer(some, 100, 5), runs(&[(0, 25)]));
        assert_eq!(bytes(&runs(&[(0, 25), (30, 2)])), 27);
    }
}
