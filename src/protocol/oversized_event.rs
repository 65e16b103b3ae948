//! An event that is too long to be held back: it goes out in pieces, and is read as they pass.

use std::sync::LazyLock;

use memchr::memchr;
use memchr::memmem::{Finder, find};

use crate::protocol::body_usage::BodyUsage;
use crate::protocol::endpoint::StreamFormat;
use crate::protocol::event_class::{Class, read_event};
use crate::protocol::event_lines::{LOOK_BACK, end_of_event, is_line_end};
use crate::protocol::usage::UsageParts;

/// Bytes of the event in which a word across two pieces is found.
const TAIL: usize = 64;

static FINISH: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("\"finish_reason\""));

/// An event that goes out in pieces.
#[derive(Debug)]
pub(crate) struct OversizedEvent {
    is_text: bool,
    /// Whether the event may have a reason why the model has stopped.
    may_finish: bool,
    class: Class,
    usage: BodyUsage,
    text: u64,
    has_reason: bool,
    /// The last bytes.
    tail: Vec<u8>,
}

impl OversizedEvent {
    /// Starts with the beginning of the event.
    pub(crate) fn new(format: StreamFormat, beginning: &[u8]) -> Self {
        let name = name_of(beginning);
        // A response stands within its event, and so does the message at its start.
        let is_inside = match format {
            StreamFormat::Responses => true,
            StreamFormat::Messages => name == b"message_start",
            StreamFormat::Done | StreamFormat::Plain => false,
        };
        let objects = if is_inside { 2 } else { 1 };
        let mut event = OversizedEvent {
            // Such an event of another endpoint repeats the whole answer, or is no text.
            is_text: format == StreamFormat::Done
                || format == StreamFormat::Messages && name == b"content_block_delta",
            may_finish: format == StreamFormat::Done,
            class: classify_beginning(format, name),
            usage: BodyUsage::at_depth(objects),
            text: 0,
            has_reason: false,
            tail: Vec::new(),
        };
        // The reader of the usage begins at the object of the data.
        let data = find(beginning, b"data:").unwrap_or(0);
        let object = memchr(b'{', &beginning[data..]).map_or(beginning.len(), |at| data + at);
        event.read(&beginning[object..]);
        event
    }

    /// Reads the next piece. Returns where the event ends in it; `None` if the event goes on.
    pub(crate) fn push(&mut self, data: &[u8]) -> Option<usize> {
        let known = self.tail.len().min(LOOK_BACK);
        let joined = [&self.tail[self.tail.len() - known..], data].concat();
        // An end that the former piece had begun may lie before this one.
        let end = end_of_event(&joined, 0).map(|end| end.saturating_sub(known));
        self.read(&data[..end.unwrap_or(data.len())]);
        end
    }

    /// The length of its text so far, in bytes.
    pub(crate) fn text(&self) -> u64 {
        self.text
    }

    /// Ends the event. Returns its class, and the token counts in it.
    pub(crate) fn finish(self) -> (Class, Option<UsageParts>) {
        let class = if self.has_reason { Class::Finish } else { self.class };
        (class, self.usage.finish_parts())
    }

    fn read(&mut self, data: &[u8]) {
        self.usage.push(data);
        self.tail.extend_from_slice(data);
        if self.is_text {
            self.text += data.len() as u64;
        }
        if self.may_finish {
            self.has_reason |= has_reason(&self.tail);
        }
        let keep = self.tail.len().saturating_sub(TAIL);
        self.tail.drain(..keep);
        self.tail.shrink_to(2 * TAIL);
    }
}

/// Whether a text has the key `finish_reason` with a reason: neither null nor an empty text.
fn has_reason(text: &[u8]) -> bool {
    FINISH.find_iter(text).any(|at| {
        let rest = text[at + FINISH.needle().len()..].trim_ascii_start().strip_prefix(b":");
        let value = rest.map(<[u8]>::trim_ascii_start).unwrap_or_default();
        // A value at the end of what is known is read again with the next piece.
        value.len() >= b"null".len() && !value.starts_with(b"null") && !value.starts_with(b"\"\"")
    })
}

/// Classifies an event by its name, since it is too long to be held.
fn classify_beginning(format: StreamFormat, name: &[u8]) -> Class {
    match format {
        StreamFormat::Done | StreamFormat::Plain => Class::Content,
        StreamFormat::Messages | StreamFormat::Responses => {
            read_event(format, &[b"event: ", name, b"\ndata: {}"].concat()).class
        }
    }
}

/// The name of an event by its beginning: the type stands there as the name of the event, or as the first member of its
/// data.
fn name_of(beginning: &[u8]) -> &[u8] {
    let line_end = |text: &[u8]| text.iter().position(|b| is_line_end(*b)).unwrap_or(text.len());
    let begins = beginning.iter().position(|b| !is_line_end(*b)).unwrap_or(0);
    let line = &beginning[begins..];
    let line = &line[..line_end(line)];
    match line.strip_prefix(b"event:") {
        Some(name) => name.trim_ascii(),
        None => {
            let kind = line.strip_prefix(b"data:").map(<[u8]>::trim_ascii_start);
            let kind = kind.and_then(|data| data.strip_prefix(b"{")).map(<[u8]>::trim_ascii_start);
            let kind = kind.and_then(|data| data.strip_prefix(b"\"type\"")).map(<[u8]>::trim_ascii_start);
            let kind = kind.and_then(|data| data.strip_prefix(b":")).map(<[u8]>::trim_ascii_start);
            let kind = kind.and_then(|data| data.strip_prefix(b"\"")).unwrap_or_default();
            &kind[..memchr(b'"', kind).unwrap_or(0)]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endless_event_takes_bounded_memory_and_ends_at_its_empty_line() {
        use StreamFormat::{Done, Messages, Plain, Responses};
        for format in [Done, Messages, Plain, Responses] {
            let mut event = OversizedEvent::new(format, &[b"data: {\"x\":\"", &[b'y'; 70_000][..]].concat());
            for _ in 0..100 {
                assert_eq!(event.push(&[b'y'; 10_000]), None);
                assert!(event.tail.capacity() <= 2 * TAIL, "{} bytes are kept", event.tail.capacity());
            }
            assert_eq!((event.push(b"\"}\n"), event.push(b"\ndata: z")), (None, Some(1)));
            assert_eq!(event.finish(), (Class::Content, None));
        }
    }

    #[test]
    fn a_reason_is_found_across_pieces() {
        let text = "data: {\"choices\":[{\"finish_reason\" : \"length\",\"x\":\"y\"}]}\n\n";
        for (text, class) in
            [(text.to_owned(), Class::Finish), (text.replace("\"length\"", "null"), Class::Content)]
        {
            for cut in 0..text.len() {
                let mut event = OversizedEvent::new(StreamFormat::Done, &text.as_bytes()[..cut]);
                let end = event.push(&text.as_bytes()[cut..]);
                assert_eq!((end, event.finish().0), (Some(text.len() - cut), class), "{cut}");
            }
        }
    }
}
