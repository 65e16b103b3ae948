//! The load of a worker, and the orders of the control thread to it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::sync::Notify;

/// The state that a worker and the control thread share.
#[derive(Debug, Default)]
pub(crate) struct WorkerState {
    /// Upstream connections that the worker may have. Beyond them it closes idle ones first.
    pub(crate) upstreams: usize,
    /// Client connections.
    pub(crate) connections: AtomicUsize,
    /// Request bodies that are being received.
    pub(crate) uploads: AtomicUsize,
    /// Whether streams must be cut.
    pub(crate) cut: AtomicBool,
    /// Whether idle connections must be closed.
    pub(crate) close: AtomicBool,
    /// Whether idle upstream connections must be closed, since files are short.
    pub(crate) lacks_files: AtomicBool,
    /// Notified when one of the flags was set.
    pub(crate) changed: Notify,
}

impl WorkerState {
    /// Whether streams must be cut.
    pub(crate) fn is_cut(&self) -> bool {
        self.cut.load(Ordering::Relaxed)
    }

    /// Upstream connections that the worker may have. Beyond them it closes idle ones first.
    pub(crate) fn upstreams(&self) -> usize {
        self.upstreams
    }

    /// Whether idle connections must be closed.
    pub(crate) fn is_closing(&self) -> bool {
        self.close.load(Ordering::Relaxed)
    }
}

/// Counts a request body that is being received, until it is dropped.
#[derive(Debug)]
#[must_use = "dropping it ends the count"]
pub(crate) struct Upload(Arc<WorkerState>);

impl Upload {
    /// Counts one more.
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
