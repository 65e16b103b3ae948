//! `/status`: the backends and the clients, their states, what they have used and what is left; the last failures.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use serde_json::{Value, json};

use crate::clock;
use crate::gateway::caller::limit_key;
use crate::gateway::history::{Recent, STEP, state_of};
use crate::gateway::state::Shared;
use crate::policy::balance::BackendId;
use crate::policy::breaker::Status;
use crate::policy::choose::Closed;
use crate::policy::prices::usd;
use crate::policy::queue::Turn;
use crate::policy::ratio::Demand;
use crate::policy::route::Target;
use crate::policy::spend::SpendLimit;
use crate::telemetry::clients::{Client, ClientTotal};
use crate::telemetry::failures::{FailedTry, Failure};
use crate::telemetry::ledger::sums::{Payer, Spent};
use crate::telemetry::record::Caller;
use crate::telemetry::token_metrics::{tokens_of, totals_by_client};
use crate::time::{Day, Nanos, SECOND};
use crate::upstream::Upstream;
use crate::upstream::fault::Fault;
use crate::upstream::fleet::Snapshot;
use crate::upstream::limits::Candidate;
use crate::upstream::token_counters::TokenCount;

/// The history sees a new state so late at most: it looks at the backends each second.
const LOOK: Duration = Duration::from_secs(2);

/// Backends that are looked at between two times of giving way to threads that wait for the core.
const STRETCH: usize = 8;

/// Encodes the status as JSON: lists come last, and names first.
pub(crate) fn encode(shared: &Shared) -> Bytes {
    let mut status = status(shared);
    let lists = ["backends", "clients", "failures"].map(|name| (name, taken(&mut status, name)));
    let mut text = status.to_string();
    text.pop();
    for (name, list) in lists {
        let _ = write!(text, ",\n \"{name}\":[");
        let Some(Value::Array(items)) = list else { continue };
        for (at, item) in items.into_iter().enumerate() {
            text.push_str(if at == 0 { "\n  " } else { ",\n  " });
            push_name_first(&mut text, item);
        }
        text.push(']');
    }
    text.push_str("}\n");
    text.into()
}

/// Appends an object whose name, if it has one, comes first.
fn push_name_first(text: &mut String, mut item: Value) {
    let rest = match taken(&mut item, "name") {
        Some(name) => {
            let _ = write!(text, "{{\"name\":{name},");
            1
        }
        None => 0,
    };
    text.push_str(&item.to_string()[rest..]);
}

fn taken(object: &mut Value, name: &str) -> Option<Value> {
    object.as_object_mut().and_then(|members| members.remove(name))
}

/// What `/status` says.
pub(crate) fn status(shared: &Shared) -> Value {
    let (snapshot, now) = (shared.current.load(), clock::now());
    let today = clock::today();
    let spent = |payer| shared.telemetry.ledger.spent(payer, today);
    let backends: Vec<_> = (0..snapshot.backends.len())
        .map(|id| {
            let mut status = backend(shared, &snapshot, id);
            let upstream = &snapshot.backends[id];
            let total = TokenCount::sum(tokens_of(upstream).into_values());
            let recent = upstream.lanes.iter().map(|lane| lane.recent_tokens.last_minute(now)).sum();
            status["used"] = used(&total, recent, spent(Payer::Backend(upstream.configured_name())));
            status["tokens_per_minute"] = tokens_left(upstream.tokens_left(now));
            status["budget"] = budget(upstream.budget(), today);
            if id % STRETCH == 0 {
                std::thread::yield_now();
            }
            status
        })
        .collect();
    let anonymous = shared.telemetry.anonymous(now);
    let known = snapshot.clients.iter().map(Some).chain([None]);
    let clients: Vec<_> = totals_by_client(&snapshot.clients, anonymous, now)
        .zip(known)
        .map(|((name, ClientTotal { requests, count, last_minute, .. }), client)| {
            json!({
                "name": name,
                "requests": requests,
                "used": used(&count, last_minute, spent(Payer::Client(name))),
                "tokens_per_minute": tokens_left(client.and_then(|c| client_tokens(shared, &snapshot, c, now))),
                "budget": budget(client.and_then(|client| client.budget.as_ref()), today),
                "in_flight": client.and_then(|client| client.admission.as_ref()).map(|a| a.in_flight()),
            })
        })
        .collect();
    let queue = &snapshot.config.queue;
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "time": clock::timestamp(clock::wall(now)),
        "uptime_secs": now / SECOND,
        "draining": shared.is_stopping(),
        "in_flight": shared.admission.in_flight(),
        "max_in_flight": queue.max_in_flight,
        "queue_depth": shared.admission.depth(),
        "queue_size": queue.max_size,
        "last_reload": last_reload(shared),
        "unserved_models": unserved_models(&snapshot, now),
        "backends": backends,
        "clients": clients,
        "failures": failures(shared),
    })
}

/// The last reload of the configuration; null if there was none.
fn last_reload(shared: &Shared) -> Value {
    let Some((at, fault)) = shared.telemetry.reloads.last() else { return Value::Null };
    let fault = Some(fault).filter(|fault| !fault.is_empty());
    json!({ "at": clock::timestamp(at), "applied": fault.is_none(), "fault": fault })
}

/// The listed models that no backend can serve now. A backend that is only full can.
fn unserved_models(snapshot: &Snapshot, now: Nanos) -> Vec<&str> {
    let table = snapshot.table();
    let can_serve = |name: &str, target: &Target| {
        let (target_of, demand) = (Some((target, Some(name))), &Demand::default());
        let candidate = Candidate { target: target_of, demand, now, ticket: None, turn: Turn::default() };
        let closed = snapshot.upstream(target).check(&candidate).err();
        target.weight > 0 && matches!(closed, None | Some(Closed::Full))
    };
    let is_served = |name: &str| {
        table
            .find(Some(name), true)
            .is_some_and(|id| table.route(id).targets.iter().any(|t| can_serve(name, t)))
    };
    table.listed().iter().map(|listed| &*listed.name).filter(|name| !is_served(name)).collect()
}

/// The last failures, the newest first.
fn failures(shared: &Shared) -> Vec<Value> {
    let or_null = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
    let one = |failure: Failure| {
        let tries: Vec<_> = failure
            .tries
            .iter()
            .map(|FailedTry { backend, cause }| json!({ "backend": backend, "cause": cause }))
            .collect();
        json!({
            "at": clock::timestamp(failure.at.1),
            "first_at": clock::timestamp(failure.at.0),
            "count": failure.count,
            "client": or_null(&failure.client),
            "model": or_null(&failure.model),
            "tries": tries,
            "outcome": failure.outcome_in_words(),
            "hurt": failure.has_hurt(),
        })
    };
    shared.telemetry.failures.list().into_iter().map(one).collect()
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

fn backend(shared: &Shared, snapshot: &Snapshot, id: BackendId) -> Value {
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
    let state = state_of(b, now);
    let recent = shared.history.of(b, state, (now, clock::wall(now)));
    let models = snapshot.table().models().iter().filter(|model| model.backend == id);
    let models: serde_json::Map<_, _> = models
        .map(|model| {
            let state = b.state.breaker.status_for(|| model.key, now).name();
            (model.name.to_string(), state.into())
        })
        .collect();
    let (answers, errors): (Vec<_>, Vec<_>) = recent.steps.iter().copied().unzip();
    let rounded = |rate: f64| (rate * 1000.0).round() / 1000.0;
    json!({
        "name": b.name(),
        "state": state,
        "since": clock::timestamp(recent.since),
        "why": why(b, state, &models, &recent),
        "weight": b.conf.weight,
        "priority": b.conf.priority,
        "in_flight": b.in_flight(),
        "max_in_flight": b.max_in_flight(),
        "requests": recent.now.answers,
        "errors": recent.now.errors,
        "requests_per_second": rounded(recent.answers),
        "errors_per_second": rounded(recent.errors),
        "tokens_per_second": rounded(recent.tokens),
        "first_token_ms": recent.first_token_ms.map(|(p50, p95)| json!({ "p50": rounded(p50), "p95": rounded(p95) })),
        "history": { "step_secs": STEP / SECOND, "requests": answers, "errors": errors },
        "retry_secs": b.state.breaker.retries_at(now).map(secs_to),
        "cooling_secs": cooling.map(secs_to),
        "cooling_until": cooling.map(|until| clock::timestamp(clock::wall(until))),
        "quota_opens_secs": quota,
        "models": models,
        "last_error": b.last_error().map(|(at, Fault { kind, cause })| {
            json!({ "code": kind.text(), "cause": cause, "at": clock::timestamp(at) })
        }),
    })
}

/// Why a backend is in its state, in words. `models`: the state of each model that the configuration names.
fn why(b: &Upstream, state: &str, models: &serde_json::Map<String, Value>, recent: &Recent) -> String {
    let last_cause = || b.last_error().map(|(_, fault)| fault.cause.into_owned()).unwrap_or_default();
    // A success may ask to wait, too: then an older failure is not the reason.
    let cause_since = |since: SystemTime| {
        b.last_error().filter(|(at, _)| *at + LOOK >= since).map(|(_, fault)| fault.cause).unwrap_or_default()
    };
    match state {
        "drained" => "its weight is 0".into(),
        "full" => "all its requests in flight are taken".into(),
        "quota" => "the requests or tokens of this minute are used up".into(),
        "budget" => "the budget is spent".into(),
        "cooling" => match cause_since(recent.since) {
            cause if cause.is_empty() => "the provider asked to wait".into(),
            cause => format!("the provider asked to wait: {cause}"),
        },
        "healthy" => {
            let mut told = Vec::new();
            if recent.errors > 0.0 {
                told.push(format!("some tries fail: {}", last_cause()));
            }
            let out = models.iter().filter(|(_, state)| *state != "healthy");
            let out: Vec<_> = out
                .map(|(model, state)| format!("{model} is {}", state.as_str().unwrap_or_default()))
                .collect();
            if !out.is_empty() {
                told.push(out.join(", "));
            }
            told.join("; ")
        }
        _ => Some(b.outage()).filter(|why| !why.is_empty()).unwrap_or_else(last_cause),
    }
}
