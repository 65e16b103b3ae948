//! Reservations of tokens, as guards: of a client's limit and of a backend's quota.
//!
//! Dropping a [`Reservation`] refunds it, so no path leaks one. A refund needs no time: it only makes room.

use std::sync::Arc;

use crossbeam_utils::CachePadded;

use crate::policy::limit::Limiter;
use crate::policy::quota::LEEWAY;
use crate::policy::sync::{AtomicU64, Mutex, Ordering};
use crate::policy::token_window::{Stamp, TokenDecision, TokenWindow};
use crate::time::Nanos;

/// Tokens that a request has reserved. Dropping it refunds them.
#[derive(Debug)]
#[must_use = "dropping a reservation refunds it"]
pub(crate) struct Reservation {
    from: Source,
    /// `None` once the reservation has ended.
    stamp: Option<Stamp>,
}

/// The window of a reservation.
#[derive(Debug)]
enum Source {
    Client { limiter: Arc<Limiter<TokenWindow>>, key: u64 },
    Backend(Arc<BackendTokens>),
}

/// A provider's quota of tokens in any [`WINDOW`](crate::policy::limit::WINDOW), shared by all workers.
#[derive(Debug)]
pub(crate) struct BackendTokens {
    limit: AtomicU64,
    window: Mutex<TokenWindow>,
    /// The number of free tokens after the last change. Time alone only makes more of them, so this many can be reserved.
    /// Kept outside the lock, so that reading it takes none.
    free: CachePadded<AtomicU64>,
}

impl Reservation {
    /// Reports that the request is sent at `now`, which may be some time after it was reserved: the provider counts it
    /// from now on, and may see it a little later than Zap sends it.
    pub(crate) fn sent(&mut self, now: Nanos) {
        if let Some(stamp) = &mut self.stamp {
            stamp.restamp(now + LEEWAY);
        }
    }

    /// Ends the reservation at `now` with the number of tokens that were `used`. Returns the number of tokens that were
    /// used beyond the reservation.
    pub(crate) fn settle(mut self, used: u64, now: Nanos) -> u64 {
        let Some(stamp) = self.stamp.take() else { return 0 };
        match &self.from {
            Source::Client { limiter, key } => {
                let overrun = limiter.update(*key, now, |window| window.settle(stamp, used, now));
                limiter.trim();
                overrun
            }
            Source::Backend(tokens) => tokens.change(|window, _| window.settle(stamp, used, now)),
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let Some(stamp) = self.stamp.take() else { return };
        match &self.from {
            Source::Client { limiter, key } => {
                limiter.update_known(*key, None, |window| window.refund(stamp));
                limiter.trim();
            }
            Source::Backend(tokens) => tokens.change(|window, _| window.refund(stamp)),
        }
    }
}

impl Limiter<TokenWindow> {
    /// Reserves `amount` tokens for a request of `key` at `now` under `limit` (at least 1), as one atomic step. The rules
    /// are those of [`TokenWindow::reserve`].
    ///
    /// # Errors
    /// Returns the decision if there is no room.
    pub(crate) fn reserve(
        self: &Arc<Self>,
        key: u64,
        limit: u64,
        amount: u64,
        now: Nanos,
    ) -> Result<(Reservation, TokenDecision), TokenDecision> {
        self.update(key, now, |window| {
            let (stamp, decision) = window.reserve(limit, amount, now)?;
            let from = Source::Client { limiter: self.clone(), key };
            Ok((Reservation { from, stamp: Some(stamp) }, decision))
        })
    }

    /// Decides like [`reserve`](Self::reserve), but reserves nothing. The call counts as a use of the key.
    pub(crate) fn look_at_tokens(&self, key: u64, limit: u64, amount: u64, now: Nanos) -> TokenDecision {
        let free = TokenDecision { limit, remaining: limit, reset: 0, opens_in: Some(0) };
        self.update_known(key, Some(now), |window| window.look(limit, amount, now)).unwrap_or(free)
    }
}

impl BackendTokens {
    /// Creates a quota of `limit` (at least 1) tokens per window.
    pub(crate) fn new(limit: u64) -> Arc<Self> {
        let limit = limit.max(1);
        let free = CachePadded::new(AtomicU64::new(limit));
        Arc::new(BackendTokens { limit: AtomicU64::new(limit), window: Mutex::default(), free })
    }

    /// Returns the limit.
    pub(crate) fn limit(&self) -> u64 {
        self.limit.load(Ordering::Relaxed)
    }

    /// Changes the limit (at least 1). What is reserved and used still counts.
    pub(crate) fn set_limit(&self, limit: u64) {
        self.limit.store(limit.max(1), Ordering::Relaxed);
        // The thread that takes the lock last publishes the new limit.
        self.change(|_, _| ());
    }

    /// Reserves `amount` tokens at `now`; `None` if there is no room. The rules are those of [`TokenWindow::reserve`],
    /// except that used tokens expire [`LEEWAY`] later.
    pub(crate) fn try_reserve(self: &Arc<Self>, amount: u64, now: Nanos) -> Option<Reservation> {
        let (stamp, _) = self.change(|window, limit| window.reserve(limit, amount, now)).ok()?;
        let mut reservation = Reservation { from: Source::Backend(self.clone()), stamp: Some(stamp) };
        reservation.sent(now);
        Some(reservation)
    }

    /// Returns when `amount` tokens can be reserved, as far as is known: `now` if at once, `None` if only open
    /// reservations are in the way. Takes no lock if there was room after the last change.
    pub(crate) fn opens_at(&self, now: Nanos, amount: u64) -> Option<Nanos> {
        if amount.max(1) <= self.free.load(Ordering::Acquire) {
            return Some(now);
        }
        let decision = self.change(|window, limit| window.look(limit, amount, now));
        decision.opens_in.map(|wait| now.saturating_add(wait))
    }

    /// Changes the window under the present limit, and updates the number of free tokens.
    fn change<T>(&self, change: impl FnOnce(&mut TokenWindow, u64) -> T) -> T {
        let mut window = self.window.lock();
        let limit = self.limit();
        let result = change(&mut window, limit);
        self.free.store(window.free(limit), Ordering::Release);
        result
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::policy::limit::WINDOW;
    use crate::time::{MILLI, SECOND};

    fn limiter(max_keys: usize) -> Arc<Limiter<TokenWindow>> {
        Arc::new(Limiter::new(max_keys))
    }

    fn key(i: u64) -> u64 {
        i.wrapping_mul(0x9E37_79B9_7F4A_7C15)
    }

    #[test]
    fn each_key_has_its_own_window() {
        let l = limiter(10);
        let (first, after) = l.reserve(1, 100, 70, 0).unwrap();
        assert_eq!((after.limit, after.remaining, after.reset), (100, 30, WINDOW));
        let (_other, _) = l.reserve(2, 100, 100, 0).unwrap();
        assert_eq!(l.reserve(1, 100, 31, 0).unwrap_err().opens_in, None);
        assert_eq!(first.settle(80, SECOND), 10);
        let state = l.look_at_tokens(1, 100, 21, SECOND);
        assert_eq!((state.remaining, state.reset, state.opens_in), (20, WINDOW, Some(WINDOW - SECOND)));
        let unknown = l.look_at_tokens(3, 100, 1_000, SECOND);
        assert_eq!((unknown.remaining, unknown.reset, unknown.opens_in, l.keys()), (100, 0, Some(0), 2));
    }

    #[test]
    fn a_dropped_reservation_is_refunded_even_by_a_panic() {
        let (l, b) = (limiter(10), BackendTokens::new(100));
        drop((l.reserve(1, 100, 100, 0).unwrap(), b.try_reserve(100, 0).unwrap()));
        let (theirs, backend) = (l.clone(), b.clone());
        let thread = std::thread::Builder::new().spawn(move || {
            let _held = (theirs.reserve(1, 100, 100, 0).unwrap(), backend.try_reserve(100, 0).unwrap());
            panic!("expected by the test");
        });
        assert!(thread.unwrap().join().is_err());
        assert_eq!(l.look_at_tokens(1, 100, 1, 0).remaining, 100);
        assert_eq!(b.opens_at(7, 100), Some(7));
        assert!(Arc::strong_count(&l) == 1 && Arc::strong_count(&b) == 1);
    }

    #[test]
    fn a_key_with_an_open_reservation_is_neither_reaped_nor_evicted() {
        let l = limiter(100);
        let held = l.reserve(key(0), 100, 100, 0).unwrap().0;
        // All keys are idle for a window, then more keys come than are tracked.
        for i in 1..1_000 {
            let now = WINDOW * (1 + i / 500);
            drop(l.reserve(key(i), 100, 1, now).unwrap());
            assert!(l.keys() <= 100, "{}", l.keys());
        }
        assert_eq!(l.reserve(key(0), 100, 1, 3 * WINDOW).unwrap_err().opens_in, None);
        assert_eq!(held.settle(150, 3 * WINDOW), 50);
        assert_eq!(l.look_at_tokens(key(0), 100, 1, 3 * WINDOW).remaining, 50, "the overrun counts");
    }

    #[test]
    fn keys_above_the_maximum_go_when_their_reservations_end() {
        let l = limiter(10);
        let held: Vec<_> = (0..1_000).map(|i| l.reserve(key(i), 5, 1, i).unwrap().0).collect();
        assert_eq!(l.keys(), 1_000);
        held.into_iter().for_each(drop);
        assert!(l.keys() <= 11, "{}", l.keys());
    }

    #[test]
    fn many_threads_reserve_exactly_the_limit_together() {
        let (l, b) = (limiter(1_000), BackendTokens::new(1_500));
        let held: Vec<_> = std::thread::scope(|s| {
            let run = |t: u64| {
                let (l, b) = (&l, &b);
                move || {
                    let mine = (0..2_000).filter_map(|i| {
                        Some((l.reserve(7, 1_500, 1, t + i).ok()?, b.try_reserve(1, t + i)?))
                    });
                    mine.collect::<Vec<_>>()
                }
            };
            let threads: Vec<_> = (0..4).map(|t| s.spawn(run(t))).collect();
            threads.into_iter().flat_map(|t| t.join().unwrap()).collect()
        });
        assert_eq!(held.len(), 1_500);
        drop(held);
        assert_eq!((l.look_at_tokens(7, 1_500, 1, 5_000).remaining, b.opens_at(0, 1_500)), (1_500, Some(0)));
    }

    #[test]
    fn a_backend_says_when_there_is_room() {
        let b = BackendTokens::new(100);
        let first = b.try_reserve(60, 0).unwrap();
        let second = b.try_reserve(30, SECOND).unwrap();
        assert!(b.try_reserve(11, SECOND).is_none());
        assert_eq!((b.opens_at(SECOND, 10), b.opens_at(SECOND, 11)), (Some(SECOND), None));
        assert_eq!(first.settle(60, 2 * SECOND), 0);
        assert_eq!(b.opens_at(2 * SECOND, 70), Some(WINDOW + LEEWAY));
        assert_eq!(b.opens_at(2 * SECOND, 71), None, "the second reservation is still open");
        drop(second);
        assert_eq!(b.opens_at(2 * SECOND, 1_000), Some(WINDOW + LEEWAY), "as much as the limit");
        assert_eq!(b.opens_at(WINDOW + LEEWAY, 1_000), Some(WINDOW + LEEWAY));
        assert!(b.try_reserve(1_000, WINDOW + LEEWAY).is_some());
    }

    #[test]
    fn tokens_of_a_backend_count_from_when_the_request_is_sent() {
        let b = BackendTokens::new(100);
        let mut reservation = b.try_reserve(100, 0).unwrap();
        reservation.sent(3 * SECOND);
        reservation.sent(2 * SECOND);
        reservation.settle(100, 10 * SECOND);
        assert_eq!(b.opens_at(10 * SECOND, 1), Some(WINDOW + 3 * SECOND + LEEWAY));
    }

    #[test]
    fn a_new_limit_counts_earlier_tokens() {
        let b = BackendTokens::new(100);
        let held = b.try_reserve(80, 0).unwrap();
        b.set_limit(50);
        assert_eq!((b.limit(), b.opens_at(0, 1)), (50, None));
        held.settle(80, SECOND);
        assert_eq!(b.opens_at(SECOND, 1), Some(WINDOW + LEEWAY));
        b.set_limit(200);
        assert_eq!((b.opens_at(SECOND, 120), b.opens_at(SECOND, 121)), (Some(SECOND), Some(WINDOW + LEEWAY)));
    }

    proptest! {
        /// The time that is read without the lock is correct: not after now exactly if the tokens can be reserved.
        #[test]
        fn the_time_for_a_request_is_correct(
            limit in 1u64..50,
            steps in prop::collection::vec((0u8..6, 0u64..20_000, 0u64..60), 1..120),
        ) {
            let b = BackendTokens::new(limit);
            let (mut held, mut now) = (Vec::new(), 0);
            for (op, step, amount) in steps {
                now += step * MILLI;
                match op {
                    0 if !held.is_empty() => drop(held.remove(held.len() / 2)),
                    1 | 2 if !held.is_empty() => {
                        let reservation: Reservation = held.remove(0);
                        reservation.settle(amount, now);
                    }
                    _ => {
                        let opens = b.opens_at(now, amount);
                        let reservation = b.try_reserve(amount, now);
                        prop_assert_eq!(reservation.is_some(), opens.is_some_and(|at| at <= now), "{:?} at {}", opens, now);
                        held.extend(reservation);
                    }
                }
            }
            held.clear();
            prop_assert!(b.try_reserve(limit, now + 2 * WINDOW).is_some(), "nothing is leaked");
        }
    }
}
