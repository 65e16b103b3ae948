//! Token counting, as far as it concerns the tries: asks a provider for the token counts of a stream, and starts the
//! meter of an answer.

use http::StatusCode;

use crate::clock;
use crate::gateway::attempt::{Attempts, OpenedResponse};
use crate::gateway::opening::{Asked, Problem};
use crate::json::patch::Splice;
use crate::policy::ratio::{Asking, Lengths};
use crate::policy::route::TargetId;
use crate::protocol::endpoint::{Metering, StreamFormat};
use crate::protocol::usage_request::{STREAM_OPTIONS, ask_for_usage};
use crate::telemetry::meter::{Meter, OTHER_MODEL};
use crate::upstream::in_flight::InFlight;
use crate::upstream::send::UpstreamResponse;

/// Longest `stream_options` that is read, in bytes. A longer one is left alone.
const MAX_OPTIONS: u64 = 1024;

impl Attempts<'_> {
    /// The splice that asks the backend for the token counts of a stream; `None` if Zap does not ask, or the client has
    /// decided itself.
    pub(super) fn usage_splice(&self, in_flight: &InFlight) -> Option<Splice> {
        let (upstream, fields) = (in_flight.upstream(), &self.chat.fields);
        let api = self.ask.endpoint.api().filter(|api| api.stream == StreamFormat::Done)?;
        let can_ask = self.record.stream && upstream.asks_for_usage();
        if !can_ask || upstream.state.ratios.asking(in_flight.key()) == Asking::Refused {
            return None;
        }
        let index = self.snapshot.watch(api).droppable.iter().position(|name| **name == *STREAM_OPTIONS);
        let Some(member) = fields.droppable.iter().find(|member| Some(member.name) == index) else {
            return ask_for_usage(fields.stream_end, None);
        };
        if member.span.end - member.span.start > MAX_OPTIONS {
            return None;
        }
        let options = self.chat.copy(member.span.clone());
        ask_for_usage(fields.stream_end, Some((member.span.start, &options)))
    }

    /// Sends a request that asks for the token counts. Some providers refuse it for that: as long as none has succeeded
    /// at this pair, the request is sent once more without the question.
    pub(super) async fn send_asking(&mut self, asked: &mut Asked<'_>) -> Result<UpstreamResponse, Problem> {
        let (ratios, key) = (&asked.in_flight.upstream().state.ratios, asked.in_flight.key());
        let response = self.send_request(asked).await?;
        if ratios.asking(key) != Asking::Unknown {
            return Ok(response);
        }
        match response.head.status {
            status if status.is_success() => ratios.set_asking(key, Asking::Accepted),
            // The provider has received the first request, so that the second one is one of its quota too.
            StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY if asked.in_flight.take_again() => {
                // A server with a single connection must not wait for the end of the first response.
                drop(response);
                asked.usage = None;
                let response = self.send_request(asked).await?;
                // Any other failure leaves open which part of the request was refused.
                if response.head.status.is_success() {
                    ratios.set_asking(key, Asking::Refused);
                }
                return Ok(response);
            }
            _ => {}
        }
        Ok(response)
    }

    /// Starts to count the tokens of an answer.
    pub(super) fn start_meter(&mut self, target: TargetId, response: &mut OpenedResponse) {
        let target = &self.snapshot.route(&self.ask).targets[target];
        let upstream = self.snapshot.upstream(target);
        let is_success = response.head.status.is_success();
        let api = self.ask.endpoint.api().filter(|api| api.metering != Metering::Off);
        let Some(api) = api.filter(|_| is_success && upstream.is_metered()) else { return };
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
            lengths: Lengths { asked: self.chat.text_length(), text: 0 },
            usage: None,
            begun: None,
            first_content: has_content.then(clock::now),
            is_whole: false,
            reservation: response.in_flight.take_reservation(),
        });
    }
}
