//! Follows an event stream as it passes: cuts it at the ends of events, and tells what its events say.
//!
//! An unfinished event is held back, since no parser can use half an event. So what goes out ends with an event, and
//! an event of Zap's own may follow at any time. What was pushed goes out unchanged and in order. The verdict does not
//! depend on the chunking.
//!
//! A provider sends most events of a stream in chunks of whole events, and most of them say only that they are content.
//! Therefore, once there is content, only events with a telling word are parsed.

use std::sync::LazyLock;

use bytes::Bytes;
use memchr::memmem::Finder;
use memchr::{memchr2, memrchr2};

use crate::protocol::endpoint::StreamFormat;
use crate::protocol::event_class::{Class, classify, error_body};

/// Longest unfinished event that is held back, in bytes. A longer one goes out in pieces.
pub(crate) const MAX_HELD: usize = 64 * 1024;

/// Bytes of an event that must be known to find its end across two chunks.
const LOOK_BACK: usize = 2;

/// U+FEFF, which may begin a stream.
const BOM: &[u8] = b"\xEF\xBB\xBF";

static ERROR: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("error"));
static DONE: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("[DONE]"));
static FINISH: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("finish_reason"));
static COMPLETE: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("omplete"));
static FAILED: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(".failed"));

/// How a stream has ended, by its own word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StreamEnd {
    /// By its terminal event.
    Complete,
    /// By an error event.
    Error,
}

/// An error event that came before any content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EarlyError {
    /// The status that the error stands for.
    pub status: u16,
    /// The error as a JSON body.
    pub body: Vec<u8>,
}

/// The state of one stream.
#[derive(Debug)]
pub(crate) struct EventStream {
    format: StreamFormat,
    /// The unfinished event, or its last bytes if it is too long to be held.
    partial: Vec<u8>,
    /// The class of an unfinished event that is too long to be held.
    oversized: Option<Class>,
    is_begun: bool,
    has_events: bool,
    has_content: bool,
    is_finished: bool,
    end: Option<StreamEnd>,
    early_error: Option<EarlyError>,
}

impl EventStream {
    /// Starts a stream.
    pub(crate) fn new(format: StreamFormat) -> Self {
        EventStream {
            format,
            partial: Vec::new(),
            oversized: None,
            is_begun: false,
            has_events: false,
            has_content: false,
            is_finished: false,
            end: None,
            early_error: None,
        }
    }

    /// Reads the next chunk. Returns what may go out: the bytes up to the end of the last whole event.
    pub(crate) fn push(&mut self, data: Bytes) -> Bytes {
        if self.oversized.is_some() {
            return self.push_oversized(data);
        }
        if self.partial.is_empty() {
            let end = end_of_last_event(&data, 0);
            if end == data.len() {
                self.read(&data);
                return data;
            }
            self.partial = data[end..].to_vec();
            self.read(&data[..end]);
            return self.released(data.slice(..end));
        }
        let from = self.partial.len().saturating_sub(LOOK_BACK);
        self.partial.extend_from_slice(&data);
        let end = end_of_last_event(&self.partial, from);
        if end == 0 {
            return self.released(Bytes::new());
        }
        let rest = self.partial.split_off(end);
        let whole = std::mem::replace(&mut self.partial, rest);
        self.read(&whole);
        self.released(whole.into())
    }

    /// Ends the stream at the end of its body. Returns the bytes that were held back. They count as an event.
    pub(crate) fn finish(&mut self) -> Bytes {
        match self.oversized.take() {
            Some(class) => {
                self.partial.clear();
                self.note(class, b"");
                Bytes::new()
            }
            None => {
                let rest = std::mem::take(&mut self.partial);
                self.read(&rest);
                rest.into()
            }
        }
    }

    /// Whether a whole event has come. A comment is none.
    pub(crate) fn has_events(&self) -> bool {
        self.has_events
    }

    /// Whether a part of the answer has come.
    pub(crate) fn has_content(&self) -> bool {
        self.has_content
    }

    /// How the stream has ended by its own word. What comes later does not matter.
    pub(crate) fn end(&self) -> Option<StreamEnd> {
        self.end
    }

    /// Whether the answer is whole if the body ends here.
    pub(crate) fn is_whole(&self) -> bool {
        match self.format {
            StreamFormat::Plain => true,
            // Some providers never send `[DONE]`.
            StreamFormat::Done => self.end == Some(StreamEnd::Complete) || self.is_finished,
            StreamFormat::Responses => self.end == Some(StreamEnd::Complete),
        }
    }

    /// The error event, if it came before any content.
    pub(crate) fn take_early_error(&mut self) -> Option<EarlyError> {
        self.early_error.take()
    }

    /// Bytes that are held back.
    pub(crate) fn held(&self) -> usize {
        if self.oversized.is_some() { 0 } else { self.partial.len() }
    }

    /// Whether what has gone out ends with an event.
    pub(crate) fn is_between_events(&self) -> bool {
        self.oversized.is_none()
    }

    /// Adds the unfinished event to `out` if it is too long to be held.
    fn released(&mut self, out: Bytes) -> Bytes {
        if self.partial.len() <= MAX_HELD {
            return out;
        }
        self.oversized = Some(classify_beginning(self.format, &self.partial));
        let keep = self.partial[self.partial.len() - LOOK_BACK..].to_vec();
        let rest = std::mem::replace(&mut self.partial, keep);
        [&out[..], &rest].concat().into()
    }

    /// Passes an event on that is too long to be held, up to its end.
    fn push_oversized(&mut self, data: Bytes) -> Bytes {
        let known = self.partial.len();
        self.partial.extend_from_slice(&data);
        let Some(end) = end_of_event(&self.partial, known.saturating_sub(LOOK_BACK)) else {
            self.partial.drain(..self.partial.len() - LOOK_BACK);
            return data;
        };
        self.partial.clear();
        if let Some(class) = self.oversized.take() {
            self.note(class, b"");
        }
        // An end that the former chunk had begun may lie before this one.
        let end = end.saturating_sub(known);
        let rest = self.push(data.slice(end..));
        match rest.is_empty() {
            true => data.slice(..end),
            false if self.partial.is_empty() => data,
            false => [&data[..end], &rest].concat().into(),
        }
    }

    /// Reads whole events.
    fn read(&mut self, mut events: &[u8]) {
        if !events.is_empty() && !std::mem::replace(&mut self.is_begun, true) {
            events = events.strip_prefix(BOM).unwrap_or(events);
        }
        while !events.is_empty() && self.end.is_none() {
            let (start, end) = if self.has_content {
                let Some(at) = self.next_telling(events) else { return };
                (end_of_last_event(&events[..at], 0), end_of_event(events, at))
            } else {
                let start = events.iter().position(|b| !is_line_end(*b)).unwrap_or(events.len());
                (start, end_of_event(events, start))
            };
            let end = end.unwrap_or(events.len());
            if start < end {
                self.note(classify(self.format, &events[start..end]), &events[start..end]);
            }
            events = &events[end..];
        }
    }

    fn note(&mut self, class: Class, event: &[u8]) {
        self.has_events |= class != Class::Prelude || has_data(event);
        match class {
            Class::Prelude | Class::Usage => {}
            Class::Content => self.has_content = true,
            Class::Finish => (self.has_content, self.is_finished) = (true, true),
            Class::Terminal => {
                self.end = Some(StreamEnd::Complete);
                // The terminal event of `/v1/responses` has the whole response in it.
                self.has_content |= self.format == StreamFormat::Responses;
            }
            Class::Error(status) => {
                self.end = Some(StreamEnd::Error);
                if !self.has_content {
                    self.early_error = Some(EarlyError { status, body: error_body(event) });
                }
            }
        }
    }

    /// The position of the first word in `events` that may make its event more than content.
    fn next_telling(&self, events: &[u8]) -> Option<usize> {
        let error = find(&ERROR, events, |at| is_error_word(events, at));
        let others = match self.format {
            StreamFormat::Plain => [None, None],
            StreamFormat::Done => {
                let is_told = |at: usize| !has_no_reason(&events[at..]);
                let finish = if self.is_finished { None } else { find(&FINISH, events, is_told) };
                // Most chunks are one event with an object for data.
                let line_end = memchr2(b'\n', b'\r', events);
                let is_one_object = events.starts_with(b"data: {") && line_end >= Some(events.len() - 2);
                [finish, if is_one_object { None } else { DONE.find(events) }]
            }
            StreamFormat::Responses => [COMPLETE.find(events), FAILED.find(events)],
        };
        error.into_iter().chain(others.into_iter().flatten()).min()
    }
}

/// Whether an event has data, so that it is more than a comment.
fn has_data(event: &[u8]) -> bool {
    event.split(|b| is_line_end(*b)).any(|line| line.starts_with(b"data"))
}

/// Whether a body that begins with this is an event stream, whatever its content type says.
pub(crate) fn is_event_stream(beginning: &[u8]) -> bool {
    let text = beginning.strip_prefix(BOM).unwrap_or(beginning);
    [&b"data:"[..], b"event:", b"id:", b"retry:", b":"].iter().any(|field| text.starts_with(field))
}

/// The first position of a word for which `is_told` is true.
fn find(word: &Finder<'_>, text: &[u8], is_told: impl Fn(usize) -> bool) -> Option<usize> {
    let mut from = 0;
    loop {
        let at = from + word.find(&text[from..])?;
        if is_told(at) {
            return Some(at);
        }
        from = at + 1;
    }
}

/// Whether the word `error` at this position may be a key or the name of an event.
fn is_error_word(text: &[u8], at: usize) -> bool {
    match (text[..at].last(), text.get(at + b"error".len())) {
        (Some(b'"'), Some(b'"')) => true,
        (Some(b':' | b' '), after) => after.is_none_or(|b| is_line_end(*b)),
        _ => false,
    }
}

/// Whether `finish_reason` at the beginning of this text is a key without a reason: null, or an empty text.
fn has_no_reason(text: &[u8]) -> bool {
    let rest = text[b"finish_reason".len()..].strip_prefix(b"\"").map(<[u8]>::trim_ascii_start);
    let value = rest.and_then(|rest| rest.strip_prefix(b":")).map(<[u8]>::trim_ascii_start);
    value.is_some_and(|value| value.starts_with(b"null") || value.starts_with(b"\"\""))
}

/// Classifies an event by its beginning, since it is too long to be held.
fn classify_beginning(format: StreamFormat, beginning: &[u8]) -> Class {
    if format != StreamFormat::Responses {
        return Class::Content;
    }
    // The type stands at the beginning: as the name of the event, or as the first member of its data.
    let line_end = |text: &[u8]| text.iter().position(|b| is_line_end(*b)).unwrap_or(text.len());
    let begins = beginning.iter().position(|b| !is_line_end(*b)).unwrap_or(0);
    let line = &beginning[begins..];
    let line = &line[..line_end(line)];
    let name = match line.strip_prefix(b"event:") {
        Some(name) => name.trim_ascii(),
        None => {
            let kind = line.strip_prefix(b"data:").map(<[u8]>::trim_ascii_start);
            let kind = kind.and_then(|data| data.strip_prefix(b"{")).map(<[u8]>::trim_ascii_start);
            let kind = kind.and_then(|data| data.strip_prefix(b"\"type\"")).map(<[u8]>::trim_ascii_start);
            let kind = kind.and_then(|data| data.strip_prefix(b":")).map(<[u8]>::trim_ascii_start);
            let kind = kind.and_then(|data| data.strip_prefix(b"\"")).unwrap_or_default();
            &kind[..memchr::memchr(b'"', kind).unwrap_or(0)]
        }
    };
    classify(format, &[b"event: ", name, b"\ndata: {}"].concat())
}

fn is_line_end(b: u8) -> bool {
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
fn end_of_event(text: &[u8], from: usize) -> Option<usize> {
    let mut ends = memchr::memchr2_iter(b'\n', b'\r', &text[from..]).map(|at| from + at);
    let at = ends.find(|at| ends_event(text, *at))?;
    // A line feed behind a carriage return belongs to the same line end.
    let has_feed = text[at] == b'\r' && text.get(at + 1) == Some(&b'\n');
    Some(at + 1 + usize::from(has_feed))
}

/// The end of the last event that ends at or after `from`; 0 if none ends.
fn end_of_last_event(text: &[u8], from: usize) -> usize {
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

    /// What a stream says, and what went out before its end.
    fn run(format: StreamFormat, pieces: &[&str]) -> (EventStream, String) {
        let mut stream = EventStream::new(format);
        let mut out = Vec::new();
        for piece in pieces {
            out.extend_from_slice(&stream.push(Bytes::copy_from_slice(piece.as_bytes())));
        }
        (stream, String::from_utf8(out).unwrap())
    }

    const ROLE: &str =
        "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\"},\"finish_reason\":null}]}\n\n";
    const TEXT: &str =
        "data: {\"choices\":[{\"delta\":{\"content\":\"an error\"},\"finish_reason\":null}]}\n\n";
    const STOP: &str = "data: {\"choices\":[{\"delta\":{},\"finish_reason\": \"stop\"}]}\n\n";
    const ERROR: &str = "data: {\"error\":{\"code\":503}}\n\n";
    const DONE: &str = "data: [DONE]\n\n";

    #[test]
    fn tells_what_a_stream_says() {
        use StreamEnd::{Complete, Error};
        for (pieces, has_content, end, is_whole) in [
            (&[][..], false, None, false),
            (&[ROLE], false, None, false),
            (&[ROLE, TEXT], true, None, false),
            (&[ROLE, TEXT, STOP], true, None, true),
            (&[TEXT, DONE], true, Some(Complete), true),
            (&[DONE], false, Some(Complete), true),
            (&[TEXT, DONE, ERROR], true, Some(Complete), true),
            (&[ROLE, ERROR], false, Some(Error), false),
            (&[TEXT, ERROR, DONE], true, Some(Error), false),
            (&[TEXT, "event: error\ndata: x\n\n"], true, Some(Error), false),
            (&[TEXT, "data: {}\r\rdata: [DONE]\n\n"], true, Some(Complete), true),
            (&["\u{FEFF}data: [DONE]\n\n"], false, Some(Complete), true),
            (&["\n\r\n", TEXT, "data: [DONE]\r\r"], true, Some(Complete), true),
        ] {
            let (stream, out) = run(StreamFormat::Done, pieces);
            assert_eq!(
                (stream.has_content(), stream.end(), stream.is_whole()),
                (has_content, end, is_whole),
                "{pieces:?}"
            );
            assert_eq!(out, pieces.concat());
        }
        let (mut stream, _) = run(StreamFormat::Done, &[ROLE, ERROR]);
        let error = stream.take_early_error().unwrap();
        assert_eq!((error.status, &error.body[..]), (503, &b"{\"error\":{\"code\":503}}"[..]));
        assert_eq!(run(StreamFormat::Done, &[TEXT, ERROR]).0.take_early_error(), None);
    }

    #[test]
    fn an_unfinished_event_is_held_back_until_the_end() {
        let (mut stream, out) = run(StreamFormat::Done, &[TEXT, "data: [DO", "NE]", "\n"]);
        assert_eq!((&*out, stream.held(), stream.end()), (TEXT, 13, None));
        assert_eq!(
            (stream.finish(), stream.end()),
            (Bytes::from("data: [DONE]\n"), Some(StreamEnd::Complete))
        );
    }

    #[test]
    fn an_event_that_is_too_long_goes_out_in_pieces_and_keeps_its_class() {
        for (name, end) in [
            ("event: response.completed\ndata: {", Some(StreamEnd::Complete)),
            ("data: {\"type\":\"response.completed\",", Some(StreamEnd::Complete)),
            ("data: {\"type\":\"response.output_item.done\",", None),
        ] {
            let long = format!("{name}\"x\":\"{}\"}}", "y".repeat(3 * MAX_HELD));
            let (head, tail) = long.split_at(2 * MAX_HELD);
            let (mut stream, out) = run(StreamFormat::Responses, &[head, tail]);
            assert_eq!((out.len(), stream.end(), stream.is_between_events()), (long.len(), None, false));
            assert_eq!(stream.push(Bytes::from_static(b"\n")), "\n");
            assert_eq!(stream.push(Bytes::from_static(b"\n: x")), "\n");
            assert_eq!((stream.end(), stream.has_content(), stream.held()), (end, true, 3), "{name}");
            assert!(stream.partial.capacity() < 100, "the long event is not kept");
        }
    }

    #[test]
    fn a_byte_at_a_time_gives_the_same_verdict() {
        for text in
            [[ROLE, TEXT, STOP, DONE].concat(), [ROLE, ERROR].concat(), ["\r\n", TEXT, ": x\r\r"].concat()]
        {
            let bytes: Vec<&str> = (0..text.len()).map(|i| &text[i..=i]).collect();
            let ((one, out), (whole, _)) =
                (run(StreamFormat::Done, &bytes), run(StreamFormat::Done, &[&text]));
            assert_eq!(out, text);
            assert_eq!(
                (one.has_content, one.is_finished, one.end, &one.early_error),
                (whole.has_content, whole.is_finished, whole.end, &whole.early_error)
            );
        }
    }
}
