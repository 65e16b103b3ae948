//! Polls each backend without `models` for its list, at start and every five minutes.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;

use crate::clock;
use crate::config::ModelsFrom;
use crate::gateway::state::{Generation, Shared};
use crate::upstream::Upstream;

/// Time between two questions to a backend; a random factor of 0.8 to 1 is applied.
const INTERVAL: Duration = Duration::from_secs(300);

/// Longest time for an answer.
const MAX_TIME: Duration = Duration::from_secs(30);

/// Whether a backend is asked.
pub(crate) fn is_asked(generation: &Generation, upstream: &Upstream) -> bool {
    generation.config.models_from == ModelsFrom::Backends && upstream.may_list()
}

/// Asks the backend with this `id` until it is removed or no longer asked. A failure changes nothing.
pub(crate) async fn watch(shared: Arc<Shared>, id: u64) {
    loop {
        let generation = shared.current.load_full();
        let asked = generation.backends.iter().find(|b| b.state.id == id && is_asked(&generation, b));
        let Some(upstream) = asked.cloned() else { return };
        let connect = generation.config.timeouts.connect;
        drop(generation);
        if let Ok(Some(names)) = clock::within(MAX_TIME, upstream.list_models(connect)).await {
            shared.served_models.set(id, names);
        }
        drop(upstream);
        sleep(INTERVAL.mul_f64(0.8 + 0.2 * fastrand::f64())).await;
    }
}
