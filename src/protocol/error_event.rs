//! The error event that Zap sends when an upstream stream is cut, in the format of the endpoint.

use std::borrow::Cow;

use crate::protocol::responses::StreamState;

macro_rules! interrupted {
    () => {
        r#"{"message":"The stream was cut before its end; the response is incomplete.","type":"upstream_error","param":null,"code":"stream_interrupted"}"#
    };
}

/// The event for all endpoints except `/v1/responses`.
const STREAM_INTERRUPTED: &str = concat!(r#"data: {"error":"#, interrupted!(), "}\n\n");

/// Returns the error event for a cut stream. `seen` is the state of a `/v1/responses` stream; `None` for other streams.
pub(crate) fn stream_interrupted(seen: Option<&StreamState>, request_id: &str) -> Cow<'static, str> {
    match seen {
        None => STREAM_INTERRUPTED.into(),
        Some(seen) => {
            let error = serde_json::from_str(interrupted!()).unwrap_or_default();
            seen.failed(request_id, &error).into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interruption_is_one_event_with_an_openai_error() {
        let data = STREAM_INTERRUPTED.strip_prefix("data: ").unwrap().strip_suffix("\n\n").unwrap();
        let json: serde_json::Value = serde_json::from_str(data).unwrap();
        assert_eq!(json["error"]["code"], "stream_interrupted");
        assert!(json["error"]["param"].is_null());
        let failed = stream_interrupted(Some(&StreamState::default()), "r");
        assert!(failed.starts_with("event: response.failed\n"));
        let data = failed.split_once("data: ").unwrap().1;
        let failed: serde_json::Value = serde_json::from_str(data).unwrap();
        assert_eq!(failed["error"], json["error"], "both SDKs raise this error");
    }
}
