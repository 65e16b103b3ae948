//! Identifies the client of a request, and applies the rate limits.

use std::cmp::Reverse;
use std::net::IpAddr;
use std::sync::Arc;

use http::HeaderMap;
use smallvec::SmallVec;

use crate::clock;
use crate::gateway::refusal::GatewayError;
use crate::gateway::state::{Generation, Shared};
use crate::http1::headers;
use crate::policy::limit::{Decision, WindowStamp};
use crate::policy::queue::Turn;
use crate::telemetry::clients::{Client, Clients};
use crate::telemetry::record::{Caller, RequestRecord};

/// Why a request with two credentials is refused.
pub(super) const REPEATED: &str = "a header with a credential is repeated";

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

/// Identifies the client by its credential, otherwise by `common_name`: that of the certificate that it has shown.
///
/// # Errors
/// [`GatewayError::BadRequest`] if a credential is repeated, [`GatewayError::InvalidApiKey`] if client keys are
/// configured and the client has none of them and no certificate of them.
pub(crate) fn identify(
    shared: &Shared,
    clients: &Clients,
    headers: &HeaderMap,
    common_name: Option<&str>,
) -> Result<Caller, GatewayError> {
    if headers::repeats_credential(headers) {
        return Err(GatewayError::BadRequest(REPEATED));
    }
    let credential = headers::credential(headers);
    if clients.is_open() {
        let key = |c| shared.keyed_hash(LimitKey::Credential(c));
        return Ok(credential.map_or(Caller::Anonymous, |c| Caller::Unknown(key(c))));
    }
    known(clients, credential, common_name).map(Caller::Known).ok_or(GatewayError::InvalidApiKey)
}

/// The client with this credential, otherwise the one whose certificate has this common name.
pub(super) fn known(
    clients: &Clients,
    credential: Option<&[u8]>,
    common_name: Option<&str>,
) -> Option<Arc<Client>> {
    let client = credential.and_then(|c| clients.find(c));
    client.or_else(|| clients.with_certificate(common_name?)).cloned()
}

/// Takes a request back from the windows of requests, since Zap has refused it later on and it is not to blame.
/// Returns the decision to report; `None` if no limit applies.
pub(crate) fn refund(shared: &Shared, record: &mut RequestRecord) -> Option<Decision> {
    let limiter = &shared.limiter;
    let refunded = record.window_stamps.drain(..).map(|WindowStamp { key, limit, stamp }| {
        limiter.refund(key, stamp);
        limiter.look(key, limit, clock::now())
    });
    strictest(refunded)
}

/// The decision to report: a refusal, then the one that leaves the least.
fn strictest(decisions: impl Iterator<Item = Decision>) -> Option<Decision> {
    decisions.min_by_key(|d| (d.admitted, d.remaining, Reverse(d.reset)))
}

/// The key of the client's limits.
pub(crate) fn limit_key(shared: &Shared, caller: &Caller) -> u64 {
    match caller {
        Caller::Anonymous => shared.keyed_hash(LimitKey::Anonymous),
        Caller::Known(client) => shared.keyed_hash(LimitKey::Named(&client.conf.name)),
        Caller::Unknown(key) => *key,
    }
}

/// The client to which ids belong that an answer has; 0 without client keys.
pub(crate) fn owner(shared: &Shared, caller: &Caller) -> u64 {
    match caller {
        Caller::Known(_) => limit_key(shared, caller),
        Caller::Anonymous | Caller::Unknown(_) => 0,
    }
}

/// Checks the request against the limits of requests of its client and its address, and counts it. A refused request
/// counts against neither. Returns the stricter decision; `None` if no limit applies. `peer`: the peer address of the
/// connection.
pub(crate) fn check_limits(
    shared: &Shared,
    generation: &Generation,
    headers: &HeaderMap,
    peer: IpAddr,
    record: &mut RequestRecord,
) -> Option<Decision> {
    let limits = &generation.config.rate_limit;
    let now = record.started;
    let own = known_client(&record.caller).and_then(|client| client.conf.requests_per_minute);
    let client_limit = own.or(limits.requests_per_minute);
    let address_limit = limits.requests_per_minute_per_address.filter(|_| generation.clients.is_open());
    let address = address_limit.map(|limit| (address_key(shared, generation, headers, peer), limit));
    let client = client_limit.map(|limit| (limit_key(shared, &record.caller), limit));
    let (mut decisions, mut is_refused) = (SmallVec::<[Decision; 2]>::new(), false);
    // Both are checked, to report the one that opens later.
    for (key, limit) in address.into_iter().chain(client) {
        let decision = if is_refused {
            shared.limiter.look(key, limit, now)
        } else {
            let (decision, stamp) = shared.limiter.check_stamped(key, limit, now);
            if decision.admitted {
                record.window_stamps.push(WindowStamp { key, limit, stamp });
            }
            decision
        };
        is_refused |= !decision.admitted;
        decisions.push(decision);
    }
    if is_refused {
        record.window_stamps.drain(..).for_each(|place| shared.limiter.refund(place.key, place.stamp));
    }
    strictest(decisions.into_iter())
}

/// The key of the client's address.
fn address_key(shared: &Shared, generation: &Generation, headers: &HeaderMap, peer: IpAddr) -> u64 {
    let proxies = &generation.config.server.trusted_proxies;
    let trusted = |a: &IpAddr| proxies.iter().any(|net| net.contains(a));
    shared.keyed_hash(LimitKey::Address(headers::client_address(headers, peer, trusted)))
}

/// Whose turn it is while requests wait: that of the client's key, else of its address.
pub(crate) fn turn(
    shared: &Shared,
    generation: &Generation,
    headers: &HeaderMap,
    peer: IpAddr,
    caller: &Caller,
) -> Turn {
    match caller {
        Caller::Anonymous => Turn { client: address_key(shared, generation, headers, peer), priority: 0 },
        Caller::Known(client) => Turn { client: limit_key(shared, caller), priority: client.conf.priority },
        Caller::Unknown(key) => Turn { client: *key, priority: 0 },
    }
}

/// Returns the client if it has a configured key.
pub(crate) fn known_client(caller: &Caller) -> Option<&Arc<Client>> {
    match caller {
        Caller::Known(client) => Some(client),
        Caller::Anonymous | Caller::Unknown(_) => None,
    }
}
