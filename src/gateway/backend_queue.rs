//! The queues before busy backends: a request waits here for a full backend, a quota or a cooldown.
//!
//! [`Dispatch`](crate::policy::dispatch::Dispatch) decides that a request waits, and for which backends;
//! [`BackendQueues`] carries the wait out, and ends it if no backend can take the request in time. A waiting request holds
//! no slot of the gateway.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::futures::Notified;
use tokio::time::sleep;

use crate::client::deadline::Elapsed;
use crate::client::exchange::Exchange;
use crate::clock;
use crate::config::Queue;
use crate::gateway::Gateway;
use crate::gateway::admit::admit;
use crate::gateway::refusal::GatewayError;
use crate::policy::balance::BackendId;
use crate::policy::dispatch::Busy;
use crate::policy::queue::{Admitted, BackendWait, Permit, QueueFull, Ticket};
use crate::policy::quota::{LEEWAY, QuotaTicket};
use crate::telemetry::phase::Phase;
use crate::telemetry::record::RequestRecord;
use crate::time::Nanos;
use crate::upstream::fleet::Snapshot;
use crate::upstream::in_flight::QuotaWait;

/// The places of a request in the queues before busy backends. Dropping the value leaves all queues.
#[derive(Default)]
pub(crate) struct BackendQueues {
    /// The place before a quota.
    quota: Option<(BackendId, QuotaWait)>,
    /// The places before full backends.
    tickets: Vec<(BackendId, Ticket)>,
    /// A permit of a backend that was full.
    pub granted: Option<(BackendId, Permit)>,
    /// Held from the first wait on, so that no other request takes this one's place in the count while it picks again.
    counted: Option<BackendWait>,
}

/// The busy targets that a request waits for, and the limits of the wait.
pub(crate) struct Wait<'a> {
    /// The fleet.
    pub snapshot: &'a Snapshot,
    /// The busy targets.
    pub busy: &'a Busy,
    /// The end of the wait for a full backend.
    pub deadline: Nanos,
    /// Ends the wait when a backend reopens.
    pub reopened: Option<Notified<'a>>,
}

/// The event that ended a wait.
enum Woken {
    /// A request left the queue of the quota, so the others moved up.
    QuotaChanged,
    /// A backend may have reopened, or has granted a permit.
    Opened,
}

impl BackendQueues {
    /// The ticket of a quota, if the request waits for one.
    pub(crate) fn ticket(&self) -> Option<&QuotaTicket> {
        self.quota.as_ref().and_then(|(_, wait)| wait.ticket())
    }

    /// Whether the request waits for busy targets.
    pub(crate) fn is_waiting(&self) -> bool {
        self.counted.is_some() || self.quota.is_some() || !self.tickets.is_empty()
    }

    /// Takes a slot of the gateway after a wait. If a slot is free, the request stays in the count of waiting ones.
    ///
    /// # Errors
    /// As [`admit`].
    pub(crate) async fn readmit(
        &mut self,
        gateway: &Gateway,
        exchange: &Exchange,
        record: &mut RequestRecord,
        deadline: Nanos,
    ) -> Result<Permit, GatewayError> {
        if let Some(slot) = gateway.shared().admission.try_pass() {
            return Ok(slot);
        }
        // The request must not count twice while it waits for a slot.
        self.counted = None;
        admit(gateway, exchange, record, deadline).await
    }

    /// Leaves all queues because the backend has taken the request.
    pub(crate) fn leave(&mut self, backend: BackendId) {
        if let Some((_, wait)) = self.quota.take_if(|(id, _)| *id == backend) {
            wait.served();
        }
        *self = BackendQueues::default();
    }

    /// Waits, without a slot, until a busy target may have reopened: at the known time of a quota or a cooldown, when a
    /// full backend grants a permit, or when any backend reopens. The request keeps its places until it
    /// [leaves](Self::leave). A full backend is waited for until the deadline; a quota or a cooldown must end within
    /// `queue.max_wait`.
    ///
    /// # Errors
    /// Returns an error at once if no target opens in time or too many requests wait; else
    /// [`GatewayError::QueueTimeout`] at the deadline.
    pub(crate) async fn wait(
        &mut self,
        gateway: &Gateway,
        exchange: &Exchange,
        record: &mut RequestRecord,
        wait: Wait<'_>,
    ) -> Result<(), GatewayError> {
        let Wait { snapshot, busy, deadline, reopened } = wait;
        let mut reopened = pin!(reopened);
        let since = clock::now();
        let latest = latest_opening(deadline, &snapshot.config.queue);
        let in_time = |at: &Nanos| *at <= latest;
        let first = busy.opens.filter(|(at, ..)| in_time(at));
        if let (None, Some((at, ..)), true) = (first, busy.opens, busy.full.is_empty()) {
            return Err(too_late(at, since));
        }
        if self.counted.is_none() {
            self.counted = Some(gateway.shared().admission.wait_for_backend()?);
        }
        record.phase = Phase::Queued;
        self.join(snapshot, busy, first);
        let result = loop {
            let quota_changed =
                self.quota.as_ref().map(|(id, _)| &snapshot.backends[*id].state.quota_changed);
            let mut quota_changed = pin!(quota_changed.map(|notify| notify.notified()));
            if let Some(notified) = quota_changed.as_mut().as_pin_mut() {
                notified.enable();
            }
            let now = clock::now();
            let at = match &self.quota {
                // If the backend is full too, the request needs a permit first.
                Some((id, wait)) if !busy.full.contains(id) => Some(wait.opens_at(now)),
                _ => first.map(|(at, ..)| at),
            };
            match at {
                _ if self.granted.is_some() => break Ok(()),
                None if self.tickets.is_empty() => break Err(GatewayError::QueueFull),
                Some(at) if self.tickets.is_empty() && !in_time(&at) => break Err(too_late(at, now)),
                _ => {}
            }
            let mut opened = pin!(at.filter(in_time).map(|at| sleep(time_until(at, now))));
            let (tickets, granted) = (&mut self.tickets, &mut self.granted);
            let woken = poll_fn(|cx| {
                *granted = poll_tickets(tickets, cx);
                if granted.is_some()
                    || is_ready(opened.as_mut().as_pin_mut(), cx)
                    || is_ready(reopened.as_mut().as_pin_mut(), cx)
                {
                    return Poll::Ready(Woken::Opened);
                }
                if is_ready(quota_changed.as_mut().as_pin_mut(), cx) {
                    return Poll::Ready(Woken::QuotaChanged);
                }
                Poll::Pending
            });
            match exchange.limit(deadline, woken).await {
                Ok(Woken::Opened) => break Ok(()),
                Ok(Woken::QuotaChanged) => {}
                Err(Elapsed) => break Err(GatewayError::QueueTimeout),
            }
        };
        record.add_queued(clock::now() - since);
        result
    }

    /// Joins the queues of the full backends, and the queue of the quota that opens `first`. Keeps a place that the
    /// request has already.
    fn join(&mut self, snapshot: &Snapshot, busy: &Busy, first: Option<(Nanos, BackendId, bool)>) {
        self.tickets.retain(|(id, _)| busy.full.contains(id));
        for id in &busy.full {
            if self.tickets.iter().any(|(known, _)| known == id) {
                continue;
            }
            match snapshot.backends[*id].queue_for_permit() {
                Ok(Some(Admitted::Queued(ticket))) => self.tickets.push((*id, ticket)),
                Ok(Some(Admitted::Passed(permit))) => self.granted = Some((*id, permit)),
                // The queue of this backend is full: wait for the other backends.
                Ok(None) | Err(QueueFull) => {}
            }
        }
        // A request that is first at a quota keeps this place while the backend is full.
        let kept = self.quota.as_ref().map(|(id, _)| *id).filter(|id| busy.full.contains(id));
        let quota = first.filter(|(_, _, by_quota)| *by_quota).map(|(_, id, _)| id).or(kept);
        if self.quota.as_ref().map(|(id, _)| *id) != quota {
            self.quota = quota.and_then(|id| Some((id, QuotaWait::new(&snapshot.backends[id])?)));
        }
    }
}

/// When a target must have opened so that a request with this deadline waits for it. Both times count from the same
/// moment.
pub(crate) fn latest_opening(deadline: Nanos, queue: &Queue) -> Nanos {
    let began = deadline.saturating_sub(clock::nanos(queue.timeout));
    deadline.min(began + clock::nanos(queue.max_wait))
}

/// The error for a request that does not wait for `busy` targets.
pub(crate) fn refusal(busy: &Busy, now: Nanos) -> GatewayError {
    match busy.opens {
        Some((at, ..)) if busy.full.is_empty() => too_late(at, now),
        _ => GatewayError::QueueFull,
    }
}

/// The error if no target opens in time. The client is told to come back earlier by the leeway of a quota: it then
/// waits for that short time.
fn too_late(at: Nanos, now: Nanos) -> GatewayError {
    GatewayError::UpstreamRateLimited(at.saturating_sub(now).saturating_sub(LEEWAY))
}

/// The time from `now` to just after `at`.
fn time_until(at: Nanos, now: Nanos) -> Duration {
    Duration::from_nanos(at.saturating_sub(now) + 1)
}

/// Removes the first ticket that is served, and returns its permit.
fn poll_tickets(tickets: &mut Vec<(BackendId, Ticket)>, cx: &mut Context<'_>) -> Option<(BackendId, Permit)> {
    let ready = |(i, (id, ticket)): (usize, &mut (BackendId, Ticket))| match Pin::new(ticket).poll(cx) {
        Poll::Ready(permit) => Some((i, *id, permit)),
        Poll::Pending => None,
    };
    let (i, id, permit) = tickets.iter_mut().enumerate().find_map(ready)?;
    drop(tickets.swap_remove(i));
    Some((id, permit))
}

fn is_ready<F: Future>(future: Option<Pin<&mut F>>, cx: &mut Context<'_>) -> bool {
    future.is_some_and(|future| future.poll(cx).is_ready())
}
