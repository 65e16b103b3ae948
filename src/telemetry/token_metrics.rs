//! The metrics of tokens and money.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::config::ANONYMOUS;
use crate::counter::{Histogram, PER_TOKEN, REQUEST, Total};
use crate::telemetry::clients::Clients;
use crate::telemetry::encode::Encoder;
use crate::upstream::Upstream;
use crate::upstream::counters::BackendLane;
use crate::upstream::token_counters::TokenCount;

/// The token counts of all workers for one backend, by model.
pub(crate) fn tokens_of(upstream: &Upstream) -> BTreeMap<Arc<str>, TokenCount> {
    let mut totals = BTreeMap::new();
    upstream.lanes.iter().for_each(|lane| lane.tokens.add_to(&mut totals));
    totals
}

/// The token counts of all clients by name; `anonymous` is that of requests without a client key.
pub(crate) fn tokens_by_client(
    clients: &Clients,
    anonymous: TokenCount,
) -> impl Iterator<Item = (&str, TokenCount)> {
    let known = clients.iter().map(|client| {
        let count = TokenCount::sum(client.lanes.iter().map(|lane| lane.spent()));
        (&*client.conf.name, count)
    });
    known.chain([(ANONYMOUS, anonymous)])
}

/// Writes the metrics of tokens and money. `anonymous`: the count of requests without a client key.
pub(super) fn encode(e: &mut Encoder, backends: &[Arc<Upstream>], clients: &Clients, anonymous: TokenCount) {
    of_backends(e, backends);
    times(e, backends);
    of_clients(e, clients, anonymous);
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

fn of_clients(e: &mut Encoder, clients: &Clients, anonymous: TokenCount) {
    let all: Vec<_> = tokens_by_client(clients, anonymous).collect();
    e.family("zap_client_tokens_total", "counter", "Tokens of the responses to a client key.");
    for (client, count) in &all {
        for (kind, n) in TokenCount::KINDS.into_iter().zip(count.tokens) {
            e.sample("zap_client_tokens_total", &[("client", client), ("type", kind)], n);
        }
    }
    e.family("zap_client_cost_usd_total", "counter", "Cost of the responses to a client key.");
    for (client, count) in &all {
        e.money("zap_client_cost_usd_total", &[("client", client)], count.cost);
    }
}
