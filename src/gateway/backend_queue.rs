//! The queues before busy backends: a request waits here for a full backend, a quota or a cooldown.
//!
//! [`Dispatch`](crate::policy::dispatch::Dispatch) decides that a request waits, and for which backends;
//! [`BackendQueues`] carries the wait out, and ends it if no backend can take the request in time. A waiting request
//! holds no slot of the gateway.

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
use crate::policy::queue::{Admitted, BackendWait, Permit, QueueFull, Ticket, Turn};
use crate::policy::quota::LEEWAY;
use crate::telemetry::phase::Phase;
use crate::telemetry::record::RequestRecord;
use crate::time::Nanos;
use crate::upstream::fleet::{Ask, Snapshot};
use crate::upstream::in_flight::QuotaWait;
use crate::upstream::limits::Candidate;

/// The places of a request in the queues before busy backends. Dropping the value leaves all queues.
#[derive(Default)]
pub(crate) struct BackendQueues {
    /// The places before quotas.
    quotas: Vec<(BackendId, QuotaWait)>,
    /// The places before full backends, by the first backend of a [pool](Snapshot::pool).
    tickets: Vec<(BackendId, Ticket)>,
    /// A permit of a backend that was full, by the first backend of its pool.
    pub granted: Option<(BackendId, Permit)>,
    /// Held from the first wait on, so that no other request takes this one's place in the count while it picks again.
    counted: Option<BackendWait>,
}

/// The busy targets that a request waits for, and the limits of the wait.
pub(crate) struct Wait<'a> {
    /// The fleet.
    pub snapshot: &'a Snapshot,
    /// The request.
    pub ask: &'a Ask<'a>,
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

/// When a busy target opens.
struct Opening {
    /// The first known time.
    at: Option<Nanos>,
    /// Whether one may open at a time that nobody knows.
    is_open_ended: bool,
}

impl BackendQueues {
    /// The places before quotas.
    pub(crate) fn quotas(&self) -> &[(BackendId, QuotaWait)] {
        &self.quotas
    }

    /// Whether the request waits for busy targets.
    pub(crate) fn is_waiting(&self) -> bool {
        self.counted.is_some() || !self.quotas.is_empty() || !self.tickets.is_empty()
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
        (deadline, turn): (Nanos, Turn),
    ) -> Result<Permit, GatewayError> {
        if let Some(slot) = gateway.shared().admission.try_pass(turn) {
            return Ok(slot);
        }
        // The request must not count twice while it waits for a slot.
        self.counted = None;
        admit(gateway, exchange, record, (deadline, turn)).await
    }

    /// Leaves all queues because the backend has taken the request.
    pub(crate) fn leave(&mut self, backend: BackendId) {
        if let Some(at) = self.quotas.iter().position(|(id, _)| *id == backend) {
            self.quotas.swap_remove(at).1.served();
        }
        *self = BackendQueues::default();
    }

    /// Waits, without a slot, until a busy target may have reopened: at the known time of a quota, a cooldown or a
    /// trial, when a full backend grants a permit, when reserved tokens are freed, or when any backend reopens. The
    /// request keeps its places until it [leaves](Self::leave). A full backend and reserved tokens are waited for until
    /// the deadline; a quota or a cooldown must end within `queue.max_wait`.
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
        let Wait { snapshot, ask, busy, deadline, reopened } = wait;
        let mut reopened = pin!(reopened);
        let since = clock::now();
        let latest = latest_opening(deadline, &snapshot.config.queue);
        let in_time = |at: Nanos| at <= latest;
        if let Some((at, ..)) = busy.opens
            && !in_time(at)
            && !busy.is_open_ended()
        {
            return Err(too_late(at, since));
        }
        if self.counted.is_none() {
            self.counted = Some(gateway.shared().admission.wait_for_backend()?);
        }
        record.phase = Phase::Queued;
        self.join(snapshot, ask, busy, latest);
        let result = loop {
            // Register before the look: a quota that changes after the look then ends the wait.
            let changed = self.quotas.iter().map(|(id, _)| &snapshot.backends[*id].state.quota_changed);
            let mut changed: Vec<_> = changed.map(|notify| Box::pin(notify.notified())).collect();
            for notified in &mut changed {
                notified.as_mut().enable();
            }
            let now = clock::now();
            let Opening { at, is_open_ended } = self.opening(busy, now);
            match at {
                _ if self.granted.is_some() => break Ok(()),
                _ if is_open_ended => {}
                None => break Err(GatewayError::QueueFull),
                Some(at) if !in_time(at) => break Err(too_late(at, now)),
                Some(_) => {}
            }
            // A request that waits anyway tries an ejected target as soon as one may be tried.
            let wake = at.into_iter().chain(busy.trial).min();
            let mut opened = pin!(wake.map(|at| sleep(time_until(at, now))));
            let (tickets, granted) = (&mut self.tickets, &mut self.granted);
            let woken = poll_fn(|cx| {
                *granted = poll_tickets(tickets, cx);
                if granted.is_some()
                    || is_ready(opened.as_mut().as_pin_mut(), cx)
                    || is_ready(reopened.as_mut().as_pin_mut(), cx)
                {
                    return Poll::Ready(Woken::Opened);
                }
                if changed.iter_mut().any(|notified| notified.as_mut().poll(cx).is_ready()) {
                    return Poll::Ready(Woken::QuotaChanged);
                }
                Poll::Pending
            });
            match exchange.limit(deadline, woken).await {
                Ok(Woken::Opened) => break Ok(()),
                // What the request is expected to use may have changed with the answers of others.
                Ok(Woken::QuotaChanged) => {
                    self.quotas
                        .iter()
                        .for_each(|(id, wait)| wait.set_tokens(most_tokens(snapshot, ask, *id)));
                }
                Err(Elapsed) => break Err(GatewayError::QueueTimeout),
            }
        };
        record.add_queued(clock::now() - since);
        result
    }

    /// When the first target may open, as far as is known at `now`.
    fn opening(&self, busy: &Busy, now: Nanos) -> Opening {
        // A full backend needs a permit first.
        let is_full = |id: &BackendId| busy.full.contains(id);
        let (mut at, mut is_open_ended) = (None::<Nanos>, !self.tickets.is_empty());
        let mut note = |opens: Nanos| at = Some(at.map_or(opens, |at| at.min(opens)));
        let quotas = self.quotas.iter().filter(|(id, _)| !is_full(id));
        for ticket in quotas.filter_map(|(_, wait)| wait.ticket()) {
            match ticket.opens_at(now) {
                Some(opens) => note(opens),
                None => {
                    is_open_ended = true;
                    ticket.opens_for_sure(now).into_iter().for_each(&mut note);
                }
            }
        }
        let has_place = |id: &BackendId| self.quotas.iter().any(|(known, _)| known == id);
        let other = busy.opens.filter(|(_, id, by_quota)| !by_quota || is_full(id) || !has_place(id));
        other.into_iter().for_each(|(opens, ..)| note(opens));
        Opening { at, is_open_ended }
    }

    /// Joins the queues of the full backends, of the quotas with reserved tokens, and of the quota that opens first if
    /// it opens before `latest`. Keeps a place that the request has already.
    fn join(&mut self, snapshot: &Snapshot, ask: &Ask<'_>, busy: &Busy, latest: Nanos) {
        let pool = |id: BackendId| snapshot.pool(id);
        self.tickets.retain(|(known, _)| busy.full.iter().any(|id| pool(*id) == *known));
        for id in &busy.full {
            if self.tickets.iter().any(|(known, _)| *known == pool(*id)) {
                continue;
            }
            match snapshot.backends[*id].queue_for_permit(ask.turn) {
                Ok(Some(Admitted::Queued(ticket))) => self.tickets.push((pool(*id), ticket)),
                Ok(Some(Admitted::Passed(permit))) => self.granted = Some((pool(*id), permit)),
                // The queue of this backend is full: wait for the other backends.
                Ok(None) | Err(QueueFull) => {}
            }
        }
        let first = busy.opens.filter(|(at, _, by_quota)| *by_quota && *at <= latest).map(|(_, id, _)| id);
        let is_wanted = |id: &BackendId| first == Some(*id) || busy.reserved.contains(id);
        // A request that is first at a quota keeps this place while the backend is full.
        self.quotas.retain(|(id, _)| is_wanted(id) || busy.full.contains(id));
        for id in first.iter().chain(&busy.reserved) {
            let tokens = most_tokens(snapshot, ask, *id);
            match self.quotas.iter().find(|(known, _)| known == id) {
                Some((_, wait)) => wait.set_tokens(tokens),
                None => {
                    let wait = QuotaWait::new(&snapshot.backends[*id], tokens);
                    self.quotas.extend(wait.map(|wait| (*id, wait)));
                }
            }
        }
    }
}

/// The most tokens that a request is expected to use at any of its targets with this backend.
fn most_tokens(snapshot: &Snapshot, ask: &Ask<'_>, id: BackendId) -> u64 {
    let of = |target| {
        let (target, demand) = (Some((target, ask.model)), &ask.demand);
        let candidate = Candidate { target, demand, now: clock::now(), ticket: None, turn: ask.turn };
        snapshot.backends[id].need(&candidate).tokens()
    };
    snapshot.targets(ask).filter(|target| target.backend == id).map(of).max().unwrap_or(0)
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
        Some((at, ..)) if !busy.is_open_ended() => too_late(at, now),
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
