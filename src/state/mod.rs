//! What all workers share: the fleet as a [`Snapshot`] behind an `ArcSwap`, and the counters of the policies.

pub mod snapshot;

pub mod clients;

pub mod pages;

use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arc_swap::ArcSwap;
use crossbeam_utils::CachePadded;
use tokio::sync::Notify;

use self::pages::Pages;
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
    /// Pages that are costly to make.
    pub pages: Pages,
    /// Reloads so far.
    pub reloads: Reloads,
    /// The way to stderr.
    pub log: Log,
    /// Rung when a backend's state changed, so that the schedule is rebuilt.
    pub fleet_changed: Notify,
    /// Rung when a backend may be asked again: requests in line look for a target anew.
    pub reopened: Notify,
    /// Rung when the configuration is to be read anew.
    pub reload_wanted: Notify,
    /// Rung when it was.
    pub reloaded: Notify,
    draining: AtomicBool,
    hasher: RandomState,
}

impl Shared {
    /// Shared state for `config`, with as many lanes as it has workers.
    ///
    /// # Errors
    /// What is wrong with a backend's URL or certificates, for the operator.
    pub fn new(config: Config, log: Log) -> Result<Self, String> {
        let snapshot = prepare(config, None)?;
        let config = &snapshot.config;
        Ok(Shared {
            limiter: Limiter::new(config.rate_limit.max_keys),
            admission: Admission::new(config.queue.max_in_flight, config.queue.max_size),
            budget: Budget::new(config.retry.budget_percent),
            lanes: (0..config.server.workers).map(|_| CachePadded::default()).collect(),
            pages: Pages::default(),
            reloads: Reloads::default(),
            fleet_changed: Notify::new(),
            reopened: Notify::new(),
            reload_wanted: Notify::new(),
            reloaded: Notify::new(),
            draining: AtomicBool::new(false),
            hasher: RandomState::new(),
            log,
            snapshot: ArcSwap::from_pointee(snapshot),
        })
    }

    /// Whether every request gets a line in the log.
    pub fn log_requests(&self) -> bool {
        self.snapshot.load().config.log.requests
    }

    /// Puts another configuration's fleet, made by [`prepare`] of the present one, in its place. Requests under way keep
    /// the old; what is counted goes on under the new limits.
    pub fn replace(&self, next: Snapshot) {
        let config = &next.config;
        self.limiter.set_max_keys(config.rate_limit.max_keys);
        self.admission.resize(config.queue.max_in_flight, config.queue.max_size);
        self.budget.set_percent(config.retry.budget_percent);
        self.log.set_format(config.log.events);
        let now = clock::now();
        next.backends.iter().for_each(|b| b.apply(config.queue.max_size, now));
        self.snapshot.store(Arc::new(next));
        self.reloaded.notify_waiters();
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

    /// Makes the schedule anew from the backends' present states, and wakes the requests in line, since one of them may be
    /// served by a backend that is back; returns when the next one changes by itself.
    pub fn rebuild(&self) -> Option<Nanos> {
        let current = self.snapshot.load_full();
        self.snapshot.store(Arc::new(current.rebuilt()));
        self.reopened.notify_waiters();
        let now = clock::now();
        current.backends.iter().filter_map(|b| b.live.breaker.retries_key_at(now)).min()
    }
}

/// The fleet of a configuration, with what lives on of the one `before`; that one is left as it is. Reads certificates,
/// so it may block.
///
/// # Errors
/// What only trying shows, for the operator: the first certificate that does not load or address that is none.
pub fn prepare(config: Config, before: Option<&Snapshot>) -> Result<Snapshot, String> {
    let roots = Roots::load(&config.backends);
    let known = |name: &str| before?.backends.iter().find(|b| b.name() == name).map(|b| &**b);
    let backends: Result<Vec<_>, String> = config
        .backends
        .iter()
        .map(|b| {
            let upstream = Upstream::new(
                b.clone(),
                config.server.workers,
                &roots,
                config.queue.max_size,
                known(&b.name),
            );
            upstream.map(Arc::new)
        })
        .collect();
    Ok(Snapshot::new(Arc::new(config), backends?.into(), before))
}
