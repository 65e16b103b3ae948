//! The counters of one worker for one backend.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::code::Code;
use crate::counter::{Counter, Histogram, PER_TOKEN, REQUEST, Recent};
use crate::policy::breaker::Probe;
use crate::protocol::Endpoint;
use crate::upstream::token_counters::TokenCounters;

/// Why a response with a good status was no answer, so that another target was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub(crate) enum NoAnswer {
    Cut,
    Empty,
    ErrorEvent,
    JsonError,
    Timeout,
}

impl NoAnswer {
    /// All reasons with their names, in the order of their discriminants.
    pub(crate) const ALL: [(&str, NoAnswer); 5] = [
        ("cut", NoAnswer::Cut),
        ("empty", NoAnswer::Empty),
        ("error_event", NoAnswer::ErrorEvent),
        ("json_error", NoAnswer::JsonError),
        ("timeout", NoAnswer::Timeout),
    ];
}

/// The health checks of one backend, by result.
#[derive(Debug, Default)]
pub(crate) struct CheckCounters([AtomicU64; Self::RESULTS.len()]);

impl CheckCounters {
    /// The results with their names.
    const RESULTS: [(&str, Probe); 3] =
        [("failed", Probe::Failed), ("ok", Probe::Alive), ("unauthorized", Probe::BadKey)];

    /// Counts one check.
    pub(crate) fn add(&self, result: Probe) {
        for ((_, known), count) in Self::RESULTS.iter().zip(&self.0) {
            count.fetch_add(u64::from(*known == result), Ordering::Relaxed);
        }
    }

    /// The number of checks of each result, by name.
    pub(crate) fn all(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let counts = self.0.iter().map(|count| count.load(Ordering::Relaxed));
        Self::RESULTS.into_iter().map(|(name, _)| name).zip(counts)
    }
}

/// The counters of one worker for one backend.
#[derive(Debug)]
pub(crate) struct BackendLane {
    /// Responses delivered to clients.
    pub responses: ResponseCounters,
    /// Time from the start of a try to the head of its response, or to its failure.
    pub first_byte: Histogram,
    /// Time from a streamed request's arrival to the first content of its response.
    pub first_token: Histogram,
    /// Mean time between the output tokens of a streamed response.
    pub per_output_token: Histogram,
    /// The token counts of the responses, by model.
    pub tokens: TokenCounters,
    /// Input and output tokens of the last minute.
    pub recent_tokens: Recent,
    /// Responses whose token counts were estimated.
    pub usage_missing: Counter,
    /// Retries, by the code of the failure that caused the retry.
    pub retries: [Counter; Code::ALL.len()],
    /// Failed tries, by the code of the failure.
    pub errors: [Counter; Code::ALL.len()],
    /// Requests that went to another target although this backend had responded, by reason.
    prelude_failovers: [Counter; NoAnswer::ALL.len()],
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
            first_token: Histogram::new(REQUEST),
            per_output_token: Histogram::new(PER_TOKEN),
            tokens: TokenCounters::default(),
            recent_tokens: Recent::default(),
            usage_missing: Counter::default(),
            retries: std::array::from_fn(|_| Counter::default()),
            errors: std::array::from_fn(|_| Counter::default()),
            prelude_failovers: Default::default(),
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

    /// Counts a request that goes to another target although this backend has responded.
    pub(crate) fn failed_over(&self, reason: NoAnswer) {
        self.prelude_failovers[reason as usize].add(1);
    }

    /// The number of requests that went to another target for this reason.
    pub(crate) fn prelude_failovers(&self, reason: NoAnswer) -> u64 {
        self.prelude_failovers[reason as usize].get()
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

    /// The number of responses of all endpoints.
    pub(crate) fn total(&self) -> u64 {
        self.0.iter().filter_map(OnceLock::get).flatten().map(Counter::get).sum()
    }

    /// The counters of an endpoint, by status; `None` if the endpoint was never used.
    pub(crate) fn row(&self, endpoint: Endpoint) -> Option<&[Counter]> {
        self.0[endpoint as usize].get().map(|row| &row[..])
    }
}
