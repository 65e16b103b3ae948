//! The log line of a request.

use std::fmt::Write as _;
use std::time::SystemTime;

use crate::code::Code;
use crate::config::ANONYMOUS;
use crate::policy::prices::usd;
use crate::protocol::usage::Usage;
use crate::telemetry::line::{
    Colour, Style, in_words, ms, push_json, push_json_or_null, push_json_start, push_plain,
};
use crate::telemetry::meter::Used;
use crate::telemetry::record::{Caller, End, RequestRecord};
use crate::telemetry::tries::LastTry;
use crate::time::Nanos;

/// A try of a request, for its log line.
struct Attempt<'a> {
    backend: &'a str,
    /// The status of the response, the code of the failure, or how the request ended during the try.
    outcome: &'a str,
    /// Why it failed.
    cause: Option<&'a str>,
    took: Nanos,
}

impl RequestRecord {
    /// The log line. `total`: the time from arrival to the end.
    pub(super) fn line(&self, style: Style, total: Nanos) -> String {
        match style {
            Style::Json => self.json(total),
            Style::Text | Style::Short { .. } => self.text(style, SystemTime::now(), total),
        }
    }

    /// The level of the line: a warning if the client got no whole response for no fault of its own.
    fn level(&self) -> &'static str {
        let is_cut = !matches!(self.end, End::Complete | End::ClientGone);
        if self.status >= 500 || is_cut { "warn" } else { "info" }
    }

    fn json(&self, total: Nanos) -> String {
        let mut out = String::with_capacity(600);
        push_json_start(&mut out, SystemTime::now(), self.level(), "request");
        out.push_str(",\"request_id\":");
        push_json(&mut out, self.request_id.to_str().unwrap_or_default());
        out.push_str(",\"upstream_request_id\":");
        push_json_or_null(&mut out, self.upstream_id());
        out.push_str(",\"client\":");
        self.with_client(|client| push_json(&mut out, client));
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
        let mut separator = "[";
        self.each_attempt(total, |Attempt { backend, outcome, cause, took }| {
            out.push_str(separator);
            separator = ",[";
            push_json(&mut out, backend);
            let _ = write!(out, ",\"{outcome}\",");
            push_json_or_null(&mut out, cause);
            let _ = write!(out, ",{:.3}]", ms(took));
        });
        out.push_str("],\"passed\":[");
        self.passed.push_to(&mut out);
        out.push_str("],\"upstream_model\":");
        push_json_or_null(&mut out, self.upstream_model());
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
                let _ = write!(out, "{:.3}", ms(first.saturating_sub(self.started)));
            }
            None => out.push_str("null"),
        }
    }

    /// The line as text. A short one leaves out what is seldom asked for.
    fn text(&self, style: Style, at: SystemTime, total: Nanos) -> String {
        let mut out = String::with_capacity(300);
        style.push_start(at, self.level(), &mut out);
        if !style.is_short() {
            out.push_str("request: ");
        }
        let colour = match self.status {
            0..400 => Colour::Green,
            400..500 => Colour::Yellow,
            _ => Colour::Red,
        };
        style.push_in(colour, itoa::Buffer::new().format(self.status), &mut out);
        let _ = write!(out, " {}", self.method.as_ref().map_or("-", |m| cut(m.as_str())));
        if !self.path.is_empty() {
            out.push(' ');
            push_plain(&mut out, cut(&self.path));
        }
        if let Some(code) = self.refused {
            let _ = write!(out, " {}", code.text());
        }
        if let Some(backend) = &self.backend {
            let _ = write!(out, " from {}", backend.name());
        }
        let _ = write!(out, " in {}", in_words(total));
        if self.end != End::Complete {
            let _ = write!(out, ", {}", self.end.name());
        }
        self.push_details(style, total, &mut out);
        out
    }

    fn push_details(&self, style: Style, total: Nanos, out: &mut String) {
        if let Some(model) = &self.model {
            out.push_str(", model ");
            push_plain(out, model);
        }
        if let Some(sent) = self.upstream_model().filter(|sent| Some(*sent) != self.model.as_deref()) {
            out.push_str(", sent as ");
            push_plain(out, sent);
        }
        if let Some(queued) = self.queued {
            let _ = write!(out, ", queued {}", in_words(queued));
        }
        if let Some(Used { usage, is_estimate, cost, first_content, .. }) = &self.used {
            if let Some(first) = first_content {
                let _ = write!(out, ", first token {}", in_words(first.saturating_sub(self.started)));
            }
            let about = if *is_estimate { "about " } else { "" };
            let _ = write!(out, ", {about}{} + {} tokens", usage.input, usage.output);
            if *cost > 0 {
                let _ = write!(out, ", {} USD", usd(*cost));
            }
        }
        let _ = write!(out, ", {} bytes", self.bytes);
        // A single good try says nothing that is not above.
        if !self.failed.is_empty() || self.backend.is_none() && self.tries > 0 || !style.is_short() {
            let mut separator = "; tries: ";
            self.each_attempt(total, |Attempt { backend, outcome, cause, took }| {
                let _ = write!(out, "{separator}{backend} {outcome} ");
                separator = ", ";
                if let Some(cause) = cause {
                    out.push('(');
                    push_plain(out, cause);
                    out.push_str(") ");
                }
                let _ = write!(out, "in {}", in_words(took));
            });
        }
        if !(style.is_short() && matches!(self.caller, Caller::Anonymous)) {
            self.with_client(|client| {
                let _ = write!(out, "; client {client}");
            });
        }
        if style.is_short() {
            return;
        }
        let _ = write!(out, " at {}", self.peer.to_canonical());
        self.passed.push_words(out);
        out.push_str("; id ");
        // It may have tabs.
        push_plain(out, self.request_id.to_str().unwrap_or_default());
        if let Some(id) = self.upstream_id() {
            out.push_str(", upstream id ");
            push_plain(out, id);
        }
    }

    /// Calls `each` with every try, the first one first.
    fn each_attempt(&self, total: Nanos, mut each: impl FnMut(Attempt<'_>)) {
        for failed in &self.failed {
            let (backend, kind, cause) = (failed.backend.name(), failed.fault.kind, &*failed.fault.cause);
            each(Attempt { backend, outcome: kind.text(), cause: Some(cause), took: failed.took });
        }
        let Some(LastTry { backend, began, took, .. }) = &self.last_try else { return };
        if self.tries as usize > self.failed.len() {
            let status = itoa::Buffer::new().format(self.status).to_owned();
            let outcome = match (&self.backend, self.refused) {
                (Some(_), _) => &*status,
                (None, Some(code)) => code.text(),
                (None, None) => self.end.name(),
            };
            let until_head = || (self.started + self.first_byte.unwrap_or(total)).saturating_sub(*began);
            let took = took.unwrap_or_else(until_head);
            each(Attempt { backend: backend.name(), outcome, cause: None, took });
        }
    }

    /// The model that the backend that responded was sent.
    fn upstream_model(&self) -> Option<&str> {
        self.backend.as_ref().and(self.last_try.as_ref()).and_then(|last| last.model.as_deref())
    }

    fn upstream_id(&self) -> Option<&str> {
        self.upstream_request_id.as_ref().and_then(|id| id.to_str().ok())
    }

    /// Calls `show` with the client's name, or with the hash of its key.
    fn with_client(&self, show: impl FnOnce(&str)) {
        match &self.caller {
            Caller::Anonymous => show(ANONYMOUS),
            Caller::Known(client) => show(&client.conf.name),
            Caller::Unknown(key) => show(&format!("{key:016x}")),
        }
    }
}

/// Truncates a text from outside to at most 256 bytes.
fn cut(text: &str) -> &str {
    text.get(..text.floor_char_boundary(256)).unwrap_or_default()
}
