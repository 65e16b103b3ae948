//! How much the kernel receives of a response before Zap reads it. It costs memory while the client does not read, and
//! time if a fast client has to wait for it: the window is narrow until a response has shown that its client is fast.

use crate::clock;
use crate::time::{Nanos, SECOND};

/// The narrow window in bytes. The kernel takes up to twice as much, for its own data.
pub(crate) const NARROW: usize = 64 * 1024;

/// The wide window in bytes: 4 MB/s from a backend whose answers take 125 ms to come. The kernel gives at most
/// net.core.rmem_max.
const WIDE: usize = 512 * 1024;

/// Bytes of a response between two decisions. A client that reads nothing takes fewer than two such steps, all of them
/// in buffers.
const STEP: usize = 128 * 1024;

/// A client is fast if it has taken a step in this time.
const FAST: Nanos = SECOND;

/// The window of one connection.
#[derive(Debug, Default)]
pub(super) struct ReceiveWindow {
    is_wide: bool,
    /// Bytes read in this step.
    read: usize,
    /// When the step began; 0 in the first one, whose time does not count.
    since: Nanos,
}

impl ReceiveWindow {
    /// A response begins. Returns the size that the window must have now, if that is another one.
    pub(super) fn begin(&mut self) -> Option<usize> {
        let was_wide = self.is_wide;
        *self = ReceiveWindow::default();
        was_wide.then_some(NARROW)
    }

    /// Counts `n` bytes that were read, as fast as the client takes them. Returns the size that the window must have
    /// now, if that is another one.
    #[inline]
    pub(super) fn took(&mut self, n: usize) -> Option<usize> {
        self.read += n;
        if self.read < STEP { None } else { self.end_step(clock::now()) }
    }

    #[cold]
    fn end_step(&mut self, now: Nanos) -> Option<usize> {
        let is_fast = now - self.since < FAST && self.since > 0;
        let has_changed = is_fast != self.is_wide;
        *self = ReceiveWindow { is_wide: is_fast, read: 0, since: now };
        has_changed.then_some(if is_fast { WIDE } else { NARROW })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_is_wide_while_the_client_is_fast() {
        let mut window = ReceiveWindow::default();
        let mut step = |at| {
            window.read = STEP;
            window.end_step(at)
        };
        assert_eq!(step(7 * SECOND), None, "the first step fills buffers");
        assert_eq!(step(8 * SECOND - 1), Some(WIDE));
        assert_eq!(step(8 * SECOND), None);
        assert_eq!(step(9 * SECOND), Some(NARROW), "the client has become slow");
        assert_eq!(step(9 * SECOND + 1), Some(WIDE));
        assert_eq!(window.begin(), Some(NARROW), "the next client may be slow");
        assert_eq!(window.begin(), None);
        assert_eq!((window.took(STEP - 1), window.since), (None, 0));
    }
}
