//! The exact sliding window of [`limit`](crate::policy::limit), weighted: at most N tokens in any 60 s.
//!
//! A request reserves its tokens before it is sent, and is settled when the number that it used is known. A reservation
//! counts until it is settled, for as long as the answer takes. Then the tokens that were used count for 60 s from the
//! time of the reservation, so the sum of what is reserved and used is never above the limit in any window. Tokens
//! beyond the reservation count for 60 s from the settlement, and [`settle`](TokenWindow::settle) returns their number.
//!
//! The window keeps a log of used tokens and only the sum of what is reserved: the caller holds each reservation's
//! [`Stamp`].

use std::collections::VecDeque;

use crate::policy::limit::{KeyWindow, WINDOW};
use crate::time::Nanos;

/// The longest time that one log entry covers. Used tokens expire with the newest of their entry, at most 15 ms late,
/// and a log has at most about 8,200 entries.
const GRANULE: Nanos = WINDOW / 4_096;

/// The state of a window for one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TokenDecision {
    /// The limit, in tokens a minute.
    pub limit: u64,
    /// Number of tokens that are neither used nor reserved now.
    pub remaining: u64,
    /// Time until all tokens of the window are free again, if each open reservation were settled now; 0 if all are
    /// free.
    pub reset: Nanos,
    /// Time until the request may fit: 0 if it fits now. Before that time it does not fit whatever the open
    /// reservations use. `None` if only open reservations are in the way, because nothing says when they are settled.
    pub opens_in: Option<Nanos>,
}

/// An open reservation. It must go back to its window, to be [settled](TokenWindow::settle) or
/// [refunded](TokenWindow::refund).
#[derive(Debug)]
#[must_use = "a stamp that is dropped leaks its reservation"]
pub(crate) struct Stamp {
    at: Nanos,
    tokens: u64,
}

impl Stamp {
    /// The tokens that are reserved.
    pub(crate) fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Moves the reservation to the time `at`, unless it is stamped later already.
    pub(crate) fn restamp(&mut self, at: Nanos) {
        self.at = self.at.max(at);
    }
}

/// The tokens of the last [`WINDOW`], used and reserved.
#[derive(Debug, Default)]
pub(crate) struct TokenWindow {
    /// Newest last, disjoint. `used` is the sum of all `tokens`.
    log: VecDeque<Used>,
    used: u64,
    /// The sum of all open reservations.
    reserved: u64,
    /// When the newest reservation was made.
    newest: Nanos,
    /// The latest time that the window has seen.
    latest: Nanos,
}

/// A log entry: `tokens` that count from times between `first` and `last`.
#[derive(Debug)]
struct Used {
    first: Nanos,
    last: Nanos,
    tokens: u64,
}

impl TokenWindow {
    /// Reserves `amount` tokens at `now` under `limit` (at least 1). An `amount` above the limit reserves the whole
    /// limit, so that it fits into an empty window; a reservation has at least one token. A refused request reserves
    /// nothing.
    ///
    /// `now` may be a little before that of an earlier call, because threads read their clocks before they take the
    /// lock. The window then counts from the later time.
    ///
    /// # Errors
    /// Returns the decision if there is no room.
    pub(crate) fn reserve(
        &mut self,
        limit: u64,
        amount: u64,
        now: Nanos,
    ) -> Result<(Stamp, TokenDecision), TokenDecision> {
        let decision = self.look(limit, amount, now);
        if decision.opens_in != Some(0) {
            return Err(decision);
        }
        let tokens = clamped(limit, amount);
        self.reserved += tokens;
        self.newest = self.latest;
        let after = TokenDecision { remaining: self.free(limit), reset: self.reset(), ..decision };
        Ok((Stamp { at: self.latest, tokens }, after))
    }

    /// Decides like [`reserve`](Self::reserve), but reserves nothing.
    pub(crate) fn look(&mut self, limit: u64, amount: u64, now: Nanos) -> TokenDecision {
        self.expire(now);
        let opens_in = self.opens_in(limit, clamped(limit, amount));
        TokenDecision { limit, remaining: self.free(limit), reset: self.reset(), opens_in }
    }

    /// Ends a reservation at `now` with the number of tokens that were `used`. Returns the overrun: the number of
    /// tokens that were used beyond the reservation.
    pub(crate) fn settle(&mut self, stamp: Stamp, used: u64, now: Nanos) -> u64 {
        self.expire(now);
        let overrun = used.saturating_sub(stamp.tokens);
        self.log(stamp.at, used - overrun);
        self.log(self.latest, overrun);
        self.refund(stamp);
        overrun
    }

    /// Ends a reservation of which nothing was used.
    pub(crate) fn refund(&mut self, stamp: Stamp) {
        self.reserved = self.reserved.saturating_sub(stamp.tokens);
    }

    /// Returns the number of tokens that are neither used nor reserved, as of the last call with a time.
    pub(crate) fn free(&self, limit: u64) -> u64 {
        limit.saturating_sub(self.used.saturating_add(self.reserved))
    }

    fn reset(&self) -> Nanos {
        let newest = (self.reserved > 0).then_some(self.newest);
        let last = self.log.back().map(|entry| entry.last).max(newest);
        last.map_or(0, |last| (last + WINDOW).saturating_sub(self.latest))
    }

    /// Returns the time until `tokens` may fit.
    fn opens_in(&self, limit: u64, tokens: u64) -> Option<Nanos> {
        match self.expires_in(self.used.saturating_add(tokens).saturating_sub(limit)) {
            Some(0) if self.free(limit) < tokens => None,
            wait => wait,
        }
    }

    /// Returns the time from `now` until `tokens` (at most `limit`) fit for sure, whatever open reservations use;
    /// `None` if that depends on them.
    pub(crate) fn fits_in(&mut self, limit: u64, tokens: u64, now: Nanos) -> Option<Nanos> {
        self.expire(now);
        let taken = self.used.saturating_add(self.reserved);
        self.expires_in(taken.saturating_add(tokens).saturating_sub(limit))
    }

    /// Returns the time until so many of the used tokens have expired.
    fn expires_in(&self, mut over: u64) -> Option<Nanos> {
        if over == 0 {
            return Some(0);
        }
        for entry in &self.log {
            if entry.tokens >= over {
                return Some((entry.last + WINDOW).saturating_sub(self.latest));
            }
            over -= entry.tokens;
        }
        None
    }

    fn expire(&mut self, now: Nanos) {
        self.latest = self.latest.max(now);
        while let Some(entry) = self.log.front() {
            if entry.last + WINDOW > self.latest {
                break;
            }
            self.used = self.used.saturating_sub(entry.tokens);
            self.log.pop_front();
        }
    }

    /// Logs tokens that count from `at`, unless they have expired. Times may come in any order.
    fn log(&mut self, at: Nanos, tokens: u64) {
        if tokens == 0 || at + WINDOW <= self.latest {
            return;
        }
        self.used = self.used.saturating_add(tokens);
        let next = self.log.partition_point(|entry| entry.first <= at);
        if let Some(entry) = next.checked_sub(1).and_then(|i| self.log.get_mut(i))
            && at < entry.first + GRANULE
        {
            entry.last = entry.last.max(at);
            entry.tokens = entry.tokens.saturating_add(tokens);
            return;
        }
        match self.log.get_mut(next) {
            Some(entry) if entry.last < at + GRANULE => {
                entry.first = at;
                entry.tokens = entry.tokens.saturating_add(tokens);
            }
            _ => self.log.insert(next, Used { first: at, last: at, tokens }),
        }
    }
}

impl KeyWindow for TokenWindow {
    /// A window with an open reservation must be there when the reservation is settled.
    fn is_in_use(&self) -> bool {
        self.reserved > 0
    }
}

/// Returns the number of tokens that a request for `amount` reserves.
fn clamped(limit: u64, amount: u64) -> u64 {
    amount.min(limit).max(1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::time::{MILLI, SECOND};

    fn reserve(w: &mut TokenWindow, amount: u64, now: Nanos) -> Stamp {
        w.reserve(100, amount, now).expect("there is room").0
    }

    fn refused(w: &mut TokenWindow, amount: u64, now: Nanos) -> Option<Nanos> {
        w.reserve(100, amount, now).expect_err("there is no room").opens_in
    }

    #[test]
    fn used_tokens_count_for_a_window_from_the_reservation() {
        let mut w = TokenWindow::default();
        let stamp = reserve(&mut w, 100, SECOND);
        assert_eq!(w.settle(stamp, 60, 11 * SECOND), 0);
        let want =
            TokenDecision { limit: 100, remaining: 40, reset: 50 * SECOND, opens_in: Some(50 * SECOND) };
        assert_eq!(w.reserve(100, 41, 11 * SECOND).unwrap_err(), want);
        assert_eq!(refused(&mut w, 41, 61 * SECOND - 1), Some(1));
        let (_stamp, after) = w.reserve(100, 100, 61 * SECOND).unwrap();
        assert_eq!((after.remaining, after.reset, after.opens_in), (0, WINDOW, Some(0)));
    }

    #[test]
    fn an_open_reservation_counts_for_as_long_as_it_is_open() {
        let mut w = TokenWindow::default();
        let stamp = reserve(&mut w, 80, 0);
        assert_eq!(refused(&mut w, 21, 5 * WINDOW), None, "nothing says when the reservation ends");
        assert_eq!(w.settle(stamp, 80, 5 * WINDOW), 0);
        assert_eq!(
            w.look(100, 100, 5 * WINDOW),
            TokenDecision { limit: 100, remaining: 100, reset: 0, opens_in: Some(0) }
        );
    }

    #[test]
    fn an_overrun_counts_from_the_settlement() {
        let mut w = TokenWindow::default();
        let stamp = reserve(&mut w, 10, 0);
        assert_eq!(w.settle(stamp, 150, 30 * SECOND), 140);
        assert_eq!(w.look(100, 1, 30 * SECOND).remaining, 0);
        assert_eq!(refused(&mut w, 1, WINDOW), Some(30 * SECOND));
        let _stamp = reserve(&mut w, 100, WINDOW + 30 * SECOND);
    }

    #[test]
    fn what_is_refunded_or_not_used_is_free_at_once() {
        let mut w = TokenWindow::default();
        let stamp = reserve(&mut w, 100, 0);
        w.refund(stamp);
        let stamp = reserve(&mut w, 100, 0);
        assert_eq!(w.settle(stamp, 0, SECOND), 0);
        let _stamp = reserve(&mut w, 100, SECOND);
        assert_eq!(w.log.len(), 0);
    }

    #[test]
    fn an_amount_above_the_limit_fits_into_an_empty_window_only() {
        let mut w = TokenWindow::default();
        let small = reserve(&mut w, 0, 0);
        assert_eq!(refused(&mut w, 1_000, 0), None);
        w.refund(small);
        let stamp = reserve(&mut w, 1_000, 0);
        assert_eq!(w.settle(stamp, 1_000, SECOND), 900, "only the limit was reserved");
    }

    #[test]
    fn the_opening_time_takes_the_oldest_tokens_first() {
        let mut w = TokenWindow::default();
        for i in 0..4 {
            let stamp = reserve(&mut w, 20, i * SECOND);
            w.settle(stamp, 20, i * SECOND);
        }
        let open = reserve(&mut w, 10, 4 * SECOND);
        let fits = |w: &mut TokenWindow, amount| w.fits_in(100, amount, 5 * SECOND).map(|wait| wait / SECOND);
        for (amount, opens, sure) in [
            (11, None, Some(55)),
            (20, None, Some(55)),
            (21, Some(55), Some(55)),
            (40, Some(55), Some(56)),
            (41, Some(56), Some(56)),
            (80, Some(57), Some(58)),
            (91, Some(58), None),
        ] {
            assert_eq!(refused(&mut w, amount, 5 * SECOND), opens.map(|s| s * SECOND), "{amount}");
            assert_eq!(fits(&mut w, amount), sure, "{amount}");
        }
        assert_eq!(fits(&mut w, 10), Some(0));
        let lowered = w.look(50, 30, 5 * SECOND);
        assert_eq!((lowered.remaining, lowered.opens_in), (0, Some(57 * SECOND)));
        w.refund(open);
        assert_eq!(w.look(100, 20, 5 * SECOND).opens_in, Some(0));
    }

    #[test]
    fn reset_is_the_time_until_the_window_is_empty() {
        let mut w = TokenWindow::default();
        let first = reserve(&mut w, 10, 0);
        let second = reserve(&mut w, 10, 20 * SECOND);
        assert_eq!(w.look(100, 1, 30 * SECOND).reset, 50 * SECOND, "as if both were settled now");
        w.refund(second);
        w.settle(first, 10, 30 * SECOND);
        assert_eq!(w.look(100, 1, 30 * SECOND).reset, 30 * SECOND);
    }

    #[test]
    fn a_time_before_an_earlier_one_counts_as_the_earlier_one() {
        let mut w = TokenWindow::default();
        let stamp = reserve(&mut w, 100, 0);
        w.settle(stamp, 100, 0);
        let stamp = reserve(&mut w, 100, WINDOW);
        w.settle(stamp, 100, WINDOW - 5);
        assert_eq!(refused(&mut w, 1, WINDOW - 3), Some(WINDOW));
        assert_eq!(refused(&mut w, 1, 2 * WINDOW - 1), Some(1));
    }

    #[test]
    fn the_log_is_bounded_and_expires_late_by_a_granule_at_most() {
        let (limit, mut w) = (10_000_000, TokenWindow::default());
        // Settlements come out of order, 150 µs apart.
        let mut open = VecDeque::new();
        for i in 0..1_000_000u64 {
            let now = i * 150_000;
            let at = w.reserve(limit, 10, now).expect("there is room").0;
            if i % 3 == 0 {
                open.push_front(at)
            } else {
                open.push_back(at)
            }
            if open.len() > 50
                && let Some(stamp) = open.pop_front()
            {
                w.settle(stamp, 10, now);
            }
        }
        assert!(w.log.len() <= 2 * 4_096 + 3, "{}", w.log.len());
        assert!(w.log.iter().all(|e| e.first <= e.last && e.last - e.first < GRANULE));
        assert!(w.log.iter().zip(w.log.iter().skip(1)).all(|(a, b)| a.last < b.first));
        assert_eq!(w.log.iter().map(|e| e.tokens).sum::<u64>(), w.used);
    }

    #[test]
    fn absurd_numbers_do_not_overflow() {
        let mut w = TokenWindow::default();
        let (first, _) = w.reserve(u64::MAX, 5, 0).unwrap();
        let (second, _) = w.reserve(u64::MAX, 5, 0).unwrap();
        assert_eq!(w.settle(first, u64::MAX, 0), u64::MAX - 5);
        assert_eq!(w.settle(second, u64::MAX, 20 * MILLI), u64::MAX - 5);
        assert_eq!(w.look(u64::MAX, u64::MAX, 1).remaining, 0);
    }

    /// A reservation of the naive model.
    #[derive(Debug)]
    struct Naive {
        at: Nanos,
        reserved: u64,
        /// When it was settled, and what was used.
        end: Option<(Nanos, u64)>,
    }

    impl Naive {
        /// The tokens that count at `t`, if used tokens expire `late`.
        fn counts(&self, t: Nanos, late: Nanos) -> u64 {
            let Some((end, used)) = self.end else { return self.reserved };
            let live = |at: Nanos| u64::from(at + WINDOW + late > t);
            used.min(self.reserved) * live(self.at) + used.saturating_sub(self.reserved) * live(end)
        }
    }

    proptest! {
        #[test]
        fn agrees_with_a_list_of_all_reservations(
            limit in 1u64..200,
            steps in prop::collection::vec((0u8..8, 0u64..12_000, 0u64..5, 0u64..120, any::<prop::sample::Index>()), 1..150),
        ) {
            let mut w = TokenWindow::default();
            let (mut all, mut open) = (Vec::<Naive>::new(), Vec::<(usize, Stamp)>::new());
            let (mut clock, mut latest) = (0, 0);
            for (op, step, behind, amount, which) in steps {
                // Some steps are short, so that entries merge; some threads read their clocks early.
                clock += if op & 1 == 0 { step * MILLI } else { step * 1_000 };
                let now = clock.saturating_sub(behind * MILLI);
                latest = now.max(latest);
                let sum = |all: &[Naive], t: Nanos, late: Nanos| all.iter().map(|r| r.counts(t, late)).sum::<u64>();
                if op < 4 || open.is_empty() {
                    let reserved = amount.min(limit).max(1);
                    match w.reserve(limit, amount, now) {
                        Ok((stamp, after)) => {
                            prop_assert!(sum(&all, latest, 0) + reserved <= limit, "one too many at {}", now);
                            prop_assert_eq!((stamp.at, stamp.tokens, after.opens_in), (latest, reserved, Some(0)));
                            open.push((all.len(), stamp));
                            all.push(Naive { at: latest, reserved, end: None });
                        }
                        Err(refused) => {
                            prop_assert!(sum(&all, latest, GRANULE) + reserved > limit, "refused at {}", now);
                            // What is used alone, as if all open reservations were refunded.
                            let used = |t: Nanos, late: Nanos| {
                                let ended = all.iter().filter(|r| r.end.is_some());
                                ended.map(|r| r.counts(t, late)).sum::<u64>()
                            };
                            match refused.opens_in {
                                Some(wait) => {
                                    prop_assert!(used(latest + wait, 0) + reserved <= limit, "opens too early");
                                    let before = used(latest + wait - 1, GRANULE);
                                    prop_assert!(wait > 0 && before + reserved > limit, "opens too late");
                                }
                                None => prop_assert!(used(latest, 0) + reserved <= limit),
                            }
                            match w.fits_in(limit, reserved, now) {
                                Some(wait) => {
                                    prop_assert!(sum(&all, latest + wait, 0) + reserved <= limit, "opens too early");
                                    let before = sum(&all, latest + wait - 1, GRANULE);
                                    prop_assert!(wait > 0 && before + reserved > limit, "opens too late");
                                }
                                None => prop_assert!(sum(&all, Nanos::MAX / 2, 0) + reserved > limit),
                            }
                        }
                    }
                } else {
                    let (id, stamp) = open.remove(which.index(open.len()));
                    let used = if op == 7 { 0 } else { amount };
                    if op == 7 {
                        w.refund(stamp);
                    } else {
                        prop_assert_eq!(w.settle(stamp, used, now), used.saturating_sub(all[id].reserved));
                    }
                    all[id].end = Some((latest, used));
                }
                let counted = w.used + w.reserved;
                prop_assert!(counted >= sum(&all, latest, 0), "counts too little");
                let state = w.look(limit, 1, now);
                let (least, most) = (sum(&all, latest, 0), sum(&all, latest, GRANULE));
                let counted = w.used + w.reserved;
                prop_assert!((least..=most).contains(&counted), "{} not in {}..={}", counted, least, most);
                prop_assert_eq!(state.remaining, limit.saturating_sub(counted));
                let is_empty = |t: Nanos| w.log.iter().all(|e| e.last + WINDOW <= t);
                prop_assert!(is_empty(latest + state.reset));
            }
            // Every window of 60 s: what was reserved and used within it is at most the limit. An overrun is above the
            // limit only when it is settled.
            for start in all.iter().map(|r| r.at) {
                let within = all.iter().filter(|r| (start..start + WINDOW).contains(&r.at));
                let used = within.map(|r| r.end.map_or(r.reserved, |(_, used)| used.min(r.reserved))).sum::<u64>();
                prop_assert!(used <= limit, "{} from {}", used, start);
            }
            for (_, stamp) in open.drain(..) {
                w.refund(stamp);
            }
            let end = w.look(limit, limit, latest + WINDOW + GRANULE);
            prop_assert_eq!((end.remaining, end.reset, end.opens_in, w.reserved), (limit, 0, Some(0), 0));
        }
    }
}
