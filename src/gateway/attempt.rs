//! Drives the tries of a request: carries out the decisions of [`Dispatch`] until there is a response to relay or an
//! error. [`crate::gateway::one_try`] runs a single try.

use std::borrow::Cow;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use http::request::Parts as RequestParts;
use http::response::Parts;
use http::{HeaderMap, StatusCode};
use smallvec::SmallVec;
use tokio::time::sleep;

use crate::client::exchange::Exchange;
use crate::clock;
use crate::code::Code;
use crate::config::Config;
use crate::gateway::Gateway;
use crate::gateway::backend_queue::{BackendQueues, Wait, latest_opening, refusal};
use crate::gateway::buffered::MemoryHold;
use crate::gateway::intake::ChatRequest;
use crate::gateway::limit_error::LimitError;
use crate::gateway::refusal::GatewayError;
use crate::gateway::reserve;
use crate::gateway::silence::StreamClocks;
use crate::gateway::state::Generation;
use crate::http1::headers::ResponseFacts;
use crate::policy::breaker::Status;
use crate::policy::choose::{Closed, Fleet};
use crate::policy::dispatch::{Dispatch, Do, Refusal, Rules};
use crate::policy::queue::Permit;
use crate::policy::retry::{MAX_RETRY_AFTER, retry_after_secs};
use crate::policy::route::TargetId;
use crate::policy::spend::Refused;
use crate::protocol::event_stream::EventStream;
use crate::telemetry::phase::Phase;
use crate::telemetry::record::RequestRecord;
use crate::telemetry::tries::{LastTry, TryFault};
use crate::time::{Nanos, SECOND};
use crate::upstream::counters::NoAnswer;
use crate::upstream::fault::Fault;
use crate::upstream::fleet::{Ask, Snapshot, View};
use crate::upstream::in_flight::InFlight;
use crate::upstream::link::Link;
use crate::upstream::pool::Lease;

/// Frames read from a discarded response, so that its connection can be reused.
const MAX_DISCARDED_FRAMES: usize = 16;

/// A response of a backend that can go to the client.
pub(crate) struct OpenedResponse {
    /// The status and the headers, without hop-by-hop headers and others that Zap does not forward.
    pub head: Parts,
    /// The facts that Zap needs from the headers.
    pub about: ResponseFacts,
    /// The connection, positioned after the head, or after `first`.
    pub lease: Lease,
    /// The request at the backend; without its permit, if the response was kept.
    pub in_flight: InFlight,
    /// The beginning of the body, if it has been read already.
    pub first: Option<Bytes>,
    /// The events of a readable stream, which have seen `first`.
    pub events: Option<Box<EventStream>>,
    /// Whether `first` is the whole body, whatever the connection still has.
    pub is_whole: bool,
    /// When the head came.
    pub opened: Nanos,
}

impl OpenedResponse {
    /// Replaces what has been read of the body. `error`: the body is the whole of an error that was found inside a
    /// success, so the response becomes one with this status.
    pub(super) fn replace_body(&mut self, body: Bytes, error: Option<u16>) {
        self.first = Some(body);
        let Some(status) = error else { return };
        self.is_whole = true;
        self.head.status = StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_GATEWAY);
        self.head.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        self.head.headers.remove(CONTENT_LENGTH);
        self.about.is_events = false;
    }
}

/// A response that goes to the client.
pub(crate) struct Delivery {
    /// The response.
    pub response: OpenedResponse,
    /// The slot of the request; `None` if the request has given it up to wait.
    pub slot: Option<Permit>,
    /// The limits of time of the response.
    pub clocks: StreamClocks,
}

/// A response of a failed try, which is delivered if no later try has a better one.
pub(crate) struct KeptResponse {
    /// The response.
    pub response: OpenedResponse,
    /// The number of its try, from 1.
    pub number: u32,
    /// Its try, for the log.
    pub last_try: Option<LastTry>,
    /// The memory of what has been read of it; `None` if nothing has.
    pub _hold: Option<MemoryHold>,
}

/// The tries of one request.
pub(crate) struct Attempts<'a> {
    /// The worker's gateway.
    pub gateway: &'a Rc<Gateway>,
    /// The exchange on the client connection, for time limits.
    pub exchange: &'a Exchange,
    /// The head of the client's request.
    pub request: &'a RequestParts,
    /// The body of the client's request.
    pub chat: &'a ChatRequest,
    /// The route, the model and the affinity of the request.
    pub ask: Ask<'a>,
    /// The fleet, under the configuration that was current when the request arrived.
    pub snapshot: Arc<Generation>,
    /// The record of the request.
    pub record: &'a mut RequestRecord,
    /// The deadline for the first byte of the response.
    pub deadline: Nanos,
    /// When the current try began to wait for its backend; `None` before that.
    pub wait_began: Option<Nanos>,
    /// Backends that the request has blamed.
    pub blamed: SmallVec<[u64; 2]>,
    /// Why the response of the last try was no answer.
    pub no_answer: Option<NoAnswer>,
    /// The decisions about the tries.
    pub dispatch: Dispatch,
    /// Whether the failed targets have been blamed.
    pub is_settled: bool,
}

impl Attempts<'_> {
    /// Runs tries until there is a response to deliver.
    ///
    /// # Errors
    /// The error to send to the client if there is none.
    pub(crate) async fn run(mut self, slot: Permit) -> Result<Delivery, GatewayError> {
        let (mut slot, mut kept, mut queues) = (Some(slot), None, BackendQueues::default());
        let mut now = clock::now();
        self.gateway.shared().budget.offer(now);
        loop {
            if self.record.waited > 0 {
                self.refresh();
            }
            let mut step = self.decide(now, &queues);
            // Register for reopened backends, then decide again: a backend may have reopened before the registration.
            let gateway = self.gateway;
            let reopened = matches!(step, Do::Wait(_)).then(|| gateway.shared().reopened.notified());
            if reopened.is_some() {
                queues.granted = None;
                step = self.decide(now, &queues);
            }
            self.record_passed(now, &step);
            match step {
                Do::Try { target, panic } => {
                    let Some(in_flight) = self.enter((now, panic), target, &mut queues) else {
                        self.dispatch.missed();
                        continue;
                    };
                    self.count_try(panic);
                    let result = self.try_one(target, in_flight).await;
                    // The time since the wait began is not Zap's own.
                    self.record.waited += self.wait_began.map_or(0, |began| clock::now() - began);
                    match result {
                        Ok(mut response) => {
                            self.discard(kept);
                            self.settle(response.head.status.as_u16() < 400);
                            self.start_meter(target, &mut response);
                            let clocks = self.clocks(response.opened);
                            return Ok(Delivery { response, slot, clocks });
                        }
                        Err(newer) => {
                            if is_sdk_retry(&self.request.headers) {
                                self.dispatch.forbid_rounds();
                            }
                            if newer.is_some() {
                                self.discard(std::mem::replace(&mut kept, newer));
                            }
                        }
                    }
                }
                Do::Wait(busy) => {
                    drop(slot.take());
                    let (ask, deadline, turn) = (&self.ask, self.deadline, self.ask.turn);
                    let wait = Wait { snapshot: &self.snapshot, ask, busy: &busy, deadline, reopened };
                    let waited = match queues.wait(self.gateway, self.exchange, self.record, wait).await {
                        Ok(()) => {
                            queues.readmit(self.gateway, self.exchange, self.record, (deadline, turn)).await
                        }
                        Err(error) => Err(error),
                    };
                    match (waited, kept.take()) {
                        (Ok(again), still_kept) => (slot, kept) = (Some(again), still_kept),
                        // The response that came says more than that the wait was too long.
                        (Err(_), Some(kept)) if !self.gateway.is_cut() => {
                            self.settle(false);
                            return Ok(self.deliver_kept(*kept, None));
                        }
                        (Err(error), _) => {
                            self.settle(false);
                            return Err(error);
                        }
                    }
                }
                Do::Backoff { until } => self.back_off(now, until).await,
                Do::Deliver => match (kept.take(), slot.take()) {
                    (Some(kept), slot) => {
                        self.settle(false);
                        return Ok(self.deliver_kept(*kept, slot));
                    }
                    _ => return Err(GatewayError::Internal),
                },
                Do::Refuse(why) => {
                    self.settle(false);
                    return Err(self.to_error(why, now));
                }
            }
            now = clock::now();
        }
    }

    /// Blames the targets that have failed, now that the request has ended. `was_served`: a target has served it.
    fn settle(&mut self, was_served: bool) {
        self.is_settled = true;
        if !self.record.failed.is_empty() && !self.gateway.is_cut() {
            let targets = &self.snapshot.route(&self.ask).targets;
            let pool = |target: TargetId| self.snapshot.pool(targets[target].backend);
            self.dispatch.blamed(was_served, pool).for_each(|target| self.strike(target));
        }
    }

    /// Counts a strike of a target that has failed: of the pair of its backend and the model.
    fn strike(&self, target: TargetId) {
        let target = &self.snapshot.route(&self.ask).targets[target];
        let upstream = self.snapshot.upstream(target);
        let failed = self.record.failed.iter().rev().find(|t| t.backend.state.id == upstream.state.id);
        if let Some(TryFault { fault, .. }) = failed {
            self.gateway.strike(upstream, target.key(self.ask.model), self.record.model_name(), fault);
        }
    }

    /// The limits of time of a response whose head came at `begun`.
    fn clocks(&self, begun: Nanos) -> StreamClocks {
        let config = &self.snapshot.config;
        StreamClocks {
            begun,
            idle: clock::nanos(config.timeouts.stream_idle),
            content_by: self.deadline,
            heartbeat: clock::nanos(config.stream.heartbeat),
        }
    }

    /// Takes the current snapshot of the fleet, unless a reload has changed the configuration. Only a request that has
    /// waited since its last snapshot needs a new one.
    fn refresh(&mut self) {
        let fresh = self.gateway.current();
        if !Arc::ptr_eq(&fresh, &self.snapshot) && fresh.has_same_ids(&self.snapshot) {
            self.snapshot = fresh.clone();
        }
    }

    fn decide(&mut self, now: Nanos, queues: &BackendQueues) -> Do {
        let view = view(&self.snapshot, &self.ask, now, queues);
        self.dispatch.next(now, &view, &self.gateway.shared().budget, || self.gateway.random())
    }

    /// Takes a permit and a unit of the quota at the target's backend, and leaves all queues. Returns `None` if another
    /// request took the last one.
    fn enter(
        &self,
        (now, panic): (Nanos, bool),
        target: TargetId,
        queues: &mut BackendQueues,
    ) -> Option<InFlight> {
        let backend = self.snapshot.route(&self.ask).targets[target].backend;
        let upstream = &self.snapshot.backends[backend];
        let permit = queues.granted.take_if(|(granted, _)| *granted == self.snapshot.pool(backend));
        let candidate = view(&self.snapshot, &self.ask, now, queues).candidate(target);
        let in_flight = match permit {
            Some((_, permit)) => upstream.enter_with(Some(permit), &candidate, panic),
            None => upstream.enter(&candidate, panic),
        }?;
        queues.leave(backend);
        Some(in_flight)
    }

    /// Counts a try. A retry counts at the backend whose failure caused it.
    fn count_try(&mut self, panic: bool) {
        let recorder = self.gateway.recorder();
        if let Some(TryFault { backend, fault, .. }) = self.record.failed.last() {
            backend.lanes[recorder.worker].retried(fault.kind);
            if let Some(reason) = self.no_answer.take() {
                backend.lanes[recorder.worker].failed_over(reason);
            }
        }
        if panic {
            recorder.lane().panic_picks.add(1);
        }
    }

    /// Records for the log which targets were passed over.
    fn record_passed(&mut self, now: Nanos, step: &Do) {
        if !self.record.is_logged {
            return;
        }
        let chosen = match step {
            Do::Try { target, .. } => Some(*target),
            _ => None,
        };
        for (upstream, why) in self.snapshot.passed(now, &self.ask, self.dispatch.tried(), chosen) {
            self.record.passed.note(upstream, why, now);
        }
    }

    /// Discards a kept response. Its connection is reused if the rest of the body has been received already.
    fn discard(&self, kept: Option<Box<KeptResponse>>) {
        let Some(kept) = kept else { return };
        let mut lease = kept.response.lease;
        let mut cx = Context::from_waker(Waker::noop());
        for _ in 0..MAX_DISCARDED_FRAMES {
            match lease.link.poll_frame(&mut cx) {
                Poll::Ready(Some(Ok(_))) => {}
                Poll::Ready(None) => return self.gateway.pool().park(lease, clock::now()),
                Poll::Ready(Some(Err(_))) | Poll::Pending => return,
            }
        }
    }

    /// Sleeps until `until`.
    async fn back_off(&mut self, now: Nanos, until: Nanos) {
        self.record.phase = Phase::Backoff;
        self.exchange.set_deadline(self.deadline);
        sleep(std::time::Duration::from_nanos(until.saturating_sub(now))).await;
        self.record.waited += clock::now() - now;
    }

    /// Delivers the response of a failed try. A 429 gets the time after which a target reopens as `Retry-After`.
    fn deliver_kept(&mut self, kept: KeptResponse, slot: Option<Permit>) -> Delivery {
        let KeptResponse { mut response, number, last_try, .. } = kept;
        let headers = &mut response.head.headers;
        if response.head.status == StatusCode::TOO_MANY_REQUESTS {
            let secs = retry_after_secs(self.time_to_reopen().min(MAX_RETRY_AFTER));
            headers.insert(RETRY_AFTER, HeaderValue::from(secs));
            headers.remove("retry-after-ms");
        }
        self.record.deliver_failed(number, last_try);
        let clocks = self.clocks(response.opened);
        Delivery { response, slot, clocks }
    }

    /// Returns the time until the first target that cools down or has spent its quota reopens; a second if there is
    /// none.
    fn time_to_reopen(&self) -> Nanos {
        let now = clock::now();
        let queues = BackendQueues::default();
        let view = view(&self.snapshot, &self.ask, now, &queues);
        let check = |id| match view.check(id) {
            Err(Closed::Out(Status::Ejected)) => view.check_ejected(id),
            result => result,
        };
        let opens = |id| match check(id) {
            Err(Closed::Cooling(at) | Closed::Quota(at)) => Some(at.saturating_sub(now)),
            _ => None,
        };
        (0..self.snapshot.route(&self.ask).targets.len()).filter_map(opens).min().unwrap_or(SECOND)
    }
}

/// A client may leave during a later try: then only the targets without any answer are to blame, since the others might
/// have answered the same.
impl Drop for Attempts<'_> {
    fn drop(&mut self) {
        if !self.is_settled && !std::thread::panicking() && !self.gateway.is_cut() {
            self.dispatch.silent().for_each(|target| self.strike(target));
        }
    }
}

/// The targets at `now`, as a request sees them.
fn view<'a>(snapshot: &'a Snapshot, ask: &'a Ask<'a>, now: Nanos, queues: &'a BackendQueues) -> View<'a> {
    View {
        snapshot,
        ask,
        now,
        tickets: queues.quotas(),
        granted: queues.granted.as_ref().map(|(backend, _)| *backend),
        is_waiting: queues.is_waiting(),
    }
}

/// The rules for the tries of a request with this deadline.
pub(super) fn rules(config: &Config, deadline: Nanos) -> Rules {
    Rules {
        max_retries: config.retry.max_retries,
        base_delay: config.retry.base_delay,
        max_delay: config.retry.max_delay,
        wait_until: latest_opening(deadline, &config.queue),
        deadline,
    }
}

/// Whether an SDK sends the request again: it retries by itself, so Zap asks each target once.
fn is_sdk_retry(headers: &HeaderMap) -> bool {
    headers.get("x-stainless-retry-count").is_some_and(|count| count != "0" && !count.is_empty())
}

impl Attempts<'_> {
    /// Why the key of a target is refused, as the provider said it: in this request, or in an earlier one.
    fn key_fault(&self) -> Cow<'static, str> {
        let is_of_key = |fault: &Fault| fault.kind == Code::UpstreamAuthError;
        let failed = self.record.failed.iter().map(|t| t.fault.clone()).rfind(is_of_key);
        let known = || {
            let targets = self.snapshot.route(&self.ask).targets.iter();
            targets
                .filter_map(|target| self.snapshot.upstream(target).last_error())
                .map(|(_, fault)| fault)
                .find(is_of_key)
        };
        failed.or_else(known).map_or("".into(), |fault| fault.cause)
    }

    /// The error to send to the client for a refusal.
    fn to_error(&self, why: Refusal, now: Nanos) -> GatewayError {
        match why {
            Refusal::Busy(busy) => refusal(&busy, now),
            Refusal::Budget(Refused::Spent) => GatewayError::Limited(LimitError::BackendBudgetsSpent),
            Refusal::Budget(Refused::Reserved) => GatewayError::Limited(LimitError::BudgetReserved),
            Refusal::KeysRefused => GatewayError::UpstreamAuth(self.key_fault()),
            Refusal::NoBackend => GatewayError::NoBackend,
            Refusal::TooLarge => reserve::too_large(&self.snapshot, &self.ask),
            Refusal::Failed(code) => match code {
                Code::Draining => GatewayError::Draining,
                Code::UpstreamAuthError => GatewayError::UpstreamAuth(self.key_fault()),
                Code::UpstreamEmpty => GatewayError::UpstreamEmpty,
                Code::UpstreamInvalidResponse => GatewayError::UpstreamInvalid,
                Code::UpstreamRedirect => GatewayError::UpstreamRedirect,
                Code::UpstreamTimeout => GatewayError::UpstreamTimeout,
                Code::UpstreamTlsError => GatewayError::UpstreamTls,
                _ => GatewayError::UpstreamUnreachable,
            },
        }
    }
}
