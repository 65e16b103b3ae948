//! What a relay gets: the response, what the request still holds, and the limits of time.

use bytes::Bytes;
use http::Version;

use crate::gateway::learned_ids::IdLearner;
use crate::gateway::silence::StreamClocks;
use crate::policy::queue::Permit;
use crate::protocol::error_event::StreamEnding;
use crate::protocol::event_stream::EventStream;
use crate::protocol::redact::Redactor;
use crate::telemetry::record::RequestRecord;
use crate::upstream::in_flight::InFlight;
use crate::upstream::pool::Lease;

/// What the request still holds while its response is relayed.
pub(crate) struct RequestGuards {
    /// The upstream connection, positioned after the head, or after [`RelayInput::first`].
    pub lease: Lease,
    /// The request at the backend, with its place there; `None` after the terminal event of a stream.
    pub in_flight: Option<InFlight>,
    /// The slot of the request; `None` after the terminal event of a stream.
    pub slot: Option<Permit>,
    /// The record of the request.
    pub record: Box<RequestRecord>,
}

/// The kind of a response body.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BodyKind {
    /// The body is an event stream, readable or not.
    pub is_stream: bool,
    /// An event of Zap's own can be put in: the body is an event stream, not compressed, without `Content-Length`.
    pub can_take_event: bool,
    /// Nothing follows [`RelayInput::first`], whatever the upstream connection still has.
    pub is_whole: bool,
    /// The HTTP version of the request. Before HTTP/1.1 the end of the connection ends a body without a length.
    pub version: Version,
}

/// The body to relay, and how to relay it.
pub(crate) struct RelayInput {
    /// The beginning of the body, if it has been read already.
    pub first: Option<Bytes>,
    /// The events of a successful stream, which have seen [`first`](Self::first).
    pub events: Option<Box<EventStream>>,
    /// What an error event needs to know of the stream.
    pub ending: StreamEnding,
    /// Whether the body is JSON with token counts to read.
    pub has_usage: bool,
    /// Learns the ids of the answer; `None` if no request can refer to it.
    pub ids: Option<Box<IdLearner>>,
    /// Redacts the backend's key in error responses. Boxed, since it is large and rarely present.
    pub redactor: Option<Box<Redactor>>,
    /// The kind of the body.
    pub kind: BodyKind,
    /// The limits of time.
    pub clocks: StreamClocks,
}
