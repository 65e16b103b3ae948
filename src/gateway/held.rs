//! The beginning of a stream, which is held back until its first content.

use bytes::Bytes;
use smallvec::SmallVec;

use crate::time::Nanos;

/// The whole events that are held back.
pub(super) struct Held {
    parts: SmallVec<[Bytes; 2]>,
    /// Their length, in bytes.
    pub(super) length: usize,
    /// When the first byte came; `Nanos::MAX` before that.
    pub(super) since: Nanos,
}

impl Default for Held {
    fn default() -> Self {
        Held { parts: SmallVec::new(), length: 0, since: Nanos::MAX }
    }
}

impl Held {
    pub(super) fn push(&mut self, data: Bytes) {
        if !data.is_empty() {
            self.length += data.len();
            self.parts.push(data);
        }
    }

    /// All of them; `None` if there are none.
    pub(super) fn finish(mut self) -> Option<Bytes> {
        match self.parts.len() {
            0 | 1 => self.parts.pop(),
            _ => Some(self.parts.concat().into()),
        }
    }
}
