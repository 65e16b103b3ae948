//! The ids of responses, items and conversations: learnt from answers, and looked up for the requests that refer to
//! them.

use std::sync::Arc;

use crate::clock;
use crate::gateway::caller;
use crate::gateway::refusal::GatewayError;
use crate::gateway::state::Shared;
use crate::policy::known_ids::{MadeBy, Maker};
use crate::protocol::answer_ids::AnswerIds;
use crate::protocol::event_stream::EventStream;
use crate::telemetry::record::Caller;

/// Learns the ids of one answer as it passes.
#[derive(Debug)]
pub(crate) struct IdLearner {
    ids: AnswerIds,
    maker: Maker,
    shared: Arc<Shared>,
}

impl IdLearner {
    /// Starts an answer of the backend whose state has the id `backend`. `is_stream`: it is an event stream. `caller`:
    /// the client that has made what has the ids; `None` if it has only read them.
    pub(super) fn new(shared: &Arc<Shared>, caller: Option<&Caller>, backend: u64, is_stream: bool) -> Self {
        let maker = Maker { backend, client: caller.map_or(0, |caller| caller::owner(shared, caller)) };
        IdLearner { ids: AnswerIds::new(is_stream), maker, shared: shared.clone() }
    }

    /// Reads the beginning of the answer: what goes out first, and the unfinished event that its `events` hold back.
    pub(super) fn begin(&mut self, first: &[u8], events: Option<&EventStream>) {
        self.push(first);
        self.push(events.map_or(&[], |events| events.unfinished()));
    }

    /// Reads the next part of the answer.
    pub(super) fn push(&mut self, data: &[u8]) {
        let IdLearner { ids, maker, shared } = self;
        ids.push(data, |id| shared.known_ids.learn(shared.keyed_hash(id), *maker, clock::now()));
    }
}

/// The backend that made what a request with these ids refers to. `serves`: whether the backend whose state has an id
/// can serve the request.
///
/// # Errors
/// [`GatewayError::NotYours`] if an id belongs to another client.
pub(super) fn made_by(
    shared: &Shared,
    caller: &Caller,
    ids: &[impl AsRef<str>],
    serves: impl Fn(u64) -> bool,
) -> Result<MadeBy, GatewayError> {
    if ids.is_empty() {
        return Ok(MadeBy::Anybody);
    }
    let (now, client) = (clock::now(), caller::owner(shared, caller));
    let mut found = MadeBy::Unknown;
    for id in ids {
        let Some(maker) = shared.known_ids.find(shared.keyed_hash(id.as_ref().as_bytes()), now) else {
            continue;
        };
        if maker.client != 0 && maker.client != client {
            return Err(GatewayError::NotYours);
        }
        if found == MadeBy::Unknown && serves(maker.backend) {
            found = MadeBy::Backend(maker.backend);
        }
    }
    Ok(found)
}
