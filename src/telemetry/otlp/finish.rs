//! Ends the trace of a request with the facts of its record.

use crate::telemetry::otlp::trace::{FinishedTrace, Trace};
use crate::telemetry::record::{End, RequestRecord};
use crate::time::Nanos;

impl RequestRecord {
    /// Gives a trace that ends at `now` to the exporter, if it is recorded.
    pub(in crate::telemetry) fn finish_trace(&self, mut trace: Trace, now: Nanos) {
        if !trace.is_sampled() {
            return;
        }
        // A response that broke off has left a fault of a try that had not failed before.
        let broken = self.failed.get(trace.failures..).unwrap_or_default().last();
        if let Some(failed) = broken
            && let Some(open) = trace.open_try()
        {
            open.fail(&failed.fault);
        }
        let is_cut = !matches!(self.end, End::Complete | End::ClientGone);
        let error = match self.refused {
            Some(code) => Some(code.text().into()),
            None if self.end != End::Complete => Some(self.end.name().into()),
            None if self.status >= 500 => Some(self.status.to_string().into()),
            None => None,
        };
        let used = self.used.as_ref();
        self.recorder().telemetry.traces.push(Box::new(FinishedTrace {
            trace,
            times: (self.started, now),
            method: self.method.clone(),
            endpoint: self.endpoint,
            model: self.model.clone(),
            is_stream: self.stream,
            status: self.status,
            error,
            is_fault: self.status >= 500 || self.refused.is_none() && is_cut,
            queued: self.queued.unwrap_or(0),
            usage: used.filter(|used| !used.is_estimate).map(|used| used.usage),
            first_content: used.and_then(|used| used.first_content),
        }));
    }
}
