//! The counters of one worker for one backend.

use std::sync::OnceLock;

use crate::code::Code;
use crate::counter::{Counter, Histogram, REQUEST};
use crate::protocol::Endpoint;

/// The counters of one worker for one backend.
#[derive(Debug)]
pub(crate) struct BackendLane {
    /// Responses delivered to clients.
    pub responses: ResponseCounters,
    /// Time from a request's arrival to the head of its response.
    pub first_byte: Histogram,
    /// Retries, by the code of the failure that caused the retry.
    pub retries: [Counter; Code::ALL.len()],
    /// Failed tries, by the code of the failure.
    pub errors: [Counter; Code::ALL.len()],
    /// Connections in use.
    pub active: Counter,
    /// Idle connections.
    pub idle: Counter,
}

impl Default for BackendLane {
    fn default() -> Self {
        BackendLane {
            responses: ResponseCounters::default(),
            first_byte: Histogram::new(REQUEST),
            retries: Default::default(),
            errors: Default::default(),
            active: Counter::default(),
            idle: Counter::default(),
        }
    }
}

impl BackendLane {
    /// Counts a response of the backend that is delivered to a client.
    pub(crate) fn count_response(&self, endpoint: Endpoint, status: u16) {
        self.responses.count(endpoint, status);
    }

    /// Counts a retry that was made because this backend failed.
    pub(crate) fn retried(&self, reason: Code) {
        self.retries[reason as usize].add(1);
    }

    /// Counts a failed try.
    pub(crate) fn failed(&self, kind: Code) {
        self.errors[kind as usize].add(1);
    }
}

/// Number of responses by endpoint and status. The row of an endpoint is allocated on first use.
#[derive(Debug, Default)]
pub(crate) struct ResponseCounters([OnceLock<Box<[Counter]>>; Endpoint::COUNT]);

/// Statuses with a counter of their own. A higher status counts as the last of them.
pub(crate) const STATUSES: std::ops::Range<u16> = 100..600;

impl ResponseCounters {
    /// Counts a response. A status below the range is not counted.
    pub(crate) fn count(&self, endpoint: Endpoint, status: u16) {
        let row = self.0[endpoint as usize].get_or_init(|| STATUSES.map(|_| Counter::default()).collect());
        let status = status.min(STATUSES.end - 1);
        if let Some(counter) = row.get(usize::from(status.wrapping_sub(STATUSES.start))) {
            counter.add(1);
        }
    }

    /// The counters of an endpoint, by status; `None` if the endpoint was never used.
    pub(crate) fn row(&self, endpoint: Endpoint) -> Option<&[Counter]> {
        self.0[endpoint as usize].get().map(|row| &row[..])
    }
}
