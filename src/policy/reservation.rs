//! What a request reserves of its client's limits, as guards: dropping one refunds it, so no path leaks a reservation.
//! A refund needs no time: it only makes room. [`quota`](crate::policy::quota) has the reservations of a backend's
//! tokens.

use std::sync::Arc;

use crate::policy::limit::Limiter;
use crate::policy::queue::Permit;
use crate::policy::spend::SpendReservation;
use crate::policy::token_window::{Stamp, TokenDecision, TokenWindow};
use crate::protocol::usage::Usage;
use crate::time::{Day, Nanos};

/// What a request holds of its client's limits. Dropping it releases everything.
#[derive(Debug, Default)]
#[must_use = "dropping it releases everything"]
pub(crate) struct ClientReservation {
    /// The tokens, if the client has a limit of tokens.
    pub tokens: Option<Reservation>,
    /// The money, if the client has a budget.
    pub spend: Option<SpendReservation>,
    /// The permit, if the client has a limit of requests at once.
    pub permit: Option<Permit>,
    /// What the request was expected to use.
    pub expected: Usage,
}

impl ClientReservation {
    /// Ends the reservation with what the answer used and cost, in nano-USD. Returns the tokens that were used beyond
    /// the reservation.
    pub(crate) fn settle(self, usage: &Usage, cost: u64, (now, today): (Nanos, Day)) -> u64 {
        let is_dearer = self.spend.is_some_and(|spend| spend.settle(cost, today) > 0);
        let overrun = self.tokens.map_or(0, |reserved| reserved.settle(usage.total(), now));
        overrun.max(beyond(usage, &self.expected, is_dearer))
    }
}

/// The tokens by which an answer cost more than was expected: all beyond the expected ones, or those of its output
/// alone.
pub(crate) fn beyond(usage: &Usage, expected: &Usage, is_dearer: bool) -> u64 {
    let all = usage.total().saturating_sub(expected.total());
    if is_dearer { all.max(usage.output.saturating_sub(expected.output)) } else { 0 }
}

/// Tokens that a request has reserved. Dropping it refunds them.
#[derive(Debug)]
#[must_use = "dropping a reservation refunds it"]
pub(crate) struct Reservation {
    limiter: Arc<Limiter<TokenWindow>>,
    key: u64,
    /// `None` once the reservation has ended.
    stamp: Option<Stamp>,
}

impl Reservation {
    /// Ends the reservation at `now` with the number of tokens that were `used`. Returns the number of tokens that were
    /// used beyond the reservation.
    pub(crate) fn settle(mut self, used: u64, now: Nanos) -> u64 {
        let Some(stamp) = self.stamp.take() else { return 0 };
        let overrun = self.limiter.update(self.key, now, |window| window.settle(stamp, used, now));
        self.limiter.trim();
        overrun
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let Some(stamp) = self.stamp.take() else { return };
        self.limiter.update_known(self.key, None, |window| window.refund(stamp));
        self.limiter.trim();
    }
}

impl Limiter<TokenWindow> {
    /// Reserves `amount` tokens for a request of `key` at `now` under `limit` (at least 1), as one atomic step. The
    /// rules are those of [`TokenWindow::reserve`].
    ///
    /// # Errors
    /// Returns the decision if there is no room.
    pub(crate) fn reserve(
        self: &Arc<Self>,
        key: u64,
        (limit, amount): (u64, u64),
        now: Nanos,
    ) -> Result<(Reservation, TokenDecision), TokenDecision> {
        self.update(key, now, |window| {
            let (stamp, decision) = window.reserve(limit, amount, now)?;
            Ok((Reservation { limiter: self.clone(), key, stamp: Some(stamp) }, decision))
        })
    }

    /// The state of the window of `key` at `now`, for a request of one token. The call is no use of the key.
    pub(crate) fn state(&self, key: u64, limit: u64, now: Nanos) -> TokenDecision {
        let free = TokenDecision { limit, remaining: limit, reset: 0, opens_in: Some(0) };
        self.update_known(key, None, |window| window.look(limit, 1, now)).unwrap_or(free)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::limit::WINDOW;
    use crate::time::SECOND;

    fn limiter(max_keys: usize) -> Arc<Limiter<TokenWindow>> {
        Arc::new(Limiter::new(max_keys))
    }

    fn key(i: u64) -> u64 {
        i.wrapping_mul(0x9E37_79B9_7F4A_7C15)
    }

    #[test]
    fn each_key_has_its_own_window() {
        let l = limiter(10);
        let (first, after) = l.reserve(1, (100, 70), 0).unwrap();
        assert_eq!((after.limit, after.remaining, after.reset), (100, 30, WINDOW));
        let (_other, _) = l.reserve(2, (100, 100), 0).unwrap();
        assert_eq!(l.reserve(1, (100, 31), 0).unwrap_err().opens_in, None);
        assert_eq!(first.settle(80, SECOND), 10);
        let refused = l.reserve(1, (100, 21), SECOND).unwrap_err();
        assert_eq!((refused.remaining, refused.reset, refused.opens_in), (20, WINDOW, Some(WINDOW - SECOND)));
        assert_eq!(
            (l.state(1, 100, SECOND).remaining, l.state(3, 100, SECOND).remaining, l.keys()),
            (20, 100, 2)
        );
    }

    #[test]
    fn a_dropped_reservation_is_refunded_even_by_a_panic() {
        let l = limiter(10);
        drop(l.reserve(1, (100, 100), 0).unwrap());
        let theirs = l.clone();
        let thread = std::thread::Builder::new().spawn(move || {
            let _held = theirs.reserve(1, (100, 100), 0).unwrap();
            panic!("expected by the test");
        });
        assert!(thread.unwrap().join().is_err());
        assert_eq!(l.state(1, 100, 0).remaining, 100);
        assert_eq!(Arc::strong_count(&l), 1);
    }

    #[test]
    fn a_key_with_an_open_reservation_is_neither_reaped_nor_evicted() {
        let l = limiter(100);
        let held = l.reserve(key(0), (100, 100), 0).unwrap().0;
        // All keys are idle for a window, then more keys come than are tracked.
        for i in 1..1_000 {
            let now = WINDOW * (1 + i / 500);
            drop(l.reserve(key(i), (100, 1), now).unwrap());
            assert!(l.keys() <= 100, "{}", l.keys());
        }
        assert_eq!(l.reserve(key(0), (100, 1), 3 * WINDOW).unwrap_err().opens_in, None);
        assert_eq!(held.settle(150, 3 * WINDOW), 50);
        assert_eq!(l.state(key(0), 100, 3 * WINDOW).remaining, 50, "the overrun counts");
    }

    #[test]
    fn keys_above_the_maximum_go_when_their_reservations_end() {
        let l = limiter(10);
        let held: Vec<_> = (0..1_000).map(|i| l.reserve(key(i), (5, 1), i).unwrap().0).collect();
        assert_eq!(l.keys(), 1_000);
        held.into_iter().for_each(drop);
        assert!(l.keys() <= 11, "{}", l.keys());
    }

    #[test]
    fn many_threads_reserve_exactly_the_limit_together() {
        let l = limiter(1_000);
        let held: Vec<_> = std::thread::scope(|s| {
            let run = |t: u64| {
                let l = &l;
                move || (0..2_000).filter_map(|i| l.reserve(7, (1_500, 1), t + i).ok()).collect::<Vec<_>>()
            };
            let threads: Vec<_> = (0..4).map(|t| s.spawn(run(t))).collect();
            threads.into_iter().flat_map(|t| t.join().unwrap()).collect()
        });
        assert_eq!(held.len(), 1_500);
        drop(held);
        assert_eq!(l.state(7, 1_500, 5_000).remaining, 1_500);
    }
}
