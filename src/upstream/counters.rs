//! What one worker counts for one backend.

use std::sync::OnceLock;

use crate::code::Code;
use crate::counter::{Counter, Histogram, REQUEST};
use crate::protocol::Endpoint;

/// One worker's counts for one backend.
#[derive(Debug)]
pub(crate) struct BackendLane {
    /// Answers that went to clients.
    pub answers: Answers,
    /// Time from a request's arrival to the head of its answer.
    pub first_byte: Histogram,
    /// By the code of the failure that led to a further try.
    pub retries: [Counter; Code::ALL.len()],
    /// By the code of the failed try.
    pub errors: [Counter; Code::ALL.len()],
    /// Connections that serve a request.
    pub active: Counter,
    /// Connections that wait for one.
    pub idle: Counter,
}

impl Default for BackendLane {
    fn default() -> Self {
        BackendLane {
            answers: Answers::default(),
            first_byte: Histogram::new(REQUEST),
            retries: Default::default(),
            errors: Default::default(),
            active: Counter::default(),
            idle: Counter::default(),
        }
    }
}

impl BackendLane {
    /// The backend answered a client.
    pub(crate) fn answered(&self, endpoint: Endpoint, status: u16) {
        self.answers.count(endpoint, status);
    }

    /// Another try was made because this backend failed.
    pub(crate) fn retried(&self, reason: Code) {
        self.retries[reason as usize].add(1);
    }

    /// A try failed.
    pub(crate) fn failed(&self, kind: Code) {
        self.errors[kind as usize].add(1);
    }
}

/// Answers by endpoint and status. Rows are made when an endpoint is first used.
#[derive(Debug, Default)]
pub(crate) struct Answers([OnceLock<Box<[Counter]>>; Endpoint::ALL.len()]);

/// Statuses that are counted one by one; what is beyond them counts as the last of them.
pub(crate) const STATUSES: std::ops::Range<u16> = 100..600;

impl Answers {
    /// Counts an answer.
    pub(crate) fn count(&self, endpoint: Endpoint, status: u16) {
        let row = self.0[endpoint as usize].get_or_init(|| STATUSES.map(|_| Counter::default()).collect());
        // What is beyond them is a failure of no known kind, as the last of them.
        let status = status.min(STATUSES.end - 1);
        if let Some(counter) = row.get(usize::from(status.wrapping_sub(STATUSES.start))) {
            counter.add(1);
        }
    }

    /// The counts of an endpoint, by status; `None`: it was never used.
    pub(crate) fn row(&self, endpoint: Endpoint) -> Option<&[Counter]> {
        self.0[endpoint as usize].get().map(|row| &row[..])
    }
}
