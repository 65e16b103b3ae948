//! Who calls, what it may use, and how often.

use std::cmp::Reverse;
use std::net::IpAddr;
use std::sync::Arc;

use http::HeaderMap;

use crate::gateway::Gateway;
use crate::gateway::refusal::GatewayError;
use crate::http1::headers;
use crate::policy::limit::Decision;
use crate::telemetry::clients::Client;
use crate::telemetry::{Caller, RequestRecord};

/// What is counted by: one map holds them all, and none can pass for another.
#[derive(Hash)]
enum CountedBy<'a> {
    Address(IpAddr),
    /// Everybody without a credential.
    Anonymous,
    Credential(&'a [u8]),
    Named(&'a str),
}

/// Finds out who calls.
///
/// # Errors
/// [`GatewayError::BadRequest`] where a credential is repeated, [`GatewayError::InvalidApiKey`] where client keys are
/// configured and this is none of them.
pub(crate) fn identify(gateway: &Gateway, headers: &HeaderMap) -> Result<Caller, GatewayError> {
    if headers::repeats_credential(headers) {
        return Err(GatewayError::BadRequest("a header with a credential is repeated"));
    }
    let credential = headers::credential(headers);
    let clients = gateway.shared().clients.load();
    if clients.is_open() {
        let key = |c| gateway.shared().key_of(CountedBy::Credential(c));
        return Ok(credential.map_or(Caller::Anonymous, |c| Caller::Unknown(key(c))));
    }
    let known = credential.and_then(|c| clients.find(c));
    known.cloned().map(Caller::Known).ok_or(GatewayError::InvalidApiKey)
}

/// Counts the request against its caller's limits, if it has any. `peer`: whom the connection comes from.
pub(crate) fn check_limits(
    gateway: &Gateway,
    headers: &HeaderMap,
    peer: IpAddr,
    record: &RequestRecord,
) -> Option<Decision> {
    let (shared, snapshot) = (gateway.shared(), gateway.snapshot());
    let limits = &snapshot.config.rate_limit;
    let now = record.started;
    let (key, limit) = match &record.caller {
        Caller::Anonymous => (shared.key_of(CountedBy::Anonymous), limits.requests_per_minute),
        Caller::Known(client) => {
            let limit = client.conf.requests_per_minute.or(limits.requests_per_minute);
            (shared.key_of(CountedBy::Named(&client.conf.name)), limit)
        }
        Caller::Unknown(key) => (*key, limits.requests_per_minute),
    };
    let by_address = limits.requests_per_minute_per_address.filter(|_| shared.clients.load().is_open());
    let address = by_address.map(|limit| {
        let proxies = &snapshot.config.server.trusted_proxies;
        let trusted = |a: &IpAddr| proxies.iter().any(|net| net.contains(a));
        (shared.key_of(CountedBy::Address(headers::client_address(headers, peer, trusted))), limit)
    });
    let first = address.map(|(key, limit)| shared.limiter.check_stamped(key, limit, now));
    let second = limit.map(|limit| match first {
        // A refused request costs nothing, at either limit; both are looked at, to name the later.
        Some((refused, _)) if !refused.admitted => shared.limiter.look(key, limit, now),
        _ => shared.limiter.check(key, limit, now),
    });
    if let (Some((key, _)), Some((Decision { admitted: true, .. }, stamp))) = (address, first)
        && second.is_some_and(|d| !d.admitted)
    {
        shared.limiter.refund(key, stamp);
    }
    let both = [first.map(|(decision, _)| decision), second];
    both.into_iter().flatten().min_by_key(|d| (d.admitted, d.remaining, Reverse(d.reset)))
}

/// The client, where it is one that is known.
pub(crate) fn known(caller: &Caller) -> Option<&Arc<Client>> {
    match caller {
        Caller::Known(client) => Some(client),
        Caller::Anonymous | Caller::Unknown(_) => None,
    }
}
