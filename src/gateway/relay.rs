//! Relays a response body from a backend to the client, frame by frame.
//!
//! A relay owns what the request still holds: its slot, its slot at the backend, the upstream connection and the
//! record. All are released when the response ends, the backend fails or the client disconnects.

use std::borrow::Cow;
use std::fmt;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::Version;
use http_body::{Frame, SizeHint};

use crate::client::body::Cut;
use crate::client::exchange::Exchange;
use crate::clock;
use crate::code::Code;
use crate::gateway::Gateway;
use crate::gateway::failpoint;
use crate::policy::queue::Permit;
use crate::protocol::endpoint::StreamFormat;
use crate::protocol::error_event::stream_interrupted;
use crate::protocol::events::Tail;
use crate::protocol::redact::Redactor;
use crate::protocol::responses::StreamState;
use crate::telemetry::metrics::Side;
use crate::telemetry::record::{End, RequestRecord};
use crate::time::Nanos;
use crate::upstream::fault::Fault;
use crate::upstream::in_flight::InFlight;
use crate::upstream::link::Link;
use crate::upstream::pool::Lease;

/// What the request still holds while its response is relayed.
pub(crate) struct RequestGuards {
    /// The upstream connection, positioned after the head, or after [`RelayInput::first`].
    pub lease: Lease,
    /// The request at the backend, with its slot there.
    pub in_flight: InFlight,
    /// The slot of the request.
    pub _slot: Permit,
    /// The record of the request.
    pub record: Box<RequestRecord>,
}

impl RequestGuards {
    /// Counts a complete response as a success of the backend, unless it is an error or empty: a 4xx shows only that
    /// the request is wrong, and an empty body is a response only for status 204 and 304.
    fn record_success(&self, now: Nanos) {
        let RequestRecord { status, bytes, .. } = *self.record;
        let may_be_empty = matches!(status, 204 | 304);
        if status < 400 && (bytes > 0 || may_be_empty) {
            self.in_flight.upstream().state.breaker.success(now);
        }
    }
}

/// The kind of a response body.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BodyKind {
    /// The content type is `text/event-stream`.
    pub is_stream: bool,
    /// An error event can be appended: the body is an event stream, not compressed, without `Content-Length`.
    pub can_append_event: bool,
    /// How an event stream marks its end. `None` if the body is compressed or no event stream.
    pub stream: Option<StreamFormat>,
    /// The HTTP version of the request. Before HTTP/1.1 the end of the connection ends a body without a length.
    pub version: Version,
}

/// The body to relay, and how to relay it.
pub(crate) struct RelayInput {
    /// The first frame, if it has been read already.
    pub first: Option<Bytes>,
    /// Redacts the backend's key in error responses. Boxed, since it is large and rarely present.
    pub redactor: Option<Box<Redactor>>,
    /// The kind of the body.
    pub kind: BodyKind,
}

/// The body of a relayed response.
pub(crate) struct RelayBody {
    /// `None` once the relay has ended.
    guards: Option<RequestGuards>,
    gateway: Rc<Gateway>,
    exchange: Exchange,
    first: Option<Bytes>,
    /// Boxed, since it is large and rarely present.
    redactor: Option<Box<Redactor>>,
    kind: BodyKind,
    /// The stream must end with `[DONE]`.
    done_expected: bool,
    tail: Tail,
    /// The state of a stream of `/v1/responses`, which its error event needs.
    seen: Option<Box<StreamState>>,
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
}

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
        let RelayInput { first, redactor, kind } = input;
        let done_expected = kind.stream == Some(StreamFormat::Done) && guards.record.status < 300;
        let is_responses = kind.can_append_event && kind.stream == Some(StreamFormat::Responses);
        let mut relay = RelayBody {
            first,
            redactor,
            kind,
            done_expected,
            tail: Tail::new(done_expected),
            seen: is_responses.then(Box::default),
            state: RelayState::Streaming,
            guards: Some(guards),
            gateway,
            exchange,
        };
        if relay.first.is_none() && relay.redactor.is_none() && relay.is_upstream_done() {
            relay.finish();
        }
        relay
    }

    /// Polls for the next frame.
    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Cut>>> {
        match self.state {
            RelayState::Ended => return Poll::Ready(None),
            RelayState::Flushing => return self.exchange.poll_flushed().map(|()| Some(Err(Cut))),
            // Checked before each frame: a backend that keeps sending must not delay the cut.
            RelayState::Streaming if self.gateway.is_cut() => {
                return self.interrupt(End::UpstreamError, Fault::cut());
            }
            RelayState::Streaming => {}
        }
        loop {
            let Some(guards) = &mut self.guards else { return Poll::Ready(None) };
            let frame = match self.first.take() {
                Some(first) => Poll::Ready(Some(Ok(first))),
                // A slow client must not trip the backend's idle timeout.
                None if self.exchange.is_behind() => return Poll::Pending,
                None => guards.lease.link.poll_frame(cx),
            };
            match frame {
                Poll::Ready(Some(Ok(data))) => {
                    let data = match &mut self.redactor {
                        Some(redactor) => redactor.push(&data),
                        None => data,
                    };
                    if !data.is_empty() {
                        return Poll::Ready(Some(Ok(self.forward(data))));
                    }
                }
                Poll::Ready(Some(Err(fault))) => return self.interrupt(End::UpstreamError, fault),
                Poll::Ready(None) => {
                    let rest = self.redactor.take().map(|r| r.finish()).filter(|r| !r.is_empty());
                    let rest = rest.map(|r| Ok(self.forward(r)));
                    self.finish();
                    return Poll::Ready(rest);
                }
                Poll::Pending if self.exchange.take_timeout() => {
                    let idle_timeout = Duration::from_nanos(self.exchange.idle_timeout());
                    return if self.gateway.is_cut() {
                        self.interrupt(End::UpstreamError, Fault::cut())
                    } else {
                        self.interrupt(End::Timeout, Fault::timed_out("stream", idle_timeout))
                    };
                }
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    /// Records a frame that goes to the client, and ends the relay after the last frame.
    fn forward(&mut self, data: Bytes) -> Bytes {
        if self.kind.is_stream {
            self.tail.push(&data);
        }
        if let Some(seen) = &mut self.seen {
            seen.feed(&data);
        }
        self.exchange.progress();
        self.exchange.hand_over(data.len());
        if let Some(guards) = &mut self.guards {
            failpoint::hit("body", &guards.record.request_id);
            guards.record.bytes += data.len() as u64;
        }
        if self.redactor.is_none() && self.is_upstream_done() {
            self.finish();
        }
        data
    }

    /// Whether the body of the backend is complete.
    fn is_upstream_done(&self) -> bool {
        self.guards.as_ref().is_some_and(|g| g.lease.link.is_end())
    }

    /// Whether the stream has sent its terminal event. The transport may still be open then.
    fn has_terminal_event(&self) -> bool {
        self.done_expected && self.tail.has_done() || self.seen.as_ref().is_some_and(|seen| seen.is_over())
    }

    /// Ends the relay, and parks the upstream connection. A stream without its `[DONE]` counts as interrupted.
    fn finish(&mut self) {
        self.state = RelayState::Ended;
        let Some(mut guards) = self.guards.take() else { return };
        let now = clock::now();
        if self.done_expected && !self.tail.has_done() {
            guards.record.end = End::UpstreamError;
            guards.record.recorder().lane().interrupted(Side::Upstream);
        } else {
            guards.record.end = End::Complete;
            guards.record_success(now);
        }
        self.gateway.pool().park(guards.lease, now);
    }

    /// Cuts the response: the backend failed, sent nothing for too long, or the drain has ended. The client keeps the
    /// frames that it has, and can see that the response is incomplete.
    fn interrupt(&mut self, end: End, fault: Fault) -> Poll<Option<Result<Bytes, Cut>>> {
        if self.has_terminal_event() {
            return self.end_after_terminal_event();
        }
        self.state = RelayState::Flushing;
        self.exchange.expect_write();
        // A client that has stopped reading gets one more idle timeout to read the rest.
        self.exchange.progress();
        let mut event = None;
        if let Some(mut guards) = self.guards.take() {
            let upstream = guards.in_flight.upstream().clone();
            let recorder = guards.record.recorder().clone();
            if !self.gateway.is_cut() {
                let kind = if end == End::Timeout { Code::UpstreamTimeout } else { Code::UpstreamError };
                // An error response has been judged by its status already.
                let blame = guards.record.status < 400;
                self.gateway.record_failure(&upstream, &Fault { kind, ..fault }, blame);
            }
            if self.kind.is_stream {
                recorder.lane().interrupted(Side::Upstream);
            }
            guards.record.end = end;
            event = self.error_event(&guards.record);
        }
        let Some(event) = event else {
            if self.kind.version < Version::HTTP_11 {
                self.exchange.reset_on_close();
            }
            return self.exchange.poll_flushed().map(|()| Some(Err(Cut)));
        };
        if self.seen.is_some() {
            // The body must end cleanly: Codex drops the last event of a stream that is cut.
            self.state = RelayState::Ended;
        }
        Poll::Ready(Some(Ok(event)))
    }

    /// Returns the event that reports a cut stream; `None` if the body cannot take one.
    fn error_event(&self, record: &RequestRecord) -> Option<Bytes> {
        let id = record.request_id.to_str().unwrap_or_default();
        let event = self.kind.can_append_event.then(|| stream_interrupted(self.seen.as_deref(), id))?;
        Some(match (self.tail.is_between_events(), event) {
            (true, Cow::Borrowed(event)) => Bytes::from_static(event.as_bytes()),
            (true, Cow::Owned(event)) => event.into(),
            (false, event) => ["\n\n", &event].concat().into(),
        })
    }

    /// Ends a stream whose terminal event was sent before the backend failed or timed out. Counts as complete. The pool
    /// closes the upstream connection, since the response on it is incomplete.
    fn end_after_terminal_event(&mut self) -> Poll<Option<Result<Bytes, Cut>>> {
        self.finish();
        if self.kind.can_append_event {
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
        let rest = self.guards.as_ref().map_or(SizeHint::with_exact(0), |g| g.lease.link.remaining());
        match (&self.redactor, rest.exact()) {
            (None, Some(rest)) => {
                SizeHint::with_exact(rest + self.first.as_ref().map_or(0, |f| f.len() as u64))
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
        }
    }
}
