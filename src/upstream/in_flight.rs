//! A request at a backend, and a request in the line of its quota. Each gives back what it holds when it is dropped.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::clock;
use crate::policy::queue::Permit;
use crate::policy::quota::{Quota, QuotaTicket};
use crate::time::Nanos;
use crate::upstream::Upstream;

/// A request that a backend serves; dropping it ends that.
#[derive(Debug)]
#[must_use = "dropping it says that the backend is done"]
pub(crate) struct InFlight {
    upstream: Arc<Upstream>,
    /// Under which the quota counts it, where there is one.
    stamp: Cell<Nanos>,
    /// Its place, where there is a limit.
    place: Option<Permit>,
}

/// A turn in the line of a backend's quota; dropping it lets those behind move up.
#[derive(Debug)]
#[must_use = "dropping it leaves the line"]
pub(crate) struct InLine {
    /// Until it is left.
    turn: Option<QuotaTicket>,
    quota: Arc<Quota>,
    upstream: Arc<Upstream>,
    served: bool,
}

impl InLine {
    /// Stands in the line of a backend's quota, if it has one.
    pub(crate) fn new(upstream: &Arc<Upstream>) -> Option<Self> {
        let quota = upstream.quota.clone()?;
        let turn = Some(quota.wait(clock::now()));
        Some(InLine { turn, quota, upstream: upstream.clone(), served: false })
    }

    /// Its turn.
    pub(crate) fn turn(&self) -> Option<&QuotaTicket> {
        self.turn.as_ref()
    }

    /// When its turn comes, as far as is known at `now`.
    pub(crate) fn opens_at(&self, now: Nanos) -> Nanos {
        self.quota.opens_at(now, self.turn())
    }

    /// Leaves it because its turn has come: those behind wait on as before.
    pub(crate) fn served(mut self) {
        self.served = true;
    }
}

impl Drop for InLine {
    fn drop(&mut self) {
        if let Some(turn) = self.turn.take() {
            turn.leave(clock::now());
        }
        if !self.served {
            self.upstream.state.moved.notify_waiters();
        }
    }
}

impl InFlight {
    /// Counts a request that takes `place`, and `stamp` of the quota.
    pub(super) fn new(upstream: Arc<Upstream>, stamp: Nanos, place: Option<Permit>) -> Self {
        upstream.state.in_flight.fetch_add(1, Ordering::Relaxed);
        InFlight { upstream, stamp: Cell::new(stamp), place }
    }

    /// The backend.
    pub(crate) fn upstream(&self) -> &Arc<Upstream> {
        &self.upstream
    }

    /// Gives the place to the next: the backend is done with the request, but for an answer that may be dropped.
    pub(crate) fn leave_place(&mut self) {
        self.place = None;
    }

    /// The request goes out: the provider counts it from now on.
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
    /// Takes one of its places and one of its quota, both or neither.
    pub(crate) fn enter(self: &Arc<Self>, now: Nanos, turn: Option<&QuotaTicket>) -> Option<InFlight> {
        let place = match &self.places {
            Some(places) => Some(places.try_pass()?),
            None => None,
        };
        self.enter_at(place, now, turn)
    }

    /// Takes one of its quota, at a place that was waited for.
    pub(crate) fn enter_at(
        self: &Arc<Self>,
        place: Option<Permit>,
        now: Nanos,
        turn: Option<&QuotaTicket>,
    ) -> Option<InFlight> {
        let stamp = match &self.quota {
            Some(quota) => quota.take(now, turn)?,
            None => 0,
        };
        Some(InFlight::new(self.clone(), stamp, place))
    }
}
