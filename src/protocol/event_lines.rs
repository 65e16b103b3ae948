//! The ends of lines and events in an event stream (WHATWG HTML, section 9.2).

use memchr::{memchr2_iter, memrchr2};

/// Bytes of an event that must be known to find its end across two chunks.
pub(crate) const LOOK_BACK: usize = 2;

pub(crate) fn is_line_end(b: u8) -> bool {
    matches!(b, b'\n' | b'\r')
}

/// Whether an event ends with the line end at `at`: the line before it is empty. `\r\n` is one line end.
fn ends_event(text: &[u8], at: usize) -> bool {
    let before = match text[at] {
        b'\n' if text[..at].last() == Some(&b'\r') => &text[..at - 1],
        _ => &text[..at],
    };
    before.last().is_some_and(|b| is_line_end(*b))
}

/// The end of the first event that ends at or after `from`; `None` if none ends.
pub(crate) fn end_of_event(text: &[u8], from: usize) -> Option<usize> {
    let mut ends = memchr2_iter(b'\n', b'\r', &text[from..]).map(|at| from + at);
    let at = ends.find(|at| ends_event(text, *at))?;
    // A line feed behind a carriage return belongs to the same line end.
    let has_feed = text[at] == b'\r' && text.get(at + 1) == Some(&b'\n');
    Some(at + 1 + usize::from(has_feed))
}

/// The end of the last event that ends at or after `from`; 0 if none ends.
pub(crate) fn end_of_last_event(text: &[u8], from: usize) -> usize {
    if text[from..].ends_with(b"\n\n") {
        return text.len();
    }
    let mut end = text.len();
    while let Some(at) = memrchr2(b'\n', b'\r', &text[from..end]).map(|at| from + at) {
        if ends_event(text, at) {
            return at + 1;
        }
        end = at;
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_ends_with_an_empty_line_in_any_spelling() {
        for (text, first, last) in [
            ("a\n\nb\n\nc", Some(3), 6),
            ("a\r\n\r\nb", Some(5), 5),
            ("a\r\rb\r\r", Some(3), 6),
            ("a\n\r\nb", Some(4), 4),
            ("a\r\nb\n", None, 0),
            ("a\r\n\r", Some(4), 4),
            ("", None, 0),
        ] {
            assert_eq!(end_of_event(text.as_bytes(), 0), first, "{text:?}");
            assert_eq!(end_of_last_event(text.as_bytes(), 0), last, "{text:?}");
        }
    }
}
