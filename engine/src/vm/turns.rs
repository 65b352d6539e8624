//! Whose turn it is: guests that are woken at the same time.
//!
//! A guest's wake is work for a processor and no waiting. More of them at a time than there are processors make every one
//! later and none earlier; and where guest kernels are emulated, many busy guests keep each other from getting on at all
//! (docs/host-without-vt.md).

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// So many at a time for each processor: one of them may wait for its disk.
const EACH: usize = 2;
/// How often who waits looks whether his caller has had enough.
const LOOK: Duration = Duration::from_millis(20);

/// So many guests are busy at a time.
pub(crate) fn at_once() -> usize {
    EACH * std::thread::available_parallelism().map_or(1, usize::from)
}

/// Those who are woken by this process.
pub(crate) static WAKES: Turns = Turns::new();

/// A count of those who have a turn.
#[derive(Debug)]
pub(crate) struct Turns {
    taken: Mutex<usize>,
    freed: Condvar,
}

/// Dropped, it is another's.
#[derive(Debug)]
pub(crate) struct Turn<'t>(&'t Turns);

impl Turns {
    const fn new() -> Self {
        Self {
            taken: Mutex::new(0),
            freed: Condvar::new(),
        }
    }

    /// Waits for one. `None`: the caller has had `enough`.
    pub(crate) fn take(&self, enough: impl Fn() -> bool) -> Option<Turn<'_>> {
        self.take_of(at_once(), enough)
    }

    fn take_of(&self, most: usize, enough: impl Fn() -> bool) -> Option<Turn<'_>> {
        let mut taken = self.taken();
        while *taken >= most {
            if enough() {
                return None;
            }
            let freed = self.freed.wait_timeout(taken, LOOK);
            (taken, _) = freed.unwrap_or_else(PoisonError::into_inner);
        }
        *taken += 1;
        Some(Turn(self))
    }

    fn taken(&self) -> MutexGuard<'_, usize> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.taken() -= 1;
        self.0.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn no_more_than_so_many_have_a_turn_and_all_get_one() {
        let turns = Turns::new();
        let (at_once, most, done) = (
            AtomicUsize::new(0),
            AtomicUsize::new(0),
            AtomicUsize::new(0),
        );
        std::thread::scope(|scope| {
            for _ in 0..16 {
                scope.spawn(|| {
                    let _turn = turns.take_of(3, || false);
                    most.fetch_max(at_once.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    std::thread::yield_now();
                    at_once.fetch_sub(1, Ordering::SeqCst);
                    done.fetch_add(1, Ordering::SeqCst);
                });
            }
        });
        assert!(most.into_inner() <= 3);
        let turn = turns.take_of(1, || false);
        assert!(turns.take_of(1, || true).is_none(), "it was waited for");
        drop(turn);
        assert!(turns.take_of(1, || true).is_some());
        assert_eq!(done.into_inner(), 16);
    }
}
