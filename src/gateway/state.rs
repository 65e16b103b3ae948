//! The state that all workers share: the current [`Generation`] behind an `ArcSwap`, and the counters of the policies.

use std::hash::{BuildHasher, Hash, RandomState};
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use arc_swap::ArcSwap;
use tokio::sync::Notify;

use crate::clock;
use crate::config::{Config, Server, memory_limit};
use crate::gateway::history::History;
use crate::gateway::pages::Pages;
use crate::gateway::served_models::ServedModels;
use crate::policy::breaker::Change;
use crate::policy::byte_budget::ByteBudget;
use crate::policy::choose;
use crate::policy::known_ids::{KnownIds, MadeBy};
use crate::policy::limit::Limiter;
use crate::policy::pair::PairChange;
use crate::policy::queue::{Admission, MAX as MAX_SLOTS, Turn};
use crate::policy::ratio::Demand;
use crate::policy::retry::Budget;
use crate::policy::spend::{Period, SpendLimit};
use crate::policy::token_window::TokenWindow;
use crate::protocol::Endpoint;
use crate::telemetry::Telemetry;
use crate::telemetry::clients::Clients;
use crate::telemetry::ledger::Ledger;
use crate::telemetry::ledger::sums::{Payer, Spent};
use crate::telemetry::line::Fields;
use crate::telemetry::log::Log;
use crate::time::Nanos;
use crate::upstream::Upstream;
use crate::upstream::fleet::{Ask, Snapshot, View, prepare};

/// All that a request takes from the configuration: the fleet and the client keys. A reload replaces both in one step,
/// so that no request is admitted by the old keys and routed by the new fleet.
#[derive(Debug)]
pub(crate) struct Generation {
    fleet: Snapshot,
    /// The configured clients.
    pub(crate) clients: Arc<Clients>,
}

impl Generation {
    /// Lifts the limits that `next` does not have, so that a request that waits for one goes on. A backend that is
    /// removed keeps its limits for the requests that are left.
    fn lift_limits_without(&self, next: &Generation, now: Nanos) {
        for backend in self.backends.iter() {
            if let Some(next) = next.backends.iter().find(|next| next.name() == backend.name()) {
                backend.lift_limits(next, now);
            }
        }
        for client in self.clients.iter() {
            let Some(admission) = &client.admission else { continue };
            let next = next.clients.iter().find(|next| next.conf.name == client.conf.name);
            if next.is_none_or(|next| next.admission.is_none()) {
                admission.resize(MAX_SLOTS, 0);
            }
        }
    }
}

impl Deref for Generation {
    type Target = Snapshot;

    fn deref(&self) -> &Snapshot {
        &self.fleet
    }
}

/// The state that all workers share.
#[derive(Debug)]
pub struct Shared {
    /// The current generation. A request uses the one that was current when it arrived.
    pub(crate) current: ArcSwap<Generation>,
    /// The limits of requests of the clients.
    pub(crate) limiter: Limiter,
    /// The limits of tokens of the clients.
    pub(crate) tokens: Arc<Limiter<TokenWindow>>,
    /// The slots, and the queue in front of them.
    pub(crate) admission: Arc<Admission>,
    /// The retry budget: a share of the requests.
    pub(crate) budget: Budget,
    /// The metrics and the log.
    pub(crate) telemetry: Arc<Telemetry>,
    /// The memory of request bodies.
    pub(crate) buffers: ByteBudget,
    /// Notified when a request has given memory back.
    pub(crate) buffer_freed: Notify,
    /// Which backends made the responses, items and conversations that requests refer to.
    pub(crate) known_ids: KnownIds,
    /// What backends without `models` say they serve.
    pub(crate) served_models: ServedModels,
    /// The last minutes of the backends.
    pub(crate) history: History,
    /// The pages that are expensive to render.
    pub(crate) pages: Pages,
    /// Notified when the state of a backend has changed: the fleet thread then calls [`rebuild`](Self::rebuild).
    pub(crate) fleet_changed: Notify,
    /// Notified when a backend may take requests again: waiting requests then pick a target again.
    pub(crate) reopened: Notify,
    /// Notified when the configuration must be read again.
    pub(crate) reload_wanted: Notify,
    /// Notified when a new configuration is in use.
    pub(crate) reloaded: Notify,
    /// Number of ejections so far: when it changes, waiting requests see whether they wait for an ejected target.
    pub(crate) ejections: AtomicU64,
    leaving: AtomicBool,
    stopping: AtomicBool,
    draining: AtomicBool,
    hasher: RandomState,
}

/// The least memory of request bodies if the configuration does not say how much.
const MIN_BUFFERED: u64 = 64 << 20;

/// The memory of all request bodies together.
fn max_buffered(server: &Server) -> u64 {
    let default = || memory_limit().map_or(MIN_BUFFERED, |limit| limit / 2).max(MIN_BUFFERED);
    server.max_buffered_bytes.unwrap_or_else(default)
}

impl Shared {
    /// Creates the state for `config`.
    ///
    /// # Errors
    /// Returns a message for the operator if the URL or the certificates of a backend are invalid.
    pub fn new(config: Config, log: Log) -> Result<Self, String> {
        Self::with_ledger(config, log, Ledger::in_memory())
    }

    /// Creates the state for `config`, with a ledger that is open already.
    ///
    /// # Errors
    /// Returns a message for the operator if the URL or the certificates of a backend are invalid.
    pub(crate) fn with_ledger(config: Config, log: Log, ledger: Arc<Ledger>) -> Result<Self, String> {
        let snapshot = prepare(config, None)?;
        let config = &snapshot.config;
        let shared = Shared {
            limiter: Limiter::new(config.rate_limit.max_keys),
            tokens: Arc::new(Limiter::new(config.rate_limit.max_keys)),
            admission: Admission::new(config.queue.max_in_flight, config.queue.max_size),
            budget: Budget::new(config.retry.budget_percent),
            telemetry: Telemetry::new(config, log, ledger),
            buffers: ByteBudget::new(max_buffered(&config.server)),
            buffer_freed: Notify::new(),
            known_ids: KnownIds::new(config.max_ids),
            served_models: ServedModels::default(),
            history: History::default(),
            pages: Pages::default(),
            fleet_changed: Notify::new(),
            reopened: Notify::new(),
            reload_wanted: Notify::new(),
            reloaded: Notify::new(),
            ejections: AtomicU64::new(0),
            leaving: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            draining: AtomicBool::new(false),
            hasher: RandomState::new(),
            current: ArcSwap::from_pointee(Generation {
                clients: Arc::new(Clients::new(config, None)),
                fleet: snapshot,
            }),
        };
        shared.sync_budgets();
        Ok(shared)
    }

    /// Replaces the fleet after a reload. [`prepare`] must have made `next` from the current snapshot. Requests in
    /// flight keep the old configuration; counters go on under the new limits.
    pub(crate) fn replace(&self, next: Snapshot) {
        let config = &next.config;
        self.limiter.set_max_keys(config.rate_limit.max_keys);
        self.tokens.set_max_keys(config.rate_limit.max_keys);
        self.known_ids.set_max(config.max_ids);
        self.admission.resize(config.queue.max_in_flight, config.queue.max_size);
        self.budget.set_percent(config.retry.budget_percent);
        self.telemetry.configure(&config.log);
        let clients = Arc::new(Clients::new(config, Some(&self.current.load().clients)));
        let now = clock::now();
        next.backends.iter().for_each(|b| b.apply(config.queue.max_size, now));
        let next = Arc::new(Generation { fleet: next, clients });
        self.sync_budgets_of(&next);
        let before = self.current.swap(next.clone());
        before.lift_limits_without(&next, now);
        self.reloaded.notify_waiters();
    }

    /// Drops the limits of clients above `rate_limit.max_keys`. This may take long.
    pub(crate) fn shrink(&self) {
        self.limiter.shrink();
        self.tokens.shrink();
    }

    /// Makes the budgets take what the ledger knows: what was spent before this process, and by others.
    pub(crate) fn sync_budgets(&self) {
        self.sync_budgets_of(&self.current.load());
    }

    fn sync_budgets_of(&self, current: &Generation) {
        let today = clock::today();
        let sync = |budget: Option<&Arc<SpendLimit>>, payer| {
            let Some(budget) = budget else { return };
            budget.sync(today, || {
                let Spent { day, month } = self.telemetry.ledger.spent(payer, today);
                match budget.period() {
                    Period::Day => day,
                    Period::Month => month,
                }
            });
        };
        current.clients.iter().for_each(|c| sync(c.budget.as_ref(), Payer::Client(&c.conf.name)));
        current.backends.iter().for_each(|b| sync(b.budget(), Payer::Backend(b.configured_name())));
    }

    /// Logs a change of a backend's state with its `cause`, and requests a rebuild of the schedule.
    pub(crate) fn announce(&self, upstream: &Upstream, change: Change, cause: &str) {
        let name = upstream.name();
        let (level, event, text, outage) = match change {
            Change::Down => {
                let failures = self.in_a_row();
                let text = format!("backend {name} is down after {failures}: {cause}");
                ("warn", "backend_down", text, self.outage("", cause))
            }
            Change::StillDown => {
                ("warn", "backend_down", format!("backend {name} is down: {cause}"), cause.into())
            }
            Change::Misconfigured => {
                let what = format!("refuses its api_key, or requires one: {cause}");
                let outage = format!("it refuses its key, or requires one: {}", kind_and_rest(cause).1);
                ("error", "backend_misconfigured", format!("backend {name} {what}"), outage)
            }
            Change::Up => {
                ("info", "backend_up", format!("backend {name} is up again: {cause}"), String::new())
            }
        };
        upstream.note_outage(outage);
        self.telemetry.log.event_with(level, event, &text, &Fields::default().text("backend", name));
        self.ejections.fetch_add(1, Ordering::Relaxed);
        self.fleet_changed.notify_one();
    }

    /// The number of failures that eject, in words.
    fn in_a_row(&self) -> String {
        match self.current.load().thresholds().failures {
            1 => "1 failure".into(),
            failures => format!("{failures} failures in a row"),
        }
    }

    /// Why a backend is out, in words: `3 requests in a row failed: HTTP 500`. `whose`: the requests of a pair.
    fn outage(&self, whose: &str, cause: &str) -> String {
        let (kind, rest) = kind_and_rest(cause);
        match self.current.load().thresholds().failures {
            1 => format!("a {kind}{whose} failed: {rest}"),
            failures => format!("{failures} {kind}s{whose} in a row failed: {rest}"),
        }
    }

    /// Logs a change of a pair's state with its `cause`. `model`: its name, as the client gave it.
    pub(crate) fn announce_pair(&self, upstream: &Upstream, model: &str, change: PairChange, cause: &str) {
        let (name, asked) = (upstream.name(), model);
        let whose = match model {
            "" => " without a model".into(),
            model => format!(" for {}", model.escape_debug()),
        };
        let model = match model {
            "" => "requests without a model".into(),
            model => format!("model {}", model.escape_debug()),
        };
        let (level, event, text, outage) = match change {
            PairChange::Down => {
                self.ejections.fetch_add(1, Ordering::Relaxed);
                let failures = self.in_a_row();
                let text = format!("backend {name} is down for {model} after {failures}: {cause}");
                ("warn", "backend_down", text, self.outage(&whose, cause))
            }
            PairChange::Up => {
                ("info", "backend_up", format!("backend {name} serves {model} again"), String::new())
            }
        };
        upstream.note_outage(outage);
        let fields = Fields::default().text("backend", name).text("model", asked);
        self.telemetry.log.event_with(level, event, &text, &fields);
        // Waiting requests pick again, since this pair may take them.
        self.reopened.notify_waiters();
    }

    /// Picks a backend for a chat completion with `model` at `now`, takes a slot there and releases it. Returns whether
    /// this succeeded. For benchmarks.
    #[doc(hidden)]
    pub fn pick_once(&self, model: &str, affinity: u64, now: Nanos) -> bool {
        let snapshot = self.current.load();
        let Some(route) = snapshot.table().find(Some(model), true) else { return false };
        let (affinity, demand) = (Some(affinity), Demand::default());
        let (endpoint, made_by) = (Endpoint::Chat, MadeBy::Anybody);
        let ask = Ask {
            endpoint,
            route,
            model: Some(model),
            affinity,
            demand,
            made_by,
            turn: Turn::default(),
            by_latency: None,
        };
        let view =
            View { snapshot: &snapshot, ask: &ask, now, tickets: &[], granted: None, is_waiting: false };
        let Some(picked) = choose::pick(&view, true, |_| false) else { return false };
        let upstream = snapshot.upstream(&snapshot.route(&ask).targets[picked]);
        upstream.enter(&view.candidate(picked), false).is_some()
    }

    /// Whether responses say `connection: close`, since Zap stops or another process has taken the listeners.
    pub(crate) fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Relaxed)
    }

    /// Lets responses say `connection: close`. A connection whose last response did not say so may send one more
    /// request.
    pub(crate) fn start_leaving(&self) {
        self.leaving.store(true, Ordering::Relaxed);
    }

    /// Whether Zap has been told to stop: `/ready` fails, and connections close after a response that begins now.
    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// Announces that Zap will stop. New requests are still served until [`start_draining`](Self::start_draining).
    pub(crate) fn start_stopping(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        self.start_leaving();
    }

    /// Whether Zap is draining: connections close after their response, even if it began before and did not say so.
    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Starts the drain: from now on new requests are refused.
    pub(crate) fn start_draining(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Hashes a credential, a client name or an address for the rate limiter and the log, with a random key that this
    /// process alone knows.
    pub(crate) fn keyed_hash(&self, what: impl Hash) -> u64 {
        self.hasher.hash_one(what)
    }

    /// Rebuilds the schedule from the current states of the backends, and wakes the waiting requests, since a backend
    /// that is up again may serve them. Returns the time when the first backend may take requests again without a
    /// report, which needs another rebuild.
    pub(crate) fn rebuild(&self) -> Option<Nanos> {
        let current = self.current.load_full();
        let rebuilt = Generation { fleet: current.rebuilt(), clients: current.clients.clone() };
        self.current.store(Arc::new(rebuilt));
        self.reopened.notify_waiters();
        let now = clock::now();
        current.backends.iter().filter_map(|b| b.state.breaker.reopens_at(now)).min()
    }
}

/// The kind of a cause, which is a request or a health check, and the rest.
fn kind_and_rest(cause: &str) -> (&str, &str) {
    cause
        .split_once(": ")
        .filter(|(kind, _)| *kind == "health check")
        .unwrap_or_else(|| ("request", cause.strip_prefix("request: ").unwrap_or(cause)))
}
