//! The tries of a request, as its log line lists them.

use std::sync::Arc;

use crate::time::Nanos;
use crate::upstream::Upstream;
use crate::upstream::fault::Fault;

/// A failed try.
#[derive(Debug)]
pub(crate) struct TryFault {
    /// The backend.
    pub backend: Arc<Upstream>,
    /// Why it failed.
    pub fault: Fault,
    /// How long it took; 0 if the request is not logged.
    pub took: Nanos,
}

/// The last try of a request that is logged.
#[derive(Debug)]
pub(crate) struct LastTry {
    /// The backend.
    pub backend: Arc<Upstream>,
    /// The model that the backend was sent.
    pub model: Option<Arc<str>>,
    /// When it began.
    pub began: Nanos,
    /// How long it took, if it is over and its response was kept for later.
    pub took: Option<Nanos>,
}
