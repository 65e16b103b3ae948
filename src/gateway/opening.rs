//! Opens a response: reads the beginning of its body, until it is sure that the response is an answer.
//!
//! A stream is held back until its first content, since another target can still be asked before that. A short JSON
//! body is read as a whole, since it may be an error in spite of its status.

use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};
use http::response::Parts;

use crate::client::exchange::Exchange;
use crate::clock;
use crate::code::Code;
use crate::gateway::Gateway;
use crate::gateway::attempt::Attempts;
use crate::gateway::buffered::MemoryHold;
use crate::gateway::held::Held;
use crate::gateway::state::Generation;
use crate::http1::headers::ResponseFacts;
use crate::json::patch::Splice;
use crate::policy::dispatch::{Dispatch, Unfit};
use crate::policy::known_ids::MadeBy;
use crate::policy::route::TargetId;
use crate::protocol::body_class::{BodyClass, classify_body, needs_other_model};
use crate::protocol::endpoint::StreamFormat;
use crate::protocol::event_stream::{EventStream, MAX_HELD, StreamEnd, is_event_stream};
use crate::protocol::rate_limits;
use crate::time::{Nanos, SECOND};
use crate::upstream::fault::Fault;
use crate::upstream::fleet::{Ask, View};
use crate::upstream::in_flight::InFlight;
use crate::upstream::link::Link;
use crate::upstream::pool::Lease;
use crate::upstream::send::SendError;

/// How long the rest of a short JSON body may take until its beginning goes out.
const MAX_BODY_WAIT: Nanos = 10 * SECOND;

/// How long the body of an error may take that Zap reads for its own use.
const MAX_ERROR_WAIT: Nanos = SECOND;

/// The beginning of a response that is an answer.
pub(super) struct Opening {
    /// The beginning of the body; `None` if nothing has been read.
    pub(super) first: Option<Bytes>,
    /// The events of a readable stream, which have seen `first`.
    pub(super) events: Option<Box<EventStream>>,
}

/// A target that is asked, and the request there.
pub(super) struct Asked<'f> {
    /// The target.
    pub(super) target: TargetId,
    /// The request at the backend.
    pub(super) in_flight: &'f InFlight,
    /// The splice that asks for the token counts; `None` if the request does not ask.
    pub(super) usage: Option<Splice>,
    /// When the request was sent; the time of the try's begin until then.
    pub(super) sent: Nanos,
}

impl Asked<'_> {
    /// The state of a stream of the target. `is_traced`: the request is recorded.
    fn events(&self, format: StreamFormat, is_traced: bool) -> EventStream {
        let key = self.in_flight.upstream().conf.api_key.as_ref().map(|key| key.shared());
        EventStream::new(format, self.usage.is_some()).without_key(key).noting(is_traced)
    }
}

/// Why a wait for the backend has ended without a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stopped {
    /// The target was ejected meanwhile, and another one is left.
    Ejected,
    /// The time is up.
    Elapsed,
}

/// Why a response is not delivered now.
pub(super) enum Unopened {
    /// The response is an error. `is_whole`: `body` is the whole error, found inside a success; otherwise it is the
    /// beginning of a 4xx as it came.
    Error { status: u16, body: Bytes, is_whole: bool },
    /// There is no answer.
    Failed(Problem),
}

/// Why a try has no answer.
#[derive(Debug)]
pub(super) enum Problem {
    /// The request could not be sent, or no head came.
    Send(SendError),
    /// The wait ended.
    Stopped(Stopped),
    /// A head came, and then no answer.
    Unfit(Unfit, Fault),
}

impl From<SendError> for Problem {
    fn from(error: SendError) -> Self {
        Problem::Send(error)
    }
}

impl From<Problem> for Unopened {
    fn from(problem: Problem) -> Self {
        Unopened::Failed(problem)
    }
}

/// The parts of a request that a wait for a backend uses.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) gateway: &'a Rc<Gateway>,
    pub(super) exchange: &'a Exchange,
    pub(super) snapshot: &'a Generation,
    pub(super) ask: &'a Ask<'a>,
    pub(super) dispatch: &'a Dispatch,
}

impl Place<'_> {
    /// Whether another target is left if the present try fails.
    pub(super) fn has_next(&self) -> bool {
        let now = clock::now();
        self.dispatch.has_next(now, &self.view(now), &self.gateway.shared().budget)
    }

    /// Takes the right to another try, because the present one is about to be given up. Returns `false` if none is
    /// left.
    pub(super) fn claim_next(&self) -> bool {
        let now = clock::now();
        self.dispatch.claim_next(now, &self.view(now), &self.gateway.shared().budget)
    }

    fn view(&self, now: Nanos) -> View<'_> {
        View { snapshot: self.snapshot, ask: self.ask, now, tickets: &[], granted: None, is_waiting: false }
    }

    /// Waits for `work` until `at`, or, if `may_move`, until the target is ejected and another one is left.
    ///
    /// # Errors
    /// Returns the error of `work`, or why the wait ended without its result.
    pub(super) async fn wait<T, E>(
        &self,
        at: Nanos,
        (in_flight, may_move): (&InFlight, bool),
        mut work: impl FnMut(&mut Context<'_>) -> Poll<Result<T, E>>,
    ) -> Result<T, Problem>
    where
        Problem: From<E>,
    {
        self.exchange.set_deadline(at);
        poll_fn(|cx| match work(cx) {
            Poll::Ready(out) => Poll::Ready(out.map_err(Problem::from)),
            Poll::Pending if self.exchange.take_timeout() => {
                Poll::Ready(Err(Problem::Stopped(Stopped::Elapsed)))
            }
            Poll::Pending => {
                if self.exchange.take_nudge() {
                    in_flight.note_silence(clock::now());
                }
                match may_move && in_flight.is_ejected() && self.claim_next() {
                    true => Poll::Ready(Err(Problem::Stopped(Stopped::Ejected))),
                    false => Poll::Pending,
                }
            }
        })
        .await
    }
}

impl Attempts<'_> {
    fn body<'b>(&'b self, lease: &'b mut Lease, asked: &'b Asked<'b>) -> BodyStart<'b> {
        let place = Place {
            gateway: self.gateway,
            exchange: self.exchange,
            snapshot: &self.snapshot,
            ask: &self.ask,
            dispatch: &self.dispatch,
        };
        BodyStart { place, lease, asked, deadline: self.deadline, may_move: true, hold: None }
    }

    /// Reads the body of an error that may say how long to wait, why the key is refused, or what is not there. `None`
    /// if the status does not call for it, or nothing came in time.
    pub(super) async fn error_text(
        &self,
        head: &Parts,
        lease: &mut Lease,
        asked: &Asked<'_>,
    ) -> Option<Bytes> {
        let is_wanted = match head.status.as_u16() {
            429 => rate_limits::retry_after(&head.headers, SystemTime::now).is_none(),
            401 => asked.in_flight.upstream().conf.api_key.is_some(),
            400 => self.ask.made_by == MadeBy::Unknown,
            _ => false,
        };
        if !is_wanted {
            return None;
        }
        let mut body = self.body(lease, asked);
        body.deadline = body.deadline.min(clock::now() + MAX_ERROR_WAIT);
        let first = body.frame(body.deadline).await.ok()??;
        Some(body.whole(first.clone()).await.map_or(first, |(text, _)| text))
    }

    /// Reads the beginning of a response that may go to the client.
    ///
    /// # Errors
    /// Returns why the response is not delivered, unless there is no other.
    pub(super) async fn open(
        &self,
        head: &Parts,
        about: &mut ResponseFacts,
        lease: &mut Lease,
        asked: &Asked<'_>,
    ) -> Result<Opening, Unopened> {
        let mut body = self.body(lease, asked);
        let status = head.status.as_u16();
        let is_success = status < 300;
        let format = self.ask.endpoint.api().map(|api| api.stream);
        let is_traced = self.record.is_traced();
        if is_success && about.is_events {
            return match format.filter(|_| !about.is_encoded) {
                Some(format) => body.stream(Box::new(asked.events(format, is_traced)), None).await,
                // Zap cannot classify this stream: its first byte commits the try.
                None => match body.first_byte().await? {
                    None if status != 204 => Err(empty()),
                    first => Ok(Opening { first, events: None }),
                },
            };
        }
        let Some(first) = body.frame(self.deadline).await? else {
            let is_empty = is_success && status != 204;
            return if is_empty { Err(empty()) } else { Ok(Opening { first: None, events: None }) };
        };
        if is_success
            && self.record.stream
            && !about.is_encoded
            && is_event_stream(&first)
            && let Some(format) = format
        {
            about.is_events = true;
            return body.stream(Box::new(asked.events(format, is_traced)), Some(first)).await;
        }
        let is_answer = |first| Ok(Opening { first: Some(first), events: None });
        match is_success {
            true if about.is_json && !about.is_encoded && begins_object(&first) => {}
            false if matches!(status, 400 | 404 | 422) && body.place.has_next() => {}
            _ => return is_answer(first),
        }
        let (text, is_whole) = body.whole(first).await?;
        if !is_success {
            return match needs_other_model(&text) {
                true => Err(Unopened::Error { status, body: text, is_whole: false }),
                false => is_answer(text),
            };
        }
        match if is_whole { classify_body(&text) } else { BodyClass::Answer } {
            BodyClass::Answer => is_answer(text),
            BodyClass::Empty => Err(empty()),
            BodyClass::Error(status) => Err(Unopened::Error { status, body: text, is_whole: true }),
        }
    }
}

/// Whether a body may be a JSON object. Some providers send white space until the answer is ready.
fn begins_object(first: &[u8]) -> bool {
    first.trim_ascii_start().first().is_none_or(|b| *b == b'{')
}

fn empty() -> Unopened {
    Problem::Unfit(Unfit::Empty, Fault::new(Code::UpstreamEmpty, "a success without content")).into()
}

/// A limit of time where 0 is none.
fn no_limit(span: Duration) -> Nanos {
    if span.is_zero() { Nanos::MAX } else { clock::nanos(span) }
}

/// The beginning of a body.
struct BodyStart<'a> {
    place: Place<'a>,
    lease: &'a mut Lease,
    asked: &'a Asked<'a>,
    /// The deadline of the request.
    deadline: Nanos,
    /// Whether the request goes to another target if this one is ejected: not while an answer is on its way.
    may_move: bool,
    /// The memory of what is held back; `None` if nothing is.
    hold: Option<MemoryHold>,
}

impl BodyStart<'_> {
    /// Takes the memory to hold `length` bytes back while more is read. Returns `false` if it is not left: what has
    /// come must go out then.
    fn may_hold(&mut self, length: usize) -> bool {
        let hold = self.hold.get_or_insert_with(|| MemoryHold::new(self.place.gateway.clone()));
        hold.reach(length as u64)
    }

    /// Reads a frame until `at`; `None` at the end of the body.
    async fn frame(&mut self, at: Nanos) -> Result<Option<Bytes>, Problem> {
        if self.lease.link.is_end() {
            return Ok(None);
        }
        let link = &mut self.lease.link;
        let frame = |cx: &mut Context<'_>| match link.poll_frame(cx) {
            Poll::Ready(Some(Ok(data))) => Poll::Ready(Ok(Some(data))),
            Poll::Ready(Some(Err(fault))) => Poll::Ready(Err(Problem::Unfit(Unfit::CutShort, fault))),
            Poll::Ready(None) => Poll::Ready(Ok(None)),
            Poll::Pending => Poll::Pending,
        };
        self.place.wait(at, (self.asked.in_flight, self.may_move), frame).await
    }

    /// Reads the rest of a short body. Returns also whether that is the whole body: it is not if the body is long, or
    /// takes its time, or no memory is left to hold it back.
    async fn whole(&mut self, first: Bytes) -> Result<(Bytes, bool), Problem> {
        let is_long = |n: usize, more: Option<u64>| n as u64 + more.unwrap_or(0) > MAX_HELD as u64;
        if self.lease.link.is_end() || is_long(first.len(), self.lease.link.remaining().exact()) {
            return Ok((first, self.lease.link.is_end()));
        }
        if !self.may_hold(first.len()) {
            return Ok((first, false));
        }
        let until = self.deadline.min(clock::now() + MAX_BODY_WAIT);
        self.may_move = false;
        let mut text = BytesMut::from(first);
        loop {
            match self.frame(until).await {
                Ok(Some(data)) => text.extend_from_slice(&data),
                Ok(None) => return Ok((text.freeze(), true)),
                Err(Problem::Stopped(Stopped::Elapsed)) => return Ok((text.freeze(), false)),
                Err(problem) => return Err(problem),
            }
            if is_long(text.len(), None) || !self.may_hold(text.len()) {
                return Ok((text.freeze(), false));
            }
        }
    }

    /// Reads the first frame of a stream that Zap cannot read; `None` at the end of the body.
    async fn first_byte(&mut self) -> Result<Option<Bytes>, Problem> {
        let mut token_by = self.token_by(self.place.has_next());
        loop {
            match self.frame(token_by.min(self.deadline)).await {
                Err(Problem::Stopped(Stopped::Elapsed)) if !self.place.gateway.is_cut() => {
                    let now = clock::now();
                    if now >= self.deadline || self.place.claim_next() {
                        return Err(self.silent(now));
                    }
                    token_by = Nanos::MAX;
                }
                result => return result,
            }
        }
    }

    /// When the first content must be there at the latest if another target is left.
    fn token_by(&self, has_next: bool) -> Nanos {
        let limit = no_limit(self.place.snapshot.config.timeouts.first_token);
        if has_next { self.asked.sent.saturating_add(limit) } else { Nanos::MAX }
    }

    /// No content has come in time.
    fn silent(&self, now: Nanos) -> Problem {
        let waited = Duration::from_nanos(now - self.asked.sent);
        Problem::Unfit(Unfit::Silent, Fault::timed_out("first token", waited))
    }

    /// Holds a stream back until its first content. Without another target, only until its first event, which may be an
    /// error. `first`: what has been read already.
    async fn stream(
        &mut self,
        mut events: Box<EventStream>,
        mut first: Option<Bytes>,
    ) -> Result<Opening, Unopened> {
        let config = &self.place.snapshot.config;
        let hold = clock::nanos(config.stream.hold);
        if hold == 0 {
            let first = first.map(|data| events.push(data));
            return Ok(Opening { first, events: Some(events) });
        }
        let mut has_next = self.place.has_next();
        let opened = clock::now();
        let mut token_by = self.token_by(has_next);
        let ping_at = opened.saturating_add(no_limit(config.stream.heartbeat));
        let mut held = Held::default();
        loop {
            let release_at = if token_by < Nanos::MAX { token_by } else { held.since.saturating_add(hold) };
            let at = release_at.min(ping_at).min(self.deadline);
            let frame = match first.take() {
                Some(first) => Ok(Some(first)),
                None => self.frame(at).await,
            };
            let is_end = match frame {
                Ok(Some(data)) => {
                    held.push(events.push(data));
                    false
                }
                Ok(None) => {
                    held.push(events.finish());
                    true
                }
                Err(Problem::Stopped(Stopped::Elapsed)) => {
                    let now = clock::now();
                    let is_late = now >= token_by && self.place.claim_next();
                    if is_late || now >= self.deadline {
                        return Err(self.silent(now).into());
                    }
                    if now < token_by || events.has_events() {
                        break;
                    }
                    // No other target is left by now: the time limit of the request alone counts.
                    (has_next, token_by) = (false, Nanos::MAX);
                    continue;
                }
                Err(problem) => return Err(problem.into()),
            };
            if let Some(error) = events.take_early_error() {
                return Err(Unopened::Error {
                    status: error.status,
                    body: error.body.into(),
                    is_whole: true,
                });
            }
            if !events.has_content() && (is_end || events.end() == Some(StreamEnd::Complete)) {
                return Err(empty());
            }
            if held.since == Nanos::MAX {
                held.since = clock::now();
            }
            let length = held.length + events.held();
            let is_due = events.has_content() || length > MAX_HELD || !has_next && events.has_events();
            if is_due || !self.may_hold(length) {
                break;
            }
        }
        Ok(Opening { first: held.finish(), events: Some(events) })
    }
}
