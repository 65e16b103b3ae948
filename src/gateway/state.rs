//! What all workers share: the fleet as a [`Snapshot`] behind an `ArcSwap`, and the counters of the policies.

use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arc_swap::ArcSwap;
use tokio::sync::Notify;

use crate::clock;
use crate::config::Config;
use crate::gateway::pages::Pages;
use crate::policy::breaker::Change;
use crate::policy::choose;
use crate::policy::limit::Limiter;
use crate::policy::queue::Admission;
use crate::policy::retry::Budget;
use crate::protocol::Endpoint;
use crate::telemetry::Telemetry;
use crate::telemetry::clients::Clients;
use crate::telemetry::log::Log;
use crate::time::Nanos;
use crate::upstream::Upstream;
use crate::upstream::fleet::{Ask, Snapshot, View, prepare};

/// Everything that workers share.
#[derive(Debug)]
pub struct Shared {
    /// The fleet as it is now.
    pub(crate) snapshot: ArcSwap<Snapshot>,
    /// Client limits.
    pub(crate) limiter: Limiter,
    /// Slots and queue.
    pub(crate) admission: Arc<Admission>,
    /// Retries against offered requests.
    pub(crate) budget: Budget,
    /// Who may call.
    pub(crate) clients: ArcSwap<Clients>,
    /// Counters and log.
    pub(crate) telemetry: Arc<Telemetry>,
    /// Pages that are costly to make.
    pub(crate) pages: Pages,
    /// Rung when a backend's state changed, so that the schedule is rebuilt.
    pub(crate) fleet_changed: Notify,
    /// Rung when a backend may be asked again: requests in line look for a target anew.
    pub(crate) reopened: Notify,
    /// Rung when the configuration is to be read anew.
    pub(crate) reload_wanted: Notify,
    /// Rung when it was.
    pub(crate) reloaded: Notify,
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
            clients: ArcSwap::from_pointee(Clients::new(config, None)),
            telemetry: Telemetry::new(config.server.workers, log, config.log.requests),
            pages: Pages::default(),
            fleet_changed: Notify::new(),
            reopened: Notify::new(),
            reload_wanted: Notify::new(),
            reloaded: Notify::new(),
            draining: AtomicBool::new(false),
            hasher: RandomState::new(),
            snapshot: ArcSwap::from_pointee(snapshot),
        })
    }

    /// Puts another configuration's fleet, made by [`prepare`] of the present one, in its place. Requests under way keep
    /// the old; what is counted goes on under the new limits.
    pub(crate) fn replace(&self, next: Snapshot) {
        let config = &next.config;
        self.limiter.set_max_keys(config.rate_limit.max_keys);
        self.admission.resize(config.queue.max_in_flight, config.queue.max_size);
        self.budget.set_percent(config.retry.budget_percent);
        self.telemetry.configure(&config.log);
        self.clients.store(Arc::new(Clients::new(config, Some(&self.clients.load()))));
        let now = clock::now();
        next.backends.iter().for_each(|b| b.apply(config.queue.max_size, now));
        self.snapshot.store(Arc::new(next));
        self.reloaded.notify_waiters();
    }

    /// Logs a change of state with who saw it and why, and has the schedule rebuilt.
    pub(crate) fn announce(&self, upstream: &Upstream, change: Change, cause: &str) {
        let name = upstream.name();
        let (level, event, text) = match change {
            Change::Down => {
                let failures = self.snapshot.load().thresholds().failures;
                let in_a_row =
                    if failures == 1 { "1 failure" } else { &format!("{failures} failures in a row") };
                ("warn", "backend_down", format!("backend {name} is down after {in_a_row}: {cause}"))
            }
            Change::Misconfigured => (
                "error",
                "backend_misconfigured",
                format!("backend {name} refuses its api_key, or needs one: {cause}"),
            ),
            Change::Up => ("info", "backend_up", format!("backend {name} is up again: {cause}")),
        };
        self.telemetry.log.event(level, event, &text);
        self.fleet_changed.notify_one();
    }

    /// Picks a backend for a chat with `model` at `now`, takes a place there and gives it back: for benchmarks.
    #[doc(hidden)]
    pub fn pick_once(&self, model: &str, affinity: u64, now: Nanos) -> bool {
        let snapshot = self.snapshot.load();
        let Some(route) = snapshot.table().find(Some(model), true) else { return false };
        let ask = Ask { endpoint: Endpoint::Chat, route, model: Some(model), affinity: Some(affinity) };
        let view =
            View { snapshot: &snapshot, ask: &ask, now, turn: None, granted: None, stands_in_line: false };
        let picked = choose::pick(&view, true, |_| false);
        let target = picked.map(|id| &snapshot.route(&ask).targets[id]);
        target.and_then(|target| snapshot.upstream(target).enter(now, None)).is_some()
    }

    /// The process is on its way out.
    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// From now on new requests are refused.
    pub(crate) fn start_draining(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Something that is counted by, a credential or an address, as the rate limiter and the log know it: hashed with
    /// a key that dies with the process.
    pub(crate) fn key_of(&self, what: impl Hash) -> u64 {
        self.hasher.hash_one(what)
    }

    /// Makes the schedule anew from the backends' present states, and wakes the requests in line, since one of them may be
    /// served by a backend that is back; returns when the next one changes by itself.
    pub(crate) fn rebuild(&self) -> Option<Nanos> {
        let current = self.snapshot.load_full();
        self.snapshot.store(Arc::new(current.rebuilt()));
        self.reopened.notify_waiters();
        let now = clock::now();
        current.backends.iter().filter_map(|b| b.state.breaker.retries_key_at(now)).min()
    }
}
