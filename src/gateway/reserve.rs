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
use crate::protocol::request_limits::{members, most_output};
use crate::telemetry::phase::Phase;
use crate::telemetry::record::RequestRecord;
use crate::time::Nanos;
use crate::upstream::Upstream;
use crate::upstream::fleet::{Ask, Snapshot};
use crate::upstream::in_flight::{Candidate, today};

/// What a request may use. Costs nothing if nothing is limited by tokens or money. A request that only counts tokens uses
/// none.
pub(crate) fn demand(snapshot: &Snapshot, api: &Api, chat: &ChatRequest) -> Demand {
    if !snapshot.limits_tokens() || api.metering == Metering::Off {
        return Demand::default();
    }
    let watched = &snapshot.watch().droppable;
    let is_limit = |name: usize| members().any(|member| *member == *watched[name]);
    let found = chat.fields.droppable.iter().filter(|member| is_limit(member.name));
    let found: Vec<_> = found.map(|member| chat.copy(member.span.clone())).collect();
    let output = match (api.metering, most_output(found.iter().map(|member| &member[..]))) {
        (Metering::Input | Metering::Off | Metering::Told, _) => Output::None,
        (Metering::Full, Some(most)) => Output::AtMost(most),
        (Metering::Full, None) => Output::Unstated,
    };
    Demand { asked: chat.text_length(), output }
}

/// The most that the request is expected to use at any of its targets.
struct Expected {
    tokens: u64,
    /// In nano-USD.
    cost: u64,
}

impl Expected {
    fn of(snapshot: &Snapshot, ask: &Ask<'_>, now: Nanos) -> Self {
        let mut most = Expected { tokens: 0, cost: 0 };
        for (upstream, candidate) in candidates(snapshot, ask, now) {
            most.tokens = most.tokens.max(upstream.expected_tokens(&candidate));
            most.cost = most.cost.max(upstream.expected_cost(&candidate));
        }
        most
    }
}

/// The backends that serve the request if they are up, each with the request as a candidate at `now`.
fn candidates<'a>(
    snapshot: &'a Snapshot,
    ask: &'a Ask<'a>,
    now: Nanos,
) -> impl Iterator<Item = (&'a Arc<Upstream>, Candidate<'a>)> {
    let targets = snapshot.route(ask).targets.iter().map(|target| (snapshot.upstream(target), target));
    let serving = targets.filter(|(upstream, target)| target.weight > 0 && upstream.serves(ask.endpoint));
    serving.map(move |(upstream, target)| {
        let target = Some((target, ask.model));
        (upstream, Candidate { target, demand: &ask.demand, now, ticket: None })
    })
}

/// A request that asks for a reservation.
pub(crate) struct Reserve<'a> {
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

impl Reserve<'_> {
    /// Reserves what the request needs of its client's limits. Waits while the client has too many requests at once. Also
    /// returns the state of the client's limit of tokens.
    ///
    /// # Errors
    /// Why a limit refuses the request.
    pub(crate) async fn run(
        &self,
        record: &mut RequestRecord,
    ) -> Result<Option<TokenDecision>, GatewayError> {
        let client = known_client(&record.caller);
        let own = client.and_then(|client| client.conf.tokens_per_minute);
        let limit = own.or(self.snapshot.config.rate_limit.tokens_per_minute);
        let admission = client.and_then(|client| client.admission.clone());
        let budget = client.and_then(|client| client.budget.clone());
        let now = clock::now();
        let expected = Expected::of(self.snapshot, self.ask, now);
        self.check_size(limit, &expected, now)?;
        let mut reserved = ClientReservation { expected: expected.tokens, ..ClientReservation::default() };
        if let Some(admission) = &admission {
            reserved.permit = Some(self.permit(admission, record).await?);
        }
        reserved.spend = budget.map(|budget| spend(&budget, expected.cost)).transpose()?;
        let decision = match limit {
            Some(limit) => {
                let tokens = &self.gateway.shared().tokens;
                let key = limit_key(self.gateway.shared(), &record.caller);
                let result = tokens.reserve(key, limit, expected.tokens, clock::now());
                let (reservation, decision) =
                    result.map_err(|d| GatewayError::Limited(LimitError::Tokens(d)))?;
                reserved.tokens = Some(reservation);
                Some(decision)
            }
            None => None,
        };
        record.reserved = Some(Box::new(reserved));
        Ok(decision)
    }

    /// Refuses a request whose input and stated maximum of output are above the limit of its client, or of every backend
    /// that could serve it: no wait helps.
    fn check_size(&self, limit: Option<u64>, expected: &Expected, now: Nanos) -> Result<(), GatewayError> {
        if !matches!(self.ask.demand.output, Output::AtMost(_)) {
            return Ok(());
        }
        let too_large =
            |limit| GatewayError::Limited(LimitError::TooLarge { tokens: expected.tokens, limit });
        if let Some(limit) = limit.filter(|limit| expected.tokens > *limit) {
            return Err(too_large(limit));
        }
        let mut largest = 0;
        for (upstream, candidate) in candidates(self.snapshot, self.ask, now) {
            match upstream.conf.tokens_per_minute {
                Some(limit) if upstream.is_too_large(&candidate) => largest = largest.max(limit),
                _ => return Ok(()),
            }
        }
        if largest > 0 { Err(too_large(largest)) } else { Ok(()) }
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

fn spend(budget: &Arc<SpendLimit>, cost: u64) -> Result<SpendReservation, GatewayError> {
    let today = today();
    budget.reserve(cost, today).map_err(|why| match why {
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
