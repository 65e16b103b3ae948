//! A slot, or a wait for one; and the wait for a backend to reopen, in the lines before it.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::futures::Notified;
use tokio::time::sleep;

use crate::client::deadline::Elapsed;
use crate::client::exchange::Exchange;
use crate::clock;
use crate::gateway::Gateway;
use crate::gateway::refusal::GatewayError;
use crate::policy::balance::BackendId;
use crate::policy::dispatch::Busy;
use crate::policy::queue::{Admitted, Outside, Permit, QueueFull, Ticket};
use crate::policy::quota::{LEEWAY, QuotaTicket};
use crate::telemetry::{Phase, RequestRecord};
use crate::time::Nanos;
use crate::upstream::fleet::Snapshot;
use crate::upstream::in_flight::InLine;

impl From<QueueFull> for GatewayError {
    fn from(_: QueueFull) -> Self {
        GatewayError::QueueFull
    }
}

/// Takes a slot, waiting in line until `deadline` where none is free.
///
/// # Errors
/// [`GatewayError::QueueFull`] at once, [`GatewayError::QueueTimeout`] at the deadline.
pub(crate) async fn admit(
    gateway: &Gateway,
    exchange: &Exchange,
    record: &mut RequestRecord,
    deadline: Nanos,
) -> Result<Permit, GatewayError> {
    let place = match gateway.shared().admission.enter()? {
        Admitted::Passed(slot) => return Ok(slot),
        Admitted::Queued(place) => place,
    };
    record.phase = Phase::Queued;
    let since = clock::now();
    let slot = exchange.limit(deadline, place).await;
    waited(record, since);
    // A slot that comes at the last moment comes too late for any backend.
    slot.ok().filter(|_| clock::now() < deadline).ok_or(GatewayError::QueueTimeout)
}

/// Where a request stands in the lines before busy backends. Dropping it leaves them all.
#[derive(Default)]
pub(crate) struct Lines {
    /// Before a quota.
    quota: Option<(BackendId, InLine)>,
    /// Before full backends.
    places: Vec<(BackendId, Ticket)>,
    /// A place that came.
    pub granted: Option<(BackendId, Permit)>,
    /// It counts as waiting from its first wait on, so that nobody takes its place in the queue while it looks again.
    outside: Option<Outside>,
}

/// What a request waits for.
pub(crate) struct Wait<'a> {
    /// The fleet.
    pub snapshot: &'a Snapshot,
    /// The targets that it waits for.
    pub busy: &'a Busy,
    /// Until when.
    pub deadline: Nanos,
    /// Ends the wait when any backend reopens.
    pub reopened: Option<Notified<'a>>,
}

/// What ended a wait.
enum Woken {
    /// Somebody has left the line, so that the others moved up.
    Moved,
    /// A backend may have reopened, or has a place.
    Opened,
}

impl Lines {
    /// The turn at a quota, if it waits for one.
    pub(crate) fn turn(&self) -> Option<&QuotaTicket> {
        self.quota.as_ref().and_then(|(_, line)| line.turn())
    }

    /// Whether the request waits for busy targets, in whatever line.
    pub(crate) fn stands(&self) -> bool {
        self.outside.is_some() || self.quota.is_some() || !self.places.is_empty()
    }

    /// Takes a slot for another look, without losing what the request has waited for where one is free.
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
        // It may not count twice while it waits for a slot.
        self.outside = None;
        admit(gateway, exchange, record, deadline).await
    }

    /// Leaves all lines where the request has `entered` a backend.
    pub(crate) fn served(&mut self, backend: BackendId, entered: bool) {
        if !entered {
            return;
        }
        if let Some((_, line)) = self.quota.take_if(|(id, _)| *id == backend) {
            line.served();
        }
        *self = Lines::default();
    }

    /// Waits, without a slot, until one of the busy targets may have reopened: at its time, when a full one has a place, or
    /// when any backend reopened. The places in line are kept until a target is [`served`](Self::served).
    ///
    /// # Errors
    /// At once where none opens in time or too many wait already; else [`GatewayError::QueueTimeout`].
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
        let latest = deadline.min(record.started + clock::nanos(snapshot.config.queue.max_wait));
        let in_time = |at: &Nanos| *at <= latest;
        let first = busy.opens.filter(|(at, ..)| in_time(at));
        if let (None, Some((at, ..)), true) = (first, busy.opens, busy.full.is_empty()) {
            return Err(too_late(at, since));
        }
        if self.outside.is_none() {
            self.outside = Some(gateway.shared().admission.wait_outside()?);
        }
        record.phase = Phase::Queued;
        self.stand(snapshot, busy, first);
        let result = loop {
            let mut moved =
                pin!(self.quota.as_ref().map(|(id, _)| snapshot.backends[*id].state.moved.notified()));
            if let Some(moved) = moved.as_mut().as_pin_mut() {
                moved.enable();
            }
            let now = clock::now();
            let at = match &self.quota {
                // Where the backend is full as well, only a place helps.
                Some((id, line)) if !busy.full.contains(id) => Some(line.opens_at(now)),
                _ => first.map(|(at, ..)| at),
            };
            match at {
                _ if self.granted.is_some() => break Ok(()),
                None if self.places.is_empty() => break Err(GatewayError::QueueFull),
                Some(at) if self.places.is_empty() && !in_time(&at) => {
                    break Err(too_late(at, now));
                }
                _ => {}
            }
            let mut opened = pin!(at.filter(in_time).map(|at| sleep(nap(at, now))));
            let (places, granted) = (&mut self.places, &mut self.granted);
            let woken = poll_fn(|cx| {
                *granted = poll_places(places, cx);
                if granted.is_some()
                    || is_ready(opened.as_mut().as_pin_mut(), cx)
                    || is_ready(reopened.as_mut().as_pin_mut(), cx)
                {
                    return Poll::Ready(Woken::Opened);
                }
                if is_ready(moved.as_mut().as_pin_mut(), cx) {
                    return Poll::Ready(Woken::Moved);
                }
                Poll::Pending
            });
            match exchange.limit(deadline, woken).await {
                Ok(Woken::Opened) => break Ok(()),
                Ok(Woken::Moved) => {}
                Err(Elapsed) => break Err(GatewayError::QueueTimeout),
            }
        };
        waited(record, since);
        result
    }

    /// Stands before those that are full, and before the quota that opens `first`; where it stands already, it stays.
    fn stand(&mut self, snapshot: &Snapshot, busy: &Busy, first: Option<(Nanos, BackendId, bool)>) {
        self.places.retain(|(id, _)| busy.full.contains(id));
        for id in &busy.full {
            if self.places.iter().any(|(known, _)| known == id) {
                continue;
            }
            match snapshot.backends[*id].wait_for_place() {
                Ok(Some(Admitted::Queued(place))) => self.places.push((*id, place)),
                Ok(Some(Admitted::Passed(slot))) => self.granted = Some((*id, slot)),
                // As many wait for it as may: then for the others alone.
                Ok(None) | Err(QueueFull) => {}
            }
        }
        // Whose turn at a quota has come while the backend is full keeps it.
        let kept = self.quota.as_ref().map(|(id, _)| *id).filter(|id| busy.full.contains(id));
        let quota = first.filter(|(_, _, by_quota)| *by_quota).map(|(_, id, _)| id).or(kept);
        if self.quota.as_ref().map(|(id, _)| *id) != quota {
            self.quota = quota.and_then(|id| Some((id, InLine::new(&snapshot.backends[id])?)));
        }
    }
}

/// What to say where nobody waits for those who are `busy`.
pub(crate) fn refusal(busy: &Busy, now: Nanos) -> GatewayError {
    match busy.opens {
        Some((at, ..)) if busy.full.is_empty() => too_late(at, now),
        _ => GatewayError::QueueFull,
    }
}

/// Nothing opens in time. Who comes back as long before `at` as a quota allows for is in time: it waits that little.
fn too_late(at: Nanos, now: Nanos) -> GatewayError {
    GatewayError::UpstreamRateLimited(at.saturating_sub(now).saturating_sub(LEEWAY))
}

/// Just past `at`, from `now` on.
fn nap(at: Nanos, now: Nanos) -> Duration {
    Duration::from_nanos(at.saturating_sub(now) + 1)
}

/// The first place whose turn has come.
fn poll_places(places: &mut Vec<(BackendId, Ticket)>, cx: &mut Context<'_>) -> Option<(BackendId, Permit)> {
    let ready = |(i, (id, place)): (usize, &mut (BackendId, Ticket))| match Pin::new(place).poll(cx) {
        Poll::Ready(slot) => Some((i, *id, slot)),
        Poll::Pending => None,
    };
    let (i, id, slot) = places.iter_mut().enumerate().find_map(ready)?;
    drop(places.swap_remove(i));
    Some((id, slot))
}

fn is_ready<F: Future>(future: Option<Pin<&mut F>>, cx: &mut Context<'_>) -> bool {
    future.is_some_and(|future| future.poll(cx).is_ready())
}

fn waited(record: &mut RequestRecord, since: Nanos) {
    let waited = clock::now() - since;
    record.queued = Some(record.queued.unwrap_or(0) + waited);
    record.others += waited;
}
