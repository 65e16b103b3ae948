//! One table that maps each error of Zap's own to its response.

use std::fmt;

use http::StatusCode;
use http::header::{ALLOW, CONNECTION, HeaderName, HeaderValue, RETRY_AFTER, UPGRADE, WWW_AUTHENTICATE};
use smallvec::SmallVec;

use crate::client::respond;
use crate::code::Code;
use crate::gateway::ClientResponse;
pub(crate) use crate::gateway::error::GatewayError;
use crate::gateway::error_row::{ErrorRow, LIMIT, row};
use crate::gateway::limit_error::LimitError;
use crate::gateway::wording::{format_number, is_misleading, model_not_found, unless_misleading};
use crate::policy::retry::{MAX_RETRY_AFTER, retry_after_secs};
use crate::protocol::endpoint::Protocol;
use crate::protocol::error_body::ErrorBody;
use crate::time::{Nanos, SECOND};

/// Tells OpenAI's SDKs whether to retry the request.
pub(crate) const X_SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

const AUTHENTICATION: &str = "authentication_error";
const INVALID: &str = "invalid_request_error";
const SERVER: &str = "server_error";
const UPSTREAM: &str = "upstream_error";

impl GatewayError {
    /// The code in the response and in `zap_rejected_total`.
    pub(crate) fn code(&self) -> Code {
        self.row().code
    }

    /// The status of the response.
    pub(crate) fn status(&self) -> StatusCode {
        self.row().status
    }

    /// Builds the response in the shape of a protocol. `is_budget_spent`: the retry budget is spent, so a 5xx asks SDKs
    /// not to retry.
    pub(crate) fn response(&self, protocol: Protocol, is_budget_spent: bool) -> ClientResponse {
        let row = self.row();
        let error = ErrorBody { message: &row.message, kind: row.kind, param: self.param(), code: row.code };
        respond::error((protocol, row.status), &error, self.headers(&row, is_budget_spent))
    }

    fn headers(&self, row: &ErrorRow, is_budget_spent: bool) -> SmallVec<[(HeaderName, HeaderValue); 4]> {
        let mut headers = SmallVec::new();
        if let Some(wait) = row.retry_after {
            headers.push((RETRY_AFTER, HeaderValue::from(retry_after_secs(wait))));
        }
        match self {
            GatewayError::InvalidApiKey => {
                headers.push((WWW_AUTHENTICATE, HeaderValue::from_static("Bearer")));
            }
            // A browser asks its user.
            GatewayError::AdminToken | GatewayError::PageKey => {
                headers.push((WWW_AUTHENTICATE, HeaderValue::from_static("Basic realm=\"Zap\"")));
            }
            GatewayError::MethodNotAllowed(allow) => headers.push((ALLOW, HeaderValue::from_static(allow))),
            // RFC 9110: a 426 must have `Upgrade` (section 15.5.22), which `Connection` must list (section 7.8).
            GatewayError::UpgradeRequired => {
                headers.push((UPGRADE, HeaderValue::from_static("HTTP/1.1")));
                headers.push((CONNECTION, HeaderValue::from_static("upgrade")));
            }
            _ => {}
        }
        if row.close {
            headers.push((CONNECTION, HeaderValue::from_static("close")));
        }
        // A retry would fail in the same way.
        let is_final = matches!(
            self,
            GatewayError::NoBackend | GatewayError::UpstreamAuth(_) | GatewayError::UpstreamRedirect
        ) || matches!(self, GatewayError::Limited(limit) if limit.is_final());
        if is_budget_spent && row.status.is_server_error() || is_final {
            headers.push((X_SHOULD_RETRY, HeaderValue::from_static("false")));
        }
        headers
    }

    /// Whether the refused request is taken back from the limit of requests.
    pub(crate) fn is_refundable(&self) -> bool {
        let is_of_limit = matches!(self, GatewayError::Limited(LimitError::Requests(_)));
        let status = self.status();
        !is_of_limit && (status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS)
    }

    fn row(&self) -> ErrorRow {
        use GatewayError as E;
        let closing = |row: ErrorRow| ErrorRow { close: true, ..row };
        let after = |wait: &Nanos, row: ErrorRow| row.after(*wait);
        match self {
            E::AdminToken => row(
                StatusCode::UNAUTHORIZED,
                AUTHENTICATION,
                Code::InvalidAdminToken,
                "The admin token is missing or not valid; send it in the header Authorization: Bearer, or in a browser as the password of any user.",
            ),
            E::BadRequest(why) => closing(row(
                StatusCode::BAD_REQUEST,
                INVALID,
                Code::BadRequest,
                format!(
                    "The request is not valid HTTP: {why}; check the client, or a proxy in front of the gateway."
                ),
            )),
            E::BodyIncomplete => closing(row(
                StatusCode::BAD_REQUEST,
                INVALID,
                Code::BadRequest,
                "The request body ended early or is not valid HTTP/1.1; send the whole body, with a Content-Length or chunked.",
            )),
            E::Draining => closing(after(
                &SECOND,
                row(
                    StatusCode::SERVICE_UNAVAILABLE,
                    SERVER,
                    Code::Draining,
                    "The gateway is shutting down; send the request again.",
                ),
            )),
            E::DuplicateKey(key) => row(
                StatusCode::BAD_REQUEST,
                INVALID,
                Code::DuplicateKey,
                unless_misleading(
                    format!("The key \"{key}\" occurs more than once at the top level; send it once."),
                    "A key occurs more than once at the top level, see \"param\"; send it once.",
                ),
            ),
            E::ExpectationFailed => closing(row(
                StatusCode::EXPECTATION_FAILED,
                INVALID,
                Code::ExpectationFailed,
                "Only \"Expect: 100-continue\" is supported.",
            )),
            E::Internal => closing(row(
                StatusCode::INTERNAL_SERVER_ERROR,
                SERVER,
                Code::InternalError,
                "The gateway failed to handle this request; its log has the details.",
            )),
            E::InvalidApiKey => row(
                StatusCode::UNAUTHORIZED,
                AUTHENTICATION,
                Code::InvalidApiKey,
                "The API key is missing or not valid; send a key of this gateway in the header Authorization: Bearer.",
            ),
            E::InvalidJson(offset) => row(
                StatusCode::BAD_REQUEST,
                INVALID,
                Code::InvalidJson,
                format!(
                    "The body is not one JSON object (RFC 8259, UTF-8, depth at most 128): error at byte {}, counted from 0.",
                    format_number(*offset)
                ),
            ),
            E::InvalidForm(why) => row(
                StatusCode::BAD_REQUEST,
                INVALID,
                Code::InvalidMultipart,
                format!(
                    "The body is not a valid form (RFC 7578): {why}; let an HTTP library write the form."
                ),
            ),
            E::InvalidType(key, expected) => row(
                StatusCode::BAD_REQUEST,
                INVALID,
                Code::InvalidType,
                format!("\"{key}\" has the wrong type: it must be {expected}."),
            ),
            E::KeyCase(key, member) => row(
                StatusCode::BAD_REQUEST,
                INVALID,
                Code::DuplicateKey,
                unless_misleading(
                    format!(
                        "The key \"{key}\" differs from \"{member}\" only in case, and some providers treat both as the same key; send only \"{member}\"."
                    ),
                    "A key differs only in case from one that the gateway reads, see \"param\"; send only the latter.",
                ),
            ),
            E::Limited(limit) => limit.row(),
            E::MemoryFull => closing(after(
                &SECOND,
                row(
                    StatusCode::SERVICE_UNAVAILABLE,
                    SERVER,
                    Code::MemoryFull,
                    "The gateway has no memory left for this request body; try again shortly.",
                ),
            )),
            E::MethodNotAllowed(allow) => row(
                StatusCode::METHOD_NOT_ALLOWED,
                INVALID,
                Code::MethodNotAllowed,
                format!("This path supports {allow} only."),
            ),
            E::MissingMessages => row(
                StatusCode::BAD_REQUEST,
                INVALID,
                Code::MissingMessages,
                "\"messages\" is missing or is not an array; send the conversation in it.",
            ),
            E::MissingModel => row(
                StatusCode::BAD_REQUEST,
                INVALID,
                Code::MissingModel,
                "\"model\" is missing and there is no default for this request; send one that GET /v1/models lists.",
            ),
            E::ModelNotFound(name, near) => {
                row(StatusCode::NOT_FOUND, INVALID, Code::ModelNotFound, model_not_found(name, near))
            }
            // Only a reload opens a backend.
            E::NoBackend => after(
                &MAX_RETRY_AFTER,
                row(
                    StatusCode::SERVICE_UNAVAILABLE,
                    SERVER,
                    Code::NoBackend,
                    "No backend can take the request: all backends are drained. See /status.",
                ),
            ),
            E::NotAtAdmin => row(
                StatusCode::NOT_FOUND,
                INVALID,
                Code::UnknownUrl,
                "The admin listener does not serve this path; send it to the port of clients. Here are /, /status, /usage, /metrics, /health and /ready.",
            ),
            E::OnlyAtAdmin => row(
                StatusCode::NOT_FOUND,
                INVALID,
                Code::UnknownUrl,
                "This path is for operators; the admin listener of the gateway serves it.",
            ),
            E::NotYours => row(
                StatusCode::NOT_FOUND,
                INVALID,
                Code::ResponseNotFound,
                "No response, item or conversation with this id belongs to this key; use the key that made it.",
            ),
            E::PageKey => row(
                StatusCode::UNAUTHORIZED,
                AUTHENTICATION,
                Code::InvalidApiKey,
                "This page needs a key of this gateway, except on the machine of the gateway; send one in the header Authorization: Bearer, or in a browser as the password of any user.",
            ),
            E::QueueFull => after(
                &SECOND,
                row(
                    StatusCode::SERVICE_UNAVAILABLE,
                    SERVER,
                    Code::QueueFull,
                    "The queue is full; try again shortly.",
                ),
            ),
            E::QueueTimeout => after(
                &SECOND,
                row(
                    StatusCode::GATEWAY_TIMEOUT,
                    SERVER,
                    Code::QueueTimeout,
                    "The request waited in the queue until its deadline; it was not sent to a backend.",
                ),
            ),
            E::BadQuery(why) => row(
                StatusCode::BAD_REQUEST,
                INVALID,
                Code::BadRequest,
                unless_misleading(
                    why.clone(),
                    "The query is not valid: its parameters are from, to, by and format; see `zap help usage`.",
                ),
            ),
            E::LedgerUnavailable(text) => after(
                &SECOND,
                row(
                    StatusCode::SERVICE_UNAVAILABLE,
                    SERVER,
                    Code::LedgerUnavailable,
                    unless_misleading(text.to_string(), "The usage cannot be read now; try again in 1 s."),
                ),
            ),
            E::RequestTimeout => closing(row(
                StatusCode::REQUEST_TIMEOUT,
                INVALID,
                Code::RequestTimeout,
                "The request body arrived too slowly; send it without long pauses.",
            )),
            E::Site(refusal) => refusal.row(),
            E::TooLarge(limit) => closing(row(
                StatusCode::PAYLOAD_TOO_LARGE,
                INVALID,
                Code::RequestTooLarge,
                format!(
                    "The request body is larger than {} bytes; send less, or ask the operator for a higher server.max_body_bytes.",
                    format_number(*limit)
                ),
            )),
            E::NotSpoken(api) => row(
                StatusCode::NOT_FOUND,
                INVALID,
                Code::ModelNotFound,
                format!(
                    "No backend for this model speaks the {api} API; send the request to another endpoint, or ask the operator to check backends.protocols."
                ),
            ),
            E::ProviderState => row(
                StatusCode::NOT_FOUND,
                INVALID,
                Code::UnknownUrl,
                "Files, batches, realtime sockets and assistants are one provider's state and are not served here; call the provider.",
            ),
            E::TooManyConnections => closing(after(
                &SECOND,
                row(
                    StatusCode::SERVICE_UNAVAILABLE,
                    SERVER,
                    Code::TooManyConnections,
                    "The gateway has no connection left; try again shortly.",
                ),
            )),
            E::UnknownUrl => row(
                StatusCode::NOT_FOUND,
                INVALID,
                Code::UnknownUrl,
                "This path does not exist. Chat completions are at POST /v1/chat/completions, messages at POST /v1/messages.",
            ),
            E::UnsupportedEncoding => closing(row(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                INVALID,
                Code::UnsupportedContentEncoding,
                "Send the body without a Content-Encoding.",
            )),
            E::UpgradeRequired => row(
                StatusCode::UPGRADE_REQUIRED,
                INVALID,
                Code::UpgradeRequired,
                "This path supports HTTP only, not WebSocket; send the request as a POST.",
            ),
            E::UpstreamAuth(cause) => {
                let is_unfit = cause.is_empty() || is_misleading(cause);
                let cause = if is_unfit { String::new() } else { format!(" ({cause})") };
                row(
                    StatusCode::BAD_GATEWAY,
                    UPSTREAM,
                    Code::UpstreamAuthError,
                    format!(
                        "The provider refuses the gateway's key, not yours{cause}; the gateway's operator must check /status."
                    ),
                )
            }
            E::UpstreamEmpty => row(
                StatusCode::BAD_GATEWAY,
                UPSTREAM,
                Code::UpstreamEmpty,
                "The provider's response is successful and empty; try again, or ask the operator to check the backend.",
            ),
            E::UpstreamInvalid => row(
                StatusCode::BAD_GATEWAY,
                UPSTREAM,
                Code::UpstreamInvalidResponse,
                "The provider's response is not valid HTTP/1.1; the operator must check the backend's url.",
            ),
            E::UpstreamRateLimited(wait) => after(
                &(*wait).min(MAX_RETRY_AFTER),
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
                "The provider responded with a redirect, which the gateway never follows; the operator must check the backend's url.",
            ),
            E::UpstreamTimeout => row(
                StatusCode::GATEWAY_TIMEOUT,
                SERVER,
                Code::UpstreamTimeout,
                "No provider responded in time; try again, or ask the operator for a longer queue.timeout_secs.",
            ),
            E::UpstreamTls => row(
                StatusCode::BAD_GATEWAY,
                UPSTREAM,
                Code::UpstreamTlsError,
                "The TLS handshake with the provider failed; the operator must check the backend's url and ca_file.",
            ),
            E::UpstreamUnreachable => row(
                StatusCode::BAD_GATEWAY,
                UPSTREAM,
                Code::UpstreamUnreachable,
                "The provider cannot be reached, or its connection broke before the response was whole; try again shortly. /status shows its state.",
            ),
        }
    }
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
    use crate::gateway::browser::SiteRefusal;
    use crate::policy::spend::Period;
    use crate::policy::token_window::TokenDecision;
    use crate::protocol::endpoint::StreamFormat;
    use crate::protocol::error_event::StreamEnding;
    use crate::time::Day;

    #[test]
    fn every_error_has_the_response_of_the_table() {
        use GatewayError as E;
        use LimitError as L;
        let tokens = TokenDecision { limit: 9, remaining: 0, reset: 0, opens_in: Some(8 * SECOND) };
        let opens = Day::parse("2026-12-01").unwrap();
        let budget_spent = L::BudgetSpent { limit: 2_500_000_000, per: Period::Month, opens };
        #[rustfmt::skip]
        let table = [
            // error, status, type, code, param, retry-after, closes
            (E::AdminToken, 401, AUTHENTICATION, "invalid_admin_token", None, None, false),
            (E::BadRequest("why"), 400, INVALID, "bad_request", None, None, true),
            (E::BodyIncomplete, 400, INVALID, "bad_request", None, None, true),
            (E::Draining, 503, SERVER, "draining", None, Some("1"), true),
            (E::DuplicateKey("model".into()), 400, INVALID, "duplicate_key", Some("model"), None, false),
            (E::KeyCase("Model".into(), "model".into()), 400, INVALID, "duplicate_key", Some("Model"), None, false),
            (E::ExpectationFailed, 417, INVALID, "expectation_failed", None, None, true),
            (E::Internal, 500, SERVER, "internal_error", None, None, true),
            (E::InvalidApiKey, 401, AUTHENTICATION, "invalid_api_key", None, None, false),
            (E::DuplicateKey("quota".into()), 400, INVALID, "duplicate_key", Some("quota"), None, false),
            (E::KeyCase("Quota".into(), "quota".into()), 400, INVALID, "duplicate_key", Some("Quota"), None, false),
            (E::InvalidJson(1_321_429), 400, INVALID, "invalid_json", None, None, false),
            (E::TooLarge(1_321_429), 413, INVALID, "request_too_large", None, None, true),
            (E::BadQuery("`by` has \"429\"; must be day.".into()), 400, INVALID, "bad_request", None, None, false),
            (E::LedgerUnavailable("Disk quota exceeded.".into()), 503, SERVER, "ledger_unavailable", None, Some("1"), false),
            (E::ModelNotFound("gpt-429".into(), vec!["quota-x".into()]), 404, INVALID, "model_not_found", Some("model"), None, false),
            (E::ModelNotFound("x".into(), vec!["quota-x".into(), "y".into()]), 404, INVALID, "model_not_found", Some("model"), None, false),
            (E::UpstreamAuth("HTTP 401: rate-limit".into()), 502, UPSTREAM, "upstream_auth_error", None, None, false),
            (E::InvalidJson(7), 400, INVALID, "invalid_json", None, None, false),
            (E::InvalidForm("the body ends before the form does"), 400, INVALID, "invalid_multipart", None, None, false),
            (E::InvalidType("stream", "true or false"), 400, INVALID, "invalid_type", Some("stream"), None, false),
            (E::BadQuery("The query is wrong.".into()), 400, INVALID, "bad_request", None, None, false),
            (E::LedgerUnavailable("Not now.".into()), 503, SERVER, "ledger_unavailable", None, Some("1"), false),
            (E::MethodNotAllowed("POST"), 405, INVALID, "method_not_allowed", None, None, false),
            (E::MissingMessages, 400, INVALID, "missing_messages", Some("messages"), None, false),
            (E::MissingModel, 400, INVALID, "missing_model", Some("model"), None, false),
            (E::ModelNotFound("x".into(), vec![]), 404, INVALID, "model_not_found", Some("model"), None, false),
            (E::ModelNotFound("x\"".into(), vec!["y".into()]), 404, INVALID, "model_not_found", Some("model"), None, false),
            (E::NotSpoken("Anthropic"), 404, INVALID, "model_not_found", Some("model"), None, false),
            (E::ProviderState, 404, INVALID, "unknown_url", None, None, false),
            (E::NoBackend, 503, SERVER, "no_backend", None, Some("59"), false),
            (E::MemoryFull, 503, SERVER, "memory_full", None, Some("1"), true),
            (E::TooManyConnections, 503, SERVER, "too_many_connections", None, Some("1"), true),
            (E::QueueFull, 503, SERVER, "queue_full", None, Some("1"), false),
            (E::QueueTimeout, 504, SERVER, "queue_timeout", None, Some("1"), false),
            (E::Limited(L::BackendBudgetsSpent), 429, "insufficient_quota", "insufficient_quota", None, Some("59"), false),
            (E::Limited(L::BudgetReserved), 429, LIMIT, "rate_limit_exceeded", None, Some("1"), false),
            (E::Limited(budget_spent), 429, "insufficient_quota", "insufficient_quota", None, Some("59"), false),
            (E::Limited(L::Requests(2 * SECOND + 1)), 429, LIMIT, "rate_limit_exceeded", None, Some("3"), false),
            (E::Limited(L::Tokens(tokens)), 429, LIMIT, "rate_limit_exceeded", None, Some("8"), false),
            (E::Limited(L::Tokens(TokenDecision { opens_in: None, ..tokens })), 429, LIMIT, "rate_limit_exceeded", None, Some("1"), false),
            (E::Limited(L::TooLarge { tokens: 9, limit: 8 }), 429, LIMIT, "request_too_large_for_limit", None, None, false),
            (E::RequestTimeout, 408, INVALID, "request_timeout", None, None, true),
            (E::TooLarge(9), 413, INVALID, "request_too_large", None, None, true),
            (E::Site(SiteRefusal::Host), 421, INVALID, "misdirected_request", None, None, false),
            (E::Site(SiteRefusal::Origin), 403, INVALID, "origin_not_allowed", None, None, false),
            (E::NotAtAdmin, 404, INVALID, "unknown_url", None, None, false),
            (E::OnlyAtAdmin, 404, INVALID, "unknown_url", None, None, false),
            (E::PageKey, 401, AUTHENTICATION, "invalid_api_key", None, None, false),
            (E::NotYours, 404, INVALID, "response_not_found", None, None, false),
            (E::UnknownUrl, 404, INVALID, "unknown_url", None, None, false),
            (E::UnsupportedEncoding, 415, INVALID, "unsupported_content_encoding", None, None, true),
            (E::UpgradeRequired, 426, INVALID, "upgrade_required", None, None, false),
            (E::UpstreamAuth("".into()), 502, UPSTREAM, "upstream_auth_error", None, None, false),
            (E::UpstreamAuth("HTTP 401: no such key".into()), 502, UPSTREAM, "upstream_auth_error", None, None, false),
            (E::UpstreamAuth("HTTP 401: quota".into()), 502, UPSTREAM, "upstream_auth_error", None, None, false),
            (E::UpstreamEmpty, 502, UPSTREAM, "upstream_empty", None, None, false),
            (E::UpstreamInvalid, 502, UPSTREAM, "upstream_invalid_response", None, None, false),
            (E::UpstreamRateLimited(600 * SECOND), 429, LIMIT, "upstream_rate_limited", None, Some("59"), false),
            (E::UpstreamRateLimited(0), 429, LIMIT, "upstream_rate_limited", None, Some("1"), false),
            (E::UpstreamRedirect, 502, UPSTREAM, "upstream_redirect", None, None, false),
            (E::UpstreamTimeout, 504, SERVER, "upstream_timeout", None, None, false),
            (E::UpstreamTls, 502, UPSTREAM, "upstream_tls_error", None, None, false),
            (E::UpstreamUnreachable, 502, UPSTREAM, "upstream_unreachable", None, None, false),
        ];
        // Every reason for which a head is refused, as the sources spell it.
        let sources = [
            (include_str!("../http1/head.rs"), "HeadFault(\""),
            (include_str!("caller.rs"), "REPEATED: &str = \""),
        ];
        let reasons: Vec<_> = sources
            .iter()
            .flat_map(|(source, begin)| source.split(begin).skip(1))
            .filter_map(|rest| rest.split_once('"'))
            .map(|(why, _)| (E::BadRequest(why), 400, INVALID, "bad_request", None, None, true))
            .collect();
        assert!(reasons.len() > 16, "{reasons:?}");
        // The same of forms.
        let of_multipart = include_str!("../protocol/multipart.rs")
            .split("FormError::Invalid(\"")
            .skip(1)
            .filter_map(|rest| rest.split_once('"'))
            .map(|(why, _)| why);
        // Each text of this file with more than one word is a reason.
        let (form_header, _) = include_str!("../protocol/form_header.rs").split_once("mod tests").unwrap();
        let of_headers = form_header
            .lines()
            .filter(|line| !line.contains("b\"") && !line.trim_start().starts_with("//"))
            .flat_map(|line| line.split('"').skip(1).step_by(2))
            .filter(|text| text.contains(' ') && text.starts_with(char::is_alphabetic));
        let forms: Vec<_> = of_multipart
            .chain(of_headers)
            .map(|why| (E::InvalidForm(why), 400, INVALID, "invalid_multipart", None, None, false))
            .collect();
        assert!(forms.len() > 20, "{forms:?}");
        let table: Vec<_> = table.into_iter().chain(reasons).chain(forms).collect();
        // Every code has a row here, except codes that only label metrics.
        for code in Code::ALL {
            assert!(code.is_label() || table.iter().any(|r| r.3 == code.text()), "no row for {code:?}");
        }
        for (error, status, kind, code, param, retry_after, closes) in table {
            let response = error.response(Protocol::OpenAi, true);
            let header = |name| response.headers().get(name).map(|v| v.to_str().unwrap().to_owned());
            assert_eq!(response.status().as_u16(), status, "{error:?}");
            assert_eq!(header("content-type").as_deref(), Some("application/json"));
            assert_eq!(header("retry-after").as_deref(), retry_after, "{error:?}");
            let connection = if status == 426 { Some("upgrade") } else { closes.then_some("close") };
            assert_eq!(header("connection").as_deref(), connection, "{error:?}");
            assert_eq!(header("upgrade").as_deref(), (status == 426).then_some("HTTP/1.1"));
            let is_of_operators = matches!(error, E::AdminToken | E::PageKey);
            let scheme = if is_of_operators { "Basic realm=\"Zap\"" } else { "Bearer" };
            assert_eq!(header("www-authenticate").as_deref(), (status == 401).then_some(scheme));
            assert_eq!(header("allow").as_deref(), (status == 405).then_some("POST"));
            let is_final =
                status >= 500 || ["insufficient_quota", "request_too_large_for_limit"].contains(&code);
            assert_eq!(header("x-should-retry").as_deref(), is_final.then_some("false"));
            let mut body = response.into_body();
            let frame = poll_ready(body.frame()).unwrap().unwrap().into_data().unwrap();
            let json: serde_json::Value = serde_json::from_slice(&frame).unwrap();
            let error_json = &json["error"];
            assert_eq!((error_json["type"].as_str(), error_json["code"].as_str()), (Some(kind), Some(code)));
            assert_eq!(error_json["param"].as_str(), param);
            let message = error_json["message"].as_str().unwrap();
            assert!(message.ends_with('.') || status == 429);
            assert!(status == 429 || !is_misleading(message), "{message}");
        }
        for code in [Code::Draining, Code::StreamInterrupted] {
            for format in [StreamFormat::Done, StreamFormat::Messages, StreamFormat::Responses] {
                assert!(!is_misleading(&StreamEnding::new(format).event(code, "")));
            }
        }
        assert!(
            !GatewayError::QueueFull
                .response(Protocol::OpenAi, false)
                .headers()
                .contains_key("x-should-retry")
        );
        for error in
            [GatewayError::NoBackend, GatewayError::UpstreamAuth("".into()), GatewayError::UpstreamRedirect]
        {
            assert_eq!(
                error.response(Protocol::OpenAi, false).headers()["x-should-retry"],
                "false",
                "{error:?}"
            );
        }
    }

    #[test]
    fn a_spent_budget_says_when_it_opens() {
        let opens = Day::parse("2026-12-01").unwrap();
        let spent = LimitError::BudgetSpent { limit: 2_500_000_000, per: Period::Month, opens };
        let message = GatewayError::Limited(spent).row().message;
        assert!(
            message.contains("2.5 USD a month") && message.contains("on 2026-12-01 at 00:00 UTC"),
            "{message}"
        );
    }

    fn poll_ready<F: Future + Unpin>(mut future: F) -> F::Output {
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        match std::pin::Pin::new(&mut future).poll(&mut cx) {
            std::task::Poll::Ready(out) => out,
            std::task::Poll::Pending => panic!("the body is not ready"),
        }
    }
}
