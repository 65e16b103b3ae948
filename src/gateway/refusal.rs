//! Every refusal that Zap itself makes, and how it looks on the wire: one table.

use std::borrow::Cow;
use std::fmt;

use http::StatusCode;
use http::header::{ALLOW, CONNECTION, HeaderName, HeaderValue, RETRY_AFTER, UPGRADE, WWW_AUTHENTICATE};
use smallvec::SmallVec;

use crate::client::respond::{self, ErrorBody};
use crate::code::Code;
use crate::gateway::Answer;
use crate::policy::retry::retry_after_secs;
use crate::time::{Nanos, SECOND};

/// Tells the SDKs of OpenAI whether to try again by themselves.
pub(crate) const X_SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// A refusal. Its wire form is the one table in `GatewayError::row`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum GatewayError {
    /// The request head breaks a rule of HTTP.
    BadRequest(&'static str),
    /// The request's body ended before it was whole.
    BodyIncomplete,
    /// Zap is shutting down.
    Draining,
    /// A member that Zap reads stands twice.
    DuplicateKey(Cow<'static, str>),
    /// `Expect` with something else than `100-continue`.
    ExpectationFailed,
    /// A defect in Zap; the connection stays in order.
    Internal,
    /// Client keys are configured, and the request carries none of them.
    InvalidApiKey,
    /// Not one JSON object; where.
    InvalidJson(u64),
    /// A key at the top level is that of a member that Zap reads, except for its case; the key, and the member.
    KeyCase(Box<str>, Box<str>),
    /// A member has the wrong type; which, and what it must be.
    InvalidType(&'static str, &'static str),
    /// The path is served, the method is not; what is.
    MethodNotAllowed(&'static str),
    /// A chat completion without an array of messages.
    MissingMessages,
    /// No model is named at an endpoint that has no default.
    MissingModel,
    /// No backend serves the model; its name, and names that are near.
    ModelNotFound(Box<str>, Vec<Box<str>>),
    /// Nobody can be asked at all.
    NoBackend,
    /// As many wait as may.
    QueueFull,
    /// Waited to the deadline without a slot.
    QueueTimeout,
    /// The client's own limit is used up; time until one more passes.
    RateLimited(Nanos),
    /// The body came too slowly.
    RequestTimeout,
    /// The body is larger than so many bytes.
    TooLarge(u64),
    /// No such path.
    UnknownUrl,
    /// A body in a content encoding.
    UnsupportedEncoding,
    /// The client wants a WebSocket where HTTP is spoken.
    UpgradeRequired,
    /// The backends refuse the key that Zap sends.
    UpstreamAuth,
    /// The upstream's answer is not HTTP that can be passed on.
    UpstreamInvalid,
    /// All backends want to be left alone; time until the first does not.
    UpstreamRateLimited(Nanos),
    /// The upstream wants to send the client elsewhere.
    UpstreamRedirect,
    /// No answer in time.
    UpstreamTimeout,
    /// The TLS handshake with the upstream failed.
    UpstreamTls,
    /// No connection, or it broke before an answer.
    UpstreamUnreachable,
}

/// One row of the table.
#[derive(Debug)]
struct Row {
    status: StatusCode,
    kind: &'static str,
    code: Code,
    message: String,
    retry_after: Option<Nanos>,
    close: bool,
}

const AUTHENTICATION: &str = "authentication_error";
const INVALID: &str = "invalid_request_error";
const LIMIT: &str = "rate_limit_error";
const SERVER: &str = "server_error";
const UPSTREAM: &str = "upstream_error";

impl GatewayError {
    /// The code in the answer and in `zap_rejected_total`.
    pub(crate) fn code(&self) -> Code {
        self.row().code
    }

    /// The status of the answer.
    pub(crate) fn status(&self) -> StatusCode {
        self.row().status
    }

    /// The answer. `spent`: the retry budget is used up, so SDKs are asked not to try again by themselves.
    pub(crate) fn response(&self, spent: bool) -> Answer {
        let row = self.row();
        let error =
            ErrorBody { message: &row.message, kind: row.kind, param: self.param(), code: row.code.text() };
        respond::error(row.status, &error, self.headers(&row, spent))
    }

    fn headers(&self, row: &Row, spent: bool) -> SmallVec<[(HeaderName, HeaderValue); 4]> {
        let mut headers = SmallVec::new();
        if let Some(wait) = row.retry_after {
            headers.push((RETRY_AFTER, HeaderValue::from(retry_after_secs(wait))));
        }
        match self {
            GatewayError::InvalidApiKey => {
                headers.push((WWW_AUTHENTICATE, HeaderValue::from_static("Bearer")));
            }
            GatewayError::MethodNotAllowed(allow) => headers.push((ALLOW, HeaderValue::from_static(allow))),
            // RFC 9110, section 15.5.22: a 426 must say which protocol to use, and 7.8: as an option of the connection.
            GatewayError::UpgradeRequired => {
                headers.push((UPGRADE, HeaderValue::from_static("HTTP/1.1")));
                headers.push((CONNECTION, HeaderValue::from_static("upgrade")));
            }
            _ => {}
        }
        if row.close {
            headers.push((CONNECTION, HeaderValue::from_static("close")));
        }
        // What is refused, redirected or drained now will be so again.
        let is_final = matches!(
            self,
            GatewayError::NoBackend | GatewayError::UpstreamAuth | GatewayError::UpstreamRedirect
        );
        if spent && row.status.is_server_error() || is_final {
            headers.push((X_SHOULD_RETRY, HeaderValue::from_static("false")));
        }
        headers
    }

    fn param(&self) -> Option<&str> {
        match self {
            GatewayError::DuplicateKey(key) => Some(key),
            GatewayError::KeyCase(key, _) => Some(key),
            GatewayError::InvalidType(key, _) => Some(key),
            GatewayError::MissingMessages => Some("messages"),
            GatewayError::MissingModel | GatewayError::ModelNotFound(..) => Some("model"),
            _ => None,
        }
    }

    fn row(&self) -> Row {
        use GatewayError as E;
        let row = |status, kind, code, message: String| Row {
            status,
            kind,
            code,
            message,
            retry_after: None,
            close: false,
        };
        let closing = |row: Row| Row { close: true, ..row };
        let after = |wait: &Nanos, row: Row| Row { retry_after: Some(*wait), ..row };
        match self {
            E::BadRequest(why) => closing(row(
                StatusCode::BAD_REQUEST,
                INVALID,
                Code::BadRequest,
                format!("The request is not valid HTTP: {why}; look at the client, or at a proxy before the gateway."),
            )),
            E::BodyIncomplete => closing(row(
                StatusCode::BAD_REQUEST,
                INVALID,
                Code::BadRequest,
                "The request body is not framed as HTTP/1.1 asks, or ended early; send it whole, with its Content-Length or in chunks.".into(),
            )),
            E::Draining => closing(after(
                &SECOND,
                row(
                    StatusCode::SERVICE_UNAVAILABLE,
                    SERVER,
                    Code::Draining,
                    "The gateway is shutting down; send the request again.".into(),
                ),
            )),
            E::DuplicateKey(key) => row(
                StatusCode::BAD_REQUEST,
                INVALID,
                Code::DuplicateKey,
                format!("The key \"{key}\" stands more than once at the top level; send it once."),
            ),
            E::ExpectationFailed => closing(row(
                StatusCode::EXPECTATION_FAILED,
                INVALID,
                Code::ExpectationFailed,
                "Only \"Expect: 100-continue\" is understood.".into(),
            )),
            E::Internal => closing(row(
                StatusCode::INTERNAL_SERVER_ERROR,
                SERVER,
                Code::InternalError,
                "The gateway failed on this request; its log says more.".into(),
            )),
            E::InvalidApiKey => row(
                StatusCode::UNAUTHORIZED,
                AUTHENTICATION,
                Code::InvalidApiKey,
                "No valid API key; send one that this gateway knows as Authorization: Bearer.".into(),
            ),
            E::InvalidJson(offset) => row(
                StatusCode::BAD_REQUEST,
                INVALID,
                Code::InvalidJson,
                format!(
                    "The body is not one JSON object (RFC 8259, UTF-8, depth at most 128): see byte {}, counted from 0.",
                    number(*offset)
                ),
            ),
            E::InvalidType(key, expected) => row(
                StatusCode::BAD_REQUEST,
                INVALID,
                Code::InvalidType,
                format!("\"{key}\" has the wrong type: {expected} is expected."),
            ),
            E::KeyCase(key, member) => row(
                StatusCode::BAD_REQUEST,
                INVALID,
                Code::DuplicateKey,
                format!(
                    "The key \"{key}\" differs from \"{member}\" in its case alone, and some providers read both as one; send \"{member}\", once."
                ),
            ),
            E::MethodNotAllowed(allow) => row(
                StatusCode::METHOD_NOT_ALLOWED,
                INVALID,
                Code::MethodNotAllowed,
                format!("This path serves {allow} only."),
            ),
            E::MissingMessages => row(
                StatusCode::BAD_REQUEST,
                INVALID,
                Code::MissingMessages,
                "\"messages\" is missing or not an array; send the conversation in it.".into(),
            ),
            E::MissingModel => row(
                StatusCode::BAD_REQUEST,
                INVALID,
                Code::MissingModel,
                "\"model\" is missing and there is no default for this request; name one of GET /v1/models."
                    .into(),
            ),
            E::ModelNotFound(name, near) => row(
                StatusCode::NOT_FOUND,
                INVALID,
                Code::ModelNotFound,
                match near.is_empty() {
                    true => format!(
                        "The model `{name}` is not served here, or not to this key. GET /v1/models lists what is."
                    ),
                    false => {
                        let near = near.join("`, `");
                        format!(
                            "The model `{name}` is not served here, or not to this key; near it: `{near}`. GET /v1/models lists what is."
                        )
                    }
                },
            ),
            E::NoBackend => after(
                &SECOND,
                row(
                    StatusCode::SERVICE_UNAVAILABLE,
                    SERVER,
                    Code::NoBackend,
                    "No backend can take the request: all are drained. See /status.".into(),
                ),
            ),
            E::QueueFull => after(
                &SECOND,
                row(
                    StatusCode::SERVICE_UNAVAILABLE,
                    SERVER,
                    Code::QueueFull,
                    "All places in the queue are taken; try again shortly.".into(),
                ),
            ),
            E::QueueTimeout => after(
                &SECOND,
                row(
                    StatusCode::GATEWAY_TIMEOUT,
                    SERVER,
                    Code::QueueTimeout,
                    "The request waited for a free slot until its time was up; no backend has seen it."
                        .into(),
                ),
            ),
            E::RateLimited(wait) => after(
                wait,
                row(
                    StatusCode::TOO_MANY_REQUESTS,
                    LIMIT,
                    Code::RateLimitExceeded,
                    format!(
                        "The limit of requests per minute for this key is reached; try again in {} s.",
                        retry_after_secs(*wait)
                    ),
                ),
            ),
            E::RequestTimeout => closing(row(
                StatusCode::REQUEST_TIMEOUT,
                INVALID,
                Code::RequestTimeout,
                "The request body came too slowly; send it without long pauses.".into(),
            )),
            E::TooLarge(limit) => closing(row(
                StatusCode::PAYLOAD_TOO_LARGE,
                INVALID,
                Code::RequestTooLarge,
                format!(
                    "The request body is larger than {} bytes; send less, or ask the operator for a higher server.max_body_bytes.",
                    number(*limit)
                ),
            )),
            E::UnknownUrl => row(
                StatusCode::NOT_FOUND,
                INVALID,
                Code::UnknownUrl,
                "No such path. Chat completions are at POST /v1/chat/completions.".into(),
            ),
            E::UnsupportedEncoding => closing(row(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                INVALID,
                Code::UnsupportedContentEncoding,
                "Send the body without a Content-Encoding.".into(),
            )),
            E::UpgradeRequired => row(
                StatusCode::UPGRADE_REQUIRED,
                INVALID,
                Code::UpgradeRequired,
                "This path speaks HTTP only, no WebSocket; send the request as a POST.".into(),
            ),
            E::UpstreamAuth => row(
                StatusCode::BAD_GATEWAY,
                UPSTREAM,
                Code::UpstreamAuthError,
                "The provider refuses the gateway's key, not yours; its operator must look at /status."
                    .into(),
            ),
            E::UpstreamInvalid => row(
                StatusCode::BAD_GATEWAY,
                UPSTREAM,
                Code::UpstreamInvalidResponse,
                "The provider's answer is not valid HTTP/1.1; the operator must check the backend's url.".into(),
            ),
            E::UpstreamRateLimited(wait) => after(
                wait,
                row(
                    StatusCode::TOO_MANY_REQUESTS,
                    LIMIT,
                    Code::UpstreamRateLimited,
                    format!("All providers are at their limits; try again in {} s.", retry_after_secs(*wait)),
                ),
            ),
            E::UpstreamRedirect => row(
                StatusCode::BAD_GATEWAY,
                UPSTREAM,
                Code::UpstreamRedirect,
                "The provider answered with a redirect, which is never followed; check the backend's url."
                    .into(),
            ),
            E::UpstreamTimeout => row(
                StatusCode::GATEWAY_TIMEOUT,
                SERVER,
                Code::UpstreamTimeout,
                "No provider answered in time; try again, or ask the operator for a longer queue.timeout_secs.".into(),
            ),
            E::UpstreamTls => row(
                StatusCode::BAD_GATEWAY,
                UPSTREAM,
                Code::UpstreamTlsError,
                "The TLS handshake with the provider failed; the operator must check the backend's url and ca_file.".into(),
            ),
            E::UpstreamUnreachable => row(
                StatusCode::BAD_GATEWAY,
                UPSTREAM,
                Code::UpstreamUnreachable,
                "The provider cannot be reached, or closed the connection before it answered; try again shortly, /status shows its state.".into(),
            ),
        }
    }
}

/// A number for a message, in hexadecimal where its digits would hold `429`: frameworks look for that in any text.
fn number(n: u64) -> String {
    let decimal = n.to_string();
    if decimal.contains("429") { format!("{n:#x}") } else { decimal }
}

impl fmt::Display for GatewayError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code().text())
    }
}

impl std::error::Error for GatewayError {}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    #[test]
    fn every_refusal_looks_as_the_table_says() {
        use GatewayError as E;
        #[rustfmt::skip]
        let table = [
            // error, status, type, code, param, retry-after, closes
            (E::BadRequest("why"), 400, INVALID, "bad_request", None, None, true),
            (E::BodyIncomplete, 400, INVALID, "bad_request", None, None, true),
            (E::Draining, 503, SERVER, "draining", None, Some("1"), true),
            (E::DuplicateKey("model".into()), 400, INVALID, "duplicate_key", Some("model"), None, false),
            (E::KeyCase("Model".into(), "model".into()), 400, INVALID, "duplicate_key", Some("Model"), None, false),
            (E::ExpectationFailed, 417, INVALID, "expectation_failed", None, None, true),
            (E::Internal, 500, SERVER, "internal_error", None, None, true),
            (E::InvalidApiKey, 401, AUTHENTICATION, "invalid_api_key", None, None, false),
            (E::InvalidJson(7), 400, INVALID, "invalid_json", None, None, false),
            (E::InvalidType("stream", "true or false"), 400, INVALID, "invalid_type", Some("stream"), None, false),
            (E::MethodNotAllowed("POST"), 405, INVALID, "method_not_allowed", None, None, false),
            (E::MissingMessages, 400, INVALID, "missing_messages", Some("messages"), None, false),
            (E::MissingModel, 400, INVALID, "missing_model", Some("model"), None, false),
            (E::ModelNotFound("x".into(), vec![]), 404, INVALID, "model_not_found", Some("model"), None, false),
            (E::ModelNotFound("x\"".into(), vec!["y".into()]), 404, INVALID, "model_not_found", Some("model"), None, false),
            (E::NoBackend, 503, SERVER, "no_backend", None, Some("1"), false),
            (E::QueueFull, 503, SERVER, "queue_full", None, Some("1"), false),
            (E::QueueTimeout, 504, SERVER, "queue_timeout", None, Some("1"), false),
            (E::RateLimited(2 * SECOND + 1), 429, LIMIT, "rate_limit_exceeded", None, Some("3"), false),
            (E::RequestTimeout, 408, INVALID, "request_timeout", None, None, true),
            (E::TooLarge(9), 413, INVALID, "request_too_large", None, None, true),
            (E::UnknownUrl, 404, INVALID, "unknown_url", None, None, false),
            (E::UnsupportedEncoding, 415, INVALID, "unsupported_content_encoding", None, None, true),
            (E::UpgradeRequired, 426, INVALID, "upgrade_required", None, None, false),
            (E::UpstreamAuth, 502, UPSTREAM, "upstream_auth_error", None, None, false),
            (E::UpstreamInvalid, 502, UPSTREAM, "upstream_invalid_response", None, None, false),
            (E::UpstreamRateLimited(0), 429, LIMIT, "upstream_rate_limited", None, Some("1"), false),
            (E::UpstreamRedirect, 502, UPSTREAM, "upstream_redirect", None, None, false),
            (E::UpstreamTimeout, 504, SERVER, "upstream_timeout", None, None, false),
            (E::UpstreamTls, 502, UPSTREAM, "upstream_tls_error", None, None, false),
            (E::UpstreamUnreachable, 502, UPSTREAM, "upstream_unreachable", None, None, false),
        ];
        // Every code but those that only label metrics has a row here.
        for code in Code::ALL {
            assert!(code.is_label() || table.iter().any(|r| r.3 == code.text()), "{code:?}");
        }
        for (error, status, kind, code, param, retry_after, closes) in table {
            let response = error.response(true);
            let header = |name| response.headers().get(name).map(|v| v.to_str().unwrap().to_owned());
            assert_eq!(response.status().as_u16(), status, "{error:?}");
            assert_eq!(header("content-type").as_deref(), Some("application/json"));
            assert_eq!(header("retry-after").as_deref(), retry_after, "{error:?}");
            let connection = if status == 426 { Some("upgrade") } else { closes.then_some("close") };
            assert_eq!(header("connection").as_deref(), connection, "{error:?}");
            assert_eq!(header("upgrade").as_deref(), (status == 426).then_some("HTTP/1.1"));
            assert_eq!(header("www-authenticate").as_deref(), (status == 401).then_some("Bearer"));
            assert_eq!(header("allow").as_deref(), (status == 405).then_some("POST"));
            assert_eq!(header("x-should-retry").as_deref(), (status >= 500).then_some("false"));
            let mut body = response.into_body();
            let frame = futures_lite_block(body.frame()).unwrap().unwrap().into_data().unwrap();
            let json: serde_json::Value = serde_json::from_slice(&frame).unwrap();
            let error_json = &json["error"];
            assert_eq!((error_json["type"].as_str(), error_json["code"].as_str()), (Some(kind), Some(code)));
            assert_eq!(error_json["param"].as_str(), param);
            let message = error_json["message"].as_str().unwrap();
            assert!(message.ends_with('.') || status == 429);
            assert!(status == 429 || !is_misleading(message), "{message}");
        }
        assert!(!is_misleading(&crate::protocol::error_event::stream_interrupted(None, "")));
        assert!(!GatewayError::QueueFull.response(false).headers().contains_key("x-should-retry"));
        for error in [GatewayError::NoBackend, GatewayError::UpstreamAuth, GatewayError::UpstreamRedirect] {
            assert_eq!(error.response(false).headers()["x-should-retry"], "false", "{error:?}");
        }
        for (n, text) in [(42, "42"), (429, "0x1ad"), (14_290, "0x37d2"), (4_294_967_296, "0x100000000")] {
            assert_eq!(number(n), text);
        }
    }

    /// Frameworks take an answer with these words for a rate limit or too long a prompt, whatever its status.
    fn is_misleading(message: &str) -> bool {
        let message = message.to_lowercase();
        ["too many requests", "rate limit", "quota", "429", "context length", "too long"]
            .iter()
            .any(|words| message.contains(words))
    }

    fn futures_lite_block<F: Future + Unpin>(mut future: F) -> F::Output {
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        match std::pin::Pin::new(&mut future).poll(&mut cx) {
            std::task::Poll::Ready(out) => out,
            std::task::Poll::Pending => panic!("a full body is always ready"),
        }
    }
}
