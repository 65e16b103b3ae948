//! Makes spans of finished traces, after OpenTelemetry's conventions for HTTP and for generative AI.
//!
//! A span has names, numbers and codes, never a key and nothing that a user or a model has written.

use std::borrow::Cow;
use std::time::UNIX_EPOCH;

use bytes::Bytes;
use prost::Message as _;

use crate::clock;
use crate::config::Otlp;
use crate::http1::trace_context::SpanId;
use crate::protocol::Endpoint;
use crate::protocol::provider_name::provider_name;
use crate::telemetry::otlp::message::{
    AnyValue, ExportRequest, ExportResponse, KIND_CLIENT, KIND_SERVER, KeyValue, List, Resource,
    ResourceSpans, STATUS_ERROR, Scope, ScopeSpans, Span, Status, Value,
};
use crate::telemetry::otlp::trace::{FinishedTrace, TrySpan};
use crate::time::{MILLI, Nanos, SECOND};

/// Attributes that a span has at most.
const MAX_ATTRIBUTES: usize = 20;

/// Flags of a span beside those of the trace: it is known whether the parent is in another program, and it is.
const HAS_REMOTE: u32 = 0x100;
const IS_REMOTE: u32 = 0x200;

/// Encodes traces with the same settings as one request of OTLP.
pub(crate) fn encode(settings: &Otlp, traces: &[FinishedTrace]) -> Vec<u8> {
    let text = |text: &String| Bytes::copy_from_slice(text.as_bytes());
    let resource = settings.resource.iter().map(|(key, value)| pair(text(key), Value::Text(text(value))));
    let scope = Scope { name: "zap".to_owned(), version: env!("CARGO_PKG_VERSION").to_owned() };
    let request = ExportRequest {
        resource_spans: vec![ResourceSpans {
            resource: Some(Resource { attributes: resource.collect() }),
            scope_spans: vec![ScopeSpans {
                scope: Some(scope),
                spans: traces.iter().flat_map(spans_of).collect(),
            }],
        }],
    };
    request.encode_to_vec()
}

/// The number of spans that a collector has rejected, by the body of its response.
pub(crate) fn rejected(response: &[u8]) -> u64 {
    let response = ExportResponse::decode(response).unwrap_or_default();
    response.partial_success.map_or(0, |partial| u64::try_from(partial.rejected_spans).unwrap_or(0))
}

fn spans_of(finished: &FinishedTrace) -> impl Iterator<Item = Span> {
    let tries = finished.trace.tries.iter().map(|one| of_try(finished, one));
    std::iter::once(of_request(finished)).chain(tries)
}

/// The span of the request.
fn of_request(finished: &FinishedTrace) -> Span {
    let FinishedTrace { trace, endpoint, method, status, error, .. } = finished;
    let mut attributes = Attributes(Vec::with_capacity(MAX_ATTRIBUTES));
    let name = match (method, endpoint.route()) {
        (Some(method), Some(route)) => format!("{method} {route}"),
        (Some(method), None) => method.to_string(),
        (None, _) => "HTTP".to_owned(),
    };
    if let Some(method) = method {
        attributes.text("http.request.method", method.as_str());
    }
    attributes.text("url.path", &trace.path);
    if let Some(route) = endpoint.route() {
        attributes.word("http.route", route);
    }
    let (host, port) = host_and_port(&trace.host);
    if !host.is_empty() {
        attributes.text("server.address", host);
        attributes.extend(port.map(|port| number("server.port", port)));
    }
    attributes.number("http.response.status_code", u64::from(*status));
    of_api(&mut attributes, *endpoint, finished.model.as_deref(), finished.is_stream);
    attributes.fraction("zap.queue_ms", finished.queued as f64 / MILLI as f64);
    if let Some(error) = error {
        attributes.word("error.type", error.clone());
    }
    let is_remote = if trace.parent.is_some() { IS_REMOTE } else { 0 };
    Span {
        parent_span_id: trace.parent.map(Vec::from).unwrap_or_default(),
        name,
        kind: KIND_SERVER,
        attributes: attributes.0,
        status: finished.is_fault.then(|| Status { code: STATUS_ERROR, ..Status::default() }),
        flags: u32::from(trace.flags) | HAS_REMOTE | is_remote,
        ..span(finished, trace.span_id, finished.times)
    }
}

/// The span of a try.
fn of_try(finished: &FinishedTrace, one: &TrySpan) -> Span {
    let FinishedTrace { trace, endpoint, usage, .. } = finished;
    let url = &one.upstream.conf.url;
    let mut attributes = Attributes(Vec::with_capacity(MAX_ATTRIBUTES));
    let operation = endpoint.operation();
    of_api(&mut attributes, *endpoint, one.model.as_deref(), finished.is_stream);
    attributes.word("gen_ai.provider.name", provider_name(&url.host, endpoint.protocol()));
    attributes.text("server.address", &url.host);
    attributes.number("server.port", u64::from(url.port));
    if let Some(method) = &finished.method {
        attributes.text("http.request.method", method.as_str());
    }
    if one.status > 0 {
        attributes.number("http.response.status_code", u64::from(one.status));
    }
    attributes.text("zap.backend", one.upstream.name());
    attributes.number("zap.attempt", u64::from(one.number));
    // The answer is that of the try that was open to the end.
    let has_answered = one.ended.is_none();
    if has_answered {
        if let Some(model) = &trace.answer.model {
            attributes.text("gen_ai.response.model", model);
        }
        if !trace.answer.finish_reasons.is_empty() {
            let reasons = trace.answer.finish_reasons.iter();
            attributes.list("gen_ai.response.finish_reasons", reasons.map(|reason| &**reason));
        }
        if let Some(usage) = usage {
            attributes.number("gen_ai.usage.input_tokens", usage.input);
            attributes.number("gen_ai.usage.output_tokens", usage.output);
            for (key, part) in [
                ("gen_ai.usage.cache_read.input_tokens", usage.cached),
                ("gen_ai.usage.cache_creation.input_tokens", usage.cache_write),
                ("gen_ai.usage.reasoning.output_tokens", usage.reasoning),
            ] {
                attributes.extend((part > 0).then(|| number(key, part)));
            }
        }
        if let Some(first) = finished.first_content {
            let seconds = first.saturating_sub(one.started) as f64 / SECOND as f64;
            attributes.fraction("gen_ai.response.time_to_first_chunk", seconds);
        }
    }
    let (error, cause, is_fault) = match &one.fault {
        Some(fault) => (Some(Cow::Borrowed(fault.kind)), &*fault.cause, true),
        None if one.status >= 400 => (Some(one.status.to_string().into()), "", true),
        // The client left, or its request ended otherwise, while the try went on.
        None if has_answered && one.status == 0 => (finished.error.clone(), "", finished.is_fault),
        None => (None, "", false),
    };
    if let Some(error) = error {
        attributes.word("error.type", error);
    }
    Span {
        parent_span_id: trace.span_id.to_vec(),
        name: match &one.model {
            Some(model) => format!("{operation} {model}"),
            None => operation.to_owned(),
        },
        kind: KIND_CLIENT,
        attributes: attributes.0,
        status: is_fault.then(|| Status { code: STATUS_ERROR, message: cause.to_owned() }),
        flags: u32::from(trace.flags) | HAS_REMOTE,
        ..span(finished, one.span_id, (one.started, one.ended.unwrap_or(finished.times.1)))
    }
}

/// What all spans have.
fn span(finished: &FinishedTrace, span_id: SpanId, (started, ended): (Nanos, Nanos)) -> Span {
    let nanos = |at| {
        let since = clock::wall(at).duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    };
    Span {
        trace_id: finished.trace.trace_id.to_vec(),
        span_id: span_id.to_vec(),
        start_time_unix_nano: nanos(started),
        end_time_unix_nano: nanos(ended),
        ..Span::default()
    }
}

/// What the conventions for generative AI ask of both kinds of spans.
fn of_api(attributes: &mut Attributes, endpoint: Endpoint, model: Option<&str>, is_stream: bool) {
    attributes.word("gen_ai.operation.name", endpoint.operation());
    if let Some(model) = model {
        attributes.text("gen_ai.request.model", model);
    }
    if is_stream {
        attributes.push("gen_ai.request.stream", Value::Flag(true));
    }
}

/// The host of a `Host` header, without brackets, and its port.
fn host_and_port(host: &str) -> (&str, Option<u64>) {
    let after_address = host.rfind(']').map_or(0, |at| at + 1);
    let (name, port) = match host.rfind(':').filter(|colon| *colon >= after_address) {
        Some(colon) => (host.get(..colon), host.get(colon + 1..).and_then(|port| port.parse().ok())),
        None => (Some(host), None),
    };
    (name.unwrap_or_default().trim_start_matches('[').trim_end_matches(']'), port)
}

struct Attributes(Vec<KeyValue>);

impl Attributes {
    fn push(&mut self, key: &'static str, value: Value) {
        self.0.push(pair(Bytes::from_static(key.as_bytes()), value));
    }

    fn text(&mut self, key: &'static str, value: &str) {
        self.push(key, Value::Text(Bytes::copy_from_slice(value.as_bytes())));
    }

    /// Adds a text of which there are few.
    fn word(&mut self, key: &'static str, value: impl Into<Cow<'static, str>>) {
        self.push(
            key,
            Value::Text(match value.into() {
                Cow::Borrowed(word) => Bytes::from_static(word.as_bytes()),
                Cow::Owned(word) => Bytes::from(word),
            }),
        );
    }

    fn number(&mut self, key: &'static str, value: u64) {
        self.0.push(number(key, value));
    }

    fn fraction(&mut self, key: &'static str, value: f64) {
        self.push(key, Value::Fraction(value));
    }

    fn list<'t>(&mut self, key: &'static str, values: impl Iterator<Item = &'t str>) {
        let value =
            |text: &str| AnyValue { value: Some(Value::Text(Bytes::copy_from_slice(text.as_bytes()))) };
        self.push(key, Value::List(List { values: values.map(value).collect() }));
    }

    fn extend(&mut self, more: Option<KeyValue>) {
        self.0.extend(more);
    }
}

fn pair(key: Bytes, value: Value) -> KeyValue {
    KeyValue { key, value: Some(AnyValue { value: Some(value) }) }
}

fn number(key: &'static str, value: u64) -> KeyValue {
    pair(Bytes::from_static(key.as_bytes()), Value::Number(i64::try_from(value).unwrap_or(i64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_split_from_its_port() {
        for (host, want) in [
            ("zap", ("zap", None)),
            ("zap:8000", ("zap", Some(8000))),
            ("[::1]:80", ("::1", Some(80))),
            ("[::1]", ("::1", None)),
            ("a:x", ("a", None)),
            ("", ("", None)),
            (":", ("", None)),
            ("]:[", ("", None)),
        ] {
            assert_eq!(host_and_port(host), want, "{host}");
        }
    }

    #[test]
    fn what_a_collector_rejects_is_counted_and_garbage_is_nothing() {
        for (response, want) in [
            (&[][..], 0),
            (&[0x0A, 2, 0x08, 5], 5),
            (&[0x0A, 11, 0x08, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 1], 0),
            (b"<html>", 0),
            (&[0xFF; 40], 0),
        ] {
            assert_eq!(rejected(response), want, "{response:?}");
        }
    }
}
