//! A provider's quota as the operator configured it, and the queue of requests that wait for it.
//!
//! The quota is an exact sliding [`Window`], shared by all workers. A waiting request has a [`QuotaTicket`]. A
//! request is admitted only if the window has room for it *and* for all requests ahead of it: so no request is
//! overtaken, and the time at which a request will be admitted is known in advance. Reading clocks and waking are the
//! caller's task.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crossbeam_utils::CachePadded;
use parking_lot::Mutex;

use crate::policy::limit::{WINDOW, Window};
use crate::time::{MILLI, Nanos};

/// How much longer one request may take to reach the provider than the next one. An admission expires that much
/// later, so that the provider, too, sees no more than its quota in any window.
pub(crate) const LEEWAY: Nanos = 25 * MILLI;

/// At most `limit` requests in any [`WINDOW`].
#[derive(Debug)]
pub(crate) struct Quota {
    limit: AtomicU32,
    state: Mutex<QuotaState>,
    /// When a new request would be admitted, behind all that wait. Kept outside the lock, so that reading it takes
    /// none.
    opens: CachePadded<AtomicU64>,
}

#[derive(Debug, Default)]
struct QuotaState {
    window: Window,
    /// Ticket numbers of the waiting requests, ascending.
    waiting: VecDeque<u64>,
    next_number: u64,
}

/// A place in the queue, held until the request [leaves](QuotaTicket::leave).
#[derive(Debug)]
#[must_use = "a ticket that does not leave blocks those behind it"]
pub(crate) struct QuotaTicket {
    quota: Arc<Quota>,
    number: u64,
}

impl Quota {
    /// Creates a quota of `limit` (at least 1) requests per window.
    pub(crate) fn new(limit: u32) -> Arc<Self> {
        let limit = AtomicU32::new(limit.max(1));
        Arc::new(Quota { limit, state: Mutex::default(), opens: CachePadded::default() })
    }

    /// Changes the limit (at least 1) at `now`. Requests that were taken before still count.
    pub(crate) fn set_limit(&self, limit: u32, now: Nanos) {
        self.limit.store(limit.max(1), Ordering::Relaxed);
        self.change(now, |_| ());
    }

    fn limit(&self) -> u32 {
        self.limit.load(Ordering::Relaxed)
    }

    /// Returns when a request with this `ticket` is admitted; without a ticket of this quota, the request comes
    /// behind all that wait. A time that is not after `now` means at once.
    pub(crate) fn opens_at(&self, now: Nanos, ticket: Option<&QuotaTicket>) -> Nanos {
        if !ticket.is_some_and(|ticket| ticket.is_of(self)) {
            return self.opens.load(Ordering::Acquire);
        }
        let mut state = self.state.lock();
        let ahead = self.ahead(&state, ticket);
        self.opening_time(&mut state, now, ahead)
    }

    /// Takes one request of the quota, if there is room for this request and for all ahead of it. Returns the stamp
    /// under which the request is counted.
    pub(crate) fn take(&self, now: Nanos, ticket: Option<&QuotaTicket>) -> Option<Nanos> {
        self.change(now, |state| {
            let free = u32::try_from(self.ahead(state, ticket))
                .ok()
                .and_then(|ahead| self.limit().checked_sub(ahead));
            let (decision, stamp) = state.window.check_late(free.filter(|free| *free > 0)?, now, LEEWAY);
            decision.admitted.then_some(stamp)
        })
    }

    /// Reports that the request counted under `stamp` is sent at `now`, which may be some time after it was taken: its
    /// connection was being opened, or its worker was busy. Returns the new stamp of the request.
    pub(crate) fn sent(&self, stamp: Nanos, now: Nanos) -> Nanos {
        self.change(now, |state| state.window.restamp(self.limit(), stamp, now + LEEWAY))
    }

    /// Joins the queue at `now`.
    pub(crate) fn wait(self: &Arc<Self>, now: Nanos) -> QuotaTicket {
        let number = self.change(now, |state| {
            let number = state.next_number;
            state.next_number += 1;
            state.waiting.push_back(number);
            number
        });
        QuotaTicket { quota: self.clone(), number }
    }

    /// Returns the number of requests ahead of a request with this `ticket`: all that wait, without a ticket of this
    /// quota.
    fn ahead(&self, state: &QuotaState, ticket: Option<&QuotaTicket>) -> usize {
        match ticket.filter(|ticket| ticket.is_of(self)) {
            Some(ticket) => state.waiting.partition_point(|number| *number < ticket.number),
            None => state.waiting.len(),
        }
    }

    /// Changes the state, and updates the time at which a new request would be admitted.
    fn change<T>(&self, now: Nanos, change: impl FnOnce(&mut QuotaState) -> T) -> T {
        let mut state = self.state.lock();
        let result = change(&mut state);
        let ahead = self.ahead(&state, None);
        let opens = self.opening_time(&mut state, now, ahead);
        self.opens.store(opens, Ordering::Release);
        result
    }

    /// Returns when a request with `ahead` requests ahead of it is admitted; 0 if that is now.
    fn opening_time(&self, state: &mut QuotaState, now: Nanos, ahead: usize) -> Nanos {
        let limit = self.limit();
        let (windows, rest) = (ahead as u64 / u64::from(limit), ahead as u64 % u64::from(limit));
        match state.window.opens_in(limit - rest as u32, now) {
            0 if windows == 0 => 0,
            wait => now.saturating_add(wait).saturating_add(WINDOW.saturating_mul(windows)),
        }
    }
}

impl QuotaTicket {
    /// Whether this is a ticket of `quota`.
    pub(crate) fn is_of(&self, quota: &Quota) -> bool {
        std::ptr::eq(&*self.quota, quota)
    }

    /// Leaves the queue at `now`.
    pub(crate) fn leave(self, now: Nanos) {
        self.quota.change(now, |state| {
            if let Ok(at) = state.waiting.binary_search(&self.number) {
                state.waiting.remove(at);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::time::SECOND;

    /// A quota of 3 requests, which were taken at 0, 1 and 2 s.
    fn spent() -> Arc<Quota> {
        let q = Quota::new(3);
        (0..3).for_each(|s| assert!(q.take(s * SECOND, None).is_some()));
        assert!(q.take(3 * SECOND, None).is_none());
        q
    }

    #[test]
    fn a_waiting_request_knows_its_time_and_is_not_overtaken() {
        let q = spent();
        let now = 10 * SECOND;
        let tickets: Vec<_> = (0..4).map(|_| q.wait(now)).collect();
        let opens: Vec<_> = tickets.iter().map(|t| q.opens_at(now, Some(t)) / SECOND).collect();
        assert_eq!(opens, [60, 61, 62, 120]);
        assert_eq!(q.opens_at(now, None) / SECOND, 121, "a new request comes behind them");
        let first = WINDOW + LEEWAY;
        assert!(
            q.take(first, None).is_none() && q.take(first, Some(&tickets[1])).is_none(),
            "there is room for the first ticket only"
        );
        assert!(q.take(first, Some(&tickets[0])).is_some());
        assert!(q.take(first, Some(&tickets[0])).is_none());
    }

    #[test]
    fn a_request_that_leaves_lets_the_others_move_up() {
        let q = spent();
        let now = 10 * SECOND;
        let (first, second) = (q.wait(now), q.wait(now));
        assert_eq!(q.state.lock().waiting.len(), 2);
        first.leave(now);
        assert_eq!(q.opens_at(now, Some(&second)), WINDOW + LEEWAY);
        assert!(q.take(WINDOW + LEEWAY, Some(&second)).is_some());
        second.leave(WINDOW + LEEWAY);
        assert!(q.take(WINDOW + SECOND + LEEWAY, None).is_some());
        assert_eq!(q.state.lock().waiting.len(), 0);
    }

    #[test]
    fn a_new_limit_counts_earlier_requests_and_moves_the_queue() {
        let q = spent();
        let now = 10 * SECOND;
        let ticket = q.wait(now);
        q.set_limit(5, now);
        assert_eq!(q.opens_at(now, Some(&ticket)), 0);
        assert!(q.take(now, Some(&ticket)).is_some());
        ticket.leave(now);
        assert!(q.take(now, None).is_some() && q.take(now, None).is_none(), "five in all");
        q.set_limit(1, now);
        assert_eq!(q.opens_at(now, None), now + WINDOW + LEEWAY, "the last of them must expire first");
    }

    #[test]
    fn a_ticket_of_another_quota_counts_as_none() {
        let (q, other) = (spent(), spent());
        let elsewhere = other.wait(SECOND);
        let _waiting = q.wait(SECOND);
        assert!(q.take(WINDOW + LEEWAY, Some(&elsewhere)).is_none());
        assert!(q.take(WINDOW + SECOND + LEEWAY, Some(&elsewhere)).is_some(), "there is room for both");
    }

    proptest! {
        /// No window of the provider has more than the quota, although workers read their clocks at slightly
        /// different times and send requests up to a second after they were admitted, over new and pooled
        /// connections.
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

        /// The time that is read without the lock is correct: not after now exactly if a new request is admitted.
        #[test]
        fn the_time_for_a_new_request_is_correct(limit in 1u32..5, steps in prop::collection::vec((0u8..4, 0u64..20), 1..120)) {
            let q = Quota::new(limit);
            let (mut tickets, mut now) = (Vec::new(), 0);
            for (op, step) in steps {
                now += step * SECOND;
                match op {
                    0 => tickets.push(q.wait(now)),
                    1 if !tickets.is_empty() => tickets.remove(tickets.len() / 2).leave(now),
                    2 if !tickets.is_empty() => {
                        if q.take(now, Some(&tickets[0])).is_some() {
                            tickets.remove(0).leave(now);
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
                // Five requests a second per thread, for five minutes.
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
        // The threads' clocks differ by any amount; in every case no window may have more than the quota.
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
            // A window may have one less: the leeway is not a multiple of the time between requests, so a window may
            // begin after a request and end before its admission expires.
            assert!((29..=30).contains(&within), "{within} from {start}");
        }
        assert_eq!(times.iter().filter(|t| **t < WINDOW).count(), 30);
    }

    #[test]
    fn requests_taken_at_once_by_two_workers_count_from_when_each_is_sent() {
        let q = Quota::new(2);
        // The second worker read its clock before the first, and takes the lock after it.
        let (first, second) = std::thread::scope(|s| {
            let first = s.spawn(|| q.take(1000, None)).join().unwrap().unwrap();
            (first, s.spawn(|| q.take(990, None)).join().unwrap().unwrap())
        });
        assert_eq!((first, second), (1000 + LEEWAY, 1000 + LEEWAY), "stamps do not go back");
        q.sent(first, 1000);
        q.sent(second, 2 * SECOND);
        assert!(q.take(WINDOW + SECOND, None).is_some(), "the first request has left the window");
        assert_eq!(q.take(WINDOW + SECOND, None), None, "the second request was sent 59 s ago");
        assert!(q.take(WINDOW + 2 * SECOND + LEEWAY, None).is_some());
    }

    #[test]
    fn a_request_that_is_sent_again_counts_from_then() {
        let q = Quota::new(1);
        let stamp = q.take(0, None).unwrap();
        let stamp = q.sent(stamp, SECOND);
        q.sent(stamp, 3 * SECOND);
        assert_eq!(q.take(WINDOW + 2 * SECOND, None), None);
        assert!(q.take(WINDOW + 3 * SECOND + LEEWAY, None).is_some());
        // The admission has expired by then, but the request counts again.
        q.sent(stamp, 3 * WINDOW);
        assert_eq!(q.take(3 * WINDOW + SECOND, None), None);
    }

    #[test]
    fn a_request_whose_connection_took_long_counts_from_when_it_was_sent() {
        let q = Quota::new(1);
        let stamp = q.take(0, None).unwrap();
        assert_eq!(q.sent(stamp, 2 * SECOND), 2 * SECOND + LEEWAY);
        assert!(q.take(WINDOW + SECOND, None).is_none());
        assert!(q.take(WINDOW + 2 * SECOND + LEEWAY, None).is_some());
    }
}
