//! The attempt loop: pick, patch, send, judge, again. It ends with an answer to relay or with an error.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::HeaderMap;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue, RETRY_AFTER};
use http::response::Parts;

use super::Gateway;
use super::admit::{admit, wait_for_backend};
use super::intake::ChatRequest;
use crate::clock;
use crate::error::{Code, GatewayError};
use crate::policy::balance::BackendId;
use crate::policy::patch::{model_splice, slices};
use crate::policy::queue::Slot;
use crate::policy::retry::{Outcome, backoff, cooling, judge, retry_after_secs};
use crate::policy::{Nanos, SECOND, headers, quota};
use crate::server::io::Conn;
use crate::state::Pick;
use crate::telemetry::{Completion, Phase};
use crate::upstream::link::{Link, SendBody};
use crate::upstream::pool::Lease;
use crate::upstream::probe::announce;
use crate::upstream::send::{Answer, Outgoing, send};
use crate::upstream::{Ask, Closed, InFlight, Upstream};

/// Frames that are read of an answer nobody wants, to keep its connection.
const MAX_LEFTOVER: usize = 16;

/// An answer that goes to the client.
pub struct Delivery {
    /// Status and headers as they came.
    pub head: Parts,
    /// The connection, positioned behind the head, or behind `first`.
    pub lease: Lease,
    /// The place at the backend.
    pub entered: InFlight,
    /// The slot.
    pub slot: Slot,
    /// The body's first frame, where it was waited for.
    pub first: Option<Bytes>,
}

/// What the last try left, should there be no further one.
enum Last {
    Answer { head: Box<Parts>, lease: Lease, entered: InFlight },
    Error(GatewayError),
}

/// A try's result that is no delivery: why, and what could be delivered all the same.
struct Failed {
    code: Code,
    last: Last,
    /// Counts against the backend.
    blame: bool,
    /// No other backend is asked.
    fatal: bool,
}

/// One request's way through the backends.
pub struct Attempts<'a> {
    /// The worker's gateway.
    pub gateway: &'a Gateway,
    /// The client's connection, for time limits.
    pub conn: &'a Conn,
    /// The client's headers.
    pub headers: &'a HeaderMap,
    /// The client's body.
    pub chat: &'a ChatRequest,
    /// What it asks for.
    pub ask: Ask,
    /// The record.
    pub completion: &'a mut Completion,
    /// When the first byte must be on its way.
    pub deadline: Nanos,
}

impl Attempts<'_> {
    /// Tries until there is an answer to deliver.
    ///
    /// # Errors
    /// What to tell the client where there is none.
    pub async fn run(mut self, slot: Slot) -> Result<Delivery, GatewayError> {
        let mut slot = Some(slot);
        let mut last = None;
        // In the first round backends are picked; later rounds go through them in the same order.
        let (mut order, mut tried) = (Vec::<BackendId>::new(), Vec::<BackendId>::new());
        let mut rounds = 0;
        loop {
            let now = clock::now();
            if self.completion.tries > 0 && !self.may_retry(now) {
                return self.give_up(last, slot);
            }
            let picked = match self.pick(now, rounds, &order, &tried) {
                Pick::Backend(entered) => Some((entered, false)),
                Pick::Out => {
                    self.gateway.snapshot().pick_in_panic(now, self.ask).map(|entered| (entered, true))
                }
                Pick::Nobody => None,
                Pick::Busy { opens } => {
                    drop(slot.take());
                    wait_for_backend(self.gateway, self.conn, self.completion, opens, self.deadline).await?;
                    slot = Some(admit(self.gateway, self.conn, self.completion, self.deadline).await?);
                    continue;
                }
                Pick::Tried => {
                    if !self.may_come_again(&order) || !self.back_off(rounds).await {
                        return self.give_up(last, slot);
                    }
                    tried.clear();
                    rounds += 1;
                    continue;
                }
            };
            let Some((entered, panic)) = picked else { return Err(GatewayError::NoBackend) };
            if self.completion.tries > 0 {
                self.count_retry(now, &last);
            }
            if panic {
                self.gateway.recorder().lane().panic_picks.add(1);
            }
            let id = self.gateway.snapshot().id_of(entered.upstream());
            let limit = self.share(now, &tried, id);
            self.let_go(last.take());
            let failed = match (self.try_one(entered, limit).await, slot.take()) {
                (Ok((head, lease, entered, first)), Some(slot)) => {
                    return Ok(Delivery { head, lease, entered, slot, first });
                }
                (Ok(_), None) => return Err(GatewayError::Internal),
                (Err(failed), held) => {
                    slot = held;
                    *failed
                }
            };
            last = Some((failed.code, failed.last));
            if failed.fatal || panic {
                return self.give_up(last, slot);
            }
            tried.extend(id);
            if rounds == 0 {
                order.extend(id);
            }
        }
    }

    /// Drops an answer that will not be delivered; its connection serves on if the rest of it is here already.
    fn let_go(&self, last: Option<(Code, Last)>) {
        let Some((_, Last::Answer { mut lease, .. })) = last else { return };
        let mut cx = Context::from_waker(Waker::noop());
        for _ in 0..MAX_LEFTOVER {
            match lease.link.poll_frame(&mut cx) {
                Poll::Ready(Some(Ok(_))) => {}
                Poll::Ready(None) => return self.gateway.pool().park(lease, clock::now()),
                Poll::Ready(Some(Err(_))) | Poll::Pending => return,
            }
        }
    }

    fn pick(&self, now: Nanos, rounds: u32, order: &[BackendId], tried: &[BackendId]) -> Pick {
        let snapshot = self.gateway.snapshot();
        if rounds == 0 {
            return snapshot.pick(now, self.ask, tried);
        }
        let rest: Vec<_> = order.iter().copied().filter(|id| !tried.contains(id)).collect();
        snapshot.pick_in_order(now, self.ask, &rest).map_or(Pick::Tried, Pick::Backend)
    }

    /// Whether one of those tried may be asked once more.
    fn may_come_again(&self, order: &[BackendId]) -> bool {
        let (snapshot, now) = (self.gateway.snapshot(), clock::now());
        order.iter().filter_map(|id| snapshot.backends.get(*id)).any(|b| b.check(now, self.ask).is_ok())
    }

    /// Whether the rules allow one more try.
    fn may_retry(&self, now: Nanos) -> bool {
        self.completion.tries <= self.gateway.config().retry.max_retries
            && now < self.deadline
            && self.gateway.shared().budget.has_room(now)
    }

    /// Counts a further try, by the backend whose failure led to it.
    fn count_retry(&self, now: Nanos, last: &Option<(Code, Last)>) {
        self.gateway.shared().budget.withdraw(now);
        if let (Some((reason, _)), Some((upstream, _))) = (last, self.completion.failed.last()) {
            upstream.lanes[self.gateway.recorder().worker].retried(*reason);
        }
    }

    /// Waits before the next round. `false`: there is no time, or no try, left for one.
    async fn back_off(&mut self, rounds: u32) -> bool {
        let retry = &self.gateway.config().retry;
        let wait = backoff(retry.base_delay, retry.max_delay, rounds, self.gateway.random());
        let since = clock::now();
        if since + clock::nanos(wait) >= self.deadline {
            return false;
        }
        self.completion.phase = Phase::Backoff;
        self.conn.alarm.set(self.deadline);
        tokio::time::sleep(wait).await;
        self.completion.others += clock::now() - since;
        true
    }

    /// Until when a try may wait for its head: its share of what is left, by the backends still untried.
    fn share(&self, now: Nanos, tried: &[BackendId], id: Option<BackendId>) -> Nanos {
        let snapshot = self.gateway.snapshot();
        let untried = |(other, b): (BackendId, &Arc<Upstream>)| {
            Some(other) != id
                && !tried.contains(&other)
                && b.conf.weight > 0
                && b.check(now, self.ask).is_ok()
        };
        let others = snapshot.backends.iter().enumerate().filter(|b| untried((b.0, b.1))).count() as u64;
        now + self.deadline.saturating_sub(now) / (others + 1)
    }

    /// Nothing further is tried: the last answer as it came, or the last error.
    fn give_up(&mut self, last: Option<(Code, Last)>, slot: Option<Slot>) -> Result<Delivery, GatewayError> {
        match (last, slot) {
            (Some((_, Last::Answer { mut head, lease, entered })), Some(slot)) => {
                if head.status == http::StatusCode::TOO_MANY_REQUESTS {
                    let secs = retry_after_secs(self.soonest());
                    head.headers.insert(RETRY_AFTER, HeaderValue::from(secs));
                    head.headers.remove("retry-after-ms");
                }
                // The answer that is delivered did not fail for the log's purposes: its status says it all.
                self.completion.failed.pop();
                Ok(Delivery { head: *head, lease, entered, slot, first: None })
            }
            (Some((_, Last::Error(error))), _) => Err(error),
            _ => Err(GatewayError::UpstreamTimeout),
        }
    }

    /// Time until the first of all backends that cool for this model reopens.
    fn soonest(&self) -> Nanos {
        let (snapshot, now) = (self.gateway.snapshot(), clock::now());
        let opens = |b: &Arc<Upstream>| match b.check(now, self.ask) {
            Err(Closed::Until(at)) => Some(at - now),
            _ => None,
        };
        snapshot.backends.iter().filter_map(opens).min().unwrap_or(SECOND)
    }

    /// One try at one backend.
    async fn try_one(
        &mut self,
        entered: InFlight,
        limit: Nanos,
    ) -> Result<(Parts, Lease, InFlight, Option<Bytes>), Box<Failed>> {
        let upstream = entered.upstream().clone();
        self.completion.tries += 1;
        self.completion.phase = Phase::Waiting;
        let since = clock::now();
        let outgoing = self.outgoing(&upstream);
        let (gateway, conn) = (self.gateway, self.conn);
        let completion = &mut *self.completion;
        let on_connect =
            |opening| completion.phase = if opening { Phase::Connecting } else { Phase::Waiting };
        let sending = send(gateway.pool(), gateway.recorder().worker, &upstream, outgoing, on_connect);
        let answer = conn.alarm.limit(limit, sending).await.unwrap_or(Err(Code::UpstreamTimeout));
        if gateway.is_cut() {
            return Err(Box::new(cut()));
        }
        let result = match answer {
            Ok(answer) => self.judge(answer, entered, limit).await,
            Err(code) => Err(broken(code)),
        };
        self.completion.others += clock::now() - since;
        if let Err(failed) = &result {
            self.note(&upstream, failed);
        }
        result.map_err(Box::new)
    }

    /// What goes to `upstream`: fresh headers, and the body with its default model spliced in where none is named.
    fn outgoing(&self, upstream: &Upstream) -> Outgoing {
        let mut to = HeaderMap::with_capacity(24);
        to.insert(HOST, upstream.host.clone());
        headers::to_backend(self.headers, upstream.conf.forward_authorization, &mut to);
        if let Some(key) = &upstream.authorization {
            to.insert(AUTHORIZATION, key.clone());
        }
        to.insert(headers::X_REQUEST_ID, self.completion.request_id.clone());
        let splice = model_splice(&self.chat.fields, upstream.model.as_ref());
        let body = SendBody::new(slices(&self.chat.chunks, splice.as_ref()));
        let target = upstream.target(self.ask.endpoint).cloned().unwrap_or_default();
        Outgoing { target, headers: to, body }
    }

    /// Judges an answer by its status; of one that is delivered and no stream, waits for the first frame too.
    async fn judge(
        &mut self,
        answer: Answer,
        entered: InFlight,
        limit: Nanos,
    ) -> Result<(Parts, Lease, InFlight, Option<Bytes>), Failed> {
        let Answer { head, mut lease } = answer;
        let upstream = entered.upstream();
        if let Some(span) = quota::exhausted(&head.headers, SystemTime::now()) {
            self.cool(upstream, span);
        }
        let fail = |code, blame| {
            move |head: Parts, lease, entered| Failed {
                code,
                blame,
                fatal: false,
                last: Last::Answer { head: Box::new(head), lease, entered },
            }
        };
        match judge(head.status.as_u16(), upstream.authorization.is_some()) {
            Outcome::Deliver => {}
            Outcome::Failure => return Err(fail(Code::UpstreamError, true)(head, lease, entered)),
            Outcome::Busy => {
                self.cool(upstream, cooling(&head.headers, SystemTime::now()));
                return Err(fail(Code::UpstreamRateLimited, false)(head, lease, entered));
            }
            Outcome::BadKey => {
                if upstream.breaker.bad_key(clock::now()) {
                    let text =
                        format!("{} answered {} to its api_key", upstream.name(), head.status.as_u16());
                    self.gateway.shared().log.event("error", "backend_misconfigured", &text);
                    self.gateway.shared().fleet_changed.notify_one();
                }
                let last = Last::Error(GatewayError::UpstreamAuth);
                return Err(Failed { code: Code::UpstreamAuthError, last, blame: false, fatal: false });
            }
            Outcome::Redirect => {
                let last = Last::Error(GatewayError::UpstreamRedirect);
                return Err(Failed { code: Code::UpstreamRedirect, last, blame: false, fatal: true });
            }
        }
        if is_event_stream(&head.headers) || lease.link.is_end() {
            return Ok((head, lease, entered, None));
        }
        let frame = poll_fn(|cx| lease.link.poll_frame(cx));
        match self.conn.alarm.limit(limit, frame).await {
            Ok(Some(Ok(first))) => Ok((head, lease, entered, Some(first))),
            Ok(None) => Ok((head, lease, entered, None)),
            Ok(Some(Err(_))) => Err(broken(Code::UpstreamUnreachable)),
            Err(_) => Err(broken(Code::UpstreamTimeout)),
        }
    }

    /// Leaves a backend alone, with the model that it was asked for.
    fn cool(&self, upstream: &Upstream, span: Duration) {
        let now = clock::now();
        upstream.breaker.cool(upstream.sent_model(self.ask.model), now + clock::nanos(span), now);
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
            upstream.penalty.add(clock::now());
            if let Some(change) = upstream.breaker.failure(self.gateway.snapshot().thresholds()) {
                announce(&recorder.shared, upstream, change, "a request");
            }
        }
    }
}

/// A try that the way out has ended: nobody's fault, and nobody is asked any more.
fn cut() -> Failed {
    let last = Last::Error(GatewayError::Draining);
    Failed { code: Code::Draining, last, blame: false, fatal: true }
}

/// A try that ended without an answer.
fn broken(code: Code) -> Failed {
    let error = match code {
        Code::UpstreamInvalidResponse => GatewayError::UpstreamInvalid,
        Code::UpstreamTimeout => GatewayError::UpstreamTimeout,
        Code::UpstreamTlsError => GatewayError::UpstreamTls,
        _ => GatewayError::UpstreamUnreachable,
    };
    Failed { code, last: Last::Error(error), blame: true, fatal: false }
}

/// Whether an answer is a stream of events, whatever was asked for.
pub fn is_event_stream(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
    let name = b"text/event-stream";
    kind.len() >= name.len() && kind[..name.len()].eq_ignore_ascii_case(name)
}
