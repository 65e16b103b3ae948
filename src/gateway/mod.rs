//! Handles requests: [`Gateway::handle`] runs the phases of one request in order.

pub(crate) mod endpoints;

pub(crate) mod browser;

mod access;

pub(crate) mod caller;

pub(crate) mod reserve;

pub(crate) mod intake;

pub(crate) mod admit;

pub(crate) mod backend_queue;

pub(crate) mod attempt;

mod blame;

pub(crate) mod one_try;

pub(crate) mod metering;

pub(crate) mod opening;

pub(crate) mod relay;

pub(crate) mod ask;

pub(crate) mod buffered;
mod chunk_buffer;
mod held;
pub(crate) mod history;
pub(crate) mod learned_ids;
mod relay_input;
mod relay_usage;
mod response;
mod silence;
mod spans;
mod wire_request;
mod wording;

pub mod failpoint;

mod error;

mod error_row;

mod limit_error;

pub(crate) mod refusal;

pub(crate) mod state;

pub(crate) mod pages;

mod status;

mod status_page;

pub(crate) mod served_models;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use arc_swap::Guard;
use bytes::Bytes;
use http::header::HeaderValue;
use http::request::Parts;
use http::{Method, Response, Uri};
use smallvec::SmallVec;

use crate::client::body::Body;
use crate::client::exchange::Exchange;
use crate::client::load::{Upload, WorkerState};
use crate::client::peer::Listener;
use crate::client::serve::Service;
use crate::clock;
use crate::config::Server;
use crate::gateway::access::Visitor;
use crate::gateway::attempt::Attempts;
use crate::gateway::buffered::{Buffered, MemoryHold};
use crate::gateway::endpoints::ModelLists;
use crate::gateway::intake::BodyReader;
use crate::gateway::limit_error::LimitError;
use crate::gateway::refusal::GatewayError;
use crate::gateway::relay::RelayBody;
use crate::gateway::reserve::ClientLimits;
use crate::gateway::response::ResponseContext;
use crate::gateway::state::{Generation, Shared};
use crate::http1::headers;
use crate::json::members::Model;
use crate::policy::allowance::Allowance;
use crate::policy::dispatch::Dispatch;
use crate::protocol::Endpoint;
use crate::protocol::endpoint::{Api, BodyFormat, Page, ServedBy};
use crate::protocol::stored::{NotStored, Stored};
use crate::telemetry::Recorder;
use crate::telemetry::otlp::trace::Trace;
use crate::telemetry::record::{Arrival, RequestRecord};
use crate::upstream::pool::Pool;

/// Searches for similar model names that a worker may run in a second. Any client can cause one by naming an unknown
/// model.
const MAX_SEARCHES: u64 = 50;

/// Reports of usage that a worker may make in a second: each reads a file.
const MAX_REPORTS: u64 = 20;

/// The path of a model, up to its id.
const MODELS: &str = "/models/";

/// A response to a client.
pub(crate) type ClientResponse = Response<Body<RelayBody>>;

/// The gateway of one worker.
pub(crate) struct Gateway {
    shared: Arc<Shared>,
    recorder: Rc<Recorder>,
    pool: Pool,
    load: Arc<WorkerState>,
    server: Server,
    rng: RefCell<fastrand::Rng>,
    /// The request limit sent last in a response, as a number and as a header value.
    last_limit: RefCell<(u32, HeaderValue)>,
    /// Log lines written for invalid request heads in this second.
    refused_heads: RefCell<Allowance>,
    /// Searches for similar model names in this second.
    searches: RefCell<Allowance>,
    /// Reports of usage in this second.
    reports: RefCell<Allowance>,
    lists: RefCell<ModelLists>,
    /// The memory of request bodies.
    buffered: Buffered,
}

/// A request for a backend.
struct Forward<'a, B> {
    head: &'a Parts,
    body: B,
    api: &'a Api,
    generation: Arc<Generation>,
}

impl Gateway {
    /// Creates the gateway of worker number `worker`.
    pub(crate) fn new(worker: usize, shared: Arc<Shared>, load: Arc<WorkerState>) -> Rc<Self> {
        let server = shared.current.load().config.server.clone();
        let recorder = Recorder::new(worker, shared.telemetry.clone());
        Rc::new(Gateway {
            shared,
            recorder,
            pool: Pool::new(worker, load.upstreams()),
            load,
            server,
            rng: RefCell::default(),
            last_limit: RefCell::new((0, headers::number(0u32))),
            refused_heads: RefCell::default(),
            searches: RefCell::default(),
            reports: RefCell::default(),
            lists: RefCell::default(),
            buffered: Buffered::default(),
        })
    }

    /// Handles one request. The future and the response body own all its resources.
    async fn respond<B>(self: &Rc<Self>, head: &Parts, body: B, exchange: &Exchange) -> ClientResponse
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
        let context = ResponseContext::new(exchange, head.version, &head.headers);
        let generation = self.shared().current.load_full();
        if let Some(otlp) = &generation.config.otlp
            && endpoint.api().is_some()
        {
            record.set_trace(Trace::begin(otlp, &head.headers, path, || self.random()));
        }
        // The admin listener serves no page of another origin, whatever the request shows.
        let is_closed = exchange.listener() != Listener::Admin && !generation.clients.is_open();
        let must_check_origin = exchange.has_page_headers() && !is_closed;
        if let Err(refusal) = browser::check(&self.server, &head.headers, endpoint, must_check_origin) {
            return self.refuse(&GatewayError::Site(refusal), record, &context);
        }
        if let Some(response) = browser::preflight(&self.server.cors_origins, head, endpoint) {
            return self.finish(response, record, &context);
        }
        let (shared, headers) = (self.shared(), &head.headers);
        let visitor = Visitor { shared, generation: &generation, headers, exchange };
        match visitor.check(endpoint, path, endpoint == Endpoint::Root && status_page::is_wanted(headers)) {
            Ok(caller) => record.caller = caller,
            Err(error) => return self.refuse(&error, record, &context),
        }
        if exchange.is_reserve() && !endpoint.is_health_check() {
            // In a box, since it is rare.
            let is_regular = Box::pin(exchange.leave_reserve()).await;
            record.waited += clock::now() - record.started;
            if !is_regular {
                return self.refuse(&GatewayError::TooManyConnections, record, &context);
            }
        }
        match &endpoint.row().served {
            ServedBy::Backends(api) if head.method == Method::POST => {
                self.forward(Forward { head, body, api, generation }, record, context).await
            }
            ServedBy::Backends(_) | ServedBy::Stored(_)
                if head.method == Method::GET && headers::wants_websocket(&head.headers) =>
            {
                self.refuse(&GatewayError::UpgradeRequired, record, &context)
            }
            ServedBy::Stored(api) => match Stored::of(&head.method, path) {
                Ok(_) => self.forward(Forward { head, body, api, generation }, record, context).await,
                Err(NotStored::Method(allow)) => {
                    self.refuse(&GatewayError::MethodNotAllowed(allow), record, &context)
                }
                Err(NotStored::Path) => self.refuse(&GatewayError::UnknownUrl, record, &context),
            },
            ServedBy::Zap(page) if matches!(head.method, Method::GET | Method::HEAD) => {
                match self.page(*page, head, &record, (&generation, exchange.listener())).await {
                    Ok(response) => self.finish(response, record, &context),
                    Err(error) => self.refuse(&error, record, &context),
                }
            }
            ServedBy::Backends(_) | ServedBy::Zap(_) => {
                self.refuse(&GatewayError::MethodNotAllowed(endpoint.row().allow()), record, &context)
            }
            ServedBy::Nobody => self.refuse(&GatewayError::unknown_path(path), record, &context),
        }
    }

    async fn page(
        &self,
        page: Page,
        head: &Parts,
        record: &RequestRecord,
        (generation, listener): (&Generation, Listener),
    ) -> Result<ClientResponse, GatewayError> {
        let uri = &head.uri;
        let has_page = listener == Listener::Admin || generation.config.server.admin.is_none();
        Ok(match page {
            Page::Health => endpoints::health(),
            Page::Metrics => endpoints::metrics(self.shared(), &head.headers).await?,
            Page::Models => return self.models(uri.path(), record, generation),
            Page::Ready => endpoints::ready(self.shared()),
            Page::Status if status_page::is_wanted(&head.headers) => {
                endpoints::status_page(self.shared(), &head.headers).await?
            }
            Page::Root if has_page && status_page::is_wanted(&head.headers) => {
                endpoints::status_page(self.shared(), &head.headers).await?
            }
            Page::Root => endpoints::root(),
            Page::Status => endpoints::status(self.shared(), &head.headers).await?,
            Page::Usage => {
                let may_report = self.reports.borrow_mut().take(record.started, MAX_REPORTS);
                return endpoints::usage(self.shared(), uri.query(), may_report).await;
            }
        })
    }

    fn models(
        &self,
        path: &str,
        record: &RequestRecord,
        generation: &Generation,
    ) -> Result<ClientResponse, GatewayError> {
        if self.shared().is_draining() {
            return Err(GatewayError::Draining);
        }
        let client = caller::known_client(&record.caller);
        match path.split_once(MODELS).map(|(_, id)| id) {
            Some(id) => {
                let may_search = || self.may_search(record);
                endpoints::model(generation, client.map(|c| &**c), id, may_search)
            }
            None => Ok(self.lists.borrow_mut().models(generation, client, &self.shared().served_models)),
        }
    }

    /// Forwards a request to a backend, phase by phase.
    async fn forward<B>(
        self: &Rc<Self>,
        request: Forward<'_, B>,
        mut record: Box<RequestRecord>,
        mut context: ResponseContext<'_>,
    ) -> ClientResponse
    where
        B: http_body::Body<Data = Bytes> + Unpin,
    {
        let Forward { head, body, api, generation } = request;
        let exchange = context.exchange;
        let result = async {
            if self.shared().is_draining() {
                return Err(GatewayError::Draining);
            }
            let peer = exchange.peer();
            context.decision =
                caller::check_limits(self.shared(), &generation, &head.headers, peer, &mut record);
            if let Some(refused) = context.decision.filter(|d| !d.admitted) {
                return Err(GatewayError::Limited(LimitError::Requests(refused.reset)));
            }
            intake::check_head(&head.headers, self.server.max_body_bytes)?;
            let watch = generation.watch(api);
            let reader = BodyReader { gateway: self, exchange, watch, headers: &head.headers };
            let mut hold = MemoryHold::new(self.clone());
            let (chat, upload) = reader.read(body, api, (&mut record, &mut hold)).await?;
            // The clock of the request starts once its body is whole; an upload has limits of its own.
            let began = if upload.is_some() { clock::now() } else { record.started };
            let deadline = began + clock::nanos(generation.config.queue.timeout);
            record.stream = chat.fields.wants_stream() || asks_for_stream(api, &head.uri);
            if let Model::Named { name, .. } = &chat.fields.model {
                record.model = Some(name.clone());
            }
            let turn = caller::turn(self.shared(), &generation, &head.headers, peer, &record.caller);
            let ask = self.ask(&generation, head, (api, &chat), (&record, turn))?;
            if generation.limits_clients() {
                let snapshot = &*generation;
                let limits = ClientLimits { gateway: self, exchange, snapshot, ask: &ask, deadline };
                // Boxed, so that a request without such a limit does not carry the room for it.
                context.tokens = Box::pin(limits.reserve(&mut record)).await?;
            }
            let slot = admit::admit(self, exchange, &mut record, (deadline, ask.turn)).await?;
            drop(upload);
            let attempts = Attempts {
                gateway: self,
                exchange,
                request: head,
                chat: &chat,
                ask,
                dispatch: Dispatch::new(attempt::rules(&generation.config, deadline)),
                is_settled: false,
                snapshot: generation,
                record: &mut record,
                deadline,
                wait_began: None,
                blamed: SmallVec::new(),
                no_answer: None,
            };
            attempts.run(slot).await
        }
        .await;
        match result {
            Ok(delivery) => self.deliver(delivery, record, &context),
            // The client disconnected while it sent its body: the record counts it as gone, not as refused.
            Err(error @ GatewayError::BodyIncomplete) if exchange.has_ended() => {
                error.response(api.protocol, false)
            }
            Err(error) => {
                // The drain cut this request, whatever phase it was in.
                let error = if self.is_cut() { GatewayError::Draining } else { error };
                if error.is_refundable() {
                    context.decision = caller::refund(self.shared(), &mut record).or(context.decision);
                }
                let current = self.current();
                if current.limits_clients() {
                    record.reserved = None;
                    context.tokens = reserve::token_state(self, &current, &record);
                }
                self.refuse(&error, record, &context)
            }
        }
    }

    /// Whether the worker may search for similar model names now: any client can cause a search.
    fn may_search(&self, record: &RequestRecord) -> bool {
        self.searches.borrow_mut().take(record.started, MAX_SEARCHES)
    }

    /// The state that all workers share.
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// The current fleet and clients.
    pub(crate) fn current(&self) -> Guard<Arc<Generation>> {
        self.shared().current.load()
    }

    /// The `[server]` section, which a reload does not change.
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

    /// Counts a request body as being received, until the returned value is dropped.
    pub(crate) fn begin_upload(&self) -> Upload {
        Upload::new(self.load.clone())
    }

    /// Returns a random number, for jitter.
    pub(crate) fn random(&self) -> u64 {
        self.rng.borrow_mut().u64(..)
    }

    /// Whether the drain has ended, so that the remaining requests and streams are cut now.
    pub(crate) fn is_cut(&self) -> bool {
        self.load.is_cut()
    }
}

impl Service for Gateway {
    type Stream = RelayBody;

    async fn handle<B>(self: &Rc<Self>, head: &Parts, body: B, exchange: &Exchange) -> ClientResponse
    where
        B: http_body::Body<Data = Bytes> + Unpin,
    {
        self.respond(head, body, exchange).await
    }

    fn panicked(&self, head: &Parts) -> ClientResponse {
        self.internal_error(head)
    }

    fn is_stopping(&self) -> bool {
        self.shared().is_draining()
    }

    fn is_closing(&self) -> bool {
        self.load.is_closing()
    }
}

/// Whether the query of a request for a stored response asks for a stream.
fn asks_for_stream(api: &Api, uri: &Uri) -> bool {
    let is_stream = |query: &str| query.split('&').any(|parameter| parameter == "stream=true");
    api.body == BodyFormat::Nothing && uri.query().is_some_and(is_stream)
}
