//! Limits by tokens, by money and by requests at once: what a request needs of its client's limits is reserved before
//! it is sent. The [`RequestRecord`] holds the reservation, and settles it.

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
use crate::time::{Day, Nanos};
use crate::upstream::fleet::{Ask, Snapshot};
use crate::upstream::limits::Candidate;

/// What a request may use. Costs nothing if nothing is limited by tokens or money. A request that only counts tokens
/// uses none.
pub(crate) fn demand(snapshot: &Snapshot, api: &Api, chat: &ChatRequest) -> Demand {
    if !snapshot.limits_tokens() || api.metering == Metering::Off {
        return Demand::default();
    }
    let watched = &snapshot.watch(api).droppable;
    let found = chat.fields.droppable.iter().filter(|member| is_member(&watched[member.name]));
    let found: Vec<_> = found.map(|member| chat.copy(member.span.clone())).collect();
    let output = match (api.metering, most_output(found.iter().map(|member| &member[..]))) {
        (Metering::Input | Metering::Off | Metering::Told, _) => Output::None,
        (Metering::Full, Some(most)) => Output::AtMost(most),
        (Metering::Full, None) => Output::Unstated,
    };
    Demand { asked: chat.text_length(), output, is_metered: true }
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
    /// Reserves what the request needs of its client's limits. Waits while the client has too many requests at once.
    /// Also returns the state of the client's limit of tokens.
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
        let cost_limit = budget.as_ref().map(|budget| budget.limit());
        let needs = needs(self.snapshot, self.ask, (limit.is_some() || budget.is_some(), cost_limit));
        self.check_size(&needs, limit)?;
        let mut reserved = ClientReservation { expected: needs.expected, ..ClientReservation::default() };
        if let Some(admission) = &admission {
            if let Some(budget) = &budget {
                check_budget(budget, needs.cost)?;
            }
            reserved.permit = Some(self.permit(admission, record).await?);
        }
        if let Some(budget) = &budget {
            reserved.spend = Some(spend(budget, needs.cost)?);
        }
        let mut decision = None;
        if let Some(limit) = limit {
            let shared = self.gateway.shared();
            let key = limit_key(shared, &record.caller);
            let result = shared.tokens.reserve(key, (limit, needs.expected.total()), clock::now());
            let (reservation, state) = result.map_err(|d| GatewayError::Limited(LimitError::Tokens(d)))?;
            (reserved.tokens, decision) = (Some(reservation), Some(state));
        }
        if reserved.permit.is_some() || reserved.spend.is_some() || reserved.tokens.is_some() {
            record.reserved = Some(Box::new(reserved));
        }
        Ok(decision)
    }

    /// Refuses a request whose input and stated maximum of output are above the limit of its client, or of every
    /// backend that could serve it: no wait helps.
    fn check_size(&self, needs: &Needs, limit: Option<u64>) -> Result<(), GatewayError> {
        let above_own = limit.filter(|limit| needs.stated > *limit).map(|limit| (limit, needs.stated));
        match above_own.or(needs.exceeded.filter(|_| !needs.fits)) {
            Some((limit, tokens)) => Err(GatewayError::Limited(LimitError::TooLarge { tokens, limit })),
            None => Ok(()),
        }
    }

    /// Takes one of the client's requests at once, or waits for one. A waiting request counts in `queue.max_size`.
    async fn permit(
        &self,
        admission: &Arc<Admission>,
        record: &mut RequestRecord,
    ) -> Result<Permit, GatewayError> {
        let ticket = match admission.enter(self.ask.turn)? {
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

/// What a request needs at the targets that may serve it.
#[derive(Debug, Default)]
struct Needs {
    /// The most that it is expected to use at any of them.
    expected: Usage,
    /// The most that it is expected to cost at any of them, in nano-USD.
    cost: u64,
    /// Its input and its stated maximum of output, in tokens: the most at any of them.
    stated: u64,
    /// Whether one of them has no limit that it exceeds.
    fits: bool,
    /// The largest limit that it exceeds, and its tokens there.
    exceeded: Option<(u64, u64)>,
}

/// What the request needs at its targets. `is_limited`: the client's tokens or money are limited; otherwise a target
/// where the request fits ends the search. The cost is computed only with a `budget`, see
/// [`expected_cost`](crate::upstream::Upstream::expected_cost).
fn needs(snapshot: &Snapshot, ask: &Ask<'_>, (is_limited, budget): (bool, Option<u64>)) -> Needs {
    let mut needs = Needs::default();
    if !snapshot.limits_tokens() {
        return needs;
    }
    let now = clock::now();
    for target in snapshot.targets(ask) {
        let (upstream, target) = (snapshot.upstream(target), Some((target, ask.model)));
        let candidate = Candidate { target, demand: &ask.demand, now, ticket: None, turn: ask.turn };
        let need = upstream.need(&candidate);
        needs.stated = needs.stated.max(need.stated);
        if need.expected.total() > needs.expected.total() {
            needs.expected = need.expected;
        }
        if let Some(budget) = budget {
            needs.cost = needs.cost.max(upstream.expected_cost(&candidate, &need, budget));
        }
        match upstream.exceeded(&need) {
            Some(limit) => needs.exceeded = needs.exceeded.max(Some((limit, need.stated))),
            None => needs.fits = true,
        }
        if needs.fits && !is_limited {
            break;
        }
    }
    needs
}

/// The error for a request that is too large for every backend that is left.
pub(crate) fn too_large(snapshot: &Snapshot, ask: &Ask<'_>) -> GatewayError {
    let (limit, tokens) = needs(snapshot, ask, (true, None)).exceeded.unwrap_or_default();
    GatewayError::Limited(LimitError::TooLarge { tokens, limit })
}

/// Refuses a request that no wait helps, since the budget does not pay for it.
fn check_budget(budget: &SpendLimit, cost: u64) -> Result<(), GatewayError> {
    let today = clock::today();
    match budget.check(cost, today) {
        Err(Refused::Spent) => Err(budget_error(budget, (cost, today), Refused::Spent)),
        Err(Refused::Reserved) | Ok(()) => Ok(()),
    }
}

fn spend(budget: &Arc<SpendLimit>, cost: u64) -> Result<SpendReservation, GatewayError> {
    let today = clock::today();
    budget.reserve(cost, today).map_err(|why| budget_error(budget, (cost, today), why))
}

/// The error for a request of this cost that its client's budget refuses.
fn budget_error(budget: &SpendLimit, (cost, today): (u64, Day), why: Refused) -> GatewayError {
    let (limit, per) = (budget.limit(), budget.period());
    GatewayError::Limited(match why {
        Refused::Spent if cost > limit => LimitError::AboveBudget { cost, limit, per },
        Refused::Spent => LimitError::BudgetSpent { limit, per, opens: per.next(today) },
        Refused::Reserved => LimitError::BudgetReserved,
    })
}
