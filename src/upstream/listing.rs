//! Asks a backend which models it serves.

use std::time::Duration;

use http::StatusCode;

use crate::protocol::model_list;
use crate::upstream::Upstream;
use crate::upstream::get::get;

/// Largest list, in bytes.
pub(crate) const MAX_LIST: usize = 4 << 20;

impl Upstream {
    /// Whether the backend can be asked for its models: it takes requests for any name, with a key of its own or
    /// without one, and the path of the list is known.
    pub(crate) fn may_list(&self) -> bool {
        let conf = &self.conf;
        conf.weight > 0
            && conf.models.is_none()
            && !conf.forward_authorization
            && self.models_request().is_some()
    }

    /// Asks the backend for its models, on a new connection. The caller limits the time. Returns `None` if there is no
    /// such list.
    pub(crate) async fn list_models(&self, connect: Duration) -> Option<Vec<Box<str>>> {
        let got = get(self, self.models_request()?, connect).await.ok()?;
        if got.head.status != StatusCode::OK {
            return None;
        }
        model_list::names(&got.body(MAX_LIST).await.ok()??)
    }
}
