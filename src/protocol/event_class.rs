//! Classifies the events of a stream (WHATWG HTML, section 9.2): what one event means for the try that it belongs to.
//!
//! A pure function of the endpoint's [`StreamFormat`] and the bytes of one event. An event that is not understood is
//! content: it is never held back.

use std::borrow::Cow;
use std::sync::LazyLock;

use memchr::memmem::Finder;
use memchr::{memchr, memchr2};
use serde_json::{Value, json};

use crate::protocol::endpoint::StreamFormat;
use crate::protocol::error_body::API_ERROR;
use crate::protocol::event_shape::text_length;
use crate::protocol::usage::UsageParts;

/// The status of an error inside a stream or a body that names none.
const DEFAULT_STATUS: u16 = 502;

static ERROR_KEY: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("\"error\""));

/// What an event means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// A part of the answer, or an event that Zap does not know.
    Content,
    /// An error of the provider, with the status that it stands for: 400 to 599.
    Error(u16),
    /// A part of the answer that also says why the model has stopped.
    Finish,
    /// What comes before the answer: the role, an empty delta, a comment.
    Prelude,
    /// The end of the stream.
    Terminal,
    /// The token counts of the answer, without a part of it.
    Usage,
}

/// What one event says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Said {
    /// What the event means.
    pub class: Class,
    /// The token counts in it, if they are a usage.
    pub usage: Option<UsageParts>,
    /// The length of the text of the model in it, in bytes.
    pub text: u64,
    /// Whether its data is JSON.
    pub is_json: bool,
}

impl Said {
    fn no_json(class: Class) -> Self {
        Said { class, usage: None, text: 0, is_json: false }
    }
}

/// Classifies one event, and reads its token counts. `event` is the event with or without its final empty line.
pub(crate) fn read_event(format: StreamFormat, event: &[u8]) -> Said {
    let fields = Fields::of(event);
    let Some(data) = fields.data else { return Said::no_json(Class::Prelude) };
    if format == StreamFormat::Done && data.trim_ascii() == b"[DONE]" {
        return Said::no_json(Class::Terminal);
    }
    let Ok(json) = serde_json::from_slice::<Value>(&data) else {
        let is_error = fields.name == b"error";
        return Said::no_json(if is_error { Class::Error(DEFAULT_STATUS) } else { Class::Content });
    };
    let class = match format {
        _ if fields.name == b"error" || has_error(&json) => Class::Error(error_status(&json)),
        StreamFormat::Done => of_chunk(&json),
        StreamFormat::Messages => of_message_event(fields.name, &json),
        StreamFormat::Plain => Class::Content,
        StreamFormat::Responses => of_response_event(fields.name, &json),
    };
    let usage = match format {
        StreamFormat::Responses => &json["response"]["usage"],
        StreamFormat::Messages if json["message"].is_object() => &json["message"]["usage"],
        StreamFormat::Done | StreamFormat::Messages | StreamFormat::Plain => &json["usage"],
    };
    Said { class, usage: UsageParts::of_usage(usage), text: text_length(format, &json), is_json: true }
}

/// The data of an event, if it is JSON.
pub(crate) fn event_json(event: &[u8]) -> Option<Value> {
    serde_json::from_slice(&Fields::of(event).data?).ok()
}

/// The fields of an event that Zap reads.
#[derive(Debug, Default)]
struct Fields<'e> {
    /// The value of the last `event` line.
    name: &'e [u8],
    /// The `data` lines, joined by line feeds; `None` if there is none.
    data: Option<Cow<'e, [u8]>>,
}

impl<'e> Fields<'e> {
    fn of(event: &'e [u8]) -> Self {
        let mut fields = Fields::default();
        let mut rest = event;
        while !rest.is_empty() {
            let end = memchr2(b'\n', b'\r', rest).unwrap_or(rest.len());
            let line = &rest[..end];
            rest = rest.get(end + 1..).unwrap_or_default();
            let (name, value) = match memchr(b':', line) {
                Some(colon) => (&line[..colon], &line[colon + 1..]),
                None => (line, &b""[..]),
            };
            let value = value.strip_prefix(b" ").unwrap_or(value);
            match name {
                b"event" => fields.name = value,
                b"data" => {
                    fields.data = Some(match fields.data.take() {
                        None => Cow::Borrowed(value),
                        Some(before) => Cow::Owned([&before, &b"\n"[..], value].concat()),
                    });
                }
                _ => {}
            }
        }
        fields
    }
}

/// A chunk of a chat or text completion.
fn of_chunk(json: &Value) -> Class {
    let Some(choices) = json["choices"].as_array() else { return Class::Content };
    if choices.is_empty() {
        return if json["usage"].is_null() { Class::Prelude } else { Class::Usage };
    }
    if choices.iter().any(|choice| !is_empty(&choice["finish_reason"])) {
        return Class::Finish;
    }
    if choices.iter().all(is_empty_choice) { Class::Prelude } else { Class::Content }
}

/// Whether a choice has a delta or a text, and nothing in it but the role.
fn is_empty_choice(choice: &Value) -> bool {
    let is_empty_delta = |delta: &Value| match delta.as_object() {
        Some(members) => members.iter().all(|(key, value)| key == "role" || is_empty(value)),
        None => false,
    };
    match (choice.get("delta"), choice.get("text")) {
        (None, None) => false,
        (delta, text) => delta.is_none_or(is_empty_delta) && text.is_none_or(is_empty),
    }
}

/// Whether a value says nothing: null, or an empty text, list or object.
pub(crate) fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(members) => members.is_empty(),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

/// An event of `/v1/responses`. Its type is the member `type`; the name of the event is the same, or missing.
fn of_response_event(name: &[u8], json: &Value) -> Class {
    let name = json["type"].as_str().map_or(name, str::as_bytes);
    match name {
        b"response.completed" | b"response.incomplete" => Class::Terminal,
        b"response.failed" => Class::Error(status_of(&json["response"]["error"])),
        b"error" => Class::Error(error_status(json)),
        b"response.created"
        | b"response.queued"
        | b"response.in_progress"
        | b"response.content_part.added"
        | b"response.reasoning_summary_part.added" => Class::Prelude,
        b"response.output_item.added" => match json["item"]["type"].as_str() {
            Some("message" | "reasoning") => Class::Prelude,
            _ => Class::Content,
        },
        _ => Class::Content,
    }
}

/// An event of `/v1/messages`. Its type is the member `type`; the name of the event is the same, or missing.
fn of_message_event(name: &[u8], json: &Value) -> Class {
    let name = json["type"].as_str().map_or(name, str::as_bytes);
    match name {
        b"message_start" | b"ping" | b"content_block_stop" => Class::Prelude,
        b"content_block_start" => {
            let block = &json["content_block"];
            let is_empty_text = match block["type"].as_str() {
                Some("text") => is_empty(&block["text"]),
                Some("thinking") => is_empty(&block["thinking"]),
                _ => false,
            };
            if is_empty_text { Class::Prelude } else { Class::Content }
        }
        b"message_delta" if is_empty(&json["delta"]["stop_reason"]) => Class::Prelude,
        b"message_delta" => Class::Finish,
        b"message_stop" => Class::Terminal,
        b"error" => Class::Error(error_status(json)),
        _ => Class::Content,
    }
}

/// Whether an object has a top-level `error` that is not null.
pub(crate) fn has_error(json: &Value) -> bool {
    json.get("error").is_some_and(|error| !error.is_null())
}

/// Whether a JSON text has the key `error` anywhere, with or without an error.
pub(crate) fn mentions_error(text: &[u8]) -> bool {
    ERROR_KEY.find(text).is_some()
}

/// The status that an error stands for: the `code` or `status` of its `error`, or its own.
pub(crate) fn error_status(json: &Value) -> u16 {
    status_of(if has_error(json) { &json["error"] } else { json })
}

/// The member `code` or `status` if it is a number from 400 to 599.
fn status_of(error: &Value) -> u16 {
    let status = |key: &str| error[key].as_u64().and_then(|n| u16::try_from(n).ok());
    [status("code"), status("status")]
        .into_iter()
        .flatten()
        .find(|n| (400..600).contains(n))
        .unwrap_or(DEFAULT_STATUS)
}

/// The data of an error event as the JSON body of an error response.
pub(crate) fn error_body(format: StreamFormat, event: &[u8]) -> Vec<u8> {
    let data = Fields::of(event).data.unwrap_or_default();
    let error = match serde_json::from_slice::<Value>(&data) {
        Ok(json) if has_error(&json) => return data.into_owned(),
        Ok(mut json) if has_error(&json["response"]) => json["response"]["error"].take(),
        Ok(json @ Value::Object(_)) => json,
        _ => {
            let message = String::from_utf8_lossy(&data);
            match format {
                StreamFormat::Messages => json!({ "type": API_ERROR, "message": message }),
                StreamFormat::Done | StreamFormat::Plain | StreamFormat::Responses => json!({
                    "message": message, "type": "upstream_error", "param": null, "code": "upstream_error",
                }),
            }
        }
    };
    let body = match format {
        StreamFormat::Messages => json!({ "error": error, "type": "error" }),
        StreamFormat::Done | StreamFormat::Plain | StreamFormat::Responses => json!({ "error": error }),
    };
    body.to_string().into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classifies_every_row_of_the_table() {
        use StreamFormat::{Done, Messages, Plain, Responses};
        #[rustfmt::skip]
        let rows = [
            // messages
            (Messages, "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"content\":[],\"usage\":{\"input_tokens\":3,\"output_tokens\":1}}}", Class::Prelude),
            (Messages, r#"data: {"type":"message_start","message":{}}"#, Class::Prelude),
            (Messages, "event: ping\ndata: {\"type\": \"ping\"}", Class::Prelude),
            (Messages, "event: ping\ndata: {}", Class::Prelude),
            (Messages, r#"data: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}"#, Class::Prelude),
            (Messages, r#"data: {"type":"content_block_start","index":0,"content_block":{"type":"thinking","thinking":"","signature":""}}"#, Class::Prelude),
            (Messages, r#"data: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":"a"}}"#, Class::Content),
            (Messages, r#"data: {"type":"content_block_start","index":1,"content_block":{"type":"tool_use","id":"t","name":"f","input":{}}}"#, Class::Content),
            (Messages, r#"data: {"type":"content_block_start","index":1,"content_block":{"type":"server_tool_use","id":"t","name":"f","input":{}}}"#, Class::Content),
            (Messages, r#"data: {"type":"content_block_start","index":1,"content_block":{"type":"redacted_thinking","data":"x"}}"#, Class::Content),
            (Messages, r#"data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"a"}}"#, Class::Content),
            (Messages, r#"data: {"type":"content_block_delta","index":0,"delta":{"type":"signature_delta","signature":"a"}}"#, Class::Content),
            (Messages, r#"data: {"type":"content_block_stop","index":0}"#, Class::Prelude),
            (Messages, r#"data: {"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},"usage":{"output_tokens":15}}"#, Class::Finish),
            (Messages, r#"data: {"type":"message_delta","delta":{"stop_reason":null},"usage":{"output_tokens":15}}"#, Class::Prelude),
            (Messages, "event: message_stop\ndata: {\"type\":\"message_stop\"}", Class::Terminal),
            (Messages, "event: message_stop\ndata: {}", Class::Terminal),
            (Messages, "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"overloaded_error\",\"message\":\"Overloaded\"}}", Class::Error(502)),
            (Messages, r#"data: {"type":"error","error":{"type":"api_error","status":529}}"#, Class::Error(529)),
            (Messages, r#"data: {"type":"error","message":"m"}"#, Class::Error(502)),
            (Messages, "event: error\ndata: it broke", Class::Error(502)),
            (Messages, "data: [DONE]", Class::Content),
            (Messages, "event: something_new\ndata: {\"type\":\"something_new\"}", Class::Content),
            (Messages, ": ping", Class::Prelude),
            // chat and completions
            (Done, r#"data: {"choices":[{"delta":{"role":"assistant"},"finish_reason":null}]}"#, Class::Prelude),
            (Done, r#"data: {"choices":[{"delta":{"role":"assistant","content":"","reasoning_content":null,"tool_calls":[]}}]}"#, Class::Prelude),
            (Done, r#"data: {"choices":[],"prompt_filter_results":[{"prompt_index":0}]}"#, Class::Prelude),
            (Done, r#"data: {"choices":[],"usage":null}"#, Class::Prelude),
            (Done, r#"data: {"choices":[],"usage":{"total_tokens":3}}"#, Class::Usage),
            (Done, ": OPENROUTER PROCESSING", Class::Prelude),
            (Done, "id: 7", Class::Prelude),
            (Done, "retry: 100\nid: 7", Class::Prelude),
            (Done, "event: error", Class::Prelude),
            (Done, r#"data: {"choices":[{"delta":{"content":"a"}}]}"#, Class::Content),
            (Done, r#"data: {"choices":[{"delta":{"reasoning_content":"a"}}]}"#, Class::Content),
            (Done, r#"data: {"choices":[{"delta":{"reasoning":"a"}}]}"#, Class::Content),
            (Done, r#"data: {"choices":[{"delta":{"refusal":"a"}}]}"#, Class::Content),
            (Done, r#"data: {"choices":[{"delta":{"tool_calls":[{"index":0}]}}]}"#, Class::Content),
            (Done, r#"data: {"choices":[{"delta":{"function_call":{"name":"f"}}}]}"#, Class::Content),
            (Done, r#"data: {"choices":[{"delta":{"audio":{"id":"a"}}}]}"#, Class::Content),
            (Done, r#"data: {"choices":[{"delta":{}},{"delta":{"content":"b"}}]}"#, Class::Content),
            (Done, r#"data: {"choices":[{"delta":{},"finish_reason":"stop"}]}"#, Class::Finish),
            (Done, r#"data: {"choices":[{"delta":{"role":"assistant"},"finish_reason":""}]}"#, Class::Prelude),
            (Done, r#"data: {"choices":[{"text":""}]}"#, Class::Prelude),
            (Done, r#"data: {"choices":[{"text":"a","finish_reason":null}]}"#, Class::Content),
            (Done, r#"data: {"choices":[{"text":"","finish_reason":"length"}]}"#, Class::Finish),
            (Done, r#"data: {"choices":[{"message":{}}]}"#, Class::Content),
            (Done, r#"data: {"choices":[{"delta":"x"}]}"#, Class::Content),
            (Done, r#"data: {"object":"unknown"}"#, Class::Content),
            (Done, "data: not JSON", Class::Content),
            (Done, "data: {\"choices\":\ndata: []}", Class::Prelude),
            (Done, "data: [DONE]", Class::Terminal),
            (Done, "data:[DONE] \r\n\r\n", Class::Terminal),
            (Done, "event: x\rdata: [DONE]\r\r", Class::Terminal),
            (Done, "data: [DONE]x", Class::Content),
            (Done, r#"data: {"error":{"message":"m","code":429}}"#, Class::Error(429)),
            (Done, r#"data: {"error":{"message":"m","code":200,"status":503},"choices":[{"delta":{"content":"a"},"finish_reason":"error"}]}"#, Class::Error(503)),
            (Done, r#"data: {"error":"text"}"#, Class::Error(502)),
            (Done, r#"data: {"error":null,"choices":[{"delta":{"content":"a"}}]}"#, Class::Content),
            (Done, r#"data: {"choices":[{"delta":{"content":"\"error\""}}]}"#, Class::Content),
            (Done, "event: error\ndata: it broke", Class::Error(502)),
            (Done, "event: error\ndata: {\"code\":500}", Class::Error(500)),
            // responses
            (Responses, r#"data: {"type":"response.created","response":{"error":null}}"#, Class::Prelude),
            (Responses, "event: response.queued\ndata: {}", Class::Prelude),
            (Responses, r#"data: {"type":"response.in_progress"}"#, Class::Prelude),
            (Responses, r#"data: {"type":"response.content_part.added"}"#, Class::Prelude),
            (Responses, r#"data: {"type":"response.reasoning_summary_part.added"}"#, Class::Prelude),
            (Responses, r#"data: {"type":"response.output_item.added","item":{"type":"message"}}"#, Class::Prelude),
            (Responses, r#"data: {"type":"response.output_item.added","item":{"type":"reasoning"}}"#, Class::Prelude),
            (Responses, r#"data: {"type":"response.output_item.added","item":{"type":"function_call"}}"#, Class::Content),
            (Responses, r#"data: {"type":"response.output_text.delta","delta":"a"}"#, Class::Content),
            (Responses, r#"data: {"type":"response.function_call_arguments.delta"}"#, Class::Content),
            (Responses, r#"data: {"type":"response.web_search_call.completed"}"#, Class::Content),
            (Responses, r#"data: {"type":"response.completed","response":{}}"#, Class::Terminal),
            (Responses, "event: response.incomplete\ndata: {}", Class::Terminal),
            (Responses, r#"data: {"type":"response.failed","response":{"error":{"code":"server_error"}}}"#, Class::Error(502)),
            (Responses, r#"data: {"type":"error","code":"rate_limit_exceeded","message":"m"}"#, Class::Error(502)),
            (Responses, r#"data: {"type":"response.output_text.delta","error":{"code":500}}"#, Class::Error(500)),
            (Responses, "data: [DONE]", Class::Content),
            // all others
            (Plain, "data: [DONE]", Class::Content),
            (Plain, r#"data: {"type":"speech.audio.delta"}"#, Class::Content),
            (Plain, r#"data: {"error":{"code":400}}"#, Class::Error(400)),
            (Plain, ": ping", Class::Prelude),
        ];
        for (format, event, want) in rows {
            assert_eq!(read_event(format, event.as_bytes()).class, want, "{format:?} {event}");
            let whole = format!("{event}\n\n");
            assert_eq!(read_event(format, whole.as_bytes()).class, want, "{format:?} {event}");
        }
    }

    #[test]
    fn an_error_event_becomes_an_error_body() {
        for (event, want) in [
            ("data: {\"error\":{\"code\":1}}", r#"{"error":{"code":1}}"#),
            ("event: error\ndata: {\"message\":\"m\"}", r#"{"error":{"message":"m"}}"#),
            (
                "data: {\"type\":\"response.failed\",\"response\":{\"error\":{\"code\":\"c\"}}}",
                r#"{"error":{"code":"c"}}"#,
            ),
            (
                "event: error\ndata: it \"broke\"",
                r#"{"error":{"code":"upstream_error","message":"it \"broke\"","param":null,"type":"upstream_error"}}"#,
            ),
        ] {
            let body: Value =
                serde_json::from_slice(&error_body(StreamFormat::Done, event.as_bytes())).unwrap();
            assert_eq!(body, serde_json::from_str::<Value>(want).unwrap(), "{event}");
        }
    }

    #[test]
    fn an_error_of_a_message_stream_keeps_the_shape_of_its_dialect() {
        for (event, want) in [
            (
                r#"data: {"type":"error","error":{"type":"overloaded_error","message":"m"},"request_id":"r"}"#,
                r#"{"type":"error","error":{"type":"overloaded_error","message":"m"},"request_id":"r"}"#,
            ),
            (
                "event: error\ndata: it broke",
                r#"{"type":"error","error":{"type":"api_error","message":"it broke"}}"#,
            ),
            ("event: error\ndata: {\"message\":\"m\"}", r#"{"type":"error","error":{"message":"m"}}"#),
        ] {
            let body: Value =
                serde_json::from_slice(&error_body(StreamFormat::Messages, event.as_bytes())).unwrap();
            assert_eq!(body, serde_json::from_str::<Value>(want).unwrap(), "{event}");
        }
    }
}
