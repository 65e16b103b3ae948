//! One try at one target: what it is sent, and what its answer means.

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
use crate::gateway::attempt::{Attempts, Kept};
use crate::gateway::failpoint;
use crate::http1::headers;
use crate::http1::headers::About;
use crate::json::patch::{slices, splices};
use crate::policy::breaker::Change;
use crate::policy::dispatch::{Dispatch, Event, Failure, Mark, Verdict};
use crate::policy::retry::cooling;
use crate::policy::route::TargetId;
use crate::protocol::rate_limits;
use crate::telemetry::Phase;
use crate::time::Nanos;
use crate::upstream::Upstream;
use crate::upstream::fault::Fault;
use crate::upstream::in_flight::InFlight;
use crate::upstream::link::{Link, WireRequest, write_header};
use crate::upstream::pool::Lease;
use crate::upstream::send::{SendError, Source, Step, UpstreamAnswer, send};

/// Room in a head for what most clients' headers take.
const HEAD_ROOM: usize = 768;

/// An answer worth delivering.
type Good = (Parts, About, Lease, InFlight, Option<Bytes>);

/// The answer of a try that failed, if it is kept.
type Bad = Option<Box<Kept>>;

impl Attempts<'_> {
    /// One try at one target, which may last until `limit`.
    pub(super) async fn try_one(
        &mut self,
        target: TargetId,
        entered: InFlight,
        limit: Nanos,
        dispatch: &mut Dispatch,
    ) -> Result<Good, Bad> {
        self.record.tries += 1;
        self.record.phase = Phase::Waiting;
        failpoint::here("try", &self.record.request_id);
        let upstream = entered.upstream().clone();
        self.begun = None;
        let mut answer = self.ask_once(target, &entered, limit, true).await;
        if matches!(answer, Err(SendError::Stale)) && !self.gateway.is_cut() {
            answer = self.ask_once(target, &entered, limit, false).await;
        }
        let failed = match answer {
            Ok(UpstreamAnswer { mut head, mut lease }) if !self.gateway.is_cut() => {
                if let Some(failure) = self.judge(target, &head, &upstream, dispatch) {
                    self.stop_waiting();
                    return Err(failure.keep.then(|| self.keep(head, lease, entered)));
                }
                let about = headers::to_client(&mut head.headers);
                match self.first_frame(&about, &mut lease, limit).await {
                    Ok(first) => {
                        self.stop_waiting();
                        return Ok((head, about, lease, entered, first));
                    }
                    Err(error) => error,
                }
            }
            Ok(_) => SendError::Broken(Fault::cut()),
            Err(error) => error,
        };
        self.stop_waiting();
        let (event, fault) = match failed {
            _ if self.gateway.is_cut() => (Event::Cut, Fault::cut()),
            SendError::Broken(fault) => (Event::Broke(fault.kind), fault),
            SendError::Late(fault) => (Event::TimedOut, fault),
            SendError::Exhausted(fault) => (Event::Exhausted, fault),
            SendError::Stale => (Event::Broke(Code::UpstreamUnreachable), Fault::closed()),
        };
        if let Verdict::Failed(failure) = dispatch.on(event) {
            self.account(&upstream, fault, failure.blame);
        }
        Err(None)
    }

    /// The backend has answered, or will not: the time since it `begun` was its own.
    fn stop_waiting(&mut self) {
        self.record.others += self.begun.map_or(0, |begun| clock::now() - begun);
    }

    fn keep(&self, head: Parts, lease: Lease, mut entered: InFlight) -> Box<Kept> {
        // The next try may be for this target again.
        entered.leave_place();
        Box::new(Kept { head, lease, entered, number: self.record.tries })
    }

    /// Sends the request and waits for the head of the answer until `limit`; on a fresh connection unless it may `reuse`
    /// one. `begun`: when the waiting for the backend began, unless it had before.
    async fn ask_once(
        &mut self,
        target: TargetId,
        entered: &InFlight,
        limit: Nanos,
        reuse: bool,
    ) -> Result<UpstreamAnswer, SendError> {
        let message = self.message(target, entered.upstream());
        let source =
            Source { pool: self.gateway.pool(), reuse, limit: self.snapshot.config.timeouts.connect };
        let (record, begun) = (&mut *self.record, &mut self.begun);
        let on_step = |step| match step {
            Step::Begun(now) => *begun = begun.or(Some(now)),
            Step::Connecting => record.phase = Phase::Connecting,
            Step::Sending => {
                record.phase = Phase::Waiting;
                entered.sent();
            }
        };
        let answer = {
            // It is large, and would be moved into the limit.
            let sending = pin!(send(source, entered.upstream(), message, on_step));
            self.exchange.limit(limit, sending).await
        };
        answer.unwrap_or_else(|Elapsed| Err(self.late("answer")))
    }

    /// What goes to `upstream`: fresh headers, and the body with the target's model in and without what it refuses.
    fn message(&self, target: TargetId, upstream: &Upstream) -> WireRequest {
        let begin = upstream.begin(self.ask.endpoint).unwrap_or_default();
        let mut head = Vec::with_capacity(begin.len() + HEAD_ROOM);
        head.extend_from_slice(begin);
        headers::to_backend(self.headers, upstream.conf.forward_authorization, |name, value| {
            if !upstream.has_own(name) {
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

    /// Judges an answer by its status: why it is not to be delivered, if it is not.
    fn judge(
        &mut self,
        target: TargetId,
        head: &Parts,
        upstream: &Arc<Upstream>,
        dispatch: &mut Dispatch,
    ) -> Option<Failure> {
        let (status, own_key) = (head.status.as_u16(), upstream.conf.api_key.is_some());
        // A refusal closes nobody: one client's request could close the backend for all with it.
        if (status < 400 || status == 429)
            && let Some(span) = rate_limits::exhausted(&head.headers, SystemTime::now)
        {
            self.cool(target, span);
        }
        let Verdict::Failed(failure) = dispatch.on(Event::Head { status, own_key }) else { return None };
        match failure.mark {
            Some(Mark::Cool) => self.cool(target, cooling(&head.headers, SystemTime::now())),
            Some(Mark::BadKey) => self.close_for_key(upstream, status),
            None => {}
        }
        self.account(upstream, Fault::status(failure.code, status), failure.blame);
        Some(failure)
    }

    /// The first frame of an answer that is no stream of events, so that one which breaks there can be tried again.
    async fn first_frame(
        &self,
        about: &About,
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
            Err(Elapsed) => Err(self.late("body")),
        }
    }

    /// `what` has not come in time.
    fn late(&self, what: &str) -> SendError {
        let waited = clock::now() - self.begun.unwrap_or(clock::now());
        SendError::Late(Fault::timed_out(what, Duration::from_nanos(waited)))
    }

    /// Leaves a target alone: its backend, with the model that it was sent.
    fn cool(&self, target: TargetId, span: Duration) {
        let now = clock::now();
        let target = &self.snapshot.route(&self.ask).targets[target];
        let until = now + clock::nanos(span);
        self.snapshot.upstream(target).state.breaker.cool(target.key(self.ask.model), until, now);
    }

    /// The backend refuses its key: it is closed for a while.
    fn close_for_key(&self, upstream: &Upstream, status: u16) {
        if upstream.state.breaker.bad_key(clock::now()) {
            let shared = self.gateway.shared();
            shared.announce(upstream, Change::Misconfigured, &format!("request: HTTP {status}"));
        }
    }

    fn account(&mut self, upstream: &Arc<Upstream>, fault: Fault, blame: bool) {
        self.gateway.account(upstream, &fault, blame);
        self.record.failed.push((upstream.clone(), fault));
    }
}
