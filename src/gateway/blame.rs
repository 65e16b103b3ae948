//! What the result of a try changes: the counters, and the health of the backend and of its pair with the model.

use crate::clock;
use crate::code::Code;
use crate::gateway::Gateway;
use crate::telemetry::record::RequestRecord;
use crate::time::Nanos;
use crate::upstream::Upstream;
use crate::upstream::fault::Fault;
use crate::upstream::in_flight::InFlight;

impl Gateway {
    /// Records a failed try or a cut response.
    pub(crate) fn record_failure(&self, upstream: &Upstream, fault: &Fault) {
        if fault.kind != Code::UpstreamRedirect {
            upstream.lanes[self.recorder.worker].failed(fault.kind);
        }
        upstream.note_error(fault);
    }

    /// Counts a failure of the transport against the backend as a whole.
    pub(crate) fn blame_backend(&self, upstream: &Upstream, fault: &Fault) {
        let now = clock::now();
        upstream.state.penalty.add(now);
        if let Some(change) = upstream.state.breaker.failure(self.current().thresholds(), now) {
            if !upstream.conf.health.is_enabled {
                upstream.state.breaker.begin_trials(now);
            }
            self.shared().announce(upstream, change, &format!("request: {fault}"));
        }
    }

    /// Reports the head of a response at `now`, which brings a backend on trial back.
    pub(crate) fn record_answered(&self, in_flight: &InFlight, now: Nanos) {
        in_flight.answered(now);
        let upstream = in_flight.upstream();
        if let Some(change) = upstream.state.breaker.answered(in_flight.entered(), now) {
            self.shared().announce(upstream, change, "a request was answered");
        }
    }

    /// Records that a request ended without a result of its target: its client has left, or it was refused for what it
    /// asks for. If it was a trial, another request may go in its place.
    pub(crate) fn record_no_result(&self, in_flight: &InFlight) {
        if in_flight.undo_trial(clock::now()) {
            self.shared().reopened.notify_waiters();
        }
    }

    /// Counts a strike against a pair: the backend and the model with this key. `model`: its name, for the log.
    pub(crate) fn strike(&self, upstream: &Upstream, key: u64, model: &str, fault: &Fault) {
        let now = clock::now();
        upstream.state.penalty.add(now);
        let threshold = self.current().thresholds().failures;
        if let Some(change) = upstream.state.breaker.pairs.strike(key, threshold, now) {
            self.shared().announce_pair(upstream, model, change, &format!("request: {fault}"));
        }
    }

    /// Records that a response failed after it had begun to go out. An error response has been judged by its status.
    pub(crate) fn record_broken(&self, in_flight: &InFlight, record: &mut RequestRecord, fault: Fault) {
        let upstream = in_flight.upstream();
        self.record_failure(upstream, &fault);
        if record.status < 400 {
            self.strike(upstream, in_flight.key(), record.model_name(), &fault);
        }
        record.fail_try(upstream, fault);
    }

    /// Counts a success of a backend and of its pair at `now`. `model`: its name, for the log.
    pub(crate) fn record_success(&self, in_flight: &InFlight, model: &str, now: Nanos) {
        let upstream = in_flight.upstream();
        upstream.state.breaker.success(now);
        let (change, lets_more_go) = upstream.state.breaker.pairs.success(in_flight.key(), now);
        if let Some(change) = change {
            self.shared().announce_pair(upstream, model, change, "");
        } else if lets_more_go {
            self.shared().reopened.notify_waiters();
        }
    }
}
