//! One try at one target: builds and sends the request, and judges the response.

use std::pin::pin;
use std::sync::Arc;
use std::task::Context;
use std::time::{Duration, SystemTime};

use http::response::Parts;

use crate::clock;
use crate::code::Code;
use crate::gateway::Gateway;
use crate::gateway::attempt::{Attempts, KeptResponse, OpenedResponse};
use crate::gateway::buffered::MemoryHold;
use crate::gateway::failpoint;
use crate::gateway::opening::{Asked, Opening, Place, Problem, Stopped, Unopened};
use crate::http1::headers;
use crate::http1::headers::ResponseFacts;
use crate::policy::breaker::{Change, Status};
use crate::policy::dispatch::{Event, Failure, Mark, Unfit, Verdict};
use crate::policy::known_ids::MadeBy;
use crate::policy::latency::SizeClass;
use crate::policy::retry::DEFAULT_COOLING;
use crate::policy::route::TargetId;
use crate::protocol::body_class::{error_message, is_request_too_large};
use crate::protocol::rate_limits;
use crate::protocol::rate_limits::Wait;
use crate::protocol::stored::is_not_found;
use crate::telemetry::phase::Phase;
use crate::time::{Nanos, SECOND};
use crate::upstream::Upstream;
use crate::upstream::counters::NoAnswer;
use crate::upstream::fault::Fault;
use crate::upstream::in_flight::InFlight;
use crate::upstream::send::{SendError, Source, Step, UpstreamResponse, send};

/// A backend that has served a request in this time has a good key; a 401 is then due to the request.
const GOOD_KEY: Nanos = 10 * SECOND;

/// A target that has kept a request for so long, and has sent nothing to anybody in that time, is suspect.
const SILENT: Nanos = 30 * SECOND;

/// The response of a failed try, if it is kept.
type FailedTry = Option<Box<KeptResponse>>;

impl Attempts<'_> {
    /// Runs one try at one target.
    ///
    /// # Errors
    /// The try failed. The value is its response, if the response is kept.
    pub(super) async fn try_one(
        &mut self,
        target: TargetId,
        in_flight: InFlight,
    ) -> Result<OpenedResponse, FailedTry> {
        let route = &self.snapshot.route(&self.ask).targets;
        let model = |asked: Option<&Arc<str>>| route[target].model(asked);
        self.record.begin_try(in_flight.upstream(), model, in_flight.entered());
        self.begin_span(target, &in_flight);
        let result = self.try_target(target, in_flight).await;
        if result.is_err() {
            self.end_span();
        }
        if let Some((_, class)) = self.ask.by_latency {
            self.learn_latency(target, class, &result);
        }
        result
    }

    /// Records for the strategy `least_latency` how long a target took to its first content. A failure counts as long
    /// as the target cools down; a request that is refused for what it asks says nothing.
    fn learn_latency(&self, target: TargetId, class: SizeClass, result: &Result<OpenedResponse, FailedTry>) {
        let now = clock::now();
        let target = &self.snapshot.route(&self.ask).targets[target];
        let (state, key) = (&self.snapshot.upstream(target).state, target.key(self.ask.model));
        let took = match result {
            Ok(response) if response.head.status.as_u16() >= 400 => return,
            Ok(response) => now.saturating_sub(response.in_flight.entered()),
            Err(_) if self.gateway.is_cut() => return,
            Err(_) => match state.breaker.pairs.status(|| key, now) {
                Status::Cooling(until) => until.saturating_sub(now),
                _ => clock::nanos(DEFAULT_COOLING),
            },
        };
        state.latencies.learn(key, class, took, now);
    }

    async fn try_target(
        &mut self,
        target: TargetId,
        in_flight: InFlight,
    ) -> Result<OpenedResponse, FailedTry> {
        failpoint::hit("try", &self.record.request_id);
        self.wait_began = None;
        let usage = self.usage_splice(&in_flight);
        let mut asked = Asked { target, in_flight: &in_flight, usage, sent: in_flight.entered() };
        self.exchange.nudge_at(self.exchange.coarse_now() + SILENT);
        let unanswered = Unanswered::new(self.gateway, &in_flight, self.ask.model);
        let response = match asked.usage {
            Some(_) => self.send_asking(&mut asked).await,
            None => self.send_request(&mut asked).await,
        };
        unanswered.end();
        let lane = &in_flight.upstream().lanes[self.gateway.recorder().worker];
        let took = clock::now().saturating_sub(in_flight.entered());
        lane.first_byte.record_traced(took, self.record.exemplar());
        let Asked { sent, usage, .. } = asked;
        let UpstreamResponse { head, lease } = match response {
            Ok(response) if !self.gateway.is_cut() => response,
            Ok(_) => return Err(self.fail(Problem::Send(Fault::cut().into()), &in_flight)),
            Err(problem) => return Err(self.fail(problem, &in_flight)),
        };
        self.note_status(head.status.as_u16());
        self.gateway.record_answered(&in_flight, self.exchange.coarse_now());
        let (about, opened) = (ResponseFacts::default(), self.exchange.coarse_now());
        let mut opened = OpenedResponse {
            head,
            about,
            lease,
            in_flight,
            first: None,
            events: None,
            is_whole: false,
            opened,
        };
        let OpenedResponse { head, about, lease, in_flight, .. } = &mut opened;
        let asked = Asked { target, in_flight, usage, sent };
        let text = self.error_text(head, lease, &asked).await;
        let failure = self.judge(&asked, head, text.as_deref());
        *about = headers::to_client(&mut head.headers);
        if let Some(failure) = failure {
            opened.first = text;
            return Err(failure.keep.then(|| self.keep(opened)));
        }
        let (status, body, is_whole) = match self.open(head, about, lease, &asked).await {
            Ok(Opening { first, events }) => {
                (opened.first, opened.events) = (first, events);
                if opened.head.status.as_u16() >= 400 {
                    self.gateway.record_no_result(&opened.in_flight);
                }
                return Ok(opened);
            }
            Err(Unopened::Failed(problem)) => return Err(self.fail(problem, &opened.in_flight)),
            Err(Unopened::Error { status, body, is_whole }) => (status, body, is_whole),
        };
        let reason = if about.is_events { NoAnswer::ErrorEvent } else { NoAnswer::JsonError };
        self.no_answer = is_whole.then_some(reason);
        let failure = self.judge_body(&asked, head, (status, &body, is_whole));
        opened.replace_body(body, is_whole.then_some(status));
        Err(failure.filter(|failure| failure.keep).map(|_| self.keep(opened)))
    }

    /// Reports a try without a response to the dispatcher.
    fn fail(&mut self, problem: Problem, in_flight: &InFlight) -> FailedTry {
        let (event, fault) = match problem {
            _ if self.gateway.is_cut() => (Event::Cut, Fault::cut()),
            Problem::Stopped(Stopped::Ejected) => {
                (Event::Ejected, Fault::new(Code::UpstreamTimeout, "ejected while the request waited"))
            }
            Problem::Stopped(Stopped::Elapsed) => (Event::TimedOut, self.timed_out()),
            Problem::Unfit(unfit, fault) => {
                self.no_answer = match unfit {
                    Unfit::CutShort => Some(NoAnswer::Cut),
                    Unfit::Empty => Some(NoAnswer::Empty),
                    Unfit::Silent => Some(NoAnswer::Timeout),
                    Unfit::Error { .. } | Unfit::NotHere(_) | Unfit::OtherModel(_) => None,
                };
                (Event::Unfit(unfit), fault)
            }
            Problem::Send(SendError::Broken(fault)) => (Event::Broke(fault.kind), fault),
            Problem::Send(SendError::Exhausted(fault)) => (Event::Exhausted, fault),
            Problem::Send(SendError::Stale) => (Event::Broke(Code::UpstreamUnreachable), Fault::closed()),
        };
        if let Verdict::Failed(failure) = self.dispatch.on(event) {
            let fault = Fault { kind: failure.code, ..fault };
            self.record_failure(in_flight.upstream(), fault, failure.blames_backend);
        }
        None
    }

    /// Keeps a response in case no later try has a better one.
    fn keep(&mut self, mut response: OpenedResponse) -> Box<KeptResponse> {
        // The next try may need a permit of the same backend.
        response.in_flight.release();
        let (number, last_try) = (self.record.tries, self.record.last_try.take());
        let hold = response.first.as_ref().map(|first| MemoryHold::of(self.gateway, first.len()));
        Box::new(KeptResponse { response, number, last_try, _hold: hold })
    }

    /// Sends the request and waits for the head of the response. Sends it again on a new connection if an idle
    /// connection was closed.
    pub(super) async fn send_request(&mut self, asked: &mut Asked<'_>) -> Result<UpstreamResponse, Problem> {
        match self.send_once(asked, true).await {
            Err(Problem::Send(SendError::Stale)) if !self.gateway.is_cut() => {
                self.send_once(asked, false).await
            }
            result => result,
        }
    }

    /// Sends the request and waits for the head of the response. Uses an idle connection if there is one and `reuse` is
    /// set. Sets [`Self::wait_began`] unless a former call in this try has set it.
    async fn send_once(&mut self, asked: &mut Asked<'_>, reuse: bool) -> Result<UpstreamResponse, Problem> {
        let request = self.wire_request(asked);
        let source =
            Source { pool: self.gateway.pool(), reuse, limit: self.snapshot.config.timeouts.connect };
        let place = Place {
            gateway: self.gateway,
            exchange: self.exchange,
            snapshot: &self.snapshot,
            ask: &self.ask,
            dispatch: &self.dispatch,
        };
        let limit = clock::nanos(self.snapshot.config.timeouts.first_byte);
        let first_byte = match self.record.stream {
            true if limit > 0 && place.has_next() => Some(limit),
            // The time counts for the first token.
            true => Some(Nanos::MAX / 2),
            false => None,
        };
        let (record, wait_began) = (&mut *self.record, &mut self.wait_began);
        let (exchange, deadline, sent, in_flight) =
            (self.exchange, self.deadline, &mut asked.sent, asked.in_flight);
        let on_step = |step| match step {
            Step::Begun(now) => *wait_began = wait_began.or(Some(now)),
            Step::Connecting => record.phase = Phase::Connecting,
            Step::Sending => {
                record.phase = Phase::Waiting;
                in_flight.sent();
                if let Some(limit) = first_byte {
                    *sent = clock::now();
                    exchange.set_deadline(deadline.min(*sent + limit));
                }
            }
        };
        let mut sending = pin!(send(source, in_flight.upstream(), request, on_step));
        loop {
            let sent = |cx: &mut Context<'_>| sending.as_mut().poll(cx);
            match place.wait(deadline, (in_flight, true), sent).await {
                // No other target is left by now: the time limit of the request alone counts.
                Err(Problem::Stopped(Stopped::Elapsed))
                    if clock::now() < deadline && !place.gateway.is_cut() && !place.claim_next() => {}
                result => return result,
            }
        }
    }

    /// Judges a response by its status, and cools down or closes the target if the response asks for it. Returns the
    /// failure if the response must not be delivered.
    fn judge(&mut self, asked: &Asked<'_>, head: &Parts, text: Option<&[u8]>) -> Option<Failure> {
        let upstream = asked.in_flight.upstream();
        let (status, own_key) = (head.status.as_u16(), upstream.conf.api_key.is_some());
        if status < 300
            && let Some(wait) = rate_limits::wait_after_success(&head.headers, SystemTime::now)
            && !wait.is_zero()
        {
            self.cool_down(asked.in_flight, wait);
        }
        let event = match status {
            429 if text.is_some_and(is_request_too_large) => Event::Unfit(Unfit::OtherModel(status)),
            404 if self.ask.made_by == MadeBy::Unknown => Event::Unfit(Unfit::NotHere(status)),
            400 if text.is_some_and(is_not_found) => Event::Unfit(Unfit::NotHere(status)),
            _ => Event::Head { status, own_key, is_alive: is_alive(asked, status, (head, text)) },
        };
        let Verdict::Failed(failure) = self.dispatch.on(event) else {
            return None;
        };
        self.mark(asked, (status, head, text), failure);
        let mut fault = Fault::status(failure.code, status);
        if failure.mark == Some(Mark::BadKey)
            && let Some(message) = text.and_then(|text| error_message(text, upstream.key()))
        {
            fault.cause = format!("HTTP {status}: {message}").into();
        }
        match failure.is_search {
            true => self.record.fail_try(upstream, fault),
            false => self.record_failure(upstream, fault, failure.blames_backend),
        }
        Some(failure)
    }

    /// Judges a response by its body: an error with this status, found inside a success if `is_inside`, else one of the
    /// client's own kind that another model may not give.
    fn judge_body(
        &mut self,
        asked: &Asked<'_>,
        head: &Parts,
        (status, text, is_inside): (u16, &[u8], bool),
    ) -> Option<Failure> {
        let upstream = asked.in_flight.upstream();
        let unfit = match is_inside {
            true => Unfit::Error {
                status,
                own_key: upstream.conf.api_key.is_some(),
                is_alive: is_alive(asked, status, (head, Some(text))),
            },
            false => Unfit::OtherModel(status),
        };
        let Verdict::Failed(failure) = self.dispatch.on(Event::Unfit(unfit)) else { return None };
        self.mark(asked, (status, head, Some(text)), failure);
        let fault = match is_inside {
            true => Fault::new(failure.code, format!("HTTP {status} inside a {}", head.status.as_u16())),
            false => Fault::status(failure.code, status),
        };
        self.record_failure(upstream, fault, false);
        Some(failure)
    }

    /// Cools down or closes the target of a failed try, as its response asks for it.
    fn mark(
        &mut self,
        asked: &Asked<'_>,
        (status, head, text): (u16, &Parts, Option<&[u8]>),
        failure: Failure,
    ) {
        let (in_flight, now) = (asked.in_flight, clock::now());
        let pairs = &in_flight.upstream().state.breaker.pairs;
        match failure.mark {
            Some(Mark::BadKey) => self.close_for_bad_key(in_flight.upstream(), status),
            Some(Mark::Limited) => match stated_wait(head, text) {
                Some(Wait { span, pace }) => {
                    pairs.limited(in_flight.key(), (clock::nanos(span), pace.map(clock::nanos)), now);
                }
                None => self.cool_down(in_flight, DEFAULT_COOLING),
            },
            Some(Mark::Busy) => drop(pairs.busy(in_flight.key(), now)),
            Some(Mark::NoResult) => self.gateway.record_no_result(in_flight),
            None => {}
        }
        if failure.code == Code::UpstreamError
            && let Some(wait) = rate_limits::retry_after(&head.headers, SystemTime::now)
        {
            self.cool_down(in_flight, wait);
        }
    }

    /// The fault of a try that has waited until its limit.
    fn timed_out(&self) -> Fault {
        let what = if self.record.phase == Phase::Connecting { "connect" } else { "response" };
        let waited = self.wait_began.map_or(0, |began| clock::now() - began);
        Fault::timed_out(what, Duration::from_nanos(waited))
    }

    /// Cools a pair down.
    fn cool_down(&self, in_flight: &InFlight, span: Duration) {
        let now = clock::now();
        let pairs = &in_flight.upstream().state.breaker.pairs;
        pairs.cool(in_flight.key(), now + clock::nanos(span), now);
    }

    /// Closes a backend for a while because it refuses its key, unless a request there has succeeded lately: then the
    /// key is good for others.
    fn close_for_bad_key(&self, upstream: &Upstream, status: u16) {
        let now = clock::now();
        if !upstream.state.breaker.succeeded_within(GOOD_KEY, now) && upstream.state.breaker.bad_key(now) {
            let shared = self.gateway.shared();
            shared.announce(upstream, Change::Misconfigured, &format!("request: HTTP {status}"));
        }
    }

    /// Records a failed try at the backend and in the request's record. A request blames a backend once at most.
    fn record_failure(&mut self, upstream: &Arc<Upstream>, fault: Fault, blame: bool) {
        let is_first = !self.blamed.contains(&upstream.state.id);
        self.gateway.record_failure(upstream, &fault);
        if blame && is_first {
            self.blamed.push(upstream.state.id);
            self.gateway.blame_backend(upstream, &fault);
        }
        self.record.fail_try(upstream, fault);
    }
}

/// A request without the head of a response. If it is dropped before [`end`](Self::end), its client has given up.
struct Unanswered<'a> {
    gateway: &'a Gateway,
    in_flight: &'a InFlight,
    /// The model that the request names.
    model: &'a str,
    since: Nanos,
    is_over: bool,
}

/// A client that gives up after so long has not just changed its mind.
const PATIENCE: Nanos = 5 * SECOND;

impl<'a> Unanswered<'a> {
    fn new(gateway: &'a Gateway, in_flight: &'a InFlight, model: Option<&'a str>) -> Self {
        Unanswered {
            gateway,
            in_flight,
            model: model.unwrap_or_default(),
            since: in_flight.entered(),
            is_over: false,
        }
    }

    fn end(mut self) {
        self.is_over = true;
    }
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        if self.is_over || self.gateway.is_cut() || std::thread::panicking() {
            return;
        }
        let now = clock::now();
        let (upstream, key) = (self.in_flight.upstream(), self.in_flight.key());
        if now < self.since + PATIENCE {
            self.gateway.record_no_result(self.in_flight);
        } else if upstream.state.breaker.pairs.gave_up(key, now) {
            let fault =
                Fault::new(Code::UpstreamTimeout, "clients gave up, one after the other, without a response");
            upstream.note_error(&fault);
            self.gateway.strike(upstream, key, self.model, &fault);
        }
    }
}

/// The wait that a 429 states in its body or its headers.
fn stated_wait(head: &Parts, text: Option<&[u8]>) -> Option<Wait> {
    let delay = text.and_then(rate_limits::retry_delay).map(Wait::of);
    delay.or_else(|| rate_limits::stated_wait(&head.headers, SystemTime::now))
}

/// Whether the target of a try has served another request a moment ago, so that a status that names no wait means that
/// it has no room now.
fn is_alive(asked: &Asked<'_>, status: u16, (head, text): (&Parts, Option<&[u8]>)) -> bool {
    let pairs = &asked.in_flight.upstream().state.breaker.pairs;
    matches!(status, 429 | 503 | 529)
        && (status != 429 || stated_wait(head, text).is_none())
        && pairs.has_just_succeeded(asked.in_flight.key(), clock::now())
}
