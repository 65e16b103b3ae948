//! Metrics, logs and traces. Each request has one [`RequestRecord`](record::RequestRecord), which feeds both.

pub(crate) mod record;

pub(crate) mod phase;

pub(crate) mod passed_over;

pub(crate) mod tries;

pub(crate) mod metrics;

mod tls_metrics;

pub(crate) mod token_metrics;

pub(crate) mod encode;

pub(crate) mod failures;

pub(crate) mod log;

pub(crate) mod line;

mod request_line;

pub(crate) mod otlp;

pub(crate) mod clients;

pub(crate) mod meter;

pub(crate) mod reloads;

pub(crate) mod ledger;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_utils::CachePadded;
use http::HeaderValue;

use crate::config::{Config, LogSettings};
use crate::telemetry::clients::ClientTotal;
use crate::telemetry::failures::Failures;
use crate::telemetry::ledger::Ledger;
use crate::telemetry::log::Log;
use crate::telemetry::metrics::Lane;
use crate::telemetry::otlp::queue::TraceQueue;
use crate::telemetry::reloads::Reloads;
use crate::time::Nanos;

/// The telemetry that all workers share.
#[derive(Debug)]
pub(crate) struct Telemetry {
    /// The lanes, one per worker.
    pub lanes: Box<[CachePadded<Lane>]>,
    /// Reloads so far.
    pub reloads: Reloads,
    /// The log.
    pub log: Log,
    /// What clients have used, by day.
    pub ledger: Arc<Ledger>,
    /// The last failures.
    pub failures: Failures,
    /// Finished traces.
    pub traces: TraceQueue,
    /// Whether each request gets a log line.
    log_requests: AtomicBool,
    /// Whether requests of monitors get one, too.
    log_probes: AtomicBool,
}

impl Telemetry {
    /// Creates the telemetry with all counts at 0.
    pub(crate) fn new(config: &Config, log: Log, ledger: Arc<Ledger>) -> Arc<Self> {
        let workers = config.server.workers;
        Arc::new(Telemetry {
            lanes: (0..workers).map(|_| CachePadded::default()).collect(),
            reloads: Reloads::new(),
            log,
            ledger,
            failures: Failures::default(),
            traces: TraceQueue::default(),
            log_requests: AtomicBool::new(config.log.requests),
            log_probes: AtomicBool::new(config.log.probes),
        })
    }

    /// The counts of requests without a client key, at `now`.
    pub(crate) fn anonymous(&self, now: Nanos) -> ClientTotal {
        ClientTotal::of(self.lanes.iter().map(|lane| &lane.anonymous), now)
    }

    /// Applies a new configuration.
    pub(crate) fn configure(&self, config: &LogSettings) {
        self.log.set_format(config.format);
        self.log_requests.store(config.requests, Ordering::Relaxed);
        self.log_probes.store(config.probes, Ordering::Relaxed);
    }
}

/// The access of one worker to the telemetry.
#[derive(Debug)]
pub(crate) struct Recorder {
    /// The worker's number.
    pub worker: usize,
    /// The shared telemetry, with the lanes of all workers.
    pub telemetry: Arc<Telemetry>,
    /// Id and number of tries of a request that a panic has just ended.
    pub panicked: RefCell<Option<(HeaderValue, u32)>>,
}

impl Recorder {
    /// Creates the recorder of worker number `worker`.
    pub(crate) fn new(worker: usize, telemetry: Arc<Telemetry>) -> Rc<Self> {
        Rc::new(Recorder { worker, telemetry, panicked: RefCell::default() })
    }

    /// The worker's lane.
    pub(crate) fn lane(&self) -> &Lane {
        &self.telemetry.lanes[self.worker]
    }
}
