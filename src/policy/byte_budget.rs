//! A bound for the bytes that all requests hold together, and who gives way when it is reached.
//!
//! Workers take bytes in slabs, so that a small body costs no write to what all workers share. Bodies that wait for
//! room have an order: the newest gives way.

use std::collections::BTreeSet;

use crate::policy::sync::{AtomicU64, Mutex, Ordering};
use crate::time::Nanos;

/// The unit in which a worker takes bytes, if as many are left.
pub(crate) const SLAB: u64 = 64 * 1024;

/// The bytes that all workers may hold together.
#[derive(Debug)]
pub(crate) struct ByteBudget {
    max: u64,
    taken: AtomicU64,
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    next: u64,
    numbers: BTreeSet<u64>,
    /// When a body was refused last.
    refused: Option<Nanos>,
}

/// The bytes of one worker.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct WorkerBytes {
    /// Bytes that its requests hold.
    pub held: u64,
    /// Bytes that it has taken of the budget; at least as many.
    taken: u64,
}

impl ByteBudget {
    /// Creates a budget of `max` bytes.
    pub(crate) fn new(max: u64) -> Self {
        ByteBudget { max, taken: AtomicU64::new(0), waiting: Mutex::default() }
    }

    /// Takes `n` bytes for a request of the worker. Returns `false` if they are not left.
    pub(crate) fn take(&self, worker: &mut WorkerBytes, n: u64) -> bool {
        let missing = (worker.held + n).saturating_sub(worker.taken);
        let slab = missing.next_multiple_of(SLAB);
        let taken = match missing {
            0 => 0,
            _ if self.try_take(slab) => slab,
            _ if self.try_take(missing) => missing,
            _ => return false,
        };
        worker.taken += taken;
        worker.held += n;
        true
    }

    /// Takes `n` bytes that a request of the worker holds already, even if they are not left.
    pub(crate) fn force(&self, worker: &mut WorkerBytes, n: u64) {
        if !self.take(worker, n) {
            let missing = worker.held + n - worker.taken;
            self.taken.fetch_add(missing, Ordering::Relaxed);
            worker.taken += missing;
            worker.held += n;
        }
    }

    /// Gives `n` bytes of the worker back. Returns whether others may find room that was not there.
    pub(crate) fn give(&self, worker: &mut WorkerBytes, n: u64) -> bool {
        worker.held -= n;
        let spare = worker.taken - worker.held;
        // Some stay while requests run, so that most of them cost nothing here; none stay while little is left.
        let is_short = self.taken.load(Ordering::Relaxed) + SLAB > self.max;
        let kept = if worker.held == 0 || is_short { 0 } else { SLAB };
        if spare < (2 * kept).max(1) {
            return false;
        }
        worker.taken -= spare - kept;
        self.taken.fetch_sub(spare - kept, Ordering::Release);
        true
    }

    fn try_take(&self, n: u64) -> bool {
        let take = |taken: u64| taken.checked_add(n).filter(|taken| *taken <= self.max);
        self.taken.fetch_update(Ordering::Acquire, Ordering::Relaxed, take).is_ok()
    }

    /// Registers a body that waits for room. Returns its number.
    pub(crate) fn join(&self) -> u64 {
        let mut waiting = self.waiting.lock();
        let number = waiting.next;
        waiting.next += 1;
        waiting.numbers.insert(number);
        number
    }

    /// Whether the body with this number is refused at `now`: it came last of all that wait, and none was refused in
    /// the last `pause`.
    pub(crate) fn refuse(&self, number: u64, now: Nanos, pause: Nanos) -> bool {
        let mut waiting = self.waiting.lock();
        let is_due = waiting.refused.is_none_or(|last| now >= last + pause);
        let is_refused = is_due && waiting.numbers.last() == Some(&number);
        if is_refused {
            waiting.refused = Some(now);
        }
        is_refused
    }

    /// Ends the wait of the body with this number.
    pub(crate) fn leave(&self, number: u64) {
        self.waiting.lock().numbers.remove(&number);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_worker_takes_a_slab_while_there_is_one_and_gives_back_what_it_does_not_need() {
        let budget = ByteBudget::new(4 * SLAB);
        let (mut a, mut b) = (WorkerBytes::default(), WorkerBytes::default());
        assert!(budget.take(&mut a, 10) && a.taken == SLAB);
        assert!(budget.take(&mut b, 3 * SLAB) && !budget.take(&mut b, 1));
        assert!(budget.take(&mut a, SLAB - 10), "its slab has room");
        assert!(!budget.take(&mut a, 1));
        assert!(budget.give(&mut a, 5), "others may need each byte");
        assert!(budget.take(&mut b, 5) && !budget.take(&mut a, 1));
        assert!(budget.give(&mut b, 3 * SLAB + 5));
        assert!(budget.give(&mut a, SLAB - 5) && (a.held, b.held) == (0, 0));
        assert!(budget.take(&mut b, 4 * SLAB), "an idle worker keeps nothing");
    }

    #[test]
    fn bytes_beyond_the_bound_are_counted_and_keep_others_out() {
        let budget = ByteBudget::new(SLAB);
        let (mut a, mut b) = (WorkerBytes::default(), WorkerBytes::default());
        assert!(budget.take(&mut a, SLAB - 1));
        budget.force(&mut b, 10);
        assert_eq!((b.held, budget.taken.load(Ordering::Relaxed)), (10, SLAB + 10));
        assert!(!budget.take(&mut b, 1), "nothing is left for others");
        assert!(budget.give(&mut b, 10) && budget.give(&mut a, SLAB - 1));
        assert_eq!(budget.taken.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn the_newest_of_those_that_wait_gives_way() {
        let budget = ByteBudget::new(1);
        let (first, second) = (budget.join(), budget.join());
        assert!(!budget.refuse(first, 10, 5) && budget.refuse(second, 10, 5));
        budget.leave(second);
        assert!(!budget.refuse(first, 14, 5), "what the other held may be enough");
        assert!(budget.refuse(first, 15, 5));
    }

    proptest! {
        #[test]
        fn workers_never_hold_more_than_the_budget_and_nothing_is_lost(
            max in 1..6 * SLAB,
            steps in prop::collection::vec((0..3usize, 0..2 * SLAB, any::<bool>()), 1..80),
        ) {
            let budget = ByteBudget::new(max);
            let (mut workers, mut held) = ([WorkerBytes::default(); 3], [vec![], vec![], vec![]]);
            for (worker, n, gives) in steps {
                match held[worker].pop() {
                    Some(n) if gives => drop(budget.give(&mut workers[worker], n)),
                    kept => {
                        held[worker].extend(kept);
                        if budget.take(&mut workers[worker], n) {
                            held[worker].push(n);
                        }
                    }
                }
                prop_assert!(workers.iter().all(|worker| worker.held <= worker.taken));
                prop_assert_eq!(workers.iter().map(|w| w.taken).sum::<u64>(), budget.taken.load(Ordering::Relaxed));
                prop_assert!(budget.taken.load(Ordering::Relaxed) <= max);
            }
        }
    }
}
