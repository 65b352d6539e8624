//! Many VMs at once: started side by side, woken as they come, those that are late left behind.
//!
//! ```text
//!   0..n --start--> started --finish--> the caller, who waits until all are there, the deadline has passed,
//!                                       or somebody has had enough
//! ```
//!
//! All are started before the first is finished, so that none waits for another's guest; of more than [`MOST_BETWEEN`] only
//! few at a time. What is not there in time is dropped by the thread that works on it: after the
//! deadline nobody waits for that.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::vm::turns;

/// Threads: a VM that starts or wakes waits for others most of the time.
const MOST_WORKERS: usize = 32;
/// Up to so many are all started before the first is finished.
const MOST_BETWEEN: usize = 128;
/// Of more than that so many for each that is woken at a time are started and not finished. Each takes something of a
/// processor, and where guest kernels are emulated a hundred that wait for their turn do little else than catch up with
/// their clocks.
const FEW_BETWEEN: usize = 3;
/// How often the wait looks whether the caller has had enough.
const LOOK: Duration = Duration::from_millis(20);

/// What is done for each.
pub(crate) trait Each: Send + Sync + 'static {
    /// What comes of it; dropped, it is undone.
    type Item: Send + 'static;
    /// Why nothing came of it.
    type Error: Send + 'static;

    /// The first half. `enough` becomes readable when nobody waits any more.
    fn start(&self, index: usize, enough: BorrowedFd<'_>) -> Result<Self::Item, Self::Error>;

    /// The second half.
    fn finish(&self, index: usize, item: &mut Self::Item) -> Result<(), Self::Error>;
}

struct Work<E: Each> {
    each: E,
    count: usize,
    /// So many are started and not finished at a time.
    most: usize,
    queue: Mutex<Queue<E::Item>>,
    over: AtomicBool,
    enough: OwnedFd,
}

struct Queue<T> {
    next: usize,
    /// So many have been finished, or have failed.
    done: usize,
    started: VecDeque<(usize, T)>,
}

/// What became of each, by its index; `None`: it was not ready in time.
pub(crate) type Results<E> = Vec<Option<Result<<E as Each>::Item, <E as Each>::Error>>>;

type Report<E> = (usize, Result<<E as Each>::Item, <E as Each>::Error>);

/// Does it `count` times. `None`: it was not ready at the deadline, or when `cancel` became readable.
///
/// # Errors
/// When the system has no pipe or no thread at all.
pub(crate) fn fan_out<E: Each>(
    count: usize,
    each: E,
    deadline: Option<Instant>,
    cancel: Option<BorrowedFd<'_>>,
) -> std::io::Result<Results<E>> {
    let mut results: Vec<_> = std::iter::repeat_with(|| None).take(count).collect();
    let (enough, said) = pipe_with(PipeFlags::CLOEXEC)?;
    let work = Arc::new(Work {
        each,
        count,
        most: most_between(count),
        queue: Mutex::new(Queue {
            next: 0,
            done: 0,
            started: VecDeque::new(),
        }),
        over: AtomicBool::new(false),
        enough,
    });
    let (reports, inbox) = mpsc::channel();
    let mut workers = 0;
    for _ in 0..count.min(MOST_WORKERS) {
        let (work, reports) = (work.clone(), reports.clone());
        let thread = std::thread::Builder::new().name("fork".into());
        match thread.spawn(move || work.run(&reports)) {
            Ok(_) => workers += 1,
            // Fewer do as well.
            Err(_) if workers > 0 => break,
            Err(error) => return Err(error),
        }
    }
    drop(reports);
    let mut missing = count;
    while missing > 0 {
        let left = deadline.map(|end| end.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) || cancel.is_some_and(is_readable) {
            break;
        }
        match inbox.recv_timeout(left.unwrap_or(LOOK).min(LOOK)) {
            Ok((index, result)) => {
                results[index] = Some(result);
                missing -= 1;
            }
            Err(RecvTimeoutError::Timeout) => {}
            // A worker has panicked: what it had is missing.
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    work.over.store(true, Ordering::Release);
    // Its hang-up is what they see.
    drop(said);
    Ok(results)
}

/// Whether there is something to read, or an end.
pub(crate) fn is_readable(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

/// How many of `count` are started and not finished at a time.
fn most_between(count: usize) -> usize {
    match count > MOST_BETWEEN {
        true => (FEW_BETWEEN * turns::at_once()).min(MOST_BETWEEN),
        false => MOST_BETWEEN,
    }
}

enum Step<T> {
    Start(usize),
    Finish(usize, T),
}

impl<E: Each> Work<E> {
    fn run(&self, reports: &Sender<Report<E>>) {
        while !self.over.load(Ordering::Acquire)
            && let Some(step) = self.step()
        {
            let report = match step {
                Step::Start(index) => match self.each.start(index, self.enough.as_fd()) {
                    Ok(item) => {
                        self.queue().started.push_back((index, item));
                        continue;
                    }
                    Err(error) => (index, Err(error)),
                },
                Step::Finish(index, item) => self.finish(index, item),
            };
            self.queue().done += 1;
            // Nobody waits any more: what is ready too late is dropped here.
            let _ = reports.send(report);
        }
        // Others may have started what nobody finishes now.
        if self.over.load(Ordering::Acquire) {
            let late = std::mem::take(&mut self.queue().started);
            drop(late);
        }
    }

    fn finish(&self, index: usize, mut item: E::Item) -> Report<E> {
        let finished = self.each.finish(index, &mut item);
        (index, finished.map(|()| item))
    }

    fn queue(&self) -> std::sync::MutexGuard<'_, Queue<E::Item>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is to be done next. Whoever starts or finishes one comes back for another, so nothing is left when there is
    /// no step for him.
    fn step(&self) -> Option<Step<E::Item>> {
        let mut queue = self.queue();
        if queue.next < self.count && queue.next - queue.done < self.most {
            queue.next += 1;
            return Some(Step::Start(queue.next - 1));
        }
        let (index, item) = queue.started.pop_front()?;
        Some(Step::Finish(index, item))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    /// Counts how many there are.
    struct Item(Arc<AtomicUsize>);

    impl Drop for Item {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }

    struct Tests {
        alive: Arc<AtomicUsize>,
        slow: Option<usize>,
        bad: Option<usize>,
    }

    impl Each for Tests {
        type Item = Item;
        type Error = &'static str;

        fn start(&self, index: usize, enough: BorrowedFd<'_>) -> Result<Item, &'static str> {
            if self.bad == Some(index) {
                return Err("bad");
            }
            self.alive.fetch_add(1, Ordering::SeqCst);
            let item = Item(self.alive.clone());
            if self.slow == Some(index) {
                let mut fds = [PollFd::from_borrowed_fd(enough, PollFlags::IN)];
                let _ = poll(&mut fds, None);
            }
            Ok(item)
        }

        fn finish(&self, _: usize, _: &mut Item) -> Result<(), &'static str> {
            Ok(())
        }
    }

    fn tests(slow: Option<usize>, bad: Option<usize>) -> (Arc<AtomicUsize>, Tests) {
        let alive = Arc::new(AtomicUsize::new(0));
        let each = Tests {
            alive: alive.clone(),
            slow,
            bad,
        };
        (alive, each)
    }

    #[test]
    fn one_that_fails_does_not_keep_the_others() {
        let (alive, each) = tests(None, Some(7));
        let done = fan_out(100, each, None, None).unwrap();
        for (index, result) in done.iter().enumerate() {
            match (index, result) {
                (7, Some(Err("bad"))) => {}
                (_, Some(Ok(_))) if index != 7 => {}
                _ => panic!("{index}"),
            }
        }
        assert_eq!(alive.load(Ordering::SeqCst), 99);
        drop(done);
        assert_eq!(alive.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn one_that_is_late_is_left_behind_and_undone() {
        let (alive, each) = tests(Some(3), None);
        let deadline = Instant::now() + Duration::from_secs(2);
        let done = fan_out(5, each, Some(deadline), None).unwrap();
        assert!(done[3].is_none());
        assert_eq!(done.iter().flatten().count(), 4);
        drop(done);
        let end = Instant::now() + Duration::from_secs(60);
        while alive.load(Ordering::SeqCst) > 0 {
            assert!(Instant::now() < end, "the late one is still there");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn all_are_started_before_the_first_is_finished() {
        struct Orderly(AtomicUsize);
        impl Each for Orderly {
            type Item = ();
            type Error = usize;
            fn start(&self, _: usize, _: BorrowedFd<'_>) -> Result<(), usize> {
                self.0.fetch_add(1, Ordering::SeqCst);
                Ok(())
            }
            fn finish(&self, _: usize, (): &mut ()) -> Result<(), usize> {
                match self.0.load(Ordering::SeqCst) {
                    begun if begun > 100 - MOST_WORKERS => Ok(()),
                    begun => Err(begun),
                }
            }
        }
        let done = fan_out(100, Orderly(AtomicUsize::new(0)), None, None).unwrap();
        assert!(done.into_iter().flatten().all(|it| it.is_ok()));
    }

    #[test]
    fn no_more_than_so_many_are_between_start_and_finish() {
        struct Few(AtomicUsize, Arc<AtomicUsize>);
        impl Each for Few {
            type Item = ();
            type Error = &'static str;
            fn start(&self, index: usize, _: BorrowedFd<'_>) -> Result<(), &'static str> {
                if index.is_multiple_of(3) {
                    return Err("bad");
                }
                let begun = self.0.fetch_add(1, Ordering::SeqCst) + 1;
                self.1.fetch_max(begun, Ordering::SeqCst);
                Ok(())
            }
            fn finish(&self, _: usize, (): &mut ()) -> Result<(), &'static str> {
                std::thread::yield_now();
                self.0.fetch_sub(1, Ordering::SeqCst);
                Ok(())
            }
        }
        let most = Arc::new(AtomicUsize::new(0));
        let few = Few(AtomicUsize::new(0), most.clone());
        let done = fan_out(1000, few, None, None).unwrap();
        assert_eq!(done.iter().flatten().count(), 1000);
        assert_eq!(done.into_iter().flatten().flatten().count(), 666);
        assert!(most.load(Ordering::SeqCst) <= most_between(1000));
    }

    #[test]
    fn nothing_waits_when_the_deadline_has_passed() {
        let (_, each) = tests(None, None);
        let done = fan_out(3, each, Some(Instant::now()), None).unwrap();
        assert!(done.iter().all(Option::is_none));
        assert!(
            fan_out(0, tests(None, None).1, None, None)
                .unwrap()
                .is_empty()
        );
    }
}
