//! Admission of a request: takes one of the gateway's slots, or waits in the queue for one.
//!
//! [`crate::gateway::backend_queue`] holds the other wait, for a backend that is busy.

use crate::client::exchange::Exchange;
use crate::clock;
use crate::gateway::Gateway;
use crate::gateway::refusal::GatewayError;
use crate::policy::queue::{Admitted, Permit, QueueFull, Turn};
use crate::telemetry::phase::Phase;
use crate::telemetry::record::RequestRecord;
use crate::time::Nanos;

impl From<QueueFull> for GatewayError {
    fn from(_: QueueFull) -> Self {
        GatewayError::QueueFull
    }
}

/// Takes a slot. Waits in the queue until `deadline` if none is free.
///
/// # Errors
/// Returns [`GatewayError::QueueFull`] at once, or [`GatewayError::QueueTimeout`] at the deadline.
pub(crate) async fn admit(
    gateway: &Gateway,
    exchange: &Exchange,
    record: &mut RequestRecord,
    (deadline, turn): (Nanos, Turn),
) -> Result<Permit, GatewayError> {
    let ticket = match gateway.shared().admission.enter(turn)? {
        Admitted::Passed(slot) => return Ok(slot),
        Admitted::Queued(ticket) => ticket,
    };
    record.phase = Phase::Queued;
    let since = clock::now();
    let slot = exchange.limit(deadline, ticket).await;
    record.add_queued(clock::now() - since);
    // A slot at the last moment leaves no time for a backend.
    slot.ok().filter(|_| clock::now() < deadline).ok_or(GatewayError::QueueTimeout)
}
