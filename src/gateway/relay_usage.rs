//! Reads what an answer used while it is relayed.

use crate::clock;
use crate::protocol::answer_notes::AnswerNotes;
use crate::protocol::answer_text::answer_text;
use crate::protocol::body_usage::BodyUsage;
use crate::protocol::endpoint::Metering;
use crate::protocol::event_stream::{EventStream, StreamEnd};
use crate::protocol::usage::Usage;
use crate::telemetry::record::RequestRecord;

/// Zap measures the text of one in this many JSON answers with token counts, to learn the length of a token.
const TEXT_SAMPLE: u64 = 4;

/// Reads the token counts of a JSON body that is not there as a whole. A stream's are read with its events.
#[derive(Debug, Default)]
pub(super) enum RelayUsage {
    /// The body is read as it passes.
    Passing(Box<BodyUsage>),
    /// The body cannot be read: it is no JSON, or it is compressed.
    #[default]
    Unread,
    /// The body was there as a whole.
    Whole,
}

impl RelayUsage {
    /// Begins with the first part of a JSON body. `is_whole`: nothing follows. `random` returns a random number.
    pub(super) fn of_body(
        record: &mut RequestRecord,
        first: &[u8],
        is_whole: bool,
        random: impl FnOnce() -> u64,
    ) -> Self {
        if is_whole && let Some(trace) = record.sampled_trace() {
            trace.answer = AnswerNotes::of_body(first);
        }
        let Some(meter) = &mut record.meter else { return RelayUsage::Unread };
        if !is_whole {
            let mut usage = Box::new(BodyUsage::new());
            usage.push(first);
            return RelayUsage::Passing(usage);
        }
        meter.usage = Usage::of_body(first);
        if meter.metering == Metering::Full && (meter.usage.is_none() || random().is_multiple_of(TEXT_SAMPLE))
        {
            meter.lengths.text = answer_text(first);
        }
        RelayUsage::Whole
    }

    /// Reads the next part of a JSON body.
    pub(super) fn push(&mut self, data: &[u8]) {
        if let RelayUsage::Passing(usage) = self {
            usage.push(data);
        }
    }

    /// Counts what the answer used, as far as it has come.
    pub(super) fn settle(&mut self, record: &mut RequestRecord, events: Option<&EventStream>) {
        if let Some(notes) = events.and_then(EventStream::notes)
            && let Some(trace) = record.sampled_trace()
        {
            trace.answer.clone_from(notes);
        }
        let Some(meter) = &mut record.meter else { return record.settle() };
        match (events, std::mem::take(self)) {
            (Some(events), _) => {
                (meter.usage, meter.lengths.text) = (events.usage(), events.text());
                meter.begun = events.usage_so_far();
                meter.is_whole = events.is_whole() && events.end() != Some(StreamEnd::Error);
            }
            (None, RelayUsage::Passing(usage)) => {
                (meter.usage, meter.lengths.text) = (usage.finish(), record.bytes);
            }
            (None, RelayUsage::Unread) => meter.lengths.text = record.bytes,
            (None, RelayUsage::Whole) => {}
        }
        record.settle();
    }
}

/// Notes when the first content of a stream goes out.
pub(super) fn note_content(record: &mut RequestRecord, events: &EventStream) {
    if let Some(meter) = &mut record.meter
        && meter.first_content.is_none()
        && events.has_content()
    {
        meter.first_content = Some(clock::now());
    }
}
