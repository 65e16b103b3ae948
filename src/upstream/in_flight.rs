//! A request at a backend, and a request that waits for the backend's quota. Dropping either releases what it holds.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::clock;
use crate::policy::gate::Passage;
use crate::policy::pair::Entry;
use crate::policy::queue::Permit;
use crate::policy::quota::{QuotaHold, QuotaTicket};
use crate::time::Nanos;
use crate::upstream::Upstream;
use crate::upstream::limits::{BackendReservation, Candidate};

/// A request in flight at a backend.
#[derive(Debug)]
#[must_use = "dropping it ends the request at the backend"]
pub(crate) struct InFlight {
    upstream: Arc<Upstream>,
    /// What the request has taken of the backend's limits; `None` if the backend has none, or once another value
    /// answers for it. Boxed, since this value moves often and limits are rare.
    reservation: Option<Box<BackendReservation>>,
    /// The permit, if the backend has a `max_in_flight`.
    permit: Option<Permit>,
    /// The key of the model that the backend is sent.
    key: u64,
    /// When the request came to the backend.
    entered: Nanos,
    passages: Cell<Passages>,
}

/// How a request has passed the gates of its target. Both are free once the trials are undone.
#[derive(Clone, Copy, Debug)]
struct Passages {
    backend: Passage,
    pair: Passage,
}

/// A place in the queue of a backend's quota. Dropping it lets the requests behind it move up.
#[derive(Debug)]
#[must_use = "dropping it leaves the queue"]
pub(crate) struct QuotaWait {
    /// `None` once the queue has been left.
    ticket: Option<QuotaTicket>,
    upstream: Arc<Upstream>,
}

impl QuotaWait {
    /// Joins the queue of the backend's quota, to take `tokens`; `None` if the backend has no quota.
    pub(crate) fn new(upstream: &Arc<Upstream>, tokens: u64) -> Option<Self> {
        let ticket = Some(upstream.quota.as_ref()?.wait(clock::now(), tokens));
        Some(QuotaWait { ticket, upstream: upstream.clone() })
    }

    /// Changes the tokens that the request will take, since what it is expected to use has changed. It keeps its place.
    /// The requests behind it look again if they have fewer tokens ahead.
    pub(crate) fn set_tokens(&self, tokens: u64) {
        if self.ticket.as_ref().is_some_and(|ticket| ticket.set_tokens(tokens, clock::now())) {
            self.upstream.state.quota_changed.notify_waiters();
        }
    }

    /// The ticket.
    pub(crate) fn ticket(&self) -> Option<&QuotaTicket> {
        self.ticket.as_ref()
    }

    /// Leaves the queue because the quota has admitted the request. The requests behind it wait as long as before, so
    /// they are not woken.
    pub(crate) fn served(mut self) {
        self.leave();
    }

    /// Leaves the queue. Returns whether the request was in it.
    fn leave(&mut self) -> bool {
        self.ticket.take().map(|ticket| ticket.leave(clock::now())).is_some()
    }
}

impl Drop for QuotaWait {
    fn drop(&mut self) {
        if self.leave() {
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

    /// Reports that the request has waited for long without a byte. If the pair has sent nothing to anybody in that
    /// time, others are preferred.
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

    /// Reports that the request ends without a result of its target. If it was a trial, another request may go in its
    /// place: returns whether one may.
    pub(crate) fn undo_trial(&self, now: Nanos) -> bool {
        let Passages { backend, pair } =
            self.passages.replace(Passages { backend: Passage::Free, pair: Passage::Free });
        let breaker = &self.upstream.state.breaker;
        let is_undone = backend == Passage::Trial && breaker.undo_trial(now);
        pair == Passage::Trial && breaker.pairs.undo_trial(self.key, now) || is_undone
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

    /// Takes another unit of the quota, for a second request that the provider gets on behalf of this one. Returns
    /// `false` if there is none.
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
    /// Takes a permit, and what the request needs of the quota and the budget: all or nothing. In `panic` mode an
    /// ejected backend takes the request too.
    pub(crate) fn enter(self: &Arc<Self>, candidate: &Candidate<'_>, panic: bool) -> Option<InFlight> {
        let permit = match &self.admission {
            Some(admission) => Some(admission.try_pass(candidate.turn)?),
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
        let mut reservation = self.reserve(candidate)?;
        let breaker = &self.state.breaker;
        let backend = breaker.enter(now, panic);
        let pair = backend.and_then(|_| breaker.pairs.enter(Entry { key, now, panic }));
        let (Some(backend), Some(pair)) = (backend, pair) else {
            if backend == Some(Passage::Trial) {
                breaker.undo_trial(now);
            }
            if let Some(quota) = reservation.as_mut().and_then(|reservation| reservation.quota.take()) {
                quota.cancel(now, candidate.ticket);
                self.state.quota_changed.notify_waiters();
            }
            return None;
        };
        self.state.in_flight.fetch_add(1, Ordering::Relaxed);
        let passages = Cell::new(Passages { backend, pair });
        Some(InFlight { upstream: self.clone(), reservation, permit, key, entered: now, passages })
    }
}
