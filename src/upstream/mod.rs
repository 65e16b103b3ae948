//! Backends at run time: connections, one try, health checks. Nothing here knows a client.

pub(crate) mod connect;

pub(crate) mod dial;

pub(crate) mod proxy;

pub(crate) mod fault;

pub(crate) mod get;

pub(crate) mod post;

pub(crate) mod link;

mod receive_window;

pub(crate) mod paths;

pub(crate) mod resolver;

pub(crate) mod pool;

pub(crate) mod send;

pub(crate) mod listing;

mod account;

pub(crate) mod fleet;

mod heads;

pub(crate) mod in_flight;

pub(crate) mod limits;

mod rotation;

mod routing;

pub(crate) mod counters;

pub(crate) mod token_counters;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crossbeam_utils::CachePadded;
use http::request::Parts;
use http::{HeaderName, HeaderValue};
use parking_lot::Mutex;
use tokio::sync::Notify;
use xxhash_rust::xxh64::xxh64;

use crate::clock;
use crate::config;
use crate::config::UsageMode;
use crate::policy::balance::{BackendId, Penalty};
use crate::policy::breaker::{Breaker, Status};
use crate::policy::choose::Closed;
use crate::policy::latency::Latencies;
use crate::policy::prices::{Price, PriceTable};
use crate::policy::queue::{Admission, Admitted, QueueFull, Turn};
use crate::policy::quota::{Quota, QuotaLimits};
use crate::policy::ratio::{Demand, Ratios};
use crate::policy::spend::SpendLimit;
use crate::protocol::Endpoint;
use crate::protocol::request_limits;
use crate::protocol::usage::Usage;
use crate::protocol::usage_request::STREAM_OPTIONS;
use crate::time::Nanos;
use crate::upstream::account::is_same_account;
use crate::upstream::connect::Connector;
use crate::upstream::counters::{BackendLane, CheckCounters};
use crate::upstream::fault::Fault;
use crate::upstream::heads::Heads;
use crate::upstream::limits::{Candidate, quota_limits};
use crate::upstream::paths::joined;

static NEXT_ID: AtomicU64 = AtomicU64::new(0);

/// What a backend may have of the gateway's queue.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BackendShare {
    /// Most of the gateway's slots; `None`: all.
    pub slots: Option<usize>,
    /// Most requests that may wait for the backend.
    pub waiters: usize,
}

/// A backend at run time: its prepared configuration, and the state that all workers share.
#[derive(Debug)]
pub(crate) struct Upstream {
    /// The configuration.
    pub conf: config::Backend,
    /// State that survives a reload if the account at the provider stays the same.
    pub state: Arc<BackendState>,
    /// The counters, one lane for each worker. They survive a reload if the name stays the same.
    pub lanes: Arc<[CachePadded<BackendLane>]>,
    /// The health checks. They survive a reload if the name stays the same.
    pub checks: Arc<CheckCounters>,
    heads: Heads,
    /// The value of `x-zap-backend`.
    pub label: HeaderValue,
    /// A hash of the name, the same in every process.
    pub identity: u64,
    connector: Connector,
    /// The connector of health checks.
    check_connector: Connector,
    /// The limit of [`max_in_flight`](Self::max_in_flight), and the queue in front of it.
    admission: Option<Arc<Admission>>,
    max_in_flight: Option<usize>,
    quota: Option<Arc<Quota>>,
    budget: Option<Arc<SpendLimit>>,
    prices: PriceTable,
    asks_for_usage: bool,
    /// Whether the backend is not sent a maximum of output.
    drops_maximum: bool,
}

/// The state of a backend across reloads.
#[derive(Debug)]
pub(crate) struct BackendState {
    /// Unique in the process. Pools and health checks refer to the backend by this id.
    pub id: u64,
    /// Health, cooldowns and a refused key.
    pub breaker: Breaker,
    /// Tokens per byte, by pair.
    pub ratios: Ratios,
    /// Recent failures, for the strategy `least_loaded`.
    pub penalty: Penalty,
    /// Times to first content, for the strategy `least_latency`.
    pub latencies: Latencies,
    /// Notified when a request has left the queue of the quota, or the limit has changed.
    pub quota_changed: Notify,
    /// When a byte of an answer came last; 0: never.
    heard: AtomicU64,
    in_flight: CachePadded<AtomicUsize>,
    last_error: Mutex<Option<(std::time::SystemTime, Fault)>>,
    /// Why the backend is out, in words, as the log says it; empty: it is not.
    outage: Mutex<String>,
}

impl BackendState {
    fn new() -> Self {
        BackendState {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            breaker: Breaker::new(),
            ratios: Ratios::default(),
            penalty: Penalty::default(),
            latencies: Latencies::default(),
            quota_changed: Notify::new(),
            heard: AtomicU64::new(0),
            in_flight: CachePadded::default(),
            last_error: Mutex::default(),
            outage: Mutex::default(),
        }
    }

    /// Records that a byte of an answer came at `now`.
    pub(crate) fn hear(&self, now: Nanos) {
        // A write takes the cache line from the other workers, a read does not.
        if self.heard.load(Ordering::Relaxed) < now {
            self.heard.store(now, Ordering::Relaxed);
        }
    }

    /// Whether a byte of an answer came at `since` or later.
    pub(crate) fn was_heard_since(&self, since: Nanos) -> bool {
        self.heard.load(Ordering::Relaxed) >= since
    }
}

impl Upstream {
    /// Prepares a configured backend with its place in the `queue`. `before` is the backend of the same name before a
    /// reload: the counters are shared with it, and the whole state if the account is the same. The shared state does
    /// not change before [`apply`](Self::apply).
    ///
    /// # Errors
    /// Returns a message for the operator if the URL or the certificates are invalid.
    pub(crate) fn new(
        conf: config::Backend,
        workers: usize,
        roots: &connect::Roots,
        queue: BackendShare,
        before: Option<&Upstream>,
    ) -> Result<Self, String> {
        let name = conf.name.clone();
        let bad = |what: &str| format!("backend {name}: {what}");
        let connector = Connector::new(&conf, roots).map_err(|e| bad(&e))?;
        let heads = Heads::new(&conf).map_err(bad)?;
        let lanes = before.map(|b| b.lanes.clone());
        let same =
            before.filter(|b| is_same_account(&b.conf, &conf) && b.connector.has_same_roots(&connector));
        let max_in_flight = conf.max_in_flight.into_iter().chain(queue.slots).min();
        let admission = max_in_flight.map(|max| {
            same.and_then(|b| b.admission.clone())
                .unwrap_or_else(|| Admission::of_one_backend(max, queue.waiters))
        });
        let limits = quota_limits(&conf);
        let kept = same.and_then(|b| b.quota.clone()).filter(|_| limits != QuotaLimits::default());
        let quota = kept.or_else(|| Quota::new(limits));
        let spent = before.and_then(|b| b.budget.as_ref());
        let budget = conf.budget.map(|b| SpendLimit::renewed(spent, b.nano_usd, b.per, clock::today()));
        Ok(Upstream {
            state: same.map_or_else(|| Arc::new(BackendState::new()), |b| b.state.clone()),
            lanes: lanes.unwrap_or_else(|| (0..workers).map(|_| CachePadded::default()).collect()),
            checks: before.map(|b| b.checks.clone()).unwrap_or_default(),
            heads,
            label: HeaderValue::from_str(&conf.name).map_err(|_| bad("its name is not valid"))?,
            identity: xxh64(conf.name.as_bytes(), 0),
            check_connector: connector.with_own_rotation(),
            connector,
            admission,
            max_in_flight,
            quota,
            budget,
            prices: PriceTable::new(conf.prices.iter().map(|(model, price)| (&**model, Price::of(*price)))),
            asks_for_usage: asks_for_usage(&conf),
            drops_maximum: conf.drop_fields.iter().any(|field| request_limits::is_limit(field)),
            conf,
        })
    }

    /// Shares the limits of another key of the same backend: of the requests at once, and of the money.
    pub(crate) fn share_limits_of(&mut self, first: &Upstream) {
        self.admission.clone_from(&first.admission);
        self.budget.clone_from(&first.budget);
    }

    /// Keeps the slots of an earlier configuration of the same backend, if both limit the requests at once.
    pub(crate) fn keep_slots_of(&mut self, before: &Upstream) {
        if let (Some(own), Some(before)) = (&mut self.admission, &before.admission) {
            own.clone_from(before);
        }
    }

    /// Applies the limits of this configuration to the state that is shared with the backend before the reload. At most
    /// `waiters` requests may wait.
    pub(crate) fn apply(&self, waiters: usize, now: Nanos) {
        self.state.breaker.set_trials(!self.conf.health.is_enabled, now);
        if let (Some(admission), Some(max)) = (&self.admission, self.max_in_flight) {
            admission.resize(max, waiters);
        }
        if let Some(quota) = &self.quota {
            quota.set_limits(quota_limits(&self.conf), now);
            self.state.quota_changed.notify_waiters();
        }
        if let (Some(limit), Some(budget)) = (&self.budget, self.conf.budget) {
            limit.set_limit(budget.nano_usd);
        }
    }

    /// Whether the tokens of the backend's answers are counted.
    pub(crate) fn is_metered(&self) -> bool {
        self.conf.usage != UsageMode::Off
    }

    /// Whether streamed requests ask for the token counts.
    pub(crate) fn asks_for_usage(&self) -> bool {
        self.asks_for_usage
    }

    /// What an answer of `model`, the name that the backend was sent, cost in nano-USD.
    pub(crate) fn cost(&self, model: Option<&str>, usage: &Usage) -> u64 {
        // A request may go out without a model; the price of all models counts for it too.
        self.prices.price(model.unwrap_or_default()).map_or(0, |price| price.cost(usage))
    }

    /// The first of the backends that are one backend with several keys; `id`, the index of this backend, if it has one
    /// key.
    pub(crate) fn pool(&self, id: BackendId) -> BackendId {
        self.conf.pool.as_ref().map_or(id, |pool| pool.first)
    }

    /// The name of the backend in the configuration, which several keys share.
    pub(crate) fn configured_name(&self) -> &str {
        self.conf.configured_name()
    }

    /// The name in labels, headers and logs; with several keys, that of the key.
    pub(crate) fn name(&self) -> &str {
        &self.conf.name
    }

    /// The key that Zap sends, if one is configured.
    pub(crate) fn key(&self) -> Option<&str> {
        self.conf.api_key.as_ref().map(|key| key.expose())
    }

    /// The connector of health checks.
    pub(crate) fn check_connector(&self) -> &Connector {
        &self.check_connector
    }

    /// The connector of requests.
    pub(crate) fn connector(&self) -> &Connector {
        &self.connector
    }

    /// Requests in flight.
    pub(crate) fn in_flight(&self) -> usize {
        self.state.in_flight.load(Ordering::Relaxed)
    }

    /// The start of a request head: the request line and the backend's own headers. `None` if the backend does not
    /// serve the endpoint.
    pub(crate) fn head_start(&self, endpoint: Endpoint) -> Option<&[u8]> {
        self.heads.request(endpoint)
    }

    /// Writes the request line of a `request` for a stored response, which [`head_start`](Self::head_start) does not
    /// have.
    pub(crate) fn write_stored_line(&self, request: &Parts, head: &mut Vec<u8>) {
        self.heads.write_stored_line(request, head);
    }

    /// Whether [`head_start`](Self::head_start) has a header of this name.
    pub(crate) fn has_own_header(&self, name: &HeaderName) -> bool {
        self.heads.has_header(name)
    }

    /// The head of a health check.
    pub(crate) fn probe(&self) -> &[u8] {
        self.heads.probe()
    }

    /// The head of a request for the list of models; `None` if the backend serves chat only.
    pub(crate) fn models_request(&self) -> Option<&[u8]> {
        self.heads.models()
    }

    /// The path of health checks, without the query: the query may hold a key.
    pub(crate) fn health_path(&self) -> String {
        let path = joined(&self.conf.url.path, &self.conf.health_path);
        path.split('?').next().unwrap_or_default().to_owned()
    }

    /// Whether the backend serves an endpoint.
    pub(crate) fn serves(&self, endpoint: Endpoint) -> bool {
        self.head_start(endpoint).is_some()
    }

    /// Checks whether the backend can take a request.
    ///
    /// # Errors
    /// Returns the reason if the backend cannot.
    pub(crate) fn check(&self, candidate: &Candidate<'_>) -> Result<(), Closed> {
        self.check_with_permit(candidate)?;
        self.check_full()
    }

    fn check_full(&self) -> Result<(), Closed> {
        match &self.admission {
            Some(admission) if admission.is_full() => Err(Closed::Full),
            _ => Ok(()),
        }
    }

    /// Checks whether the backend, which is out as a whole or for this model, can take a request in panic mode.
    ///
    /// # Errors
    /// Returns the reason if the backend cannot; [`Closed::Out`] if it is not ejected.
    pub(crate) fn check_ejected(&self, candidate: &Candidate<'_>) -> Result<(), Closed> {
        let (breaker, now) = (&self.state.breaker, candidate.now);
        let of_pair = breaker.pairs.status_in_panic(|| candidate.key(), now);
        match (breaker.status_of_backend(now), of_pair) {
            (Status::Unauthorized, _) => return Err(Closed::Out(Status::Unauthorized)),
            (_, Status::Cooling(until)) => return Err(Closed::Cooling(until)),
            // Checks alone say that the key is wrong: requests ask such a backend last, rather than nobody.
            (Status::Ejected | Status::Misconfigured, _) | (Status::Healthy, Status::Ejected) => {}
            (other, _) => return Err(Closed::Out(other)),
        }
        self.check_limits(candidate)?;
        self.check_full()
    }

    /// When the pair or its backend, which is out, may be tried; `None` if nothing says when.
    pub(crate) fn trial(&self, candidate: &Candidate<'_>) -> Option<Nanos> {
        let breaker = &self.state.breaker;
        match breaker.status_of_backend(candidate.now) {
            Status::Healthy => breaker.pairs.trial_at(|| candidate.key()),
            _ => breaker.reopens_at(candidate.now),
        }
    }

    /// [`check`](Self::check) for a request that already holds a permit.
    ///
    /// # Errors
    /// Returns the reason if the backend cannot take the request.
    pub(crate) fn check_with_permit(&self, candidate: &Candidate<'_>) -> Result<(), Closed> {
        match self.state.breaker.status_for(|| candidate.key(), candidate.now) {
            Status::Healthy => {}
            Status::Cooling(until) => return Err(Closed::Cooling(until)),
            out => return Err(Closed::Out(out)),
        }
        self.check_limits(candidate)
    }

    /// Takes a permit, or joins the queue for one; `None` if the backend has no [`max_in_flight`](Self::max_in_flight).
    ///
    /// # Errors
    /// Returns [`QueueFull`] if the queue is full.
    pub(crate) fn queue_for_permit(&self, turn: Turn) -> Result<Option<Admitted>, QueueFull> {
        self.admission.as_ref().map(|admission| admission.enter(turn)).transpose()
    }

    /// The reason why the backend takes no request for any model at `now`. A cooldown is none, since it may concern a
    /// single model.
    pub(crate) fn closed(&self, now: Nanos) -> Option<Closed> {
        let any =
            Candidate { target: None, demand: &Demand::default(), now, ticket: None, turn: Turn::default() };
        self.check(&any).err().filter(|closed| !matches!(closed, Closed::Cooling(_)))
    }

    /// Records the fault of a failed try or health check for `/status`.
    pub(crate) fn note_error(&self, fault: &Fault) {
        *self.state.last_error.lock() = Some((std::time::SystemTime::now(), fault.clone()));
    }

    /// Records why the backend is out, in words; empty: it is back.
    pub(crate) fn note_outage(&self, why: String) {
        *self.state.outage.lock() = why;
    }

    /// Why the backend is out, in words; empty if nothing has said so.
    pub(crate) fn outage(&self) -> String {
        self.state.outage.lock().clone()
    }

    /// Most requests in flight: the backend's own limit or its share of the gateway's slots, the smaller.
    pub(crate) fn max_in_flight(&self) -> Option<usize> {
        self.max_in_flight
    }

    /// The fault of the last failed try or health check, and its time.
    pub(crate) fn last_error(&self) -> Option<(std::time::SystemTime, Fault)> {
        self.state.last_error.lock().clone()
    }
}

/// Whether streamed requests to a backend ask for the token counts: something depends on them, and the member that asks
/// is not dropped.
fn asks_for_usage(conf: &config::Backend) -> bool {
    conf.usage == UsageMode::Inject && !conf.drop_fields.iter().any(|field| **field == *STREAM_OPTIONS)
}
