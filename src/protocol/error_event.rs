//! The error event that Zap puts at the end of a stream that it cuts, in the format of the endpoint.

use serde_json::json;

use crate::code::Code;
use crate::protocol::responses::StreamState;

/// Returns the error event with this code. `seen` is the state of a `/v1/responses` stream; `None` for other streams.
pub(crate) fn error_event(code: Code, seen: Option<&StreamState>, request_id: &str) -> String {
    let (message, kind) = match code {
        Code::Draining => (
            "The gateway is shutting down; the response is incomplete. Send the request again.",
            "server_error",
        ),
        _ => ("The stream was cut before its end; the response is incomplete.", "upstream_error"),
    };
    let code = code.text();
    match seen {
        // In OpenAI's order. No text needs an escape.
        None => format!(
            "data: {{\"error\":{{\"message\":\"{message}\",\"type\":\"{kind}\",\"param\":null,\"code\":\"{code}\"}}}}\n\n"
        ),
        Some(seen) => {
            seen.failed(request_id, &json!({ "message": message, "type": kind, "param": null, "code": code }))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn the_event_is_one_event_with_an_openai_error() {
        for code in [Code::StreamInterrupted, Code::Draining] {
            let event = error_event(code, None, "r");
            let data = event.strip_prefix("data: ").unwrap().strip_suffix("\n\n").unwrap();
            let json: Value = serde_json::from_str(data).unwrap();
            assert_eq!(json["error"]["code"], code.text());
            assert!(json["error"]["param"].is_null());
            let failed = error_event(code, Some(&StreamState::default()), "r");
            assert!(failed.starts_with("event: response.failed\n"));
            let data = failed.split_once("data: ").unwrap().1;
            let failed: Value = serde_json::from_str(data).unwrap();
            assert_eq!(failed["error"], json["error"], "both SDKs raise this error");
        }
    }
}
