//! Builds the request that a backend gets.

use bytes::Bytes;
use http::Method;
use http::header::CONTENT_LENGTH;

use crate::gateway::attempt::Attempts;
use crate::gateway::opening::Asked;
use crate::http1::headers;
use crate::http1::headers::{BodyType, Passing, TracePassing};
use crate::http1::trace_context::{TRACEPARENT, TraceContext};
use crate::json::patch::{slices, splices, with_splice};
use crate::protocol::Endpoint;
use crate::protocol::endpoint::BodyFormat;
use crate::upstream::link::{WireRequest, write_header};

/// Initial capacity for the client's headers: enough for most requests.
const HEADER_CAPACITY: usize = 768;

impl Attempts<'_> {
    /// Builds the request to `upstream`: a new head, and the body with the target's model and without the members that
    /// the backend does not accept.
    pub(super) fn wire_request(&mut self, asked: &Asked<'_>) -> WireRequest {
        let upstream = asked.in_flight.upstream();
        let begin = upstream.head_start(self.ask.endpoint).unwrap_or_default();
        let mut head = Vec::with_capacity(begin.len() + HEADER_CAPACITY);
        if self.ask.endpoint == Endpoint::StoredResponse {
            upstream.write_stored_line(self.request, &mut head);
        }
        head.extend_from_slice(begin);
        let rules = &upstream.conf.header_rules;
        let sends_trace = !rules.drops(TRACEPARENT.as_str()) && !upstream.has_own_header(&TRACEPARENT);
        let passing = Passing {
            authorization: upstream.conf.forward_authorization,
            more: self.ask.endpoint.protocol().headers(),
            content_type: match self.ask.endpoint.api().map(|api| api.body) {
                Some(BodyFormat::Form) => BodyType::Clients,
                Some(BodyFormat::Nothing) => BodyType::Nothing,
                Some(BodyFormat::Json) | None => BodyType::Json,
            },
            trace: match &self.record.trace {
                None => TracePassing::Both,
                Some(trace) if trace.parent.is_some() && sends_trace => TracePassing::State,
                Some(_) => TracePassing::Neither,
            },
        };
        let traceparent = headers::to_backend(&self.request.headers, passing, rules, |name, value| {
            if !upstream.has_own_header(name) {
                write_header(&mut head, name, value.as_bytes());
            }
        });
        match &self.record.trace {
            Some(trace) if sends_trace => {
                write_header(&mut head, &TRACEPARENT, &trace.context().write());
            }
            Some(_) => {}
            None => {
                // The trace of the client is one that exemplars can name.
                if let Some(context) = traceparent.and_then(|value| TraceContext::parse(value.as_bytes())) {
                    self.record.exemplar = context.is_sampled().then_some(context.trace_id);
                }
            }
        }
        write_header(&mut head, &headers::X_REQUEST_ID, self.record.request_id.as_bytes());
        let target = &self.snapshot.route(&self.ask).targets[asked.target];
        let model = target.text(self.ask.model);
        let drops = |member| self.snapshot.drops(target.backend, member);
        let splices = splices(&self.chat.fields, model.as_deref(), drops);
        let body = match (&self.chat.form, &asked.usage) {
            (Some(form), _) => {
                let model = target.replacement(self.ask.model);
                slices(&self.chat.chunks, model.map(|model| form.model_splice(&model)).into_iter())
            }
            (None, Some(usage)) => slices(&self.chat.chunks, with_splice(splices, usage.clone())),
            (None, None) => slices(&self.chat.chunks, splices),
        };
        let length: usize = body.iter().map(Bytes::len).sum();
        // A GET or a DELETE has no body.
        if length > 0 || self.request.method == Method::POST {
            write_header(&mut head, &CONTENT_LENGTH, itoa::Buffer::new().format(length).as_bytes());
        }
        head.extend_from_slice(b"\r\n");
        WireRequest { head, body }
    }
}
