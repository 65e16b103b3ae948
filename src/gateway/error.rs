//! The errors that Zap itself sends.

use std::borrow::Cow;

use crate::gateway::browser::SiteRefusal;
use crate::gateway::limit_error::LimitError;
use crate::protocol::provider_state::is_provider_state;
use crate::time::Nanos;

/// An error that Zap sends to a client. `crate::gateway::refusal` maps it to a response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum GatewayError {
    /// The request does not show the token of the admin listener.
    AdminToken,
    /// The request head is invalid; the reason.
    BadRequest(&'static str),
    /// The request body is incomplete, or its framing is invalid.
    BodyIncomplete,
    /// Zap is shutting down.
    Draining,
    /// A member that Zap reads occurs more than once; its key.
    DuplicateKey(Cow<'static, str>),
    /// `Expect` has a value other than `100-continue`.
    ExpectationFailed,
    /// Zap failed on the request: a panic or a broken invariant.
    Internal,
    /// Client keys are configured, and the request has none of them.
    InvalidApiKey,
    /// The body is not one JSON object; the offset of the error, in bytes.
    InvalidJson(u64),
    /// The body is not a form that all backends read alike; why.
    InvalidForm(&'static str),
    /// A limit refuses the request.
    Limited(LimitError),
    /// A top-level key differs only in case from the key of a member that Zap reads; the key, and the member.
    KeyCase(Box<str>, Box<str>),
    /// A member has the wrong type; its key, and the type that it must have.
    InvalidType(&'static str, &'static str),
    /// There is no memory for the request body.
    MemoryFull,
    /// The path does not support the method; the methods that it supports.
    MethodNotAllowed(&'static str),
    /// The body has no array `messages`, which the endpoint requires.
    MissingMessages,
    /// The body has no `model`, and there is no default for the request.
    MissingModel,
    /// No backend serves the model, or the client may not use it; its name, and similar names.
    ModelNotFound(Box<str>, Vec<Box<str>>),
    /// No backend takes requests.
    NoBackend,
    /// The admin listener does not serve the path.
    NotAtAdmin,
    /// The path is for operators, and the admin listener serves it.
    OnlyAtAdmin,
    /// The request refers to a response, an item or a conversation of another client.
    NotYours,
    /// A page for operators needs a client key, and the request has none.
    PageKey,
    /// The queue is full.
    QueueFull,
    /// The deadline passed while the request waited in a queue.
    QueueTimeout,
    /// The query of a page is not valid; why.
    BadQuery(String),
    /// The ledger cannot be read now; the message.
    LedgerUnavailable(Cow<'static, str>),
    /// The request comes from elsewhere, or is meant for another host.
    Site(SiteRefusal),
    /// The body stalled, or the deadline passed before it was complete.
    RequestTimeout,
    /// The body is larger than the limit; the limit, in bytes.
    TooLarge(u64),
    /// All regular connections are taken, and the request is no health check.
    TooManyConnections,
    /// No target of the model speaks the protocol of the endpoint; the name of the protocol's API.
    NotSpoken(&'static str),
    /// The path belongs to the state of one provider.
    ProviderState,
    /// The path is unknown.
    UnknownUrl,
    /// The body has a content encoding.
    UnsupportedEncoding,
    /// The client asks for a WebSocket at a path that supports only HTTP.
    UpgradeRequired,
    /// The backends refuse the key that Zap sends; the cause, such as `HTTP 401: Incorrect API key`.
    UpstreamAuth(Cow<'static, str>),
    /// The backend's response is successful and empty.
    UpstreamEmpty,
    /// The backend's response is not valid HTTP/1.1.
    UpstreamInvalid,
    /// All backends cool down or have spent their quota; the time until the first one reopens.
    UpstreamRateLimited(Nanos),
    /// The backend responded with a redirect.
    UpstreamRedirect,
    /// No backend responded in time.
    UpstreamTimeout,
    /// The TLS handshake with the backend failed.
    UpstreamTls,
    /// The backend cannot be reached, or its connection broke before the response was whole.
    UpstreamUnreachable,
}

impl GatewayError {
    /// The error for a path that Zap does not serve.
    pub(crate) fn unknown_path(path: &str) -> Self {
        if is_provider_state(path) { GatewayError::ProviderState } else { GatewayError::UnknownUrl }
    }

    /// The member of the request that is wrong.
    pub(crate) fn param(&self) -> Option<&str> {
        match self {
            GatewayError::DuplicateKey(key) => Some(key),
            GatewayError::KeyCase(key, _) => Some(key),
            GatewayError::InvalidType(key, _) => Some(key),
            GatewayError::MissingMessages => Some("messages"),
            GatewayError::MissingModel | GatewayError::ModelNotFound(..) | GatewayError::NotSpoken(_) => {
                Some("model")
            }
            _ => None,
        }
    }
}
