//! The backends' side: connections, one try, probes. Nothing in here sees a client's headers.

pub(crate) mod connect;

pub(crate) mod dial;

pub(crate) mod fault;

pub(crate) mod link;

pub(crate) mod resolver;

pub(crate) mod pool;

pub(crate) mod send;

pub(crate) mod fleet;

pub(crate) mod in_flight;

mod rotation;

pub(crate) mod counters;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crossbeam_utils::CachePadded;
use http::header::{ACCEPT, AUTHORIZATION, HOST, USER_AGENT};
use http::{HeaderName, HeaderValue, Uri};
use parking_lot::Mutex;
use tokio::sync::Notify;
use xxhash_rust::xxh64::xxh64;

use crate::config;
use crate::config::HEALTH_PATH;
use crate::http1::headers::X_REQUEST_ID;
use crate::policy::balance::Penalty;
use crate::policy::breaker::{Breaker, Status};
use crate::policy::choose::Closed;
use crate::policy::queue::{Admission, Admitted, QueueFull};
use crate::policy::quota::{Quota, QuotaTicket};
use crate::protocol::Endpoint;
use crate::time::Nanos;
use crate::upstream::connect::Connector;
use crate::upstream::counters::BackendLane;
use crate::upstream::fault::Fault;
use crate::upstream::link::write_header;

/// Headers of a health check beside a backend's own.
const PROBE_HEADERS: &[(HeaderName, &str)] =
    &[(ACCEPT, "*/*"), (USER_AGENT, concat!("zap/", env!("CARGO_PKG_VERSION")))];

static NEXT_ID: AtomicU64 = AtomicU64::new(0);

/// One backend at run time: what its configuration fixes, made ready for use, and what all workers share.
#[derive(Debug)]
pub(crate) struct Upstream {
    /// As configured.
    pub conf: config::Backend,
    /// What a reload leaves alone where the provider stays the same.
    pub state: Arc<BackendState>,
    /// One lane a worker; they stay with the name.
    pub lanes: Arc<[CachePadded<BackendLane>]>,
    /// How a request to each endpoint begins, by its discriminant; `None` where it is not served.
    heads: [Option<HeadStart>; Endpoint::COUNT],
    /// The head of a probe.
    probe: HeadStart,
    /// Headers that [`heads`](Self::begin) has: nobody else's of the same name are sent.
    own: Vec<HeaderName>,
    /// `x-zap-backend`.
    pub label: HeaderValue,
    /// A hash of its name, the same in every process.
    pub identity: u64,
    connector: Connector,
    /// For health checks.
    check_connector: Connector,
    /// Its own limit of requests at once, and the line before it.
    places: Option<Arc<Admission>>,
    quota: Option<Arc<Quota>>,
}

/// The beginning of a request's head, with Zap's own key in it.
struct HeadStart(Vec<u8>);

impl fmt::Debug for HeadStart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl HeadStart {
    fn new(method: &str, target: &Uri, headers: &[(HeaderName, HeaderValue)]) -> Self {
        let path = target.path_and_query().map_or("/", |p| p.as_str());
        let mut head = format!("{method} {path} HTTP/1.1\r\n").into_bytes();
        headers.iter().for_each(|(name, value)| write_header(&mut head, name, value.as_bytes()));
        HeadStart(head)
    }
}

/// What is known of a provider, from its first configuration to its last.
#[derive(Debug)]
pub(crate) struct BackendState {
    /// Never used twice in a process: pools and probes know it by it.
    pub id: u64,
    /// Health, cooling, key.
    pub breaker: Breaker,
    /// Recent failures, for the least loaded.
    pub penalty: Penalty,
    /// Rung when somebody has left the line of the quota, or its limit has changed.
    pub moved: Notify,
    in_flight: CachePadded<AtomicUsize>,
    last_error: Mutex<Option<(std::time::SystemTime, Fault)>>,
}

impl BackendState {
    fn new() -> Self {
        BackendState {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            breaker: Breaker::new(),
            penalty: Penalty::default(),
            moved: Notify::new(),
            in_flight: CachePadded::default(),
            last_error: Mutex::default(),
        }
    }
}

impl Upstream {
    /// Makes a configured backend ready. At most `waiters` may wait for it. `before`: the backend of that name, if there
    /// was one: its counters go on, and where the provider and the account are the same, all that is known of it.
    /// Nothing that `before` shares is changed until [`apply`](Self::apply).
    ///
    /// # Errors
    /// What is wrong with its URL or its certificates, for the operator.
    pub(crate) fn new(
        conf: config::Backend,
        workers: usize,
        roots: &connect::Roots,
        waiters: usize,
        before: Option<&Upstream>,
    ) -> Result<Self, String> {
        let name = conf.name.clone();
        let bad = |what: &str| format!("backend {name}: {what}");
        let path =
            |tail: &str| joined(&conf.url.path, tail).parse().map_err(|_| bad("its path is not valid"));
        let connector = Connector::new(&conf, roots).map_err(|e| bad(&e))?;
        let host = HeaderValue::from_str(&conf.url.authority).map_err(|_| bad("its host is not valid"))?;
        let key = conf.api_key.as_ref().map(|key| match &conf.auth_header {
            Some(name) => (name.clone(), key.bare()),
            None => (AUTHORIZATION, key.bearer()),
        });
        let mut own = vec![(HOST, host)];
        own.extend(key);
        // Each has one author; the last word is with the further headers.
        own.retain(|(name, _)| conf.extra_headers.iter().all(|(extra, _)| extra != name));
        own.extend(conf.extra_headers.iter().filter(|(name, _)| *name != X_REQUEST_ID).cloned());
        let targets = targets(&conf).map_err(bad)?;
        let heads = targets.map(|target| target.map(|target| HeadStart::new("POST", &target, &own)));
        let mut probe = HeadStart::new("GET", &path(&conf.health_path)?, &own);
        for (name, value) in PROBE_HEADERS {
            if own.iter().all(|(known, _)| known != name) {
                write_header(&mut probe.0, name, value.as_bytes());
            }
        }
        probe.0.extend_from_slice(b"connection: close\r\n\r\n");
        let lanes = before.map(|b| b.lanes.clone());
        let same = before.filter(|b| is_same_account(&b.conf, &conf) && b.connector.trusts_as(&connector));
        let places = conf
            .max_in_flight
            .map(|max| same.and_then(|b| b.places.clone()).unwrap_or_else(|| Admission::new(max, waiters)));
        let quota = conf
            .requests_per_minute
            .map(|limit| same.and_then(|b| b.quota.clone()).unwrap_or_else(|| Quota::new(limit)));
        Ok(Upstream {
            state: same.map_or_else(|| Arc::new(BackendState::new()), |b| b.state.clone()),
            lanes: lanes.unwrap_or_else(|| (0..workers).map(|_| CachePadded::default()).collect()),
            heads,
            probe,
            own: own.into_iter().map(|(name, _)| name).collect(),
            label: HeaderValue::from_str(&conf.name).map_err(|_| bad("its name is not valid"))?,
            identity: xxh64(conf.name.as_bytes(), 0),
            check_connector: connector.with_own_turns(),
            connector,
            places,
            quota,
            conf,
        })
    }

    /// Gives what it took over from the backend before it its own limits. At most `waiters` may wait for it.
    pub(crate) fn apply(&self, waiters: usize, now: Nanos) {
        if let (Some(places), Some(max)) = (&self.places, self.conf.max_in_flight) {
            places.resize(max, waiters);
        }
        if let (Some(quota), Some(limit)) = (&self.quota, self.conf.requests_per_minute) {
            quota.set_limit(limit, now);
            self.state.moved.notify_waiters();
        }
    }

    /// Its name in labels, headers and logs.
    pub(crate) fn name(&self) -> &str {
        &self.conf.name
    }

    /// The connector for its health checks.
    pub(crate) fn check_connector(&self) -> &Connector {
        &self.check_connector
    }

    /// The connector to it.
    pub(crate) fn connector(&self) -> &Connector {
        &self.connector
    }

    /// Requests it serves now.
    pub(crate) fn in_flight(&self) -> usize {
        self.state.in_flight.load(Ordering::Relaxed)
    }

    /// The beginning of a request's head: its first line, and the headers that are this backend's own. `None`: it does not
    /// serve that endpoint.
    pub(crate) fn begin(&self, endpoint: Endpoint) -> Option<&[u8]> {
        self.heads[endpoint as usize].as_ref().map(|head| &head.0[..])
    }

    /// Whether [`begin`](Self::begin) has a header of this name.
    pub(crate) fn has_own(&self, name: &HeaderName) -> bool {
        self.own.contains(name)
    }

    /// The head of a health check.
    pub(crate) fn probe(&self) -> &[u8] {
        &self.probe.0
    }

    /// Whether it serves other endpoints than chat.
    pub(crate) fn serves_all(&self) -> bool {
        self.begin(Endpoint::Completions).is_some()
    }

    /// Whether it may be asked at `now` for a model of this `key`, asked for only where it matters. `turn`: a place in
    /// the line of a quota, this one's or another's.
    ///
    /// # Errors
    /// Why not.
    pub(crate) fn check(
        &self,
        now: Nanos,
        key: impl FnOnce() -> u64,
        turn: Option<&QuotaTicket>,
    ) -> Result<(), Closed> {
        self.check_place(now, key, turn)?;
        self.check_full()
    }

    fn check_full(&self) -> Result<(), Closed> {
        match &self.places {
            Some(places) if places.is_full() => Err(Closed::Full),
            _ => Ok(()),
        }
    }

    fn check_quota(&self, now: Nanos, turn: Option<&QuotaTicket>) -> Result<(), Closed> {
        match self.quota.as_ref().map_or(0, |quota| quota.opens_at(now, turn)) {
            at if at <= now => Ok(()),
            at => Err(Closed::Quota(at)),
        }
    }

    /// [`check`](Self::check) for one that is out and is to be asked all the same.
    ///
    /// # Errors
    /// Why not; that it is up, as [`Closed::Out`].
    pub(crate) fn check_out(
        &self,
        now: Nanos,
        key: impl FnOnce() -> u64,
        turn: Option<&QuotaTicket>,
    ) -> Result<(), Closed> {
        match self.state.breaker.status(now) {
            Status::Ejected => {}
            other => return Err(Closed::Out(other)),
        }
        if let Some(until) = self.state.breaker.cools_until(key, now) {
            return Err(Closed::Cooling(until));
        }
        self.check_quota(now, turn)?;
        self.check_full()
    }

    /// [`check`](Self::check) for who has a place already.
    ///
    /// # Errors
    /// Why not.
    pub(crate) fn check_place(
        &self,
        now: Nanos,
        key: impl FnOnce() -> u64,
        turn: Option<&QuotaTicket>,
    ) -> Result<(), Closed> {
        match self.state.breaker.status_for(key, now) {
            Status::Healthy => {}
            Status::Cooling(until) => return Err(Closed::Cooling(until)),
            out => return Err(Closed::Out(out)),
        }
        self.check_quota(now, turn)
    }

    /// Stands in line for a place; `None`: it has no limit.
    ///
    /// # Errors
    /// [`QueueFull`] where as many wait as may.
    pub(crate) fn wait_for_place(&self) -> Result<Option<Admitted>, QueueFull> {
        self.places.as_ref().map(Admission::enter).transpose()
    }

    /// Why it would refuse a request for any model at `now`, but for cooling, which goes by model.
    pub(crate) fn closed(&self, now: Nanos) -> Option<Closed> {
        self.check(now, || 0, None).err().filter(|closed| !matches!(closed, Closed::Cooling(_)))
    }

    /// Notes a failed try or health check for `/status`.
    pub(crate) fn note_error(&self, fault: &Fault) {
        *self.state.last_error.lock() = Some((std::time::SystemTime::now(), fault.clone()));
    }

    /// The last failed try or health check.
    pub(crate) fn last_error(&self) -> Option<(std::time::SystemTime, Fault)> {
        self.state.last_error.lock().clone()
    }
}

/// Whether both are the same account at the same provider: then what was learnt of one is true of the other, and its
/// connections may be used for the other.
fn is_same_account(a: &config::Backend, b: &config::Backend) -> bool {
    a.name == b.name
        && a.url == b.url
        && a.ca_file == b.ca_file
        && a.api_key == b.api_key
        && a.auth_header == b.auth_header
        && a.extra_headers == b.extra_headers
        && a.forward_authorization == b.forward_authorization
}

/// The API base is the chat path less `/chat/completions`; a chat path that ends otherwise serves chat alone.
fn targets(conf: &config::Backend) -> Result<[Option<Uri>; Endpoint::COUNT], &'static str> {
    let (chat, query) = conf.chat_path.split_at(conf.chat_path.find('?').unwrap_or(conf.chat_path.len()));
    let tail = |endpoint: Endpoint| endpoint.api().map(|api| api.tail);
    let base = tail(Endpoint::Chat).and_then(|tail| chat.strip_suffix(tail));
    let mut targets = [const { None }; Endpoint::COUNT];
    for endpoint in Endpoint::ALL {
        let path = match (endpoint, base, tail(endpoint)) {
            (Endpoint::Chat, ..) => joined(&conf.url.path, &conf.chat_path),
            (_, Some(base), Some(tail)) => joined(&conf.url.path, &format!("{base}{tail}{query}")),
            _ => continue,
        };
        targets[endpoint as usize] = Some(path.parse().map_err(|_| "its path is not valid")?);
    }
    Ok(targets)
}

/// The path of a backend's `url` with another one behind it. Where the first ends in `/v1` and the second begins with
/// it, it is sent once: SDKs call `https://api.openai.com/v1` the base URL, so many an operator writes it as `url`.
/// The default health path is looked for at the root, where engines have it.
fn joined(base: &str, path: &str) -> String {
    let is_of_root = path.starts_with("/v1/") || path == HEALTH_PATH;
    let base = base.strip_suffix("/v1").filter(|_| is_of_root).unwrap_or(base);
    format!("{base}{path}")
}
