//! The trace of one request, from its arrival to its end: the span of the request and one of each try.

use std::borrow::Cow;
use std::sync::Arc;

use http::header::HOST;
use http::{HeaderMap, Method};
use smallvec::SmallVec;

use crate::code::Code;
use crate::config::Otlp;
use crate::http1::trace_context::{SAMPLED, SpanId, TraceContext, TraceId};
use crate::protocol::Endpoint;
use crate::protocol::answer_notes::AnswerNotes;
use crate::protocol::usage::Usage;
use crate::telemetry::tries::TryFault;
use crate::time::Nanos;
use crate::upstream::Upstream;
use crate::upstream::fault::Fault;

/// Longest path and name that are kept, in bytes.
const MAX_TEXT: usize = 256;

/// Most tries that have a span of their own.
const MAX_TRIES: usize = 32;

/// One, in millionths.
const ONE: u64 = 1_000_000;

/// The trace of a request that is being served. One that is not recorded only has ids, which the backend gets.
#[derive(Debug)]
pub(crate) struct Trace {
    /// The settings when the request arrived.
    pub settings: Arc<Otlp>,
    /// The trace.
    pub trace_id: TraceId,
    /// The span of the caller, if it has sent a valid `traceparent`.
    pub parent: Option<SpanId>,
    /// The span of the request.
    pub span_id: SpanId,
    /// The flags of the trace.
    pub flags: u8,
    /// The span of the present try.
    try_id: SpanId,
    /// The path as received.
    pub path: Box<str>,
    /// The `Host` of the request.
    pub host: Box<str>,
    /// The tries so far.
    pub tries: SmallVec<[TrySpan; 1]>,
    /// The failures of the request that the tries so far account for.
    pub failures: usize,
    /// What the answer says of itself.
    pub answer: AnswerNotes,
}

/// A try at one backend.
#[derive(Debug)]
pub(crate) struct TrySpan {
    /// Its id.
    pub span_id: SpanId,
    /// The number of the try, from 1.
    pub number: u32,
    /// The backend.
    pub upstream: Arc<Upstream>,
    /// The model that the backend was sent.
    pub model: Option<Arc<str>>,
    /// When it began.
    pub started: Nanos,
    /// When it ended; `None`: its response is passed on until the request ends.
    pub ended: Option<Nanos>,
    /// The status of its response; 0: none came.
    pub status: u16,
    /// Why it failed.
    pub fault: Option<SpanFault>,
}

/// Why a try failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SpanFault {
    /// The class of the error.
    pub kind: &'static str,
    /// The cause for the operator; may be empty.
    pub cause: Cow<'static, str>,
}

impl SpanFault {
    /// The fault of a try, without what a provider has said about a key.
    fn of(fault: &Fault) -> Self {
        let cause = if fault.kind == Code::UpstreamAuthError { "".into() } else { fault.cause.clone() };
        SpanFault { kind: fault.kind.text(), cause }
    }
}

/// A trace whose request has ended.
#[derive(Debug)]
pub(crate) struct FinishedTrace {
    /// What was collected.
    pub trace: Trace,
    /// When the request arrived and ended.
    pub times: (Nanos, Nanos),
    /// The method; `None` if the head is invalid.
    pub method: Option<Method>,
    /// The endpoint.
    pub endpoint: Endpoint,
    /// The model that the request names.
    pub model: Option<Arc<str>>,
    /// Whether the request asks for a stream.
    pub is_stream: bool,
    /// The status of the response.
    pub status: u16,
    /// The class of the error, if the request has failed.
    pub error: Option<Cow<'static, str>>,
    /// Whether the error is Zap's or a backend's, not the client's.
    pub is_fault: bool,
    /// Time in queues, in nanoseconds.
    pub queued: Nanos,
    /// The token counts that the provider has told.
    pub usage: Option<Usage>,
    /// When the first content of a stream came.
    pub first_content: Option<Nanos>,
}

impl TrySpan {
    /// Notes why the try has failed after its response had begun.
    pub(crate) fn fail(&mut self, fault: &Fault) {
        self.fault = Some(SpanFault::of(fault));
    }
}

impl FinishedTrace {
    /// The number of spans.
    pub(crate) fn spans(&self) -> u64 {
        1 + self.trace.tries.len() as u64
    }
}

impl Trace {
    /// Begins the trace of a request: that of its `traceparent`, or a new one. The caller decides whether its trace is
    /// recorded; of new ones, `sample_ratio` is. `random` returns random numbers.
    pub(crate) fn begin(
        settings: &Arc<Otlp>,
        headers: &HeaderMap,
        path: &str,
        mut random: impl FnMut() -> u64,
    ) -> Box<Self> {
        let context = TraceContext::of(headers);
        let trace_id = context.map_or_else(|| new_trace_id(&mut random), |context| context.trace_id);
        let is_sampled = match context {
            Some(context) => context.is_sampled(),
            None => is_in_ratio(&trace_id, settings.sample_millionths),
        };
        let text = |text: &str| if is_sampled { cut(text).into() } else { Box::default() };
        let host = headers.get(HOST).and_then(|host| host.to_str().ok());
        Box::new(Trace {
            settings: settings.clone(),
            trace_id,
            parent: context.map(|context| context.parent),
            span_id: new_span_id(&mut random),
            flags: context.map_or(if is_sampled { SAMPLED } else { 0 }, |context| context.flags),
            try_id: SpanId::default(),
            path: text(path),
            host: text(host.unwrap_or_default()),
            tries: SmallVec::new(),
            failures: 0,
            answer: AnswerNotes::default(),
        })
    }

    /// Whether the trace is recorded.
    pub(crate) fn is_sampled(&self) -> bool {
        self.flags & SAMPLED != 0
    }

    /// Begins try `number`, with a span id that is made of `random`.
    pub(crate) fn begin_try(
        &mut self,
        (number, started): (u32, Nanos),
        upstream: &Arc<Upstream>,
        model: impl FnOnce() -> Option<Arc<str>>,
        random: impl FnMut() -> u64,
    ) {
        self.try_id = new_span_id(random);
        if self.is_sampled() && self.tries.len() < MAX_TRIES {
            self.tries.push(TrySpan {
                span_id: self.try_id,
                number,
                upstream: upstream.clone(),
                model: model(),
                started,
                ended: None,
                status: 0,
                fault: None,
            });
        }
    }

    /// What the backend of the present try gets as its `traceparent`.
    pub(crate) fn context(&self) -> TraceContext {
        TraceContext { trace_id: self.trace_id, parent: self.try_id, flags: self.flags }
    }

    /// The present try, if it has a span and has not ended.
    pub(crate) fn open_try(&mut self) -> Option<&mut TrySpan> {
        self.tries.last_mut().filter(|last| last.ended.is_none() && last.span_id == self.try_id)
    }

    /// Ends the present try at `now`, since it has failed. `failed`: the failures of the request.
    pub(crate) fn end_try(&mut self, now: Nanos, failed: &[TryFault]) {
        let failed_try = failed.get(self.failures..).unwrap_or_default().last();
        self.failures = failed.len();
        if let Some(open) = self.open_try() {
            open.ended = Some(now);
            open.fault = failed_try.map(|failed| SpanFault::of(&failed.fault));
        }
    }
}

/// Cuts a text from outside.
fn cut(text: &str) -> &str {
    text.get(..text.floor_char_boundary(MAX_TEXT)).unwrap_or_default()
}

fn new_span_id(mut random: impl FnMut() -> u64) -> SpanId {
    random().max(1).to_be_bytes()
}

fn new_trace_id(mut random: impl FnMut() -> u64) -> TraceId {
    let (high, low) = (u128::from(random()), u128::from(random()));
    (high << 64 | low).max(1).to_be_bytes()
}

/// Whether a trace is in a share of all traces, in millionths. Programs that decide so by the id of the trace decide
/// alike: this is the rule of the samplers of OpenTelemetry's SDKs, `TraceIdRatioBased`.
fn is_in_ratio(trace_id: &TraceId, millionths: u32) -> bool {
    let low = trace_id.iter().skip(8).fold(0u64, |low, byte| low << 8 | u64::from(*byte));
    let bound = (u128::from(millionths) << 63) / u128::from(ONE);
    u128::from(low >> 1) < bound
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::http1::trace_context::TRACEPARENT;

    fn settings(ratio: &str) -> Arc<Otlp> {
        let text = format!(
            "[otlp]\nendpoint = \"http://a\"\nsample_ratio = {ratio}\n[[backends]]\nurl = \"http://a\"\nweight = 1\n"
        );
        Config::of(&text).unwrap().otlp.unwrap()
    }

    fn begin(ratio: &str, parent: Option<&str>) -> Box<Trace> {
        let mut headers = HeaderMap::new();
        headers.extend(parent.map(|value| (TRACEPARENT, value.parse().unwrap())));
        let mut rng = fastrand::Rng::with_seed(7);
        Trace::begin(&settings(ratio), &headers, &"/x".repeat(1000), || rng.u64(..))
    }

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0";

    #[test]
    fn the_caller_decides_whether_its_trace_is_recorded_and_the_ratio_for_new_ones() {
        for (ratio, flags) in [("0", "1"), ("1", "0"), ("1", "3"), ("0", "2")] {
            let trace = begin(ratio, Some(&format!("{PARENT}{flags}")));
            assert_eq!(trace.is_sampled(), matches!(flags, "1" | "3"), "{flags}");
            assert_eq!(trace.parent, Some(0x00f0_67aa_0ba9_02b7_u64.to_be_bytes()));
            assert_eq!(trace.context().write()[..36], PARENT.as_bytes()[..36]);
            assert_eq!(trace.flags.to_string(), flags);
        }
        for malformed in [None, Some("00-x"), Some("garbage")] {
            for (ratio, want) in [("0", false), ("1", true)] {
                let trace = begin(ratio, malformed);
                assert_eq!((trace.is_sampled(), trace.parent), (want, None));
                assert_ne!(trace.trace_id, TraceId::default());
            }
        }
    }

    #[test]
    fn the_ratio_is_met_and_decides_by_the_id_alone() {
        let mut rng = fastrand::Rng::with_seed(1);
        let ids: Vec<TraceId> = (0..20_000).map(|_| new_trace_id(|| rng.u64(..))).collect();
        for millionths in [0, 1_000, 250_000, 999_999, 1_000_000] {
            let n = ids.iter().filter(|id| is_in_ratio(id, millionths)).count() as f64;
            let want = f64::from(millionths) / 1e6 * ids.len() as f64;
            assert!((n - want).abs() <= 4.0 * want.sqrt(), "{millionths}: {n}");
        }
        assert!(ids.iter().all(|id| !is_in_ratio(id, 0) && is_in_ratio(id, 1_000_000)));
        // A larger ratio samples every trace that a smaller one does.
        assert!(ids.iter().all(|id| !is_in_ratio(id, 100_000) || is_in_ratio(id, 200_000)));
    }

    #[test]
    fn a_trace_that_is_not_recorded_keeps_no_text() {
        let (on, off) = (begin("1", None), begin("0", None));
        assert_eq!((on.path.len(), off.path.len()), (MAX_TEXT, 0));
    }
}
