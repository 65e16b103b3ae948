//! Follows an event stream as it passes: cuts it at the ends of events, and tells what its events say.
//!
//! An unfinished event is held back, since no parser can use half an event. So what goes out ends with an event, and
//! an event of Zap's own may follow at any time. What was pushed goes out unchanged and in order. The verdict does not
//! depend on the chunking.
//!
//! The token counts of the answer are read, and the length of its text. Once there is content, an event of a
//! [shape](crate::protocol::event_shape) that is known is not parsed.

use std::ops::Range;
use std::sync::LazyLock;

use bytes::{Bytes, BytesMut};
use memchr::memmem::Finder;
use memchr::memrchr2;
use smallvec::SmallVec;

use crate::protocol::body_usage::BodyUsage;
use crate::protocol::endpoint::StreamFormat;
use crate::protocol::event_class::{Class, error_body, read_event};
use crate::protocol::event_shape::{Shape, null_usage};
use crate::protocol::usage::Usage;

/// Longest unfinished event that is held back, in bytes. A longer one goes out in pieces.
pub(crate) const MAX_HELD: usize = 64 * 1024;

/// Bytes of an event that must be known to find its end across two chunks.
const LOOK_BACK: usize = 2;

/// Bytes of an event that is too long to be held, in which a word across two chunks is found.
const OVERSIZED_LOOK_BACK: usize = 64;

/// U+FEFF, which may begin a stream.
const BOM: &[u8] = b"\xEF\xBB\xBF";

static FINISH: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("\"finish_reason\""));

/// Parts of the stream that must not go out.
type Cuts = SmallVec<[Range<usize>; 4]>;

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
    /// An unfinished event that is too long to be held.
    oversized: Option<Oversized>,
    shape: Shape,
    /// Whether Zap has asked for the token counts, so that they must not go out.
    hides_usage: bool,
    /// Whether a line feed that follows must not go out, since it belongs to an event that did not.
    hides_feed: bool,
    usage: Option<Usage>,
    text: u64,
    is_begun: bool,
    has_events: bool,
    has_content: bool,
    is_finished: bool,
    end: Option<StreamEnd>,
    early_error: Option<EarlyError>,
}

/// An event that goes out in pieces.
#[derive(Debug)]
struct Oversized {
    class: Class,
    usage: BodyUsage,
}

impl EventStream {
    /// Starts a stream. `hides_usage`: Zap has asked for the token counts, so they do not go out.
    pub(crate) fn new(format: StreamFormat, hides_usage: bool) -> Self {
        EventStream {
            format,
            partial: Vec::new(),
            oversized: None,
            shape: Shape::default(),
            hides_usage,
            hides_feed: false,
            usage: None,
            text: 0,
            is_begun: false,
            has_events: false,
            has_content: false,
            is_finished: false,
            end: None,
            early_error: None,
        }
    }

    /// Reads the next chunk. Returns what may go out: the bytes up to the end of the last whole event, without the token
    /// counts that Zap has asked for.
    pub(crate) fn push(&mut self, data: Bytes) -> Bytes {
        if self.oversized.is_some() {
            return self.push_oversized(data);
        }
        if self.partial.is_empty() {
            let end = end_of_last_event(&data, 0);
            if end == data.len() {
                return self.pass(data);
            }
            self.partial = data[end..].to_vec();
            let whole = self.pass(data.slice(..end));
            return self.released(whole);
        }
        let from = self.partial.len().saturating_sub(LOOK_BACK);
        self.partial.extend_from_slice(&data);
        let end = end_of_last_event(&self.partial, from);
        if end == 0 {
            return self.released(Bytes::new());
        }
        let rest = self.partial.split_off(end);
        let whole = std::mem::replace(&mut self.partial, rest);
        let whole = self.pass(whole.into());
        self.released(whole)
    }

    /// Ends the stream at the end of its body. Returns the bytes that were held back. They count as an event.
    pub(crate) fn finish(&mut self) -> Bytes {
        if self.oversized.is_some() {
            self.end_oversized(b"");
            return Bytes::new();
        }
        let rest = std::mem::take(&mut self.partial);
        self.pass(rest.into())
    }

    /// The token counts that have come last.
    pub(crate) fn usage(&self) -> Option<Usage> {
        self.usage
    }

    /// The length of the answer's text so far, in bytes.
    pub(crate) fn text(&self) -> u64 {
        self.text
    }

    /// Whether parts of the stream do not go out.
    pub(crate) fn hides_usage(&self) -> bool {
        self.hides_usage
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
        let class = classify_beginning(self.format, &self.partial);
        // A response stands within its event.
        let objects = if self.format == StreamFormat::Responses { 2 } else { 1 };
        self.oversized = Some(Oversized { class, usage: BodyUsage::at_depth(objects) });
        let beginning = std::mem::take(&mut self.partial);
        // The reader begins at the object of the data.
        let object = memchr::memmem::find(&beginning, b"data:").unwrap_or(0);
        let object = memchr::memchr(b'{', &beginning[object..]).map_or(beginning.len(), |at| object + at);
        self.read_oversized(&beginning[object..]);
        [&out[..], &beginning].concat().into()
    }

    /// Passes an event on that is too long to be held, up to its end.
    fn push_oversized(&mut self, data: Bytes) -> Bytes {
        let known = self.partial.len().min(LOOK_BACK);
        let joined = [&self.partial[self.partial.len() - known..], &data].concat();
        let Some(end) = end_of_event(&joined, 0) else {
            self.read_oversized(&data);
            return data;
        };
        // An end that the former chunk had begun may lie before this one.
        let end = end.saturating_sub(known);
        self.end_oversized(&data[..end]);
        let rest = self.push(data.slice(end..));
        match rest.is_empty() {
            true => data.slice(..end),
            false if self.partial.is_empty() && !self.hides_usage => data,
            false => [&data[..end], &rest].concat().into(),
        }
    }

    /// Reads a part of an event that is too long to be held.
    fn read_oversized(&mut self, data: &[u8]) {
        let Some(oversized) = &mut self.oversized else { return };
        oversized.usage.push(data);
        // Such an event of `/v1/responses` repeats the whole answer.
        if self.format == StreamFormat::Done {
            self.text += data.len() as u64;
        }
        self.partial.extend_from_slice(data);
        self.is_finished |= self.format == StreamFormat::Done && has_reason(&self.partial);
        let keep = self.partial.len().saturating_sub(OVERSIZED_LOOK_BACK);
        self.partial.drain(..keep);
        self.partial.shrink_to(2 * OVERSIZED_LOOK_BACK);
    }

    /// Reads the last part of an event that is too long to be held.
    fn end_oversized(&mut self, data: &[u8]) {
        self.read_oversized(data);
        self.partial = Vec::new();
        let Some(Oversized { class, usage }) = self.oversized.take() else { return };
        self.usage = usage.finish().or(self.usage);
        self.note(class, b"");
    }

    /// Reads whole events. Returns what may go out of them.
    fn pass(&mut self, events: Bytes) -> Bytes {
        let cuts = self.read(&events);
        if cuts.is_empty() {
            return events;
        }
        let mut out = BytesMut::with_capacity(events.len());
        let mut from = 0;
        for cut in cuts {
            out.extend_from_slice(&events[from..cut.start]);
            from = cut.end;
        }
        out.extend_from_slice(&events[from..]);
        out.freeze()
    }

    /// Reads whole events. Returns the parts that must not go out.
    fn read(&mut self, events: &[u8]) -> Cuts {
        let (mut at, mut cuts) = (0, Cuts::new());
        if events.is_empty() {
            return cuts;
        }
        if !std::mem::replace(&mut self.is_begun, true) && events.starts_with(BOM) {
            at = BOM.len();
        }
        if std::mem::take(&mut self.hides_feed) && events.starts_with(b"\n") {
            cuts.push(0..1);
            at = 1;
        }
        // Behind an error, only what Zap has asked for is still looked for.
        while at < events.len() && (self.end.is_none() || self.hides_usage) {
            let rest = &events[at..];
            let may_be_known = self.has_content && self.end.is_none();
            let known = if may_be_known { self.shape.find(rest) } else { None };
            let (start, end, cut) = match known {
                Some(known) => {
                    self.text += known.text;
                    (0, known.length, known.cut)
                }
                None => {
                    let start = rest.iter().position(|b| !is_line_end(*b)).unwrap_or(rest.len());
                    let end = end_of_event(rest, start).unwrap_or(rest.len());
                    (start, end, if start < end { self.parse(&rest[start..end]) } else { None })
                }
            };
            cuts.extend(cut.map(|cut| at + start + cut.start..at + start + cut.end));
            at += end;
        }
        // The line feed of the last line end may still come.
        self.hides_feed = events.ends_with(b"\r") && cuts.last().is_some_and(|cut| cut.end == events.len());
        cuts
    }

    /// Reads an event with a parser. Returns the part of it that must not go out.
    fn parse(&mut self, event: &[u8]) -> Option<Range<usize>> {
        let said = read_event(self.format, event);
        self.usage = said.usage.or(self.usage);
        if self.end.is_some() {
            return (said.class == Class::Usage).then_some(0..event.len());
        }
        self.text += said.text;
        let cut = match said.class {
            _ if !self.hides_usage => None,
            Class::Usage => Some(0..event.len()),
            _ => null_usage(event),
        };
        self.note(said.class, event);
        if said.class == Class::Content && said.usage.is_none() && said.is_json {
            self.shape.learn(self.format, event, said.text, cut.clone());
        }
        cut
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

/// Whether a text has the key `finish_reason` with a reason: neither null nor an empty text.
fn has_reason(text: &[u8]) -> bool {
    FINISH.find_iter(text).any(|at| {
        let rest = text[at + FINISH.needle().len()..].trim_ascii_start().strip_prefix(b":");
        let value = rest.map(<[u8]>::trim_ascii_start).unwrap_or_default();
        // A value at the end of what is known is read again with the next piece.
        value.len() >= b"null".len() && !value.starts_with(b"null") && !value.starts_with(b"\"\"")
    })
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
    read_event(format, &[b"event: ", name, b"\ndata: {}"].concat()).class
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
pub(crate) fn end_of_event(text: &[u8], from: usize) -> Option<usize> {
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
        let mut stream = EventStream::new(format, false);
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

    /// A stream of an answer in chunks of random shapes, and the same stream as a provider sends it that was asked for the
    /// token counts.
    fn random_streams(rng: &mut fastrand::Rng) -> (String, String) {
        let (mut plain, mut asked) = (String::new(), String::new());
        let end = ["\n\n", "\r\n\r\n", "\r\r"][rng.usize(..3)];
        let (space, place) = (["", " "][rng.usize(..2)], rng.usize(..3));
        let varies = [rng.bool(), rng.bool()];
        for i in 0..rng.usize(..30) {
            let text: String = (0..rng.usize(..8))
                .map(|_| ["a", "\\\"", "é", "\\n", "{", "usage", "\\\\"][rng.usize(..7)])
                .collect();
            let delta = match rng.usize(..12) {
                0 => "{}".to_owned(),
                1 => format!(
                    "{{\"tool_calls\":[{{\"index\":{},\"function\":{{\"arguments\":\"{text}\"}}}}]}}",
                    rng.u8(..3)
                ),
                _ => format!("{{\"content\":\"{text}\"}}"),
            };
            let id = if varies[0] { i } else { 0 };
            let more = if varies[1] {
                format!(",\"obfuscation\":\"{}\"", "x".repeat(rng.usize(..9)))
            } else {
                String::new()
            };
            let finish = if rng.u8(..20) == 0 { "\"stop\"" } else { "null" };
            let parts = [
                format!("\"id\":\"c{id}\",\"created\":{}", 1000 + i),
                format!("\"choices\":{space}[{{\"delta\":{delta},\"finish_reason\":{finish}}}]"),
                format!("\"model\":\"m\"{more}"),
            ];
            plain += &format!("data: {{{}}}{end}", parts.join(","));
            let null = format!("\"usage\":{space}null");
            let mut asked_parts: Vec<&str> = parts.iter().map(String::as_str).collect();
            asked_parts.insert(place, &null);
            asked += &format!("data: {{{}}}{end}", asked_parts.join(","));
        }
        asked += &format!(
            "data: {{\"id\":\"c\",\"choices\":[],\"usage\":{{\"prompt_tokens\":3,\"completion_tokens\":4}}}}{end}"
        );
        for text in [&mut plain, &mut asked] {
            *text += &format!("data: [DONE]{end}");
        }
        (plain, asked)
    }

    fn pieces(rng: &mut fastrand::Rng, text: &str) -> Vec<Bytes> {
        let (mut rest, mut pieces) = (text.as_bytes(), Vec::new());
        let most = [1, 20, 300, 5000][rng.usize(..4)];
        while !rest.is_empty() {
            let (piece, more) = rest.split_at(rng.usize(1..=most).min(rest.len()));
            pieces.push(Bytes::copy_from_slice(piece));
            rest = more;
        }
        pieces
    }

    #[test]
    fn the_client_gets_the_same_bytes_whether_or_not_zap_asks_for_the_token_counts() {
        let mut rng = fastrand::Rng::with_seed(17);
        for round in 0..10_000 {
            let (plain, asked) = random_streams(&mut rng);
            let said = |text: &str, hides: bool, rng: &mut fastrand::Rng| {
                let mut stream = EventStream::new(StreamFormat::Done, hides);
                let mut out: Vec<u8> =
                    pieces(rng, text).into_iter().flat_map(|piece| stream.push(piece)).collect();
                out.extend_from_slice(&stream.finish());
                let verdict = (stream.has_content(), stream.end(), stream.is_whole(), stream.text());
                (String::from_utf8(out).unwrap(), verdict, stream.usage())
            };
            let (out, verdict, usage) = said(&asked, true, &mut rng);
            assert_eq!(out, plain, "round {round}: {asked}");
            assert_eq!(usage.map(|usage| (usage.input, usage.output)), Some((3, 4)));
            assert_eq!(said(&plain, false, &mut rng), (plain.clone(), verdict, None), "round {round}");
            assert_eq!(said(&asked, false, &mut rng), (asked, verdict, usage), "round {round}");
        }
    }

    #[test]
    fn an_event_of_a_known_shape_counts_its_text_and_any_other_is_parsed() {
        let event = |text: &str| {
            format!("data: {{\"n\":1,\"choices\":[{{\"delta\":{{\"content\":\"{text}\"}}}}]}}\n\n")
        };
        let (stream, _) =
            run(StreamFormat::Done, &[&event("one"), &event("three"), &event("a\\\"b"), &event("")]);
        assert_eq!(stream.text(), 3 + 5 + 3);
        let mut shape = stream.shape;
        let known = event("four").into_bytes();
        assert_eq!(shape.find(&known).map(|found| (found.length, found.text)), Some((known.len(), 4)));
        for other in [
            event("x").replace("\"n\":1", "\"n\":2"),
            event("x").replace("}]", ",\"finish_reason\":\"stop\"}]"),
            event("a\nb"),
            event("x\",\"y\":\""),
            event("x").trim_end().to_owned(),
            STOP.to_owned(),
        ] {
            assert_eq!(shape.find(other.as_bytes()), None, "{other}");
        }
    }

    #[test]
    fn an_event_that_is_too_long_to_be_held_keeps_its_reason_and_its_token_counts() {
        let text = "y".repeat(2 * MAX_HELD);
        let long = format!(
            "data: {{\"choices\":[{{\"message\":{{\"content\":\"{text}\"}},\"finish_reason\":\"stop\"}}]}}\n\n"
        );
        for cut in 0..40 {
            let (head, tail) = long.split_at(long.len() - cut);
            let (mut stream, out) = run(StreamFormat::Done, &[head, tail]);
            assert_eq!((out.len() + stream.finish().len(), stream.is_whole()), (long.len(), true), "{cut}");
        }
        let (stream, _) = run(StreamFormat::Done, &[&long.replace("\"stop\"", "null")]);
        assert!(!stream.is_whole());
        let told = "\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":9}";
        let chat = long.replace("]}\n\n", &format!("],{told}}}\n\n"));
        let image = format!("event: x\ndata: {{\"b64_json\":\"{text}\",{told}}}\n\n");
        let response = format!(
            "event: response.completed\ndata: {{\"type\":\"response.completed\",\"response\":{{\"instructions\":\"{text}\",{told},\"x\":{{}}}},\"y\":1}}\n\n"
        );
        for (format, event) in
            [(StreamFormat::Done, chat), (StreamFormat::Plain, image), (StreamFormat::Responses, response)]
        {
            for cut in [1, 10, 60, 100, MAX_HELD + 10] {
                let (head, tail) = event.split_at(event.len() - cut);
                let usage = run(format, &[head, tail]).0.usage();
                assert_eq!(usage.map(|usage| (usage.input, usage.output)), Some((7, 9)), "{format:?} {cut}");
            }
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
