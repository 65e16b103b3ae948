//! What a request asks of the fleet: its route, its affinity, and the backend that made what it refers to.

use http::header::{HeaderMap, HeaderName};
use http::request::Parts;

use crate::config::Strategy;
use crate::gateway::intake::ChatRequest;
use crate::gateway::refusal::GatewayError;
use crate::gateway::{Gateway, caller, endpoints, learned_ids, reserve};
use crate::json::members::Model;
use crate::policy::known_ids::MadeBy;
use crate::policy::latency::SizeClass;
use crate::policy::queue::Turn;
use crate::policy::route::RouteId;
use crate::protocol::endpoint::{Api, BodyFormat, Metering};
use crate::protocol::stored;
use crate::protocol::stored::Stored;
use crate::telemetry::clients::Client;
use crate::telemetry::record::RequestRecord;
use crate::upstream::fleet::{Ask, Snapshot};

/// Headers that identify a conversation, the first one first: Zap's own, Claude Code's and Codex's.
const SESSION: [HeaderName; 4] = [
    HeaderName::from_static("x-zap-session"),
    HeaderName::from_static("x-claude-code-session-id"),
    HeaderName::from_static("session-id"),
    HeaderName::from_static("thread-id"),
];

impl Gateway {
    /// Returns what to ask of the fleet for a request to `api`.
    ///
    /// # Errors
    /// [`GatewayError::ModelNotFound`] or [`GatewayError::MissingModel`] if there is no route or the client may not use
    /// it; [`GatewayError::NotSpoken`] if no target of the route speaks the endpoint's protocol;
    /// [`GatewayError::NotYours`] if the request refers to what another client has.
    pub(super) fn ask<'c>(
        &self,
        snapshot: &Snapshot,
        request: &Parts,
        (api, chat): (&Api, &'c ChatRequest),
        (record, turn): (&RequestRecord, Turn),
    ) -> Result<Ask<'c>, GatewayError> {
        let (model, whole) = match &chat.fields.model {
            Model::Named { name, whole, .. } => (Some(&**name), *whole),
            _ => (None, true),
        };
        let client = caller::known_client(&record.caller).map(|client| &**client);
        let route = match api.body {
            BodyFormat::Nothing => snapshot.table().any_backend(),
            BodyFormat::Form | BodyFormat::Json => route(snapshot, client, (model, whole)),
        };
        let route = route.ok_or_else(|| match model {
            Some(name) => endpoints::model_not_found(snapshot, client, name, self.may_search(record)),
            None => GatewayError::MissingModel,
        })?;
        if !snapshot.speaks(route, api.protocol) {
            return Err(GatewayError::NotSpoken(api.protocol.name()));
        }
        let affinity = match snapshot.config.strategy {
            Strategy::PrefixHash => {
                // What is embedded, spoken or drawn is no conversation.
                let is_conversation = matches!(api.metering, Metering::Full | Metering::Off);
                let max_bytes = is_conversation.then_some(snapshot.config.prefix_bytes);
                chat.affinity(session(&request.headers), model, max_bytes)
            }
            _ => None,
        };
        let demand = reserve::demand(snapshot, api, chat);
        let (endpoint, made_by) = (record.endpoint, MadeBy::Anybody);
        let by_latency = (snapshot.config.strategy == Strategy::LeastLatency)
            .then(|| (self.random(), SizeClass::of(chat.text_length(), record.stream)));
        let ask = Ask { endpoint, route, model, affinity, demand, made_by, turn, by_latency };
        if !api.is_stored {
            return Ok(ask);
        }
        let ids = references(snapshot, request, (api, chat));
        // A drained target that made it has it alone: other targets do not answer in its place.
        let targets = &snapshot.route(&ask).targets;
        let serves = |id| targets.iter().any(|target| snapshot.upstream(target).state.id == id);
        let made_by = learned_ids::made_by(self.shared(), &record.caller, &ids, serves)?;
        Ok(Ask { made_by, ..ask })
    }
}

/// The route of a model that the client may use.
fn route(
    snapshot: &Snapshot,
    client: Option<&Client>,
    (model, whole): (Option<&str>, bool),
) -> Option<RouteId> {
    let is_allowed = client.is_none_or(|client| match model {
        Some(name) => client.may_use(name, whole),
        None => client.conf.models.is_none(),
    });
    if is_allowed { snapshot.table().find(model, whole) } else { None }
}

/// The value of the first header that identifies the conversation.
fn session(headers: &HeaderMap) -> Option<&http::HeaderValue> {
    SESSION.iter().filter_map(|name| headers.get(name)).find(|value| !value.is_empty())
}

/// The ids of what a request refers to.
fn references(snapshot: &Snapshot, request: &Parts, (api, chat): (&Api, &ChatRequest)) -> Vec<String> {
    if api.body == BodyFormat::Nothing {
        let stored = Stored::of(&request.method, request.uri.path());
        return stored.map(|stored| stored.id.to_owned()).into_iter().collect();
    }
    let watched = &snapshot.watch(api).droppable;
    // Most inputs refer to nothing, and may be long.
    let may_refer = |name: &str, span| name != stored::INPUT || chat.contains(span, stored::ITEM_REFERENCE);
    let found = chat.fields.droppable.iter().filter(|member| {
        let name = &*watched[member.name];
        stored::MEMBERS.contains(&name) && may_refer(name, member.span.clone())
    });
    found.flat_map(|member| stored::references(&chat.copy(member.span.clone()))).collect()
}
