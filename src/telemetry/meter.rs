//! What the answer to one request used: told by its provider, or estimated.

use std::sync::{Arc, LazyLock};

use crate::http1::trace_context::TraceId;
use crate::policy::ratio::Lengths;
use crate::protocol::endpoint::Metering;
use crate::protocol::usage::Usage;
use crate::time::Nanos;
use crate::upstream::Upstream;
use crate::upstream::counters::BackendLane;
use crate::upstream::limits::BackendReservation;
use crate::upstream::token_counters::TokenCount;

/// The label of models that the configuration does not name.
pub(crate) static OTHER_MODEL: LazyLock<Arc<str>> = LazyLock::new(|| "other".into());

/// The meter of an answer that is being delivered.
#[derive(Debug)]
pub(crate) struct Meter {
    /// The key of the model that the backend was sent.
    pub key: u64,
    /// The model as a label: the name that was asked for if the configuration knows it, else [`OTHER_MODEL`].
    pub label: Arc<str>,
    /// The model that the backend was sent.
    pub model: Option<Arc<str>>,
    /// What can be known of the answer's tokens.
    pub metering: Metering,
    /// The lengths of the request and of the answer so far.
    pub lengths: Lengths,
    /// The token counts that the provider has told.
    pub usage: Option<Usage>,
    /// The token counts that the provider had told before the answer was cut: those of the input are known.
    pub begun: Option<Usage>,
    /// When the first content came; only of a stream.
    pub first_content: Option<Nanos>,
    /// Whether a stream has come whole and without an error.
    pub is_whole: bool,
    /// What the request has reserved at its backend.
    pub reservation: Option<Box<BackendReservation>>,
}

/// What an answer used.
#[derive(Clone, Debug)]
pub(crate) struct Used {
    /// The token counts.
    pub usage: Usage,
    /// Whether they are an estimate.
    pub is_estimate: bool,
    /// The model as a label.
    pub label: Arc<str>,
    /// The cost in nano-USD.
    pub cost: u64,
    /// When the first content came; only of a stream.
    pub first_content: Option<Nanos>,
}

impl Meter {
    /// Ends the metering at `now`, and counts what the answer used at its backend. `started`: when the request arrived.
    /// `exemplar`: its trace, and the present time. Also returns the reservation, which is still open. `None` if
    /// nothing is known of the answer.
    pub(crate) fn settle(
        self,
        upstream: &Upstream,
        lane: &BackendLane,
        (started, now): (Nanos, Nanos),
        exemplar: Option<(TraceId, u64)>,
    ) -> Option<(Used, Option<Box<BackendReservation>>)> {
        let Meter {
            key,
            label,
            model,
            metering,
            lengths,
            usage,
            begun,
            first_content,
            is_whole,
            reservation,
        } = self;
        let ratios = &upstream.state.ratios;
        let (usage, is_estimate) = match (usage, metering) {
            (Some(usage), _) => {
                ratios.learn(key, lengths, &usage);
                (usage, false)
            }
            (None, Metering::Told | Metering::Off) => return None,
            (None, Metering::Input) => (ratios.estimate(key, Lengths { text: 0, ..lengths }), true),
            (None, Metering::Full) => {
                let estimate = ratios.estimate(key, lengths);
                let output = |begun: &Usage| estimate.output.max(begun.output);
                (begun.map_or(estimate, |begun| Usage { output: output(&begun), ..begun }), true)
            }
        };
        let cost = upstream.cost(model.as_deref(), &usage);
        lane.tokens.add(&label, &TokenCount::new(&usage, cost));
        lane.recent_tokens.add(now, usage.total());
        if is_estimate {
            lane.usage_missing.add(1);
        }
        if let Some(first) = first_content {
            lane.first_token.record_traced(first.saturating_sub(started), exemplar);
            // The wait before a cut says nothing about the pace of the tokens.
            if is_whole && usage.output > 1 {
                lane.per_output_token.record(now.saturating_sub(first) / (usage.output - 1));
            }
        }
        Some((Used { usage, is_estimate, label, cost, first_content }, reservation))
    }
}
