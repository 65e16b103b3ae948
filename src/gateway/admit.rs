//! A slot, or a wait for one; and the wait for a backend to reopen.

use std::time::Duration;

use tokio::time::sleep;

use super::Gateway;
use crate::clock;
use crate::error::GatewayError;
use crate::policy::Nanos;
use crate::policy::queue::{Entry, QueueFull, Slot};
use crate::server::io::Conn;
use crate::telemetry::{Completion, Phase};

/// A backend that was full may have got room between the look at it and the wait: look again after this.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

impl From<QueueFull> for GatewayError {
    fn from(_: QueueFull) -> Self {
        GatewayError::QueueFull
    }
}

/// Takes a slot, waiting in line until `deadline` where none is free.
///
/// # Errors
/// [`GatewayError::QueueFull`] at once, [`GatewayError::QueueTimeout`] at the deadline.
pub async fn admit(
    gateway: &Gateway,
    conn: &Conn,
    completion: &mut Completion,
    deadline: Nanos,
) -> Result<Slot, GatewayError> {
    let place = match gateway.shared().admission.enter()? {
        Entry::Passed(slot) => return Ok(slot),
        Entry::Queued(place) => place,
    };
    completion.phase = Phase::Queued;
    let since = clock::now();
    let slot = conn.alarm.limit(deadline, place).await;
    waited(completion, since);
    // A slot that comes at the last moment comes too late for any backend.
    slot.ok().filter(|_| clock::now() < deadline).ok_or(GatewayError::QueueTimeout)
}

/// Waits, without a slot, until a backend may have reopened: at `opens`, or when one that was full has room.
///
/// # Errors
/// At once where `opens` lies too far ahead or too many wait already; else [`GatewayError::QueueTimeout`].
pub async fn wait_for_backend(
    gateway: &Gateway,
    conn: &Conn,
    completion: &mut Completion,
    opens: Option<Nanos>,
    deadline: Nanos,
) -> Result<(), GatewayError> {
    let since = clock::now();
    let latest = deadline.min(completion.started + clock::nanos(gateway.config().queue.max_wait));
    if let Some(at) = opens.filter(|at| *at > latest) {
        return Err(GatewayError::UpstreamRateLimited(at.saturating_sub(since)));
    }
    let _outside = gateway.shared().admission.wait_outside()?;
    completion.phase = Phase::Queued;
    let wait = opens.map_or(LOOK_AGAIN, |at| Duration::from_nanos(at.saturating_sub(since) + 1));
    let reopened = async {
        tokio::select! {
            () = sleep(wait) => {}
            () = gateway.shared().room.notified() => {}
        }
    };
    let result = conn.alarm.limit(deadline, reopened).await;
    waited(completion, since);
    result.map_err(|_| GatewayError::QueueTimeout)
}

fn waited(completion: &mut Completion, since: Nanos) {
    let waited = clock::now() - since;
    completion.queued = Some(completion.queued.unwrap_or(0) + waited);
    completion.others += waited;
}
