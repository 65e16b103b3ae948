//! What all workers share: the fleet as a [`Snapshot`] behind an `ArcSwap`, and the counters of the policies.

pub mod snapshot;

pub mod clients;

use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arc_swap::ArcSwap;
use crossbeam_utils::CachePadded;
use tokio::sync::Notify;

use self::snapshot::Snapshot;
use crate::clock;
use crate::config::Config;
use crate::policy::Nanos;
use crate::policy::limit::Limiter;
use crate::policy::queue::Admission;
use crate::policy::retry::Budget;
use crate::telemetry::log::Log;
use crate::telemetry::metrics::{Lane, Reloads};
use crate::upstream::Upstream;
use crate::upstream::connect::Roots;

/// Everything that workers share.
#[derive(Debug)]
pub struct Shared {
    /// The fleet as it is now.
    pub snapshot: ArcSwap<Snapshot>,
    /// Client limits.
    pub limiter: Limiter,
    /// Slots and queue.
    pub admission: Arc<Admission>,
    /// Retries against offered requests.
    pub budget: Budget,
    /// One lane a worker.
    pub lanes: Box<[CachePadded<Lane>]>,
    /// Reloads so far.
    pub reloads: Reloads,
    /// The way to stderr.
    pub log: Log,
    /// Rung when a backend's state changed, so that the schedule is rebuilt.
    pub fleet_changed: Notify,
    draining: AtomicBool,
    log_requests: bool,
    hasher: RandomState,
}

impl Shared {
    /// Shared state for `config`, with as many lanes as it has workers.
    ///
    /// # Errors
    /// What is wrong with a backend's URL or certificates, for the operator.
    pub fn new(config: Config, log: Log) -> Result<Self, String> {
        let workers = config.server.workers;
        let roots = Roots::load(&config.backends, config.timeouts.connect);
        let backends: Result<Vec<_>, String> = config
            .backends
            .iter()
            .map(|b| Upstream::new(b.clone(), workers, &roots, config.queue.max_size).map(Arc::new))
            .collect();
        Ok(Shared {
            limiter: Limiter::new(config.rate_limit.max_keys),
            admission: Admission::new(config.queue.max_in_flight, config.queue.max_size),
            budget: Budget::new(config.retry.budget_percent),
            lanes: (0..workers).map(|_| CachePadded::default()).collect(),
            reloads: Reloads::default(),
            fleet_changed: Notify::new(),
            draining: AtomicBool::new(false),
            log_requests: config.log.requests,
            hasher: RandomState::new(),
            log,
            snapshot: ArcSwap::from_pointee(Snapshot::new(Arc::new(config), backends?.into())),
        })
    }

    /// Whether every request gets a line in the log.
    pub fn log_requests(&self) -> bool {
        self.log_requests
    }

    /// The process is on its way out.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// From now on new requests are refused.
    pub fn start_draining(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Something that is counted by, a credential or an address, as the rate limiter and the log know it: hashed with
    /// a key that dies with the process.
    pub fn key_of(&self, what: impl Hash) -> u64 {
        self.hasher.hash_one(what)
    }

    /// Makes the schedule anew from the backends' present states; returns when the next one changes by itself.
    pub fn rebuild(&self) -> Option<Nanos> {
        let current = self.snapshot.load_full();
        self.snapshot.store(Arc::new(current.rebuilt()));
        let now = clock::now();
        current.backends.iter().filter_map(|b| b.breaker.retries_key_at(now)).min()
    }
}

/// What only trying shows: certificates that do not load, addresses that are none.
///
/// # Errors
/// The first fault, for the operator.
pub fn check(config: &Config) -> Result<(), String> {
    let roots = Roots::load(&config.backends, config.timeouts.connect);
    for backend in &config.backends {
        Upstream::new(backend.clone(), 1, &roots, 0)?;
    }
    Ok(())
}
