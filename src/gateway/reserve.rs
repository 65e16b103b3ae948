//! Limits by tokens, by money and by requests at once: what a request needs of its client's limits is reserved before it is
//! sent. The [`RequestRecord`] holds the reservation, and settles it.

use std::sync::Arc;

use crate::client::exchange::Exchange;
use crate::clock;
use crate::gateway::Gateway;
use crate::gateway::caller::{known_client, limit_key};
use crate::gateway::intake::ChatRequest;
use crate::gateway::limit_error::LimitError;
use crate::gateway::refusal::GatewayError;
use crate::policy::queue::{Admission, Admitted, Permit};
use crate::policy::ratio::{Demand, Output};
use crate::policy::reservation::ClientReservation;
use crate::policy::spend::{Refused, SpendLimit, SpendReservation};
use crate::policy::token_window::TokenDecision;
use crate::protocol::endpoint::{Api, Metering};
use crate::protocol::request_limits::{is_member, most_output};
use crate::protocol::usage::Usage;
use crate::telemetry::phase::Phase;
use crate::telemetry::record::RequestRecord;
use crate::time::Nanos;
use crate::upstream::Upstream;
use crate::upstream::fleet::{Ask, Snapshot};
use crate::upstream::limits::Candidate;

/// What a request may use. Costs nothing if nothing is limited by tokens or money. A request that only counts tokens uses
/// none.
pub(crate) fn demand(snapshot: &Snapshot, api: &Api, chat: &ChatRequest) -> Demand {
    if !snapshot.limits_tokens() || api.metering == Metering::Off {
        return Demand::default();
    }
    let watched = &snapshot.watch().droppable;
    let found = chat.fields.droppable.iter().filter(|member| is_member(&watched[member.name]));
    let found: Vec<_> = found.map(|member| chat.copy(member.span.clone())).collect();
    let output = match (api.metering, most_output(found.iter().map(|member| &member[..]))) {
        (Metering::Input | Metering::Off | Metering::Told, _) => Output::None,
        (Metering::Full, Some(most)) => Output::AtMost(most),
        (Metering::Full, None) => Output::Unstated,
    };
    Demand { asked: chat.text_length(), output }
}

/// The limits of the client of a request, as far as the request is concerned.
pub(crate) struct ClientLimits<'a> {
    /// The worker's gateway.
    pub gateway: &'a Gateway,
    /// The exchange on the client connection, for time limits.
    pub exchange: &'a Exchange,
    /// The fleet and the clients.
    pub snapshot: &'a Snapshot,
    /// The route, the model and the demand of the request.
    pub ask: &'a Ask<'a>,
    /// When the wait for a request at once must end.
    pub deadline: Nanos,
}

/// The limit of tokens of a client; `None` if it has none.
fn token_limit(snapshot: &Snapshot, record: &RequestRecord) -> Option<u64> {
    let own = known_client(&record.caller).and_then(|client| client.conf.tokens_per_minute);
    own.or(snapshot.config.rate_limit.tokens_per_minute)
}

/// The state of the limit of tokens of a client; `None` if it has none.
pub(crate) fn token_state(
    gateway: &Gateway,
    snapshot: &Snapshot,
    record: &RequestRecord,
) -> Option<TokenDecision> {
    let limit = token_limit(snapshot, record)?;
    let shared = gateway.shared();
    Some(shared.tokens.state(limit_key(shared, &record.caller), limit, clock::now()))
}

impl ClientLimits<'_> {
    /// Reserves what the request needs of its client's limits. Waits while the client has too many requests at once. Also
    /// returns the state of the client's limit of tokens.
    ///
    /// # Errors
    /// Why a limit refuses the request.
    pub(crate) async fn reserve(
        &self,
        record: &mut RequestRecord,
    ) -> Result<Option<TokenDecision>, GatewayError> {
        // A request that only counts tokens uses none.
        let is_metered = self.ask.endpoint.api().is_some_and(|api| api.metering != Metering::Off);
        let limit = token_limit(self.snapshot, record).filter(|_| is_metered);
        let client = known_client(&record.caller);
        let admission = client.and_then(|client| client.admission.clone());
        let budget = client.filter(|_| is_metered).and_then(|client| client.budget.clone());
        self.check_size(limit)?;
        let mut reserved = ClientReservation::default();
        if let Some(admission) = &admission {
            reserved.permit = Some(self.permit(admission, record).await?);
        }
        if let Some(budget) = &budget {
            let cost;
            (reserved.expected, cost) = self.expected(budget.limit());
            reserved.spend = Some(spend(budget, cost)?);
        }
        let mut decision = None;
        if let Some(limit) = limit {
            let (shared, expected) = (self.gateway.shared(), self.expected(0).0);
            let key = limit_key(shared, &record.caller);
            let result = shared.tokens.reserve(key, limit, expected.total(), clock::now());
            let (reservation, state) = result.map_err(|d| GatewayError::Limited(LimitError::Tokens(d)))?;
            (reserved.expected, reserved.tokens, decision) = (expected, Some(reservation), Some(state));
        }
        if reserved.permit.is_some() || reserved.spend.is_some() || reserved.tokens.is_some() {
            record.reserved = Some(Box::new(reserved));
        }
        Ok(decision)
    }

    /// The most that the request is expected to use and to cost at any of its targets. `budget`: see
    /// [`Upstream::expected_cost`].
    fn expected(&self, budget: u64) -> (Usage, u64) {
        let (mut most, mut cost) = (Usage::default(), 0);
        for (upstream, candidate) in candidates(self.snapshot, self.ask) {
            let expected = upstream.expected(&candidate);
            cost = cost.max(upstream.expected_cost(&candidate, &expected, budget));
            if expected.total() > most.total() {
                most = expected;
            }
        }
        (most, cost)
    }

    /// Refuses a request whose input and stated maximum of output are above the limit of its client, or of every backend
    /// that could serve it: no wait helps.
    fn check_size(&self, limit: Option<u64>) -> Result<(), GatewayError> {
        let too_large = |tokens, limit| Err(GatewayError::Limited(LimitError::TooLarge { tokens, limit }));
        if let Some(limit) = limit {
            let stated = candidates(self.snapshot, self.ask)
                .map(|(upstream, candidate)| upstream.stated(&candidate))
                .max();
            if let Some(stated) = stated.filter(|stated| *stated > limit) {
                return too_large(stated, limit);
            }
        }
        match too_large_for_all(candidates(self.snapshot, self.ask)) {
            Some((tokens, limit)) => too_large(tokens, limit),
            None => Ok(()),
        }
    }

    /// Takes one of the client's requests at once, or waits for one. A waiting request counts in `queue.max_size`.
    async fn permit(
        &self,
        admission: &Arc<Admission>,
        record: &mut RequestRecord,
    ) -> Result<Permit, GatewayError> {
        let ticket = match admission.enter()? {
            Admitted::Passed(permit) => return Ok(permit),
            Admitted::Queued(ticket) => ticket,
        };
        let _counted = self.gateway.shared().admission.wait_for_backend()?;
        record.phase = Phase::Queued;
        let since = clock::now();
        let permit = self.exchange.limit(self.deadline, ticket).await;
        record.add_queued(clock::now() - since);
        permit.ok().filter(|_| clock::now() < self.deadline).ok_or(GatewayError::QueueTimeout)
    }
}

/// The request as a candidate for each target that may serve it.
fn candidates<'a>(
    snapshot: &'a Snapshot,
    ask: &'a Ask<'_>,
) -> impl Iterator<Item = (&'a Upstream, Candidate<'a>)> {
    let now = clock::now();
    snapshot.targets(ask).map(move |target| {
        let (target_and_model, demand) = (Some((target, ask.model)), &ask.demand);
        let candidate = Candidate { target: target_and_model, demand, now, ticket: None };
        (&**snapshot.upstream(target), candidate)
    })
}

/// The error for a request that is too large for every backend that is left.
pub(crate) fn too_large(snapshot: &Snapshot, ask: &Ask<'_>) -> GatewayError {
    let limits = candidates(snapshot, ask).filter(|(upstream, candidate)| upstream.is_too_large(candidate));
    let limits =
        limits.map(|(upstream, c)| (upstream.conf.tokens_per_minute.unwrap_or(0), upstream.stated(&c)));
    let (limit, tokens) = limits.max().unwrap_or_default();
    GatewayError::Limited(LimitError::TooLarge { tokens, limit })
}

/// The tokens of a request that is too large for every backend that could serve it, and the largest of their limits.
fn too_large_for_all<'a>(
    candidates: impl Iterator<Item = (&'a Upstream, Candidate<'a>)>,
) -> Option<(u64, u64)> {
    let mut largest = None;
    for (upstream, candidate) in candidates {
        let limit = upstream.conf.tokens_per_minute.filter(|_| upstream.is_too_large(&candidate))?;
        largest = largest.max(Some((limit, upstream.stated(&candidate))));
    }
    largest.map(|(limit, tokens)| (tokens, limit))
}

fn spend(budget: &Arc<SpendLimit>, cost: u64) -> Result<SpendReservation, GatewayError> {
    let today = clock::today();
    budget.reserve(cost, today).map_err(|why| match why {
        Refused::Spent if cost > budget.limit() => {
            let (limit, per) = (budget.limit(), budget.period());
            GatewayError::Limited(LimitError::AboveBudget { cost, limit, per })
        }
        Refused::Reserved => GatewayError::Limited(LimitError::BudgetReserved),
        Refused::Spent => {
            let opens = budget.period().next(today);
            GatewayError::Limited(LimitError::BudgetSpent {
                limit: budget.limit(),
                per: budget.period(),
                opens,
            })
        }
    })
}
