//! Identifies the client of a request, and applies the rate limits.

use std::cmp::Reverse;
use std::net::IpAddr;
use std::sync::Arc;

use http::HeaderMap;

use crate::gateway::refusal::GatewayError;
use crate::gateway::state::{Generation, Shared};
use crate::http1::headers;
use crate::policy::limit::Decision;
use crate::telemetry::clients::{Client, Clients};
use crate::telemetry::record::{Caller, RequestRecord};

/// The key of a rate limit. The limiter has one map for all kinds of keys; the variants keep the kinds apart.
#[derive(Hash)]
enum LimitKey<'a> {
    Address(IpAddr),
    /// All clients without a credential together.
    Anonymous,
    Credential(&'a [u8]),
    /// The name of a configured client.
    Named(&'a str),
}

/// Identifies the client by its credential.
///
/// # Errors
/// [`GatewayError::BadRequest`] if a credential is repeated, [`GatewayError::InvalidApiKey`] if client keys are
/// configured and the request has none of them.
pub(crate) fn identify(
    shared: &Shared,
    clients: &Clients,
    headers: &HeaderMap,
) -> Result<Caller, GatewayError> {
    if headers::repeats_credential(headers) {
        return Err(GatewayError::BadRequest("a header with a credential is repeated"));
    }
    let credential = headers::credential(headers);
    if clients.is_open() {
        let key = |c| shared.keyed_hash(LimitKey::Credential(c));
        return Ok(credential.map_or(Caller::Anonymous, |c| Caller::Unknown(key(c))));
    }
    let known = credential.and_then(|c| clients.find(c));
    known.cloned().map(Caller::Known).ok_or(GatewayError::InvalidApiKey)
}

/// Checks the request against the limits of its client and its address, and counts it. Returns `None` if no limit
/// applies, else the stricter decision. `peer`: the peer address of the connection.
pub(crate) fn check_limits(
    shared: &Shared,
    generation: &Generation,
    headers: &HeaderMap,
    peer: IpAddr,
    record: &RequestRecord,
) -> Option<Decision> {
    let limits = &generation.config.rate_limit;
    let now = record.started;
    let (client_key, client_limit) = match &record.caller {
        Caller::Anonymous => (shared.keyed_hash(LimitKey::Anonymous), limits.requests_per_minute),
        Caller::Known(client) => {
            let limit = client.conf.requests_per_minute.or(limits.requests_per_minute);
            (shared.keyed_hash(LimitKey::Named(&client.conf.name)), limit)
        }
        Caller::Unknown(key) => (*key, limits.requests_per_minute),
    };
    let address_limit = limits.requests_per_minute_per_address.filter(|_| generation.clients.is_open());
    let address = address_limit.map(|limit| {
        let proxies = &generation.config.server.trusted_proxies;
        let trusted = |a: &IpAddr| proxies.iter().any(|net| net.contains(a));
        (shared.keyed_hash(LimitKey::Address(headers::client_address(headers, peer, trusted))), limit)
    });
    let by_address = address.map(|(key, limit)| shared.limiter.check_stamped(key, limit, now));
    let by_client = client_limit.map(|limit| match by_address {
        // A refused request counts against neither limit. Both are checked, to report the one that opens later.
        Some((refused, _)) if !refused.admitted => shared.limiter.look(client_key, limit, now),
        _ => shared.limiter.check(client_key, limit, now),
    });
    if let (Some((key, _)), Some((Decision { admitted: true, .. }, stamp))) = (address, by_address)
        && by_client.is_some_and(|d| !d.admitted)
    {
        shared.limiter.refund(key, stamp);
    }
    let both = [by_address.map(|(decision, _)| decision), by_client];
    both.into_iter().flatten().min_by_key(|d| (d.admitted, d.remaining, Reverse(d.reset)))
}

/// Returns the client if it has a configured key.
pub(crate) fn known_client(caller: &Caller) -> Option<&Arc<Client>> {
    match caller {
        Caller::Known(client) => Some(client),
        Caller::Anonymous | Caller::Unknown(_) => None,
    }
}
