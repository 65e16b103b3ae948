//! A provider's quota as the operator wrote it, and the line of those who wait for it to open.
//!
//! An exact sliding [`Window`], shared by all workers. Who waits has a ticket; a request is admitted only where the
//! window has room for it *and* for everybody before it, so that nobody is overtaken, and the time at which its turn
//! comes is known beforehand. Time and waking are the caller's.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crossbeam_utils::CachePadded;
use parking_lot::Mutex;

use crate::policy::limit::{WINDOW, Window};
use crate::time::{MILLI, Nanos};

/// How much longer one request may take to the provider than the next: so much later a place reopens, so that the
/// provider too sees no more than its quota in any window.
pub(crate) const LEEWAY: Nanos = 25 * MILLI;

/// So many requests in any [`WINDOW`].
#[derive(Debug)]
pub(crate) struct Quota {
    limit: AtomicU32,
    state: Mutex<QuotaState>,
    /// When a newcomer would be admitted, behind all that wait; kept beside the state, so that a look takes no lock.
    opens: CachePadded<AtomicU64>,
}

#[derive(Debug, Default)]
struct QuotaState {
    window: Window,
    /// Tickets of those who wait, rising.
    line: VecDeque<u64>,
    next: u64,
}

/// A place in the line, until it is [left](QuotaTicket::leave).
#[derive(Debug)]
#[must_use = "who does not leave blocks those behind"]
pub(crate) struct QuotaTicket {
    quota: Arc<Quota>,
    ticket: u64,
}

impl Quota {
    /// `limit` is at least 1.
    pub(crate) fn new(limit: u32) -> Arc<Self> {
        let limit = AtomicU32::new(limit.max(1));
        Arc::new(Quota { limit, state: Mutex::default(), opens: CachePadded::default() })
    }

    /// Changes the limit (at least 1) at `now`; what was taken before counts on.
    pub(crate) fn set_limit(&self, limit: u32, now: Nanos) {
        self.limit.store(limit.max(1), Ordering::Relaxed);
        self.change(now, |_| ());
    }

    fn limit(&self) -> u32 {
        self.limit.load(Ordering::Relaxed)
    }

    /// When a request is admitted that has this `turn`, or stands behind all that wait; not after `now`: at once.
    pub(crate) fn opens_at(&self, now: Nanos, turn: Option<&QuotaTicket>) -> Nanos {
        if !turn.is_some_and(|turn| turn.is_of(self)) {
            return self.opens.load(Ordering::Acquire);
        }
        let mut state = self.state.lock();
        let before = self.before(&state, turn);
        self.opening(&mut state, now, before)
    }

    /// Takes one request of the quota, if it is this request's turn; returns the stamp under which it is counted.
    pub(crate) fn take(&self, now: Nanos, turn: Option<&QuotaTicket>) -> Option<Nanos> {
        self.change(now, |state| {
            let free = u32::try_from(self.before(state, turn))
                .ok()
                .and_then(|before| self.limit().checked_sub(before));
            let (decision, stamp) = state.window.check_late(free.filter(|free| *free > 0)?, now, LEEWAY);
            decision.admitted.then_some(stamp)
        })
    }

    /// A request that is counted under `stamp` goes out at `now`: after a while in which it connected, or in which its
    /// worker was busy. Returns the stamp under which it is counted from now on.
    pub(crate) fn sent(&self, stamp: Nanos, now: Nanos) -> Nanos {
        self.change(now, |state| state.window.restamp(self.limit(), stamp, now + LEEWAY))
    }

    /// Stands in line at `now`.
    pub(crate) fn wait(self: &Arc<Self>, now: Nanos) -> QuotaTicket {
        let ticket = self.change(now, |state| {
            let ticket = state.next;
            state.next += 1;
            state.line.push_back(ticket);
            ticket
        });
        QuotaTicket { quota: self.clone(), ticket }
    }

    /// Those that come before a request with this `turn`: all that wait, where it is no turn of this quota.
    fn before(&self, state: &QuotaState, turn: Option<&QuotaTicket>) -> usize {
        match turn.filter(|turn| turn.is_of(self)) {
            Some(turn) => state.line.partition_point(|ticket| *ticket < turn.ticket),
            None => state.line.len(),
        }
    }

    /// Changes the state, and says anew when a newcomer would be admitted.
    fn change<T>(&self, now: Nanos, change: impl FnOnce(&mut QuotaState) -> T) -> T {
        let mut state = self.state.lock();
        let result = change(&mut state);
        let before = self.before(&state, None);
        let opens = self.opening(&mut state, now, before);
        self.opens.store(opens, Ordering::Release);
        result
    }

    /// When a request is admitted that has so many `before` it; 0 where that is now.
    fn opening(&self, state: &mut QuotaState, now: Nanos, before: usize) -> Nanos {
        let limit = self.limit();
        let (turns, rest) = (before as u64 / u64::from(limit), before as u64 % u64::from(limit));
        match state.window.opens_in(limit - rest as u32, now) {
            0 if turns == 0 => 0,
            wait => now.saturating_add(wait).saturating_add(WINDOW.saturating_mul(turns)),
        }
    }
}

impl QuotaTicket {
    /// Whether it is a turn of this quota.
    pub(crate) fn is_of(&self, quota: &Quota) -> bool {
        std::ptr::eq(&*self.quota, quota)
    }

    /// Leaves the line at `now`.
    pub(crate) fn leave(self, now: Nanos) {
        self.quota.change(now, |state| {
            if let Ok(at) = state.line.binary_search(&self.ticket) {
                state.line.remove(at);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::time::SECOND;

    /// A quota whose 3 were taken at 0, 1 and 2 s.
    fn spent() -> Arc<Quota> {
        let q = Quota::new(3);
        (0..3).for_each(|s| assert!(q.take(s * SECOND, None).is_some()));
        assert!(q.take(3 * SECOND, None).is_none());
        q
    }

    #[test]
    fn who_waits_knows_when_and_is_not_overtaken() {
        let q = spent();
        let now = 10 * SECOND;
        let turns: Vec<_> = (0..4).map(|_| q.wait(now)).collect();
        let opens: Vec<_> = turns.iter().map(|t| q.opens_at(now, Some(t)) / SECOND).collect();
        assert_eq!(opens, [60, 61, 62, 120]);
        assert_eq!(q.opens_at(now, None) / SECOND, 121, "a newcomer comes behind them");
        let first = WINDOW + LEEWAY;
        assert!(
            q.take(first, None).is_none() && q.take(first, Some(&turns[1])).is_none(),
            "the first has room, no other"
        );
        assert!(q.take(first, Some(&turns[0])).is_some());
        assert!(q.take(first, Some(&turns[0])).is_none());
    }

    #[test]
    fn who_leaves_lets_the_others_move_up() {
        let q = spent();
        let now = 10 * SECOND;
        let (first, second) = (q.wait(now), q.wait(now));
        assert_eq!(q.state.lock().line.len(), 2);
        first.leave(now);
        assert_eq!(q.opens_at(now, Some(&second)), WINDOW + LEEWAY);
        assert!(q.take(WINDOW + LEEWAY, Some(&second)).is_some());
        second.leave(WINDOW + LEEWAY);
        assert!(q.take(WINDOW + SECOND + LEEWAY, None).is_some());
        assert_eq!(q.state.lock().line.len(), 0);
    }

    #[test]
    fn a_new_limit_counts_what_was_taken_and_moves_the_line() {
        let q = spent();
        let now = 10 * SECOND;
        let turn = q.wait(now);
        q.set_limit(5, now);
        assert_eq!(q.opens_at(now, Some(&turn)), 0);
        assert!(q.take(now, Some(&turn)).is_some());
        turn.leave(now);
        assert!(q.take(now, None).is_some() && q.take(now, None).is_none(), "five in all");
        q.set_limit(1, now);
        assert_eq!(q.opens_at(now, None), now + WINDOW + LEEWAY, "the last of them must go first");
    }

    #[test]
    fn a_turn_elsewhere_is_no_turn_here() {
        let (q, other) = (spent(), spent());
        let elsewhere = other.wait(SECOND);
        let _line = q.wait(SECOND);
        assert!(q.take(WINDOW + LEEWAY, Some(&elsewhere)).is_none());
        assert!(q.take(WINDOW + SECOND + LEEWAY, Some(&elsewhere)).is_some(), "there is room for both");
    }

    proptest! {
        /// Workers whose clocks are read a moment apart, and whose requests go out up to a second after they were admitted,
        /// over fresh connections and pooled ones alike: no window of the provider has more than the quota.
        #[test]
        fn the_provider_sees_no_more_than_the_quota(
            limit in 1u32..5,
            steps in prop::collection::vec((0u64..20_000, 0u64..20, 0u64..1_000), 1..200),
        ) {
            let q = Quota::new(limit);
            let (mut now, mut waiting, mut seen) = (SECOND, Vec::<(Nanos, Nanos)>::new(), Vec::new());
            for (step, behind, busy) in steps {
                now += step * MILLI;
                waiting.sort_unstable();
                let due = waiting.iter().take_while(|(at, _)| *at <= now).count();
                for (at, stamp) in waiting.drain(..due) {
                    q.sent(stamp, at);
                    seen.push(at);
                }
                if let Some(stamp) = q.take(now - behind * MILLI, None) {
                    waiting.push((now + busy * MILLI, stamp));
                }
            }
            seen.extend(waiting.iter().map(|(at, _)| *at));
            seen.sort_unstable();
            for (i, first) in seen.iter().enumerate() {
                let within = seen[i..].iter().take_while(|at| **at < first + WINDOW).count();
                prop_assert!(within <= limit as usize, "{} from {}", within, first);
            }
        }

        /// Without a lock one sees what one would see with it: open exactly where a newcomer is admitted.
        #[test]
        fn what_is_said_of_a_newcomer_is_true(limit in 1u32..5, steps in prop::collection::vec((0u8..4, 0u64..20), 1..120)) {
            let q = Quota::new(limit);
            let (mut turns, mut now) = (Vec::new(), 0);
            for (what, step) in steps {
                now += step * SECOND;
                match what {
                    0 => turns.push(q.wait(now)),
                    1 if !turns.is_empty() => turns.remove(turns.len() / 2).leave(now),
                    2 if !turns.is_empty() => {
                        if q.take(now, Some(&turns[0])).is_some() {
                            turns.remove(0).leave(now);
                        }
                    }
                    _ => {
                        let opens = q.opens_at(now, None);
                        prop_assert_eq!(q.take(now, None).is_some(), opens <= now, "{} at {}", opens, now);
                    }
                }
            }
        }
    }

    #[test]
    fn ten_times_the_load_from_two_threads_gets_exactly_the_quota_in_every_window() {
        let q = Quota::new(30);
        let mut times: Vec<Nanos> = std::thread::scope(|s| {
            let run = |offset: u64| {
                let q = &q;
                // Five a second, each thread, for five minutes.
                move || {
                    (0..1_500)
                        .map(|i| i * 200_000_000 + offset)
                        .filter(|t| q.take(*t, None).is_some())
                        .collect()
                }
            };
            let threads = [s.spawn(run(0)), s.spawn(run(100_000_000))];
            threads.into_iter().flat_map(|t| -> Vec<Nanos> { t.join().unwrap() }).collect()
        });
        times.sort_unstable();
        // The threads' clocks run apart: by how much does not matter to the law, only that no window has more.
        for (i, t) in times.iter().enumerate() {
            let within = times[i..].iter().take_while(|other| **other < t + WINDOW).count();
            assert!(within <= 30, "{within} from {t}");
        }
        assert!(times.len() >= 30);
    }

    #[test]
    fn ten_times_the_load_in_one_order_gets_exactly_the_quota_in_every_window() {
        let q = Quota::new(30);
        let times: Vec<Nanos> =
            (0..3_000).map(|i| i * 200_000_000).filter(|t| q.take(*t, None).is_some()).collect();
        for start in (0..540).map(|s| s * SECOND) {
            let within = times.iter().filter(|t| (start..start + WINDOW).contains(*t)).count();
            // The leeway is no whole step of the load, so that a window may begin between a place and its reopening.
            assert!((29..=30).contains(&within), "{within} from {start}");
        }
        assert_eq!(times.iter().filter(|t| **t < WINDOW).count(), 30);
    }

    #[test]
    fn what_two_workers_take_at_once_counts_from_when_each_goes_out() {
        let q = Quota::new(2);
        // The second worker read its clock before the first, and takes the lock after it.
        let (first, second) = std::thread::scope(|s| {
            let first = s.spawn(|| q.take(1000, None)).join().unwrap().unwrap();
            (first, s.spawn(|| q.take(990, None)).join().unwrap().unwrap())
        });
        assert_eq!((first, second), (1000 + LEEWAY, 1000 + LEEWAY), "stamps do not go back");
        q.sent(first, 1000);
        q.sent(second, 2 * SECOND);
        assert!(q.take(WINDOW + SECOND, None).is_some(), "the first has left the window");
        assert_eq!(q.take(WINDOW + SECOND, None), None, "the second went out 59 s ago");
        assert!(q.take(WINDOW + 2 * SECOND + LEEWAY, None).is_some());
    }

    #[test]
    fn a_request_that_goes_out_again_counts_from_then() {
        let q = Quota::new(1);
        let stamp = q.take(0, None).unwrap();
        let stamp = q.sent(stamp, SECOND);
        q.sent(stamp, 3 * SECOND);
        assert_eq!(q.take(WINDOW + 2 * SECOND, None), None);
        assert!(q.take(WINDOW + 3 * SECOND + LEEWAY, None).is_some());
        // A minute later it is not known any more, and counts all the same.
        q.sent(stamp, 3 * WINDOW);
        assert_eq!(q.take(3 * WINDOW + SECOND, None), None);
    }

    #[test]
    fn what_took_a_while_to_connect_counts_from_when_it_went_out() {
        let q = Quota::new(1);
        let stamp = q.take(0, None).unwrap();
        assert_eq!(q.sent(stamp, 2 * SECOND), 2 * SECOND + LEEWAY);
        assert!(q.take(WINDOW + SECOND, None).is_none());
        assert!(q.take(WINDOW + 2 * SECOND + LEEWAY, None).is_some());
    }
}
