//! One try at one target: what it is sent, and what its answer means.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::HeaderMap;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderValue};
use http::response::Parts;

use super::attempt::{self, Attempts, Failed, Left};
use super::bug;
use crate::clock;
use crate::error::{Code, GatewayError};
use crate::policy::patch::{slices, splices};
use crate::policy::retry::{Outcome, cooling, judge};
use crate::policy::route::TargetId;
use crate::policy::{Nanos, advertised, headers};
use crate::server::alarm::Elapsed;
use crate::telemetry::Phase;
use crate::upstream::link::{Link, Message, write_header};
use crate::upstream::pool::{Lease, Pool};
use crate::upstream::probe::announce;
use crate::upstream::send::{Answer, SendError, Step, send};
use crate::upstream::{InFlight, Upstream};

/// Room in a head for what most clients' headers take.
const HEAD_ROOM: usize = 768;

/// An answer worth delivering.
type Good = (Parts, Lease, InFlight, Option<Bytes>);

impl Attempts<'_> {
    /// One try at one backend, which may last until `limit`.
    pub(super) async fn try_one(
        &mut self,
        target: TargetId,
        entered: InFlight,
        limit: Nanos,
    ) -> Result<Good, Box<Failed>> {
        let upstream = entered.upstream().clone();
        self.completion.tries += 1;
        self.completion.phase = Phase::Waiting;
        bug::here("try", &self.completion.request_id);
        let mut begun = None;
        let mut answer = self.ask_once(target, &entered, limit, Some(self.gateway.pool()), &mut begun).await;
        if matches!(answer, Err(SendError::Stale)) && !self.gateway.is_cut() {
            answer = self.ask_once(target, &entered, limit, None, &mut begun).await;
        }
        if self.gateway.is_cut() {
            return Err(Box::new(cut()));
        }
        let mut result = match answer {
            Ok(answer) => self.judge(target, answer, entered, limit).await,
            Err(SendError::Broken(code)) => Err(broken(code)),
            Err(SendError::Silent) => Err(silent()),
            Err(SendError::Exhausted) => Err(Failed { blame: false, ..broken(Code::UpstreamUnreachable) }),
            Err(SendError::Stale) => Err(broken(Code::UpstreamUnreachable)),
        };
        self.completion.others += begun.map_or(0, |begun| clock::now() - begun);
        if let Err(failed) = &mut result {
            self.note(&upstream, failed);
            if let Left::Answer(answer) = &mut failed.left {
                // The next try may be for this one again.
                answer.entered.leave_place();
            }
        }
        result.map_err(Box::new)
    }

    /// Sends the request and waits for the head of the answer until `limit`; on a fresh connection where there is no
    /// `pool`. `begun`: when the waiting for the backend began, unless it had before.
    async fn ask_once(
        &mut self,
        target: TargetId,
        entered: &InFlight,
        limit: Nanos,
        pool: Option<&Pool>,
        begun: &mut Option<Nanos>,
    ) -> Result<Answer, SendError> {
        let message = self.message(target, entered.upstream());
        let connect = self.snapshot.config.timeouts.connect;
        let completion = &mut *self.completion;
        let on_step = |step| match step {
            Step::Begun(now) => *begun = begun.or(Some(now)),
            Step::Connecting => completion.phase = Phase::Connecting,
            Step::Connected => {
                completion.phase = Phase::Waiting;
                entered.connected(clock::now());
            }
        };
        let worker = self.gateway.recorder().worker;
        // It is large, and would be moved into the limit.
        let sending = pin!(send(pool, worker, entered.upstream(), message, connect, on_step));
        self.conn.alarm.limit(limit, sending).await.unwrap_or(Err(SendError::Silent))
    }

    /// What goes to `upstream`: fresh headers, and the body with the target's model in and without what it refuses.
    fn message(&self, target: TargetId, upstream: &Upstream) -> Message {
        let begin = upstream.begin(self.ask.endpoint).unwrap_or_default();
        let mut head = Vec::with_capacity(begin.len() + HEAD_ROOM);
        head.extend_from_slice(begin);
        headers::to_backend(self.headers, upstream.conf.forward_authorization, |name, value| {
            if !upstream.has_own(name) {
                write_header(&mut head, name, value.as_bytes());
            }
        });
        write_header(&mut head, &headers::X_REQUEST_ID, self.completion.request_id.as_bytes());
        let target = &self.snapshot.route(&self.ask).targets[target];
        let model = target.text(self.ask.model);
        let drops = |member| self.snapshot.drops(target.backend, member);
        let splices = splices(&self.chat.fields, model.as_deref(), drops);
        let body = slices(&self.chat.chunks, splices);
        let length: usize = body.iter().map(Bytes::len).sum();
        write_header(&mut head, &CONTENT_LENGTH, itoa::Buffer::new().format(length).as_bytes());
        head.extend_from_slice(b"\r\n");
        Message { head, body }
    }

    /// Judges an answer by its status; of one that is delivered and no stream, waits for the first frame too.
    async fn judge(
        &mut self,
        target: TargetId,
        answer: Answer,
        entered: InFlight,
        limit: Nanos,
    ) -> Result<Good, Failed> {
        let Answer { head, mut lease } = answer;
        let upstream = entered.upstream();
        if let Some(span) = advertised::exhausted(&head.headers, SystemTime::now) {
            self.cool(target, span);
        }
        let fail = |code, head, lease, entered| {
            let left = Left::Answer(Box::new(attempt::Answer { head, lease, entered }));
            Failed { code, blame: false, fatal: false, once: false, left }
        };
        match judge(head.status.as_u16(), upstream.conf.api_key.is_some()) {
            Outcome::Deliver => {}
            Outcome::Failure => {
                return Err(Failed { blame: true, ..fail(Code::UpstreamError, head, lease, entered) });
            }
            Outcome::Refused => {
                return Err(Failed { once: true, ..fail(Code::UpstreamRefused, head, lease, entered) });
            }
            Outcome::Busy => {
                self.cool(target, cooling(&head.headers, SystemTime::now()));
                return Err(fail(Code::UpstreamRateLimited, head, lease, entered));
            }
            Outcome::BadKey => {
                if upstream.live.breaker.bad_key(clock::now()) {
                    let text =
                        format!("{} answered {} to its api_key", upstream.name(), head.status.as_u16());
                    self.gateway.shared().log.event("error", "backend_misconfigured", &text);
                    self.gateway.shared().fleet_changed.notify_one();
                }
                let left = Left::Error(GatewayError::UpstreamAuth);
                return Err(Failed { blame: false, left, ..broken(Code::UpstreamAuthError) });
            }
            Outcome::Redirect => {
                let left = Left::Error(GatewayError::UpstreamRedirect);
                return Err(Failed { blame: false, fatal: true, left, ..broken(Code::UpstreamRedirect) });
            }
        }
        if is_event_stream(&head.headers) || lease.link.is_end() {
            return Ok((head, lease, entered, None));
        }
        let frame = poll_fn(|cx| lease.link.poll_frame(cx));
        match self.conn.alarm.limit(limit, frame).await {
            Ok(Some(Ok(first))) => Ok((head, lease, entered, Some(first))),
            Ok(None) => Ok((head, lease, entered, None)),
            Ok(Some(Err(code))) => Err(broken(code)),
            Err(Elapsed) => Err(silent()),
        }
    }

    /// Leaves a target alone: its backend, with the model that it was sent.
    fn cool(&self, target: TargetId, span: Duration) {
        let now = clock::now();
        let target = &self.snapshot.route(&self.ask).targets[target];
        let until = now + clock::nanos(span);
        self.snapshot.upstream(target).live.breaker.cool(target.key(self.ask.model), until, now);
    }

    /// Counts a failed try.
    fn note(&mut self, upstream: &Arc<Upstream>, failed: &Failed) {
        let recorder = self.gateway.recorder();
        if failed.code != Code::UpstreamRedirect {
            upstream.lanes[recorder.worker].failed(failed.code);
        }
        upstream.note_error(failed.code);
        self.completion.failed.push((upstream.clone(), failed.code));
        if failed.blame {
            upstream.live.penalty.add(clock::now());
            if let Some(change) = upstream.live.breaker.failure(self.snapshot.thresholds()) {
                announce(&recorder.shared, upstream, change, "a request");
            }
        }
    }
}

/// A try that the way out has ended: nobody's fault, and nobody is asked any more.
fn cut() -> Failed {
    let left = Left::Error(GatewayError::Draining);
    Failed { code: Code::Draining, left, blame: false, fatal: true, once: true }
}

/// A try that let its time pass.
fn silent() -> Failed {
    Failed { once: true, ..broken(Code::UpstreamTimeout) }
}

/// A try that ended without an answer.
fn broken(code: Code) -> Failed {
    let error = match code {
        Code::UpstreamInvalidResponse => GatewayError::UpstreamInvalid,
        Code::UpstreamTimeout => GatewayError::UpstreamTimeout,
        Code::UpstreamTlsError => GatewayError::UpstreamTls,
        _ => GatewayError::UpstreamUnreachable,
    };
    Failed { code, left: Left::Error(error), blame: true, fatal: false, once: false }
}

/// Whether an answer is a stream of events, whatever was asked for.
pub fn is_event_stream(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
    let name = b"text/event-stream";
    kind.len() >= name.len() && kind[..name.len()].eq_ignore_ascii_case(name)
}
