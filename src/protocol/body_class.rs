//! Classifies whole bodies of responses: an answer, an empty answer or an error, and what the error says.

use std::sync::LazyLock;

use memchr::memmem::{Finder, find};
use memchr::{memchr, memrchr};
use serde_json::Value;

use crate::protocol::event_class::{error_status, has_error, is_empty, mentions_error};
use crate::protocol::redact::Redactor;

static CHOICES_KEY: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("\"choices\""));

/// What a whole JSON body of a successful response says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BodyClass {
    /// An answer, or a body that Zap does not know.
    Answer,
    /// An answer without content: `choices` is an empty list.
    Empty,
    /// An error, with the status that it stands for: 400 to 599.
    Error(u16),
}

/// Classifies the whole JSON body of a successful response.
pub(crate) fn classify_body(body: &[u8]) -> BodyClass {
    // Most bodies need not be parsed: they have choices before any other object, or neither key in doubt.
    let choices = CHOICES_KEY.find(body);
    let has_no_choice = choices.is_some_and(|at| {
        let rest = body[at + b"\"choices\"".len()..].trim_ascii_start().strip_prefix(b":");
        let list = rest.map(<[u8]>::trim_ascii_start).and_then(|rest| rest.strip_prefix(b"["));
        list.is_none_or(|list| list.trim_ascii_start().starts_with(b"]"))
    });
    let is_top_level = choices.is_some_and(|at| memrchr(b'{', &body[..at]) == memchr(b'{', body));
    if !has_no_choice && (is_top_level || !mentions_error(body)) {
        return BodyClass::Answer;
    }
    let Ok(json @ Value::Object(_)) = serde_json::from_slice::<Value>(body) else { return BodyClass::Answer };
    let has_answer = ["choices", "output", "data", "content"].iter().any(|key| !is_empty(&json[key]));
    match () {
        () if has_answer => BodyClass::Answer,
        () if has_error(&json) => BodyClass::Error(error_status(&json)),
        () if json["choices"].is_array() => BodyClass::Empty,
        () => BodyClass::Answer,
    }
}

/// Longest message of a provider that is quoted, in bytes.
const MAX_MESSAGE: usize = 200;

/// The message of an error body without `key`, cut to a sensible length; `None` if it has none.
pub(crate) fn error_message(body: &[u8], key: Option<&str>) -> Option<String> {
    let json: Value = serde_json::from_slice(body).ok()?;
    let error = &json["error"];
    let message = error["message"].as_str().or(error.as_str()).or(json["message"].as_str())?;
    // Before the cut: the rest of a key that the cut divides would not be found.
    let redactor = key.and_then(Redactor::new);
    let message = redactor.map_or_else(|| message.to_owned(), |redactor| redactor.text(message));
    let message = &message[..message.floor_char_boundary(MAX_MESSAGE)];
    Some(message.chars().map(|c| if c.is_control() { ' ' } else { c }).collect())
}

/// Whether an error body says that the model is not there, or that the request is too long for it: another model or
/// provider may serve the request.
pub(crate) fn needs_other_model(body: &[u8]) -> bool {
    const KINDS: [&str; 5] = [
        "context_length_exceeded",
        "exceed_context_size_error",
        "model_not_found",
        "model_not_supported",
        "not_found_error",
    ];
    if !KINDS.iter().any(|kind| find(body, kind.as_bytes()).is_some()) {
        return false;
    }
    let Ok(json) = serde_json::from_slice::<Value>(body) else { return false };
    is_of_kind(error_object(&json), &KINDS)
}

/// Whether the body of a 429 says that the request alone is over the limit: no wait helps, and the target has room for
/// others. OpenAI and Groq say it in the message, beside the code of any other rate limit.
pub(crate) fn is_request_too_large(body: &[u8]) -> bool {
    const CODES: [&str; 2] = ["request_too_large", "request_too_large_for_limit"];
    let Ok(json) = serde_json::from_slice::<Value>(body) else { return false };
    let error = error_object(&json);
    let says = |text: &str| text.to_ascii_lowercase().starts_with("request too large");
    error["message"].as_str().is_some_and(says) || is_of_kind(error, &CODES)
}

/// The object that has the code and the type of an error: the member `error`, or the body itself.
fn error_object(body: &Value) -> &Value {
    if body["error"].is_object() { &body["error"] } else { body }
}

/// Whether the code or the type of an error is one of `kinds`.
fn is_of_kind(error: &Value, kinds: &[&str]) -> bool {
    [&error["code"], &error["type"]]
        .iter()
        .any(|kind| kind.as_str().is_some_and(|kind| kinds.contains(&kind)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classifies_whole_bodies() {
        for (body, want) in [
            (r#"{"choices":[{"message":{"content":"\"error\""}}]}"#, BodyClass::Answer),
            (r#"{"error":{"message":"m"}}"#, BodyClass::Error(502)),
            (r#"{"error":{"code":503},"choices":[]}"#, BodyClass::Error(503)),
            (r#"{"error":{"code":503},"choices":[{"index":0}]}"#, BodyClass::Answer),
            (r#"{"error":{"status":400},"data":[]}"#, BodyClass::Error(400)),
            (r#"{"error":{},"data":[{"embedding":[]}]}"#, BodyClass::Answer),
            (r#"{"error":null,"output":[]}"#, BodyClass::Answer),
            (r#"{"error":null,"choices":[]}"#, BodyClass::Empty),
            (r#"{"choices" : [ ] }"#, BodyClass::Empty),
            (r#"{"x":{"choices":[]}}"#, BodyClass::Answer),
            (r#"["error"]"#, BodyClass::Answer),
            (r#"{"error""#, BodyClass::Answer),
            ("", BodyClass::Answer),
        ] {
            assert_eq!(classify_body(body.as_bytes()), want, "{body}");
        }
    }

    #[test]
    fn quotes_the_message_of_an_error() {
        for (body, want) in [
            (r#"{"error":{"message":"bad\nkey"}}"#, Some("bad key")),
            (r#"{"error":"bad key"}"#, Some("bad key")),
            (r#"{"message":"bad key"}"#, Some("bad key")),
            (r#"{"error":{}}"#, None),
            ("bad key", None),
        ] {
            assert_eq!(error_message(body.as_bytes(), None).as_deref(), want, "{body}");
        }
        let long = format!(r#"{{"error":"{}"}}"#, "é".repeat(500));
        assert_eq!(error_message(long.as_bytes(), None).unwrap().len(), MAX_MESSAGE);
    }

    #[test]
    fn a_key_across_the_cut_of_a_message_is_not_quoted() {
        let key = "sk-CANARY-0123456789-abcdefghijklmnopqrstuv";
        for padding in 0..=MAX_MESSAGE + 1 {
            let body = format!(r#"{{"error":{{"message":"{} {key}, sk"}}}}"#, "x".repeat(padding));
            let message = error_message(body.as_bytes(), Some(key)).unwrap();
            assert!(!message.contains("sk-") && message.len() <= MAX_MESSAGE, "{message}");
        }
    }

    #[test]
    fn a_request_that_is_too_large_for_a_limit_is_known_by_its_error() {
        for (body, want) in [
            (
                r#"{"error":{"message":"Request too large for gpt-4 on tokens per min (TPM): Limit 10000, Requested 12000.","type":"tokens","code":"rate_limit_exceeded"}}"#,
                true,
            ),
            (r#"{"error":{"code":"request_too_large_for_limit"}}"#, true),
            (r#"{"type":"request_too_large","message":"m"}"#, true),
            (r#"{"error":{"message":"Rate limit reached for gpt-4","code":"rate_limit_exceeded"}}"#, false),
            (r#"{"error":"Request too large"}"#, false),
            ("Request too large", false),
        ] {
            assert_eq!(is_request_too_large(body.as_bytes()), want, "{body}");
        }
    }

    #[test]
    fn a_missing_model_and_a_context_that_is_too_long_need_another_model() {
        for (body, want) in [
            (r#"{"error":{"code":"model_not_found"}}"#, true),
            (r#"{"error":{"type":"not_found_error","message":"m"}}"#, true),
            (r#"{"error":{"code":400,"type":"exceed_context_size_error"}}"#, true),
            (r#"{"code":"context_length_exceeded"}"#, true),
            (r#"{"error":{"code":"invalid_value","message":"model_not_found"}}"#, false),
            (r#"{"error":"model_not_found"}"#, false),
            ("model_not_found", false),
        ] {
            assert_eq!(needs_other_model(body.as_bytes()), want, "{body}");
        }
    }
}
