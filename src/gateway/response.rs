//! Builds the responses to clients: those of backends, which are passed on, and Zap's own.

use std::rc::Rc;

use http::header::{
    CACHE_CONTROL, CONNECTION, CONTENT_ENCODING, CONTENT_LANGUAGE, CONTENT_LENGTH, CONTENT_RANGE,
    CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue,
};
use http::request::Parts;
use http::{Response, Version};

use crate::client::body::Body;
use crate::client::exchange::Exchange;
use crate::clock;
use crate::gateway::attempt::{Delivery, OpenedResponse};
use crate::gateway::learned_ids::IdLearner;
use crate::gateway::refusal::{GatewayError, X_SHOULD_RETRY};
use crate::gateway::relay::RelayBody;
use crate::gateway::relay_input::{BodyKind, RelayInput, RequestGuards};
use crate::gateway::{ClientResponse, Gateway, browser};
use crate::http1::headers::{self, ResponseFacts};
use crate::policy::limit::Decision;
use crate::policy::token_window::TokenDecision;
use crate::protocol::Endpoint;
use crate::protocol::endpoint::StreamFormat;
use crate::protocol::error_event::StreamEnding;
use crate::protocol::event_class::mentions_error;
use crate::protocol::redact::{Redactor, holds_key};
use crate::telemetry::record::{Arrival, End, RequestRecord};

const X_ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");
const X_ZAP_ATTEMPTS: HeaderName = HeaderName::from_static("x-zap-attempts");
const X_ZAP_BACKEND: HeaderName = HeaderName::from_static("x-zap-backend");
const LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit-requests");
const REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining-requests");
const RESET: HeaderName = HeaderName::from_static("x-ratelimit-reset-requests");
const LIMIT_TOKENS: HeaderName = HeaderName::from_static("x-ratelimit-limit-tokens");
const REMAINING_TOKENS: HeaderName = HeaderName::from_static("x-ratelimit-remaining-tokens");
const RESET_TOKENS: HeaderName = HeaderName::from_static("x-ratelimit-reset-tokens");

/// Log lines that a worker writes in a second for invalid request heads: a client that sends noise must not fill the
/// log.
const MAX_REFUSED_LINES: u64 = 10;

/// The facts about a request that its response needs.
pub(super) struct ResponseContext<'a> {
    /// The exchange on the client connection.
    pub(super) exchange: &'a Exchange,
    /// The HTTP version of the request.
    pub(super) version: Version,
    /// The headers of the request.
    headers: &'a HeaderMap,
    /// The decision of the rate limiter, if a limit of requests applies.
    pub(super) decision: Option<Decision>,
    /// The state of the client's limit of tokens, if there is one.
    pub(super) tokens: Option<TokenDecision>,
}

impl<'a> ResponseContext<'a> {
    /// The facts about a request before any limit was looked at.
    pub(super) fn new(exchange: &'a Exchange, version: Version, headers: &'a HeaderMap) -> Self {
        ResponseContext { exchange, version, headers, decision: None, tokens: None }
    }
}

impl Gateway {
    /// Turns the response of a backend into the response to the client, and records its head.
    pub(super) fn deliver(
        self: &Rc<Self>,
        delivery: Delivery,
        mut record: Box<RequestRecord>,
        context: &ResponseContext<'_>,
    ) -> ClientResponse {
        let Delivery { response, slot, clocks } = delivery;
        let OpenedResponse { mut head, about, lease, in_flight, first, events, is_whole, .. } = response;
        let upstream = in_flight.upstream().clone();
        let ResponseFacts { has_id, is_events, is_json, is_encoded, has_length } = about;
        // Where Zap takes something out, the client may get less than the backend sends.
        let may_change = events.as_ref().is_some_and(|events| events.may_change());
        if may_change && has_length {
            head.headers.remove(CONTENT_LENGTH);
        }
        let kind = BodyKind {
            is_stream: is_events,
            can_take_event: is_events && !is_encoded && (may_change || !has_length),
            is_whole,
            version: context.version,
        };
        let key = upstream.key();
        let id = if has_id { headers::upstream_request_id(&head.headers) } else { None };
        record.upstream_request_id =
            id.filter(|id| key.is_none_or(|key| !holds_key(key.as_bytes(), id.as_bytes())));
        // An answer may have an error beside it. The errors of a stream are redacted one by one.
        let has_key = |key: &str| {
            let beginning = first.as_ref().filter(|_| events.is_none());
            beginning.is_some_and(|body| mentions_error(body) && holds_key(key.as_bytes(), body))
        };
        let secret = key.filter(|key| head.status.as_u16() >= 400 || has_key(key));
        let redactor = secret.and_then(Redactor::new);
        if let Some(redactor) = &redactor {
            redact(&mut head.headers, redactor);
        }
        record.backend = Some(upstream);
        let is_budget_spent = head.status.is_server_error() && !self.shared().budget.has_room(clock::now());
        if is_budget_spent {
            head.headers.insert(X_SHOULD_RETRY, HeaderValue::from_static("false"));
        }
        self.add_headers(&mut head.headers, &record, context);
        if is_events {
            // nginx in front of Zap buffers the stream by default, and would hold the tokens back.
            head.headers.entry(X_ACCEL_BUFFERING).or_insert(HeaderValue::from_static("no"));
            head.headers.entry(CACHE_CONTROL).or_insert(HeaderValue::from_static("no-cache"));
        }
        record.responded(head.status.as_u16());
        context.exchange.begin_response(clocks.idle);
        let format = record.endpoint.api().map(|api| api.stream).filter(|_| events.is_some());
        let ending = StreamEnding::new(format.unwrap_or(StreamFormat::Plain));
        let has_usage = record.meter.is_some() && is_json && !is_encoded && events.is_none();
        let is_stored = record.endpoint.api().is_some_and(|api| api.is_stored);
        let has_ids = is_stored && head.status.is_success() && (is_json || is_events) && !is_encoded;
        let backend = in_flight.upstream().state.id;
        let maker = (record.endpoint != Endpoint::StoredResponse).then_some(&record.caller);
        let ids = has_ids.then(|| IdLearner::new(self.shared(), maker, backend, is_events).into());
        let guards = RequestGuards { lease, in_flight: Some(in_flight), slot, record };
        let redactor = redactor.map(Box::new);
        let input = RelayInput { first, events, ending, has_usage, ids, redactor, kind, clocks };
        let relay = RelayBody::new(guards, self.clone(), context.exchange.clone(), input);
        let mut response = Response::new(Body::stream(relay).on(context.exchange));
        *response.status_mut() = head.status;
        *response.headers_mut() = head.headers;
        response
    }

    /// Completes a response of Zap's own, and records it.
    pub(super) fn finish(
        &self,
        mut response: ClientResponse,
        mut record: Box<RequestRecord>,
        context: &ResponseContext<'_>,
    ) -> ClientResponse {
        self.add_headers(response.headers_mut(), &record, context);
        record.responded(response.status().as_u16());
        record.bytes = http_body::Body::size_hint(response.body()).lower();
        if record.end == End::ClientGone {
            record.end = End::Complete;
        }
        context.exchange.begin_response(clock::nanos(self.current().config.timeouts.stream_idle));
        response.map(|body| body.on(context.exchange))
    }

    /// Adds the headers that every response has.
    fn add_headers(&self, headers: &mut HeaderMap, record: &RequestRecord, context: &ResponseContext<'_>) {
        headers.reserve(8);
        headers.insert(headers::X_REQUEST_ID, record.request_id.clone());
        if let Some(id) = &record.upstream_request_id {
            headers.insert(headers::X_UPSTREAM_REQUEST_ID, id.clone());
        }
        headers.insert(X_ZAP_ATTEMPTS, headers::number(record.tries));
        match &record.backend {
            Some(backend) => headers.insert(X_ZAP_BACKEND, backend.label.clone()),
            None => headers.remove(X_ZAP_BACKEND),
        };
        if let Some(d) = context.decision {
            headers.insert(LIMIT, self.limit_value(d.limit));
            headers.insert(REMAINING, headers::number(d.remaining));
            headers.insert(RESET, headers::reset(d.reset));
        }
        if let Some(d) = context.tokens {
            headers.insert(LIMIT_TOKENS, headers::number(d.limit));
            headers.insert(REMAINING_TOKENS, headers::number(d.remaining));
            headers.insert(RESET_TOKENS, headers::reset(d.reset));
        }
        browser::expose(&self.server().cors_origins, context.headers, headers);
        if context.exchange.must_close() || self.shared().is_leaving() {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
    }

    /// Returns the request limit as a header value. Reuses the value of the last response if the limit is the same.
    fn limit_value(&self, limit: u32) -> HeaderValue {
        let mut last = self.last_limit.borrow_mut();
        if last.0 != limit {
            *last = (limit, headers::number(limit));
        }
        last.1.clone()
    }

    /// Refuses a request: builds the error response, and records it.
    pub(super) fn refuse(
        &self,
        error: &GatewayError,
        mut record: Box<RequestRecord>,
        context: &ResponseContext<'_>,
    ) -> ClientResponse {
        let response = self.error_response(error, &mut record);
        self.finish(response, record, context)
    }

    fn error_response(&self, error: &GatewayError, record: &mut RequestRecord) -> ClientResponse {
        let (code, status) = (error.code(), error.status());
        self.recorder.lane().rejected(code);
        record.refused = Some(code);
        if matches!(
            error,
            GatewayError::QueueTimeout | GatewayError::RequestTimeout | GatewayError::UpstreamTimeout
        ) {
            record.end = End::Timeout;
        } else if status.as_u16() == 502 {
            record.end = End::UpstreamError;
        }
        let is_budget_spent = status.is_server_error() && !self.shared().budget.has_room(clock::now());
        error.response(record.endpoint.protocol(), is_budget_spent)
    }

    /// Builds the response to a request that panicked, from its head. The record was reported when the panic dropped
    /// it.
    pub(super) fn internal_error(&self, head: &Parts) -> ClientResponse {
        let protocol = Endpoint::of(head.uri.path()).protocol();
        let is_budget_spent = !self.shared().budget.has_room(clock::now());
        let mut response = GatewayError::Internal.response(protocol, is_budget_spent);
        let panicked = self.recorder.panicked.take();
        let (id, tries) =
            panicked.unwrap_or_else(|| (headers::new_request_id(self.rng.borrow_mut().u128(..)), 0));
        response.headers_mut().insert(headers::X_REQUEST_ID, id);
        response.headers_mut().insert(X_ZAP_ATTEMPTS, headers::number(tries));
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        browser::expose(&self.server().cors_origins, &head.headers, response.headers_mut());
        response
    }

    /// Refuses an invalid request head. The head that hyper parsed is a placeholder for it.
    pub(super) fn refuse_head(&self, why: &'static str, exchange: &Exchange) -> ClientResponse {
        let id = headers::new_request_id(self.rng.borrow_mut().u128(..));
        let arrival = Arrival {
            method: None,
            path: "",
            endpoint: Endpoint::Other,
            request_id: id,
            peer: exchange.peer(),
        };
        let mut record = RequestRecord::new(self.recorder.clone(), arrival);
        record.is_suppressed = !self.refused_heads.borrow_mut().take(record.started, MAX_REFUSED_LINES);
        let headers = HeaderMap::new();
        let context = ResponseContext::new(exchange, Version::HTTP_11, &headers);
        self.refuse(&GatewayError::BadRequest(why), record, &context)
    }
}

/// Replaces header values that contain the backend's key. Headers that describe the body stay: the client cannot read
/// the body without them.
fn redact(headers: &mut HeaderMap, redactor: &Redactor) {
    const BODY_HEADERS: [HeaderName; 4] = [CONTENT_ENCODING, CONTENT_LANGUAGE, CONTENT_RANGE, CONTENT_TYPE];
    for (name, value) in headers.iter_mut() {
        if !BODY_HEADERS.contains(name) && redactor.is_in(value.as_bytes()) {
            *value = HeaderValue::from_static("***");
        }
    }
    // The redactor may change the length of the body: `***` may be shorter than the key.
    headers.remove(CONTENT_LENGTH);
}
