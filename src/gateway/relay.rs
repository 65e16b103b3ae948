//! An upstream's body on its way to the client: frames through as they come, one report at the end.
//!
//! A relay owns everything that the request still holds: its slot, its place at the backend, the upstream
//! connection and the record. Whatever ends it, the end of the answer, the upstream or the client, drops them.

use std::borrow::Cow;
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
use crate::policy::queue::Permit;
use crate::protocol::endpoint::Stream;
use crate::protocol::error_event::stream_interrupted;
use crate::protocol::events::Tail;
use crate::protocol::redact::Redactor;
use crate::protocol::responses::Seen;
use crate::telemetry::metrics::Side;
use crate::telemetry::{End, RequestRecord};
use crate::time::Nanos;
use crate::upstream::fault::Fault;
use crate::upstream::in_flight::InFlight;
use crate::upstream::link::Link;
use crate::upstream::pool::Lease;

/// What a relay takes over from the request.
pub(crate) struct Held {
    /// The upstream connection, positioned behind the head.
    pub lease: Lease,
    /// The place at the backend.
    pub entered: InFlight,
    /// The slot.
    pub _slot: Permit,
    /// The record.
    pub record: Box<RequestRecord>,
}

impl Held {
    /// The answer went out whole. Only that shows that the backend works, and only where it is not an error: a 4xx says
    /// something about the request alone, and a stream without a byte is no answer.
    fn speak_for_backend(&self, now: Nanos) {
        let RequestRecord { status, bytes, .. } = *self.record;
        let may_be_empty = matches!(status, 204 | 304);
        if status < 400 && (bytes > 0 || may_be_empty) {
            self.entered.upstream().state.breaker.success(now);
        }
    }
}

/// What kind of body it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BodyKind {
    /// `text/event-stream`, in whatever form.
    pub is_stream: bool,
    /// `text/event-stream` whose end an event can be put in: neither compressed nor of a stated length.
    pub events: bool,
    /// How the stream says that it is over, where it is one that can be read.
    pub stream: Option<Stream>,
    /// The client's version: before 1.1 a body without a length ends with the connection.
    pub version: Version,
}

/// What is passed on, and how.
pub(crate) struct Passing {
    /// The first frame, which may be here already.
    pub first: Option<Bytes>,
    /// For answers that may echo the backend's key. Rare, and wider than all the rest.
    pub redactor: Option<Box<Redactor>>,
    /// What kind of body it is.
    pub kind: BodyKind,
}

/// See the module.
pub(crate) struct RelayBody {
    held: Option<Held>,
    gateway: Rc<Gateway>,
    exchange: Exchange,
    first: Option<Bytes>,
    /// Rare, and wider than all the rest.
    redactor: Option<Box<Redactor>>,
    shape: BodyKind,
    /// The stream must end with a `[DONE]`.
    done_expected: bool,
    tail: Tail,
    /// What a stream of `/v1/responses` has said of itself.
    seen: Option<Box<Seen>>,
    state: RelayState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RelayState {
    /// Over, whole.
    Ended,
    /// Cut: the connection closes once what was written has gone out.
    Flushing,
    /// Frames are still to come.
    Streaming,
}

impl fmt::Debug for RelayBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RelayBody").field("state", &self.state).finish_non_exhaustive()
    }
}

impl RelayBody {
    /// Passes on what `held` still receives.
    pub(crate) fn new(held: Held, gateway: Rc<Gateway>, exchange: Exchange, passing: Passing) -> Self {
        let Passing { first, redactor, kind } = passing;
        let done_expected = kind.stream == Some(Stream::Done) && held.record.status < 300;
        let is_response = kind.events && kind.stream == Some(Stream::Responses);
        let mut relay = RelayBody {
            first,
            redactor,
            shape: kind,
            done_expected,
            tail: Tail::new(done_expected),
            seen: is_response.then(Box::default),
            state: RelayState::Streaming,
            held: Some(held),
            gateway,
            exchange,
        };
        if relay.first.is_none() && relay.redactor.is_none() && relay.upstream_is_done() {
            relay.finish();
        }
        relay
    }

    /// The next frame.
    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Cut>>> {
        match self.state {
            RelayState::Ended => return Poll::Ready(None),
            RelayState::Flushing => return self.exchange.poll_flushed().map(|()| Some(Err(Cut))),
            // The order to cut is not to be lost in what still comes.
            RelayState::Streaming if self.gateway.is_cut() => {
                return self.interrupt(End::UpstreamError, Fault::cut());
            }
            RelayState::Streaming => {}
        }
        loop {
            let Some(held) = &mut self.held else { return Poll::Ready(None) };
            let frame = match self.first.take() {
                Some(first) => Poll::Ready(Some(Ok(first))),
                // Should it never catch up, its alarm is not for the upstream.
                None if self.exchange.is_behind() => return Poll::Pending,
                None => held.lease.link.poll_frame(cx),
            };
            match frame {
                Poll::Ready(Some(Ok(data))) => {
                    let data = match &mut self.redactor {
                        Some(redactor) => redactor.push(&data),
                        None => data,
                    };
                    if !data.is_empty() {
                        return Poll::Ready(Some(Ok(self.pass(data))));
                    }
                }
                Poll::Ready(Some(Err(fault))) => return self.interrupt(End::UpstreamError, fault),
                Poll::Ready(None) => {
                    let rest = self.redactor.take().map(|r| r.finish()).filter(|r| !r.is_empty());
                    let rest = rest.map(|r| Ok(self.pass(r)));
                    self.finish();
                    return Poll::Ready(rest);
                }
                Poll::Pending if self.exchange.take_timeout() => {
                    let patience = self.gateway.snapshot().config.timeouts.stream_idle;
                    return if self.gateway.is_cut() {
                        self.interrupt(End::UpstreamError, Fault::cut())
                    } else {
                        self.interrupt(End::Timeout, Fault::timed_out("stream", patience))
                    };
                }
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    /// Counts a frame on its way.
    fn pass(&mut self, data: Bytes) -> Bytes {
        if self.shape.is_stream {
            self.tail.push(&data);
        }
        if let Some(seen) = &mut self.seen {
            seen.feed(&data);
        }
        self.exchange.progress();
        self.exchange.hand_over(data.len());
        if let Some(held) = &mut self.held {
            failpoint::here("body", &held.record.request_id);
            held.record.bytes += data.len() as u64;
        }
        if self.redactor.is_none() && self.upstream_is_done() {
            self.finish();
        }
        data
    }

    fn upstream_is_done(&self) -> bool {
        self.held.as_ref().is_some_and(|h| h.lease.link.is_end())
    }

    /// The stream has said that it is over, whatever the transport says.
    fn is_over(&self) -> bool {
        self.done_expected && self.tail.has_done() || self.seen.as_ref().is_some_and(|seen| seen.is_over())
    }

    /// The upstream's body is whole.
    fn finish(&mut self) {
        self.state = RelayState::Ended;
        let Some(mut held) = self.held.take() else { return };
        let now = clock::now();
        if self.done_expected && !self.tail.has_done() {
            held.record.end = End::UpstreamError;
            held.record.recorder().lane().interrupted(Side::Upstream);
        } else {
            held.record.end = End::Complete;
            held.speak_for_backend(now);
        }
        self.gateway.pool().park(held.lease, now);
    }

    /// The upstream broke off, fell silent, or time is up: what came stays, the rest is visibly missing.
    fn interrupt(&mut self, end: End, fault: Fault) -> Poll<Option<Result<Bytes, Cut>>> {
        if self.is_over() {
            return self.end_behind_done();
        }
        self.state = RelayState::Flushing;
        self.exchange.expect_flush();
        // A client that reads nothing any more has as long again for the last of it.
        self.exchange.progress();
        let mut event = None;
        if let Some(mut held) = self.held.take() {
            let upstream = held.entered.upstream().clone();
            let recorder = held.record.recorder().clone();
            if !self.gateway.is_cut() {
                let kind = if end == End::Timeout { Code::UpstreamTimeout } else { Code::UpstreamError };
                // An error says all that there is to say by its status: it was judged by that.
                self.gateway.account(&upstream, &Fault { kind, ..fault }, held.record.status < 400);
            }
            if self.shape.is_stream {
                recorder.lane().interrupted(Side::Upstream);
            }
            held.record.end = end;
            event = self.last_event(&held.record);
        }
        let Some(event) = event else {
            if self.shape.version < Version::HTTP_11 {
                self.exchange.reset_on_close();
            }
            return self.exchange.poll_flushed().map(|()| Some(Err(Cut)));
        };
        if self.seen.is_some() {
            // Codex drops an event that no clean end follows.
            self.state = RelayState::Ended;
        }
        Poll::Ready(Some(Ok(event)))
    }

    /// The event that says that a stream was cut; `None` where none fits in.
    fn last_event(&self, record: &RequestRecord) -> Option<Bytes> {
        let id = record.request_id.to_str().unwrap_or_default();
        let event = self.shape.events.then(|| stream_interrupted(self.seen.as_deref(), id))?;
        Some(match (self.tail.is_between_events(), event) {
            (true, Cow::Borrowed(event)) => Bytes::from_static(event.as_bytes()),
            (true, Cow::Owned(event)) => event.into(),
            (false, event) => ["\n\n", &event].concat().into(),
        })
    }
}

impl RelayBody {
    /// The upstream broke off, fell silent, or time is up, behind the event that ends the stream: nobody's fault. The
    /// connection is not at the end of its answer, so it does not serve again.
    fn end_behind_done(&mut self) -> Poll<Option<Result<Bytes, Cut>>> {
        self.finish();
        if self.shape.events {
            return Poll::Ready(None);
        }
        // The length that was stated is not reached: the client's connection cannot go on either.
        self.state = RelayState::Flushing;
        self.exchange.expect_flush();
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
        let rest = self.held.as_ref().map_or(SizeHint::with_exact(0), |h| h.lease.link.remaining());
        match (&self.redactor, rest.exact()) {
            (None, Some(rest)) => {
                SizeHint::with_exact(rest + self.first.as_ref().map_or(0, |f| f.len() as u64))
            }
            _ => SizeHint::default(),
        }
    }
}

impl Drop for RelayBody {
    /// Only a body that nobody wants any more still holds something: the client has left.
    fn drop(&mut self) {
        if std::thread::panicking() {
            // A bug has cut it: without framing that must show.
            self.exchange.reset_on_close();
        }
    }
}
