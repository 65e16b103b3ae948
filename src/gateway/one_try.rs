//! One try at one target: builds and sends the request, and judges the response.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::CONTENT_LENGTH;
use http::response::Parts;

use crate::client::deadline::Elapsed;
use crate::clock;
use crate::code::Code;
use crate::gateway::attempt::{Attempts, KeptResponse};
use crate::gateway::failpoint;
use crate::http1::headers;
use crate::http1::headers::ResponseFacts;
use crate::json::patch::{slices, splices};
use crate::policy::breaker::Change;
use crate::policy::dispatch::{Dispatch, Event, Failure, Mark, Verdict};
use crate::policy::retry::DEFAULT_COOLING;
use crate::policy::route::TargetId;
use crate::protocol::rate_limits;
use crate::telemetry::phase::Phase;
use crate::time::Nanos;
use crate::upstream::Upstream;
use crate::upstream::fault::Fault;
use crate::upstream::in_flight::InFlight;
use crate::upstream::link::{Link, WireRequest, write_header};
use crate::upstream::pool::Lease;
use crate::upstream::send::{SendError, Source, Step, UpstreamResponse, send};

/// Initial capacity for the client's headers: enough for most requests.
const HEADER_CAPACITY: usize = 768;

/// A response to deliver.
type SuccessfulTry = (Parts, ResponseFacts, Lease, InFlight, Option<Bytes>);

/// The response of a failed try, if it is kept.
type FailedTry = Option<Box<KeptResponse>>;

impl Attempts<'_> {
    /// Runs one try at one target. The try may wait for the head, and for the first frame of the body if it reads one,
    /// until `limit`.
    ///
    /// # Errors
    /// The try failed. The value is its response, if the response is kept.
    pub(super) async fn try_one(
        &mut self,
        target: TargetId,
        in_flight: InFlight,
        limit: Nanos,
        dispatch: &mut Dispatch,
    ) -> Result<SuccessfulTry, FailedTry> {
        self.record.tries += 1;
        self.record.phase = Phase::Waiting;
        failpoint::hit("try", &self.record.request_id);
        let upstream = in_flight.upstream().clone();
        self.wait_began = None;
        let mut response = self.send_request(target, &in_flight, limit, true).await;
        if matches!(response, Err(SendError::Stale)) && !self.gateway.is_cut() {
            response = self.send_request(target, &in_flight, limit, false).await;
        }
        let error = match response {
            Ok(UpstreamResponse { mut head, mut lease }) if !self.gateway.is_cut() => {
                if let Some(failure) = self.judge(target, &head, &upstream, dispatch) {
                    self.record_wait();
                    return Err(failure.keep.then(|| self.keep_response(head, lease, in_flight)));
                }
                let about = headers::to_client(&mut head.headers);
                match self.first_frame(&about, &mut lease, limit).await {
                    Ok(first) => {
                        self.record_wait();
                        return Ok((head, about, lease, in_flight, first));
                    }
                    Err(error) => error,
                }
            }
            Ok(_) => SendError::Broken(Fault::cut()),
            Err(error) => error,
        };
        self.record_wait();
        let (event, fault) = match error {
            _ if self.gateway.is_cut() => (Event::Cut, Fault::cut()),
            SendError::Broken(fault) => (Event::Broke(fault.kind), fault),
            SendError::TimedOut(fault) => (Event::TimedOut, fault),
            SendError::Exhausted(fault) => (Event::Exhausted, fault),
            SendError::Stale => (Event::Broke(Code::UpstreamUnreachable), Fault::closed()),
        };
        if let Verdict::Failed(failure) = dispatch.on(event) {
            self.record_failure(&upstream, fault, failure.blame);
        }
        Err(None)
    }

    /// Ends the wait for the backend. The time since [`Self::wait_began`] is not Zap's own.
    fn record_wait(&mut self) {
        self.record.waited += self.wait_began.map_or(0, |began| clock::now() - began);
    }

    fn keep_response(&self, head: Parts, lease: Lease, mut in_flight: InFlight) -> Box<KeptResponse> {
        // The next try may need a permit of the same backend.
        in_flight.release_permit();
        Box::new(KeptResponse { head, lease, in_flight, number: self.record.tries })
    }

    /// Sends the request and waits for the head of the response until `limit`. Uses an idle connection if there is one
    /// and `reuse` is set. Sets [`Self::wait_began`] unless a former call in this try has set it.
    async fn send_request(
        &mut self,
        target: TargetId,
        in_flight: &InFlight,
        limit: Nanos,
        reuse: bool,
    ) -> Result<UpstreamResponse, SendError> {
        let request = self.wire_request(target, in_flight.upstream());
        let source =
            Source { pool: self.gateway.pool(), reuse, limit: self.snapshot.config.timeouts.connect };
        let (record, wait_began) = (&mut *self.record, &mut self.wait_began);
        let on_step = |step| match step {
            Step::Begun(now) => *wait_began = wait_began.or(Some(now)),
            Step::Connecting => record.phase = Phase::Connecting,
            Step::Sending => {
                record.phase = Phase::Waiting;
                in_flight.sent();
            }
        };
        let response = {
            // Pinned here, since the future is large: `limit` would move it.
            let sending = pin!(send(source, in_flight.upstream(), request, on_step));
            self.exchange.limit(limit, sending).await
        };
        response.unwrap_or_else(|Elapsed| {
            let what = if self.record.phase == Phase::Connecting { "connect" } else { "response" };
            Err(self.timed_out(what))
        })
    }

    /// Builds the request to `upstream`: a new head, and the body with the target's model and without the members that
    /// the backend does not accept.
    fn wire_request(&self, target: TargetId, upstream: &Upstream) -> WireRequest {
        let begin = upstream.head_start(self.ask.endpoint).unwrap_or_default();
        let mut head = Vec::with_capacity(begin.len() + HEADER_CAPACITY);
        head.extend_from_slice(begin);
        headers::to_backend(self.headers, upstream.conf.forward_authorization, |name, value| {
            if !upstream.has_own_header(name) {
                write_header(&mut head, name, value.as_bytes());
            }
        });
        write_header(&mut head, &headers::X_REQUEST_ID, self.record.request_id.as_bytes());
        let target = &self.snapshot.route(&self.ask).targets[target];
        let model = target.text(self.ask.model);
        let drops = |member| self.snapshot.drops(target.backend, member);
        let splices = splices(&self.chat.fields, model.as_deref(), drops);
        let body = slices(&self.chat.chunks, splices);
        let length: usize = body.iter().map(Bytes::len).sum();
        write_header(&mut head, &CONTENT_LENGTH, itoa::Buffer::new().format(length).as_bytes());
        head.extend_from_slice(b"\r\n");
        WireRequest { head, body }
    }

    /// Judges a response by its status, and cools down or closes the target if the response asks for it. Returns the
    /// failure if the response must not be delivered.
    fn judge(
        &mut self,
        target: TargetId,
        head: &Parts,
        upstream: &Arc<Upstream>,
        dispatch: &mut Dispatch,
    ) -> Option<Failure> {
        let (status, own_key) = (head.status.as_u16(), upstream.conf.api_key.is_some());
        if status < 300
            && let Some(wait) = rate_limits::wait_after_success(&head.headers, SystemTime::now)
        {
            self.cool_down(target, wait);
        }
        let Verdict::Failed(failure) = dispatch.on(Event::Head { status, own_key }) else { return None };
        match failure.mark {
            Some(Mark::Cool) => {
                let wait = rate_limits::stated_wait(&head.headers, SystemTime::now);
                self.cool_down(target, wait.unwrap_or(DEFAULT_COOLING));
            }
            Some(Mark::BadKey) => self.close_for_bad_key(upstream, status),
            None => {}
        }
        self.record_failure(upstream, Fault::status(failure.code, status), failure.blame);
        Some(failure)
    }

    /// Reads the first frame of the body, unless it is an event stream: a failure before that frame can be retried.
    async fn first_frame(
        &self,
        about: &ResponseFacts,
        lease: &mut Lease,
        limit: Nanos,
    ) -> Result<Option<Bytes>, SendError> {
        if about.is_events || lease.link.is_end() {
            return Ok(None);
        }
        let frame = poll_fn(|cx| lease.link.poll_frame(cx));
        match self.exchange.limit(limit, frame).await {
            Ok(Some(Ok(first))) => Ok(Some(first)),
            Ok(None) => Ok(None),
            Ok(Some(Err(fault))) => Err(fault.into()),
            Err(Elapsed) => Err(self.timed_out("body")),
        }
    }

    /// The error of a try that has waited for `what` until its limit.
    fn timed_out(&self, what: &str) -> SendError {
        let waited = self.wait_began.map_or(0, |began| clock::now() - began);
        SendError::TimedOut(Fault::timed_out(what, Duration::from_nanos(waited)))
    }

    /// Cools a target down for `span`: its backend, for the model that it was sent.
    fn cool_down(&self, target: TargetId, span: Duration) {
        let now = clock::now();
        let target = &self.snapshot.route(&self.ask).targets[target];
        let until = now + clock::nanos(span);
        self.snapshot.upstream(target).state.breaker.cool(target.key(self.ask.model), until, now);
    }

    /// Closes a backend for a while because it refuses its key.
    fn close_for_bad_key(&self, upstream: &Upstream, status: u16) {
        if upstream.state.breaker.bad_key(clock::now()) {
            let shared = self.gateway.shared();
            shared.announce(upstream, Change::Misconfigured, &format!("request: HTTP {status}"));
        }
    }

    /// Records a failed try at the backend and in the request's record.
    fn record_failure(&mut self, upstream: &Arc<Upstream>, fault: Fault, blame: bool) {
        self.gateway.record_failure(upstream, &fault, blame);
        self.record.failed.push((upstream.clone(), fault));
    }
}
