//! The configured client keys.

use std::sync::Arc;

use crossbeam_utils::CachePadded;
use ring::digest::{SHA256, digest};
use subtle::ConstantTimeEq;

use crate::clock;
use crate::config::{Budget, ClientKey, Config};
use crate::counter::{Counter, Recent};
use crate::policy::queue::Admission;
use crate::policy::spend::SpendLimit;
use crate::time::Nanos;
use crate::upstream::token_counters::TokenCount;

/// All client keys. If empty, every client is admitted.
#[derive(Debug)]
pub(crate) struct Clients(Box<[Arc<Client>]>);

/// The counts of one worker for a client.
#[derive(Debug, Default)]
pub(crate) struct ClientLane {
    /// Requests.
    pub requests: Counter,
    /// Input, cached, output and reasoning tokens.
    pub tokens: [Counter; TokenCount::KINDS.len()],
    /// What the answers cost, in nano-USD.
    pub cost: Counter,
    /// Tokens that answers used beyond what their requests had reserved.
    pub overrun: Counter,
    /// Input and output tokens of the last minute.
    recent: Recent,
}

/// The counts of all workers for a client.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ClientTotal {
    /// Requests.
    pub requests: u64,
    /// The tokens of all answers, and what they cost.
    pub count: TokenCount,
    /// Tokens that answers used beyond what their requests had reserved.
    pub overrun: u64,
    /// Input and output tokens of the last minute.
    pub last_minute: u64,
}

impl ClientTotal {
    /// Adds up lanes at `now`.
    pub(crate) fn of<'l>(lanes: impl Iterator<Item = &'l ClientLane>, now: Nanos) -> Self {
        lanes.fold(ClientTotal::default(), |mut total, lane| {
            total.requests += lane.requests.get();
            total.count.add(&lane.spent());
            total.overrun += lane.overrun.get();
            total.last_minute += lane.recent.last_minute(now);
            total
        })
    }
}

impl ClientLane {
    /// The count of all answers.
    fn spent(&self) -> TokenCount {
        TokenCount { tokens: std::array::from_fn(|i| self.tokens[i].get()), cost: self.cost.get() }
    }

    /// Adds the count of an answer that ended at `now`.
    pub(crate) fn spend(&self, count: &TokenCount, now: Nanos) {
        self.recent.add(now, count.total());
        self.tokens.iter().zip(count.tokens).for_each(|(counter, n)| counter.add(n));
        self.cost.add(count.cost);
    }
}

/// A client key.
#[derive(Debug)]
pub(crate) struct Client {
    /// The configuration of the key.
    pub conf: ClientKey,
    /// The counts of the key, one lane per worker.
    pub lanes: Arc<[CachePadded<ClientLane>]>,
    /// The limit `max_in_flight`, and the queue in front of it.
    pub admission: Option<Arc<Admission>>,
    /// The budget.
    pub budget: Option<Arc<SpendLimit>>,
}

impl Clients {
    /// The client keys of `config`. A key with the same name in `before` hands on its counters, and what it has spent.
    /// The new limits apply at once.
    pub(crate) fn new(config: &Config, before: Option<&Clients>) -> Self {
        let client = |conf: &ClientKey| {
            let known = before.and_then(|before| before.iter().find(|c| c.conf.name == conf.name));
            let fresh = || (0..config.server.workers).map(|_| CachePadded::default()).collect();
            let admission = conf.max_in_flight.map(|max| {
                let known = known.and_then(|c| c.admission.clone());
                known.unwrap_or_else(|| Admission::of_one_client(max, config.queue.max_size))
            });
            if let (Some(admission), Some(max)) = (&admission, conf.max_in_flight) {
                admission.resize(max, config.queue.max_size);
            }
            let budget = conf.budget.map(|Budget { nano_usd, per }| {
                let known = known.and_then(|c| c.budget.as_ref());
                let budget = SpendLimit::renewed(known, nano_usd, per, clock::today());
                budget.set_limit(nano_usd);
                budget
            });
            let lanes = known.map_or_else(fresh, |c| c.lanes.clone());
            Arc::new(Client { conf: conf.clone(), lanes, admission, budget })
        };
        Clients(config.clients.iter().map(client).collect())
    }

    /// Whether every client is admitted, since no client keys are configured.
    pub(crate) fn is_open(&self) -> bool {
        self.0.is_empty()
    }

    /// All client keys, in the order of the configuration.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<Client>> {
        self.0.iter()
    }

    /// The client whose key is `credential`. All keys are compared, each in constant time, so that the time does not
    /// reveal which key matched.
    pub(crate) fn find(&self, credential: &[u8]) -> Option<&Arc<Client>> {
        let hash = digest(&SHA256, credential);
        let is_key = |digest: [u8; 32]| bool::from(digest[..].ct_eq(hash.as_ref()));
        let matches = |client: &Arc<Client>| client.conf.digest.is_some_and(is_key);
        self.0.iter().fold(None, |found, client| if matches(client) { Some(client) } else { found })
    }

    /// The client whose certificate has this common name.
    pub(crate) fn with_certificate(&self, name: &str) -> Option<&Arc<Client>> {
        self.0.iter().find(|client| client.conf.certificate.as_deref() == Some(name))
    }
}

impl Client {
    /// Whether the client may use `model`. `whole`: the name is not truncated. A truncated name matches prefixes only.
    pub(crate) fn may_use(&self, model: &str, whole: bool) -> bool {
        let Some(models) = &self.conf.models else { return true };
        models.iter().any(|pattern| (whole || pattern.is_prefix()) && pattern.matches(model))
    }
}
