//! The error event that Zap puts at the end of a stream that it cuts, in the format of the endpoint.

use serde_json::json;

use crate::code::Code;
use crate::protocol::endpoint::{Protocol, StreamFormat};
use crate::protocol::error_body::{ErrorBody, error_status};
use crate::protocol::responses::StreamState;

/// What Zap must know of a stream to end it with an error event.
#[derive(Debug)]
pub(crate) enum StreamEnding {
    /// The error object of OpenAI's API.
    OpenAi,
    /// The error object of Anthropic's API.
    Messages,
    /// A failed response. Boxed, since it is large and rarely present.
    Responses(Box<StreamState>),
}

impl StreamEnding {
    /// Starts a stream.
    pub(crate) fn new(format: StreamFormat) -> Self {
        match format {
            StreamFormat::Done | StreamFormat::Plain => StreamEnding::OpenAi,
            StreamFormat::Messages => StreamEnding::Messages,
            StreamFormat::Responses => StreamEnding::Responses(Box::default()),
        }
    }

    /// Reads what goes out.
    pub(crate) fn feed(&mut self, data: &[u8]) {
        if let StreamEnding::Responses(seen) = self {
            seen.feed(data);
        }
    }

    /// Whether the body must end cleanly behind the error event: clients drop the last event of a stream that is cut.
    /// Those of the other formats know an incomplete stream by its cut alone.
    pub(crate) fn is_clean(&self) -> bool {
        matches!(self, StreamEnding::Messages | StreamEnding::Responses(_))
    }

    /// Returns the error event with this code. `request_id` replaces the id of a response that is unknown.
    pub(crate) fn event(&self, code: Code, request_id: &str) -> String {
        let (message, kind) = match code {
            Code::Draining => (
                "The gateway is shutting down; the response is incomplete. Send the request again.",
                "server_error",
            ),
            _ => ("The stream was cut before its end; the response is incomplete.", "upstream_error"),
        };
        let error = ErrorBody { message, kind, param: None, code };
        let json = |protocol| error.write(protocol, error_status(protocol, code, 502));
        match self {
            StreamEnding::OpenAi => format!("data: {}\n\n", json(Protocol::OpenAi)),
            StreamEnding::Messages => format!("event: error\ndata: {}\n\n", json(Protocol::Anthropic)),
            StreamEnding::Responses(seen) => {
                let error = json!({ "message": message, "type": kind, "param": null, "code": code.text() });
                seen.failed(request_id, &error)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    /// The name of an event, and its data.
    fn parts(event: &str) -> (Option<&str>, Value) {
        let (name, data) = event.strip_suffix("\n\n").unwrap().split_once("data: ").unwrap();
        let name = name.strip_prefix("event: ").map(|name| name.strip_suffix('\n').unwrap());
        (name, serde_json::from_str(data).unwrap())
    }

    #[test]
    fn the_event_is_one_event_in_the_format_of_the_endpoint() {
        for code in [Code::StreamInterrupted, Code::Draining] {
            let event = |format| StreamEnding::new(format).event(code, "r");
            let chat = event(StreamFormat::Done);
            let (name, json) = parts(&chat);
            assert_eq!((name, &json["error"]["code"]), (None, &code.text().into()));
            assert!(json["error"]["param"].is_null());
            assert_eq!(event(StreamFormat::Plain), chat);
            let failed = event(StreamFormat::Responses);
            let (name, failed) = parts(&failed);
            assert_eq!(name, Some("response.failed"));
            assert_eq!(failed["error"], json["error"], "both SDKs raise this error");
            let message = event(StreamFormat::Messages);
            let (name, message) = parts(&message);
            let kind = if code == Code::Draining { "overloaded_error" } else { "api_error" };
            assert_eq!((name, &message["type"]), (Some("error"), &"error".into()));
            assert_eq!(message["error"]["type"], kind);
            assert_eq!(message["error"]["message"], json["error"]["message"]);
        }
    }
}
