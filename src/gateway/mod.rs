//! The story of a request, told by [`Gateway::handle`].

pub(crate) mod endpoints;

pub(crate) mod caller;

pub(crate) mod intake;

pub(crate) mod admit;

pub(crate) mod attempt;

pub(crate) mod one_try;

pub(crate) mod relay;

mod answer;

pub mod failpoint;

pub(crate) mod refusal;

pub(crate) mod state;

pub(crate) mod pages;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use arc_swap::Guard;
use bytes::Bytes;
use http::header::{HeaderMap, HeaderName, HeaderValue, UPGRADE};
use http::request::Parts;
use http::{Method, Response};

use crate::client::body::Body;
use crate::client::exchange::Exchange;
use crate::client::load::{Upload, WorkerState};
use crate::client::serve::Service;
use crate::clock;
use crate::code::Code;
use crate::config::{Server, Strategy};
use crate::gateway::answer::Reply;
use crate::gateway::attempt::Attempts;
use crate::gateway::endpoints::Lists;
use crate::gateway::intake::{ChatRequest, Intake};
use crate::gateway::refusal::GatewayError;
use crate::gateway::relay::RelayBody;
use crate::gateway::state::Shared;
use crate::http1::headers;
use crate::json::members::Model;
use crate::policy::allowance::Allowance;
use crate::protocol::Endpoint;
use crate::protocol::endpoint::{Api, Page, ServedBy, is_guarded};
use crate::telemetry::{Arrival, Recorder, RequestRecord};
use crate::upstream::Upstream;
use crate::upstream::fault::Fault;
use crate::upstream::fleet::{Ask, Snapshot};
use crate::upstream::pool::Pool;

/// Searches for near names that a worker makes in a second, for models that nobody serves.
const MAX_SEARCHES: u64 = 50;

/// Where the models are listed.
const MODELS: &str = "/v1/models";

const X_ZAP_SESSION: HeaderName = HeaderName::from_static("x-zap-session");

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
        let endpoint = Endpoint::of(path);
        let request_id = headers::request_id(&head.headers).cloned();
        let request_id =
            request_id.unwrap_or_else(|| headers::new_request_id(self.rng.borrow_mut().u128(..)));
        let method = Some(&head.method);
        let arrival = Arrival { method, path, endpoint, request_id, peer: exchange.peer() };
        let mut record = RequestRecord::new(self.recorder.clone(), arrival);
        let reply = Reply { exchange, version: head.version, decision: None };
        if is_guarded(path) {
            match caller::identify(self, &head.headers) {
                Ok(caller) => record.caller = caller,
                Err(error) => return self.refused(&error, record, &reply),
            }
        }
        match &endpoint.row().served {
            ServedBy::Backends(api) if head.method == Method::POST => {
                self.forward(head, body, api, record, reply).await
            }
            ServedBy::Backends(_) if wants_websocket(head) => {
                self.refused(&GatewayError::UpgradeRequired, record, &reply)
            }
            ServedBy::Zap(page) if matches!(head.method, Method::GET | Method::HEAD) => {
                match self.page(*page, path, &record) {
                    Ok(response) => self.finish(response, record, &reply),
                    Err(error) => self.refused(&error, record, &reply),
                }
            }
            ServedBy::Backends(_) | ServedBy::Zap(_) => {
                self.refused(&GatewayError::MethodNotAllowed(endpoint.row().allow()), record, &reply)
            }
            ServedBy::Nobody => self.refused(&GatewayError::UnknownUrl, record, &reply),
        }
    }

    fn page(&self, page: Page, path: &str, record: &RequestRecord) -> Result<Answer, GatewayError> {
        Ok(match page {
            Page::Health => endpoints::health(),
            Page::Metrics => endpoints::metrics(self.shared()),
            Page::Models => return self.models(path, record),
            Page::Ready => endpoints::ready(self.shared()),
            Page::Status => endpoints::status(self.shared()),
        })
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
        api: &Api,
        mut record: Box<RequestRecord>,
        mut reply: Reply<'_>,
    ) -> Answer
    where
        B: http_body::Body<Data = Bytes> + Unpin,
    {
        let exchange = reply.exchange;
        let result = async {
            if self.shared().is_draining() {
                return Err(GatewayError::Draining);
            }
            reply.decision = caller::check_limits(self, &head.headers, exchange.peer(), &record);
            if let Some(refused) = reply.decision.filter(|d| !d.admitted) {
                return Err(GatewayError::RateLimited(refused.reset));
            }
            intake::check_head(&head.headers, self.server.max_body_bytes)?;
            let snapshot = self.shared().snapshot.load_full();
            let deadline = record.started + clock::nanos(snapshot.config.queue.timeout);
            let intake = Intake { gateway: self, exchange, watch: snapshot.watch(), deadline };
            let (chat, upload) = intake.read(body, api, &mut record).await?;
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
                begun: None,
            };
            attempts.run(slot).await
        }
        .await;
        match result {
            Ok(delivery) => self.deliver(delivery, record, &reply),
            // The client left while it sent its body: nobody is there to be told, and it is counted as gone.
            Err(error @ GatewayError::BodyIncomplete) if exchange.has_ended() => error.response(false),
            // Whatever a cut request was waiting for, the drain ended it.
            Err(_) if self.is_cut() => self.refused(&GatewayError::Draining, record, &reply),
            Err(error) => self.refused(&error, record, &reply),
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

    /// Accounts for a failed try or a cut answer. `blame`: it counts against the backend.
    pub(crate) fn account(&self, upstream: &Upstream, fault: &Fault, blame: bool) {
        if fault.kind != Code::UpstreamRedirect {
            upstream.lanes[self.recorder.worker].failed(fault.kind);
        }
        upstream.note_error(fault);
        if !blame {
            return;
        }
        upstream.state.penalty.add(clock::now());
        if let Some(change) = upstream.state.breaker.failure(self.snapshot().thresholds()) {
            self.shared().announce(upstream, change, &format!("request: {fault}"));
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
