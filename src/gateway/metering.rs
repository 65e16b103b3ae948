//! Token counting, as far as it concerns the tries: asks a provider for the token counts of a stream, and starts the meter
//! of an answer.

use crate::clock;
use crate::gateway::attempt::{Attempts, OpenedResponse};
use crate::json::patch::Splice;
use crate::policy::ratio::{Asking, Lengths};
use crate::policy::route::TargetId;
use crate::protocol::endpoint::StreamFormat;
use crate::protocol::usage_request::{STREAM_OPTIONS, ask_for_usage};
use crate::telemetry::meter::{Meter, OTHER_MODEL};
use crate::upstream::in_flight::InFlight;

/// Longest `stream_options` that is read, in bytes. A longer one is left alone.
const MAX_OPTIONS: u64 = 1024;

impl Attempts<'_> {
    /// Whether the request to this backend asks for the token counts of its stream.
    pub(super) fn asks_for_usage(&self, in_flight: &InFlight) -> bool {
        let upstream = in_flight.upstream();
        self.record.stream
            && self.ask.endpoint.api().is_some_and(|api| api.stream == StreamFormat::Done)
            && upstream.asks_for_usage()
            && upstream.state.ratios.asking(in_flight.key()) != Asking::Refused
            && self.usage_splice().is_some()
    }

    /// The splice that asks for the token counts; `None` if the client has decided itself.
    pub(super) fn usage_splice(&self) -> Option<Splice> {
        let fields = &self.chat.fields;
        let index = self.snapshot.watch().droppable.iter().position(|name| **name == *STREAM_OPTIONS);
        let options = fields.droppable.iter().find(|member| Some(member.name) == index);
        if options.is_some_and(|member| member.span.end - member.span.start > MAX_OPTIONS) {
            return None;
        }
        let options = options.map(|member| (member.span.start, self.chat.copy(member.span.clone())));
        ask_for_usage(fields.stream_end, options.as_ref().map(|(start, bytes)| (*start, &bytes[..])))
    }

    /// Starts to count the tokens of an answer.
    pub(super) fn start_meter(&mut self, target: TargetId, response: &OpenedResponse) {
        let target = &self.snapshot.route(&self.ask).targets[target];
        let upstream = self.snapshot.upstream(target);
        let is_success = response.head.status.is_success();
        let Some(api) = self.ask.endpoint.api().filter(|_| is_success && upstream.is_metered()) else {
            return;
        };
        let model = target.model(self.record.model.as_ref());
        let table = self.snapshot.table();
        let label = match (table.name_of(self.ask.route), &self.record.model) {
            (Some(name), _) => Some(name),
            // A request without a model is counted under the backend's default model.
            (None, None) => model.as_deref().and_then(|name| table.known_name(name)),
            (None, Some(_)) => None,
        };
        let has_content = response.events.as_ref().is_some_and(|events| events.has_content());
        self.record.meter = Some(Meter {
            key: response.in_flight.key(),
            label: label.unwrap_or(&OTHER_MODEL).clone(),
            model,
            metering: api.metering,
            lengths: Lengths { asked: self.chat.fields.length, text: 0 },
            usage: None,
            first_content: has_content.then(clock::now),
        });
    }
}
