//! What all workers share: the fleet as a [`Snapshot`] behind an `ArcSwap`, and the counters of the policies.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arc_swap::ArcSwap;
use crossbeam_utils::CachePadded;
use tokio::sync::Notify;

use crate::clock;
use crate::config::{Config, Strategy};
use crate::policy::Nanos;
use crate::policy::balance::{BackendId, Schedule, load};
use crate::policy::breaker::{Status, Thresholds};
use crate::policy::limit::Limiter;
use crate::policy::queue::Admission;
use crate::policy::retry::Budget;
use crate::telemetry::log::Log;
use crate::telemetry::metrics::{Lane, Reloads};
use crate::upstream::connect::Roots;
use crate::upstream::{Ask, Closed, InFlight, Upstream};

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
    /// Rung when a backend that was full has room.
    pub room: Arc<Notify>,
    draining: AtomicBool,
    log_requests: bool,
    hasher: RandomState,
}

/// The fleet and its settings; replaced as a whole.
#[derive(Debug)]
pub struct Snapshot {
    /// What the operator wrote.
    pub config: Arc<Config>,
    /// All backends, drained ones too.
    pub backends: Arc<[Arc<Upstream>]>,
    /// By priority, lowest first: those that were up when this was made.
    tiers: Vec<Arc<Schedule>>,
    /// Every backend with a weight, up or not.
    all: Arc<Schedule>,
}

/// What [`Snapshot::pick`] found.
#[derive(Debug)]
pub enum Pick {
    /// Ask this one.
    Backend(InFlight),
    /// Everybody that could be asked is busy; the first is known, or guessed, to be free then.
    Busy {
        /// When a backend reopens by itself, if one does.
        opens: Option<Nanos>,
    },
    /// Nobody can be asked: drained or misconfigured.
    Nobody,
    /// All that could be asked are out.
    Out,
    /// All that could be asked were tried.
    Tried,
}

impl Shared {
    /// Shared state for `config`, with as many lanes as it has workers.
    ///
    /// # Errors
    /// What is wrong with a backend's URL or certificates, for the operator.
    pub fn new(config: Config, log: Log) -> Result<Self, String> {
        let workers = config.server.workers;
        let room = Arc::new(Notify::new());
        let roots = Roots::load(&config.backends, config.timeouts.connect);
        let backends: Result<Vec<_>, String> = config
            .backends
            .iter()
            .map(|b| Upstream::new(b.clone(), workers, &roots, room.clone()).map(Arc::new))
            .collect();
        Ok(Shared {
            limiter: Limiter::new(config.rate_limit.max_keys),
            admission: Admission::new(config.queue.max_in_flight, config.queue.max_size),
            budget: Budget::new(config.retry.budget_percent),
            lanes: (0..workers).map(|_| CachePadded::default()).collect(),
            reloads: Reloads::default(),
            fleet_changed: Notify::new(),
            room,
            draining: AtomicBool::new(false),
            log_requests: config.log.requests,
            hasher: RandomState::new(),
            log,
            snapshot: ArcSwap::from_pointee(Snapshot::new(Arc::new(config), backends?.into(), &[])),
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

    /// A credential as the rate limiter and the log know it: hashed with a key that dies with the process.
    pub fn client_key(&self, credential: &[u8]) -> u64 {
        self.hasher.hash_one(credential)
    }

    /// Makes the schedule anew from the backends' present states; returns when the next one changes by itself.
    pub fn rebuild(&self) -> Option<Nanos> {
        let current = self.snapshot.load_full();
        let next = Snapshot::new(current.config.clone(), current.backends.clone(), &current.tiers);
        self.snapshot.store(Arc::new(next));
        let now = clock::now();
        current.backends.iter().filter_map(|b| b.breaker.retries_key_at(now)).min()
    }
}

impl Snapshot {
    /// `before`: the tiers of the snapshot that this one replaces; one whose members are the same goes on turning.
    fn new(config: Arc<Config>, backends: Arc<[Arc<Upstream>]>, before: &[Arc<Schedule>]) -> Self {
        let now = clock::now();
        let weighted = |id: BackendId| (id, backends[id].conf.weight);
        let mut priorities: Vec<u32> = backends.iter().map(|b| b.conf.priority).collect();
        priorities.sort_unstable();
        priorities.dedup();
        let in_tier = |priority: u32| {
            let ids = (0..backends.len()).filter(|id| backends[*id].conf.priority == priority);
            let up = |id: &BackendId| backends[*id].breaker.is_up(now);
            // Nobody up: the state may change before the next rebuild, so the whole tier stays listed.
            let (mut listed, rest): (Vec<_>, Vec<_>) = ids.partition(up);
            if listed.is_empty() {
                listed = rest;
            }
            let next = Schedule::new(listed.into_iter().map(weighted));
            before.iter().find(|s| s.members() == next.members()).cloned().unwrap_or(Arc::new(next))
        };
        let tiers = priorities.into_iter().map(in_tier).collect();
        let all = Arc::new(Schedule::new((0..backends.len()).map(weighted)));
        Snapshot { config, tiers, all, backends }
    }

    /// Failures and successes that change a backend's state.
    pub fn thresholds(&self) -> Thresholds {
        let health = &self.config.health;
        Thresholds { failures: health.failure_threshold, successes: health.success_threshold }
    }

    /// Chooses a backend that is eligible at `now` and not in `tried`, and takes a place at it.
    pub fn pick(&self, now: Nanos, ask: Ask, tried: &[BackendId]) -> Pick {
        for tier in self.tiers.iter().chain([&self.all]) {
            // Another request may take the last place between the choice and the entry: then choose again.
            for _ in 0..=tier.members().len() {
                let Some(id) = self.choose(tier, now, ask, tried) else { break };
                if let Some(entered) = self.backends[id].enter(now) {
                    return Pick::Backend(entered);
                }
            }
        }
        self.why_nobody(now, ask, tried)
    }

    /// Takes a place at the first of `order` that may be asked: the second round goes as the first went.
    pub fn pick_in_order(&self, now: Nanos, ask: Ask, order: &[BackendId]) -> Option<InFlight> {
        order
            .iter()
            .filter(|id| self.backends[**id].check(now, ask).is_ok())
            .find_map(|id| self.backends[*id].enter(now))
    }

    /// The least bad of those that are out: the one that failed least of late.
    pub fn pick_in_panic(&self, now: Nanos, ask: Ask) -> Option<InFlight> {
        let out = |id: BackendId| self.backends[id].check(now, ask) == Err(Closed::Out(Status::Ejected));
        let id = self.all.least_loaded(|id, weight| {
            out(id).then(|| load(self.backends[id].in_flight(), weight, self.backends[id].penalty.at(now), 0))
        })?;
        self.backends[id].enter(now)
    }

    /// The backend's index.
    pub fn id_of(&self, upstream: &Upstream) -> Option<BackendId> {
        self.backends.iter().position(|b| b.id == upstream.id)
    }

    fn choose(&self, tier: &Schedule, now: Nanos, ask: Ask, tried: &[BackendId]) -> Option<BackendId> {
        let eligible = |id: BackendId| !tried.contains(&id) && self.backends[id].check(now, ask).is_ok();
        match self.config.strategy {
            Strategy::RoundRobin => tier.round_robin(eligible),
            Strategy::LeastLoaded => tier.least_loaded(|id, weight| {
                let b = &self.backends[id];
                eligible(id).then(|| load(b.in_flight(), weight, b.penalty.at(now), b.breaker.up_for(now)))
            }),
        }
    }

    fn why_nobody(&self, now: Nanos, ask: Ask, tried: &[BackendId]) -> Pick {
        let (mut opens, mut full, mut out) = (None::<Nanos>, false, false);
        for (id, _) in self.all.members().iter().filter(|m| !tried.contains(&m.0)) {
            match self.backends[*id].check(now, ask) {
                Err(Closed::Until(at)) => opens = Some(opens.map_or(at, |o| o.min(at))),
                Err(Closed::Full) | Ok(()) => full = true,
                Err(Closed::Out(Status::Ejected)) => out = true,
                Err(Closed::Out(_) | Closed::Unfit) => {}
            }
        }
        if !tried.is_empty() {
            Pick::Tried
        } else if opens.is_some() || full {
            Pick::Busy { opens }
        } else if out {
            Pick::Out
        } else {
            Pick::Nobody
        }
    }
}

/// What only trying shows: certificates that do not load, addresses that are none.
///
/// # Errors
/// The first fault, for the operator.
pub fn check(config: &Config) -> Result<(), String> {
    let roots = Roots::load(&config.backends, config.timeouts.connect);
    for backend in &config.backends {
        Upstream::new(backend.clone(), 1, &roots, Arc::default())?;
    }
    Ok(())
}
