//! The story of a request, told by [`Gateway::handle`].

pub(crate) mod endpoints;

pub(crate) mod caller;

pub(crate) mod intake;

pub(crate) mod admit;

pub(crate) mod attempt;

pub(crate) mod one_try;

pub(crate) mod relay;

pub mod failpoint;

pub(crate) mod refusal;

pub(crate) mod state;

pub(crate) mod pages;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use arc_swap::Guard;
use bytes::Bytes;
use http::header::{
    CACHE_CONTROL, CONNECTION, CONTENT_ENCODING, CONTENT_LANGUAGE, CONTENT_LENGTH, CONTENT_RANGE,
    CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, UPGRADE,
};
use http::request::Parts;
use http::{Method, Response, Version};

use crate::client::body::Body;
use crate::client::exchange::Exchange;
use crate::client::load::{Upload, WorkerState};
use crate::client::serve::Service;
use crate::clock;
use crate::code::Code;
use crate::config::{Server, Strategy};
use crate::gateway::attempt::{Attempts, Delivery};
use crate::gateway::endpoints::Lists;
use crate::gateway::intake::ChatRequest;
use crate::gateway::refusal::{GatewayError, X_SHOULD_RETRY};
use crate::gateway::relay::{BodyKind, Held, RelayBody};
use crate::gateway::state::Shared;
use crate::http1::headers;
use crate::http1::headers::About;
use crate::json::members::Model;
use crate::policy::allowance::Allowance;
use crate::policy::limit::Decision;
use crate::protocol::Endpoint;
use crate::protocol::redact::{Redactor, holds_key};
use crate::telemetry::{Arrival, End, Recorder, RequestRecord};
use crate::upstream::Upstream;
use crate::upstream::fleet::{Ask, Snapshot};
use crate::upstream::pool::Pool;

/// Lines that a worker logs in a second of heads that it refused: whoever sends noise must not fill the log.
const MAX_REFUSED_LINES: u64 = 10;

/// Searches for near names that a worker makes in a second, for models that nobody serves.
const MAX_SEARCHES: u64 = 50;

/// Where the models are listed.
const MODELS: &str = "/v1/models";

const X_ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");
const X_ZAP_ATTEMPTS: HeaderName = HeaderName::from_static("x-zap-attempts");
const X_ZAP_BACKEND: HeaderName = HeaderName::from_static("x-zap-backend");
const X_ZAP_SESSION: HeaderName = HeaderName::from_static("x-zap-session");
const LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit-requests");
const REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining-requests");
const RESET: HeaderName = HeaderName::from_static("x-ratelimit-reset-requests");

/// An answer to a client.
pub(crate) type Answer = Response<Body<RelayBody>>;

/// One worker's gateway.
pub(crate) struct Gateway {
    shared: Arc<Shared>,
    recorder: Rc<Recorder>,
    pool: Pool,
    load: Arc<WorkerState>,
    server: Server,
    rng: RefCell<fastrand::Rng>,
    /// The limit that was stated last, as text.
    limit: RefCell<(u32, HeaderValue)>,
    /// Lines logged of heads that were refused.
    refused_heads: RefCell<Allowance>,
    /// Searches for near names.
    searches: RefCell<Allowance>,
    lists: RefCell<Lists>,
}

impl Gateway {
    /// The gateway of worker number `worker`.
    pub(crate) fn new(worker: usize, shared: Arc<Shared>, load: Arc<WorkerState>) -> Rc<Self> {
        let server = shared.snapshot.load().config.server.clone();
        let recorder = Recorder::new(worker, shared.telemetry.clone());
        Rc::new(Gateway {
            shared,
            recorder,
            pool: Pool::new(worker, load.upstreams()),
            load,
            server,
            rng: RefCell::default(),
            limit: RefCell::new((0, headers::number(0))),
            refused_heads: RefCell::default(),
            searches: RefCell::default(),
            lists: RefCell::default(),
        })
    }

    /// Answers one request. Everything it does is owned by the future and by the body of the answer.
    async fn answer<B>(self: &Rc<Self>, head: &Parts, body: B, exchange: &Exchange) -> Answer
    where
        B: http_body::Body<Data = Bytes> + Unpin,
    {
        if let Some(why) = exchange.refusal() {
            return self.refuse_head(why, exchange);
        }
        let path = head.uri.path();
        let (endpoint, allow) = route(path);
        let request_id = headers::request_id(&head.headers).cloned();
        let request_id =
            request_id.unwrap_or_else(|| headers::new_request_id(self.rng.borrow_mut().u128(..)));
        let method = Some(&head.method);
        let arrival = Arrival { method, path, endpoint, request_id, peer: exchange.peer() };
        let mut record = RequestRecord::new(self.recorder.clone(), arrival);
        if is_guarded(path) {
            match caller::identify(self, &head.headers) {
                Ok(caller) => record.caller = caller,
                Err(error) => {
                    let response = self.refuse(&error, &mut record);
                    return self.finish(response, record, None, exchange);
                }
            }
        }
        if allow == "POST" && head.method == Method::POST {
            return self.forward(head, body, exchange, record).await;
        }
        let is_read = matches!(head.method, Method::GET | Method::HEAD);
        let result = match endpoint {
            Endpoint::Other => Err(GatewayError::UnknownUrl),
            _ if allow == "POST" && wants_websocket(head) => Err(GatewayError::UpgradeRequired),
            _ if !is_read || allow == "POST" => Err(GatewayError::MethodNotAllowed(allow)),
            Endpoint::Health => Ok(endpoints::health()),
            Endpoint::Metrics => Ok(endpoints::metrics(self.shared())),
            Endpoint::Models => self.models(path, &record),
            Endpoint::Ready => Ok(endpoints::ready(self.shared())),
            // What is left are POST endpoints, which were refused just now.
            _ => Ok(endpoints::status(self.shared())),
        };
        let response = result.unwrap_or_else(|error| self.refuse(&error, &mut record));
        self.finish(response, record, None, exchange)
    }

    fn models(&self, path: &str, record: &RequestRecord) -> Result<Answer, GatewayError> {
        if self.shared().is_draining() {
            return Err(GatewayError::Draining);
        }
        let (snapshot, client) = (self.snapshot(), caller::known(&record.caller));
        match path.strip_prefix(MODELS).and_then(|rest| rest.strip_prefix('/')) {
            Some(id) => {
                let may_search = || self.may_search(record);
                endpoints::model(&snapshot, client.map(|c| &**c), id, may_search)
            }
            None => Ok(self.lists.borrow_mut().models(&snapshot, client)),
        }
    }

    /// A request to a backend, phase by phase.
    async fn forward<B>(
        self: &Rc<Self>,
        head: &Parts,
        body: B,
        exchange: &Exchange,
        mut record: Box<RequestRecord>,
    ) -> Answer
    where
        B: http_body::Body<Data = Bytes> + Unpin,
    {
        let mut decision = None;
        let result = async {
            if self.shared().is_draining() {
                return Err(GatewayError::Draining);
            }
            decision = caller::check_limits(self, &head.headers, exchange.peer(), &record);
            if let Some(refused) = decision.filter(|d| !d.admitted) {
                return Err(GatewayError::RateLimited(refused.reset));
            }
            intake::check_head(&head.headers, self.server.max_body_bytes)?;
            let snapshot = self.shared().snapshot.load_full();
            let deadline = record.started + clock::nanos(snapshot.config.queue.timeout);
            let mut upload = None;
            let watch = snapshot.watch();
            let chat = intake::read(self, body, exchange, &mut record, watch, deadline, &mut upload).await?;
            record.stream = chat.fields.wants_stream();
            if let Model::Named { name, .. } = &chat.fields.model {
                record.model = Some(name.clone());
            }
            let ask = self.ask(&snapshot, &head.headers, &chat, &record)?;
            let slot = admit::admit(self, exchange, &mut record, deadline).await?;
            drop(upload);
            let attempts = Attempts {
                gateway: self,
                exchange,
                headers: &head.headers,
                chat: &chat,
                ask,
                snapshot,
                record: &mut record,
                deadline,
            };
            attempts.run(slot).await
        }
        .await;
        match result {
            Ok(delivery) => self.deliver(delivery, record, decision, exchange, head.version),
            // It left in its body: nobody is there to be told, and it is counted as gone.
            Err(error @ GatewayError::BodyIncomplete) if exchange.has_ended() => error.response(false),
            Err(error) => {
                // Whatever a cut request was waiting for, the way out ended it.
                let error = if self.is_cut() { GatewayError::Draining } else { error };
                let response = self.refuse(&error, &mut record);
                self.finish(response, record, decision, exchange)
            }
        }
    }

    /// Whether a worker may spend time on names near one that nobody serves: anyone can ask for such.
    fn may_search(&self, record: &RequestRecord) -> bool {
        self.searches.borrow_mut().take(record.started, MAX_SEARCHES)
    }

    /// What is asked of the fleet: the route of the model, if the caller may use it.
    fn ask<'c>(
        &self,
        snapshot: &Snapshot,
        headers: &HeaderMap,
        chat: &'c ChatRequest,
        record: &RequestRecord,
    ) -> Result<Ask<'c>, GatewayError> {
        let (model, whole) = match &chat.fields.model {
            Model::Named { name, whole, .. } => (Some(&**name), *whole),
            _ => (None, true),
        };
        let client = caller::known(&record.caller).map(|client| &**client);
        let not_found = || match model {
            Some(name) => endpoints::model_not_found(snapshot, client, name, self.may_search(record)),
            None => GatewayError::MissingModel,
        };
        let may = client.is_none_or(|c| match model {
            Some(name) => c.may_use(name, whole),
            None => c.conf.models.is_none(),
        });
        let route = Some(()).filter(|()| may).and_then(|()| snapshot.table().find(model, whole));
        let route = route.ok_or_else(not_found)?;
        let affinity = if snapshot.config.strategy == Strategy::PrefixHash {
            chat.affinity(headers.get(X_ZAP_SESSION), model, snapshot.config.prefix_bytes)
        } else {
            None
        };
        Ok(Ask { endpoint: record.endpoint, route, model, affinity })
    }

    /// An upstream's answer on its way out.
    fn deliver(
        self: &Rc<Self>,
        delivery: Delivery,
        mut record: Box<RequestRecord>,
        decision: Option<Decision>,
        exchange: &Exchange,
        version: Version,
    ) -> Answer {
        let Delivery { mut head, about, lease, entered, slot, first, patience } = delivery;
        let upstream = entered.upstream().clone();
        let About { id, is_events: events, is_encoded, has_length } = about;
        let readable = events && !is_encoded;
        let shape = BodyKind {
            is_stream: events,
            events: readable && !has_length,
            done_expected: readable && head.status.is_success() && record.endpoint.ends_with_done(),
            version,
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
        self.dress(&mut head.headers, &mut record, decision, exchange);
        if events {
            // nginx in front, with its defaults, would keep the tokens back until the stream ends.
            head.headers.entry(X_ACCEL_BUFFERING).or_insert(HeaderValue::from_static("no"));
            head.headers.entry(CACHE_CONTROL).or_insert(HeaderValue::from_static("no-cache"));
        }
        record.answered(head.status.as_u16());
        exchange.begin_answer(patience);
        let held = Held { lease, entered, _slot: slot, record };
        let relay =
            RelayBody::new(held, self.clone(), exchange.clone(), first, redactor.map(Box::new), shape);
        let mut response = Response::new(Body::stream(relay).on(exchange));
        *response.status_mut() = head.status;
        *response.headers_mut() = head.headers;
        response
    }

    /// Zap's own answer on its way out.
    fn finish(
        &self,
        mut response: Answer,
        mut record: Box<RequestRecord>,
        decision: Option<Decision>,
        exchange: &Exchange,
    ) -> Answer {
        self.dress(response.headers_mut(), &mut record, decision, exchange);
        record.answered(response.status().as_u16());
        record.bytes = http_body::Body::size_hint(response.body()).lower();
        if record.end == End::ClientGone {
            record.end = End::Complete;
        }
        exchange.begin_answer(clock::nanos(self.snapshot().config.timeouts.stream_idle));
        response.map(|body| body.on(exchange))
    }

    /// The headers that every answer has.
    fn dress(
        &self,
        headers: &mut HeaderMap,
        record: &mut RequestRecord,
        decision: Option<Decision>,
        exchange: &Exchange,
    ) {
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
        if let Some(d) = decision {
            headers.insert(LIMIT, self.limit_value(d.limit));
            headers.insert(REMAINING, headers::number(d.remaining));
            headers.insert(RESET, headers::reset(d.reset));
        }
        if exchange.must_close() || self.shared().is_draining() {
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
    fn internal_error(&self) -> Answer {
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
    fn refuse_head(&self, why: &'static str, exchange: &Exchange) -> Answer {
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
        let response = self.refuse(&GatewayError::BadRequest(why), &mut record);
        self.finish(response, record, None, exchange)
    }

    /// Accounts for a failed try or a cut answer. `blame`: it counts against the backend.
    pub(crate) fn account(&self, upstream: &Upstream, code: Code, blame: bool) {
        if code != Code::UpstreamRedirect {
            upstream.lanes[self.recorder.worker].failed(code);
        }
        upstream.note_error(code);
        if !blame {
            return;
        }
        upstream.state.penalty.add(clock::now());
        if let Some(change) = upstream.state.breaker.failure(self.snapshot().thresholds()) {
            self.shared().announce(upstream, change, "a request");
        }
    }

    /// What all workers share.
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// The fleet as it is now.
    pub(crate) fn snapshot(&self) -> Guard<Arc<Snapshot>> {
        self.shared().snapshot.load()
    }

    /// `[server]`, which a reload does not change.
    pub(crate) fn server(&self) -> &Server {
        &self.server
    }

    /// The worker's telemetry.
    pub(crate) fn recorder(&self) -> &Recorder {
        &self.recorder
    }

    /// The worker's idle upstream connections.
    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Says that a body is being waited for, until what comes back is dropped.
    pub(crate) fn begin_upload(&self) -> Upload {
        Upload::new(self.load.clone())
    }

    /// A random number, for jitter.
    pub(crate) fn random(&self) -> u64 {
        self.rng.borrow_mut().u64(..)
    }

    /// Streams are to be cut now.
    pub(crate) fn is_cut(&self) -> bool {
        self.load.is_cut()
    }
}

impl Service for Gateway {
    type Stream = RelayBody;

    async fn handle<B>(self: &Rc<Self>, head: &Parts, body: B, exchange: &Exchange) -> Answer
    where
        B: http_body::Body<Data = Bytes> + Unpin,
    {
        self.answer(head, body, exchange).await
    }

    fn broken(&self) -> Answer {
        self.internal_error()
    }

    fn is_draining(&self) -> bool {
        self.shared().is_draining()
    }

    fn is_closing(&self) -> bool {
        self.load.is_closing()
    }
}

/// What a path is for, and the methods that it serves. Paths are compared as they come: nothing is normalised.
fn route(path: &str) -> (Endpoint, &'static str) {
    match path {
        "/chat" | "/v1/chat/completions" => (Endpoint::Chat, "POST"),
        "/v1/audio/speech" => (Endpoint::Speech, "POST"),
        "/v1/completions" => (Endpoint::Completions, "POST"),
        "/v1/embeddings" => (Endpoint::Embeddings, "POST"),
        "/v1/images/generations" => (Endpoint::Images, "POST"),
        "/v1/moderations" => (Endpoint::Moderations, "POST"),
        "/v1/rerank" => (Endpoint::Rerank, "POST"),
        "/v1/responses" => (Endpoint::Responses, "POST"),
        MODELS => (Endpoint::Models, "GET, HEAD"),
        "/health" => (Endpoint::Health, "GET, HEAD"),
        "/metrics" => (Endpoint::Metrics, "GET, HEAD"),
        "/ready" => (Endpoint::Ready, "GET, HEAD"),
        "/status" => (Endpoint::Status, "GET, HEAD"),
        one if one.starts_with("/v1/models/") => (Endpoint::Models, "GET, HEAD"),
        _ => (Endpoint::Other, ""),
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

/// Whether a request asks for a WebSocket (RFC 6455, section 4.1), as Codex does first.
fn wants_websocket(head: &Parts) -> bool {
    let is_named = |value: &HeaderValue| {
        value
            .as_bytes()
            .split(|b| *b == b',')
            .any(|name| name.trim_ascii().eq_ignore_ascii_case(b"websocket"))
    };
    head.method == Method::GET && head.headers.get_all(UPGRADE).iter().any(is_named)
}

/// Whether a path is for those alone who may call.
fn is_guarded(path: &str) -> bool {
    path == "/chat" || path.starts_with("/v1/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_exact() {
        assert_eq!(route("/chat").0, Endpoint::Chat);
        assert_eq!(route("/v1/chat/completions").0, Endpoint::Chat);
        assert_eq!((route("/v1/models").0, route("/v1/models/a/b").0), (Endpoint::Models, Endpoint::Models));
        for path in ["/v1/modelsx", "/chat/", "/v1//chat", "/%63hat", "/Chat", "/", ""] {
            assert_eq!(route(path).0, Endpoint::Other, "{path}");
        }
    }
}
