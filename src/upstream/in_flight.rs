//! A request at a backend, and a request that waits for the backend's quota. Dropping either releases what it holds.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::clock;
use crate::policy::pair::Entry;
use crate::policy::queue::Permit;
use crate::policy::quota::{Quota, QuotaTicket};
use crate::time::Nanos;
use crate::upstream::Upstream;

/// A request in flight at a backend.
#[derive(Debug)]
#[must_use = "dropping it ends the request at the backend"]
pub(crate) struct InFlight {
    upstream: Arc<Upstream>,
    /// The stamp under which the quota counts the request; 0 without a quota.
    stamp: Cell<Nanos>,
    /// The permit, if the backend has a `max_in_flight`.
    permit: Option<Permit>,
    /// The key of the model that the backend is sent.
    key: u64,
    /// When the request came to the backend.
    entered: Nanos,
}

/// A place in the queue of a backend's quota. Dropping it lets the requests behind it move up.
#[derive(Debug)]
#[must_use = "dropping it leaves the queue"]
pub(crate) struct QuotaWait {
    /// `None` once the queue has been left.
    ticket: Option<QuotaTicket>,
    quota: Arc<Quota>,
    upstream: Arc<Upstream>,
    served: bool,
}

impl QuotaWait {
    /// Joins the queue of the backend's quota; `None` if the backend has no quota.
    pub(crate) fn new(upstream: &Arc<Upstream>) -> Option<Self> {
        let quota = upstream.quota.clone()?;
        let ticket = Some(quota.wait(clock::now()));
        Some(QuotaWait { ticket, quota, upstream: upstream.clone(), served: false })
    }

    /// The ticket.
    pub(crate) fn ticket(&self) -> Option<&QuotaTicket> {
        self.ticket.as_ref()
    }

    /// When the quota admits the request, as far as is known at `now`.
    pub(crate) fn opens_at(&self, now: Nanos) -> Nanos {
        self.quota.opens_at(now, self.ticket())
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

    /// Releases the permit: the backend is done with the request, and its response may be dropped.
    pub(crate) fn release_permit(&mut self) {
        self.permit = None;
    }

    /// Takes another unit of the quota, for a second request that the provider gets on behalf of this one. Returns `false`
    /// if there is none.
    pub(crate) fn take_again(&self) -> bool {
        let Some(quota) = &self.upstream.quota else { return true };
        let stamp = quota.take(clock::now(), None);
        self.stamp.set(stamp.unwrap_or(self.stamp.get()));
        stamp.is_some()
    }

    /// Reports that the request is sent: the provider counts it from now on.
    pub(crate) fn sent(&self) {
        if let Some(quota) = &self.upstream.quota {
            self.stamp.set(quota.sent(self.stamp.get(), clock::now()));
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.upstream.state.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Upstream {
    /// Takes a permit and a unit of the quota: both or neither.
    pub(crate) fn enter(self: &Arc<Self>, entry: Entry, ticket: Option<&QuotaTicket>) -> Option<InFlight> {
        let permit = match &self.admission {
            Some(admission) => Some(admission.try_pass()?),
            None => None,
        };
        self.enter_with(permit, entry, ticket)
    }

    /// Takes a unit of the quota, with a permit that the request already holds.
    pub(crate) fn enter_with(
        self: &Arc<Self>,
        permit: Option<Permit>,
        entry: Entry,
        ticket: Option<&QuotaTicket>,
    ) -> Option<InFlight> {
        if !self.state.breaker.pairs.enter(entry) {
            return None;
        }
        let Entry { key, now, .. } = entry;
        let stamp = match &self.quota {
            Some(quota) => quota.take(now, ticket)?,
            None => 0,
        };
        self.state.in_flight.fetch_add(1, Ordering::Relaxed);
        Some(InFlight { upstream: self.clone(), stamp: Cell::new(stamp), permit, key, entered: now })
    }
}
