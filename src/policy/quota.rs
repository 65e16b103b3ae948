//! A provider's quota as the operator configured it, and the queue of requests that wait for it.
//!
//! The quota has an exact sliding [`Window`] of requests, a [`TokenWindow`], or both, shared by all workers. A waiting
//! request has a [`QuotaTicket`]. A request is admitted only if the windows have room for it *and* for all requests
//! ahead of it: so no request is overtaken. The time at which a request will be admitted is known in advance, unless
//! open reservations of tokens are in the way: nothing says when they end. Reading clocks and waking are the caller's
//! task.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::sync::Arc;

use crossbeam_utils::CachePadded;

use crate::policy::limit::{WINDOW, Window};
use crate::policy::sync::{AtomicU64, Mutex, Ordering};
use crate::policy::token_window::{Stamp, TokenWindow};
use crate::time::{MILLI, Nanos};

/// How much longer one request may take to reach the provider than the next one. An admission expires that much
/// later, so that the provider, too, sees no more than its quota in any window.
pub(crate) const LEEWAY: Nanos = 25 * MILLI;

/// The limits of a quota, in any [`WINDOW`]; each at least 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct QuotaLimits {
    /// Most requests.
    pub requests: Option<u32>,
    /// Most tokens.
    pub tokens: Option<u64>,
}

/// At most so many requests and tokens in any [`WINDOW`].
#[derive(Debug)]
pub(crate) struct Quota {
    /// 0: no limit.
    requests: AtomicU64,
    /// 0: no limit.
    tokens: AtomicU64,
    state: Mutex<QuotaState>,
    /// When a new request would be admitted by the limit of requests, behind all that wait. Kept outside the lock, so
    /// that reading it takes none.
    opens: CachePadded<AtomicU64>,
    /// The number of tokens that a new request could reserve after the last change, behind all that wait. Time alone
    /// only makes more of them.
    free: CachePadded<AtomicU64>,
}

#[derive(Debug, Default)]
struct QuotaState {
    requests: Window,
    tokens: TokenWindow,
    /// The waiting requests, in the order of their ticket numbers.
    waiting: VecDeque<Waiting>,
    /// The sum of their tokens.
    waiting_tokens: u64,
    next_number: u64,
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    number: u64,
    tokens: u64,
}

/// The requests ahead of one request: how many, and the tokens that they will reserve, up to the limit of tokens at
/// least.
#[derive(Clone, Copy, Debug, Default)]
struct Ahead {
    requests: usize,
    tokens: u64,
}

/// A place in the queue, held until the request [leaves](QuotaTicket::leave).
#[derive(Debug)]
#[must_use = "a ticket that does not leave blocks those behind it"]
pub(crate) struct QuotaTicket {
    quota: Arc<Quota>,
    number: u64,
}

/// What a request has taken of a quota. Dropping it refunds the tokens, but not the request: the provider may have
/// received it.
#[derive(Debug)]
#[must_use = "dropping it refunds the tokens"]
pub(crate) struct QuotaHold {
    quota: Arc<Quota>,
    /// The stamp under which the request is counted; 0 without a limit of requests.
    stamp: Cell<Nanos>,
    tokens: RefCell<Option<Stamp>>,
}

impl Quota {
    /// Creates a quota; `None` if nothing is limited.
    pub(crate) fn new(limits: QuotaLimits) -> Option<Arc<Self>> {
        if limits == QuotaLimits::default() {
            return None;
        }
        let quota = Quota {
            requests: AtomicU64::new(0),
            tokens: AtomicU64::new(0),
            state: Mutex::default(),
            opens: CachePadded::new(AtomicU64::new(0)),
            free: CachePadded::new(AtomicU64::new(0)),
        };
        quota.set_limits(limits, 0);
        Some(Arc::new(quota))
    }

    /// Changes the limits at `now`. What was taken before still counts.
    pub(crate) fn set_limits(&self, limits: QuotaLimits, now: Nanos) {
        self.change(now, |_| {
            // With the lock held, so that no request sees two limits.
            self.requests.store(u64::from(limits.requests.unwrap_or(0)), Ordering::Relaxed);
            self.tokens.store(limits.tokens.unwrap_or(0), Ordering::Relaxed);
        });
    }

    fn request_limit(&self) -> Option<u32> {
        u32::try_from(self.requests.load(Ordering::Relaxed)).ok().filter(|limit| *limit > 0)
    }

    fn token_limit(&self) -> Option<u64> {
        Some(self.tokens.load(Ordering::Relaxed)).filter(|limit| *limit > 0)
    }

    /// The limit of tokens for a request for `tokens`: a request for none is not limited by them.
    fn token_limit_of(&self, tokens: u64) -> Option<u64> {
        self.token_limit().filter(|_| tokens > 0)
    }

    /// Returns when a request for `tokens` is admitted, behind all that wait; with a `ticket` of this quota, when its
    /// holder is admitted, with the tokens of the ticket. A time that is not after `now` means at once; a later one
    /// that the request is not admitted before, whatever other requests use; `None` that only what other requests
    /// reserve is in the way.
    pub(crate) fn opens_at(&self, now: Nanos, tokens: u64, ticket: Option<&QuotaTicket>) -> Option<Nanos> {
        let is_known = ticket.is_some_and(|ticket| ticket.is_of(self));
        if !is_known && tokens <= self.free.load(Ordering::Acquire) {
            return Some(self.opens.load(Ordering::Acquire));
        }
        let mut state = self.state.lock();
        let (ahead, tokens) = self.place(&state, tokens, ticket);
        self.opening_time(&mut state, now, (ahead, tokens))
    }

    /// Returns when the holder of the `ticket` is admitted for sure, whatever other requests use; `None` if that
    /// depends on them.
    pub(crate) fn opens_for_sure(&self, now: Nanos, ticket: &QuotaTicket) -> Option<Nanos> {
        let mut state = self.state.lock();
        let (ahead, own) = self.place(&state, 0, Some(ticket));
        let limit = self.token_limit_of(own)?;
        let needed = ahead.tokens.saturating_add(own.min(limit));
        let wait = state.tokens.fits_in(limit, needed, now).filter(|_| needed <= limit)?;
        Some(self.opens_for_requests(&mut state, now, ahead.requests).max(now.saturating_add(wait)))
    }

    /// Takes one request and `tokens` of the quota, if there is room for this request and for all ahead of it. The
    /// holder of a `ticket` takes the tokens of the ticket, and leaves the queue. A request for more tokens than the
    /// limit takes the whole limit, so that it fits into an empty window.
    pub(crate) fn take(
        self: &Arc<Self>,
        now: Nanos,
        tokens: u64,
        ticket: Option<&QuotaTicket>,
    ) -> Option<QuotaHold> {
        let (stamp, tokens) = self.change(now, |state| {
            let (ahead, tokens) = self.place(state, tokens, ticket);
            let limit = self.token_limit_of(tokens);
            let has_room = limit.is_none_or(|limit| {
                let needed = ahead.tokens.saturating_add(tokens.min(limit));
                state.tokens.look(limit, tokens, now).remaining >= needed
            });
            if !has_room {
                return None;
            }
            let stamp = match self.request_limit() {
                Some(limit) => {
                    let free = u32::try_from(ahead.requests).ok().and_then(|ahead| limit.checked_sub(ahead));
                    let (decision, stamp) =
                        state.requests.check_late(free.filter(|free| *free > 0)?, now, LEEWAY);
                    decision.admitted.then_some(stamp)?
                }
                None => 0,
            };
            let reserved = limit.map(|limit| state.tokens.reserve(limit, tokens, now));
            if let Some(ticket) = ticket.filter(|ticket| ticket.is_of(self)) {
                state.remove(ticket.number);
            }
            Some((stamp, reserved.and_then(Result::ok).map(|(stamp, _)| stamp)))
        })?;
        let hold = QuotaHold { quota: self.clone(), stamp: Cell::new(stamp), tokens: RefCell::new(tokens) };
        hold.stamp_tokens(now);
        Some(hold)
    }

    /// Joins the queue at `now` with a request for `tokens`.
    pub(crate) fn wait(self: &Arc<Self>, now: Nanos, tokens: u64) -> QuotaTicket {
        let tokens = self.token_limit().map_or(0, |limit| tokens.min(limit));
        let number = self.change(now, |state| {
            let number = state.next_number;
            state.next_number += 1;
            state.waiting.push_back(Waiting { number, tokens });
            state.waiting_tokens = state.waiting_tokens.saturating_add(tokens);
            number
        });
        QuotaTicket { quota: self.clone(), number }
    }

    /// The limit of tokens and the number of tokens that are neither used nor reserved at `now`; `None` without a
    /// limit.
    pub(crate) fn tokens_left(&self, now: Nanos) -> Option<(u64, u64)> {
        let limit = self.token_limit()?;
        Some((limit, self.state.lock().tokens.look(limit, 1, now).remaining))
    }

    /// Returns what is ahead of a request for `tokens`, and the tokens of the request: those of its ticket, if it has
    /// one of this quota. Without a ticket, all that wait are ahead.
    fn place(&self, state: &QuotaState, tokens: u64, ticket: Option<&QuotaTicket>) -> (Ahead, u64) {
        let at = ticket.filter(|ticket| ticket.is_of(self)).and_then(|ticket| state.find(ticket.number));
        match at {
            Some(at) => {
                let limit = self.token_limit().unwrap_or(0);
                (Ahead { requests: at, tokens: state.tokens_before(at, limit) }, state.waiting[at].tokens)
            }
            None => (Ahead { requests: state.waiting.len(), tokens: state.waiting_tokens }, tokens),
        }
    }

    /// Changes the state, and updates what a new request would find.
    fn change<T>(&self, now: Nanos, change: impl FnOnce(&mut QuotaState) -> T) -> T {
        let mut state = self.state.lock();
        let result = change(&mut state);
        let waiting = state.waiting.len();
        self.opens.store(self.opens_for_requests(&mut state, now, waiting), Ordering::Release);
        self.publish_free(&state);
        result
    }

    fn publish_free(&self, state: &QuotaState) {
        let free = |limit| state.tokens.free(limit).saturating_sub(state.waiting_tokens);
        self.free.store(self.token_limit().map_or(u64::MAX, free), Ordering::Release);
    }

    /// Ends a reservation of which nothing was used. That needs no time: it only makes room.
    fn refund(&self, stamp: Stamp) {
        let mut state = self.state.lock();
        state.tokens.refund(stamp);
        self.publish_free(&state);
    }

    /// Takes one request of the quota, behind all that wait. Returns its stamp.
    fn take_request(&self, now: Nanos) -> Option<Nanos> {
        let Some(limit) = self.request_limit() else { return Some(0) };
        self.change(now, |state| {
            let ahead = u32::try_from(state.waiting.len()).ok()?;
            let free = limit.checked_sub(ahead).filter(|free| *free > 0)?;
            let (decision, stamp) = state.requests.check_late(free, now, LEEWAY);
            decision.admitted.then_some(stamp)
        })
    }

    /// Returns when a request for `tokens` is admitted that has these ahead; 0 if that is now, `None` if only what
    /// other requests reserve, or will reserve, is in the way.
    fn opening_time(
        &self,
        state: &mut QuotaState,
        now: Nanos,
        (ahead, tokens): (Ahead, u64),
    ) -> Option<Nanos> {
        let by_requests = self.opens_for_requests(state, now, ahead.requests);
        let Some(limit) = self.token_limit_of(tokens) else { return Some(by_requests) };
        let own = tokens.min(limit);
        let decision = state.tokens.look(limit, own, now);
        match decision.opens_in? {
            0 if decision.remaining >= ahead.tokens.saturating_add(own) => Some(by_requests),
            0 => None,
            wait => Some(by_requests.max(now.saturating_add(wait))),
        }
    }

    /// Returns when a request with so many ahead is admitted by the limit of requests; 0 if that is now.
    fn opens_for_requests(&self, state: &mut QuotaState, now: Nanos, ahead: usize) -> Nanos {
        let Some(limit) = self.request_limit() else { return 0 };
        let (windows, rest) = (ahead as u64 / u64::from(limit), ahead as u64 % u64::from(limit));
        match state.requests.opens_in(limit - rest as u32, now) {
            0 if windows == 0 => 0,
            wait => now.saturating_add(wait).saturating_add(WINDOW.saturating_mul(windows)),
        }
    }
}

impl QuotaState {
    fn find(&self, number: u64) -> Option<usize> {
        self.waiting.binary_search_by_key(&number, |waiting| waiting.number).ok()
    }

    /// The sum of the tokens of the first `count` waiting requests; more than `most` is not counted to its end.
    fn tokens_before(&self, count: usize, most: u64) -> u64 {
        let mut sum = 0u64;
        for waiting in self.waiting.iter().take(count) {
            sum = sum.saturating_add(waiting.tokens);
            if sum >= most {
                break;
            }
        }
        sum
    }

    /// Gives a waiting request its place back.
    fn put_back(&mut self, waiting: Waiting) {
        if let Err(at) = self.waiting.binary_search_by_key(&waiting.number, |other| other.number) {
            self.waiting.insert(at, waiting);
            self.waiting_tokens = self.waiting_tokens.saturating_add(waiting.tokens);
        }
    }

    fn remove(&mut self, number: u64) {
        let waiting = self.find(number).and_then(|at| self.waiting.remove(at));
        self.waiting_tokens = self.waiting_tokens.saturating_sub(waiting.map_or(0, |w| w.tokens));
    }
}

impl QuotaTicket {
    /// Whether this is a ticket of `quota`.
    pub(crate) fn is_of(&self, quota: &Quota) -> bool {
        std::ptr::eq(&*self.quota, quota)
    }

    /// Leaves the queue at `now`, unless its holder was admitted.
    pub(crate) fn leave(self, now: Nanos) {
        self.quota.change(now, |state| state.remove(self.number));
    }

    /// As [`Quota::opens_at`], for the holder.
    pub(crate) fn opens_at(&self, now: Nanos) -> Option<Nanos> {
        self.quota.opens_at(now, 0, Some(self))
    }

    /// As [`Quota::opens_for_sure`], for the holder.
    pub(crate) fn opens_for_sure(&self, now: Nanos) -> Option<Nanos> {
        self.quota.opens_for_sure(now, self)
    }

    /// Changes the tokens that the holder will take. It keeps its place. Returns whether the requests behind it have
    /// fewer tokens ahead than before.
    pub(crate) fn set_tokens(&self, tokens: u64, now: Nanos) -> bool {
        let Some(limit) = self.quota.token_limit() else { return false };
        let tokens = tokens.min(limit);
        self.quota.change(now, |state| {
            let Some(at) = state.find(self.number) else { return false };
            let before = std::mem::replace(&mut state.waiting[at].tokens, tokens);
            state.waiting_tokens = state.waiting_tokens.saturating_sub(before).saturating_add(tokens);
            tokens < before
        })
    }
}

impl QuotaHold {
    /// Reports that the request is sent at `now`, which may be some time after the quota admitted it: its connection
    /// was being opened, or its worker was busy. The provider counts the request and its tokens from now on.
    pub(crate) fn sent(&self, now: Nanos) {
        if let Some(limit) = self.quota.request_limit() {
            let stamp = self.stamp.get();
            self.stamp
                .set(self.quota.change(now, |state| state.requests.restamp(limit, stamp, now + LEEWAY)));
        }
        self.stamp_tokens(now);
    }

    /// The provider may see the tokens a little later than Zap sends the request.
    fn stamp_tokens(&self, now: Nanos) {
        if let Some(stamp) = &mut *self.tokens.borrow_mut() {
            stamp.restamp(now + LEEWAY);
        }
    }

    /// Gives back the request and the tokens at `now`: the provider was sent nothing. The holder of the `ticket` gets
    /// its place in the queue back.
    pub(crate) fn cancel(self, now: Nanos, ticket: Option<&QuotaTicket>) {
        let (stamp, tokens) = (self.stamp.get(), self.tokens.take());
        self.quota.change(now, |state| {
            if stamp > 0 {
                state.requests.refund(stamp);
            }
            if let Some(ticket) = ticket.filter(|ticket| ticket.is_of(&self.quota)) {
                let tokens = tokens.as_ref().map_or(0, Stamp::tokens);
                state.put_back(Waiting { number: ticket.number, tokens });
            }
            if let Some(stamp) = tokens {
                state.tokens.refund(stamp);
            }
        });
    }

    /// Takes another request at `now`, for a second request that the provider gets on behalf of this one. Returns
    /// `false` if there is none.
    pub(crate) fn take_again(&self, now: Nanos) -> bool {
        let Some(again) = self.quota.take_request(now) else { return false };
        self.stamp.set(again);
        true
    }

    /// Ends the reservation of tokens at `now` with the number of tokens that were `used`. Returns the tokens that were
    /// used beyond the reservation.
    pub(crate) fn settle(&self, used: u64, now: Nanos) -> u64 {
        let stamp = self.tokens.take();
        stamp.map_or(0, |stamp| self.quota.change(now, |state| state.tokens.settle(stamp, used, now)))
    }

    /// Whether tokens are reserved.
    pub(crate) fn has_tokens(&self) -> bool {
        self.tokens.borrow().is_some()
    }
}

impl Drop for QuotaHold {
    fn drop(&mut self) {
        if let Some(stamp) = self.tokens.take() {
            self.quota.refund(stamp);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::time::SECOND;

    fn requests(limit: u32) -> Arc<Quota> {
        Quota::new(QuotaLimits { requests: Some(limit), tokens: None }).expect("it has a limit")
    }

    /// When a request without tokens is admitted.
    fn opens(quota: &Quota, now: Nanos, ticket: Option<&QuotaTicket>) -> Nanos {
        quota.opens_at(now, 0, ticket).expect("no tokens are reserved")
    }

    /// A quota of 3 requests, which were taken at 0, 1 and 2 s.
    fn spent() -> Arc<Quota> {
        let q = requests(3);
        (0..3).for_each(|s| assert!(q.take(s * SECOND, 0, None).is_some()));
        assert!(q.take(3 * SECOND, 0, None).is_none());
        q
    }

    #[test]
    fn a_waiting_request_knows_its_time_and_is_not_overtaken() {
        let q = spent();
        let now = 10 * SECOND;
        let tickets: Vec<_> = (0..4).map(|_| q.wait(now, 0)).collect();
        let times: Vec<_> = tickets.iter().map(|t| opens(&q, now, Some(t)) / SECOND).collect();
        assert_eq!(times, [60, 61, 62, 120]);
        assert_eq!(opens(&q, now, None) / SECOND, 121, "a new request comes behind them");
        let first = WINDOW + LEEWAY;
        assert!(
            q.take(first, 0, None).is_none() && q.take(first, 0, Some(&tickets[1])).is_none(),
            "there is room for the first ticket only"
        );
        assert!(q.take(first, 0, Some(&tickets[0])).is_some());
        assert!(q.take(first, 0, Some(&tickets[0])).is_none());
    }

    #[test]
    fn a_request_that_leaves_lets_the_others_move_up() {
        let q = spent();
        let now = 10 * SECOND;
        let (first, second) = (q.wait(now, 0), q.wait(now, 0));
        assert_eq!(q.state.lock().waiting.len(), 2);
        first.leave(now);
        assert_eq!(opens(&q, now, Some(&second)), WINDOW + LEEWAY);
        assert!(q.take(WINDOW + LEEWAY, 0, Some(&second)).is_some());
        second.leave(WINDOW + LEEWAY);
        assert!(q.take(WINDOW + SECOND + LEEWAY, 0, None).is_some());
        assert_eq!(q.state.lock().waiting.len(), 0);
    }

    #[test]
    fn a_request_that_gives_its_admission_back_keeps_its_place() {
        let q = Quota::new(QuotaLimits { requests: Some(2), tokens: Some(100) }).expect("it has limits");
        let (first, second) = (q.wait(0, 60), q.wait(0, 60));
        let taken = |ticket| q.take(SECOND, 0, Some(ticket));
        taken(&first).unwrap().cancel(SECOND, Some(&first));
        assert!(taken(&second).is_none(), "it is not overtaken");
        let held = taken(&first).unwrap();
        assert_eq!(q.state.lock().waiting_tokens, 60, "the second waits");
        held.cancel(SECOND, None);
        assert!(taken(&second).is_some(), "the first has left");
    }

    #[test]
    fn fewer_tokens_of_one_let_those_behind_move_up() {
        let q = Quota::new(QuotaLimits { requests: None, tokens: Some(100) }).expect("it has limits");
        let (first, second) = (q.wait(0, 60), q.wait(0, 60));
        assert!(q.take(0, 0, Some(&second)).is_none() && !first.set_tokens(60, 0));
        assert!(first.set_tokens(40, 0), "the second must look again");
        assert!(q.take(0, 0, Some(&second)).is_some());
    }

    #[test]
    fn a_request_for_no_tokens_is_limited_by_requests_alone() {
        let q = Quota::new(QuotaLimits { requests: Some(3), tokens: Some(100) }).expect("it has limits");
        let all = q.take(0, 100, None).unwrap();
        assert!(q.take(0, 1, None).is_none());
        assert_eq!((q.opens_at(0, 1, None), q.opens_at(0, 0, None)), (None, Some(0)));
        assert!(q.take(0, 0, None).is_some_and(|hold| !hold.has_tokens()));
        let ticket = q.wait(0, 0);
        assert!(q.take(0, 0, Some(&ticket)).is_some() && q.take(0, 0, None).is_none(), "three requests");
        drop(all);
    }

    #[test]
    fn a_new_limit_counts_earlier_requests_and_moves_the_queue() {
        let q = spent();
        let now = 10 * SECOND;
        let ticket = q.wait(now, 0);
        q.set_limits(QuotaLimits { requests: Some(5), tokens: None }, now);
        assert_eq!(opens(&q, now, Some(&ticket)), 0);
        assert!(q.take(now, 0, Some(&ticket)).is_some());
        ticket.leave(now);
        assert!(q.take(now, 0, None).is_some() && q.take(now, 0, None).is_none(), "five in all");
        q.set_limits(QuotaLimits { requests: Some(1), tokens: None }, now);
        assert_eq!(opens(&q, now, None), now + WINDOW + LEEWAY, "the last of them must expire first");
    }

    #[test]
    fn a_ticket_of_another_quota_counts_as_none() {
        let (q, other) = (spent(), spent());
        let elsewhere = other.wait(SECOND, 0);
        let _waiting = q.wait(SECOND, 0);
        assert!(q.take(WINDOW + LEEWAY, 0, Some(&elsewhere)).is_none());
        assert!(q.take(WINDOW + SECOND + LEEWAY, 0, Some(&elsewhere)).is_some(), "there is room for both");
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
            let q = requests(limit);
            let (mut now, mut waiting, mut seen) = (SECOND, Vec::<(Nanos, QuotaHold)>::new(), Vec::new());
            for (step, behind, busy) in steps {
                now += step * MILLI;
                waiting.sort_unstable_by_key(|(at, _)| *at);
                let due = waiting.iter().take_while(|(at, _)| *at <= now).count();
                for (at, hold) in waiting.drain(..due) {
                    hold.sent(at);
                    seen.push(at);
                }
                if let Some(hold) = q.take(now - behind * MILLI, 0, None) {
                    waiting.push((now + busy * MILLI, hold));
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
            let q = requests(limit);
            let (mut tickets, mut now) = (Vec::new(), 0);
            for (op, step) in steps {
                now += step * SECOND;
                match op {
                    0 => tickets.push(q.wait(now, 0)),
                    1 if !tickets.is_empty() => tickets.remove(tickets.len() / 2).leave(now),
                    2 if !tickets.is_empty() => {
                        if q.take(now, 0, Some(&tickets[0])).is_some() {
                            tickets.remove(0).leave(now);
                        }
                    }
                    _ => {
                        let at = opens(&q, now, None);
                        prop_assert_eq!(q.take(now, 0, None).is_some(), at <= now, "{} at {}", at, now);
                    }
                }
            }
        }
    }

    #[test]
    fn ten_times_the_load_from_two_threads_gets_exactly_the_quota_in_every_window() {
        let q = requests(30);
        let mut times: Vec<Nanos> = std::thread::scope(|s| {
            let run = |offset: u64| {
                let q = &q;
                // Five requests a second per thread, for five minutes.
                move || {
                    (0..1_500)
                        .map(|i| i * 200_000_000 + offset)
                        .filter(|t| q.take(*t, 0, None).is_some())
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
        let q = requests(30);
        let times: Vec<Nanos> =
            (0..3_000).map(|i| i * 200_000_000).filter(|t| q.take(*t, 0, None).is_some()).collect();
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
        let q = requests(2);
        // The second worker read its clock before the first, and takes the lock after it.
        let (first, second) = std::thread::scope(|s| {
            let first = s.spawn(|| q.take(1000, 0, None)).join().unwrap().unwrap();
            (first, s.spawn(|| q.take(990, 0, None)).join().unwrap().unwrap())
        });
        let stamps = (first.stamp.get(), second.stamp.get());
        assert_eq!(stamps, (1000 + LEEWAY, 1000 + LEEWAY), "stamps do not go back");
        first.sent(1000);
        second.sent(2 * SECOND);
        assert!(q.take(WINDOW + SECOND, 0, None).is_some(), "the first request has left the window");
        assert!(q.take(WINDOW + SECOND, 0, None).is_none(), "the second request was sent 59 s ago");
        assert!(q.take(WINDOW + 2 * SECOND + LEEWAY, 0, None).is_some());
    }

    #[test]
    fn a_request_that_is_sent_again_counts_from_then() {
        let q = requests(1);
        let hold = q.take(0, 0, None).unwrap();
        hold.sent(SECOND);
        hold.sent(3 * SECOND);
        assert!(q.take(WINDOW + 2 * SECOND, 0, None).is_none());
        assert!(q.take(WINDOW + 3 * SECOND + LEEWAY, 0, None).is_some());
        // The admission has expired by then, but the request counts again.
        hold.sent(3 * WINDOW);
        assert!(q.take(3 * WINDOW + SECOND, 0, None).is_none());
    }

    #[test]
    fn a_request_whose_connection_took_long_counts_from_when_it_was_sent() {
        let q = requests(1);
        let hold = q.take(0, 0, None).unwrap();
        hold.sent(2 * SECOND);
        assert_eq!(hold.stamp.get(), 2 * SECOND + LEEWAY);
        assert!(q.take(WINDOW + SECOND, 0, None).is_none());
        assert!(q.take(WINDOW + 2 * SECOND + LEEWAY, 0, None).is_some());
    }

    fn tokens(limit: u64) -> Arc<Quota> {
        Quota::new(QuotaLimits { requests: None, tokens: Some(limit) }).expect("it has a limit")
    }

    #[test]
    fn a_quota_says_when_there_is_room_for_tokens() {
        let q = tokens(100);
        let first = q.take(0, 60, None).unwrap();
        let second = q.take(SECOND, 30, None).unwrap();
        assert!(q.take(SECOND, 11, None).is_none());
        assert_eq!((q.opens_at(SECOND, 10, None), q.opens_at(SECOND, 11, None)), (Some(0), None));
        first.settle(60, 2 * SECOND);
        assert_eq!(q.opens_at(2 * SECOND, 40, None), None, "the second reservation is still open");
        assert_eq!(q.opens_at(2 * SECOND, 41, None), Some(WINDOW + LEEWAY), "whatever it uses");
        drop(second);
        assert_eq!(q.opens_at(2 * SECOND, 1_000, None), Some(WINDOW + LEEWAY), "as much as the limit");
        assert_eq!(q.tokens_left(2 * SECOND), Some((100, 40)));
        assert!(q.take(WINDOW + LEEWAY, 1_000, None).is_some());
    }

    #[test]
    fn tokens_count_from_when_the_request_is_sent() {
        let q = tokens(100);
        let hold = q.take(0, 100, None).unwrap();
        hold.sent(3 * SECOND);
        hold.sent(2 * SECOND);
        hold.settle(100, 10 * SECOND);
        assert!(!hold.has_tokens());
        assert_eq!(q.opens_at(10 * SECOND, 1, None), Some(WINDOW + 3 * SECOND + LEEWAY));
    }

    #[test]
    fn a_dropped_hold_is_refunded_even_by_a_panic() {
        let q = tokens(100);
        drop(q.take(0, 100, None).unwrap());
        let theirs = q.clone();
        let thread = std::thread::Builder::new().spawn(move || {
            let _held = theirs.take(0, 100, None).unwrap();
            panic!("expected by the test");
        });
        assert!(thread.unwrap().join().is_err());
        assert_eq!(q.opens_at(7, 100, None), Some(0));
        assert_eq!(Arc::strong_count(&q), 1);
    }

    #[test]
    fn a_new_limit_of_tokens_counts_earlier_ones() {
        let q = tokens(100);
        let set = |tokens| q.set_limits(QuotaLimits { requests: None, tokens }, SECOND);
        let held = q.take(0, 80, None).unwrap();
        set(Some(50));
        assert_eq!(q.opens_at(0, 1, None), None);
        held.settle(80, SECOND);
        assert_eq!(q.opens_at(SECOND, 1, None), Some(WINDOW + LEEWAY));
        set(Some(200));
        assert_eq!(
            (q.opens_at(SECOND, 120, None), q.opens_at(SECOND, 121, None)),
            (Some(0), Some(WINDOW + LEEWAY))
        );
        set(None);
        assert_eq!((q.opens_at(SECOND, 500, None), q.tokens_left(SECOND)), (Some(0), None));
        assert!(!q.take(SECOND, 500, None).unwrap().has_tokens());
    }

    #[test]
    fn a_large_request_that_waits_is_not_overtaken_by_small_ones() {
        let q = tokens(100);
        let held = [40, 40, 20].map(|n| q.take(0, n, None).unwrap());
        let (large, small) = (q.wait(SECOND, 70), q.wait(SECOND, 20));
        let [first, second, third] = held;
        drop(first);
        assert!(q.take(SECOND, 10, None).is_none(), "a new request comes behind both");
        assert!(q.take(SECOND, 20, Some(&small)).is_none() && q.take(SECOND, 70, Some(&large)).is_none());
        assert_eq!(
            (q.opens_at(SECOND, 70, Some(&large)), q.opens_at(SECOND, 20, Some(&small))),
            (None, None)
        );
        drop(second);
        assert_eq!(q.opens_at(SECOND, 70, Some(&large)), Some(0));
        assert!(q.take(SECOND, 20, Some(&small)).is_none(), "80 tokens are free, and 70 come first");
        let large_held = q.take(SECOND, 70, Some(&large)).unwrap();
        large.leave(SECOND);
        third.settle(10, 2 * SECOND);
        let small_held = q.take(SECOND, 20, Some(&small)).unwrap();
        small.leave(SECOND);
        large_held.settle(70, 2 * SECOND);
        small_held.settle(20, 2 * SECOND);
        assert!(q.take(2 * SECOND, 1, None).is_none());
        let behind = (q.wait(3 * SECOND, 100), q.wait(3 * SECOND, 100));
        assert_eq!(q.opens_at(3 * SECOND, 100, Some(&behind.0)), Some(WINDOW + 2 * SECOND));
        let opens = q.opens_at(3 * SECOND, 100, Some(&behind.1));
        assert_eq!(opens, Some(WINDOW + 2 * SECOND), "not before: the one before it may use nothing");
        assert_eq!(q.opens_for_sure(3 * SECOND, &behind.0), Some(WINDOW + 2 * SECOND));
        assert_eq!(q.opens_for_sure(3 * SECOND, &behind.1), None);
        behind.0.leave(0);
        behind.1.leave(0);
    }

    #[test]
    fn a_ticket_has_the_tokens_of_its_holder_whatever_the_look_says() {
        let q = tokens(100);
        let held = q.take(0, 60, None).unwrap();
        let (first, second) = (q.wait(SECOND, 70), q.wait(SECOND, 10));
        assert!(q.take(SECOND, 10, Some(&first)).is_none(), "its ticket says 70");
        assert_eq!(q.opens_at(SECOND, 10, Some(&first)), None);
        first.set_tokens(30, SECOND);
        assert_eq!(
            (q.opens_at(SECOND, 70, Some(&first)), q.opens_at(SECOND, 0, Some(&second))),
            (Some(0), Some(0))
        );
        assert_eq!(q.opens_at(SECOND, 1, None), None, "both come first");
        let admitted = q.take(SECOND, 0, Some(&first)).unwrap();
        assert_eq!(q.state.lock().waiting_tokens, 10, "its holder has left the queue");
        first.leave(SECOND);
        assert!(q.take(SECOND, 0, Some(&second)).is_some());
        drop((held, admitted));
        second.leave(SECOND);
        assert_eq!(q.state.lock().waiting_tokens, 0);
        assert_eq!(q.tokens_left(SECOND), Some((100, 100)));
    }

    #[test]
    fn both_limits_hold_and_a_refused_request_takes_nothing() {
        let q = Quota::new(QuotaLimits { requests: Some(2), tokens: Some(100) }).unwrap();
        let first = q.take(0, 90, None).unwrap();
        assert!(q.take(0, 20, None).is_none());
        let second = q.take(0, 10, None).unwrap();
        assert!(q.take(0, 0, None).is_none());
        first.settle(0, SECOND);
        assert_eq!(
            (q.opens_at(SECOND, 90, None), q.opens_at(SECOND, 91, None)),
            (Some(WINDOW + LEEWAY), None)
        );
        assert!(!first.take_again(SECOND), "no request is left");
        drop(second);
        assert_eq!(q.tokens_left(SECOND), Some((100, 100)));
    }

    #[test]
    fn many_threads_reserve_exactly_the_limit_together() {
        let q = tokens(1_500);
        let taken: usize = std::thread::scope(|s| {
            let run = |t: u64| {
                let q = &q;
                move || {
                    let mine: Vec<_> = (0..2_000).filter_map(|i| q.take(t + i, 1, None)).collect();
                    mine.iter().for_each(|hold| assert_eq!(hold.settle(1, 5_000), 0));
                    mine.len()
                }
            };
            let threads: Vec<_> = (0..4).map(|t| s.spawn(run(t))).collect();
            threads.into_iter().map(|t| t.join().unwrap()).sum()
        });
        assert_eq!((taken, q.tokens_left(6_000)), (1_500, Some((1_500, 0))));
    }

    proptest! {
        /// The time that is read without the lock is correct: not after now exactly if the tokens can be reserved.
        #[test]
        fn the_time_for_tokens_is_correct(
            limit in 1u64..50,
            steps in prop::collection::vec((0u8..7, 0u64..20_000, 0u64..60), 1..120),
        ) {
            let q = tokens(limit);
            let (mut held, mut now, mut tickets) = (Vec::new(), 0, Vec::new());
            for (op, step, amount) in steps {
                now += step * MILLI;
                match op {
                    0 if !held.is_empty() => drop(held.remove(held.len() / 2)),
                    1 | 2 if !held.is_empty() => {
                        let hold: QuotaHold = held.remove(0);
                        hold.settle(amount, now);
                    }
                    3 => tickets.push(q.wait(now, amount)),
                    4 if !tickets.is_empty() => tickets.remove(0).leave(now),
                    _ => {
                        let opens = q.opens_at(now, amount, None);
                        let hold = q.take(now, amount, None);
                        prop_assert_eq!(hold.is_some(), opens.is_some_and(|at| at <= now), "{:?} at {}", opens, now);
                        held.extend(hold);
                    }
                }
            }
            held.clear();
            tickets.into_iter().for_each(|ticket| ticket.leave(now));
            prop_assert!(q.take(now + 2 * WINDOW, limit, None).is_some(), "nothing is leaked");
        }
    }
}
