//! The backends' side: connections, one try, probes. Nothing in here sees a client's headers.

pub mod connect;

pub mod link;

pub mod pool;

pub mod send;

pub mod probe;

use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crossbeam_utils::CachePadded;
use http::{HeaderValue, Uri};
use parking_lot::Mutex;
use tokio::sync::Notify;

use self::connect::Connector;
use crate::config;
use crate::error::Code;
use crate::policy::Nanos;
use crate::policy::balance::Penalty;
use crate::policy::breaker::{Breaker, Status};
use crate::policy::limit::Window;
use crate::policy::patch::ModelText;
use crate::telemetry::Endpoint;
use crate::telemetry::metrics::BackendLane;

static NEXT_ID: AtomicU64 = AtomicU64::new(0);

/// One backend at run time: what never changes, made ready for use, and what all workers share.
#[derive(Debug)]
pub struct Upstream {
    /// Never used twice in a process: pools know connections by it.
    pub id: u64,
    /// As configured.
    pub conf: config::Backend,
    /// Health, cooling, key.
    pub breaker: Breaker,
    /// Recent failures, for the least loaded.
    pub penalty: Penalty,
    /// One lane a worker.
    pub lanes: Box<[CachePadded<BackendLane>]>,
    /// Where each endpoint goes, by its discriminant; `None` where it is not served.
    targets: [Option<Uri>; Endpoint::ALL.len()],
    /// Where probes go.
    pub health: Uri,
    /// `Host`.
    pub host: HeaderValue,
    /// `Authorization` with Zap's own key.
    pub authorization: Option<HeaderValue>,
    /// `x-zap-backend`.
    pub label: HeaderValue,
    /// The default model, spelled for the splice.
    pub model: Option<ModelText>,
    connector: Connector,
    /// A hash of its default model's name; 0 where it has none.
    default_model: u64,
    in_flight: CachePadded<AtomicUsize>,
    quota: Mutex<Window>,
    room: Arc<Notify>,
    last_error: Mutex<Option<(std::time::SystemTime, Code)>>,
}

/// What a request asks for, as far as the choice of a backend goes.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    /// The endpoint.
    pub endpoint: Endpoint,
    /// A hash of the model that the client names ([`model_key`]), if it names one.
    pub model: Option<u64>,
}

/// A request that a backend serves; dropping it ends that.
#[derive(Debug)]
#[must_use = "dropping it says that the backend is done"]
pub struct InFlight(Arc<Upstream>);

/// Why a backend cannot take a request now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closed {
    /// Its own `max_in_flight` is reached.
    Full,
    /// Out, or its key is refused.
    Out(Status),
    /// It does not serve the endpoint.
    Unfit,
    /// It may be asked again then.
    Until(Nanos),
}

impl Upstream {
    /// Makes a configured backend ready. `room` is rung when a backend that was full has room again.
    ///
    /// # Errors
    /// What is wrong with its URL or its certificates, for the operator.
    pub fn new(
        conf: config::Backend,
        workers: usize,
        roots: &connect::Roots,
        room: Arc<Notify>,
    ) -> Result<Self, String> {
        let name = conf.name.clone();
        let bad = |what: &str| format!("backend {name}: {what}");
        let path =
            |tail: &str| format!("{}{tail}", conf.url.path).parse().map_err(|_| bad("its path is not valid"));
        Ok(Upstream {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            breaker: Breaker::new(),
            penalty: Penalty::default(),
            lanes: (0..workers).map(|_| CachePadded::default()).collect(),
            targets: targets(&conf).map_err(bad)?,
            health: path(&conf.health_path)?,
            host: HeaderValue::from_str(&conf.url.authority).map_err(|_| bad("its host is not valid"))?,
            authorization: conf.api_key.as_ref().map(config::Secret::bearer),
            label: HeaderValue::from_str(&conf.name).map_err(|_| bad("its name is not valid"))?,
            model: conf.default_model.as_deref().map(ModelText::new),
            connector: Connector::new(&conf, roots).map_err(|e| bad(&e))?,
            default_model: conf.default_model.as_deref().map_or(0, model_key),
            in_flight: CachePadded::default(),
            quota: Mutex::default(),
            room,
            last_error: Mutex::default(),
            conf,
        })
    }

    /// Its name in labels, headers and logs.
    pub fn name(&self) -> &str {
        &self.conf.name
    }

    /// The connector to it.
    pub fn connector(&self) -> &Connector {
        &self.connector
    }

    /// Requests it serves now.
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Where it wants requests to `endpoint`.
    pub fn target(&self, endpoint: Endpoint) -> Option<&Uri> {
        self.targets[endpoint as usize].as_ref()
    }

    /// Whether it may be asked at `now`.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self, now: Nanos, ask: Ask) -> Result<(), Closed> {
        if self.target(ask.endpoint).is_none() {
            return Err(Closed::Unfit);
        }
        match self.breaker.status_for(self.sent_model(ask.model), now) {
            Status::Healthy => {}
            Status::Cooling(until) => return Err(Closed::Until(until)),
            out => return Err(Closed::Out(out)),
        }
        if self.conf.max_in_flight.is_some_and(|max| self.in_flight() >= max) {
            return Err(Closed::Full);
        }
        if let Some(limit) = self.conf.requests_per_minute {
            match self.quota.lock().opens_in(limit, now) {
                0 => {}
                wait => return Err(Closed::Until(now + wait)),
            }
        }
        Ok(())
    }

    /// A hash of the model's name as this backend is sent it.
    pub fn sent_model(&self, asked: Option<u64>) -> u64 {
        asked.unwrap_or(self.default_model)
    }

    /// Takes one of its places and one of its quota, both or neither.
    pub fn enter(self: &Arc<Self>, now: Nanos) -> Option<InFlight> {
        let max = self.conf.max_in_flight.unwrap_or(usize::MAX);
        let one_more = |n| (n < max).then_some(n + 1);
        self.in_flight.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).ok()?;
        let guard = InFlight(self.clone());
        match self.conf.requests_per_minute {
            Some(limit) if !self.quota.lock().check(limit, now).admitted => None,
            _ => Some(guard),
        }
    }

    /// Notes a failed try for `/status`.
    pub fn note_error(&self, code: Code) {
        *self.last_error.lock() = Some((std::time::SystemTime::now(), code));
    }

    /// The last failed try.
    pub fn last_error(&self) -> Option<(std::time::SystemTime, Code)> {
        *self.last_error.lock()
    }
}

/// The API base is the chat path less `/chat/completions`; a chat path that ends otherwise serves chat alone.
fn targets(conf: &config::Backend) -> Result<[Option<Uri>; Endpoint::ALL.len()], &'static str> {
    let base = Endpoint::Chat.tail().and_then(|tail| conf.chat_path.strip_suffix(tail));
    let mut targets = [const { None }; Endpoint::ALL.len()];
    for endpoint in Endpoint::ALL {
        let path = match (endpoint, base, endpoint.tail()) {
            (Endpoint::Chat, ..) => format!("{}{}", conf.url.path, conf.chat_path),
            (_, Some(base), Some(tail)) => format!("{}{base}{tail}", conf.url.path),
            _ => continue,
        };
        targets[endpoint as usize] = Some(path.parse().map_err(|_| "its path is not valid")?);
    }
    Ok(targets)
}

/// A hash of a model's name, by which cooling is kept.
pub fn model_key(name: &str) -> u64 {
    BuildHasherDefault::<DefaultHasher>::default().hash_one(name)
}

impl InFlight {
    /// The backend.
    pub fn upstream(&self) -> &Arc<Upstream> {
        &self.0
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
        if self.0.conf.max_in_flight.is_some() {
            self.0.room.notify_waiters();
        }
    }
}
