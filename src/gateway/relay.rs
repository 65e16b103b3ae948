//! Relays a response body from a backend to the client, frame by frame.
//!
//! A relay owns what the request still holds: its slot, its place at the backend, the upstream connection and the
//! record. All are released when the response ends, the backend fails or the client disconnects.
//!
//! The message says when a stream is over, not the transport: at its terminal event the slot and the place are free,
//! and the backend has succeeded or failed. What follows is passed on for a moment, and is nobody's fault.

use std::fmt;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::Version;
use http_body::{Frame, SizeHint};

use crate::client::body::Cut;
use crate::client::exchange::Exchange;
use crate::clock;
use crate::code::Code;
use crate::gateway::Gateway;
use crate::gateway::failpoint;
use crate::gateway::learned_ids::IdLearner;
use crate::gateway::relay_input::{BodyKind, RelayInput, RequestGuards};
use crate::gateway::relay_usage::{RelayUsage, note_content};
use crate::gateway::silence::Silence;
use crate::protocol::error_event::StreamEnding;
use crate::protocol::event_stream::{EventStream, StreamEnd};
use crate::protocol::redact::Redactor;
use crate::telemetry::metrics::Side;
use crate::telemetry::record::{End, RequestRecord};
use crate::time::{Nanos, SECOND};
use crate::upstream::fault::Fault;
use crate::upstream::link::Link;

/// How long a body may go on after its terminal event.
const MAX_TRAILER: Nanos = SECOND;

/// The comment that Zap sends in a silent stream (WHATWG HTML, section 9.2).
const PING: Bytes = Bytes::from_static(b": ping\n\n");

/// The body of a relayed response.
pub(crate) struct RelayBody {
    /// `None` once the relay has ended.
    guards: Option<RequestGuards>,
    gateway: Rc<Gateway>,
    exchange: Exchange,
    first: Option<Bytes>,
    events: Option<Box<EventStream>>,
    /// Boxed, since it is large and rarely present.
    redactor: Option<Box<Redactor>>,
    kind: BodyKind,
    silence: Silence,
    ids: Option<Box<IdLearner>>,
    /// Reads the token counts of a JSON body that is not there as a whole.
    usage: RelayUsage,
    /// What an error event needs to know of the stream.
    ending: StreamEnding,
    state: RelayState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RelayState {
    /// The relay has no more frames.
    Ended,
    /// The response was cut: the connection closes once the frames written so far are flushed.
    Flushing,
    /// More frames may come from the backend.
    Streaming,
    /// The stream has sent its terminal event; the rest of the body may come until then.
    Trailing(Nanos),
}

/// A frame for the client.
type Polled = Poll<Option<Result<Bytes, Cut>>>;

impl fmt::Debug for RelayBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RelayBody").field("state", &self.state).finish_non_exhaustive()
    }
}

impl RelayBody {
    /// Creates a relay of the body that `guards.lease` receives.
    pub(crate) fn new(
        guards: RequestGuards,
        gateway: Rc<Gateway>,
        exchange: Exchange,
        input: RelayInput,
    ) -> Self {
        let RelayInput { first, events, ending, has_usage, ids, redactor, kind, clocks } = input;
        let mut relay = RelayBody {
            first,
            ending,
            events,
            redactor,
            ids,
            usage: RelayUsage::default(),
            kind,
            silence: Silence::new(clocks, exchange.coarse_now()),
            state: RelayState::Streaming,
            guards: Some(guards),
            gateway,
            exchange,
        };
        relay.begin_reading(has_usage);
        if relay.events.is_some() {
            relay.exchange.nudge_at(relay.silence.first());
        } else if relay.first.is_none() && relay.redactor.is_none() && relay.is_upstream_done() {
            relay.finish();
        }
        relay
    }

    fn begin_reading(&mut self, has_usage: bool) {
        let (is_whole, first) = (self.is_upstream_done(), self.first.as_deref().unwrap_or_default());
        self.ids.as_mut().into_iter().for_each(|ids| ids.begin(first, self.events.as_deref()));
        let Some(guards) = self.guards.as_mut().filter(|_| has_usage) else { return };
        let random = || self.gateway.random();
        self.usage = RelayUsage::of_body(&mut guards.record, first, is_whole, random);
    }

    /// Counts what the answer used, as far as it has come.
    fn settle_usage(&mut self) {
        if let Some(guards) = &mut self.guards {
            self.usage.settle(&mut guards.record, self.events.as_deref());
        }
    }

    /// Polls for the next frame.
    fn poll_data(&mut self, cx: &mut Context<'_>) -> Polled {
        match self.state {
            RelayState::Ended => return Poll::Ready(None),
            RelayState::Flushing => return self.exchange.poll_flushed().map(|()| Some(Err(Cut))),
            // Checked before each frame: a backend that keeps sending must not delay the cut.
            RelayState::Streaming if self.gateway.is_cut() => return self.shut_down(),
            RelayState::Trailing(until) if self.gateway.is_cut() || self.exchange.coarse_now() >= until => {
                return self.end_trailer();
            }
            RelayState::Streaming | RelayState::Trailing(_) => {}
        }
        loop {
            let Some(guards) = &mut self.guards else { return Poll::Ready(None) };
            let (frame, is_new) = match self.first.take() {
                Some(first) => (Poll::Ready(Some(Ok(first))), false),
                None if self.kind.is_whole => (Poll::Ready(None), true),
                // A slow client must not trip the backend's idle timeout.
                None if self.exchange.is_behind() => return Poll::Pending,
                None => (guards.lease.link.poll_frame(cx), true),
            };
            match frame {
                Poll::Ready(Some(Ok(data))) => {
                    let data = self.pass(data, is_new);
                    if !data.is_empty() {
                        return Poll::Ready(Some(Ok(self.forward(data))));
                    }
                    // An unfinished event is progress too.
                    self.exchange.progress();
                }
                Poll::Ready(Some(Err(_))) if self.is_trailing() => return self.end_trailer(),
                Poll::Ready(Some(Err(fault))) => return self.interrupt(End::UpstreamError, fault),
                Poll::Ready(None) => return self.end_of_body(),
                Poll::Pending if self.is_trailing() => return Poll::Pending,
                Poll::Pending => return self.wait(),
            }
        }
    }

    /// Takes data of the backend. Returns what may go out now. `is_new`: the events have not seen it.
    fn pass(&mut self, data: Bytes, is_new: bool) -> Bytes {
        let now = self.exchange.coarse_now();
        // Once a sweep, since all workers share the backend's clock.
        if is_new
            && self.silence.hear(now)
            && let Some(in_flight) = self.guards.as_ref().and_then(|guards| guards.in_flight.as_ref())
        {
            in_flight.upstream().state.hear(now);
            if self.silence.is_to_tell(now) {
                in_flight.upstream().state.breaker.pairs.hear(in_flight.key(), now);
            }
        }
        if is_new {
            self.usage.push(&data);
            self.ids.as_mut().into_iter().for_each(|ids| ids.push(&data));
        }
        match (&mut self.redactor, &mut self.events) {
            (Some(redactor), _) => redactor.push(&data),
            (None, Some(events)) if is_new => events.push(data),
            (None, _) => data,
        }
    }

    /// Records a frame that goes to the client, and ends the relay after the last frame.
    fn forward(&mut self, data: Bytes) -> Bytes {
        self.ending.feed(&data);
        self.exchange.progress();
        self.exchange.hand_over(data.len());
        if let Some(guards) = &mut self.guards {
            failpoint::hit("body", &guards.record.request_id);
            guards.record.bytes += data.len() as u64;
        }
        if let Some(events) = &self.events {
            if let Some(guards) = &mut self.guards {
                note_content(&mut guards.record, events);
            }
            let is_held = events.held() > 0;
            match events.end() {
                Some(end) if self.state == RelayState::Streaming => self.settle(end),
                None => self.set_nudge(),
                Some(_) => {}
            }
            if !is_held && self.is_trailing() && self.is_upstream_done() {
                self.finish();
            }
        } else if self.redactor.is_none() && self.is_upstream_done() {
            self.finish();
        }
        data
    }

    fn is_trailing(&self) -> bool {
        matches!(self.state, RelayState::Trailing(_))
    }

    /// Whether the backend has sent all.
    fn is_upstream_done(&self) -> bool {
        self.kind.is_whole || self.guards.as_ref().is_some_and(|g| g.lease.link.is_end())
    }

    /// Has the relay polled when the client has to hear something, or the backend has been silent for too long.
    fn set_nudge(&mut self) {
        if self.events.as_ref().is_none_or(|events| events.has_content()) {
            self.silence.content_began();
        }
        self.exchange.nudge_at(self.silence.next(self.exchange.coarse_now()));
    }

    /// The backend has sent nothing now: ends its silence if it has lasted too long, or the client's.
    fn wait(&mut self) -> Polled {
        let has_timed_out = self.exchange.take_timeout();
        let is_nudged = self.events.is_some() && self.exchange.take_nudge();
        if !has_timed_out && !is_nudged {
            return Poll::Pending;
        }
        if self.gateway.is_cut() {
            return self.shut_down();
        }
        let now = self.exchange.coarse_now();
        let lasted = match self.silence.too_long(now) {
            None if has_timed_out && self.events.is_none() => Some(self.silence.lasted(now)),
            lasted => lasted,
        };
        if let Some(lasted) = lasted {
            return self.interrupt(End::Timeout, Fault::timed_out("stream", lasted));
        }
        // The client reads, so the deadline of its side starts again.
        self.exchange.progress();
        self.set_nudge();
        let may_ping = self.silence.has_heartbeat()
            && self.kind.can_take_event
            && self.events.as_ref().is_some_and(|events| events.is_between_events());
        if !is_nudged || !may_ping {
            return Poll::Pending;
        }
        self.exchange.hand_over(PING.len());
        if let Some(guards) = &mut self.guards {
            guards.record.bytes += PING.len() as u64;
        }
        Poll::Ready(Some(Ok(PING)))
    }

    /// The stream has sent its terminal event: the backend is done with the request, and its result is known.
    fn settle(&mut self, end: StreamEnd) {
        let until = self.exchange.coarse_now() + MAX_TRAILER;
        self.state = RelayState::Trailing(until);
        self.exchange.nudge_at(until);
        self.settle_usage();
        let Some(guards) = &mut self.guards else { return };
        guards.slot = None;
        let Some(in_flight) = guards.in_flight.take() else { return };
        match end {
            StreamEnd::Complete => {
                guards.record.end = End::Complete;
                if self.events.as_ref().is_some_and(|events| events.has_content()) {
                    self.gateway.record_success(&in_flight, guards.record.model_name(), clock::now());
                } else {
                    let fault = Fault::new(Code::UpstreamEmpty, "a stream without content");
                    self.gateway.record_broken(&in_flight, &mut guards.record, fault);
                }
            }
            StreamEnd::Error => {
                guards.record.end = End::UpstreamErrorEvent;
                let fault = Fault::new(Code::UpstreamErrorEvent, "an error event within the stream");
                self.gateway.record_broken(&in_flight, &mut guards.record, fault);
            }
        }
    }

    /// The body of the backend has ended as it should.
    fn end_of_body(&mut self) -> Polled {
        if let Some(redactor) = self.redactor.take() {
            let rest = redactor.finish();
            let rest = (!rest.is_empty()).then(|| Ok(self.forward(rest)));
            self.finish();
            return Poll::Ready(rest);
        }
        let Some(events) = &mut self.events else {
            self.finish();
            return Poll::Ready(None);
        };
        let rest = events.finish();
        match events.end() {
            None if !events.is_whole() => {
                let fault =
                    Fault::new(Code::StreamInterrupted, "the stream ended without its terminal event");
                return self.interrupt(End::UpstreamError, fault);
            }
            end if !self.is_trailing() => self.settle(end.unwrap_or(StreamEnd::Complete)),
            _ => {}
        }
        let rest = (!rest.is_empty()).then(|| Ok(self.forward(rest)));
        self.finish();
        Poll::Ready(rest)
    }

    /// Ends the relay at the end of the body, and parks the upstream connection.
    fn finish(&mut self) {
        self.state = RelayState::Ended;
        self.settle_usage();
        let Some(mut guards) = self.guards.take() else { return };
        let now = clock::now();
        if let Some(in_flight) = &guards.in_flight {
            guards.record.end = End::Complete;
            // A 4xx shows only that the request is wrong, and an empty body is a response only for status 204 and 304.
            let RequestRecord { status, bytes, .. } = *guards.record;
            if status < 400 && (bytes > 0 || matches!(status, 204 | 304)) {
                self.gateway.record_success(in_flight, guards.record.model_name(), now);
            }
        }
        self.gateway.pool().park(guards.lease, now);
    }

    /// Zap shuts down: the stream ends with an event that says so.
    fn shut_down(&mut self) -> Polled {
        self.interrupt(End::Shutdown, Fault::cut())
    }

    /// Cuts the response: the backend failed, sent nothing for too long, or the drain has ended. The client keeps the
    /// frames that it has, and can see that the response is incomplete.
    fn interrupt(&mut self, end: End, fault: Fault) -> Polled {
        self.state = RelayState::Flushing;
        self.exchange.expect_write();
        // A client that has stopped reading gets one more idle timeout to read the rest.
        self.exchange.progress();
        let mut event = None;
        self.settle_usage();
        if let Some(mut guards) = self.guards.take() {
            guards.record.end = end;
            if self.kind.is_stream {
                guards.record.recorder().lane().interrupted(Side::Upstream);
            }
            if let Some(in_flight) = guards.in_flight.take().filter(|_| end != End::Shutdown) {
                let kind = match end {
                    End::Timeout => Code::UpstreamTimeout,
                    _ if self.kind.is_stream => Code::StreamInterrupted,
                    _ => Code::UpstreamError,
                };
                self.gateway.record_broken(&in_flight, &mut guards.record, Fault { kind, ..fault });
            }
            event = self.error_event(&guards.record);
        }
        let Some(event) = event else {
            if self.kind.version < Version::HTTP_11 {
                self.exchange.reset_on_close();
            }
            return self.exchange.poll_flushed().map(|()| Some(Err(Cut)));
        };
        if self.ending.is_clean() {
            self.state = RelayState::Ended;
        }
        Poll::Ready(Some(Ok(event)))
    }

    /// Returns the event that reports a cut stream; `None` if the body cannot take one.
    fn error_event(&self, record: &RequestRecord) -> Option<Bytes> {
        let events = self.events.as_ref().filter(|_| self.kind.can_take_event)?;
        let code = if record.end == End::Shutdown { Code::Draining } else { Code::StreamInterrupted };
        let id = record.request_id.to_str().unwrap_or_default();
        let event = self.ending.event(code, id);
        Some(if events.is_between_events() { event } else { format!("\n\n{event}") }.into())
    }

    /// Ends a body whose terminal event was sent and whose end does not come. The pool closes the upstream connection,
    /// since the response on it is incomplete.
    fn end_trailer(&mut self) -> Polled {
        self.finish();
        if self.kind.can_take_event {
            return Poll::Ready(None);
        }
        // The body has a length or is compressed: it is incomplete, so the client's connection must close.
        self.state = RelayState::Flushing;
        self.exchange.expect_write();
        self.exchange.poll_flushed().map(|()| Some(Err(Cut)))
    }
}

impl http_body::Body for RelayBody {
    type Data = Bytes;
    type Error = Cut;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Cut>>> {
        self.get_mut().poll_data(cx).map(|frame| frame.map(|frame| frame.map(Frame::data)))
    }

    fn is_end_stream(&self) -> bool {
        self.state == RelayState::Ended
    }

    fn size_hint(&self) -> SizeHint {
        let rest = match &self.guards {
            _ if self.events.as_ref().is_some_and(|events| events.may_change()) => SizeHint::default(),
            Some(guards) if !self.kind.is_whole => guards.lease.link.remaining(),
            _ => SizeHint::with_exact(0),
        };
        // The held bytes go out before the rest.
        let held = self.events.as_ref().map_or(0, |events| events.held() as u64);
        match (&self.redactor, rest.exact()) {
            (None, Some(rest)) => {
                SizeHint::with_exact(rest + held + self.first.as_ref().map_or(0, |f| f.len() as u64))
            }
            _ => SizeHint::default(),
        }
    }
}

impl Drop for RelayBody {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // A panic cuts the response: a body without a length must not look complete.
            self.exchange.reset_on_close();
        } else {
            // The client has left.
            self.settle_usage();
            if let Some(in_flight) = self.guards.as_ref().and_then(|guards| guards.in_flight.as_ref()) {
                self.gateway.record_no_result(in_flight);
            }
        }
    }
}
