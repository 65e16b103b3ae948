//! Tracks the position in an event stream (WHATWG HTML, section 9.2): inside or between events, before or after
//! `data: [DONE]`. The result does not depend on the chunking.

use memchr::{memchr, memchr_iter};

/// The data that ends a stream of chat or text completions.
const DONE: &[u8] = b"[DONE]";

/// Length of the shortest line with [`DONE`], its line end included.
const DONE_LINE: usize = b"data:[DONE]\n".len();

/// Number of last bytes kept: more than a line with [`DONE`] and the end of the line before it.
const KEPT: usize = 24;

/// The last bytes of a stream, and whether it has sent [`DONE`].
#[derive(Debug, Default)]
pub(crate) struct Tail {
    bytes: [u8; KEPT],
    len: usize,
    /// Whether the search for [`DONE`] is over: found, or not wanted.
    is_search_over: bool,
    done: bool,
}

impl Tail {
    /// Starts a stream. `has_done`: whether to search for `[DONE]`. The search costs CPU time.
    pub(crate) fn new(has_done: bool) -> Self {
        Tail { is_search_over: !has_done, ..Tail::default() }
    }

    /// Reads the next chunk of the stream.
    pub(crate) fn push(&mut self, data: &[u8]) {
        if !self.is_search_over {
            self.done = self.finds_done(data);
            self.is_search_over = self.done;
        }
        if data.len() >= KEPT {
            self.bytes.copy_from_slice(&data[data.len() - KEPT..]);
            self.len = KEPT;
            return;
        }
        let keep = self.len.min(KEPT - data.len());
        self.bytes.copy_within(self.len - keep..self.len, 0);
        self.bytes[keep..keep + data.len()].copy_from_slice(data);
        self.len = keep + data.len();
    }

    /// Whether a new event may begin here.
    pub(crate) fn is_between_events(&self) -> bool {
        let tail = self.get();
        tail.is_empty() || [&b"\n\n"[..], b"\r\n\r\n", b"\r\r"].iter().any(|end| tail.ends_with(end))
    }

    /// Whether the stream, if it ends here, has sent `[DONE]`. Data after `[DONE]` is ignored.
    pub(crate) fn has_done(&self) -> bool {
        self.done || has_done_line(self.get(), self.len < KEPT, true)
    }

    fn get(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// Whether a line with [`DONE`] ends in `data`.
    fn finds_done(&self, data: &[u8]) -> bool {
        let begins_line = self.get().last().is_none_or(|b| is_line_end(*b));
        if !begins_line && self.done_across(data) {
            return true;
        }
        match memchr(b'\n', data) {
            // Most chunks are one event. Then only the first line can have `[DONE]`, within its first bytes.
            Some(at) if data.len() - at <= DONE_LINE => {
                let first = &data[..data.len().min(KEPT)];
                begins_line && first.starts_with(b"data:") && has_done_line(first, true, false)
            }
            _ => has_done_line(data, begins_line, false),
        }
    }

    /// Whether a line with [`DONE`] began before `data` and ends in it.
    fn done_across(&self, data: &[u8]) -> bool {
        let mut both = [0; 2 * KEPT];
        let head = &data[..data.len().min(KEPT)];
        both[..self.len].copy_from_slice(self.get());
        both[self.len..self.len + head.len()].copy_from_slice(head);
        has_done_line(&both[..self.len + head.len()], self.len < KEPT, false)
    }
}

fn is_line_end(b: u8) -> bool {
    matches!(b, b'\n' | b'\r')
}

/// Whether `text` has a line with [`DONE`]. `begins_line`: whether a line begins at the start of `text`. `ends`:
/// whether a line ends at the end of `text`.
fn has_done_line(text: &[u8], begins_line: bool, ends: bool) -> bool {
    // `D` is rare in a stream, so that a search for this byte is the cheapest.
    let starts = memchr_iter(b'D', text).filter_map(|at| at.checked_sub(1));
    starts.filter(|at| text[*at..].starts_with(DONE)).any(|at| {
        let before = &text[..at];
        let field = before.strip_suffix(b" ").unwrap_or(before).strip_suffix(b"data:");
        let begins = field.is_some_and(|f| f.last().map_or(begins_line, |b| is_line_end(*b)));
        begins && text.get(at + DONE.len()).map_or(ends, |b| is_line_end(*b) || *b == b' ')
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tail(pieces: &[&[u8]]) -> Tail {
        let mut tail = Tail::new(true);
        pieces.iter().for_each(|p| tail.push(p));
        tail
    }

    #[test]
    fn finds_event_ends_and_done() {
        for (pieces, between, done) in [
            (&[][..], true, false),
            (&["data: a\n\n"], true, false),
            (&["data: a\r\n", "\r\n"], true, false),
            (&["data: a\n"], false, false),
            (&["data: {\"x\""], false, false),
            (&["data: [DONE]\n\n"], true, true),
            (&["data: [DO", "NE]", "\n", "\n"], true, true),
            (&["data: a long enough event to push all else out\n\ndata: [DONE]"], false, true),
            (&["data: [DONE]\n\n", ": and a comment that is long enough\n\n"], true, true),
            (&["data: a\n\ndata: [DONE]\n\n: and a comment that is long enough\n\n"], true, true),
            (&["data: a\r\rdata:[DONE]\r\r: and a comment that is long enough\r\r"], true, true),
            (&["data: [DONE]  \n\n", ": and a comment that is long enough\n\n"], true, true),
            (&["data: [DONE]", "x: and a comment that is long enough\n\n"], true, false),
            (&["data: {\"x\":\"data: [DONE]\"}\n\n"], true, false),
            (&[": data: [DONE]\n\n"], true, false),
            (&["dat", "a: [DONE", "d]\n\n"], true, false),
            (&["id: 1\ndata: [DONE]\n\nid: 2\ndata: a long enough event\n\n"], true, true),
        ] {
            let pieces: Vec<_> = pieces.iter().map(|p| p.as_bytes()).collect();
            let tail = tail(&pieces);
            assert_eq!((tail.is_between_events(), tail.has_done()), (between, done), "{pieces:?}");
        }
    }

    proptest! {
        #[test]
        fn the_result_does_not_depend_on_the_chunking(
            lines in prop::collection::vec("(data:|data: |: |x|)(\\[DONE\\]|\\[DON|a|a{40})?( |x)?", 0..7),
            end in prop::sample::select(vec!["\n", "\r\n", "\r"]),
            is_whole in any::<bool>(),
            cuts in prop::collection::vec(1usize..20, 1..6),
        ) {
            let mut text = lines.join(end);
            if is_whole {
                text += end;
            }
            let is_done = |line: &str| {
                let value = line.strip_prefix("data:").map(|v| v.strip_prefix(' ').unwrap_or(v));
                value.is_some_and(|v| v.strip_prefix("[DONE]").is_some_and(|v| v.is_empty() || v.starts_with(' ')))
            };
            let (mut rest, mut cut, mut cuts) = (text.as_bytes(), Tail::new(true), cuts.iter().cycle());
            while !rest.is_empty() {
                let (piece, more) = rest.split_at(rest.len().min(*cuts.next().unwrap()));
                cut.push(piece);
                rest = more;
            }
            let whole = tail(&[text.as_bytes()]);
            prop_assert_eq!(whole.has_done(), lines.iter().any(|l| is_done(l)), "{:?}", text);
            prop_assert_eq!(cut.has_done(), whole.has_done(), "{:?}", text);
            prop_assert_eq!(cut.is_between_events(), whole.is_between_events(), "{:?}", text);
        }
    }
}
