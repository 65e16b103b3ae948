//! A request at a backend, and a request that waits for the backend's quota. Dropping either releases what it holds.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use crate::clock;
use crate::policy::choose::Closed;
use crate::policy::pair::Entry;
use crate::policy::queue::Permit;
use crate::policy::quota::{Quota, QuotaHold, QuotaTicket};
use crate::policy::ratio::{Demand, Output};
use crate::policy::route::Target;
use crate::policy::spend::SpendReservation;
use crate::protocol::usage::Usage;
use crate::time::{Day, Nanos};
use crate::upstream::{BackendState, Upstream};

/// A request that a backend may get.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidate<'a> {
    /// The target, and the model that the client asks for; `None`: a request for no model in particular.
    pub target: Option<(&'a Target, Option<&'a str>)>,
    /// What the request may use.
    pub demand: &'a Demand,
    /// The time.
    pub now: Nanos,
    /// The place of the request in the queue of the backend's quota.
    pub ticket: Option<&'a QuotaTicket>,
}

impl Candidate<'_> {
    /// The key of the model that the backend would be sent.
    pub(crate) fn key(&self) -> u64 {
        self.target.map_or(0, |(target, asked)| target.key(asked))
    }

    /// The name of the model that the backend would be sent.
    fn model(&self) -> Option<Cow<'_, str>> {
        self.target.and_then(|(target, asked)| target.name(asked))
    }
}

/// A request in flight at a backend.
#[derive(Debug)]
#[must_use = "dropping it ends the request at the backend"]
pub(crate) struct InFlight {
    upstream: Arc<Upstream>,
    /// What the request has taken of the backend's limits; `None` if the backend has none, or once another value answers
    /// for it. Boxed, since this value moves often and limits are rare.
    reservation: Option<Box<BackendReservation>>,
    /// The permit, if the backend has a `max_in_flight`.
    permit: Option<Permit>,
    /// The key of the model that the backend is sent.
    key: u64,
    /// When the request came to the backend.
    entered: Nanos,
}

/// What a request has taken of its backend's quota and budget. Dropping it refunds the tokens and the money.
#[derive(Debug)]
#[must_use = "dropping it refunds the tokens and the money"]
pub(crate) struct BackendReservation {
    quota: Option<QuotaHold>,
    spend: Option<SpendReservation>,
    state: Arc<BackendState>,
}

impl BackendReservation {
    /// Ends the reservation with what the answer used and cost, in nano-USD.
    pub(crate) fn settle(mut self, tokens: u64, cost: u64, (now, today): (Nanos, Day)) {
        if let Some(spend) = self.spend.take() {
            // What a backend's answers cost beyond their reservations is in its budget; no client is to blame for it.
            let _ = spend.settle(cost, today);
        }
        if let Some(quota) = self.quota.take() {
            let has_tokens = quota.has_tokens();
            quota.settle(tokens, now);
            self.notify(has_tokens);
        }
    }

    /// Wakes the requests that wait for tokens.
    fn notify(&self, is_freed: bool) {
        if is_freed {
            self.state.quota_changed.notify_waiters();
        }
    }
}

impl Drop for BackendReservation {
    fn drop(&mut self) {
        if let Some(quota) = self.quota.take() {
            let has_tokens = quota.has_tokens();
            drop(quota);
            self.notify(has_tokens);
        }
    }
}

/// A place in the queue of a backend's quota. Dropping it lets the requests behind it move up.
#[derive(Debug)]
#[must_use = "dropping it leaves the queue"]
pub(crate) struct QuotaWait {
    /// `None` once the queue has been left.
    ticket: Option<QuotaTicket>,
    quota: Arc<Quota>,
    /// The tokens that the request will reserve.
    tokens: u64,
    upstream: Arc<Upstream>,
    served: bool,
}

impl QuotaWait {
    /// Joins the queue of the backend's quota; `None` if the backend has no quota.
    pub(crate) fn new(upstream: &Arc<Upstream>, candidate: &Candidate<'_>) -> Option<Self> {
        let quota = upstream.quota.clone()?;
        let tokens = upstream.tokens_of(candidate);
        let ticket = Some(quota.wait(candidate.now, tokens));
        Some(QuotaWait { ticket, quota, tokens, upstream: upstream.clone(), served: false })
    }

    /// The ticket.
    pub(crate) fn ticket(&self) -> Option<&QuotaTicket> {
        self.ticket.as_ref()
    }

    /// The time before which the quota does not admit the request, as far as is known at `now`; `None` if only what other
    /// requests reserve is in the way.
    pub(crate) fn opens_at(&self, now: Nanos) -> Option<Nanos> {
        self.quota.opens_at(now, self.tokens, self.ticket())
    }

    /// When the quota admits the request for sure, as far as is known at `now`.
    pub(crate) fn opens_for_sure(&self, now: Nanos) -> Option<Nanos> {
        self.quota.opens_for_sure(now, self.tokens, self.ticket()?)
    }

    /// Leaves the queue because the quota has admitted the request. The requests behind it wait as long as before, so
    /// they are not woken.
    pub(crate) fn served(mut self) {
        self.served = true;
    }
}

impl Drop for QuotaWait {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            ticket.leave(clock::now());
        }
        if !self.served {
            self.upstream.state.quota_changed.notify_waiters();
        }
    }
}

impl InFlight {
    /// The backend.
    pub(crate) fn upstream(&self) -> &Arc<Upstream> {
        &self.upstream
    }

    /// The key of the model that the backend is sent: with the backend, it names the pair.
    pub(crate) fn key(&self) -> u64 {
        self.key
    }

    /// When the request came to the backend.
    pub(crate) fn entered(&self) -> Nanos {
        self.entered
    }

    /// Whether the backend, or the pair, was ejected since the request came to it.
    pub(crate) fn is_ejected(&self) -> bool {
        self.upstream.state.breaker.was_ejected_since(|| self.key, self.entered)
    }

    /// Reports that the request has waited for long without a byte. If the pair has sent nothing to anybody in that time,
    /// others are preferred.
    pub(crate) fn note_silence(&self, now: Nanos) {
        let pairs = &self.upstream.state.breaker.pairs;
        if !pairs.was_heard_since(self.key, self.entered) {
            pairs.suspect(self.key, now);
        }
    }

    /// Reports the head of a response at `now`.
    pub(crate) fn answered(&self, now: Nanos) {
        self.upstream.state.hear(now);
        self.upstream.state.breaker.pairs.answered(self.key, now);
    }

    /// Releases the permit, the tokens and the money: the backend is done with the request and has used nothing. Its
    /// response may be dropped.
    pub(crate) fn release(&mut self) {
        self.permit = None;
        self.reservation = None;
    }

    /// Takes the reservation, to settle it when it is known what the answer has used.
    pub(crate) fn take_reservation(&mut self) -> Option<Box<BackendReservation>> {
        self.reservation.take()
    }

    fn quota(&self) -> Option<&QuotaHold> {
        self.reservation.as_ref()?.quota.as_ref()
    }

    /// Takes another unit of the quota, for a second request that the provider gets on behalf of this one. Returns `false`
    /// if there is none.
    pub(crate) fn take_again(&self) -> bool {
        self.quota().is_none_or(|quota| quota.take_again(clock::now()))
    }

    /// Reports that the request is sent: the provider counts it from now on.
    pub(crate) fn sent(&self) {
        if let Some(quota) = self.quota() {
            quota.sent(clock::now());
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.upstream.state.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Upstream {
    /// What the request is expected to use.
    fn expected(&self, candidate: &Candidate<'_>) -> Usage {
        self.state.ratios.expect(candidate.key(), candidate.demand)
    }

    /// The tokens that the request will reserve; 0 without a limit of tokens.
    fn tokens_of(&self, candidate: &Candidate<'_>) -> u64 {
        match self.conf.tokens_per_minute {
            Some(_) => self.expected(candidate).total(),
            None => 0,
        }
    }

    /// Whether the input and the stated maximum of output alone are above the limit of tokens.
    pub(crate) fn is_too_large(&self, candidate: &Candidate<'_>) -> bool {
        let is_stated = matches!(candidate.demand.output, Output::AtMost(_));
        let limit = self.conf.tokens_per_minute.filter(|_| is_stated);
        limit.is_some_and(|limit| self.expected(candidate).total() > limit)
    }

    /// The cost in nano-USD of what the request is expected to use.
    pub(crate) fn expected_cost(&self, candidate: &Candidate<'_>) -> u64 {
        self.cost(candidate.model().as_deref(), &self.expected(candidate))
    }

    /// The tokens that the request is expected to use.
    pub(crate) fn expected_tokens(&self, candidate: &Candidate<'_>) -> u64 {
        self.expected(candidate).total()
    }

    /// Checks whether the quota and the budget have room for the request.
    pub(super) fn check_limits(&self, candidate: &Candidate<'_>) -> Result<(), Closed> {
        if self.is_too_large(candidate) {
            return Err(Closed::TooLarge);
        }
        if let Some(quota) = &self.quota {
            match quota.opens_at(candidate.now, self.tokens_of(candidate), candidate.ticket) {
                Some(at) if at <= candidate.now => {}
                Some(at) => return Err(Closed::Quota(at)),
                None => return Err(Closed::Reserved),
            }
        }
        let Some(budget) = &self.budget else { return Ok(()) };
        budget.check(self.expected_cost(candidate), today()).map_err(Closed::Budget)
    }

    /// Takes what the request needs of the quota and the budget: all or nothing.
    fn reserve(&self, candidate: &Candidate<'_>) -> Option<(Option<QuotaHold>, Option<SpendReservation>)> {
        let spend = match &self.budget {
            Some(budget) => Some(budget.reserve(self.expected_cost(candidate), today()).ok()?),
            None => None,
        };
        let quota = match &self.quota {
            Some(quota) => Some(quota.take(candidate.now, self.tokens_of(candidate), candidate.ticket)?),
            None => None,
        };
        Some((quota, spend))
    }

    /// Takes a permit, and what the request needs of the quota and the budget: all or nothing. In `panic` mode an ejected
    /// backend takes the request too.
    pub(crate) fn enter(self: &Arc<Self>, candidate: &Candidate<'_>, panic: bool) -> Option<InFlight> {
        let permit = match &self.admission {
            Some(admission) => Some(admission.try_pass()?),
            None => None,
        };
        self.enter_with(permit, candidate, panic)
    }

    /// [`enter`](Self::enter) with a permit that the request already holds.
    pub(crate) fn enter_with(
        self: &Arc<Self>,
        permit: Option<Permit>,
        candidate: &Candidate<'_>,
        panic: bool,
    ) -> Option<InFlight> {
        let (key, now) = (candidate.key(), candidate.now);
        let (quota, spend) = self.reserve(candidate)?;
        let breaker = &self.state.breaker;
        if !breaker.enter(now, panic) || !breaker.pairs.enter(Entry { key, now, panic }) {
            if let Some(quota) = quota {
                quota.cancel(now);
            }
            return None;
        }
        self.state.in_flight.fetch_add(1, Ordering::Relaxed);
        let has_limit = quota.is_some() || spend.is_some();
        let reservation =
            has_limit.then(|| Box::new(BackendReservation { quota, spend, state: self.state.clone() }));
        Some(InFlight { upstream: self.clone(), reservation, permit, key, entered: now })
    }
}

/// The day in UTC.
pub(crate) fn today() -> Day {
    Day::of(SystemTime::now())
}
