//! How long a scenario may take: rounds end when its time is over, so that a run keeps its promise on
//! a host of any speed.
//!
//! A scenario's budget is its share of what is left of the run's; what one does not use, those after
//! it have. A round that has begun is ended, and each series gets at least its first round, so a run
//! may be a little longer than its budget. It cannot fail.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// The time of a scenario or of a part of one.
#[derive(Debug)]
pub struct Budget<'a> {
    until: Instant,
    whole: Option<&'a Budget<'a>>,
    over: Cell<bool>,
}

impl<'a> Budget<'a> {
    /// From now on.
    pub fn of(time: Duration) -> Self {
        Self {
            until: Instant::now() + time,
            whole: None,
            over: Cell::new(false),
        }
    }

    /// A part of what is left: `share` of it, 0 to 1.
    pub fn part<'b>(&'b self, share: f64) -> Budget<'b>
    where
        'a: 'b,
    {
        Budget {
            until: Instant::now() + self.left().mul_f64(share.clamp(0.0, 1.0)),
            whole: Some(self),
            over: Cell::new(false),
        }
    }

    /// What is left.
    pub fn left(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }

    /// Whether there is time for another round; remembers that there was not.
    pub fn more(&self) -> bool {
        let more = !self.left().is_zero();
        if !more {
            self.run_out();
        }
        more
    }

    /// Whether something that takes so long fits into what is left; remembers that it did not.
    pub fn fits(&self, time: Duration) -> bool {
        let fits = time <= self.left();
        if !fits {
            self.run_out();
        }
        fits
    }

    fn run_out(&self) {
        self.over.set(true);
        if let Some(whole) = self.whole {
            whole.run_out();
        }
    }

    /// Whether rounds were left out for want of time.
    pub fn ran_out(&self) -> bool {
        self.over.get()
    }

    /// Rounds 0 to `most` - 1; the first one always, others while there is time.
    pub fn rounds(&self, most: usize) -> impl Iterator<Item = usize> {
        (0..most).take_while(|&round| round == 0 || self.more())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_time_there_is_one_round_and_the_want_of_more_is_remembered() {
        let whole = Budget::of(Duration::ZERO);
        let part = whole.part(0.5);
        assert_eq!(part.rounds(5).collect::<Vec<_>>(), [0]);
        assert!(part.ran_out() && whole.ran_out());
    }

    #[test]
    fn with_time_there_are_all_rounds() {
        let budget = Budget::of(Duration::from_secs(3600));
        assert_eq!(budget.rounds(5).count(), 5);
        assert!(!budget.ran_out());
    }

    #[test]
    fn what_takes_longer_than_is_left_does_not_fit_and_that_is_remembered() {
        let whole = Budget::of(Duration::from_secs(1000));
        let part = whole.part(0.5);
        assert!(part.fits(Duration::from_secs(400)) && !whole.ran_out());
        assert!(!part.fits(Duration::from_secs(600)));
        assert!(part.ran_out() && whole.ran_out());
    }

    #[test]
    fn a_part_has_its_share_of_what_is_left() {
        let whole = Budget::of(Duration::from_secs(1000));
        let left = whole.part(0.25).left().as_secs();
        assert!((240..=250).contains(&left), "{left}");
    }
}
