//! How far the response of the current exchange is: what hyper was given, and whether the socket has taken it.

use std::cell::Cell;
use std::task::Poll;

use crate::time::Nanos;

/// Bytes of a response that wait for the client before no more are read for it; one frame may be added.
const MAX_UNFLUSHED: usize = 8 * 1024;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// How long the response may make no progress; 0 if there is none.
    idle_timeout: Cell<Nanos>,
    /// Bytes that hyper was given since its write buffer was last empty.
    unflushed: Cell<usize>,
    /// Whether a write is expected that has not reached the socket.
    is_writing: Cell<bool>,
    /// Whether the task must be woken when the write buffer is empty.
    wants_flush: Cell<bool>,
}

impl Progress {
    /// Begins a response.
    pub(super) fn begin(&self, idle_timeout: Nanos) {
        self.idle_timeout.set(idle_timeout);
    }

    /// Ends the response.
    pub(super) fn end(&self) {
        self.idle_timeout.set(0);
    }

    /// How long the response may make no progress; 0 if there is none.
    pub(super) fn idle_timeout(&self) -> Nanos {
        self.idle_timeout.get()
    }

    /// Records that hyper gets `n` more bytes.
    pub(super) fn hand_over(&self, n: usize) {
        self.unflushed.set(self.unflushed.get() + n);
    }

    /// Whether so much waits for the client that no more must be read for it. If so, its task is woken when that has
    /// changed.
    pub(super) fn is_behind(&self) -> bool {
        let is_behind = self.unflushed.get() >= MAX_UNFLUSHED;
        if is_behind {
            self.wants_flush.set(true);
        }
        is_behind
    }

    /// Announces a write that [`poll_flushed`](Self::poll_flushed) will wait for.
    pub(super) fn expect_write(&self) {
        self.is_writing.set(true);
    }

    /// Is ready when all that was written has reached the socket. The connection's task is woken for it.
    pub(super) fn poll_flushed(&self) -> Poll<()> {
        if !self.is_writing.get() {
            return Poll::Ready(());
        }
        self.wants_flush.set(true);
        Poll::Pending
    }

    /// Records that hyper's write buffer is empty. Returns whether a task waits for it.
    pub(super) fn flushed(&self) -> bool {
        self.is_writing.set(false);
        self.unflushed.set(0);
        self.wants_flush.take()
    }
}
