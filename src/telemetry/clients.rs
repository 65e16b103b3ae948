//! The client keys that may call, where any are configured.

use std::sync::Arc;

use crossbeam_utils::CachePadded;
use ring::digest::{SHA256, digest};
use subtle::ConstantTimeEq;

use crate::config::{ClientKey, Config};
use crate::counter::Counter;

/// All of them. Empty: anyone may call.
#[derive(Debug)]
pub(crate) struct Clients(Box<[Arc<Client>]>);

/// One of them.
#[derive(Debug)]
pub(crate) struct Client {
    /// As configured.
    pub conf: ClientKey,
    /// Its requests, one counter a worker.
    pub lanes: Arc<[CachePadded<Counter>]>,
}

impl Clients {
    /// Those of `config`; those who were known `before` keep their counters.
    pub(crate) fn new(config: &Config, before: Option<&Clients>) -> Self {
        let known = |name: &str| before?.iter().find(|c| c.conf.name == name).map(|c| c.lanes.clone());
        let client = |conf: &ClientKey| {
            let fresh = || (0..config.server.workers).map(|_| CachePadded::default()).collect();
            let lanes = known(&conf.name).unwrap_or_else(fresh);
            Arc::new(Client { conf: conf.clone(), lanes })
        };
        Clients(config.clients.iter().map(client).collect())
    }

    /// Whether anyone may call.
    pub(crate) fn is_open(&self) -> bool {
        self.0.is_empty()
    }

    /// All of them, in the order of the configuration.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<Client>> {
        self.0.iter()
    }

    /// Whose key `credential` is. All are compared, each in constant time, so the time tells nothing.
    pub(crate) fn find(&self, credential: &[u8]) -> Option<&Arc<Client>> {
        let hash = digest(&SHA256, credential);
        let is_it = |client: &Arc<Client>| bool::from(client.conf.digest[..].ct_eq(hash.as_ref()));
        self.0.iter().fold(None, |found, client| if is_it(client) { Some(client) } else { found })
    }
}

impl Client {
    /// Whether it may use the model of this name. `whole`: the name was not cut.
    pub(crate) fn may_use(&self, model: &str, whole: bool) -> bool {
        let Some(models) = &self.conf.models else { return true };
        models.iter().any(|pattern| (whole || pattern.is_prefix()) && pattern.matches(model))
    }
}
