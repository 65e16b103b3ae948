//! The body and the status of an error of Zap's own, in the shape of the endpoint's protocol.

use serde_json::Value;

use crate::code::Code;
use crate::protocol::endpoint::Protocol;

/// Anthropic's type of an error that is the server's own.
pub(crate) const API_ERROR: &str = "api_error";

/// Anthropic's type of an error that says that the server has no room now.
const OVERLOADED: &str = "overloaded_error";

/// The status that goes with [`OVERLOADED`]. It is not registered; Anthropic's SDKs know it.
const OVERLOADED_STATUS: u16 = 529;

/// An error of Zap's own.
#[derive(Debug)]
pub(crate) struct ErrorBody<'a> {
    /// What happened, and what the client can do.
    pub message: &'a str,
    /// The `type` in OpenAI's API: a class of errors.
    pub kind: &'static str,
    /// The member of the request that is wrong.
    pub param: Option<&'a str>,
    /// The word that names the error.
    pub code: Code,
}

/// The status of an error: `status` in OpenAI's API.
pub(crate) fn error_status(protocol: Protocol, code: Code, status: u16) -> u16 {
    match protocol {
        Protocol::Anthropic if is_overload(code) => OVERLOADED_STATUS,
        Protocol::Anthropic | Protocol::OpenAi => status,
    }
}

fn is_overload(code: Code) -> bool {
    matches!(
        code,
        Code::Draining | Code::MemoryFull | Code::NoBackend | Code::QueueFull | Code::TooManyConnections
    )
}

impl ErrorBody<'_> {
    /// Writes the error as JSON. OpenAI's shape is `{"error":{"message":…,"type":…,"param":…,"code":…}}`. Anthropic's
    /// is `{"error":{"type":…,"message":…}}` with `"type":"error"` before it; Zap adds the `code`.
    pub(crate) fn write(&self, protocol: Protocol, status: u16) -> String {
        let (message, code) = (Value::from(self.message), self.code.text());
        match protocol {
            Protocol::OpenAi => {
                let (kind, param) = (self.kind, self.param.map_or(Value::Null, Value::from));
                format!(
                    "{{\"error\":{{\"message\":{message},\"type\":\"{kind}\",\"param\":{param},\"code\":\"{code}\"}}}}"
                )
            }
            Protocol::Anthropic => {
                let kind = anthropic_type(status);
                format!(
                    "{{\"type\":\"error\",\"error\":{{\"type\":\"{kind}\",\"message\":{message},\"code\":\"{code}\"}}}}"
                )
            }
        }
    }
}

/// Anthropic's type of an error with this status.
fn anthropic_type(status: u16) -> &'static str {
    match status {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        429 => "rate_limit_error",
        400..500 => "invalid_request_error",
        OVERLOADED_STATUS => OVERLOADED,
        _ => API_ERROR,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_error_has_the_shape_and_the_status_of_its_protocol() {
        for (status, code, want_status, want_type) in [
            (400, Code::InvalidJson, 400, "invalid_request_error"),
            (401, Code::InvalidApiKey, 401, "authentication_error"),
            (403, Code::BadRequest, 403, "permission_error"),
            (404, Code::ModelNotFound, 404, "not_found_error"),
            (405, Code::MethodNotAllowed, 405, "invalid_request_error"),
            (413, Code::RequestTooLarge, 413, "invalid_request_error"),
            (429, Code::RateLimitExceeded, 429, "rate_limit_error"),
            (429, Code::InsufficientQuota, 429, "rate_limit_error"),
            (429, Code::RequestTooLargeForLimit, 429, "rate_limit_error"),
            (429, Code::UpstreamRateLimited, 429, "rate_limit_error"),
            (500, Code::InternalError, 500, "api_error"),
            (502, Code::UpstreamEmpty, 502, "api_error"),
            (503, Code::QueueFull, 529, "overloaded_error"),
            (503, Code::MemoryFull, 529, "overloaded_error"),
            (503, Code::TooManyConnections, 529, "overloaded_error"),
            (503, Code::NoBackend, 529, "overloaded_error"),
            (503, Code::Draining, 529, "overloaded_error"),
            (504, Code::QueueTimeout, 504, "api_error"),
        ] {
            let error = ErrorBody { message: "Say \"it\".", kind: "t", param: Some("p\""), code };
            assert_eq!(error_status(Protocol::OpenAi, code, status), status);
            assert_eq!(error_status(Protocol::Anthropic, code, status), want_status, "{code:?}");
            let read =
                |protocol, status| -> Value { serde_json::from_str(&error.write(protocol, status)).unwrap() };
            let code = code.text();
            let openai =
                json!({"error": {"message": "Say \"it\".", "type": "t", "param": "p\"", "code": code}});
            assert_eq!(read(Protocol::OpenAi, status), openai);
            let anthropic = json!({"type": "error", "error": {"type": want_type, "message": "Say \"it\".", "code": code}});
            assert_eq!(read(Protocol::Anthropic, want_status), anthropic);
        }
    }
}
