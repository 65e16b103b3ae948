//! What a worker has to do, and what the control thread asks of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::sync::Notify;

/// What a worker and the control thread tell each other.
#[derive(Debug, Default)]
pub(crate) struct WorkerState {
    /// Upstream connections that the worker may have while idle ones can make room.
    pub(crate) upstreams: usize,
    pub(crate) connections: AtomicUsize,
    /// Bodies of requests that it waits for.
    pub(crate) uploads: AtomicUsize,
    /// Streams are to be cut now.
    pub(crate) cut: AtomicBool,
    /// Connections are to be closed as soon as they are idle.
    pub(crate) close: AtomicBool,
    /// Idle upstream connections are to make room for clients.
    pub(crate) lacks_files: AtomicBool,
    pub(crate) news: Notify,
}

impl WorkerState {
    /// Whether streams are to be cut.
    pub(crate) fn is_cut(&self) -> bool {
        self.cut.load(Ordering::Relaxed)
    }

    /// Upstream connections that the worker may have while idle ones can make room.
    pub(crate) fn upstreams(&self) -> usize {
        self.upstreams
    }

    /// Whether idle connections are to be closed.
    pub(crate) fn is_closing(&self) -> bool {
        self.close.load(Ordering::Relaxed)
    }
}

/// Counts a body that is waited for until it is dropped.
#[derive(Debug)]
#[must_use = "dropping it says that nobody waits for the body any more"]
pub(crate) struct Upload(Arc<WorkerState>);

impl Upload {
    /// One more.
    pub(crate) fn new(load: Arc<WorkerState>) -> Self {
        load.uploads.fetch_add(1, Ordering::Relaxed);
        Upload(load)
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        self.0.uploads.fetch_sub(1, Ordering::Relaxed);
    }
}
