//! Answers on their way to the client: an upstream's, passed on, and Zap's own.

use std::rc::Rc;

use http::header::{
    CACHE_CONTROL, CONNECTION, CONTENT_ENCODING, CONTENT_LANGUAGE, CONTENT_LENGTH, CONTENT_RANGE,
    CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue,
};
use http::{Response, Version};

use crate::client::body::Body;
use crate::client::exchange::Exchange;
use crate::clock;
use crate::gateway::attempt::Delivery;
use crate::gateway::refusal::{GatewayError, X_SHOULD_RETRY};
use crate::gateway::relay::{BodyKind, Held, Passing, RelayBody};
use crate::gateway::{Answer, Gateway};
use crate::http1::headers::{self, About};
use crate::policy::limit::Decision;
use crate::protocol::Endpoint;
use crate::protocol::redact::{Redactor, holds_key};
use crate::telemetry::{Arrival, End, RequestRecord};

const X_ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");
const X_ZAP_ATTEMPTS: HeaderName = HeaderName::from_static("x-zap-attempts");
const X_ZAP_BACKEND: HeaderName = HeaderName::from_static("x-zap-backend");
const LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit-requests");
const REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining-requests");
const RESET: HeaderName = HeaderName::from_static("x-ratelimit-reset-requests");

/// Lines that a worker logs in a second of heads that it refused: a client that sends noise must not fill the log.
const MAX_REFUSED_LINES: u64 = 10;

/// What an answer must know of its request.
pub(super) struct Reply<'a> {
    /// The client's side.
    pub(super) exchange: &'a Exchange,
    /// The client's version of HTTP.
    pub(super) version: Version,
    /// What the rate limiter said.
    pub(super) decision: Option<Decision>,
}

impl Gateway {
    /// An upstream's answer on its way out.
    pub(super) fn deliver(
        self: &Rc<Self>,
        delivery: Delivery,
        mut record: Box<RequestRecord>,
        reply: &Reply<'_>,
    ) -> Answer {
        let Delivery { mut head, about, lease, entered, slot, first, patience } = delivery;
        let upstream = entered.upstream().clone();
        let About { id, is_events: events, is_encoded, has_length } = about;
        let readable = events && !is_encoded;
        let kind = BodyKind {
            is_stream: events,
            events: readable && !has_length,
            stream: readable.then(|| record.endpoint.api().map(|api| api.stream)).flatten(),
            version: reply.version,
        };
        let key = upstream.conf.api_key.as_ref().map(|key| key.expose());
        record.upstream_request_id =
            id.filter(|id| key.is_none_or(|key| !holds_key(key.as_bytes(), id.as_bytes())));
        let secret = key.filter(|_| head.status.as_u16() >= 400);
        let redactor = secret.and_then(Redactor::new);
        if let Some(redactor) = &redactor {
            redact(&mut head.headers, redactor);
        }
        record.backend = Some(upstream);
        let spent = head.status.is_server_error() && !self.shared().budget.has_room(clock::now());
        if spent {
            head.headers.insert(X_SHOULD_RETRY, HeaderValue::from_static("false"));
        }
        self.dress(&mut head.headers, &record, reply);
        if events {
            // nginx in front, with its defaults, would keep the tokens back until the stream ends.
            head.headers.entry(X_ACCEL_BUFFERING).or_insert(HeaderValue::from_static("no"));
            head.headers.entry(CACHE_CONTROL).or_insert(HeaderValue::from_static("no-cache"));
        }
        record.answered(head.status.as_u16());
        reply.exchange.begin_answer(patience);
        let held = Held { lease, entered, _slot: slot, record };
        let passing = Passing { first, redactor: redactor.map(Box::new), kind };
        let relay = RelayBody::new(held, self.clone(), reply.exchange.clone(), passing);
        let mut response = Response::new(Body::stream(relay).on(reply.exchange));
        *response.status_mut() = head.status;
        *response.headers_mut() = head.headers;
        response
    }

    /// Zap's own answer on its way out.
    pub(super) fn finish(
        &self,
        mut response: Answer,
        mut record: Box<RequestRecord>,
        reply: &Reply<'_>,
    ) -> Answer {
        self.dress(response.headers_mut(), &record, reply);
        record.answered(response.status().as_u16());
        record.bytes = http_body::Body::size_hint(response.body()).lower();
        if record.end == End::ClientGone {
            record.end = End::Complete;
        }
        reply.exchange.begin_answer(clock::nanos(self.snapshot().config.timeouts.stream_idle));
        response.map(|body| body.on(reply.exchange))
    }

    /// The headers that every answer has.
    fn dress(&self, headers: &mut HeaderMap, record: &RequestRecord, reply: &Reply<'_>) {
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
        if let Some(d) = reply.decision {
            headers.insert(LIMIT, self.limit_value(d.limit));
            headers.insert(REMAINING, headers::number(d.remaining));
            headers.insert(RESET, headers::reset(d.reset));
        }
        if reply.exchange.must_close() || self.shared().is_draining() {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
    }

    /// The limit as a header's value: that of the last answer, mostly.
    fn limit_value(&self, limit: u32) -> HeaderValue {
        let mut last = self.limit.borrow_mut();
        if last.0 != limit {
            *last = (limit, headers::number(limit));
        }
        last.1.clone()
    }

    /// A refusal on its way out.
    pub(super) fn refused(
        &self,
        error: &GatewayError,
        mut record: Box<RequestRecord>,
        reply: &Reply<'_>,
    ) -> Answer {
        let response = self.refuse(error, &mut record);
        self.finish(response, record, reply)
    }

    fn refuse(&self, error: &GatewayError, record: &mut RequestRecord) -> Answer {
        let code = error.code();
        self.recorder.lane().rejected(code);
        record.refused = Some(code);
        if matches!(
            error,
            GatewayError::QueueTimeout | GatewayError::RequestTimeout | GatewayError::UpstreamTimeout
        ) {
            record.end = End::Timeout;
        } else if error.status().as_u16() == 502 {
            record.end = End::UpstreamError;
        }
        let spent = error.status().is_server_error() && !self.shared().budget.has_room(clock::now());
        error.response(spent)
    }

    /// The answer to a request that a bug has ended: the record is written already.
    pub(super) fn internal_error(&self) -> Answer {
        let mut response = GatewayError::Internal.response(!self.shared().budget.has_room(clock::now()));
        let broken = self.recorder.broken.take();
        let (id, tries) =
            broken.unwrap_or_else(|| (headers::new_request_id(self.rng.borrow_mut().u128(..)), 0));
        response.headers_mut().insert(headers::X_REQUEST_ID, id);
        response.headers_mut().insert(X_ZAP_ATTEMPTS, headers::number(tries));
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        response
    }

    /// A head that broke the rules: hyper has read a stand-in for it.
    pub(super) fn refuse_head(&self, why: &'static str, exchange: &Exchange) -> Answer {
        let id = headers::new_request_id(self.rng.borrow_mut().u128(..));
        let arrival = Arrival {
            method: None,
            path: "",
            endpoint: Endpoint::Other,
            request_id: id,
            peer: exchange.peer(),
        };
        let mut record = RequestRecord::new(self.recorder.clone(), arrival);
        record.is_noise = !self.refused_heads.borrow_mut().take(record.started, MAX_REFUSED_LINES);
        let reply = Reply { exchange, version: Version::HTTP_11, decision: None };
        self.refused(&GatewayError::BadRequest(why), record, &reply)
    }
}

/// Hides the backend's key in the headers of its answer, apart from those that frame or describe the body: without them
/// the body cannot be read.
fn redact(headers: &mut HeaderMap, redactor: &Redactor) {
    const OF_THE_BODY: [HeaderName; 4] = [CONTENT_ENCODING, CONTENT_LANGUAGE, CONTENT_RANGE, CONTENT_TYPE];
    for (name, value) in headers.iter_mut() {
        if !OF_THE_BODY.contains(name) && redactor.is_in(value.as_bytes()) {
            *value = HeaderValue::from_static("***");
        }
    }
    // `***` may be shorter than the key: the body's length is not known any more.
    headers.remove(CONTENT_LENGTH);
}
