//! The record of one request: what the metrics and the log line need. Dropping the record reports it.

use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use http::{HeaderValue, Method};
use smallvec::SmallVec;

use crate::clock;
use crate::code::Code;
use crate::config::ANONYMOUS;
use crate::http1::trace_context::TraceId;
use crate::policy::limit::WindowStamp;
use crate::policy::reservation::ClientReservation;
use crate::protocol::Endpoint;
use crate::telemetry::clients::{Client, ClientLane};
use crate::telemetry::failures::{Outcome, Seen};
use crate::telemetry::ledger::table::{Amounts, Labels};
use crate::telemetry::meter::{Meter, Used};
use crate::telemetry::metrics::Side;
use crate::telemetry::otlp::trace::Trace;
use crate::telemetry::passed_over::PassedOver;
use crate::telemetry::phase::Phase;
use crate::telemetry::tries::{LastTry, TryFault};
use crate::telemetry::{Recorder, Telemetry};
use crate::time::Nanos;
use crate::upstream::Upstream;
use crate::upstream::fault::Fault;
use crate::upstream::token_counters::TokenCount;

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The client disconnected. This is the default: a record reports it if it is dropped before another end is set.
    ClientGone,
    /// The whole response was sent.
    Complete,
    /// Zap cut the response because it shuts down.
    Shutdown,
    /// The deadline passed.
    Timeout,
    /// The upstream failed within the response.
    UpstreamError,
    /// The upstream ended the stream with an error event of its own.
    UpstreamErrorEvent,
}

impl End {
    /// The name in the log and in traces.
    pub(super) fn name(self) -> &'static str {
        match self {
            End::ClientGone => "client_gone",
            End::Complete => "complete",
            End::Shutdown => "shutdown",
            End::Timeout => "timeout",
            End::UpstreamError => "upstream_error",
            End::UpstreamErrorEvent => "upstream_error_event",
        }
    }
}

/// The client that sent a request.
#[derive(Clone, Debug)]
pub(crate) enum Caller {
    /// A client without a credential.
    Anonymous,
    /// A client with a configured key.
    Known(Arc<Client>),
    /// A client with a credential that is not checked, since no client keys are configured: its keyed hash.
    Unknown(u64),
}

/// A request as it arrives.
#[derive(Debug)]
pub(crate) struct Arrival<'a> {
    /// The method; `None` if the head is invalid.
    pub method: Option<&'a Method>,
    /// The path as received.
    pub path: &'a str,
    /// The endpoint that the path belongs to.
    pub endpoint: Endpoint,
    /// The id sent in the response's `x-request-id`.
    pub request_id: HeaderValue,
    /// The peer address of the client connection.
    pub peer: IpAddr,
}

/// The record of one request: filled while the request is served, reported once, when it is dropped.
#[derive(Debug)]
pub(crate) struct RequestRecord {
    recorder: Rc<Recorder>,
    /// When the head of the request was read.
    pub started: Nanos,
    /// Whether the request gets a log line, as configured when it arrived.
    pub is_logged: bool,
    /// The method; `None` if the head is invalid.
    pub method: Option<Method>,
    /// The peer address of the client connection.
    pub peer: IpAddr,
    /// The endpoint that the path belongs to.
    pub endpoint: Endpoint,
    /// The path as received; empty if requests are not logged.
    pub path: String,
    /// The id sent in the response's `x-request-id`.
    pub request_id: HeaderValue,
    /// The provider's id of the request that it responded to.
    pub upstream_request_id: Option<HeaderValue>,
    /// The trace of the request; `None`: there are no traces.
    pub trace: Option<Box<Trace>>,
    /// The trace that exemplars name: one that is recorded, here or by the client.
    pub exemplar: Option<TraceId>,
    /// The client that sent the request.
    pub caller: Caller,
    /// The model that the request names, if any.
    pub model: Option<Arc<str>>,
    /// Whether the body asks for a stream.
    pub stream: bool,
    /// Status of the response; 0 until there is one.
    pub status: u16,
    /// Why Zap refused the request; `None` if Zap did not.
    pub refused: Option<Code>,
    /// The backend that responded; `None`: Zap itself.
    pub backend: Option<Arc<Upstream>>,
    /// Number of upstream tries.
    pub tries: u32,
    /// The failed tries.
    pub failed: Vec<TryFault>,
    /// The last try; kept only if requests are logged.
    pub last_try: Option<LastTry>,
    /// Candidates that were passed over; kept only if requests are logged.
    pub passed: PassedOver,
    /// Time in the queue, if the request was queued.
    pub queued: Option<Nanos>,
    /// Time that is not Zap's own: waiting for the client's body, the queue, upstreams and backoff.
    pub waited: Nanos,
    /// Time from arrival to the head of the response.
    pub first_byte: Option<Nanos>,
    /// Body bytes sent to the client.
    pub bytes: u64,
    /// The meter of the answer; `None` if its tokens are not counted, or were counted.
    pub meter: Option<Meter>,
    /// What the answer used.
    pub used: Option<Used>,
    /// The stamps of the request in the windows of requests.
    pub window_stamps: SmallVec<[WindowStamp; 2]>,
    /// What the request holds of its client's limits.
    pub reserved: Option<Box<ClientReservation>>,
    /// The phase that the request is in.
    pub phase: Phase,
    /// How the request ended, as far as known.
    pub end: End,
    /// Whether this is one of too many invalid heads for the log: it gets no line and counts as a dropped one.
    pub is_suppressed: bool,
}

impl RequestRecord {
    /// Creates the record of a request that has just arrived.
    pub(crate) fn new(recorder: Rc<Recorder>, arrival: Arrival<'_>) -> Box<Self> {
        let Arrival { method, path, endpoint, request_id, peer } = arrival;
        let is_logged = recorder.telemetry.log_requests.load(Ordering::Relaxed);
        let path = if is_logged { path.to_owned() } else { String::new() };
        Box::new(RequestRecord {
            recorder,
            started: clock::now(),
            is_logged,
            // A standard method is a number, so that its clone does not allocate.
            method: method.cloned(),
            peer,
            endpoint,
            path,
            request_id,
            upstream_request_id: None,
            trace: None,
            exemplar: None,
            caller: Caller::Anonymous,
            model: None,
            stream: false,
            status: 0,
            refused: None,
            backend: None,
            tries: 0,
            failed: Vec::new(),
            last_try: None,
            passed: PassedOver::default(),
            queued: None,
            waited: 0,
            first_byte: None,
            bytes: 0,
            meter: None,
            used: None,
            window_stamps: SmallVec::new(),
            reserved: None,
            phase: Phase::Body,
            end: End::ClientGone,
            is_suppressed: false,
        })
    }

    /// The model that the request names; empty if it names none.
    pub(crate) fn model_name(&self) -> &str {
        self.model.as_deref().unwrap_or_default()
    }

    /// Puts the request into a trace.
    pub(crate) fn set_trace(&mut self, trace: Box<Trace>) {
        self.exemplar = trace.is_sampled().then_some(trace.trace_id);
        self.trace = Some(trace);
    }

    /// The trace of the request, if it is recorded.
    pub(crate) fn sampled_trace(&mut self) -> Option<&mut Trace> {
        self.trace.as_deref_mut().filter(|trace| trace.is_sampled())
    }

    /// Whether the request is recorded as a trace.
    pub(crate) fn is_traced(&self) -> bool {
        self.trace.as_ref().is_some_and(|trace| trace.is_sampled())
    }

    /// What an exemplar needs: the trace, and the time in milliseconds since the Unix epoch.
    pub(crate) fn exemplar(&self) -> Option<(TraceId, u64)> {
        self.exemplar.map(|id| (id, clock::unix_millis()))
    }

    /// The worker's telemetry.
    pub(crate) fn recorder(&self) -> &Rc<Recorder> {
        &self.recorder
    }

    /// Records that a panic ends the request: the response is a 500, or is cut if it has begun.
    fn record_panic(&mut self) {
        let lane = self.recorder.lane();
        lane.rejected(Code::InternalError);
        self.end = if self.status == 0 { End::Complete } else { End::UpstreamError };
        if self.status == 0 {
            self.refused = Some(Code::InternalError);
            self.status = 500;
            lane.count_response(self.endpoint, self.status);
            *self.recorder.panicked.borrow_mut() = Some((self.request_id.clone(), self.tries));
        }
    }

    /// Counts what the answer used, and ends the reservations. Called before the last byte goes to the client, so that
    /// its next request sees it.
    pub(crate) fn settle(&mut self) {
        // Without a count, dropping the reservations refunds them.
        let reserved = self.reserved.take();
        let (Some(meter), Some(backend)) = (self.meter.take(), &self.backend) else { return };
        let worker = self.recorder.worker;
        let now = clock::now();
        let (times, exemplar) = ((self.started, now), self.exemplar());
        let settled = meter.settle(backend, &backend.lanes[worker], times, exemplar);
        let Some((used, reservation)) = settled else { return };
        let (lane, client) = self.client_lane();
        lane.spend(&TokenCount::new(&used.usage, used.cost), now);
        let labels = Labels { client, backend: backend.configured_name(), model: &used.label };
        let amounts = Amounts::of_request(used.usage, used.is_estimate, used.cost);
        // Where the names stand tells them apart while they are in use, and costs less than a hash of them.
        let key = backend.identity
            ^ (used.label.as_ptr().addr() as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15)
            ^ (client.as_ptr().addr() as u64).rotate_left(32);
        let times = (now, clock::today());
        self.recorder.telemetry.ledger.add(worker, times.1, (key, labels), amounts);
        // The ledger comes first, as `SpendLimit::sync` expects.
        let (usage, cost) = (&used.usage, used.cost);
        let of_backend = reservation.map_or(0, |reservation| reservation.settle(usage, cost, times));
        let of_client = reserved.map_or(0, |reserved| reserved.settle(usage, cost, times));
        lane.overrun.add(of_backend.max(of_client));
        self.used = Some(used);
    }

    /// The worker's counts for the client, and the client's name.
    fn client_lane(&self) -> (&ClientLane, &str) {
        match &self.caller {
            Caller::Known(client) => (&client.lanes[self.recorder.worker], &client.conf.name),
            Caller::Anonymous | Caller::Unknown(_) => (&self.recorder.lane().anonymous, ANONYMOUS),
        }
    }

    /// Records that a try begins at `now`. `model` returns the model that the backend is sent for the one that the
    /// request names.
    pub(crate) fn begin_try(
        &mut self,
        backend: &Arc<Upstream>,
        model: impl FnOnce(Option<&Arc<str>>) -> Option<Arc<str>>,
        now: Nanos,
    ) {
        self.tries += 1;
        self.phase = Phase::Waiting;
        if self.is_logged {
            let model = model(self.model.as_ref());
            self.last_try = Some(LastTry { backend: backend.clone(), model, began: now, took: None });
        }
    }

    /// Records that the last try has failed.
    pub(crate) fn fail_try(&mut self, backend: &Arc<Upstream>, fault: Fault) {
        let took = self.last_try.as_ref().map_or(0, |last| clock::now().saturating_sub(last.began));
        self.failed.push(TryFault { backend: backend.clone(), fault, took });
    }

    /// Records that the response of the try with this number is delivered, although it has failed.
    pub(crate) fn deliver_failed(&mut self, number: u32, last_try: Option<LastTry>) {
        self.last_try = last_try;
        // The log line shows the status of the last response instead of the code of the failure.
        let failed = if number == self.tries { self.failed.pop() } else { None };
        if let (Some(failed), Some(last)) = (failed, &mut self.last_try) {
            last.took = Some(failed.took);
        }
    }

    /// Adds a wait in a queue.
    pub(crate) fn add_queued(&mut self, waited: Nanos) {
        self.queued = Some(self.queued.unwrap_or(0) + waited);
        self.waited += waited;
    }

    /// Records that the head of the response is ready.
    pub(crate) fn responded(&mut self, status: u16) {
        let first_byte = clock::now() - self.started;
        self.status = status;
        self.first_byte = Some(first_byte);
        self.phase = Phase::Streaming;
        let lane = self.recorder.lane();
        match &self.backend {
            Some(b) => {
                b.lanes[self.recorder.worker].count_response(self.endpoint, status);
                lane.overhead.record(first_byte.saturating_sub(self.waited));
            }
            None => lane.count_response(self.endpoint, status),
        }
    }

    /// Whether `/status` lists the request among the failures: a try has failed, or the client was refused for no fault
    /// of the request.
    fn has_failed(&self) -> bool {
        let is_refused = || self.status >= 500 || self.status == 429;
        !self.failed.is_empty() || is_refused() && self.endpoint.api().is_some()
    }

    /// Adds the request to the failures that `/status` lists.
    fn note_failure(&self) {
        let outcome = match (self.end, self.refused) {
            (_, Some(code)) => Outcome::Refused(self.status, code),
            // It closed while it got the error.
            (End::ClientGone, None) if self.status >= 500 || self.status == 429 => {
                Outcome::Status(self.status)
            }
            (End::ClientGone, None) => Outcome::ClientLeft,
            (End::Complete, None) if self.status < 400 => Outcome::Served,
            (End::Complete, None) => Outcome::Status(self.status),
            _ => Outcome::CutShort,
        };
        let seen = Seen {
            client: self.client_lane().1,
            model: self.model_name(),
            outcome,
            backend: self.backend.as_ref().map_or("", |backend| backend.name()),
        };
        // The response of the last try is not among the failed tries, if the client got it.
        let delivered = format!("HTTP {}", self.status);
        let last = (matches!(outcome, Outcome::Status(_)) && self.tries as usize > self.failed.len())
            .then_some((seen.backend, &*delivered));
        let tries = self.failed.iter().map(|t| (t.backend.name(), &*t.fault.cause)).chain(last);
        let tries: SmallVec<[_; 4]> = tries.collect();
        self.recorder.telemetry.failures.note(&seen, &tries, SystemTime::now());
    }
}

impl Drop for RequestRecord {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.record_panic();
        }
        self.settle();
        let total = clock::now() - self.started;
        let lane = self.recorder.lane();
        if self.status == 0 {
            // The client is gone before a response. The request counts with status 499, as in nginx.
            self.status = 499;
            lane.count_response(self.endpoint, self.status);
        }
        if self.end == End::ClientGone {
            lane.disconnected(self.phase);
            if self.stream && self.phase == Phase::Streaming {
                lane.interrupted(Side::Client);
            }
        }
        if let Some(queued) = self.queued {
            lane.queue_wait.record(queued);
        }
        // Without a key, what an operator or a monitor asks is no request of a client.
        if matches!(self.caller, Caller::Known(_)) || self.endpoint.api().is_some() {
            self.client_lane().0.requests.add(1);
        }
        if self.has_failed() {
            self.note_failure();
        }
        lane.record_duration(self.endpoint, total, self.exemplar());
        if let Some(trace) = self.trace.take() {
            self.finish_trace(*trace, self.started + total);
        }
        let Telemetry { log, log_probes, .. } = &*self.recorder.telemetry;
        // A refusal is logged in any case: it may be an attack, or a monitor without its key.
        let is_silent =
            || self.endpoint.is_probe() && self.refused.is_none() && !log_probes.load(Ordering::Relaxed);
        match self.is_logged {
            true if self.is_suppressed => log.count_dropped(1),
            true if !is_silent() => log.line(self.line(log.style(), total)),
            _ => {}
        }
    }
}
