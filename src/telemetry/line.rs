//! The log line of a request.

use std::fmt::Write as _;
use std::time::SystemTime;

use crate::clock;
use crate::code::Code;
use crate::policy::prices::usd;
use crate::protocol::usage::Usage;
use crate::telemetry::log::push_json;
use crate::telemetry::meter::Used;
use crate::telemetry::record::{Caller, RequestRecord};
use crate::time::{MILLI, Nanos};

impl RequestRecord {
    /// The log line of the request, as one JSON object.
    pub(super) fn line(&self, total: Nanos) -> String {
        let ms = |nanos: Nanos| nanos as f64 / MILLI as f64;
        let mut out = String::with_capacity(400);
        let _ = write!(out, "{{\"time\":\"{}\",\"request_id\":", clock::timestamp(SystemTime::now()));
        push_json(&mut out, self.request_id.to_str().unwrap_or_default());
        out.push_str(",\"upstream_request_id\":");
        push_json_or_null(&mut out, self.upstream_request_id.as_ref().and_then(|id| id.to_str().ok()));
        out.push_str(",\"client\":");
        match &self.caller {
            Caller::Anonymous => out.push_str("\"anonymous\""),
            Caller::Known(client) => push_json(&mut out, &client.conf.name),
            Caller::Unknown(key) => {
                let _ = write!(out, "\"{key:016x}\"");
            }
        }
        let _ = write!(out, ",\"peer\":\"{}\",\"method\":", self.peer.to_canonical());
        push_json_or_null(&mut out, self.method.as_ref().map(|m| cut(m.as_str())));
        out.push_str(",\"path\":");
        push_json(&mut out, cut(&self.path));
        out.push_str(",\"model\":");
        push_json_or_null(&mut out, self.model.as_deref());
        let _ = write!(out, ",\"stream\":{},\"status\":{},\"backend\":", self.stream, self.status);
        push_json_or_null(&mut out, self.backend.as_ref().map(|backend| backend.name()));
        out.push_str(",\"code\":");
        push_json_or_null(&mut out, self.refused.map(Code::text));
        out.push_str(",\"attempts\":[");
        for (i, (backend, fault)) in self.failed.iter().enumerate() {
            out.push_str(if i == 0 { "[" } else { ",[" });
            push_json(&mut out, backend.name());
            let _ = write!(out, ",\"{}\",", fault.kind.text());
            push_json(&mut out, &fault.cause);
            out.push(']');
        }
        if self.tries as usize > self.failed.len()
            && let Some(backend) = &self.backend
        {
            out.push_str(if self.failed.is_empty() { "[" } else { ",[" });
            push_json(&mut out, backend.name());
            let _ = write!(out, ",\"{}\"]", self.status);
        }
        out.push_str("],\"passed\":[");
        self.passed.push_to(&mut out);
        out.push(']');
        self.push_used(&mut out);
        let _ = write!(
            out,
            ",\"queue_ms\":{:.3},\"ttfb_ms\":{:.3},\"total_ms\":{:.3},\"bytes\":{},\"end\":\"{}\"}}",
            ms(self.queued.unwrap_or(0)),
            ms(self.first_byte.unwrap_or(total)),
            ms(total),
            self.bytes,
            self.end.name()
        );
        out
    }

    /// Appends what the answer used.
    fn push_used(&self, out: &mut String) {
        out.push_str(",\"upstream_model\":");
        push_json_or_null(out, self.used.as_ref().and_then(|used| used.model.as_deref()));
        let Some(Used { usage, is_estimate, cost, first_content, .. }) = &self.used else {
            return out.push_str(",\"tokens\":null,\"cost_usd\":null,\"ttft_ms\":null");
        };
        let Usage { input, cached, output, reasoning, .. } = usage;
        let source = if *is_estimate { "estimate" } else { "provider" };
        let _ = write!(
            out,
            ",\"tokens\":{{\"input\":{input},\"cached\":{cached},\"output\":{output},\"reasoning\":{reasoning},\"source\":\"{source}\"}},\"cost_usd\":{},\"ttft_ms\":",
            usd(*cost)
        );
        match first_content {
            Some(first) => {
                let _ = write!(out, "{:.3}", first.saturating_sub(self.started) as f64 / MILLI as f64);
            }
            None => out.push_str("null"),
        }
    }
}

/// Truncates a text from outside to at most 256 bytes.
fn cut(text: &str) -> &str {
    text.get(..text.floor_char_boundary(256)).unwrap_or_default()
}

/// Appends a JSON string, or null.
fn push_json_or_null(out: &mut String, text: Option<&str>) {
    match text {
        Some(text) => push_json(out, text),
        None => out.push_str("null"),
    }
}
