//! The tries of a request as parts of its trace. Without traces each of these is one comparison.

use crate::clock;
use crate::gateway::attempt::Attempts;
use crate::policy::route::TargetId;
use crate::upstream::in_flight::InFlight;

impl Attempts<'_> {
    /// Begins the span of the present try.
    pub(super) fn begin_span(&mut self, target: TargetId, in_flight: &InFlight) {
        let record = &mut *self.record;
        let Some(trace) = &mut record.trace else { return };
        let target = &self.snapshot.route(&self.ask).targets[target];
        let model = || target.model(record.model.as_ref());
        let number = (record.tries, in_flight.entered());
        trace.begin_try(number, in_flight.upstream(), model, || self.gateway.random());
    }

    /// Notes the status of the present try's response.
    pub(super) fn note_status(&mut self, status: u16) {
        if let Some(open) = self.record.trace.as_mut().and_then(|trace| trace.open_try()) {
            open.status = status;
        }
    }

    /// Ends the span of the present try, which has failed.
    pub(super) fn end_span(&mut self) {
        let record = &mut *self.record;
        if let Some(trace) = &mut record.trace {
            trace.end_try(clock::now(), &record.failed);
        }
    }
}
