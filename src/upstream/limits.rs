//! The limits of a backend: what a request may use there, what it reserves, and what it has used.

use std::borrow::Cow;
use std::sync::Arc;

use crate::clock;
use crate::config;
use crate::policy::choose::Closed;
use crate::policy::queue::{MAX as MAX_SLOTS, Turn};
use crate::policy::quota::{QuotaHold, QuotaLimits, QuotaTicket};
use crate::policy::ratio::{Demand, Output};
use crate::policy::reservation::beyond;
use crate::policy::route::Target;
use crate::policy::spend::{SpendLimit, SpendReservation};
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
    /// Whose turn it is to take a permit.
    pub turn: Turn,
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

/// What a request needs of the limits of a backend.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Need {
    /// What it is expected to use.
    pub expected: Usage,
    /// Its input and its stated maximum of output, in tokens.
    pub stated: u64,
    /// Whether what it may use has a maximum.
    is_bounded: bool,
    is_metered: bool,
}

impl Need {
    /// The tokens that it reserves; 0 if the request uses none.
    pub(crate) fn tokens(&self) -> u64 {
        if self.is_metered { self.expected.total().max(1) } else { 0 }
    }
}

/// What a request has taken of its backend's quota and budget. Dropping it refunds the tokens and the money.
#[derive(Debug)]
#[must_use = "dropping it refunds the tokens and the money"]
pub(crate) struct BackendReservation {
    pub(super) quota: Option<QuotaHold>,
    spend: Option<SpendReservation>,
    expected: Usage,
    state: Arc<BackendState>,
}

impl BackendReservation {
    /// Ends the reservation with what the answer used and cost, in nano-USD. Returns the tokens that were used beyond
    /// the reservation.
    pub(crate) fn settle(mut self, usage: &Usage, cost: u64, (now, today): (Nanos, Day)) -> u64 {
        let is_dearer = self.spend.take().is_some_and(|spend| spend.settle(cost, today) > 0);
        let overrun = self.end_quota(|quota| quota.settle(usage.total(), now));
        overrun.max(beyond(usage, &self.expected, is_dearer))
    }

    /// Ends the hold on the quota, and wakes the requests that wait for its tokens.
    fn end_quota<T: Default>(&mut self, end: impl FnOnce(QuotaHold) -> T) -> T {
        let Some(quota) = self.quota.take() else { return T::default() };
        let has_tokens = quota.has_tokens();
        let result = end(quota);
        if has_tokens {
            self.state.quota_changed.notify_waiters();
        }
        result
    }
}

impl Drop for BackendReservation {
    fn drop(&mut self) {
        self.end_quota(drop);
    }
}

impl Upstream {
    /// The budget.
    pub(crate) fn budget(&self) -> Option<&Arc<SpendLimit>> {
        self.budget.as_ref()
    }

    /// The limit of tokens and the number of tokens that are neither used nor reserved at `now`; `None` without a
    /// limit.
    pub(crate) fn tokens_left(&self, now: Nanos) -> Option<(u64, u64)> {
        self.quota.as_ref()?.tokens_left(now)
    }

    /// Lifts the limits that the `next` configuration of this backend does not have. Requests that wait for them go on.
    pub(crate) fn lift_limits(&self, next: &Upstream, now: Nanos) {
        if let Some(quota) = self.quota.as_ref().filter(|_| next.quota.is_none()) {
            quota.set_limits(QuotaLimits::default(), now);
            self.state.quota_changed.notify_waiters();
        }
        if let Some(admission) = self.admission.as_ref().filter(|_| next.admission.is_none()) {
            admission.resize(MAX_SLOTS, 0);
        }
    }

    /// What the request needs here.
    pub(crate) fn need(&self, candidate: &Candidate<'_>) -> Need {
        let demand = self.demand(candidate);
        let expected = self.state.ratios.expect(candidate.key(), &demand);
        let stated = match demand.output {
            Output::AtMost(_) => expected.total(),
            Output::None | Output::Unstated => expected.input,
        };
        let is_bounded = demand.output != Output::Unstated;
        Need { expected, stated, is_bounded, is_metered: demand.is_metered }
    }

    /// What the request may use here: a maximum that the backend is not sent does not count.
    fn demand(&self, candidate: &Candidate<'_>) -> Demand {
        match candidate.demand.output {
            Output::AtMost(_) if self.drops_maximum => {
                Demand { output: Output::Unstated, ..*candidate.demand }
            }
            _ => *candidate.demand,
        }
    }

    /// What the request needs here, if tokens or money are limited here; nothing otherwise.
    fn limited_need(&self, candidate: &Candidate<'_>) -> Need {
        match self.conf.tokens_per_minute.is_some() || self.budget.is_some() {
            true => self.need(candidate),
            false => Need::default(),
        }
    }

    /// The limit of tokens, if the request is too large for it.
    pub(crate) fn exceeded(&self, need: &Need) -> Option<u64> {
        self.conf.tokens_per_minute.filter(|limit| need.stated > *limit)
    }

    /// The most that the request is expected to cost, in nano-USD. A request without a maximum costs at most the whole
    /// `budget`, so that it fits into one of which nothing is spent.
    pub(crate) fn expected_cost(&self, candidate: &Candidate<'_>, need: &Need, budget: u64) -> u64 {
        // A request may go out without a model; the price of all models counts for it too.
        let price = self.prices.price(candidate.model().as_deref().unwrap_or_default());
        let cost = price.map_or(0, |price| price.most(&need.expected));
        if need.is_bounded { cost } else { cost.min(budget) }
    }

    /// The budget, if the request uses tokens.
    fn budget_of(&self, candidate: &Candidate<'_>) -> Option<&Arc<SpendLimit>> {
        self.budget.as_ref().filter(|_| candidate.demand.is_metered)
    }

    /// Checks whether the quota and the budget have room for the request.
    pub(super) fn check_limits(&self, candidate: &Candidate<'_>) -> Result<(), Closed> {
        if self.quota.is_none() && self.budget.is_none() {
            return Ok(());
        }
        let need = self.limited_need(candidate);
        if self.exceeded(&need).is_some() {
            return Err(Closed::TooLarge);
        }
        if let Some(quota) = &self.quota {
            match quota.opens_at(candidate.now, need.tokens(), candidate.ticket) {
                Some(at) if at <= candidate.now => {}
                Some(at) => return Err(Closed::Quota(at)),
                None => return Err(Closed::Reserved),
            }
        }
        let Some(budget) = self.budget_of(candidate) else { return Ok(()) };
        let cost = self.expected_cost(candidate, &need, budget.limit());
        budget.check(cost, clock::today()).map_err(Closed::Budget)
    }

    /// Takes what the request needs of the quota and the budget: all or nothing.
    pub(super) fn reserve(&self, candidate: &Candidate<'_>) -> Option<Option<Box<BackendReservation>>> {
        if self.quota.is_none() && self.budget.is_none() {
            return Some(None);
        }
        let need = self.limited_need(candidate);
        let spend = match self.budget_of(candidate) {
            Some(budget) => {
                let cost = self.expected_cost(candidate, &need, budget.limit());
                Some(budget.reserve(cost, clock::today()).ok()?)
            }
            None => None,
        };
        let expected = need.expected;
        let quota = match &self.quota {
            Some(quota) => Some(quota.take(candidate.now, need.tokens(), candidate.ticket)?),
            None => None,
        };
        Some(Some(Box::new(BackendReservation { quota, spend, expected, state: self.state.clone() })))
    }
}

/// The limits of a backend's quota.
pub(super) fn quota_limits(conf: &config::Backend) -> QuotaLimits {
    QuotaLimits { requests: conf.requests_per_minute, tokens: conf.tokens_per_minute }
}
