//! The configured client keys.

use std::sync::Arc;

use crossbeam_utils::CachePadded;
use ring::digest::{SHA256, digest};
use subtle::ConstantTimeEq;

use crate::config::{ClientKey, Config};
use crate::counter::Counter;
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
}

impl ClientLane {
    /// The count of all answers.
    pub(crate) fn spent(&self) -> TokenCount {
        TokenCount { tokens: std::array::from_fn(|i| self.tokens[i].get()), cost: self.cost.get() }
    }

    /// Adds the count of an answer.
    pub(crate) fn spend(&self, count: &TokenCount) {
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
}

impl Clients {
    /// The client keys of `config`. A key with the same name in `before` hands on its counters.
    pub(crate) fn new(config: &Config, before: Option<&Clients>) -> Self {
        let known = |name: &str| before?.iter().find(|c| c.conf.name == name).map(|c| c.lanes.clone());
        let client = |conf: &ClientKey| {
            let fresh = || (0..config.server.workers).map(|_| CachePadded::default()).collect();
            let lanes = known(&conf.name).unwrap_or_else(fresh);
            Arc::new(Client { conf: conf.clone(), lanes })
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
        let matches = |client: &Arc<Client>| bool::from(client.conf.digest[..].ct_eq(hash.as_ref()));
        self.0.iter().fold(None, |found, client| if matches(client) { Some(client) } else { found })
    }
}

impl Client {
    /// Whether the client may use `model`. `whole`: the name is not truncated. A truncated name matches prefixes only.
    pub(crate) fn may_use(&self, model: &str, whole: bool) -> bool {
        let Some(models) = &self.conf.models else { return true };
        models.iter().any(|pattern| (whole || pattern.is_prefix()) && pattern.matches(model))
    }
}
