//! The parts of a text that do not go out as they came.

use std::ops::Range;

use bytes::{Bytes, BytesMut};
use smallvec::SmallVec;

/// A part of a text that does not go out as it came.
#[derive(Debug)]
pub(crate) struct Edit {
    /// Where the part is.
    pub at: Range<usize>,
    /// What goes out in its place.
    pub with: Bytes,
}

impl Edit {
    /// Takes a part out.
    pub(crate) fn cut(at: Range<usize>) -> Self {
        Edit { at, with: Bytes::new() }
    }
}

/// Parts in their order; no two overlap.
pub(crate) type Edits = SmallVec<[Edit; 4]>;

/// Returns what goes out of `text`.
pub(crate) fn edited(text: Bytes, edits: Edits) -> Bytes {
    if edits.is_empty() {
        return text;
    }
    let mut out = BytesMut::with_capacity(text.len());
    let mut from = 0;
    for Edit { at, with } in edits {
        out.extend_from_slice(&text[from..at.start]);
        out.extend_from_slice(&with);
        from = at.end;
    }
    out.extend_from_slice(&text[from..]);
    out.freeze()
}
