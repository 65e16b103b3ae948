//! The metrics of tokens and money.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::config::ANONYMOUS;
use crate::counter::{Histogram, PER_TOKEN, REQUEST, Total};
use crate::telemetry::clients::{Client, ClientTotal, Clients};
use crate::telemetry::encode::Encoder;
use crate::time::Nanos;
use crate::upstream::Upstream;
use crate::upstream::counters::BackendLane;
use crate::upstream::token_counters::TokenCount;

/// The token counts of all workers for one backend, by model.
pub(crate) fn tokens_of(upstream: &Upstream) -> BTreeMap<Arc<str>, TokenCount> {
    let mut totals = BTreeMap::new();
    upstream.lanes.iter().for_each(|lane| lane.tokens.add_to(&mut totals));
    totals
}

/// The counts of all clients at `now`, by name; `anonymous` is that of requests without a client key.
pub(crate) fn totals_by_client(
    clients: &Clients,
    anonymous: ClientTotal,
    now: Nanos,
) -> impl Iterator<Item = (&str, ClientTotal)> {
    let total = move |client: &Arc<Client>| ClientTotal::of(client.lanes.iter().map(|lane| &**lane), now);
    let known = clients.iter().map(move |client| (&*client.conf.name, total(client)));
    known.chain([(ANONYMOUS, anonymous)])
}

/// Writes the metrics of tokens and money. `clients`: the counts of all clients by name.
pub(super) fn encode(e: &mut Encoder, backends: &[Arc<Upstream>], clients: &[(&str, ClientTotal)]) {
    of_backends(e, backends);
    times(e, backends);
    of_clients(e, clients);
}

fn of_backends(e: &mut Encoder, backends: &[Arc<Upstream>]) {
    let totals: Vec<_> = backends.iter().map(|b| (b.name(), tokens_of(b))).collect();
    let by_model = || totals.iter().flat_map(|(b, models)| models.iter().map(|(model, n)| (*b, &**model, n)));
    e.family(
        "zap_tokens_total",
        "counter",
        "Tokens of the responses of a backend by model, as the provider counted them or as estimated; cached is part of input, reasoning of output.",
    );
    for (backend, model, count) in by_model() {
        for (kind, n) in TokenCount::KINDS.into_iter().zip(count.tokens) {
            e.sample("zap_tokens_total", &[("backend", backend), ("model", model), ("type", kind)], n);
        }
    }
    e.family("zap_cost_usd_total", "counter", "Cost of the responses of a backend by model, by its prices.");
    for (backend, model, count) in by_model() {
        e.money("zap_cost_usd_total", &[("backend", backend), ("model", model)], count.cost);
    }
    e.family(
        "zap_usage_missing_total",
        "counter",
        "Responses whose tokens were estimated, since the provider did not tell them.",
    );
    for b in backends {
        let n = b.lanes.iter().map(|lane| lane.usage_missing.get()).sum();
        e.sample("zap_usage_missing_total", &[("backend", b.name())], n);
    }
}

fn times(e: &mut Encoder, backends: &[Arc<Upstream>]) {
    let mut family = |name, help, bounds, histogram: fn(&BackendLane) -> &Histogram| {
        e.family(name, "histogram", help);
        for b in backends {
            let total = Total::of(bounds, b.lanes.iter().map(|lane| histogram(lane)));
            e.histogram(name, &[("backend", b.name())], &total);
        }
    };
    family(
        "zap_time_to_first_token_seconds",
        "Time from a streamed request's arrival to the first content of its response.",
        REQUEST,
        |lane| &lane.first_token,
    );
    family(
        "zap_time_per_output_token_seconds",
        "Mean time between two output tokens of a streamed response.",
        PER_TOKEN,
        |lane| &lane.per_output_token,
    );
}

fn of_clients(e: &mut Encoder, all: &[(&str, ClientTotal)]) {
    e.family("zap_client_tokens_total", "counter", "Tokens of the responses to a client key.");
    for (client, ClientTotal { count, .. }) in all {
        for (kind, n) in TokenCount::KINDS.into_iter().zip(count.tokens) {
            e.sample("zap_client_tokens_total", &[("client", client), ("type", kind)], n);
        }
    }
    e.family("zap_client_cost_usd_total", "counter", "Cost of the responses to a client key.");
    for (client, total) in all {
        e.money("zap_client_cost_usd_total", &[("client", client)], total.count.cost);
    }
    e.family(
        "zap_token_overrun_total",
        "counter",
        "Tokens that responses used beyond what the limit of tokens or the budget of a client key had reserved for them.",
    );
    for (client, total) in all {
        e.sample("zap_token_overrun_total", &[("client", client)], total.overrun);
    }
}
