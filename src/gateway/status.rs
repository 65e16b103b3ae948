//! The page `/status`: the backends and the clients, their states, what they have used and what is left.

use std::sync::Arc;

use bytes::Bytes;
use serde_json::{Value, json};

use crate::clock;
use crate::gateway::caller::limit_key;
use crate::gateway::state::Shared;
use crate::policy::balance::BackendId;
use crate::policy::breaker::Status;
use crate::policy::choose::Closed;
use crate::policy::prices::usd;
use crate::policy::spend::SpendLimit;
use crate::telemetry::clients::{Client, ClientTotal};
use crate::telemetry::ledger::sums::{Payer, Spent};
use crate::telemetry::record::Caller;
use crate::telemetry::token_metrics::{tokens_of, totals_by_client};
use crate::time::{Day, Nanos, SECOND};
use crate::upstream::fault::Fault;
use crate::upstream::fleet::Snapshot;
use crate::upstream::token_counters::TokenCount;

/// Encodes the page as JSON.
pub(crate) fn encode(shared: &Shared) -> Bytes {
    let (snapshot, now) = (shared.current.load(), clock::now());
    let today = clock::today();
    let spent = |payer| shared.telemetry.ledger.spent(payer, today);
    let backends: Vec<_> = (0..snapshot.backends.len())
        .map(|id| {
            let mut status = backend(&snapshot, id);
            let upstream = &snapshot.backends[id];
            let total = TokenCount::sum(tokens_of(upstream).into_values());
            let recent = upstream.lanes.iter().map(|lane| lane.recent_tokens.last_minute(now)).sum();
            status["used"] = used(&total, recent, spent(Payer::Backend(upstream.configured_name())));
            status["tokens_per_minute"] = tokens_left(upstream.tokens_left(now));
            status["budget"] = budget(upstream.budget(), today);
            status
        })
        .collect();
    let anonymous = shared.telemetry.anonymous(now);
    let known = snapshot.clients.iter().map(Some).chain([None]);
    let clients: Vec<_> = totals_by_client(&snapshot.clients, anonymous, now)
        .zip(known)
        .map(|((name, ClientTotal { count, last_minute, .. }), client)| {
            json!({
                "name": name,
                "used": used(&count, last_minute, spent(Payer::Client(name))),
                "tokens_per_minute": tokens_left(client.and_then(|c| client_tokens(shared, &snapshot, c, now))),
                "budget": budget(client.and_then(|client| client.budget.as_ref()), today),
                "in_flight": client.and_then(|client| client.admission.as_ref()).map(|a| a.in_flight()),
            })
        })
        .collect();
    let status = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "draining": shared.is_stopping(),
        "in_flight": shared.admission.in_flight(),
        "queue_depth": shared.admission.depth(),
        "backends": backends,
        "clients": clients,
    });
    status.to_string().into()
}

/// The tokens since the start of the process and of the last minute, and what was spent in this day and month.
fn used(total: &TokenCount, last_minute: u64, spent: Spent) -> Value {
    let tokens: serde_json::Map<_, _> =
        TokenCount::KINDS.iter().zip(total.tokens).map(|(kind, n)| ((*kind).to_owned(), n.into())).collect();
    json!({
        "tokens": tokens,
        "tokens_last_minute": last_minute,
        "spent_today_usd": usd(spent.day),
        "spent_this_month_usd": usd(spent.month),
    })
}

/// The limit of tokens of a client key, and what is left of it.
fn client_tokens(
    shared: &Shared,
    snapshot: &Snapshot,
    client: &Arc<Client>,
    now: Nanos,
) -> Option<(u64, u64)> {
    let limit = client.conf.tokens_per_minute.or(snapshot.config.rate_limit.tokens_per_minute)?;
    let key = limit_key(shared, &Caller::Known(client.clone()));
    Some((limit, shared.tokens.state(key, limit, now).remaining))
}

/// A limit of tokens and what is left of it; null without a limit.
fn tokens_left(tokens: Option<(u64, u64)>) -> Value {
    tokens.map_or(Value::Null, |(limit, left)| json!({ "limit": limit, "left": left }))
}

/// A budget and what is left of it; null without a budget.
fn budget(budget: Option<&Arc<SpendLimit>>, today: Day) -> Value {
    let Some(budget) = budget else { return Value::Null };
    json!({
        "usd": usd(budget.limit()),
        "per": budget.period().name(),
        "spent_usd": usd(budget.spent(today)),
        "left_usd": usd(budget.left(today)),
        "opens": budget.period().next(today).to_string(),
    })
}

fn backend(snapshot: &Snapshot, id: BackendId) -> Value {
    let (b, now) = (&snapshot.backends[id], clock::now());
    let status = b.state.breaker.status(now);
    let secs_to = |until: Nanos| until.saturating_sub(now).div_ceil(SECOND / 10) as f64 / 10.0;
    let cooling = match status {
        Status::Cooling(until) => Some(until),
        _ => None,
    };
    let closed = b.closed(now);
    let quota = match closed {
        Some(Closed::Quota(until)) => Some(secs_to(until)),
        _ => None,
    };
    // The words match those that the log gives for candidates that were passed over.
    let state = match (b.conf.weight, status, closed) {
        (0, ..) => "drained",
        (_, Status::Misconfigured, _) => "misconfigured",
        (_, Status::Unauthorized, _) => "unauthorized",
        (_, Status::Ejected, _) => "ejected",
        (_, Status::Cooling(_), _) => "cooling",
        (_, _, Some(Closed::Full)) => "full",
        (_, _, Some(Closed::Quota(_) | Closed::Reserved)) => "quota",
        (_, _, Some(Closed::Budget(_))) => "budget",
        _ => "healthy",
    };
    let models = snapshot.table().models().iter().filter(|model| model.backend == id);
    let models: serde_json::Map<_, _> = models
        .map(|model| {
            let state = match b.state.breaker.status_for(|| model.key, now) {
                Status::Healthy => "healthy",
                Status::Cooling(_) => "cooling",
                Status::Ejected => "ejected",
                Status::Misconfigured => "misconfigured",
                Status::Unauthorized => "unauthorized",
            };
            (model.name.to_string(), state.into())
        })
        .collect();
    json!({
        "name": b.name(),
        "state": state,
        "weight": b.conf.weight,
        "priority": b.conf.priority,
        "in_flight": b.in_flight(),
        "cooling_secs": cooling.map(secs_to),
        "cooling_until": cooling.map(|until| clock::timestamp(clock::wall(until))),
        "quota_opens_secs": quota,
        "models": models,
        "last_error": b.last_error().map(|(at, Fault { kind, cause })| {
            json!({ "code": kind.text(), "cause": cause, "at": clock::timestamp(at) })
        }),
    })
}
